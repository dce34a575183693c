"""One pass over resources: compare all, guard, write in order, finish in reverse.

The rules, each a script in tests/unit/reconciler.txt:

1. Everything is compared before anything is written; the guard sees all changes in between. It
   may raise, or have all compared with another view.
2. ``apply`` goes in the order of ``after``, ``finish`` the other way. ``clean`` is the same pass
   with nothing wanted, in reverse.
3. A resource after one that failed is not tried and carries the same error, if both serve one
   family. A resource that serves the node as a whole goes on without a family that failed.
   NotPermitted of vital resources ends the pass where it leaves no family.
4. A resource after one that was disturbed is compared again just before it is applied.
5. DeviceGone is answered by comparing once more, and first what the resource depends on.
6. A failure that is not vital is a problem of its own; a vital one puts its families out of sync.
7. What is not read is not composed: a resource is either here, or nothing knows of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any, TypeAlias

from msgspec.structs import replace

from flannel_dp.errors import DeviceGone, FlannelDPError, NotPermitted
from flannel_dp.reconcile.report import Report
from flannel_dp.reconcile.resource import Difference, Done, Resource, Result, SyncView

if TYPE_CHECKING:
    from flannel_dp.kernel.host import Host

log = logging.getLogger(__name__)

AnyResource: TypeAlias = Resource[Any, Any]
Guard: TypeAlias = Callable[["Pass"], SyncView | None]
"""Is asked between comparing and writing. It may raise, or answer with another view: then all is
compared with that in place of the first, and it is asked again."""


def in_order(resources: Iterable[AnyResource]) -> list[AnyResource]:
    """Return the resources, each after those it depends on; else in the order given.

    A name in ``after`` that is not composed is left out. Raises ValueError for a circle and for
    a name that is there twice.
    """
    known: dict[str, AnyResource] = {}
    for resource in resources:
        if resource.name in known:
            raise ValueError(f"two resources are named {resource.name!r}")
        known[resource.name] = resource
    graph = {one.name: [n for n in one.after if n in known] for one in known.values()}
    try:
        return [known[name] for name in TopologicalSorter(graph).static_order()]
    except CycleError as error:
        raise ValueError(f"resources depend on each other: {' -> '.join(error.args[1])}") from None


class Pass:
    """What one pass over ``view`` has found and done so far: changes and outcomes by name."""

    def __init__(self, view: SyncView | None, names: Iterable[str]) -> None:
        self.view, self.names = view, frozenset(names)
        self.changes: dict[str, Difference] = {}
        self.done: dict[str, Result] = {}

    def failed(self) -> dict[str, FlannelDPError]:
        """Return the errors by resource, without those that were skipped because of another."""
        return {
            name: outcome.error
            for name, outcome in self.done.items()
            if outcome.error is not None and not outcome.skipped
        }


class Reconciler:
    """The loop over one node's resources. The caller makes sure that one pass runs at a time."""

    def __init__(self, host: Host, resources: Iterable[AnyResource]) -> None:
        self.host = host
        self.resources = in_order(resources)
        self._by_name = {resource.name: resource for resource in self.resources}
        self._updated = [one for one in self.resources if type(one).update is not Resource.update]

    def __getitem__(self, name: str) -> AnyResource:
        return self._by_name[name]

    def compare(
        self,
        view: SyncView,
        only: Iterable[str] | None = None,
        guard: Guard = lambda found: None,
    ) -> Pass:
        """Compare every resource with what ``view`` wants of it; writes nothing.

        ``only`` names the resources to compare (default: all). ``guard`` may raise, or have all
        compared with another view.
        """
        names = frozenset(self._by_name if only is None else only)
        found = self._compare(view, names)
        while (instead := guard(found)) is not None:
            found = self._compare(instead, names)
        return found

    def _compare(self, view: SyncView, names: Collection[str]) -> Pass:
        found = Pass(view, names)
        for resource in self.resources:
            if resource.name in names:
                found.done[resource.name] = self._compared(found, resource)
        return found

    def sync(
        self,
        view: SyncView,
        *,
        guard: Guard = lambda found: None,
        only: Iterable[str] | None = None,
    ) -> Pass:
        """Run one pass: compare all, guard, apply in order, finish in reverse.

        Where ``guard`` raises nothing was written. Raises NotPermitted.
        """
        found = self.compare(view, only, guard)
        chosen = [one for one in self.resources if one.name in found.done]
        for resource in chosen:
            found.done[resource.name] = self._applied(found, resource)
        self._finish(found, reversed(chosen))
        return found

    def clean(self) -> Pass:
        """Return a pass in which nothing is wanted: all is compared, then removed in reverse order.

        A failure stops nothing. Raises NotPermitted.
        """
        found = Pass(None, self._by_name)
        for resource in self.resources:
            found.done[resource.name] = self._compared(found, resource)
        for resource in reversed(self.resources):
            found.done[resource.name] = self._attempt(found, resource)
        return found

    def update(self, changed: Any) -> dict[str, Result]:
        """Follow a change of peers in every resource that it concerns; raises NotPermitted."""
        done: dict[str, Result] = {}
        for resource in self._updated:
            failed = _failed_before(resource, done, self._by_name)
            if failed is not None:
                done[resource.name] = Result(error=failed, skipped=True)
                continue
            try:
                outcome = resource.update(self.host, changed, done)
            except FlannelDPError as error:
                self._check_rights(resource, error, done, self._by_name)
                outcome = Result(error=error)
            if outcome is not None:
                done[resource.name] = outcome
        return done

    def report_of(self, name: str, view: SyncView) -> Report:
        """Compare one resource, and those that it depends on for facts; return what it says of
        what it found. Writes nothing."""
        one, report = self[name], Report()
        found = self.compare(view, (*one.after, name))
        one.record(report, found.changes.get(name), found.done[name])
        return report

    def concerned(self, event: Any) -> list[str]:
        """Return the names of the resources that a kernel event is about."""
        return [one.name for one in self.resources if one.concerns(event)]

    # ---- one resource

    def _compared(self, found: Pass, resource: AnyResource) -> Result:
        """Compare one resource, with nothing wanted where there is no view.

        The outcome so far has its facts, or an error.
        """
        reason, view = None, found.view
        if view is not None:
            reason = _failed_before(resource, found.done, self._by_name) or _left_out(
                resource, view
            )
        if reason is not None:
            return Result(error=reason, skipped=True)
        try:
            desired = resource.desired(view) if view is not None else None
            change = resource.compare(self.host, desired, found.done)
        except FlannelDPError as error:
            self._check_rights(resource, error, found.done, found.names)
            found.changes.pop(resource.name, None)
            return Result(error=error)
        found.changes[resource.name] = change
        return Result(facts=change.facts)

    def _applied(self, found: Pass, resource: AnyResource) -> Result:
        """Apply one resource; compare it again first where one before it was disturbed."""
        failed = _failed_before(resource, found.done, self._by_name)
        if failed is not None:
            return Result(error=failed, skipped=True)
        if any(found.done[name].disturbs for name in resource.after if name in found.done):
            found.done[resource.name] = self._compared(found, resource)
        outcome = self._attempt(found, resource)
        if isinstance(outcome.error, DeviceGone) and resource.name in found.changes:
            log.info(
                "The device has gone while %(resource)s was written; comparing again",
                {"resource": resource.name},
            )
            for before in self._before(resource, found):
                found.done[before.name] = self._compared(found, before)
                found.done[before.name] = self._attempt(found, before)
            found.done[resource.name] = self._compared(found, resource)
            outcome = self._attempt(found, resource)
        return outcome

    def _before(self, resource: AnyResource, found: Pass) -> list[AnyResource]:
        """Return the resources of this pass that one depends on, in order."""
        names = {*resource.after} & {*found.done}
        return [one for one in self.resources if one.name in names]

    def _attempt(self, found: Pass, resource: AnyResource) -> Result:
        """Apply the change of a resource that could be compared."""
        compared = found.done[resource.name]
        if compared.error is not None:
            return compared
        change = found.changes[resource.name]
        if change.is_empty:
            return compared
        try:
            return resource.apply(self.host, change)
        except FlannelDPError as error:
            self._check_rights(resource, error, found.done, found.names)
            return replace(compared, error=error)  # what was read is still known

    def _finish(self, found: Pass, resources: Iterable[AnyResource]) -> None:
        for resource in resources:
            outcome, change = found.done[resource.name], found.changes.get(resource.name)
            if outcome.error is not None or change is None:
                continue
            try:
                resource.finish(self.host, change)
            except FlannelDPError as error:
                self._check_rights(resource, error, found.done, found.names)
                found.done[resource.name] = replace(outcome, error=error)

    def _check_rights(
        self, resource: AnyResource, error: FlannelDPError, done: Done, names: Collection[str]
    ) -> None:
        """Raise NotPermitted of a vital resource where no family is left: of one family it is an
        error like any other, and without the rights of a resource that is not vital, such as
        those that iptables or eBPF take, all else can be done."""
        if not (resource.vital and isinstance(error, NotPermitted)):
            return
        vital = [one for one in self.resources if one.vital and one.name in names]
        served = {number for one in vital for number in one.families}
        failed = {*resource.families}
        for one in vital:
            outcome = done.get(one.name)
            if outcome is not None and outcome.error is not None:
                failed |= {*one.families}
        if not resource.families or served <= failed:
            raise error


def _left_out(resource: AnyResource, view: SyncView) -> FlannelDPError | None:
    """Return why a resource is left as it is: none of its families can be synced now."""
    if not resource.families or any(one not in view.errors for one in resource.families):
        return None
    return view.errors[resource.families[0]]


def _failed_before(
    resource: AnyResource, done: Done, known: Mapping[str, AnyResource]
) -> FlannelDPError | None:
    """Return the error of a resource before this one that serves one of its families, or the
    node."""
    for name in resource.after:
        outcome = done.get(name)
        if outcome is None or outcome.error is None:
            continue
        serves = known[name].families
        if not serves or {*serves} & {*resource.families}:
            return outcome.error
    return None
