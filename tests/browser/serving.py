"""Servers for browser tests: started on a free port of the loopback, stopped at the end."""

import contextlib
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def running(command: Sequence[str], ready: str, folder: Path, seconds: float = 60) -> Iterator[None]:
    """Run a server in `folder` until the block ends; it has begun once `ready` answers."""
    log = folder / "server.log"
    with log.open("w") as out, subprocess.Popen(command, cwd=folder, stdout=out, stderr=out) as process:
        try:
            end = time.monotonic() + seconds
            while not _answers(ready):
                if time.monotonic() > end or process.poll() is not None:
                    pytest.fail(f"{command[2]} did not start:\n{log.read_text()[-2000:]}")
                time.sleep(0.3)
            yield
        finally:
            process.terminate()
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:  # one that does not end must not stop the tests for good
                process.kill()


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=5).close()
    except urllib.error.HTTPError:
        return True  # not what was asked for, but an answer
    except OSError:
        return False
    return True
