"""Pictures on disk, and what their pixels are: upright 8-bit RGB, whatever the file holds."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from kclib.errors import DamagedFileError, InvalidValueError, reason


class Pictures(Dataset):
    """Pictures on disk with their labels: ``(PIL image in RGB, label)`` each.

    Parameters
    ----------
    samples : sequence of (str, int)
        Path and label of each.
    """

    def __init__(self, samples: Sequence[tuple[str, int]]):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return read(path), label


def read(path: str | Path) -> Image.Image:
    """Read a picture as `as_rgb` has it.

    Raises
    ------
    DamagedFileError
        Named by its path: it is no picture, or not whole, or its pixels have no known white.
    """
    try:
        with Image.open(path) as image:
            return as_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # a damaged picture can make its reader raise almost anything
        raise DamagedFileError(
            f"image {path} cannot be read ({reason(error)}); remove or restore it."
        ) from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Return a picture as a viewer shows it: upright, 8-bit RGB.

    - Grey, black-and-white and palette pictures get the three channels of their colours.
    - 16 bits are scaled to 8: the largest value that they hold becomes 255.
    - Transparent pixels lie on white.
    - CMYK and YCbCr are converted without a colour profile.
    - The camera's orientation (EXIF) is applied.
    - Of an animation or of several pages, the first is taken.

    Raises
    ------
    InvalidValueError
        Pixels of 32 bits, whole or floating, whose white is not known; a mode that has no RGB here (LAB).
    """
    image.load()
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if not wide and image.mode in ("I", "F"):
        raise InvalidValueError(
            f"pixels of mode {image.mode} have no known white; save the image with 8 or 16 bits."
        )
    if image.mode == "LAB":
        raise InvalidValueError("pixels of mode LAB have no RGB without a profile; save the image as RGB.")
    upright = _upright(image)
    if wide:
        upright = _of_16_bits(upright, _largest(image))
    if upright.mode in ("La", "RGBa"):
        upright = upright.convert(upright.mode.upper())
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    upright = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    with suppress(Exception):  # damaged notes on a picture leave its pixels as they are
        return ImageOps.exif_transpose(image)
    return image


def _largest(image: Image.Image) -> int:
    """Return the value that means white: a TIFF may say that it uses fewer than 16 bits."""
    bits = getattr(image, "tag_v2", {}).get(258, (16,))
    return 2 ** bits[0] - 1


def _of_16_bits(image: Image.Image, largest: int) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    grey = np.rint(values * (255 / largest)).clip(0, 255)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8))
