"""The passes over what one node holds: plan, sync, resync, update and clean.

leases -> view of this node -> resources compared -> guarded -> applied -> report

They share one form: what is wanted is resolved and all is compared while the kernel is only read;
then the guard of the loop asks the brake, which may have all compared once more with the peers that
are kept; then what was compared is written, and each resource says its part of the report. The
caller holds the lock of the data plane.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from msgspec.structs import replace

from flannel_dp.cluster.lease import Lease, LeaseList, Leases, Listed, count_leases
from flannel_dp.composition import Parts, forwarder_of
from flannel_dp.errors import FlannelDPError, SourceError, require
from flannel_dp.kernel.tables import Progress, timed
from flannel_dp.node.family import Family, View
from flannel_dp.node.view import Ahead
from flannel_dp.notices import about_node, full_neighbours, not_permitted
from flannel_dp.reconcile.plan import Plan
from flannel_dp.reconcile.reconciler import Guard, Pass, Reconciler
from flannel_dp.reconcile.report import Report, merge_devices
from flannel_dp.reconcile.resource import SyncView
from flannel_dp.resources.device.plan import DevicePlan
from flannel_dp.resources.device.resource import DeviceDifference
from flannel_dp.resources.forwarding.convert import check_failing, other_mode
from flannel_dp.resources.peers.brake import Brake, Names
from flannel_dp.resources.peers.brake_of_pass import BrakeOfPass, view_of
from flannel_dp.resources.peers.present import PresentPeer
from flannel_dp.resources.peers.resource import PeersChange

if TYPE_CHECKING:
    from flannel_dp.resources.peers.last_good import LastGood

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

#: Resources that belong to the node as a whole, which ``resync(host=False)`` leaves out.
_HOST = frozenset({"firewall", "subnet file"})
#: Resources that a plan shows by their lines, where there are any.
_LISTED = frozenset({"subnet file", "counters"})


class Passes:
    """The passes of one data plane, over its ``parts``."""

    def __init__(self, parts: Parts) -> None:
        self._parts, self._host, self._resolver = parts, parts.host, parts.resolver
        self.reconciler = Reconciler(parts.host, parts.resources())
        self.brake = Brake(parts.config, self._beside, parts.peers, self._in_kernel)
        #: Called after each pass that wrote to the kernel.
        self.on_written: list[Callable[[], None]] = []
        self._warned = False

    @property
    def last_good(self) -> LastGood:
        """What completes leases that became unusable; loaded where it is asked for."""
        from flannel_dp.resources.peers.last_good import LastGood

        return LastGood(self._parts.config, self._parts.peers, self._in_kernel)

    @cached_property
    def _update(self) -> Callable[..., Report]:
        """What makes an update, loaded where one is made: looking for it takes time, too."""
        from flannel_dp.updates import update

        return update

    def written(self) -> None:
        """Call the watchers: what was written is desired now."""
        for told in self.on_written:
            told()

    # ---- the passes

    def plan(self, leases: Listed, *, brakes: bool = True) -> Plan:
        """See ``DataPlane.plan``. Without ``brakes`` no removal is held back."""
        held = BrakeOfPass(self.brake, leases) if brakes else None
        with self._host.looking():
            checked = self._parts.forwarder.check()
            view = self._resolver.resolve(leases, None, self._families(), "plan")
            self._probe(True)

            def guard(found: Pass) -> View | None:
                return held.back(found) if held else None

            found = self.reconciler.compare(view, guard=guard)
            self._check_devices(found)
            report = self._told(found)
        changes, kept = found.changes, held.kept if held else None
        report.family_errors.update(view_of(found).errors)
        self._need_family(report)
        refusal = kept.refusal(planned=True) if kept else None
        peers = [one for one in changes.values() if isinstance(one, PeersChange)]
        lines = {name: [*one.lines()] for name, one in changes.items()}
        planned = Plan(
            tuple(table for one in peers for table in one.tables),
            report.devices,
            view_of(found).rejections(),
            (
                *((str(refusal),) if refusal else ()),
                *report.warnings,
                *full_neighbours(view_of(found), found),
            ),
            report.rules,
            checked,
            {
                name: lines[name]
                for name in lines
                if name in self._parts.added or (name in _LISTED and lines[name])
            },
            report.failures,
            report.family_errors,
            report.problems,
            kept.names if kept and refusal else {},
        )
        missing = {} if planned.is_empty else not_permitted()
        return replace(planned, problems={**missing, **planned.problems})

    def sync(
        self,
        leases: Listed,
        *,
        brakes: bool = True,
        every: bool = False,
        confirmed: Names | None = None,
        probe: bool = False,
        progress: Progress | None = None,
    ) -> Report:
        """See ``DataPlane.sync``. Without ``brakes`` no removal is held back, else that of all or
        nearly all peers, or with ``every`` that of any."""
        started, report = time.perf_counter(), Report()
        held = BrakeOfPass(self.brake, leases, every=every, confirmed=confirmed)

        def resolve() -> View:
            ahead = self._ahead(count_leases(leases))
            return self._resolver.resolve(leases, ahead, self._families())

        def guard(found: Pass) -> View | None:
            instead = held.back(found) if brakes else None
            if instead is None:
                self.brake.note(view_of(found), held.kept)
            return instead

        found = self._run(report, resolve, guard, probe=probe, progress=progress)
        report.looked |= {"kernel", "entries"} | self._nothing_to_see()
        if not self._warned:
            report.warnings += full_neighbours(view_of(found), found)
            self._warned = True
        self._complete(report, started)
        if held.kept:
            held.kept.refuse(report)
        return report

    def resync(
        self,
        families: Iterable[int] | None = None,
        *,
        host: bool = True,
        probe: bool = False,
        progress: Progress | None = None,
    ) -> Report:
        """See ``DataPlane.resync``."""
        started, report, known = time.perf_counter(), Report(), self._parts.known
        asked = (4, 6) if families is None else [*families]
        require({*asked} <= {4, 6}, "families", asked, "4, 6 or both")
        chosen = [n for n in known if n in asked]
        if not chosen:
            raise SourceError("there is nothing to sync again", hint="call sync() first")

        def resolve() -> View:
            for number in chosen:
                self._parts.peers[number].read_again(self._host)
            return self._resolver.again(known[number].family for number in chosen)

        only = self._serving(chosen, host=host)
        self._run(report, resolve, only=only, probe=probe, progress=progress)
        if {*chosen} == {*self._resolver.families}:
            report.looked |= {"kernel", "entries"}
        if host:
            report.looked |= self._nothing_to_see()
        self._complete(report, started)
        return report

    def diversions(self) -> Report:
        """See ``DataPlane.diversions``."""
        return self.reconciler.report_of("path", View(self._families(), [], {}))

    def update(self, leases: Listed, removed: list[Lease | str]) -> Report:
        """See ``DataPlane.update``."""
        try:
            return self._update(self._parts, self.reconciler, self.brake, leases, removed)
        finally:
            self.brake.forget_removed()
            self.written()

    def clean(self, *, keep_device: bool = False, only_rules: bool = False) -> Report:
        """See ``DataPlane.clean``."""
        started, report = time.perf_counter(), Report()
        composed = self._parts.resources(keep_device=keep_device, cleans=True)
        if only_rules:
            composed = [one for one in composed if one is self._parts.firewall]
        else:
            self.brake.held.clear()
        found = Reconciler(self._host, composed).clean()
        for one in composed:
            one.record(report, found.changes.get(one.name), found.done[one.name])
        report.family_errors.clear()
        report.problems |= found.failed()
        report.devices = merge_devices(report.devices)
        report.seconds["total"] = time.perf_counter() - started
        return report

    def blockers(self, families: Iterable[Family]) -> tuple[str, ...]:
        """Return the rules of other programs that stop the packets of these families."""
        view, firewall = View([*families], [], {}), self._parts.firewall
        return firewall.blockers(self._host, view) if firewall and view.families else ()

    # ---- what they share

    def _run(
        self,
        report: Report,
        resolve: Callable[[], View],
        guard: Guard = lambda found: None,
        *,
        only: Iterable[str] | None = None,
        probe: bool = False,
        progress: Progress | None = None,
    ) -> Pass:
        """Resolve what is wanted, and one pass of the loop; fill the report."""
        with ExitStack() as looking:
            ahead = looking.enter_context(self._host.reading_ahead())
            with timed(report.seconds, "desired"):
                view = resolve()
            report.seconds["desired"] -= self._host.waited
            report.seconds["snapshot"] += self._host.waited
            self._probe(probe)

            asked = False

            def guarded(found: Pass) -> SyncView | None:
                nonlocal asked
                looking.close()  # what was read before the first write does not count after it
                instead = None if asked else guard(found)
                if instead is None and not asked:
                    self._begin_writing(found)
                    if self._hand_over(found, report):
                        asked = True
                        return found.view
                return instead

            self._host.progress = progress
            try:
                found = self.reconciler.sync(view, guard=guarded, only=only)
            finally:
                self._host.progress = None
            report.seconds["snapshot"] += ahead.waited
        report.rejected = view_of(found).rejections()
        report.family_errors.update(view_of(found).errors)
        report.add(self._told(found))
        return found

    def _begin_writing(self, found: Pass) -> None:
        """Check that no family loses its device, and note those that are out of sync."""
        self._check_devices(found)
        for number in view_of(found).errors:
            self._parts.peers[number].in_sync = False

    def _hand_over(self, found: Pass, report: Report) -> bool:
        """Replace a program's device by the kernel's with traffic paused as briefly as possible;
        return whether it was, so that all has to be compared again."""
        plans = [getattr(one, "plan", None) for one in found.changes.values()]
        if not any(isinstance(one, DevicePlan) and one.converts for one in plans):
            return False
        from flannel_dp.handover import hand_over

        run_dir = self._parts.forwarder.run_dir
        part = hand_over(self._host, self._parts.config, found.changes, run_dir)
        if part is not None:
            report.add(part)
        return part is not None

    def _check_devices(self, found: Pass) -> None:
        """Raise the error of a family that would lose its device."""
        changes = [one for one in found.changes.values() if isinstance(one, DeviceDifference)]
        goes = [name for one in changes for name in one.goes]
        check_failing(self._host, goes, view_of(found).errors)

    def _told(self, found: Pass) -> Report:
        """Return what every resource says of a pass."""
        view = view_of(found)
        report = Report(warnings=about_node(view, self._parts.config))
        for one in self.reconciler.resources:
            if one.name in found.done:
                one.record(report, found.changes.get(one.name), found.done[one.name])
        report.looked |= {name for name in self._parts.added if name in found.changes}
        for number, error in report.family_errors.items():
            if number not in view.errors:
                log.error(
                    "IPv%(family)d cannot be synced: %(error)s", {"family": number, "error": error}
                )
        return report

    def _complete(self, report: Report, started: float) -> None:
        report.looked |= {"counters", "program"}
        self.written()
        self._need_family(report)
        report.seconds["total"] = time.perf_counter() - started

    def _need_family(self, report: Report) -> None:
        """Raise the first error where no family is left."""
        if len(report.family_errors) == len(self._resolver.families):
            raise next(iter(report.family_errors.values()))

    def _families(self) -> list[Family]:
        """Return the families that were synced, as they were then."""
        return [state.family for state in self._parts.known.values()]

    def _ahead(self, count: int) -> Ahead:
        """Begin to read a family's tables while its ``count`` leases are validated."""

        def start(number: int, device: int, uplink: int) -> None:
            self._parts.peers[number].read_ahead(self._host, device, uplink, count)

        return start

    def _beside(self, leases: LeaseList) -> View:
        """Return what is wanted when kept peers stand beside those of the list."""
        return self._resolver.resolve(leases, known=self._families())

    def _in_kernel(self, number: int, converts: bool) -> list[PresentPeer]:
        """Return each peer that the kernel has or has a part of; those of the other mode of
        forwarding where the device ``converts``."""
        from flannel_dp.look.held import FamilyReader
        from flannel_dp.look.partial import present_peers

        parts, config = self._parts, self._parts.config
        if not converts:
            reader = FamilyReader(parts.host, config, parts.forwarder, number)
            return present_peers(reader.held())
        other = other_mode(config)
        made = forwarder_of(other)(other, parts.host.netns, run_dir=parts.forwarder.run_dir)
        with closing(made) as forwarder:
            return present_peers(FamilyReader(parts.host, other, forwarder, number).held())

    def _probe(self, wanted: bool) -> None:
        if self._parts.firewall:
            self._parts.firewall.probe = wanted

    def _nothing_to_see(self) -> set[str]:
        """Return the kinds of problems of resources that were not asked for: there are none."""
        composed = {one.name for one in self.reconciler.resources}
        absent = {*_HOST - composed}
        return absent | {"forwarding"} if self._parts.firewall is None else absent

    def _serving(self, families: Sequence[int], *, host: bool) -> list[str]:
        """Return the resources of these families, and of the node where that is asked for."""
        return [
            one.name
            for one in self.reconciler.resources
            if (not one.families or {*one.families} & {*families})
            and (host or one.name not in _HOST)
        ]


def listed(leases: Leases) -> Listed:
    """Return leases that can be read more than once."""
    if isinstance(leases, LeaseList):
        return leases
    require(isinstance(leases, Iterable), "leases", leases, "Lease objects")
    return [*leases]


def formed(work: Callable[[Listed], _Result], leases: Listed) -> _Result:
    """Return ``work(leases)``; where that meets objects that no lease can be, do it with them as
    broken claims. The work reads all leases before it writes anything."""
    try:
        return work(leases)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        if isinstance(error, FlannelDPError):
            raise
        from flannel_dp.cluster.forms import check_forms

        checked = check_forms(leases)
        if len(checked.leases) == count_leases(leases):
            raise
        return work(checked)
