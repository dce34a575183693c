"""Hosts of small networks, built out of namespaces, and removed again.

Everything a test touches lives in namespaces made for that test, named ``fdp-PID-N``;
they are deleted in teardown, after a failure too. Hosts of one test share one layer 2
network: a bridge in a namespace of its own, 192.0.2.0/24 and 2001:db8::/64.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.bpf.pins import FOLDER, find_roots, namespace_key, remove
from flannel_dp.errors import ConfigError
from flannel_dp.kernel.netns import call_in_netns, netns_identity
from tests.lib import namespaces
from tests.lib.isolation import STATE
from tests.lib.namespaces import Namespace
from tests.lib.short import end_of, run
from tests.lib.waiting import LIMIT, wait_until

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Host:
    """A node: one namespace whose ``iface`` is plugged into the test's network."""

    ns: str
    iface: str
    ipv4: str
    ipv6: str
    ifindex: int

    def underlay(self, family: int) -> str:
        """Return this node's own address, ``family`` being 4 or 6."""
        return self.ipv4 if family == 4 else self.ipv6

    def ip(self, *args: str) -> str:
        """Run ``ip -n NS ARGS``; one string may hold several words."""
        return run("ip", *_words(args), netns=self.ns)

    def ip_json(self, *args: str) -> list[dict[str, Any]]:
        """Run ``ip -n NS -d -j ARGS`` and decode what it prints."""
        return _decoded(run("ip", "-d", "-j", *_words(args), netns=self.ns))

    def ip_batch(self, options: str, *commands: str) -> str:
        """Run ``ip -n NS OPTIONS -batch -`` with a line for each command."""
        steps = "\n".join([*commands, ""])
        return run("ip", *options.split(), "-batch", "-", stdin=steps, netns=self.ns)

    def ip_lists(self, family: int, *commands: str) -> list[list[dict[str, Any]]]:
        """What ``ip -FAMILY -d -j`` prints of each command, by one process. What it complains
        of, such as a device that is not there, is an empty list."""
        # It prints nothing where there is nothing, so that a mark has to tell answers apart.
        done = end_of(
            ["ip", f"-{family}", "-d", "-j", "-force", "-batch", "-"],
            stdin="\nlink show lo\n".join([*commands, ""]),
            netns=self.ns,
        )
        found: list[list[dict[str, Any]]] = [[]]
        decoder, text = json.JSONDecoder(), done.stdout.strip()
        while text:
            entries, end = decoder.raw_decode(text)
            text = text[end:].lstrip()
            if entries and entries[0].get("ifname") == "lo" and len(entries) == 1:
                found.append([])
            else:
                found[-1] += [entry for entry in entries if entry]
        found += [[]] * len(commands)  # some complaints end it
        return found[: len(commands)]

    def bridge(self, *args: str) -> str:
        """Run ``bridge -n NS ARGS``."""
        return run("bridge", *_words(args), netns=self.ns)

    def bridge_json(self, *args: str) -> list[dict[str, Any]]:
        """Run ``bridge -n NS -j ARGS`` and decode what it prints."""
        return _decoded(run("bridge", "-j", *_words(args), netns=self.ns))

    def sysctl(self, name: str, value: object = None) -> str:
        """Read ``/proc/sys/net/NAME`` in this namespace, after writing ``value`` if given."""
        path = Path(f"/proc/sys/net/{name}")
        if value is not None:
            call_in_netns(self.ns, path.write_text, str(value))
        return call_in_netns(self.ns, path.read_text).strip()

    def without_dad(self, *devices: str) -> None:
        """Let no address of these devices be tentative: for seconds after they are up the node
        would else solicit no neighbour on behalf of others."""
        for device in devices:
            _detect_duplicates(self.ns, device, 0)

    def exec(self, *command: str) -> str:
        """Run a command inside this namespace, but with the /sys of the process that runs it."""
        return run(*command, netns=self.ns)

    def ping(self, address: str, count: int = 1) -> bool:
        """Tell whether ``count`` pings sent from here to ``address`` all came back."""
        return call_in_netns(self.ns, _ping, address, count)


def _detect_duplicates(netns: str, device: str, value: int) -> None:
    """Whether addresses that a device gets from now on are tentative for a while."""
    path = Path(f"/proc/sys/net/ipv6/conf/{device}/accept_dad")
    call_in_netns(netns, path.write_text, str(value))


def _ping(address: str, count: int, timeout: float = LIMIT) -> bool:
    """ICMP echo through a raw socket, so that no test needs a ping program.

    The first one is sent again four times a second until it is answered: there may be no route to
    our own address yet, which the kernel makes some time after a sync, and solicitations of
    neighbours are lost while the other side's link comes up. All others are sent once.
    """
    v6 = ":" in address
    protocol = socket.IPPROTO_ICMPV6 if v6 else socket.IPPROTO_ICMP
    request = 128 if v6 else 8
    with socket.socket(
        socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_RAW, protocol
    ) as icmp:
        for seq in range(count):
            body = struct.pack(">HH", os.getpid() & 0xFFFF, seq) + b"flannel-dp ping!"
            # For ICMPv6 the kernel writes the checksum itself.
            check = _checksum(bytes([request, 0, 0, 0]) + body)
            deadline = time.monotonic() + timeout
            while True:
                try:
                    icmp.sendto(struct.pack(">BBH", request, 0, check) + body, (address, 0))
                    left = max(deadline - time.monotonic(), 0.001)
                    if _is_answered(icmp, v6, body, left if seq else min(0.25, left)):
                        break
                except OSError:
                    time.sleep(0.01)
                if seq or time.monotonic() > deadline:
                    return False
    return True


def _is_answered(icmp: socket.socket, v6: bool, body: bytes, timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        icmp.settimeout(left)
        try:
            data = icmp.recv(2048)
        except TimeoutError:
            return False
        data = data if v6 else data[4 * (data[0] & 15) :]
        if data[0] == (129 if v6 else 0) and data[4:] == body:
            return True
    return False


def _checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def _words(args: tuple[str, ...]) -> list[str]:
    return [word for arg in args for word in arg.split()]


def _decoded(text: str) -> list[dict[str, Any]]:
    # iproute2 prints {} for objects that a filter left out, and nothing for an empty list.
    return [entry for entry in json.loads(text or "[]") if entry]


def delete_namespace(name: str) -> None:
    """Delete a namespace, and what outlives it: pins, locks and notes. It may be gone already."""
    with suppress(ConfigError):
        key, inode = namespace_key(name), netns_identity(name)[1]
        for root in find_roots():
            for directory in (root / FOLDER).glob(f"{key}-*"):
                remove(directory)
        for path in STATE.glob(f"{inode}-*"):
            path.unlink(missing_ok=True)  # a sync of another test removes what a namespace left
    namespaces.delete(name)


class Lab:
    """The namespaces of one test; a context manager that deletes what it made.

    The other ends of hosts' links are in the namespace ``ports``, which labs can share one after
    the other, or in one of its own. They are ports of a bridge as soon as there are two.
    """

    def __init__(self, ports: Namespace | None = None) -> None:
        if os.geteuid() != 0:
            pytest.fail("kernel tests make network namespaces: run pytest as root", pytrace=False)
        self._stack = ExitStack()
        self._ports, self._members = ports, list[int]()
        self._bridge: tuple[str, int] | None = None

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def namespace(self) -> str:
        """Make a namespace with ``lo`` up and return its name."""
        with closing(self._add()) as made:
            return made.name

    def _add(self, delete: Callable[[str], None] = delete_namespace) -> Namespace:
        name = f"fdp-{os.getpid()}-{next(_numbers)}"
        self._stack.callback(delete, name)
        return Namespace(name)

    def host(self, *, mtu: int = 1500) -> Host:
        """Make node number N: ``eth0`` with 192.0.2.N/24 and 2001:db8::N/64, up, with carrier."""
        number = len(self._members) + 1
        port, ipv4, ipv6 = f"port{next(_numbers)}", f"192.0.2.{number}", f"2001:db8::{number:x}"
        switch = self._far_ends()
        with closing(self._add()) as ns:
            index = ns.add_veth("eth0", mtu, port, switch)
            ns.add_address(index, ipv4, 24)
            ns.add_address(index, ipv6, 64)
            # Of the link-local address: packets of pods are solicited for from it.
            _detect_duplicates(ns.name, "eth0", 0)
            ns.up(index)
            self._members.append(switch.index(port))
            switch.up(self._members[-1])
            if number > 1:
                switch.join(self._members[-1], self._made_bridge()[1])
            wait_until(lambda: ns.has_carrier(index) and ns.is_local(ipv6))
            _detect_duplicates(ns.name, "eth0", 1)
        return Host(ns.name, "eth0", ipv4, ipv6, index)

    @property
    def switch(self) -> str:
        """The namespace of the bridge that all hosts are plugged into."""
        return self._far_ends().name

    @property
    def bridge(self) -> str:
        """The name of that bridge."""
        return self._made_bridge()[0]

    def _far_ends(self) -> Namespace:
        if self._ports is None:
            self._ports = self._add(namespaces.delete)  # nothing of ours was there
            self._stack.callback(self._ports.close)
        return self._ports

    def _made_bridge(self) -> tuple[str, int]:
        if self._bridge is None:
            name, ports = f"br{next(_numbers)}", self._far_ends()
            self._bridge = name, ports.add_bridge(name)
            self._stack.callback(ports.remove, self._bridge[1])
            for one in self._members:
                with suppress(OSError):  # a test may have removed it
                    ports.join(one, self._bridge[1])
        return self._bridge
