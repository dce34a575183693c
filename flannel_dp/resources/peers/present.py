"""A peer that is there: as this process wanted it last, or as the kernel has it.

The kernel may have a part of a peer alone: a foreign route has its prefix, or another program
removed an entry. What is missing is unknown then, so that no lease can be made of the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import Struct

from flannel_dp._core import Table
from flannel_dp.errors import Unsupported
from flannel_dp.resources.peers.place import NO_PEER, DesiredTable, Placement
from flannel_dp.tables.entries import Entry


class PresentPeer(Struct, frozen=True):
    """A peer that is there.

    ``subnet`` is a prefix; of an incomplete peer it may be an address without a length, or "".
    ``endpoint`` and ``mac`` are "" where they are unknown; a complete peer without a MAC is
    reached directly. ``entries`` are those of an incomplete peer, in tables of one kind each; a
    complete one has none.
    """

    name: str
    subnet: str
    endpoint: str = ""
    mac: str = ""
    entries: tuple[Table, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether packets reach it, so that a lease can be made of it."""
        return not self.entries

    @property
    def address(self) -> str:
        """The first address of its subnet, "" where it is unknown."""
        return self.subnet.partition("/")[0]


#: Peers that are kept, by family and name.
Kept = dict[int, dict[str, PresentPeer]]


def incomplete(subnet: str, endpoint: str, mac: str, entries: Iterable[Entry]) -> PresentPeer:
    """Return a peer of which the kernel has these ``entries`` and lacks others."""
    tables: dict[str, Table] = {}
    for entry in entries:
        kind = type(entry).__name__.lower()
        try:
            tables.setdefault(kind, Table(kind)).add(entry, NO_PEER)
        except Unsupported:  # another program's, which no table holds and no diff removes
            continue
    name = subnet.replace("/", "-") or mac
    return PresentPeer(name, subnet, endpoint, mac, tuple(tables.values()))


def count_peers(peers: Iterable[PresentPeer]) -> int:
    """Return how many peers these are. An FDB entry that no neighbour uses names no subnet: it is
    taken for that of a peer whose neighbour is missing, where there is one."""
    named = nameless = without_mac = 0
    for one in peers:
        if one.subnet:
            named += 1
            without_mac += bool(one.entries and not one.mac)
        else:
            nameless += 1
    return named + max(0, nameless - without_mac)


def keep_entries(
    tables: Iterable[DesiredTable], kept: Iterable[Sequence[Table]], place: Placement
) -> None:
    """Want the ``kept`` entries of incomplete peers beside those of ``tables``, which come first.

    A peer with an entry on a device that is gone is not kept: nothing of it can be there.
    """
    wanted = {one.table.kind: one.table for one in tables}
    devices = {0, place.device, place.uplink, *place.leftovers}
    for entries in kept:
        if any(getattr(entry, "device", 0) not in devices for one in entries for entry in one):
            continue
        for held in entries:
            if (table := wanted.get(held.kind)) is None:
                continue  # of another layout
            for entry in held:
                if table.find(entry) < 0:
                    table.add(entry, NO_PEER)
