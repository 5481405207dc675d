"""Networks by name: the shipped VGG-16, torchvision's classifiers, or the user's own factory."""

import hashlib
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torchvision
from torch import nn
from torchvision.models.vgg import cfgs, make_layers
from torchvision.transforms import v2

from kclib import checkpoint_files, checks, datasets, factories, files, inference, inputs, state_dicts
from kclib.errors import (
    DamagedFileError,
    InvalidValueError,
    MissingFileError,
    UnknownNameError,
    reason,
)

answers = inference.answers

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
        Answers logits ``(b, n_classes)``, in any form that `answers` reads, to inputs ``(b, c, h, w)``.
    preprocess : callable
        From a PIL image, or uint8 images ``(..., c, h, w)``, to the network's float input.
    classes : tuple of str
        Class names in the order of the logits; empty if unknown.
    input_shape : (int, int, int), optional
        Channels, height and width of an input, where they are known without an image.
    """

    name: str
    network: nn.Module
    preprocess: Callable
    classes: tuple[str, ...] = ()
    input_shape: tuple[int, int, int] | None = None


def load(
    name: str = "vgg16-fashion",
    *,
    weights: str | Path | Mapping | None = None,
    device: str | torch.device = "cpu",
    input_shape: tuple[int, int, int] | None = None,
    classes: Sequence[str] = (),
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
    input_shape : (int, int, int), optional
        Channels, height and width of an input, for a network of which they are not known. Of a factory that
        returns a network alone, the images are then made so (`plain`).
    classes : sequence of str
        Names of the outputs in their order, in place of the model's own; empty keeps those.

    Raises
    ------
    UnknownNameError, MissingFileError, DamagedFileError, InvalidValueError
    """
    model = told(architecture(name), input_shape=input_shape, classes=classes)
    if weights is not None and state_dicts.is_compressed(weights):
        from kclib import checkpoint  # lies above this module, and is needed for such files only

        return checkpoint.load(files.expanded(weights), architecture=model, resident="dense", device=device)
    if weights is not None:
        source = "the mapping of weights" if isinstance(weights, Mapping) else str(weights)
        state_dicts.fill(model.network, state_dicts.found(weights), source)
    elif name == "vgg16-fashion":
        shipped = files.shipped(files.data_dir() / FASHION_FILE, FASHION_SHA256)
        state_dicts.fill(model.network, state_dicts.found(shipped), name)
    elif name in torchvision_names():
        state_dicts.fill(model.network, {"": _published(name)}, name)
    moved(model.network, device).eval()
    return model


def told(
    model: Model, *, input_shape: tuple[int, int, int] | None = None, classes: Sequence[str] = ()
) -> Model:
    """Return a model with what a user knows of its inputs and outputs, as for `load`.

    Raises
    ------
    InvalidValueError
        A shape that is none, or not that which its preprocessing makes; names that are no list of texts.
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


def architecture(name: str) -> Model:
    """Return a network by name as it is before weights are loaded; a user's own factory may bring them.

    Raises
    ------
    UnknownNameError, InvalidValueError
    """
    if isinstance(name, str) and ":" in name:
        return _from_factory(name)
    if name == "vgg16-fashion":
        return Model(name, vgg16_fashion(), fashion_preprocess(), FASHION_CLASSES, (3, 32, 32))
    if name in torchvision_names():
        published = torchvision.models.get_model_weights(name).DEFAULT
        network = torchvision.models.get_model(name, weights=None, **_BUILDER_ARGUMENTS.get(name, {}))
        preprocess = v2.Compose([v2.RGB(), published.transforms()])
        return Model(name, network, preprocess, tuple(published.meta["categories"]))
    if isinstance(name, str) and name.endswith((*checkpoint_files.SUFFIXES, ".onnx", ".py")):
        raise InvalidValueError(
            f"model {name!r} is a file's name; it must be the network's, such as resnet18, or "
            "package.module:factory, and the file is given as weights."
        )
    raise UnknownNameError("model", name, names())


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
        _check_shape(input_shape)
        n_channels, *size = input_shape
        return Model(name, network, inputs.Plain(n_channels, tuple(size)), (), tuple(input_shape))
    return Model(name, network, inputs.Plain(inference.channels(network) or 3))


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
    if known := inputs.known_shape(model.preprocess):
        return known
    if images is not None:
        first = datasets.select(datasets.as_image_set(images), torch.tensor([0]))
        return tuple(next(datasets.batches(first, model.preprocess, 1))[0].shape[1:])
    raise InvalidValueError(
        f"the size of the input of {model.name} is not known, as its preprocessing keeps that of an image; "
        "give input_shape=(channels, height, width) (kclib export --shape), or images."
    )


def _check_shape(shape: tuple[int, int, int]) -> None:
    if not isinstance(shape, tuple | list) or len(shape) != 3:
        raise InvalidValueError(f"input_shape is {shape!r}; it must be (channels, height, width).")
    for name, value in zip(("channels", "height", "width"), shape, strict=True):
        checks.check_whole(f"{name} of input_shape", value, 1)


def _shaped(model: Model, shape: tuple[int, int, int]) -> Model:
    """Return a model with an input shape that it was given; one that nothing is known of makes it so."""
    _check_shape(shape)
    if isinstance(model.preprocess, inputs.Plain):
        return plain(model.name, model.network, shape)
    known = model.input_shape or inputs.known_shape(model.preprocess)
    if known not in (None, tuple(shape)):
        raise InvalidValueError(
            f"input_shape is {tuple(shape)}, but the preprocessing of {model.name} makes {known}."
        )
    return replace(model, input_shape=tuple(shape))


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
    made = factories.made(name)
    if isinstance(made, Model):
        return replace(made, name=name)  # one factory may be asked for under two names
    if not isinstance(made, nn.Module):
        raise InvalidValueError(f"{name!r} returned {type(made).__name__}, not a torch.nn.Module.")
    return plain(name, made)
