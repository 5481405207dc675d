"""Scopes of a clustering: which layers share a codebook, and how many clusters each group is asked for."""

from collections.abc import Mapping

import pandas as pd

from kclib._util import checks
from kclib.errors import InvalidValueError, UnknownNameError
from kclib.kernels import KernelBank, Layer


def grouping(bank: KernelBank, scope: str | Mapping[str, str]) -> dict[str, tuple[Layer, ...]]:
    """Return the layers of each group, in bank order.

    Raises
    ------
    InvalidValueError, UnknownNameError
        A layer that is missing or unknown; a scope that is neither ``layer`` nor ``global`` nor a mapping.
    """
    names = [layer.name for layer in bank.layers]
    if scope == "layer":
        scope = {name: name for name in names}
    elif scope == "global":
        scope = dict.fromkeys(names, "global")
    elif isinstance(scope, str):
        raise UnknownNameError("scope", scope, ("layer", "global"))
    if not isinstance(scope, Mapping) or not all(isinstance(group, str) for group in scope.values()):
        raise InvalidValueError(
            f"scope is {checks.said(scope)}; it must be layer, global, or group names by layer."
        )
    if wrong := set(scope) ^ set(names):
        raise InvalidValueError(
            "scope must give every layer of the bank a group; "
            f"not matching: {', '.join(sorted(map(str, wrong)))}."
        )
    groups: dict[str, tuple[Layer, ...]] = {}
    for layer in bank.layers:
        groups[scope[layer.name]] = (*groups.get(scope[layer.name], ()), layer)
    return groups


def largest(bank: KernelBank, scope: str | Mapping[str, str]) -> int:
    """Return the kernels of the largest group: the most clusters that one number for all can be.

    Raises
    ------
    InvalidValueError, UnknownNameError
        As `grouping`.
    """
    return max(sum(layer.n_kernels for layer in layers) for layers in grouping(bank, scope).values())


def wanted(
    members: Mapping[str, tuple[Layer, ...]], n_clusters: int | Mapping[str, int] | pd.Series
) -> dict[str, int]:
    """Return the clusters that each group of `grouping` is asked for, checked.

    Raises
    ------
    InvalidValueError
        K below 1 or above the number of kernels; a group that is missing or unknown.
    """
    counts = {name: sum(x.n_kernels for x in layers) for name, layers in members.items()}
    if isinstance(n_clusters, pd.Series):
        n_clusters = n_clusters.to_dict()
    if isinstance(n_clusters, Mapping):
        if wrong := set(n_clusters) ^ set(counts):
            raise InvalidValueError(
                f"n_clusters must name every group; not matching: {', '.join(sorted(map(str, wrong)))}."
            )
        return {
            name: checks.check_whole("n_clusters", k, 1, counts[name], f"the kernels of group {name}")
            for name, k in n_clusters.items()
        }
    most = max(counts.values())
    return dict.fromkeys(
        counts, checks.check_whole("n_clusters", n_clusters, 1, most, "the kernels of the largest group")
    )
