"""Typed exceptions: each carries one sentence that says what was wrong and what would be right."""

import difflib
from collections.abc import Iterable


class KclibError(Exception):
    """Base of every error this library raises on purpose."""


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


class StoppedError(KclibError):
    """Work ended early because its caller said so."""


class NotebookError(KclibError):
    """A notebook of a batch failed; the executed copy with its error is kept."""


class UnknownNameError(KclibError, LookupError):
    """A name that is in no table; the sentence lists the known ones and the nearest.

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
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        super().__init__(f"unknown {kind} {name!r}; known: {', '.join(known)}.{hint}")
