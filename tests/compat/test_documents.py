"""What programs read of ours stays: JSON documents, exit codes, subnet.env, flags and metrics.

Each scenario runs the commands on a node of its own and compares all that they print with a
recorded document in tests/compat/documents. Sentences for people are masked, times are zero.
A change that only adds keys is recorded again on purpose::

    FLANNEL_DP_RECORD=1 python -m pytest tests/compat/test_documents.py
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flannel_dp.command.cli as cli

FOLDER = Path(__file__).parent / "documents"

#: Keys whose values are sentences for people (or times): their wording may improve.
PROSE = {"detail", "hint", "warnings", "why", "note", "problem", "message", "text", "changes"}
PROSE |= {"advice", "steps", "blockers", "reason_text", "fix"}

NETWORKS: dict[str, dict[str, Any]] = {
    "vxlan-ipv4": {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}},
    "vxlan-ipv6": {
        "EnableIPv4": False,
        "EnableIPv6": True,
        "IPv6Network": "fd00:10:244::/48",
        "Backend": {"Type": "vxlan"},
    },
    "dual-direct": {
        "Network": "10.244.0.0/16",
        "EnableIPv6": True,
        "IPv6Network": "fd00:10:244::/48",
        "Backend": {"Type": "vxlan", "DirectRouting": True},
    },
    "host-gw": {
        "Network": "10.244.0.0/16",
        "EnableIPv6": True,
        "IPv6Network": "fd00:10:244::/48",
        "Backend": {"Type": "host-gw"},
    },
}


def lease(number: int, backend: str, endpoint: str = "") -> dict[str, Any]:
    """The lease of node ``number`` in both families, as our own list has it."""
    data = {"VNI": 1, "VtepMAC": f"02:00:00:00:00:{number:02x}"} if backend == "vxlan" else None
    return {
        "Name": f"node{number}",
        "Subnet": f"10.244.{number}.0/24",
        "IPv6Subnet": f"fd00:10:244:{number:x}::/64",
        "PublicIP": endpoint or f"192.0.2.{number}",
        "PublicIPv6": f"2001:db8::{number:x}",
        "BackendType": backend,
        "BackendData": data,
        "BackendV6Data": data,
    }


class Recorder:
    """Runs commands on one node and keeps what they print."""

    def __init__(self, host: Any, folder: Path, network: dict[str, Any]) -> None:
        self.host, self.folder = host, folder
        self.backend = str(network["Backend"]["Type"])
        self.leases, self.net_conf = folder / "leases.json", folder / "net-conf.json"
        self.subnet_file = folder / "subnet.env"
        self.net_conf.write_text(json.dumps(network))
        self.steps: list[dict[str, Any]] = []

    def write(self, *leases: dict[str, Any]) -> None:
        self.leases.write_text(json.dumps({"leases": leases}))

    def run(self, capsys: pytest.CaptureFixture[str], name: str, command: str, *more: str) -> None:
        arguments = [*command.split(), "--netns", self.host.ns, "--net-conf", str(self.net_conf)]
        arguments += ["--iface", "eth0", "--subnet-file", str(self.subnet_file)]
        if not command.startswith("clean"):
            arguments += ["--leases", str(self.leases)]
        code = cli.main([*arguments, "--output", "json", *more])
        printed = capsys.readouterr().out
        printed = printed.replace(str(self.folder), "FOLDER")
        document = masked(json.loads(printed)) if printed else None
        self.steps.append({"step": name, "exit": code, "document": document})


def masked(value: Any, key: str = "") -> Any:
    """``value`` without sentences and times; what kind of value there was stays."""
    if isinstance(value, dict):
        if key == "seconds":
            return dict.fromkeys(value, 0)
        return {name: masked(inner, name) for name, inner in value.items()}
    if key == "warnings":  # some are about the whole machine
        return []
    if key in PROSE:
        if isinstance(value, list):
            return [masked(inner) if isinstance(inner, dict) else "..." for inner in value]
        return "..." if value else value
    if isinstance(value, list):
        return [masked(inner, key) for inner in value]
    if isinstance(value, float) or key in ("seconds", "age", "at", "since"):
        return 0
    return value


def compare(name: str, found: Any) -> None:
    """Compare with the recorded document ``name``, or record it where that was asked for."""
    path = FOLDER / f"{name}.json"
    text = json.dumps(found, indent=1, sort_keys=True) + "\n"
    if os.environ.get("FLANNEL_DP_RECORD"):
        path.write_text(text)
    assert json.loads(path.read_text()) == json.loads(text)


@pytest.mark.parametrize("network", NETWORKS)
def test_documents_of_a_node(
    network: str, make_host: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = Recorder(make_host(), tmp_path, NETWORKS[network])
    own, backend = lease(1, node.backend), node.backend

    node.write(own, lease(2, backend), lease(3, backend))
    node.run(capsys, "plan of an empty node", "plan")
    node.run(capsys, "sync of an empty node", "sync")
    node.run(capsys, "sync without a change", "sync")
    node.run(capsys, "plan without a change", "plan", "--exit-code")
    node.run(capsys, "show", "show")
    node.run(capsys, "leases", "leases")
    family = "10.244.2.9" if "ipv6" not in network else "fd00:10:244:2::9"
    node.run(capsys, "explain a pod of a peer", f"explain {family}")
    other = "10.244.1.9" if "ipv6" not in network else "fd00:10:244:1::9"
    node.run(capsys, "explain a pod of this node", f"explain {other}")
    nobody = "10.244.77.9" if "ipv6" not in network else "fd00:10:244:77::9"
    node.run(capsys, "explain an address without a lease", f"explain {nobody}")
    overlap = lease(4, backend) | {"Subnet": "10.244.2.0/24", "IPv6Subnet": "fd00:10:244:2::/64"}
    node.write(own, lease(2, backend, "192.0.2.22"), overlap)
    node.run(capsys, "plan of changes", "plan", "--exit-code")
    node.run(capsys, "sync of changes", "sync")
    node.run(capsys, "show with a rejected lease", "show")
    node.run(capsys, "leases with a rejected lease", "leases")
    node.write(own | {"BackendType": "udp"})
    node.run(capsys, "sync with a lease that cannot be this node's", "sync")
    environment = node.subnet_file.read_text()
    node.run(capsys, "clean", "clean")

    steps = [*node.steps, {"step": "subnet.env", "document": environment.splitlines()}]
    compare(network, steps)


def test_flags_of_every_command() -> None:
    found = {
        name: sorted(option for one in command.params for option in one.opts)
        for name, command in cli.command.commands.items()
    }

    compare("flags", found)


def test_names_and_labels_of_metrics() -> None:
    from flannel_dp.agent.metrics import Exposition
    from flannel_dp.agent.status import Status, StatusBoard

    text = Exposition(StatusBoard(Status())).render()[0].decode()

    compare("metrics", sorted(re.findall(r"^# TYPE (.*)$", text, re.MULTILINE)))
