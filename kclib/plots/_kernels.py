"""Pictures of kernels and of cluster sizes: each draws given values on an axes and returns it."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from scipy.cluster import hierarchy

from kclib._util import checks
from kclib.errors import InvalidValueError


def kernel_sheet(
    kernels: np.ndarray,
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
    kernels : numpy.ndarray
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
    if np.ndim(kernels) != 3 or not len(kernels):
        raise InvalidValueError(
            f"kernels have shape {np.shape(kernels)}; it must be (m, kh, kw), m at least 1."
        )
    columns = checks.check_whole("columns", columns, 1)
    m, height, width = kernels.shape
    rows = -(-m // columns)
    if counts is not None:
        captions = [short(count) for count in counts]
    if captions is not None and len(captions) != m:
        raise InvalidValueError(f"there are {len(captions)} captions; {m} kernels need one each.")
    gap = 1 if captions is None else 2
    sheet = np.full((rows * (height + gap), columns * (width + 1) - 1), np.nan)
    scale = np.abs(kernels).max(axis=None if one_scale else (1, 2), keepdims=True)
    scaled = kernels / np.where(scale > 0, scale, 1)
    for i, kernel in enumerate(scaled):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + 1)
        sheet[top : top + height, left : left + width] = kernel
        if captions is not None:
            ax.text(left + width / 2 - 0.5, top + height, captions[i], ha="center", va="center",
                    fontsize=7)  # fmt: skip
    ax.imshow(sheet, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    ax.set_axis_off()
    return ax


def codebook_tree(
    merges: np.ndarray, kernels: np.ndarray, *, counts: np.ndarray | None = None, ax: Axes | None = None
) -> Axes:
    """Draw how representatives merge, a tree, with each representative below its leaf.

    Parameters
    ----------
    merges : numpy.ndarray
        ``(m - 1, 4)``, as `scipy.cluster.hierarchy.linkage` returns them.
    kernels : numpy.ndarray
        ``(m, kh, kw)``, the leaves; some forty are legible.
    counts : numpy.ndarray, optional
        int ``(m,)``, how many kernels each stands for, written under it.
    """
    ax = ax or plt.gca()
    options = {"no_labels": True, "color_threshold": 0, "above_threshold_color": "0.3"}
    leaves = hierarchy.dendrogram(merges, ax=ax, **options)["leaves"]
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    share = 1 / len(leaves)
    for i, leaf in enumerate(leaves):
        below = ax.inset_axes(((i + 0.1) * share, -0.27, 0.8 * share, 0.25))
        kernel_sheet(kernels[[leaf]], counts=None if counts is None else counts[[leaf]], ax=below)
        below.set(anchor="N", xlim=(-0.5, kernels.shape[2] - 0.5))
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


def short(count: int) -> str:
    """Write a count in at most four characters."""
    for unit, name in ((1_000_000, "M"), (1_000, "k")):
        if count >= 0.9995 * unit:
            return f"{count / unit:.{1 if count < 9.95 * unit else 0}f}{name}"
    return str(count)
