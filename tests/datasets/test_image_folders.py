import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kclib import datasets
from kclib.datasets import _image_folders, _loader
from kclib.errors import DamagedFileError, MissingFileError


def write(root: Path, *names: str) -> Path:
    """Write a picture for each name, each of another colour."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        n = sum(1 for x in root.rglob("*") if x.is_file())
        Image.new("RGB", (4, 4), (n, 255 - n, 0)).save(path, "PNG")
    return root


def read(root: Path, split: str = "test") -> datasets.ImageSet:
    return datasets.load_data(f"folder:{root}", split)


def files(data: datasets.ImageSet) -> list[str]:
    return [Path(path).name for path, _ in data.images.samples]


def said(data: datasets.ImageSet) -> str:
    return " ".join(data.notes)


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING"])
@pytest.mark.parametrize("test", ["val", "Valid", "VALIDATION", "test", "Testing"])
def test_a_folder_with_splits_is_tested_by_the_one_for_testing(tmp_path, train, test):
    write(tmp_path, f"{train}/cat/a.png", f"{train}/dog/b.png", f"{test}/cat/c.png", f"{test}/dog/d.png")
    data = read(tmp_path)
    assert (data.classes, files(data), data.labels.tolist()) == (("cat", "dog"), ["c.png", "d.png"], [0, 1])
    assert data.name.endswith(f"/{test}")
    assert f"{test} is taken" in said(data)
    assert files(read(tmp_path, "train")) == ["a.png", "b.png"]


def test_test_is_preferred_to_val(tmp_path):
    write(tmp_path, "train/cat/a.png", "val/cat/b.png", "test/cat/c.png")
    assert files(read(tmp_path)) == ["c.png"]


@pytest.mark.parametrize("place", ["test/c.png", "test/unknown/c.png", "test/test1/x/c.png"])
def test_a_test_split_without_labels_is_passed_over(tmp_path, place):
    write(tmp_path, "train/cat/a.png", "val/cat/b.png", place)
    data = read(tmp_path)
    assert (files(data), data.classes) == (["b.png"], ("cat",))
    assert "val is taken" in said(data)


def test_a_class_that_has_no_test_image_is_counted(tmp_path):
    write(tmp_path, "train/ant/a.png", "train/bee/b.png", "train/cat/c.png", "val/cat/d.png")
    data = read(tmp_path)
    assert (data.classes, data.labels.tolist()) == (("ant", "bee", "cat"), [2])
    assert read(tmp_path, "train").classes == data.classes


def test_a_class_may_be_called_train(tmp_path):
    write(tmp_path, "bus/a.png", "car/b.png", "train/c.png")
    assert read(tmp_path).classes == ("bus", "car", "train")
    write(tmp_path, "train/old/d.png")
    assert read(tmp_path).classes == ("bus", "car", "train")
    write(tmp_path, "test/e.png")  # of a class too: no folder of a split is without class folders
    (tmp_path / "train" / "old" / "d.png").unlink()
    assert read(tmp_path).classes == ("bus", "car", "test", "train")


def test_what_lies_beside_splits_is_left_out_and_said(tmp_path):
    write(tmp_path, "train/cat/a.png", "val/cat/b.png", "samples/x.png")
    data = read(tmp_path)
    assert files(data) == ["b.png"]
    assert "samples" in said(data)


def test_a_folder_for_testing_alone_is_taken(tmp_path):
    write(tmp_path, "val/cat/a.png", "val/dog/b.png")
    assert read(tmp_path).classes == ("cat", "dog")


def test_a_folder_for_training_alone_trains_but_does_not_test(tmp_path):
    write(tmp_path, "train/cat/a.png", "train/dog/b.png")
    assert read(tmp_path, "train").classes == ("cat", "dog")
    with pytest.raises(MissingFileError, match="none to test by"):
        read(tmp_path)


def test_splits_without_class_folders_are_no_classes(tmp_path):
    write(tmp_path, "train/a.png", "test/b.png")
    with pytest.raises(MissingFileError, match="sub-folder of images for each class"):
        read(tmp_path)


def test_images_in_no_class_folder_are_one_sentence(tmp_path):
    write(tmp_path, "a.png", "b.png")
    with pytest.raises(MissingFileError, match=r"2 images, but in no sub-folders"):
        read(tmp_path)


@pytest.mark.parametrize("inside", ["pictures", "x/y/z"])
def test_a_single_folder_that_holds_it_all_is_followed(tmp_path, inside):
    write(tmp_path, f"{inside}/train/cat/a.png", f"{inside}/val/cat/b.png", "__MACOSX/x/train/cat/._a.png")
    data = read(tmp_path)
    assert files(data) == ["b.png"]
    assert inside.split("/")[0] in data.notes[0]
    write(tmp_path, "classes/pets/cat/c.png", "classes/pets/dog/d.png")
    assert read(tmp_path / "classes").classes == ("cat", "dog")


def test_what_tools_leave_is_no_class_and_is_counted(tmp_path):
    write(tmp_path, "cat/a.png", "dog/b.png", ".git/x.png", "__MACOSX/cat/y.png", "@eaDir/z.png")
    write(tmp_path, "cat/.ipynb_checkpoints/a.png", "dog/._b.png", "c.png")
    for name in ("Thumbs.db", "cat/desktop.ini", "cat/notes.txt", "labels/cat.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    data = read(tmp_path)
    assert (data.classes, files(data)) == (("cat", "dog"), ["a.png", "b.png"])
    # three folders of tools, Thumbs.db, desktop.ini, two names with a dot, notes.txt, cat.txt, c.png
    assert "10 that are no images of a class" in said(data)
    for name in ("Thumbs.db", "notes.txt", "c.png"):
        assert name in said(data)


def test_an_empty_folder_is_a_class_without_images(tmp_path):
    write(tmp_path, "ant/a.png", "cat/b.png")
    (tmp_path / "bee").mkdir()
    data = read(tmp_path)
    assert (data.classes, data.labels.tolist()) == (("ant", "bee", "cat"), [0, 2])
    assert "bee" in said(data)
    assert _loader.aligned(data, ("cat", "ant"), 2).labels.tolist() == [1, 0]


def test_nothing_is_said_of_a_plain_folder(tmp_path):
    assert read(write(tmp_path, "ant/a.png", "cat/b.JPEG", "cat/more/c.gif")).notes == ()


def test_links_that_lead_in_circles_end(tmp_path):
    write(tmp_path, "ant/a.png", "cat/b.png")
    (tmp_path / "ant" / "up").symlink_to(tmp_path)
    (tmp_path / "cat" / "self").symlink_to(tmp_path / "cat")
    (tmp_path / "cat" / "nowhere.png").symlink_to(tmp_path / "absent.png")
    (tmp_path / "cat" / "linked.png").symlink_to(tmp_path / "ant" / "a.png")
    data = read(tmp_path)
    assert files(data) == ["a.png", "b.png", "linked.png"]
    assert "nowhere.png" in said(data)


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path, "ant/a.png", "cat/b.png")
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "cat":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DamagedFileError, match="/cat cannot be read"):
        read(tmp_path)


def test_many_files_are_found_in_a_second(tmp_path):
    for i in range(10):
        (tmp_path / f"class{i}").mkdir()
        for j in range(500):
            (tmp_path / f"class{i}" / f"{j}.png").touch()
    assert len(_image_folders.find(tmp_path, "test").samples) == 5000


def test_a_path_may_begin_with_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "pets", "ant/a.png")
    assert datasets.load_data("folder:~/pets").classes == ("ant",)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), max_size=60),
    st.randoms(use_true_random=False),
)
def test_halves_share_no_content_whatever_the_order(images, random):
    labels, sums = [label for label, _ in images], [f"{content:02}" for _, content in images]
    train, test = _image_folders.halves(labels, sums)
    assert sorted([*train, *test]) == list(range(len(images)))
    assert not {sums[i] for i in train} & {sums[i] for i in test}
    order = list(range(len(images)))
    random.shuffle(order)
    _, again = _image_folders.halves([labels[i] for i in order], [sums[i] for i in order])
    assert {sums[order[i]] for i in again} == {sums[i] for i in test}


def test_each_class_is_halved(tmp_path):
    contents = [(label, f"{label}-{i}") for label, n in enumerate((1, 2, 9, 40)) for i in range(n)]
    train, test = _image_folders.halves(*zip(*contents, strict=True))
    count = Counter(contents[i][0] for i in test)
    assert [count[label] for label in range(4)] == [1, 1, 5, 20]
    assert len(train) == 52 - 27


def test_a_folder_without_splits_is_divided_and_it_is_said(tmp_path):
    write(tmp_path, *(f"{name}/{i}.png" for name in ("ant", "cat") for i in range(4)))
    (tmp_path / "ant" / "copy.png").write_bytes((tmp_path / "ant" / "0.png").read_bytes())
    train, test = datasets.train_and_test(f"folder:{tmp_path}")
    assert sorted(files(train) + files(test)) == sorted(files(read(tmp_path)))
    colours = [{data.images[i][0].getpixel((0, 0)) for i in range(len(data))} for data in (train, test)]
    assert not colours[0] & colours[1]
    assert set(train.labels.tolist()) == set(test.labels.tolist()) == {0, 1}
    assert train.fingerprint != test.fingerprint
    assert "divided by the content" in said(train)
    assert said(train) == said(test)
    assert read(tmp_path, "train").fingerprint == train.fingerprint
    assert len(read(tmp_path)) == 9


def test_an_image_in_both_splits_is_not_trained_by(tmp_path):
    write(tmp_path, "train/cat/a.png", "train/cat/b.png", "val/cat/c.png")
    (tmp_path / "train" / "cat" / "same.png").write_bytes((tmp_path / "val" / "cat" / "c.png").read_bytes())
    train, test = datasets.train_and_test(f"folder:{tmp_path}")
    assert (files(train), files(test)) == (["a.png", "b.png"], ["c.png"])
    assert "1 images of train are also in val" in said(train)
    assert test.fingerprint == read(tmp_path).fingerprint


def test_a_named_set_gives_its_own_splits():
    train, test = datasets.train_and_test("fashion-mnist", limit=30)
    assert (train.name, len(train), len(test)) == ("fashion-mnist/train", 60_000, 30)
    assert test.fingerprint == datasets.load_data(limit=30).fingerprint
