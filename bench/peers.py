"""Other ways to have a node's routes, neighbours and FDB entries in the kernel.

Each peer is given a Job and does all of it in the namespace that the thread is in. What
it says it took is the best that can be said for it: reading its input, importing and
encoding what can be encoded before are left out where the program lets us.

| peer | what runs | the clock |
|---|---|---|
| floor | the library's own messages from plain C (floor/floor.c) | the program's own |
| flannel-style C | one socket, message and ack for each object (peers/flannel.c) | its own |
| ip -batch | ``bridge -batch`` (FDB), ``ip -batch`` (the rest); gateway routes | processes |
| ip -batch, nexthops | the same, with a nexthop object for each route | processes |
| pyroute2 | one call for each object | calls, without the import |
| pyroute2 IPBatch | 96 objects compiled and sent at a time | the same |
| FRR zebra | routes by its API, installed from one write | write to the kernel's last news |
| BIRD | routes of a static protocol that is enabled | command to the last news |
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from bench import floors, routers
from bench.job import Job
from bench.routers import Run
from flannel_dp.resources.peers.nexthops import NEXTHOP_BASE
from flannel_dp.tables.entries import PROTOCOL

SOURCE = Path(__file__).parent / "peers"
BINARY = Path(__file__).parent / "build" / "flannel"
_ROOT = Path(__file__).parent.parent

#: How versions() says that a peer cannot take part.
MISSING = "not installed"

#: No cap: as large as clusters are made here.
_ANY = 1_000_000

Ready = Callable[[Job], AbstractContextManager[Run]]


@dataclass(frozen=True)
class Peer:
    """One way to do a job.

    ``ready(job)`` prepares it and gives a function that does it and returns seconds.
    ``version()`` is "" where the program is not installed; ``package`` is Debian's.
    ``cap`` and ``cap_full`` are the most nodes, by family, that it is given in the short
    and in the full run: beyond, it takes too long.
    """

    name: str
    layouts: tuple[str, ...]
    families: tuple[int, ...]
    ready: Ready
    version: Callable[[], str]
    cap: dict[int, int]
    cap_full: dict[int, int]
    package: str = ""

    def takes(self, layout: str, family: int, nodes: int, *, full: bool) -> bool:
        """Whether a case is for this peer."""
        cap = (self.cap_full if full else self.cap).get(family, _ANY)
        return layout in self.layouts and family in self.families and nodes <= cap


def build() -> Path:
    """Compile the flannel-style program if it is older than its source."""
    subprocess.run(["make", "-s", "-C", str(SOURCE)], check=True)
    return BINARY


def _process(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=_ROOT)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-500:]
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {said}")
    return done.stdout


# --- floor and flannel ----------------------------------------------------------------


@contextmanager
def _floor(job: Job) -> Iterator[Run]:
    yield lambda: floors.run("send", job.messages, job.netns).wall


def _node_lines(job: Job) -> Iterator[str]:
    for node in job.nodes:
        mac = node.mac or "00:00:00:00:00:00"  # host-gw has none and uses none
        yield f"{node.subnet} {node.gateway} {mac} {node.endpoint}"


@contextmanager
def _flannel(job: Job) -> Iterator[Run]:
    path = job.write("flannel", _node_lines(job))
    program = str(build())

    def run() -> float:
        found = json.loads(_process(program, job.case.layout, str(path), job.device))
        assert found["peers"] == job.case.nodes
        return float(found["ns"]) / 1e9

    yield run


# --- iproute2 ---------------------------------------------------------------------------


def _neighbour_lines(job: Job) -> Iterator[str]:
    for node in job.nodes if job.tunnelled else ():
        yield f"neigh replace {node.gateway} lladdr {node.mac} dev {job.device} nud permanent"


def _route_lines(job: Job) -> Iterator[str]:
    onlink = " onlink" if job.tunnelled else ""
    for node in job.nodes:
        yield f"route replace {node.subnet} via {node.gateway} dev {job.device}{onlink}"


def _nexthop_lines(job: Job) -> Iterator[str]:
    for node in job.nodes:
        number = nexthop_id(node.subnet)
        where = f"via {node.gateway} dev {job.device}" + (" onlink" if job.tunnelled else "")
        yield f"nexthop replace id {number} {where} protocol {PROTOCOL}"
    for node in job.nodes:
        yield f"route replace {node.subnet} nhid {nexthop_id(node.subnet)} protocol {PROTOCOL}"


def nexthop_id(subnet: str) -> int:
    """The id that the library gives an IPv4 subnet's nexthop object."""
    address = 0
    for byte in subnet.partition("/")[0].split("."):
        address = address << 8 | int(byte)
    return NEXTHOP_BASE + (address & 0x0FFF_FFFF)


def _fdb_lines(job: Job) -> Iterator[str]:
    for node in job.nodes if job.tunnelled else ():
        yield f"fdb replace {node.mac} dev {job.device} dst {node.endpoint} self permanent"


def _iproute2(routes: Callable[[Job], Iterator[str]]) -> Ready:
    @contextmanager
    def ready(job: Job) -> Iterator[Run]:
        fdb = job.write("bridge-batch", _fdb_lines(job))
        rest = job.write(
            "ip-batch", (line for part in (_neighbour_lines, routes) for line in part(job))
        )

        def run() -> float:
            started = time.perf_counter()
            if job.tunnelled:
                _process("bridge", "-batch", str(fdb))
            _process("ip", f"-{job.case.family}", "-batch", str(rest))
            return time.perf_counter() - started

        yield run

    return ready


# --- pyroute2 ----------------------------------------------------------------------------


def _pyroute2(what: str) -> Ready:
    @contextmanager
    def ready(job: Job) -> Iterator[Run]:
        path = job.write(f"pyroute2-{what}", _node_lines(job))

        def run() -> float:
            command = [sys.executable, "-m", "bench.pyroute2_probe", what, str(job.case.family)]
            found = json.loads(_process(*command, str(path), job.device))
            assert found["done"] == (1 if what == "dump" else 3) * job.case.nodes
            return float(found["seconds"])

        yield run

    return ready


# --- who there is --------------------------------------------------------------------------


@cache
def _said(*command: str) -> str:
    """The first number of a program's version; "" where there is no such program."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"\d+\.\d+[\w.]*", done.stdout + done.stderr)
    return found.group() if found else "unknown"


def _compiler() -> str:
    return f"gcc {_said('gcc', '-dumpfullversion')}"


def _iproute2_version() -> str:
    return _said("ip", "-V")


_BOTH = ("vxlan", "host-gw")
_EITHER = (4, 6)

FLANNEL = "flannel-style C"
IP_BATCH = "ip -batch"
PYROUTE2 = "pyroute2"

#: In the order in which they run: what is slow comes last.
INSTALLING = (
    Peer("floor", _BOTH, _EITHER, _floor, _compiler, {}, {}),
    Peer(FLANNEL, ("vxlan",), _EITHER, _flannel, _compiler, {4: 10_000, 6: 10_000}, {}),
    # Three dumps a peer: quadratic whatever the kernel does.
    Peer(FLANNEL, ("host-gw",), _EITHER, _flannel, _compiler, {4: 1_000, 6: 1_000},
         {4: 3_000, 6: 3_000}),
    Peer(IP_BATCH, _BOTH, _EITHER, _iproute2(_route_lines), _iproute2_version, {}, {4: 10_000}),
    Peer("ip -batch, nexthops", ("vxlan",), (4,), _iproute2(_nexthop_lines), _iproute2_version,
         {}, {}),
    # 8.4 takes quadratic time of its own for IPv6: 7 s for 10,000 routes, minutes for 50,000.
    Peer("FRR zebra", ("host-gw",), _EITHER, routers.zebra,
         lambda: _said(routers.ZEBRA, "--version"), {6: 3_000}, {6: 10_000}, "frr"),
    Peer("BIRD", ("host-gw",), _EITHER, routers.bird, lambda: _said("bird", "--version"),
         {}, {4: 10_000}, "bird2"),
    Peer("pyroute2 IPBatch", ("vxlan",), _EITHER, _pyroute2("batch"), lambda: version("pyroute2"),
         {4: 1_000, 6: 1_000}, {4: 10_000, 6: 10_000}),
    Peer(PYROUTE2, ("vxlan",), _EITHER, _pyroute2("objects"), lambda: version("pyroute2"),
         {6: 3_000}, {4: 10_000, 6: 10_000}),
)  # fmt: skip


@contextmanager
def _floor_dump(job: Job) -> Iterator[Run]:
    yield lambda: floors.run("dump", job.messages, job.netns).wall


@contextmanager
def _iproute2_dump(job: Job) -> Iterator[Run]:
    family = f"-{job.case.family}"

    def run() -> float:
        started = time.perf_counter()
        _process("ip", family, "route", "show", "dev", job.device)
        _process("ip", family, "neigh", "show", "dev", job.device)
        _process("bridge", "fdb", "show", "dev", job.device)
        return time.perf_counter() - started

    yield run


#: Only reading what is there: none of these looks for a difference.
READING = (
    Peer("floor", ("vxlan",), _EITHER, _floor_dump, _compiler, {}, {}),
    Peer("ip, bridge show", ("vxlan",), _EITHER, _iproute2_dump, _iproute2_version, {}, {}),
    Peer(PYROUTE2, ("vxlan",), _EITHER, _pyroute2("dump"), lambda: version("pyroute2"),
         {}, {4: 10_000, 6: 10_000}),
)  # fmt: skip


def installed(peers: tuple[Peer, ...]) -> tuple[Peer, ...]:
    """Those whose program is here."""
    return tuple(peer for peer in peers if peer.version())


def versions() -> dict[str, str]:
    """The version of each peer, "not installed" where it is not."""
    return {
        peer.name: peer.version() or f"{MISSING}: apt-get install {peer.package}"
        for peer in (*INSTALLING, *READING)
    }
