from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy.spatial.distance import cdist
from torch import nn

import kclib
from benchmarks.representatives import KINDS, cluster
from kclib import clustering, compression, kernels
from kclib.clustering import _clustering
from kclib.errors import InvalidValueError, UnknownNameError
from kclib.kernels import KernelBank, Layer
from kclib.kmeans import _nearest as kmeans_nearest
from kclib.kmeans import symmetric

EACH = pytest.mark.parametrize("kind", KINDS)
SCALED = pytest.mark.parametrize("kind", ["scaled", "scaled-symmetric"])


def bank_of(*parts, transposed=()):
    """Return a bank of layers "0", "1", ... given as their weights ``(out, in, kh, kw)``."""
    layers, start = [], 0
    for i, part in enumerate(parts):
        layers.append(Layer(str(i), part.shape, start, i in transposed))
        start += layers[-1].n_kernels
    kernels = np.concatenate([part.reshape(-1, *part.shape[2:]) for part in parts]).astype(np.float32)
    return KernelBank(kernels, tuple(layers), {})


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def error(bank, result, sample_weight=1):
    """Return the weighted sum of squared errors, in float64."""
    difference = bank.kernels.astype(np.float64) - _clustering.quantized(result.clustering)
    return float((sample_weight * np.square(difference).sum(axis=(1, 2))).sum())


@pytest.mark.parametrize(
    ("kind", "how", "codebooks_and_indices", "scales"),
    [
        # 3 representatives of 4 fp16 weights a layer; 6 and 10 indices, of 2 bits, or 5 with turns
        ("mean", {}, 48 + 2 + 3, 0),
        ("medoid", {}, 48 + 2 + 3, 0),
        ("scaled", {}, 48 + 2 + 3, 2 * 16),
        ("scaled", {"scale_bits": 2}, 48 + 2 + 3, 2 + 3 + 2 * (4 + 4)),
        ("scaled", {"scale_bits": 3}, 48 + 2 + 3, 3 + 4 + 2 * (6 + 8)),  # the first has but 6 lengths
        ("scaled", {"scale_bits": 3, "scope": "global"}, 24 + 2 + 3, 3 + 4 + 2 * 8),
        ("symmetric", {}, 48 + 4 + 7, 0),
        ("scaled-symmetric", {}, 48 + 4 + 7, 2 * 16),
        ("layer-normalised", {"scope": "global"}, 24 + 2 + 3, 2 * 2),
        ("filter-normalised", {"scope": "global"}, 24 + 2 + 3, 2 * (3 + 5)),
        ("filter-normalised", {}, 48 + 2 + 3, 2 * (3 + 5)),
    ],
)
def test_bytes_are_those_counted_by_hand(kind, how, codebooks_and_indices, scales):
    bank = bank_of(drawn(3, 2, 2, 2), drawn(2, 5, 2, 2, seed=1), transposed=[1])
    result = cluster(bank, 3, kind, **how)
    assert result.kind == kind
    assert result.n_bytes() == codebooks_and_indices + scales
    entries = result.clustering.n_clusters
    assert result.n_bytes("fp32") == result.n_bytes() + entries * 4 * 2
    assert result.n_bytes("int8") == result.n_bytes() + entries * (4 + 2 - 4 * 2)


def test_mean_and_symmetric_are_the_clusterings_of_their_names():
    bank, sample_weight = bank_of(drawn(5, 6, 3, 3)), np.arange(30)
    for kind, turned in (("mean", False), ("symmetric", True)):
        mine = cluster(bank, 4, kind, sample_weight=sample_weight, seed=2).clustering
        theirs = clustering.cluster(bank, 4, turned=turned, sample_weight=sample_weight, seed=2)
        np.testing.assert_array_equal(_clustering.quantized(mine), _clustering.quantized(theirs))


@pytest.mark.parametrize(("sample_weight", "medoid"), [(None, 1), ([1, 1, 10], 5), ([10, 1, 1], 0)])
def test_a_medoid_is_the_kernel_nearest_to_the_weighted_mean(sample_weight, medoid):
    bank = bank_of(np.array([0, 1, 5]).reshape(3, 1, 1, 1))
    (group,) = cluster(bank, 1, "medoid", sample_weight=sample_weight).clustering.groups
    assert (group.codebook.item(), group.inertia) == (medoid, sum((x - medoid) ** 2 for x in (0, 1, 5)))


@given(st.integers(1, 30), st.sampled_from(["layer", "global"]), st.sampled_from([1e-24, 1, 1e6]))
@settings(deadline=None, max_examples=20)
def test_medoids_are_kernels_of_their_group_to_the_bit_and_serve_the_nearest(n_clusters, scope, unit):
    bank = bank_of(unit * drawn(5, 6, 3, 3), unit * drawn(8, 3, 3, 3, seed=1))
    for group in cluster(bank, n_clusters, "medoid", scope=scope).clustering.groups:
        own = np.concatenate([bank.points[layer.rows] for layer in group.layers])
        medoids = group.codebook.reshape(group.n_clusters, -1)
        assert {x.tobytes() for x in medoids} <= {x.tobytes() for x in own}
        assert len(medoids) == min(n_clusters, len(own))
        distances = cdist(own.astype("d"), medoids.astype("d"))
        chosen = distances[np.arange(len(own)), group.indices]
        np.testing.assert_allclose(chosen, distances.min(1), rtol=1e-4, atol=1e-6 * unit)


def test_equal_medoids_of_two_clusters_become_one(monkeypatch):
    bank, labels = bank_of(np.array([0, 0, -1, 1]).reshape(4, 1, 1, 1)), np.array([0, 1, 0, 1], np.int32)
    halves = np.array([-0.5, 0.5], np.float32).reshape(2, 1, 1)
    split = clustering.Clustering((clustering.Group("0", bank.layers, halves, labels, 1.0),), "layer", 0)
    monkeypatch.setattr(kclib, "cluster", lambda *_, **__: split)
    # either of two equal medoids is the nearest
    monkeypatch.setattr(
        kmeans_nearest, "nearest", lambda *_, **__: kmeans_nearest.Assignment(labels, np.zeros(4, np.float32))
    )
    (group,) = cluster(bank, 2, "medoid").clustering.groups
    assert (group.codebook.tolist(), group.indices.tolist(), group.inertia) == ([[[0]]], [0, 0, 0, 0], 2)


@SCALED
def test_multiples_of_one_shape_come_back_up_to_the_rounding_of_fp16(kind):
    lengths = np.random.default_rng(1).normal(size=(20, 2, 1, 1)).astype("f")
    bank = bank_of(lengths * drawn(3, 3), 7 * lengths * drawn(3, 3))
    result = cluster(bank, 1, kind, scope="global")
    np.testing.assert_allclose(_clustering.quantized(result.clustering), bank.kernels, rtol=2**-10, atol=1e-6)
    assert error(bank, result) > 0
    (group,) = result.clustering.groups
    np.testing.assert_array_equal(group.scales, group.scales.astype(np.float16))


@SCALED
def test_scales_of_more_bits_come_from_larger_tables_of_fp16_values_and_err_less(kind):
    bank = bank_of(drawn(30, 40, 3, 3), drawn(10, 40, 3, 3))
    exact = clustering.cluster(bank, 4, scaled=True, turned=kind != "scaled")
    errors = []
    for bits in (2, 4, 6, 16):
        result = cluster(bank, 4, kind, scale_bits=bits)
        for group, before in zip(result.clustering.groups, exact.groups, strict=True):
            table = np.unique(group.scales)
            np.testing.assert_array_equal(table, table.astype(np.float16))
            assert bits == 16 or len(table) == 2**bits
            nearest = np.abs(before.scales[:, None] - table).min(1)
            np.testing.assert_allclose(np.abs(before.scales - group.scales), nearest, rtol=1e-6, atol=1e-7)
        errors.append(error(bank, result) - exact.inertia)
    assert all(more < less / 5 for less, more in pairwise(errors))


def test_a_table_of_scales_serves_the_kernels_that_weigh_more():
    lengths = np.array([1, 2, 4, 8, 16, 17])
    bank = bank_of(lengths[:, None, None, None] * np.array([[0.6, 0.8]]))
    for sample_weight, table in ((None, [1.5, 4, 8, 16.5]), ([1e-6, 1e-6, 1, 1, 1, 1], [4, 8, 16, 17])):
        result = cluster(bank, 1, "scaled", sample_weight=sample_weight, scale_bits=2)
        assert np.unique(np.abs(result.clustering.groups[0].scales)).tolist() == table


def test_layers_that_differ_by_a_factor_share_normalised_representatives_exactly():
    shapes = drawn(8, 1, 3, 3)
    bank = bank_of(shapes, 4 * shapes[::-1], 0 * shapes)
    scale = np.sqrt(np.square(shapes, dtype=np.float64).mean()).astype(np.float16)
    result = cluster(bank, 8, "layer-normalised", scope="global")
    np.testing.assert_allclose(_clustering.quantized(result.clustering), bank.kernels, rtol=3e-7)
    (group,) = result.clustering.groups
    np.testing.assert_array_equal(group.scales, np.repeat([scale, 4 * scale, 0], 8))
    assert error(bank, cluster(bank, 8, scope="global")) > 1


@pytest.mark.parametrize("transposed", [False, True])
def test_filters_that_differ_by_a_factor_share_normalised_representatives_exactly(transposed):
    shapes, factors = drawn(1, 5, 3, 3), np.array([1, 0.25, 8, 0]).reshape(4, 1, 1, 1)
    weight = factors * shapes  # (out, in, 3, 3)
    stored = weight.swapaxes(0, 1) if transposed else weight
    bank = bank_of(stored, 2 * stored, transposed=[0, 1] if transposed else [])
    for scope in ("layer", "global"):
        result = cluster(bank, 5, "filter-normalised", scope=scope)
        np.testing.assert_allclose(_clustering.quantized(result.clustering), bank.kernels, rtol=3e-7)
        for other in ("mean", "layer-normalised"):
            assert error(bank, cluster(bank, 5, other, scope=scope)) > 0.1


def test_divided_kernels_weigh_as_their_own_errors_do():
    bank = bank_of(np.full((1, 1, 2, 2), 8), np.array([2, 2, 2, -2]).reshape(1, 1, 2, 2))
    for sample_weight, last in ((None, (64 - 4) / 68), ([1, 16], 0), ([0, 16], -1)):
        result = cluster(bank, 1, "layer-normalised", scope="global", sample_weight=sample_weight)
        (group,) = result.clustering.groups
        np.testing.assert_allclose(group.codebook[0].ravel(), [1, 1, 1, last], atol=1e-6)
        assert group.inertia == pytest.approx(64 * (1 - last) ** 2 + 4 * (1 + last) ** 2)


@EACH
def test_kernels_that_weigh_more_are_served_better(kind):
    bank = bank_of(drawn(10, 20, 3, 3), 2 * drawn(20, 10, 3, 3, seed=1))
    sample_weight = np.where(np.arange(400) % 4, 0.01, 1)
    weighted, plain = (
        error(bank, cluster(bank, 12, kind, scope="global", sample_weight=w, scale_bits=6), sample_weight)
        for w in (sample_weight, None)
    )
    assert weighted < 0.95 * plain


@given(
    st.sampled_from(list(KINDS)),
    st.sampled_from(["layer", "global", {"0": "a", "1": "b", "2": "a"}]),
    st.integers(1, 18),
    st.sampled_from([2, 5, 16]),
    st.sampled_from([0, 1e-3, 1, 100]),
    st.integers(0, 9),
)
@settings(deadline=None, max_examples=25)
def test_what_holds_for_every_clustering(kind, scope, n_clusters, scale_bits, factor, seed):
    first = drawn(3, 4, 3, 3, seed=seed)
    first[1] = 0
    bank = bank_of(first, factor * drawn(6, 2, 3, 3), drawn(2, 9, 3, 3, seed=seed + 1), transposed=[2])
    sample_weight = drawn(len(bank), seed=seed) ** 2 if seed % 2 else None
    result = cluster(
        bank, n_clusters, kind, scope=scope, scale_bits=scale_bits, sample_weight=sample_weight, seed=seed
    )
    assert np.isfinite(_clustering.quantized(result.clustering)).all()
    assert result.clustering.inertia == pytest.approx(error(bank, result), rel=1e-4, abs=1e-4)
    for group in result.clustering.groups:
        assert (group.codebook.dtype, group.indices.dtype) == (np.float32, np.int32)
        assert len(np.unique(group.codebook, axis=0)) == group.n_clusters <= n_clusters
        assert np.bincount(group.indices).all()
        assert group.indices.max() == group.n_clusters - 1
        assert len(group.indices) == sum(layer.n_kernels for layer in group.layers)
        assert (group.turns is not None) == ("symmetric" in kind)
        assert (group.scales is not None) == ("scaled" in kind or "normalised" in kind)
    assert result.n_bytes() > 0


@EACH
def test_kernels_that_are_all_zero_stay_so(kind):
    bank = bank_of(np.zeros((2, 3, 3, 3)), np.zeros((3, 2, 3, 3)))
    for scope in ("layer", "global"):
        result = cluster(bank, 2, kind, scope=scope, scale_bits=4)
        assert result.clustering.inertia == 0
        np.testing.assert_array_equal(_clustering.quantized(result.clustering), bank.kernels)


@EACH
def test_a_network_decodes_to_what_its_groups_say(kind, one_thread):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ConvTranspose2d(6, 4, 3), nn.Conv2d(4, 5, 3))
    bank = kernels.extract(network)
    result = cluster(bank, 5, kind, scope={"0": "ends", "1": "middle", "2": "ends"}, scale_bits=5)
    rows = np.empty_like(bank.points)
    for group in result.clustering.groups:
        own = np.concatenate([np.arange(len(bank))[layer.rows] for layer in group.layers])
        for i, row in enumerate(own):
            kernel = group.codebook[group.indices[i]].ravel()
            if group.turns is not None:
                kernel = kernel[symmetric.transforms(3)[group.turns[i]]]
            rows[row] = kernel if group.scales is None else group.scales[i] * kernel
    decoded = compression.replaced(network, result.clustering)
    for layer in bank.layers:
        weight = decoded[int(layer.name)].weight.detach().numpy()
        np.testing.assert_array_equal(weight, rows[layer.rows].reshape(layer.shape))


@EACH
def test_the_number_of_threads_changes_no_bit(kind):
    bank = bank_of(drawn(20, 30, 3, 3), drawn(30, 10, 3, 3, seed=1))
    one, two = (
        _clustering.quantized(cluster(bank, 20, kind, scale_bits=4, n_threads=n_threads).clustering)
        for n_threads in (1, 2)
    )
    np.testing.assert_array_equal(one, two)


def test_an_unknown_kind_is_refused_with_the_nearest_known_one():
    with pytest.raises(UnknownNameError, match=r"'mediod'.*'medoid'\?"):
        cluster(bank_of(drawn(2, 2, 3, 3)), 1, "mediod")
    with pytest.raises(UnknownNameError, match="'fp8'"):
        cluster(bank_of(drawn(2, 2, 3, 3)), 1).n_bytes("fp8")


@pytest.mark.parametrize("scale_bits", [1, 17, 4.0, True])
def test_scale_bits_out_of_range_are_refused(scale_bits):
    with pytest.raises(InvalidValueError, match=f"scale_bits is {scale_bits};"):
        cluster(bank_of(drawn(2, 2, 3, 3)), 1, "scaled", scale_bits=scale_bits)


@pytest.mark.parametrize("kind", ["symmetric", "scaled-symmetric"])
def test_only_square_kernels_are_turned(kind):
    with pytest.raises(InvalidValueError, match="kernels of 1×5 cannot be turned"):
        cluster(bank_of(drawn(2, 2, 1, 5)), 1, kind)


@pytest.mark.parametrize("kind", ["scaled", "scaled-symmetric", "layer-normalised", "filter-normalised"])
def test_scales_that_fp16_cannot_hold_are_refused(kind):
    bank = bank_of(np.full((2, 2, 3, 3), 1e6))
    with pytest.raises(InvalidValueError, match=r"a value of [13]e\+06 is to be stored in fp16"):
        cluster(bank, 1, kind)


@EACH
def test_in_a_group_without_weights_all_kernels_count_alike(kind):
    bank = bank_of(drawn(2, 2, 3, 3), drawn(2, 2, 3, 3))
    ours, alike = (cluster(bank, 2, kind, sample_weight=[1, 1, 1, 1, *[x] * 4]).clustering for x in (0, 1))
    (one, two), (_, same) = (clustering.error_share(bank, x) for x in (ours, alike))
    assert two == pytest.approx(same, rel=0.2)
    assert 0 < one < 1
