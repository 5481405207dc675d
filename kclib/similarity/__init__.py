"""How alike kernels are.

Distances, histograms of all pairs, nearest neighbours, null models to compare with, and maps (UMAP).
Everything is streamed in blocks; there is no n×n matrix. Each measure says how sure it is.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "measures": ["closeness", "near_zero", "comparable", "nearest_distances", "explained", "closest"],
        "histograms": ["PairHistogram", "pair_histogram", "layer_histograms", "within_and_across"],
        "distances": ["named"],
    },
)
