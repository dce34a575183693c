"""Two agents in a hostile world for a while: one's leases are in etcd, the other's in Kubernetes.

``python -m bench.soak --seconds 3600 --seed 1``, as root, in two minutes with ``--seconds 120``. By
a fixed seed, storms come and go. In a storm, answers cannot be read or have no end, connections
break, members flood, history is lost, devices go down, and meanwhile nodes join and leave. After
each of them the faults end, and each kernel has to become as the leases say, with health ok. In the
end there may be no growth of memory, descriptors or threads, and /healthz may never have said ok
for more than ten seconds while the same entry was wrong.

No verdict depends on the machine's speed: time in which a process waited for a processor does not
count (``Patience``), and storms end by conditions.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flannel_dp.errors import FlannelDPError
from tests.lib import isolation
from tests.lib.apiserver import Certificates, status
from tests.lib.etcd_garbler import WithMore, frame
from tests.lib.hosts import Lab
from tests.lib.joined_service import Joined
from tests.lib.kernel import State, expected, observed
from tests.lib.kube_cluster import Cluster
from tests.lib.leases import DEVICE, subnet
from tests.lib.service import fetch, free_port
from tests.lib.waiting import wait_until

#: Seconds that health may be wrong for; that a storm and the end of it may take.
UNTRUE, STORM, SETTLE = 10.0, (5.0, 40.0), 600.0
#: Growth that is none: of bytes, of descriptors and of threads.
MEMORY, DESCRIPTORS, THREADS = 8 << 20, 4, 2

PING, SETTINGS, WINDOW = frame(6, 0, 0, bytes(8)), frame(4, 0, 0, b""), frame(8, 0, 0, b"\0\0\0\1")
UNKNOWN = frame(0x42, 0, 0, b"what")
#: 16 MiB of zeros in 16 KiB.
BOMB = gzip.compress(bytes(16 << 20), 1)

Weight = tuple[int, int, int]


def weigh(pid: int) -> Weight:
    """Return resident bytes, descriptors and threads of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    folder = f"/proc/{pid}"
    return pages * 4096, len(os.listdir(f"{folder}/fd")), len(os.listdir(f"{folder}/task"))


class Patience:
    """A clock that stands nearly still while one of ``pids`` waits for a processor."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids, self._seconds = list(pids), 0.0
        self._last, self._waited = time.monotonic(), [self._waiting(pid) for pid in self._pids]

    @staticmethod
    def _waiting(pid: int) -> float:
        """Seconds that threads of a process could run and did not (schedstat, the second)."""
        total = 0
        for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with suppress(OSError):
                total += int(task.read_text().split()[1])
        return total / 1e9

    def now(self) -> float:
        now, waited = time.monotonic(), [self._waiting(pid) for pid in self._pids]
        most = max(after - before for before, after in zip(self._waited, waited, strict=True))
        passed = now - self._last
        self._seconds += max(0.1 * passed, passed - max(0.0, most))
        self._last, self._waited = now, waited
        return self._seconds


class Truth:
    """Since when health has said ok while an entry was wrong."""

    def __init__(self) -> None:
        self._since: dict[Hashable, float] = {}
        self.untrue: list[str] = []

    def observe(self, said_ok: bool, wrong: set[Hashable], now: float) -> None:
        self._since = {
            item: self._since.get(item, now) for item in wrong if said_ok
        }  # an entry that became right meanwhile begins again
        for item, since in list(self._since.items()):
            if now - since > UNTRUE:
                self.untrue.append(f"health was ok for {now - since:.0f} s beside {item}")
                self._since[item] = now


def differences(held: State, wanted: State) -> set[Hashable]:
    """Return the entries that are missing, and those that are too many."""
    found: set[Hashable] = set()
    for kind, entries in wanted.items():
        found |= {(kind, "is missing", entry) for entry in entries - held[kind]}
        found |= {(kind, "is too many", entry) for entry in held[kind] - entries}
    return found


class Side:
    """One agent and its store: what can happen, and whether all is well."""

    def __init__(
        self,
        name: str,
        made: Any,
        port: int,
        happens: list[Callable[[], object]],
        quiet: Callable[[], None],
    ) -> None:
        self.name, self.made, self.port, self.happens = name, made, port, happens
        self.quiet, self.truth = quiet, Truth()
        self.weights: list[Weight] = []
        self.patience: Patience | None = None

    @property
    def pid(self) -> int:
        return int(self.made.process.pid)

    def wrong(self) -> set[Hashable]:
        """Return what differs between the kernel and the leases."""
        if isinstance(self.made, Cluster):
            kernel, wanted = self.made.kernel(), self.made.wanted()
            return {
                (family, one)
                for family in wanted
                for one in differences(kernel[family], wanted[family])
            }
        family = self.made.family
        return differences(observed(self.made.host, family), expected(self.made.peers, family))

    def said_ok(self) -> bool:
        code, text = fetch(self.made.host, self.port, "/healthz")
        return code == 200 and text.startswith("ok")

    def watch_health(self) -> None:
        """Note a word of health that has been untrue for too long."""
        if self.patience is None:
            others = (self.made.etcd.process.pid,) if isinstance(self.made, Joined) else ()
            self.patience = Patience((self.pid, os.getpid(), *others))
        said_ok = self.said_ok()
        wrong = self.wrong()
        self.truth.observe(said_ok, wrong, self.patience.now())

    def drift(self) -> None:
        """Have another program take a device down."""
        families = self.made.families if isinstance(self.made, Cluster) else (self.made.family,)
        for family in families:
            self.made.host.exec("ip", "link", "set", DEVICE[family], "down")

    def reload(self) -> None:
        self.made.process.send_signal(signal.SIGHUP)

    def settle(self) -> None:
        """Wait until all is well again, without faults. AssertionError."""
        self.quiet()
        wait_until(
            lambda: self.ended() or (not self.wrong() and self.said_ok()),
            SETTLE,
            describe=lambda: f"{self.name}: {sorted(map(str, self.wrong()))[:5]}",
        )
        if self.ended():
            raise AssertionError(f"{self.name}: the agent ended")
        self.weights.append(weigh(self.pid))

    def ended(self) -> bool:
        return self.made.process.poll() is not None

    def growth(self) -> list[str]:
        """Return what has grown between the first quarter and the end."""
        then, now = self.weights[len(self.weights) // 4], self.weights[-1]
        rows = zip(("bytes", "descriptors", "threads"), then, now, strict=True)
        return [
            f"{self.name}: {before} {what} have become {after}"
            for (what, before, after), most in zip(
                rows, (MEMORY, DESCRIPTORS, THREADS), strict=True
            )
            if after - before > most
        ]


def etcd_side(made: Joined, source: random.Random) -> Side:
    """A node whose leases are in an etcd, behind a member that garbles."""
    known: list[int] = []

    def add() -> None:
        number = source.randrange(2, 200)
        if number not in known:
            made.add(number)
            known.append(number)

    def remove() -> None:
        if len(known) > 5:
            at = source.randrange(len(known))
            made.etcd.delete(f"subnets/{subnet(made.family, known.pop(at)).replace('/', '-')}")
            del made.peers[at]

    def garble() -> None:
        wrong: Callable[[bytes], bytes] = source.choice(
            [
                lambda data: b"\xff\xff\xff",
                lambda data: data[: len(data) // 2],
                lambda data: b"",
                lambda data: WithMore(data, data, 20),
                lambda data: data[:4] + b"\x80" * 8 + data[4:],
            ]
        )
        method = source.choice(["Range", "Watch", "LeaseKeepAlive", "LeaseGrant"])
        if not made.garbler.left(method):
            made.garbler.fail(method, *[wrong] * source.randrange(1, 4))

    def flood() -> None:
        made.garbler.flood(
            source.choice(["Range", "Watch", "LeaseKeepAlive"]),
            source.choice([PING, SETTINGS, WINDOW, UNKNOWN]),
        )

    def compact() -> None:
        add()  # there is nothing new to compact otherwise
        remove()
        with suppress(AssertionError):
            made.etcd.compact()

    for _ in range(8):
        add()
    happens = [add, add, remove, remove, garble, garble, flood, compact]
    side = Side("etcd", made, made.health, happens, made.garbler.behave)
    side.happens.append(side.reload)
    return side


def _without_end(handler: Any) -> None:
    """Spaces, until the client hangs up."""
    handler.start_stream()
    while True:
        handler.chunk(b" " * 65536)


def _bomb(handler: Any) -> None:
    handler.answer(200, BOMB, Content_Encoding="gzip")


def _same_page(handler: Any) -> None:
    """A list whose pages have no end."""
    meta = {"resourceVersion": "1", "continue": "again"}
    handler.answer(200, {"kind": "NodeList", "apiVersion": "v1", "metadata": meta, "items": []})


def kube_side(made: Cluster, port: int, source: random.Random) -> Side:
    """A node whose leases are in Kubernetes."""

    def join() -> None:
        made.join(source.randrange(2, 200))

    def leave() -> None:
        if len(made.peers) > 5:
            made.leave(source.choice(sorted(made.peers)))

    def fail() -> None:
        answers: list[Any] = [
            status(503, "ServiceUnavailable"),
            status(429, "TooManyRequests", retryAfterSeconds=1),
            status(410, "Expired"),
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nnot json!",
            b"\xff\xff",
            _without_end,
            _bomb,
            _same_page,
        ]
        verb = source.choice(["list", "watch", "patch", "get"])
        if not made.server.faults[verb]:
            made.server.fail(verb, *[source.choice(answers) for _ in range(source.randrange(1, 4))])

    def nonsense() -> None:
        made.server.send(
            source.choice([{"type": "ADDED", "object": 5}, {"type": 5}, {}, "cut", "end"])
        )

    def quiet() -> None:
        for faults in made.server.faults.values():
            faults.clear()

    cuts = [made.server.cut, made.server.compact, made.server.bookmark]
    happens = [join, join, leave, leave, fail, fail, nonsense, *cuts]
    side = Side("kubernetes", made, port, happens, quiet)
    side.happens.append(side.reload)
    return side


def storm(sides: list[Side], seconds: float, source: random.Random) -> None:
    """Let things happen for so long."""
    end = time.monotonic() + seconds
    for side in sides:
        if source.random() < 0.5:
            side.drift()
    while time.monotonic() < end:
        for side in sides:
            source.choice(side.happens)()
            side.watch_health()
        time.sleep(source.uniform(0.1, 1.0))


def soak(sides: list[Side], seconds: float, source: random.Random) -> list[str]:
    """Let storms come and go for so long; return what was wrong."""
    start, storms = time.monotonic(), 0
    try:
        for side in sides:
            side.settle()
        while time.monotonic() - start < seconds:
            storm(sides, source.uniform(*STORM), source)
            storms += 1
            for side in sides:
                side.settle()
    except AssertionError as error:
        return [str(error), *(text for side in sides for text in side.truth.untrue)]
    wrong = [f"{side.name}: {text}" for side in sides for text in side.truth.untrue]
    for side in sides:
        wrong += side.growth()
        print(f"{side.name}: {storms} storms, {side.weights[0]} at first, {side.weights[-1]} in the"
              " end", file=sys.stderr)  # fmt: skip
    return wrong


def main() -> int:
    """Run it, and print what was wrong as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    isolation.isolate()
    source = random.Random(asked.seed)
    with Lab() as lab, tempfile.TemporaryDirectory() as folder:
        places = [Path(folder, name) for name in ("etcd", "kube", "pki")]
        for place in places:
            place.mkdir()
        near, far = lab.host(), lab.host()
        joined = Joined(near, 4, places[0], wait_until)
        pki = Certificates(places[2])
        pki.issue("server", "127.0.0.1")
        for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            far.sysctl(name, 1)
        cluster = Cluster(far, places[1], pki, wait_until)
        try:
            joined.publish_config()
            port = free_port(far)
            sides = [etcd_side(joined, source), kube_side(cluster, port, source)]
            joined.start("--audit-interval", "60")
            cluster.start("--healthz-ip", "127.0.0.1", "--healthz-port", str(port))
            wrong = soak(sides, asked.seconds, source)
            if wrong:
                print(joined.log.read_text()[-8000:], cluster.said()[-8000:], file=sys.stderr)
        except FlannelDPError as error:
            wrong = [str(error)]
        finally:
            joined.close()
            cluster.close()
    print(
        json.dumps({"seed": asked.seed, "seconds": asked.seconds, "ok": not wrong, "wrong": wrong})
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
