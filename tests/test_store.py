import os
import tempfile

import numpy as np
import pytest
from disks import full_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kclib.errors import StorageError
from kclib.store import Entry, Store

KEY = {"model": "vgg16", "k": 16, "nested": {"a": [1, 2], "b": None}}
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


@settings(deadline=None, max_examples=60)
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
    turned = {"nested": {"b": None, "a": [1, 2]}, "k": 16, "model": "vgg16"}
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
    assert list(store.root.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="could not be written"):
        Store(tmp_path / "file" / "store").put(entry())


def test_the_default_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("KCLIB_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("KCLIB_STORE", raising=False)
    assert Store().put(entry()).parent == tmp_path / "data" / "cache" / "store"
    monkeypatch.setenv("KCLIB_STORE", str(tmp_path / "elsewhere"))
    assert Store().get(KEY) is None
    assert Store().put(entry()).parent == tmp_path / "elsewhere"
