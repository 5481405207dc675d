"""Data sets by name: the shipped Fashion-MNIST, torchvision's, and the user's image folders."""

import gzip
import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torchvision.datasets as tv
from torch.utils.data import Dataset

from kclib._util import files
from kclib.datasets import _class_names, _image_folders, _labelled
from kclib.datasets._image_set import ImageSet
from kclib.errors import DamagedFileError, MissingFileError, StorageError, reason

FASHION_FILES = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
_FASHION_UNPACKED = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_LOG = logging.getLogger(__name__)


def _fashion_mnist(split: str) -> ImageSet:
    part = "train" if split == "train" else "t10k"
    images, labels = (_unpacked(f"{part}-{x}-ubyte") for x in ("images-idx3", "labels-idx1"))
    images = torch.from_numpy(images[16:].reshape(-1, 1, 28, 28))  # after the heads of the idx format
    labels = torch.from_numpy(labels[8:]).long()
    digest = hashlib.sha256("".join(FASHION_FILES.values()).encode() + split.encode()).hexdigest()
    return ImageSet(f"fashion-mnist/{split}", images, labels, tuple(tv.FashionMNIST.classes), digest)


def _unpacked(name: str) -> np.ndarray:
    """Return the bytes of a shipped file, from the cache if they are still right there."""
    place = Path("FashionMNIST", "raw", name)
    with suppress(OSError):
        content = (files.cache_dir() / place).read_bytes()
        if hashlib.sha256(content).hexdigest() == _FASHION_UNPACKED[name]:
            return np.frombuffer(bytearray(content), np.uint8)
        _LOG.warning("%s is damaged and is unpacked again.", files.cache_dir() / place)
    source = files.shipped(files.data_dir() / f"{place}.gz", FASHION_FILES[f"{name}.gz"])
    content = gzip.decompress(source.read_bytes())
    try:
        with files.replacing(files.cache_dir() / place) as temporary:
            temporary.write_bytes(content)
    except StorageError as error:  # it only saves time
        _LOG.info("%s", error)
    return np.frombuffer(bytearray(content), np.uint8)


def _cifar(maker: type, name: str) -> Callable[[str], ImageSet]:
    def read(split: str) -> ImageSet:
        found = _found(lambda: maker(files.data_dir(), train=split == "train"), name)
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
        labels = torch.tensor(found.targets)
        digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
        return ImageSet(f"{name}/{split}", images, labels, tuple(found.classes), digest)

    return read


def _imagenette(split: str) -> ImageSet:
    part = "train" if split == "train" else "val"
    found = _found(lambda: tv.Imagenette(files.data_dir(), split=part), "imagenette")
    samples = found._samples  # Imagenette has no public list of samples
    return _from_files(f"imagenette/{split}", samples, tuple(names[0] for names in found.classes))


def _imagenet(split: str) -> ImageSet:
    part = "train" if split == "train" else "val"
    found = _found(lambda: tv.ImageNet(files.data_dir() / "imagenet", split=part), "imagenet")
    categories, ids = _class_names.imagenet()  # their names do not repeat, as those of the archive do
    classes = categories if tuple(found.wnids) == ids else tuple(names[0] for names in found.classes)
    return _from_files(f"imagenet/{split}", found.samples, classes)


def folder(name: str, split: str) -> ImageSet:
    """Return the images of ``folder:PATH``: all that are tested by, or those that are trained by."""
    if split == "train":
        with suppress(MissingFileError):  # a folder may hold a split to train by alone
            return folders(name)[0]
    found = _image_folders.find(_root(name), split)
    return _from_files(f"{name}/{found.split or split}", found.samples, found.classes, found.notes)


def folders(name: str) -> tuple[ImageSet, ImageSet]:
    """Return the images of a folder to train and to test by; no image, told by its file's sum, is in both."""
    root = _root(name)
    train, test = _image_folders.find(root, "train"), _image_folders.find(root, "test")
    sums = _labelled.digests(test.samples, name)
    if train.split == test.split:
        kept, rest = _image_folders.halves([label for _, label in test.samples], sums)
        note = (
            f"{root} has no split to train by; it is divided by the content of its files: "
            f"{len(kept):,} images to train by, {len(rest):,} others to test by."
        )
        parts = [
            _of_found(f"{name}/{part}", test, sums, indices, (note,))
            for part, indices in (("train", kept), ("test", rest))
        ]
        return parts[0], parts[1]
    train_sums, tested = _labelled.digests(train.samples, name), set(sums)
    kept = [i for i, digest in enumerate(train_sums) if digest not in tested]
    n_both = len(train_sums) - len(kept)
    note = f"{n_both:,} images of {train.split} are also in {test.split}; they are not trained by."
    return (
        _of_found(f"{name}/{train.split}", train, train_sums, kept, (note,) if n_both else ()),
        _of_found(f"{name}/{test.split}", test, sums, range(len(sums)), ()),
    )


def _root(name: str) -> Path:
    return files.expanded(name.partition(":")[2])


def _of_found(
    name: str,
    found: _image_folders.Found,
    sums: Sequence[str],
    indices: Sequence[int],
    notes: tuple[str, ...],
) -> ImageSet:
    samples, sums = [found.samples[i] for i in indices], [sums[i] for i in indices]
    return _labelled.of_files(name, samples, found.classes, (*found.notes, *notes), sums)


def _from_files(
    name: str, samples: Sequence[tuple[str, int]], classes: tuple[str, ...], notes: tuple[str, ...] = ()
) -> ImageSet:
    samples = [(str(path), label) for path, label in samples]
    return _labelled.of_files(name, samples, classes, notes, _labelled.digests(samples, name))


def _found(read: Callable[[], Dataset], name: str, where: Path | None = None) -> Dataset:
    """Read a torchvision data set; say in one sentence where it was looked for."""
    try:
        return read()
    except Exception as error:  # a damaged file can make its reader raise almost anything
        layout = f"{where}" if where else f"{files.data_dir()} in torchvision's layout"
        text = f"data set {name!r} was not found whole in {layout} ({reason(error)})."
        missing = isinstance(error, (RuntimeError, FileNotFoundError, NotADirectoryError))
        raise (MissingFileError if missing else DamagedFileError)(text) from error


LOADERS: dict[str, Callable[[str], ImageSet]] = {
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar(tv.CIFAR10, "cifar10"),
    "cifar100": _cifar(tv.CIFAR100, "cifar100"),
    "imagenette": _imagenette,
    "imagenet": _imagenet,
}
