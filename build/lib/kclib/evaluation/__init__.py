"""Measure recognition accuracy, with its uncertainty.

`evaluate` returns what a network answers on a set of images, and `drop` the accuracy lost between two
networks on the same images. `attribution` and `damage` find where it was lost. `peers` makes networks small
by other methods, for comparison at equal bytes.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_accuracy": [
            "Interval",
            "Drop",
            "Evaluation",
            "evaluate",
            "matched",
            "told_apart",
            "drop",
            "paired",
            "input_fingerprint",
        ]
    },
)
