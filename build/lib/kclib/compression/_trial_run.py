"""Whether a network runs what took the place of its convolutions, and answers as it should: one run tells."""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kclib import models
from kclib.compression import _example_inputs
from kclib.compression._layers import ClusteredConv2d
from kclib.errors import InvalidValueError, reason
from kclib.kernels import _copying
from kclib.kernels._convolutions import ALONE

_LOG = logging.getLogger(__name__)
_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-3}  # of the largest answer; coarser types:
_COARSE = 0.1


def check(
    made: nn.Module,
    names: Iterable[str],
    *,
    source: nn.Module | None = None,
    reference: nn.Module | None = None,
    given: models.Model | nn.Module | None = None,
    inputs: _example_inputs.Inputs = None,
) -> None:
    """Raise an error unless a network, on one input, runs each of its replaced layers.

    Copies of the networks are run, in eval mode, without gradients, where torch's generators give the same
    draws each time; a layer that does not run so gets a second chance in training mode. Hooks run with them.

    Parameters
    ----------
    made : torch.nn.Module
        Unchanged.
    names : iterable of str
        The layers that were replaced.
    source : torch.nn.Module, optional
        What it was copied from. None of these layers' weights in it may be read.
    reference : torch.nn.Module, optional
        A network of ours that must answer alike but for rounding; it is run as it is.
    given : Model or torch.nn.Module, optional
        What the caller gave; the shape of inputs is a Model's own, where its preprocessing tells it.
    inputs : torch.Tensor or tuple or mapping or bool, optional
        What the forward takes, by place or by name. By default random values in the shape of an image that
        runs: of the Model, else squares of the sizes in use; if none runs, the log says that nothing was
        checked. False checks nothing.

    Raises
    ------
    InvalidValueError
        It never runs a layer, runs one of `source`, or answers otherwise than the reference.
    """
    names = list(names)
    if inputs is False or not names:
        return
    first = _copying.copied(made) if reference is None else reference
    arguments = _example_inputs.arguments(first, given, inputs)
    if arguments is None:
        _LOG.warning(
            "whether the network runs its replaced layers was not checked: no square image of %s channels "
            "runs through it. Give an input it takes: inputs=.", _example_inputs.channels_of(first)[0],
        )  # fmt: skip
        return
    if inputs is not None:
        _check_runs(first, arguments)
    trial = _tried(_copying.copied(made), names, source, arguments)
    _check_source(trial)
    if missing := [name for name in names if name not in trial.reached]:
        trained = _tried(
            _copying.copied(made), names, source, _example_inputs.twice(arguments), training=True
        )
        _check_source(trained)
        if missing := [name for name in missing if name not in trained.reached]:
            others = f" (nor {len(missing) - 1} others)" * (len(missing) > 1)
            raise InvalidValueError(
                f"the network's forward never uses layer {missing[0] or ALONE}{others}, so it cannot be "
                "replaced; it may use a copy of the weight. Let it run the layer, give inputs= with which "
                "it does, or leave the layer out of what is clustered (KernelBank.only)."
            )
    if reference is not None:
        _check_alike(reference, trial, arguments)


@dataclass(frozen=True)
class _Trial:
    """What one run did.

    Attributes
    ----------
    answers : list of torch.Tensor
        Empty if it failed.
    reached : frozenset of str
    of_source : str or None
        A layer of the source that it read, if it did.
    error : Exception, optional
    """

    answers: list[Tensor]
    reached: frozenset[str]
    of_source: str | None
    error: Exception | None = None


def _tried(
    network: nn.Module, names: list[str], source: nn.Module | None, arguments, *, training: bool = False
) -> _Trial:
    """Run a network of ours, and see what it uses."""
    reached, modules = set(), dict(network.named_modules(remove_duplicate=False))
    layers = {name: modules[name] for name in names}
    for name, module in layers.items():
        if isinstance(module, ClusteredConv2d):
            module._decoded = _noting(module._decoded, name, reached)
    own = _places({name: x for name, x in layers.items() if not isinstance(x, ClusteredConv2d)})
    sources = {} if source is None else dict(source.named_modules(remove_duplicate=False))
    foreign = _places({name: sources[name] for name in names if name in sources})
    reads, answers, error = _Reads(own.keys() | foreign.keys()), [], None
    try:
        with reads:
            answers = _example_inputs.run(network, arguments, training=training)
    except Exception as caught:  # of the user's own code
        error = caught
    for place in reads.found & own.keys():
        reached.update(own[place])
    of_source = [name for place in reads.found & foreign.keys() for name in foreign[place]]
    return _Trial(answers, frozenset(reached), min(of_source, default=None), error)


def _check_runs(network: nn.Module, arguments) -> None:
    try:
        _example_inputs.run(network, arguments)
    except Exception as error:  # of the user's own code
        raise InvalidValueError(
            f"the network does not run on the inputs that were given ({reason(error)}); "
            "give what its forward takes."
        ) from error


def _check_source(trial: _Trial) -> None:
    if trial.of_source is not None:
        raise InvalidValueError(
            f"layer {trial.of_source or ALONE} cannot be replaced: the network's forward still runs "
            "that of the network it was copied from, which a function or method in it holds; let the forward "
            "read it from self."
        )


def _check_alike(reference: nn.Module, trial: _Trial, arguments) -> None:
    """Raise an error if a trial's answers are not those of a reference, as far as this repeats its own."""
    if trial.error is not None:
        raise InvalidValueError(
            f"the network does not run with its layers replaced, and runs without ({reason(trial.error)}); "
            "its code may need something that only an ordinary convolution has."
        ) from trial.error
    expected = _example_inputs.run(reference, arguments)
    if not _alike(expected, trial.answers) and _alike(expected, _example_inputs.run(reference, arguments)):
        pairs = [(x, y) for x, y in zip(expected, trial.answers, strict=False) if x.shape == y.shape]
        apart = max(
            (float((x.double() - y.double()).abs().max()) for x, y in pairs if x.numel()), default=math.nan
        )
        raise InvalidValueError(
            f"the network answers otherwise with its layers replaced (by up to {apart:.3g}), more than "
            "rounding explains; its code may do something else to what is no ordinary convolution."
        )


def _alike(expected: list[Tensor], answers: list[Tensor]) -> bool:
    if len(expected) != len(answers):
        return False
    return all(
        x.shape == y.shape and x.dtype == y.dtype and _close(x, y)
        for x, y in zip(expected, answers, strict=True)
    )


def _close(x: Tensor, y: Tensor) -> bool:
    if not x.is_floating_point() or not x.numel():
        return True  # a class or an index: two nearly equal answers may change places
    share = _ROUNDING.get(x.dtype, _COARSE)
    x, y = x.double(), y.double()
    largest = x[torch.isfinite(x)].abs().max() if torch.isfinite(x).any() else 0
    return torch.allclose(x, y, rtol=share, atol=float(share * largest), equal_nan=True)


def _noting(decoded, name: str, reached: set[str]):
    def noted(first: int, last: int) -> Tensor:
        reached.add(name)
        return decoded(first, last)

    return noted


class _Reads(TorchDispatchMode):
    """Notes which of some places in memory are read."""

    def __init__(self, wanted: set[int]):
        super().__init__()
        self.wanted, self.found = wanted, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.found |= self.wanted & {_place(x) for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        return func(*args, **kwargs)


def _places(layers: Mapping[str, nn.Module]) -> dict[int, list[str]]:
    """Return where in memory the weights of layers, and what they are computed from, lie."""
    result = {}
    for name, module in layers.items():
        held = {id(x): x for x in module.parameters() if x is not module._parameters.get("bias")}
        weight = vars(module).get("weight")  # torch's pruning and older weight norm keep it there
        for value in [*held.values(), *([weight] if torch.is_tensor(weight) else [])]:
            result.setdefault(_place(value), []).append(name)
    result.pop(0, None)
    return result


def _place(value: Tensor) -> int:
    """Return where a tensor's values begin in memory; 0 if it has none there."""
    if value.is_meta or value.layout != torch.strided or type(value) not in (Tensor, nn.Parameter):
        return 0
    return value.untyped_storage().data_ptr()
