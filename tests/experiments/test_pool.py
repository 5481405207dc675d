import sys
from pathlib import Path

import pytest
from distributed import LocalCluster
from joblib.externals.loky.process_executor import BrokenProcessPool
from work import calls, count, do

from kclib.errors import InvalidValueError, MissingPackageError, UnknownNameError
from kclib.experiments import _pool
from kclib.experiments._pool import Workers

NAMES = ("raises", "a", "exits", "b", "c")


def ended(folder, names, **options) -> dict[str, _pool.Outcome]:
    """Run tasks of these names and return how each ended."""
    tasks = [(str(folder), name) for name in names]
    found = list(_pool.run(do, tasks, Workers(**options)))
    assert sorted(x.place for x in found) == list(range(len(names))), "each task ends once"
    return {names[x.place]: x for x in found}


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_task_that_fails_stops_no_other_and_is_told_with_its_traceback(tmp_path, n_jobs):
    found = ended(tmp_path, NAMES, n_jobs=n_jobs)
    assert {name: x.error for name, x in found.items() if x.error} == {
        "raises": "ZeroDivisionError: raises was divided",
        "exits": "SystemExit: 3",
    }
    assert 'raise ZeroDivisionError(f"{name} was divided' in found["raises"].traceback
    assert {name: len(lines) for name, lines in calls(tmp_path).items()} == dict.fromkeys(NAMES, 1)


def test_one_job_runs_in_this_process_in_order(tmp_path):
    tasks = [(str(tmp_path), name) for name in "cab"]
    assert [x.place for x in _pool.run(do, tasks, Workers())] == [0, 1, 2]


def test_a_worker_that_is_killed_costs_no_task_and_none_is_done_twice(tmp_path):
    found = ended(tmp_path, ("dies_once", "a", "b", "c", "d"), n_jobs=2)
    assert not any(x.error for x in found.values())
    counts = {name: len(lines) for name, lines in calls(tmp_path).items()}
    assert counts.pop("dies_once") == 2
    # beside it one may have ended, untold yet, and the next begun, before the death was noticed
    assert sum(counts.values()) <= 6, "only what was under way beside it may be tried again"
    assert counts["d"] == 1


def test_a_task_that_always_kills_its_worker_has_failed_and_all_others_are_done(tmp_path):
    found = ended(tmp_path, ("dies", "a", "b", "dies-too", "c"), n_jobs=2)
    assert {name for name, x in found.items() if x.error} == {"dies", "dies-too"}
    assert "its process died" in found["dies"].error
    assert {"a", "b", "c"} <= calls(tmp_path).keys()


def test_what_was_under_way_when_a_worker_died_comes_last_each_alone(monkeypatch):
    rounds = []

    def round_(call, tasks, wait, workers):
        rounds.append([i for i, _ in tasks])
        if rounds[-1][0] == 0:
            raise BrokenProcessPool
        yield from (_pool.Outcome(i) for i in rounds[-1])

    monkeypatch.setattr(_pool, "_round", round_)
    found = list(_pool.run(do, range(7), Workers(2)))
    assert rounds == [[0, 1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6], [0], [1]]
    assert [x.place for x in found if x.error] == [0]
    assert sorted(x.place for x in found) == list(range(7))


def test_what_another_process_is_at_is_left_to_the_end_and_then_waited_for(tmp_path):
    found = ended(tmp_path, ("elsewhere", "a", "b"), n_jobs=2)
    assert not any(x.error for x in found.values())
    waits = {name: [line.split()[0] for line in lines] for name, lines in calls(tmp_path).items()}
    assert waits["a"] == waits["b"] == ["False"]
    assert (waits["elsewhere"][0], waits["elsewhere"][-1]) == ("False", "True")


def test_threads_are_shared_out_among_the_jobs(tmp_path, monkeypatch):
    monkeypatch.setattr(_pool.threads, "threads", lambda: 6)
    assert [Workers(n).n_threads for n in (1, 2, 4, 9)] == [6, 3, 1, 1]
    ended(tmp_path, ("a", "b"), n_jobs=4)
    assert {line.split(maxsplit=1)[1] for (line,) in calls(tmp_path).values()} == {"1 1"}


def test_a_worker_of_a_smaller_machine_uses_no_more_threads_than_that_has(tmp_path, monkeypatch):
    monkeypatch.setattr(_pool.threads, "threads", lambda: 1)
    monkeypatch.setattr(Workers, "n_threads", 64)
    ended(tmp_path, "a")
    assert [line.split(maxsplit=1)[1] for line in calls(tmp_path)["a"]] == ["1 1"]


def test_a_dask_cluster_of_this_machine_ends_as_loky_does(tmp_path):
    for backend in _pool.BACKENDS[:2]:
        (tmp_path / backend).mkdir()
    loky, dask = (ended(tmp_path / x, NAMES, n_jobs=2, backend=x) for x in _pool.BACKENDS[:2])
    assert {x: y.error for x, y in loky.items()} == {x: y.error for x, y in dask.items()}
    assert calls(tmp_path / "dask").keys() == calls(tmp_path / "loky").keys()


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_no_more_tasks_than_jobs_are_under_way_on_a_larger_cluster(n_jobs):
    options = {
        "n_workers": 1,
        "threads_per_worker": 4,
        "processes": False,
        "dashboard_address": "localhost:0",
    }
    with LocalCluster(**options) as cluster:
        workers = Workers(n_jobs, "dask", cluster.scheduler_address)
        most = [int(x.error.split()[-1]) for x in _pool.run(count, range(8), workers)]
    assert max(most) == n_jobs


def test_a_ray_cluster_of_this_machine_survives_a_worker_that_is_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")  # a test tells nobody
    found = ended(tmp_path, ("dies_once", "raises", "a"), n_jobs=2, backend="ray")
    assert {name: x.error for name, x in found.items() if x.error} == {
        "raises": "ZeroDivisionError: raises was divided"
    }
    assert len(calls(tmp_path)["dies_once"]) == 2


@pytest.mark.parametrize("backend", ["dask", "ray"])
def test_a_backend_whose_package_is_missing_says_what_to_install(tmp_path, monkeypatch, backend):
    monkeypatch.setitem(sys.modules, {"dask": "distributed"}.get(backend, backend), None)
    with pytest.raises(MissingPackageError, match=f"pip install '{backend}"):
        ended(tmp_path, ("a",), n_jobs=2, backend=backend)


@pytest.mark.parametrize(
    ("backend", "scheduler"),
    [("Dask", "tcp://127.0.0.1:9"), ("Ray", "127.0.0.1:9"), ("Ray", "ray://127.0.0.1:99999")],
)
def test_a_scheduler_that_does_not_answer_is_named(tmp_path, backend, scheduler):
    with pytest.raises(InvalidValueError, match=f"no {backend} (scheduler|cluster) answers at '{scheduler}'"):
        ended(tmp_path, ("a",), backend=backend.lower(), scheduler=scheduler)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_jobs": 0}, InvalidValueError, "jobs is 0"),
        ({"backend": "lokey"}, UnknownNameError, "mean 'loky'"),
        ({"scheduler": "tcp://localhost:1"}, InvalidValueError, "loky has none"),
    ],
)
def test_workers_that_cannot_be_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Workers(**options)
