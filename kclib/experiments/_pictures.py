"""The pictures of a notebook that a batch runs: sharp, and with a text for readers who do not see them."""

import matplotlib.pyplot as plt
from IPython import get_ipython
from IPython.core import pylabtools
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# What the process of a notebook runs before the first cell.
ENABLE = "from kclib.experiments import _pictures; _pictures.enable()"


def enable() -> None:
    """Make this process show figures at twice the dots, with what they show as alternative text."""
    plt.switch_backend("inline")  # which sets a formatter of its own when it is first used
    get_ipython().display_formatter.formatters["image/png"].for_type(Figure, _png)


def described(figure: Figure) -> str:
    """Return what a figure shows: its titles and, where an axes has them, what is against what."""
    title = figure.get_suptitle()
    shown = [text for ax in figure.axes if (text := _described(ax))]
    return "; ".join(dict.fromkeys(filter(None, (title, *shown)))).replace("\n", " ")


def _described(ax: Axes) -> str:
    x, y = ax.get_xlabel(), ax.get_ylabel()
    against = f"{y} against {x}" if x and y else x or y
    return ": ".join(filter(None, (ax.get_title(), against)))


def _png(figure: Figure) -> tuple[str, dict] | None:
    """Return a figure as PNG with what a page needs to know of it; an empty one shows nothing."""
    made = pylabtools.retina_figure(figure, base64=True)
    if made is None:
        return None
    png, about = made
    alt = described(figure)
    return png, about | ({"alt": alt} if alt else {})
