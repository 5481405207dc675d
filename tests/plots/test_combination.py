import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from kclib import plots


def table():
    rows = [
        (s, c, p, seed, 10 * s + len(c) + (p == "int4") + seed)
        for s, c, p, seed in itertools.product((0.0, 0.5), ("none", "64 layer"), ("none", "int4"), (0, 2))
    ]
    made = pd.DataFrame(rows, columns=["sparsity", "clustering", "precision", "seed", "drop"])
    kind = np.where(made.sparsity > 0, "kernels", "none")
    return made.assign(drop_low=made["drop"] - 1, drop_high=made["drop"] + 3, pruned=kind)


def test_lines_are_clusterings_over_the_sparsity_in_a_panel_a_precision():
    axes = plots.interactions(table())
    assert [ax.get_title() for ax in axes] == ["precision: none", "precision: int4"]
    for ax, more in zip(axes, (0, 1), strict=True):
        lines = {container.get_label(): container[0] for container in ax.containers}
        assert list(lines) == ["none", "64 layer"]
        assert lines["none"].get_xdata().tolist() == [0, 50]
        assert len({line.get_marker() for line in lines.values()}) == 2
        assert lines["64 layer"].get_ydata().tolist() == [9 + more, 14 + more]
        (bars,) = ax.containers[0][2]
        np.testing.assert_allclose(bars.get_segments()[0][:, 1], [4 + more, 8 + more])
        assert ax.get_xlabel()
    assert "points" in axes[0].get_ylabel()
    assert [text.get_text() for text in axes[1].get_legend().get_texts()] == ["none", "64 layer"]
    axes[0].figure.canvas.draw()


def test_given_axes_are_drawn_on_and_must_be_as_many_as_precisions():
    _, own = plt.subplots(1, 2)
    assert plots.interactions(table(), axes=own)[1] is own[1]
    with pytest.raises(ValueError, match="zip"):
        plots.interactions(table(), axes=own[:1])


def test_the_excess_is_a_map_around_0_whose_sure_numbers_are_bold():
    rows = [
        (0.5, "none", "int4", -1.0, -2.0, 0.5),
        (0.5, "64 layer", "none", 4.0, 3.0, 5.0),
        (0.0, "64 layer", "int4", 0.2, -1.0, 1.0),
        (0.5, "64 layer", "int4", -3.0, -4.0, -2.0),
    ]
    made = pd.DataFrame(rows, columns=["sparsity", "clustering", "precision", "excess", "low", "high"])
    made["pruned"] = np.where(made.sparsity > 0, "filters", "none")
    _, ax = plt.subplots()
    assert plots.excess(made, ax=ax) is ax
    (image,) = ax.images
    expected = [[np.nan, np.nan, -1], [4, 0.2, -3]]
    np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), expected)
    assert image.norm.vmin == -image.norm.vmax == -4
    texts = {text.get_text(): text for text in ax.texts}
    assert set(texts) == {"-1.0", "+4.0", "+0.2", "-3.0"}
    assert {name for name, text in texts.items() if text.get_weight() == "bold"} == {"-3.0", "+4.0"}
    assert texts["-3.0"].get_position() == (2, 1)
    ax.figure.canvas.draw()
    assert [x.get_text() for x in ax.get_xticklabels()] == ["none\n50%", "int4\n0%", "int4\n50%"]
    assert [x.get_text() for x in ax.get_yticklabels()] == ["none", "64 layer"]
    assert ax.get_xlabel() == "precision, percent of filters pruned"


def test_kinds_of_pruning_have_panels_and_columns_of_their_own():
    weights = table().query("sparsity > 0").assign(pruned="weights", drop=77.0, drop_low=77.0, drop_high=77.0)
    both = pd.concat([table(), weights], ignore_index=True)
    axes = plots.interactions(both)
    assert [ax.get_xlabel() for ax in axes] == [
        f"{kind} pruned (%)" for kind in ("kernels", "weights") for _ in range(2)
    ]
    assert axes[2].containers[0][0].get_ydata().tolist() == [5, 77]
    assert [bool(ax.get_ylabel()) for ax in axes] == [True, False, True, False]
    excess = both.groupby(["sparsity", "clustering", "precision", "pruned"], sort=False, as_index=False)[
        "drop"
    ]
    excess = excess.mean().assign(low=0.0, high=0.0).rename(columns={"drop": "excess"})
    _, ax = plt.subplots()
    plots.excess(excess, ax=ax)
    each = ["{}\n0%", "{}\n50%\nkernels", "{}\n50%\nweights"]
    shown = [x.get_text() for x in ax.get_xticklabels()]
    assert shown == [x.format(precision) for precision in ("none", "int4") for x in each]
    assert ax.get_xlabel() == "precision, percent of kernels or weights pruned"
