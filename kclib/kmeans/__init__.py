"""Points to centres and labels: k-means for millions of small points, at any K.

This room knows no kernels and no networks. `fit` makes one clustering of an array, `ladder` one for each of
several K; both give the same result for a seed whatever the number of threads. The modules hold what they
are made of: starts, rounds, exact nearest centres, points up to scale or turns, a price for indices, and
points past one machine's memory.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"fitting": ["fit", "ladder", "Ladder"], "settings": ["KMeans", "Options"]}
)
