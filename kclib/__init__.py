"""Similarity, clustering and replacement of the 2D kernels of convolutional networks."""

__version__ = "0.1.0"

from kclib import places

places.prepare()
