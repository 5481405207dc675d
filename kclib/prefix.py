"""A network run again from where it changes: what ran before the change answers as it did."""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn


@dataclass
class _Call:
    """One module's run within a network's run.

    Attributes
    ----------
    end : int
        Number of calls that had begun when it ended.
    given : object
        A copy of its input, where an `nn.Sequential` may be entered there; None elsewhere.
    output : object
        A copy of what it answered, as it was then.
    fresh : bool
        Whether it left its inputs as they were and answered with memory of its own. One that did not is run
        again: a copy would not be tied to what others hold.
    """

    module: nn.Module
    end: int = 0
    given: object = None
    output: object = None
    fresh: bool = False


@dataclass(frozen=True)
class Recording:
    """A run of a network, call by call.

    Attributes
    ----------
    network : torch.nn.Module
    inputs : torch.Tensor
    output : object
        What it answered.
    calls : list
        In the order in which they began.
    """

    network: nn.Module
    inputs: Tensor
    output: object
    calls: list[_Call] = field(repr=False)

    def again(self, changed: Collection[nn.Module]) -> object:
        """Return what the network answers now that some of its modules have changed.

        Modules that ran before the first of them answer what they did; only the rest is computed. The result
        is that of a whole run, to the bit where the operations are deterministic. Modules may be shared and
        called often, write to their inputs, and be called in any order.

        Parameters
        ----------
        changed : collection of torch.nn.Module
            Of this network. One that was not called (its weight may be used all the same) means a whole run.
        """
        ids = {id(module) for module in changed}
        seen = {id(call.module) for call in self.calls}
        first = next((i for i, call in enumerate(self.calls) if id(call.module) in ids), 0)
        replay = _Replay(self.calls, first if ids <= seen else 0)
        with _apart(), _through(self.network, replay):
            return self.network(self.inputs.clone())


def record(network: nn.Module, inputs: Tensor, changing: Collection[nn.Module]) -> Recording:
    """Run a network and remember what its modules answered.

    Takes the memory of all their answers to these inputs, so that inputs should be a batch of some tens.

    Parameters
    ----------
    network : torch.nn.Module
        In eval mode; its modules must answer the same whenever they are given the same.
    inputs : torch.Tensor
        ``(b, ...)``, unchanged.
    changing : collection of torch.nn.Module
        Those that `Recording.again` may be told of.
    """
    ids = {id(module) for module in changing}
    holders = {id(x) for x in network.modules() if any(id(part) in ids for part in x.modules())}
    recorder = _Recorder(holders)
    with _apart(), _through(network, recorder):
        inputs = inputs.clone()
        output = network(inputs.clone())
    return Recording(network, inputs, output, recorder.calls)


class _Recorder:
    """Runs calls as they come and remembers them."""

    def __init__(self, holders: set[int]):
        self.holders, self.calls = holders, []
        self.outer: list[tuple[Callable, tuple, list[int]]] = []  # the calls that have not ended

    def __call__(self, module: nn.Module, forward: Callable, *args, **kwargs) -> object:
        call, given = _Call(module), (args, kwargs)
        self.calls.append(call)
        if id(module) in self.holders and not module._forward_pre_hooks and self._enterable(given):
            call.given = copy.deepcopy(args[0])
        versions = _versions(given)
        self.outer.append((forward, given, versions))
        output = forward(*args, **kwargs)
        self.outer.pop()
        call.end = len(self.calls)
        call.fresh = _versions(given) == versions and not _memory(output) & _memory(given)
        if call.fresh:
            call.output = copy.deepcopy(output)
        return output

    def _enterable(self, given: tuple) -> bool:
        """Tell whether an `nn.Sequential` can begin here, none of what it was given being touched so far."""
        if not self.outer:
            return False
        forward, outer, versions = self.outer[-1]
        return _is_chain(forward) and _versions(outer) == versions and not _memory(given) & _memory(outer)


class _Replay:
    """Answers for calls that ended before call number `first` began, and runs the others."""

    def __init__(self, calls: list[_Call], first: int):
        self.calls, self.first, self.next = calls, first, 0

    def __call__(self, module: nn.Module, forward: Callable, *args, **kwargs) -> object:
        if self.next >= self.first:
            return forward(*args, **kwargs)
        call = self.calls[self.next]
        if call.end <= self.first and call.fresh:
            self.next = call.end
            return copy.deepcopy(call.output)
        self.next += 1
        if _is_chain(forward) and call.end > self.first:
            return self._entered(module, *args)
        return forward(*args, **kwargs)

    def _entered(self, sequence: nn.Sequential, x: object) -> object:
        """Run a sequence from the part in which something changes, if it can be entered there."""
        parts, i, place = list(sequence), self.next, 0
        while self.calls[i].end <= self.first:
            i, place = self.calls[i].end, place + 1
        if self.calls[i].given is not None:
            self.next, x, parts = i, copy.deepcopy(self.calls[i].given), parts[place:]
        for part in parts:
            x = part(x)
        return x


@contextmanager
def _through(network: nn.Module, run: Callable) -> Iterator[None]:
    """While it lasts, every module of a network computes by ``run(module, forward, ...)``."""
    before = {module: vars(module).get("forward") for module in network.modules()}
    for module in before:
        module.forward = partial(run, module, module.forward)
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del module.forward
            else:
                module.forward = own


@contextmanager
def _apart() -> Iterator[None]:
    """Compute without gradients, on tensors that know how often they were written to."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _is_chain(forward: Callable) -> bool:
    """Tell whether this is how an `nn.Sequential` computes: each part reads what the last one answered."""
    return getattr(forward, "__func__", None) is nn.Sequential.forward


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and mappings."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def _versions(value: object) -> list[int]:
    return [tensor._version for tensor in _tensors(value) if not tensor.is_inference()]


def _memory(value: object) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in _tensors(value)}
