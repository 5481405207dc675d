import signal
import sys

import matplotlib
import pytest
import torch
from hypothesis import settings

matplotlib.use("Agg")
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
settings.register_profile("fuzz", max_examples=30_000, deadline=None, print_blob=True)  # make fuzz


def pytest_collection_modifyitems(items):
    """Begin with notebooks, which take minutes: begun last, all would wait for one processor."""
    items.sort(key=lambda item: not item.path.stem.startswith("test_notebooks"))


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
