"""FRR's zebra and BIRD, each in the namespace that the thread is in, with routes to install.

Both know all routes, and read no more configuration, when the clock starts; it stops
when the kernel has told of the last one. zebra is given them by its own API (ZAPI
version 6, FRR 8.x), as any daemon of FRR gives it routes: staticd is no use here, it
takes 10 ms a route to read its configuration. BIRD has them in a static protocol that
is disabled, and is told to enable it.
"""

from __future__ import annotations

import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bench.job import Job, Node

ZEBRA = "/usr/lib/frr/zebra"

#: Route protocols (rtnetlink(7), /etc/iproute2/rt_protos): what these mark their routes with.
RTPROT_BIRD = 12
RTPROT_ZSTATIC = 196

_DEADLINE = 300.0
_START = 20.0

_RTM_NEWROUTE = 24
_SO_RCVBUFFORCE = 33
_GROUPS = {4: 0x40, 6: 0x400}  # RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_ROUTE

Run = Callable[[], float]


class News:
    """The kernel's own word for each new route of one protocol."""

    def __init__(self, family: int, protocol: int) -> None:
        self._protocol = protocol
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 256 << 20)
        self._socket.bind((0, _GROUPS[family]))

    def wait(self, count: int) -> None:
        """Return when ``count`` routes are new; TimeoutError after five minutes."""
        deadline = time.monotonic() + _DEADLINE
        seen = 0
        while seen < count:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                seen += self._count(self._socket.recv(1 << 16))
            except TimeoutError:
                raise TimeoutError(f"{seen} of {count} routes after {_DEADLINE:.0f} s") from None

    def _count(self, data: bytes) -> int:
        at = found = 0
        while at + 28 <= len(data):
            length, kind = struct.unpack_from("=IH", data, at)
            found += kind == _RTM_NEWROUTE and data[at + 21] == self._protocol
            at += (length + 3) & ~3
        return found

    def close(self) -> None:
        self._socket.close()


def _timed(job: Job, protocol: int, begin: Callable[[], None]) -> float:
    news = News(job.case.family, protocol)
    try:
        started = time.perf_counter()
        begin()
        news.wait(len(job.nodes))
        return time.perf_counter() - started
    finally:
        news.close()


@contextmanager
def _daemon(command: list[str], folder: Path, address: Path) -> Iterator[socket.socket]:
    """A daemon that has begun to listen at ``address``, and a connection to it."""
    log = folder / "output"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        ) as process,
    ):
        try:
            with _connected(process, address, log) as connection:
                yield connection
        finally:
            process.terminate()
            try:
                process.wait(_DEADLINE)
            except subprocess.TimeoutExpired:
                process.kill()


def _connected(process: subprocess.Popen[bytes], address: Path, log: Path) -> socket.socket:
    deadline = time.monotonic() + _START
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    connection.settimeout(_DEADLINE)
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(FileNotFoundError, ConnectionRefusedError):
            connection.connect(str(address))
            return connection
        time.sleep(0.01)
    connection.close()
    said = log.read_text(encoding="utf-8", errors="replace")[-500:]
    raise RuntimeError(f"{process.args!r} does not listen at {address}: {said}")


# --- BIRD ---------------------------------------------------------------------------


@contextmanager
def bird(job: Job) -> Iterator[Run]:
    """``birdc enable peers``, with static and kernel protocol and nothing else."""
    with tempfile.TemporaryDirectory(prefix="fdp-bird-") as name:
        folder = Path(name)
        config, control = folder / "bird.conf", folder / "control"
        config.write_text(_bird_config(job), encoding="utf-8")
        command = ["bird", "-f", "-c", str(config), "-s", str(control), "-P", str(folder / "pid")]
        with _daemon(command, folder, control) as connection:
            _bird_answer(connection, b"0001")

            def begin() -> None:
                connection.sendall(b"enable peers\n")

            def run() -> float:
                taken = _timed(job, RTPROT_BIRD, begin)
                _bird_answer(connection, b"0011")
                return taken

            yield run


def _bird_config(job: Job) -> str:
    family = f"ipv{job.case.family}"
    routes = "\n".join(f"  route {node.subnet} via {node.gateway};" for node in job.nodes)
    return f"""router id 192.0.2.1;
protocol device {{ }}
protocol direct {{ {family}; }}
protocol kernel {{ {family} {{ import none; export where proto = "peers"; }}; }}
protocol static peers {{
  disabled;
  {family};
{routes}
}}
"""


def _bird_answer(connection: socket.socket, code: bytes) -> None:
    said = connection.recv(4096)
    if code not in said:
        raise RuntimeError(f"bird answered {said!r}, which is not {code.decode()}")


# --- zebra --------------------------------------------------------------------------

_ZAPI_VERSION = 6
_INTERFACE_ADD, _ROUTE_ADD, _HELLO = 0, 8, 18
_ZEBRA_ROUTE_STATIC = 3
#: Distance and recursive resolution, as staticd sets them; a nexthop and a distance follow.
_ZEBRA_FLAGS, _ZAPI_MESSAGE = 0x41, 0x03
_UNICAST = 1
_GATEWAY_AND_IFINDEX = {4: 3, 6: 5}


@contextmanager
def zebra(job: Job) -> Iterator[Run]:
    """All routes in one write to zebra's API socket, encoded before."""
    with tempfile.TemporaryDirectory(prefix="fdp-frr-") as name:
        folder = Path(name)
        shutil.chown(folder, "frr", "frr")  # zebra gives up root
        config, control = folder / "zebra.conf", folder / "zserv"
        config.touch()
        command = [ZEBRA, "-f", str(config), "-z", str(control), "-i", str(folder / "pid")]
        # -s as in Debian's /etc/frr/daemons; no TCP port for its terminal.
        command += ["--vty_socket", str(folder), "-P", "0", "-s", "90000000"]
        messages = b"".join(_zebra_routes(job))
        with _daemon(command, folder, control) as connection:
            connection.sendall(
                _zapi(_HELLO, struct.pack("!BHIBB", _ZEBRA_ROUTE_STATIC, 0, 0, 0, 0))
            )
            connection.sendall(_zapi(_INTERFACE_ADD, b""))
            connection.recv(1 << 16)  # its interfaces: it is up
            yield lambda: _timed(job, RTPROT_ZSTATIC, lambda: connection.sendall(messages))


def _zapi(command: int, body: bytes) -> bytes:
    return struct.pack("!HBBIH", 10 + len(body), 0xFE, _ZAPI_VERSION, 0, command) + body


def _zebra_routes(job: Job) -> Iterator[bytes]:
    ifindex = struct.pack("!I", socket.if_nametoindex(job.device))
    family = socket.AF_INET if job.case.family == 4 else socket.AF_INET6
    kind = _GATEWAY_AND_IFINDEX[job.case.family]
    for node in job.nodes:
        yield _zapi(_ROUTE_ADD, _zebra_route(node, family, kind, ifindex))


def _zebra_route(node: Node, family: int, kind: int, ifindex: bytes) -> bytes:
    address, _, length = node.subnet.partition("/")
    head = struct.pack(
        "!BHIIBBB",
        _ZEBRA_ROUTE_STATIC,
        0,
        _ZEBRA_FLAGS,
        _ZAPI_MESSAGE,
        _UNICAST,
        family,
        int(length),
    )
    prefix = socket.inet_pton(family, address)[: (int(length) + 7) // 8]
    nexthop = struct.pack("!HIBB", 1, 0, kind, 0) + socket.inet_pton(family, node.gateway)
    return head + prefix + nexthop + ifindex + b"\x01"
