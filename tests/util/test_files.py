import errno
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kclib._util import files
from kclib._util.files import replacing
from kclib.errors import MissingFileError, StorageError


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


def test_missing_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "new.txt"
    with replacing(path) as temporary:
        temporary.write_bytes(b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"


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
        pytest.raises(StorageError, match=r"result\.json could not be written.*No space"),
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
    monkeypatch.setattr(files.os, "open", full_disk)
    with pytest.raises(StorageError, match="No space left on device"), replacing(path):
        pytest.fail("the block ran")
    assert_untouched(path)


def test_parent_that_is_a_file_is_refused(path):
    with pytest.raises(StorageError, match="child could not be written"), replacing(path / "child"):
        pytest.fail("the block ran")
    assert_untouched(path)


@pytest.mark.parametrize("name", ["folder", "link", ".", ""])
def test_folder_is_refused_before_the_work(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    with pytest.raises(StorageError, match="it is a folder"), replacing(Path(name)):
        pytest.fail("the block ran")
    assert sorted(os.listdir(tmp_path)) == ["folder", "link"]


def write(path, text="new"):
    with replacing(path) as temporary:
        temporary.write_text(text)


def test_symbolic_link_stays_and_its_target_is_replaced(path, tmp_path):
    (tmp_path / "links").mkdir()
    link, second = tmp_path / "links" / "link.json", tmp_path / "links" / "second"
    link.symlink_to("../result.json")
    second.symlink_to("link.json")
    with replacing(second) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent
        assert temporary.suffix == ".json"
    assert (os.readlink(second), os.readlink(link), path.read_text()) == (
        "link.json",
        "../result.json",
        "new",
    )


def test_link_to_a_file_that_is_not_there_makes_it(tmp_path):
    (tmp_path / "link").symlink_to("new.txt")
    write(tmp_path / "link")
    assert (tmp_path / "new.txt").read_text() == "new"
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("target", ["gone/new.txt", "link"])
def test_link_that_leads_nowhere_or_to_itself_is_refused(tmp_path, target):
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(StorageError, match="link could not be written"):
        write(tmp_path / "link")
    assert os.listdir(tmp_path) == ["link"]


def test_only_the_name_that_is_written_of_a_hard_link_gets_the_new_content(path, tmp_path):
    os.link(path, tmp_path / "other")
    write(path)
    assert (path.read_text(), (tmp_path / "other").read_text()) == ("new", "old")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_permissions_of_what_is_replaced_are_kept(path, mode):
    path.chmod(mode)
    write(path)
    assert path.stat().st_mode & 0o7777 == mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_owner_of_what_is_replaced_is_kept(path):
    os.chown(path, 12345, 23456)
    write(path)
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 23456)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_umask_holds_for_new_files(tmp_path, mask):
    old = os.umask(mask)
    try:
        write(tmp_path / "new")
    finally:
        os.umask(old)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o666 & ~mask


def test_file_that_may_not_be_changed_is_refused_before_the_work(path, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda place, mode: Path(place) != path)  # root may always
    with pytest.raises(StorageError, match="may not be changed"), replacing(path):
        pytest.fail("the block ran")
    assert_untouched(path)


def test_longest_names_are_written(tmp_path):
    for name in ("é" * 125 + ".json", "a." + "b" * 250, "." + "c" * 250):
        write(tmp_path / name)
        assert (tmp_path / name).read_text() == "new"
    with pytest.raises(StorageError, match="File name too long"), replacing(tmp_path / ("d" * 256)):
        pytest.fail("the block ran")


def test_device_is_written_to_and_stays():
    before = os.stat("/dev/null")
    write(Path("/dev/null"))
    assert os.stat("/dev/null").st_rdev == before.st_rdev
    with pytest.raises(StorageError, match="No space left on device"):
        write(Path("/dev/full"))


def test_named_pipe_is_written_to_and_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_text)
        write(pipe)
        assert read.result(60) == "new"
    assert os.listdir(tmp_path) == ["pipe"]
    assert pipe.is_fifo()


def test_socket_is_refused_and_stays(tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        with pytest.raises(StorageError, match="no ordinary file"), replacing(tmp_path / "socket"):
            pytest.fail("the block ran")
        assert (tmp_path / "socket").is_socket()


def run(code: str, stdout) -> subprocess.CompletedProcess:
    """Run code in which `write` writes to a path's name, with another standard output."""
    head = "from kclib._util.files import output, replacing\n"
    head += "def write(x, text):\n with replacing(output(x)) as t:\n"
    head += "  t.write_text(text)\n"
    return subprocess.run(
        [sys.executable, "-c", head + code], stdout=stdout, stderr=-1, text=True, check=False
    )


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_gets_the_content_in_its_turn_after_what_is_there(tmp_path, name):
    with open(tmp_path / "log", "w") as log:
        log.write("before\n")
        log.flush()
        run(f"print('first'); write({name!r}, 'second\\n'); print('third')", log)
    assert (tmp_path / "log").read_text().split() == ["before", "first", "second", "third"]
    assert os.listdir(tmp_path) == ["log"]


def test_terminal_gets_text_but_nothing_binary():
    ours, theirs = os.openpty()
    found = run("write('-', 'text\\n')\nwrite('-', 'a\\0b')", theirs)
    assert "standard output could not be written: it is a terminal" in found.stderr
    assert os.read(ours, 100).decode().split() == ["text"]
    os.close(ours), os.close(theirs)


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
    assert files.data_dir() == Path(__file__).parents[2].absolute() / "data"
