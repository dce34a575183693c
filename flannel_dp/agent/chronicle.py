"""What an agent remembers of its events: the latest for those that ask it, all in its history."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from flannel_dp.look.events import Event

if TYPE_CHECKING:
    from flannel_dp._core import Claims
    from flannel_dp.agent.history import History

#: So many repairs and rejected leases are told one by one.
MOST_REPAIRS, MOST_REJECTED = 10, 20

#: So many changes that come together are kept one by one, and of so many rejected leases the
#: reason in words.
MOST_KEPT, MOST_DETAILS = 256, 32


class Chronicle:
    """The latest repairs and the leases that are rejected now; with a ``history``, all events.

    Events come on the agent's thread, problems on any; all is read from any thread.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.history: History | None = None
        self.repairs: deque[Event] = deque(maxlen=MOST_REPAIRS)
        #: How many entries the last audit had to write; None where there was none.
        self.audited: int | None = None
        #: The first rejected leases of each family (0: unreadable), replaced as a whole.
        self.rejected: dict[int, tuple[Event, ...]] = {}

    def note(self, event: Event) -> None:
        """Keep an event, where events are kept."""
        if self.history is not None:
            self.history.note(event)

    def repaired(self, event: Event) -> None:
        """Note the repair of an entry."""
        self.repairs.append(event)
        self.note(event)

    def rejections(self, family: int, events: tuple[Event, ...]) -> None:
        """Note the first of the leases of one family that are rejected."""
        self.rejected = {**self.rejected, family: events}

    def peers(self, claims: Claims, cause: str) -> None:
        """Keep the list of all peers of a family, in place of single changes."""
        if self.history is not None:
            self.history.note_list(claims, cause)

    def problem(self, about: str, text: str | None) -> None:
        """Keep that a problem began, or with None that it ended. From any thread."""
        if self.history is not None:
            kind = "recovered" if text is None else "problem"
            self.history.note(Event(self.clock(), kind, problem=about, cause=text or ""))
            self.history.flush()

    def flush(self) -> None:
        """Have what was kept in this turn written."""
        if self.history is not None:
            self.history.flush()
