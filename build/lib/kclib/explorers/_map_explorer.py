"""The explorer of maps, in plain Python; `widgets` shows it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kclib import kmeans, plots
from kclib._util import checks
from kclib.explorers import _background
from kclib.explorers._background import Answer, Explorer, Stale
from kclib.kernels import KernelBank
from kclib.kmeans import symmetric
from kclib.similarity import embedding

COLOURS = ("layer", "norm", "cluster")


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
        checks.check_known("kind of map", question.kind, self.graphs)
        checks.check_known("colour", question.colour, COLOURS)
        _background.check_k(question.n_clusters, self.largest)

    def answered(self, question: MapQuestion, stale: Stale) -> Answer[MapQuestion]:
        """Return the map."""
        shown = np.isin(self.rows, _background.rows_of(self.bank, self.rows, question.layers))
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
        plots.embedding(layout, colour, label=label, limits=self.layouts[question.kind], ax=ax)
        figure.suptitle(
            f"{question.kind} kernels, {_background.called(self.bank, question.layers)}", fontsize=11
        )
        return Answer(question, figure, facts)

    def _labels(self, kind: str, n_clusters: int) -> np.ndarray:
        points = self.graphs[kind].points
        if kind == "symmetric":
            return symmetric.fit(points, n_clusters, turned=True, seed=self.seed).labels
        return kmeans.fit(points, n_clusters, seed=self.seed).labels
