"""How long a compressed network takes beside the dense one, and whether reusing maps pays."""

import warnings
from collections.abc import Iterable
from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kclib import checks, inference, kernels, layers, models
from kclib.compression import expanded
from kclib.errors import InvalidValueError
from kclib.layers import ClusteredConv2d

_SECONDS = 0.5  # that each is run for, at least


def of_network(
    network: nn.Module, shape: tuple[int, int, int], batches: Iterable[int] = (1, 16, 64), *, seed: int = 0
) -> pd.DataFrame:
    """Time a compressed network against its expanded self on random images.

    Parameters
    ----------
    network : Model or torch.nn.Module
        From `compression.compress`.
    shape : (int, int, int)
        Channels, height and width.
    batches : iterable of int
    seed : int

    Returns
    -------
    pandas.DataFrame
        Indexed by batch: ``dense`` and ``packed``, median milliseconds a forward, and ``ratio``.

    Raises
    ------
    InvalidValueError
        The network does not run on such images.
    """
    if not isinstance(shape, (tuple, list)) or len(shape) != 3:
        raise InvalidValueError(f"shape is {checks.said(shape)}; it must be (channels, height, width).")
    shape = [checks.check_whole("a side of shape", x, 1) for x in shape]
    batches = [checks.check_whole("a batch", x, 1) for x in checks.several("batches", batches)]
    seed = checks.check_seed(seed)
    network, rows = kernels.copied(models.network_of(network)).eval(), {}
    dense, dtype = expanded(network), inference.precision_of(network)
    for batch in batches:
        images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        calls = {
            name: partial(inference.run, x, images) for name, x in (("dense", dense), ("packed", network))
        }
        times = _alternating(calls)
        rows[batch] = times | {"ratio": times["packed"] / times["dense"]}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("batch")


def of_layer(layer: ClusteredConv2d, images: Tensor) -> dict[str, float]:
    """Time four ways to compute one layer's answers, in median milliseconds.

    Returns
    -------
    dict of str to float
        ``dense``: an ordinary convolution; ``packed``: the layer itself; `convolve_then_gather` and
        `add_then_convolve`.
    """
    dense = expanded(layer)
    return _alternating(
        {
            "dense": lambda: dense(images),
            "packed": lambda: layer(images),
            "convolve then gather": lambda: convolve_then_gather(layer, images),
            "add then convolve": lambda: add_then_convolve(layer, images),
        }
    )


def of_layers(network: nn.Module, *, n_images: int = 16, side: int = 4, seed: int = 0) -> pd.DataFrame:
    """Time the ways of `of_layer` on a layer from the middle of a compressed network and on the last one.

    Parameters
    ----------
    network : torch.nn.Module
        From `compression.compress`.
    n_images : int
    side : int
        Height and width of the random maps, in pixels; those of a layer whose kernels reach further are as
        large as that.
    seed : int

    Returns
    -------
    pandas.DataFrame
        Indexed by layer; a column a way, median milliseconds. Without rows if no layer `is_plain`.
    """
    plain = {name: layer for name, layer in layers.clustered(network).items() if is_plain(layer)}
    rows, generator = {}, torch.Generator().manual_seed(seed)
    for name in list(plain)[len(plain) // 2 :: max(1, len(plain) // 2)]:
        layer = plain[name]
        reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        wide = max(side, *reach)
        rows[name] = of_layer(
            layer, torch.randn(n_images, layer.in_channels, wide, wide, generator=generator)
        )
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")


def is_plain(layer: ClusteredConv2d) -> bool:
    """Tell whether a layer is one that `convolve_then_gather` and `add_then_convolve` can compute."""
    geometry = layer.groups == 1 and layer.padding_mode == "zeros" and not layer.transposed
    single = layer.codebook.values.dtype == torch.float32
    return geometry and single and not layer.codebook.turned and layer.scales is None


def convolve_then_gather(layer: ClusteredConv2d, images: Tensor) -> Tensor:
    """Convolve each input channel with each representative once, then add up those that a filter means.

    Of I input and O output channels, with K representatives: I·K convolutions in place of I·O, and I·O
    additions of whole maps (Son, Nah and Lee 2018, *Clustering Convolutional Kernels to Compress Deep Neural
    Networks*, propose to remove redundant convolutions so).

    Parameters
    ----------
    layer : ClusteredConv2d
        float32, one group, zero padding, not transposed, neither scaled nor turned.
    images : torch.Tensor
        ``(b, in, h, w)``.

    Raises
    ------
    InvalidValueError
        Another kind of layer.
    """
    members = _members(layer)
    k, (n_out, n_in) = len(layer.codebook.values), members.shape
    b, _, h, w = images.shape
    maps = F.conv2d(
        images.reshape(b * n_in, 1, h, w), layer.codebook.values[:, None], None,
        layer.stride, layer.padding, layer.dilation,
    )  # fmt: skip
    h, w = maps.shape[2:]
    maps = maps.reshape(b, n_in * k, h * w).transpose(0, 1).reshape(n_in * k, -1)
    columns = members + k * torch.arange(n_in)
    sums = _selection(n_in, columns.reshape(-1), n_in * k) @ maps
    return _with_bias(layer, sums.reshape(n_out, b, h, w).transpose(0, 1))


def add_then_convolve(layer: ClusteredConv2d, images: Tensor) -> Tensor:
    """Add up the input channels that share a representative in a filter, then convolve each sum once.

    O·K convolutions in place of I·O, after I·O additions of whole maps.

    Parameters
    ----------
    layer, images
        As in `convolve_then_gather`.

    Raises
    ------
    InvalidValueError
    """
    members = _members(layer)
    k, (n_out, n_in) = len(layer.codebook.values), members.shape
    b, _, h, w = images.shape
    order = torch.argsort(members, dim=1, stable=True)
    rows = (members.gather(1, order) + k * torch.arange(n_out)[:, None]).reshape(-1)
    starts = torch.searchsorted(rows, torch.arange(n_out * k + 1))
    with _beta():
        chosen = torch.sparse_csr_tensor(
            starts, order.reshape(-1), torch.ones(n_out * n_in), size=(n_out * k, n_in)
        )
    sums = chosen @ images.transpose(0, 1).reshape(n_in, -1)
    sums = sums.reshape(n_out, k, b, h, w).permute(2, 0, 1, 3, 4).reshape(b * n_out, k, h, w)
    maps = F.conv2d(sums, layer.codebook.values[None], None, layer.stride, layer.padding, layer.dilation)
    return _with_bias(layer, maps.reshape(b, n_out, *maps.shape[2:]))


def _members(layer: ClusteredConv2d) -> Tensor:
    """Return the representative of each kernel, int64 ``(out, in)``."""
    if not (isinstance(layer, ClusteredConv2d) and is_plain(layer)):
        raise InvalidValueError(
            "only a float32 convolution of one group, zero-padded, neither scaled nor turned, is computed so."
        )
    return torch.from_numpy(layer.members()).long().reshape(layer.out_channels, layer.in_channels)


def _selection(per_row: int, columns: Tensor, n_columns: int) -> Tensor:
    """Return a sparse matrix with `per_row` ones in each row."""
    n_rows = len(columns) // per_row
    with _beta():
        return torch.sparse_csr_tensor(
            per_row * torch.arange(n_rows + 1), columns, torch.ones(len(columns)), size=(n_rows, n_columns)
        )


def _with_bias(layer: ClusteredConv2d, maps: Tensor) -> Tensor:
    return maps if layer.bias is None else maps + layer.bias[:, None, None]


def _beta() -> warnings.catch_warnings:
    """Return a context in which torch does not say that its sparse matrices are in beta state."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


@torch.inference_mode()
def _alternating(calls: dict) -> dict[str, float]:
    """Time calls in turn, so that what else the machine does falls on each; median milliseconds."""
    from torch.utils import benchmark  # it looks for a CUDA toolkit, and says so

    medians = {name: [] for name in calls}
    for _ in range(3):
        for name, call in calls.items():
            timer = benchmark.Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
            medians[name].append(1e3 * timer.blocked_autorange(min_run_time=_SECONDS / 3).median)
    return {name: float(pd.Series(values).median()) for name, values in medians.items()}
