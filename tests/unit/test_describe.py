"""Entries in the words of ``ip``: where they lead, and which device they are on."""

from __future__ import annotations

import pytest

from flannel_dp.tables.describe import conflict_json, describe, device_of
from flannel_dp.tables.entries import BLACKHOLE, Entry, Fdb, Neighbour, Nexthop, Peer, Route

NAMES = {0: "flannel.1", 2: "eth0"}

PREFIX = {4: "10.244.7.0/24", 6: "fd00:10:244:7::/64"}


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(
    ("route", "text", "device"),
    [
        (Route("", gateway="G", device=2), "via G dev eth0", "eth0"),
        (Route("", gateway="G", device=0), "via G dev flannel.1", "flannel.1"),
        (Route("", gateway="G", device=9), "via G dev if9", "if9"),
        (Route("", nexthop=7), "nhid 7", ""),
        (Route("", type=BLACKHOLE, metric=4294901760), "blackhole metric 4294901760", ""),
        (
            Route("", type=BLACKHOLE, device=2, protocol=4),
            "blackhole dev eth0 proto static",
            "eth0",
        ),
        (Route("", type=7, protocol=3), "unreachable proto boot", ""),
        (Route("", type=99), "type 99", ""),
        (Route("", other="multipath", protocol=4), "multipath proto static", ""),
    ],
)
def test_a_route_leads_to_a_device_or_to_none(
    family: int, route: Route, text: str, device: str
) -> None:
    """A blackhole is on no device, and ifindex 0 is one that has yet to be made."""
    prefix = PREFIX[family]
    route = route._replace(prefix=prefix)

    assert describe(route, NAMES) == f"route {prefix} {text}"
    assert device_of(route, NAMES) == device


@pytest.mark.parametrize(
    ("entry", "device"),
    [
        (Neighbour(2, "10.244.7.0", "02:00:00:00:00:07"), "eth0"),
        (Fdb(0, "02:00:00:00:00:07", "192.0.2.7"), "flannel.1"),
        (Nexthop(7, "10.244.7.0", 0), "flannel.1"),
        (Peer("10.244.7.0/24", "192.0.2.7", "02:00:00:00:00:07", 5), ""),
    ],
)
def test_other_entries_have_the_device_that_they_are_on(entry: Entry, device: str) -> None:
    assert device_of(entry, NAMES) == device


def test_a_conflict_names_both_devices() -> None:
    wanted, foreign = Route("10.244.7.0/24", gateway="10.244.7.0"), Route("10.244.7.0/24", device=2)

    document = conflict_json(wanted, foreign, NAMES)

    assert (document["wanted_dev"], document["foreign_dev"]) == ("flannel.1", "eth0")
    assert (document["wanted"]["device"], document["foreign"]["device"]) == (0, 2)
