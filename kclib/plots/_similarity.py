"""Pictures of how alike kernels are: each draws given values on an axes and returns it."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
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
_THUMBNAILS = 9  # kernels that may be drawn along either side of a map


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
    ax.set(xscale=xscale, yscale=yscale, xlabel=xlabel, ylabel=ylabel)
    ax.margins(x=0.02, y=0.01)
    for axis in (ax.xaxis, ax.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
    if mark:
        ax.axvline(mark[0], color="k", linewidth=1)
        at_left = ax.transAxes.inverted().transform(ax.transData.transform((mark[0], 1)))[0] < 0.3
        side = {"xytext": (4, 0), "ha": "left"} if at_left else {"xytext": (-4, 0), "ha": "right"}
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top"}
        ax.annotate(mark[1], (mark[0], 0.98), fontsize=9, **place, **side)
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
    """Draw how many of many kernels lie where on a map ``(n, 2)``; far ones count at its rim."""
    ax = ax or plt.gca()
    within = _at_the_rim(ax, layout, layout)[0]
    cells = ax.hexbin(*within.T, gridsize=160, bins="log", mincnt=1, cmap="magma")
    ax.figure.colorbar(cells, ax=ax, label="kernels in a cell", shrink=0.6)
    return _as_map(ax, layout)


def embedding(
    layout: np.ndarray,
    colour: np.ndarray | pd.Categorical,
    *,
    label: str,
    limits: np.ndarray | None = None,
    kernels: np.ndarray | None = None,
    key: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw a map ``(n, 2)`` coloured by category (dark to bright in their order), by value, or by label.

    Maps are squares, so that several stand in line. A few points far from all others do not squeeze the rest:
    they are drawn as crosses at the rim, and counted there.

    Parameters
    ----------
    layout : numpy.ndarray
    colour : numpy.ndarray or pandas.Categorical
        Labels are whole numbers without an order: colours repeat after twenty.
    label : str
    limits : numpy.ndarray, optional
        Another map ``(m, 2)``, of which this one is a part and whose extent is drawn.
    kernels : numpy.ndarray, optional
        ``(n, kh, kw)``: those nearest to the points of a grid are drawn where they lie.
    key : bool
        Whether to say what the colours mean; maps in a row need it once.
    """
    ax = ax or plt.gca()
    limits = layout if limits is None else limits
    within, far = _at_the_rim(ax, layout, limits)
    style = {"s": float(np.clip(350 / np.sqrt(max(len(layout), 1)), 1, 5)), "linewidths": 0}
    if isinstance(colour, pd.Categorical):
        names = list(colour.categories)
        palette = [look["color"] for look in _by_depth(len(names))]
        style |= {"c": np.reshape(palette, (-1, 4))[colour.codes]}
    elif np.issubdtype(colour.dtype, np.integer):
        style |= {"c": colour % 20, "cmap": "tab20", "vmin": 0, "vmax": 19}
        ax.set_title(label, fontsize=10)
    else:
        low, high = np.percentile(colour, (1, 99)) if len(colour) else (0, 1)
        shades = ListedColormap(plt.get_cmap("magma")(np.linspace(0, 0.9, 256)))
        style |= {"c": colour, "cmap": shades, "vmin": low, "vmax": high}
    dots = ax.scatter(*within.T, rasterized=True, **style)
    if far.any():
        ax.scatter(*within[far].T, marker="x", s=25, color="tab:red", linewidths=1, clip_on=False, zorder=3)
    if key and isinstance(colour, pd.Categorical):
        handles = [Line2D([], [], color=x, marker="o", linestyle="", markersize=5) for x in palette]
        _key(ax, names, handles, title=label)
    elif key and not np.issubdtype(colour.dtype, np.integer):
        ax.figure.colorbar(dots, ax=ax, label=label, shrink=0.6, extend="both")
    if kernels is not None:
        _draw_some(ax, within, kernels, limits)
    return _as_map(ax, limits)


def _extent(limits: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the middle of a map's square and half its side, where far points are left out.

    Far is what lies more than half the width of the middle 98 percent beyond them.
    """
    low, high = np.percentile(limits, (1, 99), axis=0)
    reach = (high - low) / 2
    low, high = np.maximum(limits.min(axis=0), low - reach), np.minimum(limits.max(axis=0), high + reach)
    return (low + high) / 2, 0.53 * float((high - low).max() or 1)


def _at_the_rim(ax: Axes, layout: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a map whose far points are moved to the rim, and which those are; say how many on the axes."""
    middle, half = _extent(limits)
    far = (np.abs(layout - middle) > half).any(axis=1)
    if far.any():
        said = f"× {far.sum():,} of {len(far):,} farther out"
        ax.text(0.02, 0.02, said, transform=ax.transAxes, fontsize=8, color="tab:red", zorder=4)
    return np.clip(layout, middle - half, middle + half), far


def _draw_some(ax: Axes, layout: np.ndarray, kernels: np.ndarray, limits: np.ndarray) -> None:
    """Draw the kernels nearest to the points of a grid over a map, of those that have one near."""
    middle, half = _extent(limits)
    step = 2 * half / _THUMBNAILS
    places = middle + step * (np.indices((_THUMBNAILS, _THUMBNAILS)).reshape(2, -1).T - (_THUMBNAILS - 1) / 2)
    for place in places if len(layout) else ():
        away = np.abs(layout - place).max(axis=1)
        i = int(away.argmin())
        if away[i] < step / 4:
            kernel = kernels[i] / (np.abs(kernels[i]).max() or 1)
            image = plt.get_cmap("RdBu_r")((kernel + 1) / 2)
            picture = OffsetImage(image, zoom=18 / max(kernel.shape), interpolation="nearest")
            ax.add_artist(AnnotationBbox(picture, layout[i], pad=0.1, bboxprops={"linewidth": 0.8}))


def _as_map(ax: Axes, limits: np.ndarray) -> Axes:
    (x, y), half = _extent(limits)
    ax.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2", aspect="equal", anchor="W")
    ax.set(xlim=(x - half, x + half), ylim=(y - half, y + half))
    return ax


def _by_depth(n: int) -> list[dict]:
    """Return colour and dashes of each of n layers, from dark to bright; none is as pale as the paper."""
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, n))
    return [{"color": colour, "linestyle": _DASHES[i % len(_DASHES)]} for i, colour in enumerate(colours)]


def _key(ax: Axes, names: list[str], handles: list[Line2D] | None = None, title: str | None = None) -> None:
    """Name layers beside the axes: one by one, or in a colour bar by depth where they are too many."""
    if len(names) <= _NAMED:
        beside = {"loc": "upper left", "bbox_to_anchor": (1, 1), "frameon": False, "fontsize": 8}
        handles = handles or ax.get_legend_handles_labels()[0]
        ax.legend(handles, names, title=title, handlelength=3.2 if title is None else 1, **beside)
        return
    colours = ListedColormap([style["color"] for style in _by_depth(len(names))])
    shown = np.unique(np.linspace(0, len(names) - 1, 10).round().astype(int))
    bar = ax.figure.colorbar(ScalarMappable(cmap=colours), ax=ax, label=title)
    bar.set_ticks((shown + 0.5) / len(names), labels=[names[i] for i in shown], fontsize=8)
    bar.ax.invert_yaxis()
