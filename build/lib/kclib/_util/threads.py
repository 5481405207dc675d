"""Work side by side on threads, cut so that the result does not depend on how many there are."""

import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import faiss

from kclib._util import checks

_BLOCK = 1 << 15
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
    call: Callable[[int], object], count: int, n_threads: int, done: Callable[[float], None] | None = None
) -> list:
    """Return ``[call(0), ..., call(count - 1)]``, computed on threads; `done` hears of shares of the work.

    faiss is held to one thread in each: its own would wait for each other.
    """
    results = []
    with ThreadPoolExecutor(n_threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        for result in pool.map(call, range(count)):
            results.append(result)
            if done:
                done(1 / count)
    return results


def blocks(n: int) -> list[slice]:
    """Return slices that cut n points into blocks of bounded memory."""
    return [slice(start, min(n, start + _BLOCK)) for start in range(0, n, _BLOCK)]
