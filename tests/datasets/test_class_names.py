import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torchvision.datasets import Imagenette
from torchvision.models import ResNet18_Weights

from kclib import datasets, evaluation, models
from kclib.datasets import _class_names, _loader
from kclib.errors import InvalidValueError

CATEGORIES = tuple(ResNet18_Weights.DEFAULT.meta["categories"])


def places(classes, names=(), n_outputs=None, needed=None) -> list[int]:
    needed = [True] * len(classes) if needed is None else needed
    return _class_names.places("x", classes, needed, names, n_outputs or len(names))[0]


def note(classes, names=(), n_outputs=None) -> str:
    return _class_names.places("x", classes, [True] * len(classes), names, n_outputs or len(names))[1]


def labelled(classes, labels) -> datasets.ImageSet:
    images = torch.zeros(len(labels), 3, 4, 4, dtype=torch.uint8)
    return datasets.ImageSet("x/test", images, torch.tensor(labels), tuple(classes), "x")


@given(st.permutations(range(12)), st.integers(1, 12))
def test_names_are_matched_whatever_their_order_and_number(order, n):
    names = [f"class {i}" for i in range(12)]
    assert places([names[i] for i in order[:n]], names) == order[:n]


@pytest.mark.parametrize("change", [str.upper, str.lower, str.title])
@pytest.mark.parametrize("blank", ["", " ", "_", "-"])
def test_case_blanks_and_underscores_do_not_matter(change, blank):
    names = ["garbage truck", "French horn", "T-shirt/top"]
    folders = [change(x.replace(" ", blank).replace("/", "_")) for x in reversed(names)]
    assert places(folders, names) == [2, 1, 0]
    assert "without regard to case" in note(folders, names)


def test_an_accent_may_be_written_in_two_ways():
    assert places(["cafe\u0301", "tea"], ["tea", "caf\u00e9"]) == [1, 0]


def test_a_name_that_could_be_two_is_not_guessed():
    for folders, names in ((["CAT"], ["Cat", "cat"]), (["Cat", "CAT"], ["cat", "dog"])):
        with pytest.raises(InvalidValueError, match=r"could be more than one"):
            places(folders, names)
    assert places(["cat", "Cat"], ["Cat", "cat"]) == [1, 0]


def test_repeated_names_stay_two_classes():
    names = ["crane", "dog", "crane"]
    assert places(names, names) == [0, 1, 2]
    assert places(["Crane", "Dog", "Crane"], names) == [0, 1, 2]
    assert places(["dog"], names) == [1]
    with pytest.raises(InvalidValueError, match="crane could be more than one"):
        places(["crane"], names)


@pytest.mark.parametrize("name", ["{}", "{}-Chihuahua", "{}_x", "{} x, y"])
def test_wordnet_ids_are_imagenets_classes(name):
    """Imagenette's list of ids and names is torchvision's own."""
    ids = list(Imagenette._WNID_TO_CLASS)
    found = places([name.format(x) for x in ids], CATEGORIES)
    assert [CATEGORIES[i] for i in found] == [Imagenette._WNID_TO_CLASS[x][0] for x in ids]
    assert "WordNet id" in note([name.format(x) for x in ids], CATEGORIES)


def test_all_wordnet_ids_in_order_are_all_outputs_in_order():
    _, ids = _class_names.imagenet()
    assert (len(set(ids)), sorted(ids)) == (1000, list(ids))
    assert places(ids, CATEGORIES) == list(range(1000))


def test_a_network_may_be_named_by_wordnet_ids():
    names = ["n03888257", "n01440764", "n02979186"]
    assert places(["tench", "cassette_player", "parachute"], names) == [1, 2, 0]
    assert places(["n02979186"], names) == [2]


def test_imagenets_two_cranes_are_told_apart_by_their_place():
    """Other lists of ImageNet's classes name both the same."""
    names = [x.replace(" bird", "").replace(" tank suit", "") + ", a synonym" for x in CATEGORIES]
    assert places(["n02012849", "n03126707"], names) == [134, 517]


@given(st.lists(st.integers(0, 11), min_size=1, max_size=12, unique=True), st.integers(1, 4))
def test_numbers_are_outputs_also_with_leading_zeros(numbers, width):
    folders = sorted(f"{i:0{width}}" for i in numbers)
    expected = [int(x) for x in folders]
    assert places(folders, (), 12) == expected
    assert places(folders, list("abcdefghijkl")) == expected
    assert "numbers" in note(folders, list("abcdefghijkl"))


def test_numbers_that_are_names_are_matched_as_names():
    assert places(["1", "10", "2"], [str(i) for i in range(1, 11)]) == [0, 9, 1]
    with pytest.raises(InvalidValueError, match="no output is 0"):
        places(["0", "1"], ["1", "2"])


@pytest.mark.parametrize(("folders", "says"), [(["0", "12"], "0 to 11"), (["1", "01"], "the number 1")])
def test_a_number_that_is_no_output_is_refused(folders, says):
    with pytest.raises(InvalidValueError, match=says):
        places(folders, (), 12)


def test_without_names_as_many_classes_are_taken_in_order_and_it_is_said():
    assert places(["ant", "bee", "cat"], (), 3) == [0, 1, 2]
    assert "ant, bee, cat" in note(["ant", "bee", "cat"], (), 3)


@pytest.mark.parametrize("n_outputs", [1, 2, 4, 1000])
def test_without_names_another_number_of_classes_asks_for_them(n_outputs):
    with pytest.raises(InvalidValueError, match="classes="):
        places(["ant", "bee", "cat"], (), n_outputs)


def test_classes_that_fit_nothing_show_both_lists_cut_short():
    with pytest.raises(InvalidValueError, match=r"ant, bee.*tench, goldfish.*no output is ant") as found:
        places(["ant-hill", "bee-hive", "ant", "bee"], CATEGORIES)
    assert len(str(found.value)) < 600


def test_a_class_without_images_needs_no_output():
    assert places(["ant", "new folder"], ["bee", "ant"], needed=[True, False]) == [1, -1]


class Oracle(nn.Module):
    """Answers output i for an image of brightness i."""

    def forward(self, x):
        return torch.eye(12)[(x[:, 0, 0, 0] * 255).round().long()]


WORDS = tuple("abcdefghijkl")
NUMBERED = {str(i): i for i in range(12)}


@pytest.mark.parametrize(
    ("brightness", "classes"),
    [
        (NUMBERED, ()),
        (NUMBERED, WORDS),
        ({f"{i:03}": i for i in range(5, 12)}, ()),
        ({word: 11 - i for i, word in enumerate(WORDS)}, tuple("LKJIHGFEDCBA")),
        ({word: i for i, word in enumerate(WORDS) if i}, WORDS),
        ({word: i for i, word in enumerate(WORDS)}, ()),
    ],
)
@pytest.mark.parametrize("split", ["", "val"])
def test_a_network_that_is_always_right_is_found_right(tmp_path, brightness, classes, split):
    for name, value in brightness.items():
        place = tmp_path / split / name
        place.mkdir(parents=True)
        Image.new("RGB", (8, 8), (value,) * 3).save(place / "a.png")
        if split:  # images to train by, all of them wrong
            (tmp_path / "train" / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), (11 - value,) * 3).save(tmp_path / "train" / name / "a.png")
    model = models.Model("oracle", Oracle(), models.plain("", None).preprocess, classes)
    found = evaluation.evaluate(model, datasets.load_data(f"folder:{tmp_path}"), progress=False)
    assert (found.top1.estimate, len(found.labels)) == (100, len(brightness))
    assert any("val is taken" in note for note in found.notes) == bool(split)


def test_unknown_labels_stay_unknown():
    data = _loader.aligned(labelled("ab", [0, -1, 1, -1]), ("x", "b", "a"), 3)
    assert data.labels.tolist() == [2, -1, 1, -1]
    assert data.classes == ("x", "b", "a")


def test_given_names_stand_for_the_networks_own():
    data = _loader.aligned(labelled("ab", [0, 1]), ("x", "y"), 2, classes=["b", "a"])
    assert (data.labels.tolist(), data.classes) == ([1, 0], ("b", "a"))


def test_a_nameless_network_takes_the_names_of_the_data():
    assert _loader.aligned(labelled("ab", [0, 1]), (), 2).classes == ("a", "b")
    assert _loader.aligned(labelled(["2"], [0]), (), 4).classes == ("0", "1", "2", "3")


def test_aligning_twice_changes_nothing_and_says_it_once():
    once = _loader.aligned(labelled("AB", [0, 1]), ("b", "a"), 2)
    again = _loader.aligned(once, ("b", "a"), 2)
    assert (once.labels.tolist(), len(once.notes)) == ([1, 0], 1)
    assert (again.labels.tolist(), again.notes) == ([1, 0], once.notes)


def test_a_nameless_network_and_fewer_classes_are_right_once_the_names_are_given(tmp_path):
    for i, name in enumerate(WORDS[1:], 1):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (i,) * 3).save(tmp_path / name / "a.png")
    model, data = models.plain("oracle", Oracle()), datasets.load_data(f"folder:{tmp_path}")
    with pytest.raises(InvalidValueError, match=r"12 outputs without names.*classes="):
        evaluation.evaluate(model, data, progress=False)
    assert evaluation.evaluate(model, data, classes=WORDS, progress=False).top1.estimate == 100
    assert evaluation.evaluate(model, data, classes="by position", progress=False).top1.estimate == 0
