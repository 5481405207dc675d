import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_data, tiny_model
from torch import nn

from kclib import evaluation, experiments, kernels
from kclib.errors import InvalidValueError, UnknownNameError
from kclib.experiments import _cell
from kclib.store import Store

KS = (1, 24, 36)  # the layers have 12 and 24 kernels: a K of 36 fits the scope global only
CELLS = [("dense", 0), ("layer", 1), ("layer", 24), ("global", 1), ("global", 24), ("global", 36)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def table(store):
    return experiments.sweep(tiny_model(), tiny_data(), KS, store=store)


@pytest.fixture
def evaluated(monkeypatch):
    """Counts the evaluations; `limit` of them succeed and the next is interrupted."""
    counted, genuine = {"n": 0, "limit": 1000}, evaluation.evaluate

    def count(*args, **kwargs):
        if counted["n"] == counted["limit"]:
            raise InterruptedError
        counted["n"] += 1
        return genuine(*args, **kwargs)

    monkeypatch.setattr(evaluation, "evaluate", count)
    return counted


def test_dense_comes_first_and_a_k_above_a_scopes_largest_group_is_not_run_there(table):
    assert list(zip(table.scope, table.k, strict=True)) == CELLS


def test_the_dense_row_is_the_models_own_evaluation_and_loses_nothing(table):
    own = evaluation.evaluate(tiny_model(), tiny_data(), progress=False)
    dense = table.iloc[0]
    assert (dense.top1, dense.top1_low, dense.top1_high) == (own.top1.estimate, own.top1.low, own.top1.high)
    assert dense.top5 == own.top5.estimate
    lost = ["drop", "kernels_removed", "bytes_removed", "bytes_removed_fp16"]
    assert (dense[[*lost, "model_bytes_removed", "inertia"]] == 0).all()
    assert dense.drop_low == pytest.approx(-dense.drop_high)


def test_what_a_sweep_has_computed_is_at_hand_by_its_k(store, table, evaluated):
    result, before, after = experiments.stored(tiny_model(), tiny_data(), 24, scope="global", store=store)
    assert (result.n_clusters, evaluated["n"]) == (24, 0)
    row = table[(table.scope == "global") & (table.k == 24)].iloc[0]
    assert (before.top1.estimate, after.top1.estimate) == (table.iloc[0].top1, row.top1)
    assert evaluation.drop(before, after).points.estimate == row["drop"]


def test_as_many_clusters_as_kernels_change_no_answer(table):
    whole = table[(table.k == 36) | ((table.scope == "layer") & (table.k == 24))]
    assert whole.clusters.tolist() == [36, 36]
    assert (whole[["drop", "kernels_removed", "inertia"]] == 0).to_numpy().all()
    assert (whole.top1 == table.top1[0]).all()
    # 36 indices of 6 bits are 27 bytes on top of 36 kernels of 36 bytes and 10 biases of 4
    assert whole.bytes_removed.iloc[1] == pytest.approx(-100 * 27 / (36 * 36 + 10 * 4))


def test_one_cluster_is_the_mean_kernel(table):
    points = kernels.extract(tiny_model().network).points.astype(float)
    row = table[(table.scope == "global") & (table.k == 1)].iloc[0]
    assert row.inertia == pytest.approx(np.square(points - points.mean(0)).sum(), rel=1e-5)
    assert row.kernels_removed == pytest.approx(100 * 35 / 36)
    network = tiny_model().network
    mean = torch.from_numpy(points.mean(0)).float().reshape(3, 3)
    with torch.no_grad():
        network[0].weight.copy_(mean)
        network[2].weight.copy_(mean)
    right = network(tiny_data().images.float() / 255 - 0.5).argmax(1) == tiny_data().labels
    assert row.top1 == pytest.approx(100 * right.float().mean().item())
    assert row["drop"] == pytest.approx(table.top1[0] - row.top1)
    assert row["drop"] > 20, "a case in which little was lost would show little"


def test_a_finished_sweep_is_read_and_not_computed_again(table, store, evaluated):
    evaluated["limit"] = 0
    again = experiments.sweep(tiny_model(), tiny_data(), KS, store=store)
    assert again.equals(table)


@pytest.mark.parametrize(
    ("model", "data", "options"),
    [
        (tiny_model(1), tiny_data(), {}),
        (tiny_model(), tiny_data(1), {}),
        (tiny_model(), tiny_data(), {"precision": "bf16"}),
    ],
    ids=["model", "data", "precision"],
)
def test_another_sweep_shares_no_cell(table, store, evaluated, model, data, options):
    experiments.sweep(model, data, [1], scopes=["global"], store=store, **options)
    assert evaluated["n"] == 2


def test_other_preprocessing_of_the_same_weights_shares_no_cell(table, store, evaluated):
    other = replace(tiny_model(), preprocess=lambda images: images.float() / 255)
    assert len(experiments.sweep(other, tiny_data(), (1,), store=store)) == evaluated["n"] == 3


def test_a_model_of_another_name_shares_no_evaluation_for_its_forward_may_be_other_code(
    table, store, evaluated
):
    experiments.sweep(replace(tiny_model(), name="other"), tiny_data(), (1,), store=store)
    assert evaluated["n"] == 3


def test_an_interrupted_sweep_keeps_its_finished_cells(table, tmp_path, evaluated):
    evaluated["limit"] = 3
    with pytest.raises(InterruptedError):
        experiments.sweep(tiny_model(), tiny_data(), KS, store=Store(tmp_path))
    evaluated["limit"] = 1000
    resumed = experiments.sweep(tiny_model(), tiny_data(), KS, store=Store(tmp_path))
    assert evaluated["n"] == len(CELLS)
    times = ["cluster_seconds", "evaluate_seconds", "made"]
    assert resumed.drop(columns=times).equals(table.drop(columns=times))


@pytest.mark.parametrize(
    ("ks", "scopes", "error", "message"),
    [
        ([37], ["layer", "global"], InvalidValueError, r"no K of \[37\] is at most the 36 kernels of tiny"),
        ([], ["layer"], InvalidValueError, "no K"),
        ([0], ["layer"], InvalidValueError, "n_clusters is 0"),
        ([4], ["gobal"], UnknownNameError, "mean 'global'"),
    ],
)
def test_a_sweep_that_cannot_run_is_refused_before_it_evaluates(
    tmp_path, evaluated, ks, scopes, error, message
):
    with pytest.raises(error, match=message):
        experiments.sweep(tiny_model(), tiny_data(), ks, scopes=scopes, store=Store(tmp_path))
    assert evaluated["n"] == 0


def test_another_order_of_classes_or_another_architecture_is_another_key(tmp_path):
    model, data = tiny_model(), tiny_data()
    padded = copy.deepcopy(model.network)
    next(x for x in padded.modules() if isinstance(x, nn.Conv2d)).padding = (1, 1)
    others = [replace(model, classes=tuple("fedcba")), replace(model, network=padded), tiny_model()]
    keys = [_cell.Subject(x, data, Store(tmp_path)).key for x in (model, *others)]
    assert keys[0] == keys[3]
    assert keys[0]["weights"] == keys[2]["weights"]
    assert len({key["input"] for key in keys}) == 3
