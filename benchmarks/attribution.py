"""The per-layer pass with activations kept, against as many whole evaluations, on the shipped model."""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from kclib import attribution, clustering, datasets, evaluation, files, kernels, models

IMAGES, K = 1000, 256
OUT = Path("reports/bench/attribution.json")


def whole(model: models.Model, made: clustering.Clustering, data: datasets.ImageSet) -> list[float]:
    """Return the accuracies of the rows of `attribution.by_layer`, each from a network of its own."""
    bank, small = kernels.extract(model.network), clustering.quantized(made)
    evaluation.evaluate(model, data, progress=False)
    found = []
    for clustered in [*((x.name, way) for x in bank.layers for way in attribution.WAYS), ("", "all but")]:
        rows = np.concatenate([np.full(x.n_kernels, clustered == (x.name, "alone") or
                                       (clustered[1] == "all but" and clustered[0] != x.name))
                               for x in bank.layers])  # fmt: skip
        weights = np.where(rows[:, None, None], small, bank.weights)
        network = kernels.insert(model.network, kernels.KernelBank(weights, bank.layers, {}))
        found.append(evaluation.evaluate(replace(model, network=network), data, progress=False).top1.estimate)
    return found


def main() -> None:
    model, data = models.load(), datasets.load(limit=IMAGES)
    made = clustering.cluster(kernels.extract(model.network), K)
    start = time.perf_counter()
    table = attribution.by_layer(model, made, data)
    middle = time.perf_counter()
    one_by_one = whole(model, made, data)
    kept, alone = middle - start, time.perf_counter() - middle
    found = {
        "threads": torch.get_num_threads(),
        "images": IMAGES,
        "K": K,
        "activations kept (s)": kept,
        "whole evaluations (s)": alone,
        "whole / kept": alone / kept,
        "the same accuracies": one_by_one == list(table.top1),
        "rows": table.to_dict("records"),
    }
    print(table.round(2).to_string(index=False))
    print({name: value for name, value in found.items() if name != "rows"})
    with files.replacing(OUT) as temporary:
        temporary.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
