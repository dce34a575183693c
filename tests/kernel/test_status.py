"""``flannel-dp status``: a running agent says how it is."""

from __future__ import annotations

import json
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.command.cli import main
from flannel_dp.look.events import Event
from flannel_dp.look.history import words_of
from tests.lib.leases import subnet
from tests.lib.rival import Rival
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

    def history(self, *more: str) -> dict[str, Any]:
        self._capsys.readouterr()
        netns = ["--netns", self._service.host.ns]
        directory = ["--run-dir", str(self._run_dir)]
        code = main(["history", *netns, *directory, "--output", "json", *more])
        printed = self._capsys.readouterr()
        assert code == 0, printed
        document: dict[str, Any] = json.loads(printed.out)
        return document

    def agent(self) -> dict[str, Any]:
        code, text = self.text("--output", "json")
        document = json.loads(text.splitlines()[0])
        (agent,) = document.get("agents", [{}])
        assert code == (1 if not agent else 0 if agent["ok"] else 3)
        return agent


def check_history(asked: Asked, family: int, rival: Rival) -> None:
    """What the agent has kept says why two peers are as they are, and it has ended since."""
    pod = str(ip_network(subnet(family, 2))[9])
    document = asked.history(pod)
    (peer,) = document["peers"]
    assert (peer["subnet"], peer["present"]) == (subnet(family, 2), True)
    kinds = [one["kind"] for one in document["events"]]
    assert (kinds[0], kinds[-1]) == ("started", "stopped")
    assert {"repaired", "problem", "recovered"} <= {*kinds}
    (repair,) = [one for one in document["events"] if one["kind"] == "repaired"]
    assert (repair["peer"], repair["change"]) == (peer["name"], "deleted")
    assert repair["program"] == rival.name
    assert words_of(Event(**repair)).startswith(f"{rival.name} deleted route {subnet(family, 2)}")

    pod = str(ip_network(subnet(family, 5))[9])
    document = asked.history(pod, "--limit", "0")
    (peer,) = document["peers"]
    (gone,) = [one for one in document["events"] if one["kind"] == "removed"]
    assert (peer["present"], gone["subnet"]) == (False, subnet(family, 5))
    assert gone["cause"] == "its lease is gone"
    rejections = [one["kind"] for one in asked.history("rival")["events"]]
    assert "rejected" in rejections
    assert "accepted" in rejections


def test_an_agent_says_who_it_is_and_what_happened(
    service: Service, rival: Rival, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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

    rival.does(f"route del {subnet(family, 2)}")
    wait_until(lambda: asked.agent()["repairs"])
    (repair,) = asked.agent()["repairs"]
    assert (repair["table"], repair["change"]) == ("route", "deleted")
    assert subnet(family, 2) in repair["after"]
    assert repair["program"] == rival.name
    assert f"(deleted by {rival.name})" in asked.text()[1].partition("last repairs:")[2]

    leases = json.loads(service.leases.read_text())
    leases["leases"].append({**leases["leases"][1], "Name": "rival"})
    service.replace(json.dumps(leases))
    wait_until(lambda: asked.agent()["rejected"]["leases"])
    agent = asked.agent()
    (rejected,) = agent["rejected"]["leases"]
    assert (rejected["reason"], agent["ok"]) == ("overlap", True)
    assert "rejected leases (1):" in asked.text()[1]
    assert fetch(service.host, port, "/healthz") == (200, "ok\n")
    code, body = fetch(service.host, port, "/healthz?format=json")
    health = json.loads(body)
    assert (code, health["status"], health["rejected"]) == (200, "ok", {"overlap": 1})
    assert health["warnings"] == agent["warnings"]

    service.replace('{"leases": [')
    wait_until(lambda: not asked.agent()["ok"])
    (problem,) = asked.agent()["problems"]
    assert (problem["problem"], problem["since"] > agent["started"]) == ("source", True)
    code, text = asked.text()
    assert (code, "problems:" in text) == (3, True)

    left = [one for one in leases["leases"] if one.get("Name") != "rival"][:-1]
    service.replace(json.dumps({"leases": left}))
    wait_until(lambda: asked.agent()["ok"] and not asked.agent()["rejected"]["leases"])
    assert service.end() == 0
    assert asked.text()[0] == 1
    check_history(asked, family, rival)
    assert [path.name for path in run_dir.iterdir() if ".sock" in path.name] == []
