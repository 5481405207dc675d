import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_hex

from kclib.explorers import _svg

SQUARE = re.compile(r"M([\d.]+) ([\d.]+)h([\d.]+)v")
KERNELS = np.array([[[-1, 0], [0, 1]], [[0, 0.5], [0.1, 0]]], np.float32)


def colours(drawing):
    """Return the colour of each square, by its place."""
    root = ElementTree.fromstring(drawing)
    group = root.find("{http://www.w3.org/2000/svg}g")
    return {
        (float(x), float(y)): path.get("fill") for path in group for x, y, _ in SQUARE.findall(path.get("d"))
    }


def rows(drawing):
    """Return colours in reading order."""
    found = colours(drawing)
    return [found[place] for place in sorted(found, key=lambda place: place[::-1])]


def shade(value):
    return to_hex(colormaps["RdBu_r"](np.linspace(0, 1, 101))[round(50 * (value + 1))])


def test_blue_is_negative_white_zero_and_red_positive_on_one_scale():
    expected = [shade(value) for value in (-1, 0, 0, 0.5, 0, 1, 0.1, 0)]
    assert rows(_svg.sheet(KERNELS, "two kernels")) == expected


def test_each_kernel_may_have_its_own_scale():
    expected = [shade(value) for value in (-1, 0, 0, 1, 0, 1, 0.2, 0)]
    assert rows(_svg.sheet(KERNELS, "two kernels", own_scale=True)) == expected


@pytest.mark.parametrize("columns", [1, 2])
def test_kernels_stand_in_rows(columns):
    places = list(colours(_svg.sheet(KERNELS, "two kernels", columns=columns)))
    xs, ys = (len({place[i] for place in places}) for i in (0, 1))
    assert (xs, ys) == ((2, 4), (4, 2))[columns - 1]


def test_kernels_of_zeros_are_white():
    assert set(rows(_svg.sheet(np.zeros((1, 1, 3), np.float32), "nothing"))) == {shade(0)}


def test_words_are_no_markup():
    drawing = _svg.sheet(KERNELS, '<b>"alt"', captions=["<1>", "2"], hints=["a & b", "c"])
    root = ElementTree.fromstring(drawing)
    assert root.get("aria-label") == '<b>"alt"'
    texts = [element.text for element in root.iter() if element.tag.endswith(("text", "title"))]
    assert texts == ["<1>", "2", "a & b", "c"]


def test_the_dot_lies_on_the_curve_and_more_bytes_removed_lie_further_right():
    stored = [_svg.Point(removed, top1, f"K {removed}") for removed, top1 in ((99, 20), (90, 80), (-5, 90))]
    drawing = _svg.accuracy_chart("a chart", dense=90.0, stored=stored, here=stored[1])
    root = ElementTree.fromstring(drawing)
    circles = [x for x in root.iter() if x.tag.endswith("circle")]
    *marks, dot = [(float(x.get("cx")), float(x.get("cy"))) for x in circles]
    assert dot == marks[1]
    assert marks[0][0] > marks[1][0] > marks[2][0]
    assert marks[0][1] > marks[1][1] > marks[2][1]


def test_bars_are_as_long_as_their_values():
    root = ElementTree.fromstring(_svg.bars({"one": 10.0, "two": 5.0}, "bars"))
    widths = [float(x.get("width")) for x in root.iter() if x.tag.endswith("rect")]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.2)
