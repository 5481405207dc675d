import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from kclib import compression, evaluation, kernels, models
from kclib.clustering import _clustering, cluster
from kclib.datasets import ImageSet
from kclib.errors import InvalidValueError, UnknownNameError
from kclib.models import Model
from kclib.recovery import _tradeoff, allocation
from kclib.store import Store

KS = (1, 2, 4, 8, 16, 32)
OTHER = 4 * (4 * 4 + 4 + 6 + 6 + 4)  # bytes of the 1×1 kernels and all biases
PAIRS = {"0": "ends", "2": "middle", "4": "ends"}


def tiny_model() -> Model:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Conv2d(4, 4, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    network[0].weight.data *= torch.logspace(-2, 0, 6)[:, None, None, None]
    return Model("tiny", network.eval(), lambda images: images.float() / 255 - 0.5)


def images_for(model: Model) -> ImageSet:
    """Return images, and labels that the dense network gets right but for ten."""
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (120, 3, 8, 8), dtype=torch.uint8, generator=draw)
    with torch.no_grad():
        logits = model.network(model.preprocess(images))
        model.network[5].bias -= logits.mean(0)  # all classes are then answered
    labels = (logits - logits.mean(0)).argmax(1)
    labels[:10] = 3
    return ImageSet("tiny/train", images, labels, tuple("abcd"), "0")


@pytest.fixture(scope="module", autouse=True)
def _few_threads(one_thread):
    return


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Return what `allocate` is given first, and its options."""
    model = tiny_model()
    data, bank = images_for(model), kernels.extract(model.network)
    sample_weight = np.random.default_rng(0).uniform(0.1, 2, len(bank)).astype("f")
    store = Store(tmp_path_factory.mktemp("store"))
    return (model, data, bank, sample_weight), {"ks": KS, "store": store, "progress": False}


def allocated(given, **options):
    arguments, usual = given
    return allocation.allocate(*arguments, **usual | options)


def stored_bytes(model, made, coding="fixed", precision="fp16"):
    return compression.footprint(model.network, made).loc["convolutions", f"{coding}_{precision}"]


@pytest.mark.parametrize(
    ("coding", "precision", "n_bytes"),
    [("fixed", "fp16", 900), ("fixed", "int8", 700), ("entropy", "fp16", 900), ("fixed", "fp32", 1500)],
)
def test_the_most_accurate_within_the_bytes_is_the_network_that_would_be_stored(
    given, coding, precision, n_bytes
):
    (model, data, _, _), _ = given
    scopes = ("layer", "global", "mixed", PAIRS)
    got = allocated(given, n_bytes=n_bytes, coding=coding, precision=precision, scopes=scopes)
    assert got.n_bytes == stored_bytes(model, got.clustering, coding, precision) <= n_bytes
    assert {group.name: group.n_clusters for group in got.clustering.groups} == got.n_clusters
    compressed = compression.compress(model.network, got.clustering, precision=precision)
    for one, two in zip(compression.expand(compressed).parameters(), got.network.parameters(), strict=True):
        assert torch.equal(one, two)
    dense = evaluation.evaluate(model, data, progress=False)
    after = evaluation.evaluate(replace(model, network=got.network), data, progress=False)
    assert got.drop == evaluation.drop(dense, after)
    assert (got.table.bytes <= n_bytes).all()
    assert set(got.table.scope) == {"layer", "global", "mixed", "mapping"}
    best = got.table.sort_values(["drop", "bytes"]).iloc[0]
    assert (best.bytes, best["drop"]) == (got.n_bytes, got.drop.points.estimate)
    assert best.top1 == pytest.approx(after.top1.estimate)


def test_clusters_are_shared_out_for_the_least_damage(given):
    (_, _, bank, sample_weight), options = given
    got = allocated(given, n_bytes=900, scopes="layer")
    curves = _tradeoff.curves(bank, sample_weight, ks=KS, store=options["store"])
    solved = _tradeoff.solve(curves, 900 - OTHER)
    assert len(set(solved.values())) > 1
    made = cluster(bank, solved, sample_weight=sample_weight)
    damage = np.square(bank.kernels - _clustering.quantized(made)).sum((1, 2)) @ sample_weight
    assert got.table.choice.tolist() == ["solved", "uniform"]
    assert got.table.damage[0] == pytest.approx(damage)
    assert got.table.clusters[0] == sum(solved.values())
    assert got.table.damage[0] < got.table.damage[1]


@pytest.mark.parametrize(("scope", "books"), [("layer", 3), ("global", 1)])
@pytest.mark.parametrize("n_bytes", [700, 1500])
def test_uniform_is_the_largest_k_that_fits(given, scope, books, n_bytes):
    uniform = allocated(given, n_bytes=n_bytes, scopes=scope).table.iloc[-1]
    taken = {}
    for k in range(1, 33):  # a layer with fewer kernels keeps all of them
        ks = [min(k, 18), k, min(k, 24)] if scope == "layer" else [k] * 3
        bits = sum(math.ceil(n * math.ceil(math.log2(x)) / 8) for n, x in zip((18, 36, 24), ks, strict=True))
        taken[sum(ks[:books])] = OTHER + 18 * sum(ks[:books]) + bits
    largest = max(k for k, n in taken.items() if n <= n_bytes)
    assert (uniform.clusters, uniform.bytes) == (largest, taken[largest])


def test_what_turns_out_larger_than_predicted_is_built_smaller(given):
    (model, _, bank, _), _ = given
    built = []

    def twice(scope, n_clusters):
        built.append(n_clusters)
        made = cluster(bank, {name: 2 * k for name, k in n_clusters.items()}, scope=scope)
        return model.network, made

    got = allocated(given, n_bytes=900, ks=KS[:-2], scopes="layer", build=twice)
    assert got.network is model.network
    assert got.n_bytes == stored_bytes(model, got.clustering) <= 900
    assert len(built) > len(got.table)
    assert got.clustering.n_clusters == 2 * sum(got.n_clusters.values()) > 2 * 3


def test_of_clusterings_equally_accurate_the_smallest_is_returned(given):
    (model, _, bank, _), _ = given
    built = []

    def lossless(scope, n_clusters):
        built.append(n_clusters)
        return model.network, cluster(bank, n_clusters, scope=scope)

    got = allocated(given, n_bytes=900, build=lossless)
    assert got.n_bytes == got.table.bytes.min() < got.table.bytes.max()
    assert len(built) == len(got.table)  # predicted bytes are those of the ledger: none is built twice


@pytest.mark.parametrize("max_drop", [2, 20])
def test_the_fewest_bytes_that_lose_no_more(given, max_drop):
    got = allocated(given, max_drop=max_drop)
    assert got.drop.points.estimate <= max_drop
    enough = got.table[got.table["drop"] <= max_drop]
    assert got.n_bytes == enough.bytes.min()
    assert got.n_bytes < got.table.bytes.max()
    assert set(got.table.scope) == {"layer", "global"}


@pytest.mark.parametrize("layer", [500, 800])
@pytest.mark.parametrize("scopes", [("layer", "global"), ("global", "layer")])
def test_bisection_comes_close_to_the_bytes_that_suffice_in_the_best_scope(given, layer, scopes):
    (model, _, bank, _), _ = given
    useless = kernels.insert(model.network, replace(bank, kernels=np.zeros_like(bank.kernels)))
    suffices = {"layer": layer, "global": 650}

    def stepwise(scope, n_clusters):
        made = cluster(bank, n_clusters, scope=scope)
        return model.network if stored_bytes(model, made) >= suffices[scope] else useless, made

    got = allocated(given, max_drop=1, build=stepwise, ks=range(1, 33), scopes=scopes)
    best = min(suffices, key=suffices.get)
    assert got.scope == best
    assert suffices[best] <= got.n_bytes < suffices[best] + 18
    others = got.table[got.table.scope != best]
    assert len(others) <= 9 + 1 if scopes[0] != best else len(others) <= 2  # where more bytes lose, fewer do


def test_goals_that_cannot_be_reached_say_what_can(given):
    for scopes, least in (("layer", OTHER + 3 * 18), (("layer", "global"), OTHER + 18)):
        with pytest.raises(InvalidValueError, match=f"n_bytes is {least - 1}; .* at least {least} bytes"):
            allocated(given, n_bytes=least - 1, scopes=scopes)
        assert allocated(given, n_bytes=least, scopes=scopes).n_bytes == least
    most = allocated(given, n_bytes=10_000, ks=(1,)).table["drop"].min()
    assert most > 1
    with pytest.raises(InvalidValueError, match=f"max_drop is 1;.*{most:.2f}.*tiny/train"):
        allocated(given, max_drop=1, ks=(1,))


def test_one_finite_goal_is_given_and_a_precision_that_the_ledger_counts(given):
    for goals in ({}, {"n_bytes": 900, "max_drop": 1}):
        with pytest.raises(InvalidValueError, match="give n_bytes or max_drop, and not both"):
            allocated(given, **goals)
    with pytest.raises(InvalidValueError, match="n_bytes or max_drop is nan;"):
        allocated(given, max_drop=float("nan"))
    with pytest.raises(UnknownNameError, match="unknown precision 'bf16'"):
        allocated(given, n_bytes=900, precision="bf16")


def test_the_same_seed_gives_the_same_and_nothing_of_the_callers_changes(given):
    (model, _, bank, sample_weight), _ = given
    before = [x.clone() for x in model.network.parameters()], bank.kernels.copy(), sample_weight.copy()
    first, again = (allocated(given, n_bytes=900, seed=2) for _ in range(2))
    assert first.n_clusters == again.n_clusters
    assert first.table.equals(again.table)
    assert all(map(torch.equal, model.network.parameters(), before[0]))
    np.testing.assert_array_equal(bank.kernels, before[1])
    np.testing.assert_array_equal(sample_weight, before[2])


def test_a_network_alone_and_pairs_of_images_and_labels_are_taken(given):
    (model, data, bank, sample_weight), options = given
    plain = models.plain("plain", model.network)
    ours = allocation.allocate(plain, data, bank, sample_weight, n_bytes=900, **options)
    pairs = torch.utils.data.TensorDataset(data.images, data.labels)
    alone = allocation.allocate(model.network, pairs, bank, sample_weight, n_bytes=900, **options)
    assert alone.n_clusters == ours.n_clusters
    assert alone.model is alone.network
    assert ours.model == replace(plain, network=ours.network)
