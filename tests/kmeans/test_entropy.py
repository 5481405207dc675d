from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats
from hypothesis import example, given, settings
from partitions import assert_same_bits, heavy_tailed, uneven
from scipy.spatial.distance import cdist

from kclib import kmeans
from kclib.errors import InvalidValueError
from kclib.kmeans import _entropy

WEIGHTS = st.sampled_from(["none", "uneven", "zeros"])


def weights_of(kind, n, seed=0):
    if kind == "none":
        return None
    sample_weight = np.square(uneven(n, seed))
    if kind == "zeros":
        sample_weight[1::3] = 0
    return sample_weight


def costs_of(points, centres, labels, price, sample_weight):
    """Return inertia, bits and each point's cost at each centre ``(n, K)``, in float64, unframed."""
    sample_weight = np.ones(len(points)) if sample_weight is None else sample_weight.astype(np.float64)
    squares = cdist(points.astype(np.float64), centres.astype(np.float64), "sqeuclidean")
    counts = np.bincount(labels)
    inertia = sample_weight @ squares[np.arange(len(points)), labels]
    bits = len(points) * scipy.stats.entropy(counts, base=2)
    return inertia, bits, sample_weight[:, None] * squares - price * np.log2(counts / len(points))


def after_a_round(points, centres, labels, price, sample_weight):
    """Return the cost of a partition after one round, point by point and cluster by cluster."""
    points = points.astype(np.float64)
    costs = costs_of(points, centres, labels, price, sample_weight)[2]
    cheapest = costs <= costs.min(1, keepdims=True)  # several, for a point of weight 0: then the nearest
    chosen = np.where(cheapest, cdist(points, centres.astype(np.float64)), np.inf).argmin(1)
    kept, chosen = np.unique(chosen, return_inverse=True)
    moved = []
    for i, old in enumerate(kept):
        mine = chosen == i
        mass = np.ones(mine.sum()) if sample_weight is None else sample_weight[mine]
        moved.append(np.average(points[mine], axis=0, weights=mass) if mass.any() else centres[old])
    inertia, bits, _ = costs_of(points, np.array(moved), chosen, price, sample_weight)
    return inertia + price * bits


def assert_counts_what_it_says(points, found, price, sample_weight):
    k = len(found.centres)
    assert (found.centres.dtype, found.labels.dtype) == (np.float32, np.int32)
    assert (np.bincount(found.labels, minlength=k) > 0).all()
    assert len(np.unique(found.centres, axis=0)) == k
    inertia, bits, _ = costs_of(points, found.centres, found.labels, price, sample_weight)
    assert found.inertia == pytest.approx(inertia, rel=1e-4, abs=1e-9 * np.square(points, dtype="d").sum())
    assert found.bits == pytest.approx(bits, abs=1e-6)
    assert (found.price, found.cost) == (price, found.inertia + price * found.bits)


@pytest.mark.parametrize(("price", "k"), [(0, 2), (3, 2), (3.5, 1)])
def test_a_rare_point_keeps_its_centre_while_that_costs_less_than_its_bits(price, k):
    found = _entropy.fit(np.array([[0.0]] * 7 + [[4.0]]), 2, price=price)
    bits = 7 * np.log2(8 / 7) + 3
    assert len(found.centres) == k
    assert (found.inertia, found.bits) == pytest.approx((0, bits) if k == 2 else (14, 0))
    assert found.cost == pytest.approx(min(price * bits, 7 * 0.5**2 + 3.5**2))


def test_a_dear_point_takes_the_frequent_centre_a_heavy_one_the_near():
    points = np.array([[0.0]] * 8 + [[10.0]] * 2 + [[6.0]])
    light, heavy = (
        _entropy.fit(points, 2, price=9, sample_weight=[1] * 10 + [w], max_iter=1) for w in (0.25, 1)
    )
    assert light.labels[-1] == light.labels[0] != light.labels[8]
    assert heavy.labels[-1] == heavy.labels[8] != heavy.labels[0]


@given(
    st.integers(2, 300), st.sampled_from([1, 4, 9]), st.floats(0, 1), st.floats(0, 3), WEIGHTS,
    st.sampled_from([(1, 0), (1e-4, 0), (1, 1), (1e-20, 0)]), st.integers(0, 99),
)  # fmt: skip
@example(15, 4, 1.0, 0.5, "zeros", (1, 0), 0)  # points that weigh nothing, and several most frequent centres
@settings(deadline=None, max_examples=25)
def test_a_round_is_that_of_the_paper(n, d, share, dear, kind, moved, seed):
    points = heavy_tailed(n, d, seed) * np.float32(moved[0]) + np.float32(moved[1])
    sample_weight, n_clusters = weights_of(kind, n, seed), 1 + round(share * (n - 1) / 2)
    start = kmeans.fit(points, n_clusters, sample_weight=sample_weight, seed=seed)
    price = dear * kmeans.fit(points, 1, sample_weight=sample_weight).inertia / n
    one = _entropy.fit(
        points, n_clusters, price=price, sample_weight=sample_weight, max_iter=1, tol=0, seed=seed
    )
    assert_counts_what_it_says(points, one, price, sample_weight)
    alone = kmeans.fit(points, 1, sample_weight=sample_weight).inertia
    expected = min(alone, after_a_round(points, start.centres, start.labels, price, sample_weight))
    assert one.cost == pytest.approx(expected, rel=1e-4)


@given(st.integers(1, 120), st.integers(1, 40), st.floats(0, 2), WEIGHTS, st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_no_round_raises_the_cost_until_none_lowers_it(distinct, n_clusters, dear, kind, seed):
    points = heavy_tailed(distinct, 4, seed)[np.random.default_rng(seed).integers(0, distinct, 150)]
    sample_weight, price = weights_of(kind, 150, seed), dear * float(np.square(points).mean())
    start = kmeans.fit(points, n_clusters, sample_weight=sample_weight, seed=seed)
    inertia, bits, _ = costs_of(points, start.centres, start.labels, price, sample_weight)
    costs = [(inertia + price * bits) * (1 + 1e-6) + 1e-9]
    for rounds in (0, 1, 2, 3, 200):
        found = _entropy.fit(
            points, n_clusters, price=price, sample_weight=sample_weight, max_iter=rounds, tol=0, seed=seed
        )
        assert found.iterations <= rounds
        assert_counts_what_it_says(points, found, price, sample_weight)
        costs.append(found.cost)
    assert (np.diff(costs) <= 0).all()
    assert found.converged
    again = after_a_round(points, found.centres, found.labels, price, sample_weight)
    assert again >= found.cost * (1 - 1e-5) - 1e-9


@pytest.mark.parametrize("kind", ["none", "uneven"])
@pytest.mark.parametrize("n_clusters", [30, 400])
def test_free_bits_leave_what_k_means_found_or_better(n_clusters, kind):
    points, sample_weight = heavy_tailed(3000), weights_of(kind, 3000)
    plain = kmeans.fit(points, n_clusters, sample_weight=sample_weight)
    same = _entropy.fit(points, n_clusters, price=0, sample_weight=sample_weight, max_iter=0)
    np.testing.assert_array_equal(same.labels, plain.labels)
    np.testing.assert_array_equal(same.centres, plain.centres)
    better = _entropy.fit(points, n_clusters, price=0, sample_weight=sample_weight)
    assert 0.95 * plain.inertia < better.inertia <= plain.inertia * (1 + 1e-6)
    assert len(better.centres) == n_clusters


@pytest.mark.parametrize("price", [1e6, 1e300])
@pytest.mark.parametrize("points", [heavy_tailed(500), np.repeat(np.eye(4), 5, axis=0), 1e-25 * np.eye(3)])
@pytest.mark.parametrize("kind", ["none", "zeros"])
def test_at_the_highest_prices_one_centre_remains(points, price, kind):
    sample_weight = weights_of(kind, len(points))
    found = _entropy.fit(points, 3, price=price, sample_weight=sample_weight)
    np.testing.assert_allclose(found.centres, [np.average(points, axis=0, weights=sample_weight)], rtol=1e-3)
    assert (set(found.labels), found.bits, found.cost) == ({0}, 0, found.inertia)


def test_points_without_weight_take_the_most_frequent_index():
    points, sample_weight = np.array([[0.0]] * 6 + [[50.0]] * 3 + [[50.0]]), np.array([1.0] * 9 + [0])
    found = _entropy.fit(points, 2, price=1e-6, sample_weight=sample_weight)
    assert found.labels[9] == found.labels[0] != found.labels[6]
    assert (sorted(found.centres.ravel()), found.inertia) == ([0, 50], 0)
    assert _entropy.fit(points, 2, price=0, sample_weight=sample_weight).labels[9] == found.labels[6]


@pytest.mark.parametrize("kind", ["none", "zeros"])
@pytest.mark.parametrize("exponent", [-60, -14, 20])
def test_price_and_weights_are_in_the_units_of_the_points(exponent, kind):
    points, sample_weight = heavy_tailed(1500), weights_of(kind, 1500)
    one = _entropy.fit(points, 60, price=0.1, sample_weight=sample_weight)
    scaled = np.ldexp(points, exponent)
    other = _entropy.fit(scaled, 60, price=float(np.ldexp(0.1, 2 * exponent)), sample_weight=sample_weight)
    assert one.iterations > 1
    np.testing.assert_array_equal(other.labels, one.labels)
    np.testing.assert_array_equal(other.centres, np.ldexp(one.centres, exponent))
    assert other.cost == pytest.approx(np.ldexp(one.cost, 2 * exponent), rel=1e-9)
    heavier = np.full(1500, 8) if sample_weight is None else 8 * sample_weight
    np.testing.assert_array_equal(
        _entropy.fit(points, 60, price=0.8, sample_weight=heavier).labels, one.labels
    )


@pytest.mark.parametrize("kind", ["none", "uneven"])
@pytest.mark.parametrize("n_clusters", [20, 300])
def test_same_seed_gives_the_same_bits_on_any_number_of_threads(n_clusters, kind):
    points, sample_weight = heavy_tailed(5000), weights_of(kind, 5000)
    one, *others = (
        _entropy.fit(points, n_clusters, price=0.1, sample_weight=sample_weight, seed=7, n_threads=n)
        for n in (1, 2, 3)
    )
    for other in others:
        assert_same_bits(other, one)


def test_priced_clusters_serve_points_better_than_k_means_of_as_many_bits():
    points = heavy_tailed(4000)
    priced = _entropy.fit(points, 400, price=0.05)
    plain = [kmeans.fit(points, k) for k in (8, 32, 64, 128, 256)]
    bits = [costs_of(points, x.centres, x.labels, 0, None)[1] for x in plain]
    assert bits[0] < priced.bits < bits[-1]
    assert priced.inertia < 0.8 * np.interp(priced.bits, bits, [x.inertia for x in plain])


def test_progress_sums_to_one_and_may_stop_the_rounds():
    points, steps = heavy_tailed(2000), []
    found = _entropy.fit(points, 50, price=0.1, progress=steps.append)
    assert sum(step.share for step in steps) == pytest.approx(1)
    assert steps[-1].inertia == found.inertia
    assert found.iterations > 1
    stopped = _entropy.fit(points, 50, price=0.1, progress=lambda step: True)
    assert (stopped.iterations, stopped.converged) == (0, False)


@pytest.mark.parametrize("price", [-1, np.nan, np.inf, True, "1", None])
def test_a_price_out_of_range_is_refused(price):
    with pytest.raises(InvalidValueError, match=r"price is .*;"):
        _entropy.fit(heavy_tailed(10), 2, price=price)


def test_a_round_that_rounding_makes_dearer_is_not_taken(monkeypatch):
    points = heavy_tailed(300)
    start = _entropy.fit(points, 20, price=0.1, max_iter=0)
    monkeypatch.setattr(
        _entropy._Market, "improved", lambda self, found: replace(found, bits=found.bits + 1e-9)
    )
    assert_same_bits(replace(_entropy.fit(points, 20, price=0.1), converged=False), start)


def test_equal_centres_share_one_index():
    points, centres = np.array([[-1.0], [1], [0], [9]], "f"), np.array([[0.0], [0], [9]], "f")
    found = _entropy._Market.of(points, None, 1.0, 1).priced(centres, np.array([0, 0, 1, 2], "i4"))
    assert (found.centres.tolist(), found.labels.tolist(), found.inertia) == ([[0], [9]], [0, 0, 0, 1], 2)
    assert found.bits == pytest.approx(3 * np.log2(4 / 3) + 2)
