"""Combine pruning, clustering and quantization, and tell whether they are orthogonal.

Steps such as `Prune` and `Cluster` are joined by ``>>`` into a `Pipeline`, which makes a network small. The
module `factorial` evaluates every combination of their levels. The module `orthogonality` says whether the
losses of single steps add up.
"""

from kclib._util import lazy_names

__getattr__, __dir__, __all__ = lazy_names.attach(
    __name__, submod_attrs={"_pipeline": ["Prune", "Cluster", "Quantize", "Train", "Pipeline"]}
)
