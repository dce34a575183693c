"""Pods behind nodes, and pings between them."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

from flannel_dp.kernel.netns import call_in_netns
from tests.lib.leases import address
from tests.lib.waiting import LIMIT

_SO_RCVBUFFORCE = 33
#: Bytes for the answers, those of some thousand requests.
_ROOM = 4 << 20


class Pings:
    """ICMP echo requests from a namespace every ``interval`` seconds, on a thread, while
    this is open; ``lost`` is known afterwards."""

    _serial = iter(range(1, 1 << 16))

    def __init__(self, ns: str, target: str, interval: float = 0.01) -> None:
        self._v6 = ":" in target
        self._target, self._interval = target, interval
        self._mark = struct.pack(">HH", os.getpid() & 0xFFFF, next(self._serial))
        self._socket: socket.socket = call_in_netns(ns, self._open)
        self._stop = threading.Event()
        self._waiting: set[int] = set()
        self._errors: list[OSError] = []
        self.sent = self.answered = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def lost(self) -> int:
        """Requests that could not be sent or were never answered."""
        return len(self._waiting) + len(self._errors)

    def _open(self) -> socket.socket:
        family = socket.AF_INET6 if self._v6 else socket.AF_INET
        protocol = socket.IPPROTO_ICMPV6 if self._v6 else socket.IPPROTO_ICMP
        opened = socket.socket(family, socket.SOCK_RAW, protocol)
        opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _ROOM)
        return opened

    def __enter__(self) -> Pings:
        self._thread.start()
        self.await_answers(3)
        # Requests from before the path was up (neighbour discovery at either end) are no loss.
        self._waiting.clear()
        self._errors.clear()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        # Answers come in the order of the requests: with the last one's, all that came are in.
        deadline = time.monotonic() + LIMIT
        last = self.sent - 1
        while exc[0] is None and self._waiting and time.monotonic() < deadline:
            if last not in self._waiting:
                break
            self._receive(0.05)
        self._socket.close()

    def await_answers(self, count: int) -> None:
        """Return when ``count`` more requests were answered."""
        goal, deadline = self.answered + count, time.monotonic() + LIMIT
        while self.answered < goal:
            assert time.monotonic() < deadline, f"no answer from {self._target}: {self._errors}"
            time.sleep(0.002)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._send()
            # Not sent in a row after this thread has waited for a processor: the answers, which
            # it reads, would find no room.
            due = time.monotonic() + self._interval
            while (left := due - time.monotonic()) > 0:
                self._receive(left)

    def _send(self) -> None:
        body = self._mark + struct.pack(">I", self.sent)
        kind = 128 if self._v6 else 8
        total = sum(struct.unpack(f">{len(body) // 2}H", body)) + (kind << 8)
        total = (total & 0xFFFF) + (total >> 16)
        check = 0 if self._v6 else ~(total + (total >> 16)) & 0xFFFF
        # The mark is the identifier and sequence number, the count is the payload.
        self._waiting.add(self.sent)
        self.sent += 1
        try:
            self._socket.sendto(struct.pack(">BBH", kind, 0, check) + body, (self._target, 0))
        except OSError as error:
            self._waiting.discard(self.sent - 1)
            self._errors.append(error)

    def _receive(self, timeout: float) -> None:
        if not select.select([self._socket], [], [], timeout)[0]:
            return
        data = self._socket.recv(4096)
        data = data if self._v6 else data[4 * (data[0] & 15) :]
        if data[0] == (129 if self._v6 else 0) and data[4:8] == self._mark:
            self._waiting.discard(struct.unpack(">I", data[8:12])[0])
            self.answered += 1


def pod(lab: Any, host: Any, number: int) -> str:
    """A namespace behind ``host`` with address 2 of node ``number``'s subnets; its name."""
    ns = str(lab.namespace())
    name = f"pod{number}"
    inside = type(host)(ns, "eth0", "", "", 0)
    near, far, routes = [], [], []
    for family in (4, 6):
        base, bits = address(family, number), 24 if family == 4 else 64
        base = base.rpartition(".")[0] + "." if family == 4 else base
        nodad = "nodad" if family == 6 else ""
        near.append(f"address add {base}1/{bits} dev {name} {nodad}")
        far.append(f"address add {base}2/{bits} dev eth0 {nodad}")
        routes.append(f"route add default via {base}1")
    host.ip_batch("", f"link add {name} type veth peer name eth0 netns {ns}", *near)
    host.without_dad(name)
    inside.without_dad("eth0")
    host.ip(f"link set {name} up")
    inside.ip_batch("", *far, "link set eth0 up", *routes)
    host.sysctl("ipv4/ip_forward", 1)
    host.sysctl("ipv6/conf/all/forwarding", 1)
    return ns


def pod_address(family: int, number: int) -> str:
    """The address of the pod that ``pod(..., number)`` makes."""
    base = address(family, number)
    return f"{base.rpartition('.')[0]}.2" if family == 4 else f"{base}2"


def on_threads(*functions: Callable[[], object]) -> None:
    """Run functions at the same time; raise the first failure."""
    failures: list[BaseException] = []

    def run(function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(f,), daemon=True) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive(), "a thread did not come to its end"
    if failures:
        raise failures[0]
