import errno
import os
from pathlib import Path

import pytest

from kclib import files
from kclib.errors import MissingFileError, StorageError
from kclib.files import replacing


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    return path


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def assert_untouched(path):
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == [path.name]


def test_new_content_appears_whole_and_only_after_the_block(path):
    with replacing(path) as temporary:
        temporary.write_text("ne")
        assert path.read_text() == "old"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == [path.name]


def test_temporary_file_is_a_neighbour_with_the_same_suffix(path):
    with replacing(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary != path
        assert temporary.suffix == ".json"


def test_missing_folders_are_made_and_others_may_read_the_file(tmp_path):
    path = tmp_path / "a" / "b" / "new.txt"
    with replacing(path) as temporary:
        temporary.write_bytes(b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), MissingFileError("no such data")])
def test_exception_of_the_block_passes_and_leaves_the_old_file(path, error):
    def write():
        with replacing(path) as temporary:
            temporary.write_text("half of the ne")
            raise error

    with pytest.raises(type(error)) as caught:
        write()
    assert caught.value is error
    assert_untouched(path)


def test_disk_that_fills_while_writing_is_said_and_leaves_the_old_file(path, monkeypatch):
    monkeypatch.setattr(Path, "write_text", full_disk)
    with (
        pytest.raises(StorageError, match=r"result\.json could not be written: No space left on device\."),
        replacing(path) as temporary,
    ):
        temporary.write_text("new")
    assert_untouched(path)


@pytest.mark.parametrize("call", ["replace", "chmod"])
def test_file_system_that_refuses_the_last_step_leaves_the_old_file(path, monkeypatch, call):
    monkeypatch.setattr(files.os, call, full_disk)
    with pytest.raises(StorageError, match="No space left on device"), replacing(path) as temporary:
        temporary.write_text("new")
    assert_untouched(path)


def test_disk_without_room_for_the_temporary_file_never_runs_the_block(path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "mkstemp", full_disk)
    with pytest.raises(StorageError, match="No space left on device"), replacing(path):
        pytest.fail("the block ran")
    assert_untouched(path)


def test_parent_that_is_a_file_is_refused(path):
    with pytest.raises(StorageError, match="child could not be written"), replacing(path / "child"):
        pytest.fail("the block ran")
    assert_untouched(path)


def test_folder_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="Is a directory"), replacing(tmp_path / "folder") as temporary:
        temporary.write_text("new")
    assert os.listdir(tmp_path) == ["folder"]


def test_storage_error_names_one_file_once_where_blocks_nest(path, tmp_path):
    with pytest.raises(StorageError) as caught, replacing(tmp_path / "outer"), replacing(path / "inner"):
        pytest.fail("the block ran")
    assert str(caught.value).count("could not be written") == 1
    assert "inner" in str(caught.value)
    assert_untouched(path)


def test_sha256_is_that_of_the_standard(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert files.sha256(tmp_path / "abc") == expected


def test_data_folder_is_the_one_in_the_environment_else_the_checkouts(monkeypatch, tmp_path):
    monkeypatch.setenv("KCLIB_DATA", str(tmp_path))
    assert files.data_dir() == tmp_path
    monkeypatch.setenv("KCLIB_DATA", "")
    assert files.data_dir() == Path(__file__).parents[1].absolute() / "data"
