"""A lab: hundreds of nodes of one overlay, each in a network namespace, in one process.

::

    sudo python examples/lab.py --nodes 200

makes a switch and 200 nodes, joins them to one vxlan overlay, and repairs what you break until
you press Ctrl-C (``ip -n lab7 route del 10.244.9.0/24``); then all of it is removed. One thread
does everything: a ``DataPlane`` starts none, and ``watch_all`` waits for the events of all.
Pods are missing: ``ip -n lab7 address add 10.244.7.1/24 dev flannel.1`` and a ping from another
node's is enough to see packets.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from flannel_dp import DataPlane, Lease, NetworkConfig, watch_all

CONFIG = """{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:244::/48",
             "Backend": {"Type": "vxlan", "Port": 8472}}"""


def run(program: str, lines: list[str]) -> None:
    """Have ``ip`` do many things at once. Raises CalledProcessError."""
    subprocess.run([*program.split(), "-batch", "-"], input="\n".join(lines), text=True, check=True)


@contextmanager
def namespaces(prefix: str, count: int) -> Iterator[list[str]]:
    """Make ``count`` nodes on one switch: ``lab1`` has 198.18.0.1 and 2001:db8::1 on eth0."""
    switch, names = f"{prefix}0", [f"{prefix}{number}" for number in range(1, count + 1)]
    try:
        run("ip", [f"netns add {name}" for name in [switch, *names]])
        lines = ["link add br0 type bridge mcast_snooping 0", "link set br0 up"]
        for number, name in enumerate(names, 1):
            lines.append(f"link add port{number} type veth peer name eth0 netns {name}")
            lines.append(f"link set port{number} master br0 up")
        run(f"ip -n {switch}", lines)
        for number, name in enumerate(names, 1):
            lines = [
                f"address add 198.18.{number >> 8}.{number & 255}/16 dev eth0",
                f"address add 2001:db8::{number:x}/64 dev eth0 nodad",
                "link set lo up",
                "link set eth0 up",
            ]
            run(f"ip -n {name}", lines)
        yield names
    finally:
        known = {line.split()[0] for line in _list().splitlines() if line}
        run("ip", [f"netns delete {name}" for name in [switch, *names] if name in known])


def _list() -> str:
    return subprocess.run(
        ["ip", "netns", "list"], capture_output=True, text=True, check=True
    ).stdout


@contextmanager
def lab(prefix: str, count: int) -> Iterator[tuple[list[DataPlane], list[Lease]]]:
    """Make the nodes and a data plane for each; return them with the leases of all."""
    config = NetworkConfig.from_json(CONFIG)
    with namespaces(prefix, count) as names, ExitStack() as opened:
        planes = [DataPlane(config, iface="eth0", netns=name) for name in names]
        for plane in planes:
            opened.callback(plane.close)
        leases = [
            plane.identity().lease({4: f"10.244.{n}.0/24", 6: f"fd00:10:244:{n:x}::/64"}, name)
            for n, (plane, name) in enumerate(zip(planes, names, strict=True), 1)
        ]
        yield planes, leases


def main() -> int:
    """Read the arguments and run; 1 when a node cannot be synced."""
    parser = argparse.ArgumentParser(description="Many nodes of one overlay in one process.")
    parser.add_argument("--nodes", type=int, default=200, help="how many, up to 250")
    parser.add_argument("--prefix", default="lab", help="what the namespaces are called")
    parser.add_argument("--seconds", type=float, help="end when nothing happened for so long")
    args = parser.parse_args()

    with lab(args.prefix, args.nodes) as (planes, leases):
        started = time.perf_counter()
        reports = [plane.sync(leases) for plane in planes]
        entries, seconds = sum(one.writes for one in reports), time.perf_counter() - started
        print(f"{len(planes)} nodes, {entries} entries in {seconds:.1f} s", flush=True)
        try:
            for plane, repair in watch_all(planes, timeout=args.seconds):
                print(f"{plane.netns}: {repair}", flush=True)
        except KeyboardInterrupt:
            pass
        return 0 if all(report.ok for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
