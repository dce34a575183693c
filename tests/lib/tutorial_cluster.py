"""A flannel cluster as a well-known tutorial builds it, but for the name of the program.

::

    10.4.7.0/24                                        10.4.8.0/24
      node 12 (etcd)   node 21 (etcd)   node 22 (etcd) ---- router ---- node 23

Node N has the pods of 172.7.N.0/24 behind docker0. On the nodes 21, 22 and 23 supervisord runs
a start script in a folder that holds ``cert`` and a subnet.env written by hand; etcd has three
members with TLS.
"""

from __future__ import annotations

import base64
import json
import os
import select
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

from flannel_dp.kernel.netns import call_in_netns
from tests.lib import programs
from tests.lib.apiserver import Certificates
from tests.lib.cni_site import Machine, Pod, Site, SiteNode, segment, underlay
from tests.lib.etcd import EtcdServer
from tests.lib.short import run
from tests.lib.waiting import LIMIT, wait_until

MEMBERS, HOSTS = (12, 21, 22), (21, 22, 23)
CONFIG_KEY, SUBNETS = "/coreos.com/network/config", "/coreos.com/network/subnets/"
VARIANTS = {
    "host-gw": '{"Network": "172.7.0.0/16", "Backend": {"Type": "host-gw"}}',
    "vxlan": '{"Network": "172.7.0.0/16", "Backend": {"Type": "VxLAN"}}',
    "direct": '{"Network": "172.7.0.0/16", "Backend": {"Type": "VxLAN","Directrouting": true}}',
}

# What is written by hand on host N of network NET, character by character.
SUBNET_ENV = """\
FLANNEL_NETWORK=172.7.0.0/16
FLANNEL_SUBNET=172.7.{n}.1/24
FLANNEL_MTU=1500
FLANNEL_IPMASQ=false
"""
START = """\
#!/bin/sh
./flanneld \\
  --public-ip=10.4.{net}.{n} \\
  --etcd-endpoints=https://10.4.7.12:2379,https://10.4.7.21:2379,https://10.4.7.22:2379 \\
  --etcd-keyfile=./cert/client-key.pem \\
  --etcd-certfile=./cert/client.pem \\
  --etcd-cafile=./cert/ca.pem \\
  --iface=eth0 \\
  --subnet-file=./subnet.env \\
  --healthz-port=2401
"""
SECTION = """\
[program:flanneld-{net}-{n}]
command={folder}/flanneld.sh
numprocs=1
directory={folder}
autostart=true
autorestart=true
startsecs=30
startretries=3
exitcodes=0,2
stopsignal=QUIT
stopwaitsecs=10
user=root
redirect_stderr=true
stdout_logfile=/data/logs/flanneld/flanneld.stdout.log
stdout_logfile_maxbytes=64MB
stdout_logfile_backups=4
stdout_capture_maxbytes=1MB
stdout_events_enabled=false
"""
DOCKER = "-t nat -A POSTROUTING -s 172.7.{n}.0/24 ! -o docker0 -j MASQUERADE"
SUPERVISOR = """\
[unix_http_server]
file={folder}/supervisor.sock
[supervisord]
logfile={folder}/supervisord.log
pidfile={folder}/supervisord.pid
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl=unix://{folder}/supervisor.sock
[include]
files = flanneld.ini
"""


class Host:
    """A host of the tutorial: its folder, its supervisord, and what runs there."""

    def __init__(self, node: SiteNode) -> None:
        self.node, self.number, self.ns = node, node.number, node.ns
        self.net, self.folder = (7 if node.number < 23 else 8), node.folder
        self.program = f"flanneld-{self.net}-{self.number}"
        self.log = self.folder / "logs" / "flanneld.stdout.log"
        self.subnet_env = SUBNET_ENV.format(n=self.number)
        self._supervisord: subprocess.Popen[bytes] | None = None
        self._starts: list[subprocess.Popen[bytes]] = []

    def prepare(self, certificates: Path) -> None:
        """Write what a person writes before the first start."""
        words = {"net": self.net, "n": self.number, "folder": self.folder}
        (self.folder / "cert").symlink_to(certificates)
        (self.folder / "subnet.env").write_text(self.subnet_env)
        script = self.folder / "flanneld.sh"
        script.write_text(START.format(**words).replace("./flanneld", "flannel-dpd"))
        script.chmod(0o755)
        self.log.parent.mkdir()
        section = SECTION.format(**words).replace("/data/logs/flanneld", str(self.log.parent))
        (self.folder / "flanneld.ini").write_text(section)
        (self.folder / "supervisord.conf").write_text(SUPERVISOR.format(**words))

    def start_supervisor(self) -> None:
        """supervisord, which starts the program by itself."""
        self._supervisord = self._spawn("supervisord", "--nodaemon")

    def start(self) -> None:
        """``supervisorctl start``, which waits for startsecs; this does not wait for it."""
        self._starts.append(self._spawn("supervisorctl", "start", self.program))

    def stop(self) -> None:
        """``supervisorctl stop``: the agent ends by the first signal, before ``stopwaitsecs``."""
        (pid,) = self.agents()
        agent = os.pidfd_open(pid)
        try:
            stopping = self._spawn("supervisorctl", "stop", self.program)
            poll = select.poll()
            poll.register(agent, select.POLLIN)
            ended = poll.poll(LIMIT * 1000)
            assert stopping.wait(LIMIT) == 0
            assert ended, f"{self.program} goes on\n{self.said()}"
        finally:
            os.close(agent)

    def _supervisor(self, program: str, *words: str) -> list[str]:
        return [
            *("ip", "netns", "exec", self.ns, sys.executable, "-m", f"supervisor.{program}"),
            *("-c", str(self.folder / "supervisord.conf"), *words),
        ]

    def _spawn(self, program: str, *words: str) -> subprocess.Popen[bytes]:
        command = self._supervisor(program, *words)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with open(self.folder / "supervisor.out", "ab") as output:
            return subprocess.Popen(
                command, stdout=output, stderr=output, env=os.environ | {"PATH": path}
            )

    def agents(self) -> list[int]:
        """The process ids of all agents on this host."""
        found = []
        for word in run("ip", "netns", "pids", self.ns).split():
            try:
                words = Path("/proc", word, "cmdline").read_bytes().split(b"\0")
            except OSError:  # it has ended meanwhile
                continue
            if any(word.endswith(b"/flannel-dpd") for word in words):
                found.append(int(word))
        return found

    def run(self, *command: str) -> tuple[int, Any, str]:
        """Run a command in the folder: exit code, its JSON document, standard error."""
        done = programs.run(
            ["ip", "netns", "exec", self.ns, *command],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT,
        )
        return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr

    def kill_script(self) -> None:
        """Kill what supervisor has started, and nothing else."""
        words = self._supervisor("supervisorctl", "pid", self.program)
        os.kill(int(run(*words)), signal.SIGKILL)

    def said(self) -> str:
        """All that the agent has written, and supervisor about it."""
        files = (self.log, self.folder / "supervisor.out")
        return "".join(file.read_text() for file in files if file.exists())

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of ``curl http://127.0.0.1:2401/PATH``; 0 where there is no answer."""

        def ask() -> tuple[int, str]:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            try:
                with opener.open(f"http://127.0.0.1:2401/{path}", timeout=LIMIT) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read().decode()
            except OSError:
                return 0, ""

        return call_in_netns(self.ns, ask)

    def await_ready(self) -> None:
        wait_until(lambda: self.get("readyz")[0] == 200, describe=self.said)

    def end(self) -> None:
        """Nothing of this host is left running."""
        for process in (self._supervisord, *self._starts):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
        for pid in self.agents():
            os.kill(pid, signal.SIGKILL)


class DropIn(Site):
    """The tutorial's cluster; ``use`` starts it, or changes its network's configuration."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, (*MEMBERS, HOSTS[-1]))
        self.hosts: dict[int, Host] = {}
        self.variant = ""
        self.members: list[EtcdServer] = []

    def _build(self) -> None:
        super()._build()
        certificates = self._certify()
        self._start_etcd(certificates)
        for number in HOSTS:
            host = Host(self.nodes[number])
            self._stack.callback(host.end)
            host.prepare(certificates)
            self.hosts[number] = host
            self.pods[number] = self._docker(host)
        for member in self.members:
            member.await_ready()

    def _certify(self) -> Path:
        """An authority, one certificate for all members and one for all clients."""
        made = Certificates(self.folder / "pki")
        server = made.issue("server", *(underlay(4, number) for number in MEMBERS))
        client, key = made.issue("client")
        cert = self.folder / "cert"
        cert.mkdir()
        for name, source in (
            ("ca.pem", made.ca),
            ("client.pem", client),
            ("client-key.pem", key),
            ("server.pem", server[0]),
            ("server-key.pem", server[1]),
        ):
            (cert / name).write_bytes(source.read_bytes())
        return cert

    def _start_etcd(self, cert: Path) -> None:
        for number in MEMBERS:
            member = EtcdServer(
                self.folder,
                2379,
                2380,
                name=f"etcd-server-7-{number}",
                address=underlay(4, number),
                netns=self.nodes[number].ns,
                tls=(cert / "server.pem", cert / "server-key.pem"),
                ca=cert / "ca.pem",
                ctl=[
                    f"--cacert={cert}/ca.pem",
                    f"--cert={cert}/client.pem",
                    f"--key={cert}/client-key.pem",
                ],
            )
            self._stack.callback(member.kill)
            self.members.append(member)
        for member in self.members:
            member.cluster = ",".join(other.peer for other in self.members)
            member.start()

    def _docker(self, host: Host) -> Pod:
        """docker0 with its masquerading rule, and a container that was given an address."""
        node, number, pod = host.node, host.number, Machine(self.namespace())
        node.batch(
            "link add docker0 type bridge mcast_snooping 0\n"
            f"address add 172.7.{number}.1/24 dev docker0\n"
            f"link add vethpod type veth peer name eth0 netns {pod.ns}\n"
            "link set vethpod master docker0 up\nlink set docker0 up\n"
        )
        pod.batch(
            f"address add 172.7.{number}.2/24 dev eth0\nlink set eth0 up\n"
            f"route add default via 172.7.{number}.1\n"
        )
        node.exec("iptables", *DOCKER.format(n=number).split())
        return Pod(pod.ns, {4: f"172.7.{number}.2"}, 1500)

    # ---- the cluster

    def use(self, variant: str) -> None:
        """Put a configuration into etcd and start every agent. Agents that run are stopped
        before, as the tutorial does; Directrouting is added while they run, instead."""
        restart = bool(self.variant) and variant != "direct"
        for host in self.hosts.values():
            if restart:
                host.stop()
        self.members[0].run("put", CONFIG_KEY, VARIANTS[variant])
        for host in self.hosts.values():
            if restart:
                host.start()
            elif not self.variant:
                host.start_supervisor()
        self.variant = variant
        self.settle()

    def settle(self) -> None:
        """Wait until every host is ready and has the routes it should have."""
        for number, host in self.hosts.items():
            host.await_ready()
            wait_until(partial(self._routed, number), describe=host.said)

    def _routed(self, number: int) -> bool:
        return self.routes(number) == self.wanted_routes(number)

    def way(self, one: int, other: int) -> str:
        """How host ``one`` should reach ``other``: direct, tunnel, or none."""
        if self.variant == "vxlan":
            return "tunnel"
        near = segment(one) == segment(other)
        return "direct" if near else {"host-gw": "none", "direct": "tunnel"}[self.variant]

    def pairs(self, *ways: str) -> list[tuple[int, int]]:
        return [pair for pair in permutations(HOSTS, 2) if self.way(*pair) in ways]

    def wanted_routes(self, number: int) -> dict[str, tuple[str, str]]:
        """Gateway and device for each peer's subnet."""
        return {
            f"172.7.{other}.0/24": (
                (underlay(4, other), "eth0")
                if self.way(number, other) == "direct"
                else (f"172.7.{other}.0", "flannel.1")
            )
            for one, other in self.pairs("direct", "tunnel")
            if one == number
        }

    def routes(self, number: int) -> dict[str, tuple[str, str]]:
        """The same as the kernel has it."""
        return {
            route["dst"]: (route["gateway"], route["dev"])
            for route in self.hosts[number].node.ip_json("-4 route show")
            if route["dst"].startswith("172.7.") and "gateway" in route
        }

    def lease(self, number: int) -> tuple[str, int]:
        """The value of a host's key in etcd, and the seconds that it has left."""
        kv = self._get(f"{SUBNETS}172.7.{number}.0-24")[0]
        shown = self.members[0].run("lease", "timetolive", f"{kv['lease']:x}", "-w", "json")
        return base64.b64decode(kv["value"]).decode(), int(json.loads(shown)["ttl"])

    def keys(self) -> list[str]:
        """The last parts of all leases' keys."""
        found = (base64.b64decode(kv["key"]).decode() for kv in self._get(SUBNETS, "--prefix"))
        return [key.removeprefix(SUBNETS) for key in found]

    def _get(self, *words: str) -> list[dict[str, Any]]:
        return list(json.loads(self.members[0].run("get", *words, "-w", "json")).get("kvs", []))
