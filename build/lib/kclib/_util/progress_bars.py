"""Progress bars, seen from two seconds on, with the time left; in a log file they are whole lines."""

import io
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import auto

from kclib._util import places

_EVERY = 30  # seconds between the lines of a bar in a log
_MOVES = re.compile(r"[\r\n]|\x1b\[[\d;]*[A-Za-z]")  # of the cursor
_CHILDREN = {"TQDM_MININTERVAL": str(_EVERY), "TQDM_MAXINTERVAL": str(_EVERY)}  # tqdm reads them on import
_readable = False  # whether bars are to print whole lines


class tqdm(auto.tqdm):
    """A progress bar as `tqdm.auto` has it, and in whole lines where `readable` asks for them."""

    def __init__(self, *args, **options):
        if len(args) < 5 and options.get("file") is None:  # the fifth is the file
            options |= as_lines(left=bool(options.get("leave", True)))
        super().__init__(*args, **options)


def as_lines(left: bool) -> dict[str, object]:
    """Return the options of any tqdm bar that draws as `readable` asks for; none outside of it.

    Parameters
    ----------
    left : bool
        Whether a short bar leaves its last state.
    """
    return {"file": _Lines(left), "leave": True, "position": 0} if _readable else {}  # moves no cursor


def of_shares(what: str, shown: bool) -> tqdm:
    """Return a progress bar that is told shares of the work, and is seen from two seconds on."""
    form = "{desc} {percentage:3.0f} %|{bar}| about {remaining} left"
    return tqdm(total=1.0, desc=what, delay=2, leave=False, disable=not shown, bar_format=form)


@contextmanager
def ticking(bar: tqdm) -> Iterator[None]:
    """Draw a bar anew each second in this block: what it waits for may end but once in minutes."""
    ended = threading.Event()

    def tick():
        while not ended.wait(1):
            bar.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def readable() -> Iterator[None]:
    """Let all bars of `kclib` print whole lines, one in 30 s, where ``sys.stderr`` is no terminal.

    A bar's last state is a line too, unless the bar would be cleared at its end and none of it was seen.
    Processes that are started meanwhile draw their bars as rarely. On a terminal nothing changes.
    """
    if sys.stderr.isatty():
        yield
        return
    global _readable
    before, _readable = _readable, True
    try:
        with places.environment({name: value for name, value in _CHILDREN.items() if name not in os.environ}):
            yield
    finally:
        _readable = before


class _Lines(io.TextIOBase):
    """What one bar draws on, as lines of ``sys.stderr``; `left` says whether a short bar leaves its end."""

    def __init__(self, left: bool):
        self.left, self.state, self.shown, self.printed = left, "", "", time.monotonic()

    @property
    def encoding(self) -> str:
        return getattr(sys.stderr, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        self.state = _MOVES.sub("", text).strip() or self.state
        due, ended = time.monotonic() >= self.printed + _EVERY, text == "\n"
        share = self.state.rpartition("|")[0] or self.state  # without times, which go on
        if share not in ("", self.shown) and (due or (ended and self.left)):
            sys.stderr.write(self.state + "\n")
            sys.stderr.flush()
            self.state, self.shown, self.left, self.printed = "", share, True, time.monotonic()
        return len(text)
