import base64
import html
import io
import json
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from bokeh.models import (
    ColorBar,
    CustomJS,
    DataTable,
    HoverTool,
    LassoSelectTool,
    LogColorMapper,
    Plot,
    Select,
)
from PIL import Image
from torch import nn

from kclib import plots
from kclib.errors import InvalidValueError
from kclib.explorers import interactive_map
from kclib.kernels import KernelBank, Layer, extract

DRAW = np.random.default_rng(0)


@pytest.fixture(scope="module")
def bank():
    torch.manual_seed(0)
    return extract(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 3)))


def made(bank, n=None, *, clusters=None, **options):
    rows = DRAW.permutation(len(bank))[:n]
    layout = DRAW.normal(size=(len(rows), 2)).astype(np.float32)
    return interactive_map.interactive(layout, bank, rows, clusters=clusters or {}, **options), layout, rows


def the(document, kind, **attributes):
    """Return the one model of a kind."""
    (found,) = document.select({"type": kind, **attributes})
    return found


def dots_of(document):
    (dots,) = the(document, Plot).renderers
    return dots


def points_of(document):
    return dots_of(document).data_source.data


def colours_of(document):
    return the(document, CustomJS).args["colours"]


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))


def bank_of(kernels, *counts):
    """Return a bank of layers ``layer 0``, ``layer 1``, ... with so many kernels each."""
    starts = np.cumsum([0, *counts])
    names = [f"layer {i}" for i in range(len(counts))]
    layers = tuple(
        Layer(name, (count, 1, *kernels.shape[1:]), int(start))
        for name, count, start in zip(names, counts, starts, strict=False)
    )
    return KernelBank(kernels, layers, {})


def test_points_carry_their_kernels_to_the_bit_and_where_they_come_from(bank):
    labels = DRAW.integers(0, 5, 50)
    document, layout, rows = made(bank, 50, clusters={"K = 5": labels})
    data, origin = points_of(document), bank.origin(rows)
    assert data["weights"].dtype == np.float32
    np.testing.assert_array_equal(data["weights"], bank.kernels[rows])
    np.testing.assert_array_equal(np.column_stack([data["x"], data["y"]]), layout)
    assert data["layer"] == origin["layer"].tolist()
    assert data["out"].tolist() == origin["out"].tolist()
    assert data["in"].tolist() == origin["in"].tolist()
    assert [bank.layers[i].name for i in data["depth"]] == data["layer"]
    assert data["cluster 0"].tolist() == labels.tolist()
    np.testing.assert_allclose(data["norm"], np.sqrt((bank.kernels[rows] ** 2).sum((1, 2))), rtol=1e-6)


def test_arguments_stay_as_they_are(bank):
    rows, labels = np.arange(len(bank)), np.zeros(len(bank), int)
    layout = DRAW.normal(size=(len(bank), 2)).astype(np.float32)
    kept = [part.copy() for part in (rows, labels, layout)]
    interactive_map.interactive(layout, bank, rows, clusters={"one": labels})
    for before, after in zip(kept, (rows, labels, layout), strict=True):
        np.testing.assert_array_equal(before, after)


def test_picture_is_one_pixel_a_weight_from_blue_over_white_to_red():
    first, nothing = map(pixels, interactive_map._pictures(np.array([[[-2.0, 0, 2]], [[0, 0, 0]]])))
    assert first[0, [0, 2]].tolist() == [[5, 48, 97], [103, 0, 31]]  # the ends of ColorBrewer's RdBu
    assert first.shape == nothing.shape == (1, 3, 3)
    assert first[0, 1].min() > 0.95 * 255
    assert (nothing == first[0, 1]).all()


def test_pictures_are_those_of_the_kernel_sheet(bank):
    kernels = bank.kernels[:7, :, :2]
    drawn = plt.figure().gca()
    for kernel, picture in zip(kernels, interactive_map._pictures(kernels), strict=True):
        (image,) = plots.kernel_sheet(kernel[None], columns=1, ax=drawn).images[-1:]
        sheet = image.cmap(image.norm(image.get_array()), bytes=True)[:3, :2, :3]
        np.testing.assert_array_equal(pixels(picture), sheet)


def test_hovering_and_the_lasso_work_from_the_start(bank):
    document, _, _ = made(bank, title="Kernels of a network")
    plot = the(document, Plot)
    assert plot.title.text == "Kernels of a network"
    assert [axis.axis_label for axis in (*plot.below, *plot.left)] == ["UMAP 1", "UMAP 2"]
    assert plot.match_aspect
    assert isinstance(plot.toolbar.active_drag, LassoSelectTool)
    assert plot.toolbar.active_inspect == "auto"
    kinds = {type(tool).__name__ for tool in plot.toolbar.tools}
    assert kinds == {
        "PanTool", "WheelZoomTool", "BoxSelectTool", "LassoSelectTool", "TapTool", "HoverTool", "ResetTool",
    }  # fmt: skip


def test_tooltip_shows_the_kernel_and_says_all_that_is_known_of_it(bank):
    labels = np.zeros(len(bank), int)
    document, _, _ = made(bank, clusters={"K = 1": labels, "<b> & co": labels})
    tooltip = the(document, HoverTool).tooltips
    assert '<img width="72" src="data:image/png;base64,@picture"' in tooltip
    assert "image-rendering: pixelated" in tooltip
    fields = re.findall(r"@\{?([\w ]+\w|\w+)", re.sub("<[^>]+>", " ; ", tooltip))
    assert fields == ["layer", "out", "in", "norm", "cluster 0", "cluster 1"]
    assert set(fields) < set(points_of(document))
    assert "K = 1: cluster" in tooltip
    assert "&lt;b&gt; &amp; co: cluster" in tooltip


def test_colour_is_chosen_by_name_in_a_labelled_list(bank):
    labels = np.zeros(len(bank), int)
    document, _, _ = made(bank, clusters={"K = 16": labels, "layer": labels})
    select = the(document, Select)
    assert select.title == "Colour by"
    assert [label for _, label in select.options] == ["layer", "norm", "K = 16", "layer"]
    choices = [choice for choice, _ in select.options]
    assert select.value == choices[0]
    assert list(colours_of(document)) == choices
    assert len(set(choices)) == 4
    glyph = dots_of(document).glyph
    assert glyph.fill_color == colours_of(document)["layer"]


def test_without_clusterings_the_table_has_no_clusters(bank):
    without, some = (
        [one.title for one in the(made(bank, clusters=clusters)[0], DataTable).columns]
        for clusters in ({}, {"K = 1": np.zeros(len(bank), int)})
    )
    assert without == ["kernel", "layer", "filter", "channel", "norm"]
    assert some == [*without, "cluster"]


def test_each_cluster_has_its_colour_and_twenty_of_them_differ(bank):
    labels = DRAW.permutation(np.arange(len(bank)) % 30) - 1
    document, _, _ = made(bank, clusters={"K = 30": labels})
    mapper = colours_of(document)["cluster 0"].transform
    assert (mapper.low, mapper.high, len(mapper.palette)) == (-1.5, 28.5, 30)
    assert len(set(mapper.palette[:20])) == 20
    assert mapper.palette[20:] == mapper.palette[:10]


def test_bar_of_layers_names_them_in_the_banks_order_and_only_some_of_many():
    for n in (3, 40):
        bank = bank_of(DRAW.normal(size=(2 * n, 3, 3)).astype(np.float32), *[2] * n)
        bar = the(made(bank)[0], ColorBar, title="layer")
        assert len(bar.color_mapper.palette) == n
        assert (bar.color_mapper.low, bar.color_mapper.high) == (-0.5, n - 0.5)
        assert bar.ticker.ticks == sorted(bar.major_label_overrides)
        assert len(bar.ticker.ticks) == min(n, 16)
        assert {0, n - 1} < set(bar.ticker.ticks)
        assert all(name == f"layer {i}" for i, name in bar.major_label_overrides.items())


def test_bar_of_norms_is_logarithmic_and_has_ticks_in_weight_units():
    kernels = np.zeros((101, 1, 1), np.float32)
    kernels[:, 0, 0] = np.logspace(-3, 1, 101)
    document, _, _ = made(bank_of(kernels, 101))
    bar = the(document, ColorBar, title="kernel norm (weight units)")
    assert not bar.visible
    assert isinstance(bar.color_mapper, LogColorMapper)
    assert bar.color_mapper is colours_of(document)["norm"].transform
    np.testing.assert_allclose(bar.color_mapper.low, 0.99 * 10**-2.96, rtol=1e-5)
    np.testing.assert_allclose(bar.color_mapper.high, 1.01 * 10**0.96, rtol=1e-5)
    inside = [tick for tick in bar.ticker.ticks if bar.color_mapper.low <= tick <= bar.color_mapper.high]
    assert len(inside) >= 4
    assert {0.01, 0.1, 1.0} <= set(np.round(inside, 9))


@pytest.mark.parametrize("weight", [0.0, 1.0, 1e-20])
def test_kernels_of_one_norm_still_have_a_scale(weight):
    document, _, _ = made(bank_of(np.full((4, 1, 1), weight, np.float32), 4))
    mapper = colours_of(document)["norm"].transform
    assert 0 < mapper.low < mapper.high < np.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": np.zeros((7, 2))}, r"layout has shape \(7, 2\); it must be \(8, 2\)"),
        ({"layout": np.zeros((8, 3))}, r"layout has shape \(8, 3\)"),
        ({"layout": np.full((8, 2), np.nan)}, "finite"),
        ({"rows": np.arange(7)}, r"it must be \(7, 2\)"),
        ({"rows": np.arange(8) + 1_000}, "rows must be whole numbers .* 0 to"),
        ({"rows": np.arange(0)}, "at least one"),
        ({"clusters": {"K = 2": np.zeros(9, int)}}, "'K = 2' has int64 labels of shape .* 8 integers"),
        ({"clusters": {"K = 2": np.zeros(8)}}, "'K = 2' has float64 labels"),
    ],
)
def test_what_does_not_fit_together_is_refused(bank, change, message):
    given = {"layout": np.zeros((8, 2)), "rows": np.arange(8), "clusters": {}} | change
    with pytest.raises(InvalidValueError, match=message):
        interactive_map.interactive(given.pop("layout"), bank, given.pop("rows"), **given)


class Parsed(HTMLParser):
    """The tags of a page with their attributes, the text of its scripts and of everything else."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.scripts, self.rest, self.inside = [], [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.inside = tag
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        (self.scripts if self.inside == "script" else self.rest).append(data)


def framed(document, **options):
    """Return a document's page inside its frame, and the frame's own attributes."""
    outside = Parsed(interactive_map.embedded(document, **options).data)
    assert [tag for tag, _ in outside.tags] == ["div", "iframe"]
    assert not "".join(outside.rest).strip()
    return outside.tags[1][1].pop("srcdoc"), outside.tags[1][1]


def test_frame_holds_a_whole_page_and_says_what_it_is(bank):
    page, frame = framed(made(bank)[0], height=700, title='"Map" of <kernels> & more')
    assert (frame["height"], frame["title"]) == ("700", '"Map" of <kernels> & more')
    assert "width:100%" in frame["style"]
    assert page.lstrip().startswith("<!DOCTYPE html>")
    assert page.rstrip().endswith("</html>")
    assert "<title>" + html.escape('"Map" of <kernels> & more') in page.replace("&#34;", "&quot;")


def test_page_carries_all_it_needs_and_fetches_nothing(bank):
    page, _ = framed(made(bank)[0], title="map")
    parsed = Parsed(page)
    assert not [tag for tag, of in parsed.tags if {"src", "href", "srcset", "data"} & set(of)]
    assert not re.search(r"https?://|@import", "".join(parsed.rest))
    assert 1e6 < sum(map(len, parsed.scripts)) < 2.5e6  # BokehJS, but no MathJax, which is 1.8 MB


def test_names_with_markup_and_quotes_arrive_as_they_are(bank):
    name = '</script> it\'s "K" & &amp; <b>'
    page, _ = framed(made(bank, clusters={name: np.zeros(len(bank), int)})[0], title="map")
    (state,) = (text for text in Parsed(page).scripts if text.lstrip().startswith('{"'))
    document = json.loads(html.unescape(state))
    assert ["cluster 0", name] in find_options(document)


def find_options(node):
    """Return the options of the first Select in a serialised document."""
    if isinstance(node, dict) and node.get("name") == "Select":
        return node["attributes"]["options"]
    parts = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return next(filter(None, map(find_options, parts)), None)


def test_a_map_of_five_thousand_kernels_takes_less_than_four_megabytes():
    kernels = DRAW.normal(size=(5_200, 3, 3)).astype(np.float32)
    labels = DRAW.integers(0, 64, len(kernels))
    document, _, _ = made(bank_of(kernels, 2_600, 2_600), clusters={"K = 64": labels, "K = 16": labels % 16})
    assert len(interactive_map.embedded(document, title="map").data.encode()) < 4e6


def test_points_are_smaller_where_there_are_more(bank):
    few = made(bank)[0]
    many = made(bank_of(np.ones((20_000, 1, 1), np.float32), 20_000))[0]
    assert (dots_of(few).glyph.size, dots_of(many).glyph.size) == (10, 3)
