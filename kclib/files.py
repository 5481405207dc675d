"""Whole files or none: atomic writes, checksums, and where the project's files lie."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from kclib.errors import DamagedFileError, KclibError, MissingFileError, StorageError


def data_dir() -> Path:
    """Return the folder of models and data sets: ``$KCLIB_DATA``, else ``data/`` of the checkout."""
    return Path(os.environ.get("KCLIB_DATA") or Path(__file__).parents[1] / "data").absolute()


def expanded(path: str | os.PathLike) -> Path:
    """Return a path with ``~`` and ``~user`` as the home folder they mean, where there is one."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shipped(path: Path, expected: str) -> Path:
    """Return the path of a shipped file whose SHA-256 is as `expected`.

    Raises
    ------
    MissingFileError, DamagedFileError
    """
    if not path.is_file():
        raise MissingFileError(
            f"{path} is missing; restore it from the repository, or set KCLIB_DATA to where it lies."
        )
    if (found := sha256(path)) != expected:
        raise DamagedFileError(
            f"{path} has SHA-256 {found}, but must have {expected}; restore it from the repository."
        )
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its name only if the block succeeds.

    Readers see the old file or the new one, never a part; after a failure the old one is left.

    Raises
    ------
    StorageError
        If the file system refuses (full disk, permission, missing folder that cannot be made).
    """
    path = Path(path)
    if "\0" in str(path):
        raise StorageError(f"{str(path)!r} could not be written: a file's name must not hold NUL.")
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=f".tmp{path.suffix}")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide reports from other readers
        os.replace(temporary, path)
    except KclibError:
        raise
    except (OSError, SafetensorError) as error:  # safetensors wraps what the file system said
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"{path} could not be written: {reason}.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
