"""Pruning, clustering and quantization together: are they orthogonal?

Steps are joined by ``>>`` into a `Pipeline`. `factorial` evaluates every combination of their levels, and
`orthogonality` says whether what each loses adds up.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"pipeline": ["Prune", "Cluster", "Quantize", "Train", "Pipeline", "Step"]}
)
