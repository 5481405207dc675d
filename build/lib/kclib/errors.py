"""Typed exceptions: each carries one sentence that says what was wrong and what would be right."""

import difflib
import re
import sys
import textwrap
import traceback
from collections.abc import Iterable
from pathlib import Path

_LISTED = 240  # characters of known names; readers of more look them up
_NOT_THEIRS = {"torch", "kclib", "numpy", "PIL", *sys.stdlib_module_names} - {"__main__"}


class KclibError(Exception):
    """Base of every error this library raises on purpose."""

    def __str__(self) -> str:
        """Return the sentence, in one line also where a stranger's name in it would break or move lines."""
        return "".join(x if x.isprintable() else repr(x)[1:-1] for x in super().__str__())


class InvalidValueError(KclibError, ValueError):
    """An argument has a value that cannot work (K of 0, NaN weights, a wrong shape)."""


class MissingFileError(KclibError, FileNotFoundError):
    """A file or data set that is needed is not where it should be."""


class DamagedFileError(KclibError):
    """A file exists, but its content is not what it must be."""


class StorageError(KclibError, OSError):
    """A result could not be written (full disk, no permission)."""


class NotEnoughMemoryError(KclibError, MemoryError):
    """A computation would not fit into the memory that is free; the sentence says how much it takes."""


class MissingPackageError(KclibError, ImportError):
    """An optional package is not installed; the sentence says how to install it."""


class StoppedError(KclibError):
    """Work ended early because its caller said so."""


class FailedRunError(KclibError):
    """Part of a run failed; what was finished is kept, and the sentence says where."""


class NotebookError(FailedRunError):
    """Notebooks of a batch failed; the executed copies with their errors are kept."""


class SweepError(FailedRunError):
    """Cells of a sweep failed, or lost more than they may."""


class UnknownNameError(KclibError, LookupError):
    """A name that is in no table; the sentence gives the nearest known one, and lists them.

    Parameters
    ----------
    kind : str
        What was named ("model", "data set", "profile parameter").
    name : str
        The name that was given.
    known : iterable of str
        The names that would be right.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        known = list(known)
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        listed = textwrap.shorten(", ".join(known), _LISTED, placeholder=" and so on")
        super().__init__(f"unknown {kind} {name!r}{hint}; known: {listed}.")


def reason(error: BaseException | str) -> str:
    """Return what another library's error says as the end of a sentence: its first sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    sentence = re.split(r"\. (?=[A-Z])", lines[0])[0].rstrip(".: ")
    return textwrap.shorten(sentence, 160, placeholder=" ...")


def where(error: BaseException) -> str:
    """Return where other people's code raised an error, as `` in file.py, line 7``; nothing if none ran."""
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _NOT_THEIRS:
            path = Path(frame.f_code.co_filename)
            file = "a notebook cell" if "ipykernel" in str(path) else path.name
            found = f" in {file}, line {line}"
    return found
