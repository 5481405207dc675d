"""The explorer of clusterings: any layers, any K, at once; and their accuracy, in the background."""

import math
import threading
import time
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from kclib import compression, datasets, evaluation, kernels, kmeans, plots
from kclib._util import checks
from kclib.clustering import Clustering, by_use
from kclib.clustering._clustering import of_fits
from kclib.clustering._scopes import grouping
from kclib.compression import byte_counts
from kclib.compression._counting import Count
from kclib.compression._layers import N_TURNS
from kclib.datasets import ImageSet, as_image_set
from kclib.errors import InvalidValueError
from kclib.evaluation import Evaluation, _accuracy
from kclib.explorers._background import (
    Answer,
    Explorer,
    Newest,
    Progress,
    Stale,
    attempted,
    called,
    check_k,
)
from kclib.kernels import KernelBank
from kclib.kmeans import symmetric
from kclib.models import Model
from kclib.models._model import as_model

RUNGS = (16, 64, 256, 1024, 4096)
SCOPES = {"global": "one codebook for all chosen", "layer": "a codebook a layer"}
# How the engine can cluster, by the distance that then counts.
METHODS = {
    "euclidean": {"scaled": False, "turned": False},
    "scale-free": {"scaled": True, "turned": False},
    "symmetric": {"scaled": False, "turned": True},
}
COLOURS = ("each kernel's own scale", "one scale for all")
# The progress of the clustering under way in this thread. It is not an argument of what computes the
# clustering, because results are cached by their arguments.
_progress: ContextVar[Progress] = ContextVar("progress")


@dataclass(frozen=True)
class ClusterQuestion:
    """Which layers to cluster, how, into how many clusters a codebook, and how to colour the codebook."""

    layers: tuple[str, ...]
    scope: str = "global"
    n_clusters: int = 64
    distance: str = "euclidean"
    colour: str = COLOURS[0]

    @property
    def method(self) -> "ClusterQuestion":
        """The question with only what changes the clustering; its colour is the default."""
        return replace(self, colour=COLOURS[0])


class Clusterer:
    """Compute clusterings of a bank, and keep the latest: asking again takes no time.

    Parameters
    ----------
    bank : KernelBank
    seed : int
    """

    def __init__(self, bank: KernelBank, seed: int):
        self.bank, self.seed, self._turn = bank, seed, threading.Lock()
        self._clustered = lru_cache(maxsize=32)(self._cluster)
        self._laddered = lru_cache(maxsize=16)(self._ladder)

    def clustering(self, question: ClusterQuestion, progress: Progress) -> Clustering:
        """Return the answer to a question.

        Raises
        ------
        StoppedError
            Nobody waits for it any more.
        """
        with self._turn:
            _progress.set(progress)
            return self._clustered(question.method)

    def check(self, question: ClusterQuestion) -> None:
        """Raise a KclibError for what cannot be clustered."""
        self.bank.only(*question.layers)
        checks.check_known("scope", question.scope, SCOPES)
        checks.check_known("distance that can be clustered by", question.distance, METHODS)
        checks.check_known("colour", question.colour, COLOURS)
        check_k(question.n_clusters, self.largest(question))

    def largest(self, question: ClusterQuestion) -> int:
        """Return the most clusters that a question's largest codebook can have: one for each kernel."""
        counts = [self.bank.layer(name).n_kernels for name in set(question.layers)]
        return sum(counts) if question.scope == "global" else max(counts)

    def wanted(self, bank: KernelBank, question: ClusterQuestion) -> dict[str, int]:
        """Return K by group: smaller groups keep all they have."""
        return {
            name: min(question.n_clusters, sum(layer.n_kernels for layer in layers))
            for name, layers in grouping(bank, question.scope).items()
        }

    def _cluster(self, question: ClusterQuestion) -> Clustering:
        bank, method, progress = self.bank.only(*question.layers), METHODS[question.distance], _progress.get()
        wanted, fits = self.wanted(bank, question), {}
        groups = {
            name: tuple(layer.name for layer in layers)
            for name, layers in grouping(bank, question.scope).items()
        }
        plain = question.distance == "euclidean"
        if plain:
            progress.begin("preparing every K:", len(bank))
            ladders = {name: self._laddered(names) for name, names in groups.items()}
        progress.begin("clustering:", len(bank))
        for name, names in groups.items():
            points = bank.only(*names).points
            hear = progress.of(len(points))
            if plain:
                fits[name] = ladders[name].at(wanted[name], progress=hear)
            else:
                fits[name] = symmetric.fit(points, wanted[name], seed=self.seed, progress=hear, **method)
            progress.check()
        return of_fits(bank, fits, wanted, scope=question.scope, seed=self.seed, **method)

    def _ladder(self, names: tuple[str, ...]) -> kmeans.Ladder:
        """Cluster some layers at a few K, from which any other K is a fraction of a second away."""
        points, progress = self.bank.only(*names).points, _progress.get()
        ks = [k for k in RUNGS if k <= len(points)] or [len(points)]
        ladder = kmeans.ladder(points, ks, tol=0.01, seed=self.seed, progress=progress.of(len(points)))
        progress.check()
        return ladder


@dataclass(frozen=True)
class Running:
    """An evaluation under way: of what, on how many images, and the share done, 0 to 1, since when."""

    question: ClusterQuestion
    n_images: int
    share: float
    started: float

    @property
    def seconds_left(self) -> float:
        """Seconds left at the pace so far; NaN before the first images are done."""
        return (time.monotonic() - self.started) * (1 / self.share - 1) if self.share else float("nan")


class ClusterExplorer(Explorer[ClusterQuestion]):
    """Clusterings of a network's kernels, and what they cost in accuracy.

    Parameters
    ----------
    model : Model
    images : ImageSet, optional
        Test images; without them accuracy cannot be asked for.
    n_clusters : int
        To begin with, or as many as there are kernels.
    seed : int
    shown : int
        Representatives drawn on the codebook sheet, the most used first.

    Attributes
    ----------
    rows : tuple of dict
        What was evaluated, in order: see `table`.
    running : Running or None
        The evaluation under way.
    evaluated : ClusterQuestion or None
        What the newest row is of.
    evaluation_status : str
        What went wrong with the newest evaluation, or that it was cancelled; empty if nothing.
    """

    def __init__(
        self,
        model: Model,
        images: ImageSet | None = None,
        *,
        n_clusters: int = 64,
        seed: int = 0,
        shown: int = 64,
    ):
        model, images = as_model(model), images if images is None else as_image_set(images)
        self.model, self.images, self.seed, self.shown = model, images, seed, shown
        self.bank = kernels.extract(model.network)
        every = tuple(layer.name for layer in self.bank.layers)
        super().__init__(ClusterQuestion(every, n_clusters=min(n_clusters, len(self.bank))))
        self.rows, self.running, self.evaluated, self.evaluation_status = (), None, None, ""
        self._convolutions = byte_counts.convolution_bytes(model.network)
        self._evaluations, self.clusterer = Newest(), Clusterer(self.bank, seed)
        self._dense: dict[int, Evaluation] = {}  # by number of images

    @property
    def table(self) -> pd.DataFrame:
        """One row an evaluation, as `sweep` returns, with ``layers``, ``distance`` and ``images``."""
        return pd.DataFrame(self.rows)

    @property
    def accuracy_is_stale(self) -> bool:
        """Whether the newest row is of another clustering than the one asked for now."""
        return self.evaluated is not None and self.evaluated.method != self.question.method

    @property
    def largest(self) -> int:
        """The most clusters that a codebook of the question can have: one for each kernel."""
        return self.clusterer.largest(self.question)

    def check(self, question: ClusterQuestion) -> None:
        """Raise a KclibError for what cannot be clustered."""
        self.clusterer.check(question)

    def changed(self, **changes) -> ClusterQuestion:
        """Return the question at hand, changed in some fields; K follows to what other layers allow."""
        if "layers" in changes:  # in the network's order, each once
            changes["layers"] = tuple(layer.name for layer in self.bank.only(*changes["layers"]).layers)
        if "n_clusters" not in changes:
            self.check(asked := replace(self.question, **changes, n_clusters=2))
            changes["n_clusters"] = min(self.question.n_clusters, self.clusterer.largest(asked))
        return super().changed(**changes)

    def announced(self, question: ClusterQuestion) -> str:
        """Say at once what needs no clustering: how many kernels and bytes would be removed."""
        bank, method = self.bank.only(*question.layers), METHODS[question.distance]
        count = Count("fp32", scale_bits=32 * method["scaled"], orbit=N_TURNS if method["turned"] else 1)
        groups = grouping(bank, question.scope)
        wanted = self.clusterer.wanted(bank, question)
        saved = sum(math.prod(x.shape) * x.itemsize for x in bank.layers)
        saved -= sum(count.bytes(layers, wanted[name]) for name, layers in groups.items())
        total = sum(wanted.values())
        return (
            f"clustering {len(bank):,} kernels into {total:,}: removes "
            f"{100 * (1 - total / len(bank)):.3f} % of them and "
            f"{100 * saved / self._convolutions:.2f} % of the bytes of all convolutions …"
        )

    def clustering(self, question: ClusterQuestion) -> Clustering:
        """Return the answer to a question as a clustering; kept, so that asking again takes no time."""
        return self.clusterer.clustering(question, Progress(lambda: False))

    def answered(self, question: ClusterQuestion, stale: Stale) -> Answer[ClusterQuestion]:
        """Return the codebook by use, the cluster sizes, and what is removed."""
        progress = Progress(stale, lambda sentence: self.change(stale, status=sentence))
        clustering = self.clusterer.clustering(question, progress)
        removed = byte_counts.removed(self.model.network, clustering)
        facts = {
            "kernels": f"{clustering.n_kernels:,}",
            "representatives": f"{clustering.n_clusters:,}",
            "kernels removed": f"{removed['kernels_removed']:.3f} %",
            "bytes of all convolutions removed": f"{removed['bytes_removed']:.2f} %",
            "with a 16-bit codebook": f"{removed['bytes_removed_fp16']:.2f} %",
            "inertia": f"{clustering.inertia:.4g}",
        }
        return Answer(question, self._figure(question, clustering), facts)

    def evaluate(self, n_images: int) -> None:
        """Evaluate the clustering asked for now, on images drawn at random, in the background.

        The result becomes a row, whatever is asked meanwhile; another evaluation replaces one under way.

        Raises
        ------
        InvalidValueError
            No images, or not so many.
        """
        if self.images is None:
            raise InvalidValueError("this explorer has no images; give it some to evaluate accuracy.")
        datasets.limited(self.images, n_images)
        with self._lock:
            question = self.question
            self.running = Running(question, n_images, 0.0, time.monotonic())
            self.evaluation_status = ""
            self._evaluations(lambda stale: self._measure(question, n_images, stale))
        self.tell()

    def cancel(self) -> None:
        """End the evaluation under way, if there is one; nothing of it is kept."""
        with self._lock:
            self._evaluations.drop()
            if self.running:
                self.running, self.evaluation_status = None, "cancelled"
        self.tell()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until all is answered and evaluated; return whether that came to pass in time."""
        return super().wait(seconds) and self._evaluations.wait(seconds)

    def curve(self) -> Figure:
        """Return the accuracy of the rows on as many images as the newest, against bytes removed.

        Raises
        ------
        InvalidValueError
            Nothing was evaluated yet.
        """
        if not self.rows:
            raise InvalidValueError("there is no accuracy to draw yet; evaluate something first.")
        table = self.table[self.table.images == self.rows[-1]["images"]].sort_values("bytes_removed")
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        plots.accuracy_curve(table, x="bytes_removed", ax=figure.subplots())
        return figure

    def _figure(self, question: ClusterQuestion, clustering: Clustering) -> Figure:
        figure = Figure(figsize=(11, 5), layout="constrained")
        left, right = figure.subplots(1, 2)
        books = [by_use(group) for group in clustering.groups]
        codebook = np.concatenate([book for book, _ in books])
        counts = np.concatenate([uses for _, uses in books])
        most = np.argsort(-counts, kind="stable")[: self.shown]
        plots.kernel_sheet(
            codebook[most], counts=counts[most], columns=8, one_scale=question.colour == COLOURS[1], ax=left
        )
        left.set_title(f"the {len(most)} most used of {len(codebook):,} representatives", fontsize=10)
        right.set_prop_cycle(color=sns.color_palette("viridis", len(books)))
        for group, (_, uses) in zip(clustering.groups, books, strict=True):
            plots.cluster_sizes(uses, label=group.name, ax=right)
        if len(books) > 1:
            right.legend(fontsize=7, frameon=False)
        figure.suptitle(
            f"{called(self.bank, question.layers)}: {clustering.n_kernels:,} kernels, "
            f"K = {question.n_clusters:,} ({SCOPES[question.scope]}, {question.distance})",
            fontsize=11,
        )
        return figure

    def _measure(self, question: ClusterQuestion, n_images: int, stale: Stale) -> None:
        rows, status = attempted(lambda: self._evaluated_rows(question, n_images, stale))
        found = {"rows": (*self.rows, *rows), "evaluated": question} if rows else {}
        self.change(stale, running=None, evaluation_status=status, **found)

    def _evaluated_rows(self, question: ClusterQuestion, n_images: int, stale: Stale) -> list[dict]:
        """Return the row of a clustering, after that of the dense model the first time on so many images."""
        begun = time.monotonic()
        clustering = self.clusterer.clustering(question, Progress(stale))
        images = datasets.limited(self.images, n_images)
        met, started = n_images in self._dense, time.monotonic()

        def answers(network, part: float, before: float) -> Evaluation:
            def hear(share: float) -> bool:
                self.change(stale, running=Running(question, n_images, before + part * share, started))
                return stale()

            return evaluation.evaluate(replace(self.model, network=network), images, progress=hear)

        if not met:
            self._dense[n_images] = answers(self.model.network, 0.5, 0.0)
        dense = self._dense[n_images]
        before = time.monotonic()
        small = compression.replaced(self.model, clustering).network
        started += time.monotonic() - before  # in which no image was read
        result = answers(small, 1.0 if met else 0.5, 0.0 if met else 0.5)
        origin = {"layers": "", "distance": "", "codebook": "", "scope": "dense", "k": 0}
        rows = [byte_counts.DENSE | origin | _measured(dense, dense)]
        origin = {
            "layers": called(self.bank, question.layers),
            "distance": question.distance,
            "codebook": question.scope,
            "scope": self._way(question),
            "k": question.n_clusters,
            "cluster_seconds": started - begun,
        }
        rows.append(origin | byte_counts.removed(self.model.network, clustering) | _measured(result, dense))
        return rows[any(row["images"] == n_images for row in self.rows) :]

    def _way(self, question: ClusterQuestion) -> str:
        """Name what a curve of accuracies has in common."""
        parts = [] if len(question.layers) == len(self.bank.layers) else [called(self.bank, question.layers)]
        parts += [] if question.distance == "euclidean" else [question.distance]
        return ", ".join([SCOPES[question.scope], *parts]) if parts else question.scope


def _measured(result: Evaluation, dense: Evaluation) -> dict[str, float]:
    times = {"images": len(result.labels), "evaluate_seconds": result.seconds}
    return times | _accuracy.accuracy(result, dense)
