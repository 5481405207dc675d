import math

import hypothesis.strategies as st
import joblib
import numpy as np
import pytest
from dask.distributed import Client, LocalCluster
from hypothesis import given, settings
from partitions import assert_is_a_partition, assert_same_bits, at_most, heavy_tailed, uneven
from scipy.spatial.distance import cdist

from kclib.errors import InvalidValueError
from kclib.kernels import KernelBank, Layer
from kclib.kmeans import _fitting as module
from kclib.kmeans import _streaming, fit


@pytest.fixture(autouse=True, scope="module")
def _small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_streaming, "_BLOCK", 500)
        patch.setattr(_streaming, "_SAMPLE", 1000)
        patch.setattr(_streaming, "_SAMPLE_MOST", 2000)
        yield


def bank_of(points):
    kernels = points.reshape(-1, 3, 3).copy()
    kernels.flags.writeable = False
    return KernelBank(kernels, (Layer("conv", (len(points), 1, 3, 3), 0),), {})


@pytest.mark.parametrize("n_clusters", [20, 300])
def test_points_are_clustered_alike_wherever_they_lie(n_clusters, tmp_path, monkeypatch):
    points = heavy_tailed(3200)
    one = fit([points], n_clusters)
    assert one.search == "streamed"
    assert_is_a_partition(points, n_clusters, one)
    assert_same_bits(fit([points[:1000], points[1000:2500], points[2500:]], n_clusters), one)
    assert_same_bits(fit([bank_of(points[:1500]), bank_of(points[1500:])], n_clusters), one)
    monkeypatch.setattr(module, "_IN_MEMORY", 1000)
    assert_same_bits(fit(points, n_clusters), one)
    np.save(tmp_path / "points.npy", points)
    assert_same_bits(fit(np.load(tmp_path / "points.npy", mmap_mode="r"), n_clusters), one)


@pytest.mark.parametrize("n_clusters", [20, 300])
def test_parts_of_any_length_are_clustered_as_one(n_clusters):
    points = heavy_tailed(2700)
    one = fit([points], n_clusters)
    cut = fit(np.split(points, [0, 1, 499, 501, 1700, 1700]), n_clusters)
    assert_is_a_partition(points, n_clusters, cut)
    assert cut.inertia == pytest.approx(one.inertia, rel=0.01)


def test_streamed_points_are_clustered_about_as_well_as_in_memory():
    points = heavy_tailed(6000)
    for n_clusters, share in ((10, 1.05), (100, 1.05), (400, 1.15)):  # 400 are started on 1000 points here
        assert fit([points], n_clusters).inertia <= share * fit(points, n_clusters).inertia


@pytest.mark.parametrize("n_clusters", [20, 300])
@pytest.mark.parametrize("sample_weight", [None, uneven(3200)], ids=["alike", "weighted"])
def test_exact_rounds_over_blocks_are_those_in_memory(n_clusters, sample_weight):
    points = heavy_tailed(3200)
    exact = {
        "init": points[:n_clusters],
        "sample_weight": sample_weight,
        "reach": None,
        "tol": 0,
        "max_iter": 5,
    }
    streamed, whole = fit([points], n_clusters, **exact), fit(points, n_clusters, **exact)
    np.testing.assert_array_equal(streamed.labels, whole.labels)
    np.testing.assert_allclose(streamed.centres, whole.centres, rtol=1e-5, atol=1e-6)
    assert streamed.inertia == pytest.approx(whole.inertia, rel=1e-5)
    assert (streamed.iterations, streamed.converged) == (whole.iterations, whole.converged)


def test_reach_has_no_part_in_up_to_256_clusters():
    points = heavy_tailed(3200)
    near, exact = (fit([points], 30, init=points[:30], reach=reach, tol=0) for reach in (0.1, None))
    assert_same_bits(near, exact)


@given(
    st.integers(1, 1600),
    st.sampled_from([1, 4, 9]),
    st.sampled_from([3, 60, 1600]),
    st.booleans(),
    st.floats(0, 1),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=30)
def test_labels_are_exact_and_no_cluster_is_empty(n, d, distinct, weighted, share, seed):
    points = heavy_tailed(distinct, d, seed)[np.random.default_rng(seed).integers(0, distinct, n)]
    sample_weight = uneven(n, seed) if weighted else None
    n_clusters = 1 + round(share**3 * (n - 1))
    result = fit([points], n_clusters, sample_weight=sample_weight, seed=seed)
    assert_is_a_partition(points, n_clusters, result, sample_weight)


@pytest.mark.parametrize("n_clusters", [29, 30, 31, 300])
def test_as_many_clusters_as_distinct_points_lose_nothing(n_clusters):
    points = heavy_tailed(30)[np.random.default_rng(0).integers(0, 30, 1800)]
    result = fit([points], n_clusters)
    assert_is_a_partition(points, n_clusters, result)
    if n_clusters >= 30:
        assert result.inertia == 0
        np.testing.assert_array_equal(result.centres[result.labels], points)


def test_rare_points_that_the_start_has_not_seen_have_centres():
    points = np.zeros((3000, 9), np.float32)
    points[::100] = heavy_tailed(30)
    assert_is_a_partition(points, 15, fit([points], 15))
    assert_is_a_partition(points, 28, fit([points], 28))


def test_points_without_weight_have_centres_if_no_others_are_left():
    points = heavy_tailed(30)[np.arange(3000) % 30]
    sample_weight = np.arange(3000) % 30 < 10
    result = fit([points], 15, sample_weight=sample_weight)
    assert_is_a_partition(points, 15, result, sample_weight)
    assert result.inertia == 0


@pytest.mark.parametrize("n_clusters", [12, 300])
def test_weights_that_are_all_alike_only_scale_the_inertia(n_clusters):
    points = heavy_tailed(1700)
    plain, weighted = fit([points], n_clusters), fit([points], n_clusters, sample_weight=np.full(1700, 8.0))
    np.testing.assert_array_equal(weighted.centres, plain.centres)
    np.testing.assert_array_equal(weighted.labels, plain.labels)
    assert weighted.inertia == 8 * plain.inertia


@pytest.mark.parametrize("n_clusters", [12, 300])
def test_points_without_weight_change_no_centre_and_get_their_nearest(n_clusters):
    points, others = heavy_tailed(1000), heavy_tailed(700, seed=1)
    sample_weight = np.repeat([1, 0], [1000, 700])
    exact = {"init": points[:n_clusters], "reach": None}
    alone = fit([points], n_clusters, **exact)
    result = fit([points, others], n_clusters, sample_weight=sample_weight, **exact)
    np.testing.assert_array_equal(result.centres, alone.centres)
    np.testing.assert_array_equal(result.labels[:1000], alone.labels)
    assert result.inertia == alone.inertia
    assert_is_a_partition(np.concatenate([points, others]), n_clusters, result, sample_weight)


@pytest.mark.parametrize("factor", [1e-25, 1e20])
def test_points_whose_squares_leave_the_range_of_floats_are_a_partition(factor):
    points = (factor * heavy_tailed(1200)).astype(np.float32)
    assert_is_a_partition(points, 20, fit([points[:700], points[700:]], 20))


def test_points_close_together_and_far_from_zero_are_a_partition():
    points = (1 + 1e-4 * np.random.default_rng(0).normal(size=(1700, 9))).astype(np.float32)
    with at_most(60):
        result = fit([points], 64)
    assert_is_a_partition(points, 64, result)


@pytest.mark.parametrize("sample_weight", [None, uneven(3200)], ids=["alike", "weighted"])
@pytest.mark.parametrize("n_clusters", [20, 300])
def test_same_seed_gives_the_same_bits_on_any_number_of_threads(n_clusters, sample_weight):
    points = heavy_tailed(3200)
    one, *others = (
        fit([points], n_clusters, sample_weight=sample_weight, seed=7, n_threads=n) for n in (1, 2, 3)
    )
    for other in others:
        assert_same_bits(other, one)


def test_a_dask_cluster_gives_the_same_bits():
    points, sample_weight = heavy_tailed(3200), uneven(3200)
    local = [fit([points], k, sample_weight=sample_weight) for k in (20, 300)]
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster),
        joblib.parallel_config("dask"),
    ):
        spread = [fit([points], k, sample_weight=sample_weight) for k in (20, 300)]
    for mine, theirs in zip(spread, local, strict=True):
        assert_same_bits(mine, theirs)


def test_progress_shares_sum_to_one_and_the_inertia_falls():
    for n_clusters in (1, 20, 300):
        steps = []
        result = fit([heavy_tailed(3200)], n_clusters, progress=steps.append)
        told = np.array([step.inertia for step in steps])
        assert sum(step.share for step in steps) == pytest.approx(1)
        assert math.isnan(told[0])
        assert told[-1] == result.inertia
        known = told[np.count_nonzero(np.isnan(told)) :]
        assert (np.diff(known) <= 1e-6 * known[:-1]).all()


def test_the_inertia_told_is_that_of_the_points_as_given():
    steps = []
    result = fit([1e6 * heavy_tailed(1200)], 20, progress=steps.append)
    assert steps[-1].inertia == pytest.approx(result.inertia, rel=1e-9)


@pytest.mark.parametrize("n_clusters", [16, 300])
def test_a_true_answer_stops_early_with_the_best_so_far(n_clusters):
    points, patient = heavy_tailed(3200), {"tol": 0, "max_iter": 20}
    full = fit([points], n_clusters, **patient)
    soon = fit([points], n_clusters, progress=lambda step: not math.isnan(step.inertia), **patient)
    at_once = fit([points], n_clusters, progress=lambda step: True, **patient)
    assert at_once.iterations == 0 < soon.iterations < full.iterations
    assert full.inertia < soon.inertia < at_once.inertia
    for result in (at_once, soon):
        assert not result.converged
        assert_is_a_partition(points, n_clusters, result)


def test_without_rounds_the_centres_are_those_given():
    points = heavy_tailed(1200)
    result = fit([points], 7, init=points[:7], max_iter=0)
    assert (result.iterations, result.converged) == (0, False)
    np.testing.assert_array_equal(result.centres, points[:7])
    assert_is_a_partition(points, 7, result)


def test_points_that_can_be_read_only_once_are_refused():
    for once in (iter([np.eye(4)]), (part for part in [np.eye(4)])):
        with pytest.raises(InvalidValueError, match="can be read only once"):
            fit(once, 2)


@pytest.mark.parametrize("odd", [np.zeros((3, 4)), np.zeros(9), np.zeros((2, 3, 3))])
def test_parts_of_another_shape_are_refused(odd):
    with pytest.raises(InvalidValueError, match=r"has shape \(.*\); every one must be \(m, 9\)"):
        fit([heavy_tailed(600), odd], 2)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_value_that_is_not_finite_is_refused_in_any_part(value):
    late = heavy_tailed(1100)
    late[1099, 8] = value
    with pytest.raises(InvalidValueError, match="NaN or infinite"):
        fit([heavy_tailed(600), late], 2)


def test_what_does_not_fit_the_parts_is_refused():
    parts = [np.eye(4), np.eye(4)]
    for k in (0, 9):
        with pytest.raises(InvalidValueError, match=f"n_clusters is {k}; .* 1 to 8,"):
            fit(parts, k)
    with pytest.raises(InvalidValueError, match=r"sample_weight has shape \(4,\); it must be \(8,\)"):
        fit(parts, 2, sample_weight=np.ones(4))
    with pytest.raises(InvalidValueError, match=r"init has shape \(3, 4\); it must be \(2, 4\)"):
        fit(parts, 2, init=np.eye(4)[:3])
    with pytest.raises(InvalidValueError, match="1 to 0, the number of kernels"):
        fit([], 1)


@pytest.mark.parametrize("at_once", [1, 1000, 1 << 26])
@pytest.mark.parametrize("d", [1, 9])
def test_nearest_centres_found_by_torch_are_exact_however_many_fit(d, at_once, monkeypatch):
    monkeypatch.setattr(_streaming, "_ON_DEVICE", at_once)
    points, centres = heavy_tailed(700, d), heavy_tailed(130, d, seed=1)
    labels = _streaming.nearest_on_device(points, centres, "cpu")
    assert (labels.shape, labels.dtype) == ((700,), np.int32)
    distances = cdist(points.astype(np.float64), centres.astype(np.float64), "sqeuclidean")
    own = distances[np.arange(700), labels]
    assert (own <= distances.min(1) + 1e-6 * np.square(points).sum(1)).all()


@pytest.mark.parametrize("n_clusters", [20, 300])
def test_a_torch_device_finds_a_partition(n_clusters, monkeypatch):
    monkeypatch.setattr(_streaming, "_ON_DEVICE", 10_000)
    points, sample_weight = heavy_tailed(3200), uneven(3200)
    result = fit(points, n_clusters, sample_weight=sample_weight, device="cpu:0")
    assert result.search == "cpu:0"
    assert_is_a_partition(points, n_clusters, result, sample_weight)
    assert result.inertia <= 1.02 * fit([points], n_clusters, sample_weight=sample_weight).inertia


def test_a_torch_device_takes_points_that_cannot_be_written():
    points = heavy_tailed(1200)
    result = fit([bank_of(points)], 20, device="cpu:0")
    assert_is_a_partition(points, 20, result)


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_pairs_of_points_that_nearly_coincide_have_a_centre_each(device):
    pairs = 10 * np.random.default_rng(0).normal(size=(30, 9))
    points = np.tile(np.concatenate([pairs, (1 + 1e-5) * pairs]).astype(np.float32), (20, 1))
    with at_most(60):
        result = fit([points], 60, device=device)
    assert_is_a_partition(points, 60, result)
