import os
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import tiny
import torch
from safetensors.torch import save_file

from kclib import datasets, evaluation, experiments
from kclib.errors import KclibError
from kclib.experiments import _cell, _compare, _grid, _provenance, _reports
from kclib.experiments._cell import Subject
from kclib.experiments._pool import Workers
from kclib.experiments._profiles import Grid, ModelSource, Profile
from kclib.experiments.tables import readable
from kclib.store import Store

TIMES = ["cluster_seconds", "evaluate_seconds", "made"]
ORIGIN = ("versions", "commit", "machine")
LEVELS = {"limit": 0, "scopes": ("layer", "global"), "clusters": (2, 5), "methods": ("plain", "turned")}


def levels(**changed) -> Grid:
    """A sweep over the tiny model and a folder of pictures, in place of which the tiny images are loaded."""
    given = {"models": (ModelSource("tiny:tiny_model"),), "data": ("tiny",)} | LEVELS | {"seeds": (0, 1)}
    return Grid(**given | changed)


@pytest.fixture(autouse=True)
def images(monkeypatch, one_thread):
    """The tiny images under the name tiny, also where their number is limited."""
    monkeypatch.setattr(datasets, "load_data", lambda name, limit: tiny.tiny_data())
    _cell.forget()
    yield
    _cell.forget()


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def test_the_cells_are_all_combinations_the_dense_model_and_what_is_stored(store):
    planned = _grid.plan(levels(), store)
    assert len(planned) == 1 + 2 * 2 * 2 * 2
    assert not any(task.stored for task in planned)
    assert [x.seconds for x in planned] == sorted((x.seconds for x in planned), reverse=True)
    assert all(x.seconds > 0 and x.memory > 400 << 20 for x in planned)
    model = replace(tiny.tiny_model(), name="tiny:tiny_model")
    experiments.sweep(model, tiny.tiny_data(), [2], scopes=["layer"], store=store)
    again = _grid.plan(levels(), store)
    assert {(x.cell.scope, x.cell.k, x.cell.method, x.cell.seed) for x in again if x.stored} == {
        ("dense", 0, "dense", 0), ("layer", 2, "plain", 0)
    }  # fmt: skip
    assert all(x.seconds == 0 for x in again if x.stored)


def test_a_sweep_by_cells_is_that_of_the_library_to_the_bit(store, tmp_path):
    assert _grid.run(_grid.plan(levels(), store), Workers(), progress=False) == []
    found = _grid.table(_grid.plan(levels(), store, estimated=False), store)
    options = {k: v for k, v in LEVELS.items() if k in ("scopes", "methods")}
    model = replace(tiny.tiny_model(), name="tiny:tiny_model")
    plain = experiments.sweep(
        model, tiny.tiny_data(), (2, 5), seeds=(0, 1), store=Store(tmp_path / "b"), **options
    )
    order = ["method", "seed", "scope", "k"]
    found, plain = (x.drop(columns=TIMES).sort_values(order, ignore_index=True) for x in (found, plain))
    pd.testing.assert_frame_equal(found, plain, check_exact=True)


def test_results_that_vanish_or_are_damaged_during_a_sweep_are_computed_again(store, monkeypatch, caplog):
    sweep_of = {"seeds": (0,), "methods": ("plain",), "scopes": ("layer",)}
    _grid.run(_grid.plan(levels(clusters=(2,), **sweep_of), store), Workers(), progress=False)
    whole = _grid.table(_grid.plan(levels(clusters=(2,), **sweep_of), store, estimated=False), store)
    planned, genuine = _grid.plan(levels(**sweep_of), store), evaluation.evaluate

    def destroying(*args, **options):
        for task, destroy in zip([x for x in planned if x.stored], (Path.unlink, truncate), strict=True):
            destroy(store.path(task.key))
        monkeypatch.undo()
        return genuine(*args, **options)

    monkeypatch.setattr(evaluation, "evaluate", destroying)
    monkeypatch.setattr(datasets, "load_data", lambda name, limit: tiny.tiny_data())
    assert _grid.run(planned, Workers(), progress=False) == []
    found = _grid.table(planned, store)
    assert len(found) == 3
    pd.testing.assert_frame_equal(
        found[found.k != 5].drop(columns=TIMES), whole.drop(columns=TIMES), check_exact=True
    )
    assert "gone from the store, or damaged" in caplog.text


def truncate(path: Path) -> None:
    os.truncate(path, 50)


def test_results_that_vanish_again_and_again_have_failed(store, monkeypatch):
    monkeypatch.setattr(Store, "put", lambda self, entry: None)
    monkeypatch.setattr(datasets, "load_data", lambda name, limit: tiny.tiny_data())
    planned = _grid.plan(levels(seeds=(0,), methods=("plain",), scopes=("layer",)), store)
    failures = _grid.run(planned, Workers(), progress=False)
    assert sorted(x.what for x in failures) == sorted(map(str, planned))
    assert all("gone" in x.error for x in failures)


def test_a_cell_that_fails_stops_no_other_and_a_second_run_computes_it_alone(store, monkeypatch):
    genuine = evaluation.evaluate

    def failing(model, data, **options):
        if len(calls) == 3:
            calls.append("failed")
            raise ZeroDivisionError("by zero")
        calls.append("done")
        return genuine(model, data, **options)

    planned, calls = _grid.plan(levels(seeds=(0,)), store), []
    monkeypatch.setattr(evaluation, "evaluate", failing)
    (failure,) = _grid.run(planned, Workers(), progress=False)
    assert failure.what == str(planned[3])
    assert failure.error == "ZeroDivisionError: by zero"
    assert 'raise ZeroDivisionError("by zero")' in failure.traceback
    calls.clear()
    planned = _grid.plan(levels(seeds=(0,)), store)
    assert sum(not x.stored for x in planned) == 1
    calls.clear()
    assert _grid.run(planned, Workers(), progress=False) == []
    assert calls == ["done"]


@pytest.mark.parametrize("shown", [True, False])
def test_cells_in_this_process_show_their_own_progress_too(store, monkeypatch, shown):
    asked, genuine = [], evaluation.evaluate
    planned = _grid.plan(levels(seeds=(0,), methods=("plain",)), store)

    def evaluate(*arguments, progress, **options):
        asked.append(progress)
        return genuine(*arguments, progress=False, **options)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    _grid.run(planned, Workers(), progress=shown)
    assert asked == [shown] * 5


def test_a_sweep_that_is_stored_evaluates_nothing_to_plan(store, monkeypatch):
    _grid.run(_grid.plan(levels(), store), Workers(), progress=False)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: pytest.fail("evaluated"))
    assert all(x.stored for x in _grid.plan(levels(), store))


def test_a_damaged_entry_is_a_cell_to_compute_and_is_in_the_table_again(store):
    planned = _grid.plan(levels(), store)
    _grid.run(planned, Workers(), progress=False)
    whole = _grid.table(planned, store)
    victim = store.path(next(x for x in planned if x.cell != _cell.Cell()).key)
    os.truncate(victim, victim.stat().st_size // 2)
    again = _grid.plan(levels(), store)
    assert [x.stored for x in again].count(False) == 1
    _grid.run(again, Workers(), progress=False)
    pd.testing.assert_frame_equal(
        _grid.table(again, store).drop(columns=TIMES), whole.drop(columns=TIMES), check_exact=True
    )


def test_a_rerun_keeps_each_entry_until_its_cell_is_begun(store):
    levels_ = levels(seeds=(0,), methods=("plain",))
    _grid.run(_grid.plan(levels_, store), Workers(), progress=False)
    assert (
        _grid.summary(_grid.plan(levels_, store), Workers())
        == "5 cells, 5 of them stored; nothing is left to compute."
    )
    made = {path: path.stat().st_mtime_ns for path in store.root.glob("*/*.safetensors")}
    again = _grid.plan(levels_, store, rerun=True)
    assert not any(x.stored for x in again)
    assert {path: path.stat().st_mtime_ns for path in store.root.glob("*/*.safetensors")} == made
    _grid.run(again, Workers(), progress=False)
    now = {path: path.stat().st_mtime_ns for path in store.root.glob("*/*.safetensors")}
    assert now.keys() == made.keys()
    assert all(now[path] > made[path] for path in made)


def test_estimates_come_from_what_was_measured_of_like_cells(store):
    levels_ = levels(seeds=(0,), methods=("plain",))
    _grid.run(_grid.plan(levels_, store), Workers(), progress=False)
    measured = store.table("evaluation")
    expected = (measured.evaluate_seconds / measured.images).median() * 40
    (new,) = [
        x for x in _grid.plan(replace(levels_, clusters=(3,), scopes=("layer",)), store) if not x.stored
    ]
    clusterings = store.table("clustering")
    nearest = clusterings[clusterings.k == 2].seconds.iloc[0]
    assert new.seconds >= expected
    assert new.seconds <= expected + 2 * max(nearest, *clusterings.seconds)


@pytest.fixture
def clock(monkeypatch):
    """Let evaluations take what a list of costs says: seconds an image, and once, at the start, seconds."""
    genuine, costs = evaluation.evaluate, {"image": 0.004, "start": 0.0}

    def evaluate(model, data, **options):
        found = genuine(model, data, **options)
        start = costs["start"] if len(data) > 1 else 0.0  # one image alone does not warm up
        costs["start"] -= start
        return replace(found, seconds=start + costs["image"] * len(data))

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    return costs


def test_the_estimate_is_near_what_comes_though_the_first_batch_is_slow(store, clock):
    clock["start"] = 1.0
    planned = _grid.plan(levels(), store)
    assert clock["start"] == 0
    _grid.run(planned, Workers(), progress=False)
    came = _grid.table(planned, store).evaluate_seconds.sum()
    assert came == pytest.approx(17 * 40 * 0.004)
    assert sum(x.seconds for x in planned) == pytest.approx(came, rel=1 / 3)


def test_the_estimate_follows_how_busy_the_machine_was_lately(store, clock):
    for image in (0.04, 0.004):  # ten times as busy at first
        clock["image"] = image
        _grid.run(_grid.plan(levels(seeds=(int(1 / image),)), store), Workers(), progress=False)
    planned = [x for x in _grid.plan(levels(seeds=(7,)), store) if not x.stored]
    clusterings = store.table("clustering").seconds
    evaluating = len(planned) * 40 * 0.004
    assert evaluating <= sum(x.seconds for x in planned) <= 4 / 3 * evaluating + 16 * 2 * clusterings.max()


def test_the_sentence_of_a_plan_shares_its_time_among_the_workers():
    source = _cell.Source(ModelSource("m"), "d", ".", 0, "fp32", "cpu", "")
    planned = [
        _grid.Task(source, _cell.Cell(), {}, i == 3, s, 1 << 30) for i, s in enumerate((60, 40, 20, 0))
    ]
    assert _grid.summary(planned, Workers(2)) == (
        "4 cells, 1 of them stored; "
        "the rest takes about 01:00 (minutes:seconds) with 2 at a time, in 2.0 GiB."
    )
    assert "about 02:00" in _grid.summary(planned, Workers())
    long = [replace(x, seconds=60 * x.seconds) for x in planned]
    assert "about 1:00:00 (hours:minutes:seconds)" in _grid.summary(long, Workers(2))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"models": (ModelSource("tiny:no_model"),)}, "tiny:no_model"),
        ({"clusters": (10**9,)}, "no K of"),
        ({"precision": "fp12"}, "unknown precision 'fp12'"),
        ({"device": "gpu0"}, "device 'gpu0' cannot be used here"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_anything_is_computed(store, changed, message):
    with pytest.raises(KclibError, match=message):
        _grid.plan(levels(**changed), store)
    assert not list(store.root.glob("*/*.safetensors"))


def profile(**changed) -> Profile:
    return Profile("tiny", "A few <cells>.", Path("."), {}, {}, {}, levels(**changed))


def test_a_report_of_a_sweep_shows_failures_first_then_its_table_with_hashes(store, tmp_path):
    planned = _grid.plan(levels(), store)
    _grid.run(planned, Workers(), progress=False)
    victim = next(x for x in planned if x.cell.k == 5)
    store.path(victim.key).unlink()
    failures = [_reports.Failure(str(victim), "ZeroDivisionError: <1> / 0", "Traceback")]
    index = _grid.report(profile(), planned, store, failures, tmp_path).read_text()
    assert index.index(f"{victim} failed:") < index.index("<h2>The sweep")
    assert "ZeroDivisionError: &lt;1&gt; / 0" in index
    assert index.count("<tr") == 1 + 16
    assert _cell.models.fingerprint(tiny.tiny_model().network) in index
    assert "seeds 0, 1" in index
    assert "The sweep is not whole:</b> 1 of 17 cells are not shown" in index
    assert "A few &lt;cells&gt;." in index
    assert 'src="data:image/png;base64,' in index
    csv = pd.read_csv(tmp_path / "tiny" / "results.csv")
    assert len(csv) == 16
    assert _compare.read(tmp_path / "tiny").top1.tolist() == csv.top1.tolist()


def test_what_failed_is_in_the_report_also_where_the_store_has_it_from_before(store, tmp_path, monkeypatch):
    planned = _grid.plan(levels(), store)
    _grid.run(planned, Workers(), progress=False)
    os.truncate(store.path(planned[0].key), 30)
    again = _grid.plan(levels(), store, rerun=True)
    monkeypatch.setattr(Subject, "key_of", lambda *_: 1 / 0)
    failures = _grid.run(again, Workers(), progress=False)
    page = _grid.report(profile(), again, store, failures, tmp_path).read_text()
    assert page.count("failed:</b> ZeroDivisionError") == 17
    assert "1 of 17 cells are not shown" in page


def test_without_the_dense_model_nothing_is_shown_and_no_hash_of_before(store, tmp_path):
    planned = _grid.plan(levels(), store)
    _grid.run(planned, Workers(), progress=False)
    _grid.report(profile(), planned, store, [], tmp_path)
    store.path(next(x for x in planned if x.cell == _cell.Cell()).key).unlink()
    page = _grid.report(profile(), planned, store, [], tmp_path).read_text()
    assert "17 of 17 cells are not shown" in page
    assert "<table" not in page
    assert [*_reports.read(tmp_path / "tiny", "tiny").provenance] == ["sweep"]


def test_a_chapter_that_a_batch_ends_meanwhile_is_kept(store, tmp_path, monkeypatch):
    planned, draw = _grid.plan(levels(), store), _reports.picture
    _grid.run(planned, Workers(), progress=False)

    def picture(results):
        _reports.write(tmp_path / "tiny", _reports.Report("tiny", chapters=(_reports.Chapter("a", "done"),)))
        return draw(results)

    monkeypatch.setattr(_reports, "picture", picture)
    _grid.report(profile(), planned, store, [], tmp_path)
    assert [x.status for x in _reports.read(tmp_path / "tiny", "tiny").chapters] == ["done"]


def test_a_table_says_of_which_images_it_is_also_where_others_lie_there_now(store, monkeypatch):
    planned = _grid.plan(levels(), store)
    _grid.run(planned, Workers(), progress=False)
    monkeypatch.setattr(
        datasets, "load_data", lambda name, limit: replace(tiny.tiny_data(), fingerprint="others")
    )
    after = _grid.plan(levels(), store)
    _grid.run(after, Workers(), progress=False)
    assert [set(_grid.table(x, store).images_hash) for x in (planned, after)] == [{"0"}, {"others"}]


def test_a_report_made_anew_by_others_says_who_computed_its_cells(store, tmp_path, monkeypatch):
    planned = _grid.plan(levels(), store)
    monkeypatch.setattr(_provenance, "_of_this_process", lambda: dict.fromkeys(ORIGIN, "first"))
    _grid.run(planned[:5], Workers(), progress=False)
    monkeypatch.setattr(_provenance, "_of_this_process", lambda: dict.fromkeys(ORIGIN, "second"))
    _grid.run(planned[5:], Workers(), progress=False)
    monkeypatch.setattr(_provenance, "stamp", lambda: pytest.fail("stamped"))
    for _ in range(2):
        about = _reports.read(_grid.report(profile(), planned, store, [], tmp_path).parent, "tiny").provenance
        for name in ORIGIN:
            assert sorted(about[f"sweep, {name}"].split("; ")) == ["first", "second"]
        made = about["sweep, made"].split(" to ")  # a moment, or from one to another
        assert made == sorted(set(made))
        assert all(x.endswith("+00:00") for x in made)


def test_cells_are_called_as_the_profile_calls_them_on_every_machine(store, tmp_path, monkeypatch):
    """Two weights of one network, and images in another folder than on the first machine."""
    monkeypatch.undo()
    monkeypatch.syspath_prepend(Path(tiny.__file__).parent)
    found = []
    for machine in ("a", "b"):
        folder = tmp_path / machine
        tiny.write_pictures(folder / "pictures")
        for seed in (0, 1):
            torch.manual_seed(seed)
            state = {k: torch.randn_like(v) for k, v in tiny.photo_model().network.state_dict().items()}
            save_file(state, folder / f"{seed}.safetensors")
        given = tuple(ModelSource("tiny:photo_model", f"{seed}.safetensors") for seed in (0, 1))
        levels_ = levels(models=given, data=("folder:pictures",), seeds=(0,), folder=str(folder))
        planned = _grid.plan(levels_, store)
        assert {x.stored for x in planned} == {machine == "b"}  # the content is the same
        assert _grid.run(planned, Workers(), progress=False) == []
        found.append(_grid.table(planned, store))
    assert set(found[0].model) == {"tiny:photo_model (0.safetensors)", "tiny:photo_model (1.safetensors)"}
    assert set(found[0].data) == {"folder:pictures/test"}
    assert set(readable(found[0]).model) == set(found[0].model)
    moved = _compare.compare(*found)
    assert len(moved) == len(found[0]) == 2 * 9
    assert _compare.broken(moved, 0) == []


def test_each_model_and_each_data_set_is_loaded_once_for_many_pairs(store, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_data", lambda name, limit: (asked.append(name), tiny.tiny_data())[1])
    many = levels(data=("a", "b", "c", "d"), seeds=(0,), methods=("plain",))
    planned = _grid.plan(many, store)
    _grid.run(planned, Workers(), progress=False)
    _grid.table(planned, store)
    assert sorted(asked) == ["a", "b", "c", "d"]


def test_a_worker_that_outlives_a_sweep_does_not_answer_for_images_of_before(store, monkeypatch):
    planned = _grid.plan(levels(), store)
    _cell.forget()
    others = replace(tiny.tiny_data(), fingerprint="others")
    loads = [others, tiny.tiny_data(), others, others]
    monkeypatch.setattr(datasets, "load_data", lambda name, limit: loads.pop(0))
    planned[0].source.load()  # as another sweep left it
    assert _grid.run(planned[:1], Workers(), progress=False) == []
    assert store.has(planned[0].key)
    _cell.forget()
    (failure,) = _grid.run(planned[1:2], Workers(), progress=False)
    assert "is not the same on the machine of this worker" in failure.error


@pytest.mark.parametrize("backend", ["loky", "dask"])
def test_workers_side_by_side_leave_the_same_store(store, tmp_path, monkeypatch, backend):
    model = ModelSource("tiny:photo_model")
    levels_ = levels(models=(model,), data=(f"folder:{tiny.write_pictures(tmp_path)}",), seeds=(0,))
    monkeypatch.undo()
    monkeypatch.syspath_prepend(Path(tiny.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", str(Path(tiny.__file__).parent))
    assert _grid.run(_grid.plan(levels_, store), Workers(2, backend), progress=False) == []
    alone = Store(tmp_path / "alone")
    assert _grid.run(_grid.plan(levels_, alone), Workers(), progress=False) == []
    tables = [
        _grid.table(_grid.plan(levels_, x, estimated=False), x).drop(columns=TIMES) for x in (store, alone)
    ]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
