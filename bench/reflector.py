"""A peer in a namespace of its own, laid out as flanneld leaves one, that answers for many.

It forwards probes back to node 0. Its one MAC may stand for any number of peers; a probe carries
the number of its peer, so that a firewall can have single ones of them die.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from bench import cluster
from bench.lab import ip
from flannel_dp.cluster.lease import Lease

_NAME = f"fdp-bench-reflector-{os.getpid()}"


class Reflector:
    """The peer: ``lease`` is its lease, ``mac`` its VTEP's MAC, ``vtep`` its VTEP's address."""

    def __init__(self, family: int, node: str, number: int) -> None:
        self.family, self.node, self.name = family, node, f"{_NAME}-{number}"
        self.lease: Lease = cluster.lease(family, number)
        data = self.lease.backend_data if family == 4 else self.lease.backend_v6_data
        self.mac = data.vtep_mac if data else ""
        self.subnet = self.lease.subnet if family == 4 else self.lease.ipv6_subnet
        self.vtep = self.subnet.partition("/")[0]
        self.device = "flannel.1" if family == 4 else "flannel-v6.1"

    def begin(self) -> None:
        """Make the namespace, with the other end of node 0's uplink in it."""
        own = cluster.lease(self.family, 0)
        own_subnet = own.subnet if self.family == 4 else own.ipv6_subnet
        own_end = cluster.public_address(self.family).partition("/")[0]
        end = self.lease.public_ip if self.family == 4 else self.lease.public_ipv6
        bits, vtep_bits = (12, 32) if self.family == 4 else (64, 128)
        nodad = "" if self.family == 4 else " nodad"
        base = own_subnet.partition("/")[0]
        shown = subprocess.run(
            ["ip", "-n", self.node, "-j", "link", "show", self.device],
            capture_output=True,
            text=True,
            check=True,
        )
        own_mac = json.loads(shown.stdout)[0]["address"]
        ip("netns", "add", self.name)
        ip("-n", self.node, "link", "set", "peer0", "netns", self.name)
        steps = [
            "link set lo up",
            "link set peer0 up",
            f"addr add {end}/{bits} dev peer0{nodad}",
            f"link add {self.device} address {self.mac} type vxlan id 1 dstport 8472 local {end} "
            "dev peer0 nolearning",
            f"addr add {self.vtep}/{vtep_bits} dev {self.device}{nodad}",
            f"link set {self.device} up",
            f"neigh replace {base} lladdr {own_mac} dev {self.device} nud permanent",
            f"route replace {own_subnet} via {base} dev {self.device} onlink",
        ]
        ip("-n", self.name, "-batch", "-", stdin="\n".join(steps) + "\n")
        run = ["ip", "netns", "exec", self.name]
        fdb = ["bridge", "fdb", "replace", own_mac, "dev", self.device, "dst", own_end]
        subprocess.run([*run, *fdb], check=True)
        for path in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            subprocess.run([*run, "sh", "-c", f"echo 1 > /proc/sys/net/{path}"], check=True)

    def stand_for_all(self) -> None:
        """Answer for every peer whose address is behind the router (generation 1 of
        bench/cluster.py): their public addresses, their VTEPs, and frames to their MACs."""
        router, bits = cluster.ROUTER[self.family], {4: 12, 6: 64}[self.family]
        nodad = "" if self.family == 4 else " nodad"
        overlay = {4: "10.0.0.0/7", 6: "fd00:10::/32"}[self.family]
        steps = [
            f"addr add {router}/{bits} dev peer0{nodad}",
            f"route add local {cluster.FAR[self.family]} dev lo",
            f"route add local {overlay} dev lo table main",
        ]
        ip(f"-{self.family}", "-n", self.name, "-batch", "-", stdin="\n".join(steps) + "\n")
        # The kernel would take frames to other MACs for those of other hosts.
        self._nft(
            "add table netdev every",
            f"add chain netdev every in {{ type filter hook ingress device {self.device} "
            "priority 0; }",
            "add rule netdev every in meta pkttype set host",
        )

    def drop_all(self) -> None:
        """Drop what comes in by the uplink, before anything is done with it."""
        self._nft(
            "add table netdev cut",
            "add chain netdev cut in { type filter hook ingress device peer0 priority 0; }",
            "add rule netdev cut in drop",
        )

    def _nft(self, *rules: str) -> None:
        command = ["ip", "netns", "exec", self.name, "nft", "-f", "-"]
        subprocess.run(command, input="\n".join(rules) + "\n", text=True, check=True)

    def kill(self, numbers: Iterable[int]) -> None:
        """Drop the probes of these peers from now on; without any, of none."""
        rules = ["add table inet cut", "flush table inet cut"]
        rules.append("add chain inet cut forward { type filter hook forward priority 0; }")
        for number in numbers:
            value = int.from_bytes(number.to_bytes(4, "little"), "big")
            rules.append(f"add rule inet cut forward @th,64,32 {value} drop")
        self._nft(*rules)

    def end(self) -> None:
        """Give node 0 its uplink's other end back, and remove the namespace."""
        back = ["ip", "-n", self.name, "link", "set", "peer0", "netns", self.node]
        subprocess.run(back, capture_output=True, check=False)
        subprocess.run(["ip", "netns", "delete", self.name], capture_output=True, check=False)
        ip("-n", self.node, "link", "set", "peer0", "up")


@contextmanager
def reflector(family: int, node: str, number: int) -> Iterator[Reflector]:
    """Node ``number`` as a peer of ``node``, whose vxlan device is there."""
    made = Reflector(family, node, number)
    try:
        made.begin()
        yield made
    finally:
        made.end()
