"""Labelled images to evaluate on, by name or as the user has them."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import Subset

from kclib._util import checks
from kclib.datasets import _class_names, _labelled, _named_sets, _preprocessing
from kclib.datasets._image_set import ImageSet
from kclib.datasets._named_sets import LOADERS
from kclib.errors import InvalidValueError, UnknownNameError

_READ_AT_ONCE = 256  # images that a process has read while another one starts


def load_data(name: str = "fashion-mnist", split: str = "test", *, limit: int | None = None) -> ImageSet:
    """Load one split of a data set.

    Parameters
    ----------
    name : str
        One of `names()`, or ``folder:PATH`` for a folder that holds one sub-folder of images a class, or such
        folders by split (`_image_folders.find` says how they are told; `_pictures.as_rgb`, what is read).
        The others are read from `files.data_dir()` in torchvision's own layout; nothing is downloaded.
    split : {"test", "train"}
        ``test`` is the validation split where a data set has no public test labels (ImageNet, Imagenette).
        Of a folder without splits it is all images, and ``train`` the part that `train_and_test` trains by.
    limit : int, optional
        Keep so many images, drawn once without replacement (the same for every call; a smaller
        limit is a subset of a larger one), in their original order.

    Examples
    --------
    >>> import kclib
    >>> images = kclib.load_data("fashion-mnist", limit=100)
    >>> images.images.shape, images.images.dtype
    (torch.Size([100, 1, 28, 28]), torch.uint8)
    >>> images.classes[images.labels[0]]
    'Coat'
    """
    checks.check_known("split", split, ("test", "train"))
    kind, _, path = name.partition(":") if isinstance(name, str) else ("", "", "")
    if kind == "folder" and path:
        loaded = _named_sets.folder(name, split)
    elif name in LOADERS:
        loaded = LOADERS[name](split)
    elif isinstance(name, str) and os.path.isdir(os.path.expanduser(name)):
        raise InvalidValueError(f"{name!r} is a folder; as a data set, its name is {f'folder:{name}'!r}.")
    else:
        raise UnknownNameError("data set", name, names())
    return loaded if limit is None else limited(loaded, limit)


def train_and_test(name: str, *, limit: int | None = None) -> tuple[ImageSet, ImageSet]:
    """Return images to train or correct by, and others to test by: no image is in both.

    A data set with splits gives those; an image that is in both of a folder's is left out of the first. A
    folder without splits is divided by the SHA-256 of its files, the same way on every machine: of each class
    about half to either side, copies of an image to one side. `ImageSet.notes` says so.

    Parameters
    ----------
    name : str
        As `load` takes it.
    limit : int, optional
        Keep so many images to test by, as `load` does.
    """
    kind, _, path = name.partition(":") if isinstance(name, str) else ("", "", "")
    if kind == "folder" and path:
        train, test = _named_sets.folders(name)
        return train, test if limit is None else limited(test, limit)
    return load_data(name, "train"), load_data(name, limit=limit)


def as_image_set(data) -> ImageSet:
    """Return labelled images, however they are given.

    A torch data set is read once, to the end, for its labels and the fingerprint of its images. To use it
    several times, keep what this returns.

    Parameters
    ----------
    data : ImageSet, str, Path, Dataset, DataLoader, (images, labels), DataFrame
        An image set, a name that `load` knows, or the path of an image folder. A map-style torch data set of
        ``(image, label)``, or a loader of one, of which each image is taken once, in the order of the data
        set. Arrays or tensors: images uint8 or floating, ``(n, h, w)``, ``(n, c, h, w)`` or, of 1, 3 or 4
        channels, ``(n, h, w, c)``; labels ``(n,)`` of whole numbers or names, or one-hot. A table with a
        column of paths and one of labels. Images that are floating numbers are taken as preprocessed.
        Labels -1 and -100 are unknown.

    Raises
    ------
    InvalidValueError
        It is nothing of these, or not clear.
    DamagedFileError
        An image cannot be read.
    """
    if isinstance(data, ImageSet):
        return data
    if isinstance(data, str):
        return load_data(data)
    if isinstance(data, Path):
        return load_data(f"folder:{data}")
    return _labelled.read(data)


def names() -> tuple[str, ...]:
    """Return the data set names that `load` knows."""
    return (*LOADERS, "folder:PATH")


def select(data, indices: torch.Tensor) -> ImageSet:
    """Return the images at `indices` (int64 ``(m,)``) as a data set.

    `data` is as for `as_image_set`.
    """
    data = as_image_set(data)
    whole = torch.is_tensor(indices) and indices.dtype == torch.int64 and indices.ndim == 1
    if not whole or (len(indices) and not 0 <= indices.min() <= indices.max() < len(data)):
        if not len(data):
            raise InvalidValueError(f"{data.name} has no images to choose from; it must have at least one.")
        raise InvalidValueError(
            f"indices must be int64 (m,), 0 to {len(data) - 1}, the images of {data.name}."
        )
    images = data.images
    chosen = images[indices] if torch.is_tensor(images) else Subset(images, indices.tolist())
    digest = hashlib.sha256(data.fingerprint.encode() + indices.numpy().tobytes()).hexdigest()
    return replace(data, images=chosen, labels=data.labels[indices], fingerprint=digest)


def known(data: ImageSet) -> ImageSet:
    """Return the images whose label is known."""
    where = data.labels >= 0
    return data if where.all() else select(data, where.nonzero()[:, 0])


def aligned(
    data,
    names: Sequence[str],
    n_outputs: int,
    *,
    classes: str | Sequence[str] | None = None,
) -> ImageSet:
    """Return `data` with its labels as places among a network's outputs; unknown labels stay -1.

    `_class_names.places` says how classes are matched. How they were is among the notes of what is returned.

    Parameters
    ----------
    data : as for `as_image_set`
    names : sequence of str
        The names of the network's outputs; empty if unknown.
    n_outputs : int
        How many they are.
    classes : "by position" or sequence of str, optional
        ``"by position"`` takes the data set's classes as the outputs in their order; names stand for `names`.

    Raises
    ------
    InvalidValueError
        Classes that are not those of the network, or not clearly.
    """
    data = as_image_set(data)
    if classes is not None and not isinstance(classes, str):
        names, classes = _checked_names(classes, n_outputs), None
    if classes not in (None, "by position"):
        raise InvalidValueError(
            f'classes is {classes!r}; it must be "by position" or the names of the outputs.'
        )
    if classes:
        order, note = _class_names.by_position(data.name, data.classes, n_outputs)
    else:
        with_images = set(data.labels.tolist())
        needed = [i in with_images for i in range(len(data.classes))]
        order, note = _class_names.places(data.name, data.classes, needed, names, n_outputs)
    outputs = tuple(names)
    if len(outputs) != n_outputs:  # by the data set's own names, where it has one
        by_place = dict(zip(order, data.classes, strict=True))
        outputs = tuple(by_place.get(i, str(i)) for i in range(n_outputs))
    order = torch.tensor([*order, -1])  # the last is the place of unknown labels
    notes = data.notes if not note or note in data.notes else (*data.notes, note)
    return replace(data, labels=order[data.labels], classes=outputs, notes=notes)


def batches(
    data, preprocess: Callable, batch_size: int, *, workers: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ``(float inputs (b, c, h, w), int64 labels (b,))`` in order.

    Images held in memory are preprocessed a batch at a time; where preprocessing takes no such tensors, one
    by one as PIL images. Others are preprocessed one by one as they are read, by `workers` processes, or in
    this one if it is itself a worker. Floating images are not preprocessed. Preprocessing may answer a
    mapping with ``pixel_values``. `data` is as for `as_image_set`.

    Raises
    ------
    InvalidValueError
        Preprocessing, or a user's data set, that raises or does not answer tensors alike.
    DamagedFileError
        An image cannot be read; it is named by its file.
    """
    batch_size = checks.check_whole("batch_size", batch_size, 1)
    workers = checks.check_whole("workers", workers, 0)
    data = as_image_set(data)
    start = 0
    for inputs in _preprocessing.batches(data.images, data.name, preprocess, batch_size, workers):
        yield inputs, data.labels[start : start + len(inputs)]  # of the set, which may have been relabelled
        start += len(inputs)


def readers(data: ImageSet) -> int:
    """Return how many processes are to read images: none for so few that one would start too late."""
    return min(4, os.cpu_count() or 1, len(data) // _READ_AT_ONCE)


def limited(data, limit: int) -> ImageSet:
    """Return `limit` images drawn at random, the same whenever it is asked; `data` is as for `as_image_set`.

    Raises
    ------
    InvalidValueError
        A limit below 1 or above the number of images.
    """
    data = as_image_set(data)
    limit = checks.check_whole(f"limit of {data.name}", limit, 1, len(data))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return select(data, order[:limit].sort().values)


def _checked_names(classes: Sequence[str], n_outputs: int) -> tuple[str, ...]:
    names = tuple(classes) if isinstance(classes, Sequence) else ()
    if len(names) != n_outputs or not all(isinstance(name, str) for name in names):
        raise InvalidValueError(
            f"classes has {len(names)} names ({_class_names.listed(names)}) for {n_outputs} outputs; "
            'it must be "by position" or a name for each output.'
        )
    return names
