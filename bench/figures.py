"""What was measured, against what it should be: collected here, printed at the end."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One number. ``target`` is the most it should be, ``least`` the least; None where
    there is none."""

    name: str
    value: float
    unit: str
    target: float | None = None
    detail: str = ""
    least: float | None = None

    @property
    def verdict(self) -> str:
        """``PASS``, ``over``, ``under`` or, without a target, nothing."""
        if self.target is not None and self.value > self.target:
            return "over"
        if self.least is not None and self.value < self.least:
            return "under"
        return "" if self.target is None and self.least is None else "PASS"

    @property
    def aim(self) -> str:
        """What it should be: ``1.3``, ``at least 15``, ``0.95 to 1.1`` or nothing."""
        if self.least is None:
            return "" if self.target is None else f"{self.target:g}"
        if self.target is None:
            return f"at least {self.least:g}"
        return f"{self.least:g} to {self.target:g}"


class Figures:
    """The figures of one run."""

    def __init__(self) -> None:
        self.all: list[Figure] = []
        self._seconds: dict[tuple[str, int, int], float] = {}

    def add(self, benchmark: Any, figure: Figure) -> None:
        """Keep a figure, and store it in pytest-benchmark's JSON beside the timings."""
        self.all.append(figure)
        stored = benchmark.extra_info.setdefault("figures", {})
        stored[figure.name] = {
            "value": figure.value,
            "unit": figure.unit,
            "target": figure.target,
            "least": figure.least,
            "verdict": figure.verdict,
        }

    def remember(self, what: str, family: int, nodes: int, seconds: float) -> None:
        """Keep a time for figures that compare sizes (``compare``)."""
        self._seconds[what, family, nodes] = seconds

    def compare(
        self, what: str, family: int, small: int, large: int, *, per_node: bool
    ) -> float | None:
        """The time at ``large`` nodes in times that at ``small``; None if one is missing."""
        try:
            few, many = (self._seconds[what, family, nodes] for nodes in (small, large))
        except KeyError:
            return None
        return many / few * (small / large if per_node else 1.0)

    def lines(self) -> list[str]:
        """The table, aligned."""
        rows = [("figure", "value", "target", "", "")]
        for one in self.all:
            value = f"{one.value:.3g} {one.unit}"
            rows.append((one.name, value, one.aim, one.verdict, one.detail))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return [
            f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  "
            f"{row[3]:<{widths[3]}}  {row[4]}".rstrip()
            for row in rows
        ]


def times(benchmark: Any) -> list[float]:
    """Seconds of every round of a benchmark that has run."""
    return [float(one) for one in benchmark.stats.stats.data]


def median_ratio(ours: Sequence[float], floor: Sequence[float]) -> float:
    """The median of the ratios of rounds that ran side by side.

    The machine drifts: a ratio within a pair is worth more than a ratio of medians.
    """
    return statistics.median(a / b for a, b in zip(ours, floor, strict=True))
