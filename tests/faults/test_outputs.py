"""Outputs that are no new file: each is tried, and what the user sees is on the page *What happens if*."""

import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny
from users import another_user
from what_happens import told

from kclib import cli
from kclib._util.files import replacing
from kclib.errors import StorageError
from kclib.store import Entry, Store

pytestmark = pytest.mark.usefixtures("one_thread")
KIND = "Outputs"
COMPRESS = ("compress", "tiny:tiny_model", "--clusters", "3", "-o")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of one's own to work in, with a store that has a result."""
    monkeypatch.setenv("KCLIB_STORE", str(tmp_path / "store"))
    monkeypatch.syspath_prepend(Path(tiny.__file__).parent)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Store().put(Entry({"kind": "evaluation", "scope": "layer", "k": 2}, {"images": 9}, {}))
    return tmp_path / "here"


@pytest.fixture
def run(here, monkeypatch, capfd):
    """Run the command line in this process, with standard output as the system has it."""

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kclib", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        sys.stdout.flush()
        found = capfd.readouterr()
        return end.value.code, found.out, found.err

    return call


def test_a_folder(run, here, seen):
    code, _, said = run(*COMPRESS, here)
    assert code == 2
    seen(KIND, "it is a folder", told(code, said, PATH=here) + ", before any work")
    assert not list(here.iterdir())


def test_a_symbolic_link(run, here, seen):
    (here / "there").mkdir()
    (here / "there" / "file.csv").write_text("old")
    (here / "link.csv").symlink_to("there/file.csv")
    assert run("results", "--csv", "link.csv")[0] == 0
    assert (here / "link.csv").is_symlink()
    assert "layer" in (here / "there" / "file.csv").read_text()
    seen(KIND, "it is a symbolic link to a file", "the file has the new content; the link stays")


def test_a_symbolic_link_to_itself(run, here, seen):
    (here / "link.csv").symlink_to("link.csv")
    code, _, said = run("results", "--csv", "link.csv")
    assert code == 2
    seen(KIND, "it is a symbolic link to itself", told(code, said))


def test_a_symbolic_link_into_a_folder_that_is_not_there(run, here, seen):
    (here / "link.csv").symlink_to("gone/file.csv")
    code, _, said = run("results", "--csv", "link.csv")
    assert (code, os.listdir(here)) == (2, ["link.csv"])
    seen(
        KIND,
        "it is a symbolic link into a folder that is not there (a disk that is not mounted)",
        told(code, said),
    )


def test_standard_output(run, here, seen):
    code, out, said = run("results", "--csv", "-")
    assert (code, out.splitlines()[0].split(",")[0], "1 rows" in said) == (0, "kind", True)
    assert run("results", "--csv", "/dev/stdout")[:2] == (code, out)
    assert not list(here.iterdir())
    seen(
        KIND,
        "it is `-` or `/dev/stdout`",
        "the content is on standard output, and all messages are on standard error",
    )


def test_two_kinds_of_table_for_one_output(run, here, seen):
    code, out, said = run("results", "--csv", "-", "--parquet", "-")
    assert (code, out) == (2, "")
    seen(KIND, "`kclib results --csv - --parquet -`", told(code, said))


def test_a_terminal(here, seen, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["kclib", *COMPRESS, "-"])
    ours, theirs = os.openpty()
    kept = os.dup(1)
    os.dup2(theirs, 1)
    try:
        with pytest.raises(SystemExit) as end:
            cli.main()
    finally:
        os.dup2(kept, 1)
        for descriptor in (ours, theirs, kept):
            os.close(descriptor)
    assert end.value.code == 2
    seen(KIND, "it is `-`, which is a terminal, and the file is binary", told(2, capfd.readouterr().err))


def test_devices(run, seen):
    code, out, _ = run(*COMPRESS, "/dev/null")
    assert (code, out.splitlines()[-2]) == (0, "/dev/null")
    assert Path("/dev/null").is_char_device()
    seen(KIND, "it is `/dev/null`", "written to; the device stays")
    code, _, said = run("results", "--csv", "/dev/full")
    assert code == 2
    seen(KIND, "it is a full device", told(code, said))


def test_a_named_pipe(run, here, seen):
    os.mkfifo(here / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((here / "pipe").read_text()))
    reader.start()
    assert run("results", "--csv", "pipe")[0] == 0
    reader.join(60)
    assert "layer" in read[0]
    assert (here / "pipe").is_fifo()
    seen(KIND, "it is a named pipe", "who reads it has the content; the pipe stays")


def test_a_socket(run, here, seen):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        code, _, said = run("results", "--csv", "socket")
        assert (code, (here / "socket").is_socket()) == (2, True)
    seen(KIND, "it is a socket or a block device", told(code, said))


def test_a_hard_link(run, here, seen):
    (here / "a.csv").write_text("old")
    os.link("a.csv", "b.csv")
    assert run("results", "--csv", "a.csv")[0] == 0
    assert (here / "b.csv").read_text() == "old"
    seen(
        KIND,
        "it is one of several hard links to a file",
        "this name has the new content; the others keep the old one",
    )


def test_permissions(run, here, seen):
    (here / "a.csv").write_text("old")
    (here / "a.csv").chmod(0o640)
    assert run("results", "--csv", "a.csv")[0] == 0
    assert (here / "a.csv").stat().st_mode & 0o777 == 0o640
    seen(
        KIND,
        "it is a file with permissions of its own",
        "they stay, and so does its owner, where the system lets us",
    )


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_may_not_be_changed(run, open_folder, monkeypatch, seen, what):
    monkeypatch.chdir(open_folder)
    Path("a.csv").write_text("old")
    Path("a.csv").chmod(0o444)
    open_folder.chmod(0o777 if what == "file" else 0o755)
    run("results", "--csv", "/dev/null")  # imports what another user could not
    with another_user():
        code, _, said = run("results", "--csv", "a.csv" if what == "file" else "b.csv")
    assert (code, Path("a.csv").read_text(), os.listdir()) == (2, "old", ["a.csv"])
    happens = (
        "it is a file that this user may not change" if what == "file" else "it is in a folder of others"
    )
    seen(KIND, happens, told(code, said, FOLDER=open_folder))


def test_a_name_that_is_too_long(run, seen):
    code, _, said = run("results", "--csv", "x" * 256)
    assert code == 2
    seen(KIND, "its name is too long", told(code, said, **{"NAME": "x" * 256}))


def test_a_disk_that_fills(here, seen):
    with pytest.raises(StorageError) as found, replacing(Path("/dev/full")) as temporary:
        temporary.write_text("x")
    (here / "old").write_text("old")
    cause = found.value.__cause__

    def write():
        with replacing(here / "old") as temporary:
            temporary.write_text("half of the ne")
            raise cause

    with pytest.raises(StorageError):
        write()
    assert ((here / "old").read_text(), os.listdir(here)) == ("old", ["old"])
    seen(
        KIND,
        "the disk is full before all is written",
        "the old file is still whole, and no part of the new one is left",
    )


def test_gc(run, here, seen):
    victim = Store().put(Entry({"kind": "evaluation", "k": 3}, {}, {}))
    victim.write_bytes(b"torn")
    code, out, said = run("gc")
    assert (code, victim.exists(), victim.name[:20] in out) == (2, True, True)
    seen(KIND, "`kclib gc` in a script, without `--yes`", "what would go is listed; " + told(code, said))
    code, _, said = run("gc", "--days", "-1", "--yes")
    assert code == 2
    seen(KIND, "`kclib gc --days -1`", told(code, said))
    assert len(list(Store().root.rglob("*.safetensors"))) == 2


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_make_clean(here, seen):
    shutil.copy(Path(__file__).parents[2] / "Makefile", here)
    results = ("reports/full/index.html", "data/cache/store/evaluation/x", "data/cache/vgg.training.pt")
    for name in (*results, ".venv/ready", "data/cache/FashionMNIST/raw/x", "kclib/__pycache__/x"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).touch()
    for target, left in (("clean", {*results, "Makefile"}), ("clean-all", {"Makefile"})):
        subprocess.run(["make", "-s", target], cwd=here, check=True, capture_output=True)
        assert {str(x.relative_to(here)) for x in here.rglob("*") if x.is_file()} == left
    seen(
        KIND,
        "`make clean`",
        "the environment and unpacked files go; reports, the store and states of trainings stay",
    )
    seen(KIND, "`make clean-all`", "all of these go")
