"""Two nodes with pods, the first of which has something in the way of its packets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from flannel_dp import DataPlane
from flannel_dp.kernel.netns import call_in_netns
from flannel_dp.look.explanation import Explanation, Step
from tests.lib.forwarding import PodNode
from tests.lib.hosts import _ping
from tests.lib.kernel import everything, stranger
from tests.lib.traffic import pod_address

IP = {4: "ip", 6: "ip -6"}

#: The network of the external interface.
NEAR = {4: "192.0.2.0/24", 6: "2001:db8::/64"}

HOST = {4: "100.64.0.9/32", 6: "fd7a::9/128"}

#: Devices of the test, whose timers and carrier are no concern of ours.
NOT_OURS = ("cni0", "tun0", "tun0p")

#: How long a packet that is diverted may take to be answered.
BRIEFLY = 0.3


def reaches(node: PodNode, family: int, seconds: float = 60.0) -> bool:
    """Whether a ping from the pod of ``node`` to that of node 2 is answered."""
    target = pod_address(family, 2)
    return bool(call_in_netns(node.pod, _ping, target, 1, seconds))


def without_machine(warnings: Iterable[str]) -> tuple[str, ...]:
    """Warnings but for the one of the machine: its neighbour table has the entries of all
    namespaces."""
    return tuple(text for text in warnings if "gc_thresh3" not in text)


def advised(text: str) -> list[str]:
    """The commands in a warning."""
    return re.findall(r"'([^']+)'", text)


class Pair:
    """Two nodes in sync, with a pod on each; ``plane`` is that of the first."""

    def __init__(self, nodes: list[PodNode], family: int, forwarding: str) -> None:
        self.family, (self.near, self.far) = family, nodes
        self.leases = [node.lease for node in nodes]
        self.plane = self.near.plane(family, forwarding=forwarding)
        with self.far.plane(family, forwarding=forwarding) as other:
            assert other.sync(self.leases).ok
        report = self.plane.sync(self.leases)
        assert report.ok
        self.host = self.near.host
        stranger(self.host, "tun0")

    def ip(self, words: str) -> None:
        self.host.ip(f"-{self.family}", words)

    def reaches(self, seconds: float = 60.0) -> bool:
        return reaches(self.near, self.family, seconds)

    def run(self, command: str) -> None:
        """One of the commands that a warning gives."""
        self.host.exec(*command.split())

    def warnings(self) -> tuple[str, ...]:
        """What sync, a resync, a plan and both forms of show say: the same."""
        before = everything(self.host, *NOT_OURS)
        report = self.plane.sync(self.leases)
        assert report.ok
        found = without_machine(report.warnings)
        assert without_machine(self.plane.resync().warnings) == found
        assert without_machine(self.plane.plan(self.leases).warnings) == found
        with self.fresh() as fresh:
            assert show(fresh, self.leases).warnings == found
            shown = show(fresh).warnings
        # Without leases nobody knows whose subnet it is.
        assert len(shown) == len(found)
        assert [advised(one) for one in shown] == [advised(one) for one in found]
        assert everything(self.host, *NOT_OURS) == before
        return found

    @contextmanager
    def fresh(self) -> Iterator[DataPlane]:
        with DataPlane(self.plane.config, iface="eth0", netns=self.host.ns) as made:
            yield made


def show(plane: DataPlane, leases: Any = None) -> Any:
    from flannel_dp.look.show import show as look

    return look(plane, leases)


def leftover(pair: Pair, number: int) -> str:
    """A bridge cni0 with the first pod address of a node's subnet; that address."""
    base = pod_address(pair.family, number)
    held = f"{base[:-1]}1/{24 if pair.family == 4 else 64}"
    pair.host.ip("link add cni0 type bridge")
    pair.host.ip("link set cni0 up")
    pair.host.ip(f"address add {held} dev cni0 {'nodad' if pair.family == 6 else ''}")
    return held


def step(explanation: Explanation, name: str) -> Step:
    (found,) = (one for one in explanation.steps if one.name == name)
    return found


def explained(pair: Pair, *, ok: bool) -> Explanation:
    """What explain says of the far pod, with the leases; without, it has the same advice."""
    target = pod_address(pair.family, 2)
    found = pair.plane.explain(target)
    assert found.ok == ok
    with pair.fresh() as fresh:
        other = fresh.explain(target)
    assert (other.ok, other.way) == (ok, found.way)
    if not ok:
        assert advised(step(other, "route").text) == advised(step(found, "route").text)
    return found
