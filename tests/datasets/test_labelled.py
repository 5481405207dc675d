import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchvision.datasets import FakeData, ImageFolder
from torchvision.transforms import v2

from kclib import datasets
from kclib.datasets import _loader
from kclib.errors import DamagedFileError, InvalidValueError

PIXELS = torch.randint(0, 256, (6, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = [2, 0, 1, 2, 1, 0]
SCALED = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])


class Own(Dataset):
    """A user's data set: its items are what they are."""

    def __init__(self, items, **attributes):
        self.items = items
        vars(self).update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def inputs(data: datasets.ImageSet) -> torch.Tensor:
    return torch.cat([x for x, _ in datasets.batches(data, SCALED, 4)])


def picture(i: int) -> Image.Image:
    return Image.fromarray(PIXELS[i].permute(1, 2, 0).numpy())


PICTURES = [picture(i) for i in range(6)]
PAIRS = list(zip(PICTURES, LABELS, strict=True))
TENSORS = TensorDataset(PIXELS, torch.tensor(LABELS))
GIVEN = {
    "tensors": (PIXELS, torch.tensor(LABELS)),
    "arrays": (PIXELS.numpy(), np.array(LABELS)),
    "channels last": (PIXELS.permute(0, 2, 3, 1).numpy(), LABELS),
    "read-only": (np.frombuffer(PIXELS.numpy().tobytes(), np.uint8).reshape(6, 3, 5, 7), np.array(LABELS)),
    "TensorDataset": TENSORS,
    "column of labels": (PIXELS, torch.tensor(LABELS)[:, None]),
    "one-hot": (PIXELS, torch.eye(3)[LABELS]),
    "whole floats": (PIXELS, np.array(LABELS, float)),
    "shuffled loader": DataLoader(TENSORS, 4, shuffle=True, drop_last=True),
    "pictures and labels": (PICTURES, LABELS),
    "list of pairs": PAIRS,
    "two pairs thrice": ConcatDataset([PAIRS[i : i + 2] for i in (0, 2, 4)]),
    "pairs of tensors": Own(list(zip(PIXELS, torch.tensor(LABELS), strict=True))),
    "pairs of arrays": Own([(np.asarray(x), np.int32(y)) for x, y in PAIRS]),
    "one-hot pairs": Own(list(zip(PIXELS, np.eye(3)[LABELS], strict=True))),
    "mappings": Own([{"image": x, "label": y} for x, y in PAIRS]),
    "subset": Subset(Own(PAIRS * 2), range(6, 12)),
    "floating tensors": (PIXELS / 255, torch.tensor(LABELS)),
    "floating pairs": Own([(SCALED(x), y) for x, y in PAIRS]),
    "double pairs": Own([(SCALED(x).double(), y) for x, y in PAIRS]),
}  # fmt: skip


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_images_are_the_same_however_they_are_given(given):
    data = datasets.as_image_set(given)
    assert (data.labels.tolist(), data.classes) == (LABELS, ("0", "1", "2"))
    torch.testing.assert_close(inputs(data), PIXELS / 255)


@pytest.mark.parametrize("name", [x for x in GIVEN if "floating" in x or "double" in x])
def test_floating_images_are_not_preprocessed_and_it_is_said(name):
    data = datasets.as_image_set(GIVEN[name])
    assert "as they are" in data.notes[0]
    found = torch.cat([x for x, _ in datasets.batches(data, lambda x: x * 0, 4)])
    torch.testing.assert_close(found, PIXELS / 255)


def test_an_image_set_is_itself_and_a_name_or_path_is_loaded(tmp_path):
    data = datasets.load_data(limit=5)
    assert datasets.as_image_set(data) is data
    assert datasets.as_image_set("fashion-mnist").name == "fashion-mnist/test"
    (tmp_path / "ant").mkdir()
    picture(0).save(tmp_path / "ant" / "a.png")
    assert datasets.as_image_set(tmp_path).classes == ("ant",)


def test_big_tensors_are_not_copied():
    data = datasets.as_image_set((PIXELS, LABELS))
    assert data.images.data_ptr() == PIXELS.data_ptr()
    array = PIXELS.numpy()
    assert datasets.as_image_set((array, LABELS)).images.data_ptr() == PIXELS.data_ptr()


@pytest.mark.parametrize("make", [lambda x, y: (x, y), lambda x, y: Own(list(zip(x, y, strict=True)))])
def test_the_fingerprint_is_of_the_content(make):
    first = datasets.as_image_set(make(PIXELS, LABELS)).fingerprint
    other, others = PIXELS.clone(), [*LABELS[:-1], 1]
    other[3, 1, 2, 2] ^= 1
    assert datasets.as_image_set(make(PIXELS.clone(), list(LABELS))).fingerprint == first
    assert datasets.as_image_set(make(other, LABELS)).fingerprint != first
    assert datasets.as_image_set(make(PIXELS, others)).fingerprint != first


@given(st.lists(st.sampled_from([-100, -1, 0, 1, 2]), min_size=6, max_size=6))
def test_unknown_labels_are_kept_as_unknown(labels):
    for given_ in ((PIXELS, np.array(labels)), Own(list(zip(PIXELS, labels, strict=True)))):
        data = datasets.as_image_set(given_)
        assert data.labels.tolist() == [max(label, -1) for label in labels]
        assert _loader.aligned(data, tuple("abc"), 3).labels.tolist() == data.labels.tolist()


def test_labels_may_be_names():
    names = ["cat", "ant", "bee", "cat", "bee", "ant"]
    pairs = list(zip(PICTURES, names, strict=True))
    for given_ in ((PIXELS, names), (PIXELS, np.array(names)), (PIXELS, pd.Series(names)), pairs):
        data = datasets.as_image_set(given_)
        assert [data.classes[i] for i in data.labels] == names
    data = datasets.as_image_set(Own(list(zip(PICTURES, names, strict=True)), classes=["cat", "bee", "ant"]))
    assert [data.classes[i] for i in data.labels] == names


def test_class_names_are_the_data_sets_own_also_of_its_parts():
    own = Own(PAIRS, classes=["ant", "bee", "cat", "dog"])
    for data in (own, Subset(own, [0, 2]), ConcatDataset([own, Subset(own, [1])])):
        assert datasets.as_image_set(data).classes == ("ant", "bee", "cat", "dog")
    other = Own(own.items, classes=["bee", "ant", "cat", "dog"])
    with pytest.raises(InvalidValueError, match="other classes"):
        datasets.as_image_set(ConcatDataset([own, other]))


def test_ids_stand_for_classes_that_repeat_a_name():
    """As torchvision's ImageNet has them."""
    own = Own(list(zip(PICTURES, [0, 1] * 3, strict=True)), classes=[("crane",), ("crane", "derrick")])
    own.wnids = ["n02012849", "n03126707"]
    assert datasets.as_image_set(own).classes == ("n02012849", "n03126707")


def test_a_loaders_subset_is_followed_and_other_samplers_are_said():
    data = TENSORS
    few = datasets.as_image_set(DataLoader(data, 2, sampler=SubsetRandomSampler([4, 0])))
    assert (few.labels.tolist(), few.notes) == ([1, 2], ())
    weighted = datasets.as_image_set(DataLoader(data, 2, sampler=WeightedRandomSampler([1.0] * 6, 9)))
    assert (weighted.labels.tolist(), len(weighted.notes)) == (LABELS, 1)
    own = datasets.as_image_set(DataLoader(data, 2, collate_fn=lambda items: items))
    assert "collate_fn" in own.notes[0]


def test_a_table_of_files_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, image in enumerate(PICTURES):
        image.save(f"{i}.png")
    table = pd.DataFrame({"Path": [f"{i}.png" for i in range(6)], "label": ["c", "a", "b", "c", "b", "a"]})
    data = datasets.as_image_set(table)
    assert (data.labels.tolist(), data.classes) == (LABELS, ("a", "b", "c"))
    torch.testing.assert_close(inputs(data), PIXELS / 255)
    with pytest.raises(DamagedFileError, match=r"9\.png"):
        datasets.as_image_set(table.assign(Path="9.png"))
    with pytest.raises(InvalidValueError, match="columns path and label"):
        datasets.as_image_set(table.rename(columns={"Path": "x"}))


def test_torchvisions_data_sets_are_taken(tmp_path):
    data = datasets.as_image_set(FakeData(6, (3, 8, 8), 4))
    assert len(data) == 6
    (tmp_path / "n01440764").mkdir()
    picture(0).save(tmp_path / "n01440764" / "a.png")
    folder = datasets.as_image_set(ImageFolder(tmp_path, SCALED))
    assert folder.classes == ("n01440764",)


def test_limited_takes_what_is_no_image_set():
    pairs = TensorDataset(torch.rand(8, 3, 32, 32), torch.zeros(8, dtype=torch.long))
    assert len(datasets.limited(pairs, 4)) == 4


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (Endless(), "an Endless"),
        (DataLoader(Endless()), "an Endless"),
        (torch.nn.Sequential(torch.nn.Flatten()), "a Sequential"),
        (iter([]), "list_iterator"),
        ({"image": 1}, "a dict with image"),
        (PIXELS, "torch.uint8"),
        (7, "an int"),
        ((PIXELS, LABELS, LABELS), "comes as"),
        (list(PICTURES), "comes as a PIL image of mode RGB, 7×5"),
        (Own([(PICTURES[0], 1, 0)]), "a tuple of 3"),
        (Own([("a.png", 1)]), "is a str"),
        (Own([(PICTURES[0], {"boxes": 1})]), "a dict with boxes at image 0"),
        (Own([(PICTURES[0], [1, [2]])]), "a list of 2 at image 0"),
        (Own([(PICTURES[0], torch.zeros(7, 5))]), "(7, 5) at image 0"),
        (Own([(PICTURES[0], 0.5)]), "float64"),
        (Own([(PICTURES[0], None)]), "a NoneType at image 0"),
        (Own([(PICTURES[0], [0, 1]), (PICTURES[0], 1)]), "several shapes"),
        (Own([(PICTURES[0], 4)], classes=["a", "b"]), "0 to 1"),
        (Own([(PICTURES[0], -7)]), "-7"),
        ((PIXELS, torch.zeros(6, 5, 7, dtype=int)), "int64 (6, 5, 7)"),
        ((PIXELS, LABELS[:4]), "an image for each of its 4 labels"),
        ((PICTURES, LABELS[:4]), "6 images have 4 labels"),
        ((PIXELS.int(), LABELS), "torch.int32"),
        ((np.full((6, 2), "x"), LABELS), "<U1"),
        ((np.zeros((6, 3, 9, 3), np.uint8), LABELS), "(6, 3, 9, 3)"),
        ((np.zeros((6, 9, 9, 9), np.uint8), LABELS), "(6, 9, 9, 9)"),
        ((torch.rand(6, 10), torch.tensor(LABELS)), "(6, 10)"),
    ],
)
def test_what_is_not_clear_is_one_sentence(data, says):
    with pytest.raises(InvalidValueError) as found:
        datasets.as_image_set(data)
    assert says in str(found.value)
    assert "must" in str(found.value)
