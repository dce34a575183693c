"""What an agent's probes say of each peer, as ``show``, ``explain`` and ``status`` tell it."""

from __future__ import annotations

from typing import Any

import pytest

from flannel_dp.look import lives
from flannel_dp.look.asking import NoAgent
from flannel_dp.look.explanation import Explanation
from flannel_dp.look.held import PeerView
from flannel_dp.look.lives import Life, Lives, ask_lives
from flannel_dp.look.show import FamilyView, Overview

PROBES = {
    "lives": {"4": {"new": 0, "alive": 2, "lossy": 1, "dead": 1}},
    "each": {"4": {"10.1.1.0/24": ["dead", None], "10.1.2.0/24": ["lossy", 0.0421]}},
}


def asked(monkeypatch: pytest.MonkeyPatch, *agents: dict[str, Any]) -> Lives | None:
    monkeypatch.setattr(lives, "ask_agents", lambda run_dir, netns: agents)
    return ask_lives("/run/none", None, ["flannel.1"])


def agent(probes: dict[str, Any] | None, device: str = "flannel.1") -> dict[str, Any]:
    return {"devices": [device], "probes": probes}


def test_all_others_are_alive_where_those_that_are_not_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = asked(monkeypatch, agent(PROBES, "flannel.2"), agent(PROBES))
    assert found is not None
    assert found.of("10.1.1.0/24") == Life("dead")
    assert str(found.of("10.1.2.0/24")) == "lossy 42.10 ms"
    assert found.of("10.1.3.0/24") == Life("alive")
    narrow = {"peers": [{"subnet": "10.1.2.0/24", "path_mtu": 1350}]}
    found = asked(monkeypatch, agent({**PROBES, "path_mtu": narrow}))
    assert found is not None
    assert str(found.of("10.1.2.0/24")) == "lossy 42.10 ms, path MTU 1350"
    more = {"4": {"new": 9, "alive": 2, "lossy": 1, "dead": 1}}
    found = asked(monkeypatch, agent({**PROBES, "lives": more}))
    assert found is not None
    assert found.of("10.1.3.0/24") is None


def test_without_an_agent_that_probes_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch) is None
    assert asked(monkeypatch, agent(None)) is None
    assert asked(monkeypatch, agent(PROBES, "flannel.2")) is None

    def none(run_dir: str, netns: object) -> Any:
        raise NoAgent("none")

    monkeypatch.setattr(lives, "ask_agents", none)
    assert ask_lives("/run/none", None, ["flannel.1"]) is None


def test_it_is_a_column_and_a_line() -> None:
    peers = tuple(
        PeerView(subnet, "", "", "", "tunnel", "ok") for subnet in ("10.1.1.0/24", "10.1.9.0/24")
    )
    view = FamilyView(4, "10.1.0.0/16", None, peers)
    found = Lives({"10.1.1.0/24": Life("alive", 0.00004)})
    text = str(Overview((view,), lives=found))
    assert [line.split()[-1] for line in text.splitlines()[1:4]] == ["LIFE", "ms", "-"]
    assert "alive 0.04 ms" in text
    assert "LIFE" not in str(Overview((view,)))
    said = Explanation("a", 4, "peer", "b", "tunnel", life=Life("dead"))
    assert str(said).endswith("the agent's probes: dead")
