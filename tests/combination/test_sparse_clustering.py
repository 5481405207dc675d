import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from kclib import clustering, compression
from kclib.clustering import _clustering
from kclib.combination import _sparse_clustering
from kclib.errors import InvalidValueError
from kclib.kernels import KernelBank, Layer, extract

SCOPES = st.sampled_from(["layer", "global", {"conv0": "ends", "conv1": "middle", "conv2": "ends"}])
ZERO, A, B = (np.full((2, 2), value, np.float32) for value in (0, 1, 5))


def bank_of(**layers):
    """Return a bank of named layers, each given as its kernels, one input channel."""
    start, made = 0, []
    for name, given_kernels in layers.items():
        made.append(Layer(name, (len(given_kernels), 1, *given_kernels[0].shape), start))
        start += len(given_kernels)
    return KernelBank(np.concatenate([np.stack(x) for x in layers.values()]), tuple(made), {})


def sparse_bank(seed, *shares, n=30):
    draw = np.random.default_rng(seed)
    made = [draw.normal(size=(n, 3, 3)).astype("f") * (draw.random((n, 1, 1)) > x) for x in shares]
    return bank_of(**{f"conv{i}": list(x.astype("f")) for i, x in enumerate(made)})


@given(SCOPES, st.integers(1, 30), st.integers(0, 99), st.sampled_from([0.0, 0.5]), st.booleans())
@settings(deadline=None, max_examples=20)
def test_zero_kernels_are_zero_and_the_others_are_clustered_as_without_them(scope, k, seed, price, weighted):
    bank = sparse_bank(seed, 0.7, 0.0, 1.0 if scope == "layer" else 0.9)
    sample_weight = np.random.default_rng(seed).lognormal(size=len(bank)).astype("f") if weighted else None
    found = _sparse_clustering.cluster(
        bank, k, scope=scope, price=price, sample_weight=sample_weight, seed=seed, progress=False
    )
    rows, dead = _clustering.quantized(found), ~bank.kernels.any(axis=(1, 2))
    assert not rows[dead].any()
    assert found.scope == (scope if isinstance(scope, str) else "mapping")
    assert (found.seed, found.layers) == (seed, bank.layers)
    assert found.inertia == pytest.approx(np.square(bank.kernels - rows).sum(dtype="d"), rel=1e-4)
    for group in found.groups:
        mine = np.concatenate([np.arange(x.rows.start, x.rows.stop) for x in group.layers])
        left = mine[~dead[mine]]
        assert (np.bincount(group.indices, minlength=group.n_clusters) > 0).all()
        assert len(np.unique(group.codebook, axis=0)) == group.n_clusters
        others, most = group.n_clusters - dead[mine].any(), min(k, len(left))
        assert min(1, most) <= others <= most
        assert price or others == most
        if len(left):
            alone = bank_of(one=list(bank.kernels[left]))
            theirs = clustering.cluster(
                alone,
                min(k, len(left)),
                price=price,
                seed=seed,
                sample_weight=None if sample_weight is None else sample_weight[left],
            )
            np.testing.assert_array_equal(rows[left], _clustering.quantized(theirs))


def test_groups_of_few_others_are_noted_and_those_without_zeros_have_none():
    bank = bank_of(full=[A, A, B], half=[ZERO, A, ZERO], empty=[ZERO, ZERO, ZERO])
    found = _sparse_clustering.cluster(bank, 2)
    full, half, empty = found.groups
    np.testing.assert_array_equal(np.sort(full.codebook[:, 0, 0]), [1, 5])
    np.testing.assert_array_equal(half.codebook, [A, ZERO])
    np.testing.assert_array_equal(empty.codebook, [ZERO])
    assert (half.indices.tolist(), empty.indices.tolist(), empty.inertia) == ([1, 0, 1], [0, 0, 0], 0)
    (note,) = found.notes
    assert note.startswith("half: 1 clusters in place of 2, for its 1 kernels that are not zero")
    assert _sparse_clustering.cluster(bank, 2, price=1e-3).notes == ()
    assert _sparse_clustering.cluster(bank_of(one=[ZERO, ZERO]), 2).n_clusters == 1


def test_opposite_kernels_share_the_zero_that_is_their_mean():
    (group,) = _sparse_clustering.cluster(bank_of(one=[A, -A, ZERO]), 1).groups
    np.testing.assert_array_equal(group.codebook, [ZERO])
    assert group.indices.tolist() == [0, 0, 0]
    assert group.inertia == pytest.approx(8)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_zero_kernels_are_zero_in_a_compressed_network(precision):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3))
    gone = torch.rand(8, 4) < 0.6
    with torch.no_grad():
        network[0].weight[gone] = 0
    found = _sparse_clustering.cluster(extract(network), 5, scope="global")
    assert found.n_clusters == 6
    small = compression.expand(compression.compress(network, found, precision=precision))
    assert torch.equal(~small[0].weight.flatten(2).any(2), gone)
    assert small[1].weight.flatten(2).any(2).all()


@pytest.mark.parametrize(
    ("n_clusters", "options", "sentence"),
    [
        (4, {}, "n_clusters is 4;"),
        (0, {}, "n_clusters is 0"),
        (1, {"sample_weight": np.ones(3)}, r"sample_weight has shape \(3,\); it must be \(5,\)"),
        (1, {"price": -1}, "price is -1"),
    ],
)
def test_options_out_of_range_are_refused_as_by_clustering(n_clusters, options, sentence):
    with pytest.raises(InvalidValueError, match=sentence):
        _sparse_clustering.cluster(bank_of(one=[A, ZERO, B], two=[ZERO, A]), n_clusters, **options)


def test_k_may_be_that_of_the_group_before_it_was_pruned():
    assert _sparse_clustering.cluster(bank_of(one=[A, ZERO, B], two=[ZERO, A]), 3).n_clusters == 3 + 2
    assert _sparse_clustering.cluster(bank_of(one=[A, ZERO, B]), {"one": 3}).n_clusters == 3
