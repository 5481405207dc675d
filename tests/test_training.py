import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import entropy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from kclib import datasets, models, training
from kclib.errors import DamagedFileError, InvalidValueError
from kclib.training import Recipe

RECIPE = Recipe(epochs=2, batch_size=8, peak_rate=1e-2, shift=1, square=2, held_back=12)
CALLS = 6 + 1  # of preprocess an epoch: 48 training images by 8, then all held-back ones; before it a check


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


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("interrupted_at", [0, 1, 4, 1 + CALLS, 4 + CALLS, 2 * CALLS])
def test_a_resumed_run_ends_in_the_bits_of_an_uninterrupted_one(tmp_path, interrupted_at, taught):
    how = {"teacher": network(1) if taught else None}  # what it answers for held-back images is asked first
    whole = training.train(network(), data(), scaler(), RECIPE, tmp_path / "whole.pt", **how)
    cut, path = scaler(interrupted_at + taught), tmp_path / "cut.pt"
    with pytest.raises(InterruptedError):
        training.train(network(), data(), cut, RECIPE, path, **how)
    epochs_left = 2 - max(0, interrupted_at - 1) // CALLS
    for calls_left in (epochs_left * CALLS + (interrupted_at == 0), 0):
        resumed = training.train(network(), data(), scaler(calls_left + taught), RECIPE, path, **how)
        assert resumed.history == whole.history
        assert equal(resumed.model.state_dict(), whole.model.state_dict())


def test_the_callers_network_is_untouched(tmp_path):
    net = network().eval()
    before = models.fingerprint(net)
    trained = training.train(net, data(), scaler(), RECIPE, tmp_path / "a.pt")
    assert (models.fingerprint(net), net.training) == (before, False)
    assert models.fingerprint(trained.model) != before


@pytest.mark.parametrize(
    ("seed", "images", "epochs", "teacher"), [(1, 60, 2, 7), (0, 62, 2, 7), (0, 60, 3, 7), (0, 60, 2, 8)]
)
def test_a_checkpoint_of_another_start_data_set_recipe_or_teacher_is_refused(
    tmp_path, seed, images, epochs, teacher
):
    training.train(network(), data(), scaler(), RECIPE, tmp_path / "a.pt", teacher=network(7))
    recipe = replace(RECIPE, epochs=epochs)
    with pytest.raises(InvalidValueError, match=r"a\.pt belongs to another"):
        training.train(
            network(seed), data(images), scaler(), recipe, tmp_path / "a.pt", teacher=network(teacher)
        )


def test_a_truncated_checkpoint_is_named(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"PK\x03\x04 not a whole checkpoint")
    with pytest.raises(DamagedFileError, match=r"a\.pt"):
        training.train(network(), data(), scaler(), RECIPE, tmp_path / "a.pt")


@pytest.mark.parametrize("held_back", [60, 61, 53])
def test_a_recipe_that_leaves_no_batch_to_train_on_is_refused(tmp_path, held_back):
    recipe = replace(RECIPE, held_back=held_back)
    with pytest.raises(InvalidValueError, match="held_back"):
        training.train(network(), data(), scaler(), recipe, tmp_path / "a.pt")


@pytest.mark.parametrize("images", [7, 49])
def test_an_epoch_of_less_than_a_batch_or_more_than_all_images_is_refused(tmp_path, images):
    with pytest.raises(InvalidValueError, match=f"images is {images};"):
        training.train(network(), data(), scaler(), replace(RECIPE, images=images), tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"epochs": 0}, "epochs is 0;"),
        ({"batch_size": 1.5}, "batch_size is 1.5;"),
        ({"patience": -1}, "patience is -1;"),
        ({"images": True}, "images is True;"),
        ({"peak_rate": float("nan")}, "peak_rate is nan;"),
        ({"temperature": 0}, "temperature is 0;"),
        ({"label_smoothing": 1.1}, "label_smoothing is 1.1;"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1;"),
    ],
)
def test_a_bad_recipe_is_refused_in_a_sentence(changes, sentence):
    with pytest.raises(InvalidValueError) as caught:
        Recipe(**changes)
    assert str(caught.value).startswith(sentence)


def test_what_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(InvalidValueError, match=r"0\.weight.*float16.*\.float"):
        training.train(network().half(), data(), scaler(), RECIPE, tmp_path / "a.pt")
    with pytest.raises(InvalidValueError, match=r"epoch 1 is nan.* 0\.01"):
        training.train(network(), data(), lambda x: x * math.nan, RECIPE, tmp_path / "a.pt")


@pytest.mark.parametrize("taught", [False, True])
def test_images_read_one_by_one_train_as_those_in_memory(tmp_path, taught):
    def to_float(images):  # black stays 0, so that it does not matter which comes first, this or the blanks
        return images.float() / 64

    how = {"teacher": network(1) if taught else None}
    start = nn.Sequential(*(x for x in network() if not isinstance(x, nn.Dropout)))  # it has draws of its own
    streamed = replace(data(), images=TensorDataset(data().images, data().labels))
    first, second = (
        training.train(start, images, to_float, RECIPE, tmp_path / f"{i}.pt", **how)
        for i, images in enumerate((data(), streamed))
    )
    assert first.history == second.history
    assert equal(first.model.state_dict(), second.model.state_dict())


def test_a_run_on_images_read_one_by_one_resumes_to_the_bit(tmp_path):
    streamed = replace(data(), images=TensorDataset(data().images, data().labels))
    whole = training.train(network(), streamed, scaler(), RECIPE, tmp_path / "whole.pt")
    cut = scaler(12 + 48 + 12 + 20)  # in the second epoch, after a check, an epoch and another check
    with pytest.raises(InterruptedError):
        training.train(network(), streamed, cut, RECIPE, tmp_path / "cut.pt")
    resumed = training.train(network(), streamed, scaler(), RECIPE, tmp_path / "cut.pt")
    assert resumed.history == whole.history
    assert equal(resumed.model.state_dict(), whole.model.state_dict())


def test_images_of_unknown_label_are_not_trained_on(tmp_path):
    labels = data().labels.clone()
    labels[::6] = -1
    seen = set()
    see = scaler(seen=lambda images: seen.update(images[:, 0, 0, 0].tolist()))
    recipe = replace(RECIPE, shift=0, square=0)
    trained = training.train(network(), replace(data(), labels=labels), see, recipe, tmp_path / "a.pt")
    assert seen == set(data().images[labels >= 0, 0, 0, 0].tolist())
    assert all(math.isfinite(row["held_back"]) for row in trained.history)


def test_held_back_images_are_never_trained_on_and_each_epoch_has_its_own_order(tmp_path):
    trained, held = [], set()

    def seen(images):
        (trained.extend if len(images) == 8 else held.update)(images[:, 0, 0, 0].tolist())

    recipe = replace(RECIPE, shift=0, square=0)
    training.train(network(), data(), scaler(seen=seen), recipe, tmp_path / "a.pt")
    assert (len(trained), len(set(trained)), len(held)) == (96, 48, 12)
    assert held | set(trained) == set(data().images.flatten().tolist())
    assert trained[:48] != trained[48:]


def test_an_epoch_of_so_many_images_draws_others_each_time(tmp_path):
    seen = []
    recipe = replace(RECIPE, shift=0, square=0, images=17)  # of which two batches of 8 are whole
    see = scaler(seen=lambda images: seen.extend(images[:, 0, 0, 0].tolist() if len(images) == 8 else ()))
    training.train(network(), data(), see, recipe, tmp_path / "a.pt")
    assert (len(seen), len(set(seen[:16]))) == (32, 16)
    assert 16 < len(set(seen)) <= 32


def right_at(*checks: int, states: list) -> nn.Module:
    """Return a network that is right at these checks alone; `states` get what it was at each."""
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        net[2].weight.copy_(torch.tensor([[-1.0], [1.0]])), net[2].bias.zero_()

    def remember(module, inputs):
        if not module.training:
            states.append({k: v.clone() for k, v in module.state_dict().items()})
            return inputs[0] if len(states) - 1 in checks else -inputs[0]

    net.register_forward_pre_hook(remember)
    return net


@pytest.mark.parametrize("best", [0, 1, 2, 3])
def test_the_answer_is_the_network_of_the_best_check_the_start_among_them(tmp_path, best):
    net = right_at(best, states=(states := []))
    trained = training.train(net, data(), scaler(), replace(RECIPE, epochs=3), tmp_path / "a.pt")
    assert [row["held_back"] for row in trained.history] == [100 * (i == best) for i in range(4)]
    assert [row["epoch"] for row in trained.history if "loss" in row] == [1, 2, 3]
    assert trained.held_back == 100
    assert [equal(trained.model.state_dict(), state) for state in states] == [i == best for i in range(4)]
    assert not trained.model.training


@pytest.mark.parametrize(
    ("right", "patience", "epochs"),
    [((0,), 2, 3), ((2,), 2, 4), ((2, 4), 2, 4), ((1, 3), 3, 4), ((1,), 0, 6)],
)
def test_patience_ends_training_so_many_epochs_after_the_best_one(tmp_path, right, patience, epochs):
    recipe = replace(RECIPE, epochs=6, patience=patience)
    trained = training.train(right_at(*right, states=[]), data(), scaler(), recipe, tmp_path / "a.pt")
    assert len(trained.history) - 1 == epochs
    again = training.train(right_at(*right, states=[]), data(), scaler(0), recipe, tmp_path / "a.pt")
    assert again.history == trained.history


def test_what_after_epoch_returns_is_checked_and_kept_and_what_it_changes_is_trained_on(tmp_path):
    biases = []

    def after(net):
        biases.append(net[-1].bias.detach().clone())
        kept = copy.deepcopy(net)
        with torch.no_grad():
            net[-1].bias += 5
            kept[-1].bias.copy_(torch.tensor([99.0, 0.0]))
        return kept

    recipe = replace(RECIPE, peak_rate=1e-5)
    trained = training.train(network(), data(), scaler(), recipe, tmp_path / "a.pt", after_epoch=after)
    dark = 100 * sum(x < 128 for x in held_back_values()) / 12
    assert [row["held_back"] for row in trained.history] == [dark] * 3
    assert trained.model[-1].bias.tolist() == [99, 0]
    assert torch.allclose(biases[2] - biases[0], torch.tensor(10.0), atol=1e-3)


def held_back_values() -> list[int]:
    order = torch.randperm(60, generator=torch.Generator().manual_seed(RECIPE.seed))
    return data().images[order[:12], 0, 0, 0].tolist()


def test_distillation_reads_no_labels(tmp_path):
    first, second = (
        training.train(network(), images, scaler(), RECIPE, tmp_path / f"{i}.pt", teacher=network(1))
        for i, images in enumerate((data(), replace(data(), labels=torch.full((60,), -1))))
    )
    assert first.history == second.history
    assert set(first.history[1]) == {"epoch", "loss", "agreement"}
    assert equal(first.model.state_dict(), second.model.state_dict())
    assert first.held_back == max(row["agreement"] for row in first.history)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_to_a_teacher_is_the_divergence_of_softened_answers(tmp_path, temperature):
    def answers(slope, images):
        return softmax(np.outer(images.reshape(-1) / 127.5 - 1, [-slope, slope]) / temperature, axis=1)

    one, other = (right_at(*range(9), states=[]) for _ in range(2))
    with torch.no_grad():
        other[2].weight.mul_(3)
    recipe = replace(RECIPE, epochs=1, shift=0, square=0, peak_rate=1e-9, temperature=temperature)
    found = training.train(one, data(), scaler(), recipe, tmp_path / "a.pt", teacher=other)
    images = np.setdiff1d(data().images[:, 0, 0, 0].numpy(), held_back_values())
    expected = temperature**2 * entropy(answers(3, images), answers(1, images), axis=1).mean()
    assert found.history[1]["loss"] == pytest.approx(expected, rel=0.01)
    assert [row["agreement"] for row in found.history] == [100, 100]


def test_a_student_learns_its_teachers_answers(tmp_path):
    teacher = right_at(states=[])  # always wrong
    recipe = replace(RECIPE, epochs=8)
    trained = training.train(network(), data(), scaler(), recipe, tmp_path / "a.pt", teacher=teacher)
    assert trained.history[0]["agreement"] < trained.held_back == 100
    assert trained.history[-1]["loss"] < 0.7 * trained.history[1]["loss"]


def test_the_teacher_answers_as_it_would_in_use_and_stays_as_it_is(tmp_path):
    teacher, modes = network(1), set()
    before = models.fingerprint(teacher)
    teacher.register_forward_hook(
        lambda module, inputs, out: modes.add((module.training, out.requires_grad, out.dtype))
    )
    training.train(network(), data(), scaler(), RECIPE, tmp_path / "a.pt", teacher=teacher)
    assert modes == {(False, False, torch.bfloat16)}
    assert (models.fingerprint(teacher), teacher.training) == (before, True)


def test_the_loss_falls_on_an_easy_problem(tmp_path):
    trained = training.train(network(), data(), scaler(), replace(RECIPE, epochs=8), tmp_path / "a.pt")
    assert trained.history[-1]["loss"] < 0.7 * trained.history[1]["loss"]
    assert trained.held_back == 100


def augmented(images, seed: int = 0, **changes):
    return training._augment(images, replace(RECIPE, **changes), torch.Generator().manual_seed(seed))


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
