"""What a live view reads, and when: overviews, and the events between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct, to_builtins

from flannel_dp.errors import FlannelDPError

if TYPE_CHECKING:
    from flannel_dp.look.show import Overview

#: Seconds between two readings of everything, at most and, however much happens, at least.
LOOK_SECONDS, LEAST_SECONDS = 10.0, 1.0

#: Seconds within which ``stop`` is asked again.
TICK = 0.5


_WORDS = {"repaired": "drift", "rejected": "rejection", "accepted": "rejection"}
_WORDS |= dict.fromkeys(("problem", "recovered"), "problem")
_WORDS |= dict.fromkeys(("started", "stopped"), "agent")


class DriftLine(Struct, frozen=True):
    """One thing that happened in the kernel, as a line to read.

    ``time`` is in seconds since the epoch, ``family`` 4 or 6 (0: neither, or both),
    ``table`` "route", "neighbour", .. (empty where it is none of them), ``change``
    one of "deleted", "changed", "foreign", "link" and "overrun". ``what`` says what it
    happened to, its key first: ``10.244.7.0/24 via 10.244.7.0 dev flannel.1``. ``told_by`` is
    "kernel", whose events do not say why something changed, or "agent", whose events do: there
    ``change`` is the kind of its event (:class:`flannel_dp.look.events.Event`), ``what`` a
    sentence.
    """

    time: float
    family: int
    table: str
    change: str
    what: str
    told_by: str = "kernel"

    @property
    def word(self) -> str:
        """What kind of line it is: the kernel's "change", or of the agent's events "drift" (another
        program's doing), "rejection", "problem" or "peer"."""
        return "change" if self.told_by == "kernel" else _WORDS.get(self.change, "peer")

    def __str__(self) -> str:
        family = f"ipv{self.family}" if self.family else ""
        if self.told_by == "agent":  # the sentence may begin with the word itself
            return clean(self.what.removeprefix(f"{self.word} "))
        return " ".join(filter(None, (family, self.table, self.change, clean(self.what))))

    def to_json(self) -> dict[str, Any]:
        """Plain values; the time is where the event is put."""
        return {name: value for name, value in to_builtins(self).items() if name != "time"}


Look = Callable[[], "Overview"]
#: Bits a second that a peer (MAC, family) was sent, and that came from it.
Rates = Mapping[tuple[str, int], tuple[float, float]]
Events = Callable[[float | None], "list[DriftLine]"]


#: Seconds that an event waits for earlier ones: an agent writes down what it did after it has.
HOLD_SECONDS = 0.5


class InOrder:
    """Events in the order of their times, from readers that learn of them sooner and later."""

    def __init__(self, events: Events, clock: Callable[[], float] = time.time) -> None:
        self._events, self._clock = events, clock
        self._held: list[DriftLine] = []

    def __call__(self, timeout: float | None) -> list[DriftLine]:
        """Wait up to ``timeout`` seconds and return those that no other can come before."""
        if self._held:
            due = self._held[0].time + HOLD_SECONDS - self._clock()
            timeout = max(0.0, due if timeout is None else min(timeout, due))
        self._held += self._events(timeout)
        self._held.sort(key=lambda event: event.time)
        now = self._clock()
        ripe = [event for event in self._held if abs(now - event.time) >= HOLD_SECONDS]
        if ripe:
            self._held = [event for event in self._held if abs(now - event.time) < HOLD_SECONDS]
        return ripe

    def rest(self) -> list[DriftLine]:
        """Return what waits, without waiting."""
        held, self._held = self._held, []
        return held


class Turn(Struct):
    """What came within one wait: events, and a new overview or why there is none."""

    events: Sequence[DriftLine] = ()
    overview: Overview | None = None
    error: FlannelDPError | None = None


def turns(
    look: Look, events: Events, stop: Callable[[], bool], clock: Callable[[], float]
) -> Iterator[Turn]:
    """Wait and look, for ever. Looking takes a fifth of the time at most."""
    started = clock()
    yield Turn(overview=look())
    took = clock() - started
    looked = clock()
    due = looked + LOOK_SECONDS
    while not stop():
        came = events(max(0.0, min(TICK, due - clock())))
        if came:
            due = min(due, looked + max(LEAST_SECONDS, 4 * took))
        turn = Turn(came)
        started = clock()
        if started >= due:
            try:
                turn.overview = look()
            except FlannelDPError as error:
                turn.error = error
            looked = clock()
            took = looked - started
            due = looked + LOOK_SECONDS
        yield turn


def timestamp(seconds: float, precision: str = "seconds") -> str:
    """Return a time in the form of RFC 3339, in UTC."""
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec=precision)[:-6] + "Z"


def clean(text: str) -> str:
    """Return text that cannot steer a terminal: the kernel takes any byte in a device's name."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
