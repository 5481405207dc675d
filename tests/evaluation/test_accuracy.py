import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from kclib import evaluation, models
from kclib.datasets import ImageSet
from kclib.errors import InvalidValueError, StoppedError, UnknownNameError
from kclib.evaluation import Evaluation, _accuracy
from kclib.models import Model

# A picture of one row whose pixels are the logits, so that nn.Flatten() is a network of known answers.
LOGITS = ([9, 0, 1, 2, 3, 4], [9, 8, 7, 6, 5, 4], [1, 2, 3, 4, 5, 6], [0, 0, 9, 0, 0, 1])
LABELS = (0, 5, 1, 2)  # right; wrong and sixth; wrong but fifth; right
READER = Model("reader", nn.Flatten(), torch.Tensor.float)


def pictures(logits=LOGITS, labels=LABELS) -> ImageSet:
    images = torch.tensor(logits, dtype=torch.uint8)[:, None, None, :]
    return ImageSet(
        "pictures/test", images, torch.tensor(labels), tuple("abcdef")[: len(logits[0])], "f" * 64
    )


def convolution() -> Model:
    """A network of every kind of state, in training mode, with answers exact in any summation order."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, (1, 3)), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    with torch.no_grad():
        network[0].weight.copy_(torch.randint(-3, 4, network[0].weight.shape))
        network[0].bias.zero_()
    return Model("convolution", network.train(), torch.Tensor.float)


def answers(correct) -> Evaluation:
    right = np.asarray(correct, dtype=bool)
    return Evaluation((~right).astype(int), np.zeros(len(right), int), right, ("yes", "no"), 0.0)


def test_accuracies_of_known_answers_are_as_counted_by_hand():
    result = evaluation.evaluate(READER, pictures(), progress=False)
    assert result.predictions.tolist() == [0, 0, 5, 2]
    assert result.correct.tolist() == [True, False, False, True]
    assert result.in_top5.tolist() == [True, False, True, True]
    assert (result.top1.estimate, result.top5.estimate) == (50, 75)


@pytest.mark.parametrize(
    ("times", "right", "told"),
    [(12, 24, True), (12, 60, False), (8, 16, False)],  # half are class 0; of 48 images it is not told
)
def test_answers_no_better_than_guessing_are_said(times, right, told):
    rows = np.eye(4, dtype=int)
    labels = [0] * (3 * times) + [1] * (2 * times) + [2] * times
    answered = labels[:right] + [3] * (len(labels) - right)
    notes = evaluation.evaluate(READER, pictures(rows[answered], labels), progress=False).notes
    said = "cannot be told from guessing: the most frequent class is 50.00 % of the images."
    assert any(said in note for note in notes) == told


def test_with_fewer_than_five_classes_every_answer_is_in_the_top_five():
    result = evaluation.evaluate(READER, pictures([[1, 2, 3], [3, 2, 1]], [0, 0]), progress=False)
    assert (result.top1.estimate, result.top5.estimate) == (50, 100)


def test_labels_follow_the_models_class_order():
    model = dataclasses.replace(READER, classes=tuple("abcdef"))
    data = dataclasses.replace(pictures([[5, 0, 0], [0, 5, 0]], [1, 0]), classes=("b", "a"))
    padded = dataclasses.replace(data, images=nn.functional.pad(data.images, (0, 3)))
    result = evaluation.evaluate(model, padded, progress=False)
    assert result.labels.tolist() == [0, 1]
    assert result.correct.all()


def test_the_interval_is_wilsons():
    top1 = answers([1] * 9 + [0]).top1
    assert (top1.estimate, top1.low, top1.high) == pytest.approx((90, 59.585, 98.212), abs=1e-3)
    top1 = answers([1] * 5).top1
    assert (top1.estimate, top1.low, top1.high) == pytest.approx((100, 56.552, 100), abs=1e-3)


def test_the_drop_counts_discordant_images():
    before, after = answers([1, 1, 1, 1, 0, 0, 0, 1, 1, 1]), answers([1, 0, 0, 0, 1, 0, 0, 1, 1, 1])
    lost = evaluation.drop(before, after)
    assert (lost.lost, lost.won) == (3, 1)
    assert lost.points.estimate == pytest.approx(20)
    assert lost.p_value == pytest.approx(2 * (4 + 1) / 16)  # 2 P(at least 3 heads of 4)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_the_drop_is_within_its_interval_which_has_a_width(pairs):
    before, after = (np.array(side) for side in zip(*pairs, strict=True))
    lost = evaluation.drop(answers(before), answers(after))
    points = lost.points
    assert -100 <= points.low <= points.estimate <= points.high <= 100
    assert points.high - points.low > 1


def test_the_drops_interval_agrees_with_a_bootstrap():
    rng = np.random.default_rng(0)
    before = rng.random(600) < 0.9
    after = np.where(rng.random(600) < 0.12, rng.random(600) < 0.3, before)
    points = evaluation.drop(answers(before), answers(after)).points
    drawn = rng.integers(0, 600, (4000, 600))
    means = 100 * (before.astype(float) - after)[drawn].mean(1)
    assert (points.low, points.high) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))), abs=0.5)


@pytest.mark.parametrize(("n", "reach"), [(1, 79.35), (10, 27.75), (1_000_000, 0.000384)])
def test_equal_answers_of_more_images_say_more(n, reach):
    right = np.ones(n, bool)
    lost = _accuracy.paired(right, right)
    assert (lost.points.estimate, lost.p_value) == (0, 1)
    assert (lost.points.low, lost.points.high) == pytest.approx((-reach, reach), rel=1e-3)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (np.array([1, 0, 1], bool), np.ones(1, bool)),
        (np.ones(3), np.ones(3)),
        (np.ones(3, int), np.ones(3, int)),
        (np.ones(0, bool), np.ones(0, bool)),
        (np.ones((2, 2), bool), np.ones((2, 2), bool)),
    ],
)
def test_what_is_not_right_or_wrong_of_the_same_images_is_refused(before, after):
    with pytest.raises(InvalidValueError, match="bool"):
        _accuracy.paired(before, after)


def test_losing_every_image_is_significant():
    lost = evaluation.drop(answers([1] * 10), answers([0] * 10))
    assert (lost.lost, lost.points.estimate) == (10, 100)
    assert lost.p_value == pytest.approx(2 * 0.5**10)


FEW_WRONG = [0] * 10 + [1] * 190
MORE_WRONG = [1] * 5 + [0] * 25 + [1] * 170


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (FEW_WRONG, MORE_WRONG, "a loss of 7.50 points [2.82, 12.82] on 200 images"),
        (MORE_WRONG, FEW_WRONG, "a gain of 7.50 points [2.82, 12.82] on 200 images"),
        ([1] * 2000, [1] * 2000, "no loss that 2,000 images can show (at most 0.19 points)"),
        ([1], [0], "no loss that 1 image can show (at most 100.00 points)"),
    ],
)
def test_a_drop_says_no_more_than_its_interval_shows(before, after, said):
    assert str(evaluation.drop(answers(before), answers(after))) == said


def test_what_holds_zero_is_neither_loss_nor_gain_whatever_was_measured():
    for drop in (-0.10, 0.10):
        told = evaluation.in_words(drop, -0.6, 0.4, 2000)
        assert told == "no loss that 2,000 images can show (at most 0.40 points)"
    assert evaluation.in_words(-1.25, -3.13, 0.27, 400, sought="gain") == (
        "no gain that 400 images can show (at most 3.13 points)"
    )
    assert evaluation.in_words(6, 3.26, 9.19, 400, sought="gain").startswith("a loss of 6.00 points")
    assert evaluation.in_words(np.nan, np.nan, np.nan, 400) == "no drop that 400 images could measure"


def test_a_drop_between_different_images_is_refused():
    with pytest.raises(InvalidValueError, match="different images"):
        evaluation.drop(answers([1, 0]), answers([1, 0, 1]))


def test_the_callers_network_is_untouched():
    model = convolution()
    before = models.fingerprint(model.network)
    evaluation.evaluate(model, pictures(labels=(0, 1, 2, 3), logits=np.eye(4, dtype=int) * 9), progress=False)
    assert models.fingerprint(model.network) == before
    assert all(module.training for module in model.network.modules())
    assert model.network[0].weight.is_contiguous()
    assert all(p.requires_grad and not p.is_inference() for p in model.network.parameters())


@pytest.mark.parametrize("batch_size", [1, 7, 30, 64])
def test_the_batch_size_changes_no_answer(batch_size):
    logits = torch.randint(0, 256, (30, 4), generator=torch.Generator().manual_seed(0)).tolist()
    data = pictures(logits, [i % 4 for i in range(30)])
    network = convolution().network.eval()
    expected = network(data.images.float()).argmax(1)
    result = evaluation.evaluate(convolution(), data, batch_size=batch_size, progress=False)
    assert result.predictions.tolist() == expected.tolist()


def test_progress_hears_the_share_of_the_images_done(capsys):
    shares = []
    result = evaluation.evaluate(READER, pictures(), batch_size=3, progress=shares.append)
    assert shares == [0.75, 1]
    assert result.predictions.tolist() == [0, 0, 5, 2]
    assert capsys.readouterr().err == ""


def test_a_true_answer_ends_the_evaluation():
    shares = []

    def stop(share):
        shares.append(share)
        return share >= 0.5

    with pytest.raises(StoppedError, match="stopped after 2 of 4 images"):
        evaluation.evaluate(READER, pictures(), batch_size=1, progress=stop)
    assert shares == [0.25, 0.5]


def test_pictures_read_one_by_one_are_answered_like_those_in_memory():
    data = pictures()
    listed = [(Image.fromarray(image[0].numpy()), 0) for image in data.images]
    model = dataclasses.replace(READER, preprocess=lambda image: torch.tensor(np.array(image))[None].float())
    result = evaluation.evaluate(model, dataclasses.replace(data, images=listed), progress=False)
    expected = evaluation.evaluate(READER, data, progress=False)
    assert np.array_equal(result.predictions, expected.predictions)
    assert np.array_equal(result.in_top5, expected.in_top5)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_convolutions_run_in_the_precision_asked_for(precision, dtype):
    model, seen = convolution(), []
    model.network[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    data = pictures(np.eye(4, dtype=int) * 9, (0, 1, 2, 3))
    evaluation.evaluate(model, data, precision=precision, progress=False)
    assert seen == [dtype]


def test_a_model_of_other_classes_is_refused():
    with pytest.raises(InvalidValueError, match=r"6 outputs and 2 names \(x, y\)"):
        evaluation.evaluate(dataclasses.replace(READER, classes=("x", "y")), pictures(), progress=False)
    with pytest.raises(InvalidValueError, match="6"):
        evaluation.evaluate(convolution(), pictures(), progress=False)


def test_wrong_options_are_refused():
    with pytest.raises(UnknownNameError, match="mean 'bf16'"):
        evaluation.evaluate(READER, pictures(), precision="bf61", progress=False)
    with pytest.raises(InvalidValueError, match="batch_size is 0"):
        evaluation.evaluate(READER, pictures(), batch_size=0, progress=False)
