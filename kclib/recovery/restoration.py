"""Bytes that win back most: the clusters whose errors cost the network most are split."""

import heapq
import itertools
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from torch import nn

from kclib import models
from kclib._util import checks
from kclib._util.progress_bars import tqdm
from kclib.clustering import Clustering
from kclib.clustering._clustering import dense_kernels, kernel_errors, with_inertia
from kclib.compression import _precisions, _replacement, byte_counts
from kclib.errors import InvalidValueError
from kclib.kernels import KernelBank
from kclib.kmeans import _entropy, _nearest
from kclib.models import Model

# Most rounds of k-means in a cluster that is split.
_ROUNDS = 50


@dataclass(frozen=True)
class Restored:
    """A clustering that more bytes were spent on.

    Attributes
    ----------
    clustering : Clustering
        Not rounded; `compression.compress` and `compression.save` round it.
    network : torch.nn.Module
        A copy with ordinary dense weights, rounded as they are stored.
    n_bytes : int
        Spent: what the convolutions take more, stored with entropy-coded indices.
    table : pandas.DataFrame
        One row a group: ``group``; ``clusters``, the representatives bought; ``before`` and ``after``, its
        damage.
    model : Model or torch.nn.Module
        The network as what was given: in a `Model`, or alone.
    """

    clustering: Clustering
    network: nn.Module
    n_bytes: int
    table: pd.DataFrame
    model: Model | nn.Module


def restore_worst(
    model: Model | nn.Module,
    clustering: Clustering,
    budget: float,
    *,
    sample_weight: np.ndarray | None = None,
    precision: str = "fp16",
    progress: bool = True,
) -> Restored:
    """Spend bytes on more representatives, where they lower the damage most.

    Clusters are split in two by weighted k-means from their principal axis, first always the one that gains
    most per byte: the greedy growing of a tree-structured quantizer (Riskin and Gray 1991, *A Greedy Tree
    Growing Algorithm for the Design of Variable Rate Vector Quantizers*). A split costs a row of the
    codebook, and the entropy that it adds to the group's indices.

    Parameters
    ----------
    model : Model or torch.nn.Module
        Dense; unchanged.
    clustering : Clustering
        Of kernels neither scaled nor turned.
    budget : float
        Most bytes to spend: `compression.footprint`'s ``convolutions``, with entropy-coded indices.
    sample_weight : numpy.ndarray, optional
        As in `damage.by_cluster`.
    precision : {"fp32", "fp16", "int8"}
        Of the stored codebooks.
    progress : bool
        Whether to show a progress bar.

    Raises
    ------
    InvalidValueError, UnknownNameError
        A clustering of another architecture, or of scaled or turned kernels; a budget or sample weights
        out of range; an unknown precision.
    """
    _check(clustering, budget, precision)
    dense = models.network_of(model)
    bank = dense_kernels(dense, clustering)
    before = kernel_errors(bank, clustering, sample_weight)
    bought = _Market.of(bank, clustering, sample_weight, precision).bought(budget, progress)
    made, n_bytes = _affordable(dense, bank, clustering, bought, budget, precision)
    after = kernel_errors(bank, made, sample_weight)
    rows = [
        (new.name, new.n_clusters - old.n_clusters, before[new.rows].sum(), after[new.rows].sum())
        for old, new in zip(clustering.groups, made.groups, strict=True)
    ]
    table = pd.DataFrame(rows, columns=["group", "clusters", "before", "after"])
    network = _replacement.inserted(dense, _precisions.stored(made, precision))
    return Restored(made, network, n_bytes, table, models.like(model, network))


@dataclass(frozen=True)
class _Cluster:
    """A cluster of a group: its number, its kernels' rows of the group, and its centre, float32 ``(d,)``."""

    group: int
    cluster: int
    rows: np.ndarray
    centre: np.ndarray


@dataclass(frozen=True)
class _Split:
    """A cluster cut in two.

    Attributes
    ----------
    group, cluster : int
    stays, moves : numpy.ndarray
        Rows of the group's kernels.
    centres : numpy.ndarray
        float32 ``(2, d)``: of those that stay and of those that move.
    gain : float
        The damage that it saves.
    n_bytes : float
    """

    group: int
    cluster: int
    stays: np.ndarray
    moves: np.ndarray
    centres: np.ndarray
    gain: float
    n_bytes: float


@dataclass(frozen=True)
class _Market:
    """The kernels and sample weights of each group, and what is asked for a split."""

    clustering: Clustering
    points: list[np.ndarray]
    sample_weight: list[np.ndarray]
    row_bytes: int

    @classmethod
    def of(cls, bank: KernelBank, clustering: Clustering, sample_weight, precision: str) -> "_Market":
        sample_weight = (
            np.ones(len(bank), np.float32) if sample_weight is None else np.asarray(sample_weight, np.float32)
        )
        rows = [group.rows for group in clustering.groups]
        price = _precisions.codebook_bytes(1, bank.points.shape[1], precision)
        return cls(clustering, [bank.points[x] for x in rows], [sample_weight[x] for x in rows], price)

    def bought(self, budget: float, progress: bool) -> list[_Split]:
        """Return the splits in the order in which they are bought.

        A cluster is only split once the most that it could gain for a row's bytes (`most`) is more than the
        best split on offer gains.
        """
        order, shelf, bought = itertools.count(), [], []
        used = [group.n_clusters for group in self.clustering.groups]
        title, total = "bytes spent", int(budget)
        with tqdm(desc=title, unit="B", total=total, delay=2, leave=False, disable=not progress) as bar:

            def offer(whole: _Cluster) -> None:
                if len(whole.rows) > 1 and (most := self.most(whole)) > 0:
                    heapq.heappush(shelf, (-most / self.row_bytes, next(order), whole))

            for i, group in enumerate(self.clustering.groups):
                rows, starts = _nearest.by_label(group.indices, group.n_clusters)
                for k, members in enumerate(np.split(rows, starts[1:-1])):
                    offer(_Cluster(i, k, members, group.codebook[k].ravel()))
            while shelf:
                _, place, best = heapq.heappop(shelf)
                if isinstance(best, _Cluster):
                    split = self.split(best)
                    if split is not None and split.n_bytes <= budget:
                        heapq.heappush(shelf, (-split.gain / split.n_bytes, place, split))
                elif best.n_bytes <= budget:
                    bought.append(best)
                    budget -= best.n_bytes
                    bar.update(round(best.n_bytes))
                    offer(_Cluster(best.group, best.cluster, best.stays, best.centres[0]))
                    offer(_Cluster(best.group, used[best.group], best.moves, best.centres[1]))
                    used[best.group] += 1
        return bought

    def most(self, whole: _Cluster) -> float:
        """Return no less than any split of a cluster gains.

        That is its centre's distance from the mean, and the largest eigenvalue of its scatter: two means lie
        on a line, and between them is no more scatter than there is in all along it (Ding and He 2004,
        *K-means Clustering via Principal Component Analysis*, theorem 2.1).
        """
        points, sample_weight = self.members(whole)
        if not (total := sample_weight.sum()) > 0:
            return 0.0
        mean, values, _ = _principal(points, sample_weight)
        most = values[-1] + total * np.square(mean - whole.centre).sum()
        return float(most) * (1 + 1e-9)  # what rounding may add

    def split(self, whole: _Cluster) -> _Split | None:
        """Return a good split of a cluster; None if none gains anything."""
        points, sample_weight = self.members(whole)
        moves, centres = _halves(points, sample_weight)
        if moves.all() or not moves.any():
            return None
        before = np.square(points - whole.centre).sum(1) @ sample_weight
        gain = before - np.square(points - centres[moves.astype(int)]).sum(1) @ sample_weight
        if not gain > 0:
            return None
        # A group's entropy is that of its clusters' shares and, within each, of the parts' shares.
        n_bytes = self.row_bytes + _entropy.entropy_bytes(np.array([(~moves).sum(), moves.sum()]))
        parts = whole.rows[~moves], whole.rows[moves]
        return _Split(whole.group, whole.cluster, *parts, centres.astype(np.float32), float(gain), n_bytes)

    def members(self, whole: _Cluster) -> tuple[np.ndarray, np.ndarray]:
        """Return a cluster's kernels and what their errors cost, float64."""
        kept = self.points[whole.group][whole.rows], self.sample_weight[whole.group][whole.rows]
        return kept[0].astype(np.float64), kept[1].astype(np.float64)


def _principal(points: np.ndarray, sample_weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the weighted mean, and the eigenvalues and eigenvectors of the scatter, the largest last."""
    mean = np.average(points, axis=0, weights=sample_weight)
    apart = points - mean
    return mean, *np.linalg.eigh(apart.T @ (sample_weight[:, None] * apart))


def _halves(points: np.ndarray, sample_weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which points move to the second half, and the halves' means; all or none if they are alike."""
    mean, _, axes = _principal(points, sample_weight)
    moves = (points - mean) @ axes[:, -1] > 0
    centres = np.stack([mean, mean])
    for _ in range(_ROUNDS):
        if moves.all() or not moves.any():
            break
        for i, part in enumerate((~moves, moves)):
            heavy = (
                sample_weight[part] if sample_weight[part].any() else None
            )  # what costs nothing has a plain mean
            centres[i] = np.average(points[part], axis=0, weights=heavy)
        nearer = (points - centres.mean(0)) @ (centres[1] - centres[0]) > 0
        if (nearer == moves).all():
            break
        moves = nearer
    return moves, centres


def _affordable(
    network: nn.Module,
    bank: KernelBank,
    clustering: Clustering,
    bought: list[_Split],
    budget: float,
    precision: str,
) -> tuple[Clustering, int]:
    """Return the clustering after as many splits as the bytes that a file takes allow, and these bytes."""
    cumulated = np.cumsum([0, *(split.n_bytes for split in bought)])

    def stored(made: Clustering) -> int:
        return byte_counts.clustered_bytes(network, made, precision=precision)

    before, n = stored(clustering), len(bought)
    while n:
        made = _after(bank, clustering, bought[:n])
        over = stored(made) - before - budget
        if over <= 0:
            return made, int(over + budget)
        n = max(0, min(n, int(np.searchsorted(cumulated, cumulated[n] - over, side="right"))) - 1)
    return clustering, 0


def _after(bank: KernelBank, clustering: Clustering, bought: list[_Split]) -> Clustering:
    """Return the clustering after some splits."""
    groups = []
    for i, group in enumerate(clustering.groups):
        splits = [split for split in bought if split.group == i]
        indices, size = group.indices.copy(), group.codebook.shape[1:]
        codebook = np.concatenate([group.codebook, np.empty((len(splits), *size), np.float32)])
        for new, split in enumerate(splits, group.n_clusters):
            indices[split.moves] = new
            codebook[[split.cluster, new]] = split.centres.reshape(2, *size)
        groups.append(replace(group, codebook=codebook, indices=indices))
    return with_inertia(replace(clustering, groups=tuple(groups)), bank)


def _check(clustering: Clustering, budget: float, precision: str) -> None:
    checks.check_known("precision", precision, byte_counts.PRECISIONS)
    checks.check_real("budget", budget, lambda x: x >= 0, "a number of bytes, at least 0")
    if any(group.scales is not None or group.turns is not None for group in clustering.groups):
        raise InvalidValueError(
            "clusters of scaled or turned kernels cannot be split; cluster without scaled and turned."
        )
