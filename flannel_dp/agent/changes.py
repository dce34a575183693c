"""Which peers came, changed and went between two sets of accepted leases.

The sets are compared as packed tables, in the compiled unit; only what is asked for is made into
text.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, NamedTuple

from flannel_dp._core import ADD, REMOVE, Claims, Diff, Table, diff_tables
from flannel_dp.cluster.lease import printable

#: So many changes of one comparison are read to find nodes that have another subnet than before.
_FEW = 64
#: So many are searched for the first ones of a kind.
_SEARCHED = 512
_NO_MAC = "00:00:00:00:00:00"
_KINDS = {ADD: "added", REMOVE: "removed"}


class PeerAt(NamedTuple):
    """Where a peer is: its lease's name, its subnet, its endpoint, and its MAC ("" where the mode
    of forwarding has none)."""

    name: str
    subnet: str
    endpoint: str
    mac: str

    @property
    def described(self) -> str:
        """For people: "10.244.7.0/24 at 192.0.2.7, MAC 02:00:00:00:00:07"."""
        return f"{self.subnet} at {self.endpoint}" + (f", MAC {self.mac}" if self.mac else "")


NOWHERE = PeerAt("", "", "", "")


class PeerChange(NamedTuple):
    """One change: ``before`` is None for a peer that came, ``after`` for one that went."""

    before: PeerAt | None
    after: PeerAt | None

    @property
    def kind(self) -> str:
        """``added``, ``changed`` or ``removed``."""
        return "added" if self.before is None else "removed" if self.after is None else "changed"

    @property
    def described(self) -> str:
        """For people, of a changed one: "endpoint from 192.0.2.7 to 192.0.2.8"."""
        words = {"mac": "MAC"}
        return ", ".join(
            f"{words.get(name, name)} from {was or 'none'} to {now or 'none'}"
            for name, was, now in zip(
                PeerAt._fields, self.before or NOWHERE, self.after or NOWHERE, strict=True
            )
            if was != now
        )


class PeerChanges:
    """The changes from ``old`` to ``new``, accepted leases of one family.

    ``counts`` are how many were ``added``, ``changed`` and ``removed``. Changes are
    made into text when they are asked for.
    """

    def __init__(self, old: Claims, new: Claims) -> None:
        self._old, self._new = old, new
        self._diff: Diff = diff_tables(_table(new), _table(old))
        self.family = new.family
        self.counts = {
            "added": self._diff.added,
            "changed": self._diff.replaced,
            "removed": self._diff.removed,
        }
        self._few: list[PeerChange] | None = None
        if len(self._diff) <= _FEW:
            self._few = _joined([self._change(number) for number in range(len(self._diff))])
            kinds = [one.kind for one in self._few]
            self.counts = {kind: kinds.count(kind) for kind in self.counts}

    def __len__(self) -> int:
        return sum(self.counts.values())

    def first(self, kind: str, most: int) -> list[PeerChange]:
        """Return at most ``most`` changes of one kind; fewer where they are far behind others."""
        if self._few is not None:
            return [one for one in self._few if one.kind == kind][:most]
        if not self.counts[kind]:
            return []
        begin = len(self._diff) - self._diff.removed if kind == "removed" else 0
        numbers = range(begin, min(begin + _SEARCHED, len(self._diff)))
        found = (n for n in numbers if _KINDS.get(self._diff.operation(n)[0], "changed") == kind)
        return [self._change(number) for number in islice(found, most)]

    def _change(self, number: int) -> PeerChange:
        op, new, old = self._diff.operation(number)
        return PeerChange(
            None if op == ADD else _peer(self._old, old),
            None if op == REMOVE else _peer(self._new, new),
        )


def _table(claims: Claims) -> Table:
    table = Table("peer")
    table.extend_peers(0, claims.subnets, claims.lengths, claims.macs, claims.endpoints)
    return table


def _peer(claims: Claims, entry: Any) -> PeerAt:
    subnet, endpoint, mac, _ = entry
    number = claims.find_subnet(subnet)
    name = printable(claims.name(number)) if number >= 0 else subnet
    return PeerAt(name, subnet, endpoint, "" if mac == _NO_MAC else mac)


def _joined(changes: list[PeerChange]) -> list[PeerChange]:
    """Make one change of a node that went with one subnet and came with another."""
    came = {one.after.name: one.after for one in changes if one.after and not one.before}
    gone = {one.before.name: one.before for one in changes if one.before and not one.after}
    moved = sorted(came.keys() & gone.keys())
    rest = [one for one in changes if one.kind == "changed" or not {*moved} & {*_names_of(one)}]
    return rest + [PeerChange(gone[name], came[name]) for name in moved]


def _names_of(change: PeerChange) -> tuple[str, ...]:
    return tuple(one.name for one in change if one is not None)
