"""The compressed model and back: indices and codebooks in place of dense weights."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from kclib import kernels, packing, quantization
from kclib.clustering import Clustering, Group, quantized
from kclib.errors import InvalidValueError
from kclib.layers import BLOCK_BYTES, GEOMETRY, N_TURNS, ClusteredConv2d, Codebook, clustered


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
    network: nn.Module,
    clustering: Clustering,
    *,
    precision: str | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> nn.Module:
    """Return a copy of `network` that keeps indices and codebooks in place of the clustered kernels.

    No dense copy of them is made. Convolutions that share one weight share its indices.

    Parameters
    ----------
    network : torch.nn.Module
    clustering : Clustering
    precision : {"fp32", "fp16", "bf16", "int8", "int4"}, optional
        What the codebooks' values (and scales) are rounded to, so that a file holds what runs; the network's
        own by default. int8 and int4 need a float32 network.
    block_bytes : int
        What a layer may take above its packed form while it runs.

    Raises
    ------
    InvalidValueError, UnknownNameError
        The clustering comes from another architecture; a group whose layers differ in device or floating
        type; a weight that something other than a convolution shares; a convolution with a forward of its
        own; values the precision cannot hold.
    """
    modules = dict(network.named_modules())
    memo = {}
    for name, layer in packed_layers(
        network, clustering, precision=precision, block_bytes=block_bytes
    ).items():
        convolution = modules[name]
        if not _computes_as_torch(convolution):
            raise InvalidValueError(
                f"layer {name} is a {type(convolution).__name__} that computes in a way of its own; "
                "replace its kernels with compression.replaced instead."
            )
        memo[id(convolution)] = layer
        if layer.bias is not None:
            memo[id(convolution.bias)] = layer.bias
    return kernels.copied(network, memo)


def replaced(network: nn.Module, clustering: Clustering) -> nn.Module:
    """Return a copy of `network` whose kernels are those that stand for them, in ordinary dense weights.

    Raises
    ------
    InvalidValueError
        The clustering comes from another architecture.
    """
    return kernels.insert(network, kernels.KernelBank(quantized(clustering), clustering.layers, {}))


def packed_layers(
    network: nn.Module,
    clustering: Clustering,
    *,
    precision: str | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> dict[str, ClusteredConv2d]:
    """Return what `compress` puts in place of convolutions, by their names."""
    convolutions = kernels.matched(network, clustering.layers)
    result, biases = {}, {}
    for group in clustering.groups:
        members = [convolutions[layer.name] for layer in group.layers]
        codebook, ranks = _codebook(group, members, precision, clustering.seed)
        start = 0
        for layer, member in zip(group.layers, members, strict=True):
            rows = slice(start, start := start + layer.n_kernels)
            packed = {}
            for name, user in users(network, layer.name, member.weight).items():
                order = output_order(user)
                if order not in packed:
                    packed[order] = _packed(group, rows, order, ranks, codebook)
                indices, scales = packed[order]
                result[name] = ClusteredConv2d(
                    user, codebook, indices, scales=scales, bias=_bias(user, biases), block_bytes=block_bytes
                )
                if result[name].shape != tuple(user.weight.shape):
                    raise InvalidValueError(
                        f"layer {name} says that its weight has shape {result[name].shape}, "
                        f"but it has {tuple(user.weight.shape)}; they must agree."
                    )
    return result


def expand(network: nn.Module) -> nn.Module:
    """Return a copy of `network` whose clustered convolutions are ordinary ones with dense weights."""
    ordinary, weights = {}, {}
    for module in clustered(network).values():
        if id(module.indices) not in weights:
            weights[id(module.indices)] = nn.Parameter(
                module.weight().detach().contiguous(), module.codebook.values.requires_grad
            )
        ordinary[id(module)] = _ordinary(module, weights[id(module.indices)], _bias(module, ordinary))
    return kernels.copied(network, ordinary)


def users(network: nn.Module, name: str, weight: nn.Parameter) -> dict[str, nn.Module]:
    """Return every convolution with this weight, by name."""
    users = {}
    for owner, module in network.named_modules():
        if any(value is weight for value in module._parameters.values()):
            if not isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                raise InvalidValueError(
                    f"layer {name} shares its weight with {owner}, which is no 2D convolution; "
                    "it cannot be clustered."
                )
            users[owner] = module
    return users


def output_order(convolution: nn.Module) -> Order:
    """Return the order in which a convolution's kernels are packed."""
    first, second = convolution.weight.shape[:2]
    return Order((convolution.groups, -1, second) if convolution.transposed else (1, 1, first * second))


def _computes_as_torch(convolution: nn.Module) -> bool:
    """Tell whether neither a convolution nor its class has replaced what torch does in it."""
    base = nn.ConvTranspose2d if isinstance(convolution, nn.ConvTranspose2d) else nn.Conv2d
    methods = [name for name in ("forward", "_conv_forward") if hasattr(base, name)]
    return all(
        name not in vars(convolution) and getattr(type(convolution), name) is getattr(base, name)
        for name in methods
    )


def _codebook(group: Group, convolutions, precision: str | None, seed: int) -> tuple[Codebook, np.ndarray]:
    """Return a group's codebook, the most used representative first, and the new place of each."""
    kinds = {(x.weight.device, x.weight.dtype) for x in convolutions}
    if len(kinds) > 1:
        raise InvalidValueError(
            f"the layers of group {group.name} are of several kinds, and one codebook needs one: "
            f"{', '.join(sorted(f'{dtype} on {device}' for device, dtype in kinds))}."
        )
    device, dtype = kinds.pop()
    precision = quantization.own(dtype) if precision is None else precision
    if precision in ("int8", "int4") and dtype != torch.float32:
        raise InvalidValueError(
            f"an {precision} codebook needs a float32 network, not {dtype}; call .float() on it first."
        )
    order = np.argsort(-np.bincount(group.indices, minlength=group.n_clusters), kind="stable")
    values = quantization.restore(quantization.store(torch.from_numpy(group.codebook[order]), precision))
    values = quantization.checked(values.to(dtype), precision).to(device)
    codebook = Codebook(
        values, group=group.name, precision=precision, turned=group.turns is not None, seed=seed
    )
    return codebook.requires_grad_(convolutions[0].weight.requires_grad), np.argsort(order)


def _packed(group: Group, rows: slice, order: "Order", ranks: np.ndarray, codebook: Codebook):
    """Return one layer's packed indices, and its scales as a parameter or None."""
    indices = ranks[group.indices[rows]]
    if group.turns is not None:
        indices = indices * N_TURNS + group.turns[rows]
    packed = torch.from_numpy(packing.pack(order(indices), codebook.bits)).to(codebook.values.device)
    if group.scales is None:
        return packed, None
    scales = torch.from_numpy(order(group.scales[rows])).to(quantization.scale_type(codebook.precision))
    scales = quantization.checked(scales, codebook.precision).to(codebook.values)
    return packed, nn.Parameter(scales, codebook.values.requires_grad)


def _bias(convolution: nn.Module, made: dict[int, object]) -> nn.Parameter | None:
    """Return a copy of a bias, the same one wherever it is shared."""
    bias = convolution.bias
    if bias is None:
        return None
    return made.setdefault(id(bias), nn.Parameter(bias.detach().clone(), bias.requires_grad))


def _ordinary(module: ClusteredConv2d, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
    geometry = {name: getattr(module, name) for name in GEOMETRY if name != "transposed"}
    if not module.transposed:
        geometry.pop("output_padding")
    kind = nn.ConvTranspose2d if module.transposed else nn.Conv2d
    convolution = kind(**geometry, bias=bias is not None, device="meta")
    convolution.weight, convolution.bias = weight, bias
    return convolution.train(module.training)
