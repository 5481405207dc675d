"""Convolutions that keep packed indices and a shared codebook in place of weights."""

import functools
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from kclib._util import checks
from kclib.compression import _attributes, _code_convolution, _packing
from kclib.errors import InvalidValueError
from kclib.kmeans import symmetric

BLOCK_BYTES = 8 << 20
N_TURNS = 8
_LANES = 16  # libraries compute so many channels at once


class Codebook(nn.Module):
    """The representatives of one group, shared by all its layers.

    Parameters
    ----------
    values : torch.Tensor
        ``(K, kh, kw)``, in the network's floating type.
    group : str
        The group's name.
    precision : str
        How a file stores it (`_precisions.PRECISIONS`); the values are already rounded so.
    turned : bool
        Whether an index says, beside the representative, which of its 8 flips and rotations is meant.
    seed : int
        Of the clustering.
    """

    def __init__(self, values: Tensor, *, group: str, precision: str, turned: bool = False, seed: int = 0):
        super().__init__()
        self.group, self.precision, self.turned, self.seed = group, precision, turned, int(seed)
        self.values = nn.Parameter(values)
        turns = torch.from_numpy(symmetric.transforms(values.shape[1])) if turned else None
        self.register_buffer("turns", turns, persistent=False)

    @property
    def n_members(self) -> int:
        """Number of different indices."""
        return len(self.values) * (N_TURNS if self.turned else 1)

    @property
    def bits(self) -> int:
        """Bits of a fixed-width index."""
        return _packing.index_bits(self.n_members)

    def table(self) -> Tensor:
        """Return the representatives, ``(K, kh * kw)``."""
        return self.values.flatten(1)

    def forward(self, indices: Tensor) -> Tensor:
        """Return the kernels that int32 ``(n,)`` indices mean, ``(n, kh * kw)``."""
        values = self.table()
        if not self.turned:
            return F.embedding(indices, values)
        return F.embedding(indices >> 3, values).gather(1, self.turns.index_select(0, indices & 7))

    def extra_repr(self) -> str:
        """Describe it in one line."""
        shape = "×".join(map(str, self.values.shape))
        return f"{self.group!r}, {shape}, {self.precision}" + ", turned" * self.turned


class ClusteredConv2d(nn.Module):
    """A convolution, plain or transposed, that decodes its weight from packed indices while it runs.

    It is of the convolution's own class too and has its attributes; `_replacement.compress` gives it copies
    of the hooks, and of further parameters, buffers and modules. Only the weight is another: `weight` decodes
    it anew each time it is read, and cannot be set.

    Each forward decodes one block of output channels at a time, so that, beside the activations, it takes at
    most `block_bytes` above the packed layer (one channel if even that is larger). A layer that fits is one
    block, and its outputs are those of `_replacement.expand` to the bit. In several blocks they are too,
    unless the library behind `conv2d` chooses another order of summation for fewer channels (seen for one
    image of a few pixels on several threads, and for groups); then they differ in the last bits.

    Without gradients, on a CPU and in float32, a forward decodes nothing where that is faster: it convolves
    straight from the indices (`_code_convolution`). It leaves out what of the kernels only meets padding. Its
    outputs then differ from the expanded layer's by about 1e-6 of their largest. So it takes at most
    `block_bytes` for rows of the codebook, and half a MiB a thread (more from 2,048 input channels on).

    The attribute `way` is ``"faster"``, which chooses so. It may be set to ``"decoded"``, for answers of the
    expanded layer, or to ``"indices"``, for none to be decoded where that is possible.

    Parameters
    ----------
    convolution : torch.nn.Conv2d or torch.nn.ConvTranspose2d
        What it stands for. Its attributes are shared, not copied.
    codebook : Codebook
    indices : torch.Tensor
        uint8, packed (`_packing.pack`) into `codebook.bits` bits: output channels first, whatever the kind of
        convolution, then the input channels of their group.
    scales : torch.nn.Parameter, optional
        ``(n,)`` in the order of the indices.
    bias : torch.nn.Parameter, optional
    block_bytes : int
    """

    stands_for: type  # the class of the convolution
    way = "faster"
    __jit_unused_properties__ = ("n_kernels", "shape", "weight", "_fan_in")

    def __new__(cls, convolution=None, *_, **__):
        """Return an object of a class that is the convolution's too."""
        return object.__new__(cls if convolution is None else _also(cls, kind_of(convolution)))

    def __init__(self, convolution, codebook: Codebook, indices: Tensor, *, scales=None, bias=None,
                 block_bytes: int = BLOCK_BYTES):  # fmt: skip
        nn.Module.__init__(self)  # not its other class's, which would make a weight
        self.block_bytes = checks.check_whole("block_bytes", block_bytes, 1)
        self.codebook = codebook
        self.register_buffer("indices", indices)
        self.register_parameter("scales", scales)
        self.register_parameter("bias", bias)
        _attributes.give(self, _attributes.plain(convolution))

    def __reduce__(self):
        """Copy and pickle it by its two classes: that of both was made while the program ran."""
        return _bare, (self._alone, self.stands_for), self.__getstate__()

    def __prepare_scriptable__(self):
        """Refuse TorchScript, which would put what this returns into the network itself."""
        raise InvalidValueError(
            "torch.jit.script cannot read a clustered convolution; script compression.expand(network), "
            "or use torch.jit.trace, torch.export or torch.compile."
        )

    def reset_parameters(self) -> None:
        """Refuse to draw a weight."""
        raise InvalidValueError(
            "a clustered convolution has no weight to draw anew; expand the network first."
        )

    @property
    def n_kernels(self) -> int:
        """Number of 2D kernels."""
        return self.out_channels * self._fan_in

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the weight that the indices stand for, as torch stores it."""
        if self.transposed:
            return (self.in_channels, self.out_channels // self.groups, *self.kernel_size)
        return (self.out_channels, self._fan_in, *self.kernel_size)

    @property
    def _fan_in(self) -> int:
        return self.in_channels // self.groups

    def members(self) -> np.ndarray:
        """Return the indices, int32 ``(n,)``, unpacked."""
        return self._unpacked(0, self.n_kernels).cpu().numpy()

    @property
    def weight(self) -> Tensor:
        """The dense weight, in the shape torch stores it, decoded anew; what is written to it is lost."""
        if isinstance(self.codebook.values, fx.Proxy):
            raise InvalidValueError(
                "torch.fx cannot follow a forward that reads the weight of a clustered convolution; "
                "trace compression.expand(network) instead."
            )
        return self._decoded(0, self.out_channels)

    def forward(self, x: Tensor, output_size=None) -> Tensor:
        """Convolve ``(b, in, h, w)`` or ``(in, h, w)``; `output_size` as in `torch.nn.ConvTranspose2d`."""
        if isinstance(x, fx.Proxy):  # torch.fx sees one module, as it does of every convolution
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x, output_size), {})
        if not torch.compiler.is_compiling():
            answer = _code_convolution.answered(self, x)
            if answer is not None:
                return answer
        padding, grown = self.padding, None
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        if self.transposed:
            grown = nn.ConvTranspose2d._output_padding(
                self, x, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
            )
        parts = [self._convolved(x, first, last, padding, grown) for first, last in self.blocks()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-3)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield the ranges of output channels that are decoded together."""
        item, area = self.codebook.values.element_size(), self.kernel_size[0] * self.kernel_size[1]
        copies = 1 + (self.scales is not None) + (self.transposed and self.groups > 1)
        kernel = 4 + area * (item * copies + (8 + item) * self.codebook.turned)
        fits = max(1, self.block_bytes // (kernel * self._fan_in))
        group = self.out_channels // self.groups
        if fits >= group:
            yield from _cut(0, self.out_channels, fits // group * group)
        else:
            for first in range(0, self.out_channels, group):
                yield from _cut(first, first + group, fits // _LANES * _LANES or fits)

    def _convolved(self, x: Tensor, first: int, last: int, padding, grown) -> Tensor:
        weight = self._decoded(first, last)
        bias = None if self.bias is None else self.bias[first:last]
        group = self.out_channels // self.groups
        n_groups = max(1, (last - first) // group)
        if n_groups < self.groups:
            x = x.narrow(-3, first // group * self._fan_in, n_groups * self._fan_in)
        if self.transposed:
            return F.conv_transpose2d(x, weight, bias, self.stride, padding, grown, n_groups, self.dilation)
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, n_groups)

    def _unpacked(self, start: int, count: int) -> Tensor:
        return _packing.unpack(self.indices, self.codebook.bits, start, count)

    def _decoded(self, first: int, last: int) -> Tensor:
        """Return the weight of the output channels `first` to `last`, whole groups or within one."""
        start, count = first * self._fan_in, (last - first) * self._fan_in
        rows = self.codebook(self._unpacked(start, count))
        if self.scales is not None:
            rows = self.scales[start : start + count, None].to(rows.dtype) * rows
        weight = rows.reshape(last - first, self._fan_in, *self.kernel_size)
        if not self.transposed:
            return weight
        n_groups = max(1, (last - first) * self.groups // self.out_channels)
        weight = weight.reshape(n_groups, -1, self._fan_in, *self.kernel_size).transpose(1, 2)
        return weight.reshape(n_groups * self._fan_in, -1, *self.kernel_size)

    def extra_repr(self) -> str:
        """Describe it in one line."""
        scaled = ", scaled" * (self.scales is not None)
        return f"{self.shape}, transposed={self.transposed}, {self.codebook.bits} bits a kernel{scaled}"


def kind_of(convolution: nn.Module) -> type:
    """Return a convolution's class without what torch's parametrizations, or indices, made of it."""
    if isinstance(convolution, ClusteredConv2d):
        return convolution.stands_for
    return parametrize.type_before_parametrizations(convolution)


@functools.cache
def _also(cls: type, kind: type) -> type:
    """Return the class of what is clustered and a convolution of a kind."""
    return type(cls.__name__, (cls, kind), {"stands_for": kind, "_alone": cls, "__module__": cls.__module__})


def _bare(cls: type, kind: type) -> ClusteredConv2d:
    return object.__new__(_also(cls, kind))


def clustered(network: nn.Module) -> dict[str, ClusteredConv2d]:
    """Return the clustered convolutions of a network by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, ClusteredConv2d)}


def by_codebook(network: nn.Module) -> list[tuple[Codebook, dict[str, ClusteredConv2d]]]:
    """Return each codebook of a network with the clustered convolutions it serves, by name.

    Of several that share their indices, only the first.
    """
    seen, groups = set(), {}
    for name, module in clustered(network).items():
        _, members = groups.setdefault(id(module.codebook), (module.codebook, {}))
        if id(module.indices) not in seen:
            members[name] = module
            seen.add(id(module.indices))
    return list(groups.values())


def _cut(first: int, last: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(last, start + step)) for start in range(first, last, step)]
