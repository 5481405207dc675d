"""The view of the explorer of clusterings: controls, the codebook, and beside it what is known of it."""

import math
from bisect import bisect_left
from collections.abc import Mapping

import ipywidgets as widgets
import numpy as np
from tqdm import tqdm

from kclib.explorers import _controls, _details, _svg
from kclib.explorers._cluster_explorer import ClusterExplorer
from kclib.explorers._clusterer import COLOURS, METHODS, SCOPES, ClusterAnswer
from kclib.explorers._controls import ClusterCount, Number, Panel, View, canvas, choice, layers, note, said

_COLUMN = "repeat(auto-fit, minmax(min(100%, 400px), 1fr))"  # two where there is room, else one
_OLD = "kclib-old"
_STYLE = f"""<style>
.{_OLD} svg {{ opacity: 0.35 }}
.kclib-scroll {{ max-height: 300px; overflow: auto }}
.kclib-rows {{ max-height: 110px; overflow: auto }}
.kclib-explorer .widget-html .widget-html-content {{ line-height: 1.4 }}
</style>"""
_KERNELS = 12  # of a filter


class ClusterView(View):
    """Controls that ask, the codebook that answers, and panels about it: one is seen at a time."""

    def __init__(self, explorer: ClusterExplorer):
        count = ClusterCount("clusters K", explorer.largest, live=True)
        controls = {
            "layers": layers(explorer),
            "scope": choice("codebook", {text: name for name, text in SCOPES.items()}),
            "distance": choice("distance", {name: name for name in METHODS}),
            "colour": choice("colours", {name: name for name in COLOURS}),
            "n_clusters": count,
        }
        super().__init__(explorer, controls)
        self.facts, self.title, self.picture = canvas("facts"), said(""), canvas("picture")
        chosen, *how = (controls[name].box for name in ("layers", "scope", "distance", "colour"))
        asked = widgets.HBox(
            [
                chosen,
                widgets.VBox(how, layout=_grows("260px")),
                _column(count.box, self.status, grows="300px"),
            ],
            layout=widgets.Layout(flex_flow="row wrap"),
        )
        self.panels = {
            "Layers": _Errors(explorer),
            "Members": _Representative(explorer, self.mark),
            "Filter": _Filter(explorer),
        }
        if explorer.images is not None:
            self.panels = {"Accuracy": _Accuracy(explorer)} | self.panels
        self.tab = widgets.Tab(
            [panel.box for panel in self.panels.values()], titles=list(self.panels), selected_index=0,
            layout=widgets.Layout(min_width="0"),
        )  # fmt: skip
        answer = widgets.GridBox(
            [_column(self.title, self.picture), self.tab],
            layout=widgets.Layout(grid_template_columns=_COLUMN, grid_gap="4px 12px", width="100%"),
        )
        self.box = widgets.VBox([widgets.HTML(value=_STYLE, tooltip=""), asked, self.facts, answer])
        self.box.add_class("kclib-explorer")
        self.listen()
        self.tab.observe(lambda _: self.refresh(), "selected_index")
        for panel in self.panels.values():
            panel.listen()
        self.refresh()

    def mark(self, rank: int | None) -> None:
        """Mark a representative on the sheet."""
        self.picture.value = self.explorer.answer.sheet(rank)

    def show(self) -> None:
        super().show()
        if self.explorer.answer.question.method == self.explorer.question.method:
            self.picture.remove_class(_OLD)
        else:  # the codebook of another question is seen to be one
            self.picture.add_class(_OLD)
        shown = self.tab.selected_index
        for i, panel in enumerate(self.panels.values()):
            if panel.is_seen != (i == shown):
                panel.is_seen = i == shown
                self.mark(None)
                panel.refresh()

    def show_answer(self, answer: ClusterAnswer) -> None:
        self.facts.value, self.picture.value = _controls.facts(answer), answer.sheet()
        kind = "" if answer.is_final else "sketch of "
        k, shown = answer.question.n_clusters, len(answer.most_used)
        self.title.value = note(
            f"{kind}K = {k:,}: the {shown} most used, and for how many kernels each stands"
        )


class _Detail(Panel):
    """A panel about the clustering itself, which is worked out only while it is seen."""

    def __init__(self, explorer: ClusterExplorer, *controls: widgets.Widget):
        super().__init__(explorer)
        self.is_seen, self._shown = False, None
        self.picture = canvas("detail")
        self.box = _column(*controls, self.status, self.picture)

    def show(self) -> None:
        answer = self.explorer.answer
        if not self.is_seen or answer is None:
            return
        if not answer.is_final:
            self.status.value, self._shown = note("follows once the slider rests …"), None
        elif self._shown != (asked := (id(answer), *self.chosen(answer))):
            self._shown = asked
            self.status.value = note(self.show_clustering(answer))

    def chosen(self, answer: ClusterAnswer) -> tuple:
        """Return what else is asked."""
        return ()

    def show_clustering(self, answer: ClusterAnswer) -> str:
        """Draw it, and return what is said of it."""
        raise NotImplementedError


class _Representative(_Detail):
    """The kernels that a representative stands for: which is chosen by its place on the sheet."""

    def __init__(self, explorer: ClusterExplorer, mark):
        self.mark, self.rank = mark, _slider("no. on the sheet")
        super().__init__(explorer, self.rank)
        self.rank.observe(lambda _: self.refresh(), "value")

    def chosen(self, answer: ClusterAnswer) -> tuple:
        self.rank.max = max(len(answer.most_used), 2)
        return (self.rank.value,)

    def show_clustering(self, answer: ClusterAnswer) -> str:
        rank = min(self.rank.value, len(answer.most_used)) - 1
        book, i = answer.most_used[rank]
        (group,) = (group for group in answer.clustering.groups if group.name == book.name)
        (index,) = np.flatnonzero((group.codebook == book.kernels[i]).all(axis=(1, 2)))[:1]
        found = _details.members(answer.bank, group, int(index))
        self.mark(rank)
        itself = group.codebook[[index]]
        drawn = np.concatenate([itself, found.nearest, itself, found.farthest])
        near, far = ([f"{x:.2g}" for x in ends] for ends in (found.near, found.far))
        alt = f"Representative {rank + 1} and its {len(near)} nearest members; again, with its farthest."
        captions = ["itself", *near, "itself", *far]
        self.picture.value = _svg.sheet(drawn, alt, captions=captions, columns=len(near) + 1)
        some = [f"{name} ({n:,})" for name, n in list(found.by_layer.items())[:4]]
        others = f" and {len(found.by_layer) - 4} more layers" if len(found.by_layer) > 4 else ""
        return (
            f"No. {rank + 1} stands for {found.count:,} kernels, of {', '.join(some)}{others}. "
            "Above its nearest, below its farthest, with their distance (weight units):"
        )


class _Errors(_Detail):
    """How much of each layer is lost."""

    def __init__(self, explorer: ClusterExplorer):
        super().__init__(explorer)
        self.picture.add_class("kclib-scroll")

    def show_clustering(self, answer: ClusterAnswer) -> str:
        lost = _details.errors(answer.bank, answer.clustering)
        worst = max(lost, key=lost.get)
        alt = f"Bars: {worst} loses most, {lost[worst]:.1f} % of its squared weight."
        self.picture.value = _svg.bars(lost, alt)
        return "Squared weight that is lost (%):"


class _Filter(_Detail):
    """A filter as it was trained, and as it is clustered."""

    def __init__(self, explorer: ClusterExplorer):
        names = explorer.question.layers
        self.layer = widgets.Dropdown(
            options=names, value=names[len(names) // 2], description="layer of the filter", tooltip="",
            style=_controls.AS_LONG, layout=widgets.Layout(width="auto", max_width="300px"),
        )  # fmt: skip
        self.number = _slider("filter")
        super().__init__(explorer, self.layer, self.number)
        for control in (self.layer, self.number):
            control.observe(lambda _: self.refresh(), "value")

    def chosen(self, answer: ClusterAnswer) -> tuple:
        names = tuple(layer.name for layer in answer.bank.layers)
        if self.layer.options != names:
            self.layer.options = names
        self.number.max = max(answer.bank.layer(self.layer.value).shape[0], 2)
        return self.layer.value, self.number.value

    def show_clustering(self, answer: ClusterAnswer) -> str:
        layer = answer.bank.layer(self.layer.value)
        number = min(self.number.value, layer.shape[0])
        before, after, lost = _details.one_filter(answer.bank, answer.clustering, layer.name, number - 1)
        shown = min(_KERNELS, len(before))
        alt = f"The first {shown} kernels of the filter: above as trained, below clustered, on one scale."
        self.picture.value = _svg.sheet(
            np.concatenate([before[:shown], after[:shown]]), alt, columns=shown,
            captions=["trained", *[""] * (shown - 1), "clustered", *[""] * (shown - 1)],
        )  # fmt: skip
        return (
            f"Filter {number} of {layer.shape[0]:,} loses {lost:.1f} % of its squared weight. "
            f"The first {shown} of its {len(before):,} kernels, on one scale:"
        )


class _Accuracy(Panel):
    """What is known of accuracy, stored and measured here; a button that measures, and one that cancels."""

    def __init__(self, explorer: ClusterExplorer):
        super().__init__(explorer)
        self.is_seen, self._rows = False, ()
        most = len(explorer.images)
        self.images = Number("test images", min(1000, most), most)
        self.images.entry.layout.max_width = "160px"
        self.start = widgets.Button(description="Evaluate accuracy", button_style="primary", tooltip="")
        self.stop = widgets.Button(
            description="Cancel", disabled=True, tooltip="", layout=widgets.Layout(width="70px")
        )
        self.bar = widgets.FloatProgress(
            max=1.0, description="done", style=_controls.AS_LONG, tooltip="",
            layout=widgets.Layout(width="120px"),
        )  # fmt: skip
        self.table, self.picture = canvas("rows"), canvas("accuracy")
        row = widgets.HBox(
            [self.images.box, self.start, self.stop, self.bar], layout=widgets.Layout(flex_flow="row wrap")
        )
        self.box = _column(self.picture, row, self.status, self.table)
        self.start.on_click(lambda _: self._evaluate())
        self.stop.on_click(lambda _: explorer.cancel())

    def _evaluate(self) -> None:
        if not self.images.is_wrong:
            self.ask(self.explorer.evaluate, self.images.value)

    def show(self) -> None:
        running, rows = self.explorer.running, self.explorer.rows
        self.start.disabled, self.stop.disabled = running is not None, running is None
        self.bar.value = running.share if running else 0.0
        self.bar.layout.display = "flex" if running else "none"
        self.status.value = note(self._said())
        if rows is not self._rows:
            self._rows = rows
            self.table.value = _controls.table([_row(row) for row in reversed(rows)])
        if self.is_seen:
            self.picture.value = self._chart()

    def _chart(self) -> str:
        known, rows = self.explorer.known(), self.explorer.rows
        dense = [row["top1"] for row in rows if row["scope"] == "dense"][-1:]
        dense = dense or known.top1[known.k == 0].tolist() or [None]
        stored = known[known.k > 0]
        points = [
            _svg.Point(row.bytes_removed, row.top1, f"stored: K = {row.k:,}, {row.top1:.2f} %")
            for row in stored.itertuples()
        ]
        measured = [
            _svg.Point(row["bytes_removed"], row["top1"], f"measured: K = {row['k']:,}, {row['top1']:.2f} %")
            for row in rows
            if row["scope"] != "dense"
        ]
        here = self._here(stored)
        alt = f"Accuracy against bytes removed: {len(points)} stored and {len(measured)} measured here"
        alt += f"; the dot of what is shown now is {here.says}." if here else "; nothing is known at this K."
        return _svg.accuracy_chart(alt, dense=dense[0], stored=points, measured=measured, here=here)

    def _here(self, stored) -> _svg.Point | None:
        """Return the place of what is asked for on the curve of what is stored, where that reaches."""
        k, ks = self.explorer.question.n_clusters, stored.k.tolist()
        if not ks or not ks[0] <= k <= ks[-1]:
            return None
        top1 = float(np.interp(math.log(k), np.log(ks), stored.top1))
        ends = ks[max(0, bisect_left(ks, k) - 1)], ks[bisect_left(ks, k)]
        where = f"stored at K = {k:,}" if k in ks else f"between K = {ends[0]:,} and {ends[1]:,}"
        return _svg.Point(self.explorer.bytes_removed(self.explorer.question), top1, f"{top1:.1f} %, {where}")

    def _said(self) -> str:
        running = self.explorer.running
        if running:
            left = running.seconds_left
            time_left = "" if math.isnan(left) else f", about {tqdm.format_interval(left)} left"
            return (
                f"K = {running.question.n_clusters:,} on {running.n_images:,} images: "
                f"{running.share:.0%}{time_left}"
            )
        known = [self.explorer.evaluation_status] if self.explorer.evaluation_status else []
        here = self._here(self.explorer.known().query("k > 0"))
        if here:
            known.append(f"of stored runs: {here.says}")
        if self.explorer.evaluated is None:
            return "; ".join(known) if known else "accuracy of what is shown: not evaluated yet"
        row = self.explorer.rows[-1]
        top1 = f"{row['top1']:.2f} %"
        if self.explorer.accuracy_is_stale:
            which = f"K = {row['k']:,} ({row['layers']}, {SCOPES[row['codebook']]}, {row['distance']})"
            known.append(f"stale: {top1} top-1 is that of {which}, not of what is shown now")
        else:
            known.append(f"top-1 of what is shown: {top1}")
        return "; ".join(known)


def _row(row: Mapping) -> dict[str, str]:
    """Return a row of evaluations as its reader wants it: what matters comes first."""
    dense = row["scope"] == "dense"
    return {
        "K": "dense model" if dense else f"{row['k']:,}",
        "drop (points)": f"{row['drop']:.2f} [{row['drop_low']:.2f}, {row['drop_high']:.2f}]",
        "top-1 (%)": f"{row['top1']:.2f} [{row['top1_low']:.2f}, {row['top1_high']:.2f}]",
        "convolution bytes removed (%)": f"{row['bytes_removed']:.2f}",
        "kernels removed (%)": f"{row['kernels_removed']:.3f}",
        "test images": f"{row['images']:,}",
        "layers": "" if dense else row["layers"],
        "codebook": "" if dense else SCOPES[row["codebook"]],
        "distance": row["distance"],
    }


def _slider(description: str) -> widgets.IntSlider:
    return widgets.IntSlider(
        value=1, min=1, max=2, description=description, style=_controls.AS_LONG, readout=False, tooltip="",
        layout=widgets.Layout(width="auto", max_width="420px"),
    )  # fmt: skip


def _grows(least: str) -> widgets.Layout:
    return widgets.Layout(flex=f"1 1 {least}", min_width="0")


def _column(*children: widgets.Widget, grows: str = "") -> widgets.VBox:
    return widgets.VBox(children, layout=_grows(grows) if grows else widgets.Layout(min_width="0"))
