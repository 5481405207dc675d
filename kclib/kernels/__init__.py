"""Take the 2D kernels of a network as one array, and put them back.

A `KernelBank` holds all kernels of one size, layer by layer. `extract` and `insert` are inverse to the bit.
Each convolution that is left out is named, with the reason.
"""

from kclib._util import lazy_names

__getattr__, __dir__, __all__ = lazy_names.attach(
    __name__, submod_attrs={"_bank": ["extract", "insert", "sample", "Layer", "KernelBank"]}
)
