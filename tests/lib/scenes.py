"""Scenes for docs/screens: what the command shows of a cluster whose figures and times are fixed.

    python -m tests.lib.scenes NAME

draws one on standard output, which is a terminal; tests/lib/programs.py forks it. Where figures
depend on a network (round trips, counters) or on time, they are given here and drawn by the
command's own code; ``show``, ``plan`` and ``explain`` are the command itself on a node in a network
namespace (tests/kernel/test_screens.py).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from flannel_dp.cluster.rejections import Reason, Rejection
from flannel_dp.command import output
from flannel_dp.kernel.netns import netns_identity
from flannel_dp.look.events import Event
from flannel_dp.look.history import Answer, words_of
from flannel_dp.look.history_file import Kept
from flannel_dp.look.live_show import DriftLine, watch_view
from flannel_dp.look.live_stats import watch_stats
from flannel_dp.look.lives import Life, Lives
from flannel_dp.look.proof import PeerProof, Proof
from flannel_dp.look.show import FamilyView, Overview, PeerView
from flannel_dp.look.stats import DroppedView, FamilyStats, Flow, PeerStats, Stats
from flannel_dp.look.status import AgentsStatus
from flannel_dp.probe.oneshot import Result
from flannel_dp.probe.target import Place, Target
from flannel_dp.probe.verdict import Evidence, judge
from flannel_dp.resources.device.view import DeviceView

#: It is this time in every scene.
NOW = datetime(2026, 3, 14, 3, 30, 0, tzinfo=UTC).timestamp()
PORT, MTU = 8472, 1450


def at(clock: str) -> float:
    """Seconds since the epoch of a time of that day: "03:12:04" or "03:12:04.250"."""
    return datetime.fromisoformat(f"2026-03-14T{clock}+00:00").timestamp()


def mac(number: int, family: int = 4) -> str:
    return f"02:00:00:0{family}:00:{number:02x}"


def endpoint(number: int, family: int = 4) -> str:
    """Node 2 is on the network of node 1."""
    if family == 4:
        return f"192.0.2.{number}" if number <= 2 else f"198.51.100.{number}"
    return f"2001:db8::{number}" if number <= 2 else f"2001:db8:1::{number}"


def subnet(number: int, family: int = 4) -> str:
    return f"10.244.{number}.0/24" if family == 4 else f"fd00:10:244:{number}::/64"


def address(number: int, family: int = 4) -> str:
    return subnet(number, family).partition("/")[0]


# ---- for the command itself ------------------------------------------------------------


def net_conf() -> str:
    return json.dumps(
        {
            "Network": "10.244.0.0/16",
            "IPv6Network": "fd00:10:244::/48",
            "EnableIPv6": True,
            "Backend": {"Type": "vxlan", "DirectRouting": True},
        }
    )


def nodes(*numbers: int, **strangers: int) -> str:
    """Nodes as kubectl prints them; ``strangers`` are nodes that claim another one's subnet."""
    named = {f"node{number}": number for number in numbers} | strangers
    return json.dumps({"kind": "List", "items": [_node(*pair) for pair in named.items()]})


def _node(name: str, number: int) -> dict[str, Any]:
    last = int("".join(filter(str.isdigit, name)))
    notes = {
        "kube-subnet-manager": "true",
        "backend-type": "vxlan",
        "backend-data": json.dumps({"VNI": 1, "VtepMAC": mac(last)}),
        "backend-v6-data": json.dumps({"VNI": 1, "VtepMAC": mac(last, 6)}),
        "public-ip": endpoint(last),
        "public-ipv6": endpoint(last, 6),
    }
    return {
        "kind": "Node",
        "metadata": {
            "name": name,
            "annotations": {f"flannel.alpha.coreos.com/{key}": v for key, v in notes.items()},
        },
        "spec": {"podCIDRs": [subnet(number), subnet(number, 6)]},
    }


# ---- show --watch ------------------------------------------------------------------------


def show_watch() -> None:
    """A route was deleted and restored; a lease is rejected; a peer was added."""
    devices = {
        family: DeviceView(
            name, 7, True, 1, PORT, endpoint(1, family), "eth0", mtu, mac(1, family),
            addresses=(address(1, family),),
        )
        for family, name, mtu in ((4, "flannel.1", 1450), (6, "flannel-v6.1", 1430))
    }  # fmt: skip
    networks = {4: "10.244.0.0/16", 6: "fd00:10:244::/48"}
    families = tuple(
        FamilyView(family, networks[family], device, tuple(_peers(family, 14)))
        for family, device in devices.items()
    )
    rejected = Rejection("node99", 4, Reason.OVERLAP, "10.244.7.0/24 overlaps the lease of node7")
    told = {peer.subnet: Life("alive", 0.00031) for view in families for peer in view.peers}
    told |= {subnet(9): Life("dead"), subnet(12, 6): Life("dead"), subnet(5): Life("lossy", 0.0042)}
    overview = Overview(families, (rejected,), with_leases=True, lives=Lives(told))
    restored = Event(
        at("03:29:51.104"), "repaired", 4, "node7", subnet(7), after="route 10.244.7.0/24",
        table="route", change="deleted", program="NetworkManager (process 812)",
    )  # fmt: skip
    overlap = Event(
        at("03:29:52.730"), "rejected", 4, "node99", subnet(7), rejected.detail, reason="overlap"
    )
    added = Event(at("03:29:55.018"), "added", 4, "node14", subnet(14), after=_place(14))
    route = f"{subnet(7)} nhid 1525940743 via {address(7)} dev flannel.1"
    happened = [
        DriftLine(at("03:29:51.102"), 4, "route", "deleted", route),
        _of_agent(restored),
        DriftLine(at("03:29:51.105"), 4, "route", "added", route),
        _of_agent(overlap),
        _of_agent(added),
    ]
    rates = {
        (mac(number, family), family): (8e6 / number**2, 3.1e7 / number**2)
        for family in (4, 6)
        for number in range(2, 15)
    }
    steps: Iterator[list[DriftLine]] = iter([happened])

    def events(timeout: float | None) -> list[DriftLine]:
        if more := next(steps, None):
            return more
        time.sleep(0.01)
        return []

    watch_view(
        lambda: overview,
        events,
        stop=lambda: False,
        source="kubernetes https://192.0.2.9:6443",
        rates=lambda: rates,
        clock=iter_clock(),
    )


def iter_clock() -> Callable[[], float]:
    """A clock that goes a tenth of a second further with each look at it, for five seconds: so
    much is drawn of a second, on any machine."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now = min(5.0, now + 0.1)
        return now

    return clock


def _peers(family: int, last: int) -> Iterator[PeerView]:
    for number in range(2, last + 1):
        peer = PeerView(
            subnet(number, family),
            address(number, family),
            mac(number, family),
            endpoint(number, family),
            lease=f"node{number}",
        )
        if number == 2:
            peer = replace(peer, way="direct", via=endpoint(2, family), mac="")
        if number == 9 and family == 4:
            peer = replace(peer, state="no fdb", endpoint="", difference="add fdb dst 198.51.100.9")
        yield peer


def _place(number: int) -> str:
    return f"{subnet(number)} at {endpoint(number)}, MAC {mac(number)}"


def _of_agent(event: Event) -> DriftLine:
    return DriftLine(event.time, event.family, event.table, event.kind, words_of(event), "agent")


# ---- stats ---------------------------------------------------------------------------------


def _stats(seconds: float | None) -> Stats:
    drops = (DroppedView("NETFILTER_DROP", "received", 17),)
    made = []
    for family, device in ((4, "flannel.1"), (6, "flannel-v6.1")):
        peers = []
        for number in range(3, 8):
            share = 1 / (number - 2) ** 2
            sent = Flow(int(8.1e7 * share), int(4.4e10 * share), NOW - 1)
            came = Flow(int(6.3e7 * share), int(5.2e9 * share), NOW - number)
            if number == 7:
                sent, came = Flow(12, 504, NOW - 7200), Flow()
            elif seconds:
                sent = replace(sent, packet_rate=9e4 * share, byte_rate=1.1e8 * share)
                came = replace(came, packet_rate=7e4 * share, byte_rate=5.9e6 * share)
            lost = drops if (family, number) == (4, 5) else ()
            peers.append(
                PeerStats(
                    subnet(number, family), mac(number, family), endpoint(number, family),
                    f"node{number}", sent, came, lost,
                )
            )  # fmt: skip
        none = {"sent": 0, "received": 0}
        made.append(FamilyStats(family, device, "", tuple(peers), none, none, direct=1))
    return Stats(tuple(made), seconds, with_leases=True)


def stats() -> None:
    output.write(_stats(None), "text")


def stats_watch() -> None:
    watch_stats(lambda: _stats(1.0), lambda seconds: False, interval=0.01)


# ---- status, history, probe -----------------------------------------------------------------


def status() -> None:
    family = {
        number: {
            "subnet": subnet(1, number), "address": endpoint(1, number), "interface": "eth0",
            "device": device, "mtu": mtu, "network": network,
        }
        for number, device, mtu, network in (
            (4, "flannel.1", 1450, "10.244.0.0/16"), (6, "flannel-v6.1", 1430, "fd00:10:244::/48"),
        )
    }  # fmt: skip
    problem = "cannot reach etcd at 192.0.2.9:2379: connection refused"
    repair = {
        "time": at("02:40:44"), "family": 4, "table": "route", "change": "deleted", "before": "",
        "after": f"route {subnet(7)} nhid 1525940743", "program": "NetworkManager (process 812)",
    }  # fmt: skip
    rejected = {
        "family": 4, "lease": "node99", "reason": "overlap",
        "detail": "10.244.7.0/24 overlaps the lease of node7, which comes first",
    }  # fmt: skip
    document = {
        "schema": 1, "ok": False, "status": "degraded", "ready": True, "awaiting": "",
        "version": "1.0.0", "pid": 4711, "started": at("01:23:20"),
        "devices": ["flannel.1", "flannel-v6.1"], "run_dir": "/run/flannel-dp", "node": "node1",
        "mode": "vxlan", "vni": 1, "families": {str(key): one for key, one in family.items()},
        "source": {
            "origin": "etcd http://192.0.2.9:2379", "ok": False, "changed": at("03:18:01"),
        },
        "peers": {str(key): {"total": 41, "tunnel": 40, "direct": 1} for key in (4, 6)},
        "rejected": {"reasons": {"overlap": 1}, "leases": [rejected]},
        "problems": [{"problem": "source", "text": problem, "since": at("03:24:12")}],
        "warnings": [], "repairs": [repair], "drift": {}, "probes": None,
        "audit": {"interval": 60.0, "count": 126, "last": at("03:29:31"), "written": 0},
        "counters": {
            "syncs": 1, "updates": 7, "writes": 262, "failures": 0, "overruns": 0, "failing": 0,
            "conflicts": 0,
        },
    }  # fmt: skip
    output.write(AgentsStatus([document], NOW), "text")


def history() -> None:
    """Why 10.244.7.5 stopped at 03:12."""
    refused = "cannot reach etcd at 192.0.2.9:2379: connection refused"
    deleted = Event(
        at("02:40:44"), "repaired", 4, "node7", subnet(7), table="route", change="deleted",
        after=f"route {subnet(7)} nhid 1525940743", program="NetworkManager (process 812)",
    )  # fmt: skip
    events = [
        Event(at("01:23:20"), "started", after="1.0.0"),
        Event(at("01:23:21"), "added", 4, "node7", subnet(7), after=_place(7)),
        deleted,
        Event(at("03:09:41"), "problem", problem="source", cause=refused),
        Event(at("03:11:58"), "recovered", problem="source"),
        Event(at("03:12:04"), "removed", 4, "node7", subnet(7), "its lease is gone", _place(7)),
    ]
    lines = [json.dumps({n: getattr(one, n) for n in Event.__struct_fields__}) for one in events]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(f"{folder}/{netns_identity(None)[1]}-flannel.1.history")
        path.write_text("".join(f"{line}\n" for line in lines))
        output.write(Answer(Kept(folder), "10.244.7.5", now=NOW), "text")


def probe() -> None:
    found = {
        3: Evidence((10, 10), mtu=MTU, path_mtu=MTU),
        4: Evidence((10, 9), mtu=MTU, path_mtu=MTU, paths=((5, 5), (5, 4))),
        5: Evidence((10, 0), (1, 1), mtu=MTU, underlay=True),
        6: Evidence((10, 0), (1, 0), mtu=MTU, underlay=True, refused=True),
    }
    proofs = []
    for number, evidence in found.items():
        target = Target(subnet(number), endpoint(number), mac(number), name=f"node{number}")
        place = Place(4, "flannel.1", 7, mac(1), MTU, address(1), endpoint(1), 1)
        trips = tuple(one / 1e6 for one in range(370 + number, 370 + number + evidence.loop[1]))
        verdict = judge(evidence, endpoint(number), PORT, "flannel.1")
        result = Result(target, place, trips, evidence)
        proofs.append(PeerProof.of(4, "tunnel", result, verdict))
    output.write(Proof(tuple(proofs)), "text")


SCENES: dict[str, Callable[[], None]] = {
    "show --watch": show_watch,
    "stats": stats,
    "stats --watch": stats_watch,
    "status": status,
    "history": history,
    "probe": probe,
}


def main(name: str) -> None:
    """Draw one."""
    time.time = lambda: NOW
    SCENES[name]()
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
