"""Explore similarity, maps and clusterings interactively.

`explore` opens the explorer of a network's clusterings. Each explorer is plain Python that works in the
background, and `widgets` shows it. A new question replaces one that is still being answered.
"""

from kclib._util import lazy_names

__getattr__, __dir__, __all__ = lazy_names.attach(
    __name__,
    submod_attrs={
        "_similarity_explorer": ["SimilarityExplorer"],
        "_map_explorer": ["MapExplorer"],
        "_cluster_explorer": ["ClusterExplorer"],
        "widgets": ["explore"],
    },
)
