"""Pictures of bytes and of memory: each draws given values on an axes and returns it."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

_PARTS = 30  # points of a line, each of as many kernels


def byte_bars(ledger: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw columns of a footprint ledger as stacked bars in megabytes, a bar for each way to keep a model."""
    ax = ax or plt.gca()
    sums = ["convolutions", "model", "model in memory"]
    parts = ledger.drop(index=sums, errors="ignore").rename(columns=_way)
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
    """Draw the bits that each layer's indices take, as `byte_counts.index_bits_by_layer` returns them.

    Entropy-coded bars are full where a file has them, what exceeds fixed width in another colour, and empty
    where it keeps fixed width.
    """
    ax = ax or plt.gca()
    places, colour = np.arange(len(table)), sns.color_palette("colorblind")[0]
    ax.bar(places, table.fixed, width=0.8, color="0.85", label="fixed width")
    looks = {"coded": ("entropy-coded, with its table of frequencies", colour),
             "fixed": ("entropy-coded, but the file keeps fixed width", "none")}  # fmt: skip
    for stored, (label, face) in looks.items():
        these = (table.stored == stored).to_numpy()
        if these.any():
            ax.bar(places[these], table.coded[these], 0.5, color=face, edgecolor=colour, label=label)
    dearer = ((table.coded > table.fixed) & (table.stored == "coded")).to_numpy()
    if dearer.any():
        more = (table.coded - table.fixed)[dearer]
        style = {"color": sns.color_palette("colorblind")[1], "edgecolor": colour}
        ax.bar(
            places[dearer],
            more,
            0.5,
            bottom=table.fixed[dearer],
            label="of it, more than fixed width",
            **style,
        )
    ax.plot(places, table.entropy, "k_", markersize=16, label="entropy of the layer's indices")
    ax.set_xticks(places, table.layer, rotation=90)
    ax.set(ylabel="bits a kernel", ylim=(0, 1.05 * table[["fixed", "coded"]].to_numpy().max()))
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    return ax


def bits_by_layer(tables: Mapping[str, pd.DataFrame], *, ax: Axes | None = None) -> Axes:
    """Draw the bits that a kernel takes in each layer, a line for each network, on a log axis.

    Parameters
    ----------
    tables : mapping of str to pandas.DataFrame
        Of `byte_counts.bits_by_layer`, by what the legend calls them.
    """
    ax = ax or plt.gca()
    for (label, table), colour in zip(tables.items(), _shades(len(tables)), strict=True):
        bits = table["index"] + table.codebook
        ax.plot(table.layer, bits, "o-", color=colour, markersize=5, label=label)
    ax.tick_params("x", rotation=45, labelsize=8)
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda bits, _: f"{bits:g}"))
    ax.set_ylabel("bits a kernel, codebook included")
    ax.grid(alpha=0.3)
    ax.legend(title="bytes kept", fontsize=8, frameon=False)
    return ax


def bits_by_norm(tables: Mapping[str, pd.DataFrame], *, ax: Axes | None = None) -> Axes:
    """Draw the mean bits of kernels of about the same norm, a line for each network.

    Parameters
    ----------
    tables : mapping of str to pandas.DataFrame
        Of `byte_counts.bits_by_kernel`, by what the legend calls them.
    """
    ax = ax or plt.gca()
    for (label, table), colour in zip(tables.items(), _shades(len(tables)), strict=True):
        ordered = table.sort_values("norm")
        parts = ordered.groupby(np.arange(len(ordered)) * _PARTS // len(ordered)).mean()
        ax.plot(parts.norm, parts.bits, "o-", color=colour, markersize=4, label=label)
    ax.set_xlabel("norm of a kernel, over the root mean square of its layer")
    ax.set_ylabel("bits of its index")
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    return ax


def _shades(n: int) -> np.ndarray:
    return plt.get_cmap("viridis")(np.linspace(0, 0.75, n))


def latency_bars(times: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the milliseconds an image that the dense and the packed network take, by batch.

    `times` is that of `latency.of_network`. Over each pair stands how many times as long the packed one
    takes, with the least and the most of its turns.
    """
    ax = ax or plt.gca()
    places, each = np.arange(len(times)), times[["dense", "packed"]].div(times.index, axis=0)
    for i, (name, colour) in enumerate(zip(each, ("0.7", sns.color_palette("colorblind")[0]), strict=True)):
        ax.bar(places + 0.4 * (i - 0.5), each[name], 0.4, color=colour, label=name)
    for place, top, row in zip(places, each.max(axis=1), times.itertuples(), strict=True):
        said = f"{row.ratio:.2f}×\n[{row.ratio_low:.2f}, {row.ratio_high:.2f}]"
        ax.annotate(said, (place + 0.2, top), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    ax.set_xticks(places, times.index)
    ax.set(xlabel="images a forward (batch)", ylabel="time (ms an image)")
    ax.set_ylim(0, 1.25 * each.to_numpy().max())
    ax.grid(axis="y", alpha=0.3)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
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


def _way(column: str) -> str:
    """Name a ledger's column for a reader."""
    if column == "dense":
        return "dense"
    coding, precision = column.split("_")
    words = {"fixed": "fixed-width", "entropy": "entropy-coded"}
    return f"{words[coding]} indices,\n{precision} codebook"
