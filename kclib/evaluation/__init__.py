"""Recognition accuracy, with its uncertainty.

`evaluate` answers what a network says of images, `drop` what was lost between two networks on the same
images. `attribution` and `damage` say where it was lost, `peers` makes networks small in other ways to
compare with.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "accuracy": [
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
