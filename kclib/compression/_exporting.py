"""The compressed model for other people's runtimes: ONNX that stays small, and torch's exported program."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from kclib._util import checks, files
from kclib.compression import _precisions
from kclib.compression._attributes import swapped
from kclib.compression._layers import ClusteredConv2d, Codebook, by_codebook, clustered
from kclib.compression._replacement import expanded
from kclib.errors import InvalidValueError, reason
from kclib.models import Model, input_shape, network_of

_INPUT, _OUTPUT = "image", "logits"
_FREE_BATCH = ({0: torch.export.Dim("batch")},)


def export(
    model: Model | nn.Module,
    path: str | Path,
    *,
    shape: tuple[int, int, int] | None = None,
    dense: bool = False,
) -> Path:
    """Write a network for other runtimes: as ONNX, or as a `torch.export` program.

    Parameters
    ----------
    model : Model or torch.nn.Module
        Compressed or not.
    path : path
        Ends in ``.onnx``, or in ``.pt2`` for the program, which is dense.
    shape : (int, int, int), optional
        Channels, height and width of an image; by default the model's own, where it is known.
    dense : bool
        Whether the ONNX file holds dense weights in place of indices and codebooks.

    Raises
    ------
    InvalidValueError
        Another suffix; a shape that is not known; torch cannot export this network.
    StorageError

    Examples
    --------
    >>> import kclib, tempfile, torch
    >>> network = torch.nn.Conv2d(64, 64, 3)
    >>> small = kclib.compress(network, kclib.cluster(network, 16))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = kclib.export(small, f"{folder}/small.onnx", shape=(64, 8, 8))
    ...     path.stat().st_size < network.weight.nbytes / 10
    True
    """
    kind, shape = kind_of(path), shape or input_shape(model)
    return to_onnx(model, path, shape, dense=dense) if kind == ".onnx" else to_program(model, path, shape)


def kind_of(path: str | Path) -> str:
    """Return ``.onnx`` or ``.pt2``, as the path ends; a stream is ONNX.

    Raises
    ------
    InvalidValueError
        Another suffix.
    """
    kind = Path(path).suffix or (".onnx" if files.is_stream(path) else "")
    if kind not in (".onnx", ".pt2"):
        raise InvalidValueError(f"{path} ends in {Path(path).suffix!r}; it must end in .onnx or .pt2.")
    return kind


def to_onnx(
    network: Model | nn.Module, path: str | Path, shape: tuple[int, int, int], *, dense: bool = False
) -> Path:
    """Write a network as one ONNX file with a free batch dimension.

    The input is ``image``. The output is ``logits``; of several, each has its name in the answer (the key of
    a mapping, the field of a named tuple or dataclass), or is ``logits``, ``output_1`` and so on in a tuple.
    What wraps the whole network (`DataParallel`, `torch.compile`) is left out.

    Of each clustered convolution the file holds the indices, as uint8, uint16 or int32, and the codebook in
    the precision it is stored in; `Gather` and `Reshape` make the weight while the model runs. Optimisers
    would compute that once and keep the dense weight (constant folding, pytorch issue 108342). So each of
    these tensors first passes a `Slice` that begins at the smaller of the batch and 0: always the whole, but
    nothing that an optimiser can know.

    Parameters
    ----------
    network : Model or torch.nn.Module
        Compressed or not.
    path : path
    shape : (int, int, int)
        Channels, height and width of an image.
    dense : bool
        Whether to write the expanded network.

    Raises
    ------
    InvalidValueError
        torch cannot export this network, or not for images of this shape.
    StorageError
    """
    network = _unwrapped(network_of(network))
    exported = (expanded(network) if dense else _gathering(network)).cpu().eval()
    with _explained():
        example = _example(network, shape)
        names = _answering_flatly(exported, example)
        program = torch.onnx.export(
            exported, (example,), dynamo=True, optimize=False, verbose=False, external_data=False,
            input_names=[_INPUT], output_names=names, dynamic_shapes=_FREE_BATCH,
        )  # fmt: skip
    graph = program.model_proto
    _guard(graph.graph, _stored_names(exported))
    for part in (*graph.graph.node, *graph.graph.value_info, graph.graph, graph):
        del part.metadata_props[:]  # where in the source each came from: more bytes than the small layers
    onnx.checker.check_model(graph)
    with files.replacing(path) as temporary:
        onnx.save(graph, temporary)
    return files.expanded(path)


def to_program(network: Model | nn.Module, path: str | Path, shape: tuple[int, int, int]) -> Path:
    """Write the expanded network as a `torch.export` program with a free batch dimension.

    It answers a tensor, or several in a dict, named as in `to_onnx`.

    Parameters
    ----------
    network, path, shape
        As in `to_onnx`.

    Raises
    ------
    InvalidValueError
        torch cannot export this network, or not for images of this shape.
    StorageError
    """
    with _explained():
        network = _unwrapped(network_of(network))
        exported, example = expanded(network).cpu().eval(), _example(network, shape)
        _answering_flatly(exported, example)
        program = torch.export.export(exported, (example,), dynamic_shapes=_FREE_BATCH)
    with files.replacing(path) as temporary, open(temporary, "wb") as file:
        torch.export.save(program, file)
    return files.expanded(path)


@contextmanager
def _explained() -> Iterator[None]:
    """Say in one sentence what torch's exporter says in a page."""
    try:
        yield
    except InvalidValueError:
        raise
    except Exception as error:  # whatever the network's own code raises while it is traced
        cause = error.__cause__ or error
        raise InvalidValueError(
            f"torch could not export the network for images of this shape ({reason(cause)})."
        ) from error


def _example(network: nn.Module, shape: tuple[int, int, int]) -> Tensor:
    if not isinstance(shape, (tuple, list)) or len(shape) != 3:
        raise InvalidValueError(f"the shape of images is {shape!r}; it must be (channels, height, width).")
    for name, value in zip(("channels", "height", "width"), shape, strict=True):
        checks.check_whole(name, value, 1)
    return torch.zeros(2, *shape, dtype=next((x.dtype for x in network.parameters()), None))


def _unwrapped(network: nn.Module) -> nn.Module:
    """Return a network without what only says how it runs: on several devices, or compiled."""
    while True:
        if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            network = network.module
        elif type(network).__name__ == "OptimizedModule":  # naming its class would import the compiler
            network = network._orig_mod
        else:
            return network


def _answering_flatly(network: nn.Module, example: Tensor) -> list[str]:
    """Let a network of ours, in place, answer a tensor or a dict of tensors; return their names."""
    forward = network.forward

    def flat(image: Tensor) -> Tensor | dict[str, Tensor]:
        parts = dict(_named(forward(image), ""))
        parts = {name: part.clone() if part is image else part for name, part in parts.items()}
        return parts[_OUTPUT] if list(parts) == [_OUTPUT] else parts

    network.forward = flat
    with torch.no_grad():
        answer = network(example)
    if isinstance(answer, Tensor):
        return [_OUTPUT]
    if not answer:
        raise InvalidValueError("the network answers no tensor; only what answers some can be exported.")
    return list(answer)


def _named(answer: object, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of an answer with names."""
    if torch.is_tensor(answer):
        yield name or _OUTPUT, answer
        return
    if is_dataclass(answer) and not isinstance(answer, Mapping):
        parts = {field.name: getattr(answer, field.name) for field in fields(answer)}
    elif isinstance(answer, Mapping):
        parts = answer
    elif isinstance(answer, tuple) and hasattr(answer, "_fields"):
        parts = answer._asdict()
    elif isinstance(answer, (tuple, list)):
        parts = {str(i): part for i, part in enumerate(answer)}
        if not name:
            parts = {f"output_{i}" if i else _OUTPUT: part for i, part in enumerate(answer)}
    else:
        return
    for key, part in parts.items():
        yield from _named(part, f"{name}_{key}" if name else str(key))


class _Stored(Codebook):
    """A codebook that keeps its values as a file does."""

    def __init__(self, codebook: Codebook):
        super().__init__(
            codebook.values.detach().cpu(), group=codebook.group, precision=codebook.precision,
            turned=codebook.turned, seed=codebook.seed,
        )  # fmt: skip
        self.dtype = codebook.values.dtype
        del self.values
        for part, value in _precisions.store(codebook.values, codebook.precision).items():
            self.register_buffer(part, value.flatten(1) if part == "values" else value.float()[:, None])

    def table(self) -> Tensor:
        """Return the representatives, ``(K, kh * kw)``."""
        if self.precision in ("int8", "int4"):
            return self.values.float() * self.steps
        return self.values.to(self.dtype)


class _Gathering(ClusteredConv2d):
    """A clustered convolution whose indices have a standard type and are all decoded at once."""

    way = "decoded"  # its indices are not packed

    def __init__(self, module: ClusteredConv2d, codebook: _Stored, indices: Tensor):
        scales = module.scales
        if scales is not None:
            scales = nn.Parameter(scales.detach().to(_precisions.scale_type(codebook.precision)))
        super().__init__(module, codebook, indices, scales=scales, bias=module.bias, block_bytes=1 << 62)

    def _unpacked(self, start: int, count: int) -> Tensor:
        return self.indices.to(torch.int32)


def _gathering(network: nn.Module) -> nn.Module:
    """Return a copy of a compressed network that computes its weights from standard types."""
    replaced, indices = {}, {}
    for codebook, _ in by_codebook(network):
        stored = _Stored(codebook)
        kind = next(x for x in (torch.uint8, torch.uint16, torch.int32) if codebook.bits <= 8 * x.itemsize)
        for module in clustered(network).values():
            if module.codebook is codebook:
                key = id(module.indices)
                if key not in indices:
                    indices[key] = torch.from_numpy(module.members()).to(kind)
                replaced[id(module)] = _Gathering(module, stored, indices[key])
    return swapped(network, replaced)


def _stored_names(network: nn.Module) -> set[str]:
    """Return the names, in the exported graph, of what must not be folded away."""
    return {
        f"{name}.{leaf}".lstrip(".")
        for name, module in network.named_modules(remove_duplicate=False)
        if isinstance(module, _Gathering)
        for leaf in ("indices", "scales", "codebook.values", "codebook.steps", "codebook.turns")
    }


def _guard(graph: onnx.GraphProto, names: set[str]) -> None:
    """Pass the named initializers through a `Slice` that no optimiser can compute beforehand."""
    guarded = [tensor for tensor in graph.initializer if tensor.name in names]
    if not guarded:
        return
    constants = {"guard_zero": 0, "guard_end": np.iinfo(np.int64).max}
    graph.initializer.extend(
        onnx.numpy_helper.from_array(np.array([value]), name) for name, value in constants.items()
    )
    nodes = [
        onnx.helper.make_node("Shape", [_INPUT], ["guard_batch"], start=0, end=1),
        onnx.helper.make_node("Min", ["guard_batch", "guard_zero"], ["guard_start"]),
    ]
    for tensor in guarded:
        live = f"{tensor.name}_live"
        for node in graph.node:
            node.input[:] = [live if name == tensor.name else name for name in node.input]
        inputs = [tensor.name, "guard_start", "guard_end", "guard_zero"]
        nodes.append(onnx.helper.make_node("Slice", inputs, [live]))
    old = list(graph.node)
    del graph.node[:]
    graph.node.extend(nodes + old)
