import gzip
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import Imagenette
from torchvision.models import VGG16_Weights

from kclib import datasets
from kclib._util import files
from kclib.datasets import _loader
from kclib.errors import DamagedFileError, InvalidValueError, MissingFileError, UnknownNameError
from kclib.models import fashion_preprocess
from kclib.models._loading import FASHION_CLASSES

COLOURS = {"ant": (255, 0, 0), "bee": (0, 255, 0), "cat": (0, 0, 255)}


def small(n: int = 10, classes=("a", "b", "c")) -> datasets.ImageSet:
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 1, 28, 28)
    return datasets.ImageSet("small/test", images, torch.arange(n) % len(classes), tuple(classes), "f" * 64)


@pytest.fixture(scope="module")
def fashion():
    return datasets.load_data("fashion-mnist")


@pytest.fixture
def folder(tmp_path):
    """Two pictures a class, each of its class's colour."""
    for name, colour in COLOURS.items():
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (28, 28), colour).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A data folder of one's own with the shipped Fashion-MNIST files."""
    target = tmp_path / "FashionMNIST" / "raw"
    shutil.copytree(files.data_dir() / "FashionMNIST" / "raw", target)
    monkeypatch.setenv("KCLIB_DATA", str(tmp_path))
    return target


def test_the_shipped_test_split_has_a_thousand_images_of_each_class(fashion):
    assert fashion.images.shape == (10_000, 1, 28, 28)
    assert fashion.images.dtype == torch.uint8
    assert fashion.labels.bincount().tolist() == [1000] * 10
    assert fashion.classes == FASHION_CLASSES


def test_the_shipped_test_split_is_what_its_file_says(fashion):
    """Read here without torchvision: the IDX format is 16 (labels: 8) bytes of header, then values."""
    raw = files.data_dir() / "FashionMNIST" / "raw"
    pixels = gzip.decompress((raw / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((raw / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    assert fashion.images.numpy().tobytes() == pixels
    assert fashion.labels.tolist() == list(labels)


def test_the_training_split_is_another_one(fashion):
    training = datasets.load_data("fashion-mnist", "train")
    assert training.labels.bincount().tolist() == [6000] * 10
    assert training.fingerprint != fashion.fingerprint


def test_one_changed_byte_of_a_shipped_file_is_named(copied, seen):
    path = copied / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=f"{path} has SHA-256") as found:
        datasets.load_data()
    said = re.sub("[0-9a-f]{64}", "…", str(found.value).replace(str(path.parent), "data/FashionMNIST/raw"))
    seen("Disk", "a byte of a shipped file is changed", f"`{said}`")


def test_a_missing_shipped_file_is_named(copied):
    (copied / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(MissingFileError, match=r"t10k-labels.* is missing"):
        datasets.load_data()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagenette", "imagenet"])
def test_a_data_set_that_is_not_there_says_where_it_was_looked_for(tmp_path, monkeypatch, name):
    monkeypatch.setenv("KCLIB_DATA", str(tmp_path))
    with pytest.raises(MissingFileError, match=f"'{name}' was not found whole in {tmp_path}"):
        datasets.load_data(name)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=str(tmp_path / "nowhere")):
        datasets.load_data(f"folder:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize(
    ("name", "split", "nearest"),
    [("fashon-mnist", "test", "fashion-mnist"), ("fashion-mnist", "tests", "test")],
)
def test_unknown_names_suggest_the_nearest(name, split, nearest):
    with pytest.raises(UnknownNameError, match=f"mean '{nearest}'"):
        datasets.load_data(name, split)


def test_a_smaller_limit_is_an_ordered_subset_of_a_larger_one():
    few, more = (datasets.load_data(limit=limit) for limit in (60, 200))
    found = [(more.images == image).flatten(1).all(1).nonzero().flatten().tolist() for image in few.images]
    rows = [match[0] for match in found]
    assert rows == sorted(set(rows))
    assert torch.equal(more.labels[rows], few.labels)


@pytest.mark.parametrize("content", [b"", bytes(100), "black", "longer"])
def test_what_was_unpacked_and_changed_since_is_unpacked_again(copied, fashion, caplog, content, seen):
    datasets.load_data()
    path = copied.parents[1] / "cache" / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte"
    whole = path.read_bytes()
    longer, black = whole + b"0", whole[:16] + bytes(len(whole) - 16)  # as long as it was, and an image set
    path.write_bytes({"black": black, "longer": longer}.get(content, content))
    assert torch.equal(datasets.load_data().images, fashion.images)
    assert path.read_bytes() == whole
    said = caplog.records[0].getMessage().replace(f"{path}", f"…/{path.name}")
    seen("Disk", "what was unpacked from the shipped files is changed", f"`{said}`")


def test_images_are_read_where_nothing_can_be_unpacked(copied, fashion):
    (copied.parents[1] / "cache").write_text("in the way")
    (copied.parents[1] / "home").write_text("in the way")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(copied.parents[1] / "home"))
        patch.setattr(files.tempfile, "gettempdir", lambda: str(copied.parents[1] / "home"))
        found = datasets.load_data()
    assert torch.equal(found.images, fashion.images)
    assert torch.equal(found.labels, fashion.labels)


def test_a_limit_draws_the_same_images_every_time_and_has_its_own_fingerprint(fashion):
    once, again = datasets.load_data(limit=50), datasets.load_data(limit=50)
    assert torch.equal(once.images, again.images)
    assert once.fingerprint == again.fingerprint
    assert len({fashion.fingerprint, once.fingerprint, datasets.load_data(limit=51).fingerprint}) == 3


@pytest.mark.parametrize("limit", [0, -1, 10_001])
def test_a_limit_outside_the_data_set_is_refused(limit):
    with pytest.raises(InvalidValueError, match=r"limit of fashion-mnist/test is .* 1 to 10000"):
        datasets.load_data(limit=limit)


def test_the_largest_limit_is_the_whole_data_set(fashion):
    assert torch.equal(datasets.load_data(limit=10_000).images, fashion.images)


def test_limited_draws_images_with_their_labels_and_leaves_the_set_alone():
    data = small(10)
    few, again = datasets.limited(data, 4), datasets.limited(data, 4)
    rows = few.images[:, 0, 0, 0].tolist()
    assert (len(few), len(set(rows))) == (4, 4)
    assert few.labels.tolist() == [row % 3 for row in rows]
    assert (few.name, few.classes) == (data.name, data.classes)
    assert torch.equal(again.images, few.images)
    assert few.fingerprint == again.fingerprint != data.fingerprint
    assert data.images[:, 0, 0, 0].tolist() == list(range(10))
    assert datasets.limited(data, 10).labels.tolist() == data.labels.tolist()


@pytest.mark.parametrize("limit", [0, 11])
def test_limited_refuses_what_the_set_has_not(limit):
    with pytest.raises(InvalidValueError, match=f"limit of small/test is {limit};"):
        datasets.limited(small(10), limit)


def test_a_folder_holds_a_class_in_each_sub_folder(folder):
    data = datasets.load_data(f"folder:{folder}")
    assert data.classes == ("ant", "bee", "cat")
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert [data.images[i][0].getpixel((3, 3)) for i in (0, 2, 4)] == list(COLOURS.values())


def test_a_folder_with_one_other_byte_in_a_picture_is_another_set(folder):
    before = datasets.load_data(f"folder:{folder}").fingerprint
    assert datasets.load_data(f"folder:{folder}").fingerprint == before
    picture = next(path for path in sorted(folder.rglob("*")) if path.is_file())
    content = bytearray(picture.read_bytes())
    content[-1] ^= 1
    picture.write_bytes(content)
    assert datasets.load_data(f"folder:{folder}").fingerprint != before


def test_a_folder_with_splits_is_read_by_split(folder):
    (folder.parent / "split").mkdir()
    folder.rename(folder.parent / "split" / "test")
    data = datasets.load_data(f"folder:{folder.parent / 'split'}", "test")
    assert (data.classes, len(data)) == (("ant", "bee", "cat"), 6)


def test_select_takes_images_and_labels_together(folder):
    chosen = torch.tensor([4, 1])
    from_memory = _loader.select(small(), chosen)
    assert (from_memory.images[:, 0, 0, 0].tolist(), from_memory.labels.tolist()) == ([4, 1], [1, 1])
    from_folder = _loader.select(datasets.load_data(f"folder:{folder}"), chosen)
    assert [image.getpixel((0, 0)) for image, _ in from_folder.images] == [COLOURS["cat"], COLOURS["ant"]]


@pytest.mark.parametrize("classes", [("z", "c", "b", "y", "a"), ("c", "a", "b")])
def test_aligned_relabels_by_name_into_the_models_order(classes):
    data = _loader.aligned(small(6), classes, len(classes))
    assert [classes[i] for i in data.labels] == ["a", "b", "c"] * 2
    assert data.classes == classes


def test_aligned_takes_other_names_by_position_where_the_user_says_so():
    data = _loader.aligned(small(6), ("x", "y", "z", "w"), 4, classes="by position")
    assert (data.labels.tolist(), data.classes) == ([0, 1, 2] * 2, ("x", "y", "z", "w"))
    assert any("by position" in note for note in data.notes)


@pytest.mark.parametrize("classes", [("a", "b"), ("a", "b", "x", "y"), ("a", "b", "x")])
def test_aligned_shows_both_lists_of_classes_that_do_not_fit(classes):
    with pytest.raises(InvalidValueError, match=r"\(a, b, c\).*\(a, b.*no output is c"):
        _loader.aligned(small(), classes, len(classes))


def test_every_imagenette_class_is_one_an_imagenet_model_answers():
    names = {names[0] for names in Imagenette._WNID_TO_CLASS.values()}
    assert names < set(VGG16_Weights.DEFAULT.meta["categories"])


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 12), batch_size=st.integers(1, 14))
def test_batches_from_memory_are_each_image_preprocessed_in_order(n, batch_size):
    data, preprocess = small(n), fashion_preprocess()
    inputs, labels = zip(*datasets.batches(data, preprocess, batch_size), strict=True)
    assert [len(part) for part in inputs[:-1]] == [batch_size] * (len(inputs) - 1)
    assert torch.equal(torch.cat(inputs), torch.stack([preprocess(image) for image in data.images]))
    assert torch.equal(torch.cat(labels), data.labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_a_folder_are_each_picture_preprocessed_in_order(folder, workers):
    data, preprocess = datasets.load_data(f"folder:{folder}"), fashion_preprocess()
    data = _loader.aligned(data, ("bee", "cat", "dog", "ant"), 4)
    inputs, labels = zip(*datasets.batches(data, preprocess, 4, workers=workers), strict=True)
    assert [len(part) for part in inputs] == [4, 2]
    one_by_one = [preprocess(Image.fromarray(np.asarray(data.images[i][0]))) for i in range(6)]
    assert torch.equal(torch.cat(inputs), torch.stack(one_by_one))
    assert torch.cat(labels).tolist() == [3, 3, 0, 0, 1, 1]
