"""The convolutions of a network: whose 2D kernels are taken, why others are not, weights read and written.

A weight may be an ordinary parameter, or computed from others: by weight norm (of both kinds that torch has),
or by a parametrization of the user's own that can be written to (`torch.nn.utils.parametrize`).
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.weight_norm import WeightNorm

from kclib.errors import InvalidValueError, reason
from kclib.kernels._copying import reached

ALONE = "(the network itself)"  # in place of a name, which only modules inside of others have
_TAKEN = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_FLAT = (nn.Conv2d, nn.ConvTranspose2d)
_KINDS = (*_FLAT, nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d)
_ROUNDED = 64  # units of rounding in which a weight that is written may come back otherwise
_SCRIPTED = "traced or scripted (torch.jit); give the network that it was made from"
_COMPRESSED = "compressed already; use compression.expand first"


def usable(network: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the convolutions whose 2D kernels can be taken, and why others cannot be, by name.

    Raises
    ------
    InvalidValueError
        A convolution has no values yet.
    """
    found, left_out, owner = {}, {}, {}
    for name, module in network.named_modules(remove_duplicate=False):
        if why := _why_not(module, name):
            left_out[name] = why
        elif isinstance(module, _FLAT):
            key = _key(module)
            if key in owner:
                left_out[name] = f"shares its weight with {owner[key] or ALONE}"
            else:
                owner[key] = name
                found[name] = module
    return found, left_out


def form(convolution: nn.Module) -> tuple[tuple[int, ...], bool]:
    """Return a convolution's weight shape and whether it is transposed."""
    return tuple(weight(convolution).shape), isinstance(convolution, nn.ConvTranspose2d)


@torch.no_grad()
def weight(convolution: nn.Module) -> Tensor:
    """Return a convolution's weight, computed anew where it is computed; nothing in the network changes."""
    if parametrize.is_parametrized(convolution, "weight"):
        computed = convolution.parametrizations.weight
        # A parametrization may learn as it is read, as spectral norm does.
        return (computed if _is_weight_norm(computed) else copy.deepcopy(computed).eval())()
    hook = _weight_norm_hook(convolution)
    return hook.compute_weight(convolution) if hook else convolution.weight


def parameters(convolution: nn.Module) -> tuple[Tensor, ...]:
    """Return the parameters that a convolution's weight is, or is computed from."""
    if parametrize.is_parametrized(convolution, "weight"):
        return tuple(convolution.parametrizations.weight.parameters())
    if _weight_norm_hook(convolution):
        return convolution.weight_g, convolution.weight_v
    return (convolution.weight,)


@torch.no_grad()
def set_weight(convolution: nn.Module, values: Tensor, *, name: str = "") -> None:
    """Write a weight into a convolution, in place, in its own precision and through weight norm.

    Parameters
    ----------
    convolution : torch.nn.Module
        Such as `_bank.matched` returns; changed.
    values : torch.Tensor
        As many as it has, in any shape, floating type and on any device. A weight that is computed from
        others comes back as these values to rounding; every other to the bit, where its type has them.
    name : str
        The layer's, for the sentence of an error.

    Raises
    ------
    InvalidValueError
        Values that are not finite in the convolution's floating type, or too few or many.
    """
    own = weight(convolution)
    if values.numel() != own.numel():
        raise InvalidValueError(
            f"layer {name or ALONE} is written {values.numel()} values; its weight has {own.numel()}."
        )
    new = values.reshape(own.shape).to(own)
    if not torch.isfinite(new).all():
        most = values.abs().max().item()
        raise InvalidValueError(
            f"layer {name or ALONE} is written weights up to {most:g}; they must be finite in {own.dtype}, "
            f"up to {torch.finfo(own.dtype).max:g}."
        )
    hook = _weight_norm_hook(convolution)
    if hook:
        _normed(convolution.weight_g, convolution.weight_v, new, hook.dim)
        convolution.weight = hook.compute_weight(convolution)
    elif not parametrize.is_parametrized(convolution, "weight"):
        convolution.weight.copy_(new)
    elif _is_weight_norm(computed := convolution.parametrizations.weight):
        _normed(computed.original0, computed.original1, new, computed[0].dim)
    else:
        computed.right_inverse(new)


def plain(network: nn.Module) -> nn.Module:
    """Make the computed weights of `usable` convolutions ordinary parameters, in place; return the network.

    For copies that are only measured: by gradients, or with other weights put in for a while. Those that
    share a weight share it still.
    """
    owners = {_key(x): nn.Parameter(weight(x)) for x in usable(network)[0].values() if _is_computed(x)}
    users = [(x, owners.get(_key(x))) for x in network.modules() if isinstance(x, _FLAT) and _is_computed(x)]
    for module, own in users:
        if own is None:
            continue
        if parametrize.is_parametrized(module, "weight"):
            _unparametrized(module)
        else:
            nn.utils.remove_weight_norm(module)
        module.weight = own
    return network


def _is_computed(convolution: nn.Module) -> bool:
    """Tell whether a weight is computed in one of the ways that this module knows."""
    return parametrize.is_parametrized(convolution, "weight") or bool(_weight_norm_hook(convolution))


def _key(convolution: nn.Module) -> tuple[int, ...]:
    """Return what convolutions have in common that share a weight."""
    return tuple(id(x) for x in parameters(convolution))


def described(left_out: Mapping[str, str], most: int = 3) -> str:
    """Return which convolutions were left out and why, as part of a sentence, the commonest reasons first."""
    names = {}
    for name, why in left_out.items():
        names.setdefault(why, []).append(name or ALONE)
    groups = sorted(names.items(), key=lambda x: -len(x[1]))
    parts = [f"{_some(these)}: {why}" for why, these in groups[:most]]
    rest = sum(len(these) for _, these in groups[most:])
    return "; ".join([*parts, f"{rest} more for other reasons"] if rest else parts)


def instead(network: nn.Module) -> str:
    """Return what a network without any convolution has in their place, as part of a sentence."""
    if isinstance(network, torch.jit.ScriptModule):
        return f"it is {_SCRIPTED}"
    loose = [name for name, value in network.named_parameters() if value.ndim == 4]
    if loose:
        return f"parameters of four axes: {_some(loose)}; they must be those of a torch.nn.Conv2d"
    own = {id(module) for module in network.modules()}
    hidden = [x for x in reached(network) if isinstance(x, _KINDS) and id(x) not in own]
    if hidden:
        return (
            f"{len(hidden)} {type(hidden[0]).__name__} lie in lists or the like; put them into a ModuleList"
        )
    n_linear = sum(isinstance(module, nn.Linear) for module in network.modules())
    return "it has no convolution" + (f", but {n_linear} linear layers" if n_linear else "")


def _some(names: list[str], most: int = 2) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _why_not(module: nn.Module, name: str) -> str:
    """Return why a module's kernels are not taken; nothing if they are, or if it is no convolution."""
    kind = type(module)
    if any(x.__name__ == "ClusteredConv2d" for x in kind.__mro__):
        return _COMPRESSED
    if isinstance(module, torch.jit.ScriptModule):
        is_one = "conv" in str(module.original_name).lower() and not any(module.children())
        return _SCRIPTED if is_one else ""
    if isinstance(module, _FLAT):
        return _weight_fault(module, name)
    if isinstance(module, _KINDS):
        _check_values(module.weight, name)
        return f"{kind.__name__}: its kernels are not 2D"
    return _of_another_kind(module)


def _of_another_kind(module: nn.Module) -> str:
    """Return why the kernels of a module are not taken that torch does not know as a convolution."""
    kind = type(module)
    if "conv" not in kind.__name__.lower():
        return ""
    if ".quantized" in kind.__module__ and kind.__module__.startswith("torch."):
        return f"{kind.__name__}: quantized already; give the network that it was made from"
    if any(x is not None and x.ndim >= 3 for x in module._parameters.values()):
        return f"{kind.__name__}: no torch.nn.Conv2d, and what it does with its weights is not known"
    return ""


def _weight_fault(module: nn.Module, name: str) -> str:
    """Return why the weight of a 2D convolution is not taken; nothing if it is."""
    if hasattr(module, "weight_orig") and hasattr(module, "weight_mask"):
        return "pruned, so its weight is computed; call torch.nn.utils.prune.remove(module, 'weight') first"
    if parametrize.is_parametrized(module, "weight"):
        for value in module.parametrizations.weight.parameters():
            _check_values(value, name)
        if why := _parametrization_fault(module):
            return why
    elif not _weight_norm_hook(module):
        if not isinstance(module._parameters.get("weight"), Tensor):
            hooks = ", ".join(type(x).__name__ for x in module._forward_pre_hooks.values())
            return f"its weight is computed ({hooks or 'no parameter'}); make it an ordinary parameter first"
        _check_values(module.weight, name)
    own = weight(module)
    _check_values(own, name)
    if type(own).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"its weight is a {type(own).__name__}, no ordinary tensor"
    if own.layout != torch.strided:
        return "its weight is sparse; write its dense values into it first"
    if own.dtype not in _TAKEN:
        return f"its weights are {own.dtype}; give it floating ones, such as float32"
    if own.ndim != 4 or not own.numel():
        return f"its weight has shape {tuple(own.shape)}; a 2D convolution's has four axes, none empty"
    return ""


def _parametrization_fault(module: nn.Module) -> str:
    """Return why a weight cannot be written through its parametrizations; nothing if it comes back."""
    computed = module.parametrizations.weight
    if _is_weight_norm(computed):
        return ""
    names = ", ".join(type(x).__name__.lstrip("_") for x in computed)
    advice = "call torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') first"
    trial = copy.deepcopy(computed).eval()
    try:
        own = trial()
        probe = torch.randn(own.shape, generator=torch.Generator().manual_seed(0)).to(own)
        trial.right_inverse(probe)
        apart = (trial() - probe).abs().max().item()
    except Exception as error:  # of the user's own code
        return f"parametrized ({names}), and cannot be written to ({reason(error)}); {advice}"
    if apart <= _ROUNDED * torch.finfo(own.dtype).eps * probe.abs().max().item():
        return ""
    return f"parametrized ({names}), and what is written to it does not come back; {advice}"


def _unparametrized(module: nn.Module) -> None:
    """Take a weight and its parametrizations off a module.

    Not by `remove_parametrizations`: it changes the class, which copies share with what they are copies of.
    """
    kind = type(module)
    del module.parametrizations["weight"]
    module.__class__ = kind.__base__
    if module.parametrizations:  # of other parameters
        rest = {
            name: x for name, x in vars(kind).items() if name not in ("weight", "__dict__", "__weakref__")
        }
        module.__class__ = type(kind.__name__, kind.__bases__, rest)
    else:
        del module.parametrizations


def _check_values(value: object, name: str) -> None:
    """Raise an error if a parameter has no values yet."""
    if nn.parameter.is_lazy(value) or (isinstance(value, Tensor) and value.is_meta):
        raise InvalidValueError(
            f"layer {name or ALONE} has no values yet (lazy or on the meta device); load weights first."
        )


def _is_weight_norm(computed: parametrize.ParametrizationList) -> bool:
    return [type(x) for x in computed] == [parametrizations._WeightNorm]


def _weight_norm_hook(module: nn.Module) -> WeightNorm | None:
    """Return the hook by which torch.nn.utils.weight_norm, the older of two, computes a weight."""
    hooks = module._forward_pre_hooks.values()
    return next((x for x in hooks if isinstance(x, WeightNorm) and x.name == "weight"), None)


def _normed(lengths: Tensor, directions: Tensor, new: Tensor, dim: int) -> None:
    """Write a weight as the lengths and directions of its filters; the direction of a zero one stays."""
    norms = torch.norm_except_dim(new, 2, dim)
    directions.copy_(torch.where(norms > 0, new, torch.where(directions == 0, 1, directions)))
    lengths.copy_(norms)
