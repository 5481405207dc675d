import numpy as np
import pytest
from banks import EACH, LARGEST, bank_of, between, cloud
from scipy.spatial import cKDTree
from sklearn.metrics import pairwise_distances

from kclib import kmeans, similarity
from kclib.errors import InvalidValueError
from kclib.similarity import _measures, distances, null_models


def test_a_kernel_is_near_zero_beside_its_own_layer():
    weak, strong = np.full((5, 9), 1e-3), np.full((5, 9), 10.0)
    weak[2], strong[1] = 1e-6, 0.05
    assert np.flatnonzero(similarity.near_zero(bank_of(weak, strong))).tolist() == [2, 6]
    assert np.flatnonzero(similarity.near_zero(bank_of(weak, strong), share=0.003)).tolist() == [2]
    assert not similarity.near_zero(bank_of(np.zeros((3, 9)))).any()


@EACH
def test_nearest_distances_are_the_least_of_all(distance):
    points = cloud(120, 3)
    apart = between(distance, points)
    np.fill_diagonal(apart, np.inf)
    found = similarity.nearest_distances(points, distance=distance)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, apart.min(axis=1), rtol=1e-4, atol=1e-6)


def test_kernels_without_a_shape_have_no_nearest_distance():
    points = np.vstack([cloud(5, 0), np.zeros((2, 9), np.float32)])
    assert len(similarity.nearest_distances(points, distance="cosine")) == 5
    assert similarity.nearest_distances(points)[5:].tolist() == [0, 0]
    with pytest.raises(InvalidValueError, match="1 of 3 kernels"):
        similarity.nearest_distances(points[4:], distance="cosine")


def copies(n, shapes, noise, seed=0):
    """Return kernels that are copies of few shapes, but for noise."""
    return (cloud(shapes, seed)[np.arange(n) % shapes] + noise * cloud(n, seed + 1)).astype(np.float32)


@pytest.fixture(scope="module")
def close():
    """Kernels of known likeness: of a Gaussian, copies of few shapes, and independent weights."""
    draw = np.random.default_rng(0)
    correlated = (
        draw.normal(size=(2000, 9)) @ np.linalg.qr(draw.normal(size=(9, 9)))[0] * np.linspace(1, 3, 9)
    )
    bank = bank_of(correlated, copies(2000, 8, 0.02), draw.normal(size=(2000, 9)))
    return bank, _measures.closeness(bank, np.arange(len(bank)), progress=False)


def ratios(table, layer):
    return table[table.layer == layer].set_index("null")


def test_closeness_has_a_row_a_layer_and_null_model(close):
    _, table = close
    assert table.columns.tolist() == ["layer", "null", "kernels", "real", "chance", "ratio", "low", "high"]
    expected = [(layer, null) for layer in "abc" for null in null_models.named_nulls]
    assert list(zip(table.layer, table.null, strict=True)) == expected
    assert (table.kernels == 2000).all()
    np.testing.assert_allclose(table.ratio, table.chance / table.real)
    assert (table.low < table.ratio).all()
    assert (table.ratio < table.high).all()


def test_medians_are_those_of_a_k_d_tree(close):
    bank, table = close

    def median(points):
        shapes = distances.unit(points).astype(np.float64)
        return np.median(np.square(cKDTree(shapes).query(shapes, 2)[0][:, 1]) / 2)

    for row in table.itertuples():
        points = bank.points[bank.layer(row.layer).rows]
        assert row.real == pytest.approx(median(points), rel=1e-4)
        assert row.chance == pytest.approx(median(null_models.drawn(row.null, points)), rel=1e-4)


def test_gaussian_kernels_are_as_close_as_a_gaussian_says(close):
    row = ratios(close[1], "a").loc["Gaussian of the same covariance"]
    assert row.ratio == pytest.approx(1, abs=0.1)
    assert row.low < 1 < row.high


def test_copies_of_few_shapes_are_far_closer_than_any_chance(close):
    assert (ratios(close[1], "b").low > 10).all()


def test_independent_weights_are_as_close_as_any_chance(close):
    rows = ratios(close[1], "c")
    np.testing.assert_allclose(rows.ratio, 1, atol=0.1)
    assert ((rows.low < 1.05) & (rows.high > 0.95)).all()


def test_the_interval_agrees_with_a_bootstrap_by_hand():
    bank, draw = bank_of(cloud(300, 0)), np.random.default_rng(5)
    table = _measures.closeness(bank, np.arange(300), progress=False)
    real = similarity.nearest_distances(bank.points, distance="cosine")
    for row in table.itertuples():
        chance = similarity.nearest_distances(null_models.drawn(row.null, bank.points), distance="cosine")
        medians = [np.median(x[draw.integers(0, 300, (4000, 300))], axis=1) for x in (chance, real)]
        expected = np.quantile(medians[0] / medians[1], (0.025, 0.975))
        np.testing.assert_allclose((row.low, row.high), expected, atol=0.1 * np.ptp(expected))


def test_a_seed_gives_one_table_and_another_seed_another():
    bank = bank_of(cloud(60, 0))
    first, again, other = (
        _measures.closeness(bank, np.arange(60), distance="scale-free", seed=seed, progress=False)
        for seed in (1, 1, 2)
    )
    assert first.equals(again)
    assert (first.real == other.real).all()
    assert (first.ratio != other.ratio).all()


def test_only_the_rows_asked_for_and_layers_of_three_kernels_are_looked_at():
    bank = bank_of(cloud(50, 0), cloud(2, 1), np.vstack([cloud(2, 2), np.zeros((5, 9))]), cloud(3, 3))
    rows = np.r_[np.arange(10, 30), np.arange(50, 62)]
    table = _measures.closeness(bank, rows, progress=False)
    assert list(dict.fromkeys(zip(table.layer, table.kernels, strict=True))) == [("a", 20), ("d", 3)]
    alone = _measures.closeness(bank_of(bank.points[10:30]), np.arange(20), progress=False)
    assert table[table.layer == "a"].equals(alone)


def test_kernels_that_all_have_doubles_are_infinitely_closer_without_an_interval():
    bank = bank_of(np.repeat(cloud(40, 0), 2, axis=0))
    for distance in ("euclidean", "cosine"):
        table = _measures.closeness(bank, np.arange(80), distance=distance, progress=False)
        assert (table.real == 0).all()
        assert (table.ratio == np.inf).all()
        assert table[["low", "high"]].isna().all(axis=None)


@pytest.mark.parametrize("doubled", ["real ones only", "by chance as well"])
def test_kernels_of_which_nearly_half_have_doubles_are_told_without_a_warning(doubled):
    points = cloud(81, 0)
    # 40 of 81 have a double: the median is not 0, but that of many resamples is
    points[:40] = (
        np.eye(9)[np.arange(40) % 5] if doubled == "by chance as well" else points[np.arange(40) // 2]
    )
    table = _measures.closeness(bank_of(points), np.arange(81), progress=False)
    assert np.isfinite(table.ratio).all()
    assert not ((table.low > table.ratio) | (table.high < table.ratio)).any()


@pytest.mark.parametrize("distance", ["cosine", "correlation"])
def test_real_kernels_and_null_kernels_without_a_shape_are_compared_in_equal_number(monkeypatch, distance):
    sparse = cloud(300, 0) * (np.random.default_rng(1).random((300, 9)) < 0.2)  # shuffled, some are all zeros
    compared, whole = [], _measures.nearest_distances

    def counted(points, **options):
        found = whole(points, **options)
        compared.append(len(found))
        return found

    monkeypatch.setattr(_measures, "nearest_distances", counted)
    _measures.closeness(bank_of(sparse), np.arange(300), distance=distance, progress=False)
    assert len(compared) >= 4
    assert len(set(compared)) == 1


def test_a_layer_of_few_sparse_kernels_does_not_end_the_table():
    bank = bank_of(np.eye(9)[:3], cloud(5, 0))  # shuffled across kernels, two or all three may be zeros
    for seed in range(10):
        table = _measures.closeness(bank, np.arange(8), seed=seed, progress=False)
        assert (table.layer == "b").sum() == len(null_models.named_nulls)


def lost(points, centres):
    return np.square(
        pairwise_distances(points.astype(np.float64), centres.astype(np.float64)).min(axis=1)
    ).sum()


@pytest.mark.parametrize("shapes", [False, True])
def test_explained_is_what_the_centres_of_k_means_do_not_lose(shapes):
    layers = cloud(60, 0), 3 * cloud(40, 1), cloud(5, 2)
    table = similarity.explained(bank_of(*layers), 8, shapes=shapes, seed=2, progress=False)
    assert table.columns.tolist() == ["a", "b", "c"]
    assert table.index.tolist() == ["a", "b", "c", "all layers", "all layers, as many in all"]
    parts = [distances.unit(layer) if shapes else layer for layer in layers]
    books = [
        (parts[0], 8),
        (parts[1], 8),
        (parts[2], 5),
        *((np.concatenate(parts), k) for k in (8, 8 + 8 + 5)),
    ]
    for name, (part, k) in zip(table.index, books, strict=True):
        centres = kmeans.fit(part, k, seed=2).centres
        expected = [100 * (1 - lost(x, centres) / np.square(x.astype(np.float64)).sum()) for x in parts]
        np.testing.assert_allclose(table.loc[name], expected, rtol=1e-5, atol=1e-4)


def test_a_codebook_of_every_distinct_kernel_describes_its_layer_whole():
    few = np.repeat(cloud(6, 0), 5, axis=0)
    table = similarity.explained(bank_of(few, few[::-1], cloud(30, 1)), 6, progress=False)
    np.testing.assert_allclose(table.loc[["a", "b"], ["a", "b"]], 100)
    assert (table.loc[["a", "b"], "c"] < 100).all()
    assert table.loc["c", "a"] < 100


def test_a_codebook_at_right_angles_describes_nothing():
    one, other = np.zeros((2, 12, 9))
    one[:, 0] = other[:, 1] = 1
    table = similarity.explained(bank_of(one, other), 1, progress=False)
    # |a - b|² = 2 |a|²: as much again is added
    np.testing.assert_allclose(table.loc[["a", "b"]], [[100, -100], [-100, 100]])
    # the mean of the two, (1/2, 1/2), is 1/√2 away from either
    np.testing.assert_allclose(table.loc["all layers"], 50)
    np.testing.assert_allclose(table.loc["all layers, as many in all"], 100)


def test_a_codebook_of_zeros_describes_nothing_and_shapes_do_not_depend_on_length():
    one = cloud(12, 0)
    table = similarity.explained(bank_of(one, np.zeros((4, 9))), 12, progress=False)
    assert table.loc["b", "a"] == pytest.approx(0, abs=1e-4)
    scaled = similarity.explained(bank_of(one, 100 * one), 12, shapes=True, progress=False)
    np.testing.assert_allclose(scaled.loc[["a", "b"]], 100, atol=1e-4)
    plain = similarity.explained(bank_of(one, 100 * one), 12, progress=False)
    assert plain.loc["a", "b"] < 5


@EACH
def test_closest_are_the_nearest_of_all_kernels_of_the_bank(distance):
    points = cloud(80, 5)
    points[[9, 30]] = 0
    bank = bank_of(points[:50], points[50:])
    kept = np.delete(np.arange(80), [9, 30]) if distance in LARGEST else np.arange(80)
    apart = between(distance, points[kept])
    np.fill_diagonal(apart, np.inf)
    for row in (0, 49, 50, 79):
        mine = apart[np.flatnonzero(kept == row)[0]]
        rows, found = similarity.closest(bank, row, 6, distance=distance)
        assert (rows.dtype, found.dtype) == (np.int64, np.float64)
        np.testing.assert_array_equal(rows, kept[np.argsort(mine)[:6]])
        np.testing.assert_allclose(found, np.sort(mine)[:6], rtol=1e-4, atol=1e-6)


@EACH
def test_a_duplicate_is_found_at_distance_zero_and_the_kernel_itself_is_not(distance):
    points = cloud(40, 6)
    points[33] = points[4]
    rows, found = similarity.closest(bank_of(points), 4, 39, distance=distance)
    assert (rows[0], found[0]) == (33, 0)
    assert sorted(rows) == [row for row in range(40) if row != 4]


@pytest.mark.parametrize(
    ("distance", "change"),
    [
        ("cosine", lambda kernel: 3 * kernel),
        ("correlation", lambda kernel: 1 - 2 * kernel),
        ("scale-free", lambda kernel: -kernel),
        ("symmetric", lambda kernel: np.rot90(kernel.reshape(3, 3)).ravel()),
    ],
)
def test_closest_finds_what_the_distance_is_blind_to(distance, change):
    points = cloud(40, 6)
    points[33] = change(points[4])
    rows, found = similarity.closest(bank_of(points), 4, 1, distance=distance)
    assert rows.tolist() == [33]
    assert found[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("row", [-1, 40])
def test_a_row_that_is_not_in_the_bank_is_refused(row):
    with pytest.raises(InvalidValueError, match=r"rows must be whole numbers .* 0 to 39"):
        similarity.closest(bank_of(cloud(40, 0)), row, 3)


def test_a_kernel_that_cannot_be_compared_or_too_many_neighbours_are_refused():
    points = cloud(40, 0)
    points[7] = 0
    bank = bank_of(points)
    assert len(similarity.closest(bank, 7, 3)[0]) == 3
    with pytest.raises(InvalidValueError, match="kernel 7 has no shape; cosine distance"):
        similarity.closest(bank, 7, 3, distance="cosine")
    with pytest.raises(InvalidValueError, match="k is 39"):
        similarity.closest(bank, 0, 39, distance="cosine")


def test_layers_of_fewer_than_three_comparable_kernels_are_left_out():
    bank = bank_of(cloud(5, 0), cloud(2, 1), np.concatenate([cloud(2, 2), np.zeros((4, 9))]))
    assert [x.name for x in similarity.comparable(bank).layers] == ["a"]
    assert [x.name for x in similarity.comparable(bank, share=0, distance="euclidean").layers] == ["a", "c"]
    with pytest.raises(InvalidValueError, match=r"2 kernels.*cosine"):
        similarity.comparable(bank.only("b", "c"))
