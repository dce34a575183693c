"""Lease objects whose values no lease can have: those that a program made, and not a decoder."""

from __future__ import annotations

from typing import Any

import msgspec

from flannel_dp.cluster.lease import BackendData, BadClaim, Lease, LeaseList, split_leases

_STRUCTS = ("backend_data", "backend_v6_data")


def check_forms(leases: list[Lease] | LeaseList) -> LeaseList:
    """Tell leases from objects that are none, or with values that no lease can have: a number for
    an address, half a character in a name, a negative revision. Each becomes a BadClaim, which
    names the field; the others are returned unchanged."""
    listed, bad = split_leases(leases)
    good: list[Lease] = []
    found = [*bad]
    for place, lease in enumerate(listed):
        if fault := _fault(lease, Lease):
            found.append(BadClaim(_label(lease, place), "bad-claim", fault))
        else:
            good.append(lease)
    return LeaseList(good, found)


def _fault(value: Any, kind: type[msgspec.Struct]) -> str:
    """Return what is wrong with a struct of this kind, "" for nothing."""
    if not isinstance(value, kind):
        return f"{_shown(value)} is no {kind.__name__}"
    for field in msgspec.structs.fields(kind):
        held = getattr(value, field.name)
        if isinstance(held, BackendData):
            fault = _fault(held, BackendData)
            if fault:
                return f"{field.name}.{fault}"
            continue
        if field.name in _STRUCTS and held is not None:
            return f"{field.name} is {_shown(held)}, no BackendData"
        try:
            msgspec.convert(held, field.type)
            if isinstance(held, str):
                held.encode()
        except (msgspec.ValidationError, UnicodeEncodeError) as error:
            return f"{field.name} is {_shown(held)}: {error}"
    return ""


def _label(lease: Any, place: int) -> str:
    """Return the lease's name, or its place in the list."""
    for name in ("name", "subnet", "ipv6_subnet", "public_ip", "public_ipv6"):
        text = getattr(lease, name, "")
        if isinstance(text, str) and text:
            return text.encode("utf-8", "replace").decode()
    return f"lease {place}"


def _shown(value: Any) -> str:
    try:
        return repr(value)[:80].encode("utf-8", "backslashreplace").decode()
    except Exception:  # of a stranger's __repr__
        return f"a {type(value).__name__}"
