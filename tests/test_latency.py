import copy

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from kclib import latency
from kclib.clustering import cluster
from kclib.compression import compress, expand
from kclib.errors import InvalidValueError
from kclib.kernels import extract
from kclib.latency import add_then_convolve, convolve_then_gather
from kclib.layers import ClusteredConv2d

WAYS = [convolve_then_gather, add_then_convolve]


@pytest.fixture(autouse=True)
def _hurried(monkeypatch):
    monkeypatch.setattr(latency, "_SECONDS", 0.003)


def compressed(convolution, n_clusters, **options):
    bank = extract(convolution, size=convolution.kernel_size)
    return compress(convolution, cluster(bank, min(n_clusters, len(bank)), **options))


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Dropout(0.5), nn.Flatten()
    )


@st.composite
def convolutions(draw):
    """A convolution that both ways can compute, with any geometry."""
    size = draw(st.sampled_from([(3, 3), (1, 3), (2, 1), (1, 1)]))
    pair, small = (
        st.tuples(st.integers(1, 3), st.integers(1, 3)),
        st.tuples(st.integers(0, 2), st.integers(0, 2)),
    )
    padding = draw(st.one_of(small, st.sampled_from(["valid"] if size == (2, 1) else ["valid", "same"])))
    stride, dilation = (1, 1) if padding == "same" else draw(pair), draw(pair)
    n_in, n_out, bias = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 99)))
    return nn.Conv2d(n_in, n_out, size, stride, padding, dilation, bias=bias)


@given(convolutions(), st.integers(1, 30), st.integers(1, 3), st.integers(7, 10), st.integers(7, 10))
@settings(deadline=None, max_examples=40)
@torch.no_grad()
def test_both_ways_answer_like_the_dense_convolution(convolution, n_clusters, batch, height, width):
    layer = compressed(convolution, n_clusters)
    assert latency.is_plain(layer)
    images = torch.randn(batch, convolution.in_channels, height, width)
    expected = expand(layer)(images)
    for way in WAYS:
        found = way(layer, images)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_representative_that_no_filter_or_every_filter_uses_is_no_matter(way):
    torch.manual_seed(0)
    convolution = nn.Conv2d(6, 8, 3, padding=1)
    convolution.weight[1:] = convolution.weight[1, 0]  # the first filter has six kernels, the others one
    layer = compressed(convolution, 7)
    assert sorted(np.bincount(layer.members())) == [1] * 6 + [42]
    images = torch.randn(2, 6, 5, 5)
    np.testing.assert_allclose(way(layer, images), convolution(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("convolution", "options"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), {}),
        (nn.Conv2d(4, 4, 3, groups=4), {}),
        (nn.ConvTranspose2d(4, 4, 3), {}),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), {}),
        (nn.Conv2d(4, 4, 3), {"scaled": True}),
        (nn.Conv2d(4, 4, 3), {"turned": True}),
    ],
    ids=["groups", "depthwise", "transposed", "circular", "scaled", "turned"],
)
def test_other_layers_are_refused(way, convolution, options):
    layer = compressed(convolution, 2, **options)
    assert not latency.is_plain(layer)
    images = torch.zeros(1, 4, 6, 6)
    with pytest.raises(
        InvalidValueError, match="only a float32 convolution of one group, zero-padded, neither"
    ):
        way(layer, images)
    with pytest.raises(InvalidValueError, match="only a float32 convolution"):
        latency.of_layer(layer, images)


@pytest.mark.parametrize("way", WAYS)
def test_sums_of_sparse_matrices_say_nothing_of_their_beta_state(way, recwarn):
    with torch.no_grad():
        way(compressed(nn.Conv2d(2, 3, 3), 2), torch.zeros(1, 2, 4, 4))
    assert not list(recwarn)


def test_a_layer_is_timed_in_four_ways():
    times = latency.of_layer(compressed(nn.Conv2d(4, 4, 3), 3), torch.randn(2, 4, 8, 8))
    assert list(times) == ["dense", "packed", "convolve then gather", "add then convolve"]
    assert all(isinstance(time, float) and 0 < time < 1000 for time in times.values())


def test_a_network_is_timed_packed_and_dense_at_each_batch():
    network = small_network().eval()
    table = latency.of_network(compress(network, cluster(extract(network), 3)), (3, 8, 8), (1, 3))
    assert (table.index.name, table.index.tolist()) == ("batch", [1, 3])
    assert table.columns.tolist() == ["dense", "packed", "ratio"]
    assert ((table > 0) & (table < 1000)).to_numpy().all()
    np.testing.assert_allclose(table.ratio, table.packed / table.dense)


def test_both_networks_see_the_same_images_of_the_seed(monkeypatch):
    seen = []
    monkeypatch.setattr(
        latency, "_alternating", lambda calls: {x: call().numel() for x, call in calls.items()}
    )
    network = compress(small_network().eval(), cluster(extract(small_network()), 3))
    network.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0])))
    for seed in (0, 0, 1):
        assert latency.of_network(network, (3, 8, 8), [2], seed=seed).ratio.tolist() == [1]
    packed = [any(isinstance(x, ClusteredConv2d) for x in module.modules()) for module, _ in seen]
    assert packed == [False, True] * 3
    assert [images.shape for _, images in seen] == [(2, 3, 8, 8)] * 6
    assert [torch.equal(seen[0][1], images) for _, images in seen] == [True] * 4 + [False] * 2


def test_calls_are_timed_in_milliseconds_and_in_turn(monkeypatch):
    order = []
    seconds = iter([0.001, 0.5, 0.004, 0.6, 0.002, 9.0])

    def timer(stmt, globals, num_threads):
        globals["call"]()
        measured = type("Measured", (), {"median": next(seconds)})
        return type("Timer", (), {"blocked_autorange": lambda self, min_run_time: measured})()

    monkeypatch.setattr("torch.utils.benchmark.Timer", timer)
    times = latency._alternating({"a": lambda: order.append("a"), "b": lambda: order.append("b")})
    assert times == {"a": pytest.approx(2), "b": pytest.approx(600)}
    assert order == ["a", "b"] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_layer_is_refused(dtype):
    layer = compressed(nn.Conv2d(4, 4, 3).to(dtype), 3)
    assert not latency.is_plain(layer)
    with pytest.raises(InvalidValueError, match="only a float32 convolution"):
        latency.of_layer(layer, torch.randn(2, 4, 8, 8).to(dtype))


def test_a_network_in_training_is_left_as_it_was():
    network = compress(small_network().train(), cluster(extract(small_network()), 3))
    before = copy.deepcopy(network.state_dict())
    latency.of_network(network, (3, 8, 8), [2])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_layers_are_timed_on_maps_that_their_kernels_fit_into():
    network = nn.Sequential(*(nn.Conv2d(2, 2, size, dilation=2) for size in (3, 5, 5, 5)))
    times = latency.of_layers(compress(network, cluster(extract(network), 2)), n_images=2)
    assert times.index.tolist() == ["2", "3"]
    assert (times > 0).all(axis=None)


def test_of_layers_that_no_way_can_compute_none_is_timed():
    network = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    assert latency.of_layers(compress(network, cluster(extract(network), 2))).empty
