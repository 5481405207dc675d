"""Accounts that may write hardly anywhere, and several that share a machine."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from users import NOBODY, another_user, run_as_nobody
from what_happens import told

from kclib._util import files, places
from kclib.errors import StorageError
from kclib.store import Entry, Store

KIND = "Users"
KEY = {"kind": "evaluation", "scope": "layer", "k": 2}
ROOT = Path(__file__).parents[2]
# Runs commands one after the other in one process, which need not import everything anew for each.
COMMANDS = """
import sys
import numpy as np
import torch
from kclib import cli
from kclib.compression import _packing
from kclib.store import Entry, Store
_packing.unpack(torch.from_numpy(_packing.pack(np.arange(4), 2)), 2, 0, 4)  # compiles
Store().put(Entry({"kind": "evaluation", "k": 2}, {"images": 9}, {}))
for command in ("results --columns k", "gc", "inspect absent", "results --csv found.csv"):
    sys.argv = ["kclib", *command.split()]
    try:
        cli.main()
    except SystemExit as end:
        print("exit code", end.code)
"""


@pytest.fixture
def installed(open_folder):
    """The package where nobody else may write, and nothing that was compiled before."""
    shutil.copytree(ROOT / "kclib", open_folder / "kclib", ignore=shutil.ignore_patterns("__pycache__"))
    (open_folder / "pyproject.toml").touch()  # as in a checkout
    (open_folder / "own").mkdir()
    os.chown(open_folder / "own", NOBODY, NOBODY) if os.geteuid() == 0 else None
    return open_folder


def test_neither_the_package_nor_the_home_may_be_written_to(installed, seen):
    shutil.rmtree(f"/tmp/kclib-{NOBODY}", ignore_errors=True)
    done = run_as_nobody(COMMANDS, installed / "own", PYTHONPATH=str(installed))
    assert "results are in" in done.stderr, done.stderr
    temporary = re.search(r"results are in (\S+)/store", done.stderr)[1]
    shutil.rmtree(temporary)
    assert re.findall(r"exit code (\d)", done.stdout) == ["0", "0", "2", "0"], done.stderr
    assert [x.name for x in (installed / "own").iterdir()] == ["found.csv"]
    said = [x for x in done.stderr.splitlines() if x and not x.startswith("kclib: ")]
    assert len(said) == 2, said
    names = {temporary: "/tmp/kclib-UID", str(installed): "FOLDER"}
    for text, name in names.items():
        said = [x.replace(text, name) for x in said]
    seen(
        KIND, "neither the package nor the home folder may be written to", f"every command runs; `{said[0]}`"
    )
    seen(KIND, "the data folder may not be written to, and `KCLIB_STORE` is not set", f"`{said[1]}`")


def test_no_folder_may_be_written_to_at_all(monkeypatch, tmp_path, seen):
    (tmp_path / "file").touch()
    monkeypatch.setattr(places, "is_writable", lambda _: False)
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    with pytest.raises(StorageError) as found:
        files.cache_dir()
    sentence = re.sub(r"\(.*\)", "(…)", str(found.value))
    seen(KIND, "no folder at all may be written to", f"`{sentence}`")


def test_a_temporary_folder_of_that_name_belongs_to_someone_else(monkeypatch, tmp_path, seen):
    (tmp_path / f"kclib-{os.getuid()}").mkdir()
    (tmp_path / f"kclib-{os.getuid()}").chmod(0o777)
    monkeypatch.setattr(places, "is_writable", lambda _: False)
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.raises(StorageError) as found:
        files.cache_dir()
    sentence = str(found.value).replace(str(tmp_path), "/tmp").replace(f"-{os.getuid()}", "-UID")
    seen(KIND, "another user has made the temporary folder beforehand", f"`{sentence}`")


def test_a_store_that_may_not_be_written_to(open_folder, seen):
    store = Store(open_folder / "store")
    store.put(Entry(KEY, {"images": 9}, {}))
    store.table("evaluation")
    with another_user():
        assert len(store.table("evaluation")) == 1
        assert store.once(KEY, lambda: pytest.fail("computed")).row == {"images": 9}
        with pytest.raises(StorageError) as found:
            store.once(KEY | {"k": 3}, lambda: pytest.fail("computed"))
    sentence = str(found.value).replace(str(open_folder), "FOLDER")
    sentence = re.sub(r"[0-9a-f]{64}", "…", sentence)
    seen(KIND, "`KCLIB_STORE` may be read and not written to", f"what is stored is used; else `{sentence}`")


def test_a_result_of_another_user_that_may_not_be_read(open_folder, caplog, seen):
    store = Store(open_folder / "store")
    path = store.put(Entry(KEY, {"images": 9}, {}))
    path.chmod(0o600)
    for folder in (store.root, path.parent):
        folder.chmod(0o777)
    with another_user():
        assert len(store.gc(dry_run=True)) == 0
        assert store.once(KEY, lambda: Entry(KEY, {"images": 8}, {})).row == {"images": 8}
    assert "is not readable and will be computed again" in caplog.text
    assert path.stat().st_uid == NOBODY
    seen(
        KIND,
        "a result in a shared store may not be read",
        "it is said and computed again; `kclib gc` leaves it",
    )


SIDE_BY_SIDE = """
import operator
from pathlib import Path
from joblib import Parallel, delayed
import tiny
from kclib import datasets
print(Parallel(2)(delayed(operator.add)(i, 1) for i in range(3)))
data = datasets.load_data(f"folder:{tiny.write_pictures(Path('pictures'))}")
print(sum(len(x) for x, _ in datasets.batches(data, tiny.photo_model().preprocess, 16, workers=2)))
"""
# All is read-only but the folder that is given, where temporary files are too; /dev/shm is of no use.
READ_ONLY = """
set -e
mount --make-rprivate /
mount --bind "$1" "$1"
cd "$1"
export TMPDIR="$1"
unset KCLIB_STORE
mount -t tmpfs -o ro tmpfs /dev/shm
mount -o remount,bind,ro /
shift
exec "$@"
"""


def test_a_container_whose_root_is_read_only_without_shared_memory(open_folder, seen):
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("only root can mount")
    code = "import os; open('x', 'w'); print(os.access('/etc', os.W_OK), os.access('/dev/shm', os.W_OK))"
    command = ["unshare", "-m", "sh", "-c", READ_ONLY, "sh", str(open_folder), sys.executable, "-c"]
    tried = subprocess.run([*command, code], capture_output=True, text=True, check=False)
    if tried.stdout.split() != ["False", "False"]:
        pytest.skip("file systems cannot be mounted read-only here")
    code = COMMANDS + SIDE_BY_SIDE
    tests = os.pathsep.join([str(Path(tiny.__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": tests}
    done = subprocess.run([*command, code], env=environment, capture_output=True, text=True, check=False)
    assert re.findall(r"exit code (\d)", done.stdout) == ["0", "0", "2", "0"], done.stderr
    assert done.stdout.splitlines()[-2:] == ["[1, 2, 3]", "46"]
    seen(KIND, "the root is read-only and there is no `/dev/shm`", "every command runs, side by side too")


def test_the_folder_of_reports_may_not_be_written_to(open_folder, kclib, monkeypatch, tmp_path, seen):
    monkeypatch.setenv("KCLIB_STORE", str(tmp_path / "store"))
    (open_folder / "file").touch()
    code, _, said = kclib("batch", "--out", open_folder / "file", "--no-open")
    assert code == 2
    seen(KIND, "the folder of reports cannot be made", told(code, said, FOLDER=open_folder))
