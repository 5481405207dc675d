"""Pictures: each function draws given values on an axes and returns it; none computes, saves or shows."""

import itertools
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator

from kclib import checks
from kclib.errors import InvalidValueError
from kclib.pairs import PairHistogram

# Matsui et al., IPSJ SIG Technical Report 2018-SLDM-183 no. 32: VGG-16 on ImageNet.
REPORT_POINT = {"kernels_removed": 85.6, "bytes_removed": 79.35, "drop": 9.0}
_REPORT_KERNELS = 1_634_496


def kernel_sheet(
    weights: np.ndarray,
    *,
    counts: np.ndarray | None = None,
    captions: Sequence[str] | None = None,
    columns: int = 16,
    one_scale: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw kernels as small images, row by row.

    Parameters
    ----------
    weights : numpy.ndarray
        ``(m, kh, kw)``. Blue is negative, white zero, red positive.
    counts : numpy.ndarray, optional
        int ``(m,)``, written under each kernel in short form.
    captions : sequence of str, optional
        Written under each kernel as they are, in place of counts.
    columns : int
        Kernels a row.
    one_scale : bool
        Whether colours compare between kernels; by default each is scaled to its own largest absolute weight.
    """
    ax = ax or plt.gca()
    if np.ndim(weights) != 3 or not len(weights):
        raise InvalidValueError(
            f"kernels have shape {np.shape(weights)}; it must be (m, kh, kw), m at least 1."
        )
    columns = checks.check_whole("columns", columns, 1)
    m, height, width = weights.shape
    rows = -(-m // columns)
    if counts is not None:
        captions = [_short(count) for count in counts]
    if captions is not None and len(captions) != m:
        raise InvalidValueError(f"there are {len(captions)} captions; {m} kernels need one each.")
    gap = 1 if captions is None else 2
    sheet = np.full((rows * (height + gap), columns * (width + 1) - 1), np.nan)
    scale = np.abs(weights).max(axis=None if one_scale else (1, 2), keepdims=True)
    scaled = weights / np.where(scale > 0, scale, 1)
    for i, kernel in enumerate(scaled):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + 1)
        sheet[top : top + height, left : left + width] = kernel
        if captions is not None:
            ax.text(left + width / 2 - 0.5, top + height, captions[i], ha="center", va="center",
                    fontsize=7)  # fmt: skip
    ax.imshow(sheet, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    ax.set_axis_off()
    return ax


def cluster_sizes(counts: np.ndarray, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """Draw how many kernels each representative stands for, most used first, on log axes."""
    ax = ax or plt.gca()
    ax.plot(np.arange(1, len(counts) + 1), counts, drawstyle="steps-mid", label=label)
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="rank of the representative, most used first",
        ylabel="kernels it stands for",
    )
    return ax


def norm_histogram(norms: dict[str, np.ndarray], *, ax: Axes | None = None) -> Axes:
    """Draw kernel norms ``(n,)`` of each layer as boxes with whiskers from the 1st to the 99th percentile."""
    ax = ax or plt.gca()
    ax.boxplot(list(norms.values()), tick_labels=list(norms), whis=(1, 99), showfliers=False)
    ax.set(yscale="log", ylabel="kernel norm (weight units)", xlabel="layer")
    ax.tick_params(axis="x", rotation=45)
    return ax


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

    `table` is that of `similarity.closeness`; bars are its 95 % intervals.
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
    """Draw how well each codebook describes each layer, as `similarity.explained` returns it, in percent."""
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


def accuracy_curve(table: pd.DataFrame, *, x: str = "kernels_removed", ax: Axes | None = None) -> Axes:
    """Draw accuracy against what was removed, a curve a scope, beside the dense model and the report's point.

    Parameters
    ----------
    table : pandas.DataFrame
        As `sweep.run` returns; error bars are its 95 % intervals. Where its ``clusters`` say that the network
        has another number of kernels than the report's, the report's point is left out.
    x : {"kernels_removed", "bytes_removed"}
        Percent of kernels, or of the convolutions' bytes.
    """
    ax = ax or plt.gca()
    checks.check_known("axis", x, ("kernels_removed", "bytes_removed"))
    checks.check_columns(table, ("scope", "top1", "top1_low", "top1_high", x))
    if not (table.scope == "dense").any():
        raise InvalidValueError("the table has no row of scope dense; it must have the dense model's.")
    dense = table.loc[table.scope == "dense", "top1"].iloc[0]
    for (scope, rows), marker in zip(
        table[table.scope != "dense"].groupby("scope"), itertools.cycle("os^Dv"), strict=False
    ):
        name = {"layer": "one codebook a layer", "global": "one codebook for all"}.get(scope, scope)
        bars = [rows.top1 - rows.top1_low, rows.top1_high - rows.top1]
        ax.errorbar(100 - rows[x], rows.top1, bars, marker=marker, markersize=4, capsize=2, label=name)
    ax.axhline(dense, color="0.4", linestyle="--", linewidth=1, label=f"dense model, {dense:.2f} %")
    if _as_the_reports(table):
        ax.plot(100 - REPORT_POINT[x], dense - REPORT_POINT["drop"], "k*", markersize=11,
                label=f"IPSJ report: {REPORT_POINT[x]:g} % for 9 points")  # fmt: skip
    ax.set(xscale="log", ylabel="top-1 accuracy (%)", ylim=(0, 100))
    ax.set_xlabel(
        {"kernels_removed": "kernels removed (%)", "bytes_removed": "convolution bytes removed (%)"}[x]
    )
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if x == "bytes_removed" else (1,)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda kept, _: f"{100 - kept:.6g}"))
    ax.xaxis.set_minor_formatter("")
    ax.invert_xaxis()
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, frameon=False, loc="lower left" if dense > 50 else "upper left")
    return ax


def _as_the_reports(table: pd.DataFrame) -> bool:
    """Tell whether a table may be of a network with as many kernels as the report's."""
    clustered = table[table.scope != "dense"]
    if not {"clusters", "kernels_removed"} <= set(table.columns) or clustered.empty:
        return True
    n_kernels = clustered.clusters / (1 - clustered.kernels_removed / 100)
    return bool(np.isclose(n_kernels, _REPORT_KERNELS, rtol=1e-6).any())


def byte_bars(ledger: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw columns of a footprint ledger as stacked bars in megabytes, a bar for each way to keep a model."""
    ax = ax or plt.gca()
    parts = ledger.drop(index=["convolutions", "model"]).rename(columns=_way)
    colours = dict(zip(parts.index, sns.color_palette(), strict=False))
    shown = parts[(parts > 0).any(axis=1)].T / 1e6
    shown.plot.barh(stacked=True, ax=ax, width=0.6, color=colours)
    for position, total in enumerate(ledger.loc["model"] / 1e6):
        ax.text(total, position, f" {total:.2f} MB", va="center", fontsize=9)
    ax.set(
        xlabel="bytes of the whole model (MB)", ylabel="", xlim=(0, 1.15 * ledger.loc["model"].max() / 1e6)
    )
    ax.invert_yaxis()
    ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def index_bits(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the bits that each layer's indices take, as `footprint.index_bits_by_layer` returns them."""
    ax = ax or plt.gca()
    places = np.arange(len(table))
    ax.bar(places, table.fixed, width=0.8, color="0.88", label="fixed width")
    ax.bar(places, table.coded, width=0.5, label="entropy-coded, tables of frequencies included")
    ax.plot(places, table.entropy, "k_", markersize=16, label="entropy of the layer's indices")
    ax.set_xticks(places, table.layer, rotation=90)
    ax.set(ylabel="bits a kernel", ylim=(0, 1.2 * table[["fixed", "coded"]].to_numpy().max()))
    ax.legend(frameon=False, ncol=3, loc="upper left", fontsize=9)
    return ax


def memory_traces(traces: Mapping[str, pd.DataFrame], *, ax: Axes | None = None) -> Axes:
    """Draw resident memory over time, a line a process, from `residence.Residence.trace`."""
    ax = ax or plt.gca()
    for (name, trace), colour in zip(traces.items(), sns.color_palette(), strict=False):
        ax.plot(trace.seconds, trace.bytes / 1e6, color=colour, label=name)
        answering = trace.seconds[trace.phase == "answering"]
        ax.axvspan(answering.min(), answering.max(), color=colour, alpha=0.12, linewidth=0)
    ax.set(xlabel="seconds since loading began; shaded while it answers", ylim=(0, None))
    ax.set_ylabel("resident memory above\nthe bare process (MB)")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return ax


def _as_map(ax: Axes, limits: np.ndarray) -> Axes:
    (left, low), (right, high) = limits.min(axis=0), limits.max(axis=0)
    across, up = 0.03 * (right - left or 1), 0.03 * (high - low or 1)
    ax.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2", aspect="equal")
    ax.set(xlim=(left - across, right + across), ylim=(low - up, high + up))
    return ax


def _way(column: str) -> str:
    """Name a ledger's column for a reader."""
    if column == "dense":
        return "dense"
    coding, precision = column.split("_")
    words = {"fixed": "fixed-width", "entropy": "entropy-coded"}
    return f"{words[coding]} indices,\n{precision} codebook"


def _short(count: int) -> str:
    """Write a count in at most four characters."""
    for unit, name in ((1_000_000, "M"), (1_000, "k")):
        if count >= 0.9995 * unit:
            return f"{count / unit:.{1 if count < 9.95 * unit else 0}f}{name}"
    return str(count)
