"""The threads that torch computes with, for compiled code of our own."""

import ctypes
import functools
import sys
from pathlib import Path

import torch


@functools.cache
def start_of_team():
    """Return the C function that runs compiled work on torch's threads; None where it cannot be found.

    For a while after each work torch's threads spin and wait for more. To wake others would take as long as a
    small convolution, and those would disturb torch's. In a process that was forked after torch used its
    threads, they cannot be started, by this or by torch.

    Returns
    -------
    ctypes function or None
        GNU OpenMP's ``GOMP_parallel``, which LLVM's and Intel's libraries have too. It takes the address of a
        C function of one pointer, that pointer, the number of threads, and 0.
    """
    if sys.platform != "linux":
        return None
    try:  # asked of torch's library, which finds that of its own threads: a process may hold several
        start = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    start.restype, start.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    return start
