"""The documents that lists of leases come in: ours, etcdctl's and kubectl's.

A document is decoded twice at most: by a typed decoder that knows the usual
spelling and costs about a microsecond a lease, and, when that one objects to
anything, by a patient one that matches keys without case as Go does and sets
bad claims aside one by one. Lists of other programs are read by a module that is
loaded for them.
"""

# Annotations are types here, not text: msgspec would compile and evaluate the text of each.

import re

import msgspec

from flannel_dp.cluster.json_text import NOT_TYPED, read_json
from flannel_dp.cluster.lease import (
    ANNOTATION_PREFIX,
    Lease,
    LeaseList,
    annotation_keys_prefix,
)
from flannel_dp.errors import Unavailable, require


class _LeaseDocument(msgspec.Struct, forbid_unknown_fields=True):
    leases: list[Lease]
    schema: int = 1
    # What ``flannel-dp leases`` says of them besides.
    rejected: msgspec.Raw = msgspec.Raw(b"[]")
    own: msgspec.Raw = msgspec.Raw(b"null")
    notes: msgspec.Raw = msgspec.Raw(b"[]")


_list_decoder = msgspec.json.Decoder(_LeaseDocument)
_bare_decoder = msgspec.json.Decoder(list[Lease])

_FIRST_KEY = re.compile(rb'\s*(?:\[|\{\s*"([^"\\]{0,32})")')


def decode_leases(
    data: bytes, *, origin: str, annotation_prefix: str = ANNOTATION_PREFIX
) -> LeaseList:
    """Read a whole list of leases, in any of three forms, recognised by their content.

    - ours: ``{"leases": [{"Subnet": ..., "PublicIP": ...}]}`` or the list alone;
    - ``etcdctl get PREFIX/subnets --prefix -w json``; keys that are not
      ``.../subnets/KEY`` are ignored; no keys at all is an empty cluster, if the
      header has a revision;
    - ``kubectl get nodes -o json``; nodes without a pod CIDR, or not marked
      as flannel's by the kube-subnet-manager annotation, are ignored.

    A claim that cannot be read becomes a BadClaim, the others are returned
    all the same. A flannel node without IPv4 publishes PublicIP "0.0.0.0",
    which is read as none when there is no IPv4 subnet.

    Raises Unavailable, naming ``origin`` and where known line and column,
    when the document is not JSON, not complete or none of the three, when etcd's count
    contradicts its keys, and when there are leases and none can be read; and
    ConfigError for an ``annotation_prefix`` that cannot be one.
    """
    require(isinstance(data, (bytes, bytearray, str)), "data", data, "the bytes of a document")
    prefix = annotation_keys_prefix(annotation_prefix)
    try:
        claims = _decode_typed(data, origin, prefix)
    except NOT_TYPED:
        claims = None
    if claims is None:
        from flannel_dp.cluster.listings import HINT, decode_patiently

        document = read_json(data, origin, Unavailable, hint=HINT)
        claims = decode_patiently(document, origin, prefix)
    return readable(claims, origin)


def readable(claims: LeaseList, origin: str) -> LeaseList:
    """Return ``claims``. Raises Unavailable when there are some and not one is a lease: a
    list in which nothing is readable is not an empty cluster."""
    if claims.bad and not claims.leases:
        first, bad = claims.bad[0], len(claims.bad)
        which = "its only lease" if bad == 1 else f"none of its {bad} leases"
        done = "cannot be read:" if bad == 1 else "can be read; the first,"
        raise Unavailable(
            f"{origin}: {which} {done} {first.name}: {first.detail}",
            hint="check what writes them, and that the list was read with its values",
        )
    return claims


def _decode_typed(data: bytes, origin: str, prefix: str) -> LeaseList | None:
    """Return the usual spelling only; None or a decoder's error mean that it is another one."""
    start = _FIRST_KEY.match(data)
    first = start[1] if start else b""
    if start is None:
        return None
    if first in (None, b"leases", b"schema"):
        leases = _bare_decoder.decode(data) if first is None else _list_decoder.decode(data).leases
        if b'"0.0.0.0"' in data:
            leases = [_without_zero_address(lease) for lease in leases]
        return LeaseList(leases, [])
    from flannel_dp.cluster.listings import decode_listing

    return decode_listing(data, first, origin, prefix)


def _without_zero_address(lease: Lease) -> Lease:
    if lease.public_ip == "0.0.0.0" and not lease.subnet:
        return msgspec.structs.replace(lease, public_ip="")
    return lease
