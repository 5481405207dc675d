"""Cluster points: k-means for millions of small points, at any K.

This room knows nothing of kernels or networks. `fit` makes one clustering of an array, `tree` makes one tree
from which a codebook of any K can be cut in milliseconds. The same seed gives the same result for any number
of threads. The modules hold the parts: starts, rounds, exact nearest centres, points up to scale or turns, a
price for indices, and points beyond one machine's memory.

Examples
--------
>>> import kclib, numpy as np
>>> points = np.array([[0, 0], [0, 1], [9, 9], [9, 8]], np.float32)
>>> found = kclib.kmeans.fit(points, 2)
>>> sorted(found.centres.tolist()), found.inertia
([[0.0, 0.5], [9.0, 8.5]], 1.0)
>>> tree = kclib.kmeans.tree(points)
>>> [tree.cut(k).inertia for k in (1, 2, 4)]
[146.0, 1.0, 0.0]
"""

from kclib._util import lazy_names

__getattr__, __dir__, __all__ = lazy_names.attach(
    __name__,
    submod_attrs={
        "_fitting": ["fit"],
        "_settings": ["KMeans", "Options"],
        "_tree": ["tree", "Tree", "Codebook"],
    },
)
