"""Cluster layer by layer, each layer making good what those before it lost: no training, no labels."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kclib import datasets, kmeans, models
from kclib._util import checks
from kclib._util.progress_bars import tqdm
from kclib.clustering import Clustering, Group, _clustering, _scopes
from kclib.clustering._scopes import grouping
from kclib.compression import _precisions
from kclib.kernels import KernelBank, Layer, _convolutions, _copying, extract
from kclib.kernels._bank import matched, rows_of
from kclib.kmeans import _settings
from kclib.models import _model
from kclib.recovery import _calibration, _moments
from kclib.recovery._moments import Moments

_SOONER = 10  # times the damping, where a matrix has no Cholesky factor with less
_BLOCK = 32  # input channels whose error is carried to the later ones at once
_COMPARED = 1 << 25  # distances held at once


@dataclass(frozen=True)
class Corrected:
    """A clustering made in the order in which the layers run.

    Attributes
    ----------
    network : torch.nn.Module
        A copy with what stands for the kernels in ordinary dense weights, biases and batch norms corrected.
    clustering : Clustering
        Its codebooks are rounded already; `compression.compress(model, clustering, precision=...)` packs it.
        Its notes name the layers that do not run.
    model : Model or torch.nn.Module
        The network as what was given: in a `Model`, or alone.
    """

    network: nn.Module
    clustering: Clustering
    model: models.Model | nn.Module


def correct(
    model: models.Model | nn.Module,
    images: datasets.ImageSet,
    n_clusters: int | Mapping[str, int],
    *,
    scope: str | Mapping[str, str] = "layer",
    size: int | tuple[int, int] | None = None,
    dense: models.Model | nn.Module | None = None,
    sample_weight: np.ndarray | None = None,
    precision: str = "fp16",
    damping: float = 0.01,
    batch_size: int = 64,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Corrected:
    """Cluster a model's kernels so that the answers of each layer stay near the dense model's.

    Layer by layer, in the order in which they run: the inputs of the layer are read in the dense model and in
    the one that is clustered so far; its weights are moved to where they answer those inputs as the dense
    layer answers its own (least squares: Zhang et al. 2015, *Accelerating Very Deep Convolutional Networks
    for Classification and Detection*, asymmetric reconstruction); one input channel after the other is
    replaced by representatives, and the error of each is made good by the channels still to come (Frantar et
    al. 2023, *GPTQ*; van Baalen et al. 2024, *GPTVQ*, here with a kernel as the vector); then the codebook is
    fitted to the dense answers (`_calibration.fitted`), and the mean that is left goes into the bias, or mean
    and variance into the batch norm behind the layer.

    A codebook of one layer is found from its moved weights, weighted by the energy of the channels they read;
    one that several layers share, from their kernels as they are, and it is not fitted. Transposed
    convolutions, and layers that do not run (auxiliary heads), get the nearest representative, and no
    correction.

    Parameters
    ----------
    model : Model or torch.nn.Module
        Unchanged. A network alone is given images as `models.plain` makes them. What it answers is not read.
    images : ImageSet, or what `datasets.as_image_set` takes
        Some hundred, of the kind the model knows; their labels are not read.
    n_clusters, scope
        As in `clustering.cluster`.
    size : int or (int, int), optional
        Of the kernels, as in `kernels.extract`.
    dense : Model or torch.nn.Module, optional
        What the answers shall be near to, by default the model's own network: another, of the same module
        names, where that is itself a copy made small (pruned, or its kernels of another size clustered).
    sample_weight : numpy.ndarray, optional
        ``(n,)``: how much each kernel's squared error counts where a codebook is shared
        (`sensitivity.importance`).
    precision : {"fp32", "fp16", "bf16", "int8", "int4"}
        Codebooks are rounded to it before kernels are assigned.
    damping : float
        Share of the mean energy of an input that is added to each one's, so that noise is not learned; ten
        times as much, and so on, where rounding leaves no solution with it.
    batch_size, seed, device

    Returns
    -------
    Corrected
        The same for the same seed and number of threads; the last bits of matrix products, and so some
        assignments, hang on the latter.

    Raises
    ------
    InvalidValueError, UnknownNameError
        As in `clustering.cluster`; no image; inputs of a layer that are not finite; damping not above 0.
    """
    _calibration.check_damping(damping)
    given, model, images = model, _model.as_model(model), datasets.as_image_set(images)
    bank = extract(model.network, size=size)
    seed = checks.check_seed(seed)
    dense = model.network if dense is None else models.network_of(dense)
    matched(dense, bank.layers)
    small, dense = (_model.moved(_copying.copied(x).eval(), device) for x in (model.network, dense))
    batches = _moments.batches(images, model.preprocess, batch_size, device)
    order = _moments.steps(dense, next(batches())[:1], {x.name for x in bank.layers if not x.transposed})
    books = _Books.of(bank, n_clusters, scope, sample_weight, precision, seed, {step.name for step in order})
    coded, rest = {}, [layer for layer in bank.layers if layer.name not in books.measured]
    for layer in rest:
        coded[layer.name] = books.nearest(layer)
        _convolutions.set_weight(small.get_submodule(layer.name), coded[layer.name].kernels, name=layer.name)
    for i, step in enumerate(
        tqdm(order, desc="layer by layer", unit="layer", leave=False, disable=not progress)
    ):
        read = _moments.measure(dense, small, step, batches, n_images=len(images), seed=seed + i)
        coded[step.name] = _clustered(books, bank.layer(step.name), step, read, dense, small, damping)
    notes = (
        f"layer {x.name} does not run; its kernels have the nearest representatives."
        for x in rest
        if not x.transposed
    )
    small.to("cpu")
    return Corrected(small, replace(books.clustering(coded), notes=tuple(notes)), models.like(given, small))


@dataclass(frozen=True)
class _Coded:
    """A layer's codebook, rounded, and the index of each of its kernels."""

    codebook: Tensor  # (K, area)
    indices: Tensor  # (n,)

    @property
    def kernels(self) -> Tensor:
        return self.codebook[self.indices]


@dataclass(frozen=True)
class _Books:
    """Where codebooks come from: shared ones are there from the start, others are found layer by layer."""

    bank: KernelBank
    members: Mapping[str, tuple[Layer, ...]]
    wanted: Mapping[str, int]
    shared: Mapping[str, Tensor]
    scope: str
    precision: str
    seed: int
    measured: frozenset[str]  # layers that run, and can be corrected

    @classmethod
    def of(cls, bank, n_clusters, scope, sample_weight, precision, seed, measured) -> "_Books":
        sample_weight = _settings.checked_sample_weight(sample_weight, len(bank))
        members = grouping(bank, scope)
        wanted = _scopes.wanted(members, n_clusters)
        _precisions.float_type(precision)  # an unknown one shows before the work, not after it
        scope = scope if isinstance(scope, str) else "mapping"
        result = cls(bank, members, wanted, {}, scope, precision, seed, frozenset(measured))
        for name, layers in members.items():
            if len(layers) > 1 or layers[0].name not in measured:
                rows = rows_of(layers)
                counted = _settings.counted(None if sample_weight is None else sample_weight[rows])
                result.shared[name] = result.fitted(name, bank.points[rows], counted)
        return result

    def group(self, layer: Layer) -> str:
        """Return the name of a layer's group."""
        return next(name for name, layers in self.members.items() if layer in layers)

    def fitted(self, group: str, points: np.ndarray, sample_weight: np.ndarray | None) -> Tensor:
        """Return a codebook for points ``(n, area)``, ``(K', area)`` of distinct rows, rounded as stored."""
        k = min(self.wanted[group], len(points))
        centres = kmeans.fit(points, k, sample_weight=sample_weight, seed=self.seed).centres
        return _precisions.rounded(torch.from_numpy(centres), self.precision).unique(dim=0)

    def of_layer(self, layer: Layer, target: Tensor, energy: Tensor) -> Tensor:
        """Return the codebook of a layer whose kernels ``(n, area)`` read channels of an energy ``(n,)``."""
        name = self.group(layer)
        if name in self.shared:
            return self.shared[name].to(target.device)
        sample_weight = energy / energy.max() if energy.max() > 0 else torch.ones_like(energy)
        return self.fitted(name, target.cpu().numpy(), sample_weight.cpu().numpy()).to(target.device)

    def refined(self, coded: _Coded, dense: Tensor, read: Moments, damping: float) -> _Coded:
        """Return a layer's codes with a codebook that answers nearer to the dense weights, if one does."""

        def decode(values: Tensor) -> Tensor:
            return F.embedding(coded.indices, values).reshape(dense.shape)

        def rounded(values: Tensor) -> Tensor:
            return _precisions.rounded(values, self.precision)

        values = _calibration.fitted(decode, coded.codebook, dense, read, damping=damping, rounded=rounded)
        return _Coded(values, coded.indices)

    def nearest(self, layer: Layer) -> _Coded:
        """Return a layer with the nearest representatives of its group's codebook."""
        codebook = self.shared[self.group(layer)]
        return _Coded(codebook, _nearest(torch.from_numpy(self.bank.points[layer.rows].copy()), codebook))

    def clustering(self, coded: Mapping[str, _Coded]) -> Clustering:
        """Return all layers' codes as a clustering."""
        groups = []
        for name, layers in self.members.items():
            indices = torch.cat([coded[layer.name].indices.cpu() for layer in layers]).numpy()
            codebook = coded[layers[0].name].codebook.cpu().numpy()
            used, indices = np.unique(indices, return_inverse=True)
            # representatives that were fitted may have been rounded to the same values
            codebook, same = np.unique(codebook[used], axis=0, return_inverse=True)
            codebook, indices = codebook.reshape(-1, *self.bank.size), same.reshape(-1)[indices]
            groups.append(Group(name, layers, codebook, indices.reshape(-1).astype(np.int32), math.nan))
        return _clustering.with_inertia(Clustering(tuple(groups), self.scope, self.seed), self.bank)


def _clustered(
    books: _Books, layer: Layer, step: _moments.LayerMoments, read: Moments, dense, small, damping: float
) -> _Coded:
    """Cluster one layer of `small`, in place, and return its codes."""
    original, changed = dense.get_submodule(layer.name), small.get_submodule(layer.name)
    norms = _calibration.norms_behind(step, dense, small)
    about = read if changed.bias is not None or norms else read.about_zero()
    wanted = _moments.grouped(original)
    target = _moved(wanted, _moments.grouped(changed), about, damping)
    area = int(np.prod(layer.shape[2:]))
    energy = about.small.diagonal(dim1=1, dim2=2).unflatten(1, (-1, area)).mean(2)  # (groups, inputs)
    each = energy[:, None].expand(-1, target.shape[1], -1).reshape(-1)
    codebook = books.of_layer(layer, target.reshape(-1, area), each)
    indices = [_assigned(rows, codebook, h, damping) for rows, h in zip(target, about.small, strict=True)]
    coded = _Coded(codebook, torch.cat(indices).reshape(-1))
    if books.group(layer) not in books.shared:
        coded = books.refined(coded, wanted, about, damping)
    _convolutions.set_weight(changed, coded.kernels, name=layer.name)
    _calibration.absorb(read, _moments.grouped(changed), original, changed, norms)
    return coded


def _moved(dense: Tensor, present: Tensor, read: Moments, damping: float) -> Tensor:
    """Return the weights whose answers to the small network's inputs are nearest to the dense ones.

    Ridge regression towards the layer's own weights; all ``(groups, out / groups, d)``.
    """
    missing = dense.double() @ read.cross.double() - present.double() @ read.small.double()
    return (present + torch.cholesky_solve(missing.mT, _factor(read.small, damping)).mT).float()


def _factor(h: Tensor, damping: float) -> Tensor:
    """Return the lower Cholesky factor of moments ``(..., d, d)`` and a share of their mean energy, float64.

    Damping below what rounding left of the moments is raised until there is a factor.
    """
    h = h.double()
    energy = h.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = torch.where(energy > 0, damping * energy, 1)  # where nothing is read, any will do
    while True:
        factor, failed = torch.linalg.cholesky_ex(h + torch.diag_embed(ridge[..., None].expand(h.shape[:-1])))
        if not failed.any():
            return factor
        ridge = torch.where(failed > 0, _SOONER * ridge, ridge)


def _assigned(target: Tensor, codebook: Tensor, h: Tensor, damping: float) -> Tensor:
    """Return an index for each kernel of ``(out, inputs * area)``, int64 ``(out, inputs)``.

    The channels of most energy go first; the upper Cholesky factor of the inverse moments says how the error
    of one is made good by the later ones (GPTQ, equation 2), and in which metric it counts. It is the inverse
    of the upper factor of the moments, which is the lower one of those in reverse order.
    """
    area = codebook.shape[1]
    energy = h.diagonal().reshape(-1, area).mean(1)
    order = energy.argsort(descending=True, stable=True)
    columns = (order[:, None] * area + torch.arange(area, device=h.device)).reshape(-1)
    back = columns.flip(0)
    upper = _factor(h[back][:, back], damping).flip(0, 1)
    factor = torch.linalg.solve_triangular(upper, torch.eye(len(upper)).to(upper), upper=True).float()
    target, indices = (
        target[:, columns],
        torch.empty(len(target), len(order), dtype=torch.int64, device=h.device),
    )
    for first in range(0, len(order), _BLOCK):
        last = min(first + _BLOCK, len(order))
        block = slice(first * area, last * area)
        errors = torch.empty_like(target[:, block])
        for i in range(first, last):
            place = slice(i * area, (i + 1) * area)
            scale = torch.linalg.inv(factor[place, place])
            nearest = _nearest(target[:, place] @ scale, codebook @ scale)
            error = (target[:, place] - codebook[nearest]) @ scale
            target[:, place.stop : block.stop] -= error @ factor[place, place.stop : block.stop]
            errors[:, place.start - block.start : place.stop - block.start] = error
            indices[:, order[i]] = nearest
        target[:, block.stop :] -= errors @ factor[block, block.stop :]
    return indices


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    """Return the nearest of ``(K, d)`` centres to each of ``(n, d)`` points, int64 ``(n,)``, in blocks.

    Both are moved and scaled first: products of values far from 0, huge or tiny, have no digits left for it.
    """
    shift = centres.mean(0)
    centres = centres - shift
    unit = centres.abs().max()
    unit = torch.where(unit > 0, unit, 1)
    centres = centres / unit
    half = centres.square().sum(1) / 2
    rows = max(1, _COMPARED // len(centres))
    return torch.cat(
        [
            torch.addmm(half, (part - shift) / unit, centres.mT, alpha=-1).argmin(1)
            for part in points.split(rows)
        ]
    )
