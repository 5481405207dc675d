"""Import this before processes are forked off: what a first sweep loads is then there for all."""

import tempfile
import threading

import torch
from tiny import tiny_data, tiny_model
from tqdm import tqdm

from kclib import experiments
from kclib.store import Store

torch.set_num_threads(1)
tqdm.set_lock(threading.RLock())  # by default one that forks share, which a killed one may never give back
with tempfile.TemporaryDirectory() as _folder:
    experiments.sweep(tiny_model(), tiny_data(), (1, 5), methods=("plain", "turned"), store=Store(_folder))
