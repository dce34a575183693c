"""The one owner of an agent's list of problems: which there are, and which passes may end them.

A problem stays until a pass that looked for its kind finds none. What a pass looked for, its
report says (``Report.looked``); a repair of one family, or an update, ends nothing else.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from flannel_dp.agent.logs import FirstOfKind
from flannel_dp.agent.status import StatusBoard

if TYPE_CHECKING:
    from flannel_dp.reconcile.report import Report

log = logging.getLogger(__name__)

#: What a node needs beside its tables before pods may come.
HOST = frozenset({"firewall", "subnet file"})

#: What another pass may cure; all else waits for the next audit, or for another program.
_CURABLE = HOST | {"kernel", "program"}


class Problems:
    """The problems on ``board`` that passes find and end. For one thread."""

    def __init__(self, board: StatusBoard) -> None:
        self._board = board
        self._first = FirstOfKind(log)
        #: What of HOST is to be looked at, because nobody did yet or because it failed.
        self.owed = HOST

    def note(self, about: str, error: Exception | str | None) -> None:
        """Note a problem, or with None its end. Of one that keeps changing its words the log
        has the first in full, and then a count."""
        text = None if error is None else str(error)
        if self._board.problem(about, text):
            if text is None:
                self._first.recovered(about)
                log.info("problem=%s recovered", about)
            else:
                self._first.warning(about, "problem=%s error=%s", about, text)

    def note_report(self, report: Report) -> None:
        """Note what a pass has found, and the end of what it looked for and did not find."""
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
        """Whether a pass found what another one may cure."""
        return bool(report.failures or _CURABLE & {*problems_of(report)})


def problems_of(report: Report) -> dict[str, str]:
    """What a report says is wrong, by the names of ``Status.problems``."""
    found = {kind: str(error) for kind, error in report.problems.items()}
    if report.family_errors:
        found["kernel"] = str(next(iter(report.family_errors.values())))
    failing, conflicts = len(report.failures), len(report.conflicts)
    if failing or conflicts:
        text = f"{failing} entries failed, {conflicts} are in somebody else's place"
        if failing:
            text += f"; first: {report.failures[0].message()}"
        found["entries"] = text
    if report.blockers:
        found["forwarding"] = "; ".join(report.blockers)
    return found
