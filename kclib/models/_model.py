"""A network and what it needs to be used: `Model`."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from kclib import datasets
from kclib._util import checks
from kclib.datasets import _loader
from kclib.errors import (
    InvalidValueError,
)
from kclib.models import _inference, _inputs, _state_dicts

read_weights = _state_dicts.read


@dataclass(frozen=True)
class Model:
    """A network and what it needs to be used.

    Attributes
    ----------
    name : str
        How it was asked for.
    network : torch.nn.Module
        Answers logits ``(b, n_classes)``, in any form that `answers` reads, to inputs ``(b, c, h, w)``.
    preprocess : callable
        From a PIL image, or uint8 images ``(..., c, h, w)``, to the network's float input.
    classes : tuple of str
        Class names in the order of the logits; empty if unknown.
    input_shape : (int, int, int), optional
        Channels, height and width of an input, where they are known without an image.

    Examples
    --------
    >>> import kclib, torch
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 2))
    >>> model = kclib.Model("mine", network, lambda image: image / 255, ("shirt", "coat"), (1, 8, 8))
    >>> small = kclib.compress(model, kclib.cluster(model, 2))
    >>> type(small).__name__, small.classes
    ('Model', ('shirt', 'coat'))
    """

    name: str
    network: nn.Module
    preprocess: Callable
    classes: tuple[str, ...] = ()
    input_shape: tuple[int, int, int] | None = None


def told(
    model: Model, *, input_shape: tuple[int, int, int] | None = None, classes: Sequence[str] = ()
) -> Model:
    """Return a model with what a user knows of its inputs and outputs, as for `load`.

    Raises
    ------
    InvalidValueError
        A shape that is invalid or differs from that which the preprocessing makes; names that are not a list
        of texts.
    """
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise InvalidValueError(
            f"classes is {classes!r}; it must be a list of the names of the outputs, in their order."
        )
    if input_shape is not None:
        model = _shaped(model, input_shape)
    return replace(model, classes=tuple(classes)) if classes else model


def network_of(given: Model | nn.Module) -> nn.Module:
    """Return the network of a `Model`, or a network as it is.

    Raises
    ------
    InvalidValueError
        It is neither.
    """
    network = given.network if isinstance(given, Model) else given
    if not isinstance(network, nn.Module):
        raise InvalidValueError(
            f"the network is a {type(network).__name__}; it must be a Model or a torch.nn.Module."
        )
    return network


def like(given: Model | nn.Module, network: nn.Module) -> Model | nn.Module:
    """Return `network` as what was given: in a `Model` with its name, preprocessing and classes, or alone."""
    return replace(given, network=network) if isinstance(given, Model) else network


def as_model(given: Model | nn.Module) -> Model:
    """Return a `Model` as it is, or a network with the preprocessing of `plain`.

    Raises
    ------
    InvalidValueError
        It is neither.
    """
    return given if isinstance(given, Model) else plain(type(given).__name__, network_of(given))


def answers(given: Model | nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Return the logits ``(b, n_classes)`` that a network answers to inputs; see `_inference.answers`."""
    return _inference.answers(network_of(given), inputs)


def precision_of(given: Model | nn.Module) -> torch.dtype:
    """Return the type of number that a network computes in; see `_inference.precision_of`."""
    return _inference.precision_of(network_of(given))


def moved(network: nn.Module, device: str | torch.device) -> nn.Module:
    """Move a network, in place, and return it.

    Raises
    ------
    InvalidValueError
        If there is no such device here, or the network has no values.
    """
    checks.check_device(device)
    try:
        return network.to(device)
    except NotImplementedError as error:
        raise InvalidValueError(
            "the network has no values yet (meta device); load its weights first."
        ) from error


def plain(name: str, network: nn.Module, input_shape: tuple[int, int, int] | None = None) -> Model:
    """Return a network of which nothing is known: its input is RGB, or grey, from 0 to 1.

    Parameters
    ----------
    name : str
    network : torch.nn.Module
        Where its first convolution, in the order of its modules, reads one channel, images are made grey;
        where it has none, or one that reads three, RGB.
    input_shape : (int, int, int), optional
        Channels, height and width that images are made to have, resized with antialiasing. By default they
        keep their height and width.

    Raises
    ------
    InvalidValueError
        No such shape can be. A network that reads another number of channels is told when an image is given.
    """
    if input_shape is not None:
        shape = _checked_shape(input_shape)
        return Model(name, network, _inputs.Plain(shape[0], shape[1:]), (), shape)
    return Model(name, network, _inputs.Plain(_inference.channels(network) or 3))


def input_shape(model: Model | nn.Module, images=None) -> tuple[int, int, int]:
    """Return channels, height and width of a model's input.

    They are those that the model was given, or that its preprocessing makes of images of every size; else
    those of the first image.

    Parameters
    ----------
    model : Model or torch.nn.Module
    images : ImageSet, optional
        Images of the kind that the model is used on.

    Raises
    ------
    InvalidValueError
        The shape cannot be known.
    """
    model = as_model(model)
    if model.input_shape:
        return model.input_shape
    if known := _inputs.known_shape(model.preprocess):
        return known
    if images is not None:
        first = _loader.select(datasets.as_image_set(images), torch.tensor([0]))
        return tuple(next(datasets.batches(first, model.preprocess, 1))[0].shape[1:])
    raise InvalidValueError(
        f"the size of the input of {model.name} is not known, as its preprocessing keeps that of an image; "
        "give input_shape=(channels, height, width) (kclib export --shape), or images."
    )


def _checked_shape(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    if not isinstance(shape, tuple | list) or len(shape) != 3:
        raise InvalidValueError(f"input_shape is {shape!r}; it must be (channels, height, width).")
    names = ("channels", "height", "width")
    return tuple(checks.check_whole(f"{x} of input_shape", n, 1) for x, n in zip(names, shape, strict=True))


def _shaped(model: Model, shape: tuple[int, int, int]) -> Model:
    """Return a model with an input shape that it was given; one that nothing is known of makes it so."""
    shape = _checked_shape(shape)
    if isinstance(model.preprocess, _inputs.Plain):
        return plain(model.name, model.network, shape)
    known = model.input_shape or _inputs.known_shape(model.preprocess)
    if known not in (None, shape):
        raise InvalidValueError(
            f"input_shape is {shape}, but the preprocessing of {model.name} makes {known}."
        )
    return replace(model, input_shape=shape)


def fingerprint(network: Model | nn.Module) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of a network's state.

    Raises
    ------
    InvalidValueError
        It is no network, or one without values.
    """
    digest = hashlib.sha256()
    for name, value in network_of(network).state_dict().items():
        if value.is_meta:
            raise InvalidValueError(f"{name} has no values yet (meta device); load weights first.")
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
