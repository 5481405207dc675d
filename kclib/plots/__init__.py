"""Every picture: each function draws given values on an axes and returns it.

None computes, saves or shows. All take ``ax=``. Titles and units are theirs, sizes the caller's.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "accuracy": [
            "accuracy_curve",
            "REPORT_POINT",
            "equal_bytes",
            "gains",
            "layer_sensitivities",
            "allocated_clusters",
        ],
        "kernels": ["kernel_sheet", "cluster_sizes", "norm_histogram"],
        "similarity": ["distance_histograms", "closeness", "layers_by_layers", "density", "embedding"],
        "bytes": ["byte_bars", "index_bits", "memory_traces"],
        "damage": ["damage_by_layer", "damage_by_cluster", "damage_by_class", "flipped_images"],
        "combination": ["interactions", "excess"],
    },
)
