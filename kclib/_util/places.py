"""Folders that libraries write to at home, for users whose home may not be written to, and their variables.

Folders are set when `kclib` is imported, for the libraries imported later and the processes that are started.
"""

import atexit
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from kclib.errors import MissingFileError

_VARIABLE = "KCLIB_SCRATCH"  # by which a process knows that its parent has set all this


def user_cache() -> Path:
    """Return the folder that a user's programs keep caches in; it need not be there."""
    mac = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(mac))


def is_writable(folder: Path) -> bool:
    """Tell whether a folder may be written to, or made."""
    if folder.parts[:1] == ("~",):  # the home of a user who has none
        return False
    nearest = next(x for x in (folder, *folder.absolute().parents) if os.path.lexists(x))
    return os.path.isdir(nearest) and os.access(nearest, os.W_OK | os.X_OK)


def compiles_anew() -> bool:
    """Tell whether what numba compiles is gone when this process ends."""
    scratch = os.environ.get(_VARIABLE)
    return bool(scratch) and os.environ["NUMBA_CACHE_DIR"].startswith(scratch)


def prepare() -> None:
    """Point libraries that find no folder to one of this process, which goes with it."""
    if _VARIABLE in os.environ or not (lacking := _lacking()):
        return
    try:
        scratch = tempfile.mkdtemp(prefix="kclib-")
    except OSError:  # each library says itself what it cannot do without
        return
    os.environ |= {name: os.path.join(scratch, name) for name in lacking} | {_VARIABLE: scratch}
    if os.path.expanduser("~") == "~":  # a user whom the system does not know, as containers have
        os.environ["HOME"] = scratch
    for name in lacking:
        os.mkdir(os.environ[name], mode=0o700)
    if "numba" in sys.modules:  # it has read its variables
        sys.modules["numba"].config.CACHE_DIR = os.environ.get("NUMBA_CACHE_DIR", "")
    creator = os.getpid()
    atexit.register(lambda: os.getpid() == creator and shutil.rmtree(scratch, ignore_errors=True))


def check_folder() -> None:
    """Raise a `MissingFileError` if the working folder is gone, where libraries end the process."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise MissingFileError("the working folder is gone; change to a folder that is there.") from error


@contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables in this block, for the processes that are started in it."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _lacking() -> list[str]:
    """Return the variables of folders that are not set, and whose defaults may not be written to."""
    mac = sys.platform == "darwin"
    config = Path(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"))
    homes = {
        "NUMBA_CACHE_DIR": user_cache() / "numba",
        "MPLCONFIGDIR": Path(os.path.expanduser("~/.matplotlib")) if mac else config / "matplotlib",
        "IPYTHONDIR": Path(os.path.expanduser("~/.ipython")),
        "JUPYTER_RUNTIME_DIR": Path(
            os.path.expanduser("~/Library/Jupyter" if mac else "~/.local/share/jupyter")
        ),
    }
    given = {name: os.environ.get(name) for name in homes}
    lacking = [x for x, home in homes.items() if not is_writable(Path(given[x] or home))]
    # Beside the code is numba's first choice, for this package and for UMAP's.
    rooms = [x for x in Path(__file__).parents[1].iterdir() if x.is_dir() and x.name != "__pycache__"]
    beside = [*rooms, Path(sysconfig.get_path("purelib"), "pynndescent")]
    if "NUMBA_CACHE_DIR" in lacking and all(is_writable(x / "__pycache__") for x in beside if x.is_dir()):
        lacking.remove("NUMBA_CACHE_DIR")
    return lacking
