"""``flannel-dp show --watch`` beside whoever works on the node."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.dataplane import DataPlane
from flannel_dp.look.drift_viewer import DriftViewer
from tests.lib import programs
from tests.lib.leases import DEVICE, lease_of, mac, network_config, peers, plane, subnet
from tests.lib.waiting import LIMIT

ELSEWHERE = {4: "192.0.2.77", 6: "2001:db8::77"}


@pytest.fixture
def dataplane(host: Any, family: int) -> Iterator[DataPlane]:
    """A node of twenty peers."""
    with plane(host, family) as made:
        made.sync([lease_of(host), *peers(range(1, 21))])
        yield made


def test_what_happens_is_told(host: Any, family: int, dataplane: DataPlane) -> None:
    device = DEVICE[family]
    with plane(host, family) as other, DriftViewer(other) as viewer:
        overview = viewer.read()
        assert len(overview.families[0].peers) == 20

        host.ip(f"-{family} route del {subnet(family, 3)}")
        host.bridge(f"fdb del {mac(family, 4)} dev {device}")
        host.ip(f"link set {device} mtu 1300")
        told = viewer.events(5.0)

        said = {(one.table, one.change, one.what.split()[0]) for one in told}
        assert ("route", "deleted", subnet(family, 3)) in said
        assert ("fdb", "deleted", mac(family, 4)) in said
        assert ("device", "link", device) in said
        assert all(one.family in (0, family) for one in told)


def test_it_writes_nothing(host: Any, family: int, dataplane: DataPlane) -> None:
    with plane(host, family) as other, DriftViewer(other) as viewer:
        viewer.read()
        host.ip(f"-{family} route del {subnet(family, 3)}")
        viewer.events(5.0)
        viewer.read()

        assert other.kernel.channel.messages_sent == 0
        assert dataplane.resync().tables["route"]["added"] == 1


def test_events_that_waited_are_told_one_by_one_in_their_order(
    host: Any, family: int, dataplane: DataPlane
) -> None:
    device, number = DEVICE[family], mac(family, 4)
    with plane(host, family) as other, DriftViewer(other) as viewer:
        viewer.read()
        dataplane.clean(keep_device=True)
        dataplane.sync([lease_of(host), *peers(range(1, 21))])
        host.bridge(f"fdb del {number} dev {device}")
        dataplane.resync()
        told = [
            (one.time, one.table, one.change, one.what.split()[0]) for one in viewer.events(LIMIT)
        ]

    assert [time for time, *_ in told] == sorted(time for time, *_ in told)
    for table, key in (
        ("route", subnet(family, 3)),
        ("neighbour", subnet(family, 3).partition("/")[0]),
        ("fdb", mac(family, 3)),
    ):
        assert [what for _, *what in told if what[0] == table and what[2] == key] == [
            [table, change, key] for change in ("deleted", "added")
        ]
    assert [tuple(what[1:]) for _, *what in told[-2:]] == [("deleted", number), ("added", number)]
    tables = 4 if family == 4 else 3  # nexthops
    assert len(told) == 2 * 20 * tables + 2


def test_routes_that_went_with_their_nexthop_are_told(
    host: Any, family: int, dataplane: DataPlane
) -> None:
    """The kernel has no event for IPv4 routes; IPv6 routes have a gateway of their own."""
    with plane(host, family) as other, DriftViewer(other) as viewer:
        via = viewer.read().families[0].peers[2].via
        gone = f"route del {subnet(family, 3)}"
        for one in host.ip_json(f"-{family} nexthop show"):
            if one.get("gateway") == via:
                gone = f"nexthop del id {one['id']}"
        assert gone.startswith("nexthop") == (family == 4)
        host.ip(f"-{family} {gone}")
        dataplane.resync()
        told = [(one.change, one.what) for one in viewer.events(LIMIT) if one.table == "route"]

    assert [(change, what.split()[0]) for change, what in told] == [
        ("deleted", subnet(family, 3)),
        ("added", subnet(family, 3)),
    ]


def test_the_command(
    host: Any, family: int, dataplane: DataPlane, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    config = network_config(family)
    document: dict[str, Any] = {"Backend": {"Type": "vxlan"}, "EnableIPv4": family == 4}
    document["EnableIPv6"] = family == 6
    document["Network" if family == 4 else "IPv6Network"] = str(
        config.network if family == 4 else config.ipv6_network
    )
    (tmp_path / "net-conf.json").write_text(json.dumps(document))
    command = [sys.executable, "-m", "flannel_dp", "show", "--watch", "--netns", host.ns]
    command += ["--net-conf", str(tmp_path / "net-conf.json"), "--iface", "eth0"]
    for more in ([], ["--output", "json"]):
        out = tmp_path / "out"
        with out.open("w") as file:
            process = programs.Popen([*command, *more], stdout=file, stderr=file)
        try:
            wait_until(lambda out=out: subnet(family, 20) in out.read_text())
            host.ip(f"-{family} route del {subnet(family, 5)}")
            wait_until(lambda out=out: '"deleted"' in (t := out.read_text()) or " deleted " in t)
            process.send_signal(2)
            assert process.wait(LIMIT) == 0
        finally:
            process.kill()
            process.wait()
        lines = out.read_text().splitlines()
        if more:
            events = [json.loads(line).get("event") for line in lines]
            assert any(one and one["what"].startswith(subnet(family, 5)) for one in events)
        else:
            assert f"change ipv{family} route deleted {subnet(family, 5)}" in lines[-1]
        dataplane.resync()


def test_an_entry_that_comes_back_is_told_each_time(
    host: Any, family: int, dataplane: DataPlane
) -> None:
    """What an agent repairs is seen as well as what was done before."""
    with plane(host, family) as other, DriftViewer(other) as viewer:
        viewer.read()
        for _ in range(2):
            host.ip(f"-{family} route del {subnet(family, 3)}")
            host.bridge(
                f"fdb replace {mac(family, 4)} dst {ELSEWHERE[family]} dev {DEVICE[family]}"
            )
            first = viewer.events(LIMIT)
            dataplane.resync()
            second = viewer.events(LIMIT)

            told = [
                {(one.table, one.change, one.what.split()[0]) for one in x} for x in (first, second)
            ]
            assert told[0] == {
                ("route", "deleted", subnet(family, 3)),
                ("fdb", "changed", mac(family, 4)),
            }
            assert told[1] == {
                ("route", "added", subnet(family, 3)),
                ("fdb", "changed", mac(family, 4)),
            }
