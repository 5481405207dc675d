"""State dicts as trainers write them, found in a checkpoint and fitted to a network."""

import os
import re
from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from kclib._util import files
from kclib.errors import DamagedFileError, InvalidValueError, reason
from kclib.models import _checkpoint_files
from kclib.models._checkpoint_files import Unread

State = Mapping[str, Tensor]

# Parts of a name that a wrapper puts in: DataParallel, torch.compile, FSDP, checkpointed activations, Fabric.
_WRAPPERS = {
    "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module",
}  # fmt: skip
# Published densenets carry names that the modules no longer have.
_OLD_DENSENET_NAME = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])(?=\.)")
# What averaging and counting leave beside a network's own values.
_EXTRAS = ("n_averaged", "total_ops", "total_params", "num_batches_tracked")
_EXTRA_STATE = "_extra_state"
_DEEP = 3  # mappings within mappings that are looked through
_SHOWN = 3


def read_all(path: str | Path | Mapping) -> dict[str, State]:
    """Return the state dicts of a checkpoint by where they lie in it, ``""`` if it is one itself.

    Parameters
    ----------
    path : path or mapping
        A safetensors file, an index of several, or what torch.save wrote, whatever its suffix; ``~`` is the
        home folder. ``PATH::NAME`` takes only what lies under that name, such as ``w.pt::ema``. Or what such
        a file holds.

    Raises
    ------
    MissingFileError, DamagedFileError
        The file is absent; or truncated, without a state dict, or made to run code.
    InvalidValueError
        It is a file of another kind, or has no such name; or it is neither a path nor a mapping.
    """
    if isinstance(path, Mapping):
        path, chosen, content = "the mapping of weights", "", path
    else:
        path, chosen = _parted(path)
        content = _checkpoint_files.read(path)
    states = dict(_states(content))
    if not states:
        raise DamagedFileError(f"{path} {_why_none(content)}.")
    return _under(chosen, states, path) if chosen else states


def read(path: str | Path) -> State:
    """Return the one state dict of a checkpoint.

    Raises
    ------
    MissingFileError, DamagedFileError, InvalidValueError
        As in `found`; or there are several.
    """
    states = read_all(path)
    if len(states) > 1:
        raise InvalidValueError(_several(str(path), states))
    return next(iter(states.values()))


def is_compressed(path: str | Path | Mapping) -> bool:
    """Tell whether a file is one that `compression.save` wrote."""
    return not isinstance(path, Mapping) and _checkpoint_files.is_compressed(_parted(path)[0])


def fill(network: nn.Module, states: Mapping[str, State], source: str) -> None:
    """Put the one state dict that fits into a network, in place.

    Names may differ from the network's by what wrappers put in (``module.``, ``_orig_mod.``), by a prefix
    that the network has as a part of a larger one (``model.``), or that it has itself. Everything must have a
    value of its shape; left over may be only what averaging and counting add. What lies under other prefixes
    belongs to other networks and is left.

    Parameters
    ----------
    states : mapping of str to mapping
        As `found` returns.
    source : str
        Where they come from, for errors.

    Raises
    ------
    InvalidValueError
        None fits, and the nearest names are said; or several do and differ, and they are listed.
    """
    expected = network.state_dict(keep_vars=True)
    fitting = {}
    for place, state in states.items():
        for prefix, values in _readings(state, expected).items():
            if not any(_same(values, other) for other in fitting.values()):
                fitting[f"{place}/{prefix}".strip("/")] = values
    if len(fitting) > 1:
        raise InvalidValueError(_several(source, fitting))
    given = next(iter(fitting.values()), None)
    if given is None:  # the network may have a way of its own to read names of earlier versions
        given = _renamed(next(iter(states.values())), expected)
        if len(states) > 1 or _differing(given, expected) or set(given) == set(expected):
            raise InvalidValueError(_misfit(source, states, expected))
    on_meta = any(torch.is_tensor(x) and x.is_meta for x in expected.values())
    for name, value in given.items():
        if _is_changed(value, expected.get(name)):
            raise InvalidValueError(
                f"{name} in {source} has values that {expected[name].dtype}, its type in the network, cannot "
                f"hold; build the network with {value.dtype} there."
            )
    try:
        network.load_state_dict(given, strict=not fitting, assign=on_meta)
    except Exception as error:  # also of the user's own code
        if fitting:
            raise InvalidValueError(f"{source} could not be loaded ({reason(error)}).") from error
        raise InvalidValueError(_misfit(source, states, expected)) from error


def _parted(path: str | Path) -> tuple[Path, str]:
    """Return a file and the name of what is taken out of it."""
    if not isinstance(path, (str, Path)):
        raise InvalidValueError(
            f"weights are a {type(path).__name__}; they must be the path of a file, or a state dict."
        )
    whole = files.expanded(path)
    if os.path.exists(whole) or "::" not in str(whole):
        return whole, ""
    name, _, chosen = str(whole).partition("::")
    return Path(name), chosen


def _under(chosen: str, states: Mapping[str, State], path: Path) -> dict[str, State]:
    """Return the state dict of a name, or the part of one whose names begin with the end of that name."""
    if chosen in states:
        return {chosen: states[chosen]}
    for place, state in states.items():
        prefix = chosen.removeprefix(place).strip("/")
        names = {_plain(name).removeprefix(f"{prefix}."): name for name in state}
        part = {short: state[name] for short, name in names.items() if short != _plain(name)}
        if part and chosen.startswith(place):
            return {chosen: part}
    raise InvalidValueError(f"{path} has no state dict {chosen!r}; it has {', '.join(map(repr, states))}.")


def _states(content: object, place: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    """Yield every state dict in a checkpoint's content with where it lies."""
    if not isinstance(content, Mapping):
        return
    if _is_state(content):
        yield place, content
    elif depth < _DEEP:
        for name, part in content.items():
            if isinstance(name, str):
                yield from _states(part, f"{place}/{name}".strip("/"), depth + 1)


def _is_state(content: Mapping) -> bool:
    tensors = {name: x for name, x in content.items() if not str(name).endswith(_EXTRA_STATE)}
    return bool(tensors) and all(isinstance(name, str) and torch.is_tensor(x) for name, x in tensors.items())


def _why_none(content: object) -> str:
    """Return why nothing in a checkpoint is a state dict."""
    parts = [content, *(content.values() if isinstance(content, Mapping) else ())]
    for part in parts:
        if isinstance(part, Unread):
            return (
                f"holds no state dict but objects of {type(part).__name__}, which are never unpickled; where "
                "that class can be imported, load it and give torch.save(network.state_dict(), path)"
            )
    return "holds no state dict (a mapping of names to tensors)"


def _several(source: str, states: Mapping[str, State]) -> str:
    names = ", ".join(map(repr, list(states)[:5])) + (" and so on" if len(states) > 5 else "")
    return (
        f"{source} holds {len(states)} state dicts that differ, {names}; say which, "
        f"such as {source.partition('::')[0]}::{list(states)[-1]}."
    )


def _same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        x.dtype == other[name].dtype and torch.equal(x, other[name])
        for name, x in one.items()
        if torch.is_tensor(x)
    )


def _plain(name: str) -> str:
    """Return a name without what wrappers put in."""
    bare = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    return _OLD_DENSENET_NAME.sub(r"\1\2", bare)


def _renamed(state: State, expected: Mapping) -> State:
    """Return a state dict under the network's names where only wrappers differ."""
    ours = {_plain(name): name for name in expected}
    return {ours.get(_plain(name), name): value for name, value in state.items()}


def _readings(state: State, expected: Mapping) -> dict[str, State]:
    """Return each way in which a state dict gives a network all its values, by the prefix left out."""
    theirs, ours = ({_plain(name): name for name in names} for names in (state, expected))
    if len(theirs) < len(state) or len(ours) < len(expected):  # two names become one without wrappers
        theirs, ours = ({name: name for name in names} for names in (state, expected))
    longest = max((x for x in ours if not x.endswith(_EXTRAS)), key=len, default="")
    prefixes = [x.removesuffix(longest) for x in theirs if x == longest or x.endswith(f".{longest}")]
    readings, over = {}, set()
    for prefix in prefixes:
        values = {ours[x]: state[theirs[prefix + x]] for x in ours if prefix + x in theirs}
        if _is_whole(values, expected):
            readings[prefix.strip(".")] = values
            rest = (x.removeprefix(prefix) for x in theirs if x.startswith(prefix))
            over |= {prefix.strip(".") for x in rest if x not in ours and not x.endswith(_EXTRAS)}
    for prefix in _shared_prefixes(ours):
        values = {ours[prefix + x]: state[theirs[x]] for x in theirs if prefix + x in ours}
        if _is_whole(values, expected) and all(prefix + x in ours or x.endswith(_EXTRAS) for x in theirs):
            readings.setdefault("", values)
    return {} if readings.keys() == over else readings  # beside another reading it may be what is meant


def _shared_prefixes(names: Mapping[str, str]) -> list[str]:
    """Return the prefixes, each with its dot, that all names have."""
    parts = next(iter(names), "").split(".")[:-1]
    prefixes = [".".join(parts[:end]) + "." for end in range(1, len(parts) + 1)]
    return [x for x in prefixes if all(name.startswith(x) for name in names)]


def _is_whole(values: State, expected: Mapping) -> bool:
    """Tell whether values are all that a network needs, in its shapes."""
    given = {id(expected[name]) for name in values}  # tied weights may have been written once
    return not _differing(values, expected) and all(
        name in values or id(value) in given or name.endswith("num_batches_tracked")
        for name, value in expected.items()
    )


def _differing(values: State, expected: Mapping) -> list[str]:
    """Return the names of values that cannot stand where they would: of another shape or kind of number."""
    return [
        name
        for name, value in values.items()
        if torch.is_tensor(value)
        and torch.is_tensor(wanted := expected.get(name))
        and not isinstance(wanted, UninitializedTensorMixin)
        and (value.shape != wanted.shape or not _is_of_kind(value, _kind(wanted)))
    ]


def _is_of_kind(value: Tensor, kind: str) -> bool:
    """Tell whether values are numbers of a kind; real ones may be whole."""
    return _kind(value) == kind or (kind == "whole" and _kind(value) == "real")


def _kind(value: Tensor) -> str:
    if value.is_complex():
        return "complex"
    return "real" if value.is_floating_point() else "whole"


def _is_changed(value: object, wanted: object) -> bool:
    """Tell whether values are other whole numbers, or infinite, in the type of another tensor."""
    if not (torch.is_tensor(value) and torch.is_tensor(wanted)) or value.is_meta:
        return False
    if value.dtype == wanted.dtype:
        return False
    if _kind(wanted) == "whole":
        return bool((value.to(wanted.dtype).to(value.dtype) != value).any())
    if torch.finfo(wanted.dtype).max >= torch.finfo(value.dtype).max:
        return False
    return bool((value.to(wanted.dtype).isinf() & value.isfinite()).any())


def _misfit(source: str, states: Mapping[str, State], expected: Mapping) -> str:
    """Return the sentence that says where the nearest of state dicts and a network differ."""
    ours = {_plain(name): value for name, value in expected.items()}
    near = [
        {name.removeprefix(prefix): value for name, value in plain.items()}
        for plain in ({_plain(name): value for name, value in x.items()} for x in states.values())
        for prefix in ("", *_shared_prefixes(plain))
    ]
    theirs = max(near, key=lambda names: len(names.keys() & ours.keys()))
    missing = [x for x in ours if x not in theirs and not x.endswith("num_batches_tracked")]
    extra = [x for x in theirs if x not in ours and not x.endswith(_EXTRAS)]
    if missing and extra:
        return f"{source} does not fit the network: {_pairs(missing, extra)}."
    if missing:
        return f"{source} does not fit the network: it lacks {_listed(missing)}."
    if extra:
        return f"{source} does not fit the network, which has no {_listed(extra)}."
    differing = _differing(theirs, ours)
    said = [f"{x} is {_form(theirs[x], ours[x])} in the file, {_form(ours[x], theirs[x])} in the network"
            for x in differing]  # fmt: skip
    if not said:
        return f"{source} does not fit the network."
    more = f" (and {len(said) - _SHOWN} more)" if len(said) > _SHOWN else ""
    heads = len(differing) <= 2 and all(_differs_in_outputs(theirs[x], ours[x]) for x in differing)
    right = "build it for as many classes as the file has" if heads else "build the one it was saved from"
    return f"{source} does not fit the network: {'; '.join(said[:_SHOWN])}{more}; {right}."


def _differs_in_outputs(value: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors differ in the length of their first axis alone."""
    (first, *rest), (others_first, *others_rest) = (x.shape or (0,) for x in (value, other))
    return value.ndim == other.ndim and first != others_first and rest == others_rest


def _form(value: Tensor, other: Tensor) -> str:
    """Return a tensor's shape, or its type if that is what differs."""
    return str(tuple(value.shape)) if value.shape != other.shape else str(value.dtype)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _pairs(missing: list[str], extra: list[str]) -> str:
    """Return the three nearest pairs of a name that a file has and one that a network has."""
    scored = [(SequenceMatcher(None, x, y).ratio(), x, y) for x in missing[:60] for y in extra[:60]]
    scored.sort(key=lambda pair: pair[0], reverse=True)
    pairs = {}
    for score, ours, theirs in scored:
        if score > 0.5 and ours not in pairs and theirs not in pairs.values():
            pairs[ours] = theirs
    if not pairs:
        return f"it has {_listed(extra)} where the network has {_listed(missing)}"
    said = ", ".join(f"{theirs} where it has {ours}" for ours, theirs in list(pairs.items())[:_SHOWN])
    return f"the file has {said} ({len(missing)} names of the network's are not in it)"
