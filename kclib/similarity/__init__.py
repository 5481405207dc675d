"""Measure how alike kernels are.

The measures are distances, histograms of all pairs, nearest neighbours, comparisons with null models, and
maps (UMAP). Pairs are streamed in blocks, so that no n×n matrix is kept. What rests on a sample says how sure
it is.

Examples
--------
>>> import kclib, numpy as np
>>> points = np.array([[1, 0, 0, 0], [2, 0, 0, 0], [0, 0, 0, 2]], np.float32)
>>> kclib.similarity.nearest_distances(points)
array([1.        , 1.        , 2.23606798])
>>> kclib.similarity.nearest_distances(points, distance="cosine").round(6)  # ignores lengths
array([0., 0., 1.])
"""

from kclib._util import lazy_names

__getattr__, __dir__, __all__ = lazy_names.attach(
    __name__,
    submod_attrs={
        "_measures": ["closeness", "near_zero", "comparable", "nearest_distances", "explained", "closest"],
        "_histograms": ["PairHistogram", "pair_histogram", "layer_histograms", "within_and_across"],
        "distances": ["named"],
    },
)
