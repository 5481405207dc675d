"""Make a network small within a number of bytes, or of points lost, without training: `shrink`."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pandas as pd
from torch import nn

from kclib import datasets, evaluation, kernels, models
from kclib._util import checks
from kclib._util.progress_bars import tqdm
from kclib.clustering import Clustering
from kclib.compression import byte_counts
from kclib.errors import InvalidValueError
from kclib.evaluation import Drop
from kclib.models import _model
from kclib.recovery import _sequential

_PRICE, _BITS, _STEEP = 0.1, 4.2, 2.2  # a price, the bits a kernel that it buys, and how fast prices rise
_IMAGES, _BY_IMAGES = 250, -0.36  # by so many images; with more of them a price buys fewer bits
_WITHIN = 0.93  # of the bytes are spent, at least
_TRIES = 10  # for a number of bytes; most often two are made
_LEAST_STEP = 1.1  # factor between prices
_STUCK = 1.02  # factor between numbers of bytes that are about the same
_STEPS = 3  # halvings of the range of prices, after a factor of _WIDE holds it, for a drop
_WIDE = 3.0
_HIGHEST, _LOWEST = 1e4, 1e-6  # prices


@dataclass(frozen=True)
class Shrunk:
    """A network made small.

    Attributes
    ----------
    model : Model or torch.nn.Module
        As was given: a copy with ordinary dense weights, which `compression.compress` packs.
    clustering : Clustering
        Its codebooks are rounded already.
    n_bytes : int
        Of all convolutions, packed with entropy-coded indices: `compression.footprint`'s ``convolutions``.
    price : float
        Of a bit, as in `correct`.
    drop : Drop, optional
        On the images held back, where there are some.
    table : pandas.DataFrame
        One row a price that was tried: ``price``, ``clusters``, ``bytes``, and ``drop`` in points.
    """

    model: models.Model | nn.Module
    clustering: Clustering
    n_bytes: int
    price: float
    drop: Drop | None
    table: pd.DataFrame


def shrink(
    model: models.Model | nn.Module,
    images: datasets.ImageSet,
    *,
    ratio: float | None = None,
    n_bytes: float | None = None,
    max_drop: float | None = None,
    held_back: datasets.ImageSet | None = None,
    dense: models.Model | nn.Module | None = None,
    precision: str = "fp16",
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> Shrunk:
    """Make a network small without training: a goal in, and no number of clusters to choose.

    `_sequential.correct` clusters layer by layer, each layer making good what those before it lost, and pays
    for every bit of an index. The price is the same for all layers: bits go where they win most. It is found
    so that the goal is met.

    Parameters
    ----------
    model : Model or torch.nn.Module
        Unchanged. A network alone is given images as `models.plain` makes them.
    images : ImageSet, or what `datasets.as_image_set` takes
        Some hundred to correct by; their labels are not read.
    ratio : float, optional
        Keep at most one byte of so many, of the convolutions.
    n_bytes : float, optional
        Keep at most so many bytes of the convolutions.
    max_drop : float, optional
        Lose at most so many points of accuracy on `held_back`. Give one of the three.
    held_back : ImageSet, or what `datasets.as_image_set` takes, optional
        To measure the drop on: other images, with labels, and not the test set.
    dense, seed, device
        As in `_sequential.correct`.
    precision : str
        Of the codebooks.
    progress : bool

    Raises
    ------
    InvalidValueError, UnknownNameError
        No goal or several; one that cannot be reached (the sentence says what can); a drop without images
        held back; as `_sequential.correct`.

    Examples
    --------
    >>> import kclib, torch
    >>> pictures = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
    >>> images = kclib.ImageSet("noise", pictures, torch.arange(12) % 2, ("shirt", "coat"), fingerprint="1")
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 2))
    >>> found = kclib.shrink(network, images, n_bytes=400, progress=False)
    >>> found.n_bytes <= 400, found.clustering.n_kernels
    (True, 24)
    """
    given, model, images = model, _model.as_model(model), datasets.as_image_set(images)
    held_back = None if held_back is None else datasets.as_image_set(held_back)
    _check(ratio, n_bytes, max_drop, held_back)
    bank = kernels.extract(model.network)
    all_bytes = byte_counts.convolution_bytes(model.network)
    others = all_bytes - sum(math.prod(x.shape) * x.itemsize for x in bank.layers)
    answers = {"device": device, "progress": progress}
    exact = None if held_back is None else evaluation.evaluate(model, held_back, **answers)
    options = {"precision": precision, "dense": dense, "seed": seed, "device": device, "progress": progress}

    def made(price: float) -> Shrunk:
        found = _sequential.correct(model, images, price=price, **options)
        size = byte_counts.clustered_bytes(
            model.network, found.clustering, precision=precision, coding="entropy"
        )
        lost = None
        if exact is not None:
            lost = evaluation.drop(exact, evaluation.evaluate(found.model, held_back, **answers))
        return Shrunk(models.like(given, found.network), found.clustering, size, price, lost, pd.DataFrame())

    with tqdm(desc="finding a price", unit="network", leave=False, disable=not progress) as bar:
        trials = _Trials(made, others, len(bank), len(images), bar)
        if max_drop is not None:
            _search_drop(trials, max_drop)
        else:
            _search_bytes(trials, all_bytes / ratio if n_bytes is None else n_bytes)
    if not trials.best:
        raise InvalidValueError(_unreached(trials, ratio, n_bytes, max_drop, held_back))
    return replace(trials.best[0], table=pd.DataFrame(trials.rows))


@dataclass(frozen=True)
class _Trials:
    """Networks as they are made, by their price; of those that reach the goal, the best is kept.

    Attributes
    ----------
    made : callable
        Makes one.
    others : int
        Bytes of the convolutions that no price changes.
    n : int
        Kernels.
    n_images : int
    rows : list of dict
        What is to be known of each, in the order in which they were tried.
    best : list of Shrunk
        One, or none.
    """

    made: Callable[[float], Shrunk]
    others: int
    n: int
    n_images: int
    bar: tqdm
    rows: list[dict] = field(default_factory=list)
    best: list[Shrunk] = field(default_factory=list)

    def reaches(self, price: float, goal: Callable[[dict], bool], worth: Callable[[Shrunk], float]) -> bool:
        """Try a price; tell whether what it makes reaches a goal, and keep what is worth most of these."""
        found = self.made(price)
        drop = found.drop.points.estimate if found.drop else math.nan
        row = {"price": price, "clusters": found.clustering.n_clusters, "bytes": found.n_bytes, "drop": drop}
        self.rows.append(row)
        self.bar.update()
        if reached := goal(row):
            self.best[:] = [max([*self.best, found], key=worth)]
        return reached

    def guess(self, n_bytes: float) -> float:
        """Return the price that may lead to so many bytes, by a line in logarithms through what was tried.

        Bytes may hardly change over a range of prices; steps grow there.
        """
        bits = max(1e-3, 8 * (n_bytes - self.others) / self.n)
        if not self.rows:
            return _between(_PRICE * (_BITS / bits) ** _STEEP * (self.n_images / _IMAGES) ** _BY_IMAGES)
        tried = sorted(self.rows, key=lambda row: row["price"])
        over = [row for row in tried if row["bytes"] > n_bytes]
        under = [row for row in tried if row["bytes"] <= n_bytes]
        if over and under:
            low, high = over[-1], under[0]
            share = math.log(self._bits(low) / bits) / math.log(self._bits(low) / self._bits(high))
            return low["price"] * (high["price"] / low["price"]) ** min(max(share, 0.2), 0.8)
        near, end = (over[-2:], over[-1]) if over else (under[:2], under[0])
        step = (self._bits(end) / bits) ** self._steep(near)
        least = self._least_step()
        return _between(end["price"] * (max(step, least) if over else min(step, 1 / least)))

    def _least_step(self) -> float:
        """Return the least factor to the next price; it grows with each try where bytes do not change."""
        sizes = [row["bytes"] for row in self.rows[-2:]]
        stuck = len(sizes) == 2 and max(sizes) < _STUCK * min(sizes)
        return _LEAST_STEP ** (1 << len(self.rows)) if stuck else _LEAST_STEP

    def _steep(self, near: list[dict]) -> float:
        """Return how fast prices rise as bits fall, from two networks; what is usual from one."""
        if len(near) < 2 or near[0]["bytes"] == near[1]["bytes"]:
            return _STEEP
        fall = math.log(self._bits(near[0]) / self._bits(near[1]))
        return min(max(math.log(near[1]["price"] / near[0]["price"]) / fall, _STEEP / 2), 3 * _STEEP)

    def _bits(self, row: dict) -> float:
        return 8 * max(1, row["bytes"] - self.others) / self.n


def _between(price: float) -> float:
    return min(max(price, _LOWEST), _HIGHEST)


def _search_bytes(trials: _Trials, n_bytes: float) -> None:
    """Try prices until nearly so many bytes are spent, and no more."""
    aim, tried = (1 + _WITHIN) / 2 * n_bytes, set()
    while len(tried) < _TRIES and (price := trials.guess(aim)) not in tried:
        tried.add(price)
        fits = trials.reaches(price, lambda row: row["bytes"] <= n_bytes, lambda x: x.n_bytes)
        if fits and trials.rows[-1]["bytes"] >= _WITHIN * n_bytes:
            break


def _search_drop(trials: _Trials, max_drop: float) -> None:
    """Try prices up to the highest that loses no more than so many points."""

    def fits(price: float) -> bool:
        return trials.reaches(price, lambda row: row["drop"] <= max_drop, lambda x: -x.n_bytes)

    price, low, high = _PRICE, None, None  # prices that fit, and that do not
    while (low is None or high is None) and _LOWEST <= price <= _HIGHEST:
        if fits(price):
            low, price = price, price * _WIDE
        else:
            high, price = price, price / _WIDE
    for _ in range(_STEPS if low and high else 0):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fits(middle) else (low, middle)


def _unreached(trials: _Trials, ratio, n_bytes, max_drop, held_back) -> str:
    """Return in one sentence which goal was not reached, and what was."""
    if max_drop is not None:
        least = min(row["drop"] for row in trials.rows)
        return f"max_drop is {max_drop}; the best network found loses {least:.2f} points on {held_back.name}."
    goal = f"n_bytes is {n_bytes:,.0f}" if ratio is None else f"ratio is {ratio:g}"
    least = min(row["bytes"] for row in trials.rows)
    return (
        f"{goal}; the convolutions were brought to {least:,} bytes, not below, "
        f"of which {trials.others:,} are of convolutions and biases that are not clustered."
    )


def _check(ratio, n_bytes, max_drop, held_back) -> None:
    goals = {"ratio": ratio, "n_bytes": n_bytes, "max_drop": max_drop}
    asked = {name: value for name, value in goals.items() if value is not None}
    if len(asked) != 1:
        given = ", ".join(asked) or "none"
        raise InvalidValueError(f"give one goal of ratio, n_bytes and max_drop; {given} was given.")
    for name, value in asked.items():
        least = 1 if name == "ratio" else 0
        checks.check_real(name, value, lambda x, least=least: x >= least, f"a number of at least {least}")
    if max_drop is not None and held_back is None:
        raise InvalidValueError("max_drop needs held_back: images with labels to measure the drop on.")
