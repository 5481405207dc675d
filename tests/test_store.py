import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import safetensors
from disks import full_disk
from gates import PATIENCE
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kclib import store as store_module
from kclib.errors import InvalidValueError, StorageError, UnknownNameError
from kclib.store import VERSIONS, Entry, Store

KEY = {"kind": "evaluation", "model": "vgg16", "k": 16, "nested": {"a": [1, 2], "b": None}}
DTYPES = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
DTYPES += ("float16", "float32", "float64")
ARRAYS = st.dictionaries(
    st.text(st.characters(codec="ascii", categories=("L",)), min_size=1, max_size=5),
    st.sampled_from(DTYPES).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=4))
    ),
    max_size=3,
)
NUMBERS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
ROWS = st.dictionaries(
    st.text(), st.recursive(NUMBERS, lambda inner: st.lists(inner, max_size=3)), max_size=4
)


def entry(value: float = 1.0, **key) -> Entry:
    return Entry(KEY | key, {"top1": value}, {"hits": np.full(3, value)})


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@settings(deadline=None, max_examples=25)
@given(arrays=ARRAYS, row=ROWS)
def test_what_is_put_comes_back_to_the_bit(arrays, row):
    with tempfile.TemporaryDirectory() as folder:
        Store(folder).put(Entry(KEY, row, arrays))
        found = Store(folder).get(KEY)
    assert (found.key, found.row, set(found.arrays)) == (KEY, row, set(arrays))
    for name, array in arrays.items():
        back = found.arrays[name]
        assert (back.shape, back.dtype, back.tobytes()) == (array.shape, array.dtype, array.tobytes())


def test_an_array_that_is_a_view_comes_back_as_it_reads(store):
    array = np.arange(24.0).reshape(4, 6)
    views = {
        "transposed": array.T,
        "strided": array[::2, ::-1],
        "broadcast": np.broadcast_to(array[0], (3, 6)),
    }
    store.put(Entry(KEY, {}, views))
    assert all(np.array_equal(store.get(KEY).arrays[name], view) for name, view in views.items())


@pytest.mark.parametrize("change", [{"k": 17}, {"model": "vgg19"}, {"nested": {"a": [2, 1], "b": None}}])
def test_another_key_is_another_entry(store, change):
    store.put(entry(1.0))
    assert store.get(KEY | change) is None
    store.put(entry(2.0, **change))
    assert (store.get(KEY).row["top1"], store.get(KEY | change).row["top1"]) == (1.0, 2.0)


def test_the_order_of_a_keys_parts_does_not_matter(store):
    store.put(entry(3.0))
    turned = dict(reversed(KEY.items())) | {"nested": {"b": None, "a": [1, 2]}}
    assert store.get(turned).row == {"top1": 3.0}


def test_a_second_put_replaces_the_first(store):
    assert store.put(entry(1.0)) == store.put(entry(2.0))
    assert store.get(KEY).arrays["hits"].tolist() == [2.0] * 3


def test_a_reader_in_the_middle_of_an_entry_is_not_disturbed_by_a_new_one(store):
    path = store.put(entry(1.0))
    before = path.read_bytes()
    with open(path, "rb", buffering=0) as reader:
        head = reader.read(10)
        store.put(entry(2.0))
        assert head + reader.read() == before


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_a_truncated_entry_is_a_miss_and_is_overwritten(store, kept):
    path = store.put(entry(1.0))
    os.truncate(path, int(path.stat().st_size * kept))
    assert store.get(KEY) is None
    store.put(entry(2.0))
    assert store.get(KEY).row == {"top1": 2.0}


def test_an_entry_of_other_bytes_is_a_miss(store):
    path = store.put(entry())
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert store.get(KEY) is None


def test_a_write_that_fails_leaves_the_old_entry_and_no_scraps(store):
    path = store.put(entry(1.0))
    with full_disk(), pytest.raises(StorageError, match=path.name):
        store.put(Entry(KEY, {}, {"large": np.ones(100_000)}))
    assert store.get(KEY).row == {"top1": 1.0}
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="could not be written"):
        Store(tmp_path / "file" / "store").put(entry())


def test_the_default_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("KCLIB_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("KCLIB_STORE", raising=False)
    assert Store().put(entry()).parents[1] == tmp_path / "data" / "cache" / "store"
    monkeypatch.setenv("KCLIB_STORE", str(tmp_path / "elsewhere"))
    assert Store().get(KEY) is None
    assert Store().put(entry()).parents[1] == tmp_path / "elsewhere"


def flip_a_bit(path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("place", [-1, -20, 40, 200])
def test_an_entry_with_one_bit_flipped_is_computed_again_and_said(store, caplog, place):
    path = store.put(entry(1.0))
    flip_a_bit(path, place)
    assert store.once(KEY, lambda: entry(2.0)).row == {"top1": 2.0}
    assert [record.getMessage() for record in caplog.records] == [
        f"store entry {path} is damaged and will be computed again."
    ]
    assert store.get(KEY).row == {"top1": 2.0}


def test_what_is_there_is_not_computed_again(store):
    store.put(entry(1.0))
    assert store.once(KEY, lambda: pytest.fail("computed")).row == {"top1": 1.0}


def test_of_many_who_want_an_entry_at_once_one_computes_it(store):
    computed, begin = [], threading.Barrier(8)

    def compute():
        computed.append(1)
        return entry(3.0)

    def want(_):
        begin.wait(PATIENCE)
        return Store(store.root).once(KEY, compute).row

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(want, range(8))) == [{"top1": 3.0}] * 8
    assert computed == [1]


def test_who_does_not_wait_for_another_goes_on_without(store):
    with store.claim(KEY, wait=True):
        assert Store(store.root).once(KEY, lambda: pytest.fail("computed"), wait=False) is None
        other = Store(store.root).once(KEY | {"k": 17}, lambda: entry(1.0, k=17), wait=False)
    assert other.row == {"top1": 1.0}
    assert Store(store.root).once(KEY, lambda: entry(2.0), wait=False).row == {"top1": 2.0}


def test_a_computation_that_fails_leaves_its_claim_to_others(store):
    with pytest.raises(ZeroDivisionError):
        store.once(KEY, lambda: 1 / 0)
    assert store.once(KEY, entry, wait=False).row == {"top1": 1.0}


def test_a_claim_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="could not be locked"):
        Store(tmp_path / "file").once(KEY, entry)


def test_the_table_has_a_row_an_entry_and_can_be_read_without_us(store):
    paths = [store.put(entry(value, k=k)) for k, value in ((16, 1.5), (17, 2.5))]
    store.put(Entry({"kind": "layout", "seed": 1}, {"n": 3}, {}))
    table = store.table("evaluation").set_index("k")
    assert table.top1.to_dict() == {16: 1.5, 17: 2.5}
    assert (table.nested == '{"a": [1, 2], "b": null}').all()
    assert table.file_bytes.to_dict() == {16: paths[0].stat().st_size, 17: paths[1].stat().st_size}
    assert table.entry[16] == paths[0].stem
    kept = pd.read_parquet(store.root / "evaluation.parquet").set_index("k")
    assert kept.drop(columns="checked").equals(table)


def test_the_table_reads_what_is_new_or_changed_and_drops_what_is_gone(store, monkeypatch):
    monkeypatch.setattr(store_module, "_TICK", 0)
    first, second = (store.put(entry(1.0, k=k)) for k in (1, 2))
    assert store.table("evaluation").k.tolist() != []
    first.unlink()
    os.utime(second, ns=(0, 0))  # another content at another time
    store.put(entry(5.0, k=3))
    read, genuine = [], safetensors.safe_open

    def opened(path, **options):
        read.append(path)
        return genuine(path, **options)

    store.table("evaluation")
    monkeypatch.setattr(safetensors, "safe_open", opened)
    assert sorted(store.table("evaluation").k) == [2, 3]
    assert read == []
    changed = store.put(entry(7.0, k=2))
    assert store.table("evaluation").set_index("k").top1.to_dict() == {2: 7.0, 3: 5.0}
    assert read == [changed]


@pytest.mark.parametrize("content", [b"", b"PAR1 no parquet", b"\xff" * 500])
def test_a_damaged_table_is_made_again(store, content):
    store.put(entry(1.0))
    whole = store.table("evaluation")
    (store.root / "evaluation.parquet").write_bytes(content)
    assert store.table("evaluation").equals(whole)


def test_a_damaged_entry_has_no_row(store):
    store.put(entry(1.0))
    os.truncate(store.put(entry(2.0, k=17)), 30)
    assert store.table("evaluation").top1.tolist() == [1.0]


@pytest.mark.parametrize("place", [-1, 300])
def test_an_entry_with_one_bit_flipped_in_its_arrays_has_no_row_and_it_is_said(store, caplog, place):
    store.put(entry(1.0))
    path = store.put(entry(2.0, k=17))
    assert len(store.table("evaluation")) == 2
    stat = path.stat()
    flip_a_bit(path, place)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a copy does, or one who hides it
    assert store.table("evaluation").top1.tolist() == [1.0]
    assert f"{path} is damaged" in caplog.text
    assert store.get(KEY | {"k": 17}) is None


def test_an_entry_under_the_name_of_another_is_none(store):
    mine, other = store.put(entry(1.0)), store.put(entry(2.0, k=17))
    os.replace(other, mine)
    assert store.get(KEY) is None
    assert len(store.table("evaluation")) == 0
    assert store.gc().file.tolist() == [f"evaluation/{mine.name}"]


def test_a_kept_table_in_which_a_number_was_changed_is_made_again(store, monkeypatch):
    monkeypatch.setattr(store_module, "_TICK", 0)
    for k in (1, 2):
        store.put(entry(1.0, k=k))
    whole = store.table("evaluation")
    path = store.root / "evaluation.parquet"
    pd.read_parquet(path).assign(top1=99.0).to_parquet(path)  # a whole parquet file, but not ours
    assert store.table("evaluation").equals(whole)
    for place in range(4, path.stat().st_size, 97):
        flip_a_bit(path, place)
        assert store.table("evaluation").equals(whole), place


def test_a_store_without_entries_has_an_empty_table_and_is_not_made(store):
    assert len(store.table("evaluation")) == 0
    assert not store.root.exists()


def test_a_table_is_read_where_it_cannot_be_kept(store):
    row = {"top1": 1.0, "text": os.urandom(40_000).hex()}
    store.put(Entry(KEY, row, {}))
    with full_disk():
        assert store.table("evaluation")[[*row]].to_dict("records") == [row]
    assert [x.name for x in store.root.iterdir() if x.is_file()] == []


def test_an_entry_that_another_process_removes_meanwhile_is_no_row_and_no_garbage(store, monkeypatch):
    going = store.put(entry(2.0, k=17))
    going.unlink()
    going.symlink_to("gone")  # listed, and then not there
    store.put(entry(1.0))
    assert store.table("evaluation").top1.tolist() == [1.0]
    going.unlink()
    monkeypatch.setattr(store_module, "_read", lambda path: path.unlink())
    assert len(store.gc()) == 0


def test_gc_removes_nothing_that_nobody_agrees_to_nor_what_was_computed_again_meanwhile(store):
    damaged, other = store.put(entry(1.0)), store.put(entry(1.0, k=1))
    for path in (damaged, other):
        flip_a_bit(path, -1)
    shown = []
    assert len(store.gc(agree=lambda table: shown.append(table))) == 0
    assert shown[0].why.tolist() == ["damaged"] * 2

    def agree(table):
        store.put(entry(5.0))
        return True

    assert store.gc(agree=agree).file.tolist() == [f"evaluation/{other.name}"]
    assert store.get(KEY).row == {"top1": 5.0}


@pytest.mark.parametrize("days", [-1, -1e-9, float("nan"), float("inf"), "2", True])
def test_gc_takes_no_age_that_is_none(store, days):
    store.put(entry(1.0))
    with pytest.raises(InvalidValueError, match="days is"):
        store.gc(days=days)
    assert store.get(KEY)


def test_an_unknown_kind_is_named(store):
    for ask in (lambda: store.table("evaluations"), lambda: store.get({"kind": "evaluations"})):
        with pytest.raises(UnknownNameError, match="mean 'evaluation'"):
            ask()
    with pytest.raises(UnknownNameError, match="unknown kind of entry 'None'"):
        store.get({"k": 3})


def test_another_version_of_the_code_shares_no_entry_and_gc_removes_the_old(store, monkeypatch):
    old = store.put(entry(1.0))
    monkeypatch.setitem(store_module.VERSIONS, "evaluation", VERSIONS["evaluation"] + 1)
    assert store.get(KEY) is None
    new = store.put(entry(2.0))
    assert store.gc(dry_run=True).file.tolist() == [f"evaluation/{old.name}"]
    assert old.exists()
    removed = store.gc()
    assert removed.why.tolist() == ["of an earlier version"]
    assert (old.exists(), new.exists(), len(store.gc())) == (False, True, 0)


def test_gc_removes_what_is_damaged_old_or_left_over_and_nothing_else(store):
    good, damaged = store.put(entry(1.0)), store.put(entry(1.0, k=1))
    flip_a_bit(damaged, -1)
    old = store.put(entry(1.0, k=2))
    scrap, flat = good.with_name(".x.tmp.safetensors"), store.root / f"{'0123' * 16}.safetensors"
    young = good.with_name(".y.tmp.safetensors")
    strangers = [
        store.root / name
        for name in (".git/config", "poetry.lock", "found.csv", "abc123.safetensors", f"a/b/{flat.name}")
    ]
    for folder in (".git", "a/b"):
        (store.root / folder).mkdir(parents=True)
    for path in (scrap, flat, young, *strangers):
        path.write_text("scrap")
    for path in (old, scrap, *strangers):
        os.utime(path, (time.time() - 3 * 86400,) * 2)
    store.table("evaluation")
    removed = store.gc(days=2)
    assert all(path.exists() for path in strangers)
    assert dict(zip(removed.why, removed.file, strict=True)) == {
        "damaged": f"evaluation/{damaged.name}",
        "made more than 2 days ago": f"evaluation/{old.name}",
        "left by a run that ended": f"evaluation/{scrap.name}",
        "of an earlier version": flat.name,
    }
    assert {path.name for path in store.root.rglob("*") if path.is_file()} == {
        good.name, young.name, "evaluation.parquet", *(path.name for path in strangers)
    }  # fmt: skip


def test_the_lock_of_a_long_computation_is_not_collected(tmp_path):
    store, key = Store(tmp_path), {"kind": "layers"}
    with store.claim(key, wait=True):
        (lock,) = (tmp_path / "locks").iterdir()
        os.utime(lock, (0, 0))
        assert len(store.gc()) == 0
        assert lock.is_file()
        with Store(tmp_path).claim(key, wait=False) as ours:
            assert not ours
    lock.touch()
    os.utime(lock, (0, 0))
    assert list(store.gc().why) == ["left by a run that ended"]
