"""What a clustering does to its kernels, up close: members of a cluster, errors by layer, a filter."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kclib import clustering
from kclib.clustering import Clustering, Group
from kclib.kernels import KernelBank


@dataclass(frozen=True)
class Members:
    """The kernels that one representative stands for.

    Attributes
    ----------
    count : int
    by_layer : mapping of str to int
        How many of each layer, the most first.
    nearest, farthest : numpy.ndarray
        float32 ``(m, kh, kw)``: a few kernels, by their distance to what stands for them.
    near, far : numpy.ndarray
        float32 ``(m,)``: these distances, in weight units.
    """

    count: int
    by_layer: Mapping[str, int]
    nearest: np.ndarray
    near: np.ndarray
    farthest: np.ndarray
    far: np.ndarray


def members(bank: KernelBank, group: Group, index: int, shown: int = 11) -> Members:
    """Return the kernels that a group's representative `index` stands for, `shown` of either end."""
    places = np.flatnonzero(group.indices == index)
    rows = group.rows[places]
    kernels = bank.kernels[rows]
    apart = np.linalg.norm((kernels - group.kernels(places)).reshape(len(rows), -1), axis=1)
    counts = {layer.name: len(layer.of(rows)) for layer in group.layers}
    order = np.argsort(apart, kind="stable")
    near, far = order[:shown], order[::-1][:shown]
    by_layer = {name: n for name, n in sorted(counts.items(), key=lambda item: -item[1]) if n}
    return Members(len(rows), by_layer, kernels[near], apart[near], kernels[far], apart[far])


def errors(bank: KernelBank, result: Clustering) -> dict[str, float]:
    """Return the percent of each layer's squared weight that is lost."""
    lost = clustering.error_share(bank, result)
    return {layer.name: 100 * share for layer, share in zip(bank.layers, lost, strict=True)}


def one_filter(
    bank: KernelBank, result: Clustering, layer: str, out: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return a filter's kernels before and after, and the percent of its squared weight that is lost.

    Of a transposed convolution it is the kernels of one input channel, which lie together as a filter does.

    Returns
    -------
    before, after : numpy.ndarray
        float32 ``(m, kh, kw)``.
    lost : float
    """
    (group,) = (group for group in result.groups if any(x.name == layer for x in group.layers))
    names = [x.name for x in group.layers]
    width = bank.layer(layer).shape[1]
    before_it = sum(x.n_kernels for x in group.layers[: names.index(layer)])
    places = np.arange(before_it + out * width, before_it + (out + 1) * width)
    before, after = bank.kernels[group.rows[places]], group.kernels(places)
    lost = 100 * float(((before - after) ** 2).sum() / ((before**2).sum() or 1))
    return before, after, lost
