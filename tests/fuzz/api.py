"""Calls of the compiled unit as no caller should make them: any type, size and order, by threads.

``python tests/fuzz/api.py SEED RUNS [THREADS]``: errors of Python are all that may come of a call.
It reads and writes the kernel, so run it in a network namespace of its own (``unshare -n``).
"""

from __future__ import annotations

import contextlib
import faulthandler
import random
import socket
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any

from flannel_dp import _core
from flannel_dp.cluster.lease import BackendData, Lease
from flannel_dp.errors import KernelError
from flannel_dp.tables.entries import EventFilter, Fdb, Neighbour, Nexthop, Peer, Route, Scope

MAC = "02:00:00:00:00:07"
ENTRIES = [
    Neighbour(7, "10.244.7.0", MAC),
    Neighbour(7, "fd00::7", MAC),
    Fdb(7, MAC, "192.0.2.7"),
    Fdb(7, MAC, "", nexthop=5),
    Fdb(7, "00:00:00:00:00:00", "192.0.2.7", src_vni=7, flags="router"),
    Fdb(7, MAC, state=0x40, vlan=7, master=3),
    Nexthop(7, "10.244.7.0", 7),
    Route("10.244.7.0/24", nexthop=7),
    Route("fd00::/64", gateway="fd00::", device=7),
    Peer("10.244.7.0/24", "192.0.2.7", MAC, 3),
]
TEXTS = ["", "10.244.7.0/24", "fd00:7::/64", "192.0.2.7", MAC, "vxlan", "x\udcff", "a" * 70_000]
NUMBERS = [0, 1, 2, 3, 4, 6, 7, 16, 129, 254, 255, 256, 65_535, -1, 2**31, 2**32 - 1, 2**63, 2**80]

#: Not called: they are about this process, or about descriptors, that the program needs.
SPARED = {
    *("setns", "drop_in_thread", "trim_heap", "fetch_dump"),
    *("BpfMap", "BpfProgram", "PeerProber"),  # they close the descriptor that they are given
    "run_probers",  # it waits for as long as it is told to
}


class Mischief:
    """An object whose conversions change the others."""

    def __init__(self, fuzz: Fuzz) -> None:
        self._fuzz = fuzz

    def __index__(self) -> int:
        self._fuzz.call(deeper=True)
        return self._fuzz.random.choice(NUMBERS)

    def __iter__(self) -> Any:
        self._fuzz.call(deeper=True)
        return iter(self._fuzz.values(3))

    def __call__(self, *args: Any) -> Any:
        self._fuzz.call(deeper=True)
        return self._fuzz.value()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._fuzz.call(deeper=True)
        return self._fuzz.value()


class Fuzz:
    """Random calls with random values over a pool of objects, which threads share."""

    def __init__(self, seed: int, pool: list[Any]) -> None:
        self.random, self.pool = random.Random(seed), pool
        self._depth = 0
        names = [n for n in dir(_core) if not n.startswith("_") and n not in SPARED]
        self._functions = [f for n in names if callable(f := getattr(_core, n))]
        self._methods: dict[type, list[str]] = {}

    def call(self, *, deeper: bool = False) -> None:
        """Make one call, and keep some of what came of it."""
        if deeper and self._depth > 3:
            return
        self._depth += 1
        try:
            found = self._target()(*self.values(self.random.choice((0, 1, 1, 2, 2, 3, 4, 5, 7))))
            if type(found).__module__.startswith("flannel_dp") or isinstance(found, tuple):
                self._keep(found)
        except (Exception, RecursionError):  # whatever it says, it is an error of Python
            pass
        finally:
            self._depth -= 1

    def probe(self) -> None:
        """Have probers of the pool work for a moment."""
        probers = [one for one in list(self.pool) if isinstance(one, _core.PeerProber)]
        with contextlib.suppress(BufferError, KernelError):
            _core.run_probers(probers[:3], -1, 0.001)

    def _keep(self, found: Any) -> None:
        for one in found if type(found) is tuple else (found,):
            if type(one).__module__ == "flannel_dp._core":
                if len(self.pool) > 60:
                    self.pool.pop(self.random.randrange(len(self.pool)))
                self.pool.append(one)

    def _target(self) -> Callable[..., Any]:
        if not self.pool or self.random.random() < 0.2:
            return self.random.choice(self._functions)
        one = self.random.choice(self.pool)
        names = self._methods.setdefault(
            type(one), [n for n in dir(one) if not n.startswith("_") or n in MAGIC]
        )
        name = self.random.choice(names)
        found = getattr(one, name)
        if name == "receive":  # at most so many milliseconds
            return lambda *args: found(self.random.choice((0, 1, 1, *args)) % 10)
        return found if callable(found) else (lambda *args: found)

    def values(self, count: int) -> list[Any]:
        return [self.value() for _ in range(count)]

    def value(self) -> Any:
        """Return a value that may or may not fit."""
        pick, one = self.random.randrange(16), self.random.choice
        if pick < 4 and self.pool:
            return one(self.pool)
        if pick < 6:
            return one(NUMBERS)
        if pick == 6:
            return one((*TEXTS, *_core.KINDS))
        if pick == 7:
            return one(ENTRIES)
        if pick == 8:
            return self._columns()
        if pick == 9:
            return self._lease()
        if pick == 10:
            return Mischief(self)
        if pick == 11:
            return one((None, True, 1.5, b"", bytes(4), bytes(16), bytearray(7), [], {}, (), ""))
        if pick == 12:
            return array(one("IiB"), [self.random.randrange(100) for _ in range(one((0, 1, 9)))])
        if pick == 13:
            return [self._scope()]
        if pick == 14:
            return [self._lease() for _ in range(one((0, 1, 5)))]
        return one((self._scope(), EventFilter(), one(ENTRIES)[:2], tuple(one(ENTRIES))))

    def _columns(self) -> memoryview:
        rows, width = self.random.choice((0, 1, 3, 50)), self.random.choice((1, 4, 6, 16, 17))
        if not rows:
            return memoryview(b"")
        whole = memoryview(self.random.randbytes(rows * width)).cast("B", (rows, width))
        return whole[:: self.random.choice((1, 2, -1))] if self.random.random() < 0.3 else whole

    def _scope(self) -> Scope:
        kind = self.random.choice((*_core.KINDS, "x"))
        return Scope(kind, self.random.choice((2, 7, 10, 0, -1)), device=self.random.choice((1, 7)))

    def _lease(self) -> Any:
        number = self.random.randrange(300)
        fields: dict[str, Any] = {
            "subnet": f"10.244.{number}.0/24",
            "ipv6_subnet": f"fd00:{number:x}::/64",
            "public_ip": f"192.0.2.{number}",
            "public_ipv6": f"2001:db8::{number:x}",
            "backend_type": "vxlan",
            "backend_data": BackendData(1, MAC),
            "backend_v6_data": BackendData(1, MAC),
            "name": f"node{number}",
        }
        if self.random.random() < 0.5:
            wrong: Any = self.random.choice((*TEXTS, *NUMBERS, None, Mischief(self)))
            fields[self.random.choice([*fields, "revision", "moved"])] = wrong
        return Lease(**fields)


def kernel_objects() -> list[Any]:
    """Return sockets and maps, as far as this process may have them."""
    made: list[Any] = []
    answered, lo = bytes([127, 0, 0, 1]), socket.if_nametoindex("lo")
    echo = _core.ProbeOrigin(_core.PROBE_ECHO, answered)
    frames = _core.ProbeOrigin(_core.PROBE_FRAME, answered, ifindex=lo)
    makers: list[Callable[[], Any]] = [
        *(_core.Channel, _core.Events),
        lambda: _core.ProbeSocket(echo, bytes(240), 4, key=bytes(16)),
        lambda: _core.PeerProber(frames, 100, key=bytes(16)),
    ]
    for kind, key, value in ((1, 8, 24), (2, 4, 8), (5, 8, 32), (6, 4, 16), (22, 0, 8)):
        makers.append(partial(_core.BpfMap.create, kind, key, value, 8))
    for make in makers:
        with contextlib.suppress(KernelError):  # without CAP_BPF
            made.append(make())
    return made


MAGIC = {"__len__", "__getitem__", "__iter__", "__repr__", "__enter__", "__exit__", "__init__"}


def main(seed: int, runs: int, threads: int = 1) -> None:
    """Make ``runs`` calls in each of so many threads."""
    faulthandler.enable()
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    pool: list[Any] = [_core.Table(kind) for kind in _core.KINDS]
    pool += [_core.Claims(4), _core.Claims(6)]

    def work(number: int) -> None:
        fuzz = Fuzz(seed * 1000 + number, pool)
        for at in range(runs):
            if at % 500 == 0:  # those that were closed or left the pool
                del pool[:-50]
                pool.extend(kernel_objects())
            fuzz.call()
            if at % 100 == 99:
                fuzz.probe()

    started = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for one in started:
        one.start()
    for one in started:
        one.join()
    print(f"{runs} runs of seed {seed}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
