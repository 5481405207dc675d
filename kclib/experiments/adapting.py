"""What a notebook asks for, as far as a network and its images have it, and a sentence where they have less.

The library refuses what cannot be done; a notebook does what can be, and says so on its page. Each function
returns what is taken, and the sentence: empty where all that was asked for is there.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from kclib import clustering, datasets, models, recovery
from kclib._util import checks
from kclib.clustering._scopes import largest
from kclib.compression import byte_counts
from kclib.datasets import ImageSet, _loader
from kclib.errors import InvalidValueError, KclibError
from kclib.evaluation import _accuracy
from kclib.kernels import KernelBank, _copying
from kclib.models import Model, _inference
from kclib.training import Recipe

_SHARE = 4  # of what there is, one in so many is taken where more was asked for than there is
_ROOM = 1.5  # times the least bytes must be there, for more than a cluster or two in each layer
_NAMES = {"layer": "the largest layer", "global": "the network"}


def clusters(bank: KernelBank, n_clusters: int, scope: str = "layer") -> tuple[int, str]:
    """Return `n_clusters`, or a quarter of the kernels of a scope's largest group if it has not so many.

    Raises
    ------
    InvalidValueError, UnknownNameError
        K below 1; an unknown scope.
    """
    n_clusters = checks.check_whole("n_clusters", n_clusters, 1)
    most = largest(bank, scope)
    if n_clusters <= most:
        return n_clusters, ""
    taken = _some(most)
    return taken, (
        f"K = {n_clusters:,} was asked for, but {_NAMES[scope]} has {most:,} kernels: K is {taken:,} here."
    )


def several(
    bank: KernelBank, asked: Iterable[int | None], within: Iterable[str]
) -> tuple[list[int | None], str]:
    """Return those of some K that one of the scopes has kernels for; if none is left, what `clusters` takes.

    What is left out in one scope alone is said too: `_cell.sweep` and `factorial.cells` do not compute it.

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
    asked, counts = list(asked), {scope: largest(bank, scope) for scope in within}
    if not counts:
        raise InvalidValueError("scopes is empty; name at least one, such as layer.")
    most, said = max(counts.values()), []
    for scope, n in counts.items():
        if above := [f"{k:,}" for k in asked if k is not None and k > n]:
            said.append(
                f"K = {' and '.join(above)} is left out of scope {scope}: {_NAMES[scope]} has {n:,} kernels."
            )
    kept = [k for k in asked if k is None or k <= most]
    if len(kept) < len(asked) and not any(kept):
        kept.append(_some(most))
        said.append(f"K = {kept[-1]:,} is taken instead.")
    return kept, " ".join(said)


def _some(n_kernels: int) -> int:
    """Return a K that so many kernels can have and gain by: a quarter of them, or two."""
    return max(min(2, n_kernels), n_kernels // _SHARE)


def in_float32(model: Model) -> tuple[Model, str]:
    """Return a model whose network computes in float32, as training and rounding need it."""
    dtype = _inference.precision_of(model.network)
    if dtype == torch.float32:
        return model, ""
    network = _copying.copied(model.network).float()
    return models.like(model, network), f"Its {dtype} values are computed and counted as float32 here."


def images(data: ImageSet, limit: int, kind: str = "test", *, drawn: bool = True) -> tuple[ImageSet, str]:
    """Return `limit` images, or all if it is 0 or more than there are.

    Parameters
    ----------
    data : ImageSet
    limit : int
    kind : str
        What the sentence calls them.
    drawn : bool
        Whether they are drawn as by `datasets.limited`, or the first.

    Raises
    ------
    InvalidValueError
        A limit below 0.
    """
    limit = checks.check_whole(f"number of {kind} images", limit, 0)
    if limit > len(data):
        return data, f"{limit:,} {kind} images were asked for; there are {len(data):,}, and all are taken."
    if not limit:
        return data, ""
    return datasets.limited(data, limit) if drawn else _loader.select(data, torch.arange(limit)), ""


def recipe(n_images: int, **asked) -> tuple[Recipe, str]:
    """Return `recovery.RECIPE` with the fields asked for, as far as so many images allow (`training.split`).

    A quarter of them is held back if more than half were to be; an epoch has no more than the others, and at
    least four batches if it has not enough for one as large as asked for.
    """
    asked = replace(recovery.RECIPE, **asked)
    held = asked.held_back if 2 * asked.held_back <= n_images else max(1, n_images // _SHARE)
    kept = max(0, n_images - held)
    epoch = min(asked.images or kept, kept)
    small = 1 << max(1, (epoch // _SHARE).bit_length() - 1)
    batch = asked.batch_size if asked.batch_size <= epoch else small
    taken = replace(asked, held_back=held, images=min(asked.images, kept), batch_size=batch)
    if taken == asked:
        return asked, ""
    return taken, (
        f"Of {n_images:,} training images {held:,} are held back, and {epoch:,} are trained on in an epoch, "
        f"{batch} at a time: there are fewer than the {asked.held_back:,} and {asked.images:,} asked for."
    )


def budgets(model: Model, bank: KernelBank, shares: Iterable[float]) -> tuple[dict[float, float], str]:
    """Return the bytes of all convolutions that each share comes to, one in so many.

    Convolutions of another size, and biases, stay as they are. Where a share does not leave half as much
    again as they and one cluster a layer take, it is a share of the bytes above that.

    Raises
    ------
    InvalidValueError
        A share below 1.
    """
    shares = sorted(shares)
    for share in shares:
        checks.check_real("a share", share, lambda x: x >= 1, "a number, at least 1")
    dense = byte_counts.convolution_bytes(model.network)
    single = clustering.cluster(bank, 1, progress=False)
    least = byte_counts.clustered_bytes(model.network, single)
    result = {share: dense / share for share in shares}
    above = [share for share in shares if result[share] < _ROOM * least]
    result |= {share: least + (dense - least) / share for share in above}
    if not above:
        return result, ""
    named = ", ".join(f"1/{share:g}" for share in above)
    return result, (
        f"Of the {dense:,} bytes of the convolutions {least:,} remain even with one cluster a layer, for "
        f"what is not clustered stays as it is: {named} is a share of the bytes above that."
    )


def about(model: Model, data: ImageSet) -> str:
    """Return what the reader of a result must know of how images were read and their classes matched.

    Raises
    ------
    InvalidValueError
        As `evaluation.evaluate`.
    """
    return " ".join(_accuracy.matched(model, data).notes)


def attempted(what: str, call: Callable, *arguments, **options) -> tuple[object | None, str]:
    """Return what a call returns; where it is refused, None and a sentence that names what is left out."""
    try:
        return call(*arguments, **options), ""
    except KclibError as error:
        return None, f"{what} is left out: {error}"
