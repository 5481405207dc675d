import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from kclib import plots
from kclib.plots import _bytes


@pytest.fixture
def ax():
    _, ax = plt.subplots()
    yield ax
    plt.close()


@pytest.fixture
def table():
    rows = [
        ("dense", 1.0, 0.0, 0.0, 0.0),
        ("pruning", 16.0, 2.0, 1.5, 2.5),
        ("pruning", 32.0, 40.0, 39.0, 41.0),
        ("clustering, trained", 33.0, 0.2, 0.0, 0.4),
        ("clustering, trained", 16.5, 0.0, -0.2, 0.2),
        ("dense, trained as long", 1.0, -0.1, -0.3, 0.1),
    ]
    return pd.DataFrame(rows, columns=["method", "ratio", "drop", "drop_low", "drop_high"]).assign(
        bytes=lambda x: 1000 / x.ratio
    )


def test_methods_are_lines_from_few_bytes_to_many_and_dense_models_none(ax, table):
    assert plots.equal_bytes(table, ax=ax) is ax
    lines = {container.get_label(): container[0] for container in ax.containers}
    assert list(lines) == ["clustering, trained", "pruning"]
    assert lines["pruning"].get_ydata().tolist() == [40, 2]
    assert lines["clustering, trained"].get_xdata().tolist() == [33, 16.5]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(lines)
    assert lines["pruning"].get_color() == "0.55"
    assert np.ndim(lines["clustering, trained"].get_color()) == 1


def test_bytes_are_read_as_fractions_and_everything_drawn_is_in_sight(ax, table):
    plots.equal_bytes(table, ax=ax)
    ax.figure.canvas.draw()
    labels = [x.get_text() for x in ax.get_xticklabels()]
    assert {"1/16", "1/24", "1/32"} <= set(labels)
    low, high = ax.get_ylim()
    assert low <= -0.2 < 41 <= high
    left, right = ax.get_xlim()
    assert left < 16 < 33 < right
    assert ax.get_xlabel()
    assert "points" in ax.get_ylabel()


def test_the_front_is_a_line_and_nothing_published_is_on_it(ax):
    rows = [("a", 8, 5.0), ("a", 4, 1.0), ("b", 8, 3.0), ("b", 2, 1.5), ("b", 20, 30.0), ("a", 3, 0.5)]
    made = pd.DataFrame(rows, columns=["method", "ratio", "drop"])
    made["front"] = [False, True, True, False, True, True]
    made = made.assign(drop_low=made["drop"] - 1, drop_high=made["drop"] + 1)
    assert plots.pareto_front(made, ax=ax) is ax
    lines = {line.get_label(): line for line in ax.lines}
    assert lines["Pareto front"].get_xydata().tolist() == [[20, 30], [8, 3], [4, 1], [3, 0.5]]
    drawn = {bars.get_label(): bars[0].get_xydata().tolist() for bars in ax.containers}
    assert drawn["a"] == [[8, 5], [4, 1], [3, 0.5]]
    published = [line for label, line in lines.items() if "another network" in label]
    points = [line.get_xydata()[0] for line in published]
    np.testing.assert_allclose(points, [[4.8426, 9], [12, -0.06]], rtol=1e-4)  # 79.35 % of the bytes are gone
    assert all(line.get_markerfacecolor() == "none" for line in published)
    left, right = ax.get_xlim()
    assert left < 2 < 20 < right


def test_steps_are_bars_from_top_to_bottom(ax, table):
    plots.gains(table[table.method == "pruning"], ax=ax)
    assert [bar.get_width() for bar in ax.patches] == [2, 40]
    assert [x.get_text() for x in ax.get_yticklabels()] == ["pruning", "pruning"]
    assert ax.yaxis_inverted()


def test_bits_are_lines_over_the_layers(ax):
    tables = {
        "1/16": pd.DataFrame({"layer": ["a", "b"], "index": [6.0, 4.0], "codebook": [2.0, 1.0]}),
        "1/32": pd.DataFrame({"layer": ["a", "b"], "index": [3.0, 1.0], "codebook": [1.0, 0.5]}),
    }
    plots.bits_by_layer(tables, ax=ax)
    assert [line.get_ydata().tolist() for line in ax.lines] == [[8, 5], [4, 1.5]]
    assert [x.get_text() for x in ax.get_legend().get_texts()] == ["1/16", "1/32"]
    ax.figure.canvas.draw()
    assert [x.get_text() for x in ax.get_xticklabels()] == ["a", "b"]


def test_bits_by_norm_are_means_of_as_many_kernels(ax, monkeypatch):
    monkeypatch.setattr(_bytes, "_PARTS", 2)
    table = pd.DataFrame({"norm": [3.0, 1.0, 2.0, 0.0], "bits": [8.0, 2.0, 6.0, 1.0]})
    plots.bits_by_norm({"1/16": table}, ax=ax)
    (line,) = ax.lines
    assert line.get_xdata().tolist() == [0.5, 2.5]
    assert line.get_ydata().tolist() == [1.5, 7]
