from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_data, tiny_model
from torch import nn

from kclib import clustering, datasets, kernels, models, recovery, training
from kclib.combination import factorial
from kclib.compression import byte_counts
from kclib.errors import InvalidValueError
from kclib.experiments import adapting

BANK = kernels.extract(tiny_model().network)  # layers of 12 and 24 kernels
LARGEST = {"layer": 24, "global": 36}


@settings(deadline=None)
@given(st.integers(1, 5000), st.sampled_from(["layer", "global"]))
def test_clusters_are_those_asked_for_or_a_quarter_of_the_kernels(n_clusters, scope):
    taken, said = adapting.clusters(BANK, n_clusters, scope)
    assert taken == (n_clusters if n_clusters <= LARGEST[scope] else LARGEST[scope] // 4)
    assert bool(said) == (taken != n_clusters)
    assert not said or (f"{n_clusters:,}" in said and f"{LARGEST[scope]} kernels" in said)
    assert 1 <= taken <= LARGEST[scope]


@pytest.mark.parametrize(
    ("asked", "scopes", "taken", "said"),
    [
        ([None, 8, 24], ["layer", "global"], [None, 8, 24], []),
        ([8, 30], ["layer", "global"], [8, 30], ["K = 30 is left out of scope layer"]),
        ([8, 30], ["layer"], [8], ["K = 30 is left out of scope layer"]),
        ([None, 4096], ["layer", "global"], [None, 9], ["scope layer", "scope global", "K = 9"]),
        ([64, 128], ["layer"], [6], ["K = 64 and 128", "K = 6"]),
        ([None], ["global"], [None], []),
    ],
)
def test_of_several_k_those_are_taken_that_a_scope_has_kernels_for(asked, scopes, taken, said):
    found, text = adapting.several(BANK, asked, scopes)
    assert found == taken
    assert bool(text) == bool(said)
    assert all(part in text for part in said)


def test_cells_of_a_factorial_leave_out_what_their_own_scope_has_no_kernels_for():
    cells = factorial.cells([0], [None, 8, 30, 99], ["layer", "global"], [None], seeds=[0], bank=BANK)
    assert [(cell["clusters"], cell["scope"]) for cell in cells] == [
        (None, None), (8, "layer"), (8, "global"), (30, "global")
    ]  # fmt: skip
    assert len(factorial.cells([0], [99], ["layer"], [None], seeds=[0])) == 1


def test_images_are_drawn_as_ever_or_all_are_taken():
    data = tiny_data()
    drawn, said = adapting.images(data, 7)
    assert (drawn.fingerprint, said) == (datasets.limited(data, 7).fingerprint, "")
    first, _ = adapting.images(data, 7, drawn=False)
    assert torch.equal(first.labels, data.labels[:7])
    for limit, sentence in ((0, ""), (40, ""), (1000, "1,000 training images were asked for")):
        found, said = adapting.images(data, limit, "training")
        assert len(found) == 40
        assert said.startswith(sentence)
        assert bool(said) == bool(sentence)


@settings(deadline=None)
@given(
    st.integers(8, 3000),
    st.integers(1, 2000),
    st.sampled_from([0, 64, 128, 3200]),
    st.sampled_from([8, 128]),
)
def test_a_recipe_can_be_followed_with_the_images_that_there_are(n_images, held_back, images, batch_size):
    options = {"held_back": held_back, "images": images, "batch_size": batch_size}
    asked = replace(recovery.RECIPE, **options)
    taken, said = adapting.recipe(n_images, **options)
    data = datasets.ImageSet(
        "made up", torch.zeros(n_images, 1, 1, 1, dtype=torch.uint8), torch.zeros(n_images).long(), ("a",), ""
    )
    kept, held = training.split(data, taken)
    assert len(held) == taken.held_back <= max(1, n_images // 2)
    assert 1 < taken.batch_size <= (taken.images or len(kept))
    assert replace(taken, held_back=held_back, images=images, batch_size=batch_size) == asked
    assert bool(said) == (taken != asked)


def test_a_recipe_that_there_are_images_for_stays_as_it_is():
    assert adapting.recipe(60_000) == (recovery.RECIPE, "")


def test_shares_are_of_all_bytes_where_enough_of_them_are_clustered():
    model = models.Model("vgg", models.vgg16_fashion(), models.fashion_preprocess())
    bank = kernels.extract(model.network)
    found, said = adapting.budgets(model, bank, [32, 16])
    dense = byte_counts.convolution_bytes(model.network)
    assert found == {16: dense / 16, 32: dense / 32}
    assert not said


def test_shares_are_above_what_is_not_clustered_where_that_takes_most():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4096, 1, bias=False))
    model = models.Model("mostly 1x1", network, lambda x: x)
    bank = kernels.extract(network)
    found, said = adapting.budgets(model, bank, [4])
    dense = 4 * (8 * 3 * 9 + 8 + 8 * 4096)
    least = dense - 4 * 8 * 3 * 9 + 2 * 9
    assert found[4] == pytest.approx(least + (dense - least) / 4, rel=1e-3)
    assert f"{dense:,} bytes" in said
    assert "1/4" in said


def test_what_is_said_of_classes_is_what_an_evaluation_says():
    said = adapting.about(tiny_model(), tiny_data())
    assert "a, b, c, d, e, f" in said


def test_what_is_refused_is_left_out_by_name_and_reason():
    assert adapting.attempted("Adding", np.add, 1, 2) == (3, "")
    found, said = adapting.attempted("Clustering", clustering.cluster, BANK, 99)
    assert found is None
    assert said.startswith("Clustering is left out: n_clusters is 99")
    with pytest.raises(ZeroDivisionError):
        adapting.attempted("Dividing", divmod, 1, 0)


def test_what_cannot_be_is_refused():
    with pytest.raises(InvalidValueError, match="at least 1"):
        adapting.clusters(BANK, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_network_of_any_precision_is_taken_in_float32(dtype):
    model = replace(tiny_model(), network=tiny_model().network.to(dtype))
    found, said = adapting.in_float32(model)
    assert {x.dtype for x in found.network.parameters()} == {torch.float32}
    assert {x.dtype for x in model.network.parameters()} == {dtype}
    assert (str(dtype) in said) == (dtype != torch.float32)
