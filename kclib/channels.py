"""The channels that kernels read and add to: which are zero for all images, and how one is made so."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from kclib import checks, compression, datasets, kernels, models, moments
from kclib.bars import tqdm
from kclib.kernels import KernelBank, Layer


def ends(convolution: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Return each kernel's output and input channel, int64 in the first two axes of the weight as stored."""
    n, m = convolution.weight.shape[:2]
    first, second = np.indices((n, m))
    second += first // (n // convolution.groups) * m
    return (second, first) if convolution.transposed else (first, second)


@torch.no_grad()
def silence(network: nn.Module, masks: Mapping[str, np.ndarray], norms: Mapping[str, str]) -> None:
    """Set to zero, in place, what an output channel without a kernel would still be: its biases.

    Parameters
    ----------
    network : torch.nn.Module
        The caller's own copy.
    masks : mapping of str to numpy.ndarray
        By layer: bool in the shape of its weight, False where a weight is taken away.
    norms : mapping of str to str
        The batch norm behind a convolution, whose weight and bias are zeroed too, where there is one.
    """
    for layer, mask in masks.items():
        for name, user in _users(network, layer).items():
            outputs = ends(user)[0].ravel()
            gone = torch.from_numpy(np.bincount(outputs, mask.any(axis=(2, 3)).ravel()) == 0)
            norm = network.get_submodule(norms[name]) if name in norms else None
            for value in (user.bias, getattr(norm, "weight", None), getattr(norm, "bias", None)):
                if value is not None:
                    value[gone.to(value.device)] = 0


@dataclass(frozen=True)
class Run:
    """Images, and the layers that are watched while networks answer them, in float32.

    Attributes
    ----------
    layers : tuple of Layer
    batches : callable
        Answers the inputs, batch by batch, the same at each call.
    device : str or torch.device
    bar : callable
        Wraps them in a progress bar, of a title ``desc``.
    """

    layers: tuple[Layer, ...]
    batches: Callable[[], Iterator[Tensor]]
    device: str | torch.device
    bar: Callable

    @classmethod
    def of(
        cls,
        model: models.Model,
        images: datasets.ImageSet,
        bank: KernelBank,
        batch_size: int,
        device: str | torch.device,
        progress: bool,
    ) -> "Run":
        """Return the run of a model's images; raise InvalidValueError if there are none."""
        checks.check_whole("batch_size", batch_size, 1)
        batches = moments.batches(images, model.preprocess, batch_size, device)
        n = math.ceil(len(images) / batch_size)
        bar = partial(tqdm, total=n, unit="batch", delay=2, leave=False, disable=not progress)
        return cls(bank.layers, batches, device, bar)

    def norms(self, network: nn.Module) -> dict[str, str]:
        """Return the batch norm behind each convolution; raise InvalidValueError if one does not run."""
        network = self._running(network)
        names = {name for layer in self.layers for name in _users(network, layer.name)}
        found = moments.steps(network, next(self.batches())[:1].float(), names)
        return {step.name: step.norm for step in found if step.norm}

    def lost(self, before: nn.Module, after: nn.Module) -> dict[str, np.ndarray]:
        """Return which kernels read something in one network, and nothing but zeros in the other.

        Returns
        -------
        dict of str to numpy.ndarray
            By layer: bool in the first two axes of its weight.
        """
        alive = self._reading(before, "channels before pruning")
        still = self._reading(after, "channels after pruning")
        return {name: alive[name] & ~still[name] for name in alive}

    @torch.no_grad()
    def _reading(self, network: nn.Module, title: str) -> dict[str, np.ndarray]:
        """Return which kernels read anything but zero on any image."""
        network = self._running(network)
        found = {layer.name: np.zeros(layer.shape[:2], bool) for layer in self.layers}

        def ran(name: str, user: nn.Module, args: tuple, named: dict) -> None:
            x = args[0] if args else named["input"]
            alive = (x != 0).reshape(-1, *x.shape[-3:]).any(0).flatten(1).any(1)
            found[name] |= alive.cpu().numpy()[ends(user)[1]]

        for layer in self.layers:
            for user in _users(network, layer.name).values():
                user.register_forward_pre_hook(partial(ran, layer.name), with_kwargs=True)
        for inputs in self.bar(self.batches(), desc=title):
            network(inputs.float())
        return found

    def _running(self, network: nn.Module) -> nn.Module:
        return models.moved(kernels.copied(network).eval().float(), self.device)


def _users(network: nn.Module, layer: str) -> dict[str, nn.Module]:
    return compression.users(network, layer)
