"""The 2D kernels of a network as one array, and back: `extract` and `insert` are inverse to the bit."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from torch import nn

from kclib._util import checks
from kclib.errors import InvalidValueError
from kclib.kernels import _convolutions
from kclib.kernels._convolutions import ALONE, form, set_weight
from kclib.kernels._copying import copied
from kclib.models import Model, like, network_of


@dataclass(frozen=True)
class Layer:
    """One convolution's place in a `KernelBank`.

    Attributes
    ----------
    name : str
        Module name in the network, as in ``named_modules()``.
    shape : tuple of int
        Shape of its weight as stored: ``(out, in / groups, kh, kw)``, and for a transposed
        convolution ``(in, out / groups, kh, kw)``.
    start : int
        Row of its first kernel in the bank.
    transposed : bool
    itemsize : int
        Bytes of one weight in the network (4 for float32, 2 for half precision).
    """

    name: str
    shape: tuple[int, int, int, int]
    start: int
    transposed: bool = False
    itemsize: int = 4

    @property
    def n_kernels(self) -> int:
        """Number of 2D kernels, the product of the first two axes."""
        return self.shape[0] * self.shape[1]

    @property
    def rows(self) -> slice:
        """Rows of the bank that hold this layer's kernels, in C order of the first two axes."""
        return slice(self.start, self.start + self.n_kernels)

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Return those rows of the bank, int ``(m,)``, that are this layer's kernels."""
        return rows[(rows >= self.rows.start) & (rows < self.rows.stop)]


def rows_of(layers: Iterable[Layer]) -> np.ndarray:
    """Return the rows of a bank that hold the kernels of some layers, int64 ``(n,)``, layer after layer."""
    return np.concatenate([np.empty(0, np.int64), *(np.arange(x.rows.start, x.rows.stop) for x in layers)])


@dataclass(frozen=True)
class KernelBank:
    """The kernels of one spatial size of a network.

    Attributes
    ----------
    kernels : numpy.ndarray
        float32 ``(n, kh, kw)``, read-only; rows in order of `layers`.
    layers : tuple of Layer
    left_out : mapping of str to str
        Every other convolution of the network by name, and why it is not here.

    Examples
    --------
    >>> import kclib, torch
    >>> bank = kclib.extract(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 16, 3)))
    >>> bank.origin([0, 1, 24])  # the first layer has 3 * 8 kernels
      layer  out  in
    0     0    0   0
    1     0    0   1
    2     1    0   0
    >>> len(bank.only("1"))
    128
    """

    kernels: np.ndarray
    layers: tuple[Layer, ...]
    left_out: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.kernels)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the kernels in pixels."""
        return self.kernels.shape[1:]

    @property
    def points(self) -> np.ndarray:
        """The kernels as float32 points ``(n, kh * kw)``, a view."""
        return self.kernels.reshape(len(self), -1)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the layers and the bytes of all kernels."""
        digest = hashlib.sha256(f"{self.layers} {self.kernels.shape}".encode())
        digest.update(np.ascontiguousarray(self.kernels))
        return digest.hexdigest()

    def layer(self, name: str) -> Layer:
        """Return the layer called `name`."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        known = ", ".join(layer.name for layer in self.layers)
        raise InvalidValueError(f"no layer {name!r} in this kernel bank; it has {known}.")

    def only(self, *names: str) -> "KernelBank":
        """Return the bank of some layers alone, in the order of this one."""
        wanted = {self.layer(name).name for name in names}
        if not wanted:
            raise InvalidValueError("no layer is named; name at least one.")
        if len(wanted) == len(self.layers):
            return self
        chosen = [layer for layer in self.layers if layer.name in wanted]
        starts = np.cumsum([0, *(layer.n_kernels for layer in chosen)]).tolist()
        kernels = self.kernels[rows_of(chosen)]
        kernels.flags.writeable = False
        layers = tuple(replace(x, start=start) for x, start in zip(chosen, starts, strict=False))
        return KernelBank(kernels, layers, {})

    def checked(self, rows: np.ndarray) -> np.ndarray:
        """Return rows as int64 ``(m,)``; raise an InvalidValueError if some are not in this bank."""
        rows = np.asarray(rows)
        rows = rows.astype(np.int64) if not rows.size else rows
        whole = rows.ndim == 1 and rows.dtype.kind in "iu"
        if not whole or (rows.size and not 0 <= rows.min() <= rows.max() < len(self)):
            raise InvalidValueError(
                f"rows must be whole numbers (m,), 0 to {len(self) - 1}, the kernels of this bank."
            )
        return rows.astype(np.int64)

    def origin(self, rows: np.ndarray) -> pd.DataFrame:
        """Return where kernels came from: columns ``layer``, ``out``, ``in`` for int ``(m,)`` rows.

        For a transposed convolution the stored first axis is ``in``. In a grouped convolution the
        second stored axis counts within the group.
        """
        rows = self.checked(rows)
        starts = np.array([layer.start for layer in self.layers])
        which = np.searchsorted(starts, rows, side="right") - 1
        second = np.array([layer.shape[1] for layer in self.layers])[which]
        first, second = np.divmod(rows - starts[which], second)
        swap = np.array([layer.transposed for layer in self.layers])[which]
        return pd.DataFrame(
            {
                "layer": np.array([layer.name for layer in self.layers], dtype=object)[which],
                "out": np.where(swap, second, first),
                "in": np.where(swap, first, second),
            }
        )


Kernels = KernelBank | Model | nn.Module  # what `bank_of` takes


def extract(network: Model | nn.Module, *, size: int | tuple[int, int] | None = None) -> KernelBank:
    """Take the 2D kernels of one spatial size out of a network.

    Parameters
    ----------
    network : Model or torch.nn.Module
        Unchanged. Grouped, depthwise, dilated, strided and transposed convolutions count as stored;
        a weight that several modules share counts once. Weights in float64 are rounded to float32; those
        behind weight norm, or a parametrization that can be written to, are what these compute.
    size : int or (int, int), optional
        Height and width of the kernels wanted; the size larger than 1×1 with the most kernels by
        default.

    Raises
    ------
    InvalidValueError
        If there are no such kernels, or weights are NaN, infinite, too large for float32, or not
        materialised.

    Examples
    --------
    >>> import kclib, torch
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 16, 1))
    >>> bank = kclib.extract(network)
    >>> bank.kernels.shape
    (24, 3, 3)
    >>> [layer.name for layer in bank.layers], bank.left_out
    (['0'], {'1': '1×1 kernels, not 3×3'})
    """
    network = network_of(network)
    convolutions, left_out = _convolutions.usable(network)
    chosen = _wanted_size(network, convolutions, left_out, size)
    layers, parts, start = [], [], 0
    for name, module in convolutions.items():
        shape, transposed = form(module)
        if shape[2:] != chosen:
            left_out[name] = f"{_times(shape[2:])} kernels, not {_times(chosen)}"
            continue
        parts.append(_rows(name, module))
        layers.append(Layer(name, shape, start, transposed, _convolutions.weight(module).element_size()))
        start += len(parts[-1])
    kernels = np.concatenate(parts)
    kernels.flags.writeable = False
    return KernelBank(kernels, tuple(layers), left_out)


def insert(network: Model | nn.Module, bank: KernelBank) -> Model | nn.Module:
    """Return a copy of `network` whose kernels are those of `bank`, in the network's own precision.

    Kernels that the bank has as `extract` gives them stay as they are to the bit, also in float64.

    Raises
    ------
    InvalidValueError
        If the bank does not come from a network of this architecture, or holds values that the network's
        precision does not.

    Examples
    --------
    >>> import dataclasses, kclib, torch
    >>> network = torch.nn.Conv2d(3, 8, 3)
    >>> bank = kclib.extract(network)
    >>> torch.equal(kclib.insert(network, bank).weight, network.weight)
    True
    >>> zeros = dataclasses.replace(bank, kernels=0 * bank.kernels)
    >>> kclib.insert(network, zeros).weight.count_nonzero()
    tensor(0)
    """
    if not isinstance(bank, KernelBank):
        raise InvalidValueError(f"the bank is a {type(bank).__name__}; it must be a KernelBank.")
    kernels = checks.floats("the kernels of the bank", bank.kernels)
    n_kernels = sum(layer.n_kernels for layer in bank.layers)
    if len(kernels) != n_kernels:
        raise InvalidValueError(f"the bank has {len(kernels)} kernels; its layers have {n_kernels}.")
    result = copied(network_of(network))
    for name, module in matched(result, bank.layers).items():
        rows, present = kernels[bank.layer(name).rows], _rows(name, module)
        if rows.shape != present.shape:
            raise InvalidValueError(
                f"the bank's kernels have shape {rows.shape[1:]}; "
                f"layer {name or ALONE} has {present.shape[1:]}."
            )
        changed = (rows.view(np.uint32) != present.view(np.uint32)).any(axis=(1, 2))
        if changed.any():
            set_weight(module, _changed(_convolutions.weight(module), rows, changed), name=name)
    return like(network, result)


def matched(network: Model | nn.Module, layers: Iterable[Layer]) -> dict[str, nn.Module]:
    """Return the network's own convolutions that `layers` describe, by name.

    Their weights may be float64 or computed (by weight norm): `set_weight` writes all of them alike.

    Raises
    ------
    InvalidValueError
        If the layers do not come from a network of this architecture.
    """
    network = network_of(network)
    convolutions, left_out = _convolutions.usable(network)
    for layer in layers:
        module = convolutions.get(layer.name)
        if module is not None and form(module) == (layer.shape, layer.transposed):
            continue
        was = f"layer {layer.name or ALONE} was a convolution of {_described(layer.shape, layer.transposed)}"
        if layer.name in left_out:
            raise InvalidValueError(f"{was}; in this network it is not taken ({left_out[layer.name]}).")
        has = "no such layer" if module is None else _described(*form(module))
        raise InvalidValueError(
            f"{was}, the network has {has}; use the architecture that the kernels were extracted from."
        )
    return {layer.name: convolutions[layer.name] for layer in layers}


def bank_of(given: Kernels) -> KernelBank:
    """Return a bank as it is, or the kernels of a network as `extract` takes them.

    Raises
    ------
    InvalidValueError
        It is neither, or `extract` refuses it.
    """
    if isinstance(given, KernelBank):
        return given
    if isinstance(given, (Model, nn.Module)):
        return extract(given)
    arrays = (np.ndarray, torch.Tensor, pd.DataFrame, list, tuple)
    advice = "; kmeans.fit clusters points (n, d) of any kind" if isinstance(given, arrays) else ""
    raise InvalidValueError(
        f"the kernels are a {type(given).__name__}; they must be a KernelBank (of kernels.extract), "
        f"a Model or a torch.nn.Module{advice}."
    )


def sample(bank: Kernels, per_layer: int, *, seed: int = 0) -> np.ndarray:
    """Return a stratified sample of rows: up to `per_layer` of each layer, without replacement, sorted.

    Raises
    ------
    InvalidValueError
        `per_layer` is below 1; an invalid seed.
    """
    bank = bank_of(bank)
    per_layer = checks.check_whole("per_layer", per_layer, 1)
    checks.check_seed(seed)
    draw = np.random.default_rng(seed)
    return np.concatenate(
        [
            layer.start
            + np.sort(draw.choice(layer.n_kernels, min(per_layer, layer.n_kernels), replace=False))
            for layer in bank.layers
        ]
    )


def _rows(name: str, module: nn.Module) -> np.ndarray:
    """Return a convolution's kernels, float32 ``(n, kh, kw)``."""
    weight = _convolutions.weight(module).detach()
    values = weight.to("cpu", torch.float32).contiguous().numpy()
    if np.isfinite(values).all():
        return values.reshape(-1, *values.shape[2:])
    if torch.isfinite(weight).all():
        raise InvalidValueError(
            f"layer {name or ALONE} has weights up to {weight.abs().max().item():g}; "
            f"they must be within float32's, up to {np.finfo(np.float32).max:g}."
        )
    raise InvalidValueError(f"layer {name or ALONE} has NaN or infinite weights; they must be finite.")


def _changed(weight: torch.Tensor, rows: np.ndarray, changed: np.ndarray) -> torch.Tensor:
    """Return a weight with other kernels where they are `changed`, in float64: no value is lost here."""
    new = weight.detach().to("cpu", torch.float64).reshape(rows.shape).clone()
    new[changed] = torch.from_numpy(rows[changed]).double()
    return new


def _described(shape: tuple[int, ...], transposed: bool) -> str:
    return f"shape {shape}" + " (transposed)" * transposed


def _wanted_size(
    network: nn.Module, convolutions: Mapping[str, nn.Module], left_out, size
) -> tuple[int, int]:
    counts = Counter()
    for module in convolutions.values():
        shape, _ = form(module)
        counts[shape[2:]] += shape[0] * shape[1]
    larger = [s for s, _ in counts.most_common() if s != (1, 1)]
    if size is None and larger:
        return larger[0]
    wanted = (size, size) if checks.is_whole(size) else size
    if isinstance(wanted, (tuple, list)) and tuple(wanted) in counts:
        return tuple(wanted)
    kind = "2D kernels larger than 1×1" if size is None else f"{_times(wanted)} kernels"
    listing = ", ".join(f"{n} of {_times(s)}" for s, n in counts.most_common()) or "none"
    if left_out:
        listing += f"; left out: {_convolutions.described(left_out)}"
    elif not counts:
        listing += f"; {_convolutions.instead(network)}"
    advice = "; give size=1 to cluster 1×1 kernels" if size is None and counts else ""
    raise InvalidValueError(f"the model has no {kind} (found: {listing}){advice}.")


def _times(size) -> str:
    return "×".join(map(str, size)) if isinstance(size, (tuple, list)) else repr(size)
