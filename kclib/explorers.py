"""Widgets: a controller that can be tested without a browser, under a thin ipywidgets view."""

import io
from collections.abc import Callable
from functools import lru_cache

import ipywidgets as widgets
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from kclib import clustering, figures, kmeans
from kclib.clustering import Clustering
from kclib.kernels import KernelBank

ALL_LAYERS = "all layers, one codebook"
RUNGS = (16, 64, 256, 1024, 4096)


class ClusterExplorer:
    """The state behind the cluster-count slider: one layer or all of them, clustered at any K.

    Parameters
    ----------
    bank : KernelBank
    seed : int
    shown : int
        Representatives drawn on the codebook sheet, the most used first.
    progress : callable, optional
        Called with the share of the work done, 0 to 1, while a choice is clustered for the first time.
    """

    def __init__(
        self,
        bank: KernelBank,
        *,
        seed: int = 0,
        shown: int = 64,
        progress: Callable[[float], None] | None = None,
    ):
        self.bank, self.seed, self.shown, self.progress = bank, seed, shown, progress
        self.ladder = lru_cache(maxsize=None)(self._ladder)
        self.cluster = lru_cache(maxsize=64)(self._cluster)

    @property
    def choices(self) -> tuple[str, ...]:
        """What can be clustered: all layers at once, or each by name."""
        return (ALL_LAYERS, *(layer.name for layer in self.bank.layers))

    def largest(self, choice: str) -> int:
        """Return the number of kernels of a choice, its largest K."""
        return len(self.bank) if choice == ALL_LAYERS else self.bank.layer(choice).n_kernels

    def figure(self, choice: str, n_clusters: int) -> Figure:
        """Return the codebook by use, and the cluster sizes, as a new figure."""
        result = self.cluster(choice, min(n_clusters, self.largest(choice)))
        codebook, counts = clustering.by_use(result.groups[0])
        fig, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
        shown = min(self.shown, len(codebook))
        figures.kernel_sheet(codebook[:shown], counts=counts[:shown], columns=8, ax=left)
        left.set_title(f"the {shown} most used of {len(codebook):,} representatives", fontsize=10)
        figures.cluster_sizes(counts, ax=right)
        fig.suptitle(
            f"{choice}: {result.n_kernels:,} kernels, K = {result.n_clusters:,}, "
            f"{100 * result.kernels_removed:.3f} % removed, inertia {result.inertia:.4g}",
            fontsize=11,
        )
        return fig

    def _bank(self, choice: str) -> KernelBank:
        return self.bank if choice == ALL_LAYERS else self.bank.only(choice)

    def _ladder(self, choice: str) -> kmeans.Ladder:
        """Cluster a choice at a few K, from which any other K is a fraction of a second away."""
        bank, done = self._bank(choice), 0.0

        def report(step: kmeans.Step) -> None:
            nonlocal done
            done += step.share
            if self.progress:
                self.progress(min(done, 1.0))

        ks = [k for k in RUNGS if k <= len(bank)] or [len(bank)]
        return kmeans.ladder(bank.points, ks, tol=0.01, seed=self.seed, progress=report)

    def _cluster(self, choice: str, n_clusters: int) -> Clustering:
        found = self.ladder(choice).at(n_clusters)
        return clustering.of_all(self._bank(choice), found, self.seed)


def cluster_explorer(explorer: ClusterExplorer, *, n_clusters: int = 64) -> widgets.VBox:
    """Return the view: a choice of layer and a slider for K, and the picture they lead to.

    The picture is an image widget, not an output area: it does not flicker, and in batch a client that
    fills output areas can miss the kernel's reply and wait for ever (nbclient issue 312).
    """
    choice = widgets.Dropdown(
        options=explorer.choices, description="layer", value=explorer.choices[len(explorer.choices) // 2]
    )
    counts = sorted({n_clusters, *(2**power for power in range(1, 15))})
    count = widgets.SelectionSlider(
        options=[(f"{k:,}", k) for k in counts], value=n_clusters,
        description="clusters K", continuous_update=False,
    )  # fmt: skip
    status = widgets.Label()
    picture = widgets.Image(format="png")
    explorer.progress = lambda share: setattr(status, "value", f"clustering … {share:.0%}")

    def show(_=None) -> None:
        status.value = "clustering …"
        picture.value = _png(explorer.figure(choice.value, count.value))
        status.value = ""

    choice.observe(show, "value")
    count.observe(show, "value")
    show()
    return widgets.VBox([widgets.HBox([choice, count, status]), picture])


def _png(fig: Figure) -> bytes:
    """Return a figure as PNG and close it."""
    png = io.BytesIO()
    fig.savefig(png, format="png")
    plt.close(fig)
    return png.getvalue()
