"""Views and clean while etcd is down: by what the node has and remembers."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.command.cli import main
from tests.lib.leases import DEVICE, lease_of, network_config, peers, subnet
from tests.lib.service import Service
from tests.lib.traffic import pod_address
from tests.lib.waiting import wait_until

NUMBERS = range(1, 4)


class Node:
    """One that was synced from a file, and asks an etcd that does not answer now."""

    def __init__(self, host: Any, family: int, folder: Path, **backend: Any) -> None:
        self.host, self.folder = host, folder
        self.subnet_file = folder / "subnet.env"
        leases, net_conf = folder / "leases.json", folder / "net-conf.json"
        every = [lease_of(host), *peers(NUMBERS)]
        leases.write_text('{"leases": [' + ",".join(one.to_json() for one in every) + "]}")
        net_conf.write_text(network_config(family, **backend).to_json())
        files = ["--leases", str(leases), "--net-conf", str(net_conf)]
        assert main(["sync", *files, *self.flags]) == 0
        with socket.socket() as nobody:  # bound, and not listening
            nobody.bind(("127.0.0.1", 0))
            self.etcd = f"http://127.0.0.1:{nobody.getsockname()[1]}"

    @property
    def flags(self) -> list[str]:
        here = ["--netns", self.host.ns, "--iface", self.host.iface, "--firewall", "none"]
        return [*here, "--subnet-file", str(self.subnet_file)]

    def run(self, *command: str) -> int:
        return main([*command, "--etcd-endpoints", self.etcd, *self.flags])


@pytest.fixture
def node(host: Any, family: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Node:
    made = Node(host, family, tmp_path)
    capsys.readouterr()
    return made


def test_show_and_explain_read_the_kernel(
    node: Node, family: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert node.run("show", "--output", "json") == 0
    shown = capsys.readouterr()
    (view,) = json.loads(shown.out)["families"]
    assert [(one["subnet"], one["state"]) for one in view["peers"]] == [
        (subnet(family, number), "ok") for number in NUMBERS
    ]
    assert view["device"]["problem"] == ""
    assert view["strays"] == []
    assert f"without leases, in the network of {node.subnet_file}" in shown.err

    assert node.run("explain", pod_address(family, 2), "--output", "json") == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "peer"


def test_clean_removes_what_the_node_has(node: Node, host: Any, family: int) -> None:
    assert node.run("clean") == 0

    assert DEVICE[family] not in host.ip("link show")
    assert host.ip(f"-{family} route show proto 138") == ""


@pytest.mark.parametrize("command", ["sync", "plan", "leases"])
def test_what_needs_leases_fails_as_before(node: Node, command: str) -> None:
    assert node.run(command) == 4


def test_a_node_that_remembers_no_network_says_so(
    node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    node.subnet_file.unlink()

    assert node.run("show") == 4
    assert "etcd" in capsys.readouterr().err


def test_another_namespaces_file_is_not_read(node: Node) -> None:
    """The default path is the file of the namespace that the command is started in."""
    here = ["--netns", node.host.ns, "--iface", node.host.iface, "--firewall", "none"]

    for command in ("show", "clean"):
        assert main([command, "--etcd-endpoints", node.etcd, *here]) == 4


def test_devices_of_two_networks_say_nothing(node: Node, host: Any, family: int) -> None:
    name = DEVICE[family].replace(".1", ".77")
    host.ip(f"link add {name} type vxlan id 77 dstport 4790")

    assert node.run("show") == 4


def test_a_list_that_is_missing_is_no_server_that_does_not_answer(node: Node) -> None:
    files = ["--leases", str(node.folder / "none.json")]
    files += ["--net-conf", str(node.folder / "net-conf.json")]

    assert main(["show", *files, *node.flags]) == 4


def test_a_running_agent_says_the_network(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No flag says where anything is, and the files that the agent has read are gone."""
    service.configure(Port=4799)
    here = ["--run-dir", str(tmp_path / "run"), "--subnet-file", str(tmp_path / "env")]
    service.start(*here, "--iface", service.host.iface)
    service.await_clean()
    service.net_conf.unlink()
    flags = ["--netns", service.host.ns, *here]
    as_json = [*flags, "--output", "json"]
    pod = pod_address(service.family, 2)

    assert main(["show", *as_json]) == 0
    shown = capsys.readouterr()
    (view,) = json.loads(shown.out)["families"]
    assert [one["state"] for one in view["peers"]] == ["ok"] * 5
    assert (view["device"]["port"], view["device"]["problem"]) == (4799, "")
    said = f"in the network of the running agent (process {service.pid})"
    assert shown.err == f"flannel-dp: {said}, as with --iface {service.host.iface}\n"
    assert main(["explain", pod, *as_json]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "peer"
    assert main(["stats", *as_json]) == 0
    assert main(["clean", *flags]) == 5
    leases = json.loads(service.leases.read_text())["leases"]
    service.replace(json.dumps({"leases": [*leases, {**leases[2], "Name": "rival"}]}))
    capsys.readouterr()

    def told() -> bool:
        assert main(["show", *flags]) == 0
        return "it has 1 rejected lease: see 'flannel-dp status'" in capsys.readouterr().err

    wait_until(told)
    assert main(["show", *flags, "--net-conf", str(service.net_conf)]) == 2
    capsys.readouterr()
    service.end()
    assert main(["explain", pod, *as_json]) == 0
    assert str(tmp_path / "env") in capsys.readouterr().err
    assert main(["clean", *flags]) == 0
    assert DEVICE[service.family] not in service.host.ip("link show")
