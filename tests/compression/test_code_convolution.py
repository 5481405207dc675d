import concurrent.futures
import contextlib
import copy
import ctypes
import os
import sys
import threading

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn
from torch.nn.modules.utils import _pair

from kclib._util import openmp
from kclib.compression import _code_convolution, _packing
from kclib.compression._layers import ClusteredConv2d, Codebook
from kclib.compression._replacement import expanded
from kclib.errors import UnknownNameError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def always(monkeypatch):
    """Convolve straight from indices wherever that is possible, faster or not; count how often."""
    calls, convolved = [], _code_convolution.convolved
    monkeypatch.setattr(_code_convolution, "is_faster", lambda *_: True)
    monkeypatch.setattr(_code_convolution, "convolved", lambda *given: calls.append(1) or convolved(*given))
    return calls


def layer_of(convolution, n_clusters=37, *, bits=None, seed=0, turned=False, scaled=False):
    draw = np.random.default_rng(seed)
    n = convolution.weight.shape[0] * convolution.weight.shape[1]
    dtype = convolution.weight.dtype
    values = torch.from_numpy(draw.normal(size=(n_clusters, *convolution.kernel_size))).to(dtype)
    codebook = Codebook(values, group="all", precision="fp32", turned=turned)
    packed = torch.from_numpy(_packing.pack(draw.integers(0, codebook.n_members, n), codebook.bits))
    scales = nn.Parameter(torch.from_numpy(draw.normal(size=n)).to(dtype)) if scaled else None
    return ClusteredConv2d(convolution, codebook, packed, scales=scales, bias=convolution.bias).eval()


def straight(layer, x):
    return _code_convolution.convolved(layer, x, _code_convolution.plan_of(layer, x))


@contextlib.contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def exact(layer, x):
    """Return what a layer answers, by torch's convolution in float64."""
    return expanded(layer).double()(x.double())


def assert_close(answer, expected):
    assert answer.dtype == torch.float32
    assert answer.shape == expected.shape
    assert (answer - expected).abs().max() <= 1e-5 * expected.abs().max()


@st.composite
def layers(draw):
    inputs, outputs = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    size = draw(st.sampled_from([3, 3, 3, 1, 5, 7, (1, 3), (4, 2)]))
    even = size == (4, 2)
    stride, padding, mode = (
        draw(st.sampled_from([1, 1, 2, (2, 1)])),
        draw(st.sampled_from([0, 1, (1, 2)])),
        "zeros",
    )
    if not even and draw(st.booleans()):
        stride, padding = 1, "same"
    if draw(st.booleans()):
        mode = draw(st.sampled_from(["reflect", "circular", "replicate"]))
    torch.manual_seed(draw(st.integers(0, 99)))
    convolution = nn.Conv2d(
        inputs, outputs, size, stride=stride, padding=padding, padding_mode=mode,
        dilation=draw(st.sampled_from([1, 1, 2, (1, 2)])), bias=draw(st.booleans()),
    )  # fmt: skip
    bits = draw(st.integers(0, 18))
    return layer_of(convolution, draw(st.integers((1 << bits) // 2 + 1, 1 << bits)))


@given(
    layers(),
    st.sampled_from([(), (1,), (2,), (5,)]),
    st.integers(13, 15),
    st.integers(13, 16),
    st.booleans(),
    st.sampled_from([1, 2, 3]),
)
@settings(deadline=None, max_examples=60)
def test_answers_are_those_of_a_convolution_in_float64(layer, batch, height, width, last, n_threads):
    x = torch.randn(*batch, layer.in_channels, height, width)
    if last and batch:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        with threads(n_threads):
            answer = straight(layer, x)
        assert_close(answer, exact(layer, x))
        if layer.padding_mode == "zeros" and min(layer.in_channels, layer.out_channels) > 1:
            expected = expanded(layer)(x)  # strides of sides of one pixel may be any
            for layout in (torch.contiguous_format, torch.channels_last)[: answer.ndim - 2]:
                assert answer.is_contiguous(memory_format=layout) == expected.is_contiguous(
                    memory_format=layout
                )


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_images_of_few_pixels_are_answered_right(side, batch):
    for stride in (1, 2):
        layer = layer_of(nn.Conv2d(67, 45, 3, padding=1, stride=stride), 300)
        x = torch.randn(batch, 67, side, side)
        with torch.no_grad():
            assert_close(straight(layer, x), exact(layer, x))


def test_more_channels_than_a_block_of_places_holds_are_summed_right():
    layer = layer_of(nn.Conv2d(3000, 7, 3, padding=1), 50)
    x = torch.randn(2, 3000, 4, 5)
    with torch.no_grad():
        assert_close(straight(layer, x), exact(layer, x))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [2, 9])
def test_answers_depend_on_neither_threads_nor_batch(monkeypatch, stride, side):
    layer, x = layer_of(nn.Conv2d(64, 50, 3, padding=1, stride=stride)), torch.randn(3, 64, side, side)
    answers = []
    with torch.no_grad():
        for n in (1, 2, 3):
            with threads(n):
                answers.append(straight(layer, x))
        monkeypatch.setattr(openmp, "start_of_team", lambda: None)
        with threads(2):
            answers.append(straight(layer, x))
        answers.append(torch.cat([straight(layer, image[None]) for image in x]))
    for answer in answers[1:]:
        assert torch.equal(answers[0], answer)


@pytest.mark.skipif(sys.platform != "linux", reason="only there is it known how torch's threads are had")
def test_work_is_done_by_threads_of_torch():
    seen, get = [], threading.get_native_id
    work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda told: seen.append((get(), told)))
    with threads(3):
        torch.randn(1 << 20).exp()
        before = {int(name) for name in os.listdir("/proc/self/task")}
        openmp.start_of_team()(work, 17, 3, 0)
    assert {told for _, told in seen} == {17}
    assert len({thread for thread, _ in seen}) == len(seen) == 3
    assert {thread for thread, _ in seen} <= before


GEOMETRIES = {  # convolution, side of the images, and those of the kernels that meet pixels
    "one pixel": (nn.Conv2d(20, 30, 3, padding=1), 1, (1, 2)),
    "a stride": (nn.Conv2d(20, 30, 3, padding=1, stride=2), 2, (1, 3)),
    "a dilation": (nn.Conv2d(20, 30, 3, padding=3, dilation=3), 2, (1, 2)),
    "a large kernel": (nn.Conv2d(20, 30, 7, padding=3), 2, (2, 5)),
    "even": (nn.Conv2d(20, 30, 4, padding=2), 1, (1, 3)),
    "wide padding": (nn.Conv2d(20, 30, 2, padding=5, stride=5), 1, (0, 1)),
    "none meets any": (nn.Conv2d(20, 30, 2, padding=4, stride=7), 1, (0, 2)),
    "a side": (nn.Conv2d(20, 30, (3, 5), padding=(1, 2)), (1, 2), ((1, 2), (1, 4))),
    "same": (nn.Conv2d(20, 30, (5, 3), padding="same", dilation=(1, 2)), (2, 1), ((1, 4), (1, 2))),
    "reflected": (nn.Conv2d(20, 30, 3, padding=1, padding_mode="reflect"), 2, (0, 3)),
}


@pytest.mark.parametrize(("convolution", "side", "met"), GEOMETRIES.values(), ids=GEOMETRIES)
@torch.no_grad()
def test_values_that_only_meet_padding_are_left_out(convolution, side, met):
    layer = layer_of(convolution)
    for batch in [(), (1,), (6,)]:
        x = torch.randn(*batch, 20, *_pair(side))
        plan = _code_convolution.plan_of(layer, x)
        taps = tuple(slice(*each) for each in (met if isinstance(met[0], tuple) else (met, met)))
        assert plan.taps == taps
        assert plan.is_cropped == (taps != tuple(slice(0, size) for size in convolution.kernel_size))
        assert_close(straight(layer, x), exact(layer, x))
        if plan.is_cropped:
            assert_close(_code_convolution.cropped(layer, x, plan), exact(layer, x))


@torch.no_grad()
def test_a_cropped_layer_decodes_what_meets_pixels(monkeypatch):
    calls, cropped = [], _code_convolution.cropped
    monkeypatch.setattr(_code_convolution, "cropped", lambda *given: calls.append(1) or cropped(*given))
    monkeypatch.setattr(_code_convolution, "is_faster", lambda *_: False)
    layer, x = layer_of(nn.Conv2d(20, 30, 3, padding=1)), torch.randn(3, 20, 1, 1)
    assert_close(layer(x), exact(layer, x))
    assert len(calls) == 1
    assert torch.equal(layer(x.expand(-1, -1, 2, 2)), expanded(layer)(x.expand(-1, -1, 2, 2)))
    layer.block_bytes = 20 * 30 * 4  # no room for indices and a value of each
    assert torch.equal(layer(x), expanded(layer)(x))
    assert len(calls) == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("stride", [1, 2])
def test_what_is_not_finite_reaches_the_answer_and_no_other_image(stride, value):
    layer, x = layer_of(nn.Conv2d(8, 9, 3, padding=1, stride=stride)), torch.randn(2, 8, 8, 8)
    with torch.no_grad():
        before = straight(layer, x)
        x[0, 3, 4, 4] = value
        answer = straight(layer, x)
    assert not answer[0][~expanded(layer)(x)[0].isfinite()].isfinite().any()
    assert torch.equal(answer[0, :, :1], before[0, :, :1])
    assert torch.equal(answer[1], before[1])


def test_defaults_of_the_program_change_nothing():
    layer, x = layer_of(nn.Conv2d(8, 9, 3, padding=1, bias=False)), torch.randn(2, 8, 4, 4)
    with torch.no_grad():
        expected = straight(layer, x)
        torch.set_default_dtype(torch.float64)
        try:
            answer = straight(layer, x)
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.device("meta"):
            assert torch.equal(straight(layer, x), answer)
    assert torch.equal(answer, expected)


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize(("stride", "side"), [(1, 5), (1, 4), (2, 5), (2, 1)])
def test_nothing_is_written_beside_the_answer(monkeypatch, stride, side, n_threads):
    layer = layer_of(nn.Conv2d(11, 13, 3, padding=1, stride=stride))
    x, guard, whole = torch.randn(3, 11, side, side), 4096, []

    def guarded(*shape, **_):
        n = int(np.prod(shape))
        whole.append(torch.full((n + 2 * guard,), torch.nan))
        return whole[-1][guard : guard + n].view(shape)

    with torch.no_grad():
        expected = exact(layer, x)
        monkeypatch.setattr(torch, "empty", guarded)
        with threads(n_threads):
            answer = straight(layer, x)
    (buffer,) = whole
    assert buffer.isnan().nonzero().flatten().tolist() == [
        *range(guard), *range(len(buffer) - guard, len(buffer))
    ]  # fmt: skip
    assert_close(answer, expected)


def test_two_networks_in_two_threads_answer_as_alone(always):
    networks = [
        nn.Sequential(
            *(layer_of(nn.Conv2d(48, 48, 3, padding=1), 200, seed=seed) for seed in range(i, i + 3))
        )
        for i in range(2)
    ]
    x, barrier = torch.randn(1, 48, 4, 4), threading.Barrier(2)

    def run(network):
        torch.set_num_threads(2)
        barrier.wait()
        with torch.no_grad():
            return [network(x) for _ in range(50)]

    with torch.no_grad():
        expected = [network(x) for network in networks]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(run, networks))
    assert len(always) == 6 + 2 * 50 * 3
    for alone, together in zip(expected, answers, strict=True):
        assert all(torch.equal(alone, answer) for answer in together)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_an_index_beyond_the_codebook_is_an_error(always, n_threads):
    layer = layer_of(nn.Conv2d(4, 6, 3))
    layer.indices.fill_(255)
    with torch.no_grad(), threads(n_threads), pytest.raises(IndexError):
        layer(torch.randn(1, 4, 5, 5))
    assert len(always) == 1


def test_a_part_that_was_not_written_is_an_error(monkeypatch):
    layer = layer_of(nn.Conv2d(4, 6, 3))
    monkeypatch.setattr(_code_convolution, "_on_threads", lambda *_: None)
    with torch.no_grad(), pytest.raises(MemoryError, match="no room"):
        straight(layer, torch.randn(1, 4, 5, 5))


@torch.no_grad()
def test_geometry_is_read_as_torch_reads_it_when_it_answers():
    layer, x = layer_of(nn.Conv2d(8, 9, 3, padding=1)), torch.randn(2, 8, 6, 6)
    layer.dilation, layer.padding, layer.stride = 2, (2, 1), 1
    assert_close(straight(layer, x), exact(layer, x))
    assert straight(layer, x).shape == (2, 9, 6, 4)


@torch.no_grad()
def test_indices_that_are_not_as_they_were_packed_are_left_to_decoding(always):
    layer, x = layer_of(nn.Conv2d(8, 9, 3, padding=1)), torch.randn(2, 8, 4, 4)
    expected = expanded(layer)(x)
    spread = torch.zeros(len(layer.indices), 2, dtype=torch.uint8)
    spread[:, 0] = layer.indices
    layer.indices = spread[:, 0]
    assert torch.equal(layer(x), expected)
    assert not always
    layer.indices = spread[:5, 0].contiguous()
    assert _code_convolution.planned(layer, x) is None
    assert (
        _code_convolution.planned(layer_of(nn.Conv2d(8, 9, 3)), torch._efficientzerotensor((2, 8, 4, 4)))
        is None
    )


def test_a_way_that_there_is_not_is_one_sentence():
    layer = layer_of(nn.Conv2d(8, 9, 3))
    layer.way = "decode"
    with torch.no_grad(), pytest.raises(UnknownNameError, match="decoded"):
        layer(torch.randn(1, 8, 4, 4))


def test_a_layer_in_inference_is_convolved_from_its_indices(always):
    layer, x = layer_of(nn.Conv2d(8, 9, 3, padding=1)), torch.randn(2, 8, 4, 4)
    expected = exact(layer, x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_close(layer(x), expected)
    assert len(always) == 2
    with torch.no_grad():  # what the codebook holds is read anew
        layer.codebook.values.data.mul_(2)
        assert_close(layer(x), exact(layer, x))
    with torch.no_grad():
        assert_close(torch.func.functional_call(layer, {"codebook.values": torch.ones(37, 3, 3)}, x),
                     F.conv2d(x, torch.ones(9, 8, 3, 3), layer.bias, padding=1))  # fmt: skip
    assert len(always) == 4


def plain(**options):
    return layer_of(nn.Conv2d(8, 10, 3, padding=1, **options))


DECODED = {
    "gradients": (plain, torch.enable_grad),
    "half": (lambda: plain(dtype=torch.float16), torch.no_grad),
    "bfloat16": (lambda: plain(dtype=torch.bfloat16), torch.no_grad),
    "double": (lambda: plain(dtype=torch.float64), torch.no_grad),
    "groups": (lambda: plain(groups=2), torch.no_grad),
    "scales": (lambda: layer_of(nn.Conv2d(8, 10, 3), scaled=True), torch.no_grad),
    "turned": (lambda: layer_of(nn.Conv2d(8, 10, 3), turned=True), torch.no_grad),
    "transposed": (lambda: layer_of(nn.ConvTranspose2d(8, 10, 3)), torch.no_grad),
    "autocast": (plain, lambda: torch.autocast("cpu", torch.bfloat16)),
}


@pytest.mark.parametrize(("make", "mode"), DECODED.values(), ids=DECODED)
def test_what_does_not_fit_is_decoded_as_before(always, make, mode):
    layer = make()
    x = torch.randn(2, 8, 4, 4, dtype=layer.codebook.values.dtype)
    with mode():
        assert torch.equal(layer(x), expanded(layer)(x))
    assert not always


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_whoever_follows_torchs_operators_sees_a_convolution(always):
    layer, x = plain(), torch.randn(2, 8, 4, 4)
    expected = expanded(layer)(x)
    traced = torch.jit.trace(layer, x, check_trace=False)
    assert torch.equal(traced(x), expected)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), expected)
    assert torch.equal(torch.func.vmap(layer)(x[:, None])[:, 0], expected)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), expected)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 2 * 10 * 8 * 9 * 16
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
    torch.testing.assert_close(tangent, expanded(layer)(x + 1) - expected, rtol=1e-4, atol=1e-4)
    assert not always


@torch.no_grad()
def test_errors_are_those_of_torchs_convolution(always):
    layer = plain()
    for shape in [(2, 7, 4, 4), (8, 4), (1, 1, 8, 4, 4)]:
        with pytest.raises(RuntimeError):
            layer(torch.randn(shape))
    narrow = layer_of(nn.Conv2d(8, 10, 3))
    with pytest.raises(RuntimeError):
        narrow(torch.randn(1, 8, 2, 2))
    assert layer(torch.randn(0, 8, 4, 4)).shape == (0, 10, 4, 4)
    assert not always


@pytest.mark.parametrize(
    ("convolution", "n_clusters", "shape", "faster"),
    [
        (nn.Conv2d(512, 512, 3, padding=1), 4096, (1, 512, 2, 2), True),
        (nn.Conv2d(512, 512, 3, padding=1), 4096, (64, 512, 4, 4), True),
        (nn.Conv2d(128, 128, 3, padding=1), 256, (128, 16, 16), True),
        (nn.Conv2d(256, 512, 3, padding=1, stride=2), 256, (1, 256, 4, 4), True),
        (nn.Conv2d(3, 64, 3, padding=1), 64, (1, 3, 32, 32), False),  # few channels share a place's numbers
        (nn.Conv2d(64, 64, 3, padding=1), 65_536, (1, 64, 8, 8), False),  # a codebook larger than the layer
        (nn.Conv2d(128, 256, 3, stride=2), 256, (16, 128, 16, 16), False),
        (nn.Conv2d(512, 512, 1), 256, (1, 512, 8, 8), False),
    ],
)
def test_the_faster_way_is_chosen(convolution, n_clusters, shape, faster):
    layer = layer_of(convolution, n_clusters)
    with torch.no_grad():
        assert (_code_convolution.planned(layer, torch.empty(shape)) is not None) == faster
        layer.block_bytes = 1  # no room for the codebook's rows
        assert _code_convolution.planned(layer, torch.empty(shape)) is None


def test_a_copy_and_a_moved_layer_are_convolved_too(always):
    layer, x = plain(), torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))
        assert torch.equal(layer.double().float()(x), layer(x))
    assert len(always) == 4
