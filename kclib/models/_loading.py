"""Networks by name: the shipped VGG-16, torchvision's classifiers, or the user's own factory."""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torchvision
from torch import nn
from torchvision.models.vgg import cfgs, make_layers
from torchvision.transforms import v2

from kclib._util import checks
from kclib.errors import (
    DamagedFileError,
    InvalidValueError,
    MissingFileError,
    UnknownNameError,
    reason,
)
from kclib.models import _checkpoint_files, _factories, _model

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FASHION_FILE = "vgg16_fashion.fp16.safetensors"
FASHION_SHA256 = "5e0e2765a902909e06d690168e9fcf03d15c67960481355aa29a78193700029b"
# Builders whose published weights need other arguments than the builder's defaults.
_BUILDER_ARGUMENTS = {
    "googlenet": {"transform_input": True, "init_weights": False},
    "inception_v3": {"transform_input": True, "init_weights": False},
    "vit_h_14": {"image_size": 518},
}


def architecture(name: str) -> _model.Model:
    """Return a network by name as it is before weights are loaded; a user's own factory may bring them."""
    if isinstance(name, str) and ":" in name:
        return _from_factory(name)
    if name == "vgg16-fashion":
        return _model.Model(name, vgg16_fashion(), fashion_preprocess(), FASHION_CLASSES, (3, 32, 32))
    if name in torchvision_names():
        published = torchvision.models.get_model_weights(name).DEFAULT
        network = torchvision.models.get_model(name, weights=None, **_BUILDER_ARGUMENTS.get(name, {}))
        preprocess = v2.Compose([v2.RGB(), published.transforms()])
        return _model.Model(name, network, preprocess, tuple(published.meta["categories"]))
    if isinstance(name, str) and name.endswith((*_checkpoint_files.SUFFIXES, ".onnx", ".py")):
        raise InvalidValueError(
            f"model {name!r} is a file's name; it must be the network's, such as resnet18, or "
            "package.module:factory, and the file is given as weights."
        )
    raise UnknownNameError("model", name, names())


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
    n_classes = checks.check_whole("n_classes", n_classes, 1)
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


def published(name: str) -> dict[str, torch.Tensor]:
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


def _from_factory(name: str) -> _model.Model:
    made = _factories.made(name)
    if isinstance(made, _model.Model):
        return replace(made, name=name)  # one factory may be asked for under two names
    if not isinstance(made, nn.Module):
        raise InvalidValueError(f"{name!r} returned {type(made).__name__}, not a torch.nn.Module.")
    return _model.plain(name, made)
