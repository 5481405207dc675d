"""The explorers of similarity and of maps, in plain Python; `views` shows them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kclib import distances, embedding, figures, kmeans, nulls, pairs, similarity, symmetry
from kclib.errors import InvalidValueError, StoppedError, UnknownNameError
from kclib.kernels import KernelBank
from kclib.questions import Answer, Explorer, Stale

_MOST = 3000  # kernels compared at once: an answer within a second or two
COLOURS = ("layer", "norm", "cluster")


@dataclass(frozen=True)
class SimilarityQuestion:
    """How alike the kernels of these layers are by this distance."""

    layers: tuple[str, ...]
    distance: str = "cosine"


class SimilarityExplorer(Explorer[SimilarityQuestion]):
    """Pairs of sampled kernels by distance, over the null models.

    Parameters
    ----------
    bank : KernelBank
    rows : numpy.ndarray
        Sampled rows of the bank.
    n_bins, seed : int
    """

    def __init__(self, bank: KernelBank, rows: np.ndarray, *, n_bins: int = 80, seed: int = 0):
        super().__init__(SimilarityQuestion((bank.layers[len(bank.layers) // 2].name,)))
        self.bank, self.rows, self.n_bins, self.seed = bank, rows, n_bins, seed

    def check(self, question: SimilarityQuestion) -> None:
        """Raise a KclibError for an unknown layer or distance, or no layer."""
        self.bank.only(*question.layers)
        distances.named(question.distance)

    def answered(self, question: SimilarityQuestion, stale: Stale) -> Answer[SimilarityQuestion]:
        """Return the histogram over its null models, and how much closer real kernels are."""
        named = distances.named(question.distance)
        rows = rows_of(self.bank, self.rows, question.layers)
        points = self.bank.points[rows[:: -(-len(rows) // _MOST) or 1]]
        points = points[named.comparable(points)]
        if len(points) < 3:
            raise InvalidValueError(
                f"{len(points)} sampled kernels of {called(self.bank, question.layers)} can be compared; "
                "give at least 3."
            )
        sets = {"real kernels": points}
        sets |= {null: nulls.drawn(null, points, seed=self.seed) for null in nulls.named_nulls}
        largest = named.largest
        if np.isinf(largest):
            largest = 2 * np.linalg.norm(points, axis=1).max()
        edges, found, nearest = np.linspace(0, largest, self.n_bins + 1), {}, {}
        for name, kernels_ in sets.items():
            if stale():
                raise StoppedError("a newer question came.")
            found[name] = pairs.pair_histogram(kernels_, edges, distance=question.distance)
            nearest[name] = np.median(similarity.nearest_distances(kernels_, distance=question.distance))
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        ax = figures.distance_histograms(found, xlabel=named.label, ax=figure.subplots())
        ax.set_title(
            f"{called(self.bank, question.layers)}: all pairs of {len(points):,} kernels", fontsize=10
        )
        real = nearest.pop("real kernels")
        facts = {"kernels compared": f"{len(points):,}", "median distance to the nearest": f"{real:.3g}"}
        facts |= {f"in “{name}”": f"{value:.3g}" for name, value in nearest.items()}
        return Answer(question, figure, facts)


@dataclass(frozen=True)
class MapQuestion:
    """Which map, of which layers, in which colours."""

    layers: tuple[str, ...]
    kind: str
    colour: str = "layer"
    n_clusters: int = 16


class MapExplorer(Explorer[MapQuestion]):
    """Maps of the same sampled kernels, coloured by layer, norm or cluster.

    Parameters
    ----------
    bank : KernelBank
    rows : numpy.ndarray
        Sampled rows of the bank, int ``(n,)``.
    graphs : mapping of str to embedding.Graph
        By kind of map.
    layouts : mapping of str to numpy.ndarray
        float32 ``(n, 2)`` for each.
    seed : int
        Of the clusters.
    """

    def __init__(
        self,
        bank: KernelBank,
        rows: np.ndarray,
        graphs: Mapping[str, embedding.Graph],
        layouts: Mapping[str, np.ndarray],
        *,
        seed: int = 0,
    ):
        kind = "unit" if "unit" in graphs else next(iter(graphs))
        every = tuple(layer.name for layer in bank.layers)
        super().__init__(MapQuestion(every, kind, n_clusters=min(16, len(rows))))
        self.bank, self.rows, self.graphs, self.layouts, self.seed = bank, rows, graphs, layouts, seed
        self.labels = lru_cache(maxsize=64)(self._labels)

    @property
    def largest(self) -> int:
        """The largest number of clusters: as many as kernels on the map."""
        return len(self.rows)

    def check(self, question: MapQuestion) -> None:
        """Raise a KclibError for what is not there."""
        self.bank.only(*question.layers)
        known("kind of map", question.kind, self.graphs)
        known("colour", question.colour, COLOURS)
        between(question.n_clusters, self.largest)

    def answered(self, question: MapQuestion, stale: Stale) -> Answer[MapQuestion]:
        """Return the map."""
        shown = np.isin(self.rows, rows_of(self.bank, self.rows, question.layers))
        rows, layout = self.rows[shown], self.layouts[question.kind][shown]
        figure = Figure(figsize=(10, 5.5), layout="constrained")
        ax = figure.subplots()
        facts = {"kernels on the map": f"{len(rows):,}"}
        if question.colour == "layer":
            names = [layer.name for layer in self.bank.layers]
            colour, label = pd.Categorical(self.bank.origin(rows).layer, names), "layer"
        elif question.colour == "norm":
            norms = np.linalg.norm(self.bank.points[rows], axis=1)
            colour, label = np.log10(np.maximum(norms, 1e-8)), "log10 of the kernel norm (weight units)"
        else:
            labels = self.labels(question.kind, question.n_clusters)
            colour, label = labels[shown], f"{labels.max() + 1:,} clusters (colours repeat after 20)"
        figures.embedding(layout, colour, label=label, limits=self.layouts[question.kind], ax=ax)
        figure.suptitle(f"{question.kind} kernels, {called(self.bank, question.layers)}", fontsize=11)
        return Answer(question, figure, facts)

    def _labels(self, kind: str, n_clusters: int) -> np.ndarray:
        points = self.graphs[kind].points
        if kind == "symmetric":
            return symmetry.kmeans(points, n_clusters, turned=True, seed=self.seed).labels
        return kmeans.kmeans(points, n_clusters, seed=self.seed).labels


def known(kind: str, name: str, names: Iterable[str]) -> None:
    """Raise UnknownNameError if `name` is none of `names`."""
    if name not in names:
        raise UnknownNameError(kind, name, names)


def between(n_clusters: int, largest: int) -> None:
    """Raise InvalidValueError unless a number of clusters is from 2 (1, of one kernel) to `largest`."""
    least = min(2, largest)
    if not isinstance(n_clusters, Integral) or not least <= n_clusters <= largest:
        raise InvalidValueError(f"K is {n_clusters}; it must be from {least} to {largest:,}.")


def called(bank: KernelBank, layers: tuple[str, ...]) -> str:
    """Name a choice of layers for a title."""
    layers = tuple(dict.fromkeys(layers))
    if len(layers) == len(bank.layers):
        return f"all {len(layers)} layers" if len(layers) > 1 else layers[0]
    return layers[0] if len(layers) == 1 else f"{len(layers)} layers, {layers[0]} … {layers[-1]}"


def rows_of(bank: KernelBank, rows: np.ndarray, layers: Iterable[str]) -> np.ndarray:
    """Return those of the rows that belong to some layers, in their order."""
    return rows[np.isin(rows, np.concatenate([bank.layer(name).of(rows) for name in layers]))]
