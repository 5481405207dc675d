import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox
from scipy.cluster import hierarchy

from kclib import plots
from kclib.similarity import PairHistogram

EDGES = np.array([0.0, 1, 2, 3])
LEDGER = pd.DataFrame(
    {
        "dense": [6e6, 0, 0, 2e6, 6e6, 8e6],
        "fixed_fp32": [0, 1e6, 2e6, 2e6, 3e6, 5e6],
        "fixed_fp16": [0, 1e6, 1e6, 2e6, 2e6, 4e6],
    },
    index=["kernels", "indices", "codebooks", "rest", "convolutions", "model"],
)


def sweep(*rows):
    names = ["scope", "kernels_removed", "bytes_removed", "top1", "top1_low", "top1_high"]
    return pd.DataFrame([("dense", 0, 0, 92, 91, 93), *rows], columns=names)


TABLE = sweep(("layer", 90, 80, 85, 84, 87), ("layer", 99, 95, 60, 58, 61), ("global", 50, 30, 91, 90, 92))
LAYERS = pd.DataFrame([[90, 20], [-5, 80], [70, 60]], index=["a", "b", "all layers"], columns=["a", "b"])
NULLS = ["shuffled within kernels", "shuffled across kernels", "Gaussian"]
CLOSENESS = pd.DataFrame(
    [(layer, null, ratio + i, ratio + i - 0.5, ratio + i + 1)
     for layer, ratio in (("conv1", 2.0), ("conv2", 5.0)) for i, null in enumerate(NULLS)],
    columns=["layer", "null", "ratio", "low", "high"],
)  # fmt: skip


def histogram(counts, error=0.0, pairs=None):
    counts = np.array(counts)
    pairs = counts.sum() if pairs is None else pairs
    return PairHistogram(EDGES, counts, int(pairs), np.full(len(counts), error))


CATEGORIES = pd.Categorical(["b", "a", "b"], categories=["b", "a"])
DRAW = {
    "kernel_sheet": lambda ax: plots.kernel_sheet(np.ones((5, 3, 3)), ax=ax),
    "codebook_tree": lambda ax: plots.codebook_tree(np.array([[0, 1, 2.0, 2]]), np.ones((2, 3, 3)), ax=ax),
    "cluster_sizes": lambda ax: plots.cluster_sizes(np.array([5, 1]), ax=ax),
    "norm_histogram": lambda ax: plots.norm_histogram({"a": np.ones(3)}, ax=ax),
    "distance_histograms": lambda ax: plots.distance_histograms(
        {"a": histogram([1, 2, 1], 0.1)}, xlabel="x", ax=ax
    ),
    "layer_curves": lambda ax: plots.layer_curves(curves(2), xlabel="x", ylabel="y", mark=(2, "here"), ax=ax),
    "closeness": lambda ax: plots.closeness(CLOSENESS, ax=ax),
    "layers_by_layers": lambda ax: plots.layers_by_layers(LAYERS, ax=ax),
    "density": lambda ax: plots.density(np.eye(2), ax=ax),
    "embedding by value": lambda ax: plots.embedding(np.eye(2), np.array([0.5, 2]), label="norm", ax=ax),
    "embedding by label": lambda ax: plots.embedding(np.eye(2), np.arange(2), label="cluster", ax=ax),
    "embedding by name": lambda ax: plots.embedding(np.eye(3)[:, :2], CATEGORIES, label="layer", ax=ax),
    "accuracy_curve": lambda ax: plots.accuracy_curve(TABLE, ax=ax),
    "byte_bars": lambda ax: plots.byte_bars(LEDGER, ax=ax),
}


def curves(n):
    return {f"conv{i}": (np.arange(1, 4) + i, np.array([0, 50, 100])) for i in range(n)}


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)
def test_figure_is_drawn_on_the_axes_given_and_neither_shown_nor_saved(draw, monkeypatch):
    for owner, name in ((plt, "show"), (Figure, "savefig"), (Figure, "show")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("shown or saved"))
    _, (ax, current) = plt.subplots(1, 2)
    plt.sca(current)
    assert draw(ax) is ax
    assert ax.has_data()
    assert not current.has_data()
    assert draw(None) is current
    current.figure.canvas.draw()


def test_kernel_sheet_shows_each_kernel_on_its_own_scale():
    kernels = np.array([[[1, 2], [3, 4]], [[0, 0], [0, 0]], [[-8, 4], [0, 2]]], float)
    ax = plots.kernel_sheet(kernels, columns=2, ax=plt.figure().gca())
    (image,) = ax.images
    sheet = np.ma.filled(image.get_array(), np.nan)
    np.testing.assert_array_equal(sheet[0:2, 0:2], kernels[0] / 4)
    np.testing.assert_array_equal(sheet[0:2, 3:5], kernels[1])
    np.testing.assert_array_equal(sheet[3:5, 0:2], kernels[2] / 8)
    assert np.isnan(sheet).sum() == sheet.size - kernels.size
    assert image.get_clim() == (-1, 1)
    blue, white, red = (image.cmap(image.norm(value)) for value in (-1, 0, 1))
    assert blue[2] > blue[0]
    assert red[0] > red[2]
    assert min(white) > 0.95


def test_kernel_sheet_on_one_scale_compares_between_kernels():
    kernels = np.array([[[1, 2], [3, 4]], [[0, 0], [0, 0]], [[-8, 4], [0, 2]]], float)
    before = kernels.copy()
    ax = plots.kernel_sheet(kernels, columns=3, one_scale=True, ax=plt.figure().gca())
    sheet = np.ma.filled(ax.images[0].get_array(), np.nan)
    for i, kernel in enumerate(kernels):
        np.testing.assert_array_equal(sheet[0:2, 3 * i : 3 * i + 2], kernel / 8)
    np.testing.assert_array_equal(kernels, before)


def test_kernel_sheet_writes_captions_as_they_are():
    kernels = np.ones((3, 2, 2))
    ax = plots.kernel_sheet(kernels, captions=["0.00", "0.1", "itself"], columns=2, ax=plt.figure().gca())
    places = [(text.get_text(), *text.get_position()) for text in ax.texts]
    assert places == [("0.00", 0.5, 2), ("0.1", 3.5, 2), ("itself", 0.5, 6)]
    assert plots.kernel_sheet(kernels, ax=plt.figure().gca()).texts[:] == []


def test_kernel_sheet_writes_each_count_under_its_kernel():
    kernels = np.ones((3, 2, 2))
    ax = plots.kernel_sheet(kernels, counts=np.array([7, 6, 5]), columns=2, ax=plt.figure().gca())
    places = [(text.get_text(), *text.get_position()) for text in ax.texts]
    assert places == [("7", 0.5, 2), ("6", 3.5, 2), ("5", 0.5, 6)]
    sheet = np.ma.filled(ax.images[0].get_array(), np.nan)
    assert all(np.isnan(sheet[int(y), int(x)]) for _, x, y in places)


@pytest.mark.parametrize(
    ("count", "about"),
    [(7, 7), (999, 999), (1234, 1234), (9_999, 1e4), (54_321, 54e3), (999_999, 1e6), (1_634_496, 1.63e6)],
)
def test_kernel_sheet_writes_counts_in_at_most_four_characters(count, about):
    ax = plots.kernel_sheet(np.ones((1, 2, 2)), counts=np.array([count]), ax=plt.figure().gca())
    short = ax.texts[0].get_text()
    assert float(short.replace("k", "e3").replace("M", "e6")) == pytest.approx(about, rel=0.05)
    assert len(short) <= 4


def test_a_tree_has_each_representative_in_the_midst_below_its_leaf():
    values = np.array([1.0, 9, 2, 12])
    kernels = values[:, None, None] * np.array([[1, 0.5, 0], [0, 0, 0], [0, 0, 0.25]]) - np.eye(3) * values[1]
    merges = hierarchy.linkage(values[:, None], "ward")
    fig, ax = plt.subplots(figsize=(8, 5))
    plots.codebook_tree(merges, kernels, counts=np.array([10, 20, 30, 40]), ax=ax)
    fig.canvas.draw()
    order = hierarchy.leaves_list(merges)
    for i, (leaf, sheet) in enumerate(zip(order, ax.child_axes, strict=True)):
        drawn = np.ma.filled(sheet.images[0].get_array(), np.nan)[:3, :3]
        np.testing.assert_allclose(drawn, kernels[leaf] / np.abs(kernels[leaf]).max())
        assert [text.get_text() for text in sheet.texts] == [f"{10 * (leaf + 1)}"]
        middle = sheet.transData.transform((1, 0))[0]
        assert middle == pytest.approx(ax.transData.transform((5 + 10 * i, 0))[0], abs=1)
    heights = np.max([[y for _, y in path.vertices] for c in ax.collections for path in c.get_paths()])
    assert heights == pytest.approx(merges[-1, 2])


def test_cluster_sizes_are_drawn_by_rank_on_log_axes():
    ax = plots.cluster_sizes(np.array([40, 9, 1]), label="conv1", ax=plt.figure().gca())
    (line,) = ax.lines
    assert line.get_xydata().tolist() == [[1, 40], [2, 9], [3, 1]]
    assert (line.get_label(), ax.get_xscale(), ax.get_yscale()) == ("conv1", "log", "log")
    assert "representative" in ax.get_xlabel()
    assert ax.get_ylabel() == "kernels it stands for"


def test_norm_boxes_have_the_median_and_percentile_whiskers_of_each_layer():
    norms = {"conv1": np.linspace(1, 101, 101), "conv2": np.full(5, 3.0)}
    ax = plots.norm_histogram(norms, ax=plt.figure().gca())
    assert [label.get_text() for label in ax.get_xticklabels()] == ["conv1", "conv2"]
    drawn = [line.get_ydata().tolist() for line in ax.lines]
    assert [51, 51] in drawn
    assert [3, 3] in drawn
    assert {2, 100} <= {y for line in drawn for y in line}
    assert max(max(line) for line in drawn) == 100
    assert (ax.get_yscale(), ax.get_ylabel()) == ("log", "kernel norm (weight units)")


def test_distance_curves_are_the_share_of_pairs_in_each_bin():
    # ten pairs of conv1 were measured, six of them beyond the edges
    found = {"conv1": histogram([1, 2, 1], pairs=10), "conv2": histogram([0, 0, 5])}
    ax = plots.distance_histograms(found, xlabel="cosine", ax=plt.figure().gca())
    outline, filled, other = ax.patches
    drawn = [patch.get_data() for patch in (outline, filled, other)]
    np.testing.assert_allclose([x.values for x in drawn], [[10, 20, 10], [10, 20, 10], [0, 0, 100]])
    assert all(x.edges.tolist() == EDGES.tolist() for x in drawn)
    assert [patch.get_fill() for patch in (outline, filled, other)] == [False, True, False]
    assert not ax.collections
    assert legend(ax) == ["conv1", "conv2"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("cosine", "pairs in each bin (%)")
    assert (ax.get_xlim(), ax.get_ylim()[0]) == ((0, 3), 0)


def test_distance_curves_lie_in_bands_of_two_standard_errors():
    found = {"sampled": histogram([1, 2, 1], error=0.03), "all": histogram([3, 1, 0])}
    ax = plots.distance_histograms(found, xlabel="x", ax=plt.figure().gca())
    (band,) = ax.collections
    corners = band.get_paths()[0].vertices
    for x, low, high in ((0.5, 19, 31), (1.5, 44, 56), (2.5, 19, 31)):  # 25 and 50 %, 6 points to either side
        left, right = np.floor(x), np.ceil(x)
        at = corners[(corners[:, 0] >= left) & (corners[:, 0] <= right)]
        assert {low, high} <= set(np.round(at[:, 1], 6))
    np.testing.assert_allclose([corners[:, 1].min(), corners[:, 1].max()], [19, 56])
    assert tuple(band.get_facecolor()[0][:3]) == tuple(ax.patches[0].get_edgecolor()[:3])


def test_more_than_four_distance_curves_go_from_dark_to_bright_and_none_is_filled():
    found = {str(i): histogram([1, 2, 1]) for i in range(12)}
    ax = plots.distance_histograms(found, xlabel="x", legend=False, ax=plt.figure().gca())
    assert len(ax.patches) == 12
    assert not any(patch.get_fill() for patch in ax.patches)
    luminance = [np.dot(patch.get_edgecolor()[:3], (0.2126, 0.7152, 0.0722)) for patch in ax.patches]
    assert (np.diff(luminance) > 0).all()
    assert ax.get_legend() is None


def test_curves_of_layers_differ_in_colour_and_neighbours_in_dashes():
    ax = plots.layer_curves(curves(13), xlabel="length (%)", ylabel="shorter (%)", ax=plt.figure().gca())
    lines = ax.lines
    assert lines[2].get_xydata().tolist() == [[3, 0], [4, 50], [5, 100]]
    assert len({tuple(line.get_color()) for line in lines}) == 13
    assert max(np.dot(line.get_color()[:3], (0.2126, 0.7152, 0.0722)) for line in lines) < 0.8
    dashes = [str(line._dash_pattern) for line in lines]
    assert all(len(set(dashes[i : i + 4])) == 4 for i in range(10))
    assert legend(ax) == list(curves(13))
    ax.figure.canvas.draw()
    assert {"1", "2", "5", "10"} <= {x.get_text() for x in ax.get_xticklabels()}
    low, high = ax.get_xlim()
    assert 0.9 < low < 1
    assert 15 < high < 17  # the axis keeps to what is drawn


@pytest.mark.parametrize(("place", "side"), [(1, "left"), (10, "right")])
def test_what_a_marked_place_is_called_stands_on_the_side_that_has_room(place, side):
    mark = (place, "near zero")
    ax = plots.layer_curves(curves(13), xlabel="x", ylabel="y", mark=mark, ax=plt.figure().gca())
    (text,) = ax.texts
    assert (text.get_text(), text.get_ha()) == ("near zero", side)
    ax.figure.canvas.draw()
    left, right = (ax.transAxes.inverted().transform(x)[0] for x in text.get_window_extent().get_points())
    assert left > 0
    assert right < 1


def test_curves_of_more_layers_than_a_legend_holds_have_a_colour_bar():
    ax = plots.layer_curves(curves(40), xlabel="x", ylabel="y", ax=plt.figure().gca())
    assert ax.get_legend() is None
    (bar,) = (other for other in ax.figure.axes if other is not ax)
    names = [x.get_text() for x in bar.get_yticklabels()]
    assert (names[0], names[-1], len(names)) == ("conv0", "conv39", 10)
    assert bar.yaxis_inverted()  # the first layer on top, as in a legend


def test_distances_by_layer_leave_out_the_bins_that_hold_no_pair():
    edges, counts = np.arange(11.0), np.zeros((6, 10), int)
    counts[:, 4], counts[5, 6] = 3, 1
    found = {str(i): PairHistogram(edges, x, int(x.sum()), np.zeros(10)) for i, x in enumerate(counts)}
    ax = plots.distance_histograms(found, xlabel="x", ax=plt.figure().gca())
    assert ax.get_xlim() == (4, 7)


def test_distance_curve_of_a_layer_with_no_pairs_in_range_is_flat():
    for pairs in (0, 7):
        found = {"far": histogram([0, 0, 0], pairs=pairs)}
        ax = plots.distance_histograms(found, xlabel="x", ax=plt.figure().gca())
        assert ax.patches[0].get_data().values.tolist() == [0, 0, 0]


def test_closeness_has_a_marker_a_null_model_over_each_layer_with_its_interval():
    ax = plots.closeness(CLOSENESS, ax=plt.figure().gca())
    drawn = {bars.get_label(): bars for bars in ax.containers}
    assert list(drawn) == NULLS
    for null, (line, _, (bars,)) in drawn.items():
        rows = CLOSENESS[CLOSENESS.null == null]
        assert np.round(line.get_xdata()).tolist() == [0, 1]
        assert line.get_ydata().tolist() == rows.ratio.tolist()
        assert [segment[:, 1].tolist() for segment in bars.get_segments()] == rows[
            ["low", "high"]
        ].values.tolist()
    places = [line.get_xdata()[0] for line, _, _ in drawn.values()]
    markers = [line.get_marker() for line, _, _ in drawn.values()]
    assert len(set(places)) == len(set(markers)) == 3
    (chance,) = (line for line in ax.lines if line.get_label() == "no closer than chance")
    assert chance.get_ydata() == [1, 1]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["conv1", "conv2"]
    assert ax.get_yscale() == "log"
    assert legend(ax) == ["no closer than chance", *NULLS]


def test_closeness_of_a_layer_whose_kernels_have_doubles_leaves_the_others_in_sight():
    table = CLOSENESS.copy()
    table.loc[table.layer == "conv1", ["ratio", "low", "high"]] = [np.inf, np.nan, np.nan]
    table.loc[table.layer == "conv2", "high"] = np.inf
    ax = plots.closeness(table, ax=plt.figure().gca())
    ax.figure.canvas.draw()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["conv1", "conv2"]
    low, high = ax.get_ylim()
    assert low < 1 < 7 < high < 1e3


@pytest.mark.parametrize("n", [2, 40])
def test_layers_by_layers_writes_each_percentage_where_codebook_and_kernels_meet(n):
    names = [f"features.{i}" for i in range(n)]
    values = np.random.default_rng(0).uniform(-50, 100, (n + 2, n))
    table = pd.DataFrame(values, index=[*names, "all layers", "all layers, as many in all"], columns=names)
    ax = plots.layers_by_layers(table, ax=plt.figure().gca())
    ax.figure.canvas.draw()
    (mesh,) = ax.collections
    np.testing.assert_array_equal(np.asarray(mesh.get_array()).reshape(values.shape), values)
    assert mesh.get_clim() == (10 * np.floor(values.min() / 10), 100)
    assert [label.get_text() for label in ax.get_xticklabels()] == names
    assert [label.get_text() for label in ax.get_yticklabels()] == table.index.tolist()
    written = {text.get_position(): text.get_text() for text in ax.texts}
    assert written[0.5, 1.5] == f"{values[1, 0]:.0f}"
    assert len(written) == values.size
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("kernels of", "codebook of")
    assert [other.get_ylabel() for other in ax.figure.axes if other is not ax] == [
        "squared weight described (%)"
    ]


def test_density_counts_the_kernels_of_each_cell():
    layout = np.repeat([[0.0, 0], [1, 2], [10, 20]], [100, 7, 9], axis=0)
    ax = plots.density(layout, ax=plt.figure().gca())
    (cells,) = ax.collections
    assert sorted(cells.get_array()) == [7, 9, 100]
    assert cells.norm(7) == pytest.approx(0)
    assert cells.norm(np.sqrt(700)) == pytest.approx(0.5)  # halfway on a logarithmic scale
    left, right = ax.get_xlim()
    low, high = ax.get_ylim()
    assert right - left == pytest.approx(high - low)  # a square
    assert low < 0 < 20 < high
    assert ax.get_aspect() == 1
    assert [other.get_ylabel() for other in ax.figure.axes if other is not ax] == ["kernels in a cell"]


def test_a_part_of_a_map_is_drawn_in_the_extent_of_the_whole():
    whole = np.array([[0.0, 0], [10, 20], [5, 5]])
    for colour in (np.array([1.0]), np.array([1]), pd.Categorical(["a"])):
        ax = plots.embedding(whole[2:], colour, label="x", limits=whole, ax=plt.figure().gca())
        assert ax.get_ylim() == pytest.approx((-0.6, 20.6))
        assert ax.get_xlim() == pytest.approx((-5.6, 15.6))  # as wide, the map in the midst
        alone = plots.embedding(whole, np.repeat(colour, 3), label="x", ax=plt.figure().gca())
        assert (alone.get_xlim(), alone.get_ylim()) == (ax.get_xlim(), ax.get_ylim())


def test_a_few_far_kernels_are_drawn_at_the_rim_and_do_not_squeeze_a_map():
    layout = np.vstack([np.random.default_rng(0).uniform(0, 1, (500, 2)), [[100, 0.5], [0.5, -70]]])
    ax = plots.embedding(layout, np.arange(502.0), label="norm", ax=plt.figure().gca())
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    assert 1 < right - left < 3
    assert right - left == pytest.approx(high - low)
    dots, crosses = ax.collections
    np.testing.assert_allclose(dots.get_offsets()[:500], layout[:500])
    np.testing.assert_allclose(crosses.get_offsets(), [[right, 0.5], [0.5, low]])
    assert [text.get_text() for text in ax.texts] == ["× 2 of 502 farther out"]
    near = plots.embedding(layout[:500], np.arange(500.0), label="norm", ax=plt.figure().gca())
    assert len(near.collections) == 1
    assert not near.texts


def test_thumbnails_are_kernels_at_their_places_and_none_hides_another():
    layout = np.random.default_rng(0).uniform(0, 1, (3000, 2))
    kernels = np.random.default_rng(1).normal(size=(3000, 3, 3))
    values = np.ones(3000)
    ax = plots.embedding(layout, values, label="x", kernels=kernels, ax=plt.figure(figsize=(8, 6)).gca())
    ax.figure.canvas.draw()
    boxes = [x for x in ax.artists if isinstance(x, AnnotationBbox)]
    assert len(boxes) > 40
    for box in boxes:
        i = np.flatnonzero((layout == box.xy).all(axis=1)).item()
        shown = plt.get_cmap("RdBu_r")((kernels[i] / np.abs(kernels[i]).max() + 1) / 2)
        np.testing.assert_array_equal(box.offsetbox.get_data(), shown)
    extents = [box.get_window_extent() for box in boxes]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(extents, 2))


def test_maps_in_a_row_need_what_their_colours_mean_once():
    for colour in (CATEGORIES, np.array([1.0, 2, 3])):
        ax = plots.embedding(np.eye(3)[:, :2], colour, label="x", key=False, ax=plt.figure().gca())
        assert ax.get_legend() is None
        assert ax.figure.axes == [ax]


def test_map_by_label_gives_neighbouring_labels_unlike_colours_and_no_colour_bar():
    labels = np.array([0, 1, 19, 20, 1], np.int32)
    ax = plots.embedding(np.arange(10).reshape(5, 2), labels, label="K = 21", ax=plt.figure().gca())
    (dots,) = ax.collections
    ax.figure.canvas.draw()
    zero, one, nineteen, twenty, again = map(tuple, dots.get_facecolors())
    assert len({zero, one, nineteen}) == 3
    assert (twenty, again) == (zero, one)
    assert ax.figure.axes == [ax]
    assert ax.get_title() == "K = 21"


def test_map_by_value_has_its_points_and_a_colour_bar():
    layout, values = np.array([[0, 1], [2, 3], [4, 0.5]]), np.array([5.0, 7.0, 6.0])
    ax = plots.embedding(layout, values, label="norm", ax=plt.figure().gca())
    (dots,) = ax.collections
    np.testing.assert_array_equal(dots.get_offsets(), layout)
    np.testing.assert_array_equal(dots.get_array(), values)
    assert [other.get_ylabel() for other in ax.figure.axes if other is not ax] == ["norm"]


def test_map_by_name_has_one_colour_a_category_in_their_order():
    layout = np.array([[0, 1], [2, 3], [4, 0.5]])
    ax = plots.embedding(layout, CATEGORIES, label="layer", ax=plt.figure().gca())
    (dots,) = ax.collections
    np.testing.assert_array_equal(dots.get_offsets(), layout)
    first, second, third = map(tuple, dots.get_facecolors())
    assert first == third != second
    assert legend(ax) == ["b", "a"]
    handles = [to_rgba(handle.get_markerfacecolor()) for handle in ax.get_legend().legend_handles]
    assert handles == [first, second]
    assert ax.get_legend().get_title().get_text() == "layer"


@pytest.mark.parametrize(("x", "star"), [("kernels_removed", 85.6), ("bytes_removed", 79.35)])
def test_accuracy_curve_has_a_line_a_scope_the_dense_model_and_the_reports_star(x, star):
    ax = plots.accuracy_curve(TABLE, x=x, ax=plt.figure().gca())
    curves = {bars.get_label(): bars for bars in ax.containers}
    assert set(curves) == {"one codebook for all", "one codebook a layer"}
    line, _, (error,) = curves["one codebook a layer"]
    rows = TABLE[TABLE.scope == "layer"]
    np.testing.assert_allclose(line.get_xydata(), np.column_stack([100 - rows[x], rows.top1]))
    assert [segment[:, 1].tolist() for segment in error.get_segments()] == [[84, 87], [58, 61]]
    lines = {line.get_label(): line for line in ax.lines}
    assert lines["dense model, 92.00 %"].get_ydata() == [92, 92]
    (report,) = (
        line for label, line in lines.items() if label.startswith(f"IPSJ report (another network): {star}")
    )
    np.testing.assert_allclose(report.get_xydata(), [[100 - star, 92 - 9]])
    assert report.get_marker() == "*"


@pytest.mark.parametrize(("n_kernels", "star"), [(1_634_496, True), (2_280, False)])
def test_the_reports_star_is_for_networks_of_as_many_kernels(n_kernels, star):
    clusters = pd.Series([0, 16, 256, 1024])
    table = TABLE.assign(clusters=clusters, kernels_removed=100 * (1 - clusters / n_kernels))
    table.loc[0, "kernels_removed"] = 0.0
    ax = plots.accuracy_curve(table, ax=plt.figure().gca())
    assert any("IPSJ" in text for text in legend(ax)) == star


def test_accuracy_axis_grows_to_the_right_and_is_labelled_in_percent_removed():
    ax = plots.accuracy_curve(TABLE, ax=plt.figure().gca())
    assert ax.xaxis_inverted()
    assert ax.xaxis.get_major_formatter()(0.1, None) == "99.9"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("kernels removed (%)", "top-1 accuracy (%)")
    bytes_ax = plots.accuracy_curve(TABLE, x="bytes_removed", ax=plt.figure().gca())
    assert bytes_ax.get_xlabel() == "convolution bytes removed (%)"


def test_accuracy_curve_drops_no_scope():
    table = sweep(*((scope, 50, 40, 90, 89, 91) for scope in ("global", "layer", "mapping")))
    ax = plots.accuracy_curve(table, ax=plt.figure().gca())
    assert "mapping" in legend(ax)


def test_byte_bars_stack_to_the_models_megabytes():
    ax = plots.byte_bars(LEDGER, ax=plt.figure().gca())
    parts = {bars.get_label(): [bar.get_width() for bar in bars] for bars in ax.containers}
    expected = {"kernels": [6, 0, 0], "indices": [0, 1, 1], "codebooks": [0, 2, 1], "rest": [2, 2, 2]}
    assert parts == expected
    ends = np.max([[bar.get_x() + bar.get_width() for bar in bars] for bars in ax.containers], axis=0)
    assert ends.tolist() == [8, 5, 4]
    texts = [text.get_text() for text in ax.texts]
    assert [text.strip() for text in texts] == ["8.00 MB", "5.00 MB", "4.00 MB"]
    names = [label.get_text().replace("\n", " ") for label in ax.get_yticklabels()]
    assert names == ["dense", "fixed-width indices, fp32 codebook", "fixed-width indices, fp16 codebook"]
    assert ax.yaxis_inverted()
    assert max(text.get_position()[0] for text in ax.texts) < ax.get_xlim()[1]


def test_index_bits_show_width_code_and_entropy_of_each_layer():
    table = pd.DataFrame({"layer": ["a", "b"], "fixed": [8, 8], "coded": [9.5, 7], "entropy": [5, 6.5]})
    ax = plots.index_bits(table.assign(stored=["fixed", "coded"]), ax=plt.figure().gca())
    bars = {x.get_label(): x for x in ax.containers}
    heights = [[bar.get_height() for bar in x] for x in bars.values()]
    assert heights == [[8, 8], [7], [9.5]]
    coded, spared = (x[0] for x in list(bars.values())[1:])
    assert coded.get_facecolor()[3] == 1
    assert spared.get_facecolor()[3] == 0  # the file does not have it
    assert "keeps fixed width" in legend(ax)[-1]
    assert spared.get_x() < coded.get_x()
    assert ax.lines[0].get_ydata().tolist() == [5, 6.5]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b"]
    assert ax.get_ylabel() == "bits a kernel"


def test_what_exceeds_fixed_width_in_a_file_is_marked():
    table = pd.DataFrame({"layer": ["a", "b"], "fixed": [8, 8], "coded": [9.5, 7], "entropy": [5, 6.5]})
    ax = plots.index_bits(table.assign(stored="coded"), ax=plt.figure().gca())
    (over,) = next(x for x in ax.containers if "more than fixed width" in x.get_label())
    assert (over.get_y(), over.get_height()) == (8, 1.5)
    assert over.get_x() + over.get_width() / 2 == 0


def test_latency_bars_are_milliseconds_an_image_with_how_many_times_over_them():
    times = {"dense": [10.0, 64], "packed": [25.0, 80], "ratio": [2.5, 1.25], "ratio_low": [2, 1.2]}
    table = pd.DataFrame(times | {"ratio_high": [3, 1.5]}, index=[1, 16])
    ax = plots.latency_bars(table, ax=plt.figure().gca())
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in ax.containers}
    assert heights == {"dense": [10, 4], "packed": [25, 5]}
    assert [x.get_text() for x in ax.get_xticklabels()] == ["1", "16"]
    assert [x.get_text() for x in ax.texts] == ["2.50×\n[2.00, 3.00]", "1.25×\n[1.20, 1.50]"]
    assert "ms" in ax.get_ylabel()
    assert ax.get_ylim()[1] > 25


def test_memory_traces_are_lines_in_megabytes_shaded_while_answering():
    phases = ["loading", "answering", "answering", "answered"]
    trace = pd.DataFrame({"seconds": [0, 1, 2, 3], "bytes": [1e6, 3e6, 4e6, 2e6], "phase": phases})
    ax = plots.memory_traces({"packed": trace, "dense": trace}, ax=plt.figure().gca())
    assert [line.get_label() for line in ax.lines] == ["packed", "dense"]
    assert ax.lines[0].get_ydata().tolist() == [1, 3, 4, 2]
    assert [(patch.get_x(), patch.get_width()) for patch in ax.patches] == [(1, 1), (1, 1)]
    assert "MB" in ax.get_ylabel()
