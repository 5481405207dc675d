"""The 2D kernels of a network as one array, and back: `extract` and `insert` are inverse to the bit."""

import copy
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from types import MappingProxyType

import numpy as np
import pandas as pd
import torch
from torch import nn

from kclib import checks
from kclib.errors import InvalidValueError

_ALONE = "(the network itself)"  # in place of a name, which only modules inside of others have
_EXACT_IN_FLOAT32 = (torch.float32, torch.float16, torch.bfloat16)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLUTIONS += (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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


@dataclass(frozen=True)
class KernelBank:
    """The kernels of one spatial size of a network.

    Attributes
    ----------
    weights : numpy.ndarray
        float32 ``(n, kh, kw)``, read-only; rows in order of `layers`.
    layers : tuple of Layer
    left_out : mapping of str to str
        Every other convolution of the network by name, and why it is not here.
    """

    weights: np.ndarray
    layers: tuple[Layer, ...]
    left_out: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the kernels in pixels."""
        return self.weights.shape[1:]

    @property
    def points(self) -> np.ndarray:
        """The kernels as float32 points ``(n, kh * kw)``, a view."""
        return self.weights.reshape(len(self), -1)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the layers and the bytes of all kernels."""
        digest = hashlib.sha256(f"{self.layers} {self.weights.shape}".encode())
        digest.update(np.ascontiguousarray(self.weights))
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
        weights = np.concatenate([self.weights[layer.rows] for layer in chosen])
        weights.flags.writeable = False
        layers = tuple(replace(x, start=start) for x, start in zip(chosen, starts, strict=False))
        return KernelBank(weights, layers, {})

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


def extract(network: nn.Module, *, size: int | tuple[int, int] | None = None) -> KernelBank:
    """Take the 2D kernels of one spatial size out of a network.

    Parameters
    ----------
    network : torch.nn.Module
        Unchanged. Grouped, depthwise, dilated, strided and transposed convolutions count as stored;
        a weight that several modules share counts once.
    size : int or (int, int), optional
        Height and width of the kernels wanted; the size larger than 1×1 with the most kernels by
        default.

    Raises
    ------
    InvalidValueError
        If there are no such kernels, or weights are NaN, infinite, or not materialised.
    """
    found, left_out = _convolutions(network)
    chosen = _wanted_size(found, size)
    layers, parts, start = [], [], 0
    for name, module in found.items():
        weight = module.weight
        if tuple(weight.shape[2:]) != chosen:
            left_out[name] = f"{_times(weight.shape[2:])} kernels, not {_times(chosen)}"
            continue
        values = weight.detach().to("cpu", torch.float32).contiguous().numpy()
        if not np.isfinite(values).all():
            raise InvalidValueError(
                f"layer {name or _ALONE} has NaN or infinite weights; they must be finite."
            )
        shape, transposed = form(module)
        layers.append(Layer(name, shape, start, transposed, weight.element_size()))
        parts.append(values.reshape(-1, *chosen))
        start += len(parts[-1])
    weights = np.concatenate(parts)
    weights.flags.writeable = False
    return KernelBank(weights, tuple(layers), left_out)


def insert(network: nn.Module, bank: KernelBank) -> nn.Module:
    """Return a copy of `network` whose kernels are those of `bank`, in the network's own precision.

    Raises
    ------
    InvalidValueError
        If the bank does not come from a network of this architecture.
    """
    n_kernels = sum(layer.n_kernels for layer in bank.layers)
    if len(bank) != n_kernels:
        raise InvalidValueError(f"the bank has {len(bank)} kernels; its layers have {n_kernels}.")
    result = copied(network)
    for name, module in matched(result, bank.layers).items():
        layer = bank.layer(name)
        values = torch.from_numpy(bank.weights[layer.rows].reshape(layer.shape).copy())
        with torch.no_grad():
            module.weight.copy_(values)
    return result


def matched(network: nn.Module, layers: Iterable[Layer]) -> dict[str, nn.Module]:
    """Return the network's own convolutions that `layers` describe, by name.

    Raises
    ------
    InvalidValueError
        If the layers do not come from a network of this architecture.
    """
    found, left_out = _convolutions(network)
    for layer in layers:
        module = found.get(layer.name)
        if module is None or form(module) != (layer.shape, layer.transposed):
            has = left_out.get(layer.name, "no such layer") if module is None else _described(*form(module))
            raise InvalidValueError(
                f"layer {layer.name} was a convolution of {_described(layer.shape, layer.transposed)}, "
                f"the network has {has}; use the architecture that the kernels were extracted from."
            )
    return {layer.name: found[layer.name] for layer in layers}


def copied(network: nn.Module, replaced: Mapping[int, object] = MappingProxyType({})) -> nn.Module:
    """Return a deep copy of a network, also where layers hold computed weights (torch's pruning).

    Parameters
    ----------
    replaced : mapping of int to object
        What takes the place of modules and parameters, by their ``id``; it is not copied.
    """
    computed = {
        id(value): value.detach().clone()
        for module in network.modules()
        if id(module) not in replaced
        for value in vars(module).values()
        if torch.is_tensor(value) and not value.is_leaf
    }
    return copy.deepcopy(network, computed | dict(replaced))


def sample(bank: KernelBank, per_layer: int, *, seed: int = 0) -> np.ndarray:
    """Return a stratified sample of rows: up to `per_layer` of each layer, without replacement, sorted.

    Raises
    ------
    InvalidValueError
        `per_layer` is below 1; a seed that is none.
    """
    checks.check_whole("per_layer", per_layer, 1)
    checks.check_seed(seed)
    draw = np.random.default_rng(seed)
    return np.concatenate(
        [
            layer.start
            + np.sort(draw.choice(layer.n_kernels, min(per_layer, layer.n_kernels), replace=False))
            for layer in bank.layers
        ]
    )


def _convolutions(network: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Sort all convolutions into usable ones and those left out with a reason, by name."""
    if not isinstance(network, nn.Module):
        raise InvalidValueError(
            f"the network is a {type(network).__name__}; it must be a torch.nn.Module, such as Model.network."
        )
    found, left_out, owner = {}, {}, {}
    for name, module in network.named_modules(remove_duplicate=False):
        if not isinstance(module, _CONVOLUTIONS):
            continue
        weight = module.weight
        if isinstance(weight, nn.parameter.UninitializedParameter) or weight.is_meta:
            raise InvalidValueError(
                f"layer {name or _ALONE} has no values yet (lazy or on the meta device); load weights first."
            )
        if not isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            left_out[name] = f"{type(module).__name__}: its kernels are not 2D"
        elif nn.utils.parametrize.is_parametrized(module, "weight") or not isinstance(weight, nn.Parameter):
            left_out[name] = "its weight is computed (parametrized or pruned); make it permanent first"
        elif weight.dtype not in _EXACT_IN_FLOAT32:
            left_out[name] = f"{weight.dtype} weights are not exact in float32"
        elif id(weight) in owner:
            left_out[name] = f"shares its weight with {owner[id(weight)]}"
        else:
            owner[id(weight)] = name
            found[name] = module
    return found, left_out


def form(module: nn.Module) -> tuple[tuple[int, ...], bool]:
    """Return a convolution's weight shape and whether it is transposed."""
    return tuple(module.weight.shape), isinstance(module, nn.ConvTranspose2d)


def _described(shape: tuple[int, ...], transposed: bool) -> str:
    return f"shape {shape}" + " (transposed)" * transposed


def _wanted_size(found: Mapping[str, nn.Module], size) -> tuple[int, int]:
    counts = Counter()
    for module in found.values():
        counts[tuple(module.weight.shape[2:])] += module.weight.shape[0] * module.weight.shape[1]
    listing = ", ".join(f"{n} of {_times(s)}" for s, n in counts.most_common()) or "none"
    if size is None:
        larger = [s for s, _ in counts.most_common() if s != (1, 1)]
        if not larger:
            raise InvalidValueError(
                f"the model has no 2D kernels larger than 1×1 (found: {listing}); "
                "give size=1 to cluster 1×1 kernels."
            )
        return larger[0]
    wanted = (size, size) if isinstance(size, Integral) else size
    if not isinstance(wanted, (tuple, list)) or tuple(wanted) not in counts:
        raise InvalidValueError(f"the model has no {_times(wanted)} kernels (found: {listing}).")
    return tuple(wanted)


def _times(size) -> str:
    return "×".join(map(str, size)) if isinstance(size, (tuple, list)) else repr(size)
