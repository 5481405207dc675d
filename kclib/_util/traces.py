"""Tell where other people's code failed."""

import sys
import traceback
from pathlib import Path

_NOT_THEIRS = {"torch", "kclib", "numpy", "PIL", *sys.stdlib_module_names} - {"__main__"}


def where(error: BaseException) -> str:
    """Return where other people's code raised an error, as `` in file.py, line 7``; nothing if none ran."""
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _NOT_THEIRS:
            path = Path(frame.f_code.co_filename)
            file = "a notebook cell" if "ipykernel" in str(path) else path.name
            place = f" in {file}, line {line}"
    return place
