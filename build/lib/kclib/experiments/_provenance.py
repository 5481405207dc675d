"""Who computed something: when, with which versions, on which machine."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

_PACKAGES = ("kclib", "torch", "torchvision", "faiss-cpu", "scikit-learn", "umap-learn", "numpy")


def stamp() -> dict[str, str]:
    """Return what a reader needs to make a result again: ``made``, ``versions``, ``commit``, ``machine``."""
    return {"made": datetime.now(UTC).isoformat(timespec="seconds")} | _of_this_process()


@cache
def _of_this_process() -> dict[str, str]:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES)
    return {
        "versions": f"Python {platform.python_version()}, {versions}",
        "commit": _commit(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:  # no git here
        return "unknown"
    return found.stdout.strip() or "unknown"
