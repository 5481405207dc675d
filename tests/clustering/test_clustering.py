from dataclasses import replace

import hypothesis.strategies as st
import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from joblib.parallel import ThreadingBackend
from scipy.spatial.distance import cdist
from torch import nn

from kclib import clustering, compression, kmeans, models
from kclib._util import progress_bars
from kclib.clustering import _clustering, cluster
from kclib.clustering._clustering import quantized
from kclib.errors import InvalidValueError, UnknownNameError
from kclib.kernels import KernelBank, Layer, extract, insert
from kclib.kmeans import _entropy, _fitting, symmetric

A, B, C = (np.full((2, 2), value, np.float32) for value in (1, 5, 20))


def bank_of(**layers):
    """Return a bank of named layers, each given as its kernels, one input channel."""
    start, made = 0, []
    for name, kernels in layers.items():
        made.append(Layer(name, (len(kernels), 1, *kernels[0].shape), start))
        start += len(kernels)
    rows = np.concatenate([np.stack(kernels) for kernels in layers.values()])
    return KernelBank(rows, tuple(made), {})


def random_bank(*sizes, seed=0):
    draw = np.random.default_rng(seed)
    return bank_of(**{f"conv{i}": draw.normal(size=(n, 3, 3)).astype("f") for i, n in enumerate(sizes)})


SCOPES = st.sampled_from(["layer", "global", {"conv0": "ends", "conv1": "middle", "conv2": "ends"}])


@given(SCOPES, st.integers(1, 30), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_each_kernel_gets_the_nearest_representative_of_its_own_group(scope, n_clusters, seed):
    bank = random_bank(12, 30, 7, seed=seed)
    result = cluster(bank, n_clusters, scope=scope, seed=seed)
    rows = _clustering.quantized(result)
    assert rows.shape == bank.kernels.shape
    for group in result.groups:
        assert (np.bincount(group.indices, minlength=group.n_clusters) > 0).all()
        assert len(group.indices) == sum(layer.n_kernels for layer in group.layers)
        codebook = group.codebook.reshape(group.n_clusters, -1)
        for layer in group.layers:
            best = cdist(bank.points[layer.rows], codebook, "sqeuclidean").min(1)
            mine = np.square(bank.kernels[layer.rows] - rows[layer.rows]).sum(axis=(1, 2))
            np.testing.assert_allclose(mine, best, rtol=1e-4, atol=1e-6)
            assert {x.tobytes() for x in rows[layer.rows]} <= {x.tobytes() for x in group.codebook}
    assert result.inertia == pytest.approx(np.square(bank.kernels - rows).sum(dtype="d"), rel=1e-4, abs=1e-6)


@given(SCOPES, st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_quantized_rows_are_codebook_lookups_in_the_rows_of_the_bank(scope, seed):
    bank = random_bank(5, 4, 6, seed=seed)
    result = cluster(bank, 3, scope=scope, seed=seed)
    lookups = {}
    for group in result.groups:
        rows = np.concatenate([np.arange(x.rows.start, x.rows.stop) for x in group.layers])
        lookups |= {row: group.codebook[index] for row, index in zip(rows, group.indices, strict=True)}
    np.testing.assert_array_equal(_clustering.quantized(result), [lookups[row] for row in range(len(bank))])


def test_one_codebook_for_all_layers_shares_what_each_layer_repeats():
    bank = bank_of(one=[A, B], two=[B, A])
    shared = cluster(bank, 2, scope="global")
    alone = cluster(bank, 1)
    assert (shared.inertia, shared.n_clusters, shared.kernels_removed) == (0, 2, 0.5)
    assert (alone.inertia, alone.n_clusters) == (2 * 2 * 4 * 2.0**2, 2)
    np.testing.assert_array_equal([g.codebook[0] for g in alone.groups], [(A + B) / 2] * 2)
    np.testing.assert_array_equal(_clustering.quantized(shared), bank.kernels)


def test_codebooks_of_layers_that_differ_split_like_one_for_all():
    bank = bank_of(low=[A, A, A], high=[C, C])
    for scope, n_clusters in (("layer", 1), ("global", 2)):
        result = cluster(bank, n_clusters, scope=scope)
        assert (result.n_clusters, result.inertia) == (2, 0)
        np.testing.assert_array_equal(_clustering.quantized(result), bank.kernels)


def test_groups_of_a_mapping_keep_the_order_of_the_bank():
    bank = bank_of(one=[A, B], two=[C], three=[B])
    result = cluster(bank, 1, scope={"three": "ends", "two": "middle", "one": "ends"})
    assert [(g.name, [x.name for x in g.layers]) for g in result.groups] == [
        ("ends", ["one", "three"]),
        ("middle", ["two"]),
    ]
    assert (result.scope, result.layers) == ("mapping", bank.layers)
    np.testing.assert_allclose(result.groups[0].codebook[0], (A + B + B) / 3)


def test_each_group_may_have_its_own_k():
    result = cluster(random_bank(12, 30), {"conv0": 2, "conv1": 7})
    assert [group.n_clusters for group in result.groups] == [2, 7]
    assert result.kernels_removed == pytest.approx(1 - 9 / 42)


def test_groups_that_fall_short_of_k_are_noted_and_no_others():
    bank = bank_of(small=[A, B], doubled=[A, A, B, B, C], large=list(random_bank(5).kernels[:, :2, :2]))
    result = cluster(bank, 5)
    assert [group.n_clusters for group in result.groups] == [2, 3, 5]
    assert len(result.notes) == 2
    assert result.notes[0].startswith("small: 2 clusters in place of 5, for its 2 kernels")
    assert result.notes[1].startswith("doubled: 3 clusters in place of 5, for its 5 kernels")
    assert cluster(bank, 2).notes == ()


def test_same_seed_gives_the_same_clustering_and_another_does_not():
    bank = random_bank(9000)  # so many that the start is drawn
    first, again, other = (cluster(bank, 9, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(_clustering.quantized(first), _clustering.quantized(again))
    assert (first.seed, other.seed) == (3, 4)
    assert first.inertia == again.inertia != other.inertia


HOW = [{"scaled": True}, {"turned": True}, {"scaled": True, "turned": True}]
EACH = pytest.mark.parametrize("how", HOW, ids=["scaled", "turned", "both"])


def stands_for(group, row):
    """Return what stands for a kernel: its representative flipped, rotated and scaled, in float64."""
    kernel = group.codebook[group.indices[row]].astype(np.float64)
    if group.turns is not None:
        kernel = kernel.ravel()[symmetric.transforms(len(kernel))[group.turns[row]]].reshape(kernel.shape)
    return kernel if group.scales is None else group.scales[row] * kernel


@EACH
@given(SCOPES, st.integers(1, 20), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_scales_and_turns_give_the_kernels_that_the_inertia_is_of(how, scope, n_clusters, seed):
    bank = random_bank(12, 30, 7, seed=seed)
    result = cluster(bank, n_clusters, scope=scope, seed=seed, **how)
    rows = _clustering.quantized(result)
    assert (rows.shape, rows.dtype) == (bank.kernels.shape, np.float32)
    for group in result.groups:
        n = len(group.indices)
        assert (group.scales is None) == ("scaled" not in how)
        assert (group.turns is None) == ("turned" not in how)
        if group.scales is not None:
            assert (group.scales.shape, group.scales.dtype) == ((n,), np.float32)
            lengths = np.linalg.norm(group.codebook.reshape(group.n_clusters, -1), axis=1)
            np.testing.assert_allclose(lengths, 1, rtol=1e-5)
        if group.turns is not None:
            assert (group.turns.shape, group.turns.dtype, group.turns.max() < 8) == ((n,), np.uint8, True)
        mine = np.concatenate([rows[layer.rows] for layer in group.layers])
        kernels = np.concatenate([bank.kernels[layer.rows] for layer in group.layers])
        np.testing.assert_allclose(mine, [stands_for(group, row) for row in range(n)], rtol=1e-6)
        np.testing.assert_array_equal(group.kernels(slice(2, 5)), mine[2:5])
        squares = np.square(kernels.astype("d")).sum()
        error = np.square(kernels.astype("d") - mine).sum()
        assert group.inertia == pytest.approx(error, rel=1e-4, abs=1e-9 * squares)
        assert error <= squares * (1 + 1e-6)
    assert result.inertia == pytest.approx(sum(group.inertia for group in result.groups))


@EACH
def test_symmetries_restore_the_layers_that_one_kernel_was_made_into(how):
    shape = np.random.default_rng(0).normal(size=(3, 3)).astype("f")
    made = []
    for quarter in range(4):
        kernel = np.rot90(shape, quarter) if "turned" in how else shape
        made.append((-2.5) ** quarter * kernel if "scaled" in how else kernel)
    bank = bank_of(one=made[:2], two=made[2:])
    result = cluster(bank, 1, scope="global", **how)
    assert result.inertia <= 1e-9 * np.square(bank.kernels).sum()
    np.testing.assert_allclose(_clustering.quantized(result), bank.kernels, rtol=1e-4, atol=1e-5)
    assert clustering.error_share(bank, result) == pytest.approx([0, 0], abs=1e-9)


@EACH
def test_symmetries_serve_kernels_better_and_the_threads_change_no_bit(how):
    bank = random_bank(500, 90, 300)
    one, *others = (cluster(bank, 20, n_threads=n, **how) for n in (1, 2, 3))
    assert one.inertia < cluster(bank, 20).inertia
    for other in others:
        assert other.inertia == one.inertia
        np.testing.assert_array_equal(_clustering.quantized(other), _clustering.quantized(one))


def test_without_symmetries_there_are_neither_scales_nor_turns():
    for group in cluster(random_bank(12, 30), 3).groups:
        assert group.scales is None
        assert group.turns is None


def test_kernels_that_are_not_square_are_scaled_but_not_turned():
    drawn = np.random.default_rng(0).normal(size=(40, 1, 5)).astype("f")
    bank = bank_of(one=list(drawn), two=list(3 * drawn))
    result = cluster(bank, 40, scope="global", scaled=True)
    assert result.inertia <= 1e-9 * np.square(bank.kernels).sum()
    np.testing.assert_allclose(_clustering.quantized(result), bank.kernels, rtol=1e-4, atol=1e-5)
    for how in ({"turned": True}, {"scaled": True, "turned": True}):
        with pytest.raises(InvalidValueError, match=r"1×5.*turned"):
            cluster(bank, 4, **how)


@pytest.mark.parametrize("scope", ["layer", "global", {"conv0": "a", "conv1": "b", "conv2": "a"}])
def test_the_number_of_threads_changes_no_bit(scope):
    bank = random_bank(500, 90, 300)
    one, *others = (cluster(bank, 40, scope=scope, n_threads=n) for n in (1, 2, 3))
    for other in others:
        for mine, theirs in zip(other.groups, one.groups, strict=True):
            assert (mine.name, mine.layers, mine.inertia) == (theirs.name, theirs.layers, theirs.inertia)
            np.testing.assert_array_equal(mine.codebook, theirs.codebook)
            np.testing.assert_array_equal(mine.indices, theirs.indices)


def test_a_group_that_fails_ends_the_clustering_with_its_error(monkeypatch):
    fit = kmeans.fit

    def failing(points, *args, **options):
        if len(points) == 90:
            raise InvalidValueError("the second layer")
        return fit(points, *args, **options)

    monkeypatch.setattr(kmeans, "fit", failing)
    with pytest.raises(InvalidValueError, match="the second layer"):
        cluster(random_bank(500, 90, 300), 4)


def test_the_bar_tells_memory_inertia_and_all_the_kernels(monkeypatch, capsys):
    made = []

    class Bar(progress_bars.tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **{**options, "delay": 0, "leave": True, "mininterval": 0})
            made.append(self)

    monkeypatch.setattr(progress_bars, "tqdm", Bar)
    result = cluster(random_bank(500, 90, 300), 40)
    (bar,) = made
    assert bar.n == pytest.approx(bar.total) == 890
    assert bar.desc.startswith("clustering (up to 0.1 GiB)")
    assert float(bar.postfix.split()[1]) == pytest.approx(result.inertia, rel=1e-3)


def test_a_fit_from_a_tree_is_a_clustering_of_all_layers():
    bank = random_bank(60, 30)
    found = kmeans.tree(bank.points, seed=5).fit(9)
    result = _clustering.of_fits(bank, {"global": found}, {"global": 9}, scope="global", seed=5)
    assert (result.scope, result.seed, result.n_clusters, result.inertia) == ("global", 5, 9, found.inertia)
    np.testing.assert_array_equal(_clustering.quantized(result).reshape(-1, 9), found.centres[found.labels])


@pytest.mark.parametrize("how", [{}, *HOW], ids=["plain", "scaled", "turned", "both"])
def test_fits_of_each_layer_are_the_clustering_that_they_would_come_to(how):
    bank = random_bank(60, 30)
    fit = symmetric.fit if how else kmeans.fit
    found = {layer.name: fit(bank.points[layer.rows], 9, seed=5, **how) for layer in bank.layers}
    mine = _clustering.of_fits(bank, found, {"conv0": 9, "conv1": 9}, scope="layer", seed=5, **how)
    theirs = cluster(bank, 9, seed=5, **how)
    assert (mine.scope, mine.seed, mine.notes, mine.inertia) == ("layer", 5, (), theirs.inertia)
    assert [group.layers for group in mine.groups] == [(layer,) for layer in bank.layers]
    np.testing.assert_array_equal(_clustering.quantized(mine), _clustering.quantized(theirs))


def test_fits_that_fall_short_of_what_was_asked_for_are_noted():
    bank = bank_of(one=[A, A, B], two=[A, B, C])
    found = {layer.name: kmeans.fit(bank.points[layer.rows], 3) for layer in bank.layers}
    result = _clustering.of_fits(bank, found, {"one": 3, "two": 3}, scope={"one": "one", "two": "two"})
    assert result.scope == "mapping"
    (note,) = result.notes
    assert note.startswith("one: 2 clusters in place of 3, for its 3 kernels")


def test_representatives_by_use_come_most_used_first():
    result = cluster(bank_of(one=[B, A, C, A, C, A]), 3)
    codebook, counts = clustering.by_use(result.groups[0])
    np.testing.assert_array_equal(codebook, [A, C, B])
    assert counts.tolist() == [3, 2, 1]


def test_error_share_is_none_where_all_is_kept_and_all_where_kernels_cancel_out():
    zero = np.zeros_like(A)
    bank = bank_of(kept=[B], cancels=[A, -A], half=[A, zero], empty=[zero, zero])
    assert clustering.error_share(bank, cluster(bank, 1)) == [0, 1, 0.5, 0]


@pytest.mark.parametrize(
    ("n_clusters", "scope", "sentence"),
    [
        (0, "layer", "n_clusters is 0;"),
        (4, "layer", "n_clusters is 4; .* 1 to 3, the kernels of the largest group"),
        (6, "global", "n_clusters is 6; .* 1 to 5"),
        (True, "layer", "n_clusters is True"),
        (2.0, "layer", r"n_clusters is 2\.0"),
        ({"one": 2, "two": 3}, "layer", "n_clusters is 3; .* 1 to 2, the kernels of group two"),
        ({"one": 2}, "layer", "n_clusters must name every group; not matching: two"),
        ({"global": 2, "one": 2}, "global", "n_clusters must name every group; not matching: one"),
        (1, {"one": "all"}, "scope must give every layer of the bank a group; not matching: two"),
        (1, {"one": "all", "two": "all", "six": "all"}, "not matching: six"),
    ],
)
def test_k_or_scope_that_does_not_fit_the_bank_is_refused(n_clusters, scope, sentence):
    with pytest.raises(InvalidValueError, match=sentence):
        cluster(bank_of(one=[A, B, C], two=[A, B]), n_clusters, scope=scope)


def test_unknown_scope_is_refused_with_the_nearest_known_one():
    with pytest.raises(UnknownNameError, match=r"'layers'.*'layer'\?"):
        cluster(bank_of(one=[A, B]), 1, scope="layers")


def test_weights_are_in_the_rows_of_the_bank_and_inertia_counts_all_kernels_alike():
    bank = random_bank(50, 30, 40)
    sample_weight = np.random.default_rng(0).lognormal(size=120)
    for how in ({}, *HOW):
        result = cluster(
            bank, 6, scope={"conv0": "a", "conv1": "b", "conv2": "a"}, sample_weight=sample_weight, **how
        )
        fit = symmetric.fit if how else kmeans.fit
        for group, rows in zip(result.groups, (np.r_[0:50, 80:120], np.r_[50:80]), strict=True):
            alone = fit(bank.points[rows], 6, sample_weight=sample_weight[rows], **how)
            np.testing.assert_array_equal(group.indices, alone.labels)
            np.testing.assert_array_equal(group.codebook.reshape(-1, 9), alone.centres)
            lost = bank.kernels[rows] - group.kernels(slice(None))
            assert group.inertia == pytest.approx(np.square(lost, dtype="d").sum(), rel=1e-6)
            assert group.inertia != pytest.approx(alone.inertia, rel=0.01)


def test_in_a_group_of_zero_weights_all_kernels_count_alike():
    bank = random_bank(30, 20)
    ours, alike = (cluster(bank, 4, sample_weight=np.repeat([1, x], [30, 20])) for x in (0, 1))
    np.testing.assert_array_equal(ours.groups[1].codebook, alike.groups[1].codebook)


@pytest.mark.parametrize("weighted", [False, True])
def test_each_group_pays_for_its_bits_alone_and_fewer_clusters_are_no_note(weighted):
    bank = random_bank(200, 90, 5)
    sample_weight = np.random.default_rng(0).lognormal(size=295) if weighted else None
    result = cluster(bank, 40, sample_weight=sample_weight, price=1.5, seed=3)
    for group, layer in zip(result.groups, bank.layers, strict=True):
        mine = None if sample_weight is None else sample_weight[layer.rows]
        k = min(40, layer.n_kernels)
        alone = _entropy.fit(bank.points[layer.rows], k, price=1.5, sample_weight=mine, seed=3)
        np.testing.assert_array_equal(group.indices, alone.labels)
        np.testing.assert_array_equal(group.codebook.reshape(-1, 9), alone.centres)
    assert result.groups[0].n_clusters < 40
    assert result.notes == ()
    assert cluster(bank, 40, seed=3).notes


def test_priced_indices_and_codebooks_take_fewer_bytes_at_less_error():
    draw = np.random.default_rng(0)
    network = nn.Sequential(nn.Conv2d(64, 128, 3, bias=False), nn.Conv2d(128, 128, 3, bias=False))
    for module in network:
        scales = draw.lognormal(-3, 1.5, size=(*module.weight.shape[:2], 1, 1))
        kernels = draw.normal(size=module.weight.shape) * scales
        module.weight.data = torch.from_numpy(kernels.astype("f"))
    bank = extract(network)
    plain = cluster(bank, 64, scope="global")
    priced = cluster(bank, 128, scope="global", price=0.4)
    tables = [compression.footprint(network, x, codings=("entropy",)).entropy_fp16 for x in (plain, priced)]
    assert priced.inertia <= plain.inertia
    assert tables[1]["indices"] < tables[0]["indices"]
    assert tables[1]["convolutions"] < tables[0]["convolutions"]
    rebuilt = compression.compress(network, priced)
    image = torch.from_numpy(draw.normal(size=(1, 64, 9, 9)).astype("f"))
    dense = insert(network, replace(bank, kernels=_clustering.quantized(priced)))
    torch.testing.assert_close(rebuilt(image), dense(image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sample_weight": np.ones(4)}, r"sample_weight has shape \(4,\); it must be \(5,\)"),
        ({"sample_weight": [1, 1, np.nan, 1, 1]}, "sample_weight must be finite"),
        ({"sample_weight": [1, 1, 1, -1, 1]}, "at least 0"),
        (
            {"sample_weight": [1, 1, 1, 0, 0], "price": 1.0},
            "sample_weight must not be all 0 in a group; it is in two",
        ),
        ({"price": -0.5}, r"price is -0\.5;"),
        ({"price": 2.0, "scaled": True}, r"price is 2\.0;"),
        ({"price": 2.0, "turned": True}, "must be 0 where kernels are scaled or turned"),
    ],
)
def test_weights_or_a_price_out_of_range_are_refused(options, sentence):
    with pytest.raises(InvalidValueError, match=sentence):
        cluster(bank_of(one=[A, B, C], two=[A, B]), 2, **options)


def test_a_network_or_model_is_clustered_by_its_kernels():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1))
    of_bank = quantized(cluster(extract(network), 3, progress=False))
    for given_ in (network, models.plain("mine", network)):
        np.testing.assert_array_equal(quantized(cluster(given_, 3, progress=False)), of_bank)


def test_numbers_of_clusters_may_come_from_a_table():
    bank = random_bank(12, 30, 7)
    counts = pd.Series({"conv0": 2, "conv1": 5, "conv2": 3})
    assert [x.n_clusters for x in cluster(bank, counts, progress=False).groups] == [2, 5, 3]


@pytest.mark.parametrize("k", [3.0, "3", True, None, np.arange(2000), torch.tensor(3), [3]])
def test_number_of_clusters_of_another_kind_is_one_short_sentence(k):
    with pytest.raises(InvalidValueError, match=r"n_clusters is .*;") as found:
        cluster(random_bank(12), k)
    assert len(str(found.value)) < 200


@pytest.mark.parametrize("make", [np.asarray, torch.tensor, pd.DataFrame, lambda x: x.tolist()])
def test_points_are_not_clustered_as_a_bank_but_sent_to_kmeans(make):
    with pytest.raises(InvalidValueError, match=r"KernelBank.*kmeans\.fit"):
        cluster(make(random_bank(12).points), 3)


@pytest.fixture
def networks():
    """Two networks whose layers have the same names, and only some kernels in common."""
    torch.manual_seed(0)
    one, other = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)) for _ in range(2))
    with torch.no_grad():
        other[1].weight[:4] = one[1].weight[:4]
    return one, other


def shared_rows(networks, result):
    """Return by hand what stands for the kernels of each network, from the codebooks that they share."""
    starts, rows = dict(zip("01", (0, len(extract(networks[0]))), strict=True)), {}
    for group in result.groups:
        stand_ins = iter(group.codebook[group.indices])
        for layer in group.layers:
            i, name = layer.name.split("/")
            start = layer.start - starts[i]
            rows[i, name] = start, [next(stand_ins) for _ in range(layer.n_kernels)]
    return [np.concatenate([x for (i, _), (_, x) in sorted(rows.items()) if i == one]) for one in "01"]


@pytest.mark.parametrize(
    "scope",
    ["layer", "global", {"0/0": "a", "0/1": "b", "1/0": "b", "1/1": "a"}],
    ids=["layer", "global", "map"],
)
def test_networks_that_share_codebooks_are_each_compressed_by_their_part(networks, scope):
    result = cluster(networks, 9, scope=scope, progress=False)
    assert [x.name for x in result.layers] == ["0/0", "0/1", "1/0", "1/1"]
    image = torch.randn(1, 3, 9, 9)
    for network, part, rows in zip(networks, result.parts, shared_rows(networks, result), strict=True):
        by_hand = insert(network, replace(extract(network), kernels=rows))
        packed = compression.compress(network, part)
        np.testing.assert_array_equal(extract(compression.expand(packed)).kernels, rows)
        assert torch.equal(compression.expand(packed)(image), by_hand(image))
        assert part.inertia == pytest.approx(np.square(extract(network).kernels - rows).sum(dtype="d"))
    assert result.inertia == pytest.approx(sum(x.inertia for x in result.parts), rel=1e-5)


def test_a_global_codebook_is_that_of_all_kernels_in_one_array(networks):
    result = cluster(networks, 9, scope="global", progress=False)
    points = np.concatenate([extract(x).points for x in networks])
    alone = kmeans.fit(points, 9)
    np.testing.assert_array_equal(result.groups[0].codebook.reshape(9, 9), alone.centres)
    np.testing.assert_array_equal(result.groups[0].indices, alone.labels)
    assert {x.tobytes() for part in result.parts for x in part.groups[0].codebook} == {
        x.tobytes() for x in result.groups[0].codebook
    }


def test_layers_of_one_name_keep_codebooks_of_their_own_network(networks):
    result = cluster(networks, 5, progress=False)
    for network, part in zip(networks, result.parts, strict=True):
        alone = cluster(network, 5, progress=False)
        assert [x.name for x in part.groups] == ["0", "1"]
        assert part.layers == alone.layers
        np.testing.assert_array_equal(quantized(part), quantized(alone))


def test_weights_of_several_banks_follow_one_another(networks):
    n = sum(len(extract(x)) for x in networks)
    sample_weight = np.random.default_rng(0).lognormal(size=n)
    result = cluster(networks, 7, sample_weight=sample_weight, progress=False)
    first = len(extract(networks[0]))
    for network, part, weights in zip(networks, result.parts, np.split(sample_weight, [first]), strict=True):
        alone = cluster(network, 7, sample_weight=weights, progress=False)
        np.testing.assert_array_equal(quantized(part), quantized(alone))
        assert part.inertia == alone.inertia
    assert result.inertia == pytest.approx(sum(x.inertia for x in result.parts))


def test_each_kernel_size_has_a_global_codebook(networks):
    large = nn.Sequential(nn.Conv2d(3, 4, 5))
    result = cluster([*networks, large], 4, scope="global", progress=False)
    assert [x.name for x in result.groups] == ["global 3×3", "global 5×5"]
    assert [x.codebook.shape for x in result.groups] == [(4, 3, 3), (4, 5, 5)]
    assert [[x.name for x in part.groups] for part in result.parts] == [["global 3×3"]] * 2 + [["global 5×5"]]
    np.testing.assert_array_equal(quantized(result.parts[2]), quantized(cluster(large, 4, progress=False)))
    with pytest.raises(InvalidValueError, match=r"group all has kernels of 3×3 and 5×5; .*of one size"):
        cluster([networks[0], large], 4, scope={"0/0": "all", "0/1": "all", "1/0": "all"})


def test_scales_and_turns_are_split_too(networks):
    result = cluster(networks, 6, scope="global", scaled=True, turned=True, progress=False)
    errors = [
        np.square(extract(x).kernels - quantized(part)).sum(dtype="d")
        for x, part in zip(networks, result.parts, strict=True)
    ]
    assert sum(errors) == pytest.approx(result.inertia, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda _: [], "the list of banks is empty; give at least one"),
        (
            lambda x: [x[0], KernelBank(np.empty((0, 3, 3), "f"), (), {})],
            "bank 1 of the list has no kernels; leave",
        ),
        (lambda _: KernelBank(np.empty((0, 3, 3), "f"), (), {}), "the bank has no kernels; give"),
        (lambda x: [x[0], "vgg16-fashion"], "the kernels are a str; they must be a KernelBank"),
        (lambda x: [x[0], nn.Linear(2, 2)], "the model has no 2D kernels"),
    ],
)
def test_lists_without_kernels_are_refused(networks, make, sentence):
    with pytest.raises(InvalidValueError, match=sentence):
        cluster(make(networks), 2)


def test_a_network_is_not_compressed_by_the_clustering_of_several(networks):
    result = cluster(networks, 5, scope="global", progress=False)
    for use in (compression.compress, compression.footprint, compression.replaced):
        with pytest.raises(InvalidValueError, match=r"of 2 banks together; it must be that of one, .*parts"):
            use(networks[0], result)


def test_processors_are_the_default_device():
    bank = random_bank(40, 30)
    default, named = (cluster(bank, 9, device=x, progress=False) for x in (None, torch.device("cpu")))
    np.testing.assert_array_equal(quantized(default), quantized(named))


def test_a_device_searches_every_group():
    bank = random_bank(40, 30)
    found = cluster(bank, 9, device="cpu:0", progress=False)
    for layer, group in zip(bank.layers, found.groups, strict=True):
        alone = kmeans.fit(bank.points[layer.rows], 9, device="cpu:0")
        assert alone.search == "cpu:0"
        np.testing.assert_array_equal(group.codebook.reshape(-1, 9), alone.centres)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"device": "cuda:99"}, r"device 'cuda:99' cannot be used here .*cpu always can"),
        ({"device": "cuad"}, "device 'cuad' cannot be used here"),
        ({"device": "meta"}, "device 'meta' holds no values"),
        ({"device": "cpu:0", "scaled": True}, "device is cpu:0; it must be cpu where kernels are scaled"),
        ({"device": "cpu:0", "price": 1.0}, r"it must be cpu where .*bits have a price"),
    ],
)
def test_a_device_that_is_not_there_is_refused(options, sentence):
    with pytest.raises(InvalidValueError, match=sentence):
        cluster(random_bank(12), 3, **options)


def test_large_groups_are_tasks_of_the_callers_joblib_backend(monkeypatch):
    bank, submitted = random_bank(300, 40, 200), []

    class Recording(ThreadingBackend):
        def submit(self, func, callback=None):
            submitted.append(func)
            return super().submit(func, callback)

    monkeypatch.setattr(_fitting, "_IN_MEMORY", 100)
    joblib.register_parallel_backend("recording", Recording)
    with joblib.parallel_config("recording"):
        there = cluster(bank, 9, progress=False)
    assert submitted
    here = cluster(bank, 9, progress=False)
    np.testing.assert_array_equal(quantized(there), quantized(here))
    small = kmeans.fit(bank.points[bank.layers[1].rows], 9)
    assert small.search == "pruned"
    np.testing.assert_array_equal(here.groups[1].codebook.reshape(-1, 9), small.centres)
