"""What a notebook asks for, as far as a network and its images have it, and a sentence where they have less.

The library refuses what cannot be done; a notebook does what can be, and says so on its page. Each function
returns what is taken, and the sentence: empty where all that was asked for is there.
"""

from collections.abc import Iterable
from dataclasses import replace

from kclib import checks, datasets
from kclib.errors import InvalidValueError
from kclib.kernels import KernelBank
from kclib.recipe import Recipe
from kclib.scopes import largest

_SHARE = 4  # of what there is, one in so many is taken where more was asked for than there is
_NAMES = {"layer": "the largest layer", "global": "the network"}


def clusters(bank: KernelBank, n_clusters: int, scope: str = "layer") -> tuple[int, str]:
    """Return `n_clusters`, or a quarter of the kernels of a scope's largest group if it has not so many.

    Raises
    ------
    InvalidValueError, UnknownNameError
        K below 1; an unknown scope.
    """
    checks.check_whole("n_clusters", n_clusters, 1)
    there = largest(bank, scope)
    if n_clusters <= there:
        return n_clusters, ""
    taken = max(1, there // _SHARE)
    return taken, (
        f"K = {n_clusters:,} was asked for, but {_NAMES[scope]} has {there:,} kernels: K is {taken:,} here, "
        f"one representative for {_SHARE} of them."
    )


def several(
    bank: KernelBank, asked: Iterable[int | None], within: Iterable[str]
) -> tuple[list[int | None], str]:
    """Return those of some K that one of the scopes has kernels for; if none is left, what `clusters` takes.

    What is left out in one scope alone is said too: `sweep.run` and `factorial.cells` do not compute it.

    Parameters
    ----------
    bank : KernelBank
    asked : iterable of int or None
        None clusters nothing, and stays.
    within : iterable of {"layer", "global"}

    Raises
    ------
    InvalidValueError, UnknownNameError
        No scope; an unknown one.
    """
    asked, there = list(asked), {scope: largest(bank, scope) for scope in within}
    if not there:
        raise InvalidValueError("scopes is empty; name at least one, such as layer.")
    most, said = max(there.values()), []
    for scope, n in there.items():
        if above := [f"{k:,}" for k in asked if k is not None and k > n]:
            said.append(f"K = {', '.join(above)}: not in scope {scope}, as {_NAMES[scope]} has {n:,} kernels.")
    kept = [k for k in asked if k is None or k <= most]
    if len(kept) < len(asked) and not any(kept):
        kept.append(max(1, most // _SHARE))
        said.append(f"K = {kept[-1]:,} is taken instead, one representative for {_SHARE} kernels.")
    return kept, " ".join(said)


def images(data: datasets.ImageSet, limit: int, kind: str = "test") -> tuple[datasets.ImageSet, str]:
    """Return `limit` images as `datasets.limited` draws them, or all if it is 0 or more than there are.

    Parameters
    ----------
    data : ImageSet
    limit : int
    kind : str
        What the sentence calls them.

    Raises
    ------
    InvalidValueError
        A limit below 0.
    """
    checks.check_whole("limit", limit, 0)
    if limit > len(data):
        return data, f"{limit:,} {kind} images were asked for, and all {len(data):,} that there are are taken."
    return (datasets.limited(data, limit) if limit else data), ""


def recipe(asked: Recipe, n_images: int) -> tuple[Recipe, str]:
    """Return a recipe that `training.split` can follow with so many images.

    Where all that was asked for is there, it is the recipe as it is. Otherwise at most half of the images are
    held back, a quarter if more were asked for; an epoch has at most all others, and at least four batches.
    """
    held = asked.held_back if 2 * asked.held_back <= n_images else max(1, n_images // _SHARE)
    kept = max(0, n_images - held)
    epoch = min(asked.images or kept, kept)
    few = 1 << max(1, (epoch // _SHARE).bit_length() - 1)
    batch = asked.batch_size if asked.batch_size <= epoch else few
    taken = replace(asked, held_back=held, images=epoch if asked.images else 0, batch_size=batch)
    if taken == asked:
        return asked, ""
    return taken, (
        f"Of {n_images:,} training images {held:,} are held back and {epoch:,} are trained on in an epoch, "
        f"{batch:,} at a time; {asked.held_back:,} and {asked.images or 'all others'}, "
        f"{asked.batch_size:,} at a time, were asked for."
    )
