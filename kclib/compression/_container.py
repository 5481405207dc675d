"""A safetensors file with a description and a hash of both: written whole, checked before it is believed."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from safetensors import SafetensorError, deserialize

from kclib import __version__
from kclib._util import files
from kclib.errors import DamagedFileError, InvalidValueError, MissingFileError, reason

if TYPE_CHECKING:  # torch takes seconds to import, and what a file holds is told without it
    from torch import Tensor

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
# What torch calls the types of safetensors.
_TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it.

    Attributes
    ----------
    dtype : str
        As torch names it, such as ``float32``.
    shape : tuple of int
    content : bytes
    """

    dtype: str
    shape: tuple[int, ...]
    content: bytes


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


def write(path: Path, description: dict, tensors: "Mapping[str, Tensor]") -> Contents:
    """Write tensors and what they are.

    Raises
    ------
    StorageError
        It could not be written; an older file of this name is then still whole.
    """
    from safetensors.torch import save_file

    description = {"format": FORMAT, "kclib": __version__} | description
    tensors, text = _apart(tensors), json.dumps(description)
    held = {name: _stored(value) for name, value in tensors.items()}
    digest = _digest(text, held)
    with files.replacing(path) as temporary:
        # one entry, for safetensors writes several in an order of its own
        save_file(tensors, temporary, metadata={"kclib": f"{digest} {text}"})
        n_bytes = temporary.stat().st_size
    return _contents(path, description, digest, held, n_bytes)


def inspect(path: str | Path) -> Contents:
    """Return what a file holds, without its network, and without torch.

    Raises
    ------
    MissingFileError, DamagedFileError, InvalidValueError
        As in `read`.
    """
    path = files.expanded(path)
    description, digest, held = _checked(path)
    return _contents(path, description, digest, held, path.stat().st_size)


def read(path: Path) -> "tuple[dict, str, dict[str, Tensor]]":
    """Return a file's description, hash and tensors, once they agree.

    Raises
    ------
    MissingFileError
    DamagedFileError
        The file is truncated, tampered with, or no compressed model.
    InvalidValueError
        It was written by a newer version.
    """
    import torch

    def tensor(stored: Stored) -> "Tensor":
        dtype = getattr(torch, stored.dtype)
        if not stored.content:
            return torch.empty(stored.shape, dtype=dtype)
        return torch.frombuffer(bytearray(stored.content), dtype=torch.uint8).view(dtype).view(stored.shape)

    description, digest, held = _checked(path)
    return description, digest, {name: tensor(held.pop(name)) for name in list(held)}


def _checked(path: Path) -> tuple[dict, str, dict[str, Stored]]:
    """Return a file's description, hash and what it holds, once they agree."""
    if not os.path.isfile(path):
        raise MissingFileError(
            f"{path} does not exist or is not a file; it must be one that `kclib compress` wrote."
        )
    try:
        content = path.read_bytes()
        held = {
            name: Stored(_TYPES[x["dtype"]], tuple(x["shape"]), bytes(x["data"]))
            for name, x in deserialize(content)
        }
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    except (SafetensorError, OSError, ValueError, LookupError, RuntimeError) as error:
        if _is_torchs(path):
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
    digest = _digest(text, held)
    if stated != digest:
        raise DamagedFileError(
            f"the contents of {path} do not have the SHA-256 it states; it was changed after it was written."
        )
    return description, digest, held


def _is_torchs(path: Path) -> bool:
    from kclib.models import _checkpoint_files  # which imports torch

    return _checkpoint_files.is_torchs(path)


def _contents(
    path: Path, description: dict, digest: str, held: Mapping[str, Stored], n_bytes: int
) -> Contents:
    parts = dict.fromkeys(_PARTS.values(), 0)
    for name, value in held.items():
        part = _PARTS.get(name.split(" ")[0], "unknown to this version")
        parts[part] = parts.get(part, 0) + len(value.content)
    parts["header"] = n_bytes - sum(parts.values())
    return Contents(path, description, digest, pd.Series(parts, dtype="int64", name="bytes"))


def _digest(text: str, held: Mapping[str, Stored]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(held):
        value = held[name]
        digest.update(f"{name} torch.{value.dtype} {value.shape}".encode())
        digest.update(value.content)
    return digest.hexdigest()


def _stored(value: "Tensor") -> Stored:
    """Return a tensor from `_apart` as a file holds it."""
    import torch

    content = value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return Stored(str(value.dtype).removeprefix("torch."), tuple(value.shape), content)


def _apart(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
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
