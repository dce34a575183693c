"""What sync, clean and plan print for people, and the progress bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from flannel_dp.look.terminal import Paint, columns, count
from flannel_dp.reconcile.plan import ORDER
from flannel_dp.tables.describe import describe

if TYPE_CHECKING:
    from flannel_dp.reconcile.plan import Plan
    from flannel_dp.reconcile.report import Report

#: Rejected leases and failures beyond this many are counted; the JSON has them all.
LISTED = 20

_SIGNS = {"+": "green", "~": "yellow", "-": "red", "!": "red"}
_WORDS = ("added", "replaced", "removed", "unchanged", "failed")


def section(title: str, lines: Sequence[str], *, limit: int = LISTED) -> Iterator[str]:
    """Yield a title and indented lines, at most ``limit`` of them and a count of the rest."""
    if not lines:
        return
    yield title
    yield from (f"  {line}" for line in lines[:limit])
    if len(lines) > limit:
        yield f"  ... and {len(lines) - limit} more (--output json has all)"


def rejected_lines(rejected: Sequence[Any], paint: Paint) -> Iterator[str]:
    """Rejected leases: name, family, reason code, and the reason in words."""
    if not rejected:
        return
    first = [
        (one.lease, f"IPv{one.family}" if one.family else "", str(one.reason), one.detail)
        for one in rejected[:LISTED]
    ]
    yield paint(f"rejected leases ({len(rejected)}):", "yellow")
    yield from columns(first, indent="  ")
    if len(rejected) > LISTED:
        yield f"  ... and {len(rejected) - LISTED} more (--output json has all)"


def counts_lines(tables: dict[str, dict[str, int]]) -> Iterator[str]:
    """Return tables as rows, what became of their entries as columns."""
    rows: list[tuple[str, ...]] = [("", *_WORDS)]
    for kind in reversed(ORDER):
        if kind == "peer" and not any(tables[kind].values()):
            continue  # entries of eBPF's map, which a node without it has none of
        rows.append((kind, *(str(tables[kind].get(word, 0)) for word in _WORDS)))
    return columns(rows, right=range(1, 6))


def report_lines(
    report: Report, verdict: str, paint: Paint, *, allowed: bool = False
) -> Iterator[str]:
    """Yield what a sync or a clean did; ``verdict`` is the word for success, which it is also with
    conflicts and failures that are ``allowed``."""
    names = report.names
    yield from counts_lines(report.tables)
    for device in report.devices:
        if device.action != "none":
            yield f"device {device.name}: {', '.join(device.changes) or device.action}"
    if report.rules:
        for line in report.rules.changes:
            yield f"firewall {report.rules.engine}: {line}".replace("firewall :", "firewall:")
    yield from (f"counters {name}: {what}" for name, what in report.counters.items())
    if report.subnet_file:
        yield f"{report.subnet_file}: written"
    yield from rejected_lines(report.rejected, paint)
    conflicts = [
        f"{describe(wanted, names)}: conflicts with an existing {type(foreign).__name__.lower()} "
        f"(not ours): {describe(foreign, names)}; remove it or change the lease"
        for wanted, foreign in report.conflicts
    ]
    yield from section(paint(f"conflicts ({len(conflicts)}):", "red"), conflicts)
    failures = [f"IPv{number}: {error}" for number, error in report.family_errors.items()]
    failures += [f"{what}: {error}" for what, error in report.problems.items()]
    failures += [outcome.message(names) for outcome in report.failures]
    yield from section(paint(f"failures ({len(failures)}):", "red"), failures)
    yield from section(paint("warnings:", "yellow"), report.warnings)
    yield _verdict(report, verdict, len(failures), paint, allowed=allowed)


def _verdict(report: Report, verdict: str, failures: int, paint: Paint, *, allowed: bool) -> str:
    devices = sum(device.action != "none" for device in report.devices)
    changes = [f"{count(report.writes, 'entry', 'entries')} changed"] if report.writes else []
    if devices:
        changes.append(count(devices, "device"))
    if report.rules and report.rules.changes:
        changes.append(count(len(report.rules.changes), "firewall change"))
    if report.counters:
        changes.append(f"counters of {count(len(report.counters), 'device')}")
    changes = changes or ["nothing else to change" if report.subnet_file else "nothing to change"]
    if report.rejected:
        changes.append(f"{count(len(report.rejected), 'lease')} rejected")
    took = f"{report.seconds['total']:.3f} s"
    if report.ok:
        return f"{paint(verdict, 'green')}: {', '.join(changes)}, {took}"
    wrong = [
        count(number, word)
        for number, word in ((len(report.conflicts), "conflict"), (failures, "failure"))
        if number
    ]
    if allowed:
        but = f"{paint(verdict, 'yellow')} but for {' and '.join(wrong)}"
        return f"{but}: {', '.join(changes)}, {took}"
    return f"{paint('not ' + verdict, 'red')}: {' and '.join(wrong)}; {', '.join(changes)}, {took}"


def plan_lines(plan: Plan, paint: Paint) -> Iterator[str]:
    """Yield a plan: one line per operation, then counts, rejected leases, warnings and a
    verdict."""
    if plan.forwarding:
        yield plan.forwarding
    for line in plan.lines():
        yield paint(line[0], _SIGNS[line[0]]) + line[1:]
    yield plan.summary()
    yield from rejected_lines(plan.rejected, paint)
    failing = plan.failing()
    yield from section(paint(f"sync would fail at ({len(failing)}):", "red"), failing)
    yield from section(paint("warnings:", "yellow"), plan.warnings)
    conflicts = len(plan.conflicts())
    if conflicts:
        yield f"{paint('!', 'red')} {count(conflicts, 'conflict')}: left out, see the lines above"
    if plan.is_empty:
        yield "nothing to do" if plan.ok else "nothing would be written, and not all is in sync"
    else:
        yield "nothing was changed: this is what sync would do"


class ProgressBar:
    """Called with ``(done, total)``; shows a bar on a terminal after the first second, if rich is
    installed."""

    def __init__(self, delay: float = 1.0) -> None:
        self._due = time.monotonic() + delay
        self._on = sys.stderr is not None and sys.stderr.isatty()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        if not self._on or (self._bar is None and time.monotonic() < self._due):
            return
        if self._bar is None:
            try:
                self._bar = _bar()
            except ModuleNotFoundError:  # the extra [live]
                self._on = False
                return
            self._task = self._bar.add_task("entries", total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total)


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
        transient=True,
    )
