"""Whole files or none: atomic writes, checksums, and where the project's files lie."""

import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from kclib._util import places, streams
from kclib.errors import DamagedFileError, KclibError, MissingFileError, StorageError

STDOUT = Path("/dev/fd/1")
_LINKS = 40  # that the system follows at most
_GARBLED = "it is a terminal, and the content is binary; redirect it"


def checkout() -> Path | None:
    """Return the checkout that this package runs from, or None if it was installed alone."""
    folder = Path(__file__).parents[2]
    return folder if (folder / "pyproject.toml").is_file() else None


def data_dir() -> Path:
    """Return the folder of models and data sets.

    That is ``$KCLIB_DATA``, else ``data`` of the checkout, else ``kclib/data`` in the user's own cache.
    """
    home = checkout() or places.user_cache() / "kclib"
    return expanded(os.environ.get("KCLIB_DATA") or home / "data").absolute()


def expanded(path: str | os.PathLike) -> Path:
    """Return a path with ``~`` and ``~user`` as the home folder they mean, where there is one."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def cache_dir() -> Path:
    """Return the folder of what was computed or unpacked, the first of these that may be written to.

    That is ``cache`` in `data_dir`, ``kclib`` in the user's own cache (``$XDG_CACHE_HOME`` or ``~/.cache``),
    and ``kclib-UID`` among temporary files.

    Raises
    ------
    StorageError
        None may be.
    """
    for folder in (data_dir() / "cache", places.user_cache() / "kclib"):
        if places.is_writable(folder):
            return folder
    return _temporary_cache()


def _temporary_cache() -> Path:
    """Return a folder among temporary files that nobody but this user can change."""
    try:
        folder = Path(tempfile.gettempdir()) / f"kclib-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise StorageError(f"no folder may be written to ({error}); set KCLIB_STORE and TMPDIR.") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise StorageError(f"{folder} is not this user's alone; set KCLIB_STORE to a folder that is.")
    return folder


def located(value: object, folder: Path, *, is_path: bool = False) -> object:
    """Return a value with the path in it, if it has one, as an absolute one that was relative to a folder.

    ``folder:PATH`` has one; another text is one if `is_path` says so and it is not empty.
    """
    if not isinstance(value, str) or not value:
        return value
    kind, _, path = value.partition(":")
    if kind == "folder" and path:
        return f"folder:{(folder / expanded(path)).absolute()}"
    return str((folder / expanded(value)).absolute()) if is_path else value


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shipped(path: Path, expected: str) -> Path:
    """Return the path of a shipped file whose SHA-256 is as `expected`."""
    if not path.is_file() and not checkout():
        raise MissingFileError(
            f"{path} is missing, for the shipped model and images come with the repository of kclib and not "
            "with the installed package; set KCLIB_DATA to the repository's folder data."
        )
    if not path.is_file():
        raise MissingFileError(
            f"{path} is missing; restore it from the repository, or set KCLIB_DATA to where it lies."
        )
    if (digest := sha256(path)) != expected:
        raise DamagedFileError(
            f"{path} has SHA-256 {digest}, but must have {expected}; restore it from the repository."
        )
    return path


def output(text: str) -> Path:
    """Return the path of an output as the command line names it; ``-`` is standard output."""
    return STDOUT if text == "-" else Path(text)


def is_text(path: str | os.PathLike) -> bool:
    """Tell whether a path is of UTF-8, so that a page or a notebook can hold it."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def is_stdout(path: Path) -> bool:
    """Tell whether a path is standard output, such as ``/dev/stdout``."""
    return _descriptor(path) == 1


def named(path: Path) -> str:
    """Return what users call an output, absolute."""
    return "standard output" if is_stdout(path) else os.path.abspath(path)


def is_stream(path: Path) -> bool:
    """Tell whether a path is a device, a named pipe or an open file such as ``/dev/stdout``."""
    if _descriptor(path) is not None:
        return True
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)


def check_output(path: Path, *, binary: bool = False, ours: bool = False) -> None:
    """Raise a `StorageError` if a path is nothing that `replacing` writes; worth asking before long work.

    Parameters
    ----------
    binary : bool
        Whether what will be written would garble a terminal.
    ours : bool
        As in `replacing`.
    """
    if "\0" in str(path):
        raise _refusal(path, "a file's name must not hold NUL")
    if is_stream(path):
        descriptor = streams.number(_descriptor(path))
        if is_stdout(path) and streams.is_closed(descriptor):
            raise _refusal(path, "it is closed")
        if binary and descriptor is not None and os.isatty(descriptor):
            raise _refusal(path, _GARBLED)
        return
    target = Path(os.path.realpath(path))
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    except OSError as error:
        raise _refusal(path, error.strerror) from error
    if stat.S_ISDIR(mode):
        raise _refusal(path, "it is a folder; give the name of a file")
    if not stat.S_ISREG(mode):
        raise _refusal(path, "it is no ordinary file, and would be lost")
    folder = next(x for x in target.parents if os.path.lexists(x))
    if not os.access(folder, os.W_OK):
        raise _refusal(path, f"{folder} may not be changed")
    if os.path.lexists(target) and not (ours or os.access(target, os.W_OK)):
        raise _refusal(path, "it may not be changed")


@contextmanager
def replacing(path: Path, *, ours: bool = False) -> Iterator[Path]:
    """Yield a temporary path whose content `path` gets only if the block succeeds.

    Readers see the old file or the new one, never a part; after a failure the old one is left. A new file has
    the permissions that the umask leaves, and one that was there keeps its own. Symbolic links stay and their
    target is replaced. Of hard links only this name gets the new content. What cannot be replaced, a device,
    a pipe or standard output, is written to once the block has succeeded.

    Parameters
    ----------
    ours : bool
        Whether the file is made anew by whoever may write to its folder, as in a store that users share.

    Raises
    ------
    StorageError
        It is a folder, a socket or a block device, or the file system refuses (full disk, permission,
        missing folder that cannot be made).
    """
    path = expanded(path)
    check_output(path, ours=ours)
    try:
        if is_stream(path):
            with tempfile.TemporaryDirectory() as folder:
                temporary = Path(folder) / f"content{path.suffix}"
                temporary.touch()
                yield temporary
                _send(temporary, path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _swapped(Path(os.path.realpath(path)), kept=not ours) as temporary:
                yield temporary
    except KclibError:
        raise
    except (OSError, SafetensorError) as error:  # safetensors wraps what the file system said
        raise _refusal(path, getattr(error, "strerror", None) or error) from error


@contextmanager
def _swapped(target: Path, *, kept: bool) -> Iterator[Path]:
    """Yield a new file beside `target` that takes its place if the block succeeds, and what is kept of it."""
    # Names may have 255 bytes, and characters 4.
    name = f".{target.name[:40]}.{secrets.token_hex(6)}.tmp{target.suffix[:12]}"
    temporary = target.with_name(name)
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        like = os.stat(target if kept and target.exists() else temporary)
        yield temporary
        for owner in ((like.st_uid, -1), (-1, like.st_gid)):
            with suppress(PermissionError):
                os.chown(temporary, *owner)
        os.chmod(temporary, stat.S_IMODE(like.st_mode) & 0o777)  # libraries make files of their own, at 0600
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _send(content: Path, path: Path) -> None:
    """Write a file's bytes to a stream."""
    descriptor = streams.number(_descriptor(path))
    if is_stdout(path):
        sys.stdout.flush()
    with (
        open(content, "rb") as source,
        # Opened anew, a redirected file would lose what is in it; a pipe's reader is waited for.
        open(os.open(path, os.O_WRONLY) if descriptor is None else os.dup(descriptor), "wb") as out,
    ):
        if out.isatty() and b"\0" in content.read_bytes():
            raise _refusal(path, _GARBLED)
        shutil.copyfileobj(source, out)


def _descriptor(path: Path) -> int | None:
    """Return which open file of this process a path stands for, if it does."""
    text = os.path.abspath(path)
    for _ in range(_LINKS):
        if match := re.fullmatch(rf"(?:/dev|/proc/(?:self|{os.getpid()}))/fd/(\d+)", text):
            return int(match[1])
        try:
            text = os.path.abspath(os.path.join(os.path.dirname(text), os.readlink(text)))
        except (OSError, ValueError):
            return None
    return None


def _refusal(path: Path, reason: object) -> StorageError:
    return StorageError(f"{'standard output' if is_stdout(path) else path} could not be written: {reason}.")
