"""Lose less accuracy at the same bytes.

`shrink` makes a network small within a number of bytes, and `finetune` trains a compressed network while its
bytes stay. The modules do one step each: sensitivities, bytes shared out over layers, correction and
calibration without labels, and bytes spent where they win back most.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_shrinking": ["shrink"],
        "allocation": ["Allocation"],
        "_calibration": ["calibrate"],
        "_finetuning": ["finetune", "RECIPE"],
    },
)
