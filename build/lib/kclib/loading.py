"""Trained networks by name, with weights from any kind of file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from kclib import compression, models
from kclib._util import files
from kclib.models import _loading, _state_dicts


def load_model(
    name: str = "vgg16-fashion",
    *,
    weights: str | Path | Mapping | None = None,
    device: str | torch.device = "cpu",
    input_shape: tuple[int, int, int] | None = None,
    classes: Sequence[str] = (),
) -> models.Model:
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

    Examples
    --------
    >>> import kclib
    >>> model = kclib.load_model("vgg16-fashion")
    >>> model.input_shape, model.classes[:3]
    ((3, 32, 32), ('T-shirt/top', 'Trouser', 'Pullover'))
    """
    model = models.told(models.architecture(name), input_shape=input_shape, classes=classes)
    if weights is not None and _state_dicts.is_compressed(weights):
        return compression.load(files.expanded(weights), architecture=model, resident="dense", device=device)
    if weights is not None:
        source = "the mapping of weights" if isinstance(weights, Mapping) else str(weights)
        _state_dicts.fill(model.network, _state_dicts.found(weights), source)
    elif name == "vgg16-fashion":
        shipped = files.shipped(files.data_dir() / models.FASHION_FILE, models.FASHION_SHA256)
        _state_dicts.fill(model.network, _state_dicts.found(shipped), name)
    elif name in models.torchvision_names():
        _state_dicts.fill(model.network, {"": _loading.published(name)}, name)
    models.moved(model.network, device).eval()
    return model
