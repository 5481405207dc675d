"""Convolutions straight from packed indices, for inference: the weight is never made.

A 2D kernel becomes a row of 16 numbers, and so does each place of the image; the rows are multiplied number
by number and summed over the input channels. So a codebook's rows are made once, its cache holds them, and
an index costs one multiplication of vectors for each place, whatever the weight's bytes.

For kernels of 3×3 with stride 1 the numbers are those of Winograd's minimal filtering F(2×2, 3×3) (Lavin and
Gray 2016, *Fast Algorithms for Convolutional Neural Networks*), where a place is four pixels of the answer.
For others they are the values of the kernel and of the pixels under it, in as many rows as these need.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from kclib._util.compiled import njit
from kclib.compression import _packing

LANES = 16
OUTPUTS = 6  # channels of the answer that one loop computes, and places: so many sums stay in registers
PLACES = 4
_CACHED = 1 << 19  # bytes of a block of places
# Nanoseconds: to multiply a kernel's vector for one place, to make a row of the codebook and a value of a
# place; to decode a kernel, and each of its values, and to convolve with one value for one pixel.
_MULTIPLY, _ROW, _PLACE = 0.4, 4.0, 0.8
_DECODE, _DECODE_VALUE, _DENSE = 3.0, 0.25, 0.0175
# Sums in any order; but images may hold NaN.
_FAST = {"reassoc", "contract"}
_NUMBERS = {"dtype": torch.float32, "device": "cpu"}  # whatever the program's defaults are
_KERNEL = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], **_NUMBERS)
_KERNELS = torch.kron(_KERNEL, _KERNEL).T


@dataclass(frozen=True)
class Plan:
    """How a layer is convolved from its indices, for images of one shape.

    Attributes
    ----------
    winograd : bool
        Whether by minimal filtering.
    shape : tuple of int
        Images, height and width of the answer.
    grid : tuple of int
        Places down and across, of each image.
    n_places : int
        Of all images.
    padding : tuple of int
        Pixels to the left, right, top and bottom of an image that the layer's own padding adds.
    more : tuple of int
        Pixels to the right and at the bottom that complete the last places.
    geometry : tuple
        Height and width of the pixels that make a place, their steps and their dilation.
    seconds : tuple of float
        What convolving so takes on one thread, and what decoding and convolving takes, as far as can be told.
    """

    winograd: bool
    shape: tuple[int, int, int]
    grid: tuple[int, int]
    n_places: int
    padding: tuple[int, int, int, int]
    more: tuple[int, int]
    geometry: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    seconds: tuple[float, float]


def planned(layer, x: Tensor) -> Plan | None:
    """Return how to convolve images straight from a layer's indices; None if its forward must decode.

    It must where something else than numbers is asked of torch, such as gradients; for layers that are
    transposed, turned, scaled or in groups; for other dtypes and devices; and where decoding is faster.

    Parameters
    ----------
    layer : ClusteredConv2d
    x : torch.Tensor
        What is given to its forward.
    """
    if _is_followed():  # first: who traces notes what is asked of a tensor
        return None
    if layer.transposed or layer.groups != 1 or layer.scales is not None or layer.codebook.turned:
        return None
    values, bias, indices = layer.codebook.values, layer.bias, layer.indices
    if not (_is_plain(x) and _is_plain(values) and (bias is None or _is_plain(bias)) and indices.is_cpu):
        return None
    rows_bytes = 4 * LANES * -(-layer.kernel_size[0] * layer.kernel_size[1] // LANES) * values.shape[0]
    if rows_bytes > layer.block_bytes:
        return None
    if x.ndim not in (3, 4) or x.shape[-3] != layer.in_channels or not x.numel():
        return None
    plan = plan_of(layer, x)
    return plan if plan is not None and is_faster(plan) else None


def is_faster(plan: Plan) -> bool:
    """Tell whether convolving from indices is expected to take clearly less time than decoding them.

    It takes one thread. Those of torch win less than their number where pixels are few.
    """
    return plan.seconds[0] * (1 + torch.get_num_threads() / 4) < plan.seconds[1]


def plan_of(layer, x: Tensor) -> Plan | None:
    """Return how to convolve images from indices; None if the answer is empty."""
    shape = x.shape if x.ndim == 4 else (1, *x.shape)
    n_rows, channels = layer.codebook.values.shape[0], (layer.in_channels, layer.out_channels)
    sides = layer.kernel_size, layer.stride, layer.dilation, layer._reversed_padding_repeated_twice
    return _plan((shape[0], shape[2], shape[3]), channels, n_rows, *map(tuple, sides))


@functools.lru_cache(4096)
def _plan(images, channels, n_rows, kernel_size, stride, dilation, padding) -> Plan | None:
    left, right, top, bottom = padding
    sides = (images[1] + top + bottom, images[2] + left + right)
    reach = [d * (size - 1) for d, size in zip(dilation, kernel_size, strict=True)]
    answer = [(side - r - 1) // step + 1 for side, r, step in zip(sides, reach, stride, strict=True)]
    if min(answer) <= 0:
        return None
    winograd = kernel_size == (3, 3) and stride == dilation == (1, 1)
    tile = 2 if winograd else 1
    grid = tuple(-(-side // tile) for side in answer)
    geometry = ((4, 4), (2, 2), (1, 1)) if winograd else (kernel_size, stride, dilation)
    n_places = images[0] * grid[0] * grid[1]
    area, n_kernels = kernel_size[0] * kernel_size[1], channels[0] * channels[1]
    parts = 1 if winograd else -(-area // LANES)
    straight = (
        n_kernels * _MULTIPLY * parts * n_places + _ROW * n_rows + _PLACE * area * n_places * sum(channels)
    )
    decoded = n_kernels * (_DECODE + _DECODE_VALUE * area + _DENSE * area * images[0] * answer[0] * answer[1])
    return Plan(
        winograd=winograd,
        shape=(images[0], *answer),
        grid=grid,
        n_places=n_places,
        padding=padding,
        more=(grid[1] * tile - answer[1], grid[0] * tile - answer[0]),
        geometry=geometry,
        seconds=(1e-9 * straight, 1e-9 * decoded),
    )


def convolved(layer, x: Tensor, plan: Plan) -> Tensor:
    """Return the answer of a clustered convolution, to about 1e-6 of its scale that of the dense one.

    What an image is answered depends neither on the others of its batch nor on the number of threads: one
    computes it, since a second one that has to be woken wins nothing, and disturbs those of torch. What is
    not finite makes NaN of all four pixels of a place.

    Parameters
    ----------
    layer : ClusteredConv2d
    x : torch.Tensor
        float32 ``(b, in, h, w)`` or ``(in, h, w)``.
    plan : Plan
        Made for them.

    Returns
    -------
    torch.Tensor
        float32 ``(b, out, h, w)`` or ``(out, h, w)``, in the layout of `x`.
    """
    images = _padded(layer, x if x.ndim == 4 else x[None], plan)
    table = layer.codebook.values.detach().flatten(1)
    bits = _packing.index_bits(len(table))
    rows = table @ _KERNELS if plan.winograd else F.pad(table, (0, -table.shape[1] % LANES))
    bias = torch.zeros(layer.out_channels, **_NUMBERS) if layer.bias is None else layer.bias.detach()
    answer = torch.empty(plan.shape[0], layer.out_channels, *plan.shape[1:], **_NUMBERS)
    arrays = images, layer.indices, rows.contiguous(), bias.contiguous(), answer
    images, packed, rows, bias, written = (value.numpy() for value in arrays)

    how = plan.grid, plan.geometry, plan.winograd
    if not _answer(images, *how, packed, bits, rows, bias, plan.n_places, written):
        raise IndexError("an index is beyond the codebook's end.")
    if x.ndim == 3:
        return answer[0]
    is_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return answer.contiguous(memory_format=torch.channels_last) if is_last else answer


def _padded(layer, x: Tensor, plan: Plan) -> Tensor:
    """Return images with the padding of a layer, and zeros that complete the last places."""
    (left, right, top, bottom), x = plan.padding, x.detach()
    if layer.padding_mode != "zeros":
        x = F.pad(x, plan.padding, mode=layer.padding_mode)
        left = right = top = bottom = 0
    return F.pad(x, (left, right + plan.more[0], top, bottom + plan.more[1])).contiguous()


def _is_plain(value: Tensor) -> bool:
    """Tell whether a tensor is one of numbers in memory that numpy can read, and wants no gradient."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.dtype == torch.float32
        and value.is_cpu
        and value.layout == torch.strided
        and not value.is_neg()
        and not (value.requires_grad and torch.is_grad_enabled())
    )


def _is_followed() -> bool:
    """Tell whether something looks at the operators of torch, or changes them."""
    return (
        torch.jit.is_tracing()
        or torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


@njit(nogil=True, cache=True, fastmath=_FAST)
def _answer(x, grid, geometry, winograd, packed, bits, rows, bias, n_places, answer):
    """Write an answer; return False if an index has no row.

    Places are taken in blocks whose numbers stay in the cache while all output channels are computed.
    """
    n_inputs, parts, n_rows = x.shape[1], rows.shape[1] // LANES, len(rows)
    length = n_inputs * parts
    step = max(PLACES, _CACHED // (4 * LANES * length) // PLACES * PLACES)
    numbers = np.zeros(min(step, n_places) * length * LANES, np.float32)
    indices = np.zeros(OUTPUTS * n_inputs, np.int32)
    codes = indices if parts == 1 else np.zeros(OUTPUTS * length, np.int32)
    sums, four = np.empty(OUTPUTS * PLACES * LANES, np.float32), np.empty(4, np.float32)
    height, width = answer.shape[2:]
    for start in range(0, n_places, step):
        end = min(start + step, n_places)
        _place(x, grid, geometry, winograd, parts, start, end, numbers)
        for output in range(0, answer.shape[1], OUTPUTS):
            n_outputs = min(OUTPUTS, answer.shape[1] - output)
            _packing._unpack(packed, bits, output * n_inputs, indices[: n_outputs * n_inputs])
            highest = np.int32(0)
            for index in indices:
                highest = max(highest, index)
            if highest >= n_rows:
                return False
            if parts > 1:
                for i in range(len(indices)):
                    for part in range(parts):
                        codes[i * parts + part] = indices[i] * parts + part
            for group in range(start, end, PLACES):
                together, first = min(PLACES, end - group), (group - start) * length * LANES
                if together == 4:
                    _multiply(rows, codes, length, numbers, first, sums, 4)
                elif together == 3:
                    _multiply(rows, codes, length, numbers, first, sums, 3)
                elif together == 2:
                    _multiply(rows, codes, length, numbers, first, sums, 2)
                else:
                    _multiply(rows, codes, length, numbers, first, sums, 1)
                for k in range(together):
                    image, place = divmod(group + k, grid[0] * grid[1])
                    row, column = divmod(place, grid[1])
                    for i in range(n_outputs):
                        own = (i * together + k) * LANES
                        if winograd:
                            _sum_tile(sums, own, four)
                            for pixel in range(4):
                                down, across = 2 * row + pixel // 2, 2 * column + pixel % 2
                                if down < height and across < width:
                                    answer[image, output + i, down, across] = four[pixel] + bias[output + i]
                        else:
                            total = np.float32(0)
                            for lane in range(LANES):
                                total += sums[own + lane]
                            answer[image, output + i, row, column] = total + bias[output + i]
    return True


@njit(nogil=True, cache=True)
def _place(x, grid, geometry, winograd, parts, start, end, numbers):
    """Write the numbers of the places `start` to `end`: for each four of them, channel by channel."""
    window, stride, dilation = geometry
    n_inputs = x.shape[1]
    height, width = x.shape[2:]
    flat = x.reshape(-1)
    for place in range(start, end):
        image, within = divmod(place, grid[0] * grid[1])
        row, column = divmod(within, grid[1])
        top, left = row * stride[0], column * stride[1]
        group = (place - start) // PLACES * PLACES
        together = min(PLACES, end - start - group)
        first = (group * n_inputs * parts + place - start - group) * LANES
        for channel in range(n_inputs):
            to = first + channel * parts * together * LANES
            if winograd:
                at = ((image * n_inputs + channel) * height + top) * width + left
                _filter_tile(flat, at, width, numbers, to)
            else:
                number = 0
                for i in range(window[0]):
                    for j in range(window[1]):
                        value = x[image, channel, top + i * dilation[0], left + j * dilation[1]]
                        numbers[to + number // LANES * together * LANES + number % LANES] = value
                        number += 1


@intrinsic(prefer_literal=True)
def _multiply(typing_context, rows, codes, length, places, start, sums, n_places):
    """Write into `sums` those of OUTPUTS × `n_places` products of rows over `length` codes.

    Compiled from arrays, a loop loads and stores its sums at each step. Here they are LLVM's vectors, which
    stay in registers; where a machine has none of 16 numbers, LLVM takes several.
    """
    signature = types.void(rows, codes, types.intp, places, types.intp, sums, n_places)
    together = n_places.literal_value

    def generate(context, builder, signature, arguments):
        index, number = ir.IntType(64), ir.FloatType()
        vector = ir.VectorType(number, LANES)

        rows, codes, places, sums = (_data(context, builder, signature, arguments, k) for k in (0, 1, 3, 5))
        places = builder.gep(places, [arguments[4]])
        rows, places, sums = (builder.bitcast(each, vector.as_pointer()) for each in (rows, places, sums))
        length = arguments[2]
        before = builder.basic_block
        loop, after = builder.append_basic_block("loop"), builder.append_basic_block("after")
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(index)
        totals = [builder.phi(vector) for _ in range(OUTPUTS * together)]
        first = builder.mul(step, index(together))
        seen = [
            builder.load(builder.gep(places, [builder.add(first, index(k))]), align=4)
            for k in range(together)
        ]
        added = []
        for output in range(OUTPUTS):
            where = builder.add(step, builder.mul(length, index(output)))
            code = builder.zext(builder.load(builder.gep(codes, [where])), index)
            row = builder.load(builder.gep(rows, [code]), align=4)
            for value in seen:
                product = builder.fmul(row, value, flags=["contract"])
                added.append(builder.fadd(totals[len(added)], product, flags=["contract"]))
        following = builder.add(step, index(1))
        step.add_incoming(index(0), before)
        step.add_incoming(following, loop)
        for total, value in zip(totals, added, strict=True):
            total.add_incoming(ir.Constant(vector, [0.0] * LANES), before)
            total.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, length), loop, after)
        builder.position_at_end(after)
        for place, value in enumerate(added):
            builder.store(value, builder.gep(sums, [index(place)]), align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _filter_tile(typing_context, x, at, width, numbers, to):
    """Write the 16 numbers of a tile of 4×4 pixels, ``B'dB``, into `numbers`."""
    signature = types.void(x, types.intp, types.intp, numbers, types.intp)

    def generate(context, builder, signature, arguments):
        x, numbers = (_data(context, builder, signature, arguments, k) for k in (0, 3))
        index, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), 4)
        starts = [builder.add(arguments[1], builder.mul(arguments[2], index(i))) for i in range(4)]
        a, b, c, d = (_load(builder, x, start, vector) for start in starts)
        rows = builder.fsub(a, c), builder.fadd(b, c), builder.fsub(c, b), builder.fsub(b, d)
        for i, row in enumerate(rows):
            first, second = _chosen(builder, row, row, 0, 1, 2, 1), _chosen(builder, row, row, 2, 2, 1, 3)
            value = _plus(builder, first, second, "-+--")
            _store(builder, value, numbers, builder.add(arguments[4], index(4 * i)))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _sum_tile(typing_context, sums, at, four):
    """Write the 2×2 pixels that 16 sums mean, ``A'mA``, into `four`."""
    signature = types.void(sums, types.intp, four)

    def generate(context, builder, signature, arguments):
        sums, four = (_data(context, builder, signature, arguments, k) for k in (0, 2))
        index, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), 4)
        starts = [builder.add(arguments[1], index(4 * i)) for i in range(4)]
        a, b, c, d = (_load(builder, sums, start, vector) for start in starts)
        upper, lower = builder.fadd(builder.fadd(a, b), c), builder.fsub(builder.fsub(b, c), d)
        first, second, third = (_chosen(builder, upper, lower, k, k + 1, k + 4, k + 5) for k in range(3))
        value = _plus(builder, _plus(builder, first, second, "+-+-"), third, "+-+-")
        _store(builder, value, four, index(0))
        return context.get_dummy_value()

    return signature, generate


def _data(context, builder, signature, arguments, place):
    """Return the pointer to the numbers of an array."""
    return context.make_array(signature.args[place])(context, builder, arguments[place]).data


def _load(builder, array, at, vector):
    return builder.load(builder.bitcast(builder.gep(array, [at]), vector.as_pointer()), align=4)


def _store(builder, value, array, at):
    builder.store(value, builder.bitcast(builder.gep(array, [at]), value.type.as_pointer()), align=4)


def _chosen(builder, first, second, *places):
    """Return the numbers at four places of two vectors of four."""
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(ir.IntType(32), 4), list(places)))


def _plus(builder, first, second, signs):
    """Return a sum of vectors of four; the numbers of the second are taken with these signs."""
    signs = ir.Constant(first.type, [1.0 if sign == "+" else -1.0 for sign in signs])
    return builder.fadd(first, builder.fmul(second, signs, flags=["contract"]), flags=["contract"])
