"""Recognition accuracy with its uncertainty: one network's, and the drop between two."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from tqdm.auto import tqdm

from kclib import checks, datasets, kernels, models
from kclib.errors import InvalidValueError, StoppedError
from kclib.models import Model

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its 95 % confidence interval, in percent or points."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Drop:
    """Accuracy points lost between two networks on the same images.

    Attributes
    ----------
    points : Interval
        Positive if the second is worse.
    p_value : float
        Exact McNemar test that images are lost as often as won.
    lost, won : int
        Images right only before, right only after.
    """

    points: Interval
    p_value: float
    lost: int
    won: int


@dataclass(frozen=True)
class Evaluation:
    """What a network answered on a data set.

    Attributes
    ----------
    predictions : numpy.ndarray
        int64 ``(n,)``, the class of the largest logit of each image.
    labels : numpy.ndarray
        int64 ``(n,)``, the true class.
    in_top5 : numpy.ndarray
        bool ``(n,)``, whether the true class is among the five largest logits.
    classes : tuple of str
    seconds : float
        Wall time.
    """

    predictions: np.ndarray
    labels: np.ndarray
    in_top5: np.ndarray
    classes: tuple[str, ...]
    seconds: float

    @property
    def correct(self) -> np.ndarray:
        """Bool ``(n,)``: whether each image's top answer is right."""
        return self.predictions == self.labels

    @property
    def top1(self) -> Interval:
        """Top-1 accuracy in percent, with the Wilson score interval."""
        return _proportion(self.correct)

    @property
    def top5(self) -> Interval:
        """Top-5 accuracy in percent, with the Wilson score interval."""
        return _proportion(self.in_top5)

    @property
    def per_class(self) -> dict[str, float]:
        """Accuracy in percent of each class that has images."""
        return {
            name: 100 * float(self.correct[self.labels == i].mean())
            for i, name in enumerate(self.classes)
            if (self.labels == i).any()
        }


def evaluate(
    model: Model,
    data: datasets.ImageSet,
    *,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    progress: bool | Callable[[float], object] = True,
) -> Evaluation:
    """Run `model` over all images of `data`.

    Parameters
    ----------
    model : Model
        Unchanged; a copy runs, in channels_last layout.
    data : ImageSet
    batch_size : int
    device : str or torch.device
    precision : {"fp32", "bf16", "fp16"}
        Autocast precision of the convolutions.
    progress : bool or callable
        Whether to show a progress bar; or, in place of one, what is called with the share of the images done.
        A true answer ends the evaluation.

    Raises
    ------
    InvalidValueError, UnknownNameError
        A model that answers other classes than the data set has, or NaN, or does not run on the images; no
        images; a batch, device or precision that is none.
    StoppedError
        `progress` ended it.
    """
    checks.check_known("precision", precision, _AUTOCAST)
    checks.check_whole("batch_size", batch_size, 1)
    if not len(data):
        raise InvalidValueError(f"{data.name} has no images; an evaluation takes at least one.")
    if model.classes:
        data = datasets.aligned(data, model.classes, len(model.classes))
    checks.check_values(device)
    network = models.moved(kernels.copied(model.network).eval(), device)
    network = network.to(memory_format=torch.channels_last)
    start = time.perf_counter()
    predictions, in_top5, done = [], [], 0
    with (
        torch.inference_mode(),
        torch.autocast(torch.device(device).type, _AUTOCAST[precision], enabled=precision != "fp32"),
        tqdm(total=len(data), desc=model.name, unit="image", delay=2, disable=progress is not True) as bar,
    ):
        for inputs, labels in datasets.batches(
            data, model.preprocess, batch_size, workers=min(4, os.cpu_count() or 1)
        ):
            inputs = inputs.to(device, memory_format=torch.channels_last)
            logits = _checked(models.answers(network, inputs), data)
            top = logits.topk(min(5, logits.shape[1])).indices
            predictions.append(top[:, 0])
            in_top5.append((top == labels[:, None]).any(1))
            bar.update(len(labels))
            done += len(labels)
            if callable(progress) and progress(done / len(data)):
                raise StoppedError(f"the evaluation was stopped after {done:,} of {len(data):,} images.")
    return Evaluation(
        torch.cat(predictions).numpy(),
        data.labels.numpy(),
        torch.cat(in_top5).numpy(),
        data.classes,
        time.perf_counter() - start,
    )


def drop(before: Evaluation, after: Evaluation) -> Drop:
    """Return the accuracy points lost from `before` to `after`.

    The interval is that of the paired t statistic over the per-image differences (-1, 0, 1), which
    uses that both saw the same images; the p-value is McNemar's (1947) in its exact binomial form.

    Raises
    ------
    InvalidValueError
        If the two were not evaluated on the same images.
    """
    if not np.array_equal(before.labels, after.labels):
        raise InvalidValueError("the two evaluations are of different images; use one data set.")
    return paired(before.correct, after.correct)


def paired(before: np.ndarray, after: np.ndarray) -> Drop:
    """Return the points lost, as `drop` does, from which of the same images are right: bool ``(n,)`` each."""
    difference = before.astype(float) - after.astype(float)
    lost, won = int((difference > 0).sum()), int((difference < 0).sum())
    mean = float(100 * difference.mean())
    low = high = mean
    if difference.std() > 0:
        low, high = stats.ttest_1samp(100 * difference, 0).confidence_interval(0.95)
    p_value = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    return Drop(Interval(mean, float(low), float(high)), float(p_value), lost, won)


def _proportion(hits: np.ndarray) -> Interval:
    ends = stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(0.95, method="wilson")
    return Interval(100 * float(hits.mean()), 100 * float(ends.low), 100 * float(ends.high))


def _checked(logits: torch.Tensor, data: datasets.ImageSet) -> torch.Tensor:
    """Return logits in float32 on the CPU; raise InvalidValueError if they are none for this data set."""
    if logits.ndim != 2 or logits.shape[1] < len(data.classes):
        raise InvalidValueError(
            f"the model answers shape {tuple(logits.shape)}; {data.name} needs one logit for each of "
            f"its {len(data.classes)} classes."
        )
    logits = logits.float().cpu()
    if logits.isnan().any():
        raise InvalidValueError("the model answers NaN; its weights and activations must be finite numbers.")
    return logits
