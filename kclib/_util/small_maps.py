"""Convolve many small maps faster: side by side, as one large map."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LARGEST, _FEWEST, _CHANNELS = 4, 32, 256  # side of a map in pixels, maps, and channels in or out


class SideBySide(TorchFunctionMode):
    """Within this context PyTorch convolves a batch of small maps as one map, zeros between them.

    The library behind ``conv2d`` on processors takes several times as long for many maps of few pixels and
    many channels as for the same maps in a grid. Values are those of ``conv2d`` but for the order of
    summation. Convolutions of larger maps, that change the size of a map, or that run elsewhere are not
    touched.
    """

    def __torch_function__(self, function, types, arguments=(), options=None):
        """Call a function of PyTorch, or convolve in a grid in its place."""
        options = options or {}
        if function is torch.conv2d and not options and _fits(*arguments):
            return _in_a_grid(*arguments[:3], padding=arguments[4])
        return function(*arguments, **options)


def _fits(x: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, groups=1) -> bool:
    """Tell whether a convolution is of small maps, with as many pixels out as in."""
    if x.device.type != "cpu" or x.ndim != 4 or len(x) < _FEWEST or groups != 1:
        return False
    same = isinstance(padding, tuple) and all(
        2 * p == k - 1 for p, k in zip(padding, weight.shape[2:], strict=True)
    )
    plain = set(stride) == set(dilation) == {1} if isinstance(stride, tuple) else False
    return same and plain and max(x.shape[2:]) <= _LARGEST and max(weight.shape[:2]) >= _CHANNELS


def _in_a_grid(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
    n, channels, height, width = x.shape
    columns = math.isqrt(n - 1) + 1
    rows = -(-n // columns)
    high, wide = height + padding[0], width + padding[1]
    # channels last, so that the grid is a rearrangement of whole pixels
    cells = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, padding[1], 0, padding[0], 0, rows * columns - n))
    grid = (
        cells.unflatten(0, (rows, columns)).transpose(1, 2).reshape(1, rows * high, columns * wide, channels)
    )
    found = F.conv2d(grid.permute(0, 3, 1, 2), weight, bias, padding=padding).permute(0, 2, 3, 1)
    cells = found.reshape(rows, high, columns, wide, -1).transpose(1, 2)[:, :, :height, :width]
    return cells.reshape(rows * columns, height, width, -1)[:n].permute(0, 3, 1, 2)
