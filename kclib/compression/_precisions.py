"""How few bytes weights take: the precisions they are stored in, there and back."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from kclib import models
from kclib._util import checks
from kclib.clustering import Clustering
from kclib.compression import _entropy_coding, _packing
from kclib.compression._layers import ClusteredConv2d
from kclib.errors import DamagedFileError, InvalidValueError
from kclib.kernels import _convolutions, _copying
from kclib.kmeans import _entropy

_FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_BITS = {"int8": 8, "int4": 4}  # of whole numbers
PRECISIONS = (*_FLOATS, *_BITS)


def float_type(precision: str) -> torch.dtype:
    """Return the floating type that goes with a precision: of its values, or of what scales whole numbers."""
    checks.check_known("precision", precision, PRECISIONS)
    return _FLOATS.get(precision, torch.bfloat16)


def scale_type(precision: str) -> torch.dtype:
    """Return the floating type of the kernels' scales beside a codebook of a precision."""
    return float_type("fp16" if precision in _BITS else precision)


def of_dtype(dtype: torch.dtype) -> str:
    """Return the name of the precision that a network's weights have; float64 ones are kept as float32."""
    return {value: name for name, value in _FLOATS.items()}.get(dtype, "fp32")


def named(name: str) -> torch.dtype:
    """Return one of these floating types by torch's name for it (``float16``); a `LookupError` if none."""
    return {str(kind).removeprefix("torch."): kind for kind in (*_FLOATS.values(), torch.float64)}[name]


def codebook_bytes(n: int, area: int, precision: str) -> int:
    """Return the bytes of n representatives of `area` weights, rounded up to a whole byte."""
    itemsize = float_type(precision).itemsize
    if precision in _BITS:
        return _packing.index_bytes(n * area, _BITS[precision]) + n * itemsize
    return n * area * itemsize


def stored(made: Clustering, precision: str) -> Clustering:
    """Return a clustering with its codebooks as they come back from `store`."""
    books = [rounded(torch.from_numpy(group.codebook), precision).numpy() for group in made.groups]
    groups = (replace(group, codebook=book) for group, book in zip(made.groups, books, strict=True))
    return replace(made, groups=tuple(groups))


def store(values: Tensor, precision: str) -> dict[str, Tensor]:
    """Return a codebook, or another weight with a representative for each row, as it is stored.

    int8 and int4 are symmetric, with a scale for each representative so that the weak ones keep their shape:
    a row's largest magnitude is 127 or 7 times its scale (Jacob et al. 2018, *Quantization and Training of
    Neural Networks for Efficient Integer-Arithmetic-Only Inference*, equation 1, zero point 0). The scale is
    a bfloat16, whose range is float32's.

    Parameters
    ----------
    values : torch.Tensor
        Floating ``(K, ...)``.
    precision : {"fp32", "fp16", "bf16", "int8", "int4"}

    Returns
    -------
    dict of str to torch.Tensor
        ``values`` ``(K, ...)``, int8 for int8 and int4; and, for these, ``steps`` bfloat16 ``(K,)``;
        contiguous and on the CPU. Stored again after `restore`, they are the same to the bit.

    Raises
    ------
    InvalidValueError, UnknownNameError
        Values beyond what the precision holds; an unknown precision.
    """
    kind = float_type(precision)
    values = values.detach().to("cpu").contiguous()
    if precision not in _BITS:
        return {"values": checked(values.to(kind), precision)}
    most = _most(precision)
    values = checked(values.float(), precision)
    rows = values.flatten(1)
    steps = (rows.abs().amax(1) / most).to(kind)
    steps = torch.where(steps < torch.finfo(kind).tiny, 0, steps)  # subnormal: too few bits for a scale
    divisor = torch.where(steps > 0, steps, 1).float()
    whole = (rows / divisor[:, None]).round().clamp(-most, most).to(torch.int8)
    return {"values": whole.reshape(values.shape), "steps": steps}


def restore(stored: Mapping[str, Tensor]) -> Tensor:
    """Return what was stored, float32 where it was whole numbers, otherwise in its own type."""
    values = stored["values"]
    if values.dtype != torch.int8:
        return values
    return values.float() * stored["steps"].float().reshape(-1, *[1] * (values.dim() - 1))


def rounded(values: Tensor, precision: str) -> Tensor:
    """Return a codebook ``(K, ...)`` as a file of that precision gives it back, in its own type and place."""
    return restore(store(values, precision)).to(values)


def pack(stored: Mapping[str, Tensor], precision: str) -> dict[str, Tensor]:
    """Return what is stored as a file holds it: int4 values in uint8 ``(ceil(n / 2),)``, two a byte."""
    if precision != "int4":
        return dict(stored)
    halves = stored["values"].flatten().numpy() & 15
    return dict(stored) | {"values": torch.from_numpy(_packing.pack(halves, 4))}


def coded(stored: Mapping[str, Tensor], precision: str) -> dict[str, Tensor]:
    """Return whole numbers entropy-coded where that takes fewer bytes than `pack`, else what `pack` returns.

    Returns
    -------
    dict of str to torch.Tensor
        Entropy-coded: ``values``, the coder's words, and ``frequencies``, their table, both uint8 ``(m,)``;
        and ``steps``.
    """
    packed = pack(stored, precision)
    if precision not in _BITS:
        return packed
    symbols = stored["values"].flatten().numpy().astype(np.int32) + _most(precision)
    frequencies = _entropy.counts(symbols, 2 * _most(precision) + 1)
    words, table = _entropy_coding.encode(symbols, frequencies), _entropy_coding.packed_counts(frequencies)
    if words.nbytes + table.nbytes >= packed["values"].nbytes:
        return packed
    parts = {"values": words.view(np.uint8), "frequencies": table}
    return dict(stored) | {part: torch.from_numpy(value.copy()) for part, value in parts.items()}


def unpack(stored: Mapping[str, Tensor], precision: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Return what was stored from what `pack` or `coded` made of it; its shape is known from elsewhere.

    Raises
    ------
    DamagedFileError, UnknownNameError
        It has not as many values as the shape; an unknown precision.
    """
    float_type(precision)
    values, n = stored["values"], int(np.prod(shape))
    if "frequencies" in stored:
        return {"values": _decoded(stored, precision, n).reshape(shape), "steps": stored["steps"]}
    if precision != "int4":
        return dict(stored)
    if values.dtype != torch.uint8 or values.shape != (_packing.index_bytes(n, 4),):
        raise DamagedFileError(f"int4 weights of shape {tuple(shape)} are not stored in {-(-n // 2)} bytes.")
    signed = (_packing.unpack(values, 4, 0, n) ^ 8) - 8
    return dict(stored) | {"values": signed.to(torch.int8).reshape(shape)}


def checked(values: Tensor, precision: str) -> Tensor:
    """Return values that a precision holds."""
    if not np.isfinite(values.float().numpy()).all():
        raise InvalidValueError(
            f"a codebook, its scales or another weight has values that are no finite {precision}; "
            "use fp32 or bf16."
        )
    return values


def quantize(
    network: models.Model | nn.Module, *, linear: str | None = "int8", biases: str | None = "fp16"
) -> models.Model | nn.Module:
    """Return a copy whose linear layers and biases are rounded to fewer bytes, and stored in these.

    They are so small in a file. While it runs, the network computes with dense weights of the rounded values,
    in its own floating type: it takes no less memory.

    How a parameter is stored is kept beside it, in its module's attribute ``stored_as``, a mapping of its
    name to its precision, which copies keep and `_checkpoint.save` reads. `_replacement.compress` rounds
    codebooks by itself: compress first. Batch norms and all else stay as they are.

    Parameters
    ----------
    network : torch.nn.Module
        Compressed or not; what is rounded must be float32.
    linear : {"fp32", "fp16", "bf16", "int8", "int4"}, optional
        Of the weights of linear layers; int8 and int4 have a scale for each output, as in `store`. A weight
        that is computed from others, by weight norm for example, stays as it is.
    biases : {"fp32", "fp16", "bf16"}, optional
        Of the biases, and other parameters ``(n,)``, of linear layers and convolutions.

    Raises
    ------
    InvalidValueError, UnknownNameError
        Parameters of another type, or beyond what the precision holds; an unknown precision.
    """
    _roundable(models.network_of(network), linear, biases)
    result, wanted = _copying.copied(models.network_of(network)), {}
    for _, value, precision in _chosen(result, linear, biases):
        with torch.no_grad():
            value.copy_(rounded(value, precision))
        wanted[id(value)] = precision
    mark(result, wanted)
    return models.like(network, result)


def precisions(network: nn.Module) -> dict[int, str]:
    """Return what `quantize` noted of a network's parameters, by their ``id``."""
    return {
        id(module._parameters[name]): precision
        for module in network.modules()
        for name, precision in getattr(module, "stored_as", {}).items()
    }


def mark(network: nn.Module, wanted: Mapping[int, str]) -> None:
    """Note, in place, how parameters are stored, by their ``id``, wherever each is used."""
    for module in network.modules():
        marks = {name: wanted[id(x)] for name, x in module._parameters.items() if id(x) in wanted}
        if marks:
            module.stored_as = getattr(module, "stored_as", {}) | marks


def _roundable(
    network: nn.Module, linear: str | None, biases: str | None
) -> list[tuple[str, nn.Parameter, str]]:
    """Return what `_chosen` does, once it can be rounded."""
    if linear is not None:
        checks.check_known("precision of linear layers", linear, PRECISIONS)
    if biases is not None:
        checks.check_known("precision of biases", biases, _FLOATS)
    result = _chosen(network, linear, biases)
    for name, value, _ in result:
        if value.dtype != torch.float32:
            raise InvalidValueError(f"{name} is {value.dtype}; call .float() on the network first.")
    return result


def _chosen(
    network: nn.Module, linear: str | None, biases: str | None
) -> list[tuple[str, nn.Parameter, str]]:
    """Return the parameters to be rounded, each once, with their names and precisions."""
    chosen = {}
    for owner, module in network.named_modules():
        if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, ClusteredConv2d)):
            continue
        for name, value in module.named_parameters(prefix=owner, recurse=False):
            if isinstance(value, nn.parameter.UninitializedTensorMixin):
                raise InvalidValueError(f"{name} has no shape yet (lazy); run the network once first.")
            if isinstance(module, nn.Linear) and value is module.weight:
                chosen[id(value)] = (name, value, linear)
            elif value.dim() == 1 and value is not getattr(module, "scales", None):
                chosen[id(value)] = (name, value, biases)
    return [each for each in chosen.values() if each[2] is not None and each[1].numel()]


def linear_weights(network: nn.Module) -> dict[int, Tensor]:
    """Return the weights of linear layers, or what they are computed from, each once, by their ``id``."""
    linear = (module for module in network.modules() if isinstance(module, nn.Linear))
    values = (value for module in linear for value in _convolutions.parameters(module))
    return {id(value): value for value in values if isinstance(value, nn.Parameter)}


def linear_bytes(network: nn.Module, precision: str, *, entropy_coded: bool) -> int:
    """Return the bytes of a network's linear weights, rounded to a precision, in a file.

    Raises
    ------
    InvalidValueError, UnknownNameError
        As `quantize`.
    """
    rounded_ids = {id(value) for _, value, _ in _roundable(network, precision, None)}
    total = 0
    for key, value in linear_weights(network).items():
        parts = {"values": value}
        if key in rounded_ids:
            parts = (coded if entropy_coded else pack)(store(value, precision), precision)
        total += sum(part.nbytes for part in parts.values())
    return total


def _most(precision: str) -> int:
    """Return the largest whole number of a precision."""
    return 2 ** (_BITS[precision] - 1) - 1


def _decoded(stored: Mapping[str, Tensor], precision: str, n: int) -> Tensor:
    """Return n entropy-coded whole numbers, int8 ``(n,)``."""
    if precision not in _BITS:
        raise DamagedFileError(f"{precision} weights are entropy-coded; only whole numbers are.")
    most = _most(precision)
    frequencies = _entropy_coding.unpacked_counts(stored["frequencies"].numpy(), 2 * most + 1)
    if frequencies.sum() != n:
        raise DamagedFileError(f"{n} entropy-coded weights have a table of {frequencies.sum()}.")
    symbols = _entropy_coding.decode(stored["values"].numpy().view(np.uint32), frequencies, n)
    return torch.from_numpy((symbols - most).astype(np.int8))
