"""Peers that are kept although a list of leases lacks them: which, how many, and in words."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from flannel_dp._core import Claims
from flannel_dp.cluster.lease import Lease
from flannel_dp.errors import ShrinkRefused
from flannel_dp.node.family import View
from flannel_dp.reconcile.report import Report
from flannel_dp.resources.peers.present import Kept, PresentPeer, count_peers

NO_MAC = "00:00:00:00:00:00"


class Gone(Struct, frozen=True):
    """The peers of one family that are there, and that a list lacks: ``peers`` are those,
    ``before`` is how many there were."""

    family: int
    before: int
    peers: list[PresentPeer]

    @property
    def count(self) -> int:
        """How many peers ``peers`` are."""
        return count_peers(self.peers)

    def __str__(self) -> str:
        return f"{self.count} of {self.before} IPv{self.family} {peers_word(self.before)}"


class Yielded(Struct, frozen=True):
    """Names of kept peers that end with a change: those with ``leases``, and ``incomplete``
    ones."""

    leases: list[str] = []
    incomplete: list[str] = []


class HeldBack(Struct, frozen=True):
    """What is synced when peers are held back: ``view`` has them beside the list's,
    ``held`` are they, by family and name, and ``gone`` says how many are missing."""

    view: View
    held: Kept
    gone: list[Gone]

    def refusal(self, *, planned: bool = False) -> ShrinkRefused | None:
        """Return the error that says so, or that it would be so if this was ``planned``; None
        when all that is missing was replaced."""
        if not self.gone:
            return None
        counts = {family: count_peers(known.values()) for family, known in self.held.items()}
        kept = " and ".join(f"{count} IPv{family}" for family, count in counts.items() if count)
        total = sum(counts.values())
        kept = f"{kept} {peers_word(total)}"
        done = (
            f"sync would keep {kept}, and do all else"
            if planned
            else f"{kept} {_are(total)} kept, and all else is in sync"
        )
        part = count_peers(
            one for known in self.held.values() for one in known.values() if one.entries
        )
        if part:
            done += f" ({part} of them incomplete: their entries stay as they are)"
        return ShrinkRefused(
            f"{' and '.join(map(str, self.gone))} {_are(sum(one.count for one in self.gone))} "
            f"missing from this list of leases, or rejected in it: {done}",
            hint="check the source; if they are really gone, pass --allow-shrink to sync",
        )

    @property
    def names(self) -> dict[int, list[str]]:
        """The names of the peers that are kept, by family."""
        return {family: sorted(known) for family, known in self.held.items()}

    def refuse(self, report: Report) -> None:
        """Raise ``refusal()``, if any, with the report of what was done."""
        report.held = self.names
        error = self.refusal()
        if error is not None:
            error.report = report
            raise error


def peers_word(count: int) -> str:
    """Return the noun for so many."""
    return "peer" if count == 1 else "peers"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def marks_of_listed(listed: Claims) -> set[str]:
    """Return what tells that a peer is listed: subnets, their addresses, endpoints and MACs."""
    return {
        mark
        for n in range(len(listed))
        for subnet in (listed.subnet(n),)
        for mark in (subnet, subnet.partition("/")[0], listed.endpoint(n), listed.mac(n))
    }


def marks_of(peer: PresentPeer) -> Iterator[str]:
    """Yield what tells one peer from others: its subnet, endpoint and MAC."""
    yield from (mark for mark in (peer.subnet, peer.endpoint, peer.mac) if mark not in ("", NO_MAC))


def contradict(new: Lease, kept: PresentPeer, family: int) -> bool:
    """Return whether a new lease takes the place of a kept peer's."""
    subnet = new.subnet if family == 4 else new.ipv6_subnet
    address = new.public_ip if family == 4 else new.public_ipv6
    if subnet and (address == kept.endpoint or overlap(subnet, kept.subnet)):
        return True
    macs = {data.vtep_mac for data in (new.backend_data, new.backend_v6_data) if data}
    return kept.mac in macs


def overlap(one: str, other: str) -> bool:
    """Return whether two prefixes overlap; those of one length do if they are equal."""
    if not other:
        return False
    if one == other or one.rpartition("/")[2] == other.rpartition("/")[2]:
        return one == other
    from ipaddress import ip_network

    try:
        return ip_network(one, strict=False).overlaps(ip_network(other))
    except (ValueError, TypeError):
        return False  # it is rejected for that
