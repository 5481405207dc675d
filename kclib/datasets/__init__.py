"""Load labelled images, by name or as the user has them.

`load_data` takes a name or ``folder:PATH``, `as_image_set` a torch data set, a loader or arrays; both return
an `ImageSet`. Classes are matched to a network's outputs by their names, and pixel values are those of the
file. Where something is unclear, an error says in one sentence what to give.
"""

from kclib._util import lazy_names

__getattr__, __dir__, __all__ = lazy_names.attach(
    __name__,
    submod_attrs={
        "_loader": ["load_data", "train_and_test", "as_image_set", "batches", "limited"],
        "_image_set": ["ImageSet"],
    },
)
