"""Convolutions straight from packed indices, for inference: the weight is never made.

A 2D kernel becomes a row of 16 numbers, and so does each place of the image; the rows are multiplied number
by number and summed over the input channels. So a codebook's rows are made once, its cache holds them, and
an index costs one multiplication of vectors for each place, whatever the weight's bytes.

For kernels of 3×3 with stride 1 the numbers are those of Winograd's minimal filtering F(2×2, 3×3) (Lavin and
Gray 2016, *Fast Algorithms for Convolutional Neural Networks*), where a place is four pixels of the answer.
For others they are the values of the kernel and of the pixels under it, in as many rows as these need.

Values of a kernel that only meet padding are left out: of 3×3 on an image of one pixel, all but one. Then it
may be faster to decode those that remain.
"""

import ctypes
import functools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic
from torch import Tensor
from torch.nn.modules.utils import _pair

from kclib._util import openmp
from kclib._util.compiled import cfunc, njit
from kclib.compression import _packing
from kclib.errors import UnknownNameError

LANES = 16
OUTPUTS = 6  # channels of the answer that one loop computes, and places: so many sums stay in registers
PLACES = 4
_CACHED = 1 << 19  # bytes of a block of places
# Where threads write into what they are told, and how many numbers that is.
_TAKEN, _WRITTEN, _BEYOND, _TOLD = 0, 1, 2, 27
WAYS = ("faster", "indices", "decoded")
# Nanoseconds: to make a row of the codebook; to unpack an index, to multiply a kernel's vector for one place,
# and to make a value of a place; to decode a kernel, and each of its values, and to convolve with one value
# for one pixel.
_ROW, _UNPACK, _MULTIPLY, _PLACE = 4.0, 0.4, 0.4, 0.8
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
    taps : tuple of slice
        Rows and columns of a kernel that meet pixels.
    is_cropped : bool
        Whether some do not.
    padding : tuple of int
        Pixels to the left, right, top and bottom of an image that these need beside it; below 0, too many.
    more : tuple of int
        Pixels to the right and at the bottom that complete the last places.
    geometry : tuple
        Height and width of the pixels that make a place, their steps and their dilation.
    seconds : tuple of tuple of float
        What convolving so takes, and what decoding these taps and convolving takes, as far as can be told:
        on one thread, and what threads share.
    way : {"indices", "cropped"}
        Straight, or by decoding these taps.
    """

    winograd: bool
    shape: tuple[int, int, int]
    grid: tuple[int, int]
    n_places: int
    taps: tuple[slice, slice]
    is_cropped: bool
    padding: tuple[int, int, int, int]
    more: tuple[int, int]
    geometry: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    seconds: tuple[tuple[float, float], tuple[float, float]]
    way: str = "indices"


def answered(layer, x: Tensor) -> Tensor | None:
    """Return a layer's answer, to about 1e-6 of its scale; None if all of its weight must be decoded.

    Parameters
    ----------
    layer : ClusteredConv2d
    x : torch.Tensor
        What is given to its forward.
    """
    plan = planned(layer, x)
    if plan is None:
        return None
    return cropped(layer, x, plan) if plan.way == "cropped" else convolved(layer, x, plan)


def planned(layer, x: Tensor) -> Plan | None:
    """Return how to convolve images without a layer's whole weight; None if its forward must decode that.

    It must where something else than numbers is asked of torch, such as gradients; for layers that are
    transposed, turned, scaled or in groups; for other dtypes and devices; and where to decode it is faster.

    Parameters
    ----------
    layer : ClusteredConv2d
    x : torch.Tensor
        What is given to its forward.
    """
    if layer.way not in WAYS:
        raise UnknownNameError("way of a layer", str(layer.way), WAYS)
    if layer.way == "decoded" or _is_followed():  # who traces notes what is asked of a tensor
        return None
    if layer.transposed or layer.groups != 1 or layer.scales is not None or layer.codebook.turned:
        return None
    values, bias, indices = layer.codebook.values, layer.bias, layer.indices
    if not (_is_plain(x) and _is_plain(values) and (bias is None or _is_plain(bias))):
        return None
    if not (indices.dtype == torch.uint8 and indices.is_cpu and indices.is_contiguous()):
        return None
    if indices.shape != (_packing.index_bytes(layer.n_kernels, layer.codebook.bits),):
        return None
    rows_bytes = 4 * LANES * -(-layer.kernel_size[0] * layer.kernel_size[1] // LANES) * values.shape[0]
    if rows_bytes > layer.block_bytes:
        return None
    if x.ndim not in (3, 4) or x.shape[-3] != layer.in_channels or not x.numel():
        return None
    plan = plan_of(layer, x)
    if plan is None or layer.way == "indices" or is_faster(plan):
        return plan
    return replace(plan, way="cropped") if _fits_cropped(layer, plan) else None


def is_faster(plan: Plan) -> bool:
    """Tell whether convolving from indices is expected to take less time than decoding them."""
    n_threads = torch.get_num_threads()
    straight, decoded = plan.seconds
    return _on(straight, n_threads if openmp.start_of_team() else 1) < _on(decoded, n_threads)


def _on(seconds: tuple[float, float], n_threads: int) -> float:
    alone, shared = seconds
    return alone + shared / n_threads


def _fits_cropped(layer, plan: Plan) -> bool:
    """Tell whether some of a layer's values only meet padding, and the others fit a block."""
    area = math.prod(plan.geometry[0])
    fits = layer.out_channels * layer.in_channels * 4 * (area + 1) <= layer.block_bytes
    return fits and plan.is_cropped


def plan_of(layer, x: Tensor) -> Plan | None:
    """Return how to convolve images from indices; None if the answer is empty."""
    shape = x.shape if x.ndim == 4 else (1, *x.shape)
    n_rows, channels = layer.codebook.values.shape[0], (layer.in_channels, layer.out_channels)
    sides = tuple(_pair(each) for each in (layer.kernel_size, layer.stride, layer.dilation))
    may_crop = layer.padding_mode == "zeros"
    return _plan((shape[0], shape[2], shape[3]), channels, n_rows, *sides, _edges(layer), may_crop)


def _edges(layer) -> tuple[int, int, int, int]:
    """Return the pixels of padding to the left, right, top and bottom as torch's own forward reads them."""
    if layer.padding_mode != "zeros":
        return tuple(layer._reversed_padding_repeated_twice)
    if layer.padding == "valid":
        return 0, 0, 0, 0
    if layer.padding != "same":
        down, across = _pair(layer.padding)
        return across, across, down, down
    sides = zip(_pair(layer.dilation), _pair(layer.kernel_size), strict=True)
    down, across = (step * (size - 1) for step, size in sides)
    top, left = down // 2, across // 2
    return left, across - left, top, down - top


@functools.lru_cache(4096)
def _plan(images, channels, n_rows, kernel_size, stride, dilation, padding, may_crop) -> Plan | None:
    edges = padding[2:], padding[:2]
    sides = list(zip(images[1:], kernel_size, stride, dilation, edges, strict=True))
    answer = [_answered(*side) for side in sides]
    if min(answer) <= 0:
        return None
    met = [_met(*side) if may_crop else (0, side[1]) for side in sides]
    area, n_kernels = math.prod(last - first for first, last in met), channels[0] * channels[1]
    winograd = (area, kernel_size, stride, dilation) == (9, (3, 3), (1, 1), (1, 1))
    tile = 2 if winograd else 1
    grid = tuple(-(-side // tile) for side in answer)
    window = tuple(last - first for first, last in met)
    n_places = images[0] * grid[0] * grid[1]
    parts = 1 if winograd else -(-area // LANES)
    n_pixels, n_values = math.prod((images[0], *answer)), area * n_places * sum(channels)
    straight = _ROW * n_rows, n_kernels * (_UNPACK + _MULTIPLY * parts * n_places) + _PLACE * n_values
    decoded = n_kernels * (_DECODE + _DECODE_VALUE * area), n_kernels * _DENSE * area * n_pixels
    (top, bottom), (left, right) = (
        (before - step * first, after - step * (size - last))
        for (_, size, _, step, (before, after)), (first, last) in zip(sides, met, strict=True)
    )
    return Plan(
        winograd=winograd,
        shape=(images[0], *answer),
        grid=grid,
        n_places=n_places,
        taps=tuple(slice(*each) for each in met),
        is_cropped=window != kernel_size,
        padding=(left, right, top, bottom),
        more=(grid[1] * tile - answer[1], grid[0] * tile - answer[0]),
        geometry=((4, 4), (2, 2), (1, 1)) if winograd else (window, stride, dilation),
        seconds=tuple(tuple(1e-9 * x for x in each) for each in (straight, decoded)),
    )


def _answered(n_pixels, size, stride, dilation, edges) -> int:
    """Return the pixels of an answer along one side."""
    return (n_pixels + sum(edges) - dilation * (size - 1) - 1) // stride + 1


def _met(n_pixels, size, stride, dilation, edges) -> tuple[int, int]:
    """Return the first of a kernel's values along one side that meets a pixel, and the one after the last."""
    starts = range(-edges[0], _answered(n_pixels, size, stride, dilation, edges) * stride - edges[0], stride)
    meets = [i for i in range(size) if any(0 <= start + i * dilation < n_pixels for start in starts)]
    return (meets[0], meets[-1] + 1) if meets else (0, size)


def convolved(layer, x: Tensor, plan: Plan) -> Tensor:
    """Return the answer of a clustered convolution, to about 1e-6 of its scale that of the dense one.

    What an image is answered depends neither on the others of its batch nor on the number of threads. What is
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
    table = layer.codebook.values.detach()
    if plan.is_cropped:
        table = table[:, *plan.taps]
    table = table.flatten(1)
    bits = _packing.index_bits(len(table))
    rows = table @ _KERNELS if plan.winograd else F.pad(table, (0, -table.shape[1] % LANES)).contiguous()
    bias = torch.zeros(layer.out_channels, **_NUMBERS) if layer.bias is None else layer.bias.contiguous()
    answer = torch.empty(plan.shape[0], layer.out_channels, *plan.shape[1:], **_NUMBERS)
    told = np.array(_told(plan, images, bits, rows, answer), np.int64)
    _on_threads(told, images, layer.indices, rows, bias, answer)
    if told[_BEYOND]:
        raise IndexError("an index is beyond the codebook's end.")
    if told[_WRITTEN] < _n_parts(told):  # what a thread raises does not leave it
        raise MemoryError("a convolution had no room for the numbers of a block of pixels.")
    if x.ndim == 3:
        return answer[0]
    is_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return answer.contiguous(memory_format=torch.channels_last) if is_last else answer


def cropped(layer, x: Tensor, plan: Plan) -> Tensor:
    """Return the answer of a clustered convolution by decoding only those of its values that meet pixels."""
    values = layer.codebook.values[:, *plan.taps]
    weight = F.embedding(layer._unpacked(0, layer.n_kernels), values.flatten(1))
    weight = weight.view(*layer.shape[:2], *values.shape[1:])
    return F.conv2d(F.pad(x, plan.padding), weight, layer.bias, layer.stride, 0, layer.dilation)


def _padded(layer, x: Tensor, plan: Plan) -> Tensor:
    """Return images with the padding of a layer, and zeros that complete the last places."""
    (left, right, top, bottom), x = plan.padding, x.detach()
    if layer.padding_mode != "zeros":
        x = F.pad(x, plan.padding, mode=layer.padding_mode)
        left = right = top = bottom = 0
    edges = left, right + plan.more[0], top, bottom + plan.more[1]
    return F.pad(x, edges).contiguous() if any(edges) else x.contiguous()


def _is_plain(value: Tensor) -> bool:
    """Tell whether a tensor is one of numbers in memory that numpy can read, and wants no gradient."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.dtype == torch.float32
        and value.is_cpu
        and value.layout == torch.strided
        and not value.is_neg()
        and not value._is_zerotensor()
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


def _told(plan: Plan, x: Tensor, bits: int, rows: Tensor, answer: Tensor) -> list[int]:
    """Return the numbers that threads are told: the parts they take, and the arrays' shapes.

    A part is a block of places, whose numbers stay in the cache, and all output channels; or a slice of these
    where there are fewer blocks than threads.
    """
    length, n_threads = x.shape[1] * (rows.shape[1] // LANES), torch.get_num_threads()
    step = max(PLACES, _CACHED // (4 * LANES * length) // PLACES * PLACES)
    step = min(step, -(-plan.n_places // (PLACES * n_threads)) * PLACES)
    n_blocks = -(-plan.n_places // step)
    channels = answer.shape[1] if n_blocks >= n_threads else -(-answer.shape[1] * n_blocks // n_threads)
    channels = -(-channels // OUTPUTS) * OUTPUTS
    window, stride, dilation = plan.geometry
    cut = 0, 0, 0, n_blocks, step, channels, plan.n_places, *plan.grid
    return [*cut, *window, *stride, *dilation, plan.winograd, bits, *x.shape, *rows.shape, *answer.shape]


def _on_threads(told: np.ndarray, *arrays: Tensor) -> None:
    """Compute an answer on as many threads as torch does if they can be had, else on this one."""
    n_threads, start, work = torch.get_num_threads(), openmp.start_of_team(), _compiled_work()
    addresses = [told.ctypes.data, *(array.data_ptr() for array in arrays)]
    addresses = (ctypes.c_int64 * len(addresses))(*addresses)
    if n_threads == 1 or start is None:
        work(addresses)
    else:
        start(work, addresses, n_threads, 0)


@functools.cache
def _compiled_work():
    """Return `_work` as a C function."""
    compiled = cfunc(types.void(types.CPointer(types.int64)), cache=True)(_work)
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)


def _work(addresses):
    """Take parts, on a thread that is told where the arrays are."""
    told = carray(_pointer(addresses, 0, np.int64), (_TOLD,))
    batch, n_inputs, height, width, n_rows, row_length = told[17:23]
    n_outputs, down, across = told[24:27]
    _take_parts(
        told,
        carray(_pointer(addresses, 1, np.float32), (batch, n_inputs, height, width)),
        carray(_pointer(addresses, 2, np.uint8), (-(-n_outputs * n_inputs * told[16] // 8),)),
        carray(_pointer(addresses, 3, np.float32), (n_rows, row_length)),
        carray(_pointer(addresses, 4, np.float32), (n_outputs,)),
        carray(_pointer(addresses, 5, np.float32), (batch, n_outputs, down, across)),
    )


@njit(cache=True)
def _n_parts(told):
    """Return the number of parts: blocks of places times slices of output channels."""
    return told[3] * -(-told[24] // told[5])


@njit(nogil=True, cache=True)
def _take_parts(told, x, packed, rows, bias, answer):
    """Write those parts of an answer that no other thread has taken."""
    step, channels, n_places = told[4], told[5], told[6]
    geometry = ((told[9], told[10]), (told[11], told[12]), (told[13], told[14]))
    how = (told[7], told[8]), geometry, told[15] != 0
    n_slices = -(-answer.shape[1] // channels)
    part = _one_more(told, _TAKEN)
    while part < _n_parts(told):
        start, first = part // n_slices * step, part % n_slices * channels
        places = start, min(start + step, n_places)
        outputs = first, min(first + channels, answer.shape[1])
        if _answer(x, how, packed, told[16], rows, bias, places, outputs, answer):
            _one_more(told, _WRITTEN)
        else:
            told[_BEYOND] = 1
        part = _one_more(told, _TAKEN)


@njit(nogil=True, cache=True, fastmath=_FAST)
def _answer(x, how, packed, bits, rows, bias, places, outputs, answer):
    """Write an answer's pixels of some places and output channels; return False if an index has no row."""
    (grid, geometry, winograd), (start, end) = how, places
    n_inputs, parts, n_rows = x.shape[1], rows.shape[1] // LANES, len(rows)
    length = n_inputs * parts
    numbers = np.zeros((end - start) * length * LANES, np.float32)
    indices = np.zeros(OUTPUTS * n_inputs, np.int32)
    codes = indices if parts == 1 else np.zeros(OUTPUTS * length, np.int32)
    sums, four = np.empty(OUTPUTS * PLACES * LANES, np.float32), np.empty(4, np.float32)
    height, width = answer.shape[2:]
    _place(x, grid, geometry, winograd, parts, start, end, numbers)
    for output in range(outputs[0], outputs[1], OUTPUTS):
        n_outputs = min(OUTPUTS, outputs[1] - output)
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


@intrinsic
def _one_more(typing_context, told, place):
    """Add one to a number that all threads count, and return what it was."""
    signature = types.int64(told, types.intp)

    def generate(context, builder, signature, arguments):
        counter = builder.gep(_data(context, builder, signature, arguments, 0), [arguments[1]])
        return builder.atomic_rmw("add", counter, ir.IntType(64)(1), "monotonic")

    return signature, generate


@intrinsic
def _pointer(typing_context, addresses, place, dtype):
    """Return an address out of several as a pointer to numbers of a dtype."""
    pointer = types.CPointer(dtype.dtype)

    def generate(context, builder, signature, arguments):
        address = builder.load(builder.gep(arguments[0], [arguments[1]]))
        return builder.inttoptr(address, context.get_value_type(pointer))

    return pointer(addresses, types.intp, dtype), generate


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
