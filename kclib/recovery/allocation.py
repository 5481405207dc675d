"""Bytes shared out: "at most so many bytes" or "at most so many points lost" in, clusters a group out."""

import bisect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from torch import nn

from kclib import clustering as clusterings
from kclib import datasets, evaluation, models
from kclib._util import checks
from kclib._util.progress_bars import tqdm
from kclib.clustering import Clustering, _clustering, _scopes
from kclib.clustering._scopes import Scope
from kclib.compression import _replacement, byte_counts
from kclib.compression._counting import Count
from kclib.datasets import ImageSet
from kclib.errors import InvalidValueError
from kclib.evaluation import Drop, Evaluation
from kclib.kernels import KernelBank, Layer
from kclib.kmeans import _fitting, _settings
from kclib.models import Model, _model
from kclib.recovery import _tradeoff
from kclib.recovery._tradeoff import KS, Curve, curves, solve
from kclib.store import Store

_MARGIN = 0.99  # of the bytes are spent at a second try, so that a third is rare
_STEPS = 8  # halvings of the range of bytes; from 50 times the bytes to within 2 %

Build = Callable[[Scope, dict[str, int]], tuple[nn.Module, Clustering]]


@dataclass(frozen=True)
class Allocation:
    """The clustering that a budget bought.

    Attributes
    ----------
    scope : str or mapping of str to str
        Of those asked for.
    n_clusters : dict of str to int
        By group.
    n_bytes : int
        Of all convolutions as stored: `compression.footprint`'s ``convolutions``.
    network : torch.nn.Module
        A copy with ordinary dense weights, rounded as they are stored.
    clustering : Clustering
        Not rounded; `compression.compress` and `compression.save` round it.
    drop : Drop
        From the dense model to `network`, on the images it was chosen on.
    table : pandas.DataFrame
        One row a clustering that was evaluated: ``scope``; ``choice``, ``solved`` or ``uniform`` (left out
        where the two are one); ``clusters``, in all; ``bytes``; ``damage``, weighted squared error before
        rounding; ``top1`` in percent; ``drop`` in points.
    model : Model or torch.nn.Module
        The network as what was given: in a `Model`, or alone.
    """

    scope: Scope
    n_clusters: dict[str, int]
    n_bytes: int
    network: nn.Module
    clustering: Clustering
    drop: Drop
    table: pd.DataFrame
    model: Model | nn.Module


def allocate(
    model: Model | nn.Module,
    data: ImageSet,
    bank: KernelBank,
    sample_weight: np.ndarray,
    *,
    n_bytes: float | None = None,
    max_drop: float | None = None,
    scopes: Iterable[Scope] = ("layer", "global"),
    ks: Iterable[int] = KS,
    precision: str = "fp16",
    coding: str = "fixed",
    seed: int = 0,
    store: Store | None = None,
    build: Build | None = None,
    uniform: bool = True,
    device: str = "cpu",
    progress: bool = True,
) -> Allocation:
    """Return the best clustering within so many bytes, or the smallest that loses at most so many points.

    In each scope, clusters are shared out by `solve` and, if `uniform`, also all groups given the same K. For
    `n_bytes`, the most accurate on `data` is returned: with `uniform` never worse there than the largest
    uniform K that fits. For `max_drop`, each of these ways is bisected for the fewest bytes.

    Parameters
    ----------
    model : Model or torch.nn.Module
        A network alone is given images as `models.plain` makes them.
    data : ImageSet, or what `datasets.as_image_set` takes
        To choose on: images held back from training, never the test set.
    bank : KernelBank
        Of the model's network.
    sample_weight, ks, coding, seed, store
        As in `curves`.
    n_bytes : float, optional
        Most bytes of all convolutions, those that are not clustered and biases included.
    max_drop : float, optional
        Most accuracy points lost on `data`. Give one of the two.
    scopes : iterable of scopes
        As in `curves`.
    precision : {"fp32", "fp16", "int8"}
        Of the stored codebooks.
    build : callable, optional
        Called with a scope for `clustering.cluster` and the clusters of each group; returns the network to
        evaluate and its clustering. By default weighted `clustering.cluster`, rounded as it is stored.
    uniform : bool
        Leave it out where `build` takes long.
    device : str
        Where networks are evaluated.
    progress : bool

    Raises
    ------
    InvalidValueError, UnknownNameError
        Neither goal or both; one that cannot be reached (the sentence says what can); what `curves` raises.
    """
    _check(n_bytes, max_drop, precision)
    given, model, data = model, _model.as_model(model), datasets.as_image_set(data)
    sample_weight = _settings.required_sample_weight(sample_weight, len(bank))
    options = {
        "ks": _fitting.checked_ks(ks),
        "precision": precision,
        "coding": coding,
        "seed": seed,
        "store": store,
    }
    scopes = (scopes,) if isinstance(scopes, (str, Mapping)) else tuple(scopes)
    if not scopes:
        raise InvalidValueError("scopes is empty; name at least one, such as layer.")
    plans = [_Plan.of(bank, sample_weight, scope, options, progress) for scope in scopes]
    plans += [replace(plan, uniform=True) for plan in plans if uniform]

    def clustered(scope: Scope, n_clusters: dict[str, int]) -> tuple[nn.Module, Clustering]:
        how = {"scope": scope, "sample_weight": sample_weight, "seed": seed, "progress": progress}
        made = clusterings.cluster(bank, n_clusters, **how)
        return _replacement.inserted(model.network, _tradeoff.stored(made, precision)), made

    build = build or clustered
    dense = evaluation.evaluate(model, data, device=device, progress=progress)
    with tqdm(desc="sharing bytes out", unit="network", delay=2, leave=False, disable=not progress) as bar:
        trials = _Trials(model, data, device, bank, sample_weight, dense, coding, precision, build, bar)
        best = _best(trials, plans, n_bytes) if max_drop is None else _fewest(trials, plans, max_drop)
    table = pd.DataFrame(list(trials.rows.values()))
    return replace(best, table=table, model=models.like(given, best.network))


@dataclass(frozen=True)
class _Plan:
    """One way to share bytes out: a scope, and whether all groups get the same K."""

    scope: Scope
    resolved: Scope
    curves: tuple[Curve, ...]
    layers: Mapping[str, tuple[Layer, ...]]
    count: Count | None
    uniform: bool = False

    @classmethod
    def of(cls, bank: KernelBank, sample_weight, scope: Scope, options: dict, progress: bool) -> "_Plan":
        resolved = _scopes.resolved(bank, scope)
        count = Count(options["precision"]) if options["coding"] == "fixed" else None
        measured = curves(bank, sample_weight, scope=scope, progress=progress, **options)
        return cls(scope, resolved, measured, _scopes.grouping(bank, resolved), count)

    @property
    def name(self) -> str:
        return self.scope if isinstance(self.scope, str) else "mapping"

    @property
    def least(self) -> int:
        return sum(int(curve.bytes[0]) for curve in self.curves)

    @property
    def most(self) -> int:
        return sum(int(curve.bytes[-1]) for curve in self.curves)

    def at(self, n_bytes: float) -> dict[str, int]:
        """Return the clusters of each group that so many bytes, at least `least`, buy."""
        if not self.uniform:
            return solve(self.curves, n_bytes)
        every = range(min(min(x.ks) for x in self.curves), 1 + max(max(x.ks) for x in self.curves))
        affordable = bisect.bisect_right(every, n_bytes, key=lambda k: self.bytes(self._same(k)))
        return self._same(every[max(0, affordable - 1)])

    def _same(self, k: int) -> dict[str, int]:
        return {curve.name: min(max(k, min(curve.ks)), max(curve.ks)) for curve in self.curves}

    def bytes(self, n_clusters: Mapping[str, int]) -> float:
        """Return what the curves say that these clusters take."""
        return sum(self._stored(curve, n_clusters[curve.name]) for curve in self.curves)

    def _stored(self, curve: Curve, k: int) -> float:
        if self.count is not None:
            return self.count.bytes(self.layers[curve.name], k)
        order = np.argsort(curve.ks)  # entropy-coded: between what was measured
        return float(np.interp(math.log(k), np.log(curve.ks)[order], curve.bytes[order]))


@dataclass(frozen=True)
class _Trials:
    """Clusterings as they are built and evaluated, and a row of the table for each."""

    model: Model
    data: ImageSet
    device: str
    bank: KernelBank
    sample_weight: np.ndarray
    dense: Evaluation
    coding: str
    precision: str
    build: Build
    bar: tqdm
    rows: dict[tuple, dict] = field(default_factory=dict)

    @property
    def unclustered(self) -> int:
        """Bytes of the convolutions that no clustering changes."""
        kernels = sum(math.prod(layer.shape) * layer.itemsize for layer in self.bank.layers)
        return byte_counts.convolution_bytes(self.model.network) - kernels

    def of(self, plan: _Plan, spend: float, limit: float = math.inf) -> Allocation | None:
        """Return what `spend` bytes for the clustered kernels buy; None if it was tried before or never fits.

        What entropy-coded indices take is known only when they are there: where they take more than their
        curves say, so much less is spent again.
        """
        while spend >= plan.least:
            n_clusters = plan.at(spend)
            key = (str(plan.resolved), *n_clusters.items())
            if key in self.rows:
                return None
            network, made = self.build(plan.resolved, n_clusters)
            how = {"coding": self.coding, "precision": self.precision}
            n_bytes = byte_counts.clustered_bytes(self.model.network, made, **how)
            if n_bytes <= limit:
                lost = self._drop(network)
                allocation = Allocation(
                    plan.scope, n_clusters, n_bytes, network, made, lost, pd.DataFrame(), network
                )
                self.rows[key] = self._row(plan, allocation)
                return allocation
            taken = (limit - self.unclustered) / (n_bytes - self.unclustered)
            spend = _MARGIN * taken * plan.bytes(n_clusters)
        return None

    def _drop(self, network: nn.Module) -> Drop:
        model = replace(self.model, network=network)
        answers = evaluation.evaluate(model, self.data, device=self.device, progress=False)
        self.bar.update()
        return evaluation.drop(self.dense, answers)

    def _row(self, plan: _Plan, allocation: Allocation) -> dict:
        errors = _clustering.kernel_errors(self.bank, allocation.clustering, self.sample_weight)
        return {
            "scope": plan.name,
            "choice": "uniform" if plan.uniform else "solved",
            "n_clusters": allocation.n_clusters,
            "clusters": allocation.clustering.n_clusters,
            "bytes": allocation.n_bytes,
            "damage": float(errors.sum()),
            "top1": self.dense.top1.estimate - allocation.drop.points.estimate,
            "drop": allocation.drop.points.estimate,
        }


def _best(trials: _Trials, plans: Iterable[_Plan], n_bytes: float) -> Allocation:
    """Return the most accurate within so many bytes, of equals the smallest."""
    candidates = (trials.of(plan, n_bytes - trials.unclustered, n_bytes) for plan in plans)
    best = min(filter(None, candidates), key=lambda x: (x.drop.lost - x.drop.won, x.n_bytes), default=None)
    if best is None:
        least = min(plan.least for plan in plans) + trials.unclustered
        raise InvalidValueError(f"n_bytes is {n_bytes}; the convolutions take at least {least} bytes.")
    return best


def _fewest(trials: _Trials, plans: Iterable[_Plan], max_drop: float) -> Allocation:
    """Return the smallest that loses no more than so many points."""
    best = None
    for plan in plans:
        most = plan.most if best is None else min(plan.most, best.n_bytes - trials.unclustered - 1)
        candidates = filter(None, (best, _bisected(trials, plan, max_drop, most)))
        best = min(candidates, key=lambda x: x.n_bytes, default=None)
    if best is None:
        least = min(row["drop"] for row in trials.rows.values())
        raise InvalidValueError(
            f"max_drop is {max_drop}; the best clustering loses {least:.2f} points on {trials.data.name}."
        )
    return best


def _bisected(trials: _Trials, plan: _Plan, max_drop: float, most: int) -> Allocation | None:
    """Return the smallest found between `plan.least` and `most` bytes, None if `most` do not suffice."""
    low, high = plan.least, most
    best = trials.of(plan, high)
    if best is None or best.drop.points.estimate > max_drop:
        return None
    for _ in range(_STEPS):
        middle = round(math.sqrt(low * high))
        trial = trials.of(plan, middle)
        if trial is None or trial.drop.points.estimate > max_drop:
            low = middle
        else:
            best, high = trial, middle
    return best


def _check(n_bytes: float | None, max_drop: float | None, precision: str) -> None:
    if (n_bytes is None) == (max_drop is None):
        raise InvalidValueError("give n_bytes or max_drop, and not both.")
    if not checks.is_real(goal := n_bytes if max_drop is None else max_drop):
        raise InvalidValueError(f"n_bytes or max_drop is {goal!r}; it must be a finite number.")
    checks.check_known("precision", precision, byte_counts.PRECISIONS)
