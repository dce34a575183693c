"""Looking at an overlay that a program forwards: its peers, and whether packets get to it."""

from __future__ import annotations

from flannel_dp.resources.forwarding.forwarder import Forwarder


def held_map(forwarder: Forwarder, number: int) -> int:
    """Return the descriptor of the map with the peers of one family that the program forwards to;
    0 where none is loaded.

    ``bpftool map dump pinned .../forward-peers4``. Raises Conflict, KernelError.
    """
    forwarder.find()
    return forwarder.maps(number)


def program_problem(forwarder: Forwarder, index: int) -> str:
    """Why the program does not see the packets of a device; "" where it does."""
    return forwarder.problem(index)
