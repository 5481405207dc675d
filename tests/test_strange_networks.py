"""Everything that measures, on networks and images that are hard to measure: what is said stays true."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from partitions import restored
from strange import NETWORKS, model, network, one_kernel, pictures, raw, scaled

from benchmarks import representatives
from kclib import clustering, compression, kernels, kmeans, models, recovery, similarity
from kclib.clustering import _clustering
from kclib.combination import _pruning, orthogonality
from kclib.compression import byte_counts
from kclib.errors import InvalidValueError
from kclib.evaluation import attribution, damage, peers
from kclib.kmeans import symmetric
from kclib.recovery import _calibration, _sequential, restoration, sensitivity
from kclib.similarity import _measures, distances, embedding, null_models
from kclib.store import Store

pytestmark = pytest.mark.usefixtures("one_thread")
EACH = pytest.mark.parametrize("kind", NETWORKS)
QUIET = {"progress": False}


def answers(net, given=None, data=None):
    data = data or pictures()
    with torch.no_grad():
        return net((given.preprocess if given else scaled)(data.images))


def layer_error(dense, small, name, data, preprocess=scaled):
    """Return the mean squared error of what a layer answers, over the variance of the dense one's answers."""
    found = []
    for net in (dense, small):
        kept = []
        handle = net.get_submodule(name).register_forward_hook(lambda *x, kept=kept: kept.append(x[2]))
        with torch.no_grad():
            net(preprocess(data.images))
        handle.remove()
        found.append(kept[0].double())
    return float((found[0] - found[1]).square().mean()), float(found[0].var(unbiased=False))


@pytest.mark.parametrize(
    ("kind", "preprocess"),
    [*((kind, scaled) for kind in NETWORKS), ("ordinary", raw), ("dead channels", raw)],
)
def test_corrected_networks_answer_nearer_than_plain_ones(kind, preprocess):
    given, data = model(kind, preprocess), pictures()
    bank = kernels.extract(given.network)
    plain = compression.replaced(given.network, clustering.cluster(bank, 5, **QUIET))
    ours = _sequential.correct(given, data, 5, precision="fp32", **QUIET).network
    assert all(torch.isfinite(x).all() for x in ours.state_dict().values())
    for layer in bank.layers:
        one, all_ = layer_error(given.network, ours, layer.name, data, preprocess)
        other, _ = layer_error(given.network, plain, layer.name, data, preprocess)
        assert one <= 1.01 * other + 0.05 * all_


@EACH
def test_calibrated_networks_answer_nearer_than_uncalibrated_ones(kind):
    given, data = model(kind), pictures()
    bank = kernels.extract(given.network)
    small = compression.compress(given.network, clustering.cluster(bank, 5, **QUIET), precision="fp32")
    ours = _calibration.calibrate(models.Model("small", small, scaled), given, data, **QUIET).network
    assert all(torch.isfinite(x).all() for x in ours.state_dict().values() if x.is_floating_point())
    first, rest = bank.layers[0].name, [layer.name for layer in bank.layers]
    assert (
        layer_error(given.network, ours, first, data)[0]
        <= 1.0001 * layer_error(given.network, small, first, data)[0] + 1e-12
    )
    last = (layer_error(given.network, x, rest[-1], data)[0] for x in (ours, small))
    assert next(last) <= 1.01 * next(last)


@pytest.mark.parametrize("images", ["constant", "black"])
def test_images_that_are_all_alike_leave_networks_finite_and_their_answers_as_they_were(images):
    given, data = model("ordinary"), pictures(images)
    found = _sequential.correct(given, data, 5, precision="fp32", **QUIET).network
    torch.testing.assert_close(
        answers(found, given, data), answers(given.network, given, data), rtol=0.2, atol=0.3
    )


@EACH
def test_sensitivities_are_finite_and_zero_only_where_nothing_depends_on_a_kernel(kind):
    given, data = model(kind), pictures()
    bank = kernels.extract(given.network)
    for name in sensitivity.KINDS:
        found = sensitivity.importance(given, data, bank, kind=name, **QUIET)
        assert np.isfinite(found).all()
        assert found.min() >= 0
    reads = sensitivity.importance(given, data, bank, kind="input", **QUIET)
    assert reads[bank.layer("0").rows].all()
    dead = {"dead channels": 3, "dead layer": 8}.get(kind, 0)
    if dead:
        norm = given.network[2]
        after = norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()
        expected = np.broadcast_to((after.detach().numpy() ** 2)[:dead], (8, dead))
        ours = reads[bank.layer("3").rows].reshape(8, -1)[:, :dead]
        assert (ours <= expected * (1 + 1e-5)).all()  # less where the padding is read


@EACH
def test_shrinking_keeps_within_the_bytes(kind):
    given, data = model(kind), pictures()
    n_bytes = byte_counts.convolution_bytes(given.network) / 2
    found = recovery.shrink(given, data, n_bytes=n_bytes, held_back=data, precision="fp32", **QUIET)
    assert found.n_bytes <= n_bytes
    assert torch.isfinite(answers(found.model.network)).all()
    assert np.isfinite(found.drop.points.estimate)
    packed = compression.compress(found.model, found.clustering, precision="fp32")
    torch.testing.assert_close(answers(packed.network), answers(found.model.network), rtol=1e-3, atol=1e-3)


@EACH
def test_damage_is_shared_out_whole_and_restoring_never_adds_to_it(kind, tmp_path):
    given, data = model(kind), pictures()
    bank = kernels.extract(given.network)
    sample_weight = sensitivity.importance(given, data, bank, kind="input", **QUIET)
    made = clustering.cluster(bank, 4, sample_weight=sample_weight, **QUIET)
    table = damage.by_cluster(bank, made, sample_weight)
    errors = np.square(bank.kernels.astype(float) - _clustering.quantized(made)).sum((1, 2))
    assert table.damage.sum() == pytest.approx(
        float(errors @ sample_weight.astype(float)), rel=1e-4, abs=1e-300
    )
    assert table.share.sum() == pytest.approx(float(table.damage.sum() > 0), abs=1e-9)
    found = restoration.restore_worst(
        given, made, 300, sample_weight=sample_weight, precision="fp32", **QUIET
    )
    assert (found.table.after <= found.table.before * (1 + 1e-6)).all()
    assert 0 <= found.n_bytes <= 300
    rows = attribution.by_layer(given, made, data, **QUIET)
    assert rows.top1.between(0, 100).all()
    won = damage.won_back(given, made, table, data, [0, len(table)], **QUIET)
    assert won.won.iloc[0] == 0
    assert won.top1.between(0, 100).all()


@EACH
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scope": "global"},
        {"scaled": True},
        {"turned": True},
        {"scaled": True, "turned": True},
        {"price": 1e-4},
    ],
    ids=["layer", "global", "scaled", "turned", "both", "priced"],
)
def test_clusters_leave_no_more_error_than_one_cluster_a_layer_would(kind, options):
    bank = kernels.extract(network(kind))
    made = clustering.cluster(bank, 5, **options, **QUIET)
    points = bank.points.astype(float)
    stands = _clustering.quantized(made).reshape(points.shape)
    groups = [np.concatenate([np.arange(len(bank))[x.rows] for x in g.layers]) for g in made.groups]
    for group, rows in zip(made.groups, groups, strict=True):
        most = np.square(points[rows] - points[rows].mean(0)).sum()
        rounding = 1e-10 * np.square(points[rows]).sum()
        if not options.get("price"):
            assert group.inertia <= 1.001 * most + rounding
        own = np.square(points[rows] - stands[rows]).sum()
        assert group.inertia == pytest.approx(own, rel=1e-3, abs=rounding)
    assert all(0 <= x <= 1 + 1e-6 for x in clustering.error_share(bank, made))
    ledger = compression.footprint(network(kind), made).to_numpy(float)
    assert np.isfinite(ledger).all()
    assert (ledger >= 0).all()


@EACH
@pytest.mark.parametrize("kind_of", representatives.KINDS)
def test_representatives_of_every_kind_are_finite(kind, kind_of):
    bank = kernels.extract(network(kind))
    if kind == "weights x 1e6" and kind_of not in ("mean", "medoid", "symmetric"):
        with pytest.raises(InvalidValueError, match="fp16"):  # which scales are stored in
            representatives.cluster(bank, 4, kind=kind_of, **QUIET)
        return
    made = representatives.cluster(bank, 4, kind=kind_of, **QUIET).clustering
    assert all(0 <= x <= 1 + 1e-3 for x in clustering.error_share(bank, made))


@EACH
@pytest.mark.parametrize("distance", distances.named_distances)
def test_distances_are_in_range_and_every_pair_is_counted(kind, distance):
    bank, named = kernels.extract(network(kind)), similarity.named(distance)
    points = bank.points
    n = int(named.comparable(points).sum())
    largest = (
        named.largest
        if np.isfinite(named.largest)
        else 3 * np.linalg.norm(points.astype(float), axis=1).max()
    )
    found = similarity.pair_histogram(points, np.linspace(0, largest, 20), distance=distance)
    assert found.pairs == found.counts.sum() == n * (n - 1) // 2
    assert np.isfinite(found.error).all()
    nearest = similarity.nearest_distances(points, distance=distance)
    assert ((nearest >= 0) & (nearest <= largest * (1 + 1e-6))).all()
    table = _measures.closeness(bank, np.arange(len(bank)), distance=distance, **QUIET)
    assert np.isfinite(table[["real", "chance"]]).all(axis=None)
    known = table.dropna()
    assert (known.low <= known.ratio * (1 + 1e-6)).all()
    assert (known.ratio <= known.high * (1 + 1e-6)).all()
    row = int(np.flatnonzero(named.comparable(points))[0])
    rows, apart = similarity.closest(bank, row, 3, distance=distance)
    assert row not in rows
    assert (np.diff(apart) >= 0).all()


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**80])
@pytest.mark.parametrize("distance", ["euclidean", "symmetric", "cosine"])
def test_pairs_and_neighbours_of_kernels_times_a_power_of_two_are_the_same(distance, factor):
    points = kernels.extract(network("ordinary")).points
    unit = factor if np.isinf(similarity.named(distance).largest) else 1
    edges = np.linspace(0, 2, 30)
    one, other = (
        similarity.pair_histogram(np.float32(x) * points, y * edges, distance=distance)
        for x, y in ((1, 1), (factor, unit))
    )
    np.testing.assert_array_equal(one.counts, other.counts)
    assert one.counts.sum() > 0
    near, scaled_ = (
        similarity.nearest_distances(np.float32(x) * points, distance=distance) for x in (1, factor)
    )
    np.testing.assert_allclose(scaled_, near * unit, rtol=1e-5)


@EACH
def test_shapes_of_kernels_can_be_described_and_mapped(kind, tmp_path):
    bank = kernels.extract(network(kind))
    for shapes in (False, True):
        described = similarity.explained(bank, 4, shapes=shapes, **QUIET)
        assert np.isfinite(described).all(axis=None)
        assert (described <= 100 + 1e-3).all(axis=None)
    for null in null_models.named_nulls:
        drawn = null_models.drawn(null, bank.points, seed=0)
        assert drawn.shape == bank.points.shape
        assert np.isfinite(drawn).all()
    for name in embedding._named_maps:
        graph = embedding.graph(bank.points, kind=name, store=Store(tmp_path))
        assert np.isfinite(graph.distances).all()
        assert (np.diff(graph.distances, axis=1) >= 0).all()


def test_a_kernel_of_zeros_has_no_shape_and_that_is_said():
    bank = kernels.extract(network("zero layer"))
    with pytest.raises(InvalidValueError, match="no shape; cosine distance"):
        similarity.closest(bank, bank.layer("3").start, 3, distance="cosine")


def test_a_single_kernel_is_clustered_mapped_and_corrected(tmp_path):
    net = one_kernel()
    bank, data = kernels.extract(net), pictures()
    made = clustering.cluster(bank, 1, **QUIET)
    assert made.inertia == 0
    np.testing.assert_array_equal(_clustering.quantized(made), bank.kernels)
    with pytest.raises(InvalidValueError, match="1 of 1 kernels can be compared"):
        similarity.nearest_distances(bank.points)
    assert not len(_measures.closeness(bank, np.arange(1), **QUIET))
    graph = embedding.graph(bank.points, n_neighbors=1, store=Store(tmp_path))
    assert embedding.layout(graph, n_neighbors=1).tolist() == [[0, 0]]
    given = models.Model("one", net, lambda x: scaled(x)[:, :1])
    found = _sequential.correct(given, data, 1, precision="fp32", **QUIET)
    torch.testing.assert_close(answers(found.network, given), answers(net, given), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"turned": True}], ids=["plain", "turned"])
@pytest.mark.parametrize("n_clusters", [3, 300])
def test_clusters_are_found_far_from_zero(options, n_clusters):
    draw, errors = np.random.default_rng(0), []
    near = 1e-2 * np.repeat(draw.normal(size=(n_clusters, 9)), 8, 0) + 1e-4 * draw.normal(
        size=(8 * n_clusters, 9)
    )
    for offset in (0, 1000):
        points = (near + offset).astype(np.float32)
        if options:
            stands = restored(symmetric.fit(points, n_clusters, scaled=False, **options))
        else:
            found = kmeans.fit(points, n_clusters)
            stands = found.centres[found.labels]
        errors.append(np.square(points.astype(float) - stands).sum())
    assert errors[1] < 2 * errors[0]


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**-20, 2.0**20, 2.0**50])
@pytest.mark.parametrize("options", [{}, {"scaled": True}, {"turned": True}])
def test_a_layer_times_a_power_of_two_has_the_same_clusters(factor, options):
    points = kernels.extract(network("ordinary")).points.copy()
    if options:
        one, other = (
            symmetric.fit(points * np.float32(x), 5, **{"scaled": False, "turned": False} | options)
            for x in (1, factor)
        )
    else:
        one, other = (kmeans.fit(points * np.float32(x), 5) for x in (1, factor))
    np.testing.assert_array_equal(one.labels, other.labels)
    assert other.inertia == pytest.approx(one.inertia * factor**2, rel=1e-6)


@EACH
def test_peers_and_pruned_networks_are_finite_and_within_their_bytes(kind):
    given = model(kind)
    budget_ = byte_counts.convolution_bytes(given.network) // 2
    if kind == "weights x 1e6":
        with pytest.raises(InvalidValueError, match="fp16"):
            peers.at_bytes(given.network, budget_)
    else:
        found = peers.at_bytes(given.network, budget_)
        assert found
        for peer in found:
            assert peer.bytes <= budget_
            assert torch.isfinite(answers(peer.network)).all()
    for way in ("kernels", "filters", "weights"):
        pruned = _pruning.prune(given, 0.5, kind=way)
        assert torch.isfinite(answers(pruned.network)).all()
        assert 0 < pruned.kept <= 0.6


@pytest.mark.parametrize("top1", [0.0, 50.0, 100.0])
@pytest.mark.parametrize("response", orthogonality._RESPONSES)
def test_methods_that_change_nothing_have_no_effect_nor_share(top1, response):
    cells = itertools.product([0.0, 0.5], ["none", "4"], ["none", "int8"], [0, 1])
    table = pd.DataFrame(cells, columns=["sparsity", "clustering", "precision", "seed"])
    table = table.assign(order="none", pruned="kernels", drop=0.0, top1=top1, images=100)
    found = orthogonality.effects(table, response)
    np.testing.assert_allclose(found.effect[found.term != "mean"].dropna(), 0, atol=1e-9)
    assert not found.share.fillna(0).any()
