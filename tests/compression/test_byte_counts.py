import math

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn.utils import parametrizations

from kclib import compression
from kclib.clustering import Clustering, Group, cluster
from kclib.compression import _checkpoint, _entropy_coding, _precisions, byte_counts, compress, footprint
from kclib.compression.byte_counts import (
    PRECISIONS,
    break_even,
    convolution_bytes,
    entropy_bound,
    index_bits_by_layer,
    savings,
    stored_bytes,
    ways,
)
from kclib.errors import InvalidValueError
from kclib.kernels import KernelBank, Layer, extract
from kclib.kmeans import _entropy

ROW = {"fp32": lambda area: 4 * area, "fp16": lambda area: 2 * area, "bf16": lambda area: 2 * area,
       "int8": lambda area: area + 2}  # fmt: skip
SCALE = {"fp32": 4, "fp16": 2, "int8": 2}
ITEMS = [
    "kernels", "indices", "frequency tables", "codebooks", "scales", "other convolution weights",
    "convolution biases", "linear weights", "rest", "convolutions", "model", "model in memory",
]  # fmt: skip


def stored(network):
    """Return the bytes of a network as a file has them, by item, compressed or not."""
    parts, convolutions = dict.fromkeys(byte_counts._ITEMS, 0), byte_counts._convolutions(network)
    for name, value in _checkpoint.encoded(network)[1].items():
        kind, _, of = name.partition(" ")
        parts[byte_counts._NAMED.get(kind) or byte_counts._item(of, convolutions)] += value.nbytes
    return pd.Series(parts, dtype="int64")


def tiny():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(2, 3)
    )


def clustered(groups, n_clusters, *, size=(3, 3), indices=None, scaled=False, turned=False):
    """Return a clustering of the right shapes and no meaning, of so many clusters a group or its kernels."""
    found = []
    for i, layers in enumerate(groups):
        n = sum(layer.n_kernels for layer in layers)
        k = min(n_clusters, n)
        members = np.arange(n) % k if indices is None else np.asarray(indices)
        scales, turns = np.ones(n, "f") if scaled else None, np.zeros(n, "u1") if turned else None
        codebook = np.zeros((k, *size), "f")
        found.append(Group(str(i), tuple(layers), codebook, members.astype("i4"), 0.0, scales, turns))
    return Clustering(tuple(found), "mapping", 0)


def rows_of(*counts, size=(3, 3), itemsize=4):
    """Return layers of so many kernels."""
    starts = np.cumsum([0, *counts])
    return [Layer(str(i), (n, 1, *size), int(starts[i]), False, itemsize) for i, n in enumerate(counts)]


def network_of(*counts):
    return nn.Sequential(*(nn.Conv2d(1, n, 3, bias=False) for n in counts))


def bits_of(n_members):
    return math.ceil(math.log2(n_members))


@st.composite
def networks(draw):
    """A network that need not run, of some kinds of layers that share weights at times."""
    torch.manual_seed(draw(st.integers(0, 999)))
    width = st.sampled_from([2, 4, 6])
    bias = st.booleans()
    layers = [nn.Conv2d(draw(width), draw(width), 3, bias=draw(bias))]
    kinds = ["plain", "groups", "transposed", "pointwise", "norm", "linear", "shared", "again"]
    for kind in draw(st.lists(st.sampled_from(kinds), max_size=4)):
        n_in, n_out, with_bias = draw(width), draw(width), draw(bias)
        if kind == "shared":
            of = layers[0].weight.shape
            layers.append(nn.Conv2d(of[1], of[0], 3, dilation=2, bias=with_bias))
            layers[-1].weight = layers[0].weight
        else:
            layers.append(
                {
                    "plain": lambda i, o, b: nn.Conv2d(i, o, 3, bias=b),
                    "groups": lambda i, o, b: nn.Conv2d(i, o, 3, groups=2, bias=b),
                    "transposed": lambda i, o, b: nn.ConvTranspose2d(i, o, 3, groups=2, bias=b),
                    "pointwise": lambda i, o, b: nn.Conv2d(i, o, 1, bias=b),
                    "norm": lambda i, o, b: nn.BatchNorm2d(i),
                    "linear": lambda i, o, b: nn.Linear(i, o, bias=b),
                    "again": lambda i, o, b: layers[0],
                }[kind](n_in, n_out, with_bias)
            )
    return nn.Sequential(*layers).to(draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])))


def test_ledger_of_a_tiny_network_is_as_by_hand():
    network = tiny()
    table = footprint(network, cluster(extract(network), 3))
    linear, rest = 4 * 2 * 3, 4 * 4 * 4 + 8 + 4 * 3  # batch norm, its counter of batches, the linear bias
    books = {"fp32": 3 * 9 * 4, "fp16": 3 * 9 * 2, "int8": 3 * (9 + 2)}
    whole = 288 + 32 + 24 + linear + rest
    expected = {"dense": [288, 0, 0, 0, 0, 32, 24, linear, rest, 288 + 32 + 24, whole, whole]}
    for name in ("fixed", "entropy"):  # so few indices are never smaller coded
        for precision, book in books.items():
            sums = [2 + book + 56, 2 + book + 56 + linear + rest, 2 + 3 * 9 * 4 + 56 + linear + rest]
            expected[f"{name}_{precision}"] = [0, 2, 0, book, 0, 32, 24, linear, rest, *sums]
    assert table.index.tolist() == ITEMS
    assert table.to_dict("list") == expected
    assert list(table.columns) == list(expected)


def test_scales_and_turns_are_in_the_ledger():
    network = tiny()
    bank = extract(network)
    scaled = footprint(network, cluster(bank, 3, scaled=True), codings=("fixed",))
    assert scaled.loc["scales"].to_dict() == {
        "dense": 0, "fixed_fp32": 8 * 4, "fixed_fp16": 8 * 2, "fixed_int8": 8 * 2
    }  # fmt: skip
    assert scaled.loc["indices", "fixed_fp32"] == 2
    turned = footprint(network, cluster(bank, 3, turned=True), codings=("fixed",))
    assert turned.loc["indices"].tolist() == [0, 5, 5, 5]  # 8 indices into 3 · 8 entries of 5 bits
    assert turned.loc["scales"].sum() == 0
    both = footprint(network, cluster(bank, 3, scaled=True, turned=True), codings=("fixed",))
    assert both.loc["model", "fixed_int8"] - turned.loc["model", "fixed_int8"] == 16


def test_only_the_codings_asked_for_are_computed():
    network = tiny()
    result = cluster(extract(network), 3)
    whole = footprint(network, result)
    for name in ("fixed", "entropy"):
        columns = ["dense", *(f"{name}_{precision}" for precision in PRECISIONS)]
        assert footprint(network, result, codings=(name,)).equals(whole[columns])


@given(networks(), st.integers(1, 12), st.sampled_from(["layer", "global"]), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=25)
def test_ledger_is_what_a_file_takes_but_for_its_header(
    tmp_path_factory, network, n_clusters, scope, scaled, turned
):
    bank = extract(network, size=3)
    most = len(bank) if scope == "global" else max(layer.n_kernels for layer in bank.layers)
    result = cluster(bank, min(n_clusters, most), scope=scope, scaled=scaled, turned=turned)
    table = footprint(network, result)
    path = tmp_path_factory.mktemp("file") / "model"
    for precision in PRECISIONS if next(network.parameters()).dtype == torch.float32 else ("fp32", "fp16"):
        compressed = compress(network, result, precision=precision)
        for name in ("fixed", "entropy"):
            parts = compression.save(compressed, path, indices=name).bytes
            column = table[f"{name}_{precision}"]
            for item in ("indices", "frequency tables", "codebooks", "scales"):
                assert parts[item] == column[item]
            others = column[["other convolution weights", "convolution biases", "rest"]].sum()
            assert parts["other parameters and buffers"] == others
            assert parts["linear weights"] == column["linear weights"]
            held = {id(x): x.nbytes for x in (*compressed.parameters(), *compressed.buffers())}
            turns = {id(x) for name, x in compressed.named_buffers() if name.endswith("codebook.turns")}
            assert column["model in memory"] == sum(held[x] for x in held.keys() - turns)
            assert column["model"] == parts.sum() - parts["header"] == path.stat().st_size - parts["header"]
    for precision in PRECISIONS:
        assert table.loc["model", f"entropy_{precision}"] <= table.loc["model", f"fixed_{precision}"]


@pytest.mark.parametrize("scaled", [False, True])
def test_ledger_is_what_a_file_takes_where_a_transposed_convolution_is_tied_to_a_plain_one(scaled, tmp_path):
    network = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.ConvTranspose2d(4, 4, 3, bias=False))
    network[1].weight = network[0].weight
    result = cluster(extract(network), 4, scaled=scaled)
    parts = compression.save(compress(network, result), tmp_path / "model", indices="fixed").bytes
    assert footprint(network, result).loc["model", "fixed_fp32"] == parts.sum() - parts["header"]


def test_uneven_indices_take_fewer_bytes_coded_and_their_table_is_counted(tmp_path):
    network = nn.Sequential(nn.Conv2d(20, 50, 3))
    indices = np.repeat([0, 1, 2, 3, 4], [900, 50, 30, 19, 1])
    result = clustered([extract(network).layers], 5, indices=indices)
    table = footprint(network, result)
    frequencies = _entropy.counts(indices, 5)
    words, counts = _entropy_coding.encode(indices, frequencies), _entropy_coding.packed_counts(frequencies)
    assert table.loc["indices", "fixed_fp16"] == 1000 * 3 // 8
    assert table.loc["indices", "entropy_fp16"] == words.nbytes
    assert table.loc["frequency tables"].to_dict() == {
        name: counts.nbytes if name.startswith("entropy") else 0 for name in table.columns
    }
    assert entropy_bound(result) - 8 < words.nbytes < entropy_bound(result) + 16
    spared = 375 - words.nbytes - counts.nbytes
    assert spared > 200
    assert table.loc["model", "entropy_int8"] == table.loc["model", "fixed_int8"] - spared


@pytest.mark.parametrize(
    ("indices", "turned", "n_bytes"),
    [
        ([0, 0, 0, 0, 1, 1, 2, 3], None, (4 * 1 + 2 * 2 + 3 + 3) / 8),
        ([0, 1, 2, 3, 0, 1, 2, 3], None, 8 * 2 / 8),
        ([0] * 8, None, 0),
        ([0] * 8, [0, 0, 0, 0, 7, 7, 7, 7], 8 * 1 / 8),
        ([0, 0, 1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 0, 1, 0, 1], 8 * 2 / 8),
    ],
    ids=["uneven", "even", "one", "one turned", "turned"],
)
def test_entropy_bound_by_hand(indices, turned, n_bytes):
    layers = rows_of(8)
    group = clustered([layers], 4, indices=indices).groups[0]
    turns = None if turned is None else np.array(turned, "u1")
    group = Group("0", tuple(layers), group.codebook, group.indices, 0.0, None, turns)
    assert entropy_bound(Clustering((group,), "layer", 0)) == pytest.approx(n_bytes)
    assert entropy_bound(Clustering((group, group), "layer", 0)) == pytest.approx(2 * n_bytes)


def test_bits_of_each_layers_indices_by_hand():
    network = network_of(8, 4)
    indices = [0, 0, 0, 0, 1, 1, 2, 2, 1, 1, 1, 1]
    result = clustered([extract(network).layers], 3, indices=indices)
    table = index_bits_by_layer(compress(network, result))
    assert table.columns.tolist() == ["layer", "fixed", "coded", "entropy", "stored"]
    assert table.stored.tolist() == ["fixed", "fixed"]  # so few indices pay for no table
    assert table.layer.tolist() == ["0", "1"]
    assert table.fixed.tolist() == [2, 2]
    assert table.entropy.tolist() == [1.5, 0]


def skewed(n, n_symbols, seed):
    shares = 1 / np.arange(1, n_symbols + 1)
    return np.random.default_rng(seed).choice(n_symbols, n, p=shares / shares.sum())


@pytest.mark.parametrize(
    ("n_symbols", "scope"),
    [
        (16, "layer"),
        (1000, "global"),
        (64, "mixed"),
    ],
)
def test_bits_of_all_layers_come_to_the_bytes_of_words_and_tables(n_symbols, scope):
    network = nn.Sequential(*(nn.Conv2d(50, 60, 3) for _ in range(4)))
    layers = extract(network).layers
    groups = [[layer] for layer in layers] if scope == "layer" else [layers]
    parts = [skewed(3000, n_symbols, seed) for seed in range(4)]
    if scope == "mixed":
        parts[3] = n_symbols - 1 - parts[3]
    result = clustered(groups, n_symbols)
    split = parts if scope == "layer" else [np.concatenate(parts)]
    filled = [
        Group(g.name, g.layers, g.codebook, x.astype("i4"), 0.0)
        for g, x in zip(result.groups, split, strict=True)
    ]
    result = Clustering(tuple(filled), "mapping", 0)
    table = index_bits_by_layer(compress(network, result))
    whole = footprint(network, result).loc[["indices", "frequency tables"], "entropy_fp32"].sum()
    assert (table.coded > table.entropy).all()
    assert (table.coded < table.fixed).all()
    assert (table.stored == "coded").all()
    assert (table.coded * 3000 / 8).sum() == pytest.approx(whole)


def test_savings_are_shares_of_the_ledgers_sums():
    network = tiny()
    saved = savings(network, cluster(extract(network), 3))
    assert saved.kernels == 1 - 3 / 8
    assert saved.bytes == pytest.approx(1 - 166 / 344)
    assert saved.bytes_fp16 == pytest.approx(1 - 112 / 344)
    assert saved.model_bytes == pytest.approx(1 - (166 + 108) / (344 + 108))


def test_savings_are_negative_where_codebook_and_indices_take_more():
    network = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False))
    assert savings(network, cluster(extract(network), 8)).bytes == pytest.approx(1 - (288 + 3) / 288)


def test_dense_column_is_the_bytes_of_the_state_dict():
    for network in (tiny(), tiny().half(), nn.Sequential(nn.ConvTranspose2d(4, 2, 5), nn.Conv1d(2, 2, 3))):
        dense = sum(x.numel() * x.element_size() for x in network.state_dict().values())
        assert footprint(network, cluster(extract(network), 2)).loc["model", "dense"] == dense


def test_convolution_bytes_by_hand():
    assert convolution_bytes(tiny()) == 4 * (2 * 4 * 9 + 4 + 4 * 2 + 2)
    assert convolution_bytes(tiny().half()) == 2 * (2 * 4 * 9 + 4 + 4 * 2 + 2)
    assert convolution_bytes(nn.Linear(3, 2)) == 0
    shared = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3, bias=False), nn.Conv1d(2, 2, 3, bias=False))
    shared[1].weight = shared[0].weight
    assert convolution_bytes(shared) == 4 * (36 + 2 + 12)


@given(networks())
@settings(deadline=None, max_examples=25)
def test_convolution_bytes_are_the_dense_bytes_of_the_ledger(network):
    expected = footprint(network, cluster(extract(network), 1, scope="global")).loc["convolutions", "dense"]
    assert convolution_bytes(network) == expected


def test_indices_of_each_layer_are_packed_to_a_whole_byte():
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 1, 3))
    bank = extract(network)
    for scope in ("layer", "global"):
        table = footprint(network, cluster(bank, 2, scope=scope))
        assert table.loc["indices"].tolist() == [0, 2, 2, 2, 2, 2, 2]


def test_shared_tensors_are_counted_once():
    network = tiny()
    network.append(network[0])
    network.append(nn.Conv2d(2, 4, 3, dilation=2))
    network[-1].weight, network[-1].bias = network[0].weight, network[0].bias
    network.append(nn.Linear(2, 3, bias=False))
    network[-1].weight = network[4].weight
    expected = footprint(tiny(), cluster(extract(tiny()), 3))
    assert footprint(network, cluster(extract(network), 3)).equals(expected)


def test_weight_of_a_parametrized_convolution_is_a_convolution_weight():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), parametrizations.weight_norm(nn.Conv2d(1, 2, 3)))
    table = footprint(network, cluster(extract(network).only("0"), 2))
    assert table.loc["other convolution weights", "dense"] == 4 * (2 + 2 * 9)
    assert table.loc["rest", "dense"] == 0
    table = footprint(network, cluster(extract(network), 2))
    assert table.loc[["kernels", "other convolution weights"], "dense"].tolist() == [4 * 6 * 9, 0]


def test_the_reports_figures_are_kernels_and_bytes_removed():
    network = nn.Sequential(nn.Conv2d(1, 1_634_496, 3, bias=False))
    saved = savings(network, clustered([rows_of(1_634_496)], 235_367))
    assert round(100 * saved.kernels, 1) == 85.6
    assert round(100 * saved.bytes, 2) == 79.35


def test_half_precision_network_has_half_the_dense_bytes():
    network = tiny()
    single = footprint(network, cluster(extract(network), 3)).loc["kernels", "dense"]
    network.to(torch.float16)
    assert footprint(network, cluster(extract(network), 3)).loc["kernels", "dense"] == single / 2


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.sampled_from(["layer", "global", "pairs"]),
    st.sampled_from([(3, 3), (1, 2)]),
    st.sampled_from([4, 2]),
    st.sampled_from(list(ROW)),
)
@settings(deadline=None, max_examples=25)
def test_break_even_is_the_largest_k_that_takes_fewer_bytes_than_dense(
    counts, scope, size, stored, precision
):
    layers = rows_of(*counts, size=size, itemsize=stored)
    bank = KernelBank(np.zeros((sum(counts), *size), "f"), tuple(layers), {})
    groups = {"layer": [[n] for n in counts], "global": [counts], "pairs": [counts[:2], counts[2:]]}[scope]
    row = ROW[precision](math.prod(size))

    def n_bytes(group, k):
        k = min(k, sum(group))
        return k * row + sum(math.ceil(n * bits_of(k) / 8) for n in group) if k else 0

    paying = [
        k
        for k in range(1, max(map(sum, groups)) + 1)
        if sum(n_bytes(group, k) for group in groups) < sum(counts) * math.prod(size) * stored
    ]
    if scope == "pairs":
        scope = {layer.name: str(i // 2) for i, layer in enumerate(layers)}
    assert break_even(bank, scope=scope, precision=precision) == max(paying, default=0)


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, "fp32"), (torch.float16, "fp16"), (torch.float16, "fp32")]
)
def test_ledger_turns_where_break_even_says(dtype, precision):
    network = nn.Sequential(nn.Conv2d(4, 30, 3, bias=False)).to(dtype)
    turn = break_even(extract(network), scope="global", precision=precision)
    assert 0 < turn < 120
    groups = [extract(network).layers]
    before = footprint(network, clustered(groups, turn)).loc["model"]
    beyond = footprint(network, clustered(groups, turn + 1)).loc["model"]
    assert before[f"fixed_{precision}"] < before["dense"] <= beyond[f"fixed_{precision}"]


def test_a_codebook_of_fewer_bytes_a_weight_always_pays():
    bank = extract(nn.Sequential(nn.Conv2d(4, 30, 3)))
    assert [break_even(bank, precision=precision) for precision in ("fp16", "bf16", "int8")] == [120] * 3


def test_ways_of_a_tiny_network_are_as_by_hand():
    network = tiny()
    result = clustered([extract(network).layers], 3, indices=[0, 0, 0, 0, 1, 1, 2, 2])
    table = ways(network, result)
    columns = ["way", "of", "dense", "kept", "removed", "ratio", "pays_up_to"]
    assert table.columns.tolist() == columns
    expected = [("kernels removed (IPSJ report)", "kernels", 8, 3, 7)]
    for label in ("fixed-width", "entropy-coded"):
        for precision, kept, limit in (("fp32", 166, 7), ("fp16", 112, 8), ("int8", 91, 8)):
            way = f"{label} indices, {precision} codebook"
            expected += [(way, "convolutions", 344, kept, limit), (way, "model", 452, kept + 108, limit)]
    bound = 112 - 2 + 8 * 1.5 / 8
    expected.append(("entropy of the groups' indices, fp16 codebook", "convolutions", 344, bound, None))
    son = (32 * 9 * 3 + 8 * (math.log2(3) + 16)) / 8
    expected.append(("formula of Son et al. 2018", "clustered kernels", 288, son, 7))
    assert table.way.tolist() == [row[0] for row in expected]
    assert table.of.tolist() == [row[1] for row in expected]
    assert table.dense.tolist() == [row[2] for row in expected]
    assert table.kept.tolist() == pytest.approx([row[3] for row in expected])
    assert [None if math.isnan(k) else k for k in table.pays_up_to.astype(float)] == [
        row[4] for row in expected
    ]
    np.testing.assert_allclose(table.removed, [100 * (1 - kept / n) for _, _, n, kept, _ in expected])
    np.testing.assert_allclose(table.ratio, [n / kept for _, _, n, kept, _ in expected])


def test_what_was_weighed_is_beside_what_was_computed(tmp_path):
    network = tiny()
    result = cluster(extract(network), 3)
    contents = compression.save(compress(network, result), tmp_path / "model")
    computed = ways(network, result)
    table = ways(network, result, file=contents, resident={"dense": 5_000, "packed": 1_250})
    assert table.iloc[:-2].equals(computed)
    file, resident = table.iloc[-2], table.iloc[-1]
    assert (file.way, file.of, file.dense) == ("file, as it lies on disk", "model", 452)
    assert file.kept == (tmp_path / "model").stat().st_size
    assert (resident.way, resident.of, resident.ratio) == ("resident memory, measured", "model", 4)
    assert (resident.dense, resident.kept, resident.removed) == (5_000, 1_250, 75)
    assert table.pays_up_to.isna().tolist()[-2:] == [True, True]
    only = ways(network, result, resident={"dense": 5_000, "packed": 1_250})
    assert only.way.tolist() == [*computed.way, "resident memory, measured"]


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(1, 20),
)
@settings(deadline=None, max_examples=30)
def test_up_to_the_k_it_says_each_way_keeps_less_than_dense_and_not_beyond(counts, joint, scaled, turned, k):
    network = network_of(*counts)
    layers = extract(network).layers
    groups = [layers] if joint else [[layer] for layer in layers]
    sizes = [sum(layer.n_kernels for layer in group) for group in groups]
    kinds = {"scaled": scaled, "turned": turned}
    table = ways(network, clustered(groups, k, **kinds))
    limits = dict(zip(table.way, table.pays_up_to, strict=True))
    dense = 36 * sum(counts)

    def formula(k, precision, scale_bytes, orbit):
        used = [min(k, n) for n in sizes]
        rows = sum(used) * ROW[precision](9)
        return rows + sum(
            n * (math.log2(j * orbit) / 8 + scale_bytes) for j, n in zip(used, sizes, strict=True)
        )

    def largest(pays):
        return max((k for k in range(1, max(sizes) + 1) if pays(k)), default=0)

    for precision in PRECISIONS:
        column = f"fixed_{precision}"

        def pays(k, column=column):
            sums = footprint(network, clustered(groups, k, **kinds), codings=("fixed",)).loc["convolutions"]
            return sums[column] < sums["dense"]

        limit = limits[f"fixed-width indices, {precision} codebook"]
        assert limit == 0 or pays(limit)
        assert limit == max(sizes) or not pays(limit + 1)
        rest = SCALE[precision] * scaled, 8 if turned else 1
        assert limits[f"entropy-coded indices, {precision} codebook"] == largest(
            lambda k, precision=precision, rest=rest: formula(k, precision, *rest) < dense
        )
    assert limits["formula of Son et al. 2018"] == largest(lambda k: formula(k, "fp32", 2, 1) < dense)
    assert limits["kernels removed (IPSJ report)"] == largest(
        lambda k: sum(min(k, n) for n in sizes) < sum(sizes)
    )
    son = table[table.way == "formula of Son et al. 2018"].iloc[0]
    assert (son.dense, son.kept) == (dense, pytest.approx(formula(k, "fp32", 2, 1)))


def test_stored_bytes_of_a_tiny_network_are_as_by_hand():
    network = tiny()
    packed = compress(network, cluster(extract(network), 3, scaled=True), precision="int4")
    packed = _precisions.quantize(packed, linear="int8", biases="fp16")
    assert stored(packed).to_dict() == {
        "indices": 2, "frequency tables": 0, "codebooks": 14 + 3 * 2, "scales": 8 * 2,
        "other convolution weights": 32, "convolution biases": 2 * (4 + 2),
        "linear weights": 3 * 2 + 3 * 2, "rest": 4 * 4 * 4 + 8 + 3 * 2,  # with scales; batch norm, biases
    }  # fmt: skip
    assert stored_bytes(packed) == 2 + 20 + 16 + 32 + 12
    assert stored_bytes(network) == convolution_bytes(network)


@given(
    networks(),
    st.integers(1, 12),
    st.sampled_from(["layer", "global"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(_precisions.PRECISIONS),
    st.sampled_from([(None, None), ("int8", "fp16"), ("int4", "bf16")]),
)
@settings(deadline=None, max_examples=20)
def test_stored_bytes_are_what_a_file_takes_but_for_its_header(
    tmp_path_factory, network, n_clusters, scope, scaled, turned, precision, others
):
    network = network.float()
    bank = extract(network, size=3)
    most = len(bank) if scope == "global" else max(layer.n_kernels for layer in bank.layers)
    result = cluster(bank, min(n_clusters, most), scope=scope, scaled=scaled, turned=turned)
    plain = compress(network, result, precision=precision)
    packed = _precisions.quantize(plain, linear=others[0], biases=others[1])
    found = stored(packed)
    parts = compression.save(packed, tmp_path_factory.mktemp("file") / "model").bytes
    apart = found[["linear weights", "rest"]].sum()
    assert stored_bytes(packed) + apart == found.sum() == parts.sum() - parts["header"]
    assert found["linear weights"] == parts["linear weights"]
    if others[0] is not None:
        table = footprint(network, result, codings=("entropy",), linear=others[0])
        assert table.loc["linear weights", "entropy_fp32"] == found["linear weights"]
    for item in ("indices", "frequency tables", "codebooks", "scales"):
        assert found[item] == parts[item]
    books = [(g.n_clusters, g.codebook[0].size) for g in result.groups]
    assert found["codebooks"] == sum(_precisions.codebook_bytes(*book, precision) for book in books)
    if precision in PRECISIONS:
        column = footprint(network, result)[f"entropy_{precision}"]
        assert stored(plain).to_dict() == column[found.index].to_dict()
        assert stored_bytes(plain) == column["convolutions"]


@pytest.mark.parametrize(
    ("linear", "n_bytes"), [("int8", 3 * 2 + 3 * 2), ("int4", 3 + 3 * 2), ("bf16", 3 * 4)]
)
def test_rounded_linear_weights_are_in_the_ledger_and_dense_in_memory(linear, n_bytes):
    network = tiny()
    result = cluster(extract(network), 3)
    plain, rounded = footprint(network, result), footprint(network, result, linear=linear)
    ways_to_keep = list(plain.columns.drop("dense"))
    assert (rounded.loc["linear weights", ways_to_keep] == n_bytes).all()
    assert rounded["dense"].equals(plain["dense"])
    change = (rounded - plain)[ways_to_keep]
    assert (change.loc[["linear weights", "model"]] == n_bytes - 4 * 2 * 3).all(axis=None)
    assert (change.drop(index=["linear weights", "model"]) == 0).all(axis=None)


def test_linear_weights_that_layers_share_or_compute_count_once():
    shared, normed = nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 2, bias=False))
    network = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), shared, nn.Linear(4, 4, bias=False), normed)
    network[2].weight = shared.weight
    result = cluster(extract(network), 2)
    table = footprint(network, result, linear="int8", codings=("fixed",))
    kept = 4 * (2 + 8)  # magnitudes and directions are not rounded
    assert table.loc["linear weights", ["dense", "fixed_fp32"]].tolist() == [4 * 16 + kept, 16 + 4 * 2 + kept]
    assert table.loc["rest", "dense"] == 4 * 4
    made = stored(compress(network, result, linear="int8", inputs=False))
    assert made["linear weights"] == 16 + 4 * 2 + kept


def test_ways_count_rounded_linear_weights_in_the_model_alone():
    network = tiny()
    result = cluster(extract(network), 3)
    change = ways(network, result, linear="int4").kept - (plain := ways(network, result)).kept
    expected = np.where((plain.of == "model"), 3 + 3 * 2 - 24, 0)
    np.testing.assert_array_equal(change, expected)


def test_the_largest_k_fits_even_where_all_representatives_are_used_equally_often():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(8, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 8, 1))
    for n_bytes in (2500, 4000, 9000):
        k = byte_counts.largest_k(network, n_bytes)
        made, more = (cluster(extract(network), x, progress=False) for x in (k, 2 * k))
        fits, too_many = (byte_counts.clustered_bytes(network, x) for x in (made, more))
        assert fits <= n_bytes < too_many
    with pytest.raises(InvalidValueError, match="n_bytes is 9; one cluster a layer takes 1,35"):
        byte_counts.largest_k(network, 9)


def test_bits_of_kernels_are_those_of_their_layers_frequencies():
    bank = extract(nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 4, 3)))
    layers, area = bank.layers, bank.size
    indices = np.array([0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 2, 2], np.int32)
    group = Group("all", layers, np.zeros((3, *area), np.float32), indices, 0.0)
    made = Clustering((group,), "global", 0)
    table = byte_counts.bits_by_kernel(bank, made)
    assert table.bits.tolist() == [1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2]
    norms = np.linalg.norm(bank.points, axis=1).reshape(-1)
    np.testing.assert_allclose(table.norm[:4], norms[:4] / np.sqrt(np.square(norms[:4]).mean()), rtol=1e-5)
    layered = byte_counts.bits_by_layer(made, precision="fp16")
    assert layered["index"].tolist() == [1, 1.5]
    np.testing.assert_allclose(layered.codebook, 8 * 3 * 9 * 2 / 12)
