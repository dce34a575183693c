"""Traffic counters as a user meets them: sync --counters, stats, explain, show, clean."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from flannel_dp import Counters, DataPlane, Lease, NetworkConfig, Unsupported
from flannel_dp._core import BpfMap
from flannel_dp.bpf import helper, loader, pins
from flannel_dp.command.cli import main
from flannel_dp.look.live_stats import StatsScreen, watch_stats
from flannel_dp.look.stats import StatsReader, stats
from flannel_dp.resources.counters.device import FILTER
from flannel_dp.resources.counters.traffic import Meter
from tests.lib.bpf import End, datagrams, tc
from tests.lib.hosts import Host
from tests.lib.leases import endpoint, lease_of, network_config, peer, peers
from tests.lib.waiting import wait_until

DEVICE = {4: "flannel.1", 6: "flannel-v6.1"}
SIZE = {4: 14 + 20 + 8 + 100, 6: 14 + 40 + 8 + 100}


class Node:
    """A node with its leases, and the end of the tunnel on it once it was synced."""

    def __init__(self, host: Host, family: int, folder: Path) -> None:
        self.host, self.family, self.folder = host, family, folder
        folder.mkdir()
        self.device = DEVICE[family]

    def write(self, leases: list[Any]) -> None:
        (self.folder / "leases.json").write_text(
            '{"leases": [' + ",".join(lease.to_json() for lease in leases) + "]}"
        )
        config: dict[str, Any] = {"Backend": {"Type": "vxlan"}}
        wanted = network_config(self.family)
        if self.family == 4:
            config["Network"] = str(wanted.network)
        else:
            config |= {"EnableIPv4": False, "EnableIPv6": True}
            config["IPv6Network"] = str(wanted.ipv6_network)
        (self.folder / "net-conf.json").write_text(json.dumps(config))

    def arguments(self, command: str, *more: str, leases: bool = True) -> list[str]:
        made = [command, *more, "--netns", self.host.ns, "--iface", "eth0", "--firewall", "none"]
        made += ["--net-conf", str(self.folder / "net-conf.json")]
        return made + (["--leases", str(self.folder / "leases.json")] if leases else [])

    def run(self, command: str, *more: str, leases: bool = True) -> int:
        return main(self.arguments(command, *more, leases=leases))

    @property
    def end(self) -> End:
        link = self.host.ip_json(f"addr show {self.device}")[0]
        (address,) = [one["local"] for one in link["addr_info"] if one["scope"] == "global"]
        return End(self.host, int(link["ifindex"]), link["address"], address)

    def filters(self) -> list[str]:
        return [
            parent
            for parent in ("ingress", "egress")
            if FILTER in tc(self.host, f"filter show dev {self.device} {parent}")
        ]


@pytest.fixture
def nodes(make_host: Callable[..., Host], family: int, tmp_path: Path) -> tuple[Node, Node]:
    """Two nodes of a cluster of six; what the first is told is up to the test."""
    made = [Node(make_host(), family, tmp_path / name) for name in ("left", "right")]
    leases = [lease_of(node.host, number) for number, node in enumerate(made, 1)]
    leases += peers(range(11, 15))
    for node in made:
        node.write(leases)
    assert made[1].run("sync", "--output", "json") == 0
    return made[0], made[1]


def told(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_sync_sets_up_and_stats_tells(
    nodes: tuple[Node, Node], family: int, capsys: pytest.CaptureFixture[str]
) -> None:
    left, right = nodes
    assert left.run("sync", "--counters", "--output", "json") == 0
    assert told(capsys)["counters"] == {left.device: "loaded"}
    datagrams(left.end, right.end, 12)
    datagrams(right.end, left.end, 3)

    assert left.run("stats", "--output", "json") == 0

    document = told(capsys)
    assert (document["schema"], document["seconds"]) == (1, None)
    (found,) = document["families"]
    assert (found["family"], found["device"], found["problem"]) == (family, left.device, "")
    assert len(found["peers"]) == 5
    (peer,) = [one for one in found["peers"] if one["mac"] == right.end.mac]
    assert peer["endpoint"] == right.host.underlay(family)
    assert peer["lease"]
    assert (peer["sent"]["packets"], peer["sent"]["bytes"]) == (12, 12 * SIZE[family])
    assert (peer["received"]["packets"], peer["received"]["bytes"]) == (3, 3 * SIZE[family])
    assert peer["received"]["last"] > 0
    others = [one for one in found["peers"] if one is not peer]
    assert {one["sent"]["packets"] for one in others} == {0}
    assert {one["received"]["last"] for one in others} == {None}

    assert left.run("stats", leases=False) == 0
    text = capsys.readouterr().out
    (line,) = [line for line in text.splitlines() if right.end.mac in line]
    words = line.split()
    assert words[1:4] == [right.host.underlay(family), right.end.mac, "12"]
    assert "LEASE" not in text
    assert "5 peers" in text


def test_a_second_sync_changes_nothing(
    nodes: tuple[Node, Node], capsys: pytest.CaptureFixture[str]
) -> None:
    left, _ = nodes
    assert left.run("sync", "--counters") == 0
    before = tc(left.host, f"filter show dev {left.device} egress")
    capsys.readouterr()

    assert left.run("sync", "--counters") == 0

    assert "in sync: nothing to change" in capsys.readouterr().out
    assert tc(left.host, f"filter show dev {left.device} egress") == before


def test_neither_flag_leaves_counters_alone_and_no_counters_removes_them(
    nodes: tuple[Node, Node], capsys: pytest.CaptureFixture[str]
) -> None:
    left, right = nodes
    left.run("sync", "--counters")
    datagrams(left.end, right.end, 2)
    assert left.run("sync") == 0
    assert left.filters() == ["ingress", "egress"]
    capsys.readouterr()

    assert left.run("sync", "--no-counters", "--output", "json") == 0

    assert told(capsys)["counters"] == {left.device: "removed"}
    assert left.filters() == []
    assert "clsact" not in tc(left.host, f"qdisc show dev {left.device}")
    assert not pins.pin_directory(left.device, left.host.ns).exists()
    assert left.run("sync", "--no-counters", "--output", "json") == 0
    assert told(capsys)["counters"] == {}
    assert left.run("stats", leases=False) == 0
    assert "not counted: 'flannel-dp sync --counters' starts counting" in capsys.readouterr().out


def test_the_environment_asks_for_counters_as_well(
    nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLANNELD_COUNTERS", "true")

    assert nodes[0].run("sync") == 0

    assert nodes[0].filters() == ["ingress", "egress"]


@pytest.mark.parametrize("keep", [True, False], ids=["keep-device", "all"])
def test_clean_removes_counters(nodes: tuple[Node, Node], keep: bool) -> None:
    left, _ = nodes
    left.run("sync", "--counters")

    assert left.run("clean", *["--keep-device"] * keep, leases=False) == 0

    assert not pins.pin_directory(left.device, left.host.ns).exists()
    if keep:
        assert left.filters() == []
        assert "clsact" not in tc(left.host, f"qdisc show dev {left.device}")


def test_without_bcc_everything_else_works(
    nodes: tuple[Node, Node],
    family: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    left, right = nodes
    monkeypatch.setattr(helper, "interpreters", lambda: [])

    assert left.run("sync", "--counters", "--output", "json") == 3

    report = told(capsys)
    (failure,) = report["failures"]
    assert failure["table"] == "counters"
    assert "install python3-bpfcc" in failure["detail"]
    assert report["tables"]["route"]["added"] == 5
    assert left.host.ping(right.end.address)


@pytest.mark.parametrize("which", ["map", "filter"])
def test_what_others_have_in_our_place_is_named_and_everything_else_works(
    nodes: tuple[Node, Node], which: str, capsys: pytest.CaptureFixture[str]
) -> None:
    left, right = nodes
    left.run("sync")
    if which == "map":
        directory = pins.pin_directory(left.device, left.host.ns, create=True)
        BpfMap.create(1, 4, 4, 8, name="theirs").pin(directory / "peers")
    else:
        tc(left.host, f"qdisc add dev {left.device} clsact")
        place = f"dev {left.device} egress prio 13801"
        tc(left.host, f"filter add {place} u32 match u32 0 0 classid 1:1")
    before = tc(left.host, f"filter show dev {left.device} egress")
    capsys.readouterr()

    assert left.run("sync", "--counters", "--output", "json") == 3

    (failure,) = told(capsys)["failures"]
    assert ("the map theirs" if which == "map" else "filter u32 has priority 13801") in failure[
        "detail"
    ]
    assert tc(left.host, f"filter show dev {left.device} egress") == before
    assert left.host.ping(right.end.address)


def test_explain_tells_of_a_peers_traffic_and_drops(
    nodes: tuple[Node, Node], family: int, capsys: pytest.CaptureFixture[str]
) -> None:
    left, right = nodes
    left.run("sync", "--counters")
    datagrams(left.end, right.end, 2)
    with right.end.socket(socket.SOCK_DGRAM) as udp:
        udp.sendto(b"x", (left.end.address, 4444))
    counters = Counters([left.device], left.host.ns)
    wait_until(lambda: any(d.mac == right.end.mac for d in counters.read()[left.device].drops))
    capsys.readouterr()

    assert left.run("explain", right.end.address, "--output", "json") == 0

    (step,) = [one for one in told(capsys)["steps"] if one["name"] == "traffic"]
    assert step["ok"] is True
    assert step["held"].startswith("sent 3 packets (")  # with "port unreachable"
    assert "s ago; received 1 packet (" in step["held"]
    assert "1 NO_SOCKET dropped received" in step["held"]


def test_stats_watch_has_rates(nodes: tuple[Node, Node], family: int) -> None:
    left, right = nodes
    left.run("sync", "--counters")
    turns = iter([lambda: datagrams(left.end, right.end, 9), lambda: None])

    def wait(_: float) -> bool:
        turn = next(turns, None)
        if turn is not None:
            turn()
        return turn is None

    out = io.StringIO()
    with plane(left) as dataplane:
        watch_stats(StatsReader(dataplane).read, wait, as_json=True, file=out)

    first, second = [json.loads(line) for line in out.getvalue().splitlines()]
    assert first["seconds"] > 0
    rates = [
        one["sent"]["packet_rate"]
        for document in (first, second)
        for one in document["families"][0]["peers"]
        if one["mac"] == right.end.mac
    ]
    assert rates[0] == pytest.approx(9 / first["seconds"], rel=0.01)
    assert rates[1] == 0

    with plane(left) as dataplane:
        reader = StatsReader(dataplane)
        reader.read()
        datagrams(left.end, right.end, 2)
        found = reader.read()
    view = StatsScreen()
    view.take(found)
    _, titles, busiest, _, foot = [text for text, _ in view.render(200, 5)]
    assert "SENT BIT/S" in titles
    assert right.end.mac in busiest
    assert foot.endswith(("1-1 of 5", "1-2 of 5"))  # multicast of IPv6 may be among the drops


def plane(node: Node, **options: Any) -> DataPlane:
    config = NetworkConfig.from_file(str(node.folder / "net-conf.json"))
    return DataPlane(config, iface="eth0", netns=node.host.ns, **options)


def test_show_watch_has_rates(nodes: tuple[Node, Node], family: int) -> None:
    left, right = nodes
    left.run("sync", "--counters")
    with plane(left) as dataplane:
        meter = Meter(dataplane.counting.read)
        assert meter.rates() == {}
        datagrams(left.end, right.end, 2)
        meter.rates()
        datagrams(left.end, right.end, 2)
        rates = meter.rates()

    assert rates is not None
    sent, received = rates[right.end.mac, family]
    assert sent > 0
    assert received == 0


def test_a_lease_that_is_gone_stays_in_the_statistics(
    nodes: tuple[Node, Node], family: int
) -> None:
    left, right = nodes
    left.run("sync", "--counters")
    datagrams(left.end, right.end, 2)
    left.write([lease_of(left.host, 1), *peers(range(11, 15))])
    assert left.run("sync") == 0

    with plane(left) as dataplane:
        (found,) = stats(dataplane).families

    (peer,) = [one for one in found.peers if one.mac == right.end.mac]
    assert (peer.subnet, peer.sent.packets) == ("", 2)


def test_detached_filters_are_a_problem_of_stats(nodes: tuple[Node, Node]) -> None:
    left, _ = nodes
    left.run("sync", "--counters")
    tc(left.host, f"filter del dev {left.device} egress")

    with plane(left) as dataplane:
        (found,) = stats(dataplane).families

    assert found.problem.startswith("the filter is detached from egress")


def test_host_gw_has_nothing_to_count(host: Host, family: int) -> None:
    config = network_config(family, Type="host-gw")
    nothing = {"backend_data": None, "backend_v6_data": None}

    with DataPlane(config, iface="eth0", netns=host.ns, counters=True) as dataplane:
        report = dataplane.sync([replace(lease_of(host), backend_type="host-gw", **nothing)])
        (found,) = stats(dataplane).families

    assert isinstance(report.problems["counters"], Unsupported)
    assert found.problem == "host-gw has no vxlan device: nothing is counted"


def test_as_a_library(nodes: tuple[Node, Node], family: int) -> None:
    left, right = nodes
    left.run("sync")
    counters = Counters([left.device, "not-there"], netns=left.host.ns)

    assert counters.ensure() == {left.device: "loaded"}
    datagrams(left.end, right.end, 4)
    reading = counters.read()[left.device]

    assert [(*entry[:3], entry[3].packets) for entry in reading if entry[0] == right.end.mac] == [
        (right.end.mac, family, "sent", 4)
    ]
    assert counters.remove() == (left.device,)
    assert counters.read() == {}


def test_ten_thousand_peers(host: Host, family: int) -> None:
    """A frame to each of 10,000 peers, counted to the packet; more peers than there is room
    for are counted together."""
    count = 10_000
    document = {
        4: {"Network": "10.64.0.0/10"},
        6: {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fd00:10::/32"},
    }[family] | {"Backend": {"Type": "vxlan"}}
    config = NetworkConfig.from_json(json.dumps(document))
    leases = [_numbered(0, host)] + [_numbered(number) for number in range(1, count + 1)]
    with DataPlane(config, iface="eth0", netns=host.ns, counters=True) as dataplane:
        assert dataplane.sync(leases).ok

        def send_to_all() -> tuple[dict[str, int], int]:
            send = sys.executable, "-c", _SEND_TO_ALL, _FIRST[family], str(_STEP[family])
            host.exec(*send, str(count))
            (found,) = stats(dataplane).families
            sent = {one.mac: one.sent.packets for one in found.peers if one.sent.packets}
            return sent, (found.overflow or {})["sent"]

        for turn in range(1, 6):
            # The kernel may have no memory at hand for a peer's first packet, on a busy machine.
            first, overflow = send_to_all()
            assert sum(first.values()) + overflow == turn * count
            if len(first) == count:
                break
        second, none_since = send_to_all()

    assert len(first) == count
    assert second == {mac: packets + 1 for mac, packets in first.items()}
    assert none_since == overflow


_SEND_TO_ALL = """
import ipaddress, socket, sys
first, step, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
start = ipaddress.ip_address(first)
family = socket.AF_INET if start.version == 4 else socket.AF_INET6
with socket.socket(family, socket.SOCK_DGRAM) as udp:
    for number in range(count):
        udp.sendto(b"x", (str(start + number * step), 9))
"""


_FIRST = {4: "10.64.1.1", 6: "fd00:10:0:1::1"}
_STEP = {4: 1 << 8, 6: 1 << 64}


def _numbered(number: int, host: Host | None = None) -> Lease:
    """Node ``number`` of a cluster larger than those of tests.lib.leases."""
    return peer(
        number,
        subnet=f"10.{64 + (number >> 8)}.{number & 255}.0/24",
        ipv6_subnet=f"fd00:10:0:{number:x}::/64",
        public_ip=host.ipv4 if host else endpoint(4, number),
        public_ipv6=host.ipv6 if host else endpoint(6, number),
    )


def test_a_process_without_a_compiler_reads(nodes: tuple[Node, Node]) -> None:
    """Reading takes no bcc and loads neither pyroute2 nor a compiler."""
    left, right = nodes
    left.run("sync", "--counters")
    datagrams(left.end, right.end, 2)
    script = (
        "import sys; from flannel_dp.command.cli import main; code = main(sys.argv[1:]); "
        "print(code, 'pyroute2' in sys.modules, 'bcc' in sys.modules)"
    )

    done = subprocess.run(
        [sys.executable, "-c", script, *left.arguments("stats", leases=False)],
        cwd=Path(loader.__file__).parents[2],
        env=os.environ | {"PATH": "/nowhere"},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.splitlines()[-1] == "0 False False"


def test_beside_a_program_that_forwards(
    nodes: tuple[Node, Node], family: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the way out it has written the peer's MAC before the counters read it."""
    left, right = nodes
    assert left.run("sync", "--counters", "--forwarding", "ebpf", "--output", "json") == 0
    datagrams(left.end, right.end, 6)
    datagrams(right.end, left.end, 4)
    capsys.readouterr()

    assert left.run("stats", "--forwarding", "ebpf", "--output", "json") == 0

    (found,) = told(capsys)["families"]
    (peer,) = [one for one in found["peers"] if one["mac"] == right.end.mac]
    assert (peer["endpoint"], found["problem"]) == (right.host.underlay(family), "")
    assert (peer["sent"]["packets"], peer["received"]["packets"]) == (6, 4)
    assert left.run("explain", right.end.address, "--forwarding", "ebpf") == 0
    assert "sent 6 packets" in capsys.readouterr().out
    assert left.run("sync", "--no-counters", "--forwarding", "ebpf") == 0
    datagrams(left.end, right.end, 1)
