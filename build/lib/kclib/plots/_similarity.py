"""Pictures of how alike kernels are: each draws given values on an axes and returns it."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from kclib._util import checks
from kclib.similarity import PairHistogram


def distance_histograms(
    histograms: Mapping[str, PairHistogram], *, xlabel: str, legend: bool = True, ax: Axes | None = None
) -> Axes:
    """Draw the share of pairs by distance, one curve a name, in a band of two standard errors.

    Parameters
    ----------
    histograms : mapping of str to PairHistogram
        All with the same edges, of equal width on the axis they are drawn on. Up to four are told apart as
        kinds, the first filled; more as an order, from dark to bright.
    xlabel : str
    legend : bool
    """
    ax = ax or plt.gca()
    few = len(histograms) <= 4
    colours = sns.color_palette() if few else sns.color_palette("viridis", len(histograms))
    for i, (name, found) in enumerate(histograms.items()):
        shares, band = 100 * found.shares, 200 * found.error
        ax.stairs(shares, found.edges, color=colours[i], label=name, linewidth=1.3)
        if few and i == 0:
            ax.stairs(shares, found.edges, color=colours[i], fill=True, alpha=0.15)
        if band.any():
            low, high = (np.append(x, x[-1]) for x in (shares - band, shares + band))
            strength = 0.2 if few else 0.1
            ax.fill_between(
                found.edges, low, high, step="post", color=colours[i], alpha=strength, linewidth=0
            )
    edges = found.edges
    ax.set(xlabel=xlabel, ylabel="pairs in each bin (%)", xlim=(edges[0], edges[-1]), ylim=(0, None))
    if legend:
        ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def closeness(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw how much closer kernels are to their nearest neighbours than null models say.

    `table` is that of `_similarity.closeness`; bars are its 95 % intervals.
    """
    ax = ax or plt.gca()
    checks.check_columns(table, ("layer", "null", "ratio", "low", "high"))
    layers = list(dict.fromkeys(table.layer))
    for i, (null, rows) in enumerate(table.groupby("null", sort=False)):
        places = np.array([layers.index(layer) for layer in rows.layer]) + 0.18 * (i - 1)
        bars = [(rows.ratio - rows.low).clip(lower=0), (rows.high - rows.ratio).clip(lower=0)]
        ax.errorbar(places, rows.ratio, bars, marker="osD^v"[i % 5], markersize=4, capsize=2, linestyle="",
                    label=null)  # fmt: skip
    ax.axhline(1, color="0.4", linestyle="--", linewidth=1, label="no closer than chance")
    ax.set_xticks(range(len(layers)), layers, rotation=45, ha="right")
    ax.set(yscale="log", ylabel="distance to the nearest kernel,\nby chance / as it is")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    ax.grid(axis="y", alpha=0.3)
    ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def layers_by_layers(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw how well each codebook describes each layer, as `_similarity.explained` returns it, in percent."""
    ax = ax or plt.gca()
    sns.heatmap(
        table, annot=True, fmt=".0f", annot_kws={"fontsize": 7}, cmap="viridis", vmin=0, vmax=100, ax=ax,
        cbar_kws={"label": "squared weight described (%)"},
    )  # fmt: skip
    ax.set(xlabel="kernels of", ylabel="codebook of")
    ax.set_xticks(np.arange(len(table.columns)) + 0.5, table.columns, rotation=45, ha="right")
    ax.set_yticks(np.arange(len(table)) + 0.5, table.index, rotation=0)
    return ax


def density(layout: np.ndarray, *, ax: Axes | None = None) -> Axes:
    """Draw how many of many kernels lie where on a map ``(n, 2)``."""
    ax = ax or plt.gca()
    cells = ax.hexbin(*layout.T, gridsize=160, bins="log", mincnt=1, cmap="magma")
    ax.figure.colorbar(cells, ax=ax, label="kernels in a cell", shrink=0.6)
    return _as_map(ax, layout)


def embedding(
    layout: np.ndarray,
    colour: np.ndarray | pd.Categorical,
    *,
    label: str,
    limits: np.ndarray | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a map ``(n, 2)`` coloured by category (dark to bright in their order), by value, or by label.

    Labels are whole numbers without an order: colours repeat after twenty. `limits` is another map, of which
    this one is a part and whose extent is drawn.
    """
    ax = ax or plt.gca()
    size = float(np.clip(350 / np.sqrt(max(len(layout), 1)), 1, 5))
    if isinstance(colour, pd.Categorical):
        names = list(colour.categories)
        palette = sns.color_palette("viridis", len(names))
        sns.scatterplot(
            x=layout[:, 0], y=layout[:, 1], hue=colour, hue_order=names, palette=palette,
            s=size, linewidth=0, ax=ax, rasterized=True,
        )  # fmt: skip
        outside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
        ax.legend(title=label, fontsize=8, markerscale=3, frameon=False, **outside)
    elif np.issubdtype(colour.dtype, np.integer):
        ax.scatter(
            *layout.T, c=colour % 20, s=size, linewidths=0, cmap="tab20", vmin=0, vmax=19, rasterized=True
        )
        ax.set_title(label, fontsize=10)
    else:
        x, y = layout.T
        dots = ax.scatter(x, y, c=colour, s=size, linewidths=0, cmap="magma", rasterized=True)
        ax.figure.colorbar(dots, ax=ax, label=label, shrink=0.6)
    return _as_map(ax, layout if limits is None else limits)


def _as_map(ax: Axes, limits: np.ndarray) -> Axes:
    (left, low), (right, high) = limits.min(axis=0), limits.max(axis=0)
    across, up = 0.03 * (right - left or 1), 0.03 * (high - low or 1)
    ax.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2", aspect="equal")
    ax.set(xlim=(left - across, right + across), ylim=(low - up, high + up))
    return ax
