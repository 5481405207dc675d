"""The compressed model and back: indices and codebooks in place of dense weights."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from kclib import kernels
from kclib.clustering import Clustering, Group, checked, digest, quantized
from kclib.compression import _attributes, _example_inputs, _packing, _precisions, _trial_run
from kclib.compression._layers import BLOCK_BYTES, N_TURNS, ClusteredConv2d, Codebook, clustered, kind_of
from kclib.errors import InvalidValueError
from kclib.kernels import _convolutions, _copying
from kclib.models import Model, like, network_of


@dataclass(frozen=True)
class Order:
    """How a weight's kernels are stored: output channels first, then the inputs of their group.

    Attributes
    ----------
    shape : tuple of int
        Of a transposed convolution: groups, inputs, outputs. In a plain one nothing is moved.
    """

    shape: tuple[int, int, int]

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Return the values of kernels ``(n,)`` in this order."""
        return rows.reshape(self.shape).transpose(0, 2, 1).ravel()


def compress(
    network: Model | nn.Module,
    clustering: Clustering,
    *,
    precision: str | None = None,
    linear: str | None = None,
    block_bytes: int = BLOCK_BYTES,
    inputs: _example_inputs.Inputs = None,
) -> Model | nn.Module:
    """Return a copy of `network` that keeps indices and codebooks in place of the clustered kernels.

    No dense copy of them is kept. Convolutions that share one weight share its indices. What stands for a
    convolution has its class, hooks, attributes and further buffers, and a `weight` to be read
    (`_layers.ClusteredConv2d`). A weight that is computed, by weight norm for example, is taken as it is.

    The result is run once, hooks included, on one input (`_trial_run.check`): each replaced layer must be
    used, and the answers must be those of dense weights, but for rounding.

    Parameters
    ----------
    network : Model or torch.nn.Module
        A Model comes back as a Model.
    clustering : Clustering
        Of this network's kernels, or of what has replaced them.
    precision : {"fp32", "fp16", "bf16", "int8", "int4"}, optional
        What the codebooks' values (and scales) are rounded to, so that a file holds what runs; the network's
        own by default. int8 and int4 need a float32 network.
    linear : {"int8", "int4", "fp16", "bf16", "fp32"}, optional
        What the weights of linear layers are rounded to (`_precisions.quantize`), with a scale for each
        output where it is int8 or int4; by default they stay as they are. A file is smaller by it. The
        network is not while it runs: its linear layers have dense weights of the rounded values.
    block_bytes : int
        What a layer may take above its packed form while it runs.
    inputs : torch.Tensor or tuple or mapping or False, optional
        What the network is tried on, by place or by name; by default random values in the shape of an image
        that it takes. False does without the trial.

    Raises
    ------
    InvalidValueError, UnknownNameError
        The clustering comes from another architecture or other weights; a group whose layers differ in device
        or floating type; a weight that something other than a convolution shares; a convolution with a
        forward of its own; values the precision cannot hold; a network that does not use a replaced layer.

    Examples
    --------
    >>> import kclib, torch
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 16, 3))
    >>> small = kclib.compress(network, kclib.cluster(network, 4))
    >>> [len(x[1].weight.flatten(0, 1).unique(dim=0)) for x in (network, small)]  # kernels that differ
    [128, 4]
    >>> small(torch.zeros(1, 3, 8, 8)).shape
    torch.Size([1, 16, 4, 4])
    """
    dense = network_of(network)
    if linear is not None:
        dense = _precisions.quantize(dense, linear=linear, biases=None)
    check_origin(dense, clustering)
    modules = dict(dense.named_modules())
    packed = packed_layers(dense, clustering, precision=precision, block_bytes=block_bytes)
    replaced = {}
    for name, layer in packed.items():
        _attributes.check_names(name, modules[name])
        if not _computes_as_torch(modules[name]):
            raise InvalidValueError(
                f"layer {name} is a {kind_of(modules[name]).__name__} that computes in a way of its own; "
                "replace its kernels with compression.replaced instead."
            )
        replaced[id(modules[name])] = layer
    result = _attributes.swapped(dense, replaced)
    if inputs is not False:
        reference = _copying.copied(dense)
        for name, convolution in kernels.matched(reference, clustering.layers).items():
            _convolutions.set_weight(convolution, packed[name].weight.detach(), name=name)
        _trial_run.check(result, packed, source=dense, reference=reference, given=network, inputs=inputs)
    return like(network, result)


def replaced(
    network: Model | nn.Module, clustering: Clustering, *, inputs: _example_inputs.Inputs = None
) -> Model | nn.Module:
    """Return a copy of `network` whose kernels are those that stand for them, in ordinary dense weights.

    Parameters
    ----------
    network, clustering, inputs
        As in `compress`.

    Raises
    ------
    InvalidValueError
        The clustering comes from another architecture or other weights; a network that does not use a
        replaced layer.
    """
    dense = network_of(network)
    check_origin(dense, clustering)
    result = inserted(dense, clustering)
    names = [layer.name for layer in clustering.layers]
    _trial_run.check(result, names, source=dense, given=network, inputs=inputs)
    return like(network, result)


def inserted(network: nn.Module, clustering: Clustering) -> nn.Module:
    """Return what `replaced` does, unchecked: for a network that was checked, and is changed many times."""
    return kernels.insert(network, kernels.KernelBank(quantized(clustering), clustering.layers, {}))


def check_origin(network: nn.Module, clustering: Clustering) -> None:
    """Raise an error if a network's kernels are neither those that were clustered nor what stands for them.

    A clustering that does not know of which it was made is taken.
    """
    if not checked(clustering).origin:
        return
    found, rows = kernels.matched(network, clustering.layers), None
    for layer in clustering.layers:
        values = _rows(found[layer.name])
        if digest(values) == clustering.origin.get(layer.name):
            continue
        rows = quantized(clustering) if rows is None else rows
        if not np.array_equal(values, rows[layer.rows]):
            raise InvalidValueError(
                f"layer {layer.name or _convolutions.ALONE} has other kernels than those that were clustered;"
                " cluster the kernels of this network."
            )


def _rows(convolution: nn.Module) -> np.ndarray:
    """Return a convolution's kernels as `kernels.extract` does."""
    weight = _convolutions.weight(convolution).detach().to("cpu", torch.float32)
    return weight.reshape(-1, *weight.shape[2:]).numpy()


def packed_layers(
    network: nn.Module,
    clustering: Clustering,
    *,
    precision: str | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> dict[str, ClusteredConv2d]:
    """Return what `compress` puts in place of convolutions, by their names."""
    found = kernels.matched(network, clustering.layers)
    result, biases = {}, {}
    for group in clustering.groups:
        members = [found[layer.name] for layer in group.layers]
        codebook, ranks = _codebook(group, members, precision, clustering.seed)
        start = 0
        for layer in group.layers:
            rows = slice(start, start := start + layer.n_kernels)
            packed = {}
            for name, user in users(network, layer.name).items():
                order = output_order(user)
                if order not in packed:
                    packed[order] = _packed(group, rows, order, ranks, codebook)
                indices, scales = packed[order]
                result[name] = ClusteredConv2d(
                    user, codebook, indices, scales=scales, bias=_bias(user, biases), block_bytes=block_bytes
                )
                shape, _ = _convolutions.form(user)
                if result[name].shape != shape:
                    raise InvalidValueError(
                        f"layer {name} says that its weight has shape {result[name].shape}, "
                        f"but it has {shape}; they must agree."
                    )
    return result


def expand(network: Model | nn.Module, *, inputs: _example_inputs.Inputs = None) -> Model | nn.Module:
    """Return a copy of `network` whose clustered convolutions are ordinary ones with dense weights.

    They are of the class that they were of, with all that they had. A weight that was computed, by weight
    norm for example, is so again, unless layers share it.

    Parameters
    ----------
    network : Model or torch.nn.Module
        A Model comes back as a Model.
    inputs
        As in `compress`.

    Raises
    ------
    InvalidValueError
        A network that does not use a replaced layer.

    Examples
    --------
    >>> import kclib, torch
    >>> network = torch.nn.Conv2d(3, 8, 3)
    >>> small = kclib.compress(network, kclib.cluster(network, 4))
    >>> dense = kclib.expand(small)
    >>> type(dense).__name__, torch.equal(dense.weight, small.weight)
    ('Conv2d', True)
    """
    packed = network_of(network)
    result = expanded(packed)
    made = [result.get_submodule(name) for name in clustered(packed)]
    shared = Counter(id(convolution.weight) for convolution in made)
    for convolution in made:
        if shared[id(convolution.weight)] == 1:
            _attributes.compute_again(convolution)
    if inputs is not False and clustered(packed):
        reference = _copying.copied(packed)
        names = list(clustered(packed))
        _trial_run.check(result, names, source=packed, reference=reference, given=network, inputs=inputs)
    return like(network, result)


def expanded(network: nn.Module) -> nn.Module:
    """Return what `expand` does, unchecked, with ordinary weights wherever they were computed."""
    ordinary, weights, biases = {}, {}, {}
    for module in clustered(network).values():
        if id(module.indices) not in weights:
            weights[id(module.indices)] = nn.Parameter(
                module.weight.detach().contiguous(), module.codebook.values.requires_grad
            )
        ordinary[id(module)] = _ordinary(module, weights[id(module.indices)], _bias(module, biases))
    return _attributes.swapped(network, ordinary)


def users(network: nn.Module, name: str) -> dict[str, nn.Module]:
    """Return every convolution that has the weight of the one called `name`, by name."""
    wanted, result = _ids(network.get_submodule(name)), {}
    for owner, module in network.named_modules():
        flat = isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and not isinstance(module, ClusteredConv2d)
        if flat and _ids(module) == wanted:
            result[owner] = module
        elif isinstance(module, ParametrizationList):
            continue  # part of a convolution
        elif any(id(value) in wanted for value in module._parameters.values()):
            raise InvalidValueError(
                f"layer {name} shares its weight with {owner}, which is no 2D convolution; "
                "it cannot be clustered."
            )
    return result


def _ids(convolution: nn.Module) -> set[int]:
    return {id(value) for value in _convolutions.parameters(convolution)}


def output_order(convolution: nn.Module) -> Order:
    """Return the order in which a convolution's kernels are packed."""
    (first, second, *_), _ = _convolutions.form(convolution)
    return Order((convolution.groups, -1, second) if convolution.transposed else (1, 1, first * second))


def _computes_as_torch(convolution: nn.Module) -> bool:
    """Tell whether neither a convolution nor its class has replaced what torch does in it."""
    base = nn.ConvTranspose2d if isinstance(convolution, nn.ConvTranspose2d) else nn.Conv2d
    methods = [name for name in ("forward", "_conv_forward") if hasattr(base, name)]
    return all(
        name not in vars(convolution) and getattr(type(convolution), name) is getattr(base, name)
        for name in methods
    )


def _codebook(group: Group, members, precision: str | None, seed: int) -> tuple[Codebook, np.ndarray]:
    """Return a group's codebook, the most used representative first, and the new place of each."""
    kinds = {(x.device, x.dtype) for x in map(_convolutions.weight, members)}
    if len(kinds) > 1:
        raise InvalidValueError(
            f"the layers of group {group.name} are of several kinds, and one codebook needs one: "
            f"{', '.join(sorted(f'{dtype} on {device}' for device, dtype in kinds))}."
        )
    device, dtype = kinds.pop()
    precision = _precisions.own(dtype) if precision is None else precision
    if precision in ("int8", "int4") and dtype != torch.float32:
        raise InvalidValueError(
            f"an {precision} codebook needs a float32 network, not {dtype}; call .float() on it first."
        )
    order = np.argsort(-np.bincount(group.indices, minlength=group.n_clusters), kind="stable")
    values = _precisions.restore(_precisions.store(torch.from_numpy(group.codebook[order]), precision))
    values = _precisions.checked(values.to(dtype), precision).to(device)
    codebook = Codebook(
        values, group=group.name, precision=precision, turned=group.turns is not None, seed=seed
    )
    trained = any(x.requires_grad for x in _convolutions.parameters(members[0]))
    return codebook.requires_grad_(trained), np.argsort(order)


def _packed(group: Group, rows: slice, order: "Order", ranks: np.ndarray, codebook: Codebook):
    """Return one layer's packed indices, and its scales as a parameter or None."""
    indices = ranks[group.indices[rows]]
    if group.turns is not None:
        indices = indices * N_TURNS + group.turns[rows]
    packed = torch.from_numpy(_packing.pack(order(indices), codebook.bits)).to(codebook.values.device)
    if group.scales is None:
        return packed, None
    scales = torch.from_numpy(order(group.scales[rows])).to(_precisions.scale_type(codebook.precision))
    scales = _precisions.checked(scales, codebook.precision).to(codebook.values)
    return packed, nn.Parameter(scales, codebook.values.requires_grad)


def _bias(convolution: nn.Module, made: dict[int, object]) -> nn.Parameter | None:
    """Return a copy of a bias, the same one wherever it is shared."""
    bias = convolution.bias
    if bias is None:
        return None
    return made.setdefault(id(bias), nn.Parameter(bias.detach().clone(), bias.requires_grad))


def _ordinary(module: ClusteredConv2d, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
    """Return a convolution of the class that a clustered one stands for, with all else that this one has."""
    convolution = module.stands_for.__new__(module.stands_for)
    nn.Module.__init__(convolution)  # its own would want its arguments
    convolution.weight, convolution.bias = weight, bias
    _attributes.give(convolution, _attributes.plain(module))
    return convolution
