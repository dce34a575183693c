"""The agent as a process: ``flannel-dp sync --watch`` on a host, with its files."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.cluster.lease import Lease
from flannel_dp.kernel.netns import call_in_netns
from tests.lib import programs
from tests.lib.kernel import expected, observed
from tests.lib.leases import lease_of, network_config, peers
from tests.lib.waiting import LIMIT, NEVER

CAP_NET_ADMIN = 1 << 12
CAP_NET_RAW = 1 << 13


class Service:
    """A running ``sync --watch`` of a host, with its files."""

    def __init__(self, host: Any, family: int, folder: Path, wait: Callable[..., None]) -> None:
        self.host, self.family, self.folder, self.wait = host, family, folder, wait
        self.net_conf, self.leases = folder / "net-conf.json", folder / "leases.json"
        self.log = folder / "log"
        self.process: Any = None
        self.configure()
        self.publish(5)

    def configure(self, **backend: Any) -> None:
        config = network_config(self.family, **backend)
        document = {"Backend": {"Type": "vxlan", **backend}, "EnableIPv4": self.family == 4}
        document |= {"EnableIPv6": self.family == 6}
        name = "Network" if self.family == 4 else "IPv6Network"
        network = config.network if self.family == 4 else config.ipv6_network
        self.net_conf.write_text(json.dumps(document | {name: str(network)}))

    def publish(self, count: int) -> list[Lease]:
        """The own lease and those of nodes 1 to ``count``, in place of the file that was there."""
        self.peers = peers(range(1, count + 1))
        self.write(self.peers)
        return self.peers

    def write(self, leases: Iterable[Lease]) -> None:
        """Put these leases, and this node's, in place of the file that was there."""
        every = [lease_of(self.host), *leases]
        self.replace('{"leases": [' + ",".join(lease.to_json() for lease in every) + "]}")

    def replace(self, text: str) -> None:
        fresh = self.folder / "fresh"
        fresh.write_text(text)
        fresh.rename(self.leases)

    def command(self, *more: str) -> list[str]:
        return [
            *(sys.executable, "-m", "flannel_dp", "sync", "--watch", "--netns", self.host.ns),
            *("--net-conf", str(self.net_conf), "--leases", str(self.leases), "--iface", "eth0"),
            *("--firewall", "none", "--audit-interval", str(NEVER), *more),
        ]

    def start(self, *more: str, **environment: str) -> Service:
        with self.log.open("wb") as log:
            self.process = programs.Popen(
                self.command(*more), stderr=log, stdout=log, env=os.environ | environment
            )
        return self

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def clean(self) -> bool:
        """Whether the kernel is exactly as the published leases say."""
        return bool(observed(self.host, self.family) == expected(self.peers, self.family))

    def await_clean(self) -> None:
        self.wait(lambda: self.ended() or self.clean())
        assert not self.ended(), self.log.read_text()

    def ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def said(self, text: str) -> bool:
        return text in self.log.read_text()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(LIMIT)


@pytest.fixture(name="service")
def service_fixture(
    host: Any, family: int, tmp_path: Path, wait_until: Callable[..., None]
) -> Iterator[Service]:
    made = Service(host, family, tmp_path, wait_until)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.wait()


def free_port(host: Any) -> int:
    def bind() -> int:
        with socket.socket() as tried:
            tried.bind(("127.0.0.1", 0))
            return int(tried.getsockname()[1])

    return call_in_netns(host.ns, bind)


def fetch(host: Any, port: int, path: str) -> tuple[int, str]:
    """A GET from inside the host's namespace; of /healthz without its warnings, which are about a
    host whose neighbour table other tests fill."""

    def get() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=LIMIT) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    code, text = call_in_netns(host.ns, get)
    if path == "/healthz":
        text = "".join(one for one in text.splitlines(True) if not one.startswith("warning: "))
    return code, text
