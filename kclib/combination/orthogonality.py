"""Whether what methods lose adds up: the effect of each, that of pairs, and what their sum does not say."""

import itertools
import math
import warnings

import numpy as np
import pandas as pd
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from kclib._util import checks
from kclib.combination import factorial
from kclib.errors import InvalidValueError
from kclib.evaluation import _intervals

_RESPONSES = ("drop", "logit")
_FACTORS = ["sparsity", "clustering", "precision"]
_CELL = [*_FACTORS, "order", "pruned"]
_NOTHING = (0.0, "none", "none", "none", "none")
_NOTHING_LEFT = 1e-12  # a sum of squares that is but rounding


def effects(table: pd.DataFrame, response: str = "drop") -> pd.DataFrame:
    """Return what each level of each method does to the accuracy, and each pair beyond that.

    For each kind of pruning on its own, with what is not pruned. By ordinary least squares on ``sparsity``,
    ``clustering`` and ``precision``, those of several levels, with all pairs; effects are deviations from the
    mean over all combinations, each counted once, so that those of a method sum to 0. What is left, higher
    interactions and seeds, is the error that intervals come from; that the images are a sample is not in
    them.

    Parameters
    ----------
    table : pandas.DataFrame
        From `run`, of one order.
    response : {"drop", "logit"}
        ``drop`` asks whether the points lost add up. As no network loses more points than it had, they cannot
        near the floor, whatever the methods do. ``logit``, the log odds of a right answer, asks whether each
        method multiplies the odds by the same factor whatever the others did, which has no floor; half an
        image is added to both sides, as there may be none (Haldane 1956).

    Returns
    -------
    pandas.DataFrame
        ``pruned``, the kind; ``term``, a method or ``a:b``, or ``mean`` for that of all; ``level``;
        ``effect`` in points or log odds, and ``low`` and ``high``, its 95 % interval, missing where nothing
        is left to take it from; ``share`` of the sums of squares of the term (type II), 0 to 1, the same for
        all its levels: of them all and ``residual``, the last row of the kind, it is eta squared if the
        design is balanced.

    Raises
    ------
    InvalidValueError, UnknownNameError
        Several orders; combinations that are missing; no more rows than effects; an unknown response.
    """
    checks.check_known("response", response, _RESPONSES)
    checks.check_columns(table, (*_CELL, "drop", "top1", "images"))
    kinds = [kind for kind in table.pruned.unique() if kind != "none"] or ["none"]
    parts = [_effects(table[table.pruned.isin([kind, "none"])], response) for kind in kinds]
    return pd.concat(parts, keys=kinds, names=["pruned"]).reset_index("pruned").reset_index(drop=True)


def _effects(table: pd.DataFrame, response: str) -> pd.DataFrame:
    """Return the effects of a table that has one kind of pruning."""
    factors = [name for name in _FACTORS if len(table[name].unique()) > 1]
    _check(table, factors)
    values = _logit(table) if response == "logit" else table["drop"]
    frame = table[factors].apply(_levels).assign(response=values)
    fit = ols(f"response ~ ({' + '.join(f'C({name}, Sum)' for name in factors)}) ** 2", frame).fit()
    if fit.df_resid < 1:
        raise InvalidValueError(
            f"{len(frame)} rows are too few for {len(fit.params)} effects; add seeds or a third method."
        )
    with warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):
        squares = anova_lm(
            fit, typ=2
        ).sum_sq  # its tests, which no one asks for, may have nothing to divide by
    squares = squares.rename(lambda x: x.replace("C(", "").replace(", Sum)", "").lower())
    squares = squares.where(squares > _NOTHING_LEFT, 0)
    most = 100 if response == "drop" else math.inf
    terms = [_tested(fit, term, rows, most) for term, rows in _contrasts(fit, frame, factors).items()]
    result = pd.concat([*terms, pd.DataFrame({"term": ["residual"], "level": [""]})], ignore_index=True)
    return result.assign(share=result.term.map(squares / (squares.sum() or 1)))


def orthogonality(table: pd.DataFrame) -> pd.DataFrame:
    """Return where the points that combined methods lose are the sum of what each loses alone.

    Parameters
    ----------
    table : pandas.DataFrame
        From `run`, with the cells of each method alone; rows that differ in their seed are averaged.

    Returns
    -------
    pandas.DataFrame
        One row a combination of two or three methods: ``sparsity``, ``clustering``, ``precision``, ``order``,
        ``pruned``; ``seeds``, the number of rows; ``drop``, the points lost; ``predicted``, the sum of those
        that each method alone loses, pruning of this kind; ``excess``, observed less predicted, above 0 if
        they harm each other, with ``low`` and ``high``, its 95 % score interval (`intervals.of_mean`) over
        the images, which all cells share. No network loses more points than it had: where the prediction is
        beyond that, the excess is below 0.

    Raises
    ------
    InvalidValueError
        A method alone, or the dense model, is not in the table.
    """
    checks.check_columns(table, (*_CELL, "right", "images"))
    groups = {key: rows for key, rows in table.groupby(_CELL, sort=False)}
    right = {key: _right(rows) for key, rows in groups.items()}
    result = []
    for key, rows in groups.items():
        if len(alone := _alone(key)) < 2:
            continue
        if missing := [each for each in (_NOTHING, *alone) if each not in right]:
            cell = dict(zip(_CELL, missing[0], strict=True))
            raise InvalidValueError(f"the table has no row of {cell}; what methods lose alone needs it.")
        lost = right[_NOTHING] - right[key]
        predicted = sum(right[_NOTHING] - right[each] for each in alone)
        means = {"seeds": len(rows), "drop": 100 * lost.mean(), "predicted": 100 * predicted.mean()}
        result.append(dict(zip(_CELL, key, strict=True)) | means | _interval(lost - predicted, len(alone)))
    return pd.DataFrame(result, columns=[*_CELL, "seeds", "drop", "predicted", "excess", "low", "high"])


def orders(table: pd.DataFrame) -> pd.DataFrame:
    """Return what pruning first loses beyond clustering first, of combinations that are there both ways.

    Parameters
    ----------
    table : pandas.DataFrame
        From `run`; of each combination the seeds that were run in both orders are compared, and averaged.

    Returns
    -------
    pandas.DataFrame
        One row a combination: ``pruned``, ``sparsity``, ``clustering``, ``precision``; the points lost
        ``prune first`` and ``cluster first``; ``difference``, the first less the second, with
        ``difference_low`` and ``difference_high``, its paired 95 % score interval.
    """
    checks.check_columns(table, (*_CELL, "seed", "right", "images"))
    cell, result = ["pruned", "sparsity", "clustering", "precision"], []
    names = ("difference", "difference_low", "difference_high")
    for key, rows in table.groupby(cell, sort=False):
        seeds = [set(rows.seed[rows.order == order]) for order in factorial.ORDERS]
        rows = rows[rows.seed.isin(set.intersection(*seeds))]
        ways = {order: rows[rows.order == order] for order in factorial.ORDERS}
        if any(x.empty for x in ways.values()):
            continue
        first, second = (_right(x) for x in ways.values())
        lost = {order: x["drop"].mean() for order, x in ways.items()}
        apart = dict(zip(names, _interval(second - first, 1).values(), strict=True))
        result.append(dict(zip(cell, key, strict=True)) | lost | apart)
    return pd.DataFrame(result, columns=[*cell, *factorial.ORDERS, *names])


def _check(table: pd.DataFrame, factors: list[str]) -> None:
    """Raise an `InvalidValueError` unless a table holds every combination, in one order."""
    if len(orders := sorted(set(table.order) - {"none"})) > 1:
        raise InvalidValueError(
            f"the table has the orders {', '.join(orders)}; take the rows of one and of none."
        )
    if not factors:
        raise InvalidValueError("no method has several levels in the table; give it rows that differ in one.")
    n, wanted = len(table[factors].drop_duplicates()), math.prod(table[name].nunique() for name in factors)
    if n < wanted:
        raise InvalidValueError(f"the table has {n} of {wanted} combinations; effects need all of them.")


def _levels(column: pd.Series) -> pd.Categorical:
    """Return a column as words, in the order in which they come, numbers in their own."""
    words = [f"{x:g}" if isinstance(x, float) else x for x in column]
    first = np.sort(column.unique()) if column.dtype == float else column.unique()
    return pd.Categorical(words, [f"{x:g}" if isinstance(x, float) else x for x in first])


def _logit(table: pd.DataFrame) -> pd.Series:
    right = (table.top1 / 100 * table.images).round()
    return np.log((right + 0.5) / (table.images - right + 0.5))


def _contrasts(fit, frame: pd.DataFrame, factors: list[str]) -> dict[str, pd.DataFrame]:
    """Return by term, for each of its levels, by what the parameters count in its effect."""
    rows = pd.DataFrame(fit.model.exog, frame.index)
    cells = rows.groupby([frame[name] for name in factors], observed=True).first()

    def by(*names: str) -> pd.DataFrame:
        return cells.groupby(level=list(names), observed=True).mean()

    mean = cells.mean()
    result = {"mean": mean.to_frame("").T} | {name: by(name) - mean for name in factors}
    for a, b in itertools.combinations(factors, 2):
        result[f"{a}:{b}"] = by(a, b).sub(by(a), axis=0, level=a).sub(by(b), axis=0, level=b) + mean
    return result


def _tested(fit, term: str, contrasts: pd.DataFrame, most: float) -> pd.DataFrame:
    tested = fit.t_test(contrasts.to_numpy())
    low, high = np.atleast_2d(tested.conf_int()).T.clip(-most, most)
    if fit.ssr < _NOTHING_LEFT:
        low = high = np.nan
    levels = [" : ".join(key) if isinstance(key, tuple) else key for key in contrasts.index]
    effect = np.atleast_1d(tested.effect)
    return pd.DataFrame({"term": term, "level": levels, "effect": effect, "low": low, "high": high})


def _alone(key: tuple) -> list[tuple]:
    """Return the cells of each method alone that a cell combines."""
    changed = [i for i in range(len(_FACTORS)) if key[i] != _NOTHING[i]]
    alone = [(*_NOTHING[:i], key[i], *_NOTHING[i + 1 : -1]) for i in changed]
    return [(*cell, key[-1] if cell[0] else "none") for cell in alone]


def _right(rows: pd.DataFrame) -> np.ndarray:
    """Return the share of the rows that answer each image rightly, ``(n,)``."""
    bits = [np.frombuffer(right, np.uint8) for right in rows.right]
    return np.unpackbits(np.stack(bits), axis=1, count=int(rows.images.iloc[0])).mean(0)


def _interval(excess: np.ndarray, n_methods: int) -> dict[str, float]:
    """Return the mean of what each image loses beyond the sum, and its interval, in points."""
    values, counts = np.unique(excess.round(9), return_counts=True)  # means over seeds, rounded alike
    # At most an image is lost to every method alone and not to all together, or won by each and not by all.
    low, high = _intervals.of_mean(values, counts, -n_methods, n_methods)
    return {"excess": 100 * float(excess.mean()), "low": 100 * low, "high": 100 * high}
