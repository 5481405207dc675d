import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.spatial import cKDTree
from sklearn import datasets, manifold
from sklearn.metrics import pairwise_distances
from threadpoolctl import threadpool_limits

from kclib.errors import InvalidValueError, UnknownNameError
from kclib.kmeans.symmetric import transforms
from kclib.similarity import _neighbours, distances, embedding
from kclib.store import Store

pytestmark = pytest.mark.filterwarnings("ignore:Tensorflow not installed:ImportWarning")  # umap's import
in_soak = pytest.mark.skipif(
    "SOAK" not in os.environ, reason="UMAP compiles its transform for 90 s: make soak"
)
BLOBS, BLOB = datasets.make_blobs(400, 9, centers=4, random_state=0)
BLOBS = BLOBS.astype(np.float32)
POINTS, NEW = BLOBS[:300], BLOBS[300:]


def cloud(n, seed):
    return np.random.default_rng(seed).normal(size=(n, 9)).astype(np.float32)


def turned_copies():
    """Return six shapes in forty copies each, turned at random, with noise; and of which shape each is."""
    draw = np.random.default_rng(0)
    shapes, whose = draw.normal(size=(6, 9)), np.arange(240) % 6
    turns = transforms(3)[draw.integers(0, 8, 240)]
    copies = np.take_along_axis(shapes[whose], turns, axis=1) + 0.05 * draw.normal(size=(240, 9))
    return copies.astype(np.float32), whose


COPIES, WHOSE = turned_copies()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def graph(store):
    return embedding.graph(POINTS, kind="raw", n_neighbors=30, store=store)


@pytest.fixture(scope="module")
def layout(graph, store):
    return embedding.layout(graph, store=store)


@pytest.fixture(scope="module")
def symmetric(store):
    return embedding.graph(COPIES, kind="symmetric", n_neighbors=15, store=store)


@pytest.fixture
def fits(monkeypatch):
    """A umap that keeps what its fits are given, and answers the number of the fit."""
    given = []

    def fitted(**options):
        def fit(points):
            given.append(options)
            return SimpleNamespace(embedding_=np.full((len(points), 2), len(given), np.float64))

        return SimpleNamespace(fit=fit)

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=fitted))
    return given


@pytest.fixture
def searches(monkeypatch):
    """The options of all searches for neighbours."""
    seen, whole = [], _neighbours.nearest

    def counted(points, **options):
        seen.append(options)
        return whole(points, **options)

    monkeypatch.setattr(_neighbours, "nearest", counted)
    return seen


def apart(kind, points):
    """Return the distances that a kind of map is of, in float64."""
    points = points.astype(np.float64)
    if kind == "unit":
        points = points / np.linalg.norm(points, axis=1, keepdims=True)
    turns = transforms(3) if kind == "symmetric" else np.arange(9)[None]
    return np.minimum.reduce([pairwise_distances(points[:, turn], points) for turn in turns])


@pytest.mark.parametrize("kind", embedding._named_maps)
def test_a_graph_has_each_kernel_itself_and_its_exact_nearest_others(kind, store):
    found = embedding.graph(COPIES, kind=kind, n_neighbors=12, store=store)
    assert (found.kind, found.indices.shape, found.distances.shape) == (kind, (240, 12), (240, 12))
    assert (found.indices.dtype, found.distances.dtype, found.points.dtype) == (np.int32, *[np.float32] * 2)
    assert found.indices[:, 0].tolist() == list(range(240))
    assert not found.distances[:, 0].any()
    expected = apart(kind, COPIES)
    np.fill_diagonal(expected, -1)
    order = np.argsort(expected, axis=1)[:, :12]
    np.testing.assert_array_equal(found.indices, order)
    nearest = np.take_along_axis(expected, order, axis=1)
    np.testing.assert_allclose(found.distances[:, 1:], nearest[:, 1:], rtol=1e-5, atol=1e-6)


def test_the_points_of_a_unit_map_are_shapes_and_of_the_others_the_kernels(store):
    zeros = np.vstack([POINTS, np.zeros((1, 9), np.float32)])
    found = embedding.graph(zeros, kind="unit", n_neighbors=5, store=store)
    np.testing.assert_array_equal(found.points, distances.unit(zeros))
    assert not found.points[-1].any()
    np.testing.assert_allclose(found.distances[-1, 1:], 1, rtol=1e-6)  # all shapes are as far from the centre
    for kind in ("raw", "symmetric"):
        found = embedding.graph(zeros, kind=kind, n_neighbors=5, store=store)
        np.testing.assert_array_equal(found.points, zeros)


def test_neighbours_are_searched_once_for_all_layouts_of_them(searches, fits, tmp_path):
    store = Store(tmp_path)
    for settings in ({}, {"min_dist": 0.5}, {"n_neighbors": 5}, {"n_neighbors": 20}, {"seed": 3}):
        graph = embedding.graph(POINTS, kind="raw", n_neighbors=20, store=store)
        embedding.layout(graph, store=store, **settings)
    assert (len(searches), len(fits)) == (1, 5)
    for options, width in zip(fits, (15, 15, 5, 20, 15), strict=True):
        indices, apart = options["precomputed_knn"]
        np.testing.assert_array_equal(indices, graph.indices[:, :width])
        np.testing.assert_array_equal(apart, graph.distances[:, :width])
    embedding.graph(POINTS, kind="unit", n_neighbors=20, store=store)
    embedding.graph(POINTS, kind="raw", n_neighbors=21, store=store)
    embedding.graph(POINTS[::-1], kind="raw", n_neighbors=20, store=store)
    assert len(searches) == 4


def test_other_settings_kernels_and_widths_are_fitted_anew_and_the_same_are_not(fits, graph, store, tmp_path):
    other = embedding.graph(POINTS + 1, kind="raw", store=store)
    few, store = embedding.graph(POINTS, kind="raw", store=store), Store(tmp_path)
    first = embedding.layout(graph, store=store)
    assert (first.shape, first.dtype, len(fits)) == ((300, 2), np.float32, 1)
    for change in ({"n_neighbors": 5}, {"min_dist": 0.2}, {"seed": 3}):
        assert embedding.layout(graph, store=store, **change)[0, 0] == len(fits) > 1
    assert embedding.layout(other, store=store)[0, 0] == len(fits) == 5
    assert embedding.layout(few, store=store)[0, 0] == 1  # its 15 neighbours are the first of the graph's 30
    assert embedding.layout(graph, store=store, n_neighbors=15, min_dist=0.1, seed=0)[0, 0] == 1
    assert len(fits) == 5


def test_kernels_with_the_same_neighbours_at_other_distances_are_fitted_anew(fits, tmp_path):
    # Each has one near other, and it is nearer yet when turned: the graphs differ in distances only.
    noise, turn = cloud(20, 0), transforms(3)[1]
    points = (
        np.concatenate([noise, noise[:, turn]]) + 20 * np.tile(np.arange(20, dtype=np.float32), 2)[:, None]
    )
    graphs = [
        embedding.graph(points, kind=kind, n_neighbors=2, store=Store(tmp_path))
        for kind in ("raw", "symmetric")
    ]
    np.testing.assert_array_equal(graphs[0].indices, graphs[1].indices)
    assert (graphs[0].distances != graphs[1].distances).any()
    for graph in graphs:
        embedding.layout(graph, n_neighbors=2, store=Store(tmp_path))
    assert len(fits) == 2


def test_a_layout_keeps_neighbours_together(graph, layout):
    assert (layout.shape, layout.dtype) == ((300, 2), np.float32)
    assert manifold.trustworthiness(POINTS, layout, n_neighbors=15) > 0.8
    shuffled = np.random.default_rng(0).permutation(layout)
    assert embedding.trustworthiness(graph, shuffled) < 0.6


def test_a_stored_graph_and_layout_are_neither_searched_nor_fitted_again(
    graph, layout, store, searches, monkeypatch
):
    monkeypatch.setitem(sys.modules, "umap", None)  # an import of it would fail
    again = embedding.graph(POINTS, kind="raw", n_neighbors=30, store=store)
    np.testing.assert_array_equal(again.indices, graph.indices)
    np.testing.assert_array_equal(again.distances, graph.distances)
    assert embedding.layout(again, store=store).tobytes() == layout.tobytes()
    assert searches == []
    with pytest.raises(ImportError):
        embedding.layout(again, store=store, seed=1)


def test_the_same_seed_gives_the_same_bits(graph, layout, tmp_path):
    assert embedding.layout(graph, store=Store(tmp_path)).tobytes() == layout.tobytes()


def test_the_default_store_is_used_where_none_is_given(fits, tmp_path, monkeypatch):
    monkeypatch.setenv("KCLIB_STORE", str(tmp_path))
    graph = embedding.graph(POINTS, kind="raw")
    assert graph.indices.shape == (300, 15)
    embedding.layout(graph)
    embedding.layout(graph)
    assert (len(list(tmp_path.rglob("*.safetensors"))), len(fits)) == (2, 1)


def test_turned_copies_of_a_kernel_are_neighbours_on_a_symmetric_map_only(symmetric, store):
    assert (WHOSE[symmetric.indices] == WHOSE[:, None]).all()
    raw = embedding.graph(COPIES, kind="raw", n_neighbors=15, store=store)
    assert (WHOSE[raw.indices] == WHOSE[:, None]).mean() < 0.9
    layout = embedding.layout(symmetric, store=store)
    near = cKDTree(layout).query(layout, 6)[1]
    assert (WHOSE[near] == WHOSE[:, None]).mean() > 0.95
    assert embedding.trustworthiness(symmetric, layout) > 0.8
    assert embedding.trustworthiness(raw, layout) < embedding.trustworthiness(symmetric, layout) - 0.05


@pytest.mark.parametrize("kind", embedding._named_maps)
def test_trustworthiness_is_scikit_learns_in_the_maps_own_distance(kind, store):
    places = COPIES[:, :2]
    graph = embedding.graph(COPIES, kind=kind, store=store)
    expected = manifold.trustworthiness(apart(kind, COPIES), places, n_neighbors=15, metric="precomputed")
    assert embedding.trustworthiness(graph, places) == pytest.approx(expected, abs=1e-6)
    if kind == "raw":
        expected = manifold.trustworthiness(COPIES, places, n_neighbors=15)
        assert embedding.trustworthiness(graph, places) == pytest.approx(expected, abs=1e-6)


def test_trustworthiness_draws_points_and_their_places_together(store):
    line = np.arange(200, dtype=np.float32)[:, None] * np.ones(9, np.float32)
    graph = embedding.graph(line, kind="raw", store=store)
    assert embedding.trustworthiness(graph, line[:, :2], limit=50) == 1
    noise = np.random.default_rng(0).normal(size=(200, 2))
    one, again, other = (embedding.trustworthiness(graph, noise, limit=50, seed=seed) for seed in (0, 0, 1))
    assert one == again != other


@pytest.fixture(scope="module")
def unit_map(store):
    graph = embedding.graph(POINTS, kind="unit", store=store)
    return graph, embedding.layout(graph, store=store)


def test_kernels_are_placed_in_blocks_as_the_map_prepares_them(store, monkeypatch):
    graph, blocks = embedding.graph(POINTS, kind="unit", store=store), []
    monkeypatch.setattr("pynndescent.NNDescent", lambda points, **_: points)
    model = SimpleNamespace(transform=lambda rows: blocks.append(rows) or rows[:, :2])
    monkeypatch.setattr(embedding, "_fitted", lambda *_: model)
    monkeypatch.setattr(embedding, "_BLOCK", 40)
    found = embedding.placed(graph, 3 * NEW)
    expected = NEW / np.linalg.norm(NEW, axis=1, keepdims=True) / graph.unit
    np.testing.assert_allclose(found, expected[:, :2], rtol=1e-5)
    assert [len(block) for block in blocks] == [50, 50]
    assert embedding.placed(graph, NEW[:0]).shape == (0, 2)


@in_soak
def test_a_maps_own_kernels_are_placed_near_their_places(graph, layout):
    extent = np.ptp(layout, axis=0).max()
    nearly = POINTS[:100] * np.float32(1 + 1e-6)
    found = embedding.placed(graph, nearly)
    assert (found.shape, found.dtype) == ((100, 2), np.float32)
    off = np.linalg.norm(found - layout[:100], axis=1)
    assert np.median(off) < 0.05 * extent
    assert off.max() < 0.25 * extent


@in_soak
def test_new_kernels_fall_among_their_like_in_any_number_of_blocks_and_at_any_length(unit_map, monkeypatch):
    graph, layout = unit_map
    monkeypatch.setattr(embedding, "_BLOCK", 40)
    found = embedding.placed(graph, 3 * NEW)
    assert found.shape == (100, 2)
    assert (BLOB[:300][cKDTree(layout).query(found)[1]] == BLOB[300:]).mean() > 0.95


def test_a_graph_that_cannot_be_is_refused(store):
    with pytest.raises(UnknownNameError, match=r"'units'.*'unit'\?"):
        embedding.graph(POINTS, kind="units", store=store)
    for n_neighbors in (1, 301):
        with pytest.raises(InvalidValueError, match=f"n_neighbors is {n_neighbors};"):
            embedding.graph(POINTS, n_neighbors=n_neighbors, store=store)
    with pytest.raises(InvalidValueError, match=r"have 6 weights; .* square"):
        embedding.graph(POINTS[:, :6].copy(), kind="symmetric", store=store)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"n_neighbors": 1}, "n_neighbors is 1;"),
        ({"n_neighbors": 31}, "n_neighbors is 31;"),
        ({"min_dist": -0.1}, r"min_dist is -0\.1;"),
        ({"min_dist": 1.5}, r"min_dist is 1\.5;"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_and_so_are_places_on_it(graph, store, settings, sentence):
    with pytest.raises(InvalidValueError, match=sentence):
        embedding.layout(graph, store=store, **settings)
    with pytest.raises(InvalidValueError, match=sentence):
        embedding.placed(graph, NEW, **settings)


def test_kernels_are_not_placed_on_a_symmetric_map(symmetric):
    with pytest.raises(InvalidValueError, match="symmetric"):
        embedding.placed(symmetric, COPIES)


@pytest.mark.parametrize("kind", embedding._named_maps)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_few_kernels_lie_as_their_distances_say(kind, n, store):
    graph = embedding.graph(cloud(n, 0), kind=kind, n_neighbors=n, store=store)
    found = embedding.layout(graph, n_neighbors=n, store=store)
    assert found.shape == (n, 2)
    np.testing.assert_array_equal(found, embedding.layout(graph, n_neighbors=n, seed=1, store=store))
    wanted, ours = apart(kind, cloud(n, 0)), pairwise_distances(found)
    assert (ours <= wanted + 1e-5).all()
    if n < 4:  # a triangle fits into a plane
        np.testing.assert_allclose(ours, wanted, atol=1e-5)
    assert 0 <= embedding.trustworthiness(graph, found) <= 1


@pytest.mark.parametrize("n", [5, 7, 16])
def test_few_kernels_more_have_a_map_of_as_many_neighbours_as_there_are(n, store):
    graph = embedding.graph(cloud(n, 0), n_neighbors=min(n, 15), store=store)
    found = embedding.layout(graph, n_neighbors=min(n, 15), store=store)
    assert found.shape == (n, 2)
    assert np.isfinite(found).all()


def test_places_are_only_found_on_a_map_that_umap_made(store):
    graph = embedding.graph(cloud(4, 0), n_neighbors=4, store=store)
    with pytest.raises(InvalidValueError, match=r"4 kernels.*5"):
        embedding.placed(graph, cloud(2, 1), n_neighbors=4)


@pytest.mark.parametrize("kind", ["unit", "symmetric"])
@pytest.mark.parametrize("others", [0, 40], ids=["all", "some"])
def test_equal_kernels_have_the_same_map_again_for_any_number_of_threads(kind, others, tmp_path, monkeypatch):
    points = np.concatenate([np.ones((40, 9), np.float32), cloud(others, 0)])
    found = []
    for n_threads in (1, 2):
        monkeypatch.setattr(embedding._neighbours.threads, "threads", lambda *_, n=n_threads: n)
        new = Store(tmp_path / str(n_threads))
        with threadpool_limits(n_threads):
            graph = embedding.graph(points, kind=kind, store=new)
            found.append((graph.indices, embedding.layout(graph, store=new)))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.isfinite(found[0][1]).all()


@pytest.mark.parametrize("factor", [2.0**-90, 2.0**70])
def test_huge_and_tiny_kernels_have_the_map_of_ordinary_ones(factor, tmp_path):
    points = cloud(60, 0) / 8  # within what is scaled to 1
    graphs = [
        embedding.graph(scale * points, kind="raw", store=Store(tmp_path / str(i)))
        for i, scale in enumerate((2.0**60, factor))
    ]
    np.testing.assert_array_equal(graphs[0].indices, graphs[1].indices)
    np.testing.assert_array_equal(graphs[0].distances, graphs[1].distances)
    assert graphs[0].unit / graphs[1].unit == 2.0**60 / factor
    one, other = (embedding.layout(graph, store=Store(tmp_path / "maps")) for graph in graphs)
    np.testing.assert_array_equal(one, other)
