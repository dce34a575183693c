"""FDB entries in the forms that the kernel has: which tables hold them, which it can hold."""

from __future__ import annotations

from flannel_dp._core import Table, parse_mac
from flannel_dp.errors import ConfigError
from flannel_dp.tables.entries import NUD_PERMANENT, Fdb


def is_of_any_form(entry: Fdb) -> bool:
    """Return whether an entry is more than a table of kind "fdb" holds."""
    try:
        raw = parse_mac(entry.mac)
    except (TypeError, ValueError):
        from flannel_dp.tables.plain import mac_of

        try:
            raw = parse_mac(mac_of("mac", entry.mac))
        except ConfigError:
            return False  # for the table to say
    more = entry.src_vni or entry.other or entry.flags or entry.vlan or entry.master
    return bool(more or entry.state != NUD_PERMANENT or raw[0] & 1 or not any(raw))


def check_lists(table: Table) -> None:
    """Raise ConfigError for destinations of one MAC that the kernel cannot hold side by side."""
    seen: dict[tuple[int, str, int], Fdb] = {}
    for entry in table:
        if entry.master:
            continue
        first = seen.setdefault((entry.device, entry.mac, entry.src_vni), entry)
        same = (entry.state, entry.flags, entry.nexthop) == (
            first.state,
            first.flags,
            first.nexthop,
        )
        if not same:
            raise ConfigError(
                f"fdb {entry.mac} is given as {first} and as {entry}: the destinations of a MAC "
                "share state, flags and nexthop group",
                hint="give them the same state, flags and nexthop",
            )
