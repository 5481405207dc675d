import itertools
from collections import OrderedDict
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from kclib import datasets, models, training
from kclib.errors import DamagedFileError, InvalidValueError
from kclib.training import Recipe

RECIPE = Recipe(epochs=2, batch_size=8, peak_rate=1e-2, shift=1, square=2, held_back=12)
CALLS = 6 + 1  # of preprocess an epoch: 48 training images by 8, then all held-back ones


@pytest.fixture(autouse=True)
def one_thread():
    """These networks are so small that a second thread only waits, long on a busy machine."""
    before = torch.get_num_threads()
    yield torch.set_num_threads(1)
    torch.set_num_threads(before)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    return nn.Sequential(*layers, nn.Dropout(0.3), nn.Linear(16, 2))


def data(n: int = 60) -> datasets.ImageSet:
    """Dark images of one class and bright ones of another; each image of one value that is its own."""
    values = torch.cat([torch.arange(1, n // 2 + 1), torch.arange(256 - n // 2, 256)])
    images = values.to(torch.uint8)[:, None, None, None].expand(n, 1, 8, 8)
    return datasets.ImageSet("tiny/train", images, (values > 127).long(), ("dark", "bright"), str(n))


def scaler(interrupted_at: int = -1, seen=lambda images: None):
    """A preprocessing to -1..1 that is interrupted at one of its calls."""
    calls = itertools.count()

    def preprocess(images):
        if next(calls) == interrupted_at:
            raise InterruptedError
        seen(images)
        return images.float() / 127.5 - 1

    return preprocess


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("interrupted_at", [CALLS, CALLS + 3, CALLS + 6])
def test_a_resumed_run_ends_in_the_bits_of_an_uninterrupted_one(tmp_path, interrupted_at):
    whole = training.train(network(), data(), scaler(), RECIPE, tmp_path / "whole.pt")
    with pytest.raises(InterruptedError):
        training.train(network(), data(), scaler(interrupted_at), RECIPE, tmp_path / "cut.pt")
    for rest in (scaler(interrupted_at=CALLS), scaler(interrupted_at=0)):  # one epoch left, then none
        resumed = training.train(network(), data(), rest, RECIPE, tmp_path / "cut.pt")
        assert resumed.history == whole.history
        assert equal(resumed.network.state_dict(), whole.network.state_dict())


def test_the_callers_network_is_untouched(tmp_path):
    net = network().eval()
    before = models.fingerprint(net)
    trained = training.train(net, data(), scaler(), RECIPE, tmp_path / "a.pt")
    assert (models.fingerprint(net), net.training) == (before, False)
    assert models.fingerprint(trained.network) != before


@pytest.mark.parametrize(("seed", "images", "epochs"), [(1, 60, 2), (0, 62, 2), (0, 60, 3)])
def test_a_checkpoint_of_another_start_data_set_or_recipe_is_refused(tmp_path, seed, images, epochs):
    training.train(network(), data(), scaler(), RECIPE, tmp_path / "a.pt")
    recipe = replace(RECIPE, epochs=epochs)
    with pytest.raises(InvalidValueError, match=r"a\.pt belongs to another"):
        training.train(network(seed), data(images), scaler(), recipe, tmp_path / "a.pt")


def test_a_truncated_checkpoint_is_named(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"PK\x03\x04 not a whole checkpoint")
    with pytest.raises(DamagedFileError, match=r"a\.pt"):
        training.train(network(), data(), scaler(), RECIPE, tmp_path / "a.pt")


@pytest.mark.parametrize("held_back", [60, 61, 53])
def test_a_recipe_that_leaves_no_batch_to_train_on_is_refused(tmp_path, held_back):
    recipe = replace(RECIPE, held_back=held_back)
    with pytest.raises(InvalidValueError, match="held_back"):
        training.train(network(), data(), scaler(), recipe, tmp_path / "a.pt")


def test_held_back_images_are_never_trained_on_and_each_epoch_has_its_own_order(tmp_path):
    trained, held = [], set()

    def seen(images):
        (trained.extend if len(images) == 8 else held.update)(images[:, 0, 0, 0].tolist())

    recipe = replace(RECIPE, shift=0, square=0)
    training.train(network(), data(), scaler(seen=seen), recipe, tmp_path / "a.pt")
    assert (len(trained), len(set(trained)), len(held)) == (96, 48, 12)
    assert held | set(trained) == set(data().images.flatten().tolist())
    assert trained[:48] != trained[48:]


def test_the_answer_is_the_network_of_the_best_held_back_epoch(tmp_path):
    net, states = network(), []

    def remember(module, inputs):
        if not module.training:
            states.append({k: v.clone() for k, v in module.state_dict().items()})
            return inputs[0] if len(states) == 2 else -inputs[0]  # wrong on held-back but in epoch 2

    net.register_forward_pre_hook(remember)
    trained = training.train(net, data(), scaler(), replace(RECIPE, epochs=3), tmp_path / "a.pt")
    assert ([row["held_back"] for row in trained.history], trained.held_back) == ([0, 100, 0], 100)
    assert equal(trained.network.state_dict(), states[1])
    assert not equal(trained.network.state_dict(), states[2])
    assert not trained.network.training


def test_the_loss_falls_on_an_easy_problem(tmp_path):
    trained = training.train(network(), data(), scaler(), replace(RECIPE, epochs=8), tmp_path / "a.pt")
    assert trained.history[-1]["loss"] < 0.7 * trained.history[0]["loss"]
    assert trained.held_back == 100


def test_the_shipped_recipe_sees_the_training_split_alone_and_leaves_halves(tmp_path, monkeypatch):
    layers = {"features": nn.Sequential(nn.Conv2d(3, 2, 3)), "pool": nn.AdaptiveAvgPool2d(1)}
    net = nn.Sequential(OrderedDict(layers, flatten=nn.Flatten(), classifier=nn.Linear(2, 2)))
    start = {"features.0.weight": torch.full((2, 3, 3, 3), 0.25), "features.0.bias": torch.zeros(2)}
    save_file(start, tmp_path / "start.safetensors")
    images = replace(data(), images=data().images.repeat(1, 1, 4, 4)[..., :28, :28])
    monkeypatch.setenv("KCLIB_DATA", str(tmp_path))
    monkeypatch.setattr(models, "vgg16_fashion", lambda: net)
    monkeypatch.setattr(datasets, "load", load := Mock(return_value=images))
    out = tmp_path / "out.safetensors"
    trained = training.train_fashion(out, tmp_path / "start.safetensors", replace(RECIPE, peak_rate=1e-9))
    load.assert_called_once_with("fashion-mnist", "train")
    assert equal(models.read_weights(out), {k: v.half() for k, v in trained.network.state_dict().items()})
    assert torch.allclose(trained.network.features[0].weight, torch.tensor(0.25))
    assert safe_open(out, "pt").metadata()["held_back"] == f"{trained.held_back:.2f}"


def test_a_start_without_the_thirteen_convolutions_is_refused(tmp_path):
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "start.safetensors")
    with pytest.raises(InvalidValueError, match="13 convolutions"):
        training.start_from_features(models.vgg16_fashion(), tmp_path / "start.safetensors")


def augmented(images, seed: int = 0, **changes):
    return training.augment(images, replace(RECIPE, **changes), torch.Generator().manual_seed(seed))


def noise(n: int, channels: int = 1) -> torch.Tensor:
    draw = torch.Generator().manual_seed(n)
    return torch.randint(1, 256, (n, channels, 9, 7), dtype=torch.uint8, generator=draw)


def test_augmentation_hangs_on_its_generator_alone():
    images = noise(20)
    assert torch.equal(augmented(images), augmented(images))
    assert not torch.equal(augmented(images), augmented(images, seed=1))


@settings(deadline=None, max_examples=20)
@given(shift=st.integers(0, 2), channels=st.integers(1, 3), seed=st.integers(0, 99))
def test_without_a_square_each_image_is_shifted_and_perhaps_mirrored(shift, channels, seed):
    images = noise(6, channels)
    result = augmented(images, seed, shift=shift, square=0)
    assert (result.shape, result.dtype) == (images.shape, torch.uint8)
    for image, after in zip(F.pad(images, (shift,) * 4), result, strict=True):
        moved = [image[:, y : y + 9, x : x + 7] for y, x in np.ndindex(2 * shift + 1, 2 * shift + 1)]
        assert any(torch.equal(after, choice) for m in moved for choice in (m, m.flip(2)))


def test_about_half_of_the_images_are_mirrored():
    images = noise(400)
    kept = (augmented(images, shift=0, square=0) == images).flatten(1).all(1).sum().item()
    assert 150 < kept < 250


def test_a_square_blanks_a_rectangle_of_at_most_its_side_in_about_half_of_the_images():
    blank = (augmented(torch.ones(400, 2, 9, 7, dtype=torch.uint8), shift=0, square=4) == 0).all(1)
    rows, columns = blank.any(2), blank.any(1)
    assert torch.equal(blank, rows[:, :, None] & columns[:, None, :])
    for side in (rows, columns):  # one run of blanks: it begins once at most
        assert (F.pad(side.int(), (1, 0)).diff(dim=1) > 0).sum(1).max() == 1
        assert side.sum(1).max() == 4
    assert 150 < blank.flatten(1).any(1).sum() < 250
