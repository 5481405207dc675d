"""Explore similarity, maps and clusterings interactively.

`explore` opens the explorer of a network's clusterings. Each explorer is plain Python that works in the
background, and `widgets` shows it. A new question replaces one that is still being answered.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_similarity_explorer": ["SimilarityExplorer", "SimilarityQuestion"],
        "_map_explorer": ["MapExplorer", "MapQuestion"],
        "_cluster_explorer": ["ClusterExplorer", "ClusterQuestion"],
        "widgets": ["explore"],
    },
)
