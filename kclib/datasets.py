"""Labelled images to evaluate on, by name: the shipped Fashion-MNIST or what the user brings."""

import gzip
import hashlib
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torchvision.datasets as tv
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from kclib import checks, files
from kclib.errors import (
    DamagedFileError,
    InvalidValueError,
    KclibError,
    MissingFileError,
    UnknownNameError,
    reason,
)

FASHION_FILES = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one split.

    Attributes
    ----------
    name : str
        Name and split, for tables and store keys.
    images : torch.Tensor or torch.utils.data.Dataset
        Either uint8 ``(n, c, h, w)`` held in memory, or a map-style data set of ``(PIL image, label)``.
    labels : torch.Tensor
        int64 ``(n,)``, an index into `classes`.
    classes : tuple of str
        Class names in label order.
    fingerprint : str
        SHA-256 over images and labels, or over the checksums of their files.
    notes : tuple of str
        Sentences that a reader of results must know: which split was taken, how classes were matched, which
        files were left out.

    Raises
    ------
    InvalidValueError
        Images or labels of another kind or number; labels that are no classes.
    """

    name: str
    images: torch.Tensor | Dataset
    labels: torch.Tensor
    classes: tuple[str, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        labels, n_classes = self.labels, len(self.classes)
        if not torch.is_tensor(labels) or labels.dtype != torch.int64 or labels.ndim != 1:
            raise InvalidValueError(f"the labels of {self.name} must be an int64 tensor (n,).")
        if len(labels) and not -1 <= labels.min() <= labels.max() < n_classes:
            raise InvalidValueError(
                f"{self.name} has labels {labels.min()} to {labels.max()}; they must be "
                f"0 to {n_classes - 1}, for its {n_classes} classes, or -1 if unknown."
            )
        if torch.is_tensor(self.images) and (self.images.dtype, self.images.ndim) != (torch.uint8, 4):
            raise InvalidValueError(
                f"the images of {self.name} are {self.images.dtype} {tuple(self.images.shape)}; "
                "they must be torch.uint8 (n, c, h, w)."
            )
        if not hasattr(self.images, "__len__") or len(self.images) != len(labels):
            raise InvalidValueError(f"{self.name} must have an image for each of its {len(labels)} labels.")

    def __len__(self) -> int:
        return len(self.labels)


def load(name: str = "fashion-mnist", split: str = "test", *, limit: int | None = None) -> ImageSet:
    """Load one split of a data set.

    Parameters
    ----------
    name : str
        One of `names()`, or ``folder:PATH`` for a folder that holds one sub-folder of images a class.
        The others are read from `files.data_dir()` in torchvision's own layout; nothing is downloaded.
    split : {"test", "train"}
        ``test`` is the validation split where a data set has no public test labels (ImageNet, Imagenette).
    limit : int, optional
        Keep so many images, drawn once without replacement (the same for every call; a smaller
        limit is a subset of a larger one), in their original order.

    Raises
    ------
    UnknownNameError, MissingFileError, DamagedFileError, InvalidValueError
    """
    checks.check_known("split", split, ("test", "train"))
    kind, _, path = name.partition(":") if isinstance(name, str) else ("", "", "")
    if kind == "folder" and path:
        loaded = _folder(Path(path), split)
    elif name in _LOADERS:
        loaded = _LOADERS[name](split)
    else:
        raise UnknownNameError("data set", name, names())
    return loaded if limit is None else limited(loaded, limit)


def as_image_set(data) -> ImageSet:
    """Return labelled images, however they are given.

    Parameters
    ----------
    data : ImageSet or str
        An image set, or a name that `load` knows.

    Raises
    ------
    InvalidValueError
        It is nothing of these.
    """
    if isinstance(data, ImageSet):
        return data
    if isinstance(data, str):
        return load(data)
    raise InvalidValueError(f"the data are a {type(data).__name__}; they must be an ImageSet or its name.")


def names() -> tuple[str, ...]:
    """Return the data set names that `load` knows."""
    return (*_LOADERS, "folder:PATH")


def select(data: ImageSet, indices: torch.Tensor) -> ImageSet:
    """Return the images at `indices` (int64 ``(m,)``) as a data set of their own.

    Raises
    ------
    InvalidValueError
    """
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


def aligned(
    data: ImageSet,
    names: Sequence[str],
    n_outputs: int,
    *,
    classes: str | Sequence[str] | None = None,
) -> ImageSet:
    """Return `data` with its labels as places among a network's outputs.

    Parameters
    ----------
    names : sequence of str
        The names of the network's outputs; empty if unknown.
    n_outputs : int
        How many they are.
    classes : "by position" or sequence of str, optional
        ``"by position"`` takes the data set's classes as the outputs in their order; names stand for `names`.

    Raises
    ------
    InvalidValueError
        If the model answers other classes than the data set has.
    """
    position = {label: i for i, label in enumerate(names)}
    if names and tuple(names) != data.classes and all(label in position for label in data.classes):
        order = torch.tensor([position[label] for label in data.classes])
        return replace(data, labels=order[data.labels], classes=tuple(names))
    if names and len(names) != len(data.classes):
        raise InvalidValueError(
            f"the model answers {len(names)} classes, but {data.name} has {len(data.classes)}; "
            "choose a data set with the classes the model was trained on."
        )
    return data


def batches(
    data: ImageSet, preprocess: Callable, batch_size: int, *, workers: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ``(float inputs (b, 3, h, w), int64 labels (b,))`` in order.

    Images held in memory are preprocessed a batch at a time; others one by one as they are read,
    by `workers` processes, or in this one if it is itself a worker.
    """
    checks.check_whole("batch_size", batch_size, 1)
    if torch.is_tensor(data.images):
        for start in range(0, len(data), batch_size):
            part = slice(start, start + batch_size)
            yield preprocess(data.images[part]), data.labels[part]
        return
    loader = DataLoader(
        _Preprocessed(data.images, preprocess),
        batch_size,
        # Processes that joblib started cannot have children.
        num_workers=workers if multiprocessing.current_process().name == "MainProcess" else 0,
        collate_fn=_together,
    )
    start = 0
    for inputs in loader:  # labels come from the set, which may have been relabelled
        if isinstance(inputs, KclibError):
            raise inputs
        yield inputs, data.labels[start : start + len(inputs)]
        start += len(inputs)


class _Preprocessed(Dataset):
    """The images of a map-style data set after preprocessing, without their labels."""

    def __init__(self, images: Dataset, preprocess: Callable):
        self.images, self.preprocess = images, preprocess

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor | KclibError:
        try:
            image = self.images[index][0]
        except Exception as error:  # a damaged picture can make its reader raise almost anything
            return DamagedFileError(f"image {index} cannot be read ({reason(error)}); remove or restore it.")
        return self.preprocess(image)


def _together(items: list[torch.Tensor | KclibError]) -> torch.Tensor | KclibError:
    """Return a batch, or what is wrong with it: raised in a worker, it would come out as a page of text."""
    wrong = [item for item in items if isinstance(item, KclibError)]
    if not wrong and len(shapes := {tuple(item.shape) for item in items}) > 1:
        wrong = [
            InvalidValueError(f"preprocessing makes images of {sorted(shapes)}; it must make them alike.")
        ]
    return wrong[0] if wrong else torch.stack(items)


def limited(data: ImageSet, limit: int) -> ImageSet:
    """Return `limit` images drawn at random, the same whenever it is asked.

    Raises
    ------
    InvalidValueError
        A limit below 1 or above the number of images.
    """
    checks.check_whole(f"limit of {data.name}", limit, 1, len(data))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return select(data, order[:limit].sort().values)


def _fashion_mnist(split: str) -> ImageSet:
    raw = files.data_dir() / "FashionMNIST" / "raw"
    cache = files.data_dir() / "cache"
    for name, expected in FASHION_FILES.items():
        source = files.shipped(raw / name, expected)
        _unpack(source, cache / "FashionMNIST" / "raw" / source.stem)
    try:
        found = tv.FashionMNIST(cache, train=split == "train", download=False)
    except Exception as error:  # a damaged file can make its reader raise almost anything
        raise DamagedFileError(
            f"{cache / 'FashionMNIST'} is damaged ({reason(error)}); remove it, and it is made again."
        ) from error
    digest = hashlib.sha256("".join(FASHION_FILES.values()).encode() + split.encode()).hexdigest()
    return ImageSet(
        f"fashion-mnist/{split}", found.data[:, None], found.targets, tuple(found.classes), digest
    )


def _unpack(source: Path, target: Path) -> None:
    """Unpack a gzip file into the cache, once."""
    if target.exists():
        return
    with (
        gzip.open(source) as packed,
        files.replacing(target) as temporary,
        open(temporary, "wb") as out,
    ):
        shutil.copyfileobj(packed, out)


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
    paths, labels = zip(*found._samples, strict=True)  # Imagenette has no public list of samples
    return _from_paths(f"imagenette/{split}", found, paths, labels)


def _imagenet(split: str) -> ImageSet:
    part = "train" if split == "train" else "val"
    found = _found(lambda: tv.ImageNet(files.data_dir() / "imagenet", split=part), "imagenet")
    paths, labels = zip(*found.samples, strict=True)
    return _from_paths(f"imagenet/{split}", found, paths, labels)


def _folder(path: Path, split: str) -> ImageSet:
    root = path / split if (path / split).is_dir() else path
    found = _found(lambda: tv.ImageFolder(root), f"folder:{path}", root)
    paths, labels = zip(*found.samples, strict=True)
    return _from_paths(f"folder:{path}/{split}", found, paths, labels)


def _from_paths(name: str, found: Dataset, paths: Sequence, labels: Sequence[int]) -> ImageSet:
    classes = tuple(c if isinstance(c, str) else c[0] for c in found.classes)
    digest = hashlib.sha256(f"{classes} {labels}".encode())
    for path in tqdm(paths, desc=f"checksum of {name}", unit="image", delay=2):
        try:
            digest.update(files.sha256(Path(path)).encode())
        except OSError as error:
            raise DamagedFileError(f"image {path} cannot be read ({reason(error)}); remove it.") from error
    return ImageSet(name, found, torch.tensor(labels), classes, digest.hexdigest())


def _found(read: Callable[[], Dataset], name: str, where: Path | None = None) -> Dataset:
    """Read a torchvision data set; say in one sentence where it was looked for."""
    try:
        return read()
    except Exception as error:  # a damaged file can make its reader raise almost anything
        layout = f"{where}" if where else f"{files.data_dir()} in torchvision's layout"
        text = f"data set {name!r} was not found whole in {layout} ({reason(error)})."
        missing = isinstance(error, (RuntimeError, FileNotFoundError, NotADirectoryError))
        raise (MissingFileError if missing else DamagedFileError)(text) from error


_LOADERS: dict[str, Callable[[str], ImageSet]] = {
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar(tv.CIFAR10, "cifar10"),
    "cifar100": _cifar(tv.CIFAR100, "cifar100"),
    "imagenette": _imagenette,
    "imagenet": _imagenet,
}
