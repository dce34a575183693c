"""``flannel-dp show --watch`` beside whoever works on the node."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.dataplane import DataPlane
from flannel_dp.kernel.netns import netns_identity
from flannel_dp.look.drift_viewer import DriftViewer
from tests.lib import programs
from tests.lib.leases import DEVICE, lease_of, mac, network_config, peers, plane, subnet
from tests.lib.terminals import ENTER, LEAVE, Session
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


@pytest.fixture
def command(host: Any, family: int, dataplane: DataPlane, tmp_path: Path) -> list[str]:
    """``flannel-dp``, and flags of that node for what reads the kernel."""
    config = network_config(family)
    document: dict[str, Any] = {"Backend": {"Type": "vxlan"}, "EnableIPv4": family == 4}
    document["EnableIPv6"] = family == 6
    document["Network" if family == 4 else "IPv6Network"] = str(
        config.network if family == 4 else config.ipv6_network
    )
    (tmp_path / "net-conf.json").write_text(json.dumps(document))
    made = [sys.executable, "-m", "flannel_dp", "--netns", host.ns, "--iface", "eth0"]
    return [*made, "--net-conf", str(tmp_path / "net-conf.json")]


def test_into_a_pipe_goes_every_event_in_the_order_of_time(
    host: Any,
    family: int,
    dataplane: DataPlane,
    command: list[str],
    tmp_path: Path,
    wait_until: Callable[..., None],
) -> None:
    """A deletion, an agent's word that it has repaired it, and that the entry was added again."""
    history = tmp_path / f"{netns_identity(host.ns)[1]}-{DEVICE[family]}.history"
    history.touch()
    watch = [*command[:3], "show", "--watch", *command[3:], "--state-dir", str(tmp_path)]
    for more in ([], ["--output", "json"]):
        out = tmp_path / "out"
        with out.open("w") as file:
            process = programs.Popen([*watch, *more], stdout=file, stderr=file)
        try:
            wait_until(lambda out=out: subnet(family, 20) in out.read_text())
            host.ip(f"-{family} route del {subnet(family, 5)}")
            wait_until(lambda out=out: "deleted" in out.read_text())
            event = {"time": time.time(), "kind": "repaired", "family": family, "table": "route"}
            event |= {"change": "deleted", "after": f"route {subnet(family, 5)}"}
            with history.open("a") as file:
                file.write(json.dumps(event) + "\n")
            dataplane.resync()
            wait_until(lambda out=out: "added" in out.read_text())
            process.send_signal(2)
            assert process.wait(LIMIT) == 0
        finally:
            process.kill()
            process.wait()
        lines = [line for line in out.read_text().splitlines() if subnet(family, 5) in line]
        if more:
            documents = [one for one in map(json.loads, lines) if "event" in one]
            told = [(one["time"], one["event"]["change"]) for one in documents]
            kinds = ["deleted", "repaired", "added"]
        else:
            told = [(line[:24], line.split()[1]) for line in lines if line.startswith("2")]
            kinds = ["change", "drift", "change"]
            assert "deleted" in lines[-3]
            assert "added" in lines[-1]
        assert [kind for _, kind in told] == kinds
        assert told == sorted(told, key=lambda one: one[0])


def test_on_a_terminal_it_is_a_screen(host: Any, family: int, command: list[str]) -> None:
    watch = [*command[:3], "show", "--watch", *command[3:]]
    with Session(programs.Popen, watch) as it:
        it.until(lambda: "1-12 of 20" in "".join(it.shown()[-1:]))
        host.ip(f"-{family} route del {subnet(family, 5)}")
        it.until(lambda: any("change" in line and " deleted " in line for line in it.shown()))
        it.until(lambda: "19 peers, 19 tunnel" in it.shown()[1])
        it.type("G/")
        it.until(lambda: it.shown()[-1].startswith("/_"))
        it.type("\x1bq")
        assert it.wait() == 0
        assert it.raw.startswith(ENTER)
        assert it.raw.endswith(LEAVE)
    stats = [*command[:3], "stats", "--watch", *command[3:], "--interval", "0.1"]
    with Session(programs.Popen, stats) as it:
        it.until(lambda: f"{DEVICE[family]}: not counted" in "".join(it.shown()))
        it.type("\x03")
        assert it.wait() == 0
        assert it.raw.endswith(LEAVE)


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
