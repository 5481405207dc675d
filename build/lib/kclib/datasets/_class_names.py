"""Which output of a network means which class of a data set: told by names, never guessed."""

import re
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from functools import cache
from pathlib import Path

from torchvision.models import VGG16_Weights

from kclib.errors import InvalidValueError

_LISTED = 120  # characters of a list of names; readers of more look them up
_WORDNET_ID = re.compile(r"n\d{8}(?!\d)")  # of a noun, as in "n01440764" or "n02085620-Chihuahua"


def places(
    source: str,
    classes: Sequence[str],
    needed: Sequence[bool],
    names: Sequence[str],
    n_outputs: int,
) -> tuple[list[int], str]:
    """Return the output that means each class of a data set, and a sentence that says how it was told.

    A network with names is matched by them: as they are; else by WordNet id; else without regard to case,
    blanks, underscores, hyphens and slashes. Each name stands for one output and one class: where two would
    do, none is taken. Classes that are all numbers are outputs counted from 0 if the names are no numbers.

    A network without names takes classes that are all numbers as its outputs counted from 0 ("010" is 10),
    and others in their order if they are as many as its outputs.

    Parameters
    ----------
    source : str
        The data set's name, for sentences.
    classes : sequence of str
        Its classes.
    needed : sequence of bool
        Whether each has images; one without may fit nothing.
    names : sequence of str
        The names of the outputs; empty if unknown.
    n_outputs : int

    Returns
    -------
    places : list of int
        The output of each class; -1 for one that fits none and is not needed.
    note : str
        Empty where there is nothing to say.

    Raises
    ------
    InvalidValueError
        Classes that fit no output, or more than one.
    """
    if not names:
        return _without_names(source, classes, n_outputs)
    if len(names) != n_outputs:
        raise InvalidValueError(
            f"the network has {n_outputs} outputs and {len(names)} names ({listed(names)}); "
            "it must have a name for each output."
        )
    if _are_alike(classes, names):
        return list(range(len(classes))), ""
    if all(map(_is_number, classes)) and not any(map(_is_number, names)):
        return _numbers(source, classes, n_outputs), _NUMBERS.format(source=source)
    return _by_names(source, classes, needed, names)


def by_position(source: str, classes: Sequence[str], n_outputs: int) -> tuple[list[int], str]:
    """Return the outputs in their order for the classes in theirs, and a sentence that says so.

    Raises
    ------
    InvalidValueError
        There are fewer outputs than classes.
    """
    if len(classes) > n_outputs:
        raise InvalidValueError(
            f"{source} has {len(classes)} classes ({listed(classes)}), but the network has {n_outputs} "
            "outputs; by position, each class needs an output."
        )
    return list(range(len(classes))), f"The classes of {source} are the network's outputs by position."


def wordnet_ids(names: Sequence[str]) -> list[str | None]:
    """Return the WordNet id of each name: the one written in it, or that of ImageNet's class of the name."""
    categories, ids = imagenet()
    if len(names) == len(categories):  # ImageNet's order tells its two cranes and two maillots apart
        same = [a == b for a, b in zip(_loose_keys(_first(names)), _loose_keys(categories), strict=True)]
        if sum(same) > len(names) / 2:
            return list(ids)
    known = dict(zip(_loose_keys(categories), ids, strict=True))
    written = [_WORDNET_ID.match(name) for name in names]
    return [id_[0] if id_ else known.get(_loose(name)) for id_, name in zip(written, names, strict=True)]


@cache
def imagenet() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of ImageNet's 1,000 classes as torchvision has them, and their WordNet ids."""
    ids = Path(__file__).with_name("imagenet_wordnet_ids.txt").read_text().split()
    return tuple(VGG16_Weights.DEFAULT.meta["categories"]), tuple(ids)


def listed(names: Sequence[str]) -> str:
    """Return names as a list that is cut where it grows long."""
    return textwrap.shorten(", ".join(map(str, names[:_LISTED])), _LISTED, placeholder=" ...")


_NUMBERS = "The classes of {source} are numbers; they are the network's outputs, counted from 0."


def _without_names(source: str, classes: Sequence[str], n_outputs: int) -> tuple[list[int], str]:
    if classes and all(map(_is_number, classes)):
        order = _numbers(source, classes, n_outputs)
        return order, "" if order == list(range(n_outputs)) else _NUMBERS.format(source=source)
    if len(classes) != n_outputs:
        raise InvalidValueError(
            f"the network has {n_outputs} outputs without names, and {source} has {len(classes)} classes "
            f"({listed(classes)}); give classes= (--classes) as the names of the outputs in their order, or "
            'as "by position".'
        )
    note = (
        f"The network's outputs have no names; they are the classes of {source} in order: {listed(classes)}."
    )
    return list(range(n_outputs)), note


def _numbers(source: str, classes: Sequence[str], n_outputs: int) -> list[int]:
    order = [int(name) for name in classes]
    if order and max(order) >= n_outputs:
        raise InvalidValueError(
            f"{source} has a class {max(order)}, but the network's outputs are 0 to {n_outputs - 1}; "
            "a class that is a number must be an output's, and the label of an unknown class -1."
        )
    if repeated := [place for place, n in Counter(order).items() if n > 1]:
        raise InvalidValueError(
            f"two classes of {source} are the number {repeated[0]} ({listed(classes)}); "
            "each must have its own."
        )
    return order


def _by_names(
    source: str, classes: Sequence[str], needed: Sequence[bool], names: Sequence[str]
) -> tuple[list[int], str]:
    order, used = [-1] * len(classes), []
    for way, of_classes, of_names in _ways(classes, names):
        place = {key: i for i, key in enumerate(of_names)}
        once = _once(of_classes) & _once(of_names)
        matched = [i for i, key in enumerate(of_classes) if order[i] < 0 and key in once]
        matched = [i for i in matched if place[of_classes[i]] not in order]
        for i in matched:
            order[i] = place[of_classes[i]]
        used += [way] * any(needed[i] for i in matched)
    left = [name for name, place, need in zip(classes, order, needed, strict=True) if need and place < 0]
    if left:
        raise InvalidValueError(_do_not_fit(source, left, classes, names))
    return order, "" if used in (
        [],
        ["name"],
    ) else f"The classes of {source} are matched by {' and '.join(used)}."


def _are_alike(classes: Sequence[str], names: Sequence[str]) -> bool:
    """Tell whether two lists are the same in their order; they may repeat a name."""
    if _loose_keys(classes) != _loose_keys(names):
        return False
    exact = set(names)
    return all(a == b or a not in exact for a, b in zip(classes, names, strict=True))


def _ways(classes: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, list, list]]:
    """Yield each way to match classes with names: what it is called, and the keys of both."""
    yield "name", list(classes), list(names)
    written = [[_WORDNET_ID.match(name) for name in both] for both in (classes, names)]
    if any(written[0]) or any(written[1]):  # else a word that has two ids would pass for one of them
        yield "WordNet id", wordnet_ids(classes), wordnet_ids(names)
    loose = "name without regard to case, blanks and underscores"
    yield loose, _loose_keys(classes), _loose_keys(names)


def _do_not_fit(source: str, left: Sequence[str], classes: Sequence[str], names: Sequence[str]) -> str:
    several = _repeated(_loose_keys(names)) | _repeated(_loose_keys(classes))
    unclear = [name for name in left if _loose(name) in several]
    wrong = f"{listed(unclear)} could be more than one" if unclear else f"no output is {listed(left)}"
    return (
        f"the classes of {source} ({listed(classes)}) are not those of the network ({listed(names)}): "
        f"{wrong}; rename them, or give classes= (--classes) as the outputs' names in their order, or "
        'as "by position".'
    )


def _repeated(keys: Sequence[str]) -> set[str]:
    return {key for key, n in Counter(keys).items() if n > 1}


def _once(keys: Sequence[Hashable]) -> set:
    return {key for key, n in Counter(keys).items() if n == 1 and key is not None}


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _first(names: Sequence[str]) -> list[str]:
    """Return the first of the synonyms that ImageNet's lists give, as in "tench, Tinca tinca"."""
    return [name.split(",")[0] for name in names]


def _loose(name: str) -> str:
    if _is_number(name):
        return str(int(name))
    name = unicodedata.normalize("NFKC", name).casefold()  # disks write accents in more than one way
    return re.sub(r"[\s_/\\-]", "", name)


def _loose_keys(names: Sequence[str]) -> list[str]:
    return [_loose(name) for name in names]
