"""Make a clustered network small: in memory, in a file, and for other runtimes.

`compress` puts indices and a codebook in place of the weights, and `expand` undoes that. `save` and `load`
keep the network in one checked file, and `export` writes it for ONNX and torch. `footprint` says where the
bytes go.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_replacement": ["compress", "replaced", "expand", "expanded", "inserted"],
        "_checkpoint": ["save", "load"],
        "_exporting": ["export", "to_onnx", "to_program"],
        "byte_counts": ["footprint"],
        "_container": ["Contents", "inspect"],
        "_layers": ["ClusteredConv2d"],
    },
)
