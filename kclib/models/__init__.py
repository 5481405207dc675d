"""Networks and what they need to be used.

A `Model` is a network with its preprocessing and class names; whatever takes a network takes either.
Networks come by name or from the user's own factory, and their weights from checkpoints of any kind, none
of which is unpickled. Other people's code is fenced: what it raises comes out as one sentence.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "model": [
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
        "loading": [
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
