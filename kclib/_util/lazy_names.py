"""Names of a room, loaded when they are first used: where libraries would end the process, a sentence."""

import lazy_loader

from kclib._util import places


def attach(package: str, **names) -> tuple:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` of a package, as `lazy_loader.attach` does.

    A name that is loaded while the working folder is gone raises a `MissingFileError`.
    """
    load, listed, everything = lazy_loader.attach(package, **names)

    def checked(name: str) -> object:
        if name in everything:  # not a module: the command line, which imports some, says it itself
            places.check_folder()
        return load(name)

    return checked, listed, everything
