"""How long a compressed network takes beside the dense one."""

import math
from collections.abc import Iterable
from functools import partial

import pandas as pd
import torch
from torch import nn

from kclib import models
from kclib._util import checks
from kclib.compression import _code_convolution
from kclib.compression._layers import ClusteredConv2d, clustered
from kclib.compression._replacement import expanded
from kclib.errors import InvalidValueError
from kclib.kernels import _copying
from kclib.models import _inference

_SECONDS = 0.5  # that each is run for, at least


def of_network(
    network: models.Model | nn.Module,
    shape: tuple[int, int, int],
    batches: Iterable[int] = (1, 16, 64),
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Time a compressed network against its expanded self on random images.

    Parameters
    ----------
    network : Model or torch.nn.Module
        From `_replacement.compress`.
    shape : (int, int, int)
        Channels, height and width.
    batches : iterable of int
    seed : int

    Returns
    -------
    pandas.DataFrame
        Indexed by batch: ``dense`` and ``packed``, median milliseconds a forward; their ``ratio``, and the
        least and the most that it was in any of three turns, ``ratio_low`` and ``ratio_high``.

    Raises
    ------
    InvalidValueError
        The network does not run on such images.
    """
    shape, batches = _shape(shape), _batches(batches)
    seed = checks.check_seed(seed)
    network, rows = _copying.copied(models.network_of(network)).eval(), {}
    dense, dtype = expanded(network), _inference.precision_of(network)
    for batch in batches:
        images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        calls = {
            name: partial(_inference.run, x, images) for name, x in (("dense", dense), ("packed", network))
        }
        turns = pd.DataFrame(_alternating(calls))
        median, ratios = turns.median(), turns.packed / turns.dense
        span = {"ratio_low": ratios.min(), "ratio_high": ratios.max()}
        rows[batch] = dict(median) | {"ratio": median.packed / median.dense} | span
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("batch")


@torch.inference_mode()
def ways(network: models.Model | nn.Module, shape: tuple[int, int, int], batch: int = 1) -> pd.DataFrame:
    """Return how each clustered convolution answers images of a shape.

    Parameters
    ----------
    network : Model or torch.nn.Module
        From `_replacement.compress`.
    shape : (int, int, int)
        Channels, height and width.
    batch : int

    Returns
    -------
    pandas.DataFrame
        Indexed by layer, in the order in which they answer: ``pixels`` of each channel of the answer, and
        ``way``: ``"indices"`` where no weight is decoded, ``"cropped"`` where what of it meets pixels is, and
        ``"decoded"`` where all is. A layer that answers several times is there for its last.

    Raises
    ------
    InvalidValueError
        The network does not run on such images.
    """
    shape, (batch,) = _shape(shape), _batches([batch])
    network, rows = _copying.copied(models.network_of(network)).eval(), {}

    def note(name: str, layer: ClusteredConv2d, given: tuple, answer: torch.Tensor) -> None:
        plan = _code_convolution.planned(layer, given[0])
        rows[name] = {"pixels": math.prod(answer.shape[-2:]), "way": plan.way if plan else "decoded"}

    for name, layer in clustered(network).items():
        layer.register_forward_hook(partial(note, name))
    _inference.run(network, torch.zeros(batch, *shape, dtype=_inference.precision_of(network)))
    return pd.DataFrame.from_dict(rows, orient="index", columns=["pixels", "way"]).rename_axis("layer")


def _shape(shape: tuple[int, int, int]) -> list[int]:
    if not isinstance(shape, (tuple, list)) or len(shape) != 3:
        raise InvalidValueError(f"shape is {checks.said(shape)}; it must be (channels, height, width).")
    return [checks.check_whole("a side of shape", x, 1) for x in shape]


def _batches(batches: Iterable[int]) -> list[int]:
    return [checks.check_whole("a batch", x, 1) for x in checks.several("batches", batches)]


@torch.inference_mode()
def _alternating(calls: dict) -> dict[str, list[float]]:
    """Time calls in turn, so that what else the machine does falls on each; milliseconds of each turn."""
    from torch.utils import benchmark  # it looks for a CUDA toolkit, and says so

    turns = {name: [] for name in calls}
    for _ in range(3):
        for name, call in calls.items():
            timer = benchmark.Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
            turns[name].append(1e3 * timer.blocked_autorange(min_run_time=_SECONDS / 3).median)
    return turns
