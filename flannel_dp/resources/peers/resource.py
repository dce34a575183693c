"""The peers of one family as a resource: all its tables, compared and written together.

``ip route``, ``ip nexthop``, ``ip neigh`` and ``bridge fdb`` show them; which of these tables a
layout writes stands in :mod:`flannel_dp.resources.peers.layouts`. The tables of one family share a
mask of broken peers: where an entry of a peer failed, those that depend on it are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field

from flannel_dp._core import Diff, Table
from flannel_dp.cluster.network import NetworkConfig, network_of
from flannel_dp.kernel.host import Host
from flannel_dp.kernel.tables import timed
from flannel_dp.node.family import Family, Purpose, View
from flannel_dp.reconcile.plan import TablePlan
from flannel_dp.reconcile.report import Report
from flannel_dp.reconcile.resource import Done, Resource, Result
from flannel_dp.resources.peers.layouts import layout_of
from flannel_dp.resources.peers.ours import every_scope
from flannel_dp.resources.peers.place import KINDS, DesiredTable, Placement
from flannel_dp.resources.peers.present import keep_entries
from flannel_dp.resources.peers.stack import (
    converge,
    read_differences,
    to_dump,
    unreachable,
)
from flannel_dp.resources.peers.state import State
from flannel_dp.tables.describe import describe
from flannel_dp.tables.entries import Scope
from flannel_dp.tables.results import add_counts

if TYPE_CHECKING:
    from flannel_dp.resources.peers.update import Prepared

#: From so many leases on, the tables are read while the leases are.
_READ_AHEAD = 2000

#: More gateway routes than this are slow to write.
_MANY_GATEWAYS = 2000

#: The outcome of a resource that is not composed.
_NOTHING = Result()


class Wanted(Struct, frozen=True):
    """The family whose peers are wanted, and what the pass is for."""

    family: Family
    purpose: Purpose


class PeersChange(Struct):
    """The tables of one family beside the kernel's. ``diffs`` is None where the device has yet to
    be made, so that there is nothing to compare with; ``state`` is None where nothing is wanted
    and ``scopes`` say what is removed."""

    state: State | None
    diffs: list[Diff] | None = None
    names: dict[int, str] = field(default_factory=dict)
    scopes: tuple[Scope, ...] = ()
    keeps_device: bool = True
    seconds: dict[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Never: what was compared is also remembered as what is there."""
        return False

    @property
    def tables(self) -> tuple[TablePlan, ...]:
        """The differences as a plan has them."""
        if self.state is None:
            return ()
        return tuple(
            TablePlan(diff, wanted.scopes, self.names)
            for diff, wanted in zip(self.diffs or (), self.state.all_tables, strict=False)
        )

    def lines(self) -> Iterator[str]:
        """Yield one line for each entry."""
        for table in self.tables:
            for sign, entry, _ in table.operations():
                yield f"{sign} {describe(entry, self.names)}"


class PeersResource(Resource[Wanted, PeersChange]):
    """The tables of one family's peers, and what was written of them.

    ``wants_blackhole`` is flanneld's --ip-blackhole-route (None: not read), ``take_boot``
    counts flanneld's routes on the uplink as ours to remove, ``as_flanneld`` writes routes as
    flanneld has them. With ``takes_mtus`` the MTUs that routes of ours have when they are first
    read stay.
    """

    vital = True

    def __init__(
        self,
        config: NetworkConfig,
        number: int,
        *,
        wants_blackhole: bool | None = None,
        take_boot: bool = False,
        as_flanneld: bool = False,
        takes_mtus: bool = False,
    ) -> None:
        self.name, self.families = f"peers{number}", (number,)
        self.after = ("program", f"map{number}", f"device{number}")
        self.number = number
        layout, self._network = layout_of(config.backend), network_of(config, number)
        self.layout = layout.as_flanneld() if as_flanneld else layout
        self._blackhole, self._take_boot = wants_blackhole, take_boot
        self._takes_mtus = takes_mtus
        #: What was written last; None before the first pass.
        self.state: State | None = None
        #: Whether the kernel agreed with it when the last pass ended.
        self.in_sync = False

    def forget(self) -> None:
        """Take nothing for granted any more: what is there is removed, or not known."""
        self.state, self.in_sync = None, False

    # ---- a pass

    def read_ahead(self, host: Host, device: int, uplink: int, leases: int) -> None:
        """Begin to read the tables while the leases are validated, where that pays."""
        if not self.layout.reads_ahead or leases < _READ_AHEAD or not host.ahead:
            return
        place = self._place(host, device, uplink)
        known = self.state is not None and self.state.index == device
        scopes = self.layout.scopes(place, self.number)
        host.ahead.start(self._to_dump(host, scopes, leases, known=known), leases)

    def read_again(self, host: Host) -> None:
        """Begin to read the tables of the last pass while the node is compared."""
        state = self.state
        if state is None or not state.index or not host.ahead or len(state.peers) < _READ_AHEAD:
            return
        if self.layout.reads_ahead:
            scopes = [scope for wanted in state.all_tables for scope in wanted.scopes]
            chosen = [scope for scope in scopes if scope.device or scope.type]
            count = len(state.peers)
            host.ahead.start(self._to_dump(host, chosen, count, known=True), count)

    def _to_dump(
        self, host: Host, scopes: Iterable[Scope], count: int, *, known: bool
    ) -> list[Scope]:
        """Return the scopes that are dumped: routes are in the main table, read for admission."""
        read = "route" if host.reads_main_table(self.number) else ""
        return [one for one in to_dump(scopes, count, known=known) if one.kind != read]

    def desired(self, view: View) -> Wanted | None:
        family = view.family(self.number)
        return Wanted(family, view.purpose) if family else None

    def compare(self, host: Host, desired: Wanted | None, done: Done) -> PeersChange:
        if desired is None:
            return self._nothing_wanted(host, done)
        family, purpose = desired.family, desired.purpose
        device = done.get(f"device{self.number}", _NOTHING).facts
        names = _every_name(host) if purpose == "plan" else {}
        names |= {family.uplink: family.iface, **device.get("names", {})}
        seconds: dict[str, float] = {}
        with timed(seconds, "desired"):
            place = self._place(
                host,
                device.get("index", 0),
                family.uplink,
                family.leftovers,
                done.get("program", _NOTHING).facts.get("maps", {}).get(self.number, 0),
                device.get("is_made", True),
            )
            state = self._state(host, family, place)
        change = PeersChange(state, None, names, seconds=seconds)
        if not place.is_made and purpose != "plan":
            return change  # nothing can be on a device that is not there
        change.diffs = read_differences(
            host.kernel,
            state,
            foreign=purpose == "plan",
            loses_neighbours=bool(device.get("loses_neighbours")),
            fetched=host.ahead,
            whole=host.main_table(self.number),
            sure=purpose == "resync",
            known=self.state is not None and self.state.index == state.index,
        )
        return change

    def _place(
        self,
        host: Host,
        device: int,
        uplink: int,
        leftovers: tuple[int, ...] = (),
        held: int = 0,
        is_made: bool = True,
    ) -> Placement:
        return Placement(
            device,
            uplink,
            self._network,
            host.uses_nexthops(self.number),
            frozenset(kind for kind in KINDS if host.keeps(kind, self.number)),
            leftovers,
            self._take_boot,
            held,
            is_made,
        )

    def _state(self, host: Host, family: Family, place: Placement) -> State:
        """Return the tables of a family: those of the last pass where they still are the right
        ones."""
        paths = self.layout.paths.decide(host.kernel, family, host.main_table(self.number))
        last = self.state
        if (
            last is not None
            and (last.place, last.paths) == (place, paths)
            and last.family.admission is family.admission
            and last.family.kept == family.kept
        ):
            last.family = family
            return last
        tables = self.layout.desired(family.peers, place, paths.column)
        keep_entries(tables, family.kept.values(), place)
        made = State(
            family,
            place,
            self.layout,
            paths,
            tables,
            self._shared(family, place),
            mtus=last.mtus if last is not None else None,
        )
        if made.mtus is not None or (last is None and self._takes_mtus):
            self._put_mtus(host, made)
        return made

    def _put_mtus(self, host: Host, state: State) -> None:
        """Have routes of ours keep MTUs of their own; of a first pass those that they have."""
        from flannel_dp.resources.peers.narrow import mtus_in_kernel, put_mtus

        if state.mtus is None:
            state.mtus = mtus_in_kernel(host, state.all_tables, self._network)
        put_mtus(state)

    def _shared(self, family: Family, place: Placement) -> list[DesiredTable]:
        tables = []
        if self._blackhole is not None:
            from flannel_dp.resources.peers.blackhole import blackhole

            own = family.admission.node.subnet if self._blackhole else ""
            tables.append(blackhole(own, self._network, self.number))
        return tables + self.layout.shared(place, self.number)

    def apply(self, host: Host, change: PeersChange) -> Result:
        part = Report()
        if change.state is None:
            self.forget()
            _remove(host, change, part)
            _name_devices(host, part)
            return Result(part=part)
        self.state, self.in_sync = change.state, False
        part.seconds |= change.seconds
        part.names |= change.names
        converge(host, change.state, part, change.diffs)
        part.failures += unreachable(change.state)
        _name_devices(host, part)
        self.in_sync = True
        return Result(part=part)

    def update(self, host: Host, changed: Any, done: Done) -> Result | None:
        change: Prepared = changed
        if change.family.number != self.number or self.state is None:
            return None
        part = change.write(host, self.state)
        if isinstance(part, Report) and (part.failures or part.conflicts):
            _name_devices(host, part)
        return Result(part=part)

    @property
    def mtus(self) -> dict[str, int]:
        """The MTUs that routes have of their own, by subnet."""
        mtus = self.state.mtus if self.state is not None else None
        return {route.prefix: route.mtu for route in mtus} if mtus is not None else {}

    def set_mtus(self, host: Host, mtus: Mapping[str, int]) -> Report:
        """Give the routes of these peers, by subnet, MTUs of their own, and all others the
        device's. Raises KernelError; nothing is done before the first pass."""
        from flannel_dp.resources.peers.narrow import set_mtus, written_as

        state = self.state
        if state is None or self.mtus == written_as(mtus):
            return Report()
        report, is_done = set_mtus(host, state, mtus)
        if not is_done:  # the kernel is not as remembered
            for row in report.tables.values():
                row["failed"] = 0
            converge(host, state, report, None)
        return report

    def record(self, report: Report, change: PeersChange | None, outcome: Result) -> None:
        super().record(report, change, outcome)
        if change is not None and change.state is not None:
            report.warnings += _many_gateways(change.state)
            if outcome.part is None and outcome.error is None:  # a plan
                report.failures += unreachable(change.state)

    def watched(self) -> Iterable[DesiredTable]:
        """Return the tables on a device that is there; no event tells of a map."""
        if self.state is None or not self.state.place.is_made:
            return ()
        return (one for one in self.state.all_tables if one.table.kind != "peer")

    # ---- clean

    def _nothing_wanted(self, host: Host, done: Done) -> PeersChange:
        """Return all of ours of the family, in the order in which it is removed."""
        before = done.get(f"device{self.number}")
        device = before.facts.get("index", 0) if before else 0
        maps = done["program"].facts.get("maps", {}) if "program" in done else {}
        tables = every_scope(
            host, self.number, self._network, device=device, map=maps.get(self.number) or 0
        )
        scopes = tuple(scope for table in reversed(tables) for scope in table)
        keeps = bool(before and before.facts.get("kept"))
        return PeersChange(None, scopes=scopes, keeps_device=keeps)


def _every_name(host: Host) -> dict[int, str]:
    with host.links() as reader:
        return {link.index: link.name for link in reader.links()}


def _name_devices(host: Host, part: Report) -> None:
    """Add the names of the devices that conflicts and failures are on, another program's, too."""
    entries = [entry for pair in part.conflicts for entry in pair]
    entries += [outcome.entry for outcome in part.failures]
    if {getattr(entry, "device", 0) for entry in entries} - {0, *part.names}:
        part.names |= _every_name(host)


def _many_gateways(state: State) -> tuple[str, ...]:
    """Return whether so many IPv4 routes name gateways that writing them takes long: those of one
    device share a bucket of the kernel's hash (fib_info_hashfn_1 in net/ipv4/fib_semantics.c)."""
    count = len(state.routes.table)
    objects = sum(len(one.table) for one in state.tables if one.table.kind == "nexthop")
    if state.number != 4 or objects or count <= _MANY_GATEWAYS:
        return ()
    return (
        f"{count} IPv4 gateway routes without nexthop objects: the kernel's cost grows with the "
        "square of their number (Linux 5.3 and later have the objects)",
    )


def _remove(host: Host, change: PeersChange, part: Report) -> None:
    """Routes and nexthops first: with the device they would vanish, too, but without the events
    that tell a routing daemon of it. The rest goes with the device, if that goes. Each scope is
    read when those before are gone, as routes on the device are in two of them."""
    for scope in change.scopes:
        diff = host.kernel.diff(Table(scope.kind), scope)
        if scope.kind in ("neighbour", "fdb", "peer") and not change.keeps_device:
            part.tables[scope.kind]["removed"] += diff.removed
            continue
        for result in host.kernel.apply(diff):
            add_counts(part.tables[result.kind], result.counts())
            part.failures += [*result.failures()]
