"""The explorer of clusterings: any layers, any K, at once; and their accuracy, in the background."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import cachetools
import pandas as pd

from kclib import compression, datasets, evaluation, kernels, models
from kclib.clustering import Clustering
from kclib.clustering._scopes import grouping
from kclib.compression import byte_counts
from kclib.compression._counting import Count
from kclib.compression._layers import N_TURNS
from kclib.datasets import ImageSet, as_image_set
from kclib.errors import InvalidValueError
from kclib.evaluation import Evaluation, _accuracy
from kclib.explorers._background import Explorer, Newest, Progress, Stale, attempted, called
from kclib.explorers._clusterer import (
    KEPT,
    METHODS,
    SCOPES,
    Book,
    ClusterAnswer,
    Clusterer,
    ClusterQuestion,
    books_of,
)
from kclib.models import Model
from kclib.models._model import as_model
from kclib.store import VERSIONS, Store

_REST = 0.3  # seconds without a move, after which a sketch is replaced by the clustering itself
_STORED_AS = {"euclidean": "plain", "scale-free": "scaled", "symmetric": "turned"}  # methods of `kclib.sweep`


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
    measured : pandas.DataFrame, optional
        Accuracies known already, as `kclib.sweep` returns them; by default what the default store has of this
        network and these images.

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
        shown: int = 72,
        measured: pd.DataFrame | None = None,
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
        self._measured, self._asked = measured, -math.inf
        self._finals = cachetools.LRUCache(KEPT)  # of answers by question, under the lock

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
        bank = self.clusterer.chosen(question.layers)
        total = sum(self.clusterer.wanted(bank, question).values())
        return (
            f"clustering {len(bank):,} kernels into {total:,}: removes "
            f"{100 * (1 - total / len(bank)):.3f} % of them and "
            f"{self.bytes_removed(question):.2f} % of the bytes of all convolutions …"
        )

    def bytes_removed(self, question: ClusterQuestion, precision: str = "fp32") -> float:
        """Return the percent of all convolutions' bytes that a question's clustering would remove."""
        bank, method = self.clusterer.chosen(question.layers), METHODS[question.distance]
        count = Count(precision, orbit=N_TURNS if method["turned"] else 1)
        if method["scaled"]:
            count = replace(count, scale_bits=16 if precision == "fp16" else 32)
        wanted = self.clusterer.wanted(bank, question)
        saved = sum(math.prod(x.shape) * x.itemsize for x in bank.layers)
        saved -= sum(
            count.bytes(layers, wanted[name]) for name, layers in grouping(bank, question.scope).items()
        )
        return 100 * saved / self._convolutions

    def clustering(self, question: ClusterQuestion) -> Clustering:
        """Return the answer to a question as a clustering; kept, so that asking again takes no time."""
        return self.clusterer.clustering(question, Progress(lambda: False))

    def at_once(self, question: ClusterQuestion) -> ClusterAnswer | None:
        """Return the answer if it is kept, or a sketch of it."""
        self._asked = time.monotonic()
        return self._ready(question)

    def _ready(self, question: ClusterQuestion) -> ClusterAnswer | None:
        with self._lock:
            answer = self._finals.get(question.method)
        if answer is not None:
            return replace(answer, question=question)
        if (sketch := self.clusterer.sketch(question)) is None:
            return None
        return self._answer(question, sketch[0], f"about {sketch[1]:.3g}")

    def answered(self, question: ClusterQuestion, stale: Stale) -> ClusterAnswer:
        """Return the codebooks by use, and what is removed; a sketch is there before, if there is time."""
        progress = Progress(stale, lambda sentence: self.change(stale, status=sentence))
        with self._lock:
            is_kept = question.method in self._finals
        if not is_kept:
            self.clusterer.prepare(question, progress)
            if self.answer and self.answer.question != question and (sketch := self._ready(question)):
                self.change(stale, answer=sketch)
            while time.monotonic() < self._asked + _REST:
                progress.check()
                time.sleep(_REST / 20)
        clustering = self.clusterer.clustering(question, progress)
        answer = self._answer(question, books_of(clustering), f"{clustering.inertia:.4g}", clustering)
        with self._lock:
            self._finals[question.method] = answer
        return answer

    def known(self) -> pd.DataFrame:
        """Return the accuracies known of clusterings like the one asked for, by K; the dense model has 0."""
        table, question = self._known, self.question
        if table.empty or len(question.layers) < len(self.bank.layers):
            return table.iloc[:0]
        alike = (table.scope == question.scope) & (table.method == _STORED_AS[question.distance])
        table = table[(table.scope == "dense") | alike]
        return table.groupby("k", as_index=False)[["kernels_removed", "bytes_removed", "top1"]].mean()

    @cached_property
    def _known(self) -> pd.DataFrame:
        """Accuracies of the network: those given, or those stored, on as many images as there are most."""
        table = self._measured
        if table is None and self.images is not None:
            table = self._stored()
        if table is None or table.empty:
            return pd.DataFrame(columns=["scope", "k", "method", "kernels_removed", "bytes_removed", "top1"])
        table = table[table.images == table.images.max()]
        removed = ["kernels_removed", "bytes_removed"]
        return table.assign(**table[removed].fillna(0.0).astype(float))

    def _stored(self) -> pd.DataFrame:
        """What the store has of this network, clustered as now, on these images or a draw of them."""
        table = Store().table("evaluation")
        if table.empty:
            return table
        table = table[(table.weights == models.fingerprint(self.model.network)) & (table.precision == "fp32")]
        table = table[(table.scope == "dense") | (table.clustering == VERSIONS["clustering"])]
        draws = [n for n in table.images.unique() if n <= len(self.images)]
        ours = {datasets.limited(self.images, int(n)).fingerprint for n in draws} | {self.images.fingerprint}
        return table[table.images_hash.isin(ours)]

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

    def _answer(
        self,
        question: ClusterQuestion,
        books: Sequence[Book],
        inertia: str,
        clustering: Clustering | None = None,
    ) -> ClusterAnswer:
        bank = self.clusterer.chosen(question.layers)
        if clustering is None:
            n_clusters = sum(self.clusterer.wanted(bank, question).values())
            removed = {
                "kernels_removed": 100 * (1 - n_clusters / len(bank)),
                "bytes_removed": self.bytes_removed(question),
                "bytes_removed_fp16": self.bytes_removed(question, "fp16"),
            }
        else:
            n_clusters = clustering.n_clusters
            removed = byte_counts.removed(self.model.network, clustering)
        facts = {
            "kernels": f"{len(bank):,}",
            "representatives": f"{n_clusters:,}",
            "kernels removed": f"{removed['kernels_removed']:.3f} %",
            "bytes of all convolutions removed": f"{removed['bytes_removed']:.2f} %",
            "with a 16-bit codebook": f"{removed['bytes_removed_fp16']:.2f} %",
            "inertia": inertia,
        }
        return ClusterAnswer(question, facts, tuple(books), n_clusters, bank, self.shown, clustering)

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
