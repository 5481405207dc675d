"""Modules' extra state (``get_extra_state``) in a file that is never unpickled."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from kclib.errors import InvalidValueError, reason

EXTRA = "extra "
_PLAIN = (type(None), bool, int, float, str)


def stored(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return the tensors of all extra state, and what a file says of it, by module.

    Raises
    ------
    InvalidValueError
        Extra state of another kind.
    """
    tensors, described = {}, {}
    for name, module in network.named_modules():
        if _has(module, "get_extra_state"):
            described[name] = _packed(module.get_extra_state(), f"{EXTRA}{name}", name, tensors)
    return tensors, described


def fill(
    path: Path, network: nn.Module, tensors: Mapping[str, Tensor], described: Mapping[str, object]
) -> None:
    """Give modules, in place, the extra state that a file has of them.

    Raises
    ------
    InvalidValueError
        It has some of a module that takes none.
    """
    modules = dict(network.named_modules(remove_duplicate=False))
    for name, value in described.items():
        module = modules.get(name)
        if module is None or not _has(module, "set_extra_state"):
            raise InvalidValueError(
                f"{path} has extra state of {name or 'the network'}, which takes none in this architecture."
            )
        state = _unpacked(value, tensors)
        try:
            module.set_extra_state(state)
        except Exception as error:  # of the user's own code
            raise InvalidValueError(
                f"{path} has extra state that {name or 'the network'} does not take ({reason(error)})."
            ) from error


def _has(module: nn.Module, method: str) -> bool:
    return getattr(type(module), method) is not getattr(nn.Module, method)


def _packed(value: object, key: str, name: str, tensors: dict[str, Tensor]) -> list:
    """Return a value as JSON has it, with its kind before it; tensors are put aside."""
    kind = type(value)
    if kind in _PLAIN:
        return ["plain", value]
    if torch.is_tensor(value):
        tensors[key] = value
        return ["tensor", key]
    if kind is bytes:
        tensors[key] = torch.tensor(list(value), dtype=torch.uint8)
        return ["bytes", key]
    if kind in (list, tuple):
        return [kind.__name__, [_packed(x, f"{key} {i}", name, tensors) for i, x in enumerate(value)]]
    if isinstance(value, dict) and all(type(x) in _PLAIN for x in value):
        parts = enumerate(value.items())
        return ["dict", [[k, _packed(x, f"{key} {i}", name, tensors)] for i, (k, x) in parts]]
    raise InvalidValueError(
        f"the extra state of {name or 'the network'} holds a {kind.__name__}; a file keeps tensors, bytes, "
        "numbers, strings, None, and lists, tuples and dicts of them."
    )


def _unpacked(value: list, tensors: Mapping[str, Tensor]) -> object:
    kind, held = value
    if kind == "plain":
        return held
    if kind == "tensor":
        return tensors[held]
    if kind == "bytes":
        return tensors[held].numpy().tobytes()
    if kind == "dict":
        return {key: _unpacked(part, tensors) for key, part in held}
    return {"list": list, "tuple": tuple}[kind](_unpacked(part, tensors) for part in held)
