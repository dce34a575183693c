"""How a cost grows: the exponent of seconds against nodes, and a curve to look beyond.

``power`` fits seconds = factor * nodes ** exponent by least squares of the logarithms
over every round; the exponent is 1 for what is linear, 2 for what is quadratic.
``curve`` fits seconds = a * nodes + b * nodes ** 2, which is the shape of "each entry
costs something, and something more for every entry before it"; beyond what was
measured it is the better guess, as a power that was fitted where the linear part still
counts grows too slowly. It is a low guess even so: what has to be walked gets slower
where it no longer fits the processor's caches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Point = tuple[float, float]
"""Nodes and seconds."""

#: Sizes that differ which a fit takes: two always lie on a line.
LEAST_SIZES = 3

# Student's t, two-sided 95 %, for 1 to 30 degrees of freedom.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_NORMAL95 = 1.960


@dataclass(frozen=True)
class Power:
    """seconds = ``factor`` * nodes ** ``exponent``; ``low`` and ``high`` bound the exponent
    with 95 % confidence, as far as rounds are independent."""

    factor: float
    exponent: float
    low: float
    high: float
    smallest: float
    largest: float

    def at(self, nodes: float) -> float:
        """Seconds at ``nodes``."""
        return float(self.factor * nodes**self.exponent)

    def __str__(self) -> str:
        return (
            f"{self.low:.2f} to {self.high:.2f} with 95 % confidence, "
            f"from {self.smallest:,.0f} to {self.largest:,.0f} nodes"
        )


@dataclass(frozen=True)
class Curve:
    """seconds = ``linear`` * nodes + ``quadratic`` * nodes ** 2, neither negative."""

    linear: float
    quadratic: float

    def at(self, nodes: float) -> float:
        """Seconds at ``nodes``."""
        return self.linear * nodes + self.quadratic * nodes * nodes


def power(points: Iterable[Point]) -> Power:
    """The exponent of a cost. Raises ValueError for fewer than three different sizes, or
    for sizes or seconds that are not positive."""
    data = _checked(points)
    xs = [math.log(nodes) for nodes, _ in data]
    ys = [math.log(seconds) for _, seconds in data]
    mean_x, mean_y = math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)
    spread = math.fsum((x - mean_x) ** 2 for x in xs)
    exponent = math.fsum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    start = mean_y - exponent * mean_x
    left = math.fsum((y - start - exponent * x) ** 2 for x, y in zip(xs, ys, strict=True))
    freedom = len(xs) - 2
    margin = _t95(freedom) * math.sqrt(left / freedom / spread)
    sizes = [nodes for nodes, _ in data]
    return Power(
        math.exp(start), exponent, exponent - margin, exponent + margin, min(sizes), max(sizes)
    )


def curve(points: Iterable[Point]) -> Curve:
    """Linear and quadratic part, by least squares of the relative error, so that small sizes
    count as much as large ones. Raises ValueError as ``power`` does."""
    data = _checked(points)
    # seconds / nodes = linear + quadratic * nodes, weighted by nodes / seconds.
    weights = [(nodes / seconds) ** 2 for nodes, seconds in data]
    total = math.fsum(weights)
    rates = [seconds / nodes for nodes, seconds in data]
    mean_x = math.fsum(w * n for w, (n, _) in zip(weights, data, strict=True)) / total
    mean_y = math.fsum(w * r for w, r in zip(weights, rates, strict=True)) / total
    spread = math.fsum(w * (n - mean_x) ** 2 for w, (n, _) in zip(weights, data, strict=True))
    product = math.fsum(
        w * (n - mean_x) * (r - mean_y) for w, (n, _), r in zip(weights, data, rates, strict=True)
    )
    quadratic = product / spread
    linear = mean_y - quadratic * mean_x
    if quadratic < 0:
        return Curve(mean_y, 0.0)
    if linear < 0:
        squares = math.fsum(w * n * n for w, (n, _) in zip(weights, data, strict=True))
        return Curve(
            0.0,
            math.fsum(w * n * r for w, (n, _), r in zip(weights, data, rates, strict=True))
            / squares,
        )
    return Curve(linear, quadratic)


def relevant(points: Sequence[Point], least: float) -> list[Point]:
    """The points that tell how a cost grows: those of ``least`` nodes and more, or, where
    these are of too few sizes, those of the three largest sizes.

    Below some hundred nodes it is the start of a program that is measured.
    """
    sizes = sorted({nodes for nodes, _ in points})
    large = [nodes for nodes in sizes if nodes >= least]
    kept = large if len(large) >= LEAST_SIZES else sizes[-LEAST_SIZES:]
    return [point for point in points if point[0] in kept]


def _checked(points: Iterable[Point]) -> list[Point]:
    data = list(points)
    for nodes, seconds in data:
        if not (nodes > 0 and seconds > 0 and math.isfinite(nodes) and math.isfinite(seconds)):
            raise ValueError(f"{seconds} s for {nodes} nodes: both have to be positive")
    sizes = {nodes for nodes, _ in data}
    if len(sizes) < LEAST_SIZES:
        raise ValueError(
            f"{len(sizes)} different sizes are too few: a fit takes {LEAST_SIZES}, two always fit"
        )
    return data


def _t95(freedom: int) -> float:
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    return _NORMAL95 + 2.4 / freedom
