"""The brake: hold back the removal of peers when a list of leases lacks most of them.

A list without most of the peers that are there is more often a fault of the program that made it
than the truth: a cut-short export, a wrong prefix, a store that came back empty. What such
a list adds or changes is applied. The peers that it lacks are kept, as claims of their own
beside those of the list: everything that keeps a peer (repairs, audits, the guard's set)
keeps them too, and a claim of the list that contradicts one of them wins. They are removed
by a later sync, once the removal is confirmed.

Of a peer that is incomplete in the kernel (a foreign route has its prefix, an entry was removed) no
claim can be made. It counts as there, and is kept as it is: its entries are wanted as they were
read, and none is added.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from msgspec.structs import replace

from flannel_dp._core import Diff
from flannel_dp.cluster.lease import Lease, LeaseList, Leases
from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.errors import SourceError
from flannel_dp.node.family import Family, View
from flannel_dp.reconcile.reconciler import Pass
from flannel_dp.resources.peers.present import Kept, PresentPeer, count_peers
from flannel_dp.resources.peers.resource import PeersChange, PeersResource

if TYPE_CHECKING:
    from flannel_dp.resources.peers.kept import Gone, HeldBack, Yielded

#: The create revision of kept peers: any claim of a list comes before them.
_LAST = 2**63 - 1

#: Reads the peers that the kernel has of one family; those of the other mode of forwarding where
#: the device is converted.
InKernel = Callable[[int, bool], Iterable[PresentPeer]]

#: Names of peers by family, 4 or 6.
Names = Mapping[int, Collection[str]]


def is_sharp(gone: int, before: int) -> bool:
    """Return whether ``gone`` of ``before`` peers are all or nearly all: all, all but one of
    three or more, or over half and over ten."""
    left = before - gone
    nearly = before >= 3 and left <= 1
    return gone > 0 and (left <= 0 or nearly or (gone > 10 and gone > left))


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
        self.held: Kept = {}

    def find(self, family: Family, found: Pass, *, every: bool = False) -> Gone | None:
        """Return the peers that applying ``family`` would remove; None where there are too
        few of them to hold them back (with ``every``: none at all).

        Raises KernelError when the kernel cannot be read.
        """
        if self._removes_few(family, found, every=every):
            return None
        from flannel_dp.resources.peers.kept import Gone, marks_of, marks_of_listed

        there = self._others(family, found)
        listed = family.peers
        names = {listed.name(number) for number in range(len(listed))}
        marks = marks_of_listed(listed)
        # A node that is listed with another subnet, address or MAC has changed, and is not gone.
        gone = [one for one in there if one.name not in names and not marks & {*marks_of(one)}]
        before, count = count_peers(there), count_peers(gone)
        if not gone or not (every or is_sharp(count, before)):
            return None
        return Gone(family.number, before, gone)

    def _removes_few(self, family: Family, found: Pass, *, every: bool) -> bool:
        """Return whether the differences alone say that too few peers could be gone: each one
        that is has an entry that is removed from one of the tables, or was wanted last."""
        diffs = _diffs(family, found)
        if diffs is None:
            return False
        state = self._peers[family.number].state
        known = len(state.peers) if state is not None else 0
        gone = max(sum(diff.removed for diff in diffs), known - len(family.peers))
        before = max(known, *(diff.ours for diff in diffs))
        return gone <= 0 or not (every or is_sharp(gone, before))

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
        from flannel_dp.resources.peers.kept import marks_of, marks_of_listed, peers_word

        same = {(listed.subnet(number), listed.endpoint(number)) for number in range(len(listed))}
        there = self._others(family, found)
        marks = marks_of_listed(listed)
        unlike = [
            one
            for one in there
            if (one.subnet, one.endpoint) not in same
            and (one.is_complete or not marks & {*marks_of(one)})
        ]
        if unlike:
            before = count_peers(there)
            raise SourceError(
                f"this list of leases lacks the lease of this node, {node.described}, and "
                f"{count_peers(unlike)} of its {before} IPv{family.number} "
                f"{peers_word(before)}, or has others in their place: "
                "it may be another cluster's, and nothing was written",
                hint="check the source and its prefix; if the list is right name this node's "
                "subnet (--subnet), or pass --allow-shrink to sync",
            )

    def _others(self, family: Family, found: Pass) -> list[PresentPeer]:
        """Return the peers there are, without what may be this node itself."""
        node = family.admission.node
        own = {node.public_ip, *node.addresses, node.subnet, node.subnet.partition("/")[0]} - {""}
        device = found.changes.get(f"device{family.number}")
        converts = bool(getattr(getattr(device, "plan", None), "converts", False))
        there = self._there(family, converts)
        return [one for one in there if one.endpoint not in own and one.subnet not in own]

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
        from flannel_dp.resources.peers.kept import HeldBack

        listed = leases if isinstance(leases, LeaseList) else LeaseList([*leases], [])
        gone_on = confirmed or {}
        held = {
            one.family: {
                peer.name: peer
                for peer in one.peers
                if peer.name not in gone_on.get(one.family, ())
                and (peer.is_complete or self._can_stay(peer, view, found, one.family))
            }
            for one in gone
        }
        while True:
            extra = [
                self._lease(family, peer)
                for family, known in held.items()
                for peer in known.values()
                if peer.is_complete
            ]
            beside = LeaseList([*listed.leases, *extra], listed.bad)
            beside_view = _with_entries(self._resolve(beside), held)
            lost = [*_lost(beside_view, held)]
            for family, name in lost:
                del held[family][name]
            if not lost:
                return HeldBack(beside_view, held, [one for one in gone if held[one.family]])

    @staticmethod
    def _can_stay(peer: PresentPeer, view: View, found: Pass, number: int) -> bool:
        """Return whether the entries of an incomplete peer can stay: the device does, and no
        listed subnet overlaps."""
        from flannel_dp.resources.peers.kept import overlap

        family = view.family(number)
        if family is None or _diffs(family, found) is None:
            return False
        listed = family.peers
        subnets = (listed.subnet(n) for n in range(len(listed)))
        return not any(overlap(one, peer.subnet) for one in subnets)

    def note(self, view: View, kept: HeldBack | None) -> None:
        """A sync writes ``view``: ``held`` is what is kept in it."""
        for family in view.families:
            self.held[family.number] = kept.held.get(family.number, {}) if kept else {}

    # ---- changes, one by one

    def yields(self, added: Iterable[Lease], removed: Iterable[Lease | str]) -> Yielded:
        """Take a change: the names of kept peers that the new leases contradict, which have to
        go. Kept peers that came back, or were removed by name, are kept no longer."""
        from flannel_dp.resources.peers.kept import Yielded, contradict

        held = [
            (number, name, kept)
            for number, known in self.held.items()
            for name, kept in known.items()
        ]
        if not held:
            return Yielded()
        met = {
            name
            for lease in added
            for number, name, kept in held
            if name != lease.label and contradict(lease, kept, number)
        }
        gone = {*met, *(lease.label for lease in added)}
        gone |= {one if isinstance(one, str) else one.label for one in removed}
        for known in self.held.values():
            for name in gone & {*known}:
                del known[name]
        return Yielded(
            [name for _, name, kept in held if name in met and kept.is_complete],
            [name for _, name, kept in held if name in gone and not kept.is_complete],
        )

    def forget_removed(self) -> None:
        """Stop keeping the peers that a change has removed."""
        for number, known in self.held.items():
            state = self._peers[number].state
            for name in [*known]:
                there = state is not None and (
                    name in state.family.kept or state.peers.find_name(name) >= 0
                )
                if not there:
                    del known[name]

    # ---- who is there

    def _there(self, family: Family, converts: bool) -> Iterator[PresentPeer]:
        """Yield the peers there are, as this process wanted them last and kept them, else as the
        kernel has them."""
        state = self._peers[family.number].state
        if state is not None:
            peers = state.peers
            for n in range(len(peers)):
                yield PresentPeer(peers.name(n), peers.subnet(n), peers.endpoint(n), peers.mac(n))
            kept = self.held.get(family.number, {})
            yield from (one for one in kept.values() if not one.is_complete)
            return
        yield from self._in_kernel(family.number, converts)

    def _lease(self, family: int, peer: PresentPeer) -> Lease:
        """Return what keeps a complete peer."""
        from flannel_dp.resources.peers.kept import NO_MAC

        backend, subnet, endpoint, mac = self._config.backend, peer.subnet, peer.endpoint, peer.mac
        if mac in ("", NO_MAC):  # reached directly; nothing that needs it is written
            from hashlib import blake2b

            mac = "02:" + blake2b(subnet.encode(), digest_size=5).digest().hex(":")
        data = backend.data(mac)
        lease = Lease(name=peer.name, revision=_LAST, backend_type=backend.type)
        if family == 4:
            return replace(lease, subnet=subnet, public_ip=endpoint, backend_data=data)
        return replace(lease, ipv6_subnet=subnet, public_ipv6=endpoint, backend_v6_data=data)


def _with_entries(view: View, held: Kept) -> View:
    """Return the view with the entries of incomplete peers that are kept."""
    entries = {
        number: {name: one.entries for name, one in known.items() if one.entries}
        for number, known in held.items()
    }
    families = [replace(one, kept=entries.get(one.number, {})) for one in view.families]
    return replace(view, families=families)


def _lost(view: View, kept: Kept) -> Iterator[tuple[int, str]]:
    """Yield the kept peers that lost to claims of the list, or that this node does not accept."""
    for family in view.families:
        rejected = family.admission.rejected.claims
        for number in range(len(rejected)):
            name = rejected.name(number)
            if name in kept.get(family.number, ()) and rejected.revision(number) == _LAST:
                yield family.number, name


def _changes_peers(family: Family, found: Pass) -> bool:
    """Return whether an entry of any table is removed or replaced, or whether that is unknown: a
    peer with another address keeps its route and its nexthop object."""
    diffs = _diffs(family, found)
    return diffs is None or any(diff.removed or diff.replaced for diff in diffs)


def _diffs(family: Family, found: Pass) -> list[Diff] | None:
    """Return the differences of the tables with an entry for each peer; None where they are
    unknown: a device that has yet to be made says nothing of what this process wanted."""
    change = found.changes.get(f"peers{family.number}")
    if not isinstance(change, PeersChange) or not change.state or change.diffs is None:
        return None
    if not change.state.place.is_made:
        return None
    tables = {id(wanted.table) for wanted in change.state.tables}
    return [diff for diff in change.diffs if id(diff.table) in tables]
