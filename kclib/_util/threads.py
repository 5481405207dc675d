"""Work side by side on threads, cut so that the result does not depend on how many there are."""

import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import faiss
import numpy as np

from kclib._util import checks

_BLOCK = 1 << 15
_HEARD = 0.05  # seconds between questions whether to stop
_SHARED = 1 << 30  # bytes that some batches of images under way may take
# For numba: sums in any order and no care for NaN, for points are finite. Infinities keep their meaning.
FAST = {"reassoc", "contract", "nnan", "nsz"}


def threads(n_threads: int | None = None) -> int:
    """Return `n_threads`, or by default the number of processors this process may use."""
    if n_threads is not None:
        return checks.check_whole("n_threads", n_threads, 1)
    return len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count()))


def can_share_memory() -> bool:
    """Tell whether processes can hand each other arrays here; containers often have little memory for it."""
    if sys.platform != "linux":  # others need no folder for it
        return True
    shared = "/dev/shm"
    return os.access(shared, os.W_OK) and shutil.disk_usage(shared).free >= _SHARED


def side_by_side(
    call: Callable[[int], object],
    count: int,
    n_threads: int,
    done: Callable[[float], object] | None = None,
    stop: np.ndarray | None = None,
) -> list:
    """Return ``[call(0), ..., call(count - 1)]``, computed on threads.

    faiss is held to one thread in each: its own would wait for each other.

    Parameters
    ----------
    call : callable
    count, n_threads : int
    done : callable, optional
        Hears of shares of the work, some of them 0. With `stop`, a true answer asks to stop.
    stop : numpy.ndarray, optional
        bool ``(1,)``: set once `done` has answered true, for compiled code under way to look at.
    """
    results = []

    def heard(share: float) -> None:
        if done and done(share) and stop is not None:
            stop[0] = True

    with ThreadPoolExecutor(n_threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        if stop is not None:
            heard(0.0)
        futures = [pool.submit(call, i) for i in range(count)]
        try:
            for future in futures:
                while stop is not None and not wait([future], _HEARD).done:
                    heard(0.0)
                results.append(future.result())
                heard(1 / count)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


def blocks(n: int) -> list[slice]:
    """Return slices that cut n points into blocks of bounded memory."""
    return [slice(start, min(n, start + _BLOCK)) for start in range(0, n, _BLOCK)]
