"""Plots of methods that are combined: each draws given values on axes and returns them."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, to_rgba


def interactions(table: pd.DataFrame, *, axes: np.ndarray | None = None) -> np.ndarray:
    """Draw the drop against the sparsity, a line a clustering, a panel a precision and kind of pruning.

    Lines that run parallel, in all panels alike, are methods whose losses add up.

    Parameters
    ----------
    table : pandas.DataFrame
        From `factorial.run`, of one order; rows that differ in their seed are averaged, intervals too.
    axes : numpy.ndarray, optional
        As many axes as there are precisions, for each kind of pruning.

    Returns
    -------
    numpy.ndarray
        Axes ``(n,)``, of a shared drop.
    """
    precisions, lines, kinds = table.precision.unique(), table.clustering.unique(), _kinds(table)
    if axes is None:
        size = 3.2 * len(precisions), 3.2 * len(kinds)
        options = {"figsize": size, "layout": "constrained", "sharey": True, "squeeze": False}
        axes = plt.subplots(len(kinds), len(precisions), **options)[1]
    axes = np.asarray(axes).ravel()
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(lines)))
    colours[lines == "none"] = to_rgba("black")
    for ax, (kind, precision) in zip(axes, itertools.product(kinds, precisions), strict=True):
        shown = table[table.pruned.isin([kind, "none"]) & (table.precision == precision)]
        for line, colour, marker in zip(lines, colours, itertools.cycle("oDs^v<>P"), strict=False):
            means = (
                shown[shown.clustering == line].groupby("sparsity")[["drop", "drop_low", "drop_high"]].mean()
            )
            bars = [means["drop"] - means.drop_low, means.drop_high - means["drop"]]
            style = {"color": colour, "marker": marker, "markersize": 5, "capsize": 2, "label": line}
            ax.errorbar(100 * means.index, means["drop"], bars, **style)
        ax.axhline(0, color="0.4", linestyle="--", linewidth=1)
        ax.set(title=f"precision: {precision}", xlabel=f"{kind} pruned (%)")
        ax.grid(alpha=0.3)
    for ax in axes[:: len(precisions)]:
        ax.set_ylabel("drop (accuracy points)")
    beside = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
    axes[-1].legend(title="clusters", fontsize=8, frameon=False, **beside)
    return axes


def excess(orthogonality: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw what combinations lose beyond the sum of their methods, as a map; red harms, blue spares.

    Numbers are points, bold where the 95 % interval leaves 0 out. Empty fields are no combinations.

    Parameters
    ----------
    orthogonality : pandas.DataFrame
        As `orthogonality.orthogonality` returns, of one order.
    ax : matplotlib.axes.Axes, optional
    """
    ax = ax or plt.gca()
    columns, rows, kinds = ["precision", "sparsity", "pruned"], "clustering", _kinds(orthogonality)
    shown = orthogonality.pivot_table(["excess", "low", "high"], rows, columns, sort=False)
    precisions = sorted(orthogonality.precision.unique(), key=lambda x: x != "none")  # none comes first
    names = sorted(
        shown["excess"].columns, key=lambda x: (precisions.index(x[0]), x[2] != "none", x[2], x[1])
    )
    values, low, high = (shown[name][names].to_numpy(float) for name in ("excess", "low", "high"))
    image = ax.imshow(values, cmap="RdBu_r", norm=CenteredNorm(), aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        if np.isfinite(value):
            weight = "bold" if low[y, x] > 0 or high[y, x] < 0 else "normal"
            dark = abs(value) > 0.6 * np.nanmax(np.abs(values))
            ax.text(x, y, f"{value:+.1f}", ha="center", va="center", fontsize=8, weight=weight,
                    color="white" if dark else "black")  # fmt: skip
    of = [f"\n{kind}" if len(kinds) > 1 and share else "" for _, share, kind in names]
    labels = [f"{name}\n{share:.0%}{kind}" for (name, share, _), kind in zip(names, of, strict=True)]
    ax.set_xticks(range(len(names)), labels, fontsize=8)
    ax.set_yticks(range(len(shown)), shown.index)
    ax.set(xlabel=f"precision, percent of {' or '.join(kinds)} pruned", ylabel="clusters")
    ax.figure.colorbar(image, ax=ax, label="drop beyond the sum (points)")
    return ax


def _kinds(table: pd.DataFrame) -> list[str]:
    """Return what is pruned in a table, kernels where nothing is."""
    return [kind for kind in table.pruned.unique() if kind != "none"] or ["kernels"]
