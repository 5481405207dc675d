import tracemalloc
import zlib

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from kclib.compression._entropy_coding import coded, decode, encode, packed_counts, unpacked_counts
from kclib.errors import DamagedFileError
from kclib.kmeans._entropy import counts, entropy_bytes


def skewed(n, n_symbols, seed=0, order=None):
    """Return n indices of which the low ones are common: the i-th has a share of about 1 / i."""
    shares = 1 / np.arange(1, n_symbols + 1)
    drawn = np.random.default_rng(seed).choice(n_symbols, n, p=shares / shares.sum())
    return (drawn if order is None else order[drawn]).astype(np.int32)


def decoded(result, i, n, n_symbols):
    """Return a layer's indices from nothing but what is stored."""
    table = result.tables[i] if result.tables[i].size else result.table
    return decode(result.words[i], unpacked_counts(table, n_symbols), n)


@given(st.integers(1, 40), st.integers(0, 300), st.floats(0.01, 5), st.integers(0, 999))
@settings(deadline=None, max_examples=25)
def test_decoded_indices_are_those_encoded(n_symbols, n, evenness, seed):
    draw = np.random.default_rng(seed)
    shares = draw.gamma(evenness, size=n_symbols) + 1e-9
    indices = draw.choice(n_symbols, n, p=shares / shares.sum())
    frequencies = counts(indices, n_symbols)
    back = decode(encode(indices, frequencies), frequencies, n)
    assert back.dtype == np.int32
    np.testing.assert_array_equal(back, indices)


@given(st.integers(0, 200), st.integers(2, 30), st.integers(0, 999))
@settings(deadline=None, max_examples=25)
def test_a_part_is_coded_with_the_frequencies_of_the_whole(n, n_symbols, seed):
    whole = np.random.default_rng(seed).integers(0, n_symbols, 500)
    frequencies = counts(whole, n_symbols)
    np.testing.assert_array_equal(decode(encode(whole[:n], frequencies), frequencies, n), whole[:n])


@pytest.mark.parametrize(("symbol", "n_symbols"), [(0, 1), (0, 5), (3, 5), (4, 5)])
def test_a_single_symbol_takes_no_words(symbol, n_symbols):
    indices = np.full(100, symbol)
    frequencies = counts(indices, n_symbols)
    words = encode(indices, frequencies)
    assert words.size == 0
    np.testing.assert_array_equal(decode(words, frequencies, 100), indices)


@pytest.mark.parametrize("n_symbols", [2, 30, 1000, 8192])
def test_words_come_within_a_percent_of_the_entropy(n_symbols):
    indices = skewed(50_000, n_symbols)
    frequencies = counts(indices, n_symbols)
    words = encode(indices, frequencies)
    bound = entropy_bytes(frequencies)
    assert bound - 8 <= words.nbytes <= 1.01 * bound + 64
    np.testing.assert_array_equal(decode(words, frequencies, 50_000), indices)


@pytest.mark.parametrize(
    ("frequencies", "n_bytes"),
    [
        ([1] * 8, 8 * 3 / 8),
        ([5] * 8, 40 * 3 / 8),
        ([1, 3], (1 * 2 + 3 * np.log2(4 / 3)) / 8),
        ([2, 0, 2], 4 * 1 / 8),
        ([4, 2, 1, 1], (4 * 1 + 2 * 2 + 1 * 3 + 1 * 3) / 8),
        ([7], 0),
        ([0, 7, 0], 0),
        ([0, 0], 0),
    ],
)
def test_entropy_by_hand(frequencies, n_bytes):
    assert entropy_bytes(np.array(frequencies)) == pytest.approx(n_bytes, rel=1e-12)


def test_counts_are_of_all_symbols_also_unused_ones():
    assert counts(np.array([3, 1, 3, 3]), 6).tolist() == [0, 1, 0, 3, 0, 0]


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
@settings(deadline=None, max_examples=25)
def test_packed_counts_are_unpacked_again(frequencies):
    table = packed_counts(np.array(frequencies))
    assert table.dtype == np.uint8
    back = unpacked_counts(table, len(frequencies))
    assert (back.dtype, back.tolist()) == (np.int64, frequencies)


def test_table_of_ordered_counts_takes_a_fraction_of_their_bytes():
    frequencies = np.sort(counts(skewed(100_000, 4096), 4096))[::-1]
    assert packed_counts(frequencies).nbytes < 0.1 * 4 * 4096


@pytest.fixture(scope="module")
def words():
    indices = skewed(2000, 20)
    return encode(indices, counts(indices, 20)), counts(indices, 20)


@pytest.mark.parametrize(
    "damage",
    [
        lambda words: words[:-1],
        lambda words: words[1:],
        lambda words: words[: len(words) // 2],
        lambda words: np.append(words, np.uint32(7)),
        lambda words: np.append(words, np.uint32(0)),
        lambda words: np.insert(words, 0, 7),
        lambda words: np.flip(words),
        lambda words: words ^ np.where(np.arange(len(words)) == len(words) // 2, 1 << 9, 0).astype("<u4"),
    ],
    ids=["last", "first", "half", "more", "zero", "before", "order", "bit"],
)
def test_damaged_words_are_refused(words, damage):
    coded_words, frequencies = words
    with pytest.raises(DamagedFileError, match="the entropy-coded indices are damaged"):
        decode(damage(coded_words), frequencies, 2000)


def test_words_of_more_indices_are_refused(words):
    with pytest.raises(DamagedFileError, match="some are left over"):
        decode(*words, 1999)


def test_words_where_a_single_symbol_needs_none_are_refused(words):
    with pytest.raises(DamagedFileError):
        decode(words[0], np.array([0, 2000, 0]), 2000)


@pytest.mark.parametrize(
    "damage",
    [
        lambda table: np.random.default_rng(0).integers(0, 256, 60, np.uint8),
        lambda table: table[:0],
        lambda table: table[:-1],
        lambda table: table[: len(table) // 2],
        lambda table: table ^ np.where(np.arange(len(table)) == len(table) // 2, 4, 0).astype("u1"),
        lambda table: packed_counts(np.arange(19)),
        lambda table: packed_counts(np.arange(21)),
        lambda table: np.frombuffer(zlib.compress(bytes(81)), "u1"),
        lambda table: np.frombuffer(zlib.compress(b""), "u1"),
    ],
    ids=["garbage", "empty", "last", "half", "bit", "fewer", "more", "byte", "nothing"],
)
def test_damaged_tables_are_refused(damage):
    table = packed_counts(np.arange(20))
    assert unpacked_counts(table, 20).tolist() == list(range(20))
    with pytest.raises(DamagedFileError, match="a table of frequencies is damaged"):
        unpacked_counts(damage(table), 20)


def test_a_table_that_swells_is_refused_before_it_does():
    bomb = np.frombuffer(zlib.compress(bytes(1 << 26), 1), np.uint8)
    tracemalloc.start()
    with pytest.raises(DamagedFileError, match="not that of 100 symbols"):
        unpacked_counts(bomb, 100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * bomb.nbytes < (1 << 26) // 50


def test_layers_that_use_few_symbols_unlike_each_other_have_their_own_tables():
    parts = [skewed(3000, 16, seed, np.roll(np.arange(16), 5 * seed)) for seed in range(3)]
    result = coded(parts, 16)
    assert all(table.size for table in result.tables)
    assert result.table.size == 0
    whole = counts(np.concatenate(parts), 16)
    assert result.index_bytes + result.table_bytes < sum(encode(part, whole).nbytes for part in parts)


def test_layers_of_many_symbols_share_the_table_of_the_group():
    parts = [skewed(2000, 4096, seed) for seed in range(3)]
    result = coded(parts, 4096)
    assert not any(table.size for table in result.tables)
    np.testing.assert_array_equal(unpacked_counts(result.table, 4096), counts(np.concatenate(parts), 4096))
    assert result.table_bytes == result.table.nbytes


def test_one_layer_that_is_unlike_the_others_has_its_own_table():
    alike = [skewed(3000, 64, seed) for seed in range(4)]
    other = 63 - skewed(3000, 64, 9)
    result = coded([*alike, other], 64)
    assert [table.size > 0 for table in result.tables] == [False] * 4 + [True]
    assert result.table.size > 0
    assert result.table_bytes == result.table.nbytes + result.tables[-1].nbytes
    assert result.index_bytes == 4 * sum(len(words) for words in result.words)


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=4),
    st.sampled_from([1, 2, 7, 300]),
    st.booleans(),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=25)
def test_each_layer_is_decoded_from_what_is_stored(sizes, n_symbols, alike, seed):
    draw = np.random.default_rng(seed)
    orders = [np.arange(n_symbols) if alike else draw.permutation(n_symbols) for _ in sizes]
    parts = [
        skewed(n, n_symbols, seed + i, order) for i, (n, order) in enumerate(zip(sizes, orders, strict=True))
    ]
    result = coded(parts, n_symbols)
    for i, part in enumerate(parts):
        np.testing.assert_array_equal(decoded(result, i, len(part), n_symbols), part)
