"""What cells of a sweep will take, from what cells like them took."""

from functools import cached_property

import numpy as np
import pandas as pd

from kclib import datasets, evaluation, kmeans, scopes
from kclib.errors import InvalidValueError
from kclib.sweep import Cell, Subject

# Seconds of clustering 1,634,496 kernels at K = 4,096 on 2 cores; they grow with the number of kernels, and
# with K from there on, by these powers (docs/kmeans-vgg16-fashion.json): where the store has none of these.
_SECONDS, _N, _K, _BY_N, _BY_K = 1.1, 1_634_496, 4096, 0.83, 0.65
_PROBE = 64  # images that are evaluated to know the rate where the store has none
_IMPORTS = 400 << 20  # bytes that a process takes before it has a model


class Rates:
    """What cells of a subject take, from those that the store has."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.evaluations = self._those(
            "evaluation", weights=subject.key["weights"], precision=subject.precision
        )
        self.clusterings = self._those("clustering", kernels=subject.bank.fingerprint)

    def seconds(self, cell: Cell) -> float:
        """Return about how long a cell takes."""
        clustering = 0.0 if cell == Cell() else self._clustering(cell)
        return clustering + self._an_image * len(self.subject.data)

    def memory(self, cell: Cell) -> int:
        """Return about how many bytes a process takes for a cell."""
        bank, network = self.subject.bank, self.subject.model.network
        dense = sum(x.nbytes for x in (*network.parameters(), *network.buffers()))
        images = self.subject.data.images
        held = getattr(images, "nbytes", 0)
        groups = [] if cell == Cell() else scopes.grouping(bank, cell.scope).values()
        largest = max((sum(layer.n_kernels for layer in layers) for layers in groups), default=0)
        k = min(cell.k, largest)
        fit = kmeans.memory(largest, bank.points.shape[1], k) if largest else 0
        # The network, the one with other kernels, the copy that runs; the bank, and what stands for it.
        return _IMPORTS + 3 * dense + held + 2 * bank.weights.nbytes + fit

    @cached_property
    def _an_image(self) -> float:
        if len(self.evaluations):
            return float((self.evaluations.evaluate_seconds / self.evaluations.images).median())
        return _probed(self.subject)

    def _clustering(self, cell: Cell) -> float:
        n = len(self.subject.bank)
        seconds, k, like = _SECONDS * (n / _N) ** _BY_N, _K, self.clusterings
        like = like[like.method == cell.method] if len(like) else like
        if len(like):
            nearest = like.iloc[np.argmin(abs(np.log(like.k.astype(float) / cell.k)))]
            seconds, k = float(nearest.seconds), int(nearest.k)
        return seconds * (max(cell.k, _K) / max(k, _K)) ** _BY_K

    def _those(self, kind: str, **values: str) -> pd.DataFrame:
        rows = self.subject.store.table(kind)
        if not len(rows):
            return rows
        return rows[np.logical_and.reduce([rows[name] == value for name, value in values.items()])]


def check(subject: Subject) -> None:
    """Raise a `KclibError` if every cell of a subject would fail: its model does not run on its images."""
    if not (subject.data.labels >= 0).any():
        raise InvalidValueError(f"{subject.data.name} has no images of known class; it needs one.")
    evaluation.evaluate(
        subject.model,
        _few(subject.data, 1),
        precision=subject.precision,
        device=subject.device,
        progress=False,
    )


def _probed(subject: Subject) -> float:
    """Return the seconds an image takes, from a few of them."""
    few, options = _few(subject.data, _PROBE), {"precision": subject.precision, "device": subject.device}
    found = evaluation.evaluate(subject.model, few, progress=False, **options)
    return found.seconds / len(few)


def _few(data: datasets.ImageSet, n: int) -> datasets.ImageSet:
    known = datasets.known(data)
    return datasets.limited(known, min(n, len(known)))
