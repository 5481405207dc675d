"""Cluster the kernels of a network, each layer with a codebook of its own or several with one.

`cluster` returns a `Clustering`, a `Group` for each codebook. `by_use` orders a codebook, and `error_share`
says how much of the kernels' energy clustering loses.
"""

from kclib._util import lazy_names

__getattr__, __dir__, __all__ = lazy_names.attach(
    __name__, submod_attrs={"_clustering": ["cluster", "Clustering", "Group", "by_use", "error_share"]}
)
