import html
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import tiny
from gates import PATIENCE
from sentences import is_one_sentence

from kclib.experiments import _cell
from kclib.store import Entry, Store

pytestmark = pytest.mark.usefixtures("one_thread")
SWEEP = """
note: Tiny.
sweep:
  models: ["tiny:photo_model"]
  data: ["folder:pictures"]
  limit: 0
  scopes: [layer]
  clusters: [2, 5]
  seeds: [{seeds}]
"""


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """The path of a profile with a sweep over a tiny model and 46 pictures."""
    monkeypatch.setenv("KCLIB_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PYTHONPATH", str(Path(tiny.__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    tiny.write_pictures(tmp_path / "pictures")
    (tmp_path / "small.yaml").write_text(SWEEP.format(seeds="0"))
    _cell.forget()
    return tmp_path / "small.yaml"


def test_a_sweep_is_planned_computed_looked_up_listed_compared_and_tidied(kclib, swept, tmp_path):
    code, out, _ = kclib("sweep", swept, "--dry-run")
    assert (code, len(out.splitlines())) == (0, 1 + 3 + 1)
    assert "3 cells, 0 of them stored; the rest takes about 00:0" in out
    assert not (tmp_path / "reports").exists()
    assert kclib("sweep", swept)[0] == 0
    code, out, _ = kclib("sweep", swept)
    assert (code, out.splitlines()) == (
        0,
        [
            "3 cells, 3 of them stored; nothing is left to compute.",
            f"report: {tmp_path / 'reports' / 'small' / 'index.html'}",
        ],
    )
    code, out, _ = kclib("results", "--where", "k > 2", "--columns", "scope, k,images")
    assert (code, [line.split() for line in out.splitlines()]) == (
        0,
        [["scope", "k", "images"], ["layer", "5", "46"]],
    )
    assert kclib("results", "--csv", "all.csv", "--parquet", "all.parquet")[0] == 0
    assert len(pd.read_csv("all.csv")) == len(pd.read_parquet("all.parquet")) == 3
    code, out, _ = kclib("compare", "reports/small", "reports/small", "--max-drop", 0)
    assert (code, "3 cells are in both runs; 0 of them moved" in out) == (0, True)
    index = tmp_path / "reports" / "small" / "index.html"
    before = index.read_text()
    index.unlink()
    assert kclib("report", swept)[0] == 0
    assert unstamped(index.read_text()) == unstamped(before)
    victim = sorted((tmp_path / "store" / "clustering").glob("*.safetensors"))[0]
    victim.write_bytes(b"torn")
    code, out, _ = kclib("gc", "--dry-run")
    assert (code, out.splitlines()[-1], victim.is_file()) == (0, "1 files, 4 bytes would go", True)
    code, _, said = kclib("gc")
    assert (code, "give --yes" in said, victim.is_file()) == (2, True, True)
    assert kclib("gc", "--yes")[1].splitlines()[-1] == "1 files, 4 bytes removed"
    assert not victim.is_file()
    assert kclib("gc")[:2] == (0, "0 files, 0 bytes removed\n")


@pytest.mark.parametrize(("answer", "goes"), [("y", True), ("n", False), ("", False)])
def test_gc_says_what_it_will_remove_and_asks(kclib, tmp_path, monkeypatch, answer, goes):
    monkeypatch.setenv("KCLIB_STORE", str(tmp_path))
    victim = Store().put(Entry({"kind": "evaluation"}, {}, {}))
    victim.write_bytes(b"torn")
    terminal = io.StringIO(answer + "\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    code, out, _ = kclib("gc")
    assert (code, victim.is_file()) == (0, not goes)
    assert out.index(victim.name[:20]) < out.index("Remove them") < out.rindex(f"{int(goes)} files")


def test_gc_takes_ages_of_0_or_more_alone(kclib, tmp_path, monkeypatch):
    monkeypatch.setenv("KCLIB_STORE", str(tmp_path))
    entry = Store().put(Entry({"kind": "evaluation"}, {}, {}))
    for days in ("-1", "nan", "inf", "-0.001"):
        code, _, said = kclib("gc", "--yes", f"--days={days}")
        assert (code, is_one_sentence(said), "days is" in said) == (2, True, True)
    assert kclib("gc", "--yes", "--days", "1")[0] == 0
    assert entry.is_file()
    assert kclib("gc", "--yes", "--days", "0")[0] == 0
    assert not entry.is_file()


def unstamped(page: str) -> str:
    return re.sub(r"<b>made</b></dt><dd>.*?</dd>", "", page)


def test_results_are_filtered_by_accuracy(kclib, swept):
    kclib("sweep", swept)
    report = pd.read_parquet("reports/small/results.parquet").set_index("k")
    code, _, _ = kclib("results", "--where", "k > 0 and top1 >= 0", "--csv", "found.csv")
    found = pd.read_csv("found.csv").set_index("k")
    assert (code, len(found)) == (0, 2)
    assert found.top1.tolist() == pytest.approx(report.top1[found.index].tolist())


def test_results_are_listed_with_the_digits_one_reads(kclib, monkeypatch, tmp_path):
    monkeypatch.setenv("KCLIB_STORE", str(tmp_path / "store"))
    for k, top1 in ((1, 94.19999999999999), (2, None)):
        Store().put(Entry({"kind": "evaluation", "k": k}, {"top1": top1, "bytes": 58_842_048}, {}))
    _, out, _ = kclib("results", "--columns", "k,top1,bytes")
    assert sorted(line.split() for line in out.splitlines()) == [
        ["1", "94.2", "58842048"], ["2", "58842048"], ["k", "top1", "bytes"]
    ]  # fmt: skip


def test_a_rerun_computes_all_again(kclib, swept, tmp_path):
    kclib("sweep", swept)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.safetensors")}
    code, out, _ = kclib("sweep", swept, "--rerun")
    assert (code, "3 cells, 0 of them stored" in out, len(times)) == (0, True, 5)
    assert all(path.stat().st_mtime_ns > time for path, time in times.items())


def test_a_gate_that_is_broken_is_exit_code_1_with_its_cells(kclib, swept, tmp_path):
    kclib("sweep", swept)
    worse = pd.read_parquet("reports/small/results.parquet")
    worse = worse.assign(right=[bytes(len(x)) for x in worse.right], top1=0.0)
    worse.to_parquet("worse.parquet")
    code, _, said = kclib("compare", "reports/small", "worse.parquet", "--max-drop", 0.5)
    assert code == 1
    assert said.count(" to 0.00 %, a loss of ") == 3
    assert said.splitlines()[-1] == "kclib: 3 of 3 cells lost more than 0.5 points or are gone."
    assert "a loss of" in Path("changes.html").read_text()
    assert kclib("compare", "reports/small", "worse.parquet")[0] == 0


def test_a_cell_that_fails_is_exit_code_1_and_its_traceback_is_in_the_report(kclib, swept, monkeypatch):
    def failing(*_, **__):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("kclib.clustering.cluster", failing)
    code, _, said = kclib("sweep", swept)
    assert code == 1
    assert "scope layer, K = 5, plain, seed 0 failed: ZeroDivisionError: by zero" in said
    assert is_one_sentence(said.splitlines(keepends=True)[-1])
    assert 'raise ZeroDivisionError("by zero")' in html.unescape(Path("reports/small/index.html").read_text())


def test_a_report_made_anew_forgets_failures_that_are_mended(kclib, swept, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("kclib.evaluation.evaluate", lambda *_, **__: 1 / 0)
        patch.setattr("kclib.experiments._grid.check_runs", lambda _: None)
        patch.setattr("kclib.experiments._grid.Rates.seconds", lambda *_: 1.0)
        assert kclib("sweep", swept)[0] == 1
    index = tmp_path / "reports" / "small" / "index.html"
    assert index.read_text().count("failed:") == 3
    assert kclib("sweep", swept, "--out", "elsewhere")[0] == 0
    assert kclib("report", swept)[0] == 0
    page = index.read_text()
    assert "failed:" not in page
    assert "not whole" not in page
    assert page.count("<tr") == 1 + 3


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_side_by_side_that_is_ended_goes_on_where_it_was(kclib, swept, tmp_path, end):
    swept.write_text(SWEEP.format(seeds=", ".join(map(str, range(25)))))
    command = [sys.executable, "-m", "kclib", "sweep", str(swept), "--jobs", "2"]
    with open("log", "w") as log:
        running = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    folder = tmp_path / "store" / "evaluation"
    deadline = time.monotonic() + 4 * PATIENCE  # three processes import torch
    while len(list(folder.glob("[!.]*.safetensors"))) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if end == signal.SIGINT:
        os.killpg(running.pid, end)  # as a terminal does
        assert running.wait(PATIENCE) == 130
        said = Path("log").read_text()
        assert "\nkclib: interrupted; what was finished is kept.\n" in said
        # Python's own, in a finalizer and in a worker that has just begun.
        assert said.count("Traceback") == len(re.findall("^Exception ignored in|^Process Loky", said, re.M))
    else:
        running.kill()
        running.wait(PATIENCE)
    there = {path: path.read_bytes() for path in folder.glob("[!.]*.safetensors")}
    assert 5 <= len(there) < 51
    assert kclib("sweep", swept)[0] == 0
    assert {path: path.read_bytes() for path in there} == there
    assert len(pd.read_parquet("reports/small/results.parquet")) == 51
