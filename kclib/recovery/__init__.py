"""Lose less accuracy at the same bytes.

`shrink` makes a network small within a number of bytes, and `finetune` trains a compressed network while its
bytes stay. `correct` clusters layer by layer, each layer making good what those before it lost, and
`calibrate` fits the codebooks of a compressed network. The modules say what an error costs, and spend bytes
where they win back most.
"""

from kclib._util import lazy_names

__getattr__, __dir__, __all__ = lazy_names.attach(
    __name__,
    submod_attrs={
        "_shrinking": ["shrink"],
        "_sequential": ["correct"],
        "_calibration": ["calibrate"],
        "_finetuning": ["finetune", "RECIPE"],
    },
)
