"""Two agents in a hostile world for a while: one's leases are in etcd, the other's in Kubernetes.

``python -m bench.soak --seconds 3600 --seed 1``, as root, in a minute with ``--seconds 60``. What
goes wrong at random, by a fixed seed: answers of etcd that cannot be read or have no end, floods
of frames, compactions; errors, broken watches and lost history of the API server; drift. In
the end each kernel has to be as the leases say, without growth of memory, descriptors or threads,
and no /healthz may have said ok for more than ten seconds while the kernel was not as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flannel_dp.errors import FlannelDPError
from tests.lib import isolation
from tests.lib.apiserver import Certificates, status
from tests.lib.etcd_garbler import frame
from tests.lib.hosts import Lab
from tests.lib.joined_service import Joined
from tests.lib.kube_cluster import Cluster
from tests.lib.leases import DEVICE, subnet
from tests.lib.service import fetch, free_port
from tests.lib.waiting import wait_until

#: Seconds that health may be wrong for, and that the end may take.
UNTRUE, SETTLE = 10.0, 120.0
#: Growth that is none: of bytes, of descriptors and of threads.
MEMORY, DESCRIPTORS, THREADS = 8 << 20, 4, 2

PING, SETTINGS, WINDOW = frame(6, 0, 0, bytes(8)), frame(4, 0, 0, b""), frame(8, 0, 0, b"\0\0\0\1")


def weigh(pid: int) -> tuple[int, int, int]:
    """Return resident bytes, descriptors and threads of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    folder = f"/proc/{pid}"
    return pages * 4096, len(os.listdir(f"{folder}/fd")), len(os.listdir(f"{folder}/task"))


class Side:
    """One agent and its store: what can happen, and whether all is well."""

    def __init__(self, name: str, made: Any, port: int, happens: list[Callable[[], object]]):
        self.name, self.made, self.port, self.happens = name, made, port, happens
        self.wrong_since: float | None = None
        self.untrue: list[str] = []
        self.weight = (0, 0, 0)

    def clean(self) -> bool:
        if isinstance(self.made, Cluster):
            return self.made.kernel() == self.made.wanted()
        return bool(self.made.clean())

    def watch_health(self, now: float) -> None:
        """Note a word of health that has been untrue for too long."""
        code, text = fetch(self.made.host, self.port, "/healthz")
        if self.clean() or code != 200 or not text.startswith("ok"):
            self.wrong_since = None
        elif self.wrong_since is None:
            self.wrong_since = now
        elif now - self.wrong_since > UNTRUE:
            self.untrue.append(f"{self.name}: ok for {now - self.wrong_since:.0f} s, and it is not")
            self.wrong_since = None


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
            [lambda data: b"\xff\xff\xff", lambda data: data[: len(data) // 2], lambda data: b""]
        )
        method = source.choice(["Range", "Watch", "LeaseKeepAlive"])
        made.garbler.fail(method, *[wrong] * source.randrange(1, 4))

    def flood() -> None:
        made.garbler.flood(
            source.choice(["Range", "Watch"]), source.choice([PING, SETTINGS, WINDOW])
        )

    def compact() -> None:
        add()  # there is nothing new to compact otherwise
        remove()
        with suppress(AssertionError):
            made.etcd.compact()

    def drift() -> None:
        made.host.exec("ip", "link", "set", DEVICE[made.family], "down")

    for _ in range(8):
        add()
    return Side("etcd", made, made.health, [add, add, remove, garble, flood, compact, drift])


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
        ]
        verb = source.choice(["list", "watch", "patch"])
        made.server.fail(verb, *[source.choice(answers) for _ in range(source.randrange(1, 4))])

    def nonsense() -> None:
        made.server.send("nonsense")

    cuts = [made.server.cut, made.server.compact, made.server.bookmark]
    return Side("kubernetes", made, port, [join, join, leave, fail, nonsense, *cuts])


def soak(sides: list[Side], seconds: float, source: random.Random) -> list[str]:
    """Let things happen for so long; return what was wrong."""
    for side in sides:
        wait_until(side.clean, SETTLE)
    start = time.monotonic()
    weighed = False
    while (now := time.monotonic()) - start < seconds:
        for side in sides:
            source.choice(side.happens)()
            side.watch_health(now)
        if not weighed and now - start > seconds / 4:
            weighed = True
            for side in sides:
                side.weight = weigh(side.made.process.pid)
        time.sleep(source.uniform(0.1, 1.0))
    wrong = [text for side in sides for text in side.untrue]
    for side in sides:
        try:
            wait_until(side.clean, SETTLE)
            wait_until(lambda side=side: fetch(side.made.host, side.port, "/healthz")[0] == 200)
        except AssertionError:
            wrong.append(f"{side.name}: the kernel is not as the leases say")
        if side.made.process.poll() is not None:
            wrong.append(f"{side.name}: the agent ended")
            continue
        now_weight = weigh(side.made.process.pid)
        rows = zip(("bytes", "descriptors", "threads"), side.weight, now_weight, strict=True)
        for (what, before, after), most in zip(rows, (MEMORY, DESCRIPTORS, THREADS), strict=True):
            if after - before > most:
                wrong.append(f"{side.name}: {before} {what} have become {after}")
        print(f"{side.name}: {side.weight} then, {now_weight} in the end", file=sys.stderr)
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
                print(joined.log.read_text()[-4000:], cluster.said()[-4000:], file=sys.stderr)
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
