"""Clusterings of a bank for a slider: a sketch of any K at once, and the clustering itself soon after."""

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import cachetools
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from kclib import kmeans, plots
from kclib._util import checks
from kclib.clustering import Clustering, by_use
from kclib.clustering._clustering import of_fits
from kclib.clustering._scopes import grouping
from kclib.explorers import _svg
from kclib.explorers._background import Progress, called, check_k
from kclib.kernels import KernelBank
from kclib.kmeans import symmetric
from kclib.plots._kernels import short

SCOPES = {"global": "one codebook for all chosen", "layer": "a codebook a layer"}
# How the engine can cluster, by the distance that then counts.
METHODS = {
    "euclidean": {"scaled": False, "turned": False},
    "scale-free": {"scaled": True, "turned": False},
    "symmetric": {"scaled": False, "turned": True},
}
COLOURS = ("one scale for all", "each kernel's own scale")
KEPT = 12  # clusterings; one of K = N takes 66 MB of VGG-16
_LEAVES = {"global": 8192, "layer": 1024}  # of a tree: with thirteen layers there are thirteen trees to cut


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


@dataclass(frozen=True)
class Book:
    """The representatives of a group, most used first.

    Attributes
    ----------
    name : str
    kernels : numpy.ndarray
        float32 ``(K, kh, kw)``.
    counts : numpy.ndarray
        int64 ``(K,)``, the kernels that each stands for, descending.
    """

    name: str
    kernels: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class ClusterAnswer:
    """The answer to a question: a sketch, or a clustering.

    Attributes
    ----------
    question : ClusterQuestion
    facts : mapping of str to str
        Numbers with their units, by what they are.
    books : tuple of Book
    n_clusters : int
        Representatives in all; of those beyond a tree's leaves a sketch has but some.
    bank : KernelBank
        Of the chosen layers.
    shown : int
        Representatives drawn on the sheet, the most used first.
    clustering : Clustering, optional
        None of a sketch.
    """

    question: ClusterQuestion
    facts: Mapping[str, str]
    books: tuple[Book, ...]
    n_clusters: int
    bank: KernelBank
    shown: int
    clustering: Clustering | None = None

    @property
    def is_final(self) -> bool:
        """Whether no better answer to the question is on its way."""
        return self.clustering is not None

    @property
    def title(self) -> str:
        """What is shown, in a line."""
        return (
            f"{called(self.bank, self.question.layers)}: {len(self.bank):,} kernels, "
            f"K = {self.question.n_clusters:,} ({SCOPES[self.question.scope]}, {self.question.distance})"
        )

    @cached_property
    def most_used(self) -> list[tuple[Book, int]]:
        """The representatives of all codebooks that stand for most kernels: a codebook and a place in it."""
        heads = [(book, i) for book in self.books for i in range(min(self.shown, len(book.counts)))]
        return sorted(heads, key=lambda head: -head[0].counts[head[1]])[: self.shown]

    def sheet(self, marked: int | None = None) -> str:
        """Return the most used representatives as SVG; one of them may be marked."""
        counts = [int(book.counts[i]) for book, i in self.most_used]
        several = len(self.books) > 1
        hints = [
            f"no. {rank}: stands for {count:,} kernels" + (f" of {book.name}" if several else "")
            for rank, (count, (book, _)) in enumerate(zip(counts, self.most_used, strict=True), 1)
        ]
        alt = (
            f"The {len(counts)} most used of {self.n_clusters:,} representatives as small images, "
            f"the most used first: it stands for {counts[0]:,} kernels, the last shown for {counts[-1]:,}."
        )
        return _svg.sheet(
            np.stack([book.kernels[i] for book, i in self.most_used]), alt,
            captions=[short(count) for count in counts], hints=hints,
            own_scale=self.question.colour == COLOURS[1], marked=marked,
        )  # fmt: skip

    @cached_property
    def figure(self) -> Figure:
        """The same for a page without a process: the sheet, and how evenly representatives are used."""
        figure = Figure(figsize=(11, 5), layout="constrained")
        left, right = figure.subplots(1, 2)
        kernels = np.stack([book.kernels[i] for book, i in self.most_used])
        counts = np.array([book.counts[i] for book, i in self.most_used])
        one_scale = self.question.colour == COLOURS[0]
        plots.kernel_sheet(kernels, counts=counts, columns=9, one_scale=one_scale, ax=left)
        left.set_title(f"the {len(counts)} most used of {self.n_clusters:,} representatives", fontsize=10)
        right.set_prop_cycle(color=sns.color_palette("viridis", len(self.books)))
        for book in self.books:
            plots.cluster_sizes(book.counts, label=book.name, ax=right)
        if len(self.books) > 1:
            right.legend(fontsize=7, frameon=False)
        figure.suptitle(self.title, fontsize=11)
        return figure


@dataclass(frozen=True)
class Sketcher:
    """The tree of some kernels, and what is needed to sketch a codebook of more than its leaves.

    Attributes
    ----------
    tree : kmeans.Tree
    finest : kmeans.Codebook
        All leaves.
    shares : numpy.ndarray
        float64 ``(L,)``: the inertia of each leaf.
    """

    tree: kmeans.Tree
    finest: kmeans.Codebook
    shares: np.ndarray

    @classmethod
    def of(cls, points: np.ndarray, tree: kmeans.Tree) -> "Sketcher":
        """Return that of a tree of points ``(n, d)``."""
        finest = tree.cut(tree.n_leaves)
        labels = finest.leaves[tree.labels]
        errors = np.square(points - finest.centres[labels]).sum(axis=1)
        return cls(tree, finest, np.bincount(labels, errors, len(finest.centres)))

    def sketch(self, k: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Return about the centres ``(m, d)`` of K clusters, their counts ``(m,)`` and the inertia, m <= K.

        Above the leaves, each leaf's mean stands for all centres in it. With many clusters the best share of
        them is proportional to the leaf's inertia to the power of d / (d + 2), and inertia falls as K to the
        power of -2 / d (Gersho 1979, *Asymptotically optimal block quantization*).
        """
        if k <= self.tree.n_leaves:
            cut = self.tree.cut(k)
            return cut.centres, cut.counts, cut.inertia
        d, counts = self.finest.centres.shape[1], self.finest.counts
        weights = self.shares ** (d / (d + 2))
        parts = np.clip(k * weights / (weights.sum() or 1), 1, counts)
        inertia = self.shares @ np.where(parts < counts, parts ** (-2 / d), 0)
        return self.finest.centres, np.maximum(1, np.rint(counts / parts)).astype(np.int64), float(inertia)


class Clusterer:
    """Compute clusterings of a bank, and keep the latest: asking again takes no time.

    Parameters
    ----------
    bank : KernelBank
    seed : int
    """

    def __init__(self, bank: KernelBank, seed: int):
        self.bank, self.seed, self._lock = bank, seed, threading.Lock()
        self._kept = cachetools.LRUCache(KEPT)  # of clusterings by question, under the lock
        self._trees: dict[tuple[str, ...], Sketcher] = {}
        self.chosen = lru_cache(maxsize=2)(lambda layers: bank.only(*layers))
        # Who asks for what is under way waits for it; who asks for anything else does not.
        self._turns: weakref.WeakValueDictionary[object, threading.Lock] = weakref.WeakValueDictionary()

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

    def prepare(self, question: ClusterQuestion, progress: Progress) -> None:
        """Make the trees from which a question is sketched, where they are not made yet."""
        todo = [names for names in self._groups(question) if names not in self._trees]
        if question.distance != "euclidean" or not todo:
            return
        total = sum(self.bank.layer(name).n_kernels for names in todo for name in names)
        progress.begin("preparing every K:", total)
        for names in todo:
            with self._turn(names):
                if names in self._trees:
                    continue
                points = self.bank.only(*names).points
                leaves = _LEAVES[question.scope]
                tree = kmeans.tree(points, leaves=leaves, seed=self.seed, progress=progress.of(len(points)))
                progress.check()
                self._trees[names] = Sketcher.of(points, tree)

    def sketch(self, question: ClusterQuestion) -> tuple[tuple[Book, ...], float] | None:
        """Return about the codebooks and the inertia of a question at once, where its trees are made."""
        groups = self._groups(question)
        if question.distance != "euclidean" or not all(names in self._trees for names in groups):
            return None
        bank = self.chosen(question.layers)
        wanted = self.wanted(bank, question)
        books, inertia = [], 0.0
        for (name, k), names in zip(wanted.items(), groups, strict=True):
            centres, counts, part = self._trees[names].sketch(k)
            order = np.argsort(-counts, kind="stable")
            books.append(Book(name, centres[order].reshape(-1, *bank.size), counts[order]))
            inertia += part
        return tuple(books), inertia

    def clustering(self, question: ClusterQuestion, progress: Progress) -> Clustering:
        """Return the answer to a question.

        Raises
        ------
        StoppedError
            Nobody waits for it any more.
        """
        question = question.method
        with self._turn(question):
            with self._lock:
                found = self._kept.get(question)
            if found is None:
                self.prepare(question, progress)
                found = self._cluster(question, progress)
                with self._lock:
                    self._kept[question] = found
        return found

    def _cluster(self, question: ClusterQuestion, progress: Progress) -> Clustering:
        bank, method = self.chosen(question.layers), METHODS[question.distance]
        wanted, fits = self.wanted(bank, question), {}
        progress.begin("clustering:", len(bank))
        for (name, k), names in zip(wanted.items(), self._groups(question), strict=True):
            points = bank.only(*names).points
            hear = progress.of(len(points))
            if question.distance != "euclidean":
                fits[name] = symmetric.fit(points, k, seed=self.seed, progress=hear, **method)
            elif 2 * k > len(points):  # nearly one for each: as they are, if they are so few
                fits[name] = kmeans.fit(points, k, max_iter=1, seed=self.seed, progress=hear)
            else:
                fits[name] = self._trees[names].tree.fit(k, max_iter=1, progress=hear)
            progress.check()
        return of_fits(bank, fits, wanted, scope=question.scope, seed=self.seed, **method)

    def _groups(self, question: ClusterQuestion) -> list[tuple[str, ...]]:
        groups = grouping(self.chosen(question.layers), question.scope)
        return [tuple(layer.name for layer in layers) for layers in groups.values()]

    def _turn(self, key: object) -> threading.Lock:
        with self._lock:
            turn = self._turns.get(key)
            if turn is None:
                turn = self._turns[key] = threading.Lock()
            return turn


def books_of(clustering: Clustering) -> tuple[Book, ...]:
    """Return the codebooks of a clustering."""
    return tuple(Book(group.name, *by_use(group)) for group in clustering.groups)
