"""Sweeps that are killed, starved, disturbed: nothing finished is lost, and nothing is computed twice."""

import multiprocessing
import multiprocessing.forkserver
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from gates import PATIENCE
from tiny import tiny_data, tiny_model

from kclib import clustering, evaluation, experiments
from kclib.errors import StorageError
from kclib.experiments import _cell
from kclib.store import Store

KS = (1, 5, 36)
OPTIONS = {"methods": ("plain", "turned")}
KILLS = 200 if "SOAK" in os.environ else 20  # `make soak`
SECONDS = ["cluster_seconds", "evaluate_seconds"]


def swept(folder, **options) -> pd.DataFrame:
    """Return a small sweep's table, without the seconds that its cells took."""
    table = experiments.sweep(tiny_model(), tiny_data(), KS, store=Store(folder), **OPTIONS, **options)
    return without_times(table)


def without_times(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(columns=[*SECONDS, "made"])


def sweep_alone(folder, pipe, interrupted: int | None = None) -> None:
    """Sweep in a process of its own; tell the pipe when it begins, and at the end how much was computed.

    The evaluation of number `interrupted` is interrupted as by Ctrl-C.
    """
    torch.set_num_threads(1)
    counts = {"evaluate": 0, "cluster": 0}
    evaluation.evaluate = counted(evaluation.evaluate, counts, "evaluate", interrupted)
    clustering.cluster = counted(clustering.cluster, counts, "cluster")
    pipe.send("begun")
    swept(folder)
    pipe.send(counts)


def counted(call, counts, name, interrupted=None):
    def count(*args, **kwargs):
        counts[name] += 1
        if counts[name] == interrupted:
            os.kill(os.getpid(), signal.SIGINT)
        return call(*args, **kwargs)

    return count


def standing(folder: Path) -> tuple[int, int]:
    """Return how many results a store has, and how many others its dead process had begun."""
    done = {path.stem for path in folder.rglob("*.safetensors") if not path.name.startswith(".")}
    begun = {path.stem for path in folder.rglob("*.lock")}
    return len(done), len(begun - done)


def told(pipe):
    """Return what a process tells, which must be soon."""
    assert pipe.poll(PATIENCE)
    return pipe.recv()


@pytest.fixture(scope="module")
def start():
    """Starts a sweep over a store in a process of its own, from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm", "test_survival"])
    with pytest.MonkeyPatch.context() as patch:  # its server looks for what it preloads there only
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
        multiprocessing.forkserver.ensure_running()

    def started(folder, *options):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=sweep_alone, args=(folder, theirs, *options))
        process.start()
        theirs.close()
        assert told(ours) == "begun"
        return process, ours

    return started


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, one_thread):
    return swept(tmp_path_factory.mktemp("store"))


def test_after_random_kills_the_table_is_that_of_an_undisturbed_run_to_the_bit(
    tmp_path, start, undisturbed, seen
):
    process, pipe = start(tmp_path / "timed")
    begin = time.perf_counter()
    told(pipe)
    whole = time.perf_counter() - begin
    process.join(PATIENCE)
    draw, killed_at, finished = random.Random(0), [], 0
    while len(killed_at) < KILLS:
        folder = tmp_path / "store"
        process, _ = start(folder)
        process.join(draw.uniform(0, 0.6 * whole))
        if process.exitcode is None:
            process.kill()
            process.join()
            killed_at.append(standing(folder))
            continue
        assert process.exitcode == 0
        finished += 1
        pd.testing.assert_frame_equal(swept(folder), undisturbed, check_exact=True)
        assert len(Store(folder).gc(dry_run=True)) == 0
        shutil.rmtree(folder)
    counts = Counter(done for done, _ in killed_at)
    under_way = sum(begun for _, begun in killed_at)
    print(f"{KILLS} kills; so many at each number of results: {sorted(counts.items())}")
    print(f"cells under way when killed: {under_way}; sweeps that came to their end: {finished}")
    assert finished > KILLS // 40, "kills that come too late or too early would show nothing"
    assert len(counts) > 4, "the store must differ between kills"
    assert under_way > KILLS // 3, "kills between two cells, or before the first, would show little"
    seen(
        "Interruptions",
        "a sweep is killed at random, again and again",
        "the table is that of an undisturbed run",
    )


def test_two_sweeps_at_once_on_one_store_compute_nothing_twice(tmp_path, start, undisturbed, seen):
    both = [start(tmp_path) for _ in range(2)]
    counts = [told(pipe) for _, pipe in both]
    for process, _ in both:
        process.join(PATIENCE)
        assert process.exitcode == 0
    assert sum(x["evaluate"] for x in counts) == len(undisturbed)
    assert sum(x["cluster"] for x in counts) == len(undisturbed) - 1
    pd.testing.assert_frame_equal(swept(tmp_path), undisturbed, check_exact=True)
    seen(
        "Interruptions",
        "two sweeps run at once on one store",
        "they share the work; nothing is computed twice",
    )


def test_a_damaged_entry_is_computed_again_and_said_and_nothing_else_is(
    tmp_path, undisturbed, monkeypatch, caplog
):
    swept(tmp_path)
    victims = [sorted((tmp_path / kind).glob("*.safetensors"))[3] for kind in ("evaluation", "clustering")]
    for path in victims:
        os.truncate(path, path.stat().st_size // 2)
    counts = {"evaluate": 0}
    monkeypatch.setattr(evaluation, "evaluate", counted(evaluation.evaluate, counts, "evaluate"))
    pd.testing.assert_frame_equal(swept(tmp_path), undisturbed, check_exact=True)
    assert counts["evaluate"] == 1
    assert str(victims[0]) in caplog.text


def test_another_data_set_clusters_nothing_again_and_another_k_takes_no_kernels_out_again(
    tmp_path, undisturbed, monkeypatch
):
    swept(tmp_path)
    monkeypatch.setattr(clustering, "cluster", lambda *_, **__: pytest.fail("clustered again"))
    other = experiments.sweep(tiny_model(), tiny_data(1), KS, store=Store(tmp_path), **OPTIONS)
    assert len(other) == len(undisturbed)
    assert not other.top1.equals(undisturbed.top1)
    monkeypatch.undo()
    taken, genuine = {"n": 0}, _cell.kernels.extract
    monkeypatch.setattr(_cell.kernels, "extract", counted(genuine, taken, "n"))
    experiments.sweep(tiny_model(), tiny_data(), [3, 4, 6], store=Store(tmp_path))
    assert taken["n"] == 1


def test_a_clock_that_jumps_changes_nothing(tmp_path, undisturbed, monkeypatch, seen):
    draw = np.random.default_rng(0)
    genuine = time.time
    monkeypatch.setattr(time, "time", lambda: genuine() + draw.uniform(-86_400, 86_400))
    found = experiments.sweep(tiny_model(), tiny_data(), KS, store=Store(tmp_path), **OPTIONS)
    assert found[SECONDS].ge(0).all(axis=None)
    assert found[SECONDS].lt(PATIENCE).all(axis=None)
    pd.testing.assert_frame_equal(without_times(found), undisturbed, check_exact=True)
    pd.testing.assert_frame_equal(swept(tmp_path), undisturbed, check_exact=True)
    seen("Interruptions", "the clock jumps, forth or back", "nothing changes")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB, or where none can be mounted, a skip that CI does not allow."""
    (tmp_path / "disk").mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path / "disk")]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a file system can only be mounted by root")
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_a_full_disk_is_one_sentence_and_what_was_finished_is_whole(small_disk, undisturbed, seen):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(200 << 10))
    with pytest.raises(StorageError, match=r"No space left"):
        swept(small_disk / "store")
    there = list((small_disk / "store").rglob("*.safetensors"))
    assert there
    assert not [path for path in there if path.name.startswith(".")], "no half-written file is left"
    before = {path: path.read_bytes() for path in there}
    ballast.unlink()
    pd.testing.assert_frame_equal(swept(small_disk / "store"), undisturbed, check_exact=True)
    assert {path: path.read_bytes() for path in there} == before
    seen("Interruptions", "the disk of the store is full", "one sentence says so; what was finished is kept")


def test_ctrl_c_keeps_what_was_finished(tmp_path, start, undisturbed, seen):
    process, _ = start(tmp_path, 4)  # from within: what comes while a destructor runs, Python ignores
    process.join(PATIENCE)
    assert process.exitcode == 1
    again, pipe = start(tmp_path)
    counts = told(pipe)
    again.join(PATIENCE)
    assert counts["evaluate"] == len(undisturbed) - 3
    pd.testing.assert_frame_equal(swept(tmp_path), undisturbed, check_exact=True)
    seen(
        "Interruptions",
        "Ctrl-C in the middle of a sweep",
        "what was finished is kept, and is not computed again",
    )
