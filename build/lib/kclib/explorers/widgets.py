"""Widgets: thin views of the explorers. They ask, and show what comes; what is true is the explorers' affair.

Pictures are image widgets, not output areas: those do not flicker, and in batch a client that fills output
areas can miss the kernel's reply and wait for ever (nbclient issue 312).
"""

import html
import io
import math
import threading
from collections.abc import Callable, Mapping

import ipywidgets as widgets
import pandas as pd
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from kclib.datasets import ImageSet
from kclib.errors import KclibError
from kclib.explorers import _cluster_explorer, _map_explorer
from kclib.explorers._background import Explorer
from kclib.explorers._cluster_explorer import ClusterExplorer
from kclib.explorers._map_explorer import MapExplorer
from kclib.explorers._similarity_explorer import SimilarityExplorer
from kclib.models import Model
from kclib.similarity import distances

_STEPS = 8  # of the slider, each time that K doubles
_LABELS = {"description_width": "150px"}
_AS_LONG = {"description_width": "initial"}
_CELLS = "padding: 1px 10px; text-align: right; vertical-align: bottom; line-height: 1.4"
_TABLE = [{"selector": "td", "props": _CELLS + "; white-space: nowrap"}, {"selector": "th", "props": _CELLS}]


def explore(
    model: Model | nn.Module, images: ImageSet | None = None, *, n_clusters: int = 64, seed: int = 0
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
    return clusters(ClusterExplorer(model, images, n_clusters=n_clusters, seed=seed))


def similarity(explorer: SimilarityExplorer) -> widgets.VBox:
    """Return the view of a `SimilarityExplorer`: layers and distance, and the histogram they lead to."""
    names = {f"{name} ({d.formula})": name for name, d in distances.named_distances.items()}
    controls = {"layers": _layers(explorer), "distance": _choice("distance", names)}
    return _View(explorer, controls).box


def maps(explorer: MapExplorer) -> widgets.VBox:
    """Return the view of a `MapExplorer`: layers, kind of map, colour and number of clusters, and the map."""
    controls = {
        "layers": _layers(explorer),
        "kind": _choice("kernels compared", {kind: kind for kind in explorer.graphs}),
        "colour": _choice("colour", {name: name for name in _map_explorer.COLOURS}),
        "n_clusters": _Count("clusters K (colour)", explorer.largest),
    }
    return _View(explorer, controls).box


def clusters(explorer: ClusterExplorer) -> widgets.VBox:
    """Return the view of a `ClusterExplorer`: what to cluster, the codebook, and accuracy on demand."""
    controls = {
        "layers": _layers(explorer),
        "scope": _choice("codebook", {text: name for name, text in _cluster_explorer.SCOPES.items()}),
        "distance": _choice("distance", {name: name for name in _cluster_explorer.METHODS}),
        "colour": _choice("colour", {name: name for name in _cluster_explorer.COLOURS}),
        "n_clusters": _Count("clusters K a codebook", explorer.largest),
    }
    view = _View(explorer, controls)
    if explorer.images is None:
        return view.box
    return widgets.VBox([view.box, _Accuracy(explorer).box])


class _Count:
    """A number of clusters: a slider in equal ratios and an entry; either follows the other."""

    def __init__(self, description: str, largest: int):
        self.slider = widgets.FloatLogSlider(
            base=2, min=math.log2(min(2, largest)), max=math.log2(largest), step=1 / _STEPS, readout=False,
            description=description, continuous_update=False, style=_LABELS,
            layout=widgets.Layout(width="520px"),
        )  # fmt: skip
        self.entry = widgets.BoundedIntText(
            min=min(2, largest), max=largest, description="K", style={"description_width": "20px"},
            layout=widgets.Layout(width="140px"),
        )  # fmt: skip
        self.box = widgets.HBox([self.slider, self.entry])

    def show(self, value: int, largest: int) -> None:
        least = min(2, largest)
        for box, ends in (
            (self.entry, (least, largest)), (self.slider, (math.log2(least), math.log2(largest)))
        ):  # fmt: skip
            with box.hold_trait_notifications():
                box.min, box.max = ends
        self.entry.value = value
        if round(self.slider.value) != value:
            self.slider.value = value

    def observe(self, call: Callable[[int], None]) -> None:
        def changed(change) -> None:
            call(min(max(round(change.new), self.entry.min), self.entry.max))

        self.slider.observe(changed, "value")
        self.entry.observe(changed, "value")


class _Control:
    """A widget whose value is the question's, or a tuple of it."""

    def __init__(self, box: widgets.Widget):
        self.box = box

    def show(self, value, largest: int) -> None:
        self.box.value = value

    def observe(self, call: Callable) -> None:
        self.box.observe(lambda change: call(change.new), "value")


def _layers(explorer) -> _Control:
    names = [layer.name for layer in explorer.bank.layers]
    box = widgets.SelectMultiple(
        options=names, value=explorer.question.layers, rows=min(6, len(names)),
        description="layers (one or more)", style=_AS_LONG, layout=widgets.Layout(width="300px"),
    )  # fmt: skip
    return _Control(box)


def _choice(description: str, options: Mapping[str, str]) -> _Control:
    box = widgets.Dropdown(
        options=list(options.items()), description=description, style=_LABELS,
        layout=widgets.Layout(width="520px"),
    )  # fmt: skip
    return _Control(box)


class _View:
    """Controls, a line that says what is under way, the picture, and its numbers."""

    def __init__(self, explorer: Explorer, controls: Mapping[str, _Control | _Count]):
        self.explorer, self.controls, self._lock = explorer, controls, threading.RLock()
        self._asked = self._shown = self._showing = None
        self.status, self.facts = widgets.HTML(), widgets.HTML()
        self.picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))
        first, *others = (control.box for control in controls.values())
        self.box = widgets.VBox(
            [widgets.HBox([first, widgets.VBox(others)]), self.status, self.facts, self.picture]
        )
        if explorer.answer is None:
            explorer.show()
        self.refresh()
        explorer.listeners.append(self.refresh)
        for name, control in controls.items():
            control.observe(lambda value, name=name: self.choose(name, value))

    def choose(self, name: str, value) -> None:
        if self._showing == threading.get_ident():
            return  # a control that is shown another question is moved by no person
        try:
            if getattr(self.explorer.question, name) != value:
                self.explorer.choose(**{name: value})
        except KclibError as error:
            self.status.value = _note(str(error))

    def refresh(self) -> None:
        with self._lock:
            question, answer = self.explorer.question, self.explorer.answer
            if question is not self._asked:  # never while a person may be moving them for another question
                self._asked, self._showing = question, threading.get_ident()
                try:
                    for name, control in self.controls.items():
                        control.show(getattr(question, name), self.explorer.largest)
                finally:
                    self._showing = None
            self.status.value = _note(self.explorer.status)
            if answer is not self._shown:
                self._shown = answer
                self.facts.value = _table([answer.facts])
                self.picture.value = png(answer.figure)


class _Accuracy:
    """A button that evaluates, one that cancels, how far it is, and the rows and curve of what came of it."""

    def __init__(self, explorer: ClusterExplorer):
        self.explorer, self._lock, self._shown = explorer, threading.RLock(), ()
        most = len(explorer.images)
        self.images = widgets.BoundedIntText(
            value=min(1000, most), min=1, max=most, description=f"test images (1 to {most:,})",
            style=_AS_LONG, layout=widgets.Layout(width="240px"),
        )  # fmt: skip
        wide = widgets.Layout(width="160px")
        self.start = widgets.Button(description="Evaluate accuracy", button_style="primary", layout=wide)
        self.stop = widgets.Button(description="Cancel", disabled=True)
        self.bar = widgets.FloatProgress(
            max=1.0, description="done", style=_AS_LONG, layout=widgets.Layout(width="200px")
        )
        self.status, self.table = widgets.HTML(), widgets.HTML()
        self.curve = widgets.Image(format="png", layout=widgets.Layout(max_width="700px", display="none"))
        row = widgets.HBox([self.images, self.start, self.stop, self.bar])
        self.box = widgets.VBox([row, self.status, self.table, self.curve])
        self.start.on_click(lambda _: self.evaluate())
        self.stop.on_click(lambda _: explorer.cancel())
        self.refresh()
        explorer.listeners.append(self.refresh)

    def evaluate(self) -> None:
        try:
            self.explorer.evaluate(self.images.value)
        except KclibError as error:
            self.status.value = _note(str(error))

    def refresh(self) -> None:
        with self._lock:
            running, rows = self.explorer.running, self.explorer.rows
            self.start.disabled, self.stop.disabled = running is not None, running is None
            self.bar.value = running.share if running else 0.0
            self.bar.layout.visibility = "visible" if running else "hidden"
            self.status.value = _note(self._said())
            if rows is not self._shown:
                self._shown = rows
                self.table.value = _table([_row(row) for row in rows])
                if rows:
                    self.curve.value, self.curve.layout.display = png(self.explorer.curve()), "block"

    def _said(self) -> str:
        running = self.explorer.running
        if running:
            left = running.seconds_left
            time_left = "" if math.isnan(left) else f", about {tqdm.format_interval(left)} left"
            return (
                f"K = {running.question.n_clusters:,} on {running.n_images:,} images: "
                f"{running.share:.0%}{time_left}"
            )
        said = [self.explorer.evaluation_status] if self.explorer.evaluation_status else []
        if self.explorer.evaluated is None:
            return said[0] if said else "accuracy of what is shown: not evaluated yet"
        row = self.explorer.rows[-1]
        top1 = f"{row['top1']:.2f} %"
        if self.explorer.accuracy_is_stale:
            codebook = _cluster_explorer.SCOPES[row["codebook"]]
            which = f"K = {row['k']:,} ({row['layers']}, {codebook}, {row['distance']})"
            said.append(f"stale: {top1} top-1 is that of {which}, not of what is shown now")
        else:
            said.append(f"top-1 of what is shown: {top1}")
        return "; ".join(said)


def png(figure: Figure) -> bytes:
    """Return a figure as PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()


def _row(row: Mapping) -> dict[str, str]:
    """Return a row of evaluations as its reader wants it."""
    dense = row["scope"] == "dense"
    return {
        "layers": "dense model" if dense else row["layers"],
        "codebook": "" if dense else _cluster_explorer.SCOPES[row["codebook"]],
        "distance": row["distance"],
        "K": "" if dense else f"{row['k']:,}",
        "kernels removed (%)": f"{row['kernels_removed']:.3f}",
        "convolution bytes removed (%)": f"{row['bytes_removed']:.2f}",
        "test images": f"{row['images']:,}",
        "top-1 (%)": f"{row['top1']:.2f} [{row['top1_low']:.2f}, {row['top1_high']:.2f}]",
        "drop (points)": f"{row['drop']:.2f} [{row['drop_low']:.2f}, {row['drop_high']:.2f}]",
    }


def _table(rows: list[Mapping[str, str]]) -> str:
    """Return rows as an HTML table with a head."""
    return (
        pd.DataFrame(rows).style.hide().format(escape="html").set_table_styles(_TABLE).to_html()
        if rows
        else ""
    )


def _note(text: str) -> str:
    return f"<span role='status'>{html.escape(text) or '&nbsp;'}</span>"
