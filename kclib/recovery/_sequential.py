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
from kclib.errors import InvalidValueError
from kclib.kernels import KernelBank, Layer, _convolutions, _copying, extract
from kclib.kernels._bank import matched, rows_of
from kclib.kmeans import _settings
from kclib.models import _model
from kclib.recovery import _assignment, _calibration, _moments
from kclib.recovery._assignment import CountedCodebook, Metric
from kclib.recovery._calibration import LeastSquares
from kclib.recovery._moments import Moments

_PASSES = 4  # in which priced indices and the codebook follow each other
_AT_FIRST, _PRICED = 512, 6e-8  # clusters of a layer at such a price of one bit of one kernel
_FEWEST, _MOST = 2, 1 << 14
_AT_START = 3  # rounds of k-means, where indices have a price
_FEW_ROUNDS = 2  # of fitting the codebook, but for the last pass


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
    n_clusters: int | Mapping[str, int] | None = None,
    *,
    scope: str | Mapping[str, str] = "layer",
    size: int | tuple[int, int] | None = None,
    dense: models.Model | nn.Module | None = None,
    sample_weight: np.ndarray | None = None,
    precision: str = "fp16",
    price: float = 0.0,
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
        As in `clustering.cluster`. None, where there is a price: it decides, by `_clusters`.
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
    price : float
        Of a bit: an index is chosen for its error plus what it takes in an entropy-coded file, from how
        often it was used the pass before. One bit a kernel, in all layers, costs as much as an error of this
        share of a layer's output energy (the price of `clustering.cluster` is in squared weights). At 0 bits
        are free.
    damping : float
        Least share of the mean energy of an input that is added to each one's, so that noise is not learned;
        more where few images are read (`_moments.Moments.damping`), and ten times as much, and so on,
        where rounding leaves no solution with it.
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
    checks.check_real("price", price, lambda x: x >= 0, "at least 0")
    given, model, images = model, _model.as_model(model), datasets.as_image_set(images)
    bank = extract(model.network, size=size)
    n_clusters = _clusters(price, bank) if n_clusters is None else n_clusters
    seed = checks.check_seed(seed)
    dense = model.network if dense is None else models.network_of(dense)
    matched(dense, bank.layers)
    small, dense = (_model.moved(_copying.copied(x).eval(), device) for x in (model.network, dense))
    batches = _moments.batches(images, model.preprocess, batch_size, device)
    order = _moments.steps(dense, next(batches())[:1], {x.name for x in bank.layers if not x.transposed})
    books = _Books.of(bank, n_clusters, scope, sample_weight, precision, price, seed, {x.name for x in order})
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
    shared: Mapping[str, CountedCodebook]
    scope: str
    precision: str
    price: float
    seed: int
    measured: frozenset[str]  # layers that run, and can be corrected

    @classmethod
    def of(cls, bank, n_clusters, scope, sample_weight, precision, price, seed, measured) -> "_Books":
        sample_weight = _settings.checked_sample_weight(sample_weight, len(bank))
        members = grouping(bank, scope)
        wanted = _scopes.wanted(members, n_clusters)
        _precisions.float_type(precision)  # an unknown one shows before the work, not after it
        scope = scope if isinstance(scope, str) else "mapping"
        result = cls(bank, members, wanted, {}, scope, precision, price, seed, frozenset(measured))
        for name, layers in members.items():
            if len(layers) > 1 or layers[0].name not in measured:
                rows = rows_of(layers)
                counted = _settings.counted(None if sample_weight is None else sample_weight[rows])
                result.shared[name] = result.fitted(name, bank.points[rows], counted)
        return result

    def group(self, layer: Layer) -> str:
        """Return the name of a layer's group."""
        return next(name for name, layers in self.members.items() if layer in layers)

    def unit(self, read: Moments) -> float:
        """Return the squared error, summed over a layer's outputs, that costs as much as a bit."""
        energy = float(read.answer_power.sum()) or 1.0  # where nothing is answered, errors cost nothing
        return self.price / len(self.bank) * energy

    def fitted(
        self, group: str, points: np.ndarray, sample_weight: np.ndarray | None, **options
    ) -> CountedCodebook:
        """Return a codebook for points ``(n, area)``: distinct rows, rounded as stored."""
        k = min(self.wanted[group], len(points))
        found = kmeans.fit(points, k, sample_weight=sample_weight, seed=self.seed, **options)
        values = _precisions.rounded(torch.from_numpy(found.centres), self.precision)
        values, rows = values.unique(dim=0, return_inverse=True)
        return CountedCodebook.of(values, rows[torch.from_numpy(found.labels).long()])

    def of_layer(self, layer: Layer, target: Tensor, energy: Tensor) -> CountedCodebook:
        """Return the codebook of a layer whose kernels ``(n, area)`` read channels of an energy ``(n,)``."""
        name = self.group(layer)
        if name in self.shared:
            return self.shared[name].to(target.device)
        sample_weight = energy / energy.max() if energy.max() > 0 else torch.ones_like(energy)
        options = {"max_iter": _AT_START} if self.price else {}  # the passes to come do the rest
        points, sample_weight = target.cpu().numpy(), sample_weight.cpu().numpy()
        return self.fitted(name, points, sample_weight, **options).to(target.device)

    def refined(self, coded: _Coded, shape: torch.Size, squares: LeastSquares, rounds: int) -> _Coded:
        """Return a layer's codes with a codebook that answers nearer to the dense weights, if one does."""

        def decode(values: Tensor) -> Tensor:
            return F.embedding(coded.indices, values).reshape(shape)

        def rounded(values: Tensor) -> Tensor:
            return _precisions.rounded(values, self.precision)

        return _Coded(squares.fitted(decode, coded.codebook, rounded=rounded, rounds=rounds), coded.indices)

    def nearest(self, layer: Layer) -> _Coded:
        """Return a layer with the nearest representatives of its group's codebook."""
        codebook = self.shared[self.group(layer)].values
        points = torch.from_numpy(self.bank.points[layer.rows].copy())
        return _Coded(codebook, _assignment.nearest(points, codebook))

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


def _clusters(price: float, bank: KernelBank) -> int:
    """Return how many clusters a layer starts with at a price; those that do not pay for themselves go.

    In a layer of the shipped model the relative error fell as ``K ** -0.45``; one more row of a codebook then
    wins as much as its bytes cost at a K that is a power of the price.
    """
    if not price:
        raise InvalidValueError("n_clusters is not given and the price is 0; give one of them.")
    k = _AT_FIRST * (_PRICED / (price / len(bank))) ** (1 / 1.45)
    return int(min(max(k, _FEWEST), _MOST, max(x.n_kernels for x in bank.layers)))


def _clustered(
    books: _Books, layer: Layer, step: _moments.LayerMoments, read: Moments, dense, small, damping: float
) -> _Coded:
    """Cluster one layer of `small`, in place, and return its codes."""
    original, changed = dense.get_submodule(layer.name), small.get_submodule(layer.name)
    norms = _calibration.norms_behind(step, dense, small)
    about = read if changed.bias is not None or norms else read.about_zero()
    area = int(np.prod(layer.shape[2:]))
    shares = about.damping(damping).tolist()
    metrics = [Metric.of(h, area, share) for h, share in zip(about.small, shares, strict=True)]
    squares = LeastSquares(about, damping)
    target = _moved(_moments.grouped(changed), about, metrics)
    energy = about.small.diagonal(dim1=1, dim2=2).unflatten(1, (-1, area)).mean(2)  # (groups, inputs)
    each = energy[:, None].expand(-1, target.shape[1], -1).reshape(-1)
    book, unit = books.of_layer(layer, target.reshape(-1, area), each), books.unit(about)
    alone = books.group(layer) not in books.shared
    rounds = (
        (*[_FEW_ROUNDS] * (_PASSES - 1), _calibration.ROUNDS) if alone and unit else (_calibration.ROUNDS,)
    )
    for n in rounds:
        indices = [
            m.assigned(rows, book.values, book.price(unit)) for rows, m in zip(target, metrics, strict=True)
        ]
        coded = _Coded(book.values, torch.cat(indices).reshape(-1))
        if alone:
            coded = books.refined(coded, target.shape, squares, n)
            book = CountedCodebook.of(coded.codebook, coded.indices)
    _convolutions.set_weight(changed, coded.kernels, name=layer.name)
    _calibration.absorb(read, _moments.grouped(changed), original, changed, norms)
    return coded


def _moved(present: Tensor, read: Moments, metrics: list[Metric]) -> Tensor:
    """Return the weights whose answers to the small network's inputs are nearest to the dense ones.

    Ridge regression towards the layer's own weights; all ``(groups, out / groups, d)``.
    """
    missing = read.wanted - read.heard(present)
    return present + torch.stack([m.solved(rows) for m, rows in zip(metrics, missing, strict=True)])
