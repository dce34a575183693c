"""From kube-flannel.yml to packaging/kubernetes.yaml and back, on a node with pods: the commands
are those of the files, with the node's paths below a folder of the test's."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from flannel_dp import DataPlane, NetworkConfig
from flannel_dp.kernel.netns import call_in_netns
from tests.lib import programs
from tests.lib.apiserver import Certificates
from tests.lib.forwarding import PodNode
from tests.lib.kernel import observed
from tests.lib.kube import kubeconfig
from tests.lib.kube_cluster import TOKEN, Server, kube_node
from tests.lib.leases import DEVICE, half
from tests.lib.service import fetch
from tests.lib.traffic import Pings, pod_address
from tests.lib.waiting import LIMIT

ROOT = Path(__file__).resolve().parents[2]
PACKAGING, GUIDE = ROOT / "packaging", ROOT / "docs/kubernetes.md"
#: Nodes 1 and 2 of the manifest's network, 10.244.0.0/16.
NEAR, FAR = 1025, 1026
NETWORK = {4: "10.244.0.0/16", 6: "fd00:10::/32"}

#: What flanneld hands to iptables-restore, in short: its chains, and jumps to them.
RULES = """\
*nat
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -s {net} -d {net} -j RETURN
-A FLANNEL-POSTRTG -s {net} ! -d {multicast} -j MASQUERADE --random-fully
COMMIT
*filter
:FLANNEL-FWD - [0:0]
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FLANNEL-FWD -s {net} -j ACCEPT
-A FLANNEL-FWD -d {net} -j ACCEPT
COMMIT
"""
#: The configuration that kube-flannel.yml has, and what flannel leaves of it on a node.
CNI = {
    "name": "cbr0",
    "cniVersion": "0.3.1",
    "plugins": [
        {"type": "flannel", "delegate": {"hairpinMode": True, "isDefaultGateway": True}},
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ],
}


def patched(spec: Any, steps: list[dict[str, Any]]) -> Any:
    """A document after a JSON patch (RFC 6902) of "replace" and "remove"."""
    made = copy.deepcopy(spec)
    for step in steps:
        *words, last = [int(w) if w.isdigit() else w for w in step["path"].split("/")[1:]]
        target = made
        for word in words:
            target = target[word]
        assert last in target
        if step["op"] == "replace":
            target[last] = step["value"]
        else:
            assert step["op"] == "remove"
            del target[last]
    return made


class KubeNode:
    """A node of a cluster, its files below ``root``, and containers as processes."""

    def __init__(self, node: PodNode, root: Path, kubeconfig: Path) -> None:
        self.node, self.host, self.root, self.kubeconfig = node, node.host, root, kubeconfig
        self.env = self.root / "run/flannel/subnet.env"
        self.conflist = self.root / "etc/cni/net.d/10-flannel.conflist"
        for path in ("run/flannel", "run/flannel-dp", "etc/cni/net.d", "opt/cni/bin"):
            (root / path).mkdir(parents=True)
        (root / "etc/kube-flannel").mkdir()
        (root / "flannel").write_text("plugin")
        self.log = root / "log"

    def below(self, word: str) -> str:
        """A word of a container's command line, with paths of mounts below the root."""
        return re.sub(r"(^|=)(?=/(etc|run|opt|flannel)\b)", rf"\1{self.root}", word)

    def words(self, container: dict[str, Any]) -> list[str]:
        words = [self.below(word) for word in [*container["command"], *container["args"]]]
        if words[0] != "flannel-dp":
            return words
        words[0:1] = ["ip", "netns", "exec", self.host.ns, sys.executable, "-m", "flannel_dp"]
        # A pod has these by its account and its mounts.
        return [
            *words,
            "--kubeconfig-file",
            str(self.kubeconfig),
            "--run-dir",
            self.below("/run/flannel-dp"),
        ]

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("NODE_", "POD_", "FLAN"))}
        return kept | {"NODE_NAME": f"node-{self.node.number:05}"}

    def run(self, container: dict[str, Any]) -> str:
        """Run a container to its end."""
        done = programs.run(
            self.words(container), capture_output=True, text=True, env=self.environment()
        )
        assert done.returncode == 0, (done.args, done.stdout, done.stderr)
        return str(done.stdout)

    def start(self, container: dict[str, Any]) -> Any:
        with self.log.open("wb") as log:
            return programs.Popen(
                self.words(container), stdout=log, stderr=log, env=self.environment()
            )

    def flanneld(self, peer: PodNode) -> None:
        """Leave the node as flannel's DaemonSet does."""
        self.conflist.write_text(json.dumps(CNI))
        (self.root / "opt/cni/bin/flannel").write_text("plugin")
        own, mtu = self.node.lease, 1430
        self.env.write_text(
            f"FLANNEL_NETWORK={NETWORK[4]}\nFLANNEL_SUBNET={own.subnet.replace('.0/', '.1/')}\n"
            f"FLANNEL_IPV6_NETWORK={NETWORK[6]}\n"
            f"FLANNEL_IPV6_SUBNET={own.ipv6_subnet.replace('::/', '::1/')}\n"
            f"FLANNEL_MTU={mtu}\nFLANNEL_IPMASQ=true\n"
        )
        for family in (4, 6):
            net, local, mac = half(own, family)
            to, remote, lladdr = half(peer.lease, family)
            device, gateway = DEVICE[family], to.partition("/")[0]
            self.host.ip_batch(
                f"-{family}",
                f"link add {device} address {mac} mtu {1450 if family == 4 else 1430} "
                f"type vxlan id 1 local {local} dev eth0 dstport 8472 nolearning",
                f"address add {net.partition('/')[0]}/{32 if family == 4 else 128} dev {device}"
                + (" nodad" if family == 6 else ""),
                f"link set {device} up",
                f"neigh add {gateway} lladdr {lladdr} dev {device} nud permanent",
                f"route add {to} via {gateway} dev {device} onlink",
            )
            self.host.bridge(f"fdb add {lladdr} dev {device} dst {remote} self permanent")
            restore = "iptables-nft-restore" if family == 4 else "ip6tables-nft-restore"
            multicast = "224.0.0.0/4" if family == 4 else "ff00::/8"
            subprocess.run(
                ["ip", "netns", "exec", self.host.ns, restore, "--noflush"],
                input=RULES.format(net=NETWORK[family], multicast=multicast),
                text=True,
                check=True,
            )

    def held(self) -> dict[str, Any]:
        """What flannel left, on the node and in the kernel."""
        links = [
            [
                (link["ifname"], link["address"], link["mtu"])
                for link in self.host.ip_json(f"link show {DEVICE[family]}")
            ]
            for family in (4, 6)
        ]
        saved = "".join(self.host.exec(f"{kind}tables-nft-save") for kind in ("ip", "ip6"))
        return {
            "kernel": [observed(self.host, family) for family in (4, 6)],
            "links": links,
            "rules": [line for line in saved.splitlines() if line.startswith("-A")],
            "subnet.env": self.env.read_text(),
            "cni": json.loads(self.conflist.read_text()),
            "plugin": (self.root / "opt/cni/bin/flannel").read_text(),
        }


@pytest.fixture(name="objects")
def objects_fixture() -> dict[str, Any]:
    """What is in the manifest, by kind; its network with IPv6, as docs of flannel have it."""
    found = {
        one["kind"]: one for one in yaml.safe_load_all((PACKAGING / "kubernetes.yaml").read_text())
    }
    conf = json.loads(found["ConfigMap"]["data"]["net-conf.json"])
    assert conf["Network"] == NETWORK[4]
    conf |= {"EnableIPv6": True, "IPv6Network": NETWORK[6]}
    found["ConfigMap"]["data"]["net-conf.json"] = json.dumps(conf)
    return found


@pytest.fixture(name="pair")
def pair_fixture(lab: Any, objects: dict[str, Any]) -> list[PodNode]:
    """Two nodes, of which the second one's entries are there for good."""
    near, far = made = [PodNode(lab, NEAR), PodNode(lab, FAR)]
    config = NetworkConfig.from_json(objects["ConfigMap"]["data"]["net-conf.json"])
    with DataPlane(config, iface=far.host.iface, netns=far.host.ns) as plane:
        assert plane.sync([near.lease, far.lease]).ok
    return made


@pytest.fixture(name="server")
def server_fixture(pair: list[PodNode], server_certificate: tuple[Path, Path]) -> Iterator[Server]:
    near = pair[0].host
    made = call_in_netns(near.ns, lambda: Server(near, server_certificate, tokens={TOKEN}))
    for one in pair:
        data = {
            key: f'{{"VNI":1,"VtepMAC":"{half(one.lease, family)[2]}"}}'  # as flanneld writes it
            for family, key in ((4, "backend_data"), (6, "backend_v6_data"))
        }
        made.put(kube_node(one.number, one.lease, **data))
    yield made
    made.close()


def test_from_kube_flannel_and_back(
    pair: list[PodNode],
    server: Server,
    objects: dict[str, Any],
    certificates: Certificates,
    tmp_path: Path,
    wait_until: Callable[..., None],
) -> None:
    """Not a ping is lost either way; what flannel had is there in the end, and nothing else."""
    near, far = pair
    config = kubeconfig(tmp_path / "kubeconfig", server.url, certificates.ca, {"token": TOKEN})
    node = KubeNode(near, tmp_path / "node", config)
    for name, text in objects["ConfigMap"]["data"].items():
        (node.root / "etc/kube-flannel" / name).write_text(text)
    node.flanneld(far)
    theirs = node.held()
    name = f"node-{NEAR:05}"
    notes = dict(server.nodes[name]["metadata"]["annotations"])
    daemon_set = objects["DaemonSet"]
    pod = daemon_set["spec"]["template"]["spec"]
    pings = [
        Pings(one.pod, pod_address(family, other.number))
        for one, other in ((near, far), (far, near))
        for family in (4, 6)
    ]

    with ExitStack() as stack:
        for each in pings:
            stack.enter_context(each)

        # flannel's DaemonSet was deleted, ours is applied.
        for container in pod["initContainers"]:
            node.run(container)
        (container,) = pod["containers"]
        agent = node.start(container)
        stack.callback(lambda: agent.poll() is None and agent.kill())
        port = container["readinessProbe"]["httpGet"]["port"]
        wait_until(lambda: fetch(near.host, port, "/readyz")[0] == 200, describe=node.log.read_text)
        assert fetch(near.host, port, "/healthz") == (200, "ok\n")
        ours = node.held()
        for key in ("links", "subnet.env", "cni", "plugin"):
            assert ours[key] == theirs[key], key
        assert {*theirs["rules"]} <= {*ours["rules"]}
        assert server.nodes[name]["metadata"]["annotations"] == notes
        conditions = server.nodes[name]["status"]["conditions"]
        assert [(c["status"]) for c in conditions if c["type"] == "NetworkUnavailable"] == ["False"]
        for each in pings:
            each.await_answers(5)

        # The DaemonSet is patched: its pod ends, and that of the patch begins.
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(LIMIT) == 0
        patch = json.loads((PACKAGING / "kubernetes-handback.json").read_text())
        back = patched(daemon_set, patch)["spec"]["template"]["spec"]
        for one in back["initContainers"]:
            node.run(one)
        assert node.held()["kernel"] == theirs["kernel"]
        assert near.host.ip("nexthop show") == ""
        for each in pings:
            each.await_answers(5)

        # flannel's DaemonSet is there again; what is left are our rules.
        for line in re.findall(r"^ *nft delete table .*$", GUIDE.read_text(), re.M):
            near.host.exec(*line.split())
        assert node.held() == theirs
        assert "flannel-dp" not in near.host.exec("nft", "list", "ruleset")
        assert server.nodes[name]["metadata"]["annotations"] == notes
        for each in pings:
            each.await_answers(5)
    assert [each.lost for each in pings] == [0, 0, 0, 0]


def test_the_patch_fits_the_manifest(objects: dict[str, Any]) -> None:
    """It changes what it names and nothing else, and what it takes is there."""
    patch = json.loads((PACKAGING / "kubernetes-handback.json").read_text())
    before = objects["DaemonSet"]
    after = patched(before, patch)
    pod, was = (one["spec"]["template"]["spec"] for one in (after, before))
    (one,), (container,) = pod["initContainers"], pod["containers"]

    assert one["image"] == container["image"] == was["containers"][0]["image"]
    assert one["env"] == was["containers"][0]["env"]
    assert [*container["command"], *container["args"]] == ["sleep", "infinity"]
    assert not {"livenessProbe", "readinessProbe"} & set(container)
    known = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert all(known[mount["mountPath"]] == mount for mount in one["volumeMounts"])
    rights = container["securityContext"] | {
        "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN"]}
    }
    assert one["securityContext"] == rights
    assert [*one["command"], *one["args"]][:3] == ["flannel-dp", "clean", "--for-flanneld"]
