"""Experiments that can be run again: sweeps, batches of notebooks, and their reports.

`sweep` evaluates clusterings at several K. A profile (YAML) says what a batch and a sweep compute; what is
finished is kept in the store and not computed again. Reports are folders of pages that can be read offline.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"cell": ["sweep"]})
