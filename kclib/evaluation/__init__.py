"""Measure recognition accuracy, with its uncertainty.

`evaluate` returns what a network answers on a set of images, and `drop` the accuracy lost between two
networks on the same images, which `in_words` says. `attribution` and `damage` find where it was lost. `peers`
makes networks small by other methods, for comparison at equal bytes.
"""

from kclib._util import lazy_names

__getattr__, __dir__, __all__ = lazy_names.attach(
    __name__, submod_attrs={"_accuracy": ["Interval", "Drop", "Evaluation", "evaluate", "drop", "in_words"]}
)
