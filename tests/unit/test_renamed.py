"""Parameters of the public API that have another name now."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from flannel_dp import Agent
from tests.lib.agents import Script


def test_an_agent_takes_its_data_plane_by_the_former_name() -> None:
    dataplane: Any = SimpleNamespace(sync=None)
    former: dict[str, Any] = {"plane": dataplane}

    with pytest.warns(DeprecationWarning, match=r"plane is named dataplane now") as caught:
        agent = Agent(source=Script(), **former)

    assert agent.plane is dataplane
    assert caught[0].filename == __file__


def test_both_names_at_once_are_an_error() -> None:
    both: dict[str, Any] = {"dataplane": object(), "plane": object()}

    with pytest.raises(TypeError, match=r"both dataplane= and plane="):
        Agent(source=Script(), **both)


@pytest.mark.filterwarnings("error::DeprecationWarning")
def test_its_name_and_its_place_are_accepted_in_silence() -> None:
    dataplane: Any = SimpleNamespace(sync=None)

    assert Agent(dataplane, Script()).plane is dataplane
    assert Agent(dataplane=dataplane, source=Script()).plane is dataplane
