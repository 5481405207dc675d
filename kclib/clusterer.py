"""Clusterings of any layers of a network, at any K, at once: what the explorer of clusterings asks."""

import threading
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache

from kclib import clustering, kmeans, scopes, symmetry
from kclib.clustering import Clustering
from kclib.explorers import between, known
from kclib.kernels import KernelBank
from kclib.questions import Progress

RUNGS = (16, 64, 256, 1024, 4096)
SCOPES = {"global": "one codebook for all chosen", "layer": "a codebook a layer"}
# How the engine can cluster, by the distance that then counts.
METHODS = {
    "euclidean": {"scaled": False, "turned": False},
    "scale-free": {"scaled": True, "turned": False},
    "symmetric": {"scaled": False, "turned": True},
}
COLOURS = ("each kernel's own scale", "one scale for all")
# Who hears of a clustering's progress: each thread its own, for clusterings are kept by what they are of.
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
        """The same question but for what does not change the clustering."""
        return replace(self, colour=COLOURS[0])


class Clusterer:
    """The clusterings of a bank, each kept: asking again takes no time.

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
        known("scope", question.scope, SCOPES)
        known("distance that can be clustered by", question.distance, METHODS)
        known("colour", question.colour, COLOURS)
        between(question.n_clusters, self.largest(question))

    def largest(self, question: ClusterQuestion) -> int:
        """Return the most clusters that a question's largest codebook can have: one for each kernel."""
        counts = [self.bank.layer(name).n_kernels for name in set(question.layers)]
        return sum(counts) if question.scope == "global" else max(counts)

    def wanted(self, bank: KernelBank, question: ClusterQuestion) -> dict[str, int]:
        """Return K by group: smaller groups keep all they have."""
        return {
            name: min(question.n_clusters, sum(layer.n_kernels for layer in layers))
            for name, layers in scopes.grouping(bank, question.scope).items()
        }

    def _cluster(self, question: ClusterQuestion) -> Clustering:
        bank, method, progress = self.bank.only(*question.layers), METHODS[question.distance], _progress.get()
        wanted, found = self.wanted(bank, question), {}
        groups = {
            name: tuple(layer.name for layer in layers)
            for name, layers in scopes.grouping(bank, question.scope).items()
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
                found[name] = ladders[name].at(wanted[name], progress=hear)
            else:
                found[name] = symmetry.kmeans(points, wanted[name], seed=self.seed, progress=hear, **method)
            progress.check()
        return clustering.of_fits(bank, found, wanted, scope=question.scope, seed=self.seed, **method)

    def _ladder(self, names: tuple[str, ...]) -> kmeans.Ladder:
        """Cluster some layers at a few K, from which any other K is a fraction of a second away."""
        points, progress = self.bank.only(*names).points, _progress.get()
        ks = [k for k in RUNGS if k <= len(points)] or [len(points)]
        found = kmeans.ladder(points, ks, tol=0.01, seed=self.seed, progress=progress.of(len(points)))
        progress.check()
        return found
