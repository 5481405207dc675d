"""Make a network small within a number of bytes, without training: `shrink`."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from torch import nn

from kclib import datasets, kernels, models
from kclib.models import _model
from kclib.recovery import _sequential, allocation, sensitivity
from kclib.recovery.allocation import KS, Allocation

_KINDS = ("output", "input", "uniform")  # of sensitivity, the first that is not 0 for all kernels


def shrink(
    model: models.Model | nn.Module,
    images: datasets.ImageSet,
    held_back: datasets.ImageSet,
    n_bytes: float,
    *,
    sample_weight: np.ndarray | None = None,
    dense: models.Model | nn.Module | None = None,
    ks: Iterable[int] = KS,
    precision: str = "fp16",
    coding: str = "entropy",
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> Allocation:
    """Return what loses least within so many bytes without training: shared out over layers, and corrected.

    `sensitivity.importance` says what errors cost. `allocation.allocate` finds how many clusters each layer
    gets for it, and `_sequential.correct` makes them. `compression.compress(found.model, found.clustering,
    precision=precision)` packs what is found. Where no image leaves the network in doubt, errors cost what
    they do to each layer's output (`sensitivity.importance` of kind ``input``).

    Parameters
    ----------
    model : Model or torch.nn.Module
        Unchanged. A network alone is given images as `models.plain` makes them.
    images : ImageSet, or what `datasets.as_image_set` takes
        Some hundred to correct by; their labels are not read.
    held_back : ImageSet, or what `datasets.as_image_set` takes
        To measure the drop on: other images, not the test set.
    n_bytes : float
        Most bytes of all convolutions.
    sample_weight : numpy.ndarray, optional
        `sensitivity.importance` of the model's kernels, if they are there already.
    dense : torch.nn.Module, optional
        As in `_sequential.correct`.
    ks : iterable of int
        Numbers of clusters that a layer may get, as in `allocation.allocate`.
    precision, coding
        Of codebooks and indices as they will be stored.
    seed, device, progress

    Raises
    ------
    InvalidValueError, UnknownNameError
        As `allocation.allocate` and `_sequential.correct`.

    Examples
    --------
    >>> import kclib, torch
    >>> pictures = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
    >>> images = kclib.ImageSet("noise", pictures, torch.arange(12) % 2, ("shirt", "coat"), fingerprint="1")
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 2))
    >>> found = kclib.shrink(network, images, images, 400, progress=False)
    >>> found.n_bytes <= 400, found.clustering.n_kernels
    (True, 24)
    """
    given, model, images = model, _model.as_model(model), datasets.as_image_set(images)
    bank, options = kernels.extract(model.network), {"seed": seed, "device": device, "progress": progress}
    if sample_weight is None:
        kinds = (sensitivity.importance(model, images, bank, kind=x, **options) for x in _KINDS)
        sample_weight = next(filter(np.any, kinds))

    def build(scope, n_clusters):
        corrected = _sequential.correct(
            model,
            images,
            n_clusters,
            scope=scope,
            dense=dense,
            precision=precision,
            sample_weight=sample_weight,
            **options,
        )
        return corrected.network, corrected.clustering

    best = allocation.allocate(
        model, held_back, bank, sample_weight, n_bytes=n_bytes, scopes=("layer",), ks=ks, precision=precision,
        coding=coding, build=build, uniform=False, **options,
    )  # fmt: skip
    return replace(best, model=models.like(given, best.network))
