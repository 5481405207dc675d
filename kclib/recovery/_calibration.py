"""Fit what a compressed network still can choose to its dense model's activations: no training, no labels."""

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor, nn

from kclib import datasets, models
from kclib._util import checks
from kclib._util.progress_bars import tqdm
from kclib.compression import _layers, _precisions
from kclib.compression._layers import ClusteredConv2d
from kclib.errors import InvalidValueError
from kclib.kernels import _copying
from kclib.models import _model
from kclib.recovery import _moments
from kclib.recovery._moments import Moments

_NOISE = 1e-8  # of the other's variance: what float32 leaves of a channel that is constant
ROUNDS = 10  # of preconditioned conjugate gradients; the error then is within 0.2 % of the least


def calibrate(
    model: models.Model | nn.Module,
    dense: models.Model | nn.Module,
    images: datasets.ImageSet,
    *,
    damping: float = 0.01,
    batch_size: int = 64,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> models.Model | nn.Module:
    """Fit codebooks, scales, biases and batch norms of a compressed model, its indices left as they are.

    Layer by layer, in the order in which they run, the layer's answers to what it now reads come as near as
    they can to the dense layer's (least squares): first by its codebook where no other layer uses it, then by
    its scales where it has some; a change that would not lower the error is not made. The mean that is left
    goes into the bias, or mean and variance into the batch norm behind the layer. Transposed convolutions,
    and layers that do not run, are left alone.

    Parameters
    ----------
    model : Model or torch.nn.Module
        One of `compression.compress`; unchanged. A network alone is given images as `models.plain` makes
        them.
    dense : Model or torch.nn.Module
        The network that it was made of.
    images : ImageSet, or what `datasets.as_image_set` takes
        Some hundred, of the kind the model knows; their labels are not read.
    damping : float
        Share of the mean energy of an input that is added to each one's, so that noise is not learned.
    batch_size, seed, device

    Returns
    -------
    Model or torch.nn.Module
        As was given, in eval mode, with the same bytes.

    Raises
    ------
    InvalidValueError
        Nothing is clustered; another architecture than `dense`; no image; damping not above 0.
    """
    check_damping(damping)
    checks.check_seed(seed)
    model, given, images = _model.as_model(model), model, datasets.as_image_set(images)
    small = _model.moved(_copying.copied(model.network).eval(), device)
    dense = _model.moved(_copying.copied(models.network_of(dense)).eval(), device)
    clustered = {name: x for name, x in _layers.clustered(small).items() if not x.transposed}
    _check_fit(clustered, dense)
    users = [module.codebook for module in _layers.clustered(small).values()]
    batches = _moments.batches(images, model.preprocess, batch_size, device)
    order = _moments.steps(dense, next(batches())[:1], set(clustered))
    for i, step in enumerate(
        tqdm(order, desc="calibration", unit="layer", leave=False, disable=not progress)
    ):
        module, original = clustered[step.name], dense.get_submodule(step.name)
        norms = norms_behind(step, dense, small)
        read = _moments.measure(dense, small, step, batches, n_images=len(images), seed=seed + i)
        about = read if module.bias is not None or norms else read.about_zero()
        _fit(module, original, about, damping, alone=sum(x is module.codebook for x in users) == 1)
        absorb(read, _moments.grouped(original, module.weight), original, module, norms)
    return models.like(given, small.to("cpu"))


class LeastSquares:
    """Fits what a layer's weights are made of, so that they answer what is read nearest to the dense weights.

    Parameters
    ----------
    read : Moments
    damping : float
    """

    def __init__(self, read: Moments, damping: float):
        self.read = read
        self.energy = read.small.diagonal(dim1=1, dim2=2)[:, None, :]
        self.ridge = damping * self.energy.mean(-1, keepdim=True)

    def fitted(
        self,
        decode: Callable[[Tensor], Tensor],
        values: Tensor,
        *,
        rounded: Callable[[Tensor], Tensor],
        rounds: int = ROUNDS,
    ) -> Tensor:
        """Return values that lower the error, rounded; the values given where they would not.

        Conjugate gradients (Hestenes and Stiefel 1952), from the values given, on the ridge regression
        towards them. They are preconditioned by the energy that each value answers: representatives of many
        kernels learn no faster than those of few.

        Parameters
        ----------
        decode : callable
            From values, linearly, to weights ``(groups, out / groups, d)``.
        values : torch.Tensor
            Floating.
        rounded : callable
            Rounds values as they are stored.
        rounds : int
        """
        start = values.detach().clone().requires_grad_()
        weight = decode(start)

        def back(gradient: Tensor) -> np.ndarray:
            (derivative,) = torch.autograd.grad(weight, start, gradient, retain_graph=True)
            return derivative.double().cpu().numpy().ravel()

        def curved(step: np.ndarray) -> np.ndarray:
            moved = decode(torch.from_numpy(step).to(start).reshape(start.shape))
            return back(torch.baddbmm(self.ridge * moved, moved, self.read.small))

        n = start.numel()
        answered = np.abs(back((self.energy + self.ridge).expand(weight.shape).contiguous()))
        answered = np.maximum(answered, 1e-6 * answered.max() or 1)  # some no kernel uses, or nobody hears
        heard = self.read.heard(weight.detach())
        step, _ = cg(
            LinearOperator((n, n), curved, dtype=np.float64),
            back(self.read.wanted - heard),
            rtol=1e-3,
            maxiter=rounds,
            M=LinearOperator((n, n), lambda residual: residual / answered, dtype=np.float64),
        )
        try:
            new = rounded(start.detach() + torch.from_numpy(step).to(start).reshape(start.shape))
        except InvalidValueError:  # beyond what can be stored
            return values.detach()
        before, after = self.read.error(weight.detach(), heard), self.read.error(decode(new).detach())
        return new if after.sum() < before.sum() else values.detach()


def norms_behind(
    step: _moments.LayerMoments, dense: nn.Module, small: nn.Module
) -> tuple[nn.Module, nn.Module] | None:
    """Return the batch norms that read a layer's output in either network, if there is one."""
    return None if step.norm is None else (dense.get_submodule(step.norm), small.get_submodule(step.norm))


@torch.no_grad()
def absorb(
    read: Moments,
    weight: Tensor,
    original: nn.Module,
    changed: nn.Module,
    norms: tuple[nn.Module, nn.Module] | None,
) -> None:
    """Put right the mean of a layer's answers in its bias, or mean and variance in the norm that reads them.

    Parameters
    ----------
    read : Moments
    weight : torch.Tensor
        ``(groups, out / groups, d)``: the layer's own.
    original, changed : torch.nn.Module
        The dense convolution and the layer, which is changed.
    norms : (torch.nn.Module, torch.nn.Module), optional
        The batch norms behind either; the second is changed in the layer's place. One that has no running
        statistics puts mean and variance right by itself.
    """
    mean = (weight.double() @ read.small_mean.double()[..., None]).reshape(-1)
    wanted = read.answer_mean.double().reshape(-1)
    if norms is None and changed.bias is not None:
        changed.bias.copy_(_bias(original) + wanted - mean)
    elif norms is not None and norms[0].running_mean is not None:
        before, after = (x.reshape(-1) for x in (read.answer_power, read.power(weight)))
        # a channel that is constant on one side has no scale to be put right; nor is rounding noise one
        told = (before > _NOISE * after) & (after > _NOISE * before)
        ratio = torch.where(told, after / before.clamp_min(torch.finfo(before.dtype).tiny), 1)
        dense, norm = norms
        spread = (dense.running_var.double() + dense.eps).clamp_min(torch.finfo(torch.float64).tiny)
        variance = (ratio * spread - norm.eps).clamp_min(0)
        gain = ((variance + norm.eps) / spread).sqrt()
        centre = dense.running_mean.double() - wanted - _bias(original)
        norm.running_mean.copy_(mean + _bias(changed) + gain * centre)
        norm.running_var.copy_(variance)


def _bias(convolution: nn.Module) -> Tensor | float:
    return 0.0 if convolution.bias is None else convolution.bias.double()


def check_damping(damping: float) -> None:
    """Raise an `InvalidValueError` unless damping is above 0."""
    checks.check_real("damping", damping, lambda x: x > 0, "a share above 0, such as 0.01")


def _fit(module: ClusteredConv2d, original: nn.Module, read: Moments, damping: float, *, alone: bool) -> None:
    """Fit one layer's codebook, if no other uses it, and its scales, in place."""
    book, dense = module.codebook, _moments.grouped(original)
    squares = LeastSquares(read, damping)
    scales = None if module.scales is None else module.scales.detach()
    indices = torch.from_numpy(module.members()).to(book.values.device)

    def decode(values: Tensor, scales: Tensor | None) -> Tensor:
        rows = torch.func.functional_call(book, {"values": values}, (indices,))
        rows = rows if scales is None else scales[:, None] * rows
        return rows.reshape(dense.shape).float()

    def fit(part: nn.Parameter, decoded: Callable[[Tensor], Tensor], rounded: Callable) -> None:
        with torch.no_grad():
            values = part.detach().clone()
        new = squares.fitted(decoded, values, rounded=rounded)
        with torch.no_grad():
            part.copy_(new)

    if alone:
        fit(book.values, lambda x: decode(x, scales), lambda x: _precisions.rounded(x, book.precision))
    if module.scales is not None:
        kind = _precisions.scale_type(book.precision)
        fit(module.scales, lambda x: decode(book.values.detach(), x), lambda x: x.to(kind).to(x.dtype))


def _check_fit(clustered: dict[str, ClusteredConv2d], dense: nn.Module) -> None:
    """Raise an error unless there are clustered convolutions and `dense` has them as ordinary ones."""
    if not clustered:
        raise InvalidValueError(
            "the model has no clustered convolution to calibrate; make it with compression.compress first."
        )
    modules = dict(dense.named_modules())
    for name, module in clustered.items():
        weight = getattr(modules.get(name), "weight", None)
        if not torch.is_tensor(weight) or tuple(weight.shape) != module.shape:
            raise InvalidValueError(
                f"layer {name} of shape {module.shape} is no such convolution in the dense network; "
                "give the network that was compressed."
            )
