import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import nn

from kclib import compression, models
from kclib.clustering import cluster
from kclib.compression import _formats, byte_counts
from kclib.errors import InvalidValueError, UnknownNameError
from kclib.evaluation import _methods, peers
from kclib.kernels import extract
from kclib.kmeans._palettes import palette

pytestmark = pytest.mark.usefixtures("one_thread")

OTHER = 4 * (4 + 2 * 4 + 2)  # bytes that stay dense in `tiny`: a bias, and a 1×1 convolution with its own
NETWORKS = st.builds(
    lambda seed, power: tiny(seed, spread=10.0**power), st.integers(0, 99), st.integers(-6, 2)
)


def tiny(seed=0, *, spread=1.0):
    """A convolution of 4×3×3×3 weights and others that stay as they are."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        network[0].weight.copy_(spread * torch.distributions.StudentT(3.0).sample((4, 3, 3, 3)))
    return network


def wide(*, transposed=False, groups=1):
    """Convolutions of 16 inputs, whose channels differ in strength."""
    torch.manual_seed(0)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    network = nn.Sequential(kind(16, 32, 3, groups=groups), nn.ReLU(), kind(32, 16, 3, bias=False))
    with torch.no_grad():
        for module in (network[0], network[2]):
            outputs = module.weight.shape[1 if transposed else 0]
            strength = torch.logspace(-2, 1, outputs).reshape((1, -1, 1, 1) if transposed else (-1, 1, 1, 1))
            module.weight.mul_(strength)
    return network


def weight(network):
    return network[0].weight.detach().numpy()


def set_to(values):
    """Return a network of one convolution with these weights ``(out, in, kh, kw)``."""
    values = torch.as_tensor(np.array(values, np.float32))
    network = nn.Sequential(nn.Conv2d(*values.shape[1::-1], tuple(values.shape[2:]), bias=False))
    with torch.no_grad():
        network[0].weight.copy_(values)
    return network


def halves(values):
    return np.asarray(values, np.float32).astype(np.float16).astype(np.float32)


def inertia(values, table):
    return np.square(values[:, None] - np.asarray(table)[None]).min(1).sum()


@pytest.mark.parametrize(
    ("peer", "n_bytes"),
    [
        (lambda x: _methods.palettized(x, 2), 27 + 4 * 2),
        (lambda x: _methods.palettized(x, 3, kind="uniform"), 41 + 8 * 2),  # 40.5 bytes of indices
        (lambda x: _methods.palettized(x, 2, per="channel"), 27 + 4 * 4 * 2),
        (lambda x: _methods.quantized(x, 5), 68 + 4 * 2),  # 67.5
        (lambda x: _methods.quantized(x, 8), 108 + 4 * 2),
        (lambda x: _methods.product_quantized(x, 4, 3), 9 + 4 * 3 * 2),
        (
            lambda x: _methods.product_quantized(x, 99, 3),
            18 + 9 * 3 * 2,
        ),  # 36 sub-vectors: K is 9, of 4 bits
        (lambda x: _methods.product_quantized(x, 4, 2), 108 * 2),  # 3 inputs are no multiple of 2
        (lambda x: _methods.pruned(x, 1.0), 108 * 2),
        (lambda x: _methods.pruned(x, 0.5), 54 * 2 + 14),  # a bit each for the mask, 13.5 bytes
        (
            lambda x: _methods.pruned(x, 0.25, precision="int8"),
            27 + 4 * 2 + 11,
        ),  # 0.8113 bits each, 10.95 bytes
        (lambda x: peers.son(x, 3, turned=False), 3 * 9 * 2 + 12 * 2 + 3),  # 12 kernels, 2 bits an index
        (lambda x: peers.son(x, 3, turned=True), 3 * 9 * 2 + 12 * 2 + 8),  # 5 bits
    ],
)
def test_bytes_are_those_counted_by_hand_and_the_callers_network_stays(peer, n_bytes):
    network = tiny()
    before = models.fingerprint(network)
    made = peer(network)
    assert (made.bytes, type(made.bytes)) == (n_bytes + OTHER, int)
    assert models.fingerprint(network) == before
    for (name, one), other in zip(
        network.state_dict().items(), made.network.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other) == (name != "0.weight"), name


def test_channels_of_a_transposed_convolution_are_its_outputs():
    network = nn.Sequential(nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False))  # a weight of 6×2×3×3
    assert _methods.quantized(network, 8).bytes == 108 + 2 * 2
    assert _methods.palettized(network, 1, per="channel").bytes == 14 + 2 * 2 * 2
    assert _methods.product_quantized(network, 4, 3).bytes == 9 + 4 * 3 * 2


@pytest.mark.parametrize(
    "peer",
    [
        lambda x: _methods.palettized(x, 3, per="channel"),
        lambda x: _methods.quantized(x, 4),
        lambda x: _methods.product_quantized(x, 8, 4),
    ],
)
def test_transposed_convolutions_decode_as_plain_ones_of_the_same_channels(peer):
    transposed = wide(transposed=True)
    plain = wide()
    with torch.no_grad():
        for mine, theirs in ((plain[0], transposed[0]), (plain[2], transposed[2])):
            mine.weight.copy_(theirs.weight.transpose(0, 1))
    one, other = peer(plain), peer(transposed)
    assert one.bytes == other.bytes
    for i in (0, 2):
        assert torch.equal(one.network[i].weight, other.network[i].weight.transpose(0, 1))


def test_a_palette_holds_the_means_of_its_values_in_fp16():
    network = set_to([[[[0, 0.1, 10, 10.3]]], [[[-1, -1, -1, -4]]]])
    small = _methods.palettized(network, 1)
    np.testing.assert_array_equal(
        weight(small.network).ravel(), halves([-1.15] * 2 + [10.15] * 2 + [-1.15] * 4)
    )
    small = _methods.palettized(network, 1, per="channel")
    np.testing.assert_array_equal(
        weight(small.network).ravel(), halves([0.05, 0.05, 10.15, 10.15, -1, -1, -1, -4])
    )


def test_a_uniform_palette_goes_evenly_from_the_smallest_to_the_largest():
    network = set_to([[[[0, 1, 1.6, 3]]], [[[30, 14.9, 15.1, 4]]]])
    decoded = weight(_methods.palettized(network, 2, kind="uniform").network)
    np.testing.assert_array_equal(decoded.ravel(), [0, 0, 0, 0, 30, 10, 20, 0])
    decoded = weight(_methods.palettized(network, 2, kind="uniform", per="channel").network)
    expected = [0, 1, 2, 3, 30, 4 + 26 / 3, 4 + 26 / 3, 4]
    np.testing.assert_array_equal(decoded.ravel(), halves(expected))


@given(NETWORKS, st.integers(1, 8), st.sampled_from(_formats.KINDS), st.sampled_from(_formats.PER))
@settings(deadline=None, max_examples=20)
def test_each_weight_gets_the_nearest_of_few_fp16_values(network, bits, kind, per):
    original = weight(network).reshape(1 if per == "tensor" else 4, -1)
    decoded = weight(_methods.palettized(network, bits, kind=kind, per=per).network).reshape(original.shape)
    np.testing.assert_array_equal(decoded, halves(decoded))
    for row, mine in zip(original, decoded, strict=True):
        used = np.unique(mine)
        assert len(used) <= 2**bits
        assert inertia(row.astype("d"), used.astype("d")) == pytest.approx(
            np.square(row - mine.astype("d")).sum()
        )


@pytest.mark.parametrize("draw", ["standard_normal", "laplace", "cauchy", "two"])
@pytest.mark.parametrize("n", [2, 3, 16, 256])
def test_palettes_are_as_good_as_three_other_starts(draw, n):
    random = np.random.default_rng(n)
    values = {
        "standard_normal": lambda: random.standard_normal(3000),
        "laplace": lambda: random.laplace(size=700),
        "cauchy": lambda: random.standard_cauchy(4600),
        "two": lambda: np.concatenate([random.normal(size=900), 100 + random.normal(size=900)]),
    }[draw]().astype(np.float32)
    table = palette(values, n)
    assert (table.shape, table.dtype) == ((n,), np.float64)
    assert (np.diff(table) > 0).all()
    theirs = KMeans(n, n_init=3, random_state=0, tol=0).fit(values[:, None].astype("d")).inertia_
    assert inertia(values, table) <= 1.1 * theirs
    assert inertia(values, table) <= inertia(values, np.linspace(values.min(), values.max(), n))


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=11), st.integers(1, 5))
@settings(deadline=None, max_examples=25)
def test_each_value_of_a_palette_is_the_mean_of_those_nearest_to_it(values, n):
    values = np.array(values, np.float32)
    table = palette(values, n)
    nearest = np.abs(values[:, None] - np.unique(table)).argmin(1)
    means = [values[nearest == i].mean(dtype="d") for i in range(len(np.unique(table)))]
    np.testing.assert_allclose(np.unique(table), means, atol=1e-9)


def test_palettes_are_the_same_on_any_number_of_threads():
    values = np.random.default_rng(0).standard_normal(20_000)
    with threadpool_limits(1):
        alone = palette(values, 64)
    with threadpool_limits(4):
        np.testing.assert_array_equal(palette(values, 64), alone)


def test_palettes_far_from_zero_or_with_one_far_value_stay_optimal():
    values = np.concatenate([1e4 + np.linspace(0, 1, 2001), [6e4]])
    alone = inertia(values[:-1], palette(values[:-1], 4))
    assert inertia(values, palette(values, 5)) == pytest.approx(alone, rel=1e-3)
    assert alone == pytest.approx(2001 / 12 / 16, rel=0.01)


def test_palettes_hold_all_values_where_there_are_few():
    np.testing.assert_array_equal(palette(np.array([3, 1, 3, 1, 2], "f"), 3), [1, 2, 3])
    np.testing.assert_array_equal(palette(np.array([3, 1, 3], "f"), 4), [1, 3, 3, 3])


def test_quantized_weights_are_whole_multiples_of_the_channels_scale():
    network = set_to([[[[7, 3.4, -3.6, -7]]], [[[0.5, 0.04, -1.75, 0.13]]], [[[0, 0, 0, 0]]]])
    decoded = weight(_methods.quantized(network, 4).network)
    np.testing.assert_array_equal(
        decoded.reshape(3, 4), [[7, 3, -4, -7], [0.5, 0, -1.75, 0.25], [0, 0, 0, 0]]
    )


@given(NETWORKS, st.integers(2, 8))
@settings(deadline=None, max_examples=25)
def test_quantization_moves_no_weight_by_more_than_half_a_scale(network, bits):
    rows = weight(network).reshape(4, -1).astype("d")
    decoded = weight(_methods.quantized(network, bits).network).reshape(4, -1).astype("d")
    most = 2 ** (bits - 1) - 1
    exact = np.abs(rows).max(1, keepdims=True) / most
    scales = exact.astype(np.float16)
    scales = np.where(scales < exact, np.nextafter(scales, np.float16(np.inf)), scales).astype("d")
    steps = decoded / scales
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-6)
    assert np.abs(steps).max() < most + 0.5
    assert (np.abs(rows - decoded) <= scales / 2 * (1 + 1e-6)).all()


def test_product_quantization_takes_consecutive_inputs_at_each_tap():
    one, two = np.array([1, -2, 0.3]), np.array([5, 0, 0.1])
    values = np.empty((3, 6, 2, 2), np.float32)
    for out, block, row, column in np.ndindex(3, 2, 2, 2):
        values[out, 3 * block : 3 * block + 3, row, column] = (one, two)[out % 2 if block else row * column]
    peer = _methods.product_quantized(set_to(values), 2, 3)
    np.testing.assert_array_equal(weight(peer.network), halves(values))
    assert peer.bytes == 3 + 2 * 3 * 2
    assert np.abs(weight(_methods.product_quantized(set_to(values), 2, 6).network) - values).max() > 0.1


def test_product_quantization_leaves_layers_that_it_cannot_divide_in_fp16():
    network = tiny()
    np.testing.assert_array_equal(
        weight(_methods.product_quantized(network, 4, 2).network), halves(weight(network))
    )


def test_product_quantization_of_a_whole_filter_of_one_tap_is_k_means_of_filters():
    rows = np.random.default_rng(0).normal(size=(60, 5)).astype("f")
    rows += 9 * np.eye(5)[np.arange(60) % 5]
    decoded = weight(_methods.product_quantized(set_to(rows.reshape(60, 5, 1, 1).repeat(2, 3)), 5, 5).network)
    expected = np.array([rows[np.arange(60) % 5 == i % 5].mean(0) for i in range(60)])
    np.testing.assert_allclose(decoded[:, :, 0, 1], expected, rtol=2e-3, atol=1e-3)


@given(NETWORKS, st.floats(0.001, 1), st.sampled_from(_formats.PRECISIONS))
@settings(deadline=None, max_examples=25)
def test_pruning_keeps_exactly_the_largest_of_all_layers(network, keep, precision):
    network.append(nn.Conv2d(2, 3, 3))
    bank = extract(network)
    flat, n = bank.kernels.ravel(), max(1, round(keep * bank.kernels.size))
    expected = np.where(np.abs(flat) >= np.sort(np.abs(flat))[-n], flat, 0)
    made = _methods.pruned(network, keep, precision=precision)
    decoded = extract(made.network).kernels.ravel()
    if precision == "fp16":
        np.testing.assert_array_equal(decoded, halves(expected))
    assert (decoded[expected == 0] == 0).all()
    for layer in bank.layers:
        rows, mine = (
            x.reshape(-1, *bank.size)[layer.rows].reshape(layer.shape[0], -1) for x in (expected, decoded)
        )
        step = np.abs(rows).max(1, keepdims=True) / 127
        assert (np.abs(rows - mine) <= 0.501 * step + 1e-7).all()


def test_pruning_keeps_the_first_of_equal_weights():
    decoded = weight(_methods.pruned(set_to([[[[2, -2, 2, 1]]]]), 0.5).network)
    np.testing.assert_array_equal(decoded.ravel(), [2, -2, 0, 0])


@pytest.mark.parametrize("turned", [False, True])
def test_son_is_a_clustering_with_scales_in_fp16_as_a_ledger_counts_it(turned):
    network = wide()
    made = peers.son(network, 20, turned=turned, seed=3)
    found = cluster(extract(network), 20, scope="global", scaled=True, turned=turned, seed=3)
    compressed = compression.expand(compression.compress(network, found, precision="fp16"))
    np.testing.assert_array_equal(extract(made.network).kernels, extract(compressed).kernels)
    assert made.bytes == compression.footprint(network, found).loc["convolutions", "fixed_fp16"]
    assert made.clustering.inertia == found.inertia
    assert _methods.palettized(network, 2).clustering is None


# At 3,500, 32 clusters fit only if kernels are not turned.
BUDGETS = [1_300, 2_100, 3_100, 3_500, 4_300, 5_900, 9_000]
GRIDS = {
    "kmeans palette per tensor": [_formats.Palette(b, "kmeans", "tensor") for b in range(1, 9)],
    "uniform palette per channel": [_formats.Palette(b, "uniform", "channel") for b in range(1, 9)],
    "quantization": [_formats.Rounded(b) for b in range(2, 9)],
}


@pytest.mark.parametrize("budget", BUDGETS)
def test_each_way_takes_as_much_of_the_budget_as_it_can(budget, monkeypatch):
    monkeypatch.setattr(peers, "_SON_KS", (2, 8, 32))
    network = wide()
    bank = extract(network)
    assert byte_counts.convolution_bytes(network) == 4 * (32 * 16 * 9 * 2 + 32)
    found = {peer.name: peer for peer in peers.at_bytes(network, budget)}
    assert all(peer.bytes <= budget for peer in found.values())
    for name, forms in GRIDS.items():
        sizes = [128 + sum(form.bytes(layer) for layer in bank.layers) for form in forms]
        fitting = [n for n in sizes if n <= budget]
        assert (name in found) == bool(fitting)
        assert not fitting or found[name].bytes == max(fitting)
    for turned, name in ((False, "Son et al. 2018"), (True, "Son et al. 2018, turned")):
        sizes = [peers.son(network, k, turned=turned).bytes for k in (2, 8, 32)]
        assert (name in found) == (min(sizes) <= budget)
        assert name not in found or found[name].bytes == max(n for n in sizes if n <= budget)
    # Another weight takes 2 bytes at most, and some of the masks' bits.
    assert found["pruning"].bytes > budget - 8


def test_the_best_width_and_precision_are_those_that_move_the_weights_least():
    network = wide()
    bank = extract(network)

    def moved(peer):
        return np.square(extract(peer.network).kernels - bank.kernels).sum()

    products = [_methods.product_quantized(network, 2**b, w) for b in range(1, 13) for w in (2, 4, 8, 16)]
    shares = np.linspace(0.02, 1, 50)
    pruned = [_methods.pruned(network, share, precision=p) for share in shares for p in _formats.PRECISIONS]
    for budget in (2_000, 6_000):
        found = {peer.name: peer for peer in peers.at_bytes(network, budget)}
        largest = {}
        for peer in products:
            width = peer.setting.split()[-1]
            if peer.bytes <= budget and peer.bytes >= getattr(largest.get(width), "bytes", 0):
                largest[width] = peer
        assert found["product quantization"].setting == min(largest.values(), key=moved).setting
        assert moved(found["pruning"]) <= min(moved(peer) for peer in pruned if peer.bytes <= budget)


def test_all_weights_are_kept_where_they_take_no_mask():
    network = set_to(np.random.default_rng(0).normal(size=(32, 32, 3, 3)))
    whole = 32 * 32 * 9 + 32 * 2
    assert _methods.pruned(network, 1 - 1 / 300, precision="int8").bytes > whole
    (full,) = (x for x in peers.at_bytes(network, whole) if x.name == "pruning")
    assert (full.setting, full.bytes) == ("1 kept, int8", whole)


def test_ways_that_cannot_get_so_small_or_not_with_these_kernels_are_absent():
    assert peers.at_bytes(wide(), 128) == []
    lines = nn.Sequential(nn.Conv2d(3, 30, (1, 5), bias=False))
    names = [peer.name for peer in peers.at_bytes(lines, 10_000)]
    assert "Son et al. 2018" in names
    assert "Son et al. 2018, turned" not in names
    assert "product quantization" not in names
    assert len(names) == len(set(names)) == 7


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x: _methods.palettized(x, 0), "bits is 0;"),
        (lambda x: _methods.palettized(x, 9), "bits is 9"),
        (lambda x: _methods.palettized(x, 2.0), r"bits is 2\.0"),
        (lambda x: _methods.quantized(x, 1), "bits is 1;"),
        (lambda x: _methods.quantized(x, True), "bits is True"),
        (lambda x: _methods.product_quantized(x, 0, 2), "n_clusters is 0"),
        (lambda x: _methods.product_quantized(x, 2, 0), "width is 0;"),
        (lambda x: _methods.product_quantized(x, 2, 3, seed=-1), "seed is -1"),
        (lambda x: _methods.pruned(x, 0), "keep is 0;"),
        (lambda x: _methods.pruned(x, 1.1), r"keep is 1\.1"),
        (lambda x: _methods.pruned(x, math.nan), "keep is nan"),
        (lambda x: peers.son(x, 13, turned=False), "n_clusters is 13"),
        (lambda x: peers.at_bytes(x, 0), "budget is 0"),
        (lambda x: peers.at_bytes(x, 100, seed=2**32), "seed is 4294967296"),
    ],
)
def test_values_out_of_range_are_refused(call, sentence):
    with pytest.raises(InvalidValueError, match=sentence):
        call(tiny())


@pytest.mark.parametrize(
    "call",
    [
        lambda x: _methods.palettized(x, 2),
        lambda x: _methods.quantized(x, 2),
        lambda x: _methods.product_quantized(x, 2, 3),
        lambda x: _methods.pruned(x, 0.5),
        lambda x: peers.son(x, 2, turned=False),
    ],
)
def test_weights_beyond_fp16_are_refused(call):
    with pytest.raises(InvalidValueError, match=r"fp16.*65504"):
        call(set_to(1e6 * np.random.default_rng(0).normal(size=(4, 3, 3, 3))))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x: _methods.palettized(x, 2, kind="unifrom"), "kind of palette 'unifrom'.*'uniform'"),
        (
            lambda x: _methods.palettized(x, 2, per="layer"),
            "granularity 'layer'; known: tensor, channel",
        ),
        (lambda x: _methods.pruned(x, 0.5, precision="bf16"), "precision 'bf16' .*known: fp16, int8"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(call, sentence):
    with pytest.raises(UnknownNameError, match=sentence):
        call(tiny())
