"""Traffic through the overlay while somebody works on it: a second node, pings, and TCP."""

from __future__ import annotations

import ipaddress
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import cluster, lab
from bench.cluster import Case
from flannel_dp import DataPlane

SOURCE = Path(__file__).parent / "traffic"
PINGER = Path(__file__).parent / "build" / "pinger"

#: Microseconds between two pings.
PACE = 500


@dataclass(frozen=True)
class Wire:
    """Two nodes that reach each other's pods: ``near`` is node 0, which the benchmark works
    on, ``far`` is node 1. ``target`` is an address in node 1's subnet."""

    near: str
    far: str
    target: str


@contextmanager
def wire(case: Case) -> Iterator[Wire]:
    """Make both nodes. Raises CalledProcessError when the pinger does not compile."""
    subprocess.run(["make", "-s", "-C", str(SOURCE)], check=True)
    members = [cluster.lease(case.family, number) for number in (0, 1)]
    with lab.namespace(case.family) as near, lab.namespace(case.family) as far:
        four = case.family == 4
        peer = members[1]
        public = f"{peer.public_ip}/12" if four else f"{peer.public_ipv6}/64"
        subnet = ipaddress.ip_network(peer.subnet if four else peer.ipv6_subnet)
        target = str(subnet.network_address + 1)
        nodad = "" if four else " nodad"
        lab.ip("-n", far, "link", "del", "eth0")
        lab.ip("-n", near, "link", "set", "peer0", "netns", far)
        steps = [
            "link set peer0 name eth0",
            "link set eth0 up",
            f"addr add {public} dev eth0{nodad}",
            f"addr add {target}/{32 if four else 128} dev lo{nodad}",
        ]
        lab.ip("-n", far, "-batch", "-", stdin="\n".join(steps) + "\n")
        plain = case.config.with_forwarding("kernel")  # whatever forwards at the near end
        with DataPlane(plain, iface="eth0", netns=far) as dp:
            report = dp.sync(members)
            assert report.ok, report.to_json()
        yield Wire(near, far, target)


@dataclass(frozen=True)
class Pings:
    """``p50``, ``p99`` and ``most`` are round trips in microseconds."""

    sent: int
    lost: int
    p50: int
    p99: int
    most: int


def pings(wire: Wire, work: Callable[[], None]) -> Pings:
    """Ping node 1 from node 0 while ``work`` is done. Raises RuntimeError when no ping
    comes back at all, before."""
    command = ["ip", "netns", "exec", wire.near, str(PINGER), wire.target, str(PACE)]
    _until_reachable(wire)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as pinger:
        assert pinger.stdout is not None
        try:
            time.sleep(0.05)  # what is measured is a steady state, not its beginning
            work()
        finally:
            pinger.terminate()
        said = json.loads(pinger.stdout.readline())
    return Pings(said["sent"], said["lost"], said["p50"], said["p99"], said["max"])


def _until_reachable(wire: Wire) -> None:
    for _ in range(20):
        done = subprocess.run(
            ["ip", "netns", "exec", wire.near, "ping", "-c1", "-W1", wire.target],
            capture_output=True,
            check=False,
        )
        if done.returncode == 0:
            return
    raise RuntimeError(f"{wire.target} does not answer")


def gigabits(wire: Wire, seconds: float, work: Callable[[], None] = lambda: None) -> float:
    """TCP from node 0 to node 1 for so many seconds, in Gbit/s. Raises CalledProcessError."""
    inside = ["ip", "netns", "exec"]
    server = subprocess.Popen(
        [*inside, wire.far, "iperf3", "-s", "-1", "-B", wire.target],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        await_listener(wire)
        client = subprocess.Popen(
            [*inside, wire.near, "iperf3", "-c", wire.target, "-t", str(seconds), "-J"],
            stdout=subprocess.PIPE,
            text=True,
        )
        work()
        out, _ = client.communicate(timeout=seconds + 30)
        if client.returncode != 0:
            raise RuntimeError(f"iperf3: {out}")
        return float(json.loads(out)["end"]["sum_received"]["bits_per_second"]) / 1e9
    finally:
        server.kill()
        server.wait()


def await_listener(wire: Wire) -> None:
    """Until iperf3 listens on the far node."""
    for _ in range(500):
        listing = subprocess.run(
            ["ip", "netns", "exec", wire.far, "ss", "-Hltn", "sport = :5201"],
            capture_output=True,
            text=True,
            check=True,
        )
        if listing.stdout.strip():
            return
        time.sleep(0.01)
    raise RuntimeError("iperf3 does not listen")
