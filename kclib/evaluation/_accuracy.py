"""Recognition accuracy with its uncertainty: one network's, and the drop between two."""

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import stats

from kclib import datasets, models
from kclib._util import checks
from kclib._util.progress_bars import tqdm
from kclib.datasets import _loader
from kclib.errors import InvalidValueError, StoppedError
from kclib.evaluation import _intervals
from kclib.kernels import _copying
from kclib.models import Model, _inference, _model

_ENOUGH = 50  # images of known class by which guessing is told
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
    """Accuracy points lost between two networks on the same images; as text, what `in_words` says.

    Attributes
    ----------
    points : Interval
        Positive if the second is worse; within -100 and 100.
    p_value : float
        Exact McNemar test that images are lost as often as won.
    lost, won : int
        Images right only before, right only after.
    images : int
        Images whose class is known.
    """

    points: Interval
    p_value: float
    lost: int
    won: int
    images: int

    def __str__(self) -> str:
        points = self.points
        return in_words(points.estimate, points.low, points.high, self.images)


@dataclass(frozen=True)
class Evaluation:
    """What a network answered on a data set.

    Images whose class is not known are answered, but counted nowhere: neither as right nor as wrong.

    Attributes
    ----------
    predictions : numpy.ndarray
        int64 ``(n,)``, the output with the largest logit for each image.
    labels : numpy.ndarray
        int64 ``(n,)``, the true class as a place among the outputs; below 0 if it is not known.
    in_top5 : numpy.ndarray
        bool ``(n,)``, whether the true class is among the five largest logits.
    classes : tuple of str
        Names of the outputs.
    seconds : float
        Wall time.
    notes : tuple of str
        Sentences that a reader must know beside the numbers: those of the data set, how many images have no
        known class, and whether of 50 or more the answers can be told from guessing.

    Examples
    --------
    >>> import kclib, numpy as np
    >>> labels = np.array([0, 1, 0, -1])  # the last image is of no known class
    >>> answers = kclib.Evaluation(np.array([0, 1, 1, 0]), labels, labels >= 0, ("shirt", "coat"), 0.0)
    >>> answers.correct
    array([ True,  True, False])
    >>> print(answers.top1)
    66.67 [20.77, 93.85]
    """

    predictions: np.ndarray
    labels: np.ndarray
    in_top5: np.ndarray
    classes: tuple[str, ...]
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def known(self) -> np.ndarray:
        """Bool ``(n,)``: whether each image's true class is known."""
        return self.labels >= 0

    @property
    def correct(self) -> np.ndarray:
        """Bool ``(m,)``: whether the top answer is right, of each image whose class is known."""
        return (self.predictions == self.labels)[self.known]

    @property
    def top1(self) -> Interval:
        """Top-1 accuracy in percent, with the Wilson score interval."""
        return _proportion(self.correct)

    @property
    def top5(self) -> Interval:
        """Top-5 accuracy in percent, with the Wilson score interval."""
        return _proportion(self.in_top5[self.known])


def evaluate(
    model: Model | torch.nn.Module,
    data: datasets.ImageSet,
    *,
    classes: str | Sequence[str] | None = None,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    progress: bool | Callable[[float], object] = True,
) -> Evaluation:
    """Run `model` over all images of `data`.

    Parameters
    ----------
    model : Model or torch.nn.Module
        A network alone gets the preprocessing of `models.plain`. It runs as it is, in eval mode, and is left
        in the mode it was in; only where it is on another device is a copy made. Inputs are in channels_last
        layout where the network stands that, and of the network's own precision.
    data : ImageSet, or what `datasets.as_image_set` takes
    classes : "by position" or sequence of str, optional
        How the classes of the data are matched to the outputs of the network (`datasets.aligned`).
    batch_size : int
    device : str or torch.device
    precision : {"fp32", "bf16", "fp16"}
        Autocast precision of the convolutions of a float32 network; a network in half or double precision
        runs in its own.
    progress : bool or callable
        Whether to show a progress bar; or, in place of one, what is called with the share of the images done.
        A true answer ends the evaluation.

    Raises
    ------
    InvalidValueError, UnknownNameError
        A model that answers other classes than the data set has, or NaN, or does not run on the images; no
        images, or none whose class is known; an invalid batch size, device or precision.
    NotEnoughMemoryError
        A batch does not fit.
    StoppedError
        `progress` ended it.

    Examples
    --------
    >>> import kclib
    >>> model, images = kclib.load_model("vgg16-fashion"), kclib.load_data("fashion-mnist", limit=20)
    >>> answers = kclib.evaluate(model, images)
    >>> print(answers.top1)  # of so few images the interval is wide
    90.00 [69.90, 97.21]
    """
    checks.check_known("precision", precision, _AUTOCAST)
    batch_size = checks.check_whole("batch_size", batch_size, 1)
    checks.check_values(device)
    model, data = _model.as_model(model), datasets.as_image_set(data)
    if not len(data):
        raise InvalidValueError(f"{data.name} has no images; an evaluation takes at least one.")
    if not (data.labels >= 0).any():
        raise InvalidValueError(
            f"{data.name} has no image whose class is known; accuracy takes at least one."
        )
    start, top, done = time.perf_counter(), [], 0
    with (
        _running(model.network, device, precision) as answers,
        tqdm(total=len(data), desc=model.name, unit="image", delay=2, disable=progress is not True) as bar,
    ):
        for inputs, labels in datasets.batches(
            data, model.preprocess, batch_size, workers=_loader.readers(data)
        ):
            logits = _checked(answers(inputs))
            if not top:
                data = _loader.aligned(data, model.classes, logits.shape[1], classes=classes)
            top.append(logits.topk(min(5, logits.shape[1])).indices)
            bar.update(len(labels))
            done += len(labels)
            if callable(progress) and progress(done / len(data)):
                raise StoppedError(f"the evaluation was stopped after {done:,} of {len(data):,} images.")
    top, labels = torch.cat(top).numpy(), data.labels.numpy()
    in_top5, seconds = (top == labels[:, None]).any(1), time.perf_counter() - start
    found = Evaluation(top[:, 0], labels, in_top5, data.classes, seconds, _noted(data))
    return replace(found, notes=found.notes + _guessed(found))


def matched(model: Model | torch.nn.Module, data: datasets.ImageSet) -> datasets.ImageSet:
    """Return `data` with its labels as places among a model's outputs, which one of the images tells.

    Raises
    ------
    InvalidValueError
        As `evaluate`.
    """
    model, data = _model.as_model(model), datasets.as_image_set(data)
    known = (data.labels >= 0).nonzero()[:1, 0]
    one = evaluate(model, _loader.select(data, known) if len(known) else data, progress=False)
    return _loader.aligned(data, model.classes, len(one.classes))


def told_apart(names: Sequence[str]) -> list[str]:
    """Return the names of classes, those that several have with their number: ImageNet has two cranes."""
    times = Counter(names)
    return [name if times[name] == 1 else f"{name} ({i})" for i, name in enumerate(names)]


def drop(before: Evaluation, after: Evaluation) -> Drop:
    """Return the accuracy points lost from `before` to `after`.

    The interval is Tango's (1998) score interval for the difference of paired proportions
    (`_intervals.of_mean`), which uses that both saw the same images; the p-value is McNemar's (1947) in its
    exact binomial form.

    Raises
    ------
    InvalidValueError
        If the two were not evaluated on the same images.

    Examples
    --------
    >>> import kclib, numpy as np
    >>> labels, before, after = np.zeros((3, 200), int)
    >>> before[:10], after[5:30] = 1, 1  # 10 images wrong before, 25 after, 5 both times
    >>> before, after = (kclib.Evaluation(x, labels, x < 2, ("shirt", "coat"), 0.0) for x in (before, after))
    >>> lost = kclib.drop(before, after)
    >>> print(f"{lost}: {lost.lost} images lost, {lost.won} won")
    a loss of 7.50 points [2.82, 12.82] on 200 images: 20 images lost, 5 won
    """
    if not np.array_equal(before.labels, after.labels):
        raise InvalidValueError("the two evaluations are of different images; use one data set.")
    return paired(before.correct, after.correct)


def paired(before: np.ndarray, after: np.ndarray) -> Drop:
    """Return the points lost, as `drop` does, from which of the same images are right: bool ``(n,)`` each.

    Raises
    ------
    InvalidValueError
        They are no truth values, none, or of different numbers of images.
    """
    before, after = np.asarray(before), np.asarray(after)
    for right in (before, after):
        if right.dtype != bool or right.ndim != 1 or not right.size or right.shape != before.shape:
            raise InvalidValueError(
                f"which images are right is {before.dtype} {before.shape} before and {after.dtype} "
                f"{after.shape} after; both must be bool (n,), of the same images, and n at least 1."
            )
    lost, won, n = int((before & ~after).sum()), int((after & ~before).sum()), len(before)
    low, high = _intervals.of_mean([-1, 0, 1], [won, n - won - lost, lost], -1, 1)
    p_value = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    points = Interval(100 * (lost - won) / n, 100 * low, 100 * high)
    return Drop(points, float(p_value), lost, won, n)


def in_words(drop: float, low: float, high: float, images: int, *, sought: str = "loss") -> str:
    """Return a drop as a noun phrase that claims no more than its interval shows.

    Parameters
    ----------
    drop, low, high : float
        Points, positive if accuracy was lost, and the ends of their interval.
    images : int
        On so many they were measured.
    sought : {"loss", "gain"}
        What there is none of, where the interval holds 0.

    Examples
    --------
    >>> from kclib import evaluation
    >>> evaluation.in_words(6, 3.26, 9.19, 400)
    'a loss of 6.00 points [3.26, 9.19] on 400 images'
    >>> evaluation.in_words(-0.45, -0.91, -0.08, 2000)
    'a gain of 0.45 points [0.08, 0.91] on 2,000 images'
    >>> evaluation.in_words(-0.1, -0.6, 0.4, 2000)
    'no loss that 2,000 images can show (at most 0.40 points)'
    """
    checks.check_known("what is sought", sought, ("loss", "gain"))
    many = f"{images:,} {'image' if images == 1 else 'images'}"
    if np.isnan([drop, low, high]).any():
        return f"no drop that {many} could measure"
    if low <= 0 <= high:
        most = high if sought == "loss" else -low
        return f"no {sought} that {many} can show (at most {abs(most):.2f} points)"
    kind, ends = ("loss", (low, high)) if drop > 0 else ("gain", (-high, -low))
    return f"a {kind} of {Interval(abs(drop), *ends)} on {many}".replace(" [", " points [")


@contextmanager
def _running(network: torch.nn.Module, device, precision: str) -> Iterator[Callable]:
    """Yield what answers inputs with a network's logits, in eval mode; a copy is for another device alone."""
    if not _inference.on_device(network, device):
        network = _model.moved(_copying.copied(network), device)
    dtype, kind = _inference.precision_of(network), torch.device(device).type

    def answers(inputs: torch.Tensor) -> torch.Tensor:
        layout = torch.channels_last if inputs.ndim == 4 else torch.contiguous_format
        return answer(inputs.to(device, dtype).contiguous(memory_format=layout))

    # no_grad: what a network keeps for itself must not be an inference tensor, which no training takes
    with (
        torch.no_grad(),
        torch.autocast(kind, _AUTOCAST[precision], enabled=precision != "fp32" and dtype == torch.float32),
        _inference.evaluating(network),
        _inference.answering(network) as answer,
    ):
        yield answers


def _noted(data: datasets.ImageSet) -> tuple[str, ...]:
    """Return the notes of a data set, and how many of its images have no known class."""
    unknown = int((data.labels < 0).sum())
    note = f"{unknown:,} of {len(data):,} images have no known class and are not counted."
    return (*data.notes, *((note,) * bool(unknown)))


def _guessed(answers: Evaluation) -> tuple[str, ...]:
    """Return a note if one class for all images may be right as often as the answers."""
    labels = answers.labels[answers.known]
    most = 100 * np.bincount(labels).max() / len(labels)
    if len(labels) < _ENOUGH or most == 100 or answers.top1.low > most:
        return ()
    return (
        f"{answers.top1} % right cannot be told from guessing: the most frequent class is {most:.2f} % of "
        "the images.",
    )


def _proportion(hits: np.ndarray) -> Interval:
    ends = stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(0.95, method="wilson")
    return Interval(100 * float(hits.mean()), 100 * float(ends.low), 100 * float(ends.high))


def _checked(logits: torch.Tensor) -> torch.Tensor:
    """Return logits on the CPU; raise InvalidValueError if no class can be read from them."""
    if logits.shape[1] < 2:
        raise InvalidValueError(
            "the model answers one number for each image, which names no class; it must answer a logit for "
            "each class, as torch.cat((-x, x), 1) makes of one for yes."
        )
    logits = logits.cpu()
    if logits.isnan().any():
        raise InvalidValueError("the model answers NaN; its weights and activations must be finite numbers.")
    return logits


def input_fingerprint(model: models.Model, data: datasets.ImageSet) -> str:
    """Return the SHA-256 of what answers depend on beside weights and images.

    That is the first image as the network sees it, the network as it prints itself, and its classes. Other
    code of a ``forward`` is not seen, nor are arguments that are not printed.
    """
    first, _ = next(datasets.batches(_loader.select(data, torch.tensor([0])), model.preprocess, 1))
    digest = hashlib.sha256(first.contiguous().numpy())
    printed = re.sub("0x[0-9a-f]+", "", repr(model.network))  # addresses differ from run to run
    digest.update(json.dumps([printed, model.classes]).encode())
    return digest.hexdigest()


def accuracy(result: Evaluation, dense: Evaluation) -> dict[str, float]:
    """Return an evaluation's columns of the table that `kclib.sweep` returns."""
    lost, top1 = drop(dense, result), result.top1
    return {
        "top1": top1.estimate,
        "top1_low": top1.low,
        "top1_high": top1.high,
        "top5": result.top5.estimate,
        "drop": lost.points.estimate,
        "drop_low": lost.points.low,
        "drop_high": lost.points.high,
        "p_value": lost.p_value,
    }
