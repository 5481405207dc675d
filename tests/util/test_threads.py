import os
import threading
import time

import faiss
import pytest

from kclib._util import threads


@pytest.mark.parametrize("n_threads", [1, 2, 3, 20])
def test_results_come_in_order_whatever_the_number_of_threads(n_threads):
    def late(i):
        time.sleep(0.01 * (5 - i))
        return i * i

    assert threads.side_by_side(late, 5, n_threads) == [0, 1, 4, 9, 16]


def test_nothing_to_do_is_done():
    assert threads.side_by_side(str, 0, 2) == []


def test_calls_run_at_the_same_time():
    meeting = threading.Barrier(2)
    threads.side_by_side(lambda _: meeting.wait(timeout=10), 2, 2)


def test_an_exception_reaches_the_caller():
    def fail(i):
        if i == 3:
            raise KeyError("the fourth")

    with pytest.raises(KeyError, match="the fourth"):
        threads.side_by_side(fail, 5, 2)


@pytest.mark.parametrize("count", [1, 3, 64])
def test_shares_of_the_work_sum_to_one(count):
    shares = []
    threads.side_by_side(str, count, 2, shares.append)
    assert shares == [pytest.approx(1 / count)] * count


def test_faiss_keeps_its_threads_outside_and_has_one_inside():
    before = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(3)
        assert threads.side_by_side(lambda _: faiss.omp_get_max_threads(), 4, 2) == [1] * 4
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(before)


@pytest.mark.parametrize("n", [0, 1, 1000, 1 << 15, (1 << 15) + 1, 100_000, 1 << 17])
def test_blocks_cover_every_point_once_and_in_order(n):
    assert [i for part in threads.blocks(n) for i in range(n)[part]] == list(range(n))
    assert all(part.start < part.stop <= n for part in threads.blocks(n))


def test_blocks_of_more_points_are_more_and_not_longer():
    longest = [max(part.stop - part.start for part in threads.blocks(n)) for n in (10**6, 10**7)]
    assert longest[0] == longest[1] < 10**6


def test_as_many_threads_as_asked_for_or_as_processors():
    assert threads.threads(3) == 3
    assert 1 <= threads.threads() <= os.cpu_count()
