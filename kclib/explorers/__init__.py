"""Explorers of similarity, of maps and of clusterings: ask anything at any moment.

Each explorer is plain Python and works in the background; `widgets` shows them. `explore` opens the
explorer of clusterings of a network. Old questions are left when a new one comes.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "similarity_explorer": ["SimilarityExplorer", "SimilarityQuestion"],
        "map_explorer": ["MapExplorer", "MapQuestion"],
        "cluster_explorer": ["ClusterExplorer", "ClusterQuestion"],
        "widgets": ["explore"],
    },
)
