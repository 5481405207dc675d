"""Copies of networks, whatever they hold; what cannot be copied is named."""

import copy
import functools
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from kclib.errors import InvalidValueError, reason
from kclib.models import Model, like, network_of

_HOLDS_NOTHING = (str, bytes, int, float, complex, type(None), type, types.FunctionType, types.ModuleType)
_HOLDS_NOTHING += weakref.ProxyTypes
_OF_MODULES = ("_modules", "_parameters", "_buffers")  # whose contents one calls by their names alone
_ADVICE = "take it off the network, and give it back afterwards"


def copied(
    network: Model | nn.Module, replaced: Mapping[int, object] = types.MappingProxyType({})
) -> Model | nn.Module:
    """Return a deep copy of a network, also where it holds computed weights or features kept by hooks.

    Parameters
    ----------
    network : Model or torch.nn.Module
        Unchanged. A Model comes back as a Model.
    replaced : mapping of int to object
        What takes the place of modules and parameters, by their ``id``; it is not copied.

    Raises
    ------
    InvalidValueError
        Something in the network cannot be copied, such as a lock or an open file; the sentence names it.
    """
    given, network = network, network_of(network)
    memo = _computed(network, replaced) | dict(replaced)
    try:
        result = copy.deepcopy(network, memo)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of whatever the network holds
        raise InvalidValueError(_what_cannot(network, replaced, error)) from error
    _check_apart(network, result, replaced)
    return like(given, result)


def _computed(network: nn.Module, replaced: Mapping[int, object]) -> dict[int, torch.Tensor]:
    """Return a detached copy of every tensor that came of a computation, which `copy.deepcopy` refuses."""
    return {
        id(value): value.detach().clone()
        for value in reached(network, replaced)
        if torch.is_tensor(value) and not value.is_leaf
    }


def _what_cannot(network: nn.Module, replaced: Mapping[int, object], error: Exception) -> str:
    """Return the sentence that names the innermost thing of a network that cannot be copied."""
    path, value, outside = "network", network, set(replaced)
    while True:
        outside.add(id(value))
        for name, part in _parts(value):
            if id(part) not in outside and (fault := _fault(part, outside)):
                path, value, error = path + name, part, fault
                break
        else:
            kind = type(value).__name__
            return f"the network cannot be copied, for {path} cannot ({kind}: {reason(error)}); {_ADVICE}."


def _fault(value: object, outside: set[int]) -> Exception | None:
    """Return why a value cannot be copied, tensors and what is `outside` of it apart; None if it can."""
    memo = dict.fromkeys(outside, Ellipsis)
    memo |= {id(part): part for part in reached(value, outside) if torch.is_tensor(part)}
    try:
        copy.deepcopy(value, memo)
    except Exception as error:
        return error
    return None


def _check_apart(network: nn.Module, result: nn.Module, replaced: Mapping[int, object]) -> None:
    """Raise an error if a module of the copy is one of the network, which would be changed with it."""
    own = {id(module) for module in network.modules()} - {id(x) for x in replaced.values()}
    for name, module in result.named_modules():
        if id(module) in own:
            path = f"network.{name}".rstrip(".")
            raise InvalidValueError(
                f"the network cannot be copied, for {path} ({type(module).__name__}) "
                f"gives itself as its copy; {_ADVICE}."
            )


def reached(value: object, outside: Iterable[int] = ()) -> Iterator[object]:
    """Yield a value and all that it holds, at any depth, each once, without what is `outside`."""
    seen, left = set(outside), [value]
    while left:
        part = left.pop()
        if id(part) not in seen and not isinstance(part, _HOLDS_NOTHING):
            seen.add(id(part))
            yield part
            left += [held for _, held in _parts(part)]


def _parts(value: object) -> Iterator[tuple[str, object]]:
    """Yield what a value holds, each with what one writes behind the value's name to get it."""
    if isinstance(value, _HOLDS_NOTHING):
        return
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", held) for key, held in list(dict.items(value)))
    elif isinstance(value, (list, tuple, deque)):
        yield from ((f"[{i}]", held) for i, held in enumerate(value))
    elif isinstance(value, (set, frozenset)):
        yield from ((".pop()", held) for held in value)
    elif isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
    elif torch.is_tensor(value) and value.is_leaf and value.grad is not None:
        yield ".grad", value.grad
    for name, held in _attributes(value).items():
        if isinstance(value, nn.Module) and name in _OF_MODULES:
            yield from ((f".{inner}", part) for inner, part in (held or {}).items())
        else:
            yield f".{name}", held


def _attributes(value: object) -> dict[str, object]:
    """Return the attributes that lie in an object, by name."""
    slots = [x for kind in type(value).__mro__ for x in _listed(vars(kind).get("__slots__", ()))]
    try:
        own = dict(vars(value))
    except TypeError:
        own = {}
    return {name: getattr(value, name) for name in slots if name != "__dict__" and hasattr(value, name)} | own


def _listed(names: str | Iterable[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
