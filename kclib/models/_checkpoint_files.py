"""Checkpoint files as they come: told by their content, whatever their suffix; no code of theirs is run."""

import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kclib.errors import DamagedFileError, InvalidValueError, MissingFileError, reason

# By their first bytes: files that are no checkpoints, what they are, and what would be right.
_OTHERS = {
    b"version https://git-lfs": "is a Git LFS pointer in place of the file; fetch it with git lfs pull",
    b"<": "is a web page, so a download went wrong; fetch the file again",
    b"\x89HDF": "is an HDF5 file, as Keras writes; give a checkpoint of the PyTorch network",
    b"\x93NUMPY": "is a NumPy array; give a state dict that torch.save or safetensors wrote",
    b"\x1f\x8b": "is packed by gzip; unpack it first",
    b"\xfd7zXZ": "is packed by xz; unpack it first",
    b"7z\xbc\xaf": "is packed by 7-Zip; unpack it first",
}
_ONNX = "is an ONNX file; give a checkpoint of the PyTorch network"
# What files in torch's format of before 1.6 often hold beside weights; newer ones can be asked.
_OFTEN = (
    "argparse.Namespace", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype",
)  # fmt: skip
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")  # to suggest by, never to tell by
_LOOKED_AT = 64  # bytes


class Unread:
    """An empty stand-in for an object whose class torch's weights-only format does not allow.

    That class is never imported. A subclass of this one is made for each, to keep its name.
    """

    def __init__(self, *args):
        """Forget what it is made from."""

    def __setstate__(self, state):
        """Forget what the object held."""


def read(path: Path) -> object:
    """Return what a file holds: a safetensors file's tensors by name, or whatever torch.save was given.

    Objects of classes that torch's weights-only format does not know (options, configurations, whole
    networks) are `Unread`.

    Raises
    ------
    MissingFileError
        There is no such file.
    DamagedFileError
        It is truncated, no checkpoint, or made to run code.
    InvalidValueError
        It is a folder, or a file of another kind; the sentence says which.
    """
    head = _head(path)
    if is_safetensors(head):
        return _safetensors(path)
    if head.lstrip().startswith(b"{"):
        return _sharded(path)
    _refuse_others(path, head)
    names = _unknown(path, head)
    unread = [(type(name, (Unread,), {}), name) for name in names]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(unread), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # torch warns of some pickles before it refuses them
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = f" ({', '.join(names[:3])})" if names and names is not _OFTEN else ""
        raise DamagedFileError(
            f"{path} is damaged or holds more than tensors{named}, which is never unpickled; "
            "give a safetensors file or what torch.save(network.state_dict(), path) wrote."
        ) from error
    except Exception as error:  # a damaged file can make its reader raise almost anything
        raise DamagedFileError(
            f"{path} is not a whole safetensors file or weights-only checkpoint ({reason(error)})."
        ) from error


def is_compressed(path: Path) -> bool:
    """Tell whether a file is one that `compression.save` wrote."""
    try:
        with safe_open(path, framework="pt") as file:
            return "kclib" in (file.metadata() or {})
    except Exception:  # whatever it is, its reader will say
        return False


def is_torchs(path: Path) -> bool:
    """Tell whether a file looks like one that torch.save wrote: a zip archive or a pickle."""
    return _head(path).startswith((b"PK\3\4", b"\x80"))


def is_safetensors(head: bytes) -> bool:
    """Tell whether a file with these first bytes is one: the length of a JSON object, and its brace."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32


def _head(path: Path) -> bytes:
    if os.path.isdir(path):
        inside = [
            x.name for x in sorted(path.iterdir()) if x.suffix in (".safetensors", ".bin", ".pt", ".pth")
        ]
        hint = f", such as {inside[0]}" if inside else ""
        raise MissingFileError(f"weights file {path} is a folder; give a file in it{hint}.")
    try:
        with open(path, "rb") as file:
            return file.read(_LOOKED_AT)
    except FileNotFoundError as error:
        raise MissingFileError(f"weights file {path} does not exist.") from error
    except (OSError, ValueError) as error:
        raise MissingFileError(f"weights file {path} cannot be read ({reason(error)}).") from error


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # a damaged file can make its reader raise almost anything
        raise DamagedFileError(f"{path} is not a whole safetensors file ({reason(error)}).") from error


def _sharded(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of all files that an index names, which lie beside it."""
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = [path.parent / name for name in names if Path(name).name == name]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise DamagedFileError(f"{path} is JSON, but no index of a checkpoint's files.") from error
    if len(shards) < len(names):
        raise DamagedFileError(f"{path} names files in other folders; they must lie beside it.")
    tensors = {}
    for shard in shards:
        content = None if shard.suffix == ".json" else read(shard)  # an index may not name itself
        if not isinstance(content, dict):
            raise DamagedFileError(f"{shard}, which {path.name} names, holds no state dict.")
        tensors |= content
    return tensors


def _refuse_others(path: Path, head: bytes) -> None:
    """Raise an error that says what a file is, if it is not a checkpoint."""
    said = next((said for start, said in _OTHERS.items() if head.lstrip().startswith(start)), "")
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and head[2:3] == b"\x12"):
        said = _ONNX
    if head.startswith(b"PK\3\4"):
        said = _zipped(path)
    if said:
        raise InvalidValueError(f"{path} {said}.")


def _zipped(path: Path) -> str:
    """Return what a zip archive is if torch.load is not for it."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):  # torch will say
        return ""
    folders = {part for name in names for part in Path(name).parts[:-1]}
    if "code" in folders:
        return "is a TorchScript archive, which holds code; give torch.save(network.state_dict(), path)"
    if any(Path(name).name == "data.pkl" for name in names):
        return "holds a program of torch.export; give its state dict" if "models" in folders else ""
    if all(name.endswith(".npy") for name in names):
        return "is a NumPy archive; give a state dict that torch.save or safetensors wrote"
    if "model.weights.h5" in names:
        return "is a Keras model; give a checkpoint of the PyTorch network"
    return "is a zip archive and no checkpoint; unpack it and give the checkpoint in it"


def _unknown(path: Path, head: bytes) -> Sequence[str]:
    """Return the classes and functions that a file names and torch's format does not know."""
    if not head.startswith(b"PK\3\4"):
        return _OFTEN
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # a damaged file, of which torch.load will say more
        return ()
