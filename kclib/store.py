"""Results on disk under a content key: one safetensors file an entry, written whole or not at all."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import save_file

from kclib import files


@dataclass(frozen=True)
class Entry:
    """One stored result.

    Attributes
    ----------
    key : dict
        What the result depends on, JSON values.
    row : dict
        Its numbers, JSON values.
    arrays : dict of str to numpy.ndarray
        Its arrays, any shape and dtype that safetensors holds.
    """

    key: dict
    row: dict
    arrays: dict[str, np.ndarray]


class Store:
    """A folder of entries, each named by the SHA-256 of its key.

    Parameters
    ----------
    root : path, optional
        ``$KCLIB_STORE``, else ``cache/store`` in the data folder.
    """

    def __init__(self, root: str | Path | None = None):
        default = os.environ.get("KCLIB_STORE") or files.data_dir() / "cache" / "store"
        self.root = Path(root or default)

    def get(self, key: dict) -> Entry | None:
        """Return the entry of `key`, or None if it was never stored or its file is damaged."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return Entry(key, json.loads(file.metadata()["row"]), arrays)
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError):
            return None  # recomputed, and then overwritten

    def put(self, entry: Entry) -> Path:
        """Write an entry and return its path.

        Raises
        ------
        StorageError
            If it could not be written; an older entry of this key is then still whole.
        """
        path = self._path(entry.key)
        metadata = {"key": _canonical(entry.key), "row": json.dumps(entry.row)}
        arrays = {name: np.asarray(array, order="C") for name, array in entry.arrays.items()}
        with files.replacing(path) as temporary:
            save_file(arrays, temporary, metadata=metadata)
        return path

    def _path(self, key: dict) -> Path:
        name = hashlib.sha256(_canonical(key).encode()).hexdigest()
        return self.root / f"{name}.safetensors"


def _canonical(key: dict) -> str:
    return json.dumps(key, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
