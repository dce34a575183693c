"""What an agent tells of paths that take less than the device's MTU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flannel_dp.look.events import Event

if TYPE_CHECKING:
    from flannel_dp.agent.bursts import Bursts
    from flannel_dp.agent.chronicle import Chronicle
    from flannel_dp.probe.life import MtuChange
    from flannel_dp.probe.line import PathMtuMode
    from flannel_dp.probe.prober import Prober

log = logging.getLogger(__name__)

#: Peers that are named in the agent's status.
_MOST_NAMED = 20


class PathMtus:
    """Tells of each change of a peer's path MTU. ``mode`` is that of ``--path-mtu``, ``name`` the
    name of a peer by family and subnet."""

    def __init__(
        self,
        mode: PathMtuMode,
        chronicle: Chronicle,
        bursts: Bursts,
        name: Callable[[int, str], str],
    ) -> None:
        self._mode, self._chronicle, self._bursts, self._name = mode, chronicle, bursts, name

    def tell(self, changes: Sequence[MtuChange]) -> None:
        """Log and keep these changes. On the prober's thread."""
        for kind in ("narrow", "wide"):
            of_kind = [one for one in changes if one.peer.is_narrow == (kind == "narrow")]
            room = self._bursts.room((kind, 0), len(of_kind))
            for number, one in enumerate(of_kind):
                self._tell_one(kind, one, told=number < room)
            self._bursts.more((kind, 0), max(0, len(of_kind) - room))
        self._chronicle.flush()

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
        elif self._mode == "fix":
            log.warning(
                "The path to peer %(peer)s at %(endpoint)s takes packets of %(takes)d bytes, and "
                "the device's MTU is %(mtu)d: its route gets the MTU of the path",
                fields,
            )
        else:
            log.warning(
                "The path to peer %(peer)s at %(endpoint)s takes packets of %(takes)d bytes, and "
                "the device's MTU is %(mtu)d: larger ones are lost. Repair the network, or set "
                "a smaller MTU",
                fields,
            )

    def document(self, prober: Prober) -> dict[str, Any]:
        """Return what is known of path MTUs in plain form, for the agent's status."""
        narrow = prober.narrow()
        return {
            "mode": self._mode,
            "narrow": len(narrow),
            "peers": [
                {
                    "family": one.family,
                    "subnet": one.subnet,
                    "endpoint": one.endpoint,
                    "path_mtu": one.path_mtu,
                    "mtu": one.mtu,
                }
                for one in narrow[:_MOST_NAMED]
            ],
        }
