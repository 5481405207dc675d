"""The explorer of similarity, in plain Python; `widgets` shows it."""

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from kclib import plots, similarity
from kclib.errors import InvalidValueError
from kclib.explorers._background import Answer, Explorer, Progress, Stale, called, rows_of
from kclib.kernels import KernelBank
from kclib.similarity import null_models

_FEWEST = 3  # kernels of a layer that a null model can be made of
_MOST = 3000  # kernels compared at once: an answer within a second or two


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
        similarity.named(question.distance)

    def answered(self, question: SimilarityQuestion, stale: Stale) -> Answer[SimilarityQuestion]:
        """Return the histogram over its null models, and how much closer real kernels are."""
        named, progress = similarity.named(question.distance), Progress(stale)
        rows = rows_of(self.bank, self.rows, question.layers)
        rows = rows[:: -(-len(rows) // _MOST) or 1]
        parts = [self.bank.points[layer.of(rows)] for layer in self.bank.layers]
        parts = [part[named.comparable(part)] for part in parts if len(part)]
        if not (enough := [part for part in parts if len(part) >= _FEWEST]):
            raise InvalidValueError(
                f"{sum(map(len, parts))} sampled kernels of {called(self.bank, question.layers)} can be "
                f"compared; give at least {_FEWEST}."
            )
        points = np.concatenate(enough)
        sets = {"real kernels": points}
        for null in null_models.named_nulls:  # layer by layer: chance does not mix strong layers with weak
            sets[null] = np.concatenate([null_models.drawn(null, x, seed=self.seed) for x in enough])
        largest = named.largest
        if np.isinf(largest):
            largest = 2 * np.linalg.norm(points, axis=1).max()
        edges, histograms, nearest = np.linspace(0, largest, self.n_bins + 1), {}, {}
        for name, kernels_ in sets.items():
            progress.check()
            histograms[name] = similarity.pair_histogram(kernels_, edges, distance=question.distance)
            nearest[name] = np.median(similarity.nearest_distances(kernels_, distance=question.distance))
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        ax = plots.distance_histograms(histograms, xlabel=named.label, ax=figure.subplots())
        ax.set_title(
            f"{called(self.bank, question.layers)}: all pairs of {len(points):,} kernels",
            fontsize=10,
        )
        real = nearest.pop("real kernels")
        facts = {"kernels compared": f"{len(points):,}", "median distance to the nearest": f"{real:.3g}"}
        facts |= {f"in “{name}”": f"{value:.3g}" for name, value in nearest.items()}
        return Answer(question, figure, facts)
