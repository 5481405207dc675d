import numpy as np
import pytest
from tiny import tiny_data, tiny_model

import kclib
from kclib import compression, evaluation, experiments
from kclib.errors import InvalidValueError
from kclib.evaluation import attribution
from kclib.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def table(store):
    return experiments.sweep_layers(tiny_model(), tiny_data(), [1, 4, 24], seed=3, store=store)


def test_each_k_has_a_row_a_layer_and_one_of_all_layers(table):
    assert table.k.tolist() == [1] * 3 + [4] * 3 + [24] * 3
    assert table.layer.tolist() == ["0", "2", "all layers"] * 3


def test_a_layers_drop_is_that_of_a_network_with_only_it_clustered(table):
    model, data = tiny_model(), tiny_data()
    dense = evaluation.evaluate(model, data, progress=False)
    for k in (1, 4):
        for name in ("0", "2"):
            alone = kclib.cluster(kclib.extract(model).only(name), k, seed=3, progress=False)
            after = evaluation.evaluate(compression.replaced(model, alone), data, progress=False)
            row = table[(table.k == k) & (table.layer == name)].iloc[0]
            assert row["drop"] == pytest.approx(evaluation.drop(dense, after).points.estimate)


def test_a_layer_that_keeps_all_its_kernels_loses_nothing(table):
    assert (table[table.k == 24]["drop"] == 0).all()
    assert (table[table.k == 1]["drop"] > 0).any()


def test_what_is_stored_is_not_computed_again(store, table, monkeypatch):
    monkeypatch.setattr(attribution, "by_layer", None)
    again = experiments.sweep_layers(tiny_model(), tiny_data(), [24, 1], seed=3, store=store)
    np.testing.assert_array_equal(again[again.k == 1].to_numpy(), table[table.k == 1].to_numpy())
    with pytest.raises(TypeError):
        experiments.sweep_layers(tiny_model(), tiny_data(), [2], seed=3, store=store)


@pytest.mark.parametrize("ks", [[], [0]])
def test_a_k_below_one_or_none_at_all_is_refused(ks):
    with pytest.raises(InvalidValueError):
        experiments.sweep_layers(tiny_model(), tiny_data(), ks)
