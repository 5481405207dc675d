import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from kclib import figures

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
CATEGORIES = pd.Categorical(["b", "a", "b"], categories=["b", "a"])
DRAW = {
    "kernel_sheet": lambda ax: figures.kernel_sheet(np.ones((5, 3, 3)), ax=ax),
    "cluster_sizes": lambda ax: figures.cluster_sizes(np.array([5, 1]), ax=ax),
    "norm_histogram": lambda ax: figures.norm_histogram({"a": np.ones(3)}, ax=ax),
    "distance_histograms": lambda ax: figures.distance_histograms({"a": EDGES[1:]}, EDGES, xlabel="x", ax=ax),
    "embedding by value": lambda ax: figures.embedding(np.eye(2), np.arange(2), label="norm", ax=ax),
    "embedding by name": lambda ax: figures.embedding(np.eye(3)[:, :2], CATEGORIES, label="layer", ax=ax),
    "accuracy_curve": lambda ax: figures.accuracy_curve(TABLE, ax=ax),
    "byte_bars": lambda ax: figures.byte_bars(LEDGER, ax=ax),
}


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
    ax = figures.kernel_sheet(kernels, columns=2, ax=plt.figure().gca())
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


def test_kernel_sheet_writes_each_count_under_its_kernel():
    kernels = np.ones((3, 2, 2))
    ax = figures.kernel_sheet(kernels, counts=np.array([7, 6, 5]), columns=2, ax=plt.figure().gca())
    places = [(text.get_text(), *text.get_position()) for text in ax.texts]
    assert places == [("7", 0.5, 2), ("6", 3.5, 2), ("5", 0.5, 6)]
    sheet = np.ma.filled(ax.images[0].get_array(), np.nan)
    assert all(np.isnan(sheet[int(y), int(x)]) for _, x, y in places)


@pytest.mark.parametrize(
    ("count", "about"),
    [(7, 7), (999, 999), (1234, 1234), (9_999, 1e4), (54_321, 54e3), (999_999, 1e6), (1_634_496, 1.63e6)],
)
def test_kernel_sheet_writes_counts_in_at_most_four_characters(count, about):
    ax = figures.kernel_sheet(np.ones((1, 2, 2)), counts=np.array([count]), ax=plt.figure().gca())
    short = ax.texts[0].get_text()
    assert float(short.replace("k", "e3").replace("M", "e6")) == pytest.approx(about, rel=0.05)
    assert len(short) <= 4


def test_cluster_sizes_are_drawn_by_rank_on_log_axes():
    ax = figures.cluster_sizes(np.array([40, 9, 1]), label="conv1", ax=plt.figure().gca())
    (line,) = ax.lines
    assert line.get_xydata().tolist() == [[1, 40], [2, 9], [3, 1]]
    assert (line.get_label(), ax.get_xscale(), ax.get_yscale()) == ("conv1", "log", "log")
    assert "representative" in ax.get_xlabel()
    assert ax.get_ylabel() == "kernels it stands for"


def test_norm_boxes_have_the_median_and_percentile_whiskers_of_each_layer():
    norms = {"conv1": np.linspace(1, 101, 101), "conv2": np.full(5, 3.0)}
    ax = figures.norm_histogram(norms, ax=plt.figure().gca())
    assert [label.get_text() for label in ax.get_xticklabels()] == ["conv1", "conv2"]
    drawn = [line.get_ydata().tolist() for line in ax.lines]
    assert [51, 51] in drawn
    assert [3, 3] in drawn
    assert {2, 100} <= {y for line in drawn for y in line}
    assert max(max(line) for line in drawn) == 100
    assert (ax.get_yscale(), ax.get_ylabel()) == ("log", "kernel norm (weight units)")


def test_distance_curves_are_the_share_of_pairs_in_each_bin():
    counts = {"conv1": np.array([1, 2, 1]), "conv2": np.array([0, 0, 5])}
    reference = np.array([0.2, 0.3, 0.5])
    ax = figures.distance_histograms(
        counts, EDGES, xlabel="cosine", reference=reference, ax=plt.figure().gca()
    )
    drawn = [patch.get_data() for patch in ax.patches]
    np.testing.assert_allclose([x.values for x in drawn], [[25, 50, 25], [0, 0, 100], [20, 30, 50]])
    assert all(x.edges.tolist() == EDGES.tolist() for x in drawn)
    assert legend(ax) == ["conv1", "conv2", "unrelated shapes"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("cosine", "pairs in each bin (%)")
    assert ax.get_xlim() == (0, 3)


def test_distance_curve_of_a_layer_with_no_pairs_in_range_is_flat():
    ax = figures.distance_histograms({"far": np.zeros(3, int)}, EDGES, xlabel="x", ax=plt.figure().gca())
    assert ax.patches[0].get_data().values.tolist() == [0, 0, 0]


def test_map_by_value_has_its_points_and_a_colour_bar():
    layout, values = np.array([[0, 1], [2, 3], [4, 0.5]]), np.array([5.0, 7.0, 6.0])
    ax = figures.embedding(layout, values, label="norm", ax=plt.figure().gca())
    (dots,) = ax.collections
    np.testing.assert_array_equal(dots.get_offsets(), layout)
    np.testing.assert_array_equal(dots.get_array(), values)
    assert [other.get_ylabel() for other in ax.figure.axes if other is not ax] == ["norm"]


def test_map_by_name_has_one_colour_a_category_in_their_order():
    layout = np.array([[0, 1], [2, 3], [4, 0.5]])
    ax = figures.embedding(layout, CATEGORIES, label="layer", ax=plt.figure().gca())
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
    ax = figures.accuracy_curve(TABLE, x=x, ax=plt.figure().gca())
    curves = {bars.get_label(): bars for bars in ax.containers}
    assert set(curves) == {"one codebook for all", "one codebook a layer"}
    line, _, (error,) = curves["one codebook a layer"]
    rows = TABLE[TABLE.scope == "layer"]
    np.testing.assert_allclose(line.get_xydata(), np.column_stack([100 - rows[x], rows.top1]))
    assert [segment[:, 1].tolist() for segment in error.get_segments()] == [[84, 87], [58, 61]]
    lines = {line.get_label(): line for line in ax.lines}
    assert lines["dense model, 92.00 %"].get_ydata() == [92, 92]
    (report,) = (line for label, line in lines.items() if label.startswith(f"IPSJ report: {star}"))
    np.testing.assert_allclose(report.get_xydata(), [[100 - star, 92 - 9]])
    assert report.get_marker() == "*"


def test_accuracy_axis_grows_to_the_right_and_is_labelled_in_percent_removed():
    ax = figures.accuracy_curve(TABLE, ax=plt.figure().gca())
    assert ax.xaxis_inverted()
    assert ax.xaxis.get_major_formatter()(0.1, None) == "99.9"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("kernels removed (%)", "top-1 accuracy (%)")
    bytes_ax = figures.accuracy_curve(TABLE, x="bytes_removed", ax=plt.figure().gca())
    assert bytes_ax.get_xlabel() == "convolution bytes removed (%)"


def test_accuracy_curve_drops_no_scope():
    table = sweep(*((scope, 50, 40, 90, 89, 91) for scope in ("global", "layer", "mapping")))
    ax = figures.accuracy_curve(table, ax=plt.figure().gca())
    assert "mapping" in legend(ax)


def test_byte_bars_stack_to_the_models_megabytes():
    ax = figures.byte_bars(LEDGER, ax=plt.figure().gca())
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
    ax = figures.index_bits(table, ax=plt.figure().gca())
    heights = [[bar.get_height() for bar in bars] for bars in ax.containers]
    assert heights == [[8, 8], [9.5, 7]]
    assert ax.lines[0].get_ydata().tolist() == [5, 6.5]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b"]
    assert ax.get_ylim()[1] > 1.1 * 9.5  # the legend lies above the bars
    assert ax.get_ylabel() == "bits a kernel"


def test_memory_traces_are_lines_in_megabytes_shaded_while_answering():
    phases = ["loading", "answering", "answering", "answered"]
    trace = pd.DataFrame({"seconds": [0, 1, 2, 3], "bytes": [1e6, 3e6, 4e6, 2e6], "phase": phases})
    ax = figures.memory_traces({"packed": trace, "dense": trace}, ax=plt.figure().gca())
    assert [line.get_label() for line in ax.lines] == ["packed", "dense"]
    assert ax.lines[0].get_ydata().tolist() == [1, 3, 4, 2]
    assert [(patch.get_x(), patch.get_width()) for patch in ax.patches] == [(1, 1), (1, 1)]
    assert "MB" in ax.get_ylabel()
