"""Labelled images, by name or as the user has them.

`load_data` takes a name, ``folder:PATH``, or a torch data set or loader, and answers an `ImageSet`. Class
folders are matched to a network's outputs by name, and pixel values are those of the file. What cannot be
told is asked for in one sentence.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "loader": [
            "load_data",
            "train_and_test",
            "as_image_set",
            "names",
            "select",
            "aligned",
            "batches",
            "readers",
            "limited",
        ],
        "image_set": ["ImageSet"],
    },
)
