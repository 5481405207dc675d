"""How much memory there is, by whatever limits it, and a sentence where that is not enough."""

import math
import re
import subprocess
import sys
from pathlib import Path

import psutil

from kclib.errors import NotEnoughMemoryError, reason

_GROUPS = Path("/sys/fs/cgroup")
_WORK = 1 << 30  # bytes of addresses that the shipped network's work takes beside what is loaded
_PATIENCE = 60  # seconds: where addresses are lacking, loading may also hang
_NOT_LOADED = re.compile("failed to map|cannot allocate|shared object file|cannot create thread", re.I)
# Loads what commands load, works a little, and prints how many bytes of addresses are taken.
_PROBE = """
import numpy, psutil
from kclib import kmeans
from kclib.experiments import _first_try
kmeans.fit(numpy.random.default_rng(0).normal(size=(200, 9)).astype("f4"), 3)
print(psutil.Process().memory_info().vms)
"""


def free() -> int:
    """Return how many bytes this process may still take.

    It is the least of what the machine has, what the control group (a container) may take, and the addresses
    that ``ulimit -v`` leaves.
    """
    addresses = _addresses() - psutil.Process().memory_info().vms
    return int(max(0, min(psutil.virtual_memory().available, _group(), addresses)))


def check_addresses() -> None:
    """Raise a `NotEnoughMemoryError` if ``ulimit -v`` leaves too few addresses to work with.

    Libraries that find too few crash or hang, so they are tried in a process of their own first.
    """
    limit = _addresses()
    if limit == math.inf:
        return
    command = [sys.executable, "-c", _PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=True)
        taken = int(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        raise _too_few("does not suffice to load PyTorch and numba") from None
    if taken + _WORK > limit:
        raise _too_few(
            f"is too little: PyTorch and numba take {_gib(taken)} of it, though less of memory, "
            f"and work takes {_gib(_WORK)} or more"
        )


def told(error: Exception) -> Exception:
    """Return an error as a `NotEnoughMemoryError` if it comes of too little memory; else as it is."""
    if isinstance(error, NotEnoughMemoryError):
        return error
    if (
        _addresses() < math.inf
        and isinstance(error, (ImportError, OSError))
        and _NOT_LOADED.search(str(error))
    ):
        return _too_few(f"does not suffice to load what this needs ({reason(error)})")
    if is_memory(error):
        return NotEnoughMemoryError(
            f"memory does not suffice ({reason(error)}); {_gib(free())} are free: give fewer images or "
            "clusters, or more memory."
        )
    return error


def is_memory(error: BaseException) -> bool:
    """Tell whether an error of Python, numpy or torch says that there is too little memory."""
    ours = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)  # torch has no type for it
    return ours or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _too_few(what: str) -> NotEnoughMemoryError:
    return NotEnoughMemoryError(
        f"the limit of {_gib(_addresses())} on addresses (ulimit -v) {what}; raise it, or limit memory "
        "itself, as containers and systemd-run do."
    )


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"


def _addresses() -> float:
    """Return the most bytes that this process may address."""
    try:
        import resource  # which Windows lacks
    except ImportError:
        return math.inf
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return math.inf if limit == resource.RLIM_INFINITY else limit


def _group() -> float:
    """Return how many bytes the control groups of this process may still take, of either version."""
    try:
        own = Path("/proc/self/cgroup").read_text()
    except OSError:
        return math.inf
    left = [math.inf]
    for root, pattern, names in (
        (_GROUPS, r"^0::/(.*)$", ("memory.max", "memory.current", "inactive_file")),
        (
            _GROUPS / "memory",
            r"^\d+:(?:.*,)?memory(?:,.*)?:/(.*)$",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ):
        if found := re.search(pattern, own, re.MULTILINE):
            folder = root / found[1]
            left += [_left(x, *names) for x in (folder, *folder.parents) if x.is_relative_to(root)]
    return min(left)


def _left(folder: Path, limit: str, used: str, cached: str) -> float:
    """Return how many bytes one control group may still take; cached files give way."""
    try:
        most, now = (int((folder / name).read_text()) for name in (limit, used))
        gives_way = re.search(rf"^{cached} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # no such group here, or no limit ("max")
        return math.inf
    return most - now + (int(gives_way[1]) if gives_way else 0)
