"""What each representative costs the network, and what is won back where its kernels are dense again."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from torch import nn

from kclib import kernels
from kclib._util import checks
from kclib.clustering import Clustering, Group
from kclib.clustering._clustering import dense_kernels, kernel_errors, quantized
from kclib.datasets import ImageSet
from kclib.evaluation import _accuracy
from kclib.kernels import KernelBank, _bank
from kclib.kernels._bank import Kernels
from kclib.models import Model, _model


def by_cluster(
    bank: Kernels, clustering: Clustering, sample_weight: np.ndarray | None = None
) -> pd.DataFrame:
    """Return what each representative costs, the worst first.

    Parameters
    ----------
    bank : KernelBank, Model or torch.nn.Module
        The dense kernels that were clustered.
    clustering : Clustering
    sample_weight : numpy.ndarray, optional
        ``(n,)`` in the rows of the bank, finite, at least 0: what a squared error of one in each kernel costs
        (`sensitivity.importance`). By default all cost alike.

    Returns
    -------
    pandas.DataFrame
        One row a representative: ``group``; ``cluster``, its index; ``kernels`` that it stands for;
        ``error``, the sum of their squared errors; ``damage``, the sum of errors times sample weights;
        ``share`` of all damage, 0 to 1.

    Raises
    ------
    InvalidValueError
        Another bank than was clustered; sample weights out of range.
    """
    bank = _bank.bank_of(bank)
    squares, costs = kernel_errors(bank, clustering), kernel_errors(bank, clustering, sample_weight)
    tables = [_by_cluster(group, squares[group.rows], costs[group.rows]) for group in clustering.groups]
    table = pd.concat(tables, ignore_index=True)
    table["share"] = table.damage / (table.damage.sum() or 1)
    return table.sort_values("damage", ascending=False, kind="stable", ignore_index=True)


def _restored(model: Model | nn.Module, clustering: Clustering, worst: pd.DataFrame) -> Model:
    """Return a clustered model in which the kernels of some representatives are their own dense ones again.

    Parameters
    ----------
    model : Model or torch.nn.Module
        Dense; unchanged.
    clustering : Clustering
    worst : pandas.DataFrame
        Rows of what `by_cluster` returns; with none of them, this is the clustered model.

    Raises
    ------
    InvalidValueError
        A clustering of another architecture.
    """
    checks.check_columns(worst, ("group", "cluster"))
    model = _model.as_model(model)
    dense = dense_kernels(model.network, clustering).kernels
    values = quantized(clustering)
    chosen = worst.groupby("group").cluster.agg(list) if len(worst) else {}
    for group in clustering.groups:
        rows = group.rows[np.isin(group.indices, chosen.get(group.name, []))]
        values[rows] = dense[rows]
    network = kernels.insert(model.network, KernelBank(values, clustering.layers, {}))
    return replace(model, network=network)


def won_back(
    model: Model | nn.Module,
    clustering: Clustering,
    table: pd.DataFrame,
    data: ImageSet,
    counts: Sequence[int],
    **options,
) -> pd.DataFrame:
    """Return the points won back by giving the kernels of the worst clusters their dense weights.

    Parameters
    ----------
    model : Model or torch.nn.Module
        Dense; unchanged.
    clustering : Clustering
    table : pandas.DataFrame
        As `by_cluster` returns it; in another order, other clusters are restored first.
    data : ImageSet
    counts : sequence of int
        Clusters to restore, from the top of the table.
    **options
        Of `_accuracy.evaluate`.

    Returns
    -------
    pandas.DataFrame
        One row a count: ``clusters``; ``kernels``; ``share`` of the damage, 0 to 1, that was theirs; ``top1``
        in percent; ``won`` over the whole clustering, in points, with its paired 95 % interval ``won_low``
        and ``won_high``.
    """
    for n in counts:
        checks.check_whole("clusters to restore", n, 0, len(table))
    answers = [
        _accuracy.evaluate(_restored(model, clustering, table.head(n)), data, **options) for n in (0, *counts)
    ]
    rows = []
    for n, after in zip(counts, answers[1:], strict=True):
        worst, won = table.head(n), _accuracy.drop(after, answers[0]).points
        rows.append(
            (n, worst.kernels.sum(), worst.share.sum(), after.top1.estimate, won.estimate, won.low, won.high)
        )
    return pd.DataFrame(rows, columns=["clusters", "kernels", "share", "top1", "won", "won_low", "won_high"])


def _by_cluster(group: Group, errors: np.ndarray, costs: np.ndarray) -> pd.DataFrame:
    counted = [np.bincount(group.indices, x, group.n_clusters) for x in (None, errors, costs)]
    columns = dict(zip(("kernels", "error", "damage"), counted, strict=True))
    return pd.DataFrame({"group": group.name, "cluster": np.arange(group.n_clusters), **columns})
