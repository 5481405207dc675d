"""Measure what a kernel's squared error costs the network, from images without labels: sample weights."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kclib import datasets, models
from kclib._util import checks
from kclib._util.progress_bars import tqdm
from kclib.compression import _replacement
from kclib.datasets import _loader
from kclib.errors import InvalidValueError
from kclib.kernels import KernelBank, _bank, _convolutions, _copying
from kclib.models import _inference, _model

_PROBES = 4  # random directions a batch, of which each costs a backward pass through the backward pass


def importance(
    model: models.Model | nn.Module,
    images: datasets.ImageSet,
    bank: KernelBank,
    *,
    kind: str = "output",
    batch_size: int = 64,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> np.ndarray:
    """Return what a squared error of one in each kernel costs, for `kmeans.fit(..., sample_weight=...)`.

    The same seed gives the same result up to the rounding of torch's convolutions, which may differ with the
    number of threads. The batch size matters only to ``hessian``, which draws directions for each batch.

    Parameters
    ----------
    model : models.Model or torch.nn.Module
        Unchanged; a float32 copy runs, in eval mode.
    images : datasets.ImageSet
        A few hundred are enough (`datasets.limited`). Their labels are not read.
    bank : kernels.KernelBank
        The kernels of `model`, or of some of its layers.
    kind : {"output", "uniform", "input", "fisher", "hessian"}
        By what the cost is measured:

        - uniform: by nothing, every kernel counts alike;
        - input: the power of what the kernel reads, as its layer's output errs by it;
        - output: that, times how much the answer depends on the channel the kernel adds to;
        - fisher: the mean squared gradient by its weights;
        - hessian: the mean second derivative by its weights.
    batch_size : int
        Images held at once; ``fisher`` runs them one by one.
    seed : int
        Of the labels drawn from the model's answers (output, fisher) and of random directions (hessian).
    device : str or torch.device
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    numpy.ndarray
        float32 ``(n,)``, finite and at least 0, in the rows of the bank. Whole layers can be 0, where they do
        not run (auxiliary heads), read nothing but 0, or the answer does not depend on them. All of them are
        where no image leaves the network in doubt; kind ``input`` then tells them apart.

    Raises
    ------
    UnknownNameError
        There is no such kind.
    InvalidValueError
        No images; a layer that runs and has no gradient; answers or sensitivities that are not
        finite; a bank of another architecture; a device that is not there.
    """
    checks.check_known("kind of sensitivity", kind, KINDS)
    model, images = _model.as_model(model), datasets.as_image_set(images)
    if not len(images):
        raise InvalidValueError(f"{images.name} has no images; sensitivity takes at least one.")
    batch_size = checks.check_whole("batch_size", batch_size, 1)
    checks.check_seed(seed)
    with torch.inference_mode(False):  # gradients are needed also where the caller has turned them off
        run = _Run.of(model, images, bank, batch_size, seed, device, progress)
        costs = KINDS[kind](run)
    result = np.empty(len(bank), np.float32)
    for layer in bank.layers:
        result[layer.rows] = run.checked(layer.name, costs[layer.name]).flatten().numpy()
    return result


@dataclass(frozen=True)
class _Run:
    """A copy of a network, of which only the kernels in question take gradients, and the images for it."""

    model: models.Model
    network: nn.Module
    parameters: dict[str, nn.Parameter]  # the weight of each layer
    images: datasets.ImageSet
    batch_size: int
    seed: int
    progress: bool
    device: str | torch.device
    reached: set[str] = field(default_factory=set)  # layers of which anything was found
    ran: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, model, images, bank, batch_size, seed, device, progress) -> "_Run":
        network = _convolutions.plain(_copying.copied(model.network)).eval().float()
        network = _model.moved(network, device).requires_grad_(False)
        layers = _bank.matched(network, bank.layers)
        parameters = {name: x.weight.requires_grad_(True) for name, x in layers.items()}
        run = cls(model, network, parameters, images, batch_size, seed, progress, device)
        for layer in parameters:
            for user in _replacement.users(network, layer).values():
                user.register_forward_hook(partial(run._heard, layer))
        return run

    def _heard(self, layer: str, *_) -> None:
        self.ran.add(layer)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs ``(b, ...)`` and a float64 number in [0, 1) for each, the same at any batch size."""
        draws = torch.from_numpy(np.random.default_rng(self.seed).random(len(self.images)))
        parts = draws.split(self.batch_size)
        workers = _loader.readers(self.images)
        inputs = datasets.batches(self.images, self.model.preprocess, self.batch_size, workers=workers)
        title = f"sensitivity of {self.model.name}"
        bar = partial(tqdm, desc=title, unit="batch", delay=2, leave=False, disable=not self.progress)
        for (some, _), part in bar(zip(inputs, parts, strict=True), total=len(parts)):
            yield some.to(self.device, torch.float32), part

    def answers(self, inputs: Tensor) -> Tensor:
        """Return the logits ``(b, n_classes)``."""
        return self.finite(models.answers(self.network, inputs))

    def finite(self, answer: Tensor) -> Tensor:
        """Return an answer; raise InvalidValueError unless it is finite."""
        if not torch.isfinite(answer).all():
            raise InvalidValueError(f"model {self.model.name} answers NaN or infinity; it must be finite.")
        return answer

    def gradients(self, value: Tensor, **options) -> dict[str, Tensor]:
        """Return the gradient of a scalar by the kernels of each layer that has one."""
        if not value.requires_grad:
            return {}
        gradients = torch.autograd.grad(value, list(self.parameters.values()), allow_unused=True, **options)
        result = {name: x for name, x in zip(self.parameters, gradients, strict=True) if x is not None}
        self.reached.update(result)
        return result

    def zeros(self) -> dict[str, Tensor]:
        """Return 0 for every kernel: float64, in the first two axes of each layer's weight."""
        return {name: torch.zeros(x.shape[:2], dtype=torch.float64) for name, x in self.parameters.items()}

    def checked(self, name: str, costs: Tensor) -> Tensor:
        """Return what was found of a layer as float32; raise InvalidValueError if it cannot be used."""
        if name in self.ran and name not in self.reached:
            raise InvalidValueError(f"gradients do not reach layer {name}; leave it out of the bank.")
        if not torch.isfinite(costs.float()).all():
            raise InvalidValueError(f"layer {name} has an infinite or NaN sensitivity; it must be finite.")
        return costs.float()


class _Calls:
    """Sums over images of what is read and answered, by layer, convolution and number of the call.

    `reads` are float64 ``(in,)``, means of x² over taps and positions; `answers` are float64 ``(out,)``, sums
    over positions of the loss's squared gradient.
    """

    def __init__(self, run: _Run):
        self.run, self.number = run, Counter()
        self.reads, self.answers = defaultdict(float), defaultdict(float)
        for layer in run.parameters:
            for user in _replacement.users(run.network, layer).values():
                user.register_forward_hook(partial(self._ran, layer), with_kwargs=True)

    def by_kernel(self, *, answered: bool) -> dict[str, Tensor]:
        """Return reads, times answers if so wished, of each kernel: means over images, summed over calls."""
        result, n = self.run.zeros(), len(self.run.images)
        for call in self.answers if answered else self.reads:
            (layer, user, _), reads = call, self.reads[call]
            answers = self.answers[call] / n if answered else reads.new_ones(user.out_channels)
            first, second = (reads, answers) if user.transposed else (answers, reads)
            second = second.reshape(user.groups, -1).repeat_interleave(len(first) // user.groups, 0)
            result[layer] += first[:, None] * second / n
        return result

    def _ran(self, layer: str, user: nn.Module, args: tuple, named: dict, output: Tensor) -> None:
        call = (layer, user, self.number[user])
        self.number[user] += 1
        x = args[0] if args else named["input"]
        self.reads[call] += _power_read(user, x.detach(), output.shape[-2:])
        if output.requires_grad:
            output.register_hook(partial(self._answered, call))

    def _answered(self, call: tuple[str, nn.Module, int], gradient: Tensor) -> None:
        power = gradient.double().square().sum((-2, -1)).cpu()
        self.answers[call] += power.reshape(-1, power.shape[-1]).sum(0)


def _power_read(convolution: nn.Module, x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the mean of x² over taps and output positions, summed over images: float64 ``(in,)``.

    Padding is read as well, and so are the zeros between the inputs of a transposed convolution.
    """
    power = x.square().reshape(-1, *x.shape[-3:]).sum(0)[:, None]
    taps = power.new_ones(1, 1, *convolution.kernel_size)
    steps = {"stride": convolution.stride, "dilation": convolution.dilation}
    if convolution.transposed:
        top, left = convolution.padding
        read = F.conv_transpose2d(power, taps, **steps)[..., top : top + size[0], left : left + size[1]]
    else:
        mode = "constant" if convolution.padding_mode == "zeros" else convolution.padding_mode
        read = F.conv2d(F.pad(power, convolution._reversed_padding_repeated_twice, mode), taps, **steps)
    return read.sum((1, 2, 3)).cpu().double() / (math.prod(size) * taps.numel())


def _uniform(run: _Run) -> dict[str, Tensor]:
    """Return 1 for every kernel."""
    run.reached.update(run.parameters)
    return {name: zeros + 1 for name, zeros in run.zeros().items()}


@torch.no_grad()
def _input(run: _Run) -> dict[str, Tensor]:
    """Return E[x_i²] over images, positions and taps.

    An error e in the kernel of channel i moves the layer's output by e·x_i, whose mean square is |e|² E[x_i²]
    where inputs are uncorrelated: the mean diagonal of what GPTQ takes for a layer's Hessian (Frantar et al.
    2023, *GPTQ*).
    """
    calls = _Calls(run)
    for inputs, _ in run.batches():
        calls.number.clear()
        answer = _inference.counting(_inference.run(run.network, inputs))
        if answer is not None:  # logits, or a map, or what else matters elsewhere
            run.finite(answer)
    run.reached.update(layer for layer, *_ in calls.reads)
    return calls.by_kernel(answered=False)


def _output(run: _Run) -> dict[str, Tensor]:
    """Return E[x_i²] times the sum over positions of E[(dL/dy_o)²], at labels drawn from the answers.

    The diagonal of the Fisher information if inputs and gradients are independent, and gradients uncorrelated
    over positions (Martens and Grosse 2015, *K-FAC*; for convolutions Grosse and Martens 2016, *KFC*).
    """
    calls = _Calls(run)
    for inputs, draws in run.batches():
        calls.number.clear()
        run.gradients(_surprise(run.answers(inputs), draws))
    return calls.by_kernel(answered=True)


def _fisher(run: _Run) -> dict[str, Tensor]:
    """Return the mean of E[(dL/dw)²] over the kernel's weights, at labels drawn from the answers.

    The diagonal of the true Fisher information, not of that at the data's labels (Martens 2020, *New Insights
    and Perspectives on the Natural Gradient Method*).
    """
    result = run.zeros()
    for inputs, draws in run.batches():
        for one, draw in zip(inputs.split(1), draws.split(1), strict=True):
            for name, gradient in run.gradients(_surprise(run.answers(one), draw)).items():
                result[name] += gradient.double().square().mean((2, 3)).cpu() / len(run.images)
    return result


def _hessian(run: _Run) -> dict[str, Tensor]:
    """Return the size of the mean of d²L/dw² over the kernel's weights, L at the model's own best answers.

    Hutchinson's estimate E[z ∘ Hz] with z of random signs (Yao et al. 2021, *AdaHessian*). Negative curvature
    counts by its size, as it is no saving.
    """
    generator = torch.Generator().manual_seed(run.seed)
    result = run.zeros()
    for inputs, _ in run.batches():
        logits = run.answers(inputs)
        loss = F.cross_entropy(logits, logits.argmax(1), reduction="sum")
        slopes = run.gradients(loss, create_graph=True)
        for _ in range(_PROBES):
            signs = {name: _signs(slope, generator) for name, slope in slopes.items()}
            along = sum(((slope * signs[name]).sum() for name, slope in slopes.items()), torch.zeros(()))
            for name, curved in run.gradients(along, retain_graph=True).items():
                result[name] += (signs[name] * curved).mean((2, 3)).cpu() / (_PROBES * len(run.images))
    return {name: value.abs() for name, value in result.items()}


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(2, like.shape, generator=generator).mul(2).sub(1).to(like)


def _surprise(logits: Tensor, draws: Tensor) -> Tensor:
    """Return the cross-entropy, summed over images, at labels drawn from the answers' own distribution."""
    cumulative = logits.detach().cpu().double().softmax(1).cumsum(1)
    labels = (cumulative <= draws[:, None]).sum(1).clamp(max=logits.shape[1] - 1)
    return F.cross_entropy(logits, labels.to(logits.device), reduction="sum")


KINDS: dict[str, Callable[[_Run], dict[str, Tensor]]] = {
    "output": _output,
    "uniform": _uniform,
    "input": _input,
    "fisher": _fisher,
    "hessian": _hessian,
}
