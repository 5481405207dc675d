"""Pictures of how alike kernels are: each draws given values on an axes and returns it."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.ticker import LogLocator

from kclib._util import checks
from kclib.similarity import PairHistogram

_DASHES = (
    "-",
    (0, (5, 1.5)),
    (0, (6, 1.5, 1, 1.5)),
    (0, (1.2, 1.2)),
)  # neighbours in depth differ
_NAMED = 20  # layers that a legend has room for


def distance_histograms(
    histograms: Mapping[str, PairHistogram], *, xlabel: str, legend: bool = True, ax: Axes | None = None
) -> Axes:
    """Draw the share of pairs by distance, one curve a name, in a band of two standard errors.

    Parameters
    ----------
    histograms : mapping of str to PairHistogram
        All with the same edges, of equal width on the axis they are drawn on. Up to four are told apart as
        kinds, the first filled; more as layers in their order, without bands, over the bins that hold pairs.
    xlabel : str
    legend : bool
    """
    ax = ax or plt.gca()
    few = len(histograms) <= 4
    styles = (
        [{"color": colour} for colour in sns.color_palette("colorblind")]
        if few
        else _by_depth(len(histograms))
    )
    for i, (name, histogram) in enumerate(histograms.items()):
        shares, band = 100 * histogram.shares, 200 * histogram.error
        ax.stairs(shares, histogram.edges, label=name, linewidth=1.3, **styles[i])
        if few and i == 0:
            ax.stairs(shares, histogram.edges, fill=True, alpha=0.15, **styles[i])
        if few and band.any():
            low, high = (np.append(x, x[-1]) for x in (shares - band, shares + band))
            ax.fill_between(histogram.edges, low, high, step="post", alpha=0.2, linewidth=0, **styles[i])
    edges = histogram.edges
    used = np.flatnonzero(np.sum([x.counts for x in histograms.values()], axis=0))
    if not few and len(used):
        edges = edges[used[0] : used[-1] + 2]
    ax.set(xlabel=xlabel, ylabel="pairs in each bin (%)", xlim=(edges[0], edges[-1]), ylim=(0, None))
    if legend:
        _key(ax, list(histograms))
    return ax


def layer_curves(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    xlabel: str,
    ylabel: str,
    xscale: str = "log",
    yscale: str = "linear",
    mark: tuple[float, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a curve a layer, told apart by colour (first dark, last bright) and by dashes.

    Parameters
    ----------
    curves : mapping of str to (numpy.ndarray, numpy.ndarray)
        What is drawn of each layer: ``(n,)`` along x and along y.
    xlabel, ylabel, xscale, yscale : str
    mark : (float, str), optional
        A place on the x axis that a line marks, and what to call it.
    """
    ax = ax or plt.gca()
    marker = "." if xscale == "linear" else ""
    for (name, (x, y)), style in zip(curves.items(), _by_depth(len(curves)), strict=True):
        ax.plot(x, y, label=name, linewidth=1.4, marker=marker, **style)
    if mark:
        ax.axvline(mark[0], color="k", linewidth=1)
        ax.annotate(mark[1], (mark[0], 0.98), xycoords=("data", "axes fraction"), xytext=(-4, 0),
                    textcoords="offset points", ha="right", va="top", fontsize=9)  # fmt: skip
    ax.set(xscale=xscale, yscale=yscale, xlabel=xlabel, ylabel=ylabel)
    ax.margins(x=0.02, y=0.01)
    for axis in (ax.xaxis, ax.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
    ax.grid(alpha=0.3)
    _key(ax, list(curves))
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
    """Draw how well each codebook describes each layer, as `_similarity.explained` returns it, in percent.

    Colours begin at the worst that is shown, rounded down to tens, so that near numbers are told apart.
    """
    ax = ax or plt.gca()
    worst = 10 * np.floor(np.nanmin(table.to_numpy()) / 10)
    sns.heatmap(
        table, annot=True, fmt=".0f", annot_kws={"fontsize": 7}, cmap="viridis", vmin=worst, vmax=100, ax=ax,
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


def _by_depth(n: int) -> list[dict]:
    """Return colour and dashes of each of n layers, from dark to bright; none is as pale as the paper."""
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, n))
    return [{"color": colour, "linestyle": _DASHES[i % len(_DASHES)]} for i, colour in enumerate(colours)]


def _key(ax: Axes, names: list[str]) -> None:
    """Name the curves beside the axes: one by one, or a colour bar by depth where they are too many."""
    if len(names) <= _NAMED:
        ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1), handlelength=3.2)
        return
    colours = ListedColormap([style["color"] for style in _by_depth(len(names))])
    shown = np.unique(np.linspace(0, len(names) - 1, 10).round().astype(int))
    bar = ax.figure.colorbar(ScalarMappable(cmap=colours), ax=ax)
    bar.set_ticks((shown + 0.5) / len(names), labels=[names[i] for i in shown], fontsize=8)
    bar.ax.invert_yaxis()


def _as_map(ax: Axes, limits: np.ndarray) -> Axes:
    (left, low), (right, high) = limits.min(axis=0), limits.max(axis=0)
    across, up = 0.03 * (right - left or 1), 0.03 * (high - low or 1)
    ax.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2", aspect="equal")
    ax.set(xlim=(left - across, right + across), ylim=(low - up, high + up))
    return ax
