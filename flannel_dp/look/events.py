"""The events of a node that an agent keeps, and the file that it keeps them in.

``DIRECTORY/INODE-DEVICE.history`` has one JSON object per line, an ``Event`` or, where ``kind`` is
``peers``, a ``PeerList``. INODE is the network namespace's. A file that is full becomes
``.history.1``, in place of the one before.
"""

from __future__ import annotations

from msgspec import Struct

#: The suffix of the file, beside the lock of the device, and that of its predecessor.
HISTORY, BEFORE = ".history", ".1"

#: The kinds of events that are about the node as a whole.
OF_NODE = frozenset({"started", "stopped", "problem", "recovered"})


class Event(Struct, frozen=True, omit_defaults=True):
    """One event of a node: ``time`` is in seconds since the epoch, ``kind`` one of

    ``started``, ``stopped``     the agent, its version in ``after``
    ``added``, ``removed``       a peer, with where it is or was in ``after`` or ``before``
    ``changed``                  a peer, from what in ``before`` to what in ``after``
    ``rejected``, ``accepted``   a lease, and that it is not rejected any more; ``reason`` is a code
    ``repaired``                 an entry that another program had changed, ``before`` and ``after``
                                 the repair; ``table``, ``change`` and ``program`` as in the log
    ``unreachable``, ``reachable``  a peer, by its probes
    ``narrow``, ``wide``         the path to a peer, by its probes: it takes packets as large as
                                 ``after`` says and no larger, or as the device's MTU again
    ``problem``, ``recovered``   what ``problem`` names begins and ends

    ``family`` is 4 or 6, 0 where it is both or neither. ``peer`` is the name of a lease, ``subnet``
    that of its peer. ``cause`` is in words.
    """

    time: float
    kind: str
    family: int = 0
    peer: str = ""
    subnet: str = ""
    cause: str = ""
    before: str = ""
    after: str = ""
    table: str = ""
    change: str = ""
    reason: str = ""
    problem: str = ""
    program: str = ""


class PeerList(Struct, frozen=True):
    """All accepted peers of a family as they are from ``time`` on, in columns: one address, prefix
    length and MAC after the other, in the order of ``names``. ``cause`` says what was done."""

    time: float
    family: int
    names: list[str]
    subnets: bytes
    lengths: bytes
    endpoints: bytes
    macs: bytes
    cause: str = ""
    kind: str = "peers"


def history_path(directory: str, inode: int, device: str) -> str:
    """Return the path of the history of an agent."""
    return f"{directory}/{inode}-{device}{HISTORY}"
