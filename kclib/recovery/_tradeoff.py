"""Bytes and damage of each group of layers at several K, and the K of each that do the least damage."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import optimize, sparse

from kclib import kmeans
from kclib._util import checks, threads
from kclib.clustering import Clustering, _scopes
from kclib.compression import _checkpoint, _entropy_coding, _precisions
from kclib.compression._counting import Count
from kclib.errors import InvalidValueError
from kclib.kernels import KernelBank, Layer
from kclib.kernels._bank import Kernels, bank_of, rows_of
from kclib.kmeans import _fit_progress, _fitting, _lloyd, _nearest, _settings
from kclib.store import Entry, Store

# A fixed-width index takes ceil(log2 K) bits: between powers of two only the codebook grows.
KS = tuple(1 << bits for bits in range(17))


@dataclass(frozen=True)
class Curve:
    """The bytes of a group of layers, and the damage that clustering it does, at several K.

    Attributes
    ----------
    name : str
        Of the group.
    ks : tuple of int
        Clusters, in order of `bytes`.
    bytes : numpy.ndarray
        int64 ``(m,)``, ascending: the group's codebook and indices, and the tables of entropy coding.
    damage : numpy.ndarray
        float64 ``(m,)``, descending: sum of weight times squared error of the group's kernels, with the
        codebook rounded as it is stored.
    """

    name: str
    ks: tuple[int, ...]
    bytes: np.ndarray
    damage: np.ndarray

    @classmethod
    def of(cls, name: str, ks: Iterable[int], n_bytes: np.ndarray, damage: np.ndarray) -> "Curve":
        """Return a curve without the points that are no better than a cheaper one."""
        order = np.lexsort((damage, n_bytes))
        least = np.minimum.accumulate(damage[order])
        kept = order[np.append(True, least[1:] < least[:-1])]
        return cls(name, tuple(np.asarray(ks)[kept].tolist()), n_bytes[kept], damage[kept])


def curves(
    bank: Kernels,
    sample_weight: np.ndarray,
    *,
    scope: _scopes.Scope = "layer",
    ks: Iterable[int] = KS,
    precision: str = "fp16",
    coding: str = "fixed",
    seed: int = 0,
    store: Store | None = None,
    progress: bool = True,
) -> tuple[Curve, ...]:
    """Return the curve of each group, from one weighted `kmeans.tree` each.

    Measured once and kept, a group at a time. The same for any number of threads.

    Parameters
    ----------
    bank : KernelBank, Model or torch.nn.Module
    sample_weight : numpy.ndarray
        ``(n,)`` in the rows of the bank, finite, at least 0: what a unit of each kernel's squared error costs
        the network. A group in which all are 0 costs nothing with one cluster.
    scope : {"layer", "global", "mixed"} or mapping of str to str
        As in `clustering.cluster`, or `mixed`.
    ks : iterable of int
        Numbers of clusters. A group with fewer kernels keeps all of them. Powers of two up to 65,536 by
        default.
    precision : {"fp32", "fp16", "bf16", "int8", "int4"}
        Of the stored codebooks.
    coding : {"fixed", "entropy"}
        Of the stored indices.
    seed : int
    store : Store, optional
        Where curves are looked for and kept; the default store if None.
    progress : bool

    Raises
    ------
    InvalidValueError, UnknownNameError
        Weights out of range; a K below 1; an unknown scope, precision or coding.
    NotEnoughMemoryError
    """
    bank = bank_of(bank)
    checks.check_known("coding of indices", coding, _checkpoint.CODINGS)
    checks.check_seed(seed)
    _precisions.float_type(precision)
    sample_weight, ks = _settings.required_sample_weight(sample_weight, len(bank)), _fitting.checked_ks(ks)
    store = store or Store()
    groups = [
        _Members.of(bank, sample_weight, name, layers, ks)
        for name, layers in _scopes.grouping(bank, _scopes.resolved(bank, scope)).items()
    ]
    keys = [group.key | {"precision": precision, "coding": coding, "seed": seed} for group in groups]
    entries = [store.get(key) for key in keys]
    missing = [i for i in np.argsort([-len(x.points) for x in groups], kind="stable") if entries[i] is None]
    with _bar([groups[i] for i in missing], progress) as bar:

        def measure(place: int) -> None:
            i = missing[place]
            inside = 1 if len(missing) >= threads.threads() else threads.threads()
            report = bar.of(groups[i].name, len(groups[i].points))
            entries[i] = Entry(keys[i], {}, groups[i].measured(precision, coding, seed, inside, report))
            store.put(entries[i])

        threads.side_by_side(measure, len(missing), threads.threads())
    return tuple(Curve.of(group.name, **entry.arrays) for group, entry in zip(groups, entries, strict=True))


def solve(curves: Iterable[Curve], n_bytes: float) -> dict[str, int]:
    """Return the clusters of each group that do the least damage in all within `n_bytes`.

    A multiple-choice knapsack, solved exactly by scipy's HiGHS (to a millionth of the damage). Its linear
    relaxation is the allocation by Lagrange multipliers over convex hulls of Shoham and Gersho 1988,
    *Efficient bit allocation for an arbitrary set of quantizers*.

    Raises
    ------
    InvalidValueError
        Fewer bytes than the cheapest choice takes.
    """
    curves = tuple(curves)
    if not curves:
        raise InvalidValueError("there are no curves; give one for each group of layers.")
    least = sum(int(curve.bytes[0]) for curve in curves)
    if not n_bytes >= least:
        raise InvalidValueError(f"n_bytes is {n_bytes}; codebooks and indices take at least {least} bytes.")
    damage, spent = (np.concatenate(x) for x in zip(*((c.damage, c.bytes) for c in curves), strict=True))
    owner = np.repeat(np.arange(len(curves)), [len(curve.ks) for curve in curves])
    one_each = sparse.csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    program = {
        "bounds": (0, 1),
        "constraints": (
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(spent[None].astype(float), -np.inf, min(n_bytes, spent.sum())),
        ),
    }
    # HiGHS stops at an absolute gap of 1e-6, so damage is put in units of the least that there can be
    unit = damage.max() or 1.0
    unit *= max(1e-9, optimize.milp(damage / unit, **program).fun)
    chosen = optimize.milp(damage / unit, integrality=1, options={"mip_rel_gap": 0}, **program).x
    return {curve.name: curve.ks[chosen[owner == i].argmax()] for i, curve in enumerate(curves)}


def rounded(codebook: np.ndarray, precision: str) -> np.ndarray:
    """Return a codebook's values, float32 ``(K, ...)``, as they come back from `precisions.store`."""
    return _precisions.rounded(torch.from_numpy(codebook), precision).numpy()


def stored(made: Clustering, precision: str) -> Clustering:
    """Return a clustering with its codebooks as they come back from `precisions.store`."""
    groups = (replace(group, codebook=rounded(group.codebook, precision)) for group in made.groups)
    return replace(made, groups=tuple(groups))


@dataclass(frozen=True)
class _Members:
    """The kernels of one group, and the numbers of clusters that are tried on them."""

    name: str
    layers: tuple[Layer, ...]
    points: np.ndarray
    sample_weight: np.ndarray
    ks: tuple[int, ...]

    @classmethod
    def of(cls, bank: KernelBank, sample_weight: np.ndarray, name: str, layers, ks) -> "_Members":
        rows = rows_of(layers)
        ks = sorted({min(k, len(rows)) for k in ks})
        for k in ks:
            _settings.check_k(k, len(rows))
        return cls(name, layers, bank.points[rows], sample_weight[rows], tuple(map(int, ks)))

    @property
    def key(self) -> dict:
        """What its curve depends on, beside how it is stored."""
        content = hashlib.sha256(self.points.tobytes() + self.sample_weight.tobytes()).hexdigest()
        counts = [layer.n_kernels for layer in self.layers]
        shape = list(self.points.shape)
        return {"kind": "curve", "content": content, "shape": shape, "kernels": counts, "ks": list(self.ks)}

    def measured(self, precision: str, coding: str, seed: int, n_threads: int, report) -> dict:
        """Return what `Curve.of` takes."""
        sample_weight = _settings.counted(self.sample_weight)
        report = _fit_progress.scaled(report, 1 / (1 + len(self.ks)))
        tree = kmeans.tree(
            self.points, sample_weight=sample_weight, seed=seed, n_threads=n_threads, progress=report
        )
        fits = (tree.fit(k, progress=report) for k in self.ks)
        rungs = list({len(rung.centres): rung for rung in fits}.values())
        return {
            "ks": np.array([len(rung.centres) for rung in rungs]),
            "n_bytes": np.array([self._bytes(rung, precision, coding) for rung in rungs]),
            "damage": np.array([self._damage(rung, precision, n_threads) for rung in rungs]),
        }

    def _damage(self, rung: kmeans.KMeans, precision: str, n_threads: int) -> float:
        centres = rounded(rung.centres, precision)
        errors = _nearest.errors(self.points, centres, rung.labels, n_threads=n_threads)
        return _lloyd.total(errors, self.sample_weight)

    def _bytes(self, rung: kmeans.KMeans, precision: str, how: str) -> int:
        """Return the bytes of codebook and indices, as `compression.footprint` counts them."""
        k = len(rung.centres)
        if how == "entropy":
            ranks = np.argsort(np.argsort(-np.bincount(rung.labels), kind="stable"))
            ends = np.cumsum([layer.n_kernels for layer in self.layers])[:-1]
            if words := _entropy_coding.smaller(np.split(ranks[rung.labels], ends), k):
                codebook = _precisions.codebook_bytes(k, self.points.shape[1], precision)
                return codebook + words.index_bytes + words.table_bytes
        return int(Count(precision).bytes(self.layers, k))


def _bar(groups: list[_Members], shown: bool) -> _fit_progress.Fits:
    """Return a progress bar over the kernels of some groups."""
    total = sum(len(group.points) for group in groups)
    memory = sum(_fitting.memory(*group.points.shape, group.ks[-1]) for group in groups[: threads.threads()])
    return _fit_progress.Fits(total, memory, shown)
