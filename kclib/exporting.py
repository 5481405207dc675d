"""The compressed model for other people's runtimes: ONNX that stays small, and torch's exported program."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from kclib import checks, files, kernels, quantization
from kclib.compression import expand
from kclib.errors import InvalidValueError, reason
from kclib.layers import ClusteredConv2d, Codebook, by_codebook, clustered

_INPUT, _OUTPUT = "image", "logits"
_FREE_BATCH = ({0: torch.export.Dim("batch")},)


def to_onnx(
    network: nn.Module, path: str | Path, shape: tuple[int, int, int], *, dense: bool = False
) -> Path:
    """Write a network as one ONNX file with a free batch dimension.

    Of each clustered convolution the file holds the indices, as uint8, uint16 or int32, and the codebook in
    the precision it is stored in; `Gather` and `Reshape` make the weight while the model runs. Optimisers
    would compute that once and keep the dense weight (constant folding, pytorch issue 108342). So each of
    these tensors first passes a `Slice` that begins at the smaller of the batch and 0: always the whole, but
    nothing that an optimiser can know.

    Parameters
    ----------
    network : torch.nn.Module
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
    exported = (expand(network) if dense else _gathering(network)).eval()
    with _explained():
        example = _example(network, shape)
        program = torch.onnx.export(
            exported, (example,), dynamo=True, optimize=False, verbose=False, external_data=False,
            input_names=[_INPUT], output_names=[_OUTPUT], dynamic_shapes=_FREE_BATCH,
        )  # fmt: skip
    graph = program.model_proto
    _guard(graph.graph, _stored_names(exported))
    for part in (*graph.graph.node, *graph.graph.value_info, graph.graph, graph):
        del part.metadata_props[:]  # where in the source each came from: more bytes than the small layers
    onnx.checker.check_model(graph)
    with files.replacing(path) as temporary:
        onnx.save(graph, temporary)
    return files.expanded(path)


def to_program(network: nn.Module, path: str | Path, shape: tuple[int, int, int]) -> Path:
    """Write the expanded network as a `torch.export` program with a free batch dimension.

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
        example = _example(network, shape)
        program = torch.export.export(expand(network).eval(), (example,), dynamic_shapes=_FREE_BATCH)
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


class _Stored(Codebook):
    """A codebook that keeps its values as a file does."""

    def __init__(self, codebook: Codebook):
        super().__init__(
            codebook.values.detach().cpu(), group=codebook.group, precision=codebook.precision,
            turned=codebook.turned, seed=codebook.seed,
        )  # fmt: skip
        self.dtype = codebook.values.dtype
        del self.values
        for part, value in quantization.store(codebook.values, codebook.precision).items():
            self.register_buffer(part, value.flatten(1) if part == "values" else value.float()[:, None])

    def table(self) -> Tensor:
        """Return the representatives, ``(K, kh * kw)``."""
        if self.precision in ("int8", "int4"):
            return self.values.float() * self.steps
        return self.values.to(self.dtype)


class _Gathering(ClusteredConv2d):
    """A clustered convolution whose indices have a standard type and are all decoded at once."""

    def __init__(self, module: ClusteredConv2d, codebook: _Stored, indices: Tensor):
        scales = module.scales
        if scales is not None:
            scales = nn.Parameter(scales.detach().to(quantization.scale_type(codebook.precision)))
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
    return kernels.copied(network, replaced)


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
