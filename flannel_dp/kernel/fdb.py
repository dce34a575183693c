"""What a comparison of an FDB needs to know beside its table: whose entries are, and what the
vxlan device itself stands for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flannel_dp._core import Table, fdb_devices, settle_fdb, table_has_lists, widen
from flannel_dp.errors import ConfigError
from flannel_dp.kernel.netns import NetNS
from flannel_dp.tables.entries import Scope

_KINDS = ("fdb", "fdb_any")
_SOURCE, _NO_VLAN = 2, 4  # of fdb_devices


def scopes_of(kind: str, scopes: Iterable[Scope], *, strict: bool) -> list[Scope]:
    """Return scopes for a table of this kind; of an FDB without an owner, as ``Kernel`` has it.
    Dumps that were read ahead are known by their scope, which stays as it is unless ``strict``."""
    if kind not in _KINDS:
        return list(scopes)
    owner = "plain" if strict else ""
    found = []
    for one in scopes:
        fdb = getattr(one, "kind", "") in _KINDS
        found.append(one._replace(kind=kind, owner=one.owner or owner) if fdb else one)
    return found


def prepared(
    table: Table, scopes: Sequence[Scope], netns: NetNS, *, strict: bool
) -> tuple[Table, list[Scope]]:
    """Return an FDB table and scopes of its kind as they are compared: one of kind "fdb" in the
    other kind, where that could not hold what it is compared with. Raises as ``settle``."""
    if _are_wide(scopes) or (strict and table.kind == "fdb" and table_has_lists(table)):
        table = as_any(table)
    if table.kind == "fdb_any":
        table = settle(table, netns)
    return table, scopes_of(table.kind, scopes, strict=strict)


def to_read(kind: str, scopes: Sequence[Scope], *, strict: bool) -> tuple[str, list[Scope]]:
    """Return the kind of FDB table that scopes are to be read into, and scopes of that kind."""
    kind = "fdb_any" if _are_wide(scopes) else kind
    return kind, scopes_of(kind, scopes, strict=strict)


def _are_wide(scopes: Sequence[Scope]) -> bool:
    of_fdb = [one for one in scopes if getattr(one, "kind", "") in _KINDS]
    return any(one.side != "self" or one.ids != (0, 0xFFFFFFFF) for one in of_fdb)


def as_any(table: Table) -> Table:
    return widen(table) if table.kind == "fdb" else table


def settle(table: Table, netns: NetNS) -> Table:
    """Return an fdb_any table without what the kernel leaves out: a device's own VNI and port.

    Raises ConfigError for what it would make something else of: source VNIs on a device that
    has one VNI, whose entries could be neither used nor removed, and entries without a VLAN
    for a port that has some, of which it makes one for each.
    """
    named = fdb_devices(table)
    if not named:
        return table
    from flannel_dp.kernel.bridge import BridgeReader

    with BridgeReader(netns) as reader:
        for device, bits in named.items():
            link = reader.link(device)
            if link is None:
                continue  # the kernel says that there is none
            if bits & _NO_VLAN and (vlans := reader.vlans(device)):
                raise ConfigError(
                    f"{link.name} is a port of VLANs ({_few(vlans)}), and of an entry without a "
                    "VLAN the kernel makes one for each of them",
                    hint="vlan: give an entry for each VLAN",
                )
            if link.vxlan is None:
                continue
            if bits & _SOURCE and not link.vxlan.collect_metadata:
                raise ConfigError(
                    f"{link.name} has the VNI {link.vxlan.vni} alone, so that its entries are for "
                    "no other one",
                    hint="leave out src_vni, or make the device with 'external vnifilter'",
                )
            vni = 0 if link.vxlan.collect_metadata else link.vxlan.vni
            table = settle_fdb(table, device, vni, link.vxlan.port)
    return table


def _few(vlans: list[int]) -> str:
    return ", ".join(map(str, vlans[:5])) + (", ..." if len(vlans) > 5 else "")
