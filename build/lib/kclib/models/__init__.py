"""Hold networks and what they need to be used.

A `Model` is a network with its preprocessing and class names; every function that takes a network takes
either. Networks come by name or from the user's own factory, their weights from checkpoints of many kinds,
and no checkpoint is unpickled. Where other people's code fails, an error says so in one sentence.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_model": [
            "Model",
            "told",
            "network_of",
            "like",
            "as_model",
            "moved",
            "plain",
            "input_shape",
            "fingerprint",
            "answers",
            "precision_of",
            "read_weights",
        ],
        "_loading": [
            "architecture",
            "names",
            "torchvision_names",
            "vgg16_fashion",
            "fashion_preprocess",
            "FASHION_CLASSES",
            "FASHION_FILE",
            "FASHION_SHA256",
        ],
    },
)
