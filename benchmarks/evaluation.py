"""Images a second of `evaluation.evaluate` against a bare torch loop over ready tensors."""

import json
import statistics
import time
from pathlib import Path

import pandas as pd
import torch

import kclib
from kclib import datasets, models
from kclib._util import files

BATCH, IMAGES, REPEATS = 64, 2000, 5


def bare_loop(network: torch.nn.Module, batches: list[torch.Tensor], precision: str) -> float:
    start = time.perf_counter()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        for inputs in batches:
            network(inputs).argmax(1)
    return time.perf_counter() - start


def main() -> None:
    model, data = kclib.load_model(), kclib.load_data(limit=IMAGES)
    network = models.network_of(kclib.load_model()).to(memory_format=torch.channels_last)
    ready = [
        inputs.contiguous(memory_format=torch.channels_last)
        for inputs, _ in datasets.batches(data, model.preprocess, BATCH)
    ]
    rows = []
    for precision in ("fp32", "bf16"):
        bare_loop(network, ready, precision)  # warm up
        ours, bare = [], []
        for _ in range(REPEATS):  # in turn, so that a drifting machine slows both
            bare.append(bare_loop(network, ready, precision))
            start = time.perf_counter()
            kclib.evaluate(model, data, batch_size=BATCH, precision=precision, progress=False)
            ours.append(time.perf_counter() - start)
        rows.append(
            {
                "precision": precision,
                "bare loop (images/s)": IMAGES / statistics.median(bare),
                "evaluate (images/s)": IMAGES / statistics.median(ours),
                "ratio": statistics.median(b / o for b, o in zip(bare, ours, strict=True)),
            }
        )
    print(pd.DataFrame(rows).round(3).to_string(index=False))
    with files.replacing(Path("reports/bench/evaluation.json")) as temporary:
        temporary.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
