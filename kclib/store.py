"""Results on disk under a content key: one safetensors file an entry, written whole or not at all."""

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np
import pandas as pd
import safetensors
from safetensors.numpy import save_file

from kclib._util import checks, files
from kclib._util.progress_bars import tqdm
from kclib.errors import StorageError, UnknownNameError, reason

# Part of every key, by what is kept: raise a number when the same inputs would give other results.
VERSIONS = {"clustering": 2, "evaluation": 5, "layers": 1, "combination": 3, "neighbours": 3, "layout": 3}
_LOG = logging.getLogger(__name__)
_OURS = re.compile(r"[0-9a-f]{64}\.(safetensors|lock)|\..+\.tmp\.(safetensors|parquet)")  # others' files stay
_HOUR = 3600  # seconds: what is older and temporary belongs to a run that was killed
_TICK = 2 * 10**9  # nanoseconds within which a file system may not tell two changes of a file apart


@dataclass(frozen=True)
class Entry:
    """One stored result.

    Attributes
    ----------
    key : dict
        What the result depends on, JSON values; ``kind`` is one of `VERSIONS`.
    row : dict
        Its numbers, JSON values.
    arrays : dict of str to numpy.ndarray
        Its arrays, any shape and dtype that safetensors holds.
    """

    key: dict
    row: dict
    arrays: dict[str, np.ndarray]


class Store:
    """A folder of entries, each named by the SHA-256 of its key; any number of processes may write to it.

    Parameters
    ----------
    root : path, optional
        ``$KCLIB_STORE``, else ``store`` in `files.cache_dir`.
    """

    def __init__(self, root: str | Path | None = None):
        self.root = files.expanded(root or os.environ.get("KCLIB_STORE") or _default()).absolute()

    def has(self, key: dict) -> bool:
        """Tell whether there is a file for `key`; only `get` tells whether it is whole."""
        return self.path(key).is_file()

    def get(self, key: dict) -> Entry | None:
        """Return the entry of `key`, or None if it was never stored, or is damaged, which is logged."""
        path = self.path(key)
        if not path.is_file():
            return None
        entry = self._whole(path)
        if entry is None:
            why = "damaged" if os.access(path, os.R_OK) else "not readable"
            _LOG.warning("store entry %s is %s and will be computed again.", path, why)
        return entry

    def put(self, entry: Entry) -> Path:
        """Write an entry and return its path.

        Raises
        ------
        StorageError
            If it could not be written; an older entry of this key is then still whole.
        """
        path = self.path(entry.key)
        arrays = {name: np.asarray(array, order="C") for name, array in entry.arrays.items()}
        texts = {"key": _json(entry.key), "row": _json(entry.row)}
        with files.replacing(path, ours=True) as temporary:
            save_file(arrays, temporary, metadata=texts | {"sha256": _digest(texts, arrays)})
        return path

    def once(self, key: dict, compute: Callable[[], Entry], *, wait: bool = True) -> Entry | None:
        """Return the entry of `key`; if there is none yet, compute and put it, in one process at a time.

        Parameters
        ----------
        wait : bool
            Whether to wait for a process that is at it already; else None is returned at once.
        """
        if (entry := self.get(key)) is not None:
            return entry
        with self.claim(key, wait=wait) as ours:
            if not ours:
                return None
            entry = self._whole(self.path(key)) if self.has(key) else None  # another process may have put it
            if entry is None:
                entry = compute()
                self.put(entry)
            return entry

    @contextlib.contextmanager
    def claim(self, key: dict, *, wait: bool) -> Iterator[bool]:
        """Yield whether `key` is ours alone to compute in this block, on this file system.

        The claim of a process that dies ends with it.

        Parameters
        ----------
        wait : bool
            Whether to wait for who has it; else False is yielded at once.
        """
        lock = filelock.FileLock(self.root / "locks" / f"{self.path(key).stem}.lock")
        try:
            Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=wait)
        except filelock.Timeout:
            yield False
            return
        except OSError as error:
            raise StorageError(f"{lock.lock_file} could not be locked: {error.strerror}.") from error
        try:
            yield True
        finally:
            lock.release()

    def table(self, kind: str) -> pd.DataFrame:
        """Return all whole entries of a kind: their keys and rows, ``entry``, ``file_bytes`` and ``written``.

        What is damaged is left out, which is logged. The table is kept beside the entries as
        ``KIND.parquet``, from which only what is new or changed is read again. Lists and mappings in it are
        JSON text.

        Raises
        ------
        UnknownNameError
            No such kind.
        """
        if kind not in VERSIONS:
            raise UnknownNameError("kind of entry", kind, VERSIONS)
        path = self.root / f"{kind}.parquet"
        kept = _read_rows(path)
        paths = sorted((self.root / kind).glob("[!.]*.safetensors"))
        bar = tqdm(paths, desc="store", unit="entry", delay=2, leave=False)
        rows = [row for x in bar if (row := self._row(x, kept))]
        if self.root.is_dir() and [id(x) for x in rows] != [id(x) for x in kept.values()]:
            try:
                _write_rows(path, rows)
            except (StorageError, TypeError, ValueError, OverflowError) as error:  # it only saves time
                _LOG.info("%s", error)
        return pd.DataFrame(rows).drop(columns="checked", errors="ignore").convert_dtypes()

    def gc(
        self,
        *,
        days: float | None = None,
        dry_run: bool = False,
        agree: Callable[[pd.DataFrame], bool] | None = None,
    ) -> pd.DataFrame:
        """Remove what nobody will ask for, and return it: ``file``, ``why`` and ``bytes``.

        That is what is damaged, what earlier versions of the code computed, and what killed runs left.

        Parameters
        ----------
        days : float, optional
            Entries that were made longer ago go too.
        dry_run : bool
            Whether to remove nothing.
        agree : callable, optional
            Is shown what would go; if it is false of that, nothing is removed.

        Raises
        ------
        InvalidValueError
            Days below 0, or not finite.
        """
        if days is not None:
            checks.check_real("days", days, lambda x: x >= 0, "a finite number, at least 0")
        garbage = []
        paths = sorted([*self.root.glob("*"), *self.root.glob("*/*")])
        for path in tqdm(paths, desc="store", unit="file", delay=2, leave=False):
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                if why := self._why_not(path, days):
                    size = path.stat().st_size
                    garbage.append({"file": str(path.relative_to(self.root)), "why": why, "bytes": size})
        table = pd.DataFrame(garbage, columns=["file", "why", "bytes"])
        if dry_run or not (len(table) and (agree is None or agree(table))):
            return table if dry_run else table[:0]
        gone = [self._removed(self.root / row["file"], days) for row in garbage]
        return table[gone].reset_index(drop=True)

    def path(self, key: dict) -> Path:
        """Return where the entry of `key` is, or would be."""
        if key.get("kind") not in VERSIONS:
            raise UnknownNameError("kind of entry", str(key.get("kind")), VERSIONS)
        text = _json(key | {"version": VERSIONS[key["kind"]]}, sort_keys=True, separators=(",", ":"))
        return self.root / key["kind"] / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"

    def _removed(self, path: Path, days: float | None) -> bool:
        """Remove a file, if it still is of no use, and tell whether it was; StorageError if it cannot be."""
        try:
            if useless := bool(self._why_not(path, days)):  # meanwhile it may have been computed again
                path.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StorageError(f"{path} could not be removed: {error.strerror}.") from error
        return useless

    def _why_not(self, path: Path, days: float | None) -> str:
        """Return why a file is of no use; nothing if it is."""
        if not (_OURS.fullmatch(path.name) and path.is_file() and os.access(path, os.R_OK)):
            return ""
        age = time.time() - path.stat().st_mtime
        if path.name.startswith(".") or path.suffix == ".lock":
            left = age > _HOUR and not (path.suffix == ".lock" and _is_held(path))
            return "left by a run that ended" if left else ""
        if path.parent.name not in VERSIONS or path.suffix != ".safetensors":
            return "of an earlier version"
        if (entry := _read(path)) is None:
            return "damaged"
        if self.path(entry.key) != path:
            return "of an earlier version"
        return f"made more than {days:g} days ago" if days is not None and age > 24 * _HOUR * days else ""

    def _whole(self, path: Path) -> Entry | None:
        """Return a file's entry if it is whole, and under the name of its key."""
        entry = _read(path)
        return entry if entry is not None and self.path(entry.key) == path else None

    def _row(self, path: Path, kept: dict[str, dict]) -> dict:
        """Return an entry's row, as kept if its file is unchanged; nothing if it is not whole."""
        try:
            stat = path.stat()
        except FileNotFoundError:  # another process has just removed it
            return {}
        # ctime cannot be set back, as mtime can.
        checked = f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        if path.stem in kept and kept[path.stem]["checked"] == checked:
            return kept[path.stem]
        if (entry := _read(path)) is None:
            _LOG.warning("store entry %s is damaged and left out.", path)
        if entry is None or self.path(entry.key) != path:  # of an earlier version
            return {}
        if abs(time.time_ns() - stat.st_ctime_ns) < _TICK:
            checked = ""  # a change right now might not show
        row = entry.key | entry.row
        plain = {name: json.dumps(x) if isinstance(x, (list, dict)) else x for name, x in row.items()}
        written = pd.Timestamp(stat.st_mtime_ns, tz="UTC")
        about = {"entry": path.stem, "file_bytes": stat.st_size, "written": written, "checked": checked}
        return plain | about


def _default() -> Path:
    usual, root = files.data_dir() / "cache" / "store", files.cache_dir() / "store"
    if root != usual:
        _say_where(root, usual)
    return root


@functools.cache
def _say_where(root: Path, usual: Path) -> None:
    _LOG.warning(
        "results are in %s, for %s may not be written to; set KCLIB_STORE to another folder.", root, usual
    )


def _is_held(path: Path) -> bool:
    """Tell whether a process has this lock."""
    try:
        with filelock.FileLock(path, blocking=False):
            return False
    except filelock.Timeout:
        return True


def _read(path: Path) -> Entry | None:
    """Return a file's entry if it is whole."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            texts = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if texts.pop("sha256") != _digest(texts, arrays):
            return None
        entry = Entry(json.loads(texts["key"]), json.loads(texts["row"]), arrays)
        return entry if entry.key["kind"] in VERSIONS and isinstance(entry.row, dict) else None
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, AttributeError, OSError):
        return None


def _json(value: object, **options) -> str:
    """Return JSON, in which numpy's numbers are as Python's."""
    return json.dumps(value, default=np.generic.item, **options)


def _digest(texts: dict[str, str], arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _write_rows(path: Path, rows: list[dict]) -> None:
    table = pd.DataFrame(rows).convert_dtypes()
    table.attrs["sha256"] = _digest_of_rows(table)
    with files.replacing(path, ours=True) as temporary:
        temporary.write_bytes(table.to_parquet())  # pyarrow takes no path but UTF-8


def _read_rows(path: Path) -> dict[str, dict]:
    """Return the rows of a kept table by entry; none if it is damaged, and made again from the entries."""
    try:
        table = pd.read_parquet(io.BytesIO(path.read_bytes()))
        if table.attrs.get("sha256") == _digest_of_rows(table):
            return {row["entry"]: row for row in table.to_dict("records")}
    except Exception as error:  # damage can make its reader raise almost anything
        _LOG.info("%s is made anew (%s).", path, reason(error))
    return {}


def _digest_of_rows(table: pd.DataFrame) -> str:
    return hashlib.sha256(table.to_csv().encode("utf-8", "surrogatepass")).hexdigest()
