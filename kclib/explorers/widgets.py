"""Widgets: thin views of the explorers. They ask, and show what comes; explorers say what is true."""

import ipywidgets as widgets
import pandas as pd
from torch import nn

from kclib.datasets import ImageSet
from kclib.explorers import _cluster_view, _controls, _map_explorer
from kclib.explorers._cluster_explorer import ClusterExplorer
from kclib.explorers._map_explorer import MapExplorer
from kclib.explorers._similarity_explorer import SimilarityExplorer
from kclib.models import Model
from kclib.similarity import distances


def explore(
    model: Model | nn.Module,
    images: ImageSet | None = None,
    *,
    n_clusters: int = 64,
    seed: int = 0,
    measured: pd.DataFrame | None = None,
) -> widgets.VBox:
    """Open the explorer of a network's clusterings: choose layers, codebook and K, and see what comes of it.

    Parameters
    ----------
    model : Model or torch.nn.Module
    images : ImageSet, optional
        What accuracy is evaluated on, on demand; without them the explorer has no such part.
    n_clusters : int
        K to begin with, clusters a codebook.
    seed : int
        Of k-means.
    measured : pandas.DataFrame, optional
        Accuracies that are known already, as `kclib.sweep` returns them; by default those of this network and
        these images in the default store.

    Raises
    ------
    InvalidValueError
        A network without kernels to cluster.

    Examples
    --------
    >>> import kclib, torch
    >>> type(kclib.explore(torch.nn.Conv2d(3, 16, 3), n_clusters=4)).__name__  # a notebook shows it
    'VBox'
    """
    return clusters(ClusterExplorer(model, images, n_clusters=n_clusters, seed=seed, measured=measured))


def similarity(explorer: SimilarityExplorer) -> widgets.VBox:
    """Return the view of a `SimilarityExplorer`: layers and distance, and the histogram they lead to."""
    names = {f"{name} ({d.formula})": name for name, d in distances.named_distances.items()}
    controls = {"layers": _controls.layers(explorer), "distance": _controls.choice("distance", names)}
    return _FigureView(explorer, controls).box


def maps(explorer: MapExplorer) -> widgets.VBox:
    """Return the view of a `MapExplorer`: layers, kind of map, colour and number of clusters, and the map."""
    controls = {
        "layers": _controls.layers(explorer),
        "kind": _controls.choice("kernels compared", {kind: kind for kind in explorer.graphs}),
        "colour": _controls.choice("colour", {name: name for name in _map_explorer.COLOURS}),
        "n_clusters": _controls.ClusterCount("clusters K (colour)", explorer.largest),
    }
    return _FigureView(explorer, controls).box


def clusters(explorer: ClusterExplorer) -> widgets.VBox:
    """Return the view of a `ClusterExplorer`: what to cluster, the codebook, and what is known of it."""
    return _cluster_view.ClusterView(explorer).box


class _FigureView(_controls.View):
    """Controls above a line of numbers and a figure."""

    def __init__(self, explorer, controls):
        super().__init__(explorer, controls)
        self.facts, self.picture = _controls.canvas("facts"), _controls.canvas("picture")
        first, *others = (control.box for control in controls.values())
        chosen = widgets.HBox(
            [first, widgets.VBox(others, layout=widgets.Layout(flex="1 1 300px"))],
            layout=widgets.Layout(flex_flow="row wrap"),
        )
        self.box = widgets.VBox([chosen, self.status, self.facts, self.picture])
        self.listen()

    def show_answer(self, answer) -> None:
        self.facts.value, self.picture.value = _controls.facts(answer), _controls.image(answer.figure)
