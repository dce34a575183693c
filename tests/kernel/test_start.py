"""``flannel-dp sync --watch`` at boot: interface, address, default route, configuration and etcd
come late and in any order, and the agent waits for each of them with health served."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.agent import starting
from flannel_dp.agent.notify import Notifier
from flannel_dp.agent.status import StatusBoard
from flannel_dp.backoff import Backoff
from flannel_dp.errors import NotYet
from flannel_dp.kernel.links import LinkReader
from flannel_dp.kernel.netns import call_in_netns, netns_path
from tests.lib import programs
from tests.lib.etcd import PREFIX, EtcdServer
from tests.lib.kernel import has_device
from tests.lib.leases import DEVICE, network_config
from tests.lib.service import CAP_NET_ADMIN, Service, fetch, free_port
from tests.lib.waiting import LIMIT

ENDPOINT = "http://127.0.0.1:2379"


class Booting(Service):
    """An agent that serves health and tells a service manager how it is."""

    def __init__(self, host: Any, family: int, folder: Path, wait: Callable[..., None]) -> None:
        super().__init__(host, family, folder, wait)
        self.port = free_port(host)
        self.iface: tuple[str, ...] = ("--iface", "eth0")
        self.source: tuple[str, ...] = ()
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.bind(str(folder / "notify"))
        self.manager.setblocking(False)
        self._told: list[str] = []

    def command(self, *more: str) -> list[str]:
        words = super().command(*more)
        at = words.index("--iface")
        words[at : at + 2] = self.iface
        if self.source:
            at = words.index("--net-conf")
            words[at : at + 4] = self.source
        return [*words, "--subnet-file", str(self.folder / "subnet.env")]

    def boot(self, *more: str) -> Booting:
        port = ("--healthz-port", str(self.port))
        self.start(*port, *more, NOTIFY_SOCKET=str(self.folder / "notify"))
        return self

    def told(self) -> list[str]:
        """What the service manager was told so far."""
        while True:
            try:
                self._told += self.manager.recv(4096).decode().split("\n")
            except BlockingIOError:
                return self._told

    def health(self) -> tuple[int, str]:
        return fetch(self.host, self.port, "/healthz")

    def heartbeat(self) -> float:
        """When the last attempt began."""
        return float(
            json.loads(fetch(self.host, self.port, "/healthz?format=json")[1])["heartbeat"]
        )

    def await_waiting(self, reason: str) -> None:
        """Wait until it is seen waiting for ``reason``, and check what is told of that."""
        self.until(lambda: reason in self.health()[1])
        status, text = self.health()
        assert (status, text.splitlines()[0]) == (200, "degraded"), text
        (line,) = text.splitlines()[1:]
        assert line.startswith("start: "), text
        assert fetch(self.host, self.port, "/readyz")[0] == 503
        self.until(lambda: any(f"STATUS=starting: {reason}" in one for one in self.told()))
        assert "READY=1" not in self.told()
        assert not has_device(self.host, self.family)

    def await_attempts(self, count: int) -> None:
        """Wait until it has tried so many times more."""
        seen = {self.heartbeat()}

        def tried() -> bool:
            seen.add(self.heartbeat())
            return len(seen) > count

        self.until(tried)

    def await_ready(self) -> None:
        self.until(lambda: self.health() == (200, "ok\n"))
        self.until(lambda: fetch(self.host, self.port, "/readyz")[0] == 200)
        self.until(lambda: "READY=1" in self.told())

    def until(self, predicate: Callable[[], object]) -> None:
        try:
            self.wait(lambda: self.ended() or predicate(), timeout=LIMIT)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.health()}\n{self.log.read_text()}") from error
        assert not self.ended(), self.log.read_text()

    def lines(self, reason: str) -> list[str]:
        """The lines of the log that say that it waits for ``reason``."""
        every = self.log.read_text().splitlines()
        return [line for line in every if "Waiting before the start" in line and reason in line]

    def add_address(self, family: int | None = None) -> None:
        six = (family or self.family) == 6
        prefix = f"{self.host.ipv6}/64 nodad" if six else f"{self.host.ipv4}/24"
        self.host.ip(f"address add {prefix} dev eth0")


@pytest.fixture
def node(
    host: Any, family: int, tmp_path: Path, wait_until: Callable[..., None]
) -> Iterator[Booting]:
    made = Booting(host, family, tmp_path, wait_until)
    yield made
    made.manager.close()
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.wait()


# ---- the network ------------------------------------------------------------------


def test_an_interface_that_comes_late(node: Booting) -> None:
    node.host.ip("link set eth0 down")
    node.host.ip("link set eth0 name early0")
    node.boot()
    node.await_waiting("there is no interface 'eth0'")

    node.host.ip("link set early0 name eth0")
    node.host.ip("link set eth0 up")
    if node.family == 6:  # it had lost those when it went down
        node.add_address()

    node.await_clean()
    node.await_ready()
    assert len(node.lines("there is no interface 'eth0'")) == 1


def test_an_address_that_comes_late(node: Booting) -> None:
    node.host.ip("address flush dev eth0")
    node.boot()
    node.await_waiting(f"eth0 has no IPv{node.family} address")

    node.add_address()

    node.await_clean()
    node.await_ready()
    assert len(node.lines("eth0 has no")) == 1


def test_a_network_namespace_that_comes_late(node: Booting) -> None:
    late = node.folder / "netns"
    words = node.command("--healthz-port", str(node.port))
    words[words.index("--netns") + 1] = str(late)
    with node.log.open("wb") as log:
        node.process = programs.Popen(words, stdout=log, stderr=log)
    waited = f"network namespace {late} does not exist"
    node.wait(lambda: waited in node.log.read_text(), timeout=LIMIT)
    assert node.process.poll() is None

    late.symlink_to(netns_path(node.host.ns))

    node.await_clean()
    node.until(lambda: node.health() == (200, "ok\n"))
    assert len(node.lines(waited)) == 1


def test_a_named_address_that_comes_late(node: Booting) -> None:
    address = node.host.underlay(node.family)
    node.host.ip("address flush dev eth0")
    node.boot("--public-ip" if node.family == 4 else "--public-ipv6", address)
    node.await_waiting(f"{address} is not an address of this node")

    node.add_address()

    node.await_clean()
    node.await_ready()


def test_a_default_route_that_comes_late(node: Booting) -> None:
    node.iface = ()
    node.boot()
    node.await_waiting("there is no default route")

    gateway = "192.0.2.254" if node.family == 4 else "2001:db8::fe"
    node.host.ip(f"-{node.family} route add default via {gateway} dev eth0")

    node.await_clean()
    node.await_ready()
    assert len(node.lines("there is no default route")) == 1


@pytest.mark.parametrize("what", ["link", "address", "route"])
def test_an_event_of_the_kernel_ends_the_wait(
    host: Any, family: int, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the clock: a pause of a week is waited for here."""
    monkeypatch.setattr(starting, "Backoff", lambda first, most, random: Backoff(1e6, 1e6))
    host.ip("address flush dev eth0")
    address = f"{host.underlay(family)}/{24 if family == 4 else 64}"
    if what == "route":
        host.ip(f"address add {address} dev eth0" + (" nodad" if family == 6 else ""))
    gateway = "192.0.2.254" if family == 4 else "2001:db8::fe"
    step = {
        "link": "link add veth7 type veth peer name veth8",
        "address": f"address add {address} dev eth0" + (" nodad" if family == 6 else ""),
        "route": f"-{family} route add default via {gateway} dev eth0",
    }[what]
    noted, attempts = threading.Event(), 0

    def attempt() -> None:
        nonlocal attempts
        attempts += 1
        with LinkReader() as reader:
            there = {
                "link": lambda: reader.link("veth7"),
                "address": lambda: host.underlay(family) in {a.address for a in reader.addresses()},
                "route": lambda: list(reader.default_routes(family)),
            }[what]
            if not there():
                raise NotYet(f"there is no {what}")

    board = StatusBoard()
    board.on_change = lambda status: noted.set() if status.problems else None
    made = starting.Starting(board, Notifier())
    thread = threading.Thread(target=call_in_netns, args=(host.ns, made.until, attempt))
    thread.start()
    try:
        assert noted.wait(LIMIT)
        host.ip(step)
        thread.join(LIMIT)
        assert not thread.is_alive()
    finally:
        made.end()
        thread.join(LIMIT)
    assert attempts >= 2
    assert board.status.problems == {}


@pytest.fixture
def late(
    host: Any, family: int, tmp_path: Path, wait_until: Callable[..., None]
) -> Iterator[Booting]:
    """A node for both families, of which ``family`` has no address yet."""
    made = Booting(host, 10 - family, tmp_path, wait_until)
    made.net_conf.write_text(network_config(4, 6).to_json())
    host.ip(f"-{family} address flush dev eth0")
    yield made
    made.manager.close()
    made.end(signal.SIGKILL)


def gets_the_other(node: Booting, family: int) -> None:
    node.add_address(family)

    node.await_clean()
    node.family = family
    node.await_clean()
    node.await_ready()


def test_a_family_that_comes_late(late: Booting, family: int) -> None:
    """Both are on, and ``family`` has no address: the other one works meanwhile."""
    late.boot()
    late.await_clean()
    late.until(lambda: f"eth0 has no IPv{family} address" in late.health()[1])
    assert late.health()[0] == 200

    gets_the_other(late, family)


def test_a_flag_s_address_that_comes_late_in_one_family(
    late: Booting, host: Any, family: int
) -> None:
    """--public-ip or --public-ipv6 is not on the node yet: the other family works meanwhile."""
    address = host.underlay(family)
    late.boot({4: "--public-ip", 6: "--public-ipv6"}[family], address)
    late.await_clean()
    late.until(lambda: f"{address} is not an address of this node" in late.health()[1])

    gets_the_other(late, family)


# ---- the configuration --------------------------------------------------------------


def test_a_configuration_file_that_is_empty_yet(node: Booting) -> None:
    """As while another program writes it."""
    node.net_conf.write_text("")
    node.boot()
    node.await_waiting(f"'{node.net_conf}': the network configuration is empty")

    node.configure()
    os.kill(node.pid, signal.SIGHUP)

    node.await_clean()
    node.await_ready()


def test_a_configuration_file_that_comes_late(node: Booting) -> None:
    node.net_conf.unlink()
    node.boot()
    node.await_waiting(f"'{node.net_conf}': cannot read the network configuration")

    node.configure()
    os.kill(node.pid, signal.SIGHUP)

    node.await_clean()
    node.await_ready()


def test_a_configuration_file_that_is_wrong_ends_it(node: Booting) -> None:
    node.net_conf.write_text('{"Network": "10.240.0.0/99"}')

    done = programs.run(node.command(), capture_output=True, text=True, check=False, timeout=LIMIT)

    assert done.returncode == 2, done.stderr
    assert "10.240.0.0/99" in done.stderr


# ---- etcd ---------------------------------------------------------------------------


@pytest.fixture
def etcd(node: Booting) -> Iterator[EtcdServer]:
    """A server in the node's namespace that was not started; the node asks there."""
    made = EtcdServer(node.folder, 2379, 2380, netns=node.host.ns)
    made.cluster = made.peer
    node.source = ("--etcd-endpoints", ENDPOINT)
    yield made
    made.kill()


def test_etcd_that_comes_late_and_its_configuration_later(node: Booting, etcd: EtcdServer) -> None:
    node.boot()
    refused = f"{ENDPOINT}: read {PREFIX}/config: connection refused"
    node.await_waiting(refused)
    node.await_attempts(2)
    node.await_waiting(refused)
    assert len(node.lines(refused)) == 1

    etcd.start().await_ready()
    node.await_waiting(f"etcd {ENDPOINT}: there is no key {PREFIX}/config")
    etcd.put("config", '{"Network": "nothing"')
    node.await_waiting(f"etcd {PREFIX}/config")
    assert etcd.leases() == {}
    etcd.put("config", node.net_conf.read_text())

    node.until(lambda: has_device(node.host, node.family))
    node.await_ready()
    (name,) = etcd.leases()
    assert node.host.underlay(node.family) in etcd.value(name)
    assert node.end(signal.SIGQUIT) == 0


def test_nothing_is_published_before_the_node_can_be_reached(
    node: Booting, etcd: EtcdServer
) -> None:
    etcd.start().await_ready()
    etcd.put("config", node.net_conf.read_text())
    node.host.ip("address flush dev eth0")
    node.boot()
    node.await_waiting(f"eth0 has no IPv{node.family} address")
    node.await_attempts(2)
    assert etcd.leases() == {}

    node.add_address()

    node.await_ready()
    (name,) = etcd.leases()
    assert node.host.underlay(node.family) in etcd.value(name)


def test_nothing_is_published_where_the_health_port_is_taken(
    node: Booting, etcd: EtcdServer
) -> None:
    etcd.start().await_ready()
    etcd.put("config", node.net_conf.read_text())

    with call_in_netns(node.host.ns, socket.create_server, ("0.0.0.0", node.port)):
        node.boot()
        assert node.process is not None
        assert node.process.wait(LIMIT) == 2, node.log.read_text()

    assert str(node.port) in node.log.read_text()
    assert etcd.leases() == {}
    assert not has_device(node.host, node.family)


def test_the_published_address_outweighs_the_default_route(node: Booting, etcd: EtcdServer) -> None:
    """A node that restarts without its device: the lease of its subnet says where it was."""
    etcd.start().await_ready()
    etcd.put("config", node.net_conf.read_text())
    host, family = node.host, node.family
    gateway = {4: "192.0.2.254", 6: "2001:db8::fe"}[family]
    host.ip(f"-{family} route add default via {gateway} dev eth0 metric 5000")
    node.iface = ()
    node.boot()
    node.await_ready()
    (name,) = etcd.leases()
    node.end()

    host.ip(f"link del {DEVICE[family]}")
    elsewhere = {4: "198.51.100.1/24", 6: "2001:db8:77::1/64 nodad"}[family]
    host.ip("link add eth1 type veth peer name far1")
    host.ip(f"-{family} address add {elsewhere} dev eth1")
    host.ip("link set far1 up")
    host.ip("link set eth1 up")
    host.ip(f"-{family} route add default dev eth1 metric 1")
    node.boot()
    node.until(lambda: has_device(host, family))
    node.await_ready()

    assert [*etcd.leases()] == [name]
    assert host.underlay(family) in etcd.value(name)
    shown = host.ip_json(f"link show {DEVICE[family]}")[0]["linkinfo"]["info_data"]
    assert shown["link"] == "eth0"


def test_a_family_that_comes_late_is_published_then(
    host: Any, family: int, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    other = 10 - family
    node = Booting(host, other, tmp_path, wait_until)
    etcd = EtcdServer(tmp_path, 2379, 2380, netns=host.ns)
    etcd.cluster = etcd.peer
    node.source = ("--etcd-endpoints", ENDPOINT)
    try:
        etcd.start().await_ready()
        etcd.put("config", network_config(4, 6).to_json())
        host.ip(f"-{family} address flush dev eth0")
        node.boot()
        node.until(lambda: has_device(host, other))
        node.until(lambda: f"eth0 has no IPv{family} address" in node.health()[1])
        (name,) = etcd.leases()
        assert host.underlay(other) in etcd.value(name)
        assert host.underlay(family) not in etcd.value(name)

        node.add_address(family)

        node.until(lambda: host.underlay(family) in etcd.value(name))
        assert host.underlay(other) in etcd.value(name)
        assert [*etcd.leases()] == [name]
        node.until(lambda: has_device(host, family))
        node.until(lambda: node.health() == (200, "ok\n"))
    finally:
        node.manager.close()
        etcd.kill()
        node.end(signal.SIGKILL)


# ---- meanwhile ------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_signals_end_the_wait(node: Booting, number: int) -> None:
    node.host.ip("address flush dev eth0")
    node.boot()
    node.await_waiting("eth0 has no")

    assert node.end(number) == 0, node.log.read_text()

    assert "STOPPING=1" in node.told()
    assert "READY=1" not in node.told()


def test_a_signal_ends_the_wait_for_a_server_that_says_nothing(node: Booting) -> None:
    """The program gives up the answer that it waits for."""
    node.source = ("--etcd-endpoints", ENDPOINT)
    with call_in_netns(node.host.ns, socket.create_server, ("127.0.0.1", 2379)) as silent:
        silent.settimeout(LIMIT)
        node.boot()
        connection, _ = silent.accept()
        with connection:
            assert connection.recv(3) == b"PRI"  # the preface of HTTP/2
            assert node.end() == 0, node.log.read_text()
    assert node.lines("") == []


def test_a_second_instance_is_busy_while_the_first_one_waits(node: Booting) -> None:
    node.host.ip("address flush dev eth0")
    node.boot()
    node.await_waiting("eth0 has no")

    second = programs.run(
        node.command(), capture_output=True, text=True, check=False, timeout=LIMIT
    )

    assert second.returncode == 5, second.stderr
    assert str(node.pid) in second.stderr


def test_the_threads_of_health_never_have_more_than_is_kept(node: Booting) -> None:
    node.host.ip("address flush dev eth0")
    node.boot()
    node.await_waiting("eth0 has no")

    held = capabilities(node.pid)
    del held[node.pid]
    assert set(held.values()) == {CAP_NET_ADMIN}

    node.add_address()
    node.await_clean()
    assert set(capabilities(node.pid).values()) == {CAP_NET_ADMIN}


def capabilities(pid: int) -> dict[int, int]:
    """What each thread has, and may get by starting programs."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = (task / "status").read_text().splitlines()
        fields = dict(line.split(":\t") for line in lines if ":\t" in line)
        names = ("CapEff", "CapPrm", "CapInh", "CapAmb", "CapBnd")
        found[int(task.name)] = 0
        for name in names:
            found[int(task.name)] |= int(fields[name], 16)
    return found


def test_a_start_that_needs_no_waiting_says_nothing_of_it(node: Booting) -> None:
    node.boot()
    node.await_clean()
    node.await_ready()

    assert node.lines("") == []
