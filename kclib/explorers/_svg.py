"""Pictures as SVG, written straight from arrays: quick, sharp on every screen, and said in words.

They take a millisecond where a figure takes a third of a second, so they can follow a slider. Each is an
element for an HTML widget whose ``aria-label`` is its alternative text. Words have the colour of the page.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

_LEVELS = 101  # of colour, from the most negative through white to the most positive; odd, so that 0 is white
_COLOURS = [to_hex(colour) for colour in colormaps["RdBu_r"](np.linspace(0, 1, _LEVELS))]
_TEXT = "font-family: var(--jp-ui-font-family, sans-serif); fill: var(--jp-ui-font-color1, currentColor)"
_GREY, _BLUE, _ORANGE = "#8a8a8a", "#0072b2", "#d55e00"  # the last two of Okabe and Ito 2008
_LARGEST = 1.4  # times its size in pixels, where there is room
_CELL, _GAP, _CAPTION = 30, 8, 13  # pixels: a kernel's longer side, between kernels, under a kernel


def sheet(
    kernels: np.ndarray,
    alt: str,
    *,
    captions: Sequence[str] = (),
    hints: Sequence[str] = (),
    columns: int = 12,
    own_scale: bool = False,
    marked: int | None = None,
) -> str:
    """Draw kernels row by row; blue is negative, white zero, red positive.

    Parameters
    ----------
    kernels : numpy.ndarray
        ``(m, kh, kw)``.
    alt : str
        Says what there is to see.
    captions : sequence of str
        Written under each kernel; none, or one each.
    hints : sequence of str
        Shown of a kernel that is pointed at; none, or one each.
    columns : int
    own_scale : bool
        Whether each kernel is scaled to its own largest absolute weight, not to that of all.
    marked : int, optional
        The kernel that gets a thick frame.
    """
    m, height, width = kernels.shape
    side = _CELL / max(height, width)
    across, down = _CELL + _GAP, side * height + _GAP + (_CAPTION if len(captions) else 0)
    lefts = _GAP / 2 + across * (np.arange(m) % columns) + (_CELL - side * width) / 2
    tops = _GAP / 2 + down * (np.arange(m) // columns)
    squares = _squares(_levels(kernels, own_scale=own_scale), lefts, tops, side)
    frame = f"h{side * width:.1f}v{side * height:.1f}h{-side * width:.1f}z"
    frames = "".join(f"M{x:.1f} {y:.1f}{frame}" for x, y in zip(lefts, tops, strict=True))
    parts = ['<g shape-rendering="crispEdges">', *squares, "</g>"]
    parts.append(f'<path d="{frames}" fill="none" stroke="#999" stroke-width="0.7"/>')
    if marked is not None:
        corner = f"M{lefts[marked]:.1f} {tops[marked]:.1f}"
        parts.append(f'<path d="{corner}{frame}" fill="none" stroke="{_ORANGE}" stroke-width="3"/>')
    below = side * height + _CAPTION - 3
    for x, y, caption in zip(lefts, tops, captions, strict=False):
        parts.append(_text(x + side * width / 2, y + below, caption, size=10, anchor="middle"))
    for x, y, hint in zip(lefts, tops, hints, strict=False):
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{side * width:.1f}" height="{down - _GAP:.1f}" '
            f'fill="transparent"><title>{html.escape(hint)}</title></rect>'
        )
    return _svg(across * min(columns, m), down * -(-m // columns), alt, parts)


@dataclass(frozen=True)
class Point:
    """A place on a chart of accuracy: percent of the bytes removed, percent right, and what it is."""

    removed: float
    top1: float
    says: str


def accuracy_chart(
    alt: str,
    *,
    dense: float | None,
    stored: Sequence[Point] = (),
    measured: Sequence[Point] = (),
    here: Point | None = None,
    width: int = 440,
    height: int = 210,
) -> str:
    """Draw accuracy against bytes removed: a grey curve of what is stored, and a dot that lies on it.

    Parameters
    ----------
    alt : str
    dense : float, optional
        Accuracy of the dense model, a dashed line.
    stored : sequence of Point
        The curve, in order of K.
    measured : sequence of Point
        Diamonds: what was evaluated here.
    here : Point, optional
        The dot.
    width, height : int
    """
    left, right, top, bottom = 38, width - 8, 8, height - 32
    kept = [100 - p.removed for p in (*stored, *measured, *([here] if here else []))]
    low, high = min([*kept, 50]) / 1.15, max([*kept, 50]) * 1.15

    def place(p: Point) -> tuple[float, float]:
        along = math.log(high / (100 - p.removed)) / math.log(high / low)
        return left + along * (right - left), bottom - p.top1 / 100 * (bottom - top)

    parts = [f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="{_GREY}"/>']
    for percent in range(0, 101, 20):
        y = bottom - percent / 100 * (bottom - top)
        parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="{_GREY}" stroke-opacity="0.25"/>')
        parts.append(_text(left - 4, y + 4, str(percent), size=10, anchor="end"))
    for tick in (x * 10.0**e for e in range(2, -4, -1) for x in (5, 2, 1)):
        if low <= tick <= high and tick <= 100:
            x, _ = place(Point(100 - tick, 0, ""))
            parts.append(f'<path d="M{x:.1f} {bottom}v4" stroke="{_GREY}"/>')
            parts.append(_text(x, bottom + 14, f"{100 - tick:g}", size=10, anchor="middle"))
    middle = (left + right) / 2
    parts.append(_text(middle, height - 4, "convolution bytes removed (%)", size=11, anchor="middle"))
    parts.append(_text(left + 4, bottom - 6, "top-1 accuracy (%)", size=11))
    if dense is not None:
        _, y = place(Point(50, dense, ""))
        parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="{_GREY}" stroke-dasharray="5 4"/>')
    if stored:
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in map(place, stored))
        parts.append(f'<path d="M{line}" fill="none" stroke="{_GREY}" stroke-width="2"/>')
    for p in stored:
        parts.append(_mark("<circle cx='{0:.1f}' cy='{1:.1f}' r='2.5'", place(p), _GREY, p.says))
    for p in measured:
        x, y = place(p)
        diamond = f"<path d='M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z'"
        parts.append(_mark(diamond, (x, y), _BLUE, p.says))
    if here:
        parts.append(_mark("<circle cx='{0:.1f}' cy='{1:.1f}' r='6'", place(here), _ORANGE, here.says))
    return _svg(width, height, alt, parts)


def bars(values: Mapping[str, float], alt: str, *, width: int = 440) -> str:
    """Draw percentages as bars, one below the other, each with its name and number."""
    most, row, left = max([*values.values(), 1e-9]), 17, 130
    parts = []
    for i, (name, value) in enumerate(values.items()):
        long = (width - left - 60) * value / most
        parts.append(_text(left - 6, row * i + 12, name, size=11, anchor="end"))
        parts.append(
            f'<rect x="{left}" y="{row * i + 2}" width="{long:.1f}" height="{row - 5}" fill="{_BLUE}"/>'
        )
        parts.append(_text(left + long + 5, row * i + 12, f"{value:.1f} %", size=11))
    return _svg(width, row * len(values) + 2, alt, parts)


def _levels(kernels: np.ndarray, *, own_scale: bool) -> np.ndarray:
    """Return the colour of each weight, int ``(m, kh, kw)``."""
    largest = np.abs(kernels).max(axis=(1, 2) if own_scale else None, keepdims=True)
    scaled = kernels / np.where(largest > 0, largest, 1)
    return np.rint((scaled + 1) / 2 * (_LEVELS - 1)).astype(int)


def _squares(levels: np.ndarray, lefts: np.ndarray, tops: np.ndarray, side: float) -> Iterable[str]:
    """Return one path a colour: a browser draws a hundred paths sooner than thousands of squares."""
    _, height, width = levels.shape
    xs = np.broadcast_to((lefts[:, None, None] + side * np.arange(width)), levels.shape).ravel().tolist()
    ys = np.broadcast_to(tops[:, None, None] + side * np.arange(height)[:, None], levels.shape).ravel()
    by_level: dict[int, list[str]] = {}
    for level, x, y in zip(levels.ravel().tolist(), xs, ys.tolist(), strict=True):
        by_level.setdefault(level, []).append(f"M{x:.1f} {y:.1f}h{side:.2f}v{side:.2f}h-{side:.2f}z")
    for level, d in by_level.items():
        yield f'<path fill="{_COLOURS[level]}" d="{"".join(d)}"/>'


def _mark(shape: str, place: tuple[float, float], colour: str, says: str) -> str:
    opened = shape.format(*place)
    name = opened[1:].split()[0]
    return f"{opened} fill='{colour}'><title>{html.escape(says)}</title></{name}>"


def _text(x: float, y: float, text: str, *, size: int, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{html.escape(text)}</text>'
    )


def _svg(width: float, height: float, alt: str, parts: Iterable[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{html.escape(alt)}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" style="display: block; width: 100%; '
        f'max-width: {_LARGEST * width:.0f}px; {_TEXT}">{"".join(parts)}</svg>'
    )
