"""Entries as plain dicts: the words of ip and bridge for what the kernel tests do not meet."""

from __future__ import annotations

from typing import Any

import pytest

from flannel_dp import Fdb, Neighbour, Nexthop, Peer, Route, entry_dict
from flannel_dp.tables.entries import Entry

MAC = "02:00:00:00:00:07"


@pytest.mark.parametrize(
    ("entry", "shown"),
    [
        (
            Neighbour(2, "10.0.0.7", MAC, 0x04, "extern_learn"),
            {
                "dst": "10.0.0.7",
                "dev": "vx",
                "lladdr": MAC,
                "state": ["STALE"],
                "extern_learn": True,
            },
        ),
        (
            Fdb(2, MAC, "192.0.2.7", vni=5, port=99, via=3, state=0x42),
            {
                **{"mac": MAC, "ifname": "vx", "dst": "192.0.2.7", "port": 99, "vni": 5},
                **{"viaIf": "if3", "flags": ["self"], "state": "static"},
            },
        ),
        (
            Fdb(2, MAC, "", nexthop=7, state=0x02, other="extern_learn"),
            {
                **{"mac": MAC, "ifname": "vx", "nhid": 7, "flags": ["self", "extern_learn"]},
                "state": "",
            },
        ),
        (
            Nexthop(7, "", 0, False, 4, "blackhole"),
            {"id": 7, "protocol": "static", "flags": [], "blackhole": True},
        ),
        (
            Route("0.0.0.0/0", gateway="192.0.2.1", device=2, table=100, protocol=186, tos=16),
            {
                **{"dst": "default", "gateway": "192.0.2.1", "dev": "vx", "table": "100"},
                **{"protocol": "bgp", "tos": "0x10", "flags": []},
            },
        ),
        (
            Route("2001:db8::7/128", type=6, metric=7),
            {
                "type": "blackhole",
                "dst": "2001:db8::7",
                "protocol": "138",
                "metric": 7,
                "flags": [],
            },
        ),
        (Route("10.7.0.0/16", nexthop=7), {"dst": "10.7.0.0/16", "nhid": 7, "protocol": "138"}),
        (
            Peer("10.7.0.0/24", "192.0.2.7", MAC, 5),
            {"prefix": "10.7.0.0/24", "endpoint": "192.0.2.7", "mac": MAC, "map": 5},
        ),
    ],
    ids=str,
)
def test_an_entry_as_ip_shows_it(entry: Entry, shown: dict[str, Any]) -> None:
    assert entry_dict(entry, {2: "vx"}) == shown
