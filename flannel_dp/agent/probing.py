"""The probes of a service: the data plane's peers are probed, and what comes of it is told.

Sockets are opened before privileges are dropped. Without the right to open them, or where one
cannot be opened, this is a problem with a name, and everything else goes on.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

from msgspec import Struct

from flannel_dp.agent.bursts import Bursts
from flannel_dp.agent.logs import in_words
from flannel_dp.agent.path_mtus import PathMtus
from flannel_dp.agent.problems import Problems
from flannel_dp.agent.status import StatusBoard
from flannel_dp.agent.supervise import Worker
from flannel_dp.cluster.lease import printable
from flannel_dp.errors import FlannelDPError
from flannel_dp.kernel.links import LinkReader
from flannel_dp.look.events import Event

if TYPE_CHECKING:
    from flannel_dp._core import Claims
    from flannel_dp.agent.chronicle import Chronicle
    from flannel_dp.agent.path_mtus import Routed
    from flannel_dp.probe.life import LifeChange, Totals
    from flannel_dp.probe.line import PacketSockets, PathMtuMode
    from flannel_dp.probe.prober import Followed, Prober

    class Kept(Followed, Routed, Protocol):
        """A data plane whose peers are probed."""


log = logging.getLogger(__name__)

ReadyWhen = Literal["programmed", "reachable"]

#: The share of the peers that has to have answered before a node is ready when they are reachable.
READY_SHARE = 0.5


#: What is kept in the history, by the kind of a change.
_KEPT = {"dead": "unreachable", "back": "reachable"}

#: Dead and lossy peers that are named in the agent's status.
_MOST_NAMED = 20

#: Peers whose life and round trip are in it.
_MOST_TOLD = 1000


class ProbeOptions(Struct, frozen=True):
    """How peers are probed: one probe each in ``interval`` seconds, by ``paths`` source ports.

    A node is ready ``when`` its peers are programmed, or reachable: half of them have answered, or
    there are none, or ``limit`` seconds have passed since they were programmed. ``path_mtu`` is
    what is done about paths that take less than the device's MTU.
    """

    interval: float = 1.0
    paths: int = 8
    when: ReadyWhen = "programmed"
    limit: float = 60.0
    path_mtu: PathMtuMode = "warn"


class Probing:
    """The probes of one service, for one agent after the other; none without ``options``.

    What they say is in ``chronicle``, too, for those that ask for the agent's status.
    ``prober`` is the present one, None where peers are not probed. ``on_change`` is called on its
    thread when something that matters to the agent's may have changed.
    """

    def __init__(
        self,
        board: StatusBoard,
        options: ProbeOptions | None,
        chronicle: Chronicle,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._board, self._chronicle, self._clock = board, chronicle, clock
        self._wanted, self._options = options is not None, options or ProbeOptions()
        self._problems, self._bursts = Problems(board), Bursts(clock)
        self._mtus = PathMtus(
            self._options.path_mtu,
            chronicle,
            self._bursts,
            self._name,
            problems=self._problems,
            clock=clock,
            on_change=lambda: self.on_change(),
        )
        self._lock = threading.Lock()
        self._sockets: PacketSockets | None = None
        self._followed: Kept | None = None
        self._families: set[int] = set()
        self._broken: dict[str, str] = {}
        self._died: dict[str, float] = {}
        self._programmed_at: float | None = None
        self.prober: Prober | None = None
        self.on_change: Callable[[], None] = lambda: None
        if self._options.when == "reachable":
            board.set(awaiting="peers are not programmed yet")

    def open(self) -> None:
        """Open what takes privileges. A failure is a problem in the status, and tried no more."""
        if not self._wanted:
            return
        from flannel_dp.probe.line import PacketSockets

        try:
            self._sockets = PacketSockets()
        except FlannelDPError as error:
            self._cannot(str(error))

    def _cannot(self, why: str) -> None:
        log.warning("Peers are not probed: %(error)s", {"error": why})
        self._problems.note("probe", why, told=True)

    @contextmanager
    def running(self, followed: Kept) -> Iterator[None]:
        """Probe the peers of a data plane, on a thread of its own, until the end of the block."""
        if self._sockets is None:
            yield
            return
        from flannel_dp.probe.prober import Prober

        self._followed, self._families = followed, set()
        prober = self.prober = Prober(
            interval=self._options.interval,
            paths=self._options.paths,
            netns=followed.host.netns,
            sockets=self._sockets,
            on_change=self._tell,
            on_problem=self._note,
            on_turn=self._turned,
            on_mtu=self._mtus.tell,
            path_mtu=self._options.path_mtu,
        )
        worker = Worker("prober", prober.run, board=self._board, on_failure=self._failed)
        worker.start()
        try:
            yield
        finally:
            worker.stop()
            prober.stop()
            worker.join(1.0)
            self.prober = None
            if not worker.alive:
                prober.close()

    # ---- which peers, on the agent's thread

    def follow(self, changed: Mapping[int, tuple[Claims, Claims]] | None) -> None:
        """Probe what the data plane has written: ``changed`` are the accepted leases that an update
        was about, before and after, by family; None where anything may have changed."""
        followed, prober = self._followed, self.prober
        if followed is None or prober is None:
            return
        from flannel_dp.probe.wanted import table_of, wanted_of

        states = followed.known
        if changed is not None and all(
            family in self._families and not states[family].paths.apart for family in changed
        ):
            for family, (old, new) in changed.items():
                with_macs = bool(states[family].index)
                gone, come = table_of(old), table_of(new, with_macs=with_macs)
                gone.subtract(come)
                prober.alter(family, gone, come)
            self._mtus.peers_changed(prober)
            return
        try:
            with LinkReader(followed.host.netns) as reader:
                wanted = wanted_of(states, reader, followed.config.backend.vni)
        except FlannelDPError as error:
            self._families = set()  # the next update reads all of it, too
            self._break("peers", str(error))
            return
        self._break("peers", "")
        self._families = {one.place.family for one in wanted}
        prober.set(wanted)
        self._mtus.begin(prober, followed)

    # ---- what comes of it, on the prober's thread

    def _note(self, problem: str) -> None:
        self._problems.note("uplink", problem or None)
        self.on_change()

    def _failed(self, error: str) -> None:
        self._break("thread", error)

    def _break(self, part: str, error: str) -> None:
        """Note why one part of probing does not work, with "" that it does again. Either thread."""
        with self._lock:
            if error == self._broken.get(part, ""):
                return
            self._broken = {**self._broken, part: error}
            said = "; ".join(filter(None, self._broken.values()))
            self._problems.note("probe", said or None)
        self.on_change()

    def _turned(self) -> None:
        self._break("thread", "")
        if self.prober is not None:
            lives = self.prober.totals.lives
            if lives != self._board.status.lives:
                self._board.set(lives=lives)
                self.on_change()

    def _tell(self, changes: Sequence[LifeChange]) -> None:
        self._tell_all(changes)
        self._chronicle.flush()

    def _tell_all(self, changes: Sequence[LifeChange]) -> None:
        for kind, of_kind in _by_kind(changes).items():
            room = self._bursts.room((kind, 0), len(of_kind))
            for number, one in enumerate(of_kind):
                self._tell_one(kind, one, told=number < room)
            self._bursts.more((kind, 0), max(0, len(of_kind) - room))

    def _tell_one(self, kind: str, change: LifeChange, *, told: bool) -> None:
        peer = change.peer
        if kind == "dead":
            self._died[peer.subnet] = self._clock()
        began = self._died.pop(peer.subnet, None) if kind == "back" else None
        kept = kind in _KEPT and self._chronicle.history is not None
        if not (told or kept):
            return
        name = self._name(peer.family, peer.subnet)
        if kept:
            self._chronicle.note(
                Event(
                    self._chronicle.clock(),
                    _KEPT[kind],
                    peer.family,
                    name,
                    peer.subnet,
                    cause=peer.described,
                )
            )
        if not told:
            return
        fields = {
            "peer": name,
            "family": peer.family,
            "subnet": peer.subnet,
            "endpoint": peer.endpoint,
            "why": peer.described,
        }
        if kind == "dead":
            log.warning("Peer %(peer)s at %(endpoint)s is unreachable: %(why)s", fields)
        elif kind == "back":
            fields["why"] = in_words(self._clock() - began) if began is not None else "a while"
            log.info("Peer %(peer)s is reachable again after %(why)s", fields)
        elif kind == "lossy":
            log.warning("Peer %(peer)s at %(endpoint)s is not well reachable: %(why)s", fields)
        elif kind == "steady":
            log.info("Peer %(peer)s is well reachable again", fields)
        else:
            log.debug("Peer %(peer)s at %(endpoint)s is reachable", fields)

    def _name(self, family: int, subnet: str) -> str:
        """Return the name of a peer's lease, its subnet where it has none."""
        followed = self._followed
        state = followed.known.get(family) if followed else None
        if followed is None or state is None:
            return subnet
        with followed.exclusive:
            number = state.peers.find_subnet(subnet)
            return printable(state.peers.name(number)) if number >= 0 else subnet

    # ---- whether the node is ready, on the agent's thread

    def programmed(self) -> None:
        """Note that all peers are programmed."""
        if self._programmed_at is None:
            self._programmed_at = self._clock()

    def ready(self) -> bool:
        """Whether the node may be called ready. What it waits for is in the status."""
        if self._options.when == "programmed":
            return True
        if self._programmed_at is None:
            return False
        waiting = self._waiting_for()
        left = self._programmed_at + self._options.limit - self._clock()
        if waiting and left <= 0:
            log.warning(
                "The node is called ready although %(waiting)s: %(limit)g s have passed",
                {"waiting": waiting, "limit": self._options.limit},
            )
            waiting = ""
        if waiting != self._board.status.awaiting:
            self._board.set(awaiting=waiting)
        return not waiting

    def _waiting_for(self) -> str:
        """Return what has yet to happen, "" for nothing."""
        if self.prober is None:
            return ""  # they are not probed, which is a problem with a name
        totals = self.prober.totals
        return waiting_for(totals, sum(self._board.status.peers.values()))

    @property
    def due(self) -> float:
        """When ``flush`` and ``ready`` have something to do, by the clock."""
        due = min(filter(None, (self._bursts.due, self._mtus.due)), default=None)
        if self._board.status.awaiting and self._programmed_at is not None:
            return min(due or math.inf, self._programmed_at + self._options.limit)
        return math.inf if due is None else due

    def document(self) -> dict[str, Any] | None:
        """Return what probes say of the peers now, None where none are sent. From any thread."""
        prober = self.prober
        if prober is None:
            return None
        return {**_document(prober), "path_mtu": self._mtus.document(prober)}

    def flush(self) -> None:
        """Tell how many more there were, of bursts that have ended; give routes their MTUs."""
        self._bursts.flush()
        if self.prober is not None and self._followed is not None:
            self._mtus.apply(self.prober, self._followed)

    def close(self) -> None:
        """Close the sockets."""
        if self._sockets is not None:
            self._sockets.close()


def _document(prober: Prober) -> dict[str, Any]:
    """Return what probes say of the peers in plain form, for the agent's status."""
    totals = prober.totals
    return {
        "lives": {str(family): lives for family, lives in totals.lives.items()},
        "interval": totals.interval,
        "problem": prober.problem,
        "peers": [
            {
                "family": one.family,
                "subnet": one.subnet,
                "endpoint": one.endpoint,
                "life": one.life,
                "text": one.described,
            }
            for one in prober.peers("dead", "lossy", most=_MOST_NAMED)
        ],
        "each": _each(prober),
    }


def _each(prober: Prober) -> dict[str, dict[str, tuple[str, float | None]]]:
    """Return the life and the round trip of each peer by family and subnet; of many peers, of those
    that are alive the first ones only."""
    found: dict[str, dict[str, tuple[str, float | None]]] = {}
    for one in prober.peers("dead", "lossy", "new", "alive", most=_MOST_TOLD):
        found.setdefault(str(one.family), {})[one.subnet] = one.life, one.rtt
    return found


def waiting_for(totals: Totals, peers: int) -> str:
    """Return what has yet to happen before a node with so many ``peers`` is ready, "" for nothing:
    half of them have to have answered."""
    answered = totals.count("alive", "lossy")
    if answered >= READY_SHARE * peers:
        return ""
    return f"{answered} of {peers} peers have answered probes, and half of them have to"


def _by_kind(changes: Sequence[LifeChange]) -> dict[str, list[LifeChange]]:
    found: dict[str, list[LifeChange]] = {}
    for one in changes:
        life, before = one.peer.life, one.before
        if life == "dead":
            kind = "dead"
        elif before == "dead":
            kind = "back"
        elif life == "lossy":
            kind = "lossy"
        else:
            kind = "steady" if before == "lossy" else "first"
        found.setdefault(kind, []).append(one)
    return found
