"""An input that a network takes, given or found by trying, and what the network answers to it."""

import contextlib
import math
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor, nn

from kclib import models
from kclib.errors import InvalidValueError

Inputs = Tensor | tuple | Mapping | bool | None
_SIZES = (32, 224, 64, 28, 96, 128, 256, 299, 384, 16, 8)
_LARGEST = 512  # pixels a side that are tried
_ALONE = threading.RLock()  # what a run changes is the process's: two at once restore what the other did


def run(network: nn.Module, arguments: tuple[tuple, dict], *, training: bool = False) -> list[Tensor]:
    """Return the tensors of a network's answer, drawn and computed alike in each run."""
    network.train(training)
    positional, named = arguments
    with _quiet():
        return list(tensors(network(*positional, **named)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Compute without gradients, compilation or warnings; leave torch's random numbers as they were."""
    compiles = "torch._dynamo" in sys.modules  # which takes seconds to import
    with (
        _ALONE,
        torch.no_grad(),
        warnings.catch_warnings(action="ignore"),
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext(),
    ):
        torch.manual_seed(0)
        yield


def tensors(answer: object) -> Iterator[Tensor]:
    """Yield the tensors of an answer of any of the usual kinds."""
    if torch.is_tensor(answer):
        yield answer
    elif isinstance(answer, Mapping):
        for part in answer.values():
            yield from tensors(part)
    elif isinstance(answer, (tuple, list)):
        for part in answer:
            yield from tensors(part)
    elif is_dataclass(answer):
        for field in fields(answer):
            yield from tensors(getattr(answer, field.name))


def arguments(network: nn.Module, given, inputs: Inputs) -> tuple[tuple, dict] | None:
    """Return what to call a network with: what was given, else an image that runs."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple):
        return inputs, {}
    if torch.is_tensor(inputs):
        return (inputs,), {}
    if inputs is not None:
        raise InvalidValueError(
            f"inputs is a {type(inputs).__name__}; it must be a tensor, a tuple or mapping of what the "
            "network's forward takes, or False."
        )
    if isinstance(given, models.Model):
        with contextlib.suppress(Exception):  # of the user's preprocessing: then as for a network alone
            shape = tuple(models.input_shape(given))
            if _runs(network, shape) is None:
                return (_image(network, shape),), {}
    for channels in channels_of(network):
        if (size := _searched(network, channels)) is not None:
            return (_image(network, size),), {}
    return None


def _searched(network: nn.Module, channels: int) -> tuple[int, int, int] | None:
    """Return a square shape that runs, sought by size where a linear layer says how many inputs it wants."""
    for start in _SIZES:
        size, low, high = start, 1, _LARGEST
        while True:
            share = _runs(network, (channels, size, size))
            if share is None:
                return (channels, size, size)
            if share == 0 and size == start:
                break  # the next size that is in use
            low, high = (low, size - 1) if share > 1 else (size + 1, high)
            if low > high:
                break
            guess = round(size / math.sqrt(share)) if share else (low + high) // 2
            size = guess if low <= guess <= high else (low + high) // 2
    return None


def _runs(network: nn.Module, shape: tuple[int, int, int]) -> float | None:
    """Return None if an image runs, else how many times too many inputs a linear layer got, 0 if none did."""
    seen = []
    watched = [
        x.register_forward_pre_hook(lambda module, args: seen.append((module, args)))
        for x in network.modules()
        if isinstance(x, nn.Linear)
    ]
    try:
        run(network, ((_image(network, shape),), {}))
    except Exception:  # of the user's own code, of which this is the question
        module, args = seen[-1] if seen else (None, ())
        misfit = len(args) == 1 and torch.is_tensor(args[0]) and args[0].dim() == 2
        got = args[0].shape[-1] if misfit else 0
        return got / module.in_features if misfit and got != module.in_features else 0.0
    finally:
        for handle in watched:
            handle.remove()
    return None


def _image(network: nn.Module, shape: tuple[int, ...]) -> Tensor:
    like = next((x for x in network.parameters() if x.is_floating_point()), torch.empty(0))
    draw = torch.Generator().manual_seed(0)
    return torch.randn(1, *shape, generator=draw).to(like.device, like.dtype)


def channels_of(network: nn.Module) -> list[int]:
    """Return how many channels an image may have: those of the first convolution, of colour, of grey."""
    first = [x.in_channels for x in network.modules() if isinstance(x, (nn.Conv2d, nn.ConvTranspose2d))][:1]
    return list(dict.fromkeys([*first, 3, 1]))


def twice(given: tuple[tuple, dict]) -> tuple[tuple, dict]:
    """Return arguments with each tensor's batch doubled, for batch norms that train."""
    positional, named = given

    def doubled(x):
        return torch.cat([x, x]) if torch.is_tensor(x) and x.dim() else x

    return tuple(map(doubled, positional)), {name: doubled(x) for name, x in named.items()}
