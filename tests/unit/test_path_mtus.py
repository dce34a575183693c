"""What an agent says of paths that take less than the device's MTU."""

from __future__ import annotations

import errno
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from flannel_dp.agent.bursts import Bursts
from flannel_dp.agent.chronicle import Chronicle
from flannel_dp.agent.path_mtus import PathMtus
from flannel_dp.agent.problems import Problems
from flannel_dp.agent.status import StatusBoard
from flannel_dp.errors import KernelError
from flannel_dp.look.events import Event
from flannel_dp.look.history import words_of
from flannel_dp.probe.life import MtuChange, PeerLife
from flannel_dp.probe.line import PathMtuMode
from flannel_dp.reconcile.report import Report

PEER = PeerLife(
    family=4,
    subnet="10.244.2.0/24",
    endpoint="192.0.2.2",
    mac="02:00:00:00:00:02",
    device="flannel.1",
    path="tunnel",
    life="lossy",
    rtt=0.001,
    loss=0.0,
    sent=10,
    answered=10,
    last_answer=0.1,
    paths=8,
    lost_size=1450,
    path_mtu=1350,
    mtu=1450,
)


BOARD = StatusBoard()


class Kept:
    """A history that keeps all events in memory."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.note = self.events.append

    def flush(self) -> None: ...


def told_of(count: int, mode: PathMtuMode = "warn") -> tuple[PathMtus, Kept, list[MtuChange]]:
    chronicle: Any = Chronicle(lambda: 7.0)
    chronicle.history = kept = Kept()
    mtus = PathMtus(
        mode,
        chronicle,
        Bursts(lambda: 0.0),
        lambda family, subnet: f"v{family}",
        problems=Problems(BOARD),
        clock=lambda: 7.0,
        on_change=lambda: None,
    )
    changes = [MtuChange(replace(PEER, subnet=f"10.244.{n}.0/24")) for n in range(count)]
    return mtus, kept, changes


def test_a_path_that_narrows_and_widens_is_told(caplog: pytest.LogCaptureFixture) -> None:
    mtus, kept, changes = told_of(1)
    with caplog.at_level(logging.INFO):
        mtus.tell(changes)
        mtus.tell([MtuChange(replace(PEER, life="alive", lost_size=0, path_mtu=1450))])
    assert [one.getMessage().partition(":")[0] for one in caplog.records] == [
        "The path to peer v4 at 192.0.2.2 takes packets of 1350 bytes, and the device's MTU is "
        "1450",
        "The path to peer v4 takes packets of 1450 bytes again",
    ]
    assert [one.levelname for one in caplog.records] == ["WARNING", "INFO"]
    assert [words_of(one) for one in kept.events] == [
        "the path to peer v4 took packets of 1350 bytes and no larger ones",
        "the path to peer v4 took packets of 1450 bytes again",
    ]


def test_many_are_told_together_and_kept_each(caplog: pytest.LogCaptureFixture) -> None:
    mtus, kept, changes = told_of(30)
    mtus.tell(changes)
    assert len(kept.events) == 30
    assert len(caplog.records) == 5


def test_the_status_names_some() -> None:
    mtus, _, changes = told_of(30)
    prober: Any = SimpleNamespace(
        narrow=lambda most: [one.peer for one in changes[:most]], narrow_count=30
    )
    document = mtus.document(prober)
    assert (document["mode"], document["narrow"], len(document["peers"])) == ("warn", 30, 20)
    assert document["peers"][2] == {
        "family": 4,
        "subnet": "10.244.2.0/24",
        "endpoint": "192.0.2.2",
        "path_mtu": 1350,
        "mtu": 1450,
    }


def test_what_routes_could_not_get_is_a_problem_until_they_have_it() -> None:
    mtus, _, changes = told_of(2, "fix")
    written: list[dict[str, int]] = []
    failing = True

    def write(wanted: dict[str, int]) -> Report:
        written.append(wanted)
        if failing:
            raise KernelError(errno.ENOBUFS, "write routes")
        return Report()

    narrow = [one.peer for one in changes]
    prober: Any = SimpleNamespace(narrow=lambda: narrow, is_complete=True, then=lambda do: do())
    routed: Any = SimpleNamespace(set_path_mtus=write)
    mtus.apply(prober, routed)
    assert written == []  # there is nothing to do yet
    mtus.tell(changes)
    mtus.apply(prober, routed)
    assert "write routes" in BOARD.status.problems["path-mtu"]
    assert mtus.due == 17.0
    failing = False
    mtus.peers_changed(prober)
    mtus.apply(prober, routed)
    assert written == [{"10.244.0.0/24": 1350, "10.244.1.0/24": 1350}] * 2
    assert (dict(BOARD.status.problems), mtus.due) == ({}, None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "packets of 1450 bytes are lost, its path takes 1350 bytes"),
        ({"path_mtu": 0}, "packets of 1450 bytes are lost, and smaller ones are not"),
        ({"life": "alive"}, ""),
    ],
)
def test_a_peer_says_what_its_path_takes(change: dict[str, Any], words: str) -> None:
    assert replace(PEER, **change).described == words
