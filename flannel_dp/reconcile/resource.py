"""The protocol of everything that this node holds: one resource, one module.

::

    desired -> compare -> apply -> finish     sync and resync; a plan is the same without writing
    update                                    a few peers changed; nothing is read
    watched, concerns                         the kernel's events
    compare with None -> apply -> finish      clean: a pass in which nothing is wanted

``desired`` is pure, ``compare`` is the only reader, ``apply`` and ``finish`` are the only writers.
The loop over resources (:mod:`flannel_dp.reconcile.reconciler`) keeps the rules, so that no
resource has to: what is read first, what is written in which order, what a failure stops.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from msgspec import Struct, field

from flannel_dp.errors import FlannelDPError, KernelError
from flannel_dp.later import Later
from flannel_dp.reconcile.report import Report, Written

if TYPE_CHECKING:
    from flannel_dp._core import Table
    from flannel_dp.kernel import host as hosting
    from flannel_dp.tables.entries import Scope
else:
    hosting = Later("flannel_dp.kernel.host")


class SyncView(Protocol):
    """What a pass is about: the facts of this node, and the families that have none."""

    @property
    def errors(self) -> Mapping[int, FlannelDPError]:
        """Why a family (4 or 6) cannot be synced now; it is left as it is."""
        ...


class Difference(Protocol):
    """The difference of one resource: what ``apply`` will write and a plan prints."""

    @property
    def is_empty(self) -> bool:
        """Whether ``apply`` has nothing to do."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the kernel holds that resources after this one compare by (an ifindex, a map)."""
        ...

    def lines(self) -> Iterator[str]:
        """Return one line for each entry: ``+`` added, ``~`` replaced, ``-`` removed."""
        ...


class Result(Struct, frozen=True):
    """What became of one resource in one pass.

    ``disturbs``: resources after this one have to be compared again, because what they read or
    want depends on what was written here. ``error`` is why it failed, ``skipped`` says that it
    was not tried because of a resource before it. ``facts`` are for the resources after it, as
    those of the change. ``warnings`` are for people, ``part`` is this
    resource's part of the report.
    """

    disturbs: bool = False
    error: FlannelDPError | None = None
    skipped: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    part: Report | Written | None = None


class ScopedTable(Protocol):
    """A table and the part of the kernel's that it is the whole of."""

    @property
    def table(self) -> Table: ...
    @property
    def scopes(self) -> tuple[Scope, ...]: ...


class Unfinished(Exception):
    """What a resource had is gone, and what was to replace it could not be made: ``reason`` says
    why. Ends the pass, as only the caller knows what there was before."""

    def __init__(self, reason: KernelError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class FiltersChanged(Struct, frozen=True):
    """A kernel event: filters or qdiscs of the device ``index`` came, went or changed."""

    index: int


Done = Mapping[str, Result]
"""The outcomes of a pass so far, by the resource's name. While everything is compared there are
only facts in them."""

D = TypeVar("D")
C = TypeVar("C", bound=Difference)


class Resource(Generic[D, C]):
    """Something that this node holds and that a pass keeps equal to what is wanted.

    ``name`` stands in plans, reports, problems and logs. ``after`` are the resources that this one
    depends on: it is written after them and removed before them. ``families`` are those (4, 6) it
    serves, none for a resource that serves the node as a whole. ``vital``: when it fails its
    families are out of sync; else the failure is a problem of its own in the report.
    """

    name: str = ""
    after: tuple[str, ...] = ()
    families: tuple[int, ...] = ()
    vital: bool = False

    def desired(self, view: Any) -> D | None:
        """Return what this node should hold, from the facts alone. Reads nothing. None: nothing."""
        raise NotImplementedError

    def compare(self, host: hosting.Host, desired: D | None, done: Done) -> C:
        """Read what the node holds and compare. The only reader; writes nothing.

        Raises FlannelDPError where it cannot be read.
        """
        raise NotImplementedError

    def apply(self, host: hosting.Host, change: C) -> Result:
        """Write the difference. The only writer, beside ``finish``. Raises FlannelDPError."""
        raise NotImplementedError

    # ---- with defaults

    def finish(self, host: hosting.Host, change: C) -> None:
        """Remove what may go only after the resources that depend on this one have changed.

        Called in reverse order when everything was applied. Raises FlannelDPError.
        """

    def update(self, host: hosting.Host, changed: Any, done: Done) -> Result | None:
        """Follow a change of a few peers, at a cost that does not grow with the cluster.

        None: the change does not concern this resource.
        """
        return None

    def watched(self) -> Iterable[ScopedTable]:
        """Return the tables, as they were written last, whose events are compared entry by
        entry."""
        return ()

    def concerns(self, event: Any) -> bool:
        """Return whether any other kernel event is about this resource. Without it an audit sees
        it."""
        return False

    def record(self, report: Report, change: C | None, outcome: Result) -> None:
        """Add what was done and what went wrong to the report."""
        report.warnings += outcome.warnings
        if outcome.part is not None:
            outcome.part.add_to(report)
        if outcome.error is None or outcome.skipped:
            return
        if self.vital:
            for number in self.families:
                report.family_errors.setdefault(number, outcome.error)
        else:
            report.problems[self.name] = outcome.error
