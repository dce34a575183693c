"""``flannel-dp`` on a node of a Kubernetes cluster, as a process: what it does to the own node
object and to the kernel, in which order, and what it makes of a bad API server."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import yaml
from msgspec.structs import replace

from flannel_dp.resources.firewall import programs
from flannel_dp.sources.kube.config import SERVICE_ACCOUNT
from tests.lib.apiserver import Certificates, status
from tests.lib.kernel import expected, has_device
from tests.lib.kube import (
    PREFIX,
)
from tests.lib.kube_cluster import (
    ELSEWHERE,
    OWN,
    TOKEN,
    Cluster,
    bare_node,
    device_mac,
    kube_node,
    published,
    told,
)
from tests.lib.leases import DEVICE, endpoint, lease_of, mac, peer, subnet
from tests.lib.monitor import Monitor
from tests.lib.service import fetch, free_port

NOTHING = expected((), 4)
MOVED = "2001:db8::99"
MANIFEST = Path(__file__).resolve().parents[2] / "packaging" / "kubernetes.yaml"


# ---- joining --------------------------------------------------------------------


def test_it_publishes_itself_then_programs_the_peers_then_lets_pods_come(cluster: Cluster) -> None:
    cluster.start()
    cluster.until(lambda: cluster.condition == "False")

    first, second = cluster.server.patches
    assert set(first.annotations) == {
        *("kube-subnet-manager", "backend-type", "backend-data", "backend-v6-data"),
        *("public-ip", "public-ipv6"),
    }
    assert first.conditions == []
    assert first.kernel == {4: NOTHING, 6: NOTHING}
    assert second.conditions == [("NetworkUnavailable", "False")]
    assert second.annotations == {}
    assert second.kernel == cluster.wanted()
    verbs = [seen.verb for seen in cluster.server.requests]
    assert verbs.index("patch") < verbs.index("list") < verbs.index("watch")


def test_others_are_told_what_the_kernel_has(cluster: Cluster) -> None:
    cluster.start()
    cluster.until(lambda: cluster.condition == "False")

    assert published(cluster) == {
        "kube-subnet-manager": "true",
        "backend-type": "vxlan",
        "backend-data": {"VNI": 1, "VtepMAC": device_mac(cluster, 4)},
        "backend-v6-data": {"VNI": 1, "VtepMAC": device_mac(cluster, 6)},
        "public-ip": cluster.host.ipv4,
        "public-ipv6": cluster.host.ipv6,
    }
    addresses = cluster.host.ip_json(f"-4 address show dev {DEVICE[4]}")[0]["addr_info"]
    assert [one["local"] for one in addresses] == [subnet(4, 0).partition("/")[0]]
    assert "FLANNEL_SUBNET=10.240.0.1/24\n" in cluster.subnet_file.read_text()
    assert "FLANNEL_IPV6_SUBNET=fd00:10::1/64\n" in cluster.subnet_file.read_text()


def test_a_new_address_is_published_while_it_runs(cluster: Cluster, family: int) -> None:
    """One family changes. MAC, subnet and the entries of peers stay; the tunnel leaves from it."""
    cluster.start()
    cluster.until(lambda: cluster.condition == "False")
    before, host = published(cluster), cluster.host
    old, new, bits = (host.ipv4, "192.0.2.99", 24) if family == 4 else (host.ipv6, MOVED, 64)

    with Monitor(host) as monitor:
        host.ip(f"address del {old}/{bits} dev eth0")
        host.ip(f"address add {new}/{bits} dev eth0 {'nodad' if family == 6 else ''}")
        key = "public-ip" if family == 4 else "public-ipv6"
        cluster.until(lambda: cluster.notes[key] == new)
        cluster.until(lambda: f"{new} " in host.ip(f"-d link show {DEVICE[family]}"))
        cluster.await_clean()
        assert monitor.deleted("fdb", "neighbour", "nexthop") & entries(cluster) == set()

    assert published(cluster) == before | {key: new}


def test_a_new_address_is_published_before_the_default_route_is_back(
    cluster: Cluster, family: int
) -> None:
    """The kernel takes the default route along with the address that it was by; no flag names the
    interface, which stays the one in use."""
    host, key = cluster.host, {4: "public-ip", 6: "public-ipv6"}[family]
    gateway = {4: "192.0.2.254", 6: "2001:db8::fe"}[family]
    host.ip(f"-{family} route add default via {gateway} dev eth0")
    cluster.configure(family)
    command = cluster.command("sync", "--watch")
    at = command.index("--iface")
    cluster.spawn(command[:at] + command[at + 2 :])
    cluster.until(lambda: cluster.condition == "False")
    old, new, bits = (host.ipv4, "192.0.2.99", 24) if family == 4 else (host.ipv6, MOVED, 64)

    host.ip(f"address del {old}/{bits} dev eth0")
    host.ip(f"-{family} route flush default")
    host.ip(f"address add {new}/{bits} dev eth0 {'nodad' if family == 6 else ''}")

    cluster.until(lambda: cluster.notes[key] == new)
    cluster.until(lambda: f"{new} " in host.ip(f"-d link show {DEVICE[family]}"))
    cluster.await_clean()
    cluster.until(lambda: f"local {old} -> {new}" in cluster.said())


def entries(cluster: Cluster) -> set[str]:
    """MACs and gateways of the peers."""
    macs = {mac(family, number) for family in (4, 6) for number in cluster.peers}
    return macs | {subnet(f, n).partition("/")[0] for f in (4, 6) for n in cluster.peers}


def test_an_address_that_cannot_be_published_is_tried_again(cluster: Cluster) -> None:
    port = free_port(cluster.host)
    cluster.start("--healthz-port", str(port))
    cluster.until(lambda: cluster.condition == "False")

    cluster.server_down()
    cluster.host.ip(f"address del {cluster.host.ipv4}/24 dev eth0")
    cluster.host.ip("address add 192.0.2.99/24 dev eth0")
    told_so = f"address: the lease still has {cluster.host.ipv4}"
    cluster.until(lambda: told_so in fetch(cluster.host, port, "/healthz")[1])
    cluster.server_up()
    cluster.until(lambda: cluster.notes["public-ip"] == "192.0.2.99")
    cluster.until(lambda: fetch(cluster.host, port, "/healthz") == (200, "ok\n"))


def test_one_family_of_a_cluster_that_has_both(cluster: Cluster, family: int) -> None:
    cluster.configure(family)
    cluster.start()
    cluster.until(lambda: cluster.condition == "False")
    cluster.await_clean()

    other = 10 - family
    assert not has_device(cluster.host, other)
    assert ("backend-v6-data" in cluster.notes) == ("public-ipv6" in cluster.notes) == (family == 6)
    assert ("backend-data" in cluster.notes) == ("public-ip" in cluster.notes) == (family == 4)


def test_the_node_is_found_by_the_pod(cluster: Cluster) -> None:
    cluster.server.pods["kube-flannel", "ds-1"] = {"kind": "Pod", "spec": {"nodeName": OWN}}

    cluster.start(POD_NAME="ds-1", POD_NAMESPACE="kube-flannel")

    cluster.await_clean()
    assert cluster.notes["public-ip"] == cluster.host.ipv4


def test_the_condition_is_left_alone_when_told_to(cluster: Cluster) -> None:
    cluster.start("--set-node-network-unavailable=false")
    cluster.await_clean()
    cluster.join(6)
    cluster.await_clean()

    assert cluster.end() == 0
    assert cluster.condition == ""
    assert len(cluster.server.patches) == 1


def test_a_condition_that_cannot_be_set_is_tried_again(cluster: Cluster) -> None:
    port = free_port(cluster.host)
    cluster.server.fail("patch", None, status(500, "InternalError", "etcdserver: no leader"))
    cluster.start("--healthz-port", str(port))

    cluster.until(lambda: "no leader" in fetch(cluster.host, port, "/healthz")[1])
    cluster.until(lambda: cluster.condition == "False")
    cluster.until(lambda: fetch(cluster.host, port, "/healthz") == (200, "ok\n"))
    assert cluster.kernel() == cluster.wanted()


# ---- addresses that the cluster knows better ------------------------------------


def test_public_ip_overwrite(cluster: Cluster) -> None:
    """What the node is reached by is not on it. Its own lease is no peer all the same, and a
    peer is reached by what it has published."""
    cluster.server.put(bare_node(public_ip_overwrite=ELSEWHERE))
    translated = replace(peer(6), public_ip=endpoint(4, 906))
    cluster.peers[6] = translated
    cluster.server.put(kube_node(6, translated, public_ip_overwrite=endpoint(4, 906)))
    cluster.start()
    cluster.until(lambda: cluster.condition == "False")
    cluster.await_clean()

    assert cluster.notes["public-ip"] == ELSEWHERE
    assert cluster.notes["public-ipv6"] == cluster.host.ipv6
    device = cluster.host.ip_json(f"link show {DEVICE[4]}")[0]["linkinfo"]["info_data"]
    assert device["local"] == cluster.host.ipv4


def test_public_ip_overwrite_of_a_node_that_runs_already(cluster: Cluster) -> None:
    """It is taken at the next start, as flanneld does; the other nodes then follow."""
    cluster.start()
    cluster.until(lambda: cluster.condition == "False")
    cluster.end()
    own = cluster.server.nodes[OWN]
    own["metadata"]["annotations"][f"{PREFIX}public-ip-overwrite"] = ELSEWHERE
    cluster.server.put(own)

    cluster.start()
    cluster.until(lambda: cluster.notes["public-ip"] == ELSEWHERE)

    cluster.await_clean()
    assert cluster.server.patches[-1].annotations == {"public-ip": ELSEWHERE}


@pytest.mark.parametrize("command", ["sync", "plan"])
def test_public_ip_overwrite_is_heeded_without_watch(cluster: Cluster, command: str) -> None:
    cluster.server.put(bare_node(public_ip_overwrite=ELSEWHERE))
    cluster.start()
    cluster.until(lambda: cluster.condition == "False")
    cluster.await_clean()
    cluster.end()
    cluster.subnet_file.unlink()

    code, answer, said = cluster.run(command)

    assert code == 0, said
    assert answer["rejected"] == []
    assert cluster.kernel() == cluster.wanted()
    if command == "plan":
        assert answer["operations"] == []


def test_node_public_ip_chooses_the_interface(cluster: Cluster) -> None:
    host = cluster.host
    host.ip("link add eth1 type veth peer name far1")
    host.ip("address add 198.51.100.1/24 dev eth1")
    host.ip("link set far1 up")
    host.ip("link set eth1 up")
    host.ip("-4 route add default dev eth0")
    cluster.configure(4)
    cluster.server.put(bare_node(node_public_ip="198.51.100.1"))
    command = cluster.command("sync", "--watch")
    at = command.index("--iface")
    cluster.spawn(command[:at] + command[at + 2 :])
    cluster.until(lambda: cluster.condition == "False")

    assert cluster.notes["public-ip"] == "198.51.100.1"
    link = host.ip_json(f"link show {DEVICE[4]}")[0]
    assert link["linkinfo"]["info_data"]["link"] == "eth1"


def test_the_published_address_outweighs_the_default_route(cluster: Cluster, family: int) -> None:
    """After a boot there is no device: the node object says which interface it was."""
    host, key = cluster.host, {4: "public-ip", 6: "public-ipv6"}[family]
    elsewhere = {4: "198.51.100.1/24", 6: "2001:db8:77::1/64 nodad"}[family]
    host.ip("link add eth1 type veth peer name far1")
    host.ip(f"-{family} address add {elsewhere} dev eth1")
    host.ip("link set far1 up")
    host.ip("link set eth1 up")
    host.ip(f"-{family} route add default dev eth1 metric 1")
    cluster.configure(family)
    cluster.server.put(kube_node(0, lease_of(host)))
    command = cluster.command("sync", "--watch")
    at = command.index("--iface")
    cluster.spawn(command[:at] + command[at + 2 :])
    cluster.until(lambda: cluster.condition == "False")

    assert cluster.notes[key] == host.underlay(family)
    link = host.ip_json(f"link show {DEVICE[family]}")[0]
    assert link["linkinfo"]["info_data"]["link"] == "eth0"


# ---- again ----------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_a_restarted_agent_writes_nothing(cluster: Cluster, number: int) -> None:
    """Neither to the API server nor to the kernel."""
    port = free_port(cluster.host)
    cluster.start()
    cluster.until(lambda: cluster.condition == "False")
    cluster.await_clean()
    cluster.end(number)
    patches = len(cluster.server.patches)

    with Monitor(cluster.host) as monitor:
        cluster.start("--healthz-port", str(port))
        cluster.until(lambda: fetch(cluster.host, port, "/readyz")[0] == 200)
        gets = cluster.server.count("get")
        assert cluster.end() == 0
        assert told(monitor) == []

    assert cluster.server.count("patch") == patches == len(cluster.server.patches)
    assert gets > 0


def test_a_device_that_was_lost_keeps_its_published_mac(cluster: Cluster) -> None:
    """The others know the MAC of the annotations, and need not learn another one."""
    cluster.start()
    cluster.until(lambda: cluster.condition == "False")
    cluster.end()
    known = {family: device_mac(cluster, family) for family in (4, 6)}
    for family in (4, 6):
        cluster.host.ip(f"link del {DEVICE[family]}")
    data = f'{{"VNI":1,"VtepMAC":"{mac(4, 77)}"}}'
    own = cluster.server.nodes[OWN]
    own["metadata"]["annotations"][f"{PREFIX}backend-data"] = data
    cluster.server.put(own)
    patches = len(cluster.server.patches)

    cluster.start()
    cluster.await_clean()

    assert {family: device_mac(cluster, family) for family in (4, 6)} == known | {4: mac(4, 77)}
    assert len(cluster.server.patches) == patches


def test_hangup_lists_again(cluster: Cluster) -> None:
    cluster.start()
    cluster.until(lambda: cluster.condition == "False")
    lists = cluster.server.count("list")

    assert cluster.process is not None
    os.kill(cluster.process.pid, signal.SIGHUP)
    cluster.until(lambda: cluster.server.count("list") > lists)

    cluster.join(6)
    cluster.await_clean()
    assert len(cluster.server.patches) == 2


def test_pods_may_come_when_firewall_rules_are_written(cluster: Cluster, tmp_path: Path) -> None:
    """Peers alone are not enough: condition, /readyz and /healthz say what is missing."""
    port, real, broken = free_port(cluster.host), programs.find("nft"), tmp_path / "broken"
    broken.touch()
    (tmp_path / "nft").write_text(
        f'#!/bin/sh\n[ -e {broken} ] && {{ echo no room >&2; exit 1; }}\nexec {real} "$@"\n'
    )
    (tmp_path / "nft").chmod(0o755)
    cluster.start(
        *("--firewall", "nft", "--ip-masq", "--healthz-port", str(port)),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    cluster.until(lambda: "firewall: " in fetch(cluster.host, port, "/healthz")[1])
    cluster.until(lambda: cluster.kernel() == cluster.wanted())

    code, text = fetch(cluster.host, port, "/readyz")
    assert code == 503
    assert "no room" in text
    assert cluster.condition != "False"

    broken.unlink()
    cluster.until(lambda: cluster.condition == "False")
    cluster.until(lambda: fetch(cluster.host, port, "/healthz") == (200, "ok\n"))
    assert fetch(cluster.host, port, "/readyz")[0] == 200


# ---- as a pod --------------------------------------------------------------------


@pytest.mark.parametrize("dropping", ["", "nft", "legacy"], ids=["plain", "nft", "legacy"])
def test_the_manifests_container(
    cluster: Cluster, certificates: Certificates, dropping: str, tmp_path: Path
) -> None:
    """Its arguments, its privileges and its read-only /proc/sys; the API server is found by
    the service account. /run is the pod's own, and so is the token in it. On a node where
    Docker made one kind of iptables drop what is forwarded, the rules are in that one."""
    port = 2401
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "token").write_text(TOKEN)
    (secrets / "ca.crt").write_bytes(certificates.ca.read_bytes())
    (daemons,) = [one for one in yaml.safe_load_all(MANIFEST.read_text())
                  if one["kind"] == "DaemonSet"]  # fmt: skip
    (container,) = daemons["spec"]["template"]["spec"]["containers"]
    args = [arg.replace("/etc/kube-flannel", str(tmp_path)) for arg in container["args"]]
    added = container["securityContext"]["capabilities"]
    assert added == {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"]}
    cluster.host.ip("-4 route add default dev eth0")
    if dropping:
        for word in ("iptables", "ip6tables"):
            cluster.host.exec(f"{word}-{dropping}", "-P", "FORWARD", "DROP")

    privileges = "setpriv --no-new-privs --bounding-set=-all,+net_admin,+net_raw --inh-caps=-all"
    script = (
        "set -e; mount -t tmpfs none /run;"
        f" mkdir -p {SERVICE_ACCOUNT} /run/flannel; cp {secrets}/* {SERVICE_ACCOUNT};"
        " mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys;"
        f' exec {privileges} "$@"'
    )
    cluster.spawn(
        [
            *("ip", "netns", "exec", cluster.host.ns, "sh", "-c", script, "pod"),
            *(sys.executable, "-m", "flannel_dp", *args),
        ],
        KUBERNETES_SERVICE_HOST="127.0.0.1",
        KUBERNETES_SERVICE_PORT=str(cluster.server.port),
    )
    cluster.until(lambda: cluster.condition == "False")
    cluster.until(lambda: fetch(cluster.host, port, "/readyz")[0] == 200)

    assert fetch(cluster.host, port, "/healthz") == (200, "ok\n")
    assert cluster.kernel() == cluster.wanted()
    assert "accept_ra: Read-only file system" in cluster.said()  # told, and no reason to stop
    assert {seen.authorization for seen in cluster.server.requests} == {f"Bearer {TOKEN}"}
    assert cluster.process is not None
    root = Path(f"/proc/{cluster.process.pid}/root")
    assert "FLANNEL_SUBNET=10.240.0.1/24\n" in (root / "run/flannel/subnet.env").read_text()
    tables = cluster.host.exec("nft", "list", "tables")
    for table, word in (("ip", "iptables"), ("ip6", "ip6tables")):
        assert (f"table {table} flannel-dp" in tables) is (not dropping)
        if dropping:
            assert "-j FLANNEL-DP-FWD" in cluster.host.exec(f"{word}-{dropping}-save")
    (line,) = [
        line
        for line in Path(f"/proc/{cluster.process.pid}/status").read_text().splitlines()
        if line.startswith("CapEff:")
    ]
    net_admin, net_raw = 1 << 12, 1 << 13  # linux/capability.h
    assert int(line.split()[1], 16) == net_admin | (net_raw if dropping == "legacy" else 0)
    assert cluster.end() == 0
    assert cluster.kernel() == cluster.wanted()
