"""Four nodes in two underlay networks, as people build them, with pods from CNI plugins.

::

    10.4.7.0/24, 2001:db8:7::/64              10.4.8.0/24, 2001:db8:8::/64
      node 21   node 22 ------- router ------- node 23   node 24
                                  |
                  198.51.100.9, 2001:db8:100::9 ("the internet")

Node N has 172.7.N.0/24 and fd00:172:7:N::/64. The pods are made by the plugins ``bridge`` and
``host-local`` of containernetworking-plugins, with the configuration that flannel's CNI plugin
derives from subnet.env (``delegateAdd`` and ``getDelegateIPAM`` of flannel-io/cni-plugin).
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from ipaddress import ip_interface
from pathlib import Path
from typing import Any, Self

import pytest

from flannel_dp.kernel.netns import call_in_netns
from tests.lib import programs
from tests.lib.hosts import delete_namespace
from tests.lib.namespaces import Namespace
from tests.lib.short import end_of, run
from tests.lib.traffic import on_threads
from tests.lib.waiting import LIMIT, wait_until

NODES = (21, 22, 23, 24)
NETWORK = {4: "172.7.0.0/16", 6: "fd00:172:7::/48"}
INTERNET = {4: "198.51.100.9", 6: "2001:db8:100::9"}
PLUGINS = ("/usr/lib/cni", "/opt/cni/bin")

_IP_MTU_DISCOVER, _IP_MTU, _IPV6_MTU_DISCOVER, _IPV6_MTU, _PMTUDISC_DO = 10, 14, 23, 24, 2
_numbers = itertools.count(1)


def segment(number: int) -> int:
    """The underlay network of a node: 7 or 8."""
    return 7 if number < 23 else 8


def underlay(family: int, number: int) -> str:
    """The underlay address of a node; number 254 of its network is the router."""
    net = segment(number)
    return f"10.4.{net}.{number}" if family == 4 else f"2001:db8:{net}::{number}"


def _set(netns: str, name: str, value: int) -> None:
    call_in_netns(netns, Path(f"/proc/sys/net/{name}").write_text, str(value))


def gateway(family: int, number: int) -> str:
    return f"10.4.{segment(number)}.254" if family == 4 else f"2001:db8:{segment(number)}::254"


def subnet(family: int, number: int) -> str:
    return f"172.7.{number}.0/24" if family == 4 else f"fd00:172:7:{number}::/64"


def vtep_mac(family: int, number: int) -> str:
    return f"02:00:00:00:0{family}:{number}"


def lease(number: int, backend_type: str) -> dict[str, Any]:
    """A node's lease in the list of our own."""
    made: dict[str, Any] = {
        "Name": f"node{number}",
        "Subnet": subnet(4, number),
        "IPv6Subnet": subnet(6, number),
        "PublicIP": underlay(4, number),
        "PublicIPv6": underlay(6, number),
        "BackendType": backend_type.lower(),
    }
    if backend_type.lower() == "vxlan":
        made["BackendData"] = {"VNI": 1, "VtepMAC": vtep_mac(4, number)}
        made["BackendV6Data"] = {"VNI": 1, "VtepMAC": vtep_mac(6, number)}
    return made


@dataclass(frozen=True)
class Machine:
    """A namespace."""

    ns: str

    def ip(self, *args: str) -> str:
        return run("ip", *(word for arg in args for word in arg.split()), netns=self.ns)

    def ip_json(self, *args: str) -> list[dict[str, Any]]:
        return [entry for entry in json.loads(self.ip("-j -d", *args) or "[]") if entry]

    def bridge(self, *args: str) -> str:
        return run("bridge", *(word for arg in args for word in arg.split()), netns=self.ns)

    def bridge_json(self, *args: str) -> list[dict[str, Any]]:
        return [entry for entry in json.loads(self.bridge("-j", *args) or "[]") if entry]

    def batch(self, steps: str) -> None:
        run("ip", "-batch", "-", stdin=steps, netns=self.ns)

    def exec(self, *command: str, stdin: str = "") -> str:
        return run("ip", "netns", "exec", self.ns, *command, stdin=stdin)

    def ping(self, address: str, seconds: float = LIMIT) -> bool:
        return self._ping(address, "-W", str(seconds))

    def _ping(self, address: str, *limit: str) -> bool:
        command = ("ping", "-q", "-n", "-c", "1", *limit, address)
        return end_of(command, netns=self.ns).returncode == 0

    def await_ping(self, address: str) -> None:
        """Return as soon as a ping is answered."""
        wait_until(
            # It sends five a second until one is answered, and at most for two seconds.
            lambda: self._ping(address, "-i", "0.2", "-w", "2"),
            describe=lambda: f"{self.ns}: no answer from {address}",
        )

    def fragments(self) -> int:
        """How many packets this namespace had to cut into fragments."""
        head, row = (
            line.split()
            for line in self.exec("cat", "/proc/net/snmp").splitlines()
            if line.startswith("Ip:")
        )
        made = int(row[head.index("FragCreates")])
        for line in self.exec("cat", "/proc/net/snmp6").splitlines():
            if line.startswith("Ip6FragCreates"):
                made += int(line.split()[1])
        return made


@dataclass(frozen=True)
class Pod(Machine):
    """A pod's namespace, and what the plugins gave it."""

    address: dict[int, str] = field(default_factory=dict)
    mtu: int = 0


@dataclass(frozen=True)
class SiteNode(Machine):
    number: int = 0
    folder: Path = Path()

    @property
    def subnet_file(self) -> Path:
        return self.folder / "subnet.env"

    def write_leases(self, leases: Iterable[dict[str, Any]]) -> None:
        (self.folder / "leases.json").write_text(json.dumps({"leases": list(leases)}))

    def env(self) -> dict[str, str]:
        """subnet.env as ``KEY: value``."""
        lines = self.subnet_file.read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def flannel_dp(self, command: str, *more: str, output: str = "json") -> tuple[int, Any, str]:
        """Run the command here: exit code, its document (or text), and standard error."""
        leases = [] if command == "clean" else ["--leases", str(self.folder / "leases.json")]
        done = programs.run(
            [
                *(sys.executable, "-m", "flannel_dp", command, *more, *leases),
                *("--net-conf", str(self.folder / "net-conf.json"), "--iface", "eth0"),
                *("--netns", self.ns, "--subnet-file", str(self.subnet_file), "--output", output),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT,
        )
        said = json.loads(done.stdout) if output == "json" and done.stdout else done.stdout
        return done.returncode, said, done.stderr


class Site:
    """The machines of one test; a context manager that deletes what it made."""

    def __init__(self, folder: Path, nodes: Iterable[int] = NODES) -> None:
        self.folder, self._wanted, self._stack = folder, tuple(nodes), ExitStack()
        self.nodes: dict[int, SiteNode] = {}
        self.pods: dict[int, Pod] = {}

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def namespace(self) -> str:
        name = f"fdp-{os.getpid()}-pods-{next(_numbers)}"
        self._stack.callback(delete_namespace, name)
        Namespace(name).close()
        for setting in ("accept_dad", "autoconf", "accept_ra"):
            for which in ("all", "default"):
                _set(name, f"ipv6/conf/{which}/{setting}", 0)
        return name

    def _build(self) -> None:
        self.router = Machine(self.namespace())
        self.internet = Machine(self.namespace())
        steps = ""
        for net in (7, 8):
            steps += f"link add br{net} type bridge mcast_snooping 0\n"
            steps += f"address add 10.4.{net}.254/24 dev br{net}\n"
            steps += f"address add 2001:db8:{net}::254/64 dev br{net} nodad\nlink set br{net} up\n"
        steps += f"link add out0 type veth peer name eth0 netns {self.internet.ns}\n"
        steps += "address add 198.51.100.254/24 dev out0\n"
        steps += "address add 2001:db8:100::254/64 dev out0 nodad\nlink set out0 up\n"
        self.router.batch(steps)
        self._forward(self.router)
        self.internet.batch(
            f"address add {INTERNET[4]}/24 dev eth0\naddress add {INTERNET[6]}/64 dev eth0 nodad\n"
            "link set eth0 up\nroute add default via 198.51.100.254\n"
            "route add default via 2001:db8:100::254\n"
        )
        for number in self._wanted:
            self._node(number)
        for node in self.nodes.values():
            for family in (4, 6):
                node.await_ping(INTERNET[family])

    def _node(self, number: int) -> None:
        folder = self.folder / f"node{number}"
        folder.mkdir()
        node = SiteNode(self.namespace(), number, folder)
        port = f"port{number}"
        node.batch(
            f"link add eth0 type veth peer name {port} netns {self.router.ns}\n"
            f"address add {underlay(4, number)}/24 dev eth0\n"
            f"address add {underlay(6, number)}/64 dev eth0 nodad\nlink set eth0 up\n"
            f"route add default via {gateway(4, number)}\n"
            f"route add default via {gateway(6, number)}\n"
        )
        self.router.ip(f"link set {port} master br{segment(number)} up")
        self._forward(node)
        self.nodes[number] = node

    @staticmethod
    def _forward(machine: Machine) -> None:
        for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            _set(machine.ns, name, 1)

    def configure(self, backend: dict[str, Any], families: tuple[int, ...] = (4, 6)) -> None:
        """Write every node's net-conf.json, and leases.json with all nodes in it."""
        conf: dict[str, Any] = {"Backend": backend}
        if 4 in families:
            conf["Network"] = NETWORK[4]
        else:
            conf["EnableIPv4"] = False
        if 6 in families:
            conf |= {"EnableIPv6": True, "IPv6Network": NETWORK[6]}
        leases = [lease(number, str(backend["Type"])) for number in self.nodes]
        for node in self.nodes.values():
            (node.folder / "net-conf.json").write_text(json.dumps(conf))
            node.write_leases(leases)

    def add_pod(self, number: int, bridge: str = "cni0") -> Pod:
        """Start a pod on a node by the plugins, fed from the node's subnet.env."""
        node = self.nodes[number]
        pod = Machine(self.namespace())
        wanted = delegate(node.env(), bridge, self.folder / f"ipam{number}")
        result = json.loads(_cni(node, pod, wanted))
        addresses = [entry["address"].partition("/")[0] for entry in result["ips"]]
        made = Pod(
            pod.ns,
            {6 if ":" in address else 4: address for address in addresses},
            int(pod.ip_json("link show eth0")[0]["mtu"]),
        )
        self.pods[number] = made
        return made

    def settle(self) -> None:
        """Wait until every pod reaches its own node."""
        for number, pod in self.pods.items():
            for family in pod.address:
                pod.await_ping(underlay(family, number))


def delegate(env: dict[str, str], bridge: str, store: Path) -> dict[str, Any]:
    """The configuration that flannel's CNI plugin hands to the plugin ``bridge``, with
    ``isDefaultGateway`` as flannel's own manifest has it. host-local keeps its files in
    ``store``."""
    networks = [env[key] for key in ("FLANNEL_NETWORK", "FLANNEL_IPV6_NETWORK") if key in env]
    subnets = [env[key] for key in ("FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET") if key in env]
    return {
        "cniVersion": "1.0.0",
        "name": "cbr0",
        "type": "bridge",
        "bridge": bridge,
        "mtu": int(env["FLANNEL_MTU"]),
        "ipMasq": env["FLANNEL_IPMASQ"] != "true",
        "isGateway": True,
        "isDefaultGateway": True,
        "ipam": {
            "type": "host-local",
            "dataDir": str(store),
            "ranges": [[{"subnet": _masked(entry)}] for entry in subnets],
            "routes": [{"dst": entry} for entry in networks],
        },
    }


def _masked(text: str) -> str:
    return str(ip_interface(text).network)


def _cni(node: SiteNode, pod: Machine, wanted: dict[str, Any]) -> str:
    found = [folder for folder in PLUGINS if Path(folder, "bridge").exists()]
    assert found, f"no CNI plugins in {PLUGINS}: install the package containernetworking-plugins"
    env = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": pod.ns,
        "CNI_NETNS": f"/run/netns/{pod.ns}",
        "CNI_IFNAME": "eth0",
        "CNI_PATH": found[0],
    }
    command = ("ip", "netns", "exec", node.ns, f"{found[0]}/bridge")
    return run(*command, stdin=json.dumps(wanted), env=env)


# ---- what others put into the firewall ------------------------------------------------

DOCKER = "-t nat -A POSTROUTING -s {own} ! -o docker0 -j MASQUERADE"
SERVICES = (
    "-A INPUT -m state --state RELATED,ESTABLISHED -j ACCEPT",
    "-A INPUT -p {icmp} -j ACCEPT",
    "-A INPUT -i lo -j ACCEPT",
    "-A INPUT -p tcp -m state --state NEW -m tcp --dport 22 -j ACCEPT",
    "-A INPUT -j REJECT --reject-with {prohibited}",
    "-A FORWARD -j REJECT --reject-with {prohibited}",
)
WORDS = {
    4: {"icmp": "icmp", "prohibited": "icmp-host-prohibited"},
    6: {"icmp": "ipv6-icmp", "prohibited": "icmp6-adm-prohibited"},
}


# ---- what is said between two machines ----------------------------------------------


def _socket(machine: Machine, family: int, kind: int) -> socket.socket:
    af = socket.AF_INET if family == 4 else socket.AF_INET6
    made: socket.socket = call_in_netns(machine.ns, socket.socket, af, kind)
    made.settimeout(LIMIT)
    return made


def transfer(
    family: int, client: Machine, server: Machine, target: str, size: int = 1 << 20
) -> tuple[str, int]:
    """Send ``size`` bytes by TCP: the source that the server sees, and the path's MTU as the
    client knows it in the end."""
    data = os.urandom(1 << 16) * (size >> 16)
    received = bytearray()
    with (
        _socket(server, family, socket.SOCK_STREAM) as listener,
        _socket(client, family, socket.SOCK_STREAM) as caller,
    ):
        listener.bind((target, 0))
        listener.listen()
        caller.connect((target, listener.getsockname()[1]))
        connection, source = listener.accept()
        with connection:
            connection.settimeout(LIMIT)

            def receive() -> None:
                while len(received) < size:
                    received.extend(connection.recv(1 << 16))

            on_threads(lambda: caller.sendall(data), receive)
        v4 = (socket.IPPROTO_IP, _IP_MTU)
        mtu = caller.getsockopt(*(v4 if family == 4 else (socket.IPPROTO_IPV6, _IPV6_MTU)))
    assert received == data
    return str(source[0]), mtu


def full_datagram(family: int, client: Machine, server: Machine, target: str, mtu: int) -> None:
    """One UDP datagram of exactly ``mtu`` bytes with "don't fragment" arrives, and one byte
    more is an error at once."""
    room = mtu - (28 if family == 4 else 48)
    v4 = (socket.IPPROTO_IP, _IP_MTU_DISCOVER)
    option = v4 if family == 4 else (socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER)
    with (
        _socket(server, family, socket.SOCK_DGRAM) as listener,
        _socket(client, family, socket.SOCK_DGRAM) as caller,
    ):
        listener.bind((target, 0))
        to = (target, listener.getsockname()[1])
        caller.setsockopt(*option, _PMTUDISC_DO)
        caller.sendto(bytes(room), to)
        assert len(listener.recv(1 << 16)) == room
        with pytest.raises(OSError, match="Message too long"):
            caller.sendto(bytes(room + 1), to)


def of_a_node(warnings: list[str]) -> list[str]:
    """Warnings but for the one of the machine: its neighbour table has the entries of all
    namespaces, also those of tests that run meanwhile."""
    return [text for text in warnings if "gc_thresh3" not in text]


def refused(family: int, client: Machine, target: str) -> bool:
    """Tell whether a TCP connection to ``target`` gets no answer, not even a reset."""
    with _socket(client, family, socket.SOCK_STREAM) as caller:
        caller.settimeout(0.5)
        try:
            caller.connect((target, 9))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
    return False
