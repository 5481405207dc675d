import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kclib._util import files, places
from kclib.errors import StorageError

HOMES = ("NUMBA_CACHE_DIR", "MPLCONFIGDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR")
SHOW = f"import os, kclib; print(*sorted(f'{{k}}={{os.environ.get(k)}}' for k in {HOMES}), sep='\\n')"


def variables(code: str = SHOW, **environment) -> dict[str, str]:
    """Return the variables as `import kclib` leaves them in another process."""
    given = {k: v for k, v in os.environ.items() if k not in (*HOMES, "KCLIB_SCRATCH")} | environment
    out = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in out.stdout.splitlines())


def test_a_home_that_may_be_written_to_is_left_alone(tmp_path):
    found = variables(HOME=str(tmp_path), XDG_CACHE_HOME="", XDG_CONFIG_HOME="")
    assert found == dict.fromkeys(HOMES, "None")
    assert not list(tmp_path.iterdir())


def test_without_a_home_libraries_have_folders_that_children_share_and_that_go_at_the_end(tmp_path):
    (tmp_path / "file").write_text("")
    code = f"import kclib, subprocess, sys; subprocess.run([sys.executable, '-c', {SHOW!r}], check=True)"
    code += f"\nimport os; assert all(os.path.isdir(os.environ[x]) for x in {HOMES[1:]})"
    home = {
        "HOME": str(tmp_path / "file"),
        "XDG_CACHE_HOME": "",
        "XDG_CONFIG_HOME": "",
        "TMPDIR": str(tmp_path),
    }
    found = variables(code, **home)
    scratch = {Path(found[x]).parent for x in HOMES[1:]}
    assert len(scratch) == 1
    assert scratch.pop().parent == tmp_path
    assert [x.name for x in tmp_path.iterdir()] == ["file"]


def test_a_user_whom_the_system_does_not_know_has_a_home_while_the_process_runs():
    code = "import os; os.path.expanduser = lambda path: path\n"
    code += "import kclib; print('home=' + os.environ['HOME'], os.path.isdir(os.environ['HOME']))"
    found = variables(code, HOME="", XDG_CACHE_HOME="", XDG_CONFIG_HOME="")
    assert re.fullmatch(r"/.*/kclib-\w+ True", found["home"])


def test_what_users_set_is_kept_where_it_may_be_written_to(tmp_path):
    home = {"HOME": "/dev/null", "XDG_CACHE_HOME": "", "XDG_CONFIG_HOME": ""}
    found = variables(**home, MPLCONFIGDIR=str(tmp_path / "mine"), IPYTHONDIR="/dev/null/ipython")
    assert found["MPLCONFIGDIR"] == str(tmp_path / "mine")
    assert found["IPYTHONDIR"] != "/dev/null/ipython"


def test_folders_may_be_written_to_if_they_can_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    assert places.is_writable(tmp_path / "a" / "b")
    assert not places.is_writable(tmp_path / "file")
    assert not places.is_writable(tmp_path / "file" / "a")
    assert not places.is_writable(Path("~/.cache"))


def test_the_cache_is_the_first_folder_that_may_be_written_to(tmp_path, monkeypatch):
    for name, value in (("KCLIB_DATA", tmp_path / "data"), ("XDG_CACHE_HOME", tmp_path / "home")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    found, refused = [], []
    monkeypatch.setattr(places, "is_writable", lambda folder: folder not in refused)
    for _ in range(3):
        found.append(files.cache_dir())
        refused.append(found[-1])
    expected = [tmp_path / "data" / "cache", tmp_path / "home" / "kclib", tmp_path / f"kclib-{os.getuid()}"]
    assert found == expected
    assert expected[-1].stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("way", ["link", "mode", "file"])
def test_a_temporary_cache_that_others_can_change_is_refused(tmp_path, monkeypatch, way):
    monkeypatch.setattr(places, "is_writable", lambda _: False)
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = tmp_path / f"kclib-{os.getuid()}"
    if way == "link":
        (tmp_path / "other").mkdir()
        folder.symlink_to("other")
    elif way == "file":
        folder.write_text("")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(StorageError, match="set KCLIB_STORE"):
        files.cache_dir()


def test_where_results_are_is_said_where_it_is_not_the_data_folder(tmp_path, monkeypatch, caplog):
    from kclib.store import Store

    monkeypatch.delenv("KCLIB_STORE", raising=False)
    monkeypatch.setattr(files, "cache_dir", lambda: tmp_path)
    assert Store().root == tmp_path / "store"
    assert Store().root == tmp_path / "store"
    assert caplog.text.count(str(tmp_path)) == 1
