"""A file system that is full, for the tests of what is written."""

import contextlib
import resource


@contextlib.contextmanager
def full_disk(largest: int = 20_000):
    """
    The file system refuses any file above `largest` bytes.

    The limit holds for the whole process, so for pytest's own output too where that goes to a long log file:
    it is lifted before the test ends, not by a fixture after pytest has written the test's dot.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
