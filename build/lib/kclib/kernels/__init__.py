"""Take the 2D kernels of a network as one array, and put them back.

A `KernelBank` holds all kernels of one size, layer by layer. `extract` and `insert` are inverse to the bit.
Each convolution that is left out is named, with the reason.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_bank": [
            "extract",
            "insert",
            "matched",
            "bank_of",
            "sample",
            "rows_of",
            "Layer",
            "KernelBank",
            "Kernels",
        ]
    },
)
