import hashlib
import json
import os

import numpy as np
import pytest
import torch
from disks import full_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from kclib.compression import _container
from kclib.compression._container import inspect, read, write
from kclib.errors import DamagedFileError, InvalidValueError, KclibError, MissingFileError, StorageError

DESCRIPTION = {"groups": {}, "layers": {}, "architecture": "añ 'b'", "accuracy": 91.25}
KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int64)
KINDS += (torch.bool, torch.complex64, torch.uint16, torch.float8_e4m3fn)
TENSORS = st.dictionaries(
    st.sampled_from(["state 0.weight", "state é", "indices a b", "codebook values {0}", "scales "]),
    st.tuples(st.sampled_from(KINDS), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 99)),
    max_size=4,
)


def of_bytes(dtype, shape, seed):
    """Return a tensor of any type with random bytes (NaN of every kind among floats)."""
    if not (n := int(np.prod(shape)) * dtype.itemsize):
        return torch.empty(shape, dtype=dtype)
    top = 2 if dtype == torch.bool else 256
    return torch.from_numpy(np.random.default_rng(seed).integers(0, top, n, np.uint8)).view(dtype).view(shape)


def bits(tensor):
    return (
        tensor.dtype,
        tuple(tensor.shape),
        tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes(),
    )


@pytest.fixture
def path(tmp_path):
    """A small file."""
    path = tmp_path / "small.safetensors"
    write(path, DESCRIPTION, {"indices a": torch.arange(5, dtype=torch.uint8), "state b": torch.ones(2, 3)})
    return path


@given(tensors=TENSORS)
@settings(deadline=None, max_examples=25)
def test_what_is_written_is_read_to_the_bit(tmp_path_factory, tensors):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    tensors = {name: of_bytes(*arguments) for name, arguments in tensors.items()}
    written = write(path, DESCRIPTION, tensors)
    description, digest, found = read(path)
    assert description.items() >= DESCRIPTION.items()
    assert {name: bits(value) for name, value in found.items()} == {
        name: bits(value) for name, value in tensors.items()
    }
    assert digest == written.sha256 == inspect(path).sha256
    assert written.bytes.sum() == inspect(path).bytes.sum() == path.stat().st_size


def test_views_overlapping_and_channels_last_tensors_are_read_as_they_read(path):
    whole = torch.arange(24.0).reshape(1, 4, 2, 3)
    views = {
        "state whole": whole,
        "state again": whole,
        "state part": whole[:, 1:3],
        "state turned": whole.transpose(1, 3),
        "state wide": torch.ones(1).expand(5),
        "state last": whole.clone().to(memory_format=torch.channels_last),
        "state trained": whole.clone().requires_grad_(),
    }
    write(path, {}, views)
    assert {name: bits(value) for name, value in read(path)[2].items()} == {
        name: bits(value.detach()) for name, value in views.items()
    }


def test_an_empty_tensor_of_numpys_is_written(path):
    write(path, {}, {"state empty": torch.from_numpy(np.empty(0, np.float32))})
    assert bits(read(path)[2]["state empty"]) == (torch.float32, (0,), b"")


def test_what_is_read_does_not_change_with_the_file(path):
    tensors = read(path)[2]
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert tensors["state b"].tolist() == [[1] * 3] * 2


def test_one_thing_is_written_to_the_same_bytes_each_time(path):
    before = path.read_bytes()
    for _ in range(8):
        description, _, tensors = read(path)
        write(path, description, tensors)
        assert path.read_bytes() == before


def test_bytes_are_told_by_what_they_hold(path):
    sizes = {"indices a": 5, "frequencies layer a": 7, "codebook values g": 11, "codebook steps g": 2}
    sizes |= {"scales a": 13, "state b": 17, "state c": 1, "linear values d": 3, "linear steps d": 2}
    write(path, DESCRIPTION, {name: torch.zeros(n, dtype=torch.uint8) for name, n in sizes.items()})
    found = inspect(path).bytes.to_dict()
    assert found.pop("header") == path.stat().st_size - sum(sizes.values())
    assert found == {
        "indices": 5,
        "frequency tables": 7,
        "codebooks": 13,
        "scales": 13,
        "linear weights": 5,
        "other parameters and buffers": 18,
    }


@pytest.mark.parametrize("name", ["unheard-of thing", "header", "indices"])
def test_bytes_sum_to_the_files_whatever_its_tensors_are_called(path, name):
    written = write(path, DESCRIPTION, {name: torch.zeros(3)})
    assert written.bytes.sum() == inspect(path).bytes.sum() == path.stat().st_size


def test_the_hash_changes_with_a_bit_a_name_a_shape_a_type_and_the_description(tmp_path):
    value = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    others = (
        (DESCRIPTION, {"state a": value}),
        (DESCRIPTION, {"state b": value}),
        (DESCRIPTION, {"state a": value + 1}),
        (DESCRIPTION, {"state a": value.view(2, 2)}),
        (DESCRIPTION, {"state a": value.view(torch.int8)}),
        (DESCRIPTION | {"accuracy": 91.5}, {"state a": value}),
    )
    digests = [write(tmp_path / "x", *other).sha256 for other in others]
    assert len(set(digests)) == len(others)
    assert write(tmp_path / "x", *others[0]).sha256 == digests[0]


def test_a_file_says_its_format_and_who_wrote_it(path):
    from kclib import __version__

    assert inspect(path).description == {"format": 4, "kclib": __version__} | DESCRIPTION


@pytest.mark.parametrize("mask", [0xFF, 0x01])
def test_any_changed_byte_is_damage(path, mask):
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
        with pytest.raises(KclibError):
            read(path)


def test_a_file_cut_anywhere_or_with_more_behind_it_is_damaged(path):
    whole = path.read_bytes()
    for content in (*(whole[:n] for n in range(0, len(whole), 7)), whole[:-1], whole + b"\0", whole * 2):
        path.write_bytes(content)
        with pytest.raises(DamagedFileError, match=path.name):
            read(path)


@given(st.binary(max_size=200), st.booleans())
@settings(deadline=None, max_examples=25)
def test_random_bytes_are_damaged(tmp_path_factory, content, framed):
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") * framed + content)
    with pytest.raises(DamagedFileError):
        read(path)


def test_other_kinds_of_file_are_damaged(path):
    save_file({"a": torch.ones(3)}, path)
    with pytest.raises(DamagedFileError, match="holds no compressed model"):
        read(path)
    save_file({"a": torch.ones(3)}, path, metadata={"format": "pt"})
    with pytest.raises(DamagedFileError, match="holds no compressed model"):
        read(path)
    path.write_bytes(b"")
    with pytest.raises(DamagedFileError, match="truncated or no safetensors"):
        read(path)


def test_a_pickle_is_damaged_and_never_run(path):
    target = path.with_name("exploded")
    bomb = type("Bomb", (), {"__reduce__": lambda self: (os.mkdir, (str(target),))})
    torch.save({"weight": bomb()}, path)
    with pytest.raises(DamagedFileError, match="no safetensors"):
        read(path)
    assert not target.exists()


def test_a_folder_and_a_file_that_is_not_there_are_missing(tmp_path):
    for path in (tmp_path, tmp_path / "absent", tmp_path / "absent" / "absent"):
        with pytest.raises(MissingFileError, match="does not exist or is not a file"):
            read(path)


@pytest.mark.parametrize("version", [5, 10**30, 1.5, "1", None, [1]])
def test_another_format_is_refused_and_named(path, version):
    write(path, DESCRIPTION | {"format": version}, {})
    with pytest.raises(InvalidValueError) as caught:
        read(path)
    assert f"format {version!r}" in str(caught.value)
    assert "newer" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", '"format"', '{"kclib": 1}', '{"a":' * 5000 + "1" + "}" * 5000, "[" * 50_000,
     '{"format": 1' + "0" * 5000 + "}"],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_a_description_that_is_none_is_damaged_though_its_hash_is_right(path, monkeypatch, text):
    with monkeypatch.context() as patched:
        patched.setattr(json, "dumps", lambda *_, **__: text)
        write(path, {}, {"state b": torch.ones(2)})
    with pytest.raises(DamagedFileError, match="description"):
        read(path)


def test_a_file_without_a_hash_or_with_anothers_is_damaged(path):
    _, _, tensors = read(path)
    text = json.dumps({"format": 1})
    for stated in ("", "sha256", hashlib.sha256(text.encode()).hexdigest()):
        save_file(tensors, path, metadata={"kclib": f"{stated} {text}"})
        with pytest.raises(DamagedFileError, match="SHA-256"):
            read(path)
    save_file(tensors, path, metadata={"kclib": text})
    with pytest.raises(DamagedFileError, match="description"):
        read(path)


def test_a_full_disk_leaves_the_old_file_and_no_scraps(path):
    before = path.read_bytes()
    with full_disk(), pytest.raises(StorageError, match=f"{path.name} could not be written"):
        write(path, {}, {"state b": torch.ones(100_000)})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_place_that_is_none_is_a_storage_error(path):
    with pytest.raises(StorageError, match="could not be written"):
        write(path / "below", {}, {})
    (path.parent / "folder").mkdir()
    with pytest.raises(StorageError, match="could not be written"):
        write(path.parent / "folder", {}, {})


def test_missing_folders_are_made(tmp_path):
    assert write(tmp_path / "a" / "b" / "c", DESCRIPTION, {}).path.is_file()


def test_whatever_the_reader_behind_it_raises_is_damage(path, monkeypatch):
    for error in (_container.SafetensorError("x"), OSError("x"), ValueError("x"), RuntimeError("x")):

        def failing(*_, error=error, **__):
            raise error

        monkeypatch.setattr(_container, "deserialize", failing)
        with pytest.raises(DamagedFileError, match=f"{path.name} is truncated"):
            read(path)


def test_a_checkpoint_in_place_of_a_compressed_file_is_told_with_what_makes_one(tmp_path):
    for zipped in (True, False):
        torch.save({"a": torch.ones(2)}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(DamagedFileError, match=r"w\.pt is no .* but a checkpoint.*kclib compress"):
            inspect(tmp_path / "w.pt")
