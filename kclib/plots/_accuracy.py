"""Pictures of accuracy against what is removed: each draws given values on an axes and returns it."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from kclib._util import checks
from kclib.errors import InvalidValueError

# Matsui et al., IPSJ SIG Technical Report 2018-SLDM-183 no. 32: VGG-16 on ImageNet.
REPORT_POINT = {"kernels_removed": 85.6, "bytes_removed": 79.35, "drop": 9.0}
_REPORT_KERNELS = 1_634_496
# What others published, of other networks and images: how many times fewer bytes, and the points lost.
# Son, Nah, Lee, ECCV 2018: an error of 5.92 % where the dense model has 5.98, after fine-tuning.
_PUBLISHED = (
    (
        "Matsui et al. 2018 (VGG-16, ImageNet)",
        100 / (100 - REPORT_POINT["bytes_removed"]),
        REPORT_POINT["drop"],
    ),
    ("Son et al. 2018 (VGG-16, CIFAR-10, trained)", 12.0, 5.92 - 5.98),
)


def accuracy_curve(table: pd.DataFrame, *, x: str = "kernels_removed", ax: Axes | None = None) -> Axes:
    """Draw accuracy against what was removed, a curve a scope, beside the dense model and the report's point.

    Parameters
    ----------
    table : pandas.DataFrame
        As `experiments.sweep` returns; error bars are its 95 % intervals. Where its ``clusters`` say that the
        network has another number of kernels than the report's, the report's point is left out.
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
                label=f"IPSJ report (another network): {REPORT_POINT[x]:g} % for 9 points")  # fmt: skip
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


_MARKERS = "oDs^v<>PXpdh8H"


def equal_bytes(table: pd.DataFrame, *, ours: str = "clustering", ax: Axes | None = None) -> Axes:
    """Draw the drop of each method against the bytes it keeps, with 95 % intervals.

    Parameters
    ----------
    table : pandas.DataFrame
        As `peers.compare` returns; dense models are left out, the one compared with is the line at 0.
    ours : str
        Beginning of the names of the methods that are drawn in colour and in front; the others are grey.
    """
    ax = ax or plt.gca()
    table = table[~table.method.str.startswith("dense")]
    groups = dict(list(table.groupby("method", sort=False)))
    coloured = [name for name in groups if name.startswith(ours)]
    colours = dict(zip(coloured, plt.get_cmap("viridis")(np.linspace(0.75, 0, len(coloured))), strict=True))
    for i, name in enumerate([*coloured, *(name for name in groups if name not in colours)]):
        rows, is_ours = groups[name].sort_values("bytes"), name in colours
        bars = [rows["drop"] - rows.drop_low, rows.drop_high - rows["drop"]]
        style = {"linewidth": 2, "markersize": 9 - i} if is_ours else {"linewidth": 0.8, "markersize": 5}
        ax.errorbar(
            rows.ratio, rows["drop"], bars, color=colours.get(name, "0.55"), zorder=2 + is_ours, capsize=2,
            marker=_MARKERS[i % len(_MARKERS)], label=name, **style,
        )  # fmt: skip
    return _drops_over_bytes(ax, table.ratio, table.drop_low.min())


def pareto_front(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the drop of each network against the bytes it keeps, and the front of those that none beats.

    Empty marks are published results of other networks on other images, and no part of the front.

    Parameters
    ----------
    table : pandas.DataFrame
        ``method``; ``ratio``, how many times fewer bytes; ``drop``, with ``drop_low`` and ``drop_high``, its
        95 % interval; ``front``, whether it is on the front (`peers.undominated`).
    """
    ax = ax or plt.gca()
    checks.check_columns(table, ("method", "ratio", "drop", "drop_low", "drop_high", "front"))
    colours = itertools.cycle(sns.color_palette("colorblind"))
    for (name, rows), marker, colour in zip(
        table.groupby("method", sort=False), itertools.cycle(_MARKERS), colours, strict=False
    ):
        bars = [rows["drop"] - rows.drop_low, rows.drop_high - rows["drop"]]
        style = {"marker": marker, "color": colour, "linestyle": "", "markersize": 6, "capsize": 2}
        ax.errorbar(rows.ratio, rows["drop"], bars, label=name, **style)
    front = table[table.front].sort_values("ratio", ascending=False)
    ax.step(front.ratio, front["drop"], where="post", color="k", linewidth=1, zorder=1, label="Pareto front")
    for (name, ratio, drop), marker in zip(_PUBLISHED, "*X", strict=True):
        style = {"marker": marker, "markersize": 11, "markerfacecolor": "none", "markeredgecolor": "0.25"}
        ax.plot(ratio, drop, linestyle="", label=f"{name}:\nanother network", **style)
    ratios = pd.concat([table.ratio, pd.Series([ratio for _, ratio, _ in _PUBLISHED])])
    return _drops_over_bytes(ax, ratios, table.drop_low.min())


def _drops_over_bytes(ax: Axes, ratios: pd.Series, lowest: float) -> Axes:
    """Label axes of drops, logarithmic above a point, against bytes kept."""
    ax.axhline(0, color="0.4", linestyle="--", linewidth=1)
    ax.set(xscale="log", xlabel="bytes of the convolutions kept", ylabel="drop (accuracy points)")
    ax.set_yscale("symlog", linthresh=1)
    lowest = min(-0.5, lowest)
    ax.set_ylim(lowest, 110)
    ax.set_yticks([x for x in (-10, -5, -2, -1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50, 100) if x >= lowest])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda drop, _: f"{drop:g}"))
    ends = ratios.min() / 1.2, ratios.max() * 1.2
    ax.set_xticks(_ticks(*ends))
    ax.set_xlim(ends)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"1/{ratio:g}"))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return ax


def gains(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the drop of each step of one method as bars, with 95 % intervals, in the order of the rows."""
    ax = ax or plt.gca()
    places = np.arange(len(table))
    ax.barh(places, table["drop"], color="0.8", height=0.6)
    bars = [table["drop"] - table.drop_low, table.drop_high - table["drop"]]
    ax.errorbar(table["drop"], places, xerr=bars, fmt="ko", markersize=4, capsize=3)
    ax.set_yticks(places, table.method)
    ax.invert_yaxis()
    ax.set_xlabel("drop (accuracy points)")
    ax.axvline(0, color="0.4", linestyle="--", linewidth=1)
    ax.grid(axis="x", alpha=0.3)
    return ax


def _ticks(low: float, high: float) -> list[float]:
    """Return the powers of two, and what lies halfway between them, from `low` to `high`."""
    powers = 2.0 ** np.arange(np.floor(np.log2(low)), np.ceil(np.log2(high)))
    return [tick for tick in np.sort(np.concatenate([powers, 1.5 * powers])) if low <= tick <= high]
