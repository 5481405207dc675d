"""Streams, folders, paths and memory as a command may find them, each tried on the real command."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from sentences import is_one_sentence
from users import another_user
from what_happens import told

from kclib import datasets
from kclib._util import limits, progress_bars
from kclib.datasets import _labelled
from kclib.errors import DamagedFileError, NotEnoughMemoryError
from kclib.store import Entry, Store

KIND = "Surroundings"
PROFILE = """note: "für"
sweep: {models: ["tiny:photo_model"], data: ["folder:pictures"], limit: 0, scopes: [layer], clusters: [2]}
"""
COMPRESS = ("compress", "tiny:photo_model", "--clusters", "3", "-o")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of one's own to work in, with a store of its own."""
    monkeypatch.setenv("KCLIB_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(tiny.__file__).parent), *sys.path]))
    monkeypatch.syspath_prepend(Path(tiny.__file__).parent)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shell(line: str, **environment: str) -> tuple[int, str]:
    """Run a line of bash, in which `kclib` is the command; return its exit code and standard error."""
    line = f'set -o pipefail; ulimit -c 0; kclib() {{ "{sys.executable}" -m kclib "$@"; }}; {line}'
    given = os.environ | environment
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=given, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", ["--help", "results", "gc --dry-run"])
def test_standard_output_that_is_full_or_closed(here, seen, command):
    full, closed = shell(f"kclib {command} > /dev/full"), shell(f"kclib {command} >&-")
    for code, said in (full, closed):
        assert code == 2
        assert is_one_sentence(said)
    seen(KIND, "standard output is full", told(*full))
    seen(KIND, "standard output is closed", told(*closed))


def test_a_compressed_file_for_standard_output_that_is_closed(here):
    code, said = shell("kclib compress tiny:tiny_model --clusters 3 -o - >&-")
    assert (code, is_one_sentence(said)) == (2, True)
    assert "it is closed" in said


def test_nobody_who_reads_or_is_told(here, seen):
    Store().put(Entry({"kind": "evaluation", "scope": "layer", "k": 2}, {"images": 9}, {}))
    assert shell("kclib --help | head -0") == (1, "")
    seen(KIND, "whoever reads standard output is gone (`head` has ended)", "it ends; exit code 1")
    assert shell("kclib results --csv found.csv 2>&- 0<&- > said")[0] == 0
    assert "layer" in Path("found.csv").read_text()
    assert shell("kclib inspect absent 2>&-")[0] == 2
    assert shell("kclib inspect absent 2> /dev/full")[0] == 2
    seen(KIND, "standard error is closed or full", "all else is done; only messages are lost")


def test_a_working_folder_that_is_gone(here, seen):
    gone = "mkdir gone; cd gone; rmdir ../gone; "
    for command in ("--help", "batch"):
        code, said = shell(f"{gone} kclib {command}")
        assert code == 2
        seen(KIND, "the working folder is gone", told(code, said))
    for line in (
        "import kclib; print(kclib.__version__); kclib.load_model()",
        "from kclib.models import Model",
    ):
        code, said = shell(f"{gone} {sys.executable} -c '{line}'")
        assert code == 1
        assert "MissingFileError: the working folder is gone" in said
        assert "oneMKL" not in said


NAMES = {"a line break": b"a\nb", "blanks": b" a b "}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_with_odd_letters(here, kclib, seen, name):
    odd = os.fsdecode(NAMES[name])
    Path(odd).mkdir()
    tiny.write_pictures(Path(odd, "pictures"))
    Path(odd, f"{odd}.yaml").write_text(PROFILE, encoding="utf-8")
    code, _, said = kclib("sweep", f"{odd}/{odd}.yaml", "--out", f"{odd}/reports")
    assert code == 0, said
    assert Path(odd, "reports", odd, "index.html").is_file()
    code, _, said = kclib(*COMPRESS, f"{odd}/{odd}.safetensors", "--data", f"folder:{odd}/pictures")
    assert code == 0, said
    assert kclib("inspect", f"{odd}/{odd}.safetensors")[0] == 0
    seen(KIND, "names of profiles, image folders, reports and files have blanks or line breaks",
         "they are read and written")  # fmt: skip


def test_a_profile_of_a_name_that_is_not_utf8(here, kclib, seen):
    odd = Path(os.fsdecode(b"a\xff"))
    odd.mkdir()
    for path in (f"{odd}.yaml", odd / "p.yaml"):
        Path(path).write_text(PROFILE, encoding="utf-8")
        for command in (("sweep",), ("report",), ("batch", "--profile")):
            code, _, said = kclib(*command, path)
            assert (code, is_one_sentence(said)) == (2, True), said
            seen(KIND, "a profile has a name that is not UTF-8", told(code, said).replace("/p.", "."))
    assert not (here / "store").exists()


def test_a_folder_of_reports_of_a_name_that_is_not_utf8(here, kclib):
    tiny.write_pictures(Path("pictures"))
    Path("p.yaml").write_text(PROFILE, encoding="utf-8")
    odd = os.fsdecode(b"a\xff")
    code, _, said = kclib("sweep", "p.yaml", "--out", odd)
    assert code == 0, said
    assert Path(odd, "p", "index.html").is_file()


def test_a_store_and_output_with_odd_letters_are_named_on_standard_output(here):
    odd = os.fsdecode(b"a\xff")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for environment in ({}, ascii_only):
        code, said = shell(
            f"kclib results --csv '{odd}.csv' >out && kclib results >out", KCLIB_STORE=odd, **environment
        )
        assert (code, said) == (0, "")


def test_a_name_that_is_too_long_to_be_there(here, kclib, seen):
    long = "x" * 300 + ".yaml"
    code, _, said = kclib("sweep", long)
    assert code == 2
    seen(KIND, "the name of a profile is too long", told(code, said, NAME=long))
    for way in (("inspect", long), ("results", "--csv", "x/" * 3000 + "a"), ("evaluate", "x/" * 3000)):
        code, _, said = kclib(*way)
        assert (code, is_one_sentence(said)) == (2, True), said


def test_the_encoding_of_a_profile(here, kclib, seen):
    for encoding in ("latin-1", "utf-16"):
        Path("p.yaml").write_bytes(PROFILE.encode(encoding))
        code, _, said = kclib("sweep", "p.yaml")
        assert code == 2
        seen(KIND, "a profile is in Latin-1 or UTF-16", told(code, said))
    tiny.write_pictures(Path("pictures"))
    Path("p.yaml").write_bytes(PROFILE.encode("utf-8-sig"))
    assert kclib("sweep", "p.yaml", "--dry-run")[0] == 0
    seen(KIND, "a profile begins with a byte order mark", "it is read")


def test_a_locale_that_knows_ascii_alone(here, seen):
    tiny.write_pictures(Path("pictures"))
    Path("p.yaml").write_text(PROFILE, encoding="utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code, said = shell("kclib sweep p.yaml", **ascii_only)
    assert (code, "Traceback" in said) == (0, False), said
    assert "für" in Path("reports/p/index.html").read_text(encoding="utf-8")
    seen(KIND, "the locale is `C` (`LC_ALL=C PYTHONUTF8=0`)", "sweeps and results run; files are UTF-8")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ulimit -v is no limit")
@pytest.mark.parametrize("gigabytes", [2, 4, 6])
def test_a_limit_of_memory_is_told_before_the_work_or_suffices(here, seen, gigabytes):
    code, said = shell(f"ulimit -v {gigabytes}000000; kclib compress tiny:tiny_model --clusters 3 -o x")
    lines = [x for x in said.splitlines() if x.startswith("kclib: ")]
    assert Path("x").exists() is (code == 0)
    assert code == 0 or (code == 2 and len(lines) == 1 and "on addresses (ulimit -v)" in lines[0]), said
    if gigabytes == 2:
        seen(KIND, "`ulimit -v 2000000` (2 GB)", told(code, said) + ", before any work")
    else:
        seen(KIND, "a limit of 4 or 6 GB", "it works, or that sentence comes before any work")


def test_a_limit_of_memory_that_stops_what_only_reads(here, seen):
    code, said = shell("ulimit -v 1000000; kclib results")
    assert (code, is_one_sentence(said)) == (2, True), said
    assert "ulimit -v" in said


def test_memory_that_ends_in_the_middle_is_a_sentence_too(here, kclib, monkeypatch, seen):
    def full(*_, **__):
        raise MemoryError("Unable to allocate 56.1 GiB for an array")

    monkeypatch.setattr(Store, "table", full)
    monkeypatch.setattr(limits, "free", lambda: 3 << 30)
    code, _, said = kclib("results")
    assert code == 2
    seen(KIND, "memory is full in the middle of the work", told(code, said))


def test_free_memory_is_what_the_tightest_limit_leaves(tmp_path, monkeypatch):
    group = tmp_path / "limited"
    group.mkdir()
    for name, text in (
        ("memory.max", 5 << 20),
        ("memory.current", 3 << 20),
        ("memory.stat", "inactive_file 1048576"),
    ):
        (group / name).write_text(f"{text}\n")
    left = limits._left(group, "memory.max", "memory.current", "inactive_file")
    assert left == 3 << 20
    (group / "memory.max").write_text("max\n")
    assert limits._left(group, "memory.max", "memory.current", "inactive_file") == float("inf")
    assert 0 < limits.free() < 1 << 50
    monkeypatch.setattr(limits, "_group", lambda: 1000)
    assert limits.free() == 1000
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    assert limits._addresses() == (float("inf") if soft == resource.RLIM_INFINITY else soft)
    monkeypatch.setattr(limits, "_addresses", lambda: 1 << 20)
    assert limits.free() == 0
    assert isinstance(limits.told(ImportError("x.so: failed to map segment")), NotEnoughMemoryError)
    assert isinstance(limits.told(ImportError("no module named x")), ImportError)


def test_links_that_lead_round(here, kclib, seen):
    tiny.write_pictures(Path("pictures"))
    whole = datasets.load_data("folder:pictures")
    os.symlink("..", "pictures/test/round")
    os.symlink(".", "pictures/test/a/here")
    assert datasets.load_data("folder:pictures").fingerprint == whole.fingerprint
    seen(KIND, "an image folder has a link to a folder above it", "the link is not followed")
    os.symlink("loop", "loop")
    Path("p.yaml").write_text(PROFILE.replace("pictures", "loop"), encoding="utf-8")
    ways = [
        ("sweep", "loop/p.yaml"), ("sweep", "loop.yaml"), ("sweep", "p.yaml"), ("inspect", "loop/x"),
        (*COMPRESS, "loop/x"), ("compare", "loop", "loop"),
    ]  # fmt: skip
    os.symlink("loop.yaml", "loop.yaml")
    for way in ways:
        code, _, said = kclib(*way)
        assert (code, is_one_sentence(said)) == (2, True), (way, said)
    code, _, said = kclib("sweep", "loop.yaml")
    seen(KIND, "a profile is a symbolic link to itself", told(code, said))


def test_reports_that_cannot_be_written_are_told_before_the_work(here, kclib, monkeypatch):
    os.symlink("loop", "loop")
    tiny.write_pictures(Path("pictures"))
    Path("p.yaml").write_text(PROFILE, encoding="utf-8")
    monkeypatch.setattr("kclib.experiments._grid.run", lambda *_: pytest.fail("it worked in vain"))
    code, _, said = kclib("sweep", "p.yaml", "--out", "loop")
    assert (code, is_one_sentence(said)) == (2, True), said


def test_a_store_that_is_a_link_to_itself(here, kclib, monkeypatch, seen):
    os.symlink("loop", "loop")
    monkeypatch.setenv("KCLIB_STORE", str(here / "loop"))
    tiny.write_pictures(Path("pictures"))
    Path("p.yaml").write_text(PROFILE, encoding="utf-8")
    code, _, said = kclib("sweep", "p.yaml")
    assert (code, is_one_sentence(said)) == (2, True), said
    seen(KIND, "`KCLIB_STORE` is a symbolic link to itself", told(code, said, FOLDER=here))


def test_a_folder_of_a_class_that_may_not_be_read(open_folder, seen):
    tiny.write_pictures(open_folder / "pictures")
    (open_folder / "pictures/test/b").chmod(0)
    with another_user(), pytest.raises(DamagedFileError) as found:
        datasets.load_data(f"folder:{open_folder / 'pictures'}")
    (open_folder / "pictures/test/b").chmod(0o755)
    sentence = str(found.value).replace(str(open_folder), "FOLDER")
    seen(KIND, "the folder of a class may not be read", f"`{sentence}`")


def test_a_hundred_thousand_pictures(here, monkeypatch, capsys, seen):
    monkeypatch.setattr(_labelled, "tqdm", lambda *x, **y: progress_bars.tqdm(*x, **y | {"delay": 0}))
    tiny.write_pictures(Path("pictures"))
    for name in "ab":  # a file has 65,000 names at most
        first = next(Path("pictures/test", name).iterdir())
        for i in range(50_000):
            os.link(first, f"pictures/test/{name}/x{i:05}.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = datasets.load_data("folder:pictures")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert len(found.labels) == 100_046
    assert "checksum of folder:pictures" in capsys.readouterr().err
    assert grown < 500 << 10  # kibibytes: some for each name, and none for what is in the files
    seen(KIND, "an image folder holds 100,000 images", "it is read, and a progress bar says how far it is")
