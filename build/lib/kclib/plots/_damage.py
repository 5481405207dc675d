"""Pictures of where accuracy was lost: each draws given values on an axes and returns it."""

from collections.abc import Iterable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from PIL import Image, ImageOps

from kclib.datasets import ImageSet

_SIDE = 96  # pixels of an image, at most
_LETTERS = 13  # of a class's name under an image, at most


def damage_by_layer(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the points lost by layer, a bar for each way, as `attribution.by_layer` returns them.

    Whiskers are the 95 % intervals; the dashed line is what all layers lose together.
    """
    ax = ax or plt.gca()
    layers = table[table.way != "all"]
    names, ways = list(dict.fromkeys(layers.layer)), list(dict.fromkeys(layers.way))
    width = 0.8 / max(1, len(ways))
    for i, way in enumerate(ways):
        rows = layers[layers.way == way]
        places = np.array([names.index(name) for name in rows.layer]) + width * (i - (len(ways) - 1) / 2)
        ends = [rows["drop"] - rows.drop_low, rows.drop_high - rows["drop"]]
        label = {"alone": "this layer alone is clustered", "all but": "all but this layer are"}.get(way, way)
        ax.bar(places, rows["drop"], width, yerr=ends, capsize=2, label=label, error_kw={"linewidth": 1})
    for lost in table.loc[table.way == "all", "drop"]:
        ax.axhline(lost, color="0.4", linestyle="--", linewidth=1, label=f"all are: {lost:.2f} points")
    ax.axhline(0, color="0.2", linewidth=0.8)
    ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
    ax.set_ylabel("accuracy lost (points)")
    ax.grid(axis="y", alpha=0.3)
    ax.legend(fontsize=8, frameon=False)
    return ax


def damage_by_cluster(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the share of the damage that the worst clusters do, a step a cluster, the worst first.

    `table` is that of `_damage.by_cluster`; the dashed line is where all clusters would do alike.
    """
    ax = ax or plt.gca()
    clusters = np.arange(len(table) + 1)
    ax.plot(clusters, 100 * np.append(0, table.share.cumsum()), label="worst first")
    ax.plot(clusters[[0, -1]], [0, 100], color="0.4", linestyle="--", linewidth=1, label="all alike")
    ax.set(xlabel="clusters", ylabel="share of the damage (%)", xlim=(0, len(table)), ylim=(0, 102))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, frameon=False, loc="lower right")
    return ax


def damage_by_class(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw each class's accuracy before and after, as `attribution.by_class` returns it, in its order."""
    ax = ax or plt.gca()
    places, (first, second) = np.arange(len(table)), sns.color_palette()[:2]
    ax.hlines(places, table.before, table.after, color="0.7", linewidth=3, zorder=1)
    ax.scatter(table.before, places, color=first, label="before", zorder=2)
    ax.scatter(table.after, places, color=second, label="after", zorder=2)
    for place, row in zip(places, table.itertuples(), strict=True):
        ax.annotate(f"{row.lost} lost, {row.won} won", (102, place), va="center", fontsize=8)
    ax.set_yticks(places, table.name)
    ax.set(xlabel="accuracy (%)", xlim=(0, 125), xticks=range(0, 101, 20))
    ax.invert_yaxis()
    ax.grid(axis="x", alpha=0.3)
    ax.legend(fontsize=8, frameon=False, loc="lower left")
    return ax


def flipped_images(
    images: np.ndarray | ImageSet, table: pd.DataFrame, *, columns: int = 8, ax: Axes | None = None
) -> Axes:
    """Draw images that are answered otherwise than before, with the truth and both answers under each.

    Parameters
    ----------
    images : numpy.ndarray or ImageSet
        uint8 ``(m, h, w)`` or ``(m, h, w, 3)``: those of the table's rows, in their order. Or the images that
        were evaluated, of which those are drawn.
    table : pandas.DataFrame
        Rows of what `attribution.flipped` returns.
    columns : int
        Images a row.
    """
    ax = ax or plt.gca()
    if table.empty:
        ax.text(0.5, 0.5, "no image is answered otherwise", ha="center", va="center", fontsize=9)
        ax.set_axis_off()
        return ax
    if isinstance(images, ImageSet):
        images = _pictures(images, table.image)
    height, width = images.shape[1:3]
    deep, wide = height + max(8, height // 2), width + 2
    rows = -(-len(images) // columns)
    sheet = np.full((rows * deep, columns * wide, *images.shape[3:]), 255, np.uint8)
    for i, (image, row) in enumerate(zip(images, table.itertuples(), strict=True)):
        top, left = (i // columns) * deep, (i % columns) * wide
        sheet[top : top + height, left : left + width] = image
        label, before, after = map(_shortened, (row.label, row.before, row.after))
        text = f"{label}\n{before} → {after}"
        colour = {"lost": "firebrick", "won": "darkgreen"}.get(row.way, "0.3")
        ax.text(left + width / 2, top + height + 1, text, ha="center", va="top", fontsize=7, color=colour)
    ax.imshow(sheet, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    ax.set_axis_off()
    return ax


def _shortened(name: str) -> str:
    """Return a name that leaves room for its neighbours'."""
    return name if len(name) <= _LETTERS else name[: _LETTERS - 1] + "…"


def _pictures(data: ImageSet, rows: Iterable[int]) -> np.ndarray:
    """Return some images as uint8 ``(m, h, w, 3)``, those of several sizes in the midst of white squares."""
    found = [_picture(data.images[i] if torch.is_tensor(data.images) else data.images[i][0]) for i in rows]
    if len({picture.size for picture in found}) > 1 or max(max(x.size) for x in found) > _SIDE:
        found = [ImageOps.pad(x, (_SIDE, _SIDE), color="white") for x in found]
    return np.stack([np.asarray(x) for x in found])


def _picture(image: Image.Image | torch.Tensor) -> Image.Image:
    """Return an image as one sees it; numbers that are no bytes from the least, black, to the largest."""
    if not isinstance(image, Image.Image):
        values = torch.as_tensor(image)
        values = values[[0] * 3 if len(values) < 3 else [0, 1, 2]]
        if values.dtype != torch.uint8:
            low, high = values.min(), values.max()
            values = 255 * (values - low) / (high - low).clamp(min=1e-12)
        image = Image.fromarray(values.permute(1, 2, 0).to(torch.uint8).numpy())
    return image.convert("RGB")
