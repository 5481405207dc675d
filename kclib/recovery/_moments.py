"""What a convolution reads in two networks at once: second moments of its inputs, image by image the same."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from kclib import datasets
from kclib._util import checks
from kclib.errors import InvalidValueError
from kclib.kernels import _convolutions
from kclib.models import _inference

POSITIONS = 1 << 14  # of a layer's output, over all images, that its moments are taken at
_HALVED = 1024  # inputs from which on moments are computed on one side of the diagonal
_MOST = 0.5  # of moments that are moved towards equal energies
_RANGE = 40  # inputs of up to 2**40 and down to 2**-40 have squares that float32 sums safely
_NORMS = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)


@dataclass(frozen=True)
class Moments:
    """Moments of what a convolution answers in a dense network and of what it reads in a small one.

    The second moments are about the means, so that inputs far from 0 leave their digits; `about_zero` returns
    those about 0.

    Attributes
    ----------
    small : torch.Tensor
        float32 ``(groups, d, d)``: the covariances of the inputs, in ``unit**2``; d = inputs of a group ×
        kh × kw.
    wanted : torch.Tensor
        float32 ``(groups, out / groups, d)``: those of the dense answers with the inputs, in ``unit**2``.
    small_mean : torch.Tensor
        float32 ``(groups, d)``.
    answer_mean, answer_power : torch.Tensor
        ``(groups, out / groups)``: the mean, float32, and the variance, float64 in ``unit**2``, of what the
        dense convolution answers, without its bias.
    n : int
        Images that were read.
    unit : float
        A power of two, 1 where the squares of the inputs keep within the range of float32.
    """

    small: Tensor
    wanted: Tensor
    small_mean: Tensor
    answer_mean: Tensor
    answer_power: Tensor
    n: int
    unit: float = 1.0

    def about_zero(self) -> "Moments":
        """Return these moments about 0, for a layer whose output's mean is put right nowhere else."""
        small, answer = (x.double() / self.unit for x in (self.small_mean, self.answer_mean))
        return replace(
            self,
            small=self.small + _outer(small, small),
            wanted=self.wanted + _outer(answer, small),
            small_mean=torch.zeros_like(self.small_mean),
            answer_mean=torch.zeros_like(self.answer_mean),
            answer_power=self.answer_power + answer.square(),
        )

    def damping(self, least: float) -> Tensor:
        """Return the share of the mean energy that is added to each input's, float64 ``(groups,)``.

        Moments of few images know directions that others will not bear out. They are moved towards equal
        energies by so much that the squared error is least (Chen et al. 2010, *Shrinkage Algorithms for MMSE
        Covariance Estimation*, oracle approximating shrinkage), at least by a share. An image counts as one
        observation: its positions tell of each other.
        """
        d, squared = self.small.shape[1], self.small.square().sum((1, 2), dtype=torch.float64)
        trace = self.small.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64).square()
        share = (squared + trace) / ((self.n + 1) * (squared - trace / d)).clamp_min(1e-300)
        share = torch.where(squared > 0, share, 0).clamp_max(_MOST)
        return (share / (1 - share)).clamp_min(least)

    def heard(self, weight: Tensor) -> Tensor:
        """Return the covariances of what weights ``(groups, out / groups, d)`` answer, with the inputs."""
        return weight @ self.small

    def power(self, weight: Tensor) -> Tensor:
        """Return the variance of what weights answer, float64 ``(groups, out / groups)``."""
        return (self.heard(weight).double() * weight).sum(-1)

    def error(self, weight: Tensor, heard: Tensor | None = None) -> Tensor:
        """Return the variance of the difference of what weights answer to the dense answers.

        Parameters
        ----------
        weight : torch.Tensor
            float32 ``(groups, out / groups, d)``.
        heard : torch.Tensor, optional
            What `heard` returns of them, where it is there already.

        Returns
        -------
        torch.Tensor
            float64 ``(groups, out / groups)``, at least 0.
        """
        heard = self.heard(weight) if heard is None else heard
        error = self.answer_power + ((heard.double() - 2 * self.wanted) * weight).sum(-1)
        return error.clamp_min(0)  # equal answers differ by what rounding leaves, on either side of 0


@dataclass(frozen=True)
class LayerMoments:
    """A convolution's place in a network's run.

    Attributes
    ----------
    name : str
    calls : int
        How often it runs for one input.
    norm : str, optional
        The batch normalization that reads its output, and nothing before it does; where both run once, so
        that neither serves another layer.
    """

    name: str
    calls: int
    norm: str | None


def steps(network: nn.Module, inputs: Tensor, names: set[str]) -> list[LayerMoments]:
    """Return those of the named convolutions that run, in the order in which they first do."""
    calls, made, norms = Counter(), {}, {}
    modules = dict(network.named_modules())

    def ran(name: str) -> Callable:
        def hook(_, __, output):
            calls[name] += 1
            made[id(output)] = (name, output, output._version)  # held, so that no other takes its id

        return hook

    def read(name: str) -> Callable:
        def hook(_, args, named):
            calls[name] += 1
            x = _first(args, named)
            layer, _, version = made.get(id(x), (None, None, None))
            if layer is not None and x._version == version:  # a ReLU in place makes it another one
                norms[layer] = name

        return hook

    handles = [modules[name].register_forward_hook(ran(name)) for name in names]
    handles += [
        module.register_forward_pre_hook(read(name), with_kwargs=True)
        for name, module in modules.items()
        if isinstance(module, _NORMS)
    ]
    try:
        with torch.no_grad():
            _run(network, inputs)
    finally:
        for handle in handles:
            handle.remove()
    alone = {layer: norm for layer, norm in norms.items() if calls[layer] == calls[norm] == 1}
    return [LayerMoments(name, calls[name], alone.get(name)) for name in calls if name in names]


@torch.no_grad()
def measure(
    dense: nn.Module,
    small: nn.Module,
    step: LayerMoments,
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
        Inputs that are not finite; a layer that runs for some images only.
    """
    convolution = dense.get_submodule(step.name)
    sums = _Sums(grouped(convolution))
    each = max(1, math.ceil(POSITIONS / (n_images * step.calls)))
    for i, inputs in enumerate(batches()):
        read = []
        for network in (dense, small):
            generator = torch.Generator().manual_seed(seed * 100_003 + i)
            reads = _read(network, step, inputs, partial(_patches, convolution, each, generator))
            if len(reads) != step.calls:
                raise InvalidValueError(
                    f"layer {step.name} does not run for every image alike; it cannot be measured."
                )
            read.append(torch.cat(reads, dim=1))
        sums.add(*read, step.name)
    return sums.result(n_images)


class _Sums:
    """Second moments of what is read in batches, each batch about its own means: nothing cancels.

    The scatter of all is that within the batches and that of their means (Chan, Golub and LeVeque 1983,
    *Algorithms for Computing the Sample Variance*).
    """

    def __init__(self, weight: Tensor):
        self.weight, self.exponent, self.counts, self.means, self.scatter = weight, 0, [], [], ()

    def add(self, dense: Tensor, small: Tensor, layer: str) -> None:
        """Add what a batch reads, ``(groups, n, d)`` of either network, which is changed."""
        largest = max(float(end.abs()) for x in (dense, small) for end in x.aminmax())
        if not math.isfinite(largest):
            raise InvalidValueError(
                f"the inputs of layer {layer} are not finite; images and weights before it must be."
            )
        self.counts.append(dense.shape[1])
        self.means.append([_centre(x) for x in (dense, small)])
        self._scale(largest)
        if self.exponent:
            dense, small = ((x.double() / self.unit).float() for x in (dense, small))
        self._scatter(dense, small)

    @property
    def unit(self) -> float:
        return 2.0**self.exponent

    def result(self, n_images: int) -> Moments:
        """Return the moments of all that was added."""
        n, device = sum(self.counts), self.weight.device
        counts = torch.tensor(self.counts, dtype=torch.float64, device=device)[:, None]
        means, apart = [], []
        for parts in zip(*self.means, strict=True):
            mean = torch.stack(parts, dim=1)  # (groups, batches, d)
            means.append((mean * counts).sum(1) / n)
            apart.append((mean - means[-1][:, None]) * counts.sqrt() / self.unit)
        if len(counts) > 1:
            self._scatter(*(x.float() for x in apart))
        small, wanted, answers = (x / n for x in self.scatter)
        answer = (self.weight.double() @ means[0][..., None])[..., 0]
        return Moments(small, wanted, means[1].float(), answer.float(), answers, n_images, self.unit)

    def _scatter(self, dense: Tensor, small: Tensor) -> None:
        """Add products of what is about its means already."""
        answers = dense @ self.weight.mT
        part = (_gram(small), answers.mT @ small, answers.double().square().sum(1))
        self.scatter = tuple(map(Tensor.add_, self.scatter, part)) or part

    def _scale(self, largest: float) -> None:
        """Find the unit, or let it grow, so that squares of what is read stay within float32."""
        exponent = math.frexp(largest)[1]
        exponent = exponent if abs(exponent) > _RANGE else 0
        if not self.scatter:
            self.exponent = exponent
        elif largest and exponent > self.exponent:
            self.scatter = tuple(x * 4.0 ** (self.exponent - exponent) for x in self.scatter)
            self.exponent = exponent


def _gram(x: Tensor) -> Tensor:
    """Return ``x.mT @ x`` of ``(groups, n, d)``; of large ones little more than one half is computed."""
    d = x.shape[2]
    if d < _HALVED:
        return x.mT @ x
    result, step = x.new_empty(len(x), d, d), -(-d // 4)
    for start in range(0, d, step):
        place = slice(start, start + step)
        part = x[:, :, place].mT @ x[:, :, start:]
        result[:, place, start:], result[:, start:, place] = part, part.mT
    return result


def _centre(x: Tensor) -> Tensor:
    """Take the means of ``(groups, n, d)`` from it, in place, and return them, float64 ``(groups, d)``.

    The first row goes first: what is constant comes out as 0, to the bit.
    """
    first = x[:, :1].clone()
    rest = x.sub_(first).mean(1, keepdim=True)
    x.sub_(rest)
    return (first.double() + rest)[:, 0]


def grouped(convolution: nn.Module, weight: Tensor | None = None) -> Tensor:
    """Return a convolution's weight, its own by default, as float32 ``(groups, out / groups, d)``."""
    weight = _convolutions.weight(convolution) if weight is None else weight
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
    batch_size = checks.check_whole("batch_size", batch_size, 1)
    checks.check_values(device)

    def inputs() -> Iterator[Tensor]:
        for images, _ in datasets.batches(data, preprocess, batch_size):
            yield images.to(device)

    return inputs


class _Reached(BaseException):
    """Ends a network's run once the layer has read its inputs; networks that catch `Exception` pass it on."""


def _read(
    network: nn.Module, step: LayerMoments, inputs: Tensor, taken: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Return what is taken of a layer's input ``(b, in, h, w)`` at each of its calls."""
    read = []

    def hook(_, args, named):
        read.append(taken(_first(args, named)))
        if len(read) == step.calls:
            raise _Reached

    with _hooked(network.get_submodule(step.name), hook), suppress(_Reached):
        _run(network, inputs)
    return read


def _first(args: tuple, named: dict) -> Tensor:
    """Return what a layer is called with, by place or by name."""
    return args[0] if args else named["input"]


def _run(network: nn.Module, inputs: Tensor) -> None:
    """Run a network, whatever it answers, on inputs of the floating type of its parameters."""
    _inference.run(network, inputs.to(_inference.precision_of(network)))


@contextmanager
def _hooked(module: nn.Module, hook: Callable) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _patches(convolution: nn.Conv2d, each: int, generator: torch.Generator, x: Tensor) -> Tensor:
    """Return what a convolution reads at some positions, ``(groups, b * positions, d)``."""
    mode = "constant" if convolution.padding_mode == "zeros" else convolution.padding_mode
    x = x[None] if x.ndim == 3 else x  # one image without a batch
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
    return (first[:, :, None] * second[:, None, :]).float()
