"""``flannel-dp status``: a running agent says how it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.command.cli import main
from tests.lib.leases import subnet
from tests.lib.service import Service, fetch, free_port
from tests.lib.waiting import wait_until


class Asked:
    """Asks the agent of a service by the command."""

    def __init__(self, service: Service, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._service, self._run_dir, self._capsys = service, run_dir, capsys

    def text(self, *more: str) -> tuple[int, str]:
        self._capsys.readouterr()
        netns = ["--netns", self._service.host.ns]
        code = main(["status", *netns, "--run-dir", str(self._run_dir), *more])
        printed = self._capsys.readouterr()
        return code, printed.out + printed.err

    def agent(self) -> dict[str, Any]:
        code, text = self.text("--output", "json")
        document = json.loads(text.splitlines()[0])
        (agent,) = document.get("agents", [{}])
        assert code == (1 if not agent else 0 if agent["ok"] else 3)
        return agent


def test_an_agent_says_who_it_is_and_what_happened(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, run_dir = service.family, tmp_path / "run"
    asked = Asked(service, run_dir, capsys)
    code, text = asked.text()
    assert (code, "no agent answers" in text) == (1, True)

    port = free_port(service.host)
    service.start("--run-dir", str(run_dir), "--healthz-port", str(port))
    service.await_clean()
    wait_until(lambda: asked.agent().get("ok"))
    agent = asked.agent()
    assert agent["pid"] == service.pid
    assert agent["families"][str(family)]["interface"] == "eth0"
    assert agent["peers"] == {str(family): {"total": 5, "tunnel": 5, "direct": 0}}
    (device,) = agent["devices"]
    code, text = asked.text("--device", device)
    assert (code, text.splitlines()[0]) == (0, f"{device}: in sync")
    assert f"peers, IPv{family}  5: 5 tunnel, 0 direct" in text

    service.host.ip(f"-{family} route del {subnet(family, 2)}")
    wait_until(lambda: asked.agent()["repairs"])
    (repair,) = asked.agent()["repairs"]
    assert (repair["table"], repair["change"]) == ("route", "deleted")
    assert subnet(family, 2) in repair["after"]
    assert "last repairs:" in asked.text()[1]

    leases = json.loads(service.leases.read_text())
    leases["leases"].append({**leases["leases"][1], "Name": "rival"})
    service.replace(json.dumps(leases))
    wait_until(lambda: asked.agent()["rejected"]["leases"])
    agent = asked.agent()
    (rejected,) = agent["rejected"]["leases"]
    assert (rejected["reason"], agent["ok"]) == ("overlap", True)
    assert "rejected leases (1):" in asked.text()[1]
    code, body = fetch(service.host, port, "/healthz")
    assert (code, body.splitlines()[:2]) == (200, ["ok", "rejected leases: 1 overlap"])

    service.replace('{"leases": [')
    wait_until(lambda: not asked.agent()["ok"])
    (problem,) = asked.agent()["problems"]
    assert (problem["problem"], problem["since"] > agent["started"]) == ("source", True)
    code, text = asked.text()
    assert (code, "problems:" in text) == (3, True)

    assert service.end() == 0
    assert asked.text()[0] == 1
    assert [path.name for path in run_dir.iterdir() if ".sock" in path.name] == []
