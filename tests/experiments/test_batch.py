import base64
import io
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import psutil
import pytest
import tiny
import yaml
from disks import full_disk
from nbformat import v4
from PIL import Image

from kclib import errors, experiments
from kclib.experiments import _batch, _profiles, _reports
from kclib.experiments._profiles import Profile
from kclib.store import Store

PARAMETERS = 'greeting: str = "hello"  # what to say\ncount: int = 1  # how many\nreport_dir: str = ""'
PICTURE = 'import sys, PIL.Image\nprint("halfway", file=sys.stderr)\ndisplay(PIL.Image.new("L", (900, 90)))'
FIGURE = """from matplotlib.figure import Figure
figure = Figure(figsize=(4, 2), dpi=100)
figure.subplots().set(title="a line", xlabel="x", ylabel="y")
figure"""
HEADLINE = 'from kclib.experiments import reports\nreports.headline(f"{greeting} {count}: {report_dir}")'
SIDE = 'stem: str = ""'
BY_SIDE = [
    "import os, time\nimport kclib.experiments.reports as r\nfrom pathlib import Path\nstart = time.time()\n"
    "time.sleep(1)",
    "r.headline(f'{start} {time.time()} {Path.cwd()} {len(os.sched_getaffinity(0))}')",
]
FOLDED = '<div class="input">.*?</pre>'
NOTEBOOKS = {
    "good": [PARAMETERS, PICTURE, FIGURE, HEADLINE],
    "other": ['greeting: str = "hello"', "import kclib.experiments.reports as r\nr.headline(greeting)"],
    "broken": ["x = 0", "1 / x", "y = 1"],
    "exits": ["x = 0", "import os\nos._exit(0)", "y = 1"],
    "killed": ["x = 0", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "y = 1"],
    "sleeps": ["x = 0", "import time\ntime.sleep(600)", "y = 1"],
    "prints": [
        "x = 0",
        'print("\\n".join(f"line {i}" for i in range(1_000_000)))',
        "import kclib.experiments.reports as r\nr.headline(str(x))",
    ],
    "looks": [
        'said: str = ""',
        "import os, time\nimport kclib.experiments.reports as r\ntime.sleep(1)",
        "r.headline(f'{said} {sorted(os.listdir())}')",
    ],
    "waits": [
        'said: str = ""',
        "import os, time\nfrom pathlib import Path\nfrom ipykernel import get_connection_file",
        "Path(f'{said}.part').write_text(f'{get_connection_file()} {os.getpid()}')\n"
        "os.replace(f'{said}.part', said)\ntime.sleep(600)",
    ],
    "imports": [
        "x = 0",
        "import kclib_test_here, kclib.experiments.reports as r\nr.headline(kclib_test_here.SAID)",
    ],
    "no_headline": ["x = 0", "y = 1"],
    **{stem: [SIDE, *BY_SIDE] for stem in ("one", "two", "timed")},
    "foreign_kernel": ["x = 0", "y = 1"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of notebooks named for their behaviour; the first cell of each holds its parameters."""
    folder = tmp_path_factory.mktemp("notebooks")
    for stem, sources in NOTEBOOKS.items():
        cells = [v4.new_code_cell(source) for source in sources]
        cells[0].metadata["tags"] = ["parameters"]
        name = "elsewhere" if stem == "foreign_kernel" else "python3"
        kernel = {"name": name, "display_name": "Python", "language": "python"}
        notebook = v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(notebook, folder / f"{stem}.ipynb")
    return folder


def profile_file(folder: Path, notebooks, parameters=None) -> str:
    content = {"note": "A <tiny> profile.", "notebooks": notebooks, "parameters": parameters, "folder": "."}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The report of a batch that ends well."""
    notebooks = {"good": {"parameters": {"count": 2}}, "other": None}
    path = profile_file(folder, notebooks, {"greeting": "ahoy", "count": 3})
    profile = _profiles.load(path, changes={"greeting": "moin"})
    return _batch.run(profile, tmp_path_factory.mktemp("out")).parent


def outputs(path: Path) -> list:
    return [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", ())]


def test_a_batch_leaves_an_executed_copy_and_a_page_of_each_notebook_and_an_index(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        "good.html", "good.ipynb", "index.html", "other.html", "other.ipynb", "report.json",
    ]  # fmt: skip


def test_parameters_reach_the_notebooks_that_have_them(finished):
    good, other = (nbformat.read(finished / f"{stem}.ipynb", 4) for stem in ("good", "other"))
    assert _reports.read_headline(good) == f"moin 2: {finished.resolve()}"
    assert _reports.read_headline(other) == "moin"


def test_the_index_shows_headlines_pictures_and_links(finished):
    index = (finished / "index.html").read_text()
    assert f"moin 2: {finished.resolve()}" in index
    assert index.count('src="data:image/png;base64,') == 1
    assert {"good.html", "good.ipynb", "other.html", "other.ipynb"} <= set(re.findall('href="(.*?)"', index))
    assert "A &lt;tiny&gt; profile." in index
    assert "greeting = moin" in index


def test_notebooks_run_side_by_side_in_their_folder_and_what_measures_time_alone(folder, tmp_path):
    profile = _profiles.load(profile_file(folder, {"timed": {"alone": True}, "one": None, "two": None}))
    before = Path.cwd()
    _batch.run(profile, tmp_path, jobs=2)
    assert Path.cwd() == before
    chapters = _reports.read(tmp_path / "tiny", "tiny").chapters
    assert [x.stem for x in chapters] == ["timed", "one", "two"], "pages stay in the profile's order"
    assert {x.headline.split()[2] for x in chapters} == {str(folder.resolve())}
    timed, one, two = (tuple(map(float, x.headline.split()[:2])) for x in chapters)
    assert max(one[0], two[0]) < min(one[1], two[1]), "both were under way at once"
    assert timed[0] > max(one[1], two[1])


def test_an_interrupted_batch_ends_what_is_under_way(folder, tmp_path):
    told = tmp_path / "told"
    path = profile_file(folder, {"waits": None, "sleeps": None, "other": None}, {"said": str(told)})
    command = [
        sys.executable,
        "-m",
        "kclib",
        "batch",
        "--profile",
        path,
        "--out",
        str(tmp_path),
        "--jobs",
        "2",
    ]
    command += ["--out", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(told.is_file)
        pid = int(told.read_text().split()[1])
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "interrupted; what was finished is kept" in said
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie")
    chapters = _reports.read(tmp_path / "tiny", "tiny").chapters
    assert [x.status for x in chapters] == ["interrupted", "interrupted", "not run"]


def test_the_page_for_readers_shows_results_without_code_or_progress(finished):
    page = (finished / "good.html").read_text()
    assert f"moin 2: {finished.resolve()}" in page
    assert "data:image/png;base64," in page
    assert not re.search(
        r"headline\(|Image\.new|what to say|halfway", re.sub(FOLDED, "", page, flags=re.DOTALL)
    )
    assert "what to say" in page, "the code is there, folded"


def test_figures_are_shown_at_twice_the_dots_with_what_they_show(finished):
    _, figure = (x for x in outputs(finished / "good.ipynb") if "image/png" in x.get("data", {}))
    about = figure.metadata["image/png"]
    with Image.open(io.BytesIO(base64.b64decode(figure.data["image/png"]))) as picture:
        assert (picture.width // 2, picture.height // 2) == (about.width, about.height)
    assert about.width == pytest.approx(400, abs=40)
    assert 'alt="a line: y against x"' in (finished / "good.html").read_text()


def test_the_notebooks_themselves_stay_without_outputs(finished, folder):
    assert not any(outputs(folder / f"{stem}.ipynb") for stem in ("good", "other"))


@pytest.mark.parametrize(
    ("stem", "error"),
    [
        ("broken", "ZeroDivisionError: division by zero"),
        ("exits", "died"),
        ("killed", "died"),
        ("sleeps", "a cell ran longer than the 2 s that the profile gives it"),
        ("no_headline", "headline"),
        ("foreign_kernel", ""),
    ],
)
def test_a_notebook_that_fails_is_kept_with_its_error_and_the_others_run(folder, tmp_path, stem, error):
    profile = _profiles.load(profile_file(folder, {stem: {"timeout": 2}, "other": None}))
    with pytest.raises(errors.NotebookError, match=f"notebook {stem} failed.*{error}.*{stem}.ipynb"):
        _batch.run(profile, tmp_path)
    written = {path.stem for path in (tmp_path / "tiny").iterdir()}
    assert written == {stem, "other", "index", "report"}
    index = (tmp_path / "tiny" / "index.html").read_text()
    assert index.index(f"{stem} failed:</b> ") < index.index('class="answer">hello</p>')
    assert re.search(f"{stem} failed:</b> .*{error}", index)
    assert ("traceback</summary>" in index) == (stem == "broken")
    assert "\x1b[" not in index
    kept = [output.ename for output in outputs(tmp_path / "tiny" / f"{stem}.ipynb") if "ename" in output]
    assert kept == {"broken": ["ZeroDivisionError"], "sleeps": ["KeyboardInterrupt"]}.get(stem, [])


def test_batches_side_by_side_on_one_folder_each_end_well_and_leave_nothing_there(folder, tmp_path):
    path = profile_file(folder, {"looks": None})
    there = sorted(path.name for path in folder.iterdir())
    command = [sys.executable, "-m", "kclib", "batch", "--profile", path]
    options = {who: ["--out", tmp_path / who, "--set", f"said={who}"] for who in "abc"}
    started = [subprocess.Popen([*command, *x], stderr=subprocess.DEVNULL) for x in options.values()]
    assert [process.wait() for process in started] == [0, 0, 0]
    found = [_reports.read(tmp_path / who / "tiny", "tiny").chapters[0].headline for who in options]
    assert found == [f"{who} {there}" for who in options], "no socket lies beside the notebooks"


def test_a_batch_that_is_killed_leaves_no_kernel_and_no_socket(folder, tmp_path):
    told = tmp_path / "told"
    path = profile_file(folder, {"waits": None}, {"said": str(told)})
    code = "from kclib.experiments import _batch, _profiles; "
    code += f"_batch.run(_profiles.load({path!r}), {str(tmp_path)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        wait_until(told.is_file)
        connection, pid = told.read_text().split()
        private = Path(connection).parent
        assert {path.suffix for path in private.iterdir()} > {".json"}, "sockets lie beside the file"
        assert private.stat().st_mode & 0o777 == 0o700
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not private.exists())
    wait_until(lambda: not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == "zombie")
    again = _profiles.load(profile_file(folder, {"other": None}))
    assert _batch.run(again, tmp_path).is_file(), "the report's folder is free again"


def wait_until(true) -> None:
    """Wait for what must come about, also where other processes run."""
    end = time.monotonic() + 240
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_notebooks_import_modules_of_the_folder_where_one_works(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("kclib_test_here.py").write_text("SAID = 'found'")
    _batch.run(_profiles.load(profile_file(folder, {"imports": None})), "out")
    assert _reports.read(tmp_path / "out" / "tiny", "tiny").chapters[0].headline == "found"


def test_a_second_batch_into_one_report_is_refused(folder, tmp_path, monkeypatch):
    profile = _profiles.load(profile_file(folder, {"other": None}))

    def execute(*_, **__):
        with pytest.raises(errors.StorageError, match=r"another batch is writing .*tiny"):
            _batch.run(profile, tmp_path)
        assert _batch.run(replace(profile, parameters={}), tmp_path / "elsewhere").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    with pytest.raises(KeyboardInterrupt):
        _batch.run(profile, tmp_path)


def test_every_notebook_that_failed_is_named_and_a_later_run_forgets_them(folder, tmp_path):
    failing = _profiles.load(profile_file(folder, dict.fromkeys(["broken", "no_headline"])))
    with pytest.raises(errors.NotebookError, match=r"notebooks broken failed .*; no_headline failed"):
        _batch.run(failing, tmp_path)
    index = _batch.run(_profiles.load(profile_file(folder, {"other": None})), tmp_path)
    assert "failed" not in re.sub("<style>.*?</style>", "", index.read_text(), flags=re.DOTALL)


def test_a_million_printed_lines_are_kept_and_cut_on_the_page(folder, tmp_path):
    _batch.run(_profiles.load(profile_file(folder, {"prints": None})), tmp_path)
    (stream,) = [x.text for x in outputs(tmp_path / "tiny" / "prints.ipynb") if x.output_type == "stream"]
    assert stream.splitlines() == [f"line {i}" for i in range(1_000_000)]
    page = (tmp_path / "tiny" / "prints.html").read_text()
    assert len(page) < 1_000_000
    assert "line 99\n... 999,800 lines are left out here; the executed notebook has them ...\n" in page
    assert "line 999999\n" in page


def test_a_disk_that_is_full_is_named_and_no_half_page_is_left(folder, tmp_path):
    profile = _profiles.load(profile_file(folder, {"other": None}))
    with full_disk(10_000), pytest.raises(errors.StorageError, match=r"other.html could not be written"):
        _batch.run(profile, tmp_path)
    assert not [x for x in (tmp_path / "tiny").iterdir() if x.suffix == ".html" and x.stem == "other"]
    assert not [x for x in (tmp_path / "tiny").iterdir() if x.name.startswith(".")]


def test_a_table_that_a_sweep_writes_meanwhile_is_kept(folder, tmp_path, monkeypatch):
    results = experiments.sweep(tiny.tiny_model(), tiny.tiny_data(), [5], store=Store(tmp_path / "store"))

    def execute(source, *_, **__):
        written = _reports.read(tmp_path / "tiny", "tiny")
        _reports.write(tmp_path / "tiny", replace(written, results=results, provenance={"sweep": "K 5"}))

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    with pytest.raises(errors.NotebookError):  # nothing was executed
        _batch.run(_profiles.load(profile_file(folder, {"good": None})), tmp_path)
    left = _reports.read(tmp_path / "tiny", "tiny")
    pd.testing.assert_frame_equal(left.results, results)
    assert left.provenance["sweep"] == "K 5"
    assert "notebooks, SHA-256" in left.provenance


def test_a_notebook_that_cannot_be_written_stops_no_other(folder, tmp_path, monkeypatch):
    execute = papermill.execute_notebook

    def refuse(source, target, *arguments, **options):
        if source.stem == "good":
            target.write_text('{"cells": [{"cell')
            raise OSError(28, "No space left on device")
        execute(source, target, *arguments, **options)

    monkeypatch.setattr(papermill, "execute_notebook", refuse)
    profile = _profiles.load(profile_file(folder, dict.fromkeys(["good", "other"])))
    with pytest.raises(errors.NotebookError, match=r"good failed.*No space left.*index\.html"):
        _batch.run(profile, tmp_path)
    assert 'href="good' not in (tmp_path / "tiny" / "index.html").read_text()
    chapters = _reports.read(tmp_path / "tiny", "tiny").chapters
    assert [x.status for x in chapters] == ["failed", "done"]


def test_a_rebuilt_report_is_the_same_but_for_what_its_pages_are_made_from(finished):
    before = (finished / "index.html").read_text()
    (finished / "good.html").unlink()
    _reports.rebuild(finished, "tiny")
    assert (finished / "good.html").is_file()
    assert (finished / "index.html").read_text() == before


def test_an_interrupted_batch_leaves_an_index_with_its_finished_part(folder, tmp_path, monkeypatch):
    def execute(source, target, parameters, **options):
        if Path(source).stem == "other":
            raise KeyboardInterrupt
        data = {"application/vnd.kclib.headline+json": {"text": "forty-two"}, "text/plain": "42"}
        shown = v4.new_output("display_data", data)
        nbformat.write(v4.new_notebook(cells=[v4.new_code_cell("", outputs=[shown])]), target)

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    profile = _profiles.load(profile_file(folder, dict.fromkeys(["good", "other", "broken"])))
    with pytest.raises(KeyboardInterrupt):
        _batch.run(profile, tmp_path)
    index = (tmp_path / "tiny" / "index.html").read_text()
    assert "<p>forty-two</p>" in index
    assert re.findall('<p class="(interrupted|not run)">', index) == ["interrupted", "not run"]


def test_a_batch_is_expected_to_take_what_its_last_run_took(tmp_path):
    given = {"a": {"k": 3}, "b": {}, "c": {}}
    profile = Profile("tiny", "", tmp_path, given, {"a": 60.0, "b": 50.0, "c": 40.0}, {})
    seconds = _batch.expected(profile, tmp_path)
    assert _batch.summary(profile, seconds) == "3 notebooks to run, in about 02:30 (minutes:seconds)."
    assert "about 01:30" in _batch.summary(profile, seconds, 2)
    assert "about 01:50" in _batch.summary(replace(profile, alone=frozenset("a")), seconds, 3)
    chapters = (
        _reports.Chapter("a", "done", seconds=20.0, parameters={"k": 3, "report_dir": "elsewhere"}),
        _reports.Chapter("b", "failed", seconds=1.0),
        _reports.Chapter("c", "done", seconds=7.0, parameters={"k": 4}),
    )
    _reports.write(tmp_path / "tiny", _reports.Report("tiny", chapters=chapters))
    assert _batch.expected(profile, tmp_path) == {"a": 20.0, "b": 50.0, "c": 40.0}
    assert "about 01:50" in _batch.summary(profile, _batch.expected(profile, tmp_path))


@pytest.mark.parametrize(("processors", "free", "jobs"), [(8, 64, 2), (1, 64, 1), (8, 7, 1), (8, 1, 1)])
def test_two_notebooks_fit_where_there_are_processors_and_memory(monkeypatch, processors, free, jobs):
    monkeypatch.setattr("kclib._util.threads.threads", lambda: processors)
    monkeypatch.setattr("kclib._util.limits.free", lambda: free << 30)
    assert _batch.fitting_jobs() == jobs


def test_threads_that_the_user_chose_stay(monkeypatch):
    monkeypatch.setattr("kclib._util.threads.threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert (_batch._limits(1), _batch._limits(2)) == ({}, {"OMP_NUM_THREADS": "4"})
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert _batch._limits(2) == {}
