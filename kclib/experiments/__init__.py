"""Run experiments that can be repeated: sweeps, batches of notebooks, and their reports.

`sweep` evaluates clusterings at several K, `sweep_layers` those of each layer alone, and a profile (a YAML
file) says what a batch of notebooks and a larger sweep compute. Finished results are kept in the store and
not computed again. Reports are folders of pages that can be read offline.
"""

from kclib._util import lazy_names

__getattr__, __dir__, __all__ = lazy_names.attach(
    __name__, submod_attrs={"_cell": ["sweep", "stored", "stored_clustering"], "_layers": ["sweep_layers"]}
)
