"""Folders of pictures: the splits and classes that they hold."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from kclib.datasets._class_names import listed
from kclib.errors import DamagedFileError, MissingFileError

SUFFIXES = (*IMG_EXTENSIONS, ".gif", ".jfif", ".avif")
_TRAINING = ("train", "training")
_TESTING = ("test", "testing", "val", "valid", "validation")  # in the order in which they are preferred
_JUNK = ("__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin")  # what tools leave, in any case


@dataclass(frozen=True)
class Scanned:
    """Pictures of one split of a folder.

    Attributes
    ----------
    split : str
        Name of the split's folder; empty if the folder has no splits.
    samples : tuple of (str, int)
        Path of each picture, and the place of its class in `classes`; by class, then by name.
    classes : tuple of str
        Names of the class folders, sorted.
    notes : tuple of str
        What was taken and what was left out.
    """

    split: str
    samples: tuple[tuple[str, int], ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def halves(labels: Sequence[int], sums: Sequence[str]) -> tuple[list[int], list[int]]:
    """Divide images by the sums of their contents: indices to train by, and to test by.

    Of each class, in the order of the sums, every other content goes to either side, the first to the test.
    Copies of an image are on one side, also where they lie in several classes.
    """
    contents = defaultdict(set)
    for label, digest in zip(labels, sums, strict=True):
        contents[label].add(digest)
    is_tested = {}
    for label in sorted(contents):
        decided = Counter(is_tested[x] for x in contents[label] if x in is_tested)
        for digest in sorted(contents[label] - is_tested.keys()):
            is_tested[digest] = decided[True] <= decided[False]
            decided[is_tested[digest]] += 1
    sides = [is_tested[digest] for digest in sums]
    return [i for i, tested in enumerate(sides) if not tested], [
        i for i, tested in enumerate(sides) if tested
    ]


def find(root: Path, split: str) -> Scanned:
    """Find the pictures of one split of a folder.

    A folder that holds ``train`` (or ``training``) and ``test``, ``testing``, ``val``, ``valid`` or
    ``validation``, in any case, is a data set with splits. For testing, the first of these in this order is
    taken that holds sub-folders of the classes. The classes are those of the training split as well: a
    network trained on them counts them all. A folder without splits holds a sub-folder a class, whatever its
    name. A single sub-folder that holds all this is followed.

    Names that begin with a dot and what tools leave (``__MACOSX``, ``Thumbs.db``) are no classes; nor is a
    folder of files that are no pictures. An empty folder is a class without images.

    Parameters
    ----------
    root : Path
    split : {"test", "train"}
        A folder whose only split is one for testing gives that one for both.

    Raises
    ------
    MissingFileError
        No such folder; no pictures in sub-folders; a training split alone, where one for testing is wanted.
    DamagedFileError
        A folder that cannot be read.
    """
    if not os.path.isdir(root):
        raise MissingFileError(
            f"image folder {root} does not exist; it must hold a sub-folder of images a class."
        )
    top, notes = _scan(root, ()), []
    while len(top.folders) == 1 and not top.images and _holds_folders(top.folders[0]):
        top = top.folders[0]
        notes.append(f"{top.path} is taken, the only folder in {root}.")
    splits = _splits(top)
    by_purpose = _by_purpose(splits) if splits else {"train": [top], "test": [top]}
    chosen = _chosen(top, splits, by_purpose, split)
    if splits:
        notes.append(
            f"Of the splits of {top.path} ({listed([x.name for x in splits])}), {chosen.name} is taken."
        )
    # A network that was trained on one split counts its classes, also those that the other has not.
    both = [x for wanted in by_purpose.values() for x in wanted[:1]]
    classes = tuple(sorted({folder.name for x in both for folder in x.classes}))
    if not chosen.classes or not chosen.n_images:
        raise MissingFileError(_without_classes(chosen))
    place = {name: i for i, name in enumerate(classes)}
    samples = [(path, place[folder.name]) for folder in chosen.classes for path in folder.all_images()]
    notes += _left_out(top, splits, chosen)
    return Scanned(chosen.name if splits else "", tuple(samples), classes, tuple(notes))


@dataclass
class _Folder:
    """What a folder holds; `ignored` are names of files and folders that are no pictures or classes."""

    path: Path
    folders: list["_Folder"] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def n_images(self) -> int:
        return len(self.images) + sum(folder.n_images for folder in self.folders)

    @property
    def classes(self) -> list["_Folder"]:
        return [x for x in self.folders if x.n_images or not (x.folders or x.ignored)]

    def all_images(self) -> Iterator[str]:
        yield from self.images
        for folder in self.folders:
            yield from folder.all_images()

    def all_ignored(self) -> Iterator[str]:
        yield from self.ignored
        for folder in self.folders:
            yield from folder.all_ignored()


def _scan(path: Path, above: tuple) -> _Folder:
    """Return what a folder holds, in the order of names; links that lead back up are not followed."""
    try:
        status = os.stat(path)
        with os.scandir(path) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DamagedFileError(
            f"folder {path} cannot be read ({error.strerror}); remove or restore it."
        ) from error
    result, above = _Folder(path), (*above, (status.st_dev, status.st_ino))
    for entry in entries:
        if entry.name.startswith(".") or entry.name.casefold() in _JUNK:
            result.ignored.append(entry.name)
        elif entry.is_dir():
            target = entry.stat()
            if (target.st_dev, target.st_ino) not in above:
                result.folders.append(_scan(path / entry.name, above))
        elif entry.is_file() and entry.name.lower().endswith(SUFFIXES):
            result.images.append(entry.path)
        else:
            result.ignored.append(entry.name)
    return result


def _holds_folders(folder: _Folder) -> bool:
    """Tell whether a folder's pictures are all in sub-folders: then it is no class of pictures itself."""
    is_split = folder.name.casefold() in (*_TRAINING, *_TESTING)
    return not is_split and not folder.images and any(x.n_images for x in folder.folders)


def _splits(top: _Folder) -> list[_Folder]:
    """Return the folders that are splits: none where they are classes, one of them named "train", say."""
    training = [x for x in top.folders if x.name.casefold() in _TRAINING]
    testing = [x for x in top.folders if x.name.casefold() in _TESTING]
    testing.sort(key=lambda x: _TESTING.index(x.name.casefold()))
    others = [x for x in top.folders if x.n_images and x not in training and x not in testing]
    in_folders = any(x.n_images for split in (*training, *testing) for x in split.folders)
    is_split = (in_folders or not others) if training and testing else (in_folders and not others)
    return [*training, *testing] if is_split else []


def _by_purpose(splits: list[_Folder]) -> dict[str, list[_Folder]]:
    """Return the splits that can be trained and tested by, those that are preferred first."""
    training = [x for x in splits if x.name.casefold() in _TRAINING]
    testing = [x for x in splits if x not in training and any(y.n_images for y in x.classes)]
    # A test split is often published without labels, as one folder of all its pictures.
    known = {y.name for x in training for y in x.classes}
    testing = [x for x in testing if not known or known & {y.name for y in x.classes if y.n_images}]
    return {"train": training or testing, "test": testing}


def _chosen(top: _Folder, splits: list[_Folder], by_purpose: dict[str, list[_Folder]], split: str) -> _Folder:
    if not by_purpose[split]:
        raise MissingFileError(
            f"{top.path} holds the splits {listed([x.name for x in splits])}, but none to {split} by that "
            "has a sub-folder of images for each class; name the folder to take, as in "
            f"folder:{splits[0].path}."
        )
    return by_purpose[split][0]


def _without_classes(folder: _Folder) -> str:
    if folder.images:
        return (
            f"{folder.path} holds {len(folder.images):,} images, but in no sub-folders; "
            "it must hold a sub-folder of images for each class."
        )
    return f"{folder.path} holds no images; it must hold a sub-folder of images for each class."


def _left_out(top: _Folder, splits: list[_Folder], chosen: _Folder) -> list[str]:
    """Return sentences on what lies in a folder and is not taken."""
    notes = []
    if ignored := [*chosen.all_ignored(), *map(os.path.basename, chosen.images)]:
        notes.append(
            f"Left out in {chosen.path}: {len(ignored):,} that are no images of a class ({listed(ignored)})."
        )
    if splits and (aside := [x.name for x in top.folders if x not in splits and x.n_images]):
        notes.append(f"Left out in {top.path}, beside the splits: {listed(aside)}.")
    if empty := [x.name for x in chosen.classes if not x.n_images]:
        notes.append(f"Classes without images in {chosen.path}: {listed(empty)}.")
    return notes
