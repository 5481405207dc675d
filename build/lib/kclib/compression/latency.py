"""How long a compressed network takes beside the dense one."""

from collections.abc import Iterable
from functools import partial

import pandas as pd
import torch
from torch import nn

from kclib import models
from kclib._util import checks
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
    network, rows = _copying.copied(models.network_of(network)).eval(), {}
    dense, dtype = expanded(network), _inference.precision_of(network)
    for batch in batches:
        images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        calls = {
            name: partial(_inference.run, x, images) for name, x in (("dense", dense), ("packed", network))
        }
        times = _alternating(calls)
        rows[batch] = times | {"ratio": times["packed"] / times["dense"]}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("batch")


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
