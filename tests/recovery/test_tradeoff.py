import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from torch import nn

from kclib import compression, kernels, kmeans
from kclib.clustering import _clustering, _scopes
from kclib.clustering._scopes import mixed
from kclib.errors import InvalidValueError, UnknownNameError
from kclib.kernels import KernelBank, Layer
from kclib.recovery import _tradeoff
from kclib.recovery._tradeoff import Curve, curves, solve
from kclib.store import Store

ENDS = {"0": "ends", "1": "middle", "2": "ends"}
KS = (1, 3, 8, 16)


def network_of(*widths):
    return nn.Sequential(*(nn.Conv2d(a, b, 3) for a, b in itertools.pairwise(widths)))


def bank_and_weights(seed):
    """Return the heavy-tailed kernels of a network of three layers, and a weight for each."""
    draw = np.random.default_rng(seed)
    bank = kernels.extract(network_of(3, 6, 5, 4))
    values = draw.standard_t(2, bank.kernels.shape) * draw.choice([0.1, 1], (len(bank), 1, 1))
    return KernelBank(values.astype("f"), bank.layers, {}), draw.uniform(0.01, 3, len(bank)).astype("f")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def test_a_point_no_better_than_a_cheaper_one_is_dropped():
    n_bytes, damage = np.array([10, 30, 20, 20, 40]), np.array([9.0, 4.0, 4.0, 5.0, 1.0])
    curve = Curve.of("a", (1, 2, 3, 4, 5), n_bytes, damage)
    assert (curve.ks, curve.bytes.tolist(), curve.damage.tolist()) == ((1, 3, 5), [10, 20, 40], [9, 4, 1])


def test_bytes_and_damage_of_two_kernels_repeated_are_those_counted_by_hand(store):
    rows = np.broadcast_to(np.float32([1, 1, 1, 1, 1, 1, 3, 3])[:, None, None], (8, 3, 3))
    bank = KernelBank(rows, (Layer("conv", (8, 1, 3, 3), 0),), {})
    (curve,) = curves(bank, np.array([1, 1, 1, 1, 1, 1, 3, 3]), ks=(1, 2, 8), store=store)
    assert curve.ks == (1, 2)
    assert curve.bytes.tolist() == [18, 36 + 1]  # codebooks of fp16, eight indices of 0 and of 1 bit
    np.testing.assert_allclose(curve.damage, [9 * 12, 0])  # one representative lies at (6·1 + 6·3) / 12 = 2


@given(
    st.sampled_from(["layer", "global", ENDS]),
    st.sampled_from(["fp16", "int8"]),
    st.sampled_from(["fixed", "entropy"]),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=12)
def test_bytes_are_the_ledgers_and_damage_is_that_of_the_stored_kernels(scope, precision, coding, seed):
    bank, sample_weight = bank_and_weights(seed)
    members = {
        name: np.concatenate([np.arange(len(bank))[x.rows] for x in layers])
        for name, layers in _scopes.grouping(bank, scope).items()
    }
    trees = {
        name: kmeans.tree(bank.points[rows], sample_weight=sample_weight[rows], seed=seed)
        for name, rows in members.items()
    }
    points = []
    for k in KS:
        rungs = {name: tree.fit(min(k, len(tree.labels))) for name, tree in trees.items()}
        made = _clustering.of_fits(bank, rungs, dict.fromkeys(rungs, 1), scope=scope)
        table = compression.footprint(network_of(3, 6, 5, 4), made, codings=[coding])[f"{coding}_{precision}"]
        stored = [_tradeoff.rounded(group.codebook, precision) for group in made.groups]
        groups = zip(made.groups, stored, members.values(), strict=True)
        errors = [
            np.square(bank.kernels[r] - s[g.indices]).sum((1, 2)) @ sample_weight[r] for g, s, r in groups
        ]
        points.append((table[["indices", "frequency tables", "codebooks"]].sum(), sum(errors)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "get", lambda *_: None)
        patch.setattr(Store, "put", lambda *_: None)
        found = curves(bank, sample_weight, scope=scope, ks=KS, precision=precision, coding=coding, seed=seed)
    assert [curve.name for curve in found] == list(members)
    assert [curve.ks for curve in found] == [KS] * len(found)
    np.testing.assert_array_equal(sum(curve.bytes for curve in found), [n_bytes for n_bytes, _ in points])
    np.testing.assert_allclose(sum(curve.damage for curve in found), [x for _, x in points], rtol=1e-4)


def test_entropy_coded_bytes_are_those_of_representatives_ordered_by_use(store):
    values = np.random.default_rng(0).standard_t(2, (3000, 3, 3)).astype("f")
    bank = KernelBank(values, (Layer("0", (1000, 3, 3, 3), 0),), {})
    (curve,) = curves(bank, np.ones(3000), ks=[200], coding="entropy", store=store)
    rung = kmeans.tree(bank.points, sample_weight=np.ones(3000)).fit(200)
    made = _clustering.of_fits(bank, {"0": rung}, {"0": 200}, scope="layer")
    table = compression.footprint(network_of(3, 1000), made, codings=["entropy"])["entropy_fp16"]
    assert curve.bytes.tolist() == [table[["indices", "frequency tables", "codebooks"]].sum()]
    assert table["frequency tables"] > 0


def test_int8_damage_exceeds_that_of_finer_codebooks_by_their_rounding(store):
    bank, sample_weight = bank_and_weights(0)
    fine, coarse = (
        curves(bank, sample_weight, scope="global", precision=x, store=store)[0] for x in ("fp32", "int8")
    )
    assert (fine.ks[-1], coarse.ks[-1]) == (len(bank), len(bank))  # all its kernels, where it has fewer
    assert fine.damage[-1] == 0 < coarse.damage[-1]


@given(st.data(), st.integers(0, 9999))
@settings(deadline=None, max_examples=25)
def test_the_choice_is_the_best_of_all_that_brute_force_finds(data, seed):
    draw = np.random.default_rng(seed)
    made = []
    for name in "abc":
        m = data.draw(st.integers(1, 5))
        n_bytes = draw.integers(1, 10 ** draw.integers(1, 8), m)
        damage = 10.0 ** draw.uniform(-6, 3, m) * draw.choice([0, 1], m, p=[0.1, 0.9])
        made.append(Curve.of(name, range(1, m + 1), n_bytes, damage))
    every = list(itertools.product(*(range(len(curve.ks)) for curve in made)))
    spent = np.array([sum(c.bytes[i] for c, i in zip(made, choice, strict=True)) for choice in every])
    lost = np.array([sum(c.damage[i] for c, i in zip(made, choice, strict=True)) for choice in every])
    limit = data.draw(st.sampled_from(sorted(set(spent.tolist()))))
    chosen = solve(made, limit)
    place = every.index(tuple(curve.ks.index(chosen[curve.name]) for curve in made))
    assert spent[place] <= limit
    assert lost[place] <= lost[spent <= limit].min() * (1 + 1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_choices_far_too_damaging_to_be_taken_change_nothing(seed):
    draw, ks = np.random.default_rng(seed), 2 ** np.arange(1, 13)
    layers = zip("abcdefghijklm", draw.integers(5000, 90_000, 13), draw.uniform(0.1, 9, 13), strict=True)
    made = [
        Curve.of(name, ks, 18 * ks + n * np.arange(1, 13) // 8, n * scale * ks**-2.0)
        for name, n, scale in layers
    ]
    cheaper = [Curve.of(x.name, (1, *x.ks), np.append(18, x.bytes), np.append(1e9, x.damage)) for x in made]
    limit = 0.8 * sum(x.bytes[-1] for x in made)
    lost = [
        sum(x.damage[x.ks.index(chosen[x.name])] for x in curves)
        for curves in (made, cheaper)
        for chosen in [solve(curves, limit)]
    ]
    assert lost[1] == pytest.approx(lost[0], rel=1e-5)


def test_a_budget_that_cannot_be_met_names_the_least():
    made = [Curve.of(x, (1, 2), np.array([20, 50]), np.array([1.0, 0.0])) for x in "ab"]
    assert solve(made, 40) == {"a": 1, "b": 1}
    assert solve(made, np.inf) == {"a": 2, "b": 2}
    for limit in (39, float("nan")):
        with pytest.raises(InvalidValueError, match=f"n_bytes is {limit}; .* at least 40 bytes"):
            solve(made, limit)


def test_mixed_joins_consecutive_layers_of_equal_width():
    network = network_of(3, 4, 4, 6, 4)
    network[3] = nn.ConvTranspose2d(6, 4, 3)
    network.append(nn.ConvTranspose2d(4, 4, 3))
    bank = kernels.extract(network)
    assert mixed(bank) == {"0": "0..1", "1": "0..1", "2": "2", "3": "3..4", "4": "3..4"}


def test_curves_are_measured_once_for_the_same_kernels_weights_and_options(store, monkeypatch):
    bank, sample_weight = bank_and_weights(0)
    first = curves(bank, sample_weight, ks=KS, store=store)
    genuine, measured = kmeans.tree, []
    monkeypatch.setattr(kmeans, "tree", lambda *a, **k: measured.append(1) or genuine(*a, **k))
    again = curves(bank, sample_weight.astype("d"), ks=reversed(KS), store=store)
    assert not measured
    for one, two in zip(first, again, strict=True):
        assert (one.name, one.ks) == (two.name, two.ks)
        np.testing.assert_array_equal(one.bytes, two.bytes)
        np.testing.assert_array_equal(one.damage, two.damage)
    changed = KernelBank(np.concatenate([bank.kernels[:1] + 1, bank.kernels[1:]]), bank.layers, {})
    curves(changed, sample_weight, ks=KS, store=store)
    assert len(measured) == 1  # the other layers are as they were
    for other in ({"ks": (1, 3)}, {"precision": "int8"}, {"coding": "entropy"}, {"seed": 1}):
        curves(bank, sample_weight, store=store, **{"ks": KS} | other)
    curves(bank, sample_weight * np.float32(2), ks=KS, store=store)
    assert len(measured) == 1 + 5 * 3


def test_a_group_whose_errors_cost_nothing_takes_the_fewest_bytes(store):
    bank, sample_weight = bank_and_weights(0)
    sample_weight[bank.layer("1").rows] = 0
    curve = next(x for x in curves(bank, sample_weight, ks=KS, store=store) if x.name == "1")
    assert curve.ks == (min(KS),)
    assert curve.damage.tolist() == [0]


def test_values_that_cannot_be_are_named(store):
    bank, sample_weight = bank_and_weights(0)
    with pytest.raises(InvalidValueError, match=r"sample_weight has shape \(2,\)"):
        curves(bank, sample_weight[:2], store=store)
    with pytest.raises(InvalidValueError, match="a number of clusters is 0"):
        curves(bank, sample_weight, ks=(0, 2), store=store)
    with pytest.raises(UnknownNameError, match="unknown coding of indices 'huffman'"):
        curves(bank, sample_weight, coding="huffman", store=store)
    with pytest.raises(UnknownNameError, match=r"'mixd'.*'mixed'"):
        curves(bank, sample_weight, scope="mixd", store=store)
    with pytest.raises(UnknownNameError, match="unknown precision 'fp8'"):
        curves(bank, sample_weight, precision="fp8", store=store)
