"""How few bytes a codebook's values take: the precisions it is stored in, there and back."""

import numpy as np
import torch
from torch import Tensor

from kclib.errors import InvalidValueError, UnknownNameError

_FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = (*_FLOATS, "int8")


def float_type(precision: str) -> torch.dtype:
    """Return the floating type that goes with a precision: that of its values, or of what scales int8.

    Raises
    ------
    UnknownNameError
    """
    if precision not in PRECISIONS:
        raise UnknownNameError("precision", precision, PRECISIONS)
    return _FLOATS.get(precision, torch.bfloat16)


def scale_type(precision: str) -> torch.dtype:
    """Return the floating type of the kernels' scales beside a codebook of a precision."""
    return float_type("fp16" if precision == "int8" else precision)


def own(dtype: torch.dtype) -> str:
    """Return the name of the precision that a network's weights have."""
    return {value: name for name, value in _FLOATS.items()}[dtype]


def named(name: str) -> torch.dtype:
    """Return one of these floating types by torch's name for it (``float16``); a `LookupError` if none."""
    return {str(kind).removeprefix("torch."): kind for kind in _FLOATS.values()}[name]


def row_bytes(area: int, precision: str) -> int:
    """Return the bytes of one representative of `area` weights."""
    itemsize = float_type(precision).itemsize
    return area + itemsize if precision == "int8" else area * itemsize


def store(values: Tensor, precision: str) -> dict[str, Tensor]:
    """Return a codebook as it is stored.

    int8 is symmetric, with a scale for each representative so that the weak ones keep their shape: a row's
    largest magnitude is 127 times its scale (Jacob et al. 2018, *Quantization and Training of Neural Networks
    for Efficient Integer-Arithmetic-Only Inference*, equation 1, zero point 0). The scale is a bfloat16,
    whose range is float32's.

    Parameters
    ----------
    values : torch.Tensor
        Floating ``(K, ...)``.
    precision : {"fp32", "fp16", "bf16", "int8"}

    Returns
    -------
    dict of str to torch.Tensor
        ``values`` ``(K, ...)`` and, for int8, ``steps`` bfloat16 ``(K,)``; contiguous and on the CPU. Stored
        again after `restore`, they are the same to the bit.

    Raises
    ------
    InvalidValueError, UnknownNameError
        Values beyond what the precision holds; an unknown precision.
    """
    kind = float_type(precision)
    values = values.detach().to("cpu").contiguous()
    if precision != "int8":
        return {"values": checked(values.to(kind), precision)}
    values = checked(values.float(), precision)
    rows = values.flatten(1)
    steps = (rows.abs().amax(1) / 127).to(kind)
    steps = torch.where(steps < torch.finfo(kind).tiny, 0, steps)  # subnormal: too few bits for a scale
    divisor = torch.where(steps > 0, steps, 1).float()
    whole = (rows / divisor[:, None]).round().clamp(-127, 127).to(torch.int8)
    return {"values": whole.reshape(values.shape), "steps": steps}


def restore(stored: dict[str, Tensor]) -> Tensor:
    """Return the codebook that was stored, float32 where it was int8, otherwise in its own type."""
    values = stored["values"]
    if values.dtype != torch.int8:
        return values
    return values.float() * stored["steps"].float().reshape(-1, *[1] * (values.dim() - 1))


def rounded(values: Tensor, precision: str) -> Tensor:
    """Return a codebook ``(K, ...)`` as a file of that precision gives it back, in its own type and place."""
    return restore(store(values, precision)).to(values)


def checked(values: Tensor, precision: str) -> Tensor:
    """Return values that a precision holds.

    Raises
    ------
    InvalidValueError
    """
    if not np.isfinite(values.float().numpy()).all():
        raise InvalidValueError(
            f"the codebook or its scales have values that are no finite {precision}; use fp32 or bf16."
        )
    return values
