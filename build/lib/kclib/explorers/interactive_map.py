"""Interactive maps of kernels (bokeh), which live in the browser alone: no Python kernel, no network."""

import base64
import html
import io
from collections.abc import Mapping
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from bokeh import models
from bokeh.core.property.vectorization import Field
from bokeh.embed import file_html
from bokeh.layouts import column, row
from bokeh.palettes import Category20_20, viridis
from bokeh.plotting import figure
from bokeh.resources import INLINE
from bokeh.transform import linear_cmap, log_cmap
from IPython.display import HTML
from matplotlib import colormaps
from matplotlib.ticker import LogLocator
from PIL import Image

from kclib.errors import InvalidValueError
from kclib.kernels import KernelBank

_WEIGHTS = colormaps["RdBu_r"]  # as in plots.kernel_sheet
PALETTE = _WEIGHTS(np.arange(256), bytes=True)[:, :3]  # uint8 (256, 3), from negative to positive


def pictures(kernels: np.ndarray) -> list[str]:
    """Return kernels as PNGs in base64, one pixel a weight, blue to white to red.

    Parameters
    ----------
    kernels : numpy.ndarray
        ``(n, kh, kw)``; each is scaled to its own largest absolute weight, as `plots.kernel_sheet` does.
    """
    scale = np.abs(kernels).max(axis=(1, 2), keepdims=True)
    scaled = kernels / np.where(scale > 0, scale, 1)
    pixels = _WEIGHTS((scaled + 1) / 2, bytes=True)[..., :3]
    return [_png(np.ascontiguousarray(image)) for image in pixels]


def _png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


_PNG = "data:image/png;base64,"  # not kept with each of thousands of pictures
_IMG = '<img width="{0}" src="' + _PNG + '{1}" style="image-rendering: pixelated; border: 1px solid #bbb">'
_SHOWN = 200
_TABLE = 390  # pixels wide
_LABELLED_LAYERS = 16
_HELP = f"""<p style="margin: 0"><b>Draw a lasso around points</b>, or click one, to see here which kernels
they are and what their mean looks like. Hold shift to add more. Hover over a point for its kernel.
Ctrl and the wheel, or a pinch, zoom.</p><p>In each picture blue is negative, white 0 and red positive, up to
the kernel's own largest absolute weight. The table holds at most {_SHOWN} kernels.</p>"""


def interactive(
    layout: np.ndarray,
    bank: KernelBank,
    rows: np.ndarray,
    *,
    clusters: Mapping[str, np.ndarray],
    title: str = "",
) -> models.LayoutDOM:
    """Return a map whose points show their kernels, and a table and the mean of those that are selected.

    The mean kernel is that of the weights as they are, not of shapes. How alike the kernels are is the mean,
    over those that are not all zero, of each one's cosine to the mean kernel.

    Parameters
    ----------
    layout : numpy.ndarray
        float32 ``(n, 2)``, finite: where the kernels lie, as `embedding.layout` returns it.
    bank : KernelBank
    rows : numpy.ndarray
        int ``(n,)``: rows of the bank, one a point.
    clusters : mapping of str to numpy.ndarray
        Clusterings to colour by, by the name that readers see: int ``(n,)`` labels each. May be empty.
    title : str
        Stands above the map.

    Raises
    ------
    InvalidValueError
        If there are no rows, rows are none of the bank's, lengths do not match, labels are no integers, or
        the layout is not finite.
    """
    layout, rows = np.asarray(layout, np.float32), np.asarray(rows)
    labels = {name: np.asarray(of) for name, of in clusters.items()}
    _check(layout, rows, labels)
    names = {f"cluster {i}": name for i, name in enumerate(labels)}
    source = models.ColumnDataSource(
        _columns(layout, bank, rows) | dict(zip(names, map(_narrow, labels.values()), strict=True))
    )
    colours = _colours(source, len(bank.layers), names)
    bars, notes = _bars(colours, bank), _notes(names)

    select = models.Select(
        title="Colour by", value="layer", width=150,
        options=[("layer", "layer"), ("norm", "norm"), *names.items()],
    )  # fmt: skip
    note = models.Div(text=notes["layer"], margin=(24, 5, 5, 5), sizing_mode="stretch_width")
    plot = _plot(source, colours["layer"], names, title)
    for bar in bars.values():
        plot.add_layout(bar, "right")
    summary = models.Div(text=_HELP, height=118, sizing_mode="stretch_width")
    table = _table(clustered=bool(names))

    (dots,) = plot.renderers
    update = models.CustomJS.from_file(
        Path(__file__).with_suffix(".js"), source=source, select=select,
        dots=dots, colours=colours, bars=bars, note=note, notes=notes,
        table=table, most=_SHOWN, clusterings=_escaped(names),
        summary=summary, help=_HELP, image=_IMG.format(96, "{picture}"),
        palette=PALETTE.tolist(),
    )  # fmt: skip
    source.selected.js_on_change("indices", update)
    select.js_on_change("value", update)
    return row(
        column(
            row(select, note, sizing_mode="stretch_width"), plot, sizing_mode="stretch_width", min_width=420
        ),
        column(summary, table, width=_TABLE),
        sizing_mode="stretch_width",
        styles={"flex-wrap": "wrap"},
    )


def embedded(document: models.LayoutDOM, *, height: int = 640, title: str) -> HTML:
    """Return a bokeh document as a frame for a notebook or a static page, which needs nothing from anywhere.

    Parameters
    ----------
    document : bokeh.models.LayoutDOM
    height : int
        Of the frame, in CSS pixels; its width is the page's.
    title : str
        Says what the frame holds, to those who do not see it.
    """
    page = file_html(document, INLINE, title)
    # Single quotes, for JSON and JavaScript are full of double ones, which would take six characters each.
    page = page.replace("&", "&amp;").replace("'", "&#39;")
    return HTML(
        f'<div><iframe title="{html.escape(title)}" height="{height}" '
        f"style=\"width:100%;border:0;background:#fff\" srcdoc='{page}'></iframe></div>"
    )


def _check(layout: np.ndarray, rows: np.ndarray, labels: Mapping[str, np.ndarray]) -> None:
    if rows.ndim != 1 or not len(rows):
        raise InvalidValueError(f"rows have shape {rows.shape}; a map needs a line of at least one.")
    if layout.shape != (len(rows), 2) or not np.isfinite(layout).all():
        raise InvalidValueError(
            f"the layout has shape {layout.shape}; it must be ({len(rows)}, 2), a place a row, and finite."
        )
    for name, of in labels.items():
        if of.shape != rows.shape or not np.issubdtype(of.dtype, np.integer):
            raise InvalidValueError(
                f"clustering {name!r} has {of.dtype} labels of shape {of.shape}; "
                f"it must have {len(rows)} integers, one a row."
            )


def _columns(layout: np.ndarray, bank: KernelBank, rows: np.ndarray) -> dict[str, np.ndarray | list[str]]:
    """Return what is known of each point but its clusters."""
    origin, weights = bank.origin(rows), bank.weights[rows]
    starts = [layer.start for layer in bank.layers]
    return {
        "x": layout[:, 0],
        "y": layout[:, 1],
        "weights": weights,
        "picture": pictures(weights),
        "norm": np.linalg.norm(weights, axis=(1, 2)),
        "layer": origin["layer"].to_list(),
        "depth": _narrow(np.searchsorted(starts, rows, side="right") - 1),
        "out": _narrow(origin["out"].to_numpy()),
        "in": _narrow(origin["in"].to_numpy()),
    }


def _narrow(numbers: np.ndarray) -> np.ndarray:
    """Return integers as browsers know them."""
    return numbers.astype(np.int32)


def _colours(source: models.ColumnDataSource, n_layers: int, names: Mapping[str, str]) -> dict[str, Field]:
    """Return for each choice of colour the column it shows, and how."""
    norms = source.data["norm"]
    low, high = np.percentile(norms[norms > 0], (1, 99)) if norms.any() else (0.1, 1.0)
    colours = {
        "layer": linear_cmap("depth", viridis(min(n_layers, 256)), -0.5, n_layers - 0.5),
        # A hair wider, for where all norms are one.
        "norm": log_cmap("norm", viridis(256), 0.99 * low, 1.01 * high),
    }
    for key in names:
        first, last = int(source.data[key].min()), int(source.data[key].max())
        palette = list(islice(cycle(Category20_20), last - first + 1))
        colours[key] = linear_cmap(key, palette, first - 0.5, last + 0.5)
    return colours


def _bars(colours: Mapping[str, Field], bank: KernelBank) -> dict[str, models.ColorBar]:
    """Return the colour bars of layers, some of them named, and of norms, which is hidden at first."""
    n = len(bank.layers)
    named = np.unique(np.linspace(0, n - 1, min(n, _LABELLED_LAYERS)).round().astype(int)).tolist()
    layers = models.ColorBar(
        color_mapper=colours["layer"].transform, title="layer", ticker=models.FixedTicker(ticks=named),
        major_label_overrides={i: bank.layers[i].name for i in named},
    )  # fmt: skip
    scale = colours["norm"].transform
    ticks = LogLocator(subs=(1, 2, 5)).tick_values(scale.low, scale.high).tolist()
    norms = models.ColorBar(
        color_mapper=scale,
        title="kernel norm (weight units)",
        ticker=models.FixedTicker(ticks=ticks),
        visible=False,
    )
    return {"layer": layers, "norm": norms}


def _notes(names: Mapping[str, str]) -> dict[str, str]:
    """Return for each choice of colour a sentence that says what colours mean."""
    cluster = f"Each cluster has a colour; above {len(Category20_20)} of them, colours come again."
    return {
        "layer": "From the network's input (dark) to its output (light).",
        "norm": "On a log scale, from the 1st to the 99th percentile.",
    } | dict.fromkeys(names, cluster)


def _plot(source: models.ColumnDataSource, colour: Field, names: Mapping[str, str], title: str) -> figure:
    """Return the map alone, with its tools."""
    plot = figure(
        title=title, x_axis_label="UMAP 1", y_axis_label="UMAP 2", match_aspect=True, height=520,
        sizing_mode="stretch_width", min_border_right=125,
        tools="pan,box_select,tap,reset", toolbar_location="above",
    )  # fmt: skip
    dots = plot.scatter(
        "x", "y", source=source, size=float(np.clip(300 / np.sqrt(len(source.data["x"])), 3, 10)),
        fill_color=colour, fill_alpha=0.65, line_color=None, selection_fill_alpha=0.9,
        nonselection_fill_alpha=0.12, hover_fill_alpha=1, hover_line_color="black",
    )  # fmt: skip
    lasso = models.LassoSelectTool(continuous=False)
    wheel = models.WheelZoomTool(modifiers="ctrl")  # the wheel alone scrolls the page that the map is part of
    hover = models.HoverTool(
        renderers=[dots], tooltips=_tooltip(names), formatters={"@norm": "printf"}, limit=1
    )
    plot.add_tools(lasso, wheel, hover)
    plot.toolbar.active_drag, plot.toolbar.active_scroll = lasso, wheel
    plot.toolbar.logo = None
    plot.axis.ticker = []
    plot.grid.visible = False
    return plot


def _tooltip(names: Mapping[str, str]) -> str:
    lines = ["<b>@layer</b>", "filter @out, channel @in", "norm @norm{%.3g}"]
    lines += [f"{name}: cluster @{{{key}}}" for key, name in _escaped(names).items()]
    return (
        '<div style="display: flex; gap: 10px; align-items: center; font-size: 13px">'
        f"{_IMG.format(72, '@picture')}<div>{'<br>'.join(lines)}</div></div>"
    )


def _table(*, clustered: bool) -> models.DataTable:
    """Return the table of selected kernels, empty."""
    image = models.HTMLTemplateFormatter(template=_IMG.format(24, "<%= value %>"))
    digits = models.ScientificFormatter(precision=3, power_limit_low=-3, power_limit_high=4)
    columns = [
        models.TableColumn(field="picture", title="kernel", width=48, formatter=image, sortable=False),
        models.TableColumn(field="layer", title="layer", width=110),
        models.TableColumn(field="out", title="filter", width=48),
        models.TableColumn(field="in", title="channel", width=58),
        models.TableColumn(field="norm", title="norm", width=64, formatter=digits),
    ]
    if clustered:
        columns.append(models.TableColumn(field="cluster", title="cluster", width=60))
    return models.DataTable(
        source=models.ColumnDataSource({one.field: [] for one in columns}), columns=columns,
        index_position=None, selectable=False, reorderable=False, row_height=30, width=_TABLE, height=440,
    )  # fmt: skip


def _escaped(names: Mapping[str, str]) -> dict[str, str]:
    return {key: html.escape(name) for key, name in names.items()}
