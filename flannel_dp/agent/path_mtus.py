"""What an agent tells and does about paths that take less than the device's MTU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from flannel_dp.errors import FlannelDPError
from flannel_dp.look.events import Event
from flannel_dp.resources.peers.narrow import IPV6_LEAST

if TYPE_CHECKING:
    from flannel_dp.agent.bursts import Bursts
    from flannel_dp.agent.chronicle import Chronicle
    from flannel_dp.agent.problems import Problems
    from flannel_dp.probe.life import MtuChange
    from flannel_dp.probe.line import PathMtuMode
    from flannel_dp.probe.prober import Prober
    from flannel_dp.reconcile.report import Report

log = logging.getLogger(__name__)

#: Peers that are named in the agent's status.
_MOST_NAMED = 20

#: How much longer the pause after writing MTUs is than the writing took.
_REST = 50

#: Seconds until MTUs that could not be written are tried again.
_AGAIN = 10.0


class Routed(Protocol):
    """A data plane, as far as the MTUs of its routes are concerned."""

    def path_mtus(self) -> Mapping[str, int]: ...
    def set_path_mtus(self, mtus: Mapping[str, int]) -> Report: ...


class PathMtus:
    """Tells of each change of a peer's path MTU, and with the mode "fix" gives the peer's route
    that MTU. ``mode`` is that of ``--path-mtu``, ``name`` the name of a peer by family and subnet.

    ``on_change`` is called on the prober's thread when ``apply`` has something to do.
    """

    def __init__(
        self,
        mode: PathMtuMode,
        chronicle: Chronicle,
        bursts: Bursts,
        name: Callable[[int, str], str],
        *,
        problems: Problems,
        clock: Callable[[], float],
        on_change: Callable[[], None],
    ) -> None:
        self._mode, self._chronicle, self._bursts, self._name = mode, chronicle, bursts, name
        self._problems, self._clock, self._on_change = problems, clock, on_change
        self._due: float | None = None  # when routes are to get the MTUs that are known
        self._rest_until = 0.0

    def tell(self, changes: Sequence[MtuChange]) -> None:
        """Log and keep these changes. On the prober's thread."""
        for kind in ("narrow", "wide"):
            of_kind = [one for one in changes if one.peer.is_narrow == (kind == "narrow")]
            room = self._bursts.room((kind, 0), len(of_kind))
            for number, one in enumerate(of_kind):
                self._tell_one(kind, one, told=number < room)
            self._bursts.more((kind, 0), max(0, len(of_kind) - room))
        self._chronicle.flush()
        self._mark()

    def _mark(self) -> None:
        """Have routes get the MTUs that are known. On the prober's thread."""
        if self._mode == "fix":
            self._due = max(self._clock(), self._rest_until)
            self._on_change()

    def _tell_one(self, kind: str, change: MtuChange, *, told: bool) -> None:
        peer = change.peer
        if not told and self._chronicle.history is None:
            return
        name = self._name(peer.family, peer.subnet)
        takes = f"{peer.path_mtu} bytes"
        self._chronicle.note(
            Event(self._chronicle.clock(), kind, peer.family, name, peer.subnet, "", "", takes)
        )
        if not told:
            return
        fields = {
            "peer": name,
            "family": peer.family,
            "subnet": peer.subnet,
            "endpoint": peer.endpoint,
            "takes": peer.path_mtu,
            "mtu": peer.mtu,
        }
        if kind == "wide":
            log.info("The path to peer %(peer)s takes packets of %(takes)d bytes again", fields)
        elif self._mode == "fix" and peer.family == 6 and peer.path_mtu < IPV6_LEAST:
            log.warning(
                "The path to peer %(peer)s at %(endpoint)s takes packets of %(takes)d bytes, and "
                "IPv6 has to take 1280 (RFC 8200): larger ones are lost. Repair the network",
                fields,
            )
        elif self._mode == "fix":
            log.warning(
                "The path to peer %(peer)s at %(endpoint)s takes packets of %(takes)d bytes, and "
                "the device's MTU is %(mtu)d: its route gets the MTU of the path",
                fields,
            )
        else:
            log.warning(
                "The path to peer %(peer)s at %(endpoint)s takes packets of %(takes)d bytes, and "
                "the device's MTU is %(mtu)d: larger ones are lost. Repair the network, set a "
                "smaller MTU, or start the agent with --path-mtu fix",
                fields,
            )

    # ---- on the agent's thread

    def begin(self, prober: Prober, routed: Routed) -> None:
        """Have the MTUs that routes have already measured, and taken back where paths are wide."""
        if self._mode == "fix":
            prober.note_mtus(routed.path_mtus())
            self.peers_changed(prober)

    def peers_changed(self, prober: Prober) -> None:
        """Note that peers have come or gone: MTUs of those that have gone go, too, once the prober
        knows of it."""
        if self._mode == "fix":
            prober.then(self._mark)

    @property
    def due(self) -> float | None:
        """When ``apply`` has something to do, by the clock; None for nothing."""
        return self._due

    def apply(self, prober: Prober, routed: Routed) -> None:
        """Give routes the MTUs that are known now."""
        if self._due is None or self._clock() < self._due:
            return
        self._due = None
        if not prober.is_complete:
            return
        began = self._clock()
        try:
            report = routed.set_path_mtus({one.subnet: one.path_mtu for one in prober.narrow()})
            problem = str(report.failures[0]) if report.failures else None
        except FlannelDPError as error:
            problem = str(error)
        # Where a whole network is narrow, changes come for minutes, and each costs all that are.
        self._rest_until = self._clock() + _REST * (self._clock() - began)
        if problem:
            problem = f"routes do not have the MTU of the path: {problem}"
            self._due = self._clock() + _AGAIN
        if self._problems.note("path-mtu", problem) and problem:
            log.warning("Cannot write the MTUs of paths: %(error)s", {"error": problem})

    def document(self, prober: Prober) -> dict[str, Any]:
        """Return what is known of path MTUs in plain form, for the agent's status."""
        return {
            "mode": self._mode,
            "narrow": prober.narrow_count,
            "peers": [
                {
                    "family": one.family,
                    "subnet": one.subnet,
                    "endpoint": one.endpoint,
                    "path_mtu": one.path_mtu,
                    "mtu": one.mtu,
                }
                for one in prober.narrow(_MOST_NAMED)
            ],
        }
