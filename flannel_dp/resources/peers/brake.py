"""The brake: hold back the removal of peers when a list of leases lacks most of them.

A list without most of the peers that are there is more often a fault of the program that made it
than the truth: a cut-short export, a wrong prefix, a store that came back empty. What such
a list adds or changes is applied. The peers that it lacks are kept, as claims of their own
beside those of the list: everything that keeps a peer (repairs, audits, the guard's set)
keeps them too, and a claim of the list that contradicts one of them wins. They are removed
by a later sync, once the removal is confirmed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from msgspec import Struct
from msgspec.structs import replace

from flannel_dp._core import Diff
from flannel_dp.cluster.lease import Lease, LeaseList
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import ShrinkRefused, SourceError
from flannel_dp.node.family import Family, View
from flannel_dp.node.view import Leases
from flannel_dp.reconcile.reconciler import Pass
from flannel_dp.reconcile.report import Report
from flannel_dp.resources.peers.resource import PeersChange, PeersResource

log = logging.getLogger(__name__)

#: The create revision of kept peers: any claim of a list comes before them.
_LAST = 2**63 - 1

_NO_MAC = "00:00:00:00:00:00"

#: Names of peers by family, 4 or 6.
Names = Mapping[int, Collection[str]]

#: Reads subnet, endpoint and MAC ("" for a direct route) of the peers that the kernel has of one
#: family; those of the other mode of forwarding where the device is converted.
InKernel = Callable[[int, bool], Iterable[tuple[str, str, str]]]


class Gone(Struct, frozen=True):
    """The peers of one family that are there, and that a list lacks: ``leases`` are those,
    ``before`` is how many there were."""

    family: int
    before: int
    leases: list[Lease]

    def __str__(self) -> str:
        return f"{len(self.leases)} of {self.before} IPv{self.family} peers"


def is_sharp(gone: int, before: int) -> bool:
    """Return whether ``gone`` of ``before`` peers are all or nearly all: all, all but one of
    three or more, or over half and over ten."""
    left = before - gone
    nearly = before >= 3 and left <= 1
    return gone > 0 and (left <= 0 or nearly or (gone > 10 and gone > left))


class HeldBack(Struct, frozen=True):
    """What is synced when peers are held back: ``view`` has them beside the list's,
    ``held`` are they, by family and name, and ``gone`` says how many are missing."""

    view: View
    held: dict[int, dict[str, Lease]]
    gone: list[Gone]

    def refusal(self, *, planned: bool = False) -> ShrinkRefused | None:
        """Return the error that says so, or that it would be so if this was ``planned``; None
        when all that is missing was replaced."""
        if not self.gone:
            return None
        kept = " and ".join(
            f"{len(known)} IPv{family}" for family, known in self.held.items() if known
        )
        done = (
            f"sync would keep {kept} peers, and do all else"
            if planned
            else f"{kept} peers are kept, and all else is in sync"
        )
        return ShrinkRefused(
            f"{' and '.join(map(str, self.gone))} are missing from this list of leases, or "
            f"rejected in it: {done}",
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


class Brake:
    """The brake of one data plane. ``held`` are the peers that are kept although the last
    list lacks them, by family and name."""

    def __init__(
        self,
        config: NetworkConfig,
        resolve: Callable[[LeaseList], View],
        peers: Mapping[int, PeersResource],
        in_kernel: InKernel,
    ) -> None:
        self._config, self._resolve = config, resolve
        self._peers, self._in_kernel = peers, in_kernel
        self.held: dict[int, dict[str, Lease]] = {}

    def find(self, family: Family, found: Pass, *, every: bool = False) -> Gone | None:
        """Return the peers that applying ``family`` would remove; None where there are too
        few of them to hold them back (with ``every``: none at all).

        Raises KernelError when the kernel cannot be read.
        """
        diff = _peer_diff(family, found)
        if diff is not None and not (diff.removed and (every or is_sharp(diff.removed, diff.ours))):
            return None  # that are all that could be gone, and more
        there = self._others(family, found)
        listed = family.peers
        names = {listed.name(number) for number in range(len(listed))}
        marks = {
            mark
            for number in range(len(listed))
            for mark in (listed.subnet(number), listed.endpoint(number), listed.mac(number))
        }
        # A node that is listed with another subnet, address or MAC has changed, and is not gone.
        gone = [one for one in there if one.name not in names and not marks & {*_marks(one)}]
        if not gone or not (every or is_sharp(len(gone), len(there))):
            return None
        return Gone(family.number, len(there), gone)

    def check_own(self, family: Family, found: Pass) -> None:
        """Raise SourceError for a list that lacks this node's lease, where that is not new, and
        that would remove or change peers: it may be another cluster's, or a part of one.

        A node whose subnet was given (``--subnet``, or joining the cluster) is not asked, and an
        empty list is one that lacks all peers.
        """
        node, listed = family.admission.node, family.peers
        if family.admission.own or node.given or not len(listed):
            return
        if not _changes_peers(family, found):
            return
        same = {(listed.subnet(number), listed.endpoint(number)) for number in range(len(listed))}
        there = self._others(family, found)
        unlike = [one for one in there if (_subnet(one), _address(one)) not in same]
        if unlike:
            raise SourceError(
                f"this list of leases lacks the lease of this node, {node.described}, and "
                f"{len(unlike)} of its {len(there)} IPv{family.number} peers, or has others in "
                "their place: it may be another cluster's, and nothing was written",
                hint="check the source and its prefix; if the list is right name this node's "
                "subnet (--subnet), or pass --allow-shrink to sync",
            )

    def _others(self, family: Family, found: Pass) -> list[Lease]:
        """Return the peers there are, without what may be this node itself."""
        own = {family.admission.node.public_ip, *family.admission.node.addresses}
        device = found.changes.get(f"device{family.number}")
        converts = bool(getattr(getattr(device, "plan", None), "converts", False))
        return [one for one in self._there(family, converts) if _address(one) not in own]

    def check(
        self,
        leases: Leases,
        view: View,
        found: Pass,
        *,
        every: bool = False,
        confirmed: Names | None = None,
    ) -> HeldBack | None:
        """Return what to sync in place of ``leases``: those, and beside them the peers that
        they lack but those ``confirmed``; None where nothing is held back.

        ``view`` is what ``leases`` want, and ``found`` how that compares with the kernel. Raises
        as ``check_own`` and ``Resolver.resolve``, and KernelError.
        """
        for each in view.families:
            self.check_own(each, found)
        missing = [self.find(family, found, every=every) for family in view.families]
        gone = [one for one in missing if one is not None]
        if not gone:
            return None
        listed = leases if isinstance(leases, LeaseList) else LeaseList([*leases], [])
        gone_on = confirmed or {}
        held = {
            one.family: {
                lease.name: lease
                for lease in one.leases
                if lease.name not in gone_on.get(one.family, ())
            }
            for one in gone
        }
        while True:
            extra = [lease for known in held.values() for lease in known.values()]
            beside = LeaseList([*listed.leases, *extra], listed.bad)
            beside_view = self._resolve(beside)
            lost = [*_lost(beside_view, held)]
            for family, name in lost:
                del held[family][name]
            if not lost:
                return HeldBack(beside_view, held, [one for one in gone if held[one.family]])

    def note(self, view: View, kept: HeldBack | None) -> None:
        """A sync writes ``view``: ``held`` is what is kept in it."""
        for family in view.families:
            self.held[family.number] = kept.held.get(family.number, {}) if kept else {}

    # ---- changes, one by one

    def yields(self, added: Iterable[Lease], removed: Iterable[Lease | str]) -> list[str]:
        """Take a change: the names of kept peers that the new leases contradict, which have to
        go. HeldBack peers that came back, or were removed by name, are kept no longer."""
        held = [one for known in self.held.values() for one in known.items()]
        if not held:
            return []
        out: list[str] = []
        for lease in added:
            for name, kept in held:
                if name != lease.label and _contradict(lease, kept):
                    out.append(name)
        gone = {*out, *(lease.label for lease in added)}
        gone |= {one if isinstance(one, str) else one.label for one in removed}
        for known in self.held.values():
            for name in gone & {*known}:
                del known[name]
        return out

    def forget_removed(self) -> None:
        """Stop keeping the peers that a change has removed."""
        for number, known in self.held.items():
            state = self._peers[number].state
            for name in [*known]:
                if state is None or state.peers.find_name(name) < 0:
                    del known[name]

    # ---- who is there

    def _there(self, family: Family, converts: bool) -> Iterator[Lease]:
        """Yield the peers there are, as this process wanted them last, else as the kernel has
        them."""
        state = self._peers[family.number].state
        if state is not None:
            peers = state.peers
            for n in range(len(peers)):
                yield self._lease(
                    family, peers.name(n), peers.subnet(n), peers.endpoint(n), peers.mac(n)
                )
            return
        for subnet, endpoint, mac in self._in_kernel(family.number, converts):
            yield self._lease(family, subnet.replace("/", "-"), subnet, endpoint, mac)

    def _lease(self, family: Family, name: str, subnet: str, endpoint: str, mac: str) -> Lease:
        backend = self._config.backend
        if mac in ("", _NO_MAC):  # reached directly; nothing that needs it is written
            from hashlib import blake2b

            mac = "02:" + blake2b(subnet.encode(), digest_size=5).digest().hex(":")
        data = backend.data(mac)
        lease = Lease(name=name, revision=_LAST, backend_type=backend.type)
        if family.number == 4:
            return replace(lease, subnet=subnet, public_ip=endpoint, backend_data=data)
        return replace(lease, ipv6_subnet=subnet, public_ipv6=endpoint, backend_v6_data=data)


def _lost(view: View, kept: dict[int, dict[str, Lease]]) -> Iterator[tuple[int, str]]:
    """Yield the kept peers that lost to claims of the list, or that this node does not accept."""
    for family in view.families:
        rejected = family.admission.rejected.claims
        for number in range(len(rejected)):
            name = rejected.name(number)
            if name in kept.get(family.number, ()) and rejected.revision(number) == _LAST:
                yield family.number, name


def _address(lease: Lease) -> str:
    return lease.public_ip or lease.public_ipv6


def _subnet(lease: Lease) -> str:
    return lease.subnet or lease.ipv6_subnet


def _changes_peers(family: Family, found: Pass) -> bool:
    """Return whether an entry of any table is removed or replaced, or whether that is unknown: a
    peer with another address keeps its route and its nexthop object."""
    change = found.changes.get(f"peers{family.number}")
    if _peer_diff(family, found) is None or not isinstance(change, PeersChange):
        return True
    return any(diff.removed or diff.replaced for diff in change.diffs or ())


def _peer_diff(family: Family, found: Pass) -> Diff | None:
    """Return the difference of the table that has one entry for each peer; None where it is
    unknown: a device that has yet to be made says nothing of what this process wanted."""
    change = found.changes.get(f"peers{family.number}")
    if not isinstance(change, PeersChange) or not change.state or change.diffs is None:
        return None
    if not change.state.place.is_made:
        return None
    table = change.state.peer_table.table
    return next(diff for diff in change.diffs if diff.table is table)


def _marks(lease: Lease) -> Iterator[str]:
    yield from (_subnet(lease), _address(lease))
    data = lease.backend_data or lease.backend_v6_data
    if data is not None:
        yield data.vtep_mac


def _contradict(new: Lease, kept: Lease) -> bool:
    """Return whether a new lease takes the place of a kept peer's."""
    pairs = (
        (new.subnet, kept.subnet, new.public_ip, kept.public_ip),
        (new.ipv6_subnet, kept.ipv6_subnet, new.public_ipv6, kept.public_ipv6),
    )
    for subnet, kept_subnet, address, kept_address in pairs:
        if not subnet or not kept_subnet:
            continue
        if address == kept_address or _overlap(subnet, kept_subnet):
            return True
    macs = {data.vtep_mac for data in (new.backend_data, new.backend_v6_data) if data}
    return any(data and data.vtep_mac in macs for data in (kept.backend_data, kept.backend_v6_data))


def _overlap(one: str, other: str) -> bool:
    if one == other or one.rpartition("/")[2] == other.rpartition("/")[2]:
        return one == other
    from ipaddress import ip_network

    try:
        return ip_network(one, strict=False).overlaps(ip_network(other))
    except (ValueError, TypeError):
        return False  # it is rejected for that
