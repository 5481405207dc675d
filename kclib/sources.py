"""What a sweep is computed from, loaded once in each process that computes cells."""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from kclib import datasets, files, models
from kclib.profiles import ModelSource
from kclib.store import Store
from kclib.sweep import Subject


@dataclass(frozen=True)
class Source:
    """Where the workers take a `Subject` from, each for itself.

    Attributes
    ----------
    model : ModelSource
    data : str
    folder : str
        What paths are relative to.
    limit : int
        Images; 0 takes all.
    precision, device : str
    root : str
        Folder of the store.
    """

    model: ModelSource
    data: str
    folder: str
    limit: int
    precision: str
    device: str
    root: str

    def load(self) -> Subject:
        """Return the subject, from memory if this process had it lately."""
        return _subject(self)


def forget() -> None:
    """Let what is loaded next come from its files again."""
    for remembered in (_subject, _model, _data):
        remembered.cache_clear()


# Models take much memory and seconds to load, data sets little and, to hash a folder, minutes.
@lru_cache(maxsize=2)
def _subject(source: Source) -> Subject:
    model, data = _model(source.model, source.folder), _data(source.data, source.folder, source.limit)
    return Subject(model, data, Store(source.root), source.precision, source.device)


@lru_cache(maxsize=2)
def _model(source: ModelSource, folder: str) -> models.Model:
    return models.load(source.name, weights=files.located(source.weights, Path(folder), is_path=True))


@lru_cache(maxsize=16)
def _data(name: str, folder: str, limit: int) -> datasets.ImageSet:
    where = files.located(name, Path(folder))
    found = datasets.load(where, limit=limit or None)
    return replace(found, name=found.name.replace(where, name, 1))
