"""The compressed model as a file, there and back; never unpickled, no dense weight made on the way."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kclib import models
from kclib._util import checks, files
from kclib.compression import (
    _architectures,
    _attributes,
    _container,
    _entropy_coding,
    _example_inputs,
    _extra_state,
    _layers,
    _packing,
    _precisions,
    _replacement,
    _trial_run,
)
from kclib.compression._container import Contents
from kclib.compression._layers import ClusteredConv2d, Codebook
from kclib.errors import DamagedFileError, InvalidValueError, KclibError, reason
from kclib.kernels import _convolutions

CODINGS = ("entropy", "fixed")
_RESIDENT = ("packed", "dense")


def save(
    network: models.Model | nn.Module,
    path: str | Path,
    *,
    architecture: str | None = None,
    indices: str = "entropy",
    accuracy: float | None = None,
) -> Contents:
    """Write a compressed network.

    Parameters
    ----------
    network : Model or torch.nn.Module
        From `_replacement.compress`. Its codebooks, and what `_precisions.quantize` rounded, are rounded to
        their precision, which changes nothing unless they were trained since. The extra state of modules
        (``get_extra_state``) is kept: tensors, bytes, and what JSON knows, in lists, tuples and dicts.
    path : path
    architecture : str, optional
        A name that `loading.load_model` knows, from which `load` can build the network; a Model's own by
        default, where it is such a name.
    indices : {"entropy", "fixed"}
        Entropy-coded, or ceil(log2 K) bits each; linear weights that are whole numbers likewise, or in 8 or 4
        bits each. A group, or such a weight, that entropy coding would make larger is written in fixed width.
    accuracy : float, optional
        In percent, if known.

    Raises
    ------
    InvalidValueError, UnknownNameError
        A network that is not compressed; an unknown coding; extra state of another kind.
    StorageError
        It could not be written; an older file of this name is then still whole.

    Examples
    --------
    >>> import kclib, tempfile, torch
    >>> network = torch.nn.Conv2d(16, 16, 3)
    >>> small = kclib.compress(network, kclib.cluster(network, 8))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     contents = kclib.save(small, f"{folder}/small.safetensors", indices="fixed")
    >>> contents.bytes[["indices", "codebooks"]].to_dict()  # 256 indices of 3 bits, 8 kernels of 9 floats
    {'indices': 96, 'codebooks': 288}
    """
    if isinstance(network, models.Model) and architecture is None:
        architecture = network.name if ":" in network.name or network.name in models.names() else None
    network = models.network_of(network)
    if not _layers.clustered(network):
        raise InvalidValueError("the network has no clustered convolutions; compress it first.")
    if not isinstance(architecture, (str, type(None))):
        raise InvalidValueError(
            f"architecture is {architecture!r}; it must be a name that kclib.load_model knows."
        )
    if accuracy is not None:
        checks.check_real("accuracy", accuracy, lambda x: 0 <= x <= 100, "in percent, 0 to 100, or None")
    described, tensors = encoded(network, indices=indices)
    accuracy = None if accuracy is None else float(accuracy)
    description = {"architecture": architecture, "accuracy": accuracy} | described
    return _container.write(files.expanded(path), description, tensors)


def encoded(network: nn.Module, *, indices: str = "entropy") -> tuple[dict, dict[str, Tensor]]:
    """Return what `save` writes of a network: what it says of its parts, and the tensors by name.

    Raises
    ------
    InvalidValueError, UnknownNameError
        Values that a precision does not hold; an unknown coding.
    """
    checks.check_known("coding of indices", indices, CODINGS)
    tensors, stored = _architectures.stored(network, entropy_coded=indices == "entropy")
    kept, extra = _extra_state.stored(network)
    described, clustered = encoded_layers(network, indices=indices)
    return described | {"stored": stored, "extra": extra}, tensors | kept | clustered


def encoded_layers(network: nn.Module, *, indices: str = "entropy") -> tuple[dict, dict[str, Tensor]]:
    """Return the part of `encoded` that stands for the kernels of clustered convolutions."""
    groups, described, tensors = {}, {}, {}
    for codebook, members in _layers.by_codebook(network):
        group = _unused(codebook.group, groups)
        groups[group] = _described(codebook, members)
        values = _precisions.store(codebook.values, codebook.precision)
        values = _precisions.pack(values, codebook.precision)
        tensors |= {f"codebook {part} {group}": value for part, value in values.items()}
        named, codings = _stored_indices(group, codebook, members, indices)
        tensors |= named | _stored_scales(codebook, members)
        described |= _described_layers(network, group, codebook, members, codings)
    return {"groups": groups, "layers": described}, tensors


def load(
    path: str | Path,
    *,
    architecture: str | nn.Module | models.Model | None = None,
    resident: str = "packed",
    block_bytes: int = _layers.BLOCK_BYTES,
    device: str | torch.device = "cpu",
    inputs: _example_inputs.Inputs = None,
) -> models.Model:
    """Rebuild the network of a file, in eval mode; no dense weight is made on the way.

    It has the hooks and attributes of the architecture, and is run once, to see that it uses each clustered
    layer.

    Parameters
    ----------
    path : path
    architecture : str or torch.nn.Module or Model, optional
        The network to rebuild, by name or as it is (unchanged; its weights do not matter, its hooks do). By
        default the one that the file names, if it is one of torchvision's or the shipped one: no module is
        imported on a file's word.
    resident : {"packed", "dense"}
        Whether it keeps packed indices while it runs, or ordinary weights (`_replacement.expand`).
    block_bytes : int
        As in `_replacement.compress`.
    device : str or torch.device
    inputs
        As in `_replacement.compress`.

    Raises
    ------
    MissingFileError
    DamagedFileError
        The file is truncated, tampered with, or no compressed model.
    InvalidValueError, UnknownNameError
        It was written by a newer version, or by an older one that rounded activations; it does not fit the
        architecture, or this does not use a layer; no architecture is known.

    Examples
    --------
    >>> import kclib, tempfile, torch
    >>> network = torch.nn.Conv2d(3, 8, 3)
    >>> small = kclib.compress(network, kclib.cluster(network, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     contents = kclib.save(small, f"{folder}/small.safetensors")
    ...     again = kclib.load(f"{folder}/small.safetensors", architecture=network)
    >>> torch.equal(again.network.weight, small.weight)
    True
    """
    checks.check_known("kind of residence", resident, _RESIDENT)
    path = files.expanded(path)
    description, _, tensors = _container.read(path)
    if description.get("activations", {}) != {}:
        raise InvalidValueError(
            f"{path} rounds activations, and this kclib does not; read it with the version that wrote it "
            f"({description.get('kclib')})."
        )
    model = _architectures.of(path, description.get("architecture"), architecture)
    try:
        network = _with_layers(path, model.network, description, tensors, block_bytes)
        _architectures.fill(path, network, tensors, description.get("stored", {}))
        _extra_state.fill(path, network, tensors, description.get("extra", {}))
        source = models.network_of(architecture) if not isinstance(architecture, str | None) else None
        _trial_run.check(network, _layers.clustered(network), source=source, given=model, inputs=inputs)
        network = _replacement.expand(network, inputs=False) if resident == "dense" else network
    except KclibError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DamagedFileError(
            f"{path} does not describe itself as this version does ({reason(error)})."
        ) from error
    return replace(model, network=models.moved(network, device).eval())


def coded(codebook: Codebook, members: Mapping[str, ClusteredConv2d]) -> _entropy_coding.Coded | None:
    """Return the entropy-coded indices of a group's layers, or None where fixed width takes fewer bytes."""
    return _entropy_coding.smaller([module.members() for module in members.values()], codebook.n_members)


def _stored_indices(group, codebook, members, indices: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors that hold a group's indices, and how each layer's are coded."""
    found = coded(codebook, members) if indices == "entropy" else None
    if found is None:
        return {f"indices {name}": x.indices for name, x in members.items()}, dict.fromkeys(members, "fixed")
    tensors = {f"indices {name}": _bytes(words) for name, words in zip(members, found.words, strict=True)}
    codings = dict.fromkeys(members, "group")
    if found.table.size:
        tensors[f"frequencies group {group}"] = _bytes(found.table)
    for name, table in zip(members, found.tables, strict=True):
        if table.size:
            tensors[f"frequencies layer {name}"] = _bytes(table)
            codings[name] = "layer"
    return tensors, codings


def _with_layers(path, network: nn.Module, description: dict, tensors, block_bytes: int) -> nn.Module:
    """Return an empty network with clustered convolutions in place of those that the file describes."""
    modules = dict(network.named_modules(remove_duplicate=False))
    sizes = {layer["group"]: layer["shape"][2:] for layer in description["layers"].values()}
    codebooks = {
        name: _codebook(path, name, group, sizes.get(name), tensors)
        for name, group in description["groups"].items()
    }
    replaced, made = {}, {}
    for name, layer in description["layers"].items():
        convolution, codebook = modules.get(name), codebooks[layer["group"]]
        expected = tuple(layer["shape"]), layer["transposed"]
        if (
            not isinstance(convolution, (nn.Conv2d, nn.ConvTranspose2d))
            or _convolutions.form(convolution) != expected
        ):
            raise InvalidValueError(
                f"{path} holds layer {name} of shape {expected[0]}, which this architecture does not have; "
                "load it into the architecture it was made from."
            )
        owner, kind = layer["same_as"], ("group", "shape", "transposed", "coding")
        if any(description["layers"][owner][part] != layer[part] for part in kind):
            raise DamagedFileError(f"{path}: layers {name} and {owner} share indices but differ in kind.")
        if owner not in made:
            made[owner] = _layer_values(path, owner, layer, codebook, tensors)
        indices, scales = made[owner]
        clustered = ClusteredConv2d(
            convolution, codebook, indices, scales=scales, bias=convolution.bias, block_bytes=block_bytes
        )
        replaced[id(convolution)] = clustered
    return _attributes.swapped(network, replaced)


def _codebook(path, name: str, group: dict, size, tensors: Mapping[str, Tensor]) -> Codebook:
    """Return a group's codebook, of kernels of a size ``(kh, kw)``."""
    stored = {
        part: tensors[f"codebook {part} {name}"]
        for part in ("values", "steps")
        if f"codebook {part} {name}" in tensors
    }
    dtype, precision, turned = _precisions.named(group["dtype"]), group["precision"], bool(group["turned"])
    shape = (len(stored["steps"]), *size) if precision == "int4" else ()
    values = _precisions.restore(_precisions.unpack(stored, precision, shape)).to(dtype)
    if values.dim() != 3 or not len(values) or not torch.isfinite(values).all():
        raise DamagedFileError(f"{path}: the codebook of group {name} is not finite kernels (K, kh, kw).")
    if turned and values.shape[1] != values.shape[2]:
        raise DamagedFileError(f"{path}: the kernels of group {name} are turned but not square.")
    return Codebook(values, group=name, precision=precision, turned=turned, seed=group["seed"])


def _layer_values(
    path, name: str, layer: dict, codebook: Codebook, tensors
) -> tuple[Tensor, nn.Parameter | None]:
    """Return a layer's packed indices and its scales."""
    n, stored = int(np.prod(layer["shape"][:2])), tensors[f"indices {name}"]
    if tuple(codebook.values.shape[1:]) != tuple(layer["shape"][2:]):
        raise DamagedFileError(f"{path}: the codebook of layer {name} has kernels of another size.")
    if layer["coding"] == "fixed":
        if stored.dtype != torch.uint8 or stored.shape != (_packing.index_bytes(n, codebook.bits),):
            raise DamagedFileError(f"{path}: layer {name} has not {n} indices of {codebook.bits} bits.")
        members = _packing.unpack(stored, codebook.bits, 0, n).numpy()
    else:
        owner = {"layer": f"layer {name}", "group": f"group {layer['group']}"}[layer["coding"]]
        frequencies = _entropy_coding.unpacked_counts(
            tensors[f"frequencies {owner}"].numpy(), codebook.n_members
        )
        members = _entropy_coding.decode(stored.numpy().view(np.uint32), frequencies, n)
    if members.size and members.max() >= codebook.n_members:
        raise DamagedFileError(f"{path}: layer {name} has an index beyond its {codebook.n_members} entries.")
    scales = tensors.get(f"scales {name}")
    if scales is not None:
        if scales.shape != (n,) or not torch.isfinite(scales).all():
            raise DamagedFileError(f"{path}: layer {name} has not {n} finite scales.")
        scales = nn.Parameter(scales.to(codebook.values.dtype))
    return torch.from_numpy(_packing.pack(members, codebook.bits)), scales


def _described(codebook: Codebook, members: Mapping[str, ClusteredConv2d]) -> dict:
    return {
        "clusters": len(codebook.values),
        "kernels": sum(module.n_kernels for module in members.values()),
        "bits": codebook.bits,
        "precision": codebook.precision,
        "turned": codebook.turned,
        "seed": codebook.seed,
        "dtype": str(codebook.values.dtype).removeprefix("torch."),
    }


def _described_layers(network, group: str, codebook: Codebook, members, codings: Mapping[str, str]) -> dict:
    """Return what the file says of each layer of a group, those that share another's indices among them."""
    owners = {id(module.indices): name for name, module in members.items()}
    return {
        name: {
            "group": group,
            "shape": list(module.shape),
            "transposed": module.transposed,
            "coding": codings[owners[id(module.indices)]],
            "same_as": owners[id(module.indices)],
        }
        for name, module in _layers.clustered(network).items()
        if module.codebook is codebook
    }


def _stored_scales(codebook: Codebook, members: Mapping[str, ClusteredConv2d]) -> dict[str, Tensor]:
    kind = _precisions.scale_type(codebook.precision)
    return {
        f"scales {name}": _precisions.checked(module.scales.detach().to("cpu", kind), codebook.precision)
        for name, module in members.items()
        if module.scales is not None
    }


def _bytes(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.view(np.uint8).copy())


def _unused(name: str, taken: Mapping) -> str:
    """Return a group's name, numbered if another codebook already has it."""
    number, result = 1, name
    while result in taken:
        number += 1
        result = f"{name} {number}"
    return result
