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
    """Return scopes for a table of this kind; of an FDB without an owner, as ``Kernel`` has it."""
    if kind not in _KINDS:
        return list(scopes)
    owner = "plain" if strict else "all"
    found = []
    for one in scopes:
        fdb = getattr(one, "kind", "") in _KINDS
        found.append(one._replace(kind=kind, owner=one.owner or owner) if fdb else one)
    return found


def needs_any(table: Table, scopes: Sequence[Scope], *, strict: bool) -> bool:
    """Return whether a table of kind "fdb" is to be compared with more than it could hold."""
    if table.kind != "fdb":
        return False
    if strict and table_has_lists(table):
        return True
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
