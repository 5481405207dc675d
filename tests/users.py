"""Other users than the one who runs the tests, for root."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

NOBODY = 65534


@contextlib.contextmanager
def another_user() -> Iterator[None]:
    """Be an ordinary user in this block; a skip unless root asks. What is imported must be so already."""
    if os.geteuid() != 0:
        pytest.skip("only root can be another user")
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def run_as_nobody(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run Python as a user who may read everything, and write to a folder alone; a skip unless root asks."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("only root, with setpriv, can run a process as another user")
    reading = "+dac_read_search"  # the interpreter may lie in root's home
    command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    command += [f"--inh-caps={reading}", f"--ambient-caps={reading}", sys.executable, "-c", code]
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    given = kept | {"HOME": "/nonexistent", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, check=False)
