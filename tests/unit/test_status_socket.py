"""The socket at which an agent is asked: what clients do to it, and what is left of it."""

from __future__ import annotations

import json
import os
import resource
import socket
import stat
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.agent.status import StatusBoard
from flannel_dp.agent.status_socket import StatusSocket
from flannel_dp.kernel.netns import netns_identity
from flannel_dp.kernel.unix_sockets import (
    listening_socket,
    make_socket,
    remove_unheld_socket,
    short_path,
)
from flannel_dp.look.asking import NoAgent, ask, ask_agents
from tests.lib.waiting import LIMIT, wait_until

DOCUMENT = {"schema": 1, "ok": True, "pid": 1, "devices": ["flannel.1"]}
INODE = netns_identity()[1]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[StatusSocket]:
    with closing(StatusSocket(lambda: DOCUMENT, str(tmp_path))) as made:
        yield made


def connected(path: Path) -> socket.socket:
    made = make_socket()
    made.settimeout(LIMIT)
    with short_path(str(path)) as short:
        made.connect(short)
    return made


def answer(client: socket.socket) -> Any:
    text = b""
    while chunk := client.recv(1 << 16):
        text += chunk
    return json.loads(text)


def test_it_is_found_by_the_names_of_its_devices_and_leaves_nothing(tmp_path: Path) -> None:
    stale = tmp_path / f"{INODE}-flannel.1.sock"
    with make_socket() as dead, short_path(str(stale)) as short:
        dead.bind(short)  # a process that was killed leaves it so
    assert ask(str(stale)) is None

    with closing(StatusSocket(lambda: DOCUMENT, str(tmp_path))) as made:
        assert ask_agents(str(tmp_path)) == [DOCUMENT]  # no device is known yet
        made.name(["flannel.1", "flannel-v6.1"])
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == [f"{INODE}-flannel-v6.1.sock", f"{INODE}-flannel.1.sock"]
        assert stat.S_IMODE(stale.stat().st_mode) == 0o600
        assert ask_agents(str(tmp_path), device="flannel.1") == [DOCUMENT]
        assert not remove_unheld_socket(stale)
        with pytest.raises(NoAgent, match=r"of device flannel\.9"):
            ask_agents(str(tmp_path), device="flannel.9")
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(NoAgent, match="no agent answers") as caught:
        ask_agents(str(tmp_path))
    assert "sync --watch" in caught.value.hint


def test_one_that_does_not_answer_is_told_though_others_do(
    served: StatusSocket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.name(["flannel.1"])
    stuck = tmp_path / f"{INODE}-flannel.2.sock"
    with make_socket() as listening, short_path(str(stuck)) as short:
        listening.bind(short)
        listening.listen(1)
        assert ask_agents(str(tmp_path), device="flannel.1") == [DOCUMENT]
        monkeypatch.setattr("flannel_dp.look.asking.ASK_SECONDS", 0.3)
        with pytest.raises(NoAgent, match=r"did not answer within .*-flannel\.2\.sock"):
            ask_agents(str(tmp_path))


def test_a_socket_that_another_agent_removes_before_it_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two agents of one namespace that start at once: each removes what is left of earlier ones."""
    removed: list[bool] = []

    class Slow(socket.socket):
        def listen(self, *args: int) -> None:
            (unfinished,) = tmp_path.iterdir()
            if not removed:
                removed.append(remove_unheld_socket(unfinished))
            super().listen(*args)

    monkeypatch.setattr(
        "flannel_dp.kernel.unix_sockets.make_socket",
        lambda: Slow(socket.AF_UNIX, socket.SOCK_STREAM),
    )
    with closing(StatusSocket(lambda: DOCUMENT, str(tmp_path))):
        assert removed == [True]
        assert ask_agents(str(tmp_path)) == [DOCUMENT]
    assert [*tmp_path.iterdir()] == []


def test_a_socket_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    with pytest.raises(IsADirectoryError):
        listening_socket(str(taken), 1)
    assert [*tmp_path.iterdir()] == [taken]


def test_a_name_that_an_agent_takes_while_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "flannel.1.sock"
    with make_socket() as dead, short_path(str(path)) as short:
        dead.bind(short)
    made = [listening_socket(str(tmp_path / "new"), 1)]
    rename = os.rename

    def taken_first(old: str, new: str) -> None:
        monkeypatch.undo()
        rename(tmp_path / "new", path)
        rename(old, new)

    monkeypatch.setattr("os.rename", taken_first)
    assert not remove_unheld_socket(path)
    with closing(made.pop()), connected(path):
        assert [*tmp_path.iterdir()] == [path]


def test_clients_that_say_garbage_or_stay_keep_no_other_waiting(
    served: StatusSocket, tmp_path: Path
) -> None:
    served.name(["flannel.1"])
    path = tmp_path / f"{INODE}-flannel.1.sock"
    silent = [connected(path) for _ in range(3)]
    loud = connected(path)
    with suppress(BrokenPipeError):  # it may have been answered, and that was all
        loud.sendall(b"\x00GET / HTTP/1.1\r\n" * 100)

    assert ask(str(path)) == DOCUMENT

    for one in (*silent, loud):
        one.close()
    assert ask(str(path)) == DOCUMENT


def test_a_client_that_does_not_read_is_given_up(tmp_path: Path) -> None:
    large = {**DOCUMENT, "problems": ["x" * 1000] * 1000}
    with closing(StatusSocket(lambda: large, str(tmp_path))) as made:
        made.name(["flannel.1"])
        path = tmp_path / f"{INODE}-flannel.1.sock"
        with connected(path):
            assert ask(str(path)) == large


def test_a_shortage_of_descriptors_passes(served: StatusSocket, tmp_path: Path) -> None:
    served.name(["flannel.1"])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    client, first = make_socket(), make_socket()
    client.settimeout(LIMIT)
    first.settimeout(LIMIT)
    folder = os.open(tmp_path, os.O_PATH)
    short = f"/proc/self/fd/{folder}/{INODE}-flannel.1.sock"
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(3, soft), hard))
        first.connect(short)  # for it accept(2) has a descriptor, if it waits already
        client.connect(short)
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(folder)
    client.settimeout(LIMIT)
    with client, first:
        assert answer(first) == answer(client) == DOCUMENT


def test_a_document_that_cannot_be_made_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = [ValueError("a value")]

    def document() -> dict[str, Any]:
        if broken:
            raise broken.pop()
        return DOCUMENT

    board = StatusBoard()
    note = partial(board.problem, "status")
    with closing(StatusSocket(document, str(tmp_path), board=board, note=note)) as made:
        made.name(["flannel.1"])
        path = str(tmp_path / f"{INODE}-flannel.1.sock")
        assert ask(path) is None
        wait_until(lambda: "a value" in board.status.problems.get("status", ""))
        assert ask(path) == DOCUMENT
        wait_until(lambda: not board.status.problems)
    assert "Thread status failed and starts again" in caplog.text
    assert not board.status.ended


def test_a_client_that_was_answered_ends_no_problem_of_others(tmp_path: Path) -> None:
    notes: list[str | None] = []
    with closing(StatusSocket(lambda: DOCUMENT, str(tmp_path), note=notes.append)) as made:
        made.name(["flannel.1"])
        assert ask(str(tmp_path / f"{INODE}-flannel.1.sock")) == DOCUMENT
    assert notes == []


def test_what_ends_the_thread_is_told(tmp_path: Path) -> None:
    def document() -> dict[str, Any]:
        raise SystemExit("enough")

    board = StatusBoard()
    with closing(StatusSocket(document, str(tmp_path), board=board)) as made:
        made.name(["flannel.1"])
        assert ask(str(tmp_path / f"{INODE}-flannel.1.sock")) is None
        wait_until(lambda: [*board.status.ended] == ["status"])
