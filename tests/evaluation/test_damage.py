from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from kclib import clustering, compression, evaluation, kernels
from kclib.clustering import Clustering, Group, _clustering
from kclib.compression import byte_counts
from kclib.datasets import ImageSet
from kclib.errors import InvalidValueError, UnknownNameError
from kclib.evaluation import damage
from kclib.kernels import KernelBank, Layer
from kclib.models import Model
from kclib.recovery import restoration

pytestmark = pytest.mark.usefixtures("one_thread")


def by_hand():
    """Four kernels of two layers in two groups, each with an error that is seen at a glance."""
    layers = Layer("one", (3, 1, 1, 2), 0), Layer("two", (1, 1, 1, 2), 3)
    values = np.array([[[1, 0]], [[3, 0]], [[9, 1]], [[0, 5]]], np.float32)
    bank = KernelBank(values, layers, {})
    books = np.array([[[2, 0]], [[9, 0]]], np.float32), np.array([[[0, 2]]], np.float32)
    groups = (
        Group("first", layers[:1], books[0], np.array([0, 0, 1], np.int32), 3.0),
        Group("second", layers[1:], books[1], np.array([0], np.int32), 9.0),
    )
    return bank, Clustering(groups, "mapping", 0)


def test_clusters_cost_what_is_counted_by_hand_the_worst_first():
    table = damage.by_cluster(*by_hand(), np.array([1, 3, 8, 0.5]))
    rows = list(table[["group", "cluster", "kernels", "error", "damage"]].itertuples(index=False, name=None))
    assert rows == [("first", 1, 1, 1, 8), ("second", 0, 1, 9, 4.5), ("first", 0, 2, 2, 4)]
    np.testing.assert_allclose(table.share, np.array([8, 4.5, 4]) / 16.5)
    alike = damage.by_cluster(*by_hand())
    assert list(alike.damage) == list(alike.error) == [9, 2, 1]


def test_another_bank_and_weights_out_of_range_are_refused():
    bank, made = by_hand()
    with pytest.raises(InvalidValueError, match="give the bank it was made of"):
        damage.by_cluster(bank.only("one"), made)
    with pytest.raises(InvalidValueError, match="sample_weight has shape"):
        damage.by_cluster(bank, made, np.ones(3))


def small(seed=0, scope="layer", **options):
    """Return a model of three convolutions, a clustering of it, and images that it answers rightly."""
    torch.manual_seed(seed)
    convolutions = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 24, 3), nn.ReLU(), nn.Conv2d(24, 5, 3)]
    network = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    images = torch.randint(0, 256, (40, 3, 9, 9), dtype=torch.uint8)
    labels = network(images.float() / 99).argmax(1)
    model = Model("small", network, lambda x: x.float() / 99)
    made = clustering.cluster(kernels.extract(network), 4, scope=scope, progress=False, **options)
    return model, made, ImageSet("random/test", images, labels, tuple("abcde"), "f" * 64)


@pytest.mark.parametrize("scaled", [False, True])
def test_restored_kernels_are_the_dense_ones_and_the_others_are_clustered(scaled):
    model, made, _ = small(scaled=scaled)
    bank = kernels.extract(model.network)
    table = damage.by_cluster(bank, made)
    chosen = {(row.group, row.cluster) for row in table.head(3).itertuples()}
    own = np.concatenate([[(g.name, k) in chosen for k in g.indices] for g in made.groups])
    found = kernels.extract(damage._restored(model, made, table.head(3)).network).kernels
    np.testing.assert_array_equal(
        found, np.where(own[:, None, None], bank.kernels, _clustering.quantized(made))
    )
    assert 0 < own.sum() == table.head(3).kernels.sum() < len(bank)


def test_all_clusters_restored_win_back_all_that_was_lost():
    model, made, data = small()
    table = damage.by_cluster(kernels.extract(model.network), made)
    found = damage.won_back(model, made, table, data, (0, 2, len(table)), progress=False)
    clustered = replace(model, network=compression.replaced(model.network, made))
    lost = 100 - evaluation.evaluate(clustered, data, progress=False).top1.estimate
    assert lost > 10
    assert (found.won.iloc[0], found.won.iloc[2], found.top1.iloc[2]) == (0, lost, 100)
    assert (found.share.iloc[2], found.kernels.iloc[2]) == (pytest.approx(1), made.n_kernels)
    assert found.share.iloc[1] == pytest.approx(table.share[:2].sum())
    assert (found.won_low <= found.won).all()


def stored(model, made, precision="fp16"):
    table = compression.footprint(model.network, made, codings=["entropy"])
    return table.loc["convolutions", f"entropy_{precision}"]


@given(
    st.integers(0, 99), st.integers(0, 600), st.sampled_from(["layer", "global"]),
    st.sampled_from(byte_counts.PRECISIONS),
)  # fmt: skip
@settings(deadline=None, max_examples=10)
def test_never_more_bytes_than_the_budget_nor_more_damage_than_before(seed, budget, scope, precision):
    model, made, _ = small(seed, scope)
    bank = kernels.extract(model.network)
    sample_weight = np.random.default_rng(seed).lognormal(size=len(bank)).astype(np.float32)
    options = {"sample_weight": sample_weight, "precision": precision, "progress": False}
    found = restoration.restore_worst(model, made, budget, **options)
    spent = stored(model, found.clustering, precision) - stored(model, made, precision)
    assert found.n_bytes == spent <= budget
    for old, new in zip(made.groups, found.clustering.groups, strict=True):
        assert (np.bincount(new.indices, minlength=new.n_clusters) > 0).all()
        assert len(np.unique(new.codebook.reshape(new.n_clusters, -1), axis=0)) == new.n_clusters
        assert (new.codebook.dtype, new.indices.dtype, new.layers) == (np.float32, np.int32, old.layers)
        assert new.n_clusters >= old.n_clusters
    before, after = (damage.by_cluster(bank, x, sample_weight) for x in (made, found.clustering))
    assert found.table.clusters.sum() == len(after) - len(before)
    for name, column in (("before", before), ("after", after)):
        sums = column.groupby("group", sort=False).damage.sum()
        np.testing.assert_allclose(found.table.set_index("group")[name][sums.index], sums, rtol=1e-6)
    assert (found.table.after <= found.table.before * (1 + 1e-6)).all()
    errors = np.square(bank.kernels - _clustering.quantized(found.clustering)).sum(dtype="d")
    assert found.clustering.inertia == pytest.approx(errors)


def test_bytes_go_where_the_damage_is_and_what_is_bought_can_be_saved(tmp_path):
    model, made, _ = small()
    bank = kernels.extract(model.network)
    sample_weight = np.zeros(len(bank), np.float32)
    sample_weight[bank.layer("2").rows] = 1
    found = restoration.restore_worst(model, made, 500, sample_weight=sample_weight, progress=False)
    assert list(found.table.clusters > 0) == [False, True, False]
    assert found.n_bytes > 400
    # 192 kernels that all cost alike: no worse than clustering them anew with as many representatives
    k = found.clustering.groups[1].n_clusters
    anew = clustering.cluster(bank.only("2"), k, progress=False)
    assert found.clustering.groups[1].inertia < 1.25 * anew.inertia
    packed = compression.compress(model.network, found.clustering, precision="fp16")
    compression.save(packed, tmp_path / "m.safetensors")
    again = compression.load(tmp_path / "m.safetensors", architecture=model.network, resident="dense")
    for name, value in found.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name])


def test_one_split_is_bought_where_a_cluster_holds_two_kinds_of_kernels():
    network = nn.Conv2d(1, 8, 3, bias=False)
    values = torch.tensor([0.0, 0, 0, 0, 1, 1, 3, 5])[:, None, None, None]
    network.weight.data.copy_(values.expand(8, 1, 3, 3))
    bank = kernels.extract(network)
    layer = bank.layers[0]
    book = np.stack([np.full((3, 3), value, np.float32) for value in (1 / 3, 4)])
    group = Group(layer.name, (layer,), book, np.array([0] * 6 + [1] * 2, np.int32), 30.0)
    made = Clustering((group,), "layer", 0)
    # Apart, 3 and 5 save 9 + 9 for 18 bytes and two bits; 0 and 1 save 9 · (4/9 + 8/9) for 18 and 5.5 bits.
    found = restoration.restore_worst(Model("one", network, None), made, 30, progress=False)
    assert found.clustering.groups[0].indices[-1] != found.clustering.groups[0].indices[-2]
    assert sorted(found.clustering.groups[0].codebook[:, 0, 0]) == pytest.approx([1 / 3, 3, 5])
    assert tuple(found.table.iloc[0, 1:]) == pytest.approx((1, 30, 12))
    whole = restoration.restore_worst(Model("one", network, None), made, 10_000, progress=False)
    assert sorted(whole.clustering.groups[0].codebook[:, 0, 0]) == [0, 1, 3, 5]


def test_nothing_is_bought_of_nothing_and_wrong_values_are_refused():
    model, made, _ = small()
    found = restoration.restore_worst(model, made, 0, progress=False)
    assert (found.n_bytes, found.clustering) == (0, made)
    for budget in (-1, np.inf, np.nan):
        with pytest.raises(InvalidValueError, match="budget is"):
            restoration.restore_worst(model, made, budget)
    with pytest.raises(UnknownNameError, match="precision"):
        restoration.restore_worst(model, made, 9, precision="fp8")
    with pytest.raises(InvalidValueError, match="scaled or turned"):
        restoration.restore_worst(model, small(scaled=True)[1], 9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), budget=st.integers(0, 400))
def test_what_is_not_split_could_not_have_gained_more(seed, budget):
    draw = np.random.default_rng(seed)
    layer = Layer("one", (6, 5, 1, 3), 0)
    bank = KernelBank(draw.standard_normal((30, 1, 3), np.float32), (layer,), {})
    made = clustering.cluster(bank, 4, seed=seed, progress=False)
    costs = draw.random(30, np.float32)
    market = restoration._Market.of(bank, made, costs, "fp16")
    for k in range(4):
        rows = np.flatnonzero(made.groups[0].indices == k)
        whole = restoration._Cluster(0, k, rows, made.groups[0].codebook[k].ravel())
        if len(rows) > 1 and (split := market.split(whole)) is not None:
            assert split.gain <= market.most(whole)
    lazy = market.bought(budget, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restoration._Market, "most", lambda self, whole: float("1e9"))
        eager = market.bought(budget, progress=False)
    assert [(x.cluster, x.gain) for x in lazy] == [(x.cluster, x.gain) for x in eager]


def test_a_network_alone_is_restored_as_a_model_is():
    model, made, _ = small()
    ours, alone = (restoration.restore_worst(x, made, 300, progress=False) for x in (model, model.network))
    assert ours.model == replace(model, network=ours.network)
    assert alone.model is alone.network
    pd.testing.assert_frame_equal(ours.table, alone.table)
