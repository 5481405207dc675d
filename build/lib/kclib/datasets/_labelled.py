"""Labelled images as users have them: torch data sets and loaders, arrays, tables of files."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
    default_convert,
)

from kclib._util import files
from kclib._util.progress_bars import tqdm
from kclib.datasets import _preprocessing
from kclib.datasets._class_names import listed
from kclib.datasets._image_set import ImageSet
from kclib.datasets._pictures import Pictures
from kclib.datasets._preprocessing import described
from kclib.errors import DamagedFileError, InvalidValueError, reason

_ALLOWED = (
    "they must be an ImageSet, a data set's name, a torch Dataset or DataLoader of (image, label) pairs, "
    "(images, labels) as arrays or tensors, or a DataFrame with columns path and label"
)
_NO_LABELS = (
    "the labels of {name} are {what}; they must be one whole number (or name) for each image, -1 if unknown."
)
_PATHS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
_LABELS = ("label", "class", "target", "category", "class_name")
_UNKNOWN = (-1, -100)  # what data sets write where a label is not known; -100 is what torch's losses ignore
_PREPARED = (
    "The images are floating numbers; they are taken as preprocessed, and go to the network as they are."
)


def read(data) -> ImageSet:
    """Return labelled images from what a user has; see `_loader.as_image_set`."""
    if isinstance(data, DataLoader):
        return _of_loader(data)
    if isinstance(data, pd.DataFrame):
        return _of_table(data)
    if isinstance(data, TensorDataset) and len(data.tensors) == 2:
        return _of_arrays("tensors", *data.tensors)
    if isinstance(data, tuple | list) and len(data) == 2:
        images, labels = data
        if isinstance(images, torch.Tensor | np.ndarray) and np.ndim(labels):
            return _of_arrays("arrays", images, labels)
        if isinstance(images, list | tuple) and images and all(isinstance(x, Image.Image) for x in images):
            return _of_pairs(_zipped(images, labels), "images")
    by_index = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    none = IterableDataset | torch.nn.Module | str | bytes | Mapping | torch.Tensor | np.ndarray | type
    if not by_index or isinstance(data, none):
        raise InvalidValueError(f"the data are {described(data)}; {_ALLOWED}.")
    return _of_pairs(data, type(data).__name__)


def digests(samples: Sequence[tuple[str, int]], name: str) -> list[str]:
    """Return the SHA-256 of each picture's file.

    Raises
    ------
    DamagedFileError
        A file that cannot be read, by its path.
    """
    sums = []
    for path, _ in tqdm(samples, desc=f"checksum of {name}", unit="image", delay=2):
        try:
            sums.append(files.sha256(Path(path)))
        except OSError as error:
            raise DamagedFileError(f"image {path} cannot be read ({reason(error)}); remove it.") from error
    return sums


def of_files(
    name: str,
    samples: Sequence[tuple[str, int]],
    classes: tuple[str, ...],
    notes: tuple[str, ...],
    sums: list[str],
) -> ImageSet:
    """Return pictures on disk with labels; `sums` are the SHA-256 of their files."""
    labels = [label for _, label in samples]
    found = hashlib.sha256(f"RGB {classes} {labels} {''.join(sums)}".encode())
    return ImageSet(
        name, Pictures(samples), torch.tensor(labels, dtype=torch.int64), classes, found.hexdigest(), notes
    )


def _of_loader(loader: DataLoader) -> ImageSet:
    """Return the data set of a loader: each image once, in its order."""
    data, sampler, notes = loader.dataset, loader.sampler, []
    if isinstance(sampler, SubsetRandomSampler):
        data = Subset(data, [int(i) for i in sampler.indices])
    elif not _takes_each_once(loader):
        notes.append("The loader's own sampler is not used: each image of its data set is taken once.")
    if not isinstance(data, IterableDataset) and loader.collate_fn not in (default_collate, default_convert):
        notes.append("The loader's own collate_fn is not used: images are taken one by one.")
    found = read(data)
    return replace(found, notes=(*notes, *found.notes))


def _takes_each_once(loader: DataLoader) -> bool:
    if type(loader.batch_sampler) not in (BatchSampler, type(None)):
        return False
    if isinstance(loader.sampler, RandomSampler):
        return not loader.sampler.replacement and len(loader.sampler) == len(loader.dataset)
    return isinstance(loader.sampler, SequentialSampler)


def _zipped(images: Sequence[Image.Image], labels) -> list[tuple]:
    labels = list(labels) if np.ndim(labels) else []
    if len(images) != len(labels):
        raise InvalidValueError(f"{len(images)} images have {len(labels)} labels; each must have one.")
    return list(zip(images, labels, strict=True))


def _of_table(table: pd.DataFrame) -> ImageSet:
    """Return the pictures that a table names; relative paths mean the working folder."""
    lower = {str(name).lower(): name for name in table.columns}
    paths, labels = ([lower[x] for x in known if x in lower] for known in (_PATHS, _LABELS))
    if len(paths) != 1 or len(labels) != 1:
        raise InvalidValueError(f"the data are a DataFrame of {listed(list(table.columns))}; {_ALLOWED}.")
    where = [str(Path(str(path)).expanduser().absolute()) for path in table[paths[0]]]
    numbers, classes = _labels("the table", table[labels[0]].to_numpy(), None)
    samples = list(zip(where, numbers.tolist(), strict=True))
    return of_files("table", samples, classes, (), digests(samples, "the table"))


def _of_arrays(name: str, images, labels) -> ImageSet:
    images = _preprocessing.image_tensor(images)
    numbers, classes = _labels(name, labels, None)
    found = hashlib.sha256(f"{images.dtype} {tuple(images.shape)}".encode())
    for part in images.split(1024):
        found.update(part.contiguous().numpy())
    found.update(numbers.numpy())
    notes = (_PREPARED,) if images.is_floating_point() else ()
    return ImageSet(name, images, numbers, classes, found.hexdigest(), notes)


def _of_pairs(data, name: str) -> ImageSet:
    """Return a map-style data set of (image, label), read once for its labels and fingerprint."""
    found, labels, prepared = hashlib.sha256(), [], False
    for i in tqdm(range(len(data)), desc=f"labels of {name}", unit="image", delay=2):
        image, label = _preprocessing.item(data, i, name)
        labels.append(_label(label, name, i))
        prepared |= _preprocessing.is_prepared(image)
        found.update(_content(image))
    classes = _classes(data, name)
    try:
        numbers, classes = _labels(name, np.stack(labels) if labels else np.zeros(0, int), classes)
    except ValueError as error:
        if isinstance(error, InvalidValueError):
            raise
        raise InvalidValueError(_NO_LABELS.format(name=name, what="of several shapes")) from error
    found.update(numbers.numpy())
    return ImageSet(name, data, numbers, classes, found.hexdigest(), (_PREPARED,) if prepared else ())


def _label(given, name: str, index: int) -> np.ndarray:
    try:
        label = np.asarray(_on_cpu(given))
        if label.ndim > 1 or label.dtype.kind not in "biufU":
            raise ValueError("more or less than a number or name")
    except ValueError as error:
        what = f"{described(given)} at image {index}"
        raise InvalidValueError(_NO_LABELS.format(name=name, what=what)) from error
    return label


def _content(image) -> bytes:
    if isinstance(image, Image.Image):
        return f"{image.mode} {image.size}".encode() + image.tobytes()
    values = _on_cpu(image).numpy()
    return f"{values.dtype} {values.shape}".encode() + values.tobytes()


def _classes(data, name: str) -> list[str] | None:
    """Return the class names that a data set has, also within subsets and concatenations."""
    if isinstance(data, Subset):
        return _classes(data.dataset, name)
    if isinstance(data, ConcatDataset):
        each = [_classes(part, name) for part in data.datasets]
        if any(classes != each[0] for classes in each):
            raise InvalidValueError(
                f"the parts of {name} have other classes each; a label must mean the same in all of them."
            )
        return each[0]
    names = getattr(data, "wnids", None) or getattr(data, "classes", None)  # names may repeat, ids do not
    if not isinstance(names, list | tuple) or not names:
        return None
    return [str(x[0] if isinstance(x, list | tuple) else x) for x in names]


def _labels(name: str, given, classes: list[str] | None) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Return labels as int64 ``(n,)``, -1 where unknown, and the class names."""
    values = np.asarray(_on_cpu(given))
    if values.ndim == 1 and len(values) and all(isinstance(x, str) for x in values):
        classes = sorted(set(values.tolist())) if classes is None else classes
        if wrong := set(values.tolist()) - set(classes):
            raise InvalidValueError(
                f"{name} has labels {listed(sorted(wrong))} that are none of its classes."
            )
        place = {label: i for i, label in enumerate(classes)}
        return torch.tensor([place[label] for label in values]), tuple(classes)
    n_classes = 0
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    elif _is_one_hot(values):
        n_classes, values = values.shape[1], values.argmax(1)
    whole = values.dtype.kind in "biu" or (values.dtype.kind == "f" and (values == np.rint(values)).all())
    if values.ndim != 1 or not (whole or not len(values)):
        raise InvalidValueError(_NO_LABELS.format(name=name, what=f"{values.dtype} {values.shape}"))
    values = values.astype(np.int64)
    values[np.isin(values, _UNKNOWN)] = -1
    n_classes = max(n_classes, int(values.max(initial=-1)) + 1)
    names = tuple(classes) if classes else tuple(map(str, range(n_classes)))
    return torch.from_numpy(values), names


def _is_one_hot(values: np.ndarray) -> bool:
    if values.ndim != 2 or values.dtype.kind not in "biuf":
        return False
    return bool((((values == 1).sum(1) == 1) & ((values != 0).sum(1) == 1)).all())


def _on_cpu(values):
    return values.detach().cpu() if torch.is_tensor(values) else values
