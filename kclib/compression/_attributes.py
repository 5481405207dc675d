"""What a convolution has beside its weight and bias, for what takes its place: hooks, attributes, buffers."""

import re
import warnings
from collections.abc import Mapping

from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import (
    SpectralNorm,
    SpectralNormLoadStateDictPreHook,
    SpectralNormStateDictHook,
)
from torch.nn.utils.weight_norm import WeightNorm

from kclib.errors import InvalidValueError
from kclib.kernels._copying import copied

PLACES = ("codebook", "indices", "scales", "block_bytes", "way")  # of a clustered convolution
_COMPUTE = (WeightNorm, SpectralNorm, prune.BasePruningMethod)
_WITH_THESE = (SpectralNormStateDictHook, SpectralNormLoadStateDictPreHook)
_COMPUTED_FROM = ("g", "v", "u", "orig", "mask")
_FRAME = frozenset(vars(nn.Module()))
# How `copying.copied` names what `swapped` copies, and what must be left of it.
_IN_WHOLE = re.compile(r"network\.(?:network\.?|attributes\['([^']*)'\]\['_?([^']*)'\](?:\['([^']*)'\])?)")


def own_attributes(module: nn.Module) -> dict[str, object]:
    """Return the attributes of a convolution, dense or clustered, without its weight and bias.

    Hooks and parametrizations that compute these (weight norm, pruning) are left out. Those from which the
    weight can be computed again (`compute_again`) are returned as ``computed_by``.

    Parameters
    ----------
    module : torch.nn.Module
        Unchanged. Values are shared, the mappings of parameters, buffers, modules and hooks are not.
    """
    hooks = [x for x in module._forward_pre_hooks.values() if isinstance(x, _COMPUTE)]
    computed = [getattr(x, "name", None) or x._tensor_name for x in hooks]
    left_out = {"weight", "bias", "parametrizations", "_compiled_call_impl", *PLACES}
    left_out |= {f"{name}_{part}" for name in computed for part in _COMPUTED_FROM}
    result = {
        name: _without(value, left_out) if name in _FRAME else value
        for name, value in vars(module).items()
        if name not in left_out
    }
    by = [x for x in hooks if isinstance(x, WeightNorm) and x.name == "weight"]
    if parametrize.is_parametrized(module, "weight"):
        by = list(module.parametrizations.weight)
    return result | ({"computed_by": by} if by else {})


def compute_again(convolution: nn.Module) -> None:
    """Let what computed a weight do so again, in place, from values that give this weight."""
    for each in vars(convolution).pop("computed_by", ()):
        if isinstance(each, WeightNorm):
            with warnings.catch_warnings(action="ignore"):  # that there is a newer one
                nn.utils.weight_norm(convolution, dim=each.dim)
        else:
            parametrize.register_parametrization(convolution, "weight", each, unsafe=True)


def plain(module: nn.Module) -> dict[str, object]:
    """Return its plain attributes alone, its geometry among them: no parameter, buffer, module or hook."""
    return {
        name: value
        for name, value in own_attributes(module).items()
        if name not in _FRAME or name == "training"
    }


def give(module: nn.Module, attributes: Mapping[str, object]) -> None:
    """Give these attributes to what takes a convolution's place; it keeps its own parameters and buffers."""
    for name, value in attributes.items():
        if name in _FRAME and isinstance(value, (dict, set)):
            vars(module)[name].update(value)
        else:
            vars(module)[name] = value


def swapped(network: nn.Module, replaced: Mapping[int, nn.Module]) -> nn.Module:
    """Return a copy of a network with other modules in some places, and in these what the former had.

    Parameters
    ----------
    network : torch.nn.Module
        Unchanged.
    replaced : mapping of int to torch.nn.Module
        By the ``id`` of the convolution, dense or clustered, whose place it takes; not copied, but given
        copies of all that the convolution has beside its weight and bias. Biases are theirs too.
    """
    places = {name: x for name, x in network.named_modules() if id(x) in replaced}
    memo = {id(x): replaced[id(x)] for x in places.values()}
    memo |= {id(x.bias): replaced[id(x)].bias for x in places.values() if x.bias is not None}
    whole = nn.Module()  # one copy of all, so that what refers to something else refers to its copy
    whole.network, whole.attributes = network, {name: own_attributes(x) for name, x in places.items()}
    try:
        copy = copied(whole, memo)
    except InvalidValueError as error:
        raise InvalidValueError(_IN_WHOLE.sub(_as_given, str(error))) from error
    for name, attributes in copy.attributes.items():
        give(replaced[id(places[name])], attributes)
    return copy.network


def check_names(name: str, convolution: nn.Module) -> None:
    """Raise an error if a convolution has an attribute whose name one in its place needs for itself."""
    if taken := sorted(set(PLACES) & {*vars(convolution), *dict(_named(convolution))}):
        raise InvalidValueError(
            f"layer {name} has an attribute {taken[0]!r}, where a clustered convolution keeps "
            "its indices; rename it, or replace its kernels with compression.replaced instead."
        )


def _named(module: nn.Module) -> list[tuple[str, object]]:
    places = (module._parameters, module._buffers, module._modules)
    return [each for place in places for each in place.items()]


def _without(value: object, left_out: set[str]) -> object:
    """Return a copy of one of a module's mappings or sets without what computes the weight."""
    if isinstance(value, dict):
        kept = {k: x for k, x in value.items() if k not in left_out and not _computes(x)}
        return type(value)(kept)
    return value - left_out if isinstance(value, set) else value


def _computes(hook: object) -> bool:
    hook = getattr(hook, "hook", hook)
    named = (
        getattr(hook, "__name__", "") == "_weight_norm_compat_hook"
    )  # reads files of the older weight norm
    return named or isinstance(hook, (*_COMPUTE, *_WITH_THESE))


def _as_given(match: re.Match) -> str:
    """Return what `copying.copied` called a thing in `swapped` by its place in the network given."""
    return ".".join(["network", *filter(None, match.groups())]) + "." * match[0].endswith("network.")
