"""Arguments checked: what cannot work is one sentence that says what a value is and what it must be."""

import math
import textwrap
from collections.abc import Callable, Iterable
from numbers import Integral, Real

import numpy as np
import pandas as pd
import torch

from kclib.errors import InvalidValueError, UnknownNameError, reason


def is_real(value: object) -> bool:
    """Tell whether a value is a finite number, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> bool:
    """Tell whether a value is a whole number, numpy's too, and no truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def said(value: object) -> str:
    """Return a value as a sentence has it: as Python writes it, in one line that is not long."""
    return textwrap.shorten(repr(value), 60, placeholder=" ...")


def check_real(name: str, value: float, right: Callable[[float], bool], must: str) -> float:
    """Return a number; InvalidValueError, which says what it must be, unless it is finite and right."""
    if not (is_real(value) and right(value)):
        raise InvalidValueError(f"{name} is {said(value)}; it must be {must}.")
    return value


def check_whole(name: str, value: int, least: int, most: float = math.inf, of: str = "") -> int:
    """Return a whole number, numpy's too, as Python's; InvalidValueError if it is none in a range.

    `of` says what the largest is, such as "the kernels of the layer", or the unit.
    """
    if not is_whole(value) or not least <= value <= most:
        limits = f"at least {least}" if most == math.inf else f"{least} to {most}"
        limits += f", {of}" if of else ""
        raise InvalidValueError(f"{name} is {said(value)}; it must be a whole number, {limits}.")
    return int(value)


def check_seed(seed: int) -> int:
    """Return a seed, for numpy as for torch, as Python's number; InvalidValueError if it is none."""
    return check_whole("seed", seed, 0, 2**32 - 1)


def several(name: str, values: Iterable) -> list:
    """Return several values as a list; raise an `InvalidValueError` for text, whose parts are letters."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise InvalidValueError(f"{name} is {said(values)}; it must be a list of them.")
    return list(values)


def check_share(name: str, value: float) -> None:
    """Raise an `InvalidValueError` unless a value is a number at least 0 and below 1."""
    check_real(name, value, lambda x: 0 <= x < 1, "a share, at least 0 and below 1")


def check_known(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise an `UnknownNameError` unless a name is known."""
    if not isinstance(name, str) or name not in known:
        raise UnknownNameError(kind, name, known)


def check_columns(table: pd.DataFrame, names: Iterable[str]) -> None:
    """Raise an `InvalidValueError` unless a table has these columns."""
    if missing := [name for name in names if name not in table]:
        raise InvalidValueError(f"the table has no column {missing[0]!r}; it needs {', '.join(names)}.")


def check_device(device: str | torch.device) -> None:
    """Raise an `InvalidValueError` unless torch has such a device here, or it is ``meta``."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch says which in many ways
        raise InvalidValueError(
            f"device {str(device)!r} cannot be used here ({reason(error)}); cpu always can."
        ) from error


def check_values(device: str | torch.device) -> None:
    """Raise an `InvalidValueError` unless torch has such a device here, and it holds values."""
    check_device(device)
    if torch.device(device).type == "meta":
        raise InvalidValueError("device 'meta' holds no values; cpu always does.")


def array(values: object) -> object:
    """Return a tensor, a table or the points of a kernel bank as an array, and anything else as it is."""
    if torch.is_tensor(values):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    if isinstance(values, (pd.DataFrame, pd.Series)):
        return values.to_numpy()
    return getattr(values, "points", values)


def floats(name: str, values) -> np.ndarray:
    """Return numbers as contiguous float32, too large ones infinite; InvalidValueError if they are none."""
    try:
        values = array(values)
        if np.ma.is_masked(values):
            raise ValueError("some are masked")
        found = np.asarray(values)
        if found.dtype.kind not in "biuf":
            raise ValueError(f"they are {found.dtype}")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidValueError(f"{name} must be an array of real numbers ({reason(error)}).") from error
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(found, dtype=np.float32)


def points(name: str, values, width: int | None = None) -> np.ndarray:
    """Return finite float32 ``(n, d)``, contiguous; raise an `InvalidValueError` if they are none."""
    result = floats(name, values)
    if result.ndim != 2 or result.shape[1] != (width or result.shape[1]) or not (width or result.size):
        raise InvalidValueError(f"{name} have shape {result.shape}; it must be (n, {width or 'd'}).")
    if not np.isfinite(result).all():
        raise InvalidValueError(f"{name} hold NaN or infinity; they must be finite.")
    return result
