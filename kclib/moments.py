"""What a convolution reads in two networks at once: second moments of its inputs, image by image the same."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kclib import checks, datasets, inference
from kclib.errors import InvalidValueError

POSITIONS = 1 << 14  # of a layer's output, over all images, that its moments are taken at


@dataclass(frozen=True)
class Moments:
    """Moments of a convolution's inputs in a dense network (d) and in a small one (s), at the same positions.

    Attributes
    ----------
    small, cross : torch.Tensor
        float32 ``(groups, d, d)``: the means of s sᵀ and of d sᵀ, d = inputs of a group × kh × kw.
    dense_mean, small_mean : torch.Tensor
        float32 ``(groups, d)``.
    answer_mean, answer_power : torch.Tensor
        float32 ``(groups, out / groups)``: the mean and the mean square of what the dense convolution
        answers, without its bias.
    """

    small: Tensor
    cross: Tensor
    dense_mean: Tensor
    small_mean: Tensor
    answer_mean: Tensor
    answer_power: Tensor

    def centred(self) -> "Moments":
        """Return these moments about their means, for a layer whose output's mean is put right elsewhere."""
        outer = _outer
        return replace(
            self,
            small=self.small - outer(self.small_mean, self.small_mean),
            cross=self.cross - outer(self.dense_mean, self.small_mean),
            dense_mean=torch.zeros_like(self.dense_mean),
            small_mean=torch.zeros_like(self.small_mean),
            answer_mean=torch.zeros_like(self.answer_mean),
            answer_power=self.answer_power - self.answer_mean.square(),
        )

    def power(self, weight: Tensor) -> Tensor:
        """Return the mean square of what ``(groups, out / groups, d)`` weights answer to the small inputs."""
        return ((weight @ self.small) * weight).sum(-1)

    def error(self, dense: Tensor, weight: Tensor) -> Tensor:
        """Return the mean squared difference of the small network's answers to the dense one's.

        Parameters
        ----------
        dense, weight : torch.Tensor
            float32 ``(groups, out / groups, d)``: the weights of either.

        Returns
        -------
        torch.Tensor
            float32 ``(groups, out / groups)``.
        """
        return self.answer_power - 2 * ((dense @ self.cross) * weight).sum(-1) + self.power(weight)


@dataclass(frozen=True)
class Step:
    """A convolution's place in a network's run.

    Attributes
    ----------
    name : str
    calls : int
        How often it runs for one input.
    norm : str, optional
        The batch normalization that reads its output, and nothing before it does.
    """

    name: str
    calls: int
    norm: str | None


def steps(network: nn.Module, inputs: Tensor, names: set[str]) -> list[Step]:
    """Return the named convolutions in the order in which they first run.

    Raises
    ------
    InvalidValueError
        One of them does not run.
    """
    order, calls, made, norms = [], {}, {}, {}
    modules = dict(network.named_modules())

    def ran(name: str) -> Callable:
        def hook(_, __, output):
            calls[name] = calls.get(name, 0) + 1
            order.append(name)
            made[id(output)] = (name, output)  # held, so that no other tensor takes its id

        return hook

    def read(name: str) -> Callable:
        def hook(_, args):
            if id(args[0]) in made:
                norms[made[id(args[0])][0]] = name

        return hook

    handles = [modules[name].register_forward_hook(ran(name)) for name in names]
    handles += [
        module.register_forward_pre_hook(read(name))
        for name, module in modules.items()
        if isinstance(module, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        inference.run(network, inputs)
    for handle in handles:
        handle.remove()
    if missing := sorted(names - set(order)):
        raise InvalidValueError(
            f"layer {missing[0]} does not run when the network does; it cannot be measured."
        )
    return [Step(name, calls[name], norms.get(name)) for name in dict.fromkeys(order)]


@torch.no_grad()
def measure(
    dense: nn.Module,
    small: nn.Module,
    step: Step,
    batches: Callable[[], Iterator[Tensor]],
    *,
    n_images: int,
    seed: int = 0,
) -> Moments:
    """Return the moments of one plain convolution's inputs over all batches.

    Positions are drawn at random, anew for each batch; both networks are read at the same ones.

    Parameters
    ----------
    dense, small : torch.nn.Module
        In eval mode and with the same module names; left as they are. In `small` the layer may be any module
        with a convolution's geometry.
    step : Step
    batches : callable
        Answers the inputs, batch by batch, the same at each call.
    n_images : int
        How many images they are.
    seed : int

    Raises
    ------
    InvalidValueError
        Inputs that are no longer finite.
    """
    convolution = dense.get_submodule(step.name)
    weight = grouped(convolution, convolution.weight)
    each = max(1, math.ceil(POSITIONS / (n_images * step.calls)))
    sums, count = None, 0
    for i, inputs in enumerate(batches()):
        read = []
        for network in (dense, small):
            generator = torch.Generator().manual_seed(seed * 100_003 + i)
            found = [_patches(convolution, x, each, generator) for x in _inputs(network, step, inputs)]
            read.append(torch.cat(found, dim=1))
        d, s = read
        answers = d @ weight.mT
        part = (
            s.mT @ s, d.mT @ s, d.sum(1), s.sum(1), answers.sum(1), answers.square().sum(1)
        )  # fmt: skip
        sums = part if sums is None else tuple(a.add_(b) for a, b in zip(sums, part, strict=True))
        count += s.shape[1]
    result = Moments(*(value / count for value in sums))
    if not torch.isfinite(result.small).all() or not torch.isfinite(result.cross).all():
        raise InvalidValueError(
            f"the inputs of layer {step.name} are not finite; images and weights before it must be."
        )
    return result


def grouped(convolution: nn.Module, weight: Tensor) -> Tensor:
    """Return a plain convolution's weight as float32 ``(groups, out / groups, d)``."""
    return weight.detach().float().reshape(convolution.groups, weight.shape[0] // convolution.groups, -1)


def batches(data: datasets.ImageSet, preprocess: Callable, batch_size: int, device) -> Callable:
    """Return what answers the inputs of a data set, labels left out, anew at each call.

    Raises
    ------
    InvalidValueError
        There are no images.
    """
    if not len(data):
        raise InvalidValueError(f"{data.name} has no images; some hundred are needed.")
    checks.check_whole("batch_size", batch_size, 1)
    checks.check_values(device)

    def inputs() -> Iterator[Tensor]:
        for images, _ in datasets.batches(data, preprocess, batch_size):
            yield images.to(device)

    return inputs


class _Reached(BaseException):  # which no network of other people catches
    """The layer has read what it reads; the rest of the network need not run."""


def _inputs(network: nn.Module, step: Step, inputs: Tensor) -> list[Tensor]:
    """Return what a layer reads, a tensor ``(b, in, h, w)`` for each of its calls."""
    read = []

    def hook(_, args):
        read.append(args[0])
        if len(read) == step.calls:
            raise _Reached

    with _hooked(network.get_submodule(step.name), hook), suppress(_Reached):
        inference.run(network, inputs)
    return read


@contextmanager
def _hooked(module: nn.Module, hook: Callable) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _patches(convolution: nn.Conv2d, x: Tensor, each: int, generator: torch.Generator) -> Tensor:
    """Return what a convolution reads at some positions, ``(groups, b * positions, d)``."""
    mode = "constant" if convolution.padding_mode == "zeros" else convolution.padding_mode
    x = F.pad(x, convolution._reversed_padding_repeated_twice, mode=mode)
    (kh, kw), (sh, sw), (dh, dw) = convolution.kernel_size, convolution.stride, convolution.dilation
    height, width = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1, (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    chosen = torch.randperm(height * width, generator=generator)[:each].to(x.device)
    rows = (chosen // width * sh)[:, None] + dh * torch.arange(kh, device=x.device)
    columns = (chosen % width * sw)[:, None] + dw * torch.arange(kw, device=x.device)
    read = x[:, :, rows[:, :, None], columns[:, None, :]].float()  # (b, in, positions, kh, kw)
    read = read.unflatten(1, (convolution.groups, -1)).permute(1, 0, 3, 2, 4, 5)
    return read.reshape(convolution.groups, len(x) * len(chosen), -1)


def _outer(first: Tensor, second: Tensor) -> Tensor:
    return first[:, :, None] * second[:, None, :]
