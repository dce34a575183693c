"""What ``show --watch`` reads, step by step, and what it writes and draws of that."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from msgspec.structs import replace

from flannel_dp.look.live_show import DriftLine, watch_json, watch_view
from flannel_dp.look.show import FamilyView, Overview, PeerView
from flannel_dp.resources.device.view import DeviceView
from tests.lib.stand_ins import Screen

NEW_YEAR = 1767225600.25  # 2026-01-01T00:00:00.25Z
DEVICE = DeviceView("flannel.1", 7, True, 1, 8472, "192.0.2.1", "eth0", 1450, "02:00:00:00:00:01")


def peer(number: int, **changes: Any) -> PeerView:
    view = PeerView(
        f"10.244.{number}.0/24",
        f"10.244.{number}.0",
        f"02:00:00:00:00:{number:02x}",
        f"192.0.2.{number}",
    )
    return replace(view, **changes)


def overview(*peers: PeerView, **changes: Any) -> Overview:
    family = FamilyView(4, "10.244.0.0/16", DEVICE, peers)
    return Overview((replace(family, **changes),))


def drift(what: str, change: str = "deleted", table: str = "route", family: int = 4) -> DriftLine:
    return DriftLine(NEW_YEAR, family, table, change, what)


Step = list[DriftLine] | float | BaseException


class Script:
    """What happens, step by step: events, seconds in which nothing does, an error.

    It is over when it was played; ``looks`` are answered in order, the last for ever.
    """

    def __init__(
        self, looks: Sequence[Overview | BaseException], steps: Iterable[Step] = ()
    ) -> None:
        self._looks, self._steps = [*looks], [*steps]
        self.now = 0.0
        self.looked: list[float] = []
        self.timeouts: list[float | None] = []

    def read(self) -> Overview:
        self.looked.append(self.now)
        found = self._looks.pop(0) if len(self._looks) > 1 else self._looks[0]
        if isinstance(found, BaseException):
            raise found
        return found

    def events(self, timeout: float | None) -> list[DriftLine]:
        self.timeouts.append(timeout)
        assert timeout is not None
        step = self._steps[0]
        if isinstance(step, float):
            spent = min(step, timeout)
            self.now += spent
            self._steps[0] = step - spent
            if step - spent < 1e-9:
                self._steps.pop(0)
            return []
        self._steps.pop(0)
        if isinstance(step, BaseException):
            raise step
        return step

    def stop(self) -> bool:
        return not self._steps

    def clock(self) -> float:
        return self.now


def lines_of(script: Script) -> list[str]:
    file = io.StringIO()
    watch_view(script.read, script.events, file=file, stop=script.stop)
    return file.getvalue().splitlines()


def frames_of(
    script: Script,
    *,
    width: int = 100,
    height: int = 30,
    keys: Sequence[list[str]] = (),
    **options: Any,
) -> list[list[str]]:
    """What was drawn, each time as a whole; ``keys`` are typed one turn after the other."""
    drawn = drawings_of(script, Screen(width, height, keys), **options)
    return [[text for text, _ in rows] for rows in drawn]


def drawings_of(script: Script, screen: Screen, **options: Any) -> list[list[tuple[str, str]]]:
    watch_view(
        script.read,
        script.events,
        terminal=screen,
        stop=script.stop,
        clock=script.clock,
        **options,
    )
    return screen.drawn


def json_of(script: Script) -> list[dict[str, Any]]:
    file = io.StringIO()
    watch_json(script.read, script.events, file=file, stop=script.stop, clock=script.clock)
    return [json.loads(line) for line in file.getvalue().splitlines()]


def plain(seen: Overview) -> object:
    """What a program reads of it."""
    return json.loads(json.dumps(seen.to_json()))
