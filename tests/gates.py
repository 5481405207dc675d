"""Gates at which threads of the tests wait, also inside a network."""

import threading

from torch import nn

PATIENCE = 30  # seconds: what takes longer hangs


class Gate:
    """Where a thread waits, once closed, so that a test can do something meanwhile."""

    def __init__(self):
        self.reached, self.open = threading.Event(), threading.Event()
        self.open.set()

    def __call__(self):
        self.reached.set()
        assert self.open.wait(PATIENCE)

    def close(self):
        self.reached.clear()
        self.open.clear()


class Through(nn.Module):
    """Makes a call whenever an input comes by; copies of it make the same call, for it is a function."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        self.call()
        return x
