import copy
import itertools
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from kclib import clustering, compression, kernels
from kclib import training as train_module
from kclib.combination import Cluster, Pipeline, Prune, Quantize, Train, _pruning
from kclib.combination._pipeline import Step
from kclib.compression import _precisions, byte_counts
from kclib.datasets import ImageSet
from kclib.errors import InvalidValueError, UnknownNameError
from kclib.models import Model
from kclib.training import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = Recipe(epochs=2, batch_size=8, peak_rate=1e-2, weight_decay=0, shift=1, square=2, held_back=8)
SCOPES = st.sampled_from(["layer", "global"])
PRECISIONS = st.sampled_from(["fp32", "fp16", "bf16", "int8", "int4"])


def network_of(seed=0):
    torch.manual_seed(seed)
    body = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1)]
    network = nn.Sequential(*body, nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.append(nn.Linear(5, 3))
    with torch.no_grad():
        network[1].bias.normal_()
        network[1].running_mean.normal_()
    return network.eval()


def model_of(seed=0):
    return Model("tiny", network_of(seed), lambda x: x.float() / 128 - 1)


def images(n=24):
    draw = torch.Generator().manual_seed(0)
    whole = torch.randint(256, (n, 3, 6, 6), generator=draw).to(torch.uint8)
    return ImageSet("noise", whole, torch.arange(n) % 3, ("a", "b", "c"), "noise")


def run(pipeline, model=None, **options):
    pipeline = pipeline if isinstance(pipeline, Pipeline) else Pipeline((pipeline,))
    return pipeline.run(model or model_of(), images=images(), progress=False, **options)


def answers(network):
    with torch.no_grad():
        return network(model_of().preprocess(images().images))


def rows(found):
    """Return the kernels that a combination stands for."""
    return kernels.extract(compression.expand(found.model.network)).kernels


def dead(found):
    return ~rows(found).any(axis=(1, 2))


def assert_same(one, other):
    np.testing.assert_array_equal(rows(one), rows(other))
    assert one.n_bytes == other.n_bytes


ALL = [
    (Prune(0.4, kind), Cluster(9, scope), Quantize(precision, linear="int8", biases="fp16"))
    for kind, scope in itertools.product(("kernels", "filters"), ("layer", "global"))
    for precision in ("fp16", "int8", "int4")
]


@pytest.mark.parametrize("steps", [*ALL, ALL[0][::-1], (ALL[5][1], ALL[5][0], ALL[5][2])])
def test_a_stored_combination_answers_to_the_bit_and_takes_the_bytes_it_says(steps, tmp_path):
    model = model_of()
    before = copy.deepcopy(model.network.state_dict())
    found = run(Pipeline(steps), model)
    contents = found.save(tmp_path / "small")
    loaded = compression.load(tmp_path / "small", architecture=network_of(1)).network
    assert torch.equal(answers(loaded), answers(found.model.network))
    parts = contents.bytes.drop(["header", "linear weights", "other parameters and buffers"]).sum()
    assert contents.bytes["linear weights"] == 5 * 3 + 3 * 2  # whole numbers, a bfloat16 step each output
    norms, linear_biases = 4 * 6 * 4 + 8, 3 * 2
    other = contents.bytes["other parameters and buffers"] - linear_biases - norms
    assert other == 8 * 5 * 4 + (6 + 8 + 5) * 2
    assert found.n_bytes == parts + other == found.table.bytes.iloc[-1]
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())
    np.testing.assert_array_equal(rows(found)[dead(found)], 0)
    assert found.table.zero_kernels.iloc[-1] == dead(found).mean() >= 0.3


def test_the_bytes_and_zeros_of_each_step_are_listed_with_the_dense_network_first():
    found = run(Prune(0.5) >> Quantize("int8", biases="fp16"))
    assert found.table.step.tolist() == ["dense", "prune", "quantize"]
    dense = byte_counts.convolution_bytes(network_of())
    pruned = _pruning.prune(model_of(), 0.5).network
    whole = _pruning.sparse_bytes(pruned, precision="int8") - (6 + 8 + 5) * 2
    assert found.table.bytes.tolist() == [dense, _pruning.sparse_bytes(pruned, precision="fp32"), whole]
    assert found.table.zero_kernels.tolist() == [0, 0.5, 0.5]
    assert (found.clustering, found.n_bytes) == (None, whole)
    assert run(Quantize("bf16")).n_bytes == dense - 2 * 66 * 9


@given(st.integers(0, 99), SCOPES, PRECISIONS, st.integers(2, 20))
@settings(deadline=None, max_examples=10)
def test_clusters_that_are_quantized_are_those_that_compress_rounds(seed, scope, precision, k):
    model = model_of(seed)
    found = run(Cluster(k, scope) >> Quantize(precision), model, seed=seed)
    theirs = clustering.cluster(kernels.extract(model.network), k, scope=scope, seed=seed, progress=False)
    theirs = compression.compress(model.network, theirs, precision=precision)
    assert torch.equal(answers(found.model.network), answers(theirs))
    assert found.n_bytes <= byte_counts.stored_bytes(theirs)  # representatives that round alike are one
    if precision == "fp16":
        assert found.n_bytes == byte_counts.stored_bytes(theirs)


@given(st.integers(0, 99), SCOPES, st.sampled_from(["fp16", "int8"]), st.sampled_from([0.25, 0.5]))
@settings(deadline=None, max_examples=6)
def test_pruning_kernels_and_rounding_codebooks_commute(seed, scope, precision, sparsity):
    model, cluster, prune, quantize = model_of(seed), Cluster(12, scope), Prune(sparsity), Quantize(precision)
    one = run(cluster >> prune >> quantize, model)
    assert_same(one, run(cluster >> quantize >> prune, model))
    assert dead(one).mean() == pytest.approx(sparsity, abs=0.5 / 66)
    assert_same(run(prune >> cluster >> quantize, model), run(prune >> (cluster >> quantize), model))


def test_clustering_commutes_neither_with_pruning_nor_with_rounding():
    early, late = run(Prune(0.4) >> Cluster(8)), run(Cluster(8) >> Prune(0.4))
    assert (dead(early) != dead(late)).any()
    assert (run(Quantize("int4") >> Cluster(8)).clustering.inertia !=
            run(Cluster(8) >> Quantize("int4")).clustering.inertia)  # fmt: skip


def test_rounding_before_clustering_rounds_the_kernels_and_then_the_codebooks():
    found = run(Quantize("int8") >> Cluster(66, "global"))
    kept = run(Quantize("int8")).model.network
    book = torch.from_numpy(clustering.cluster(kernels.extract(kept), 66, scope="global").groups[0].codebook)
    expected = _precisions.rounded(book, "int8").numpy().reshape(-1, 9)
    assert {row.tobytes() for row in rows(found).reshape(-1, 9)} == {row.tobytes() for row in expected}
    steps = (
        kept[0].weight.detach().numpy()
        / (abs(kept[0].weight.detach().numpy()).max((1, 2, 3)) / 127)[:, None, None, None]
    )
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)


def convolution(values, bias=False):
    """Return a convolution of kernels ``(out, 1)`` that are these values at 1×2 taps."""
    made = nn.Conv2d(1, len(values), (1, 2), bias=bias)
    with torch.no_grad():
        made.weight.copy_(torch.tensor(values, dtype=torch.float32).reshape(made.weight.shape))
    return Model("one", nn.Sequential(made), lambda x: x.float())


def test_pruned_clusters_get_a_zero_and_representatives_of_nothing_go():
    model = convolution([[1, 1], [1, 1], [1, 1], [5, 5], [9, 9]])
    (group,) = run(Cluster(3) >> Prune(0.4), model).clustering.groups
    assert sorted(group.codebook[:, 0, 0].tolist()) == [0, 1, 5, 9]
    assert group.codebook[group.indices][:, 0, 0].tolist() == [1, 0, 0, 5, 9]
    assert not group.codebook[-1].any()
    found = run(Cluster(3) >> Prune(0.6), model).clustering
    assert sorted(found.groups[0].codebook[:, 0, 0].tolist()) == [0, 5, 9]
    assert found.inertia == 6


def test_weights_of_codebooks_are_scored_by_what_they_add_to_the_error():
    model = convolution([[2, 3], [2, 3], [2, 3], [1, 4], [5, 9]])  # scores 12, 27; 1, 16; 25, 81
    for gone, expected in ((2, [[0, 3], [0, 4], [5, 9]]), (3, [[0, 3], [0, 0], [5, 9]])):
        found = run(Cluster(3) >> Prune(gone / 6, "weights"), model)
        assert sorted(found.clustering.groups[0].codebook.reshape(-1, 2).tolist()) == sorted(expected)
    assert found.clustering.inertia == 3 * 4 + 1 + 16
    with pytest.raises(InvalidValueError, match=r"6 of 6 weights.*5"):
        run(Cluster(3) >> Prune(0.99, "weights"), model)


def test_the_best_weight_of_each_layer_stays_in_a_codebook():
    model = model_of()
    with torch.no_grad():
        model.network[3].weight *= 0.01
    found = run(Cluster(20, "layer") >> Prune(0.98, "weights"), model)
    assert [bool(group.codebook.any()) for group in found.clustering.groups] == [True, True]


def test_single_zeros_are_averaged_away_by_representatives_but_zero_kernels_are_not():
    model = convolution([[0.1, 4], [0.2, 6], [0.1, 0.2], [8, 9]])
    found = run(Prune(0.5, "weights") >> Cluster(1), model)
    np.testing.assert_allclose(rows(found)[:, 0], [[8 / 3, 19 / 3]] * 2 + [[0, 0]] + [[8 / 3, 19 / 3]], 1e-6)


@pytest.fixture
def last_is_best(monkeypatch):
    """The last check counts as the best, so that what is returned was trained."""
    monkeypatch.setattr(train_module, "_score", lambda row: row["epoch"])


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("kernels", "fp16"), ("kernels", "int4"), ("filters", "fp16"), ("filters", "int4"), ("weights", "fp16")],
)
@pytest.mark.usefixtures("last_is_best")
def test_what_was_pruned_stays_zero_in_training_wherever_it_stands(kind, precision, tmp_path):
    prune, cluster, train = Prune(0.4, kind), Cluster(9, "global"), Train(RECIPE)
    options = {"train": images(), "folder": tmp_path}
    orders = [prune >> train, cluster >> prune >> train]
    orders += [prune >> cluster >> train] if kind != "weights" else []  # whose zeros no mean has to keep
    for steps in orders:
        before = run(steps.steps[0] >> Quantize(precision) >> Pipeline(steps.steps[1:-1]))
        after = run(steps.steps[0] >> Quantize(precision) >> Pipeline(steps.steps[1:]), **options)
        zero = rows(before) == 0 if kind == "weights" else dead(before)
        assert zero.any()
        np.testing.assert_array_equal(rows(after)[zero], 0)
        assert (rows(after) != rows(before)).mean() > 0.3
        assert not any(hasattr(module, "held") for module in after.model.network.modules())
        assert dead(after).mean() == dead(before).mean()


@pytest.mark.usefixtures("last_is_best")
def test_it_is_trained_at_each_place_and_what_is_stored_is_what_was_trained(tmp_path):
    steps = Train(RECIPE) >> Cluster(9) >> Train(RECIPE) >> Quantize("int8", linear="int8") >> Train(RECIPE)
    found = run(steps, train=images(), folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    found.save(tmp_path / "small")
    loaded = compression.load(tmp_path / "small", architecture=network_of(1)).network
    assert torch.equal(answers(loaded), answers(found.model.network))
    assert len({row.tobytes() for row in rows(found)[:18]}) == 9


def test_a_corrected_clustering_and_weights_of_errors_go_in_too():
    plain, corrected = run(Cluster(9)), run(Cluster(9, corrected=True) >> Prune(0.3) >> Quantize())
    assert corrected.clustering.inertia > plain.clustering.inertia
    assert not torch.equal(corrected.model.network[3].bias, plain.model.network[3].bias)
    assert dead(corrected).mean() == pytest.approx(0.3, abs=0.01)
    for steps in (Prune(0.3, weighted=True) >> Cluster(9), Prune(0.3) >> Cluster(9, weighted=True)):
        assert not np.array_equal(rows(run(steps)), rows(run(Prune(0.3) >> Cluster(9))))
    steps = [Cluster(9) >> Prune(0.3, "weights", weighted=x) for x in (False, True)]
    assert not np.array_equal(*(rows(run(x)) for x in steps))


def test_the_same_seed_gives_the_same_and_reaches_the_clustering():
    found = [run(Prune(0.3) >> Cluster(5, "global"), seed=seed) for seed in (3, 3, 4)]
    assert_same(*found[:2])
    assert found[2].clustering.seed == 4


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Prune(1), "sparsity is 1;"),
        (lambda: Prune(0.1) >> Cluster(3) >> Prune(0.2), "Prune is there 2 times"),
        (lambda: Cluster(3) >> Cluster(3), "Cluster is there 2 times"),
        (lambda: Cluster(3) >> 3, "3 is no step; it must be Prune"),
        (lambda: run(Prune(0.1) >> Cluster(3, corrected=True)), "would move zeros; prune after it"),
        (lambda: run(Cluster(3) >> Train(RECIPE)), r"Train\(.*\) needs train; give train=... to run"),
        (lambda: run(Cluster(3) >> Train(RECIPE), train=images()), "needs folder"),
        (lambda: Pipeline((Prune(0.1, weighted=True),)).run(model_of()), "needs images"),
        (lambda: run(Prune(0.1)).save("nowhere"), "nothing is clustered"),
        (lambda: run(Cluster(999)), "n_clusters is 999"),
    ],
)
def test_what_cannot_be_combined_is_refused(make, sentence):
    with pytest.raises(InvalidValueError, match=sentence):
        make()


@pytest.mark.parametrize("options", [{"codebook": "fp8"}, {"linear": "fp8"}, {"biases": "int8"}], ids=str)
def test_unknown_precisions_and_kinds_are_refused(options):
    with pytest.raises(UnknownNameError, match="unknown precision"):
        Quantize(**options)
    with pytest.raises(UnknownNameError, match="kind of pruning"):
        Prune(0.1, "layers")


def test_steps_are_compared_by_what_they_do():
    assert Prune(0.1) >> Cluster(3) == Pipeline((Prune(0.1), Cluster(3)))
    assert replace(Prune(0.1), sparsity=0.2) == Prune(0.2)
    assert all(issubclass(kind, Step) for kind in (Prune, Cluster, Quantize, Train))
