"""Looking at an overlay that a program forwards: its peers, and whether packets get to it."""

from __future__ import annotations

from flannel_dp.kernel.host import Host
from flannel_dp.resources.forwarding.forwarder import Forwarder
from flannel_dp.tables.entries import Peer
from flannel_dp.tables.scopes import peer_scope


def held_peers(host: Host, forwarder: Forwarder, number: int) -> list[Peer]:
    """The peers of one family that the program forwards to; none where it is not loaded.

    ``bpftool map dump pinned .../forward-peers4``. Raises Conflict, KernelError.
    """
    forwarder.find()
    held = forwarder.maps(number)
    return [*host.kernel.read("peer", peer_scope(held, number))] if held else []


def program_problem(forwarder: Forwarder, index: int) -> str:
    """Why the program does not see the packets of a device; "" where it does."""
    return forwarder.problem(index)
