"""Kernels as tiny pictures for pages."""

import base64
import io

import numpy as np
from matplotlib import colormaps
from PIL import Image

_WEIGHTS = colormaps["RdBu_r"]  # as in figures.kernel_sheet
PALETTE = _WEIGHTS(np.arange(256), bytes=True)[:, :3]  # uint8 (256, 3), from negative to positive


def pictures(kernels: np.ndarray) -> list[str]:
    """Return kernels as PNGs in base64, one pixel a weight, blue to white to red.

    Parameters
    ----------
    kernels : numpy.ndarray
        ``(n, kh, kw)``; each is scaled to its own largest absolute weight, as `figures.kernel_sheet` does.
    """
    scale = np.abs(kernels).max(axis=(1, 2), keepdims=True)
    scaled = kernels / np.where(scale > 0, scale, 1)
    pixels = _WEIGHTS((scaled + 1) / 2, bytes=True)[..., :3]
    return [_png(np.ascontiguousarray(image)) for image in pixels]


def _png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
