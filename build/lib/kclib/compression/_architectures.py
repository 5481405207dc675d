"""An architecture without values, and the values put into it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kclib import models
from kclib.compression import _layers, _precisions
from kclib.errors import DamagedFileError, InvalidValueError
from kclib.kernels import _copying

# How a file calls the parts of a tensor, before its name; until format 3 linear weights were as all others.
_STATE = {"values": "state ", "steps": "steps "}
_LINEAR = {part: f"linear {part} " for part in ("values", "steps", "frequencies")}


def of(path: Path, named: object, given: str | nn.Module | models.Model | None) -> models.Model:
    """Return the architecture of a file with every parameter and buffer on the meta device.

    Parameters
    ----------
    path : pathlib.Path
        The file, to be named in errors.
    named : object
        What the file says; nothing is imported on its word.
    given : str or torch.nn.Module or Model, optional
        What the caller says, which counts first.
    """
    if isinstance(given, models.Model):
        return replace(given, network=_without_values(given.network))
    if isinstance(given, nn.Module):
        return models.plain(type(given).__name__, _without_values(given))
    if isinstance(given, str):
        return _built(given)
    if given is not None:
        raise InvalidValueError(
            f"architecture is {given!r}; it must be a name, a torch.nn.Module or a Model."
        )
    if named is None:
        raise InvalidValueError(f"{path} does not name its architecture; pass the network, or its name.")
    if not isinstance(named, str):
        raise DamagedFileError(f"{path} says that its architecture is {named!r}; it must be a name.")
    if ":" in named:
        raise InvalidValueError(
            f"{path} was made from {named}, and no module is imported on a file's word; "
            f"pass architecture={named!r} (--model on the command line) if you trust it."
        )
    return _built(named)


def others(network: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers but those that clustered convolutions have in place of weights."""
    own = set()
    for module in _layers.clustered(network).values():
        own |= {id(x) for x in (module.indices, module.scales, module.codebook.values, module.codebook.turns)}
    named = (*network.named_parameters(), *network.named_buffers())
    return {name: value for name, value in named if id(value) not in own}


def stored(network: nn.Module, *, entropy_coded: bool = True) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """Return these as a file holds them, and what it says of those that have a precision of their own.

    Parameters
    ----------
    network : torch.nn.Module
    entropy_coded : bool
        Whether linear weights that are whole numbers are entropy-coded, where that takes fewer bytes.
    """
    tensors, described = {}, {}
    chosen, linear = _precisions.precisions(network), _precisions.linear_weights(network)
    for name, value in others(network).items():
        parts, precision = {"values": value}, chosen.get(id(value))
        if precision is not None:
            pack = _precisions.coded if entropy_coded else _precisions.pack
            parts = pack(_precisions.store(value, precision), precision)
            described[name] = {"precision": precision, "dtype": str(value.dtype).removeprefix("torch.")}
        places = _LINEAR if id(value) in linear else _STATE
        tensors |= {f"{places[part]}{name}": held for part, held in parts.items()}
    return tensors, described


def fill(
    path: Path, network: nn.Module, tensors: Mapping[str, Tensor], described: Mapping[str, dict]
) -> None:
    """Put a file's other parameters and buffers into a network of ours, wherever each is used.

    Raises
    ------
    DamagedFileError, InvalidValueError, UnknownNameError
        They are not whole; they are not those of this architecture; an unknown precision.
    """
    places = others(network)
    held = {
        x.removeprefix(y["values"]) for y in (_STATE, _LINEAR) for x in tensors if x.startswith(y["values"])
    }
    if wrong := held ^ set(places):
        raise InvalidValueError(
            f"{path} does not fit this architecture; only one of them has: {', '.join(sorted(wrong)[:5])}."
        )
    filled = {}
    for name, old in places.items():
        value = _restored(name, old.shape, tensors, described.get(name))
        if old.shape != value.shape:
            raise InvalidValueError(
                f"{path} has {name} of shape {tuple(value.shape)}, this architecture {tuple(old.shape)}."
            )
        is_parameter = isinstance(old, nn.Parameter)
        filled[id(old)] = nn.Parameter(value, old.requires_grad) if is_parameter else value
    for module in network.modules():
        for place in (module._parameters, module._buffers):
            for name, old in place.items():
                place[name] = filled.get(id(old), old)
    _precisions.mark(
        network, {id(filled[id(places[name])]): how["precision"] for name, how in described.items()}
    )


def _restored(name: str, shape: torch.Size, tensors: Mapping[str, Tensor], how: dict | None) -> Tensor:
    named = ((part, f"{start}{name}") for x in (_STATE, _LINEAR) for part, start in x.items())
    parts = {part: tensors[called] for part, called in named if called in tensors}
    if how is None:
        return parts["values"]
    parts = _precisions.unpack(parts, how["precision"], tuple(shape))
    return _precisions.restore(parts).to(_precisions.named(how["dtype"]))


def _built(name: str) -> models.Model:
    """Build a named network, without ever allocating its weights where its code allows that."""
    if ":" not in name:
        try:
            with torch.device("meta"):
                return models.architecture(name)
        except NotImplementedError:  # it computes with values while it is built (RegNet)
            pass
    model = models.architecture(name)
    return replace(model, network=_without_values(model.network))


def _without_values(network: nn.Module) -> nn.Module:
    named = (*network.named_parameters(), *network.named_buffers())
    if lazy := [name for name, x in named if isinstance(x, nn.parameter.UninitializedTensorMixin)]:
        raise InvalidValueError(f"the architecture's {lazy[0]} has no shape yet (lazy); run it once first.")
    empty = {id(x): x.detach().to("meta") for x in network.buffers()}
    empty |= {id(x): nn.Parameter(x.detach().to("meta"), x.requires_grad) for x in network.parameters()}
    return _copying.copied(network, empty)
