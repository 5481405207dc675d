"""Pictures of bytes and of memory: each draws given values on an axes and returns it."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes


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
    """Draw the bits that each layer's indices take, as `byte_counts.index_bits_by_layer` returns them."""
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


def _way(column: str) -> str:
    """Name a ledger's column for a reader."""
    if column == "dense":
        return "dense"
    coding, precision = column.split("_")
    words = {"fixed": "fixed-width", "entropy": "entropy-coded"}
    return f"{words[coding]} indices,\n{precision} codebook"
