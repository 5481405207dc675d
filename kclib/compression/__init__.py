"""Make a clustered network small: in memory, in a file, and for other runtimes.

`compress` puts indices and a codebook in place of the weights, and `expand` undoes that. `save` and `load`
keep the network in one checked file, and `export` writes it for ONNX and torch. `footprint` says where the
bytes go.
"""

from kclib._util import lazy_names

__getattr__, __dir__, __all__ = lazy_names.attach(
    __name__,
    submod_attrs={
        "_replacement": ["compress", "replaced", "expand"],
        "_checkpoint": ["save", "load"],
        "_exporting": ["export", "to_onnx"],
        "byte_counts": ["footprint"],
        "_container": ["inspect"],
    },
)
