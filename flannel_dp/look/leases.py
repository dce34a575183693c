"""``flannel-dp leases``: which leases are accepted, which are not and why, and when they expire.

They are validated as a sync of this node validates them. Where nothing is known of the node (no
such interface, no lease of its own) the leases are validated by their form, by the network and
against each other, which every node of the cluster has in common.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field

from flannel_dp._core import Claims
from flannel_dp.cluster import admission
from flannel_dp.cluster.admission import Node, Rejections
from flannel_dp.cluster.lease import Lease, printable
from flannel_dp.cluster.network import NetworkConfig, families_of, network_of
from flannel_dp.cluster.rejections import Rejection
from flannel_dp.errors import ConfigError, FlannelDPError, SourceError
from flannel_dp.look.terminal import Paint, columns, count, plain

if TYPE_CHECKING:
    from flannel_dp.look.overlay import Overlay
    from flannel_dp.sources import Snapshot

_HEAD = ("SUBNET", "PUBLIC IP", "BACKEND", "VNI", "MAC", "EXPIRES", "NAME")


class Listing(Struct, frozen=True):
    """What :func:`list_leases` found; ``str()`` of it is what the command prints.

    ``leases`` are those that are accepted, in the source's order, without the halves (of one
    family) that are not; ``own`` is the number of this node's among them, None if it has none or
    the node is not known. ``rejected`` are the rejected ones, and ``notes`` what else a person
    should know. ``expire`` says whether the source knows when leases end; one without an
    expiration never does then. ``families`` are those that were validated; of others there is
    nothing in the text. ``now`` is what remaining times are counted from.
    """

    leases: tuple[Lease, ...]
    rejected: Sequence[Rejection] = ()
    own: int | None = None
    notes: tuple[str, ...] = ()
    expire: bool = False
    families: tuple[int, ...] = (4, 6)
    now: datetime = field(default_factory=lambda: datetime.now(UTC))

    def to_json(self) -> dict[str, Any]:
        """Plain values, with ``"schema": 1``; keys are only ever added.

        It is a list of leases as ``--leases`` takes it: of the same cluster it makes the same
        overlay, with nothing rejected.
        """
        import msgspec

        return {
            "schema": 1,
            "leases": msgspec.to_builtins([*self.leases]),
            "rejected": [rejection.to_json() for rejection in self.rejected],
            "own": None if self.own is None else self.leases[self.own].label,
            "notes": list(self.notes),
        }

    def lines(self, paint: Paint = plain, width: int = 0) -> Iterator[str]:
        """Yield the listing line by line; a lease of both families has two."""
        if self.leases:
            rows = [
                (number, row) for number in range(len(self.leases)) for row in self._rows(number)
            ]
            from flannel_dp.look.fitting import Grid

            shown = Grid([_HEAD, *(row for _, row in rows)], drop=(3, 2, 4, 1)).lines(width)
            yield paint(next(shown), "bold")
            for (number, _), line in zip(rows, shown, strict=True):
                yield paint(line, "green") if number == self.own else line
        if self.rejected:
            if self.leases:
                yield ""
            yield paint(f"rejected leases ({len(self.rejected)}):", "yellow")
            yield from columns(
                (
                    (one.lease, f"IPv{one.family}" if one.family else "", one.reason, one.detail)
                    for one in self.rejected
                ),
                indent="  ",
            )
        yield from (paint(f"note: {note}", "yellow") for note in self.notes)
        words = f"{count(len(self.leases), 'lease')} accepted, {len(self.rejected)} rejected"
        yield words + (
            f"; {_name(self.leases[self.own])} is this node's" if self.own is not None else ""
        )

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _rows(self, number: int) -> Iterator[tuple[str, ...]]:
        lease = self.leases[number]
        own = " (this node)" if number == self.own else ""
        for family, subnet, address, data in (
            (4, lease.subnet, lease.public_ip, lease.backend_data),
            (6, lease.ipv6_subnet, lease.public_ipv6, lease.backend_v6_data),
        ):
            if subnet and family in self.families:
                texts = (
                    subnet,
                    address,
                    lease.backend_type,
                    str(data.vni) if data else "",
                    data.vtep_mac if data else "",
                    self._expires(lease),
                )
                yield *(printable(text) or "-" for text in texts), _name(lease) + own

    def _expires(self, lease: Lease) -> str:
        if not lease.expiration:
            return "never" if self.expire else "-"
        try:
            seconds = int((_time(lease.expiration) - self.now).total_seconds())
        except (ValueError, OverflowError):
            return lease.expiration
        if seconds <= 0:
            return "expired"
        return (
            f"in {seconds // 3600} h {seconds // 60 % 60} min"
            if seconds >= 60
            else f"in {seconds} s"
        )


def list_leases(
    config: NetworkConfig,
    snapshot: Snapshot,
    overlay: Overlay | None = None,
    expirations: Mapping[str, str] | None = None,
    *,
    now: datetime | None = None,
) -> Listing:
    """Validate all leases of ``snapshot`` as a sync of ``overlay`` would; writes nothing.

    Without a data overlay, or where it cannot say what node it is on, the leases are validated as
    any node would, and the listing's notes say so. ``expirations`` are RFC 3339 times by the
    leases' names, for sources that keep them apart (etcd); leases that it lacks do not expire.

    Raises KernelError when the node cannot be read.
    """
    leases = snapshot.claims.leases
    validated, notes = _validate(config, snapshot, overlay)
    refused = admission.form_rejections(snapshot.claims.bad, leases, validated.orphans)
    accepted_leases = _accepted(leases, validated)
    own: int | None = None
    listed: list[Lease] = []
    for number, lease in enumerate(leases):
        kept = accepted_leases.get(number)
        if kept is None:
            continue
        if number in validated.own:
            own = len(listed)
        if expirations is not None:
            kept = _changed(kept, expiration=expirations.get(lease.name, ""))
        listed.append(kept)
    passed = len(leases) - len(validated.orphans) - len(validated.numbers)
    if passed:
        families = " and ".join(f"IPv{family}" for family in validated.families)
        notes.append(f"{count(passed, 'lease')} without a subnet of {families} left out")
    return Listing(
        tuple(listed),
        tuple(refused + [one for found in validated.rejected.values() for one in found]),
        own,
        tuple(notes),
        expirations is not None,
        tuple(validated.families),
        now or datetime.now(UTC),
    )


class _Validated(Struct):
    """What became of the leases' halves, by family; numbers are those of the leases."""

    orphans: list[int]
    accepted: dict[int, set[int]] = field(default_factory=dict)
    rejected: dict[int, Rejections] = field(default_factory=dict)
    own: set[int] = field(default_factory=set)
    numbers: set[int] = field(default_factory=set)

    @property
    def families(self) -> list[int]:
        return sorted(self.accepted)

    def add(self, accepted: Claims, rejected: Rejections, packed: set[int]) -> None:
        """Note one family; what was ``packed`` and is neither is this node's own."""
        family = accepted.family
        self.accepted[family] = _origins(accepted)
        self.rejected[family] = rejected
        own = packed - self.accepted[family] - _origins(rejected.claims)
        self.accepted[family] |= own
        self.own |= own
        self.numbers |= packed


def _validate(
    config: NetworkConfig, snapshot: Snapshot, overlay: Overlay | None
) -> tuple[_Validated, list[str]]:
    leases = snapshot.claims.leases
    notes: list[str] = []
    families = families_of(config)
    backend = config.backend
    packed = {
        number: admission.pack(
            leases,
            number,
            backend=backend.type,
            vni=backend.vni,
            has_data=backend.needs_mac,
        )
        for number in families
    }
    validated = _Validated(next(iter(packed.values())).orphans)
    known = {}
    errors: Mapping[int, Exception] = {}
    if overlay is not None:
        try:
            resolved = overlay.resolver.resolve(snapshot.claims)
            known = {family.number: family.admission for family in resolved.families}
            errors = resolved.errors
        except (ConfigError, SourceError) as error:
            errors = dict.fromkeys(families, error)
    for number, claims in packed.items():
        every = _origins(claims)
        if number in known:
            validated.add(known[number].accepted, known[number].rejected, every)
            continue
        node = Node(
            number, network_of(config, number), "", pods=admission.pod_range(config, number)
        )
        accepted, rejected = claims.admit(
            node.network,
            [],
            [],
            need_mac=backend.needs_mac,
            pods=node.pods,
            link_local=True,
        )
        validated.add(accepted, Rejections(node, accepted, rejected), every)
        notes += [_note(number, errors.get(number))]
    return validated, list(dict.fromkeys(notes))


def _note(family: int, error: Exception | None) -> str:
    where = f"IPv{family} leases are validated without regard to this node"
    if isinstance(error, FlannelDPError):
        return f"{where}: {error}"
    return where


def _origins(claims: Claims) -> set[int]:
    return {claims.origin(number) for number in range(len(claims))}


def _accepted(leases: Sequence[Lease], validated: _Validated) -> dict[int, Lease]:
    """Return the leases of which a half is accepted, without the halves that are rejected."""
    found = {}
    refused = {family: _origins(rejected.claims) for family, rejected in validated.rejected.items()}
    for number in sorted(set().union(*validated.accepted.values())):
        lease = leases[number]
        if number in refused.get(4, ()):
            lease = _changed(lease, subnet="", public_ip="", backend_data=None)
        if number in refused.get(6, ()):
            lease = _changed(lease, ipv6_subnet="", public_ipv6="", backend_v6_data=None)
        found[number] = lease
    return found


def _changed(lease: Lease, **changes: Any) -> Lease:
    import msgspec

    return msgspec.structs.replace(lease, **changes)


def _name(lease: Lease) -> str:
    return printable(lease.label)


def _time(text: str) -> datetime:
    made = datetime.fromisoformat(text)
    return made if made.tzinfo else made.replace(tzinfo=UTC)
