"""Standard input, output and error of a command, also where they are closed, full, or nobody reads them."""

import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress

from kclib.errors import KclibError, StorageError

_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF)  # what writing raises, without a file's name
_moved: dict[int, int] = {}  # where standard output is while `aside` has its number


def reopen() -> None:
    """Open what is closed of the three, so that no file that is opened later takes its number.

    Standard output then refuses what is written to it; what standard error is told is lost.
    """
    for number, name, how in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:  # as Python has it when it is started so
            null = os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            os.dup2(null, number)
            if null != number:
                os.close(null)
            setattr(sys, name, open(number, how, closefd=False))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error has it: names may be any bytes


@contextmanager
def aside() -> Iterator[None]:
    """Send to standard error what any code writes to standard output in this block, processes it starts too.

    Standard output has another `number` meanwhile, by which a file can be written there alone.
    """
    printed = sys.stdout
    printed.flush()
    _moved[1] = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        printed.flush()
        if os.name == "posix":
            ctypes.CDLL(None).fflush(None)  # what libraries in C still hold
        os.dup2(_moved[1], 1)
        os.close(_moved.pop(1))


def number(descriptor: int | None) -> int | None:
    """Return the number by which an open file of the command is open now; None is none."""
    return _moved.get(descriptor, descriptor)


def is_closed(descriptor: int) -> bool:
    """Tell whether nothing can be written to an open file, as `reopen` leaves standard output."""
    try:
        import fcntl
    except ImportError:  # Windows has none
        return False
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    except OSError:
        return True


def flush() -> None:
    """Write what standard output still holds; if it does not take it, drop it and raise an OSError."""
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "w") as null:  # or Python would try again at its end
            os.dup2(null.fileno(), 1)
        raise


def told(error: Exception) -> Exception:
    """Return what standard output raised as a `StorageError`, and any other error as it is.

    A name that is not UTF-8 cannot be written into a page or a table, so that is one too.
    """
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return StorageError("a path has a name that is not UTF-8, which a report cannot hold; rename it.")
    if isinstance(error, KclibError) or getattr(error, "errno", None) not in _REFUSED or error.filename:
        return error
    why = "it is closed" if error.errno == errno.EBADF else error.strerror
    return StorageError(f"standard output could not be written: {why}.")


def say(text: str) -> None:
    """Print a line on standard error, if it takes any."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
