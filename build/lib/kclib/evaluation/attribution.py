"""Where accuracy was lost: by layer, by class and by image."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from kclib import compression, datasets, kernels, models
from kclib._util import checks
from kclib.clustering import Clustering, checked
from kclib.compression import _replacement
from kclib.datasets import ImageSet
from kclib.evaluation import _accuracy
from kclib.evaluation._accuracy import Evaluation, Interval
from kclib.kernels import _convolutions, _copying
from kclib.models import Model, _inference

WAYS = ("alone", "all but")
_ALL = ("all layers", "all")


def by_layer(
    model: Model,
    clustering: Clustering,
    data: ImageSet,
    *,
    ways: Sequence[str] = WAYS,
    batch_size: int = 64,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> pd.DataFrame:
    """Return the accuracy points lost where one layer alone is clustered, and where all but it are.

    Each batch of images goes through every network in turn: the images are prepared, and the dense network
    answers them, once for all. The answers are those of whole evaluations of each network, to the bit on the
    CPU.

    Parameters
    ----------
    model : Model or torch.nn.Module
        Dense; unchanged.
    clustering : Clustering
        As `compression.replaced` puts it into the network.
    data : ImageSet
    ways : sequence of {"alone", "all but"}
    batch_size, precision, device
        As in `_accuracy.evaluate`.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    pandas.DataFrame
        ``layer``; ``way``; ``top1`` in percent; ``drop`` from the dense model in points, with the ends of its
        paired 95 % interval (`_accuracy.drop`), ``drop_low`` and ``drop_high``; ``agreement``, percent of
        the images that the dense model answers alike. A last row, ``all layers`` and ``all``, is the whole
        clustering.

    Raises
    ------
    InvalidValueError, UnknownNameError
        A clustering of another architecture; an unknown way; what `_accuracy.evaluate` raises.
    """
    for way in ways:
        checks.check_known("way to cluster a layer", way, WAYS)
    model, data = models.as_model(model), datasets.as_image_set(data)
    owners = kernels.matched(model.network, checked(clustering).layers)
    users = {name: tuple(_replacement.users(model.network, name)) for name, x in owners.items()}
    keys = [*((layer, way) for layer in users for way in ways), _ALL]
    found: dict[tuple[str, str], list[Tensor]] = {key: [] for key in keys}

    def tell(key: tuple[str, str], logits: Tensor) -> None:
        found[key].append(logits.cpu().topk(min(5, logits.shape[1])).indices)

    pair = _copying.copied(model.network).eval(), compression.replaced(model.network, clustering)
    dense, small = map(_convolutions.plain, pair)  # weights that can be put in for each other
    many = replace(model, name=f"{model.name} by layer", network=_Variants(dense, small, users, ways, tell))
    options = {"batch_size": batch_size, "precision": precision, "device": device, "progress": progress}
    answers = _accuracy.evaluate(many, data, **options)
    rows = [(*key, *_compared(answers, torch.cat(top))) for key, top in found.items()]
    return pd.DataFrame(rows, columns=["layer", "way", "top1", "drop", "drop_low", "drop_high", "agreement"])


def by_class(before: Evaluation, after: Evaluation) -> pd.DataFrame:
    """Return what each class lost.

    Parameters
    ----------
    before, after : Evaluation
        Of the dense and of the clustered model, on the same images.

    Returns
    -------
    pandas.DataFrame
        One row a class that has images: ``name``; ``images``; ``before`` and ``after``, accuracy in percent;
        ``drop`` in points, with its paired 95 % interval on the class's images, ``drop_low`` and
        ``drop_high``; ``lost`` and ``won``, images that are right only before and only after.

    Raises
    ------
    InvalidValueError
        The two are of different images.
    """
    _check_images(before, after)
    rows = []
    for i, name in enumerate(_accuracy.told_apart(before.classes)):
        mine = before.labels == i
        if mine.any():
            first, second = _part(before, mine), _part(after, mine)
            drop = _accuracy.drop(first, second)
            accuracies = first.top1.estimate, second.top1.estimate
            rows.append((name, int(mine.sum()), *accuracies, *_ends(drop.points), drop.lost, drop.won))
    columns = ["name", "images", "before", "after", "drop", "drop_low", "drop_high", "lost", "won"]
    return pd.DataFrame(rows, columns=columns)


def flipped(before: Evaluation, after: Evaluation) -> pd.DataFrame:
    """Return the images that are answered otherwise than before: those lost, those won, those wrong twice.

    Images whose class is not known are left out.

    Parameters
    ----------
    before, after : Evaluation
        On the same images.

    Returns
    -------
    pandas.DataFrame
        ``image``, its place in the data set; ``label``, ``before`` and ``after``, class names; ``way``,
        ``lost``, ``won`` or ``wrong``, in this order.

    Raises
    ------
    InvalidValueError
        The two are of different images.
    """
    _check_images(before, after)
    right, again = (x.predictions == x.labels for x in (before, after))
    way = np.where(right, "lost", np.where(again, "won", "wrong"))
    images = np.flatnonzero((before.predictions != after.predictions) & before.known)
    names = np.array(before.classes, dtype=object)
    table = pd.DataFrame(
        {
            "image": images,
            "label": names[before.labels[images]],
            "before": names[before.predictions[images]],
            "after": names[after.predictions[images]],
            "way": pd.Categorical(way[images], categories=["lost", "won", "wrong"]),
        }
    )
    return table.sort_values("way", kind="stable", ignore_index=True)


class _Variants(nn.Module):
    """Answers as the dense network does, and tells what it answers with some layers clustered."""

    def __init__(self, dense: nn.Module, small: nn.Module, users: dict, ways: Sequence[str], tell: Callable):
        super().__init__()
        self.dense, self.small, self.users, self.ways, self.tell = dense, small, users, ways, tell

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the dense logits."""
        pairs = {"alone": (self.dense, self.small), "all but": (self.small, self.dense)}
        logits, whole = (_inference.answers(x, inputs.clone()) for x in (self.dense, self.small))
        answers = {_ALL: whole}
        for layer, names in self.users.items():
            for way in self.ways:
                network, other = pairs[way]
                with _swapped(network, other, names):
                    answers[layer, way] = _inference.answers(network, inputs.clone())
        for key, answer in answers.items():  # told once all of them have run
            self.tell(key, answer)
        return logits


@contextmanager
def _swapped(network: nn.Module, other: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """While it lasts, some modules of a network have the weights of another's."""
    changed = [network.get_submodule(name) for name in names]
    own = [module.weight for module in changed]
    for name, module in zip(names, changed, strict=True):
        module.weight = other.get_submodule(name).weight
    try:
        yield
    finally:
        for module, weight in zip(changed, own, strict=True):
            module.weight = weight


def _compared(dense: Evaluation, top: Tensor) -> tuple[float, ...]:
    """Return top-1 accuracy, points lost with their interval, and agreement, in percent."""
    top = top.numpy()
    after = replace(dense, predictions=top[:, 0], in_top5=(top == dense.labels[:, None]).any(1))
    agreement = 100 * float((after.predictions == dense.predictions).mean())
    return after.top1.estimate, *_ends(_accuracy.drop(dense, after).points), agreement


def _ends(points: Interval) -> tuple[float, float, float]:
    return points.estimate, points.low, points.high


def _part(found: Evaluation, mine: np.ndarray) -> Evaluation:
    return replace(
        found, predictions=found.predictions[mine], labels=found.labels[mine], in_top5=found.in_top5[mine]
    )


def _check_images(before: Evaluation, after: Evaluation) -> None:
    _accuracy.drop(before, after)
