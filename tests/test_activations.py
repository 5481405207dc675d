import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kclib import activations, clustering, compression, datasets, evaluation, kernels, models
from kclib.activations import Grid, grids, quantize
from kclib.errors import InvalidValueError


def images_of(n=20, seed=0):
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (n, 3, 8, 8), generator=draw, dtype=torch.uint8)
    return datasets.ImageSet("noise", pixels, torch.zeros(n, dtype=torch.int64), ("a", "b"), "noise")


def model_of(network):
    return models.Model("small", network.eval(), lambda x: x.float().sqrt() - 3)


@pytest.fixture
def model():
    """Layers of each kind that is rounded, one of them clustered, and one that does not run."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 5), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    network[3].idle = nn.Linear(2, 2)
    found = clustering.cluster(kernels.extract(network, size=3), 3, n_threads=1, progress=False)
    return model_of(compression.compress(network, found))


def read(network, inputs):
    """Return what each layer reads, before its own rounding and after."""
    before, after = {}, {}
    for name, module in network.named_modules():
        if isinstance(module, activations._READERS):
            module.register_forward_pre_hook(
                lambda _, args, name=name: before.update({name: args[0]}), prepend=True
            )
            module.register_forward_pre_hook(lambda _, args, name=name: after.update({name: args[0]}))
    with torch.no_grad():
        network(inputs)
    return before, after


@pytest.mark.parametrize(
    ("low", "high", "bits", "scale", "zero_point"),
    [
        (-1.0, 1.55, 8, 0.01, 100),
        (0.5, 2.55, 8, 0.01, 0),  # 0 is always a value
        (-3.0, -1.5, 4, 0.2, 15),
        (-1.0, 2.0, 2, 1.0, 1),
        (0.0, 0.0, 8, 1.0, 0),
        (0.0, 1e-40, 8, 1.0, 0),
    ],
)
def test_grid_by_hand(low, high, bits, scale, zero_point):
    found = Grid.spanning(low, high, bits)
    assert (pytest.approx(found.scale), found.zero_point, found.bits) == (scale, zero_point, bits)
    assert found(torch.zeros(1)).item() == 0


def test_values_go_to_the_nearest_of_the_grid_and_its_ends():
    x = torch.tensor([-9.0, -1.0, -0.6, -0.4, 0.4, 1.2, 2.0, 9.0])
    assert Grid(1.0, 1, 2)(x).tolist() == [-1, -1, -1, 0, 0, 1, 2, 2]


@given(st.floats(-50, 50), st.floats(0.01, 50), st.integers(2, 8), st.integers(0, 999))
@settings(deadline=None, max_examples=20)
def test_values_between_the_ends_are_off_by_half_a_step_and_a_grid_is_its_own(low, width, bits, seed):
    x = torch.from_numpy(np.random.default_rng(seed).uniform(low, low + width, 200)).float()
    grid = Grid.spanning(low, low + width, bits)
    rounded = grid(x)
    # the zero point is a whole number, so that the ends may lie half a step from their values
    assert (rounded - x).abs().max() <= 1.001 * grid.scale
    inner = (x > low + grid.scale) & (x < low + width - grid.scale)
    assert ((rounded - x).abs()[inner] <= 0.501 * grid.scale + 1e-5).all()
    assert len(rounded.unique()) <= 2**bits
    torch.testing.assert_close(grid(rounded), rounded, rtol=1e-6, atol=1e-6)


def test_each_layer_reads_a_grid_from_its_least_to_its_largest_value(model):
    images = images_of()
    network = quantize(model, images, batch_size=7)
    inputs = model.preprocess(images.images)
    plain, _ = read(kernels.copied(model.network), inputs)
    before, after = read(network, inputs)
    found = grids(network)
    assert set(found) == {"0", "2", "4", "7"}
    for name, grid in found.items():
        assert grid == Grid.spanning(float(plain[name].min()), float(plain[name].max()), 8)
        assert torch.equal(after[name], grid(before[name]))
        assert not torch.equal(after[name], before[name])
    assert before["0"].min() < 0
    assert found["0"].zero_point > 0


def test_the_model_and_its_mode_stay_and_copies_keep_the_grids(model):
    model.network.train()
    before = copy.deepcopy(model.network.state_dict())
    network = quantize(model, images_of(), bits=3)
    after = model.network.state_dict()
    assert all(torch.equal(before[name], value) for name, value in after.items())
    assert not grids(model.network)
    assert network.training
    inputs = model.preprocess(images_of(4, seed=1).images)
    expected = network.eval()(inputs)
    for other in (copy.deepcopy(network), kernels.copied(network)):
        assert torch.equal(other(inputs), expected)
        assert grids(other) == grids(network)
        activations.put(other, {"0": Grid(2.0, 0, 2)})
        assert not torch.equal(other(inputs), expected)
    assert torch.equal(network(inputs), expected)
    assert not torch.equal(model.network.eval()(inputs), expected)


def test_quantized_again_from_what_it_reads_without_grids(model):
    coarse = quantize(model, images_of(), bits=2)
    again = quantize(models.Model("coarse", coarse, model.preprocess), images_of())
    assert grids(again) == grids(quantize(model, images_of()))
    assert set(grids(coarse).values()).isdisjoint(grids(again).values())
    assert len(again[0]._forward_pre_hooks) == 1


def test_more_bits_are_nearer_to_the_answers_and_8_are_near(model):
    inputs = model.preprocess(images_of(50, seed=1).images)
    exact = model.network(inputs)
    off = [(quantize(model, images_of(), bits=bits)(inputs) - exact).square().mean() for bits in (2, 4, 6, 8)]
    assert off == sorted(off, reverse=True)
    assert off[-1] < 1e-3 * exact.var()


def test_it_is_evaluated_in_any_precision(model):
    network = quantize(model, images_of())
    for precision in ("fp32", "bf16"):
        found = evaluation.evaluate(
            models.Model("small", network, model.preprocess), images_of(), precision=precision, progress=False
        )
        assert len(found.predictions) == 20


def test_what_cannot_be_quantized_is_refused(model):
    for bits in (1, 9, 8.0, True):
        with pytest.raises(InvalidValueError, match=r"bits is .*; it must be a whole number, 2 to 8"):
            quantize(model, images_of(), bits=bits)
    with pytest.raises(InvalidValueError, match="no images"):
        quantize(model, images_of(0))
    with pytest.raises(InvalidValueError, match="no 2D convolution or linear layer that runs"):
        quantize(model_of(nn.Flatten()), images_of())
    with torch.no_grad():
        model.network[4].weight.fill_(torch.inf)
    with pytest.raises(InvalidValueError, match="layer 7 reads values that are not finite"):
        quantize(model, images_of())
