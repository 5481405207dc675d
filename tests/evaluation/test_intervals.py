import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kclib.evaluation import _intervals

Z = stats.norm.ppf(0.975)


def tango(b: int, c: int, n: int) -> tuple[float, float]:
    """Return Tango's interval of (b - c) / n by his closed form of the constrained estimate."""

    def held(difference: float) -> bool:
        first = 2 * n
        second = -b - c + (2 * n - b + c) * difference
        third = -c * difference * (1 - difference)
        q = (np.sqrt(second**2 - 4 * first * third) - second) / (2 * first)
        variance = n * (2 * q + difference * (1 - difference))
        return (b - c - n * difference) ** 2 <= Z**2 * variance

    ends = []
    for limit in (-1, 1):
        inside, outside = (b - c) / n, limit
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if held(middle) else (inside, middle)
        ends.append(inside)
    return tuple(ends)


def paired(b: int, c: int, n: int) -> tuple[float, float]:
    return _intervals.of_mean([-1, 0, 1], [c, n - b - c, b], -1, 1)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_of_three_values_it_is_tangos(b, c, rest):
    n = b + c + rest
    if n:
        assert paired(b, c, n) == pytest.approx(tango(b, c, n), abs=1e-8)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.integers(0, 1000))
def test_of_two_values_it_is_wilsons(hits, misses):
    if n := hits + misses:
        ends = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
        assert _intervals.of_mean([0, 1], [misses, hits], 0, 1) == pytest.approx(
            (ends.low, ends.high), abs=1e-9
        )


def test_a_published_example_comes_out():
    # Fagerland, Lydersen and Laake (2014): airway hyper-responsiveness of 21 children, 1 1 / 7 12
    assert paired(7, 1, 21) == pytest.approx((0.026, 0.517), abs=5e-4)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 30), min_size=5, max_size=5).filter(any), st.floats(0.5, 3))
def test_it_holds_the_mean_within_the_limits_and_has_a_width(counts, scale):
    values = scale * np.arange(-2, 3)
    low, high = _intervals.of_mean(values, counts, -2 * scale, 2 * scale)
    mean = np.average(values, weights=counts)
    assert -2 * scale <= low <= mean + 1e-9
    assert mean - 1e-9 <= high <= 2 * scale
    assert high - low > 0.1 * scale
    turned = _intervals.of_mean(values, counts[::-1], -2 * scale, 2 * scale)
    assert turned == pytest.approx((-high, -low), abs=1e-8)


def test_of_many_values_it_is_students():
    values = np.random.default_rng(0).integers(-2, 3, 4000)
    kinds, counts = np.unique(values, return_counts=True)
    ends = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert _intervals.of_mean(kinds, counts, -2, 2) == pytest.approx((ends.low, ends.high), abs=1e-3)


@pytest.mark.parametrize("mean", [0.02, 0.3, 0.5])
def test_it_holds_the_true_mean_as_often_as_it_says(mean):
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        b, c, rest = rng.multinomial(40, [mean + 0.05, 0.05, 0.9 - mean])
        low, high = paired(b, c, b + c + rest)
        held += low <= mean <= high
    assert 0.92 <= held / 400 <= 0.99
