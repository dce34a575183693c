"""What a service tells those who ask on its host: its status socket, and its history."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from flannel_dp.agent.chronicle import Chronicle
from flannel_dp.agent.history import History
from flannel_dp.agent.problems import Problems
from flannel_dp.agent.status import StatusBoard
from flannel_dp.agent.status_document import agent_document
from flannel_dp.agent.status_socket import StatusSocket
from flannel_dp.agent.story import version
from flannel_dp.errors import FlannelDPError, shortage
from flannel_dp.kernel.netns import netns_identity
from flannel_dp.look.events import Event, history_path

if TYPE_CHECKING:
    from flannel_dp._core import Claims
    from flannel_dp.cluster.network import NetworkConfig
    from flannel_dp.resources.peers.state import State


class Facts(NamedTuple):
    """What a service knows of the node by now: ``config`` is None before there is one."""

    devices: tuple[str, ...]
    config: NetworkConfig | None
    known: Mapping[int, State]


class Telling:
    """Answers ``flannel-dp status``; an agent works without it. ``facts`` is called on the thread
    of the socket, all else is for the service's."""

    def __init__(
        self,
        board: StatusBoard,
        problems: Problems,
        facts: Callable[[], Facts],
        *,
        run_dir: str,
        state_dir: str,
        audit: float,
        stuck_after: float,
    ) -> None:
        self._board, self._problems, self._facts = board, problems, facts
        self._run_dir, self._audit, self._stuck_after = run_dir, audit, stuck_after
        self._state_dir = state_dir or run_dir
        self._socket: StatusSocket | None = None
        #: Returns what probes say of the peers, None where none are sent.
        self.probes: Callable[[], dict[str, Any] | None] = lambda: None
        self.chronicle = Chronicle()
        board.on_problem = self.chronicle.problem

    def start(self, prepare: Callable[[], object] = lambda: None) -> None:
        """Listen, from before anything is waited for, on a thread that calls ``prepare`` first.

        Raises OSError where the process has no room for it, which passes.
        """
        if self._socket is not None:
            return
        try:
            note = partial(self._problems.note, "status")
            self._socket = StatusSocket(self.document, self._run_dir, prepare, self._board, note)
        except (OSError, RuntimeError, MemoryError) as error:
            if shortage(error):
                raise
            self._failed(error)
        else:
            self._problems.note("status", None)

    def name(self, devices: Sequence[str]) -> None:
        """Be found by the names of these devices, whose locks are held, and keep a history under
        that of the first one."""
        if devices and self.chronicle.history is None:
            path = history_path(self._state_dir, netns_identity(None)[1], devices[0])
            self.chronicle.history = History(path, self._peers, self._history_failed)
            self.chronicle.note(Event(self.chronicle.clock(), "started", after=version()))
        if self._socket is None:
            return
        try:
            self._socket.name(devices)
        except OSError as error:
            if shortage(error):
                raise
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        failure = FlannelDPError(
            f"'flannel-dp status' cannot ask this agent, in {self._run_dir}: {error}",
            hint="name a directory that can be written: --run-dir",
        )
        self._problems.note("status", failure)

    def _peers(self) -> dict[int, Claims]:
        return {number: state.peers for number, state in self._facts().known.items()}

    def _history_failed(self, error: OSError | None) -> None:
        failure = error and FlannelDPError(
            f"cannot keep the history for 'flannel-dp history' in {self._state_dir}: {error}",
            hint="make room there, or name a directory that can be written: --state-dir",
        )
        self._problems.note("history", failure)

    def close(self) -> None:
        """Listen no more, and keep that the agent stopped."""
        if self.chronicle.history is not None:
            self.chronicle.note(Event(self.chronicle.clock(), "stopped"))
            self.chronicle.history.close()
        if self._socket is not None:
            self._socket.close()

    def document(self) -> dict[str, Any]:
        """Return what ``flannel-dp status`` is told."""
        facts = self._facts()
        return agent_document(
            self._board,
            self.chronicle,
            devices=facts.devices,
            config=facts.config,
            known=facts.known,
            run_dir=self._run_dir,
            audit_interval=self._audit,
            stuck_after=self._stuck_after,
            probes=self.probes(),
        )
