import copyreg
import pickle

import pytest
import tblib.pickling_support
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from kclib import datasets
from kclib.errors import DamagedFileError, InvalidValueError

CLASSIC = transforms.Compose([transforms.Resize(6), transforms.ToTensor()])
MODERN = v2.Compose([v2.ToImage(), v2.Resize(6), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])


def memory(n: int = 5, channels: int = 3) -> datasets.ImageSet:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, channels, 6, 6), dtype=torch.uint8, generator=draw)
    return datasets.ImageSet("memory", images, torch.zeros(n, dtype=torch.int64), ("a",), "x")


def folder(root, n: int = 20):
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (64, 64), (i, 0, 0)).save(root / name / f"{i}.jpg")
    return root


def damaged(root):
    bad = root / "dog" / "7.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    return bad


def prepared(data, preprocess, batch_size: int = 2, workers: int = 0) -> torch.Tensor:
    return torch.cat([x for x, _ in datasets.batches(data, preprocess, batch_size, workers=workers)])


class Breaking(Dataset):
    """A user's data set with a mistake in it."""

    def __init__(self, error: Exception, at: int = 0):
        self.error, self.at = error, at

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == self.at:
            raise self.error
        return Image.new("RGB", (6, 6)), 0


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__("never mind")


def as_set(images: Dataset) -> datasets.ImageSet:
    return datasets.ImageSet("own", images, torch.zeros(len(images), dtype=torch.int64), ("a",), "x")


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_transform_of_pil_images_works_on_images_in_memory(channels):
    data = memory(channels=channels)
    torch.testing.assert_close(prepared(data, CLASSIC), data.images / 255)


@pytest.mark.parametrize("preprocess", [CLASSIC, MODERN])
def test_tensors_of_a_data_set_are_prepared_as_pictures_are(preprocess):
    images = memory().images
    data = datasets.as_image_set([(image, 0) for image in images])
    torch.testing.assert_close(prepared(data, preprocess), images / 255)


def test_a_transform_of_tensors_gets_whole_batches():
    seen = []
    prepared(memory(), lambda x: seen.append(x.shape) or x.float())
    assert seen == [(2, 3, 6, 6), (2, 3, 6, 6), (1, 3, 6, 6)]


@pytest.mark.parametrize(
    "preprocess",
    [
        lambda x: {"pixel_values": MODERN(x)},
        lambda x: {"pixel_values": CLASSIC(x)[None], "pixel_mask": None},
        lambda x: CLASSIC(x)[None],
    ],
)
@pytest.mark.parametrize("n", [1, 5])
def test_inputs_in_a_mapping_or_in_a_batch_of_one_are_taken_out(preprocess, n):
    data = memory(n)
    torch.testing.assert_close(prepared(data, preprocess), data.images / 255)
    pairs = datasets.as_image_set([(transforms.ToPILImage()(image), 0) for image in data.images])
    torch.testing.assert_close(prepared(pairs, preprocess), data.images / 255)


def raising(error):
    def preprocess(image):
        raise error

    return preprocess


@pytest.mark.parametrize("error", [AssertionError("no"), KeyError("no"), TypeError("no"), Unpicklable(1, 2)])
@pytest.mark.parametrize("workers", [0, 2])
def test_what_preprocessing_raises_is_one_sentence_with_its_cause(tmp_path, error, workers):
    data = datasets.load_data(f"folder:{folder(tmp_path, 1)}")
    with pytest.raises(InvalidValueError, match=r"preprocessing raised") as found:
        prepared(data, raising(error), workers=workers)
    text = str(found.value)
    assert all(x in text for x in (type(error).__name__, "mode RGB, 64×64", "cat/0.jpg"))
    assert (
        found.value.__cause__ is error if not workers else type(error).__name__ in str(found.value.__cause__)
    )


def test_an_exception_stays_behind_where_dask_would_send_it_whole():

    tblib.pickling_support.install()  # as importing Dask's scheduler does
    try:
        with pytest.raises(InvalidValueError, match=r"code of the data set own raised Unpicklable"):
            prepared(as_set(Breaking(Unpicklable(1, 2), 3)), CLASSIC, workers=2)
    finally:
        for kind in [kind for kind, how in copyreg.dispatch_table.items() if "tblib" in how.__module__]:
            del copyreg.dispatch_table[kind]


def test_in_memory_both_ways_that_failed_are_said():
    with pytest.raises(
        InvalidValueError, match=r"AssertionError.*\(2, 3, 6, 6\).*AssertionError.*PIL"
    ) as found:
        prepared(memory(), raising(AssertionError("no")))
    assert isinstance(found.value.__cause__, AssertionError)
    with pytest.raises(InvalidValueError, match=r"AssertionError.*\(2, 2, 6, 6\), images 0"):
        prepared(memory(channels=2), raising(AssertionError("no")))


@pytest.mark.parametrize(
    ("preprocess", "says"),
    [
        (lambda x: x, "answers a PIL image of mode RGB, 6×6"),
        (lambda x: [1, 2], "answers a list of 2"),
        (lambda x: {"pixel_values": [1]}, "return_tensors='pt'"),
        (lambda x: {"inputs": 1}, "a dict with inputs"),
        (None, "TypeError"),
    ],
)
def test_what_preprocessing_answers_amiss_is_said(preprocess, says):
    with pytest.raises(InvalidValueError) as found:
        prepared(as_set(Subset([(Image.new("RGB", (6, 6)), 0)], [0])), preprocess)
    assert says in str(found.value)


def test_pictures_of_several_sizes_need_a_resize():
    data = datasets.as_image_set([(Image.new("RGB", (n, 4)), 0) for n in (4, 5)])
    with pytest.raises(InvalidValueError, match=r"\(3, 4, 4\), \(3, 4, 5\)"):
        prepared(data, transforms.ToTensor())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [IndexError("mine"), Unpicklable(1, 2), ValueError("mine")])
def test_what_a_users_data_set_raises_is_said_to_be_its_own(error, workers):
    with pytest.raises(InvalidValueError, match=r"code of the data set own raised") as found:
        prepared(as_set(Breaking(error, 3)), CLASSIC, workers=workers)
    assert f"{type(error).__name__}" in str(found.value)
    assert "at image 3" in str(found.value)
    pickle.dumps(found.value)
    with pytest.raises(InvalidValueError, match="at image 3") as found:
        datasets.as_image_set(Breaking(error, 3))
    assert found.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_what_is_nobodys_fault_is_not_renamed(error):
    with pytest.raises(type(error)):
        prepared(as_set(Breaking(error)), CLASSIC)
    with pytest.raises(type(error)):
        prepared(memory(), raising(error))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_by_its_file_also_in_a_subset(tmp_path, workers):
    bad = damaged(folder(tmp_path))
    data = datasets.load_data(f"folder:{tmp_path}", limit=39)
    with pytest.raises(DamagedFileError, match=str(bad)):
        prepared(data, CLASSIC, workers=workers)


def test_a_damaged_image_of_a_users_image_folder_is_named_by_its_file(tmp_path):
    bad = damaged(folder(tmp_path))
    own = ImageFolder(tmp_path, CLASSIC)
    place = [path for path, _ in own.samples].index(str(bad))
    parts = ConcatDataset([Subset(own, [3, 2]), Subset(own, [5, place, 1])])
    for data in (own, Subset(own, [place]), parts):
        with pytest.raises(DamagedFileError, match=str(bad)):
            datasets.as_image_set(data)


def test_a_users_transform_that_raises_is_no_damaged_image(tmp_path):
    own = ImageFolder(folder(tmp_path, 1), raising(KeyError("mine")))
    with pytest.raises(InvalidValueError, match=r"code of the data set.*KeyError.*cat/0\.jpg"):
        datasets.as_image_set(own)
