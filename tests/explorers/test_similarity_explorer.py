import numpy as np
import pytest
import torch
from gates import PATIENCE
from scipy.spatial.distance import cdist
from torch import nn

from kclib import kernels, kmeans
from kclib.errors import InvalidValueError, StoppedError, UnknownNameError
from kclib.explorers import MapExplorer, SimilarityExplorer, _background, _similarity_explorer
from kclib.explorers._map_explorer import COLOURS, MapQuestion
from kclib.explorers._similarity_explorer import SimilarityQuestion
from kclib.kmeans import symmetric
from kclib.similarity import null_models
from kclib.similarity.embedding import Graph

LAYERS = ("0", "1", "2")


@pytest.fixture
def bank():
    """Layers of 24, 128 and 12 kernels, all of different lengths."""
    torch.manual_seed(0)
    return kernels.extract(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(3, 4, 3)))


def sampled(bank, per_layer=10):
    return kernels.sample(bank, per_layer, seed=3)


def turned(kernel):
    """Return the eight flips and rotations of a kernel (9,)."""
    square = kernel.reshape(3, 3)
    return [np.rot90(face, k).ravel() for face in (square, square[::-1]) for k in range(4)]


def apart(points, distance):
    """Return the distances of all pairs, computed kernel by kernel in float64."""
    points = points.astype(float)
    if distance == "euclidean":
        return cdist(points, points)
    if distance == "symmetric":
        return np.min([cdist(points, images) for images in zip(*map(turned, points), strict=True)], axis=0)
    if distance == "correlation":
        return 1 - np.abs(np.corrcoef(points))
    cosine = 1 - cdist(points, points, "cosine")
    return 1 - cosine if distance == "cosine" else np.sqrt(1 - np.minimum(cosine**2, 1))


def median_nearest(points, distance):
    pairs = apart(points, distance)
    np.fill_diagonal(pairs, np.inf)
    return np.median(pairs.min(axis=1))


def chosen_points(bank, rows, layers):
    return np.concatenate(
        [
            bank.points[rows[(rows >= x.start) & (rows < x.start + x.n_kernels)]]
            for x in bank.layers
            if x.name in layers
        ]
    )


def curves(ax):
    """Return the values of each curve of a histogram, by name."""
    return {
        patch.get_label(): patch.get_data()
        for patch in ax.patches
        if patch.get_label() in {"real kernels", *null_models.named_nulls}
    }


def test_similarity_begins_with_the_middle_layer_by_cosine(bank):
    explorer = SimilarityExplorer(bank, sampled(bank))
    assert explorer.question == SimilarityQuestion(("1",), "cosine")
    assert explorer.answer is None


@pytest.mark.parametrize("layers", [("1",), ("0", "2"), LAYERS])
@pytest.mark.parametrize("distance", ["euclidean", "cosine", "correlation", "scale-free", "symmetric"])
def test_similarity_is_that_of_pairs_measured_one_by_one(bank, distance, layers):
    rows = sampled(bank)
    explorer = SimilarityExplorer(bank, rows, n_bins=7, seed=5)
    explorer.choose(distance=distance, layers=layers)
    assert explorer.wait(PATIENCE)
    answer, points = explorer.answer, chosen_points(bank, rows, layers)
    assert answer.question == SimilarityQuestion(layers, distance)
    expected = {
        "kernels compared": str(len(points)),
        "median distance to the nearest": f"{median_nearest(points, distance):.3g}",
    }
    for null in null_models.named_nulls:
        parts = [chosen_points(bank, rows, (name,)) for name in LAYERS if name in layers]
        drawn = np.concatenate([null_models.drawn(null, part, seed=5) for part in parts])
        expected[f"in “{null}”"] = f"{median_nearest(drawn, distance):.3g}"
    assert answer.facts == expected
    (ax,) = answer.figure.axes
    found = curves(ax)
    assert list(found) == ["real kernels", *null_models.named_nulls]
    values, edges, _ = found["real kernels"]
    largest = {"euclidean": None, "symmetric": None, "cosine": 2}.get(distance, 1)
    np.testing.assert_allclose(
        edges, np.linspace(0, largest or 2 * np.linalg.norm(points, axis=1).max(), 8), rtol=1e-6
    )
    pairs = apart(points, distance)[np.triu_indices(len(points), 1)]
    counts, _ = np.histogram(pairs, edges)
    np.testing.assert_allclose(values, 100 * counts / len(pairs), atol=1e-9)
    assert values.sum() == pytest.approx(100)
    assert f"{distance} distance (" in ax.get_xlabel()
    assert f"all pairs of {len(points)} kernels" in ax.get_title()


def test_chance_is_no_closer_than_reality_where_a_strong_and_a_weak_layer_are_chosen():
    """Null models over both layers at once would have kernels of any length between theirs."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(8, 32, 3), nn.Conv2d(32, 32, 3))
    with torch.no_grad():
        network[0].weight.mul_(30)
    bank = kernels.extract(network)
    explorer = SimilarityExplorer(bank, kernels.sample(bank, 200))
    explorer.choose(layers=("0", "1"), distance="euclidean")
    assert explorer.wait(PATIENCE)
    real, *nulls = (float(text) for text in list(explorer.answer.facts.values())[1:])
    assert nulls == pytest.approx([real] * 3, rel=0.3)


def test_similarity_of_more_kernels_than_a_moment_allows_is_that_of_evenly_spread_ones(bank, monkeypatch):
    monkeypatch.setattr(_similarity_explorer, "_MOST", 20)
    explorer = SimilarityExplorer(bank, np.arange(len(bank)))
    answer = explorer.show()
    points = bank.points[bank.layer("1").rows][::7]  # 128 kernels: each seventh, for each sixth were 22
    assert answer.facts["kernels compared"] == "19"
    nearest = median_nearest(points, "cosine")
    assert answer.facts["median distance to the nearest"] == f"{nearest:.3g}"


def test_kernels_that_cannot_be_compared_are_left_out():
    network = nn.Sequential(nn.Conv2d(2, 3, 3))
    with torch.no_grad():
        network[0].weight[0] = 0
    bank = kernels.extract(network)
    explorer = SimilarityExplorer(bank, np.arange(6))
    assert explorer.show().facts["kernels compared"] == "4"
    explorer.choose(distance="euclidean")
    assert explorer.wait(PATIENCE)
    assert explorer.answer.facts["kernels compared"] == "6"


def test_similarity_of_too_few_kernels_is_said_and_keeps_the_answer(bank):
    rows = np.concatenate([bank.layer("0").start + np.arange(2), bank.layer("1").start + np.arange(9)])
    explorer = SimilarityExplorer(bank, rows)
    first = explorer.show()
    explorer.choose(layers=("0",))
    assert explorer.wait(PATIENCE)
    assert explorer.status == "2 sampled kernels of 0 can be compared; give at least 3."
    assert explorer.answer is first
    explorer.choose(layers=("2",))
    assert explorer.wait(PATIENCE)
    assert explorer.status == "0 sampled kernels of 2 can be compared; give at least 3."


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layers": ("conv9",)}, InvalidValueError, "no layer 'conv9'"),
        ({"layers": ()}, InvalidValueError, "name at least one"),
        ({"distance": "cosin"}, UnknownNameError, "unknown distance 'cosin'.*mean 'cosine'"),
    ],
)
def test_similarity_of_what_is_not_there_is_refused_and_changes_nothing(bank, changes, error, message):
    explorer = SimilarityExplorer(bank, sampled(bank))
    before, first = explorer.question, explorer.show()
    with pytest.raises(error, match=message):
        explorer.choose(**changes)
    assert (explorer.question, explorer.answer, explorer.status) == (before, first, "")


def test_similarity_stops_between_null_models_once_a_newer_question_has_come(bank, monkeypatch):
    explorer, measured = SimilarityExplorer(bank, sampled(bank)), []
    genuine = _similarity_explorer.similarity.pair_histogram
    monkeypatch.setattr(
        _similarity_explorer.similarity,
        "pair_histogram",
        lambda *a, **k: measured.append(1) or genuine(*a, **k),
    )
    with pytest.raises(StoppedError):
        explorer.answered(explorer.question, lambda: len(measured) == 2)
    assert len(measured) == 2


def map_explorer(bank, per_layer=10, seed=5):
    """Three kinds of maps whose places are made up, for no explorer makes a layout itself."""
    rows, draw = sampled(bank, per_layer), np.random.default_rng(0)
    points = bank.points[rows]
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    prepared = {"raw": points, "unit": unit, "symmetric": points}
    none = np.empty((len(rows), 0), np.int32)
    graphs = {kind: Graph(kind, p, none, none.astype(np.float32)) for kind, p in prepared.items()}
    layouts = {kind: draw.normal(size=(len(rows), 2)).astype(np.float32) for kind in graphs}
    return MapExplorer(bank, rows, graphs, layouts, seed=seed)


def asked(explorer, **changes):
    explorer.choose(**changes)
    assert explorer.wait(PATIENCE)
    assert explorer.status == ""
    return explorer.answer


def on_map(answer):
    """Return the points of a map and what colours them."""
    dots = answer.figure.axes[0].collections[0]
    return np.asarray(dots.get_offsets()), dots


def test_a_map_begins_with_the_shapes_of_every_layers_kernels_coloured_by_layer(bank):
    explorer = map_explorer(bank)
    assert explorer.question == MapQuestion(LAYERS, "unit", "layer", 16)
    places, dots = on_map(explorer.show())
    np.testing.assert_array_equal(places, explorer.layouts["unit"])
    assert explorer.answer.facts == {"kernels on the map": "30"}
    colours = dots.get_facecolors()
    assert len(np.unique(colours, axis=0)) == 3
    for part in (slice(0, 10), slice(10, 20), slice(20, 30)):
        assert len(np.unique(colours[part], axis=0)) == 1
    legend = explorer.answer.figure.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == list(LAYERS)


@pytest.mark.parametrize("kind", ["raw", "unit", "symmetric"])
@pytest.mark.parametrize("colour", COLOURS)
def test_a_map_of_some_layers_is_a_part_of_the_whole_at_the_same_extent(bank, kind, colour):
    explorer = map_explorer(bank)
    whole = asked(explorer, kind=kind, colour=colour)
    part = asked(explorer, layers=("0", "2"))
    shown = np.r_[0:10, 20:30]
    np.testing.assert_array_equal(on_map(part)[0], explorer.layouts[kind][shown])
    assert part.facts == {"kernels on the map": "20"}
    ax, other = part.figure.axes[0], whole.figure.axes[0]
    assert (ax.get_xlim(), ax.get_ylim()) == (other.get_xlim(), other.get_ylim())
    before, after = (on_map(x)[1] for x in (whole, part))
    if colour == "layer":
        np.testing.assert_array_equal(after.get_facecolors(), before.get_facecolors()[shown])
    else:
        np.testing.assert_array_equal(after.get_array(), before.get_array()[shown])
    assert part.figure.get_suptitle() == f"{kind} kernels, 2 layers, 0 … 2"


def test_a_map_coloured_by_norm_shows_the_kernels_own_lengths_on_every_map(bank):
    explorer = map_explorer(bank)
    lengths = np.log10(np.sqrt(np.square(bank.kernels[explorer.rows].astype(float)).sum(axis=(1, 2))))
    for kind in ("raw", "unit"):
        answer = asked(explorer, kind=kind, colour="norm")
        np.testing.assert_allclose(on_map(answer)[1].get_array(), lengths, rtol=1e-5)
        assert "weight units" in answer.figure.axes[1].get_ylabel()


@pytest.mark.parametrize("kind", ["raw", "unit", "symmetric"])
def test_a_map_coloured_by_cluster_shows_the_clusters_of_what_the_map_compares(bank, kind):
    explorer = map_explorer(bank)
    answer = asked(explorer, kind=kind, colour="cluster", n_clusters=7)
    points = explorer.graphs[kind].points
    if kind == "symmetric":
        labels = symmetric.fit(points, 7, turned=True, seed=5).labels
    else:
        labels = kmeans.fit(points, 7, seed=5).labels
    np.testing.assert_array_equal(on_map(answer)[1].get_array(), labels)
    assert answer.figure.axes[0].get_title().startswith(f"{labels.max() + 1} clusters")


def test_the_clusters_of_a_map_are_made_once_for_each_kind_and_number(bank, monkeypatch):
    made, genuine = [], kmeans.fit
    monkeypatch.setattr(
        kmeans, "fit", lambda points, k, **options: made.append(k) or genuine(points, k, **options)
    )
    explorer = map_explorer(bank)
    for changes in (
        {"kind": "raw", "colour": "cluster", "n_clusters": 4},
        {"layers": ("1",)},
        {"colour": "layer"},
        {"colour": "cluster"},
        {"n_clusters": 5},
        {"n_clusters": 4},
        {"kind": "unit"},
        {"kind": "raw"},
    ):
        asked(explorer, **changes)
    assert made == [4, 5, 4]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layers": ("conv9",)}, InvalidValueError, "no layer 'conv9'"),
        ({"layers": ()}, InvalidValueError, "name at least one"),
        ({"kind": "unt"}, UnknownNameError, "unknown kind of map 'unt'.*mean 'unit'"),
        ({"colour": "norms"}, UnknownNameError, "unknown colour 'norms'.*mean 'norm'"),
        ({"n_clusters": 0}, InvalidValueError, r"^K is 0;"),
        ({"n_clusters": 31}, InvalidValueError, r"^K is 31;"),
    ],
)
def test_a_map_that_cannot_be_is_refused_and_changes_nothing(bank, changes, error, message):
    explorer = map_explorer(bank)
    before, first = explorer.question, explorer.show()
    with pytest.raises(error, match=message):
        explorer.choose(**changes)
    assert (explorer.question, explorer.answer, explorer.status) == (before, first, "")


def test_the_most_clusters_of_a_map_are_its_kernels(bank):
    explorer = map_explorer(bank)
    assert explorer.largest == 30
    answer = asked(explorer, colour="cluster", n_clusters=30)
    assert answer.figure.axes[0].get_title().startswith("30 clusters")


def test_a_map_of_fewer_kernels_than_clusters_to_begin_with_is_shown(bank):
    explorer = map_explorer(bank, per_layer=3)
    assert explorer.show().facts == {"kernels on the map": "9"}
    assert explorer.question.n_clusters == 9


def test_layers_are_called_by_what_they_have_in_common(bank):
    assert _background.called(bank, LAYERS) == "all 3 layers"
    assert _background.called(bank, ("1",)) == "1"
    assert _background.called(bank, ("0", "2")) == "2 layers, 0 … 2"
    assert _background.called(bank.only("1"), ("1",)) == "1"


def test_rows_of_layers_are_those_between_their_first_and_last_kernel(bank):
    rows = np.array([0, 23, 24, 151, 152, 163])
    assert _background.rows_of(bank, rows, ["0"]).tolist() == [0, 23]
    assert _background.rows_of(bank, rows, ["2", "0", "2"]).tolist() == [0, 23, 152, 163]
    assert _background.rows_of(bank, rows, ["1"]).tolist() == [24, 151]
