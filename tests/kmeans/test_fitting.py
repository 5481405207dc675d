import math
import time
import tracemalloc
from types import SimpleNamespace

import faiss
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from partitions import assert_is_a_partition, assert_same_bits, at_most, heavy_tailed, uneven
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score

from kclib._util import threads
from kclib.errors import InvalidValueError, NotEnoughMemoryError
from kclib.kernels import KernelBank
from kclib.kmeans import _starting, _streaming, fit, tree
from kclib.kmeans._fitting import memory

GRIDS = arrays(
    np.float32,
    st.tuples(st.integers(1, 40), st.sampled_from([1, 4, 9])),
    elements=st.integers(-2, 2).map(float),
)


@pytest.fixture
def in_cells(monkeypatch):
    """Let few points be enough for centres to be started cell by cell, as they are with many."""
    monkeypatch.setattr(_starting, "_LEAVES", 64)


def test_two_pairs_on_a_line_are_found_with_their_means_and_inertia():
    result = fit(np.array([[0.0], [2.0], [10.0], [14.0]]), 2)
    assert sorted(result.centres.ravel()) == [1, 12]
    assert result.centres[result.labels].ravel().tolist() == [1, 1, 12, 12]
    assert result.inertia == 1 + 1 + 4 + 4


def test_weights_move_the_mean_and_count_in_the_inertia():
    result = fit(np.array([[0.0], [4.0], [50.0]]), 2, sample_weight=[3, 1, 7])
    assert sorted(result.centres.ravel()) == [1, 50]
    assert result.inertia == 3 * 1 + 1 * 9


def test_one_cluster_is_the_mean():
    points = heavy_tailed(100)
    result = fit(points, 1)
    np.testing.assert_allclose(result.centres[0], points.mean(0, dtype=np.float64), rtol=1e-5)
    assert result.inertia == pytest.approx(len(points) * points.var(0, dtype=np.float64).sum(), rel=1e-5)


@given(GRIDS, st.data())
@settings(deadline=None, max_examples=25)
def test_any_k_on_points_with_many_duplicates_is_a_partition(points, data):
    n_clusters = data.draw(st.integers(1, len(points)))
    assert_is_a_partition(points, n_clusters, fit(points, n_clusters))


@given(st.integers(1, 120), st.sampled_from([1, 9, 49]), st.integers(0, 99), st.floats(0, 1))
@settings(deadline=None, max_examples=25)
def test_any_k_on_heavy_tailed_points_is_a_partition(n, d, seed, share):
    points, n_clusters = heavy_tailed(n, d, seed), 1 + round(share * (n - 1))
    result = fit(points, n_clusters, seed=seed)
    assert len(result.centres) == n_clusters
    assert_is_a_partition(points, n_clusters, result)


@given(
    st.integers(1, 400),
    st.sampled_from([1, 4, 9]),
    st.integers(1, 60),
    st.sampled_from([None, 0.0, 0.5]),
    st.floats(0, 1),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=25)
def test_any_k_on_weighted_points_that_occur_again_and_again_is_a_partition(
    n, d, distinct, without, share, seed
):
    points = heavy_tailed(distinct, d, seed)[np.random.default_rng(seed).integers(0, distinct, n)]
    sample_weight = None if without is None else uneven(n, seed)
    if without:
        sample_weight[1:][np.random.default_rng(seed).random(n - 1) < without] = 0
    n_clusters = 1 + round(share * (n - 1))
    assert_is_a_partition(
        points, n_clusters, fit(points, n_clusters, sample_weight=sample_weight, seed=seed), sample_weight
    )


@given(st.integers(257, 700), st.booleans(), st.booleans(), st.sampled_from([1.6, None]), st.integers(0, 9))
@settings(deadline=None, max_examples=10)
def test_hundreds_of_clusters_started_in_cells_are_a_partition(n_clusters, weighted, doubled, reach, seed):
    points = heavy_tailed(1500, seed=seed)
    points = np.concatenate([points, points[::-1]]) if doubled else points
    sample_weight = uneven(len(points), seed) if weighted else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_starting, "_LEAVES", 64)
        result = fit(points, n_clusters, sample_weight=sample_weight, reach=reach, seed=seed)
    assert_is_a_partition(points, n_clusters, result, sample_weight)


@pytest.mark.parametrize("d", [1, 25, 49])
@pytest.mark.parametrize("n_clusters", [20, 300])
def test_kernels_of_any_size_are_clustered(d, n_clusters):
    points = heavy_tailed(1000, d)
    result = fit(points, n_clusters)
    assert_is_a_partition(points, n_clusters, result)
    assert result.inertia < 0.5 * len(points) * points.var(0, dtype=np.float64).sum()


@pytest.mark.parametrize("n_clusters", [1, 5, 30, 60, 99, 100])
def test_far_outliers_have_centres_and_the_rest_does_not_starve(n_clusters):
    points = heavy_tailed(100)
    points[3], points[77] = 1e4, -1e6
    result = fit(points, n_clusters)
    assert_is_a_partition(points, n_clusters, result)
    if n_clusters >= 5:
        assert np.bincount(result.labels)[result.labels[[3, 77]]].tolist() == [1, 1]
        assert result.inertia < np.square(points[np.abs(points).max(1) < 1e3]).sum()


def test_as_many_clusters_as_distinct_points_lose_nothing():
    distinct = heavy_tailed(30)
    points = np.concatenate([distinct, distinct[::-1], distinct[:5]])
    for n_clusters in (30, 31, 40, 65):
        result = fit(points, n_clusters)
        assert (len(result.centres), result.inertia) == (30, 0)
        np.testing.assert_array_equal(result.centres[result.labels], points)


@pytest.mark.parametrize("n_clusters", [1, 3, 20])
def test_all_zero_points_are_one_cluster(n_clusters):
    result = fit(np.zeros((20, 9)), n_clusters)
    assert (result.centres.tolist(), set(result.labels), result.inertia) == ([[0] * 9], {0}, 0)


@pytest.mark.parametrize("sample_weight", [None, uneven(5000)], ids=["alike", "weighted"])
@pytest.mark.parametrize("n_clusters", [4, 64, 600, 2900])
def test_same_seed_gives_the_same_bits_on_any_number_of_threads(n_clusters, sample_weight, in_cells):
    points, before = heavy_tailed(5000), faiss.omp_get_max_threads()
    one, *others = (
        fit(points, n_clusters, sample_weight=sample_weight, seed=7, n_threads=n) for n in (1, 2, 3)
    )
    assert faiss.omp_get_max_threads() == before
    if n_clusters == 64:  # few clusters come to the same end, and small cells are merged whole
        assert fit(points, n_clusters, sample_weight=sample_weight, seed=8).inertia != one.inertia
    for other in others:
        assert_same_bits(other, one)


def test_well_separated_blobs_are_recovered():
    points, truth = make_blobs(600, 9, centers=8, cluster_std=0.05, random_state=0)
    assert adjusted_rand_score(truth, fit(points, 8).labels) == 1


@pytest.mark.parametrize(
    ("points", "n_clusters"),
    [
        (make_blobs(2000, 9, centers=10, random_state=0)[0], 10),
        (heavy_tailed(3000), 100),
        (heavy_tailed(3000), 300),
        (heavy_tailed(300), 200),
    ],
    ids=["blobs", "heavy tails", "hundreds", "more than half"],
)
def test_inertia_is_close_to_scikit_learns(points, n_clusters):
    theirs = KMeans(n_clusters, n_init=3, random_state=0).fit(points.astype(np.float64)).inertia_
    assert fit(points, n_clusters).inertia <= 1.05 * theirs


def test_centres_started_in_cells_are_about_as_good_as_those_started_on_all_points(in_cells):
    points = heavy_tailed(20_000)
    in_some = fit(points, 400).inertia
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_starting, "_LEAVES", 1 << 13)
        on_all = fit(points, 400).inertia
    assert in_some <= 1.05 * on_all


@pytest.mark.parametrize("max_iter", [1, 5])
@pytest.mark.parametrize("n_clusters", [20, 300])
def test_exact_rounds_from_given_centres_are_scikit_learns(n_clusters, max_iter):
    points = heavy_tailed(3000)
    mine = fit(points, n_clusters, init=points[:n_clusters], reach=None, tol=0, max_iter=max_iter)
    theirs = KMeans(
        n_clusters, init=points[:n_clusters].astype(np.float64), n_init=1, max_iter=max_iter, tol=0
    ).fit(points.astype(np.float64))
    assert mine.iterations == max_iter
    np.testing.assert_array_equal(mine.labels, theirs.labels_)
    np.testing.assert_allclose(mine.centres, theirs.cluster_centers_, rtol=1e-4, atol=1e-5)
    assert mine.inertia == pytest.approx(theirs.inertia_, rel=1e-5)


def test_reach_has_no_part_in_up_to_256_clusters():
    points = heavy_tailed(3000)
    near, exact = (fit(points, 256, init=points[:256], reach=reach, tol=0) for reach in (0.1, None))
    assert_same_bits(near, exact)


@pytest.mark.parametrize("n_clusters", [12, 300])
def test_an_integer_weight_is_that_many_copies(n_clusters):
    points, copies = heavy_tailed(900), np.random.default_rng(0).integers(1, 4, 900)
    exact = {"init": points[:n_clusters], "reach": None, "tol": 0, "max_iter": 5}
    weighted = fit(points, n_clusters, sample_weight=copies, **exact)
    copied = fit(points.repeat(copies, axis=0), n_clusters, **exact)
    np.testing.assert_array_equal(weighted.labels.repeat(copies), copied.labels)
    np.testing.assert_allclose(weighted.centres, copied.centres, rtol=1e-5, atol=1e-6)
    assert weighted.inertia == pytest.approx(copied.inertia, rel=1e-5)


@pytest.mark.parametrize("n_clusters", [12, 300])
def test_points_without_weight_change_no_centre_and_get_their_nearest(n_clusters):
    points, others = heavy_tailed(900), heavy_tailed(200, seed=1)
    exact = {"init": points[:n_clusters], "reach": None}
    alone = fit(points, n_clusters, **exact)
    everyone = np.concatenate([points, others])
    sample_weight = np.repeat([1, 0], [900, 200])
    result = fit(everyone, n_clusters, sample_weight=sample_weight, **exact)
    np.testing.assert_array_equal(result.centres, alone.centres)
    np.testing.assert_array_equal(result.labels[:900], alone.labels)
    assert result.inertia == alone.inertia
    assert_is_a_partition(everyone, n_clusters, result, sample_weight)


@pytest.mark.parametrize("n_clusters", [12, 300])
@pytest.mark.parametrize("weight", [2.0**-40, 8.0])
def test_weights_that_are_all_alike_only_scale_the_inertia(n_clusters, weight, in_cells):
    points = heavy_tailed(900)
    plain, weighted = fit(points, n_clusters), fit(points, n_clusters, sample_weight=np.full(900, weight))
    np.testing.assert_array_equal(weighted.centres, plain.centres)
    np.testing.assert_array_equal(weighted.labels, plain.labels)
    assert weighted.inertia == weight * plain.inertia


@pytest.mark.parametrize("n_clusters", [12, 300])
def test_points_that_weigh_more_are_served_better(n_clusters):
    points, heavy = heavy_tailed(2000), np.arange(2000) % 2 == 0

    def loss(sample_weight):
        result = fit(points, n_clusters, sample_weight=sample_weight)
        return np.square(points - result.centres[result.labels])[heavy].sum()

    assert loss(np.where(heavy, 100, 1)) < 0.9 * loss(None)


def test_without_rounds_the_centres_are_those_given():
    points = heavy_tailed(500)
    result = fit(points, 7, init=points[:7], max_iter=0)
    assert (result.iterations, result.converged) == (0, False)
    np.testing.assert_array_equal(result.centres, points[:7])
    assert_is_a_partition(points, 7, result)


@pytest.mark.parametrize("n_clusters", [20, 300])
@pytest.mark.parametrize("max_iter", [0, 1])
def test_given_centres_that_coincide_do_not_stay_so(n_clusters, max_iter):
    points = np.random.default_rng(0).normal(size=(900, 9)).astype(np.float32)
    init = np.tile(points[: n_clusters // 2], (2, 1))
    assert_is_a_partition(points, n_clusters, fit(points, n_clusters, init=init, max_iter=max_iter))


def test_rounds_end_once_one_gains_too_little_or_there_are_enough():
    points = heavy_tailed(500)
    few = fit(points, 7, init=points[:7], tol=0, max_iter=2)
    assert (few.iterations, few.converged) == (2, False)
    easy = fit(points, 7, init=points[:7], tol=1e9)
    assert (easy.iterations, easy.converged) == (1, True)
    full = fit(points, 7, init=points[:7], tol=0, max_iter=500)
    assert 2 < full.iterations < 500
    assert full.converged
    assert full.inertia < few.inertia < easy.inertia
    means = [points[full.labels == j].mean(0, dtype=np.float64) for j in range(7)]
    np.testing.assert_allclose(full.centres, means, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("n_clusters", "lower"), [(40, 0.9999), (600, 0.995)])
def test_the_best_quality_goes_on_and_is_lower(n_clusters, lower):
    points = np.random.default_rng(0).standard_t(4, size=(20_000, 9)).astype("f4")
    fast, best = (fit(points, n_clusters, quality=quality) for quality in ("fast", "best"))
    assert best.inertia < lower * fast.inertia
    assert best.converged
    assert best.iterations > fast.iterations
    assert fit(points, n_clusters, quality="best", max_iter=2).iterations == 2


@pytest.mark.parametrize(("n", "n_clusters"), [(200, 1), (200, 20), (200, 150), (200, 200), (1000, 400)])
def test_progress_shares_sum_to_one(n, n_clusters):
    steps = []
    fit(heavy_tailed(n), n_clusters, progress=steps.append)
    assert sum(step.share for step in steps) == pytest.approx(1)
    assert min(step.share for step in steps) >= 0


@pytest.mark.parametrize("factor", [1, 1e6, 1e-6])
@pytest.mark.parametrize("n_clusters", [1, 20, 300])
def test_progress_tells_the_falling_inertia_of_the_points(n_clusters, factor):
    steps = []
    result = fit(factor * heavy_tailed(2000), n_clusters, progress=steps.append)
    told = [step.inertia for step in steps]
    assert math.isnan(told[0])
    assert told[-1] == pytest.approx(result.inertia, rel=1e-9, abs=0)
    known = np.array(told[np.count_nonzero(np.isnan(told)) :])
    assert (np.diff(known) <= 1e-6 * known[:-1]).all()


@pytest.mark.parametrize("n_clusters", [16, 300])
def test_a_true_answer_stops_early_with_the_best_so_far(n_clusters):
    points, patient = heavy_tailed(60_000), {"tol": 0, "max_iter": 30}
    full = fit(points, n_clusters, **patient)
    at_once = fit(points, n_clusters, progress=lambda step: True, **patient)
    assert (at_once.iterations, at_once.converged, at_once.exact) == (0, False, False)
    steps = []

    def enough(step):
        steps.append(step)
        return not math.isnan(step.inertia)

    soon = fit(points, n_clusters, progress=enough, **patient)
    assert 0 < soon.iterations < full.iterations
    assert (soon.converged, soon.exact, full.exact) == (False, False, True)
    assert sum(step.share for step in steps) == pytest.approx(1)
    assert full.inertia < soon.inertia < at_once.inertia
    for result in (at_once, soon):
        assert len(result.centres) <= n_clusters
        assert (np.bincount(result.labels, minlength=len(result.centres)) > 0).all()
        errors = np.square(points - result.centres[result.labels]).sum(dtype=np.float64)
        assert result.inertia == pytest.approx(errors, rel=1e-4)


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.9])
def test_a_stopped_fit_does_little_more_work(share):
    points, heard, asked = heavy_tailed(400_000), [], []
    fit(points, 3000, progress=heard.append)

    def enough(step):
        asked.append(time.process_time())
        return len(asked) >= share * len(heard)

    result = fit(points, 3000, progress=enough)
    first = asked[math.ceil(share * len(heard)) - 1]
    assert not result.exact
    assert time.process_time() - first < 0.5  # seconds of all processors; a second and more is the whole


@pytest.mark.parametrize("n_clusters", [0, -1, 5, 2.0, True])
def test_k_outside_one_to_n_is_refused(n_clusters):
    with pytest.raises(InvalidValueError, match=f"n_clusters is {n_clusters};.* 1 to 4"):
        fit(np.eye(4), n_clusters)


def test_points_that_are_not_finite_are_refused():
    for value in (np.nan, np.inf):
        with pytest.raises(InvalidValueError, match="NaN or infinite"):
            fit(np.array([[0.0], [value]]), 1)


@pytest.mark.parametrize("shape", [(4,), (4, 0), (4, 3, 3)])
def test_points_that_are_no_rows_are_refused(shape):
    with pytest.raises(InvalidValueError, match=r"points.*\(n, d\)"):
        fit(np.zeros(shape), 1)


@pytest.mark.parametrize(
    "sample_weight",
    [[1, 1, 1], np.ones((4, 1)), [1, 1, 1, -1], [1, 1, 1, np.nan], [1, 1, 1, np.inf], [0, 0, 0, 0]],
    ids=["few", "a column", "negative", "NaN", "infinite", "all 0"],
)
def test_weights_out_of_range_are_refused(sample_weight):
    with pytest.raises(InvalidValueError, match="sample_weight"):
        fit(np.eye(4), 2, sample_weight=sample_weight)


@pytest.mark.parametrize("init", [np.eye(4)[:3], np.eye(3)[:2], np.zeros(4), np.full((2, 4), np.nan)])
def test_init_of_a_wrong_shape_or_not_finite_is_refused(init):
    with pytest.raises(InvalidValueError, match=r"init has shape .* must be \(2, 4\)"):
        fit(np.eye(4), 2, init=init)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_iter", -1),
        ("tol", -0.1),
        ("tol", np.nan),
        ("tol", np.inf),
        ("reach", 0),
        ("reach", -1.0),
        ("reach", np.nan),
        ("reach", np.inf),
        ("seed", -1),
        ("seed", 2**32),
        ("n_threads", 0),
        ("n_threads", -2),
    ],
)
def test_options_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(InvalidValueError, match=f"^{name} is {value}"):
        fit(np.eye(4), 2, **{name: value})


@pytest.mark.parametrize("factor", [1e-25, 1e20, 1e36])
def test_points_whose_squares_leave_the_range_of_floats_are_a_partition(factor):
    points = (factor * heavy_tailed(400)).astype(np.float32)
    for n_clusters in (20, 300):
        assert_is_a_partition(points, n_clusters, fit(points, n_clusters))


@pytest.mark.parametrize("d", [9, 49])
def test_points_close_together_and_far_from_zero_are_a_partition(d):
    points = (1 + 1e-4 * np.random.default_rng(0).normal(size=(3000, d))).astype(np.float32)
    with at_most(60):
        results = {n_clusters: fit(points, n_clusters) for n_clusters in (64, 300)}
    for n_clusters, result in results.items():
        assert_is_a_partition(points, n_clusters, result)


@given(GRIDS, st.data())
@settings(deadline=None, max_examples=25)
def test_points_that_differ_in_their_last_bits_are_a_partition(steps, data):
    points = (np.float32(1.5) + np.float32(2**-23) * steps).astype(np.float32)
    n_clusters = data.draw(st.integers(1, len(points)))
    assert_is_a_partition(points, n_clusters, fit(points, n_clusters))


def test_points_in_a_mapped_file_are_clustered_like_those_in_memory(tmp_path):
    points = heavy_tailed(2000)
    np.save(tmp_path / "points.npy", points)
    mapped = np.load(tmp_path / "points.npy", mmap_mode="r")
    for n_clusters in (20, 300):
        assert_same_bits(fit(mapped, n_clusters), fit(points, n_clusters))


@pytest.mark.parametrize("n_clusters", [20, 300])
@pytest.mark.parametrize("shift", [0, 100])
def test_what_the_caller_gives_stays_as_it_is(n_clusters, shift):
    points, sample_weight = shift + heavy_tailed(900), uneven(900)
    given_ones = points, sample_weight, points[:n_clusters].copy()
    kept = [x.copy() for x in given_ones]
    one = fit(points, n_clusters, sample_weight=sample_weight, init=given_ones[2])
    for x, before in zip(given_ones, kept, strict=True):
        np.testing.assert_array_equal(x, before)
        x.flags.writeable = False
    assert_same_bits(fit(points, n_clusters, sample_weight=sample_weight, init=given_ones[2]), one)


@pytest.mark.parametrize(
    ("clustered", "memory"),
    [
        (fit, memory),
        (lambda points, k, **rest: fit([points], k, **rest), _streaming.memory),
        (lambda points, k, **rest: tree(points, leaves=k, **rest), memory),
    ],
    ids=["one fit", "streamed", "tree"],
)
def test_too_little_memory_is_told_before_the_work(monkeypatch, clustered, memory):
    points, steps = heavy_tailed(1000), []
    needed = memory(1000, 9, 500, threads.threads())
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=50 << 20))
    assert needed > 50 << 20
    sentence = r"takes about 0\.\d GiB beside the points, and 0\.0 GiB are free"
    with pytest.raises(NotEnoughMemoryError, match=sentence):
        clustered(points, 500, progress=steps.append)
    assert steps == []
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 32))
    clustered(points, 500)


def test_the_memory_told_grows_with_points_dimensions_and_clusters():
    least = memory(10_000, 9, 100, 2)
    for more in ((100_000, 9, 100, 2), (10_000, 90, 100, 2), (10_000, 9, 10_000, 2)):
        assert memory(*more) > least


@pytest.mark.parametrize("shift", [0, 100])
def test_the_memory_told_is_enough(shift):
    points = shift + heavy_tailed(200_000)
    fit(points[:5000], 300)  # compiling is not part of it
    tracemalloc.start()
    try:
        fit(points, 4096, max_iter=2, n_threads=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert points.nbytes / 4 < peak < memory(200_000, 9, 4096, 2)


@pytest.mark.parametrize(
    "make",
    [
        torch.tensor,
        lambda x: torch.tensor(x, requires_grad=True),
        lambda x: torch.tensor(x).bfloat16(),
        pd.DataFrame,
        lambda x: x.tolist(),
        list,
        lambda x: [torch.tensor(row) for row in x],
        lambda x: KernelBank(x.reshape(-1, 2, 2), (), {}),
        lambda x: [torch.tensor(x[:9]), pd.DataFrame(x[9:])],
    ],
)
def test_points_of_any_kind_are_clustered_as_the_array_they_are(make):
    points = np.random.default_rng(0).integers(-8, 9, (30, 4)).astype(np.float32)
    np.testing.assert_array_equal(fit(make(points), 5).labels, fit(points, 5).labels)


@pytest.mark.parametrize(
    "points",
    [
        np.ma.masked_less(np.eye(4), 0.5),
        [[1.0, 2.0], [3.0]],
        [[[1.0], [1.0, 2.0]]],
        "abc",
        {"a": 1},
        pd.DataFrame({"a": ["x"] * 5}),
        np.eye(4) * 1j,
        object(),
    ],
)
def test_points_that_are_no_numbers_are_refused(points):
    with pytest.raises(InvalidValueError, match="the points"):
        fit(points, 2)
