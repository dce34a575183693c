"""Real etcd servers."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.kernel.netns import call_in_netns
from flannel_dp.sources.etcd.grpc import KeepAlive
from flannel_dp.sources.etcd.options import EtcdOptions
from flannel_dp.sources.etcd.source import EtcdSource
from tests.lib.follower import Follower
from tests.lib.waiting import LIMIT, wait_until

PREFIX = "/coreos.com/network"
CONFIG = '{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}'
#: For a server that will not answer: it is found soon.
QUICK = KeepAlive(0.4, 0.4)
#: For a server that answers, however busy the machine is.
PATIENT = KeepAlive(0.4, LIMIT)


#: A process has one range of ports, while it has a socket of that name.
_RANGES = {first: f"\0flannel-dp-tests-{first}" for first in range(10_000, 32_500, 500)}
_held: list[socket.socket] = []


@functools.cache
def _ports() -> Iterator[int]:
    """Ports of this process alone, also beside other runs, and none that the kernel gives to
    connections."""
    _held.append(socket.socket(socket.AF_UNIX))
    for first, name in _RANGES.items():
        with contextlib.suppress(OSError):
            _held[0].bind(name)
            return itertools.cycle(range(first, first + 500))
    pytest.fail("other runs of these tests have all ports")


def free_ports(count: int) -> list[int]:
    """Free ports of 127.0.0.1, which stay free until they are used."""
    found: list[int] = []
    while len(found) < count:
        port = next(_ports())
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
    return found


@dataclass
class EtcdServer:
    """One member. ``tls`` are certificate and key; ``ca`` makes it ask for client certificates."""

    directory: Path
    client_port: int
    peer_port: int
    name: str = "one"
    cluster: str = ""
    address: str = "127.0.0.1"
    netns: str = ""
    tls: tuple[Path, Path] | None = None
    ca: Path | None = None
    flags: Sequence[str] = ()
    process: subprocess.Popen[bytes] | None = None
    ctl: Sequence[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.address}:{self.client_port}"

    @property
    def peer(self) -> str:
        return f"{self.name}=http://{self.address}:{self.peer_port}"

    def start(self) -> EtcdServer:
        """Start it; ``await_ready`` returns when it answers."""
        binary = shutil.which("etcd")
        if binary is None:
            pytest.fail("these tests need etcd: apt-get install etcd-server etcd-client")
        peer = self.peer.partition("=")[2]
        command = [
            *(("ip", "netns", "exec", self.netns) if self.netns else ()),
            binary,
            f"--name={self.name}",
            f"--data-dir={self.directory / self.name}",
            f"--listen-client-urls={self.url}",
            f"--advertise-client-urls={self.url}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster={self.cluster or self.peer}",
            # A member that is alone waits for its own election as long as for the others' votes.
            *(
                ("--heartbeat-interval=50", "--election-timeout=400")
                if self.cluster.count(",")
                else ("--heartbeat-interval=20", "--election-timeout=100")
            ),
            "--grpc-keepalive-min-time=100ms",
            "--unsafe-no-fsync",
            "--logger=zap",
            "--log-level=error",
            *self.flags,
        ]
        if self.tls:
            command += [f"--cert-file={self.tls[0]}", f"--key-file={self.tls[1]}"]
        if self.ca:
            command += ["--client-cert-auth", f"--trusted-ca-file={self.ca}"]
        with open(self.directory / f"{self.name}.log", "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        return self

    def await_ready(self) -> EtcdServer:
        """Return when it answers."""

        def answers() -> bool:
            assert self.process is not None
            log = self.directory / f"{self.name}.log"
            assert self.process.poll() is None, log.read_text()
            if not self.tls:
                return call_in_netns(self.netns or None, self._is_healthy)
            done = self._etcdctl("endpoint", "health")
            return done.returncode == 0 or b"permission denied" in done.stderr

        wait_until(answers)
        return self

    def _is_healthy(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return bool(json.loads(self._request("GET", "/health")[1])["health"] == "true")
        return False

    def _request(self, method: str, path: str, body: str = "") -> tuple[int, bytes]:
        asked = http.client.HTTPConnection(self.address, self.client_port, timeout=LIMIT)
        with contextlib.closing(asked):
            asked.request(method, path, body)
            answer = asked.getresponse()
            return answer.status, answer.read()

    def _ask(self, path: str, **body: Any) -> dict[str, Any]:
        """A request of etcd's JSON gateway, which takes a twentieth of what etcdctl takes."""
        words = json.dumps({name: _encoded(value) for name, value in body.items()})
        said = 0, b""

        def is_answered() -> bool:
            nonlocal said
            request = self._request, "POST", f"/v3/{path}", words
            said = call_in_netns(self.netns or None, *request)
            return said[0] != http.HTTPStatus.SERVICE_UNAVAILABLE  # members elect a leader

        wait_until(is_answered)
        assert said[0] == http.HTTPStatus.OK, said
        return dict(json.loads(said[1]))

    @property
    def _is_open(self) -> bool:
        """Whether anybody may ask without certificates and passwords."""
        return not self.tls and not self.ctl

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def _etcdctl(self, *args: str, stdin: str = "") -> subprocess.CompletedProcess[bytes]:
        command = [
            "etcdctl",
            f"--endpoints={self.url}",
            f"--command-timeout={LIMIT:.0f}s",
            *self.ctl,
            *args,
        ]
        if self.netns:
            command = ["ip", "netns", "exec", self.netns, *command]
        environment = {**os.environ, "ETCDCTL_API": "3"}
        return subprocess.run(
            command, input=stdin.encode(), capture_output=True, env=environment, check=False
        )

    def run(self, *args: str, stdin: str = "") -> str:
        """Run ``etcdctl ARGS``, return what it prints."""
        done = self._etcdctl(*args, stdin=stdin)
        assert done.returncode == 0, f"etcdctl {args}: {done.stderr.decode()}"
        return done.stdout.decode()

    def put(self, name: str, value: str, *args: str) -> None:
        """``etcdctl put PREFIX/NAME VALUE``."""
        if self._is_open and not args:
            self._ask("kv/put", key=f"{PREFIX}/{name}", value=value)
        else:
            self.run("put", *args, f"{PREFIX}/{name}", value)

    def delete(self, name: str) -> None:
        if self._is_open:
            self._ask("kv/deleterange", key=f"{PREFIX}/{name}")
        else:
            self.run("del", f"{PREFIX}/{name}")

    def leases(self) -> dict[str, dict[str, Any]]:
        """The keys below PREFIX/subnets/ by their last part, as etcdctl shows them."""
        first = f"{PREFIX}/subnets/"
        if self._is_open:
            found = self._ask("kv/range", key=first, range_end=f"{first[:-1]}0")
        else:
            found = json.loads(self.run("get", "--prefix", first, "-w", "json"))
        return {
            _decoded(kv["key"]).rpartition("/")[2]: {
                name: value if name in ("key", "value") else int(value)
                for name, value in kv.items()
            }
            for kv in found.get("kvs", [])
        }

    def value(self, name: str) -> str:
        """The value of ``PREFIX/subnets/NAME``."""
        return value_of(self.leases()[name])

    def renewals(self) -> int:
        """How often it has renewed a lease, by its own count."""
        shown = self._request("GET", "/metrics")[1].decode()
        found = re.search(r"^etcd_debugging_lease_renewed_total (\d+)$", shown, re.MULTILINE)
        assert found is not None
        return int(found[1])

    def revision(self) -> int:
        return int(json.loads(self.run("get", "nothing", "-w", "json"))["header"]["revision"])

    def compact(self) -> None:
        self.run("compact", str(self.revision()))

    def options(self, **how: Any) -> EtcdOptions:
        return EtcdOptions(**({"endpoints": (self.url,), "prefix": PREFIX} | how))

    def enable_auth(self, password: str = "pw") -> None:
        """Root, and a user "node" that may do all below PREFIX."""
        self.run("user", "add", "root:root")
        self.run("role", "add", "nodes")
        self.run("role", "grant-permission", "nodes", "--prefix=true", "readwrite", f"{PREFIX}/")
        self.run("user", "add", f"node:{password}")
        self.run("user", "grant-role", "node", "nodes")
        self.run("user", "grant-role", "root", "root")
        self.run("auth", "enable")
        self.ctl = ["--user=root:root"]


def value_of(kv: dict[str, Any]) -> str:
    """The value of one of ``leases()``."""
    return _decoded(kv["value"])


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode("utf-8", "surrogateescape")).decode()


def _decoded(text: str) -> str:
    return base64.b64decode(text).decode()


def attrs(number: int, mac: str = "") -> str:
    """The value of node ``number``'s key."""
    mac = mac or f"02:00:00:00:{number >> 8:02x}:{number & 255:02x}"
    return (
        f'{{"PublicIP":"192.0.2.{number}","PublicIPv6":null,"BackendType":"vxlan",'
        f'"BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}'
    )


def subnet_name(number: int) -> str:
    return f"10.5.{number}.0-24"


def follow(server: EtcdServer, *, keepalive: KeepAlive = PATIENT, **how: Any) -> Follower:
    """A follower of a source with these keepalives."""
    options = server.options(**how)
    return Follower(EtcdSource(options, timeout=LIMIT, keepalive=keepalive), netns="")
