"""numba's compiler, and a sentence where what it compiles cannot be kept."""

import logging

from numba import cfunc, njit

from kclib._util import places

__all__ = ["cfunc", "njit"]

if places.compiles_anew():
    logging.getLogger(__name__).warning(
        "code is compiled anew each time, for neither this package nor the home folder may be written to; "
        "set NUMBA_CACHE_DIR to a folder of yours that may."
    )
