"""Networks by name: the shipped VGG-16, torchvision's classifiers, or the user's own factory."""

import hashlib
import importlib
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torchvision
from torch import nn
from torchvision.models.vgg import cfgs, make_layers
from torchvision.transforms import v2

from kclib import checks, files, state_dicts
from kclib.errors import (
    DamagedFileError,
    InvalidValueError,
    MissingFileError,
    UnknownNameError,
    reason,
)

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FASHION_FILE = "vgg16_fashion.fp16.safetensors"
FASHION_SHA256 = "5e0e2765a902909e06d690168e9fcf03d15c67960481355aa29a78193700029b"
read_weights = state_dicts.read
# Builders whose published weights need other arguments than the builder's defaults.
_BUILDER_ARGUMENTS = {
    "googlenet": {"transform_input": True, "init_weights": False},
    "inception_v3": {"transform_input": True, "init_weights": False},
    "vit_h_14": {"image_size": 518},
}


@dataclass(frozen=True)
class Model:
    """A network and what it needs to be used.

    Attributes
    ----------
    name : str
        How it was asked for.
    network : torch.nn.Module
        In eval mode; answers logits ``(b, n_classes)`` for inputs ``(b, 3, h, w)``.
    preprocess : callable
        From a PIL image, or uint8 images ``(..., c, h, w)``, to the network's float input.
    classes : tuple of str
        Class names in the order of the logits; empty if unknown.
    """

    name: str
    network: nn.Module
    preprocess: Callable
    classes: tuple[str, ...] = ()


def load(
    name: str = "vgg16-fashion",
    *,
    weights: str | Path | Mapping | None = None,
    device: str | torch.device = "cpu",
) -> Model:
    """Load a trained network, in eval mode.

    Parameters
    ----------
    name : str
        ``vgg16-fashion`` (shipped), a torchvision classifier (its default published weights, with
        their own transforms), or ``package.module:factory`` for a function without arguments that
        returns a `torch.nn.Module` or a `Model`.
    weights : path, optional
        A checkpoint to load in place of the default weights, as `state_dicts.found` and `state_dicts.fill`
        take it: safetensors or what torch.save wrote, told by its content, with the prefixes and containers
        that trainers put around a state dict; or a compressed file, whose weights become dense.
    device : str or torch.device

    Raises
    ------
    UnknownNameError, MissingFileError, DamagedFileError, InvalidValueError
    """
    model = architecture(name)
    if weights is not None and state_dicts.is_compressed(weights):
        from kclib import checkpoint  # lies above this module, and is needed for such files only

        return checkpoint.load(files.expanded(weights), architecture=model, resident="dense", device=device)
    if weights is not None:
        state_dicts.fill(model.network, state_dicts.found(weights), str(weights))
    elif name == "vgg16-fashion":
        shipped = files.shipped(files.data_dir() / FASHION_FILE, FASHION_SHA256)
        state_dicts.fill(model.network, state_dicts.found(shipped), name)
    elif name in torchvision_names():
        state_dicts.fill(model.network, {"": _published(name)}, name)
    moved(model.network, device).eval()
    return model


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


def answers(network: nn.Module, inputs: torch.Tensor):
    """Return what a network answers to inputs.

    Raises
    ------
    InvalidValueError
        It does not run on such inputs.
    """
    try:
        return network(inputs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        raise InvalidValueError(
            f"the network does not run on inputs of shape {tuple(inputs.shape)} ({reason(error)}); "
            "give images of the kind it was made for."
        ) from error


def architecture(name: str) -> Model:
    """Return a network by name as it is before weights are loaded; a user's own factory may bring them.

    Raises
    ------
    UnknownNameError, InvalidValueError
    """
    if isinstance(name, str) and ":" in name:
        return _from_factory(name)
    if name == "vgg16-fashion":
        return Model(name, vgg16_fashion(), fashion_preprocess(), FASHION_CLASSES)
    if name in torchvision_names():
        published = torchvision.models.get_model_weights(name).DEFAULT
        network = torchvision.models.get_model(name, weights=None, **_BUILDER_ARGUMENTS.get(name, {}))
        preprocess = v2.Compose([v2.RGB(), published.transforms()])
        return Model(name, network, preprocess, tuple(published.meta["categories"]))
    raise UnknownNameError("model", name, names())


def plain(name: str, network: nn.Module) -> Model:
    """Return a network of which nothing is known: its input is RGB from 0 to 1."""
    scaled = [v2.RGB(), v2.ToImage(), v2.RGB(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
    return Model(name, network, v2.Compose(scaled))


def input_shape(model: Model) -> tuple[int, int, int]:
    """Return channels, height and width that a model's transform makes of a 28×28 image."""
    return tuple(model.preprocess(torch.zeros(3, 28, 28, dtype=torch.uint8)).shape)


def names() -> tuple[str, ...]:
    """Return every name that `load` knows, with the form of a user's own."""
    return ("vgg16-fashion", "package.module:factory", *torchvision_names())


def torchvision_names() -> tuple[str, ...]:
    """Return the names of torchvision's image classifiers."""
    return tuple(torchvision.models.list_models(module=torchvision.models))


def vgg16_fashion(n_classes: int = 10) -> nn.Module:
    """Return an untrained VGG-16 for 32×32 inputs.

    torchvision's convolution stack (configuration D of Simonyan and Zisserman 2014, 13 layers at
    full width), global average pooling and one linear layer.
    """
    checks.check_whole("n_classes", n_classes, 1)
    return nn.Sequential(
        OrderedDict(
            features=make_layers(cfgs["D"], batch_norm=False),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            dropout=nn.Dropout(0.3),
            classifier=nn.Linear(512, n_classes),
        )
    )


def fashion_preprocess() -> Callable:
    """Return the transform of `vgg16_fashion`: uint8 ``(..., 1|3, 28, 28)`` to float ``(..., 3, 32, 32)``.

    Mean and scale are those of the ImageNet weights it was trained from
    (``VGG16_Weights.IMAGENET1K_FEATURES``: values 0..255 minus the mean colour).
    """
    mean = (123.68 / 255, 116.779 / 255, 103.939 / 255)
    return v2.Compose(
        [
            v2.RGB(),
            v2.ToImage(),
            v2.Pad(2),
            v2.RGB(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, (1 / 255,) * 3),
            v2.ToPureTensor(),
        ]
    )


def fingerprint(network: nn.Module) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of a network's state."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        if value.is_meta:
            raise InvalidValueError(f"{name} has no values yet (meta device); load weights first.")
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _published(name: str) -> dict[str, torch.Tensor]:
    """Return the published weights of one of torchvision's networks."""
    published = torchvision.models.get_model_weights(name).DEFAULT
    target = Path(torch.hub.get_dir()) / "checkpoints" / Path(published.url).name
    try:  # torchvision's own builders would unpickle; the same files load weights-only
        return published.get_state_dict(check_hash=True, weights_only=True, map_location="cpu")
    except OSError as error:
        raise MissingFileError(
            f"the published weights of {name} could not be downloaded; place {target.name} at {target}."
        ) from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise DamagedFileError(
            f"{target} is not the published file ({reason(error)}); remove it or place the right one."
        ) from error


def _from_factory(name: str) -> Model:
    module_name, _, factory_name = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise InvalidValueError(
            f"model {name!r} could not be imported ({reason(error)}); "
            "it must be package.module:factory, importable from where you run."
        ) from error
    try:
        made = factory()
    except TypeError as error:  # most likely it is no function, or one that wants arguments
        raise InvalidValueError(
            f"{name!r} could not be called without arguments ({reason(error)}); it must be a factory."
        ) from error
    if isinstance(made, Model):
        return replace(made, name=name)  # one factory may be asked for under two names
    if not isinstance(made, nn.Module):
        raise InvalidValueError(f"{name!r} returned {type(made).__name__}, not a torch.nn.Module.")
    return plain(name, made)
