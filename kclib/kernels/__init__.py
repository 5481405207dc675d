"""The 2D kernels of a network as one array, and back.

`extract` and `insert` are inverse to the bit. A `KernelBank` holds all k×k kernels of a network's
convolutions, layer by layer. What is not taken is named with the reason.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "bank": [
            "extract",
            "insert",
            "matched",
            "bank_of",
            "sample",
            "named",
            "rows_of",
            "Layer",
            "KernelBank",
            "Kernels",
        ]
    },
)
