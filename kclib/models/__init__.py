"""Hold networks and what they need to be used.

A `Model` is a network with its preprocessing and class names; every function that takes a network takes
either. Networks come by name or from the user's own factory, their weights from checkpoints of many kinds,
and no checkpoint is unpickled. Where other people's code fails, an error says so in one sentence.
"""

from kclib._util import lazy_names

__getattr__, __dir__, __all__ = lazy_names.attach(
    __name__,
    submod_attrs={
        "_model": [
            "Model",
            "network_of",
            "like",
            "plain",
            "input_shape",
            "fingerprint",
            "answers",
            "precision_of",
        ],
        "_loading": ["vgg16_fashion", "fashion_preprocess"],
    },
)
