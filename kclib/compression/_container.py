"""A safetensors file with a description and a hash of both: written whole, checked before it is believed."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kclib import __version__
from kclib._util import files
from kclib.errors import DamagedFileError, InvalidValueError, MissingFileError, reason
from kclib.models import _checkpoint_files

# 1 knew neither int4, nor tensors in a precision of their own; 2 no extra state; 3 no entropy-coded weights
FORMAT = 4
# What the first word of a tensor's name says it is.
_PARTS = {
    "indices": "indices",
    "frequencies": "frequency tables",
    "codebook": "codebooks",
    "scales": "scales",
    "linear": "linear weights",
    "state": "other parameters and buffers",
    "steps": "other parameters and buffers",
    "extra": "other parameters and buffers",
}


@dataclass(frozen=True)
class Contents:
    """What a file says of itself.

    Attributes
    ----------
    path : pathlib.Path
    description : dict
        ``format``, ``kclib`` (the version that wrote it), ``architecture``, ``accuracy`` (percent), and by
        name ``groups``, ``layers``, ``stored`` (other parameters, which are rounded) and
        ``extra`` (modules' extra state); JSON values, None if unknown.
    sha256 : str
        Of the description and of each tensor's name, type, shape and bytes.
    bytes : pandas.Series
        Bytes of each part; ``header`` holds names, types, shapes and the description. They sum to the file's.
    """

    path: Path
    description: dict
    sha256: str
    bytes: pd.Series

    @property
    def groups(self) -> pd.DataFrame:
        """One row a group: clusters, kernels, bits of a fixed-width index, precision, turned, seed, dtype."""
        return pd.DataFrame.from_dict(self.description["groups"], orient="index")

    @property
    def layers(self) -> pd.DataFrame:
        """One row a layer: group, shape, transposed, how its indices are coded, and whose they are."""
        return pd.DataFrame.from_dict(self.description["layers"], orient="index")


def write(path: Path, description: dict, tensors: Mapping[str, Tensor]) -> Contents:
    """Write tensors and what they are.

    Raises
    ------
    StorageError
        It could not be written; an older file of this name is then still whole.
    """
    description = {"format": FORMAT, "kclib": __version__} | description
    tensors, text = _apart(tensors), json.dumps(description)
    digest = _digest(text, tensors)
    with files.replacing(path) as temporary:
        # one entry, for safetensors writes several in an order of its own
        save_file(tensors, temporary, metadata={"kclib": f"{digest} {text}"})
        n_bytes = temporary.stat().st_size
    return _contents(path, description, digest, tensors, n_bytes)


def inspect(path: str | Path) -> Contents:
    """Return what a file holds, without its network.

    Raises
    ------
    MissingFileError, DamagedFileError, InvalidValueError
        As in `read`.
    """
    path = files.expanded(path)
    description, digest, tensors = read(path)
    return _contents(path, description, digest, tensors, path.stat().st_size)


def read(path: Path) -> tuple[dict, str, dict[str, Tensor]]:
    """Return a file's description, hash and tensors, once they agree.

    Raises
    ------
    MissingFileError
    DamagedFileError
        The file is truncated, tampered with, or no compressed model.
    InvalidValueError
        It was written by a newer version.
    """
    if not path.is_file():
        raise MissingFileError(
            f"{path} does not exist or is not a file; it must be one that `kclib compress` wrote."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        if _checkpoint_files.is_torchs(path):
            raise DamagedFileError(
                f"{path} is no safetensors file but a checkpoint; `kclib compress --weights {path}` takes it."
            ) from error
        raise DamagedFileError(f"{path} is truncated or no safetensors file ({reason(error)}).") from error
    if "kclib" not in metadata:
        raise DamagedFileError(f"{path} holds no compressed model; `kclib compress` writes such files.")
    stated, _, text = metadata["kclib"].partition(" ")
    try:
        description = json.loads(text)
        version = description["format"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise DamagedFileError(f"the description in {path} is not whole ({reason(error)}).") from error
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise InvalidValueError(
            f"{path} has format {version!r}, and this kclib ({__version__}) reads up to {FORMAT}; "
            "use the version that wrote it, or a newer one."
        )
    digest = _digest(text, tensors)
    if stated != digest:
        raise DamagedFileError(
            f"the contents of {path} do not have the SHA-256 it states; it was changed after it was written."
        )
    return description, digest, tensors


def _contents(
    path: Path, description: dict, digest: str, tensors: Mapping[str, Tensor], n_bytes: int
) -> Contents:
    parts = dict.fromkeys(_PARTS.values(), 0)
    for name, value in tensors.items():
        part = _PARTS.get(name.split(" ")[0], "unknown to this version")
        parts[part] = parts.get(part, 0) + value.nbytes
    parts["header"] = n_bytes - sum(parts.values())
    return Contents(path, description, digest, pd.Series(parts, dtype="int64", name="bytes"))


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if value.numel():
            digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors wants them: on the CPU, contiguous, none in another's memory."""
    result, seen = {}, set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage()
        result[name] = (
            value.clone() if storage.data_ptr() in seen or storage.nbytes() > value.nbytes else value
        )
        seen.add(storage.data_ptr())
    return result
