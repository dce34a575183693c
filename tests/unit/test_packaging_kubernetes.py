"""packaging/kubernetes.yaml: its parts fit each other, the program's flags and its requests."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from flannel_dp.cluster.lease import Identity
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.cluster.subnet_env import DEFAULT_PATH
from flannel_dp.command import flags
from flannel_dp.command.cli import command
from flannel_dp.kernel.lock import DEFAULT_DIRECTORY
from flannel_dp.sources.kube.config import KubeOptions
from flannel_dp.sources.kube.own import OwnNode
from tests.lib.apiserver import ApiServer, Seen
from tests.lib.follower import Follower
from tests.lib.kube import node

PATH = Path(__file__).resolve().parents[2] / "packaging" / "kubernetes.yaml"
NAMESPACE = "kube-flannel"

Object = dict[str, Any]
Right = tuple[str, str, str]
"""Namespace ("" for all of the cluster), resource with its subresource, verb."""


class _OnceLoader(yaml.SafeLoader):
    """YAML whose mappings have no key twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), keys
        return super().construct_mapping(node, deep)


@pytest.fixture(name="objects", scope="module")
def objects_fixture() -> dict[str, Object]:
    """What is in the file, by kind: one of each."""
    found = list(yaml.load_all(PATH.read_text(), _OnceLoader))
    assert len({each["kind"] for each in found}) == len(found)
    return {each["kind"]: each for each in found}


@pytest.fixture(name="pod", scope="module")
def pod_fixture(objects: dict[str, Object]) -> Object:
    spec: Object = objects["DaemonSet"]["spec"]["template"]["spec"]
    return spec


@pytest.fixture(name="container", scope="module")
def container_fixture(pod: Object) -> Object:
    (container,) = pod["containers"]
    assert isinstance(container, dict)
    return container


@pytest.fixture(name="given", scope="module")
def given_fixture(container: Object) -> dict[str, Any]:
    """The values of the flags, as click reads them."""
    subcommand, *words = container["args"]
    parsed = command.commands[subcommand]
    assert isinstance(parsed, click.Command)
    # Without the context of the command above it click would forget -h, for good.
    with command.make_context("flannel-dp", [subcommand]) as parent:
        return parsed.make_context("sync", list(words), parent=parent).params


# ---- rights ---------------------------------------------------------------------


def granted(objects: dict[str, Object]) -> set[Right]:
    """All rights that the file gives."""
    found: set[Right] = set()
    for kind in ("ClusterRole", "Role"):
        role = objects[kind]
        where = role["metadata"].get("namespace", "")
        for rule in role["rules"]:
            assert rule["apiGroups"] == [""]
            assert set(rule) == {"apiGroups", "resources", "verbs"}
            found |= {(where, what, verb) for what in rule["resources"] for verb in rule["verbs"]}
    return found


def needed(seen: Seen) -> Right:
    """What RBAC asks for a request: its path is that of the API's resource."""
    words = seen.path.removeprefix("/api/v1/").split("/")
    namespace = ""
    if words[0] == "namespaces":
        namespace, words = words[1], words[2:]
    resource = "/".join([words[0], *words[2:3]])
    return namespace, resource, seen.verb


def test_rights_are_those_that_are_used(
    objects: dict[str, Object],
    server: ApiServer,
    options: Callable[..., KubeOptions],
    follow: Callable[..., Follower],
) -> None:
    """Every request of the sources is made, and RBAC would allow it; no right is left over."""
    network = NetworkConfig.from_json(objects["ConfigMap"]["data"]["net-conf.json"])
    server.pods[NAMESPACE, "one"] = {"kind": "Pod", "spec": {"nodeName": "node-00007"}}
    server.put(node(7, cidrs=["10.244.7.0/24"]))
    environ = {"POD_NAME": "one", "POD_NAMESPACE": NAMESPACE}

    own = OwnNode(options(environ=environ))
    subnets = own.own_subnets(network)
    assert own.publish(Identity({4: "192.0.2.99"}, {4: "02:00:00:00:00:07"}, vni=1), subnets)
    assert own.mark_ready()
    own.public_overrides()
    own.node_public()
    own.lease()
    own.close()
    followed = follow()
    followed.until(lambda: followed.snapshots and server.watching)

    assert {needed(seen) for seen in server.requests} == granted(objects)


def test_requests_are_all_in_the_sources_that_were_asked() -> None:
    """``get``, ``patch`` and ``watch`` of an API are called in two modules and nowhere else."""
    sources = PATH.parents[1] / "flannel_dp" / "sources"
    calling = {
        str(path.relative_to(sources))
        for path in sources.rglob("*.py")
        if any(f"api.{verb}(" in path.read_text() for verb in ("get", "patch", "watch"))
    }

    assert calling == {"kube/source.py", "kube/nodes.py", "kube/own.py"}


def test_rights_are_bound_to_the_account_of_the_pods(
    objects: dict[str, Object], pod: Object
) -> None:
    account = objects["ServiceAccount"]["metadata"]
    for kind in ("Role", "ClusterRole"):
        binding = objects[f"{kind}Binding"]
        assert binding["roleRef"] == {
            "apiGroup": "rbac.authorization.k8s.io",
            "kind": kind,
            "name": objects[kind]["metadata"]["name"],
        }
        assert binding["subjects"] == [{"kind": "ServiceAccount", **account}]
    assert pod["serviceAccountName"] == account["name"]
    namespaced = ("ServiceAccount", "Role", "RoleBinding", "ConfigMap", "DaemonSet")
    assert {objects[kind]["metadata"]["namespace"] for kind in namespaced} == {NAMESPACE}
    assert objects["Namespace"]["metadata"]["name"] == NAMESPACE


# ---- the pod ----------------------------------------------------------------------


def test_flags_are_what_the_mounts_and_the_defaults_say(
    given: dict[str, Any], container: Object, pod: Object
) -> None:
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}

    assert container["command"] == ["flannel-dp"]
    assert given["watch"]
    assert given["kube_subnet_mgr"]
    assert given["net_conf"] == flags.NET_CONF
    assert os.path.dirname(given["net_conf"]) in mounts
    assert given["subnet_file"] == DEFAULT_PATH
    hosts = {v["hostPath"]["path"]: v["name"] for v in pod["volumes"] if "hostPath" in v}
    assert hosts == {
        os.path.dirname(DEFAULT_PATH): "run-flannel",
        DEFAULT_DIRECTORY: "run-flannel-dp",
        "/run/xtables.lock": "xtables-lock",
        "/opt/cni/bin": "cni-plugins",
        "/etc/cni/net.d": "cni-configuration",
    }
    mounts |= {m["mountPath"]: m for one in pod["initContainers"] for m in one["volumeMounts"]}
    for path, name in hosts.items():
        assert mounts[path] == {"name": name, "mountPath": path}
    assert {mount["name"] for mount in mounts.values()} == {v["name"] for v in pod["volumes"]}


def test_nodes_that_join_later_get_plugin_and_configuration(
    objects: dict[str, Object], pod: Object, tmp_path: Path
) -> None:
    """The commands are run with other paths; plugin before configuration, which makes a node
    ready."""
    there = {"/flannel": "plugin", "/etc/kube-flannel/cni-conf.json": ""}
    there["/etc/kube-flannel/cni-conf.json"] = objects["ConfigMap"]["data"]["cni-conf.json"]
    for path, text in there.items():
        (tmp_path / path[1:]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path[1:]).write_text(text)
    for path in ("opt/cni/bin", "etc/cni/net.d"):
        (tmp_path / path).mkdir(parents=True)

    plugin, configuration = pod["initContainers"]
    for one in (plugin, configuration):
        words = [*one["command"], *one["args"]]
        subprocess.run([f"{tmp_path}{w}" if w[0] == "/" else w for w in words], check=True)

    assert (tmp_path / "opt/cni/bin/flannel").read_text() == "plugin"
    found = json.loads((tmp_path / "etc/cni/net.d/10-flannel.conflist").read_text())
    assert [one["type"] for one in found["plugins"]] == ["flannel", "portmap"]
    assert found["cniVersion"]
    assert found["name"]


def test_init_containers_have_no_capability(pod: Object, container: Object) -> None:
    for one in pod["initContainers"]:
        assert one["securityContext"] == container["securityContext"] | {
            "capabilities": {"drop": ["ALL"]}
        }


def test_the_firewall_engine_is_chosen_by_what_the_node_has(given: dict[str, Any]) -> None:
    """An engine by name would lose pods' traffic on nodes where iptables drops it."""
    assert given["firewall"] == "auto"
    assert given["ip_masq"]


def test_probes_ask_where_health_is_served(given: dict[str, Any], container: Object) -> None:
    for probe, path in (("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
        assert container[probe]["httpGet"] == {
            "host": given["healthz_ip"],
            "port": given["healthz_port"],
            "path": path,
        }
    assert given["healthz_ip"] == "127.0.0.1"  # nobody but the kubelet has to see it
    assert given["healthz_port"] > 1024  # CAP_NET_BIND_SERVICE is not there


def test_privileges(container: Object, pod: Object) -> None:
    assert container["securityContext"] == {
        "runAsUser": 0,
        "privileged": False,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert pod["hostNetwork"] is True
    assert not {"hostPID", "hostIPC"} & set(pod)


def test_it_runs_on_nodes_that_take_no_other_pod_yet(pod: Object) -> None:
    assert pod["tolerations"] == [{"operator": "Exists"}]
    assert pod["priorityClassName"] == "system-node-critical"
    assert pod["nodeSelector"] == {"kubernetes.io/os": "linux"}


def test_the_node_is_named(container: Object) -> None:
    assert container["env"] == [
        {"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}
    ]


def test_images_are_placeholders_that_cannot_be_pulled(container: Object, pod: Object) -> None:
    """RFC 6761: no name under .invalid is ever found."""
    for one in (container, *pod["initContainers"]):
        assert one["image"].partition("/")[0].endswith(".invalid")
    lines = PATH.read_text().splitlines()
    images = [number for number, text in enumerate(lines) if "image:" in text]
    assert all("PLACEHOLDER" in lines[number - 1] for number in images)
    assert len(images) == 1 + len(pod["initContainers"])


def test_the_daemon_set_selects_its_own_pods(objects: dict[str, Object]) -> None:
    spec = objects["DaemonSet"]["spec"]

    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]


def test_the_network_is_one_that_is_accepted(objects: dict[str, Object], pod: Object) -> None:
    config = objects["ConfigMap"]
    (volume,) = [v for v in pod["volumes"] if "configMap" in v]

    assert volume["configMap"]["name"] == config["metadata"]["name"]
    network = NetworkConfig.from_json(config["data"][os.path.basename(flags.NET_CONF)])
    assert (str(network.network), network.backend.type) == ("10.244.0.0/16", "vxlan")
