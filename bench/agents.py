"""Agents to measure, in this process or in one of their own, and strangers that disturb them."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bench.cluster import Case
from flannel_dp import DataPlane
from flannel_dp.agent.agent import Agent
from flannel_dp.reconcile.drift import Repair
from flannel_dp.sources import Call, Inbox, Snapshot

_ROOT = Path(__file__).parent.parent

#: An audit that does not come while something else is measured, in seconds.
NO_AUDIT = 86_400.0

_READY_SECONDS = 60.0

_HEAD = struct.Struct("=IHHII")
_LINK = struct.Struct("=BBHiII")
_NEWLINK, _ERROR = 16, 2
_REQUEST, _ACK = 0x01, 0x04
_SOL_NETLINK, _CAP_ACK = 270, 10
_IFF_UP = 1


class Fixed:
    """A source that says the same at every question: what ``read`` returns."""

    origin = "the benchmark"

    def __init__(self, read: Callable[[], Snapshot]) -> None:
        self._read = read

    def snapshot(self) -> Snapshot:
        return self._read()

    def follow(self, inbox: Inbox) -> None:
        inbox.put(self.snapshot())
        while inbox.wait() is not Call.STOP:
            inbox.put(self.snapshot())


class Local:
    """An agent on a thread of this process; ``repairs`` are those that it made, each with
    the time (``time.perf_counter``) at which its last write had been acknowledged."""

    def __init__(self, plane: DataPlane, read: Callable[[], Snapshot]) -> None:
        self.repairs: list[tuple[float, Repair]] = []
        self._told = threading.Condition()
        self.agent = Agent(plane, Fixed(read), audit=NO_AUDIT, on_drift=self._on_drift)

    def _on_drift(self, repair: Repair) -> None:
        with self._told:
            self.repairs.append((time.perf_counter(), repair))
            self._told.notify()

    def __enter__(self) -> Local:
        self.agent.start()
        if not self.agent.wait_ready(_READY_SECONDS):
            self.agent.stop()
            raise AssertionError(f"the agent did not become ready: {self.agent.status}")
        return self

    def __exit__(self, *exc: object) -> None:
        self.agent.stop()
        self.agent.join(10)

    def wait(self, count: int, timeout: float = 10.0) -> None:
        """Wait for so many repairs since the start."""
        with self._told:
            enough = self._told.wait_for(lambda: len(self.repairs) >= count, timeout)
        assert enough, f"{len(self.repairs)} repairs, not {count}: {self.agent.status}"

    def settle(self, quiet: float = 0.2) -> None:
        """Wait until the last repair was ``quiet`` seconds ago."""
        with self._told:
            while self._told.wait(quiet):
                pass


@dataclass(frozen=True)
class Usage:
    """What a process has used: seconds by the clock, of a processor, and context switches
    (``voluntary``: it went to sleep, so it had been woken)."""

    wall: float
    cpu: float
    voluntary: int
    switches: int

    def __sub__(self, before: Usage) -> Usage:
        return Usage(
            self.wall - before.wall,
            self.cpu - before.cpu,
            self.voluntary - before.voluntary,
            self.switches - before.switches,
        )


class Process:
    """A process that is measured from outside: it does not wake up for that. It lives in the
    caller's namespace; what it writes to standard error is kept to be quoted."""

    def __init__(self, command: list[str], **options: Any) -> None:
        self._said: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed below)
        self.process = subprocess.Popen(
            [sys.executable, *command], stderr=self._said, text=True, cwd=_ROOT, **options
        )

    def close(self) -> None:
        """Wait for the end of a process that was told to come to it."""
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()
            self._said.close()

    def said(self) -> str:
        """All that it has written to standard error."""
        self._said.seek(0)
        return self._said.read()

    def usage(self) -> Usage:
        """Read from outside: it does not wake up for that."""
        pid = self.process.pid
        # CPUCLOCK_SCHED of a process (include/linux/posix-timers.h), in nanoseconds.
        cpu = time.clock_gettime((~pid << 3) | 2)
        voluntary = involuntary = 0
        for task in Path(f"/proc/{pid}/task").iterdir():
            found = _fields(task / "status")
            voluntary += found["voluntary_ctxt_switches"]
            involuntary += found["nonvoluntary_ctxt_switches"]
        return Usage(time.perf_counter(), cpu, voluntary, voluntary + involuntary)

    def used(self, seconds: float) -> Usage:
        """What it uses while ``seconds`` pass."""
        before = self.usage()
        time.sleep(seconds)
        return self.usage() - before

    def memory(self) -> dict[str, float]:
        """MB (2**20): "resident" (with shared libraries), "private" and "peak"."""
        status = _fields(Path(f"/proc/{self.process.pid}/status"))
        rollup = _fields(Path(f"/proc/{self.process.pid}/smaps_rollup"))
        private = sum(kib for name, kib in rollup.items() if name.startswith("Private_"))
        found = {"resident": status["VmRSS"], "private": private, "peak": status["VmHWM"]}
        return {name: kib / 1024 for name, kib in found.items()}


class Remote(Process):
    """An agent in a process of its own (``agent_probe.py``), which is asked on its standard
    input and says when it is ready."""

    def __init__(self, case: Case, leases: Path, *, audit: float = NO_AUDIT) -> None:
        command = ["-m", "bench.agent_probe", str(case.family), str(leases), str(audit)]
        super().__init__(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Remote:
        try:
            self._answer()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        super().close()
        self.process.stdout.close()

    def ask(self, what: str = "status") -> dict[str, Any]:
        """The agent's own words: see ``agent_probe.answer``. It wakes up for that."""
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the agent has ended: {self.said()}"
        found: dict[str, Any] = json.loads(line)
        return found


class Service(Process):
    """``flannel-dp sync --watch`` as an init system runs it: health and metrics are served,
    and it says over a socket that it is ready. ``leases`` is a file, or the flags that name
    another source; ``folder`` takes its files."""

    def __init__(
        self, case: Case, leases: Path | list[str], folder: Path, *more: str, **environment: str
    ) -> None:
        network = folder / "net-conf.json"
        network.write_text(case.config.to_json(), encoding="utf-8")
        path = folder / "notify"
        self._notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notified.bind(str(path))
        self._notified.settimeout(0.2)
        source = leases if isinstance(leases, list) else ["--leases", str(leases)]
        command = ["-m", "flannel_dp", "sync", "--watch", *source]
        command += ["--net-conf", str(network), "--subnet-file", str(folder / "subnet.env")]
        command += [
            "--iface",
            "eth0",
            "--healthz-ip",
            "127.0.0.1",
            "--healthz-port",
            "10249",
            *more,
        ]
        told = {**os.environ, "NOTIFY_SOCKET": str(path), **environment}
        super().__init__(command, env=told)

    def __enter__(self) -> Service:
        deadline = time.monotonic() + _READY_SECONDS
        while not self._ready():
            if self.process.poll() is None and time.monotonic() < deadline:
                continue
            words = self.said()
            self.close()
            raise AssertionError(f"the service did not become ready: {words}")
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _ready(self) -> bool:
        try:
            return b"READY=1" in self._notified.recv(4096).split(b"\n")
        except TimeoutError:
            return False

    def close(self) -> None:
        self.process.terminate()
        super().close()
        self._notified.close()


def _fields(path: Path) -> dict[str, int]:
    """The numbers of a file of ``Name: number`` lines under /proc."""
    found = {}
    for line in path.read_text(encoding="ascii", errors="replace").splitlines():
        name, _, rest = line.partition(":")
        word = rest.split()[:1]
        if word and word[0].isdigit():
            found[name] = int(word[0])
    return found


class Stranger:
    """A netlink socket of another program in the caller's namespace."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        self._socket.bind((0, 0))
        self._socket.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    def send(self, batch: bytes) -> int:
        """Send messages of which the last asks for an acknowledgement, and wait for that.

        Returns how many of them the kernel refused.
        """
        last, at = 0, 0
        while at < len(batch):
            length, _, _, last, _ = _HEAD.unpack_from(batch, at)
            at += (length + 3) & ~3
        self._socket.send(batch)
        refused = 0
        while True:
            page = memoryview(self._socket.recv(65536))
            while len(page) >= _HEAD.size:
                length, kind, _, sequence, _ = _HEAD.unpack_from(page)
                error = struct.unpack_from("=i", page, _HEAD.size)[0] if kind == _ERROR else 0
                refused += error != 0
                if kind == _ERROR and sequence == last:
                    return refused
                page = page[(length + 3) & ~3 :]

    def send_all(self, batches: Iterable[bytes]) -> int:
        """``send`` each; how many messages were refused in all."""
        return sum(self.send(batch) for batch in batches)

    def set_down(self, device: int) -> None:
        """``ip link set DEVICE down``; done when this returns."""
        body = _LINK.pack(0, 0, 0, device, 0, _IFF_UP)
        size = _HEAD.size + len(body)
        assert self.send(_HEAD.pack(size, _NEWLINK, _REQUEST | _ACK, 1, 0) + body) == 0
