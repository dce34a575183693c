"""bench/linear.py: the exponents of costs that are known."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import linear

_SIZES = (1_000, 3_000, 10_000, 50_000)


@given(
    factor=st.floats(1e-9, 1e-2),
    exponent=st.floats(0.0, 3.0),
    rounds=st.integers(1, 4),
)
def test_power_of_exact_data_is_found(factor: float, exponent: float, rounds: int) -> None:
    data = [(n, factor * n**exponent) for n in _SIZES for _ in range(rounds)]

    fit = linear.power(data)

    assert fit.exponent == pytest.approx(exponent, abs=1e-9)
    assert fit.factor == pytest.approx(factor, rel=1e-6)
    assert fit.at(20_000) == pytest.approx(factor * 20_000**exponent, rel=1e-6)
    assert (fit.smallest, fit.largest) == (1_000, 50_000)


def test_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = random.Random(7)
    trials, inside = 400, 0
    for _ in range(trials):
        data = [(n, 1e-5 * n * math.exp(rng.gauss(0, 0.1))) for n in _SIZES for _ in range(3)]
        fit = linear.power(data)
        inside += fit.low <= 1.0 <= fit.high

    assert 0.91 * trials <= inside <= 0.99 * trials


def test_interval_widens_with_noise() -> None:
    rng = random.Random(3)
    noise = [rng.gauss(0, 1) for _ in range(4 * len(_SIZES))]

    def width(scale: float) -> float:
        sizes = [n for n in _SIZES for _ in range(4)]
        fit = linear.power(
            (n, 1e-5 * n * math.exp(scale * e)) for n, e in zip(sizes, noise, strict=True)
        )
        return fit.high - fit.low

    assert width(0.0) == pytest.approx(0, abs=1e-6)
    assert width(0.2) == pytest.approx(2 * width(0.1))


def test_few_degrees_of_freedom_mean_a_wide_interval() -> None:
    data = [(1.0, 1.0), (math.e, math.e * 1.1), (math.e**2, math.e**2)]

    fit = linear.power(data)

    # By hand: residuals -h/3, 2h/3, -h/3 with h = ln 1.1, spread 2, Student's t(1) = 12.706.
    residual = math.sqrt(math.log(1.1) ** 2 * 6 / 9 / 2)
    assert fit.exponent == pytest.approx(1.0)
    assert fit.high - fit.exponent == pytest.approx(12.706 * residual, rel=1e-6)


@given(
    linear_part=st.floats(1e-7, 1e-3),
    quadratic_part=st.floats(0, 1e-7),
)
def test_curve_of_exact_data_is_found(linear_part: float, quadratic_part: float) -> None:
    def cost(n: float) -> float:
        return linear_part * n + quadratic_part * n * n

    fit = linear.curve([(n, cost(n)) for n in _SIZES])

    assert fit.at(100_000) == pytest.approx(cost(100_000), rel=1e-6)
    assert fit.at(10) == pytest.approx(cost(10), rel=1e-3)


def test_curve_has_no_negative_part() -> None:
    flattening = linear.curve([(n, 1e-4 * n**0.8) for n in _SIZES])
    cubic = linear.curve([(n, 1e-12 * n**3) for n in _SIZES])

    assert flattening.quadratic == 0
    assert flattening.linear > 0
    assert cubic.linear == 0
    assert cubic.quadratic > 0


@pytest.mark.parametrize("fit", [linear.power, linear.curve])
@pytest.mark.parametrize(
    "data",
    [
        [],
        [(1_000, 0.1)],
        [(1_000, 0.1), (2_000, 0.2)],
        [(1_000, 0.1), (1_000, 0.11), (2_000, 0.2), (2_000, 0.21)],
    ],
    ids=["none", "one", "two", "two sizes"],
)
def test_too_few_sizes_are_refused(fit: object, data: list[linear.Point]) -> None:
    assert callable(fit)
    with pytest.raises(ValueError, match="different sizes are too few"):
        fit(data)


@pytest.mark.parametrize("bad", [(0, 0.1), (-5, 0.1), (10, 0.0), (10, -1.0), (10, math.inf)])
def test_what_has_no_logarithm_is_refused(bad: linear.Point) -> None:
    with pytest.raises(ValueError, match="have to be positive"):
        linear.power([(1, 1), (2, 2), (3, 3), bad])


def test_relevant_points_are_the_large_ones() -> None:
    data = [(n, n / 1e6) for n in (100, 300, 1_000, 3_000, 10_000)]

    assert [n for n, _ in linear.relevant(data, 1_000)] == [1_000, 3_000, 10_000]
    # A peer that stops at 3,000 is fitted to its three largest sizes.
    assert [n for n, _ in linear.relevant(data[:4], 1_000)] == [300, 1_000, 3_000]
