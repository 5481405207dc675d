"""Kernels, filters or single weights set to zero, and the bytes that this saves."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from kclib import kernels, models
from kclib._util import checks
from kclib.compression import _formats, byte_counts
from kclib.compression._packing import index_bytes
from kclib.errors import InvalidValueError
from kclib.kernels import KernelBank
from kclib.kmeans import _entropy, _settings

KINDS = ("kernels", "filters", "weights")
PRECISIONS = ("fp32", "fp16", "int8", "int4")
_BITS = dict(zip(PRECISIONS, (32, 16, 8, 4), strict=True))
_HALF = 2  # bytes of an fp16 number


@dataclass(frozen=True)
class Pruned:
    """A network of which a part is zero.

    Attributes
    ----------
    network : torch.nn.Module
        A copy with zeros in ordinary dense weights; the others are as they were, not rounded.
    kind : str
        Of `KINDS`.
    sparsity : float
        Share of the kernels, filters or weights that were to go, 0 to 1.
    masks : mapping of str to numpy.ndarray
        By layer: bool in the shape of its weight as stored (`kernels.Layer.shape`), True where a weight was
        kept.
    """

    network: nn.Module
    kind: str
    sparsity: float
    masks: Mapping[str, np.ndarray]

    @property
    def kept(self) -> float:
        """Share of the weights of these layers that were kept."""
        n_kept = sum(np.count_nonzero(mask) for mask in self.masks.values())
        return n_kept / sum(mask.size for mask in self.masks.values())


def prune(
    model: models.Model | nn.Module,
    sparsity: float,
    *,
    kind: str = "kernels",
    weights: np.ndarray | None = None,
) -> Pruned:
    """Set the kernels, filters or weights of the smallest scores to zero.

    They are compared over all layers of `kernels.extract` together; of equal ones the first stay. The best of
    each layer stays whatever its score, as nothing passes a layer that is all zero. The score of a weight is
    its square (Han et al. 2015, *Learning both Weights and Connections for Efficient Neural Networks*), that
    of a kernel the sum of its squares, that of a filter the mean of its squares, as filters of wide layers
    have more of them (Molchanov et al. 2017, *Pruning Convolutional Neural Networks for Resource Efficient
    Inference*, minimum weight; Li et al. 2017, *Pruning Filters for Efficient ConvNets*, sum magnitudes
    instead and compare within a layer).

    All kernels of a pruned filter are zero. Its channel stays, with its bias and the batch norm behind it.

    Parameters
    ----------
    model : models.Model or torch.nn.Module
        Unchanged.
    sparsity : float
        Share that is taken away, at least 0, below 1; in number rounded to the nearest.
    kind : {"kernels", "filters", "weights"}
    weights : numpy.ndarray, optional
        ``(n,)`` in the rows of ``kernels.extract(model.network)``, finite, at least 0, not all 0: what a
        kernel's squares count times (`sensitivity.weights`).

    Raises
    ------
    InvalidValueError, UnknownNameError
        A sparsity out of range, or that leaves less than one to each layer; an unknown kind; weights that do
        not fit.
    """
    checks.check_known("kind of pruning", kind, KINDS)
    checks.check_share("sparsity", sparsity)
    network = models.network_of(model)
    bank = kernels.extract(network)
    scores = _scores(network, bank, kind, weights)
    gone = round(sparsity * sum(x.size for x in scores.values()))
    masks = _masks(network, bank, kind, _kept(scores, gone, kind))
    return Pruned(_masked(network, bank, masks), kind, sparsity, masks)


def sparse_bytes(network: nn.Module, *, kind: str = "kernels", precision: str = "fp16") -> int:
    """Return the bytes of all convolutions of a network, not clustered, of which a part is zero.

    The layers of `kernels.extract` take a mask that tells which kernels, filters or weights are not all zero,
    and the weights of those; every other convolution and all biases count dense. Of single weights that is
    `formats.Sparse`. Counted to its favour: a layer's mask takes its entropy, the bound that an arithmetic
    coder reaches, without the tables it needs.

    Parameters
    ----------
    network : torch.nn.Module
    kind : {"kernels", "filters", "weights"}
        What the mask tells apart. A zero weight in a kernel or filter that is not all zero saves nothing
        where it tells those.
    precision : {"fp32", "fp16", "int8", "int4"}
        Of the kernels; int8 and int4 with an fp16 scale for each output channel, as in `formats.Rounded`.
    """
    checks.check_known("kind of pruning", kind, KINDS)
    checks.check_known("precision", precision, PRECISIONS)
    bank = kernels.extract(network)
    dense = sum(_formats.size(layer) * layer.itemsize for layer in bank.layers)
    total = byte_counts.convolution_bytes(network) - dense
    for name, module in kernels.matched(network, bank.layers).items():
        layer = bank.layer(name)
        alive = _alive(module, bank.weights[layer.rows], kind)
        n = int(np.count_nonzero(alive))
        mask = _entropy.entropy_bytes(np.array([n, alive.size - n]))
        scales = _formats.channels(layer)[0] * _HALF if precision in ("int8", "int4") else 0
        values = index_bytes(n * (_formats.size(layer) // alive.size), _BITS[precision])
        total += math.ceil(mask) + values + scales
    return total


def _scores(network: nn.Module, bank: KernelBank, kind: str, weights) -> dict[str, np.ndarray]:
    """Return the scores of each layer's kernels, filters ``(n,)`` or weights ``(n, kh, kw)``, float64."""
    weights, found = _settings.checked_weights(weights, len(bank)), {}
    for name, module in kernels.matched(network, bank.layers).items():
        rows = bank.layer(name).rows
        squares = np.square(bank.weights[rows], dtype=np.float64)
        if weights is not None:
            squares *= weights[rows, None, None]
        if kind == "filters":
            filters = _filters(module).ravel()
            squares = np.bincount(filters, squares.mean(axis=(1, 2))) / np.bincount(filters)
        found[name] = squares.sum(axis=(1, 2)) if kind == "kernels" else squares
    return found


def _kept(scores: Mapping[str, np.ndarray], gone: int, kind: str) -> dict[str, np.ndarray]:
    """Return which are left, bool in the shape of each layer's scores, without the `gone` of the least."""
    flat = np.concatenate([x.ravel() for x in scores.values()])
    n_kept, most = len(flat) - gone, len(flat) - len(scores)
    if gone > most:
        raise InvalidValueError(
            f"{gone} of {len(flat)} {kind} are to go; at most {most} can, as each layer keeps one."
        )
    starts = np.cumsum([0, *(x.size for x in scores.values())])[:-1]
    flat[[start + x.argmax() for start, x in zip(starts, scores.values(), strict=True)]] = np.inf
    least = np.partition(flat, gone)[gone]
    kept = flat > least
    kept[np.flatnonzero(flat == least)[: n_kept - np.count_nonzero(kept)]] = True
    parts = np.split(kept, starts[1:])
    return {name: part.reshape(x.shape) for (name, x), part in zip(scores.items(), parts, strict=True)}


def _masks(
    network: nn.Module, bank: KernelBank, kind: str, kept: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return which weights of each layer are kept, where kernels, filters or weights are."""
    masks = {}
    for name, module in kernels.matched(network, bank.layers).items():
        mask, shape = kept[name], bank.layer(name).shape
        if kind == "filters":
            mask = mask[_filters(module)]
        taps = shape[2:] if kind == "weights" else (1, 1)
        masks[name] = np.broadcast_to(mask.reshape(*shape[:2], *taps), shape).copy()
    return masks


def _masked(network: nn.Module, bank: KernelBank, masks: Mapping[str, np.ndarray]) -> nn.Module:
    """Return a copy of a network with zeros where the masks of its layers are False."""
    kept = np.concatenate([masks[layer.name].reshape(-1, *bank.size) for layer in bank.layers])
    return kernels.insert(network, replace(bank, weights=np.where(kept, bank.weights, 0)))


def _alive(convolution: nn.Module, weights: np.ndarray, kind: str) -> np.ndarray:
    """Return which of a layer's kernels, filters or weights are not all zero, bool ``(n,)``."""
    if kind == "weights":
        return weights.ravel() != 0
    alive = weights.any(axis=(1, 2))
    return alive if kind == "kernels" else np.bincount(_filters(convolution).ravel(), alive) > 0


def _filters(convolution: nn.Module) -> np.ndarray:
    """Return each kernel's output channel, int in the first two axes of the weight as stored."""
    n, m = convolution.weight.shape[:2]
    first, second = np.indices((n, m))
    return second + first // (n // convolution.groups) * m if convolution.transposed else first
