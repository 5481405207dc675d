"""The controls and panels that views of explorers are made of.

Pictures are HTML, not image widgets, which have no alternative text, and not output areas: in batch a client
that fills output areas can miss the kernel's reply and wait for ever (nbclient issue 312).
"""

import base64
import html
import io
import math
import re
import threading
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation

import ipywidgets as widgets
import pandas as pd
from matplotlib.figure import Figure

from kclib.errors import InvalidValueError, KclibError
from kclib.explorers._background import Explorer

_STEPS = 8  # of the slider, each time that K doubles
_UNITS = {"k": 3, "m": 6}  # powers of ten
_THOUSANDS = re.compile(r"(?<=\d)[,_ ](?=\d{3}(?!\d))")
_SHARP = 2  # pixels of a picture for each of the page's
_LABELS = {"description_width": "90px"}
AS_LONG = {"description_width": "initial"}
_CELLS = "padding: 1px 8px; text-align: right; vertical-align: bottom; line-height: 1.4"
_TABLE = [{"selector": "td", "props": _CELLS + "; white-space: nowrap"}, {"selector": "th", "props": _CELLS}]


class Number:
    """A whole number that is typed. What it cannot be is said beside it, and stays until it is mended.

    Parameters
    ----------
    name : str
        Its label, and what the sentence is about.
    value, most : int
        What it is now, and at most; it is at least 1.
    description : str, optional
        The label, where it says more than the name.
    """

    def __init__(self, name: str, value: int, most: int, *, description: str = ""):
        self.name, self.value, self.most, self.is_wrong = name, value, most, False
        self.entry = widgets.Text(
            value=f"{value:,}", description=description or name, continuous_update=False, style=AS_LONG,
            tooltip="", layout=widgets.Layout(width="auto", max_width="220px", flex="0 1 auto"),
        )  # fmt: skip
        self.said = said("")
        self.box = widgets.HBox([self.entry, self.said], layout=widgets.Layout(flex_flow="row wrap"))
        self.entry.observe(lambda change: self._read(change.new), "value")

    def show(self, value: int, most: int) -> None:
        """Show another number."""
        self.most, self.entry.value = most, f"{value:,}"
        self._read(self.entry.value)

    def observe(self, call: Callable[[int], None]) -> None:
        """Have a function called with each number that is typed."""

        def changed(_) -> None:
            if not self.is_wrong:
                call(self.value)

        self.entry.observe(changed, "value")

    def _read(self, text: str) -> None:
        """Take what is typed, or say what is wrong with it."""
        wrong = ""
        try:
            self.value = whole(self.name, text, self.most)
        except InvalidValueError as error:
            wrong = str(error)
        self.is_wrong, self.said.value = bool(wrong), note(wrong)


def whole(name: str, text: str, most: int) -> int:
    """Return the whole number from 1 to `most` that a text says: ``1e4``, ``10,000``, ``10_000`` or ``10k``.

    Raises
    ------
    InvalidValueError
        It says no such number.
    """
    plain = _THOUSANDS.sub("", text.strip().lower())
    power = _UNITS.get(plain[-1:], 0)
    try:
        number = Decimal(plain[:-1] if power else plain)
        if not number.is_finite():
            raise InvalidOperation
    except InvalidOperation:
        raise InvalidValueError(f"{text.strip()!r} is no number: {name} is 1 to {most:,}.") from None
    if not Decimal(1).scaleb(-power) <= number <= Decimal(most).scaleb(-power):
        raise InvalidValueError(f"{name} is 1 to {most:,}.")
    if (number := number.scaleb(power)) != number.to_integral_value():
        raise InvalidValueError(f"{text.strip()} is no whole number: {name} is 1 to {most:,}.")
    return int(number)


class ClusterCount:
    """A number of clusters: a slider in equal ratios and an entry; either follows the other.

    Parameters
    ----------
    description : str
        Of the slider.
    largest : int
    live : bool
        Whether the slider asks while it moves, not only when it is let go.
    """

    def __init__(self, description: str, largest: int, *, live: bool = False):
        self.slider = widgets.FloatLogSlider(
            base=2, min=0, max=max(math.log2(largest), 1 / _STEPS), step=1 / _STEPS, readout=False,
            description=description, continuous_update=live, style=AS_LONG, tooltip="",
            layout=widgets.Layout(width="auto"),
        )  # fmt: skip
        self.number, self._placed = Number("K", 1, largest), 1
        self.box = widgets.VBox([self.slider, self.number.box])

    def show(self, value: int, largest: int) -> None:
        """Show another K."""
        self.slider.max = max(math.log2(largest), 1 / _STEPS)
        self.number.show(value, largest)
        if round(self.slider.value) != value:
            # On a step: a browser would move it to one, and ask for that.
            step = math.floor(math.log2(value) * _STEPS) / _STEPS
            self.slider.value = value if value == largest else 2**step
        self._placed = round(self.slider.value)

    def observe(self, call: Callable[[int], None]) -> None:
        """Have a function called with each K that is chosen."""

        def moved(change) -> None:
            if round(change.new) != self._placed:
                self._placed = round(change.new)
                call(min(self._placed, self.number.most))

        self.slider.observe(moved, "value")
        self.number.observe(call)


class Control:
    """A widget whose value is the question's, or a tuple of it."""

    def __init__(self, box: widgets.Widget):
        self.box = box

    def show(self, value, largest: int) -> None:
        """Show another value."""
        self.box.value = value

    def observe(self, call: Callable) -> None:
        """Have a function called with each value that is chosen."""
        self.box.observe(lambda change: call(change.new), "value")


def layers(explorer) -> Control:
    """Return the choice of one or more layers."""
    names = [layer.name for layer in explorer.bank.layers]
    box = widgets.SelectMultiple(
        options=names, value=explorer.question.layers, rows=min(5, len(names)), tooltip="",
        description="layers", style=AS_LONG, layout=widgets.Layout(width="auto", flex="0 1 210px"),
    )  # fmt: skip
    return Control(box)


def choice(description: str, options: Mapping[str, str]) -> Control:
    """Return the choice of one of a few named values."""
    box = widgets.Dropdown(
        options=list(options.items()), description=description, style=_LABELS, tooltip="",
        layout=widgets.Layout(width="auto", max_width="420px"),
    )  # fmt: skip
    return Control(box)


class Panel:
    """What shows an explorer, in full and again whenever the explorer changes."""

    def __init__(self, explorer: Explorer):
        self.explorer, self._lock = explorer, threading.RLock()
        self.status = said("")
        self.status.add_class("kclib-status")

    def listen(self) -> None:
        """Show what there is, and again whenever the explorer changes."""
        self.refresh()
        self.explorer.listeners.append(self.refresh)

    def refresh(self) -> None:
        """Show what the explorer has now."""
        with self._lock:
            self.show()

    def show(self) -> None:
        """Show it; called by one thread at a time."""
        raise NotImplementedError

    def ask(self, call: Callable, *arguments, **options) -> None:
        """Call what may find fault with a question, and say so."""
        try:
            call(*arguments, **options)
        except KclibError as error:
            self.status.value = note(str(error))


class View(Panel):
    """Controls that ask, and follow what is asked.

    Parameters
    ----------
    explorer : Explorer
    controls : mapping of str to Control or ClusterCount
        By the field of the question.
    """

    def __init__(self, explorer: Explorer, controls: Mapping[str, Control | ClusterCount]):
        super().__init__(explorer)
        self.controls, self._asked, self._shown, self._showing = controls, None, None, None
        if explorer.answer is None:
            explorer.show()

    def listen(self) -> None:
        """Show what there is, and from now on ask what is chosen."""
        super().listen()
        for name, control in self.controls.items():
            control.observe(lambda value, name=name: self.choose(name, value))

    def choose(self, name: str, value) -> None:
        """Ask another question, if a person has chosen it."""
        if self._showing == threading.get_ident():
            return  # a control that is shown another question is moved by no person
        if getattr(self.explorer.question, name) != value:
            self.ask(self.explorer.choose, **{name: value})

    def show(self) -> None:
        """Show the question, what is under way, and the answer where it is another."""
        question, answer = self.explorer.question, self.explorer.answer
        if question is not self._asked:  # never while a person may be moving them for another question
            self._asked, self._showing = question, threading.get_ident()
            try:
                for name, control in self.controls.items():
                    control.show(getattr(question, name), self.explorer.largest)
            finally:
                self._showing = None
        self.status.value = note(self.explorer.status)
        if answer is not self._shown:
            self._shown = answer
            self.show_answer(answer)

    def show_answer(self, answer) -> None:
        """Show another answer."""
        raise NotImplementedError


def said(text: str) -> widgets.HTML:
    """Return a line that says something, also to those who do not see it change."""
    return widgets.HTML(value=note(text), tooltip="")


def canvas(name: str) -> widgets.HTML:
    """Return the place of a picture or a table, by whose name a page finds it."""
    place = widgets.HTML(tooltip="")
    place.add_class(f"kclib-{name}")
    return place


def note(text: str) -> str:
    """Return a sentence as HTML."""
    return f"<span role='status'>{html.escape(text) or '&nbsp;'}</span>"


def facts(answer) -> str:
    """Return the numbers of an answer in one line, which wraps."""
    pairs = (
        f"<span style='white-space: nowrap'>{html.escape(name)} <b>{html.escape(value)}</b></span>"
        for name, value in answer.facts.items()
    )
    style = "display: flex; flex-wrap: wrap; gap: 0 18px; line-height: 1.5"
    return f"<div style='{style}'>{''.join(pairs)}</div>"


def table(rows: list[Mapping[str, str]]) -> str:
    """Return rows as an HTML table with a head."""
    if not rows:
        return ""
    return pd.DataFrame(rows).style.hide().format(escape="html").set_table_styles(_TABLE).to_html()


def image(figure: Figure) -> str:
    """Return a figure as an HTML image: its titles and the labels of its axes are its alternative text."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100 * _SHARP)
    data = base64.b64encode(picture.getvalue()).decode()
    words = [figure.get_suptitle()]
    for ax in figure.axes:
        words += [ax.get_title(), " against ".join(filter(None, (ax.get_ylabel(), ax.get_xlabel())))]
    alt = html.escape("; ".join(filter(None, words)))
    width = round(100 * figure.get_figwidth())
    return f'<img alt="{alt}" width="{width}" style="max-width: 100%" src="data:image/png;base64,{data}">'
