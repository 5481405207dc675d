import signal
import sys
import tempfile
from pathlib import Path

import matplotlib
import pytest
import torch
import what_happens
from hypothesis import settings

_ROWS = pytest.StashKey()
matplotlib.use("Agg")
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
settings.register_profile("quick", max_examples=40)
settings.load_profile("quick")  # in place of 100; a test's own number stays


def pytest_collection_modifyitems(config, items):
    """Begin with notebooks, which take minutes: begun last, all would wait for one processor."""
    items.sort(key=lambda item: not item.path.stem.startswith("test_notebooks"))
    if what_happens.WRITING:
        config.stash[_ROWS] = what_happens.Rows()
        items[:] = [item for item in items if "seen" in item.fixturenames]


def pytest_sessionfinish(session, exitstatus):
    """Write the page, if that was asked for."""
    if what_happens.WRITING and exitstatus == 0:
        session.config.stash[_ROWS].write()


@pytest.fixture
def seen(request):
    """Tell the page *What happens if* a kind of fault, what happens, and what the user sees."""
    return request.config.stash.get(_ROWS, what_happens.Rows()).add


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


@pytest.fixture(scope="module")
def one_thread():
    """Networks this small only wait for more, and longest where other processes run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def kclib(monkeypatch, capsys):
    """Run the command line in this process; answer its exit code, output and error text."""

    def run(*arguments):
        from kclib import cli

        monkeypatch.setattr(sys, "argv", ["kclib", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        said = capsys.readouterr()
        return exit_.value.code, said.out, said.err

    return run


@pytest.fixture
def open_folder():
    """A folder that other users reach too, unlike those of `tmp_path`."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
