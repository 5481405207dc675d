"""What layers read, in few bits: the values that int8 arithmetic would see, computed in floating point."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor, nn

from kclib import checks, datasets, kernels, models, moments
from kclib.bars import tqdm
from kclib.errors import InvalidValueError
from kclib.layers import ClusteredConv2d

_READERS = (nn.Conv2d, nn.ConvTranspose2d, ClusteredConv2d, nn.Linear)


@dataclass(frozen=True)
class Grid:
    """Evenly spaced values, 0 among them, that stand for all others.

    A value is ``scale * (q - zero_point)``, q a whole number from 0 to 2**bits - 1 (Jacob et al. 2018,
    *Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference*,
    equation 1).

    Attributes
    ----------
    scale : float
    zero_point : int
    bits : int
        2 to 8.
    """

    scale: float
    zero_point: int
    bits: int

    def __post_init__(self):
        _check_bits(self.bits)
        if not (checks.is_real(self.scale) and self.scale > 0):
            raise InvalidValueError(f"a scale is {self.scale!r}; it must be finite and above 0.")
        if not isinstance(self.zero_point, Integral) or not 0 <= self.zero_point <= self.largest:
            raise InvalidValueError(
                f"a zero point is {self.zero_point!r}; it must be a whole number, 0 to {self.largest}."
            )

    @classmethod
    def spanning(cls, low: float, high: float, bits: int) -> "Grid":
        """Return the finest grid from `low` to `high` and 0."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / (2**bits - 1)
        if scale < torch.finfo(torch.float32).tiny:  # nothing but zeros is read
            return cls(1.0, 0, bits)
        return cls(scale, round(-low / scale), bits)

    @property
    def largest(self) -> int:
        """The largest of its whole numbers."""
        return 2**self.bits - 1

    def __call__(self, x: Tensor) -> Tensor:
        """Return the nearest value of the grid for each of a tensor's, in its own type."""
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, 0, self.largest)


def quantize(
    model: models.Model,
    images: datasets.ImageSet,
    *,
    bits: int = 8,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> nn.Module:
    """Return a copy of a model's network whose layers read values of a few bits.

    Each 2D convolution, plain, transposed or clustered, and each linear layer rounds what it reads to a grid
    of its own, from the least to the largest value that it reads in the calibration images. The arithmetic
    stays floating: the numbers are those that integer kernels would get, their speed is not.

    A percentile in place of the extremes was worse at 8 bits: of the shipped network's logits it lost 50
    times as much (99.95 %). A layer that does not run on the images, or gets its input by name, reads what it
    did.

    The grid is in the layer's attribute ``input_grid``, which copies, `compression` and `checkpoint` keep.

    Parameters
    ----------
    model : Model
        Unchanged.
    images : ImageSet
        Some hundred, of the kind the model knows; their labels are not read.
    bits : int
        2 to 8.
    batch_size, device
        Of the calibration alone; the copy stays on the model's own device.

    Raises
    ------
    InvalidValueError
        No image; bits out of range; a layer that reads values that are not finite; no layer to quantize.
    """
    _check_bits(bits)
    network = _ungridded(kernels.copied(model.network)).eval()
    models.moved(network, device)
    batches = moments.batches(images, model.preprocess, batch_size, device)
    bar = tqdm(batches(), desc="what layers read", unit="batch", delay=2, leave=False, disable=not progress)
    found = _ranges(network, bar)
    if not found:
        raise InvalidValueError("the model has no 2D convolution or linear layer that runs on the images.")
    result = kernels.copied(model.network)
    put(result, {name: Grid.spanning(*ends, bits) for name, ends in found.items()})
    return result


def grids(network: nn.Module) -> dict[str, Grid]:
    """Return the grids of a network's layers by name."""
    found = {name: getattr(module, "input_grid", None) for name, module in network.named_modules()}
    return {name: grid for name, grid in found.items() if isinstance(grid, Grid)}


def put(network: nn.Module, wanted: Mapping[str, Grid]) -> None:
    """Let the named layers of a network, in place, read the values of grids."""
    for name, grid in wanted.items():
        module = network.get_submodule(name)
        if _snapped not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_snapped)
        module.input_grid = grid


def _snapped(module: nn.Module, args: tuple) -> tuple:
    """Round a layer's input; a function of the module alone, so that a copy has its own grid."""
    if module.input_grid is None or not args:
        return args
    return module.input_grid(args[0]), *args[1:]


def _ungridded(network: nn.Module) -> nn.Module:
    """Let a network, in place, read what it would without grids."""
    for name in grids(network):
        network.get_submodule(name).input_grid = None
    return network


@torch.no_grad()
def _ranges(network: nn.Module, batches: Iterator[Tensor]) -> dict[str, tuple[float, float]]:
    """Return the least and the largest value that each layer reads."""
    found = {}

    def observed(name: str) -> Callable:
        def hook(_, args):
            if not args:
                return
            low, high = (float(end) for end in args[0].aminmax())
            if not math.isfinite(high - low):
                raise InvalidValueError(
                    f"layer {name} reads values that are not finite; it cannot be quantized."
                )
            least, largest = found.get(name, (low, high))
            found[name] = min(low, least), max(high, largest)

        return hook

    for name, module in network.named_modules():
        if isinstance(module, _READERS):
            module.register_forward_pre_hook(observed(name))
    for inputs in batches:
        models.answers(network, inputs)
    return found


def _check_bits(bits: int) -> None:
    checks.check_whole("bits", bits, 2, 8)
