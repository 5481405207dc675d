"""The preprocessing of a network of which nothing is known, and what shape a preprocessing makes."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from kclib.errors import InvalidValueError

_COLOURS = {1: ("L", v2.Grayscale()), 3: ("RGB", v2.RGB())}
_PROBES = ((40, 40), (48, 72), (300, 260))  # heights and widths of images of every kind


@dataclass(frozen=True)
class Plain:
    """The preprocessing of a network of which nothing is known: values from 0 to 1.

    Attributes
    ----------
    channels : int
        1 for grey (luma of ITU-R 601-2), 3 for RGB.
    size : (int, int), optional
        Height and width in pixels; those of the image by default.
    """

    channels: int = 3
    size: tuple[int, int] | None = None

    def __call__(self, image) -> Tensor:
        """Return a PIL image, or uint8 images ``(..., c, h, w)``, as float32 ``(..., channels, h, w)``."""
        if self.channels not in _COLOURS:
            raise InvalidValueError(
                f"the network's first convolution reads {self.channels} channels, and images have 1 or 3; "
                "give a Model with a preprocess of its own."
            )
        mode, colours = _COLOURS[self.channels]
        if isinstance(image, Image.Image):
            image = image.convert(mode)
        steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), colours]  # of floats: none is cut off
        if self.size:
            steps.append(v2.Resize(self.size, antialias=True))
        return v2.Compose([*steps, v2.ToPureTensor()])(image)


def known_shape(preprocess: Callable) -> tuple[int, ...] | None:
    """Return the shape that a preprocessing makes of images of several sizes; None where they differ."""
    made = {_made(preprocess, height, width) for height, width in _PROBES}
    return made.pop() if len(made) == 1 else None


def _made(preprocess: Callable, height: int, width: int) -> tuple[int, ...] | None:
    """Return the shape that a preprocessing makes of an image; None if it takes no such image."""
    for image in (torch.zeros(3, height, width, dtype=torch.uint8), Image.new("RGB", (width, height))):
        with suppress(Exception):  # other people's code can raise anything
            return tuple(preprocess(image).shape)
    return None
