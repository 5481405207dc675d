"""Draw every picture of the workbook.

Each function takes values and ``ax=``, draws on these axes (or on pyplot's current ones), and returns them.
It sets the title, the labels and the units; the caller chooses the size. None computes, saves or shows.

Examples
--------
>>> import kclib, torch
>>> from matplotlib.figure import Figure
>>> bank = kclib.extract(torch.nn.Conv2d(3, 8, 3))
>>> ax = kclib.plots.kernel_sheet(bank.kernels, columns=8, ax=Figure().subplots())
>>> ax.images[0].get_array().shape  # three rows of eight kernels of 3×3, gaps of a pixel between them
(12, 31)
"""

from kclib._util import lazy_names

__getattr__, __dir__, __all__ = lazy_names.attach(
    __name__,
    submod_attrs={
        "_accuracy": [
            "accuracy_curve",
            "REPORT_POINT",
            "equal_bytes",
            "pareto_front",
            "gains",
        ],
        "_kernels": ["kernel_sheet", "codebook_tree", "cluster_sizes", "norm_histogram"],
        "_similarity": [
            "distance_histograms",
            "layer_curves",
            "closeness",
            "layers_by_layers",
            "density",
            "embedding",
        ],
        "_bytes": [
            "byte_bars",
            "index_bits",
            "bits_by_layer",
            "bits_by_norm",
            "latency_bars",
            "memory_traces",
        ],
        "_damage": ["damage_by_layer", "damage_by_cluster", "damage_by_class", "flipped_images"],
        "_combination": ["interactions", "excess"],
    },
)
