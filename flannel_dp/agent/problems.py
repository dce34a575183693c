"""The owner of an agent's problems: which there are, and which passes may end them.

A problem stays until a pass that checked for its kind finds none. ``Report.looked`` says what
a pass checked; a repair of one family, or an update, ends nothing else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from flannel_dp.agent.logs import FirstOfKind, in_words
from flannel_dp.agent.status import StatusBoard
from flannel_dp.tables.describe import describe

if TYPE_CHECKING:
    from flannel_dp.reconcile.report import Report

log = logging.getLogger(__name__)

#: What a node needs beside its tables before pods may come.
HOST = frozenset({"firewall", "subnet file"})

#: What another pass may cure; all else waits for the next audit, or for another program.
_CURABLE = HOST | {"kernel", "program"}


class Problems:
    """The problems on ``board``, as they begin and end. What passes find is for one thread."""

    def __init__(self, board: StatusBoard, clock: Callable[[], float] = time.monotonic) -> None:
        self._board, self._clock = board, clock
        self._first = FirstOfKind(log)
        #: What of HOST is to be checked: no pass has yet, or it failed.
        self.owed = HOST

    def note(self, about: str, error: Exception | str | None, *, told: bool = False) -> bool:
        """Note a problem, or with None its end. The log has its beginning in full, unless the
        caller has ``told`` it, and its end with its length, and of one that keeps changing its
        words now and then a count. Return False where nothing has changed."""
        text = None if error is None else str(error)
        if not self._board.problem(about, text):
            return False
        if text is not None:
            self._board.began.setdefault(about, self._clock())
            if not told:
                self._first.warning(
                    about, "Problem (%(problem)s): %(error)s", {"problem": about, "error": text}
                )
            return True
        failures = self._first.recovered(about)
        seconds = self._clock() - self._board.began.pop(about, self._clock())
        log.info(
            "Problem (%(problem)s) ended after %(length)s",
            {
                "problem": about,
                "length": in_words(seconds),
                "seconds": f"{seconds:.3f}",
                "failures": failures,
            },
        )
        return True

    def note_report(self, report: Report) -> None:
        """Note what a pass has found, and the end of what it checked for and did not find."""
        found = problems_of(report)
        for about in sorted(report.looked | {*found}):
            self.note(about, found.get(about))
        self.owed = (self.owed - report.looked) | (HOST & {*found})
        if report.family_errors:  # the rules and addresses of a family that comes back are new
            self.owed |= HOST

    @property
    def open(self) -> bool:
        """Whether another pass may cure something."""
        return bool(self.owed or _CURABLE & {*self._board.status.problems})

    def cures(self, report: Report) -> bool:
        """Return whether a pass found what another one may cure."""
        return bool(report.failures or _CURABLE & {*problems_of(report)})


def _entries(report: Report) -> Iterator[str]:
    """Yield how many entries failed and how many conflict with foreign ones, with the first of
    each."""
    names = report.names
    if failing := len(report.failures):
        words = "1 entry failed" if failing == 1 else f"{failing} entries failed, the first"
        yield f"{words}: {report.failures[0].message(names)}"
    if conflicts := len(report.conflicts):
        wanted, foreign = (describe(entry, names) for entry in report.conflicts[0])
        words = (
            "1 entry conflicts with a foreign one"
            if conflicts == 1
            else f"{conflicts} entries conflict with foreign ones, the first"
        )
        yield f"{words}: {wanted} (foreign: {foreign})"


def problems_of(report: Report) -> dict[str, str]:
    """Return what a report says is wrong, by the names of ``Status.problems``."""
    found = {kind: str(error) for kind, error in (report.tolerated | report.problems).items()}
    if report.family_errors:
        found["kernel"] = str(next(iter(report.family_errors.values())))
    if report.failures or report.conflicts:
        found["entries"] = "; ".join(_entries(report))
    if report.blockers:
        found["forwarding"] = "; ".join(report.blockers)
    for family, diverted in report.diversions.items():
        if diverted:
            found[f"path{family}"] = "; ".join(map(str, diverted))
    return found
