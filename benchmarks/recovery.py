"""Accuracy at equal bytes: clustering as it is and trained, its peers, and the dense model trained too."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from benchmarks import networks
from kclib import (
    budget,
    checkpoint,
    compression,
    datasets,
    evaluation,
    files,
    footprint,
    kernels,
    models,
    peers,
    recovery,
    sensitivity,
    sequential,
)
from kclib.evaluation import Evaluation

OUT = Path("reports/bench/recovery.json")
SHARES = (16, 24, 32, 48)  # the convolutions keep one byte of so many
RECIPE = replace(recovery.RECIPE, epochs=3)
SMALL = replace(RECIPE, images=3200)  # for inputs of four times the pixels
SON = ((64, False), (512, False), (512, True))
PRECISION = "bf16"


class Rows:
    """Rows of the table as they are measured, kept in a file after each and found there again."""

    def __init__(self, path: Path):
        self.path = path
        self.rows = json.loads(path.read_text())["rows"] if path.exists() else []

    def get(self, **key) -> dict | None:
        """Return the row with this key, if it was measured."""
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def put(self, row: dict) -> None:
        """Keep a row."""
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        self.rows.append(row)
        found = {"threads": torch.get_num_threads(), "precision": PRECISION, "rows": self.rows}
        with files.replacing(self.path) as temporary:
            temporary.write_text(json.dumps(found, indent=1))


@dataclass(frozen=True)
class Bench:
    """A model, what it is measured on and by, and where what takes long is kept."""

    model: models.Model
    images: networks.Images
    test: datasets.ImageSet
    dense: Evaluation
    recipe: object
    folder: Path
    rows: Rows

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense convolutions."""
        return footprint.convolution_bytes(self.model.network)

    def key(self, method: str, share: int | None, setting: str = "") -> dict:
        """Return what a row is found by."""
        return {"network": self.model.name, "method": method, "share": share, "setting": setting}

    def measure(self, key: dict, n_bytes: int, network: nn.Module, seconds: float) -> None:
        """Evaluate a network on the test images and keep its row."""
        answers = evaluation.evaluate(replace(self.model, network=network), self.test, precision=PRECISION)
        lost = evaluation.drop(self.dense, answers).points
        self.rows.put(
            key
            | {"bytes": n_bytes, "ratio": self.dense_bytes / n_bytes, "top1": answers.top1.estimate}
            | {"drop": lost.estimate, "drop_low": lost.low, "drop_high": lost.high, "seconds": seconds}
        )

    def trained(self, key: dict, n_bytes: int, network: nn.Module, name: str) -> None:
        """Fine-tune a network towards the dense one's answers, and measure what comes of it."""
        if self.rows.get(**key):
            return
        start, model = time.perf_counter(), replace(self.model, network=network)
        found = recovery.finetune(
            model,
            self.images.train,
            self.folder / f"{name}.pt",
            teacher=self.model.network,
            recipe=self.recipe,
        )
        self.measure(key, n_bytes, found.network, time.perf_counter() - start)


def stored_bytes(network: nn.Module) -> int:
    """Return the bytes of all convolutions of a compressed network, its indices entropy-coded."""
    total = footprint.convolution_bytes(network)
    for codebook, members in footprint.by_codebook(network):
        coded = checkpoint.coded(codebook, members)
        fixed = sum(module.indices.numel() for module in members.values())
        total += fixed if coded is None else coded.index_bytes + coded.table_bytes
        total += len(codebook.values) * footprint.row_bytes(codebook.values[0].numel(), codebook.precision)
        biases = [module.bias for module in members.values() if module.bias is not None]
        total += sum(bias.numel() * bias.element_size() for bias in biases)
        scales = [module.scales for module in members.values() if module.scales is not None]
        total += sum(x.numel() * footprint.scale_type(codebook.precision).itemsize for x in scales)
    return total


def clustered(
    bench: Bench, share: int, others: Callable[[models.Model], nn.Module] | None = None
) -> nn.Module:
    """Return the compressed network that a budget buys, made once and kept in a file."""
    path = bench.folder / f"{bench.model.name}-{share}.safetensors"
    if path.exists():
        return checkpoint.load(path, architecture=bench.model).network
    start = time.perf_counter()
    base = others(bench.model) if others else bench.model.network
    model = replace(bench.model, network=base)
    bank = kernels.extract(base)
    weights = sensitivity.weights(bench.model, bench.images.calibration, bank)
    spent = stored_bytes(base) - footprint.convolution_bytes(base)  # by what is compressed already

    def build(scope, n_clusters):
        found = sequential.cluster(
            model,
            bench.images.calibration,
            n_clusters,
            scope=scope,
            dense=bench.model.network,
            weights=weights,
        )
        return found.network, found.clustering

    chosen = budget.allocate(
        model, bench.images.held_back, bank, weights, n_bytes=bench.dense_bytes / share - spent,
        scopes=("layer",), build=build,
    )  # fmt: skip
    print(chosen.table.to_string(index=False), chosen.n_clusters, flush=True)
    packed = compression.compress(chosen.network, chosen.clustering, precision="fp16")
    checkpoint.save(packed, path, architecture=None)
    bench.rows.put(
        bench.key("search", share) | {"seconds": time.perf_counter() - start, "clusters": chosen.n_clusters}
    )
    return checkpoint.load(path, architecture=bench.model).network


def own(bench: Bench, others: Callable | None = None) -> None:
    """Measure clustering at each budget, as it is and trained, and the control."""
    for share in SHARES:
        network = clustered(bench, share, others)
        n_bytes, key = stored_bytes(network), bench.key("clustering, corrected", share)
        if not bench.rows.get(**key):
            bench.measure(key, n_bytes, network, bench.rows.get(**bench.key("search", share))["seconds"])
        bench.trained(
            bench.key("clustering, trained", share), n_bytes, network, f"{bench.model.name}-{share}"
        )
    dense = bench.key("dense, trained as long", None)
    bench.trained(dense, bench.dense_bytes, bench.model.network, f"{bench.model.name}-dense")


def others(bench: Bench) -> None:
    """Measure the peers at each budget, and Son et al.'s recipe at its own bytes, also fine-tuned."""
    for share in SHARES:
        if bench.rows.get(network=bench.model.name, share=share, peers="done"):
            continue
        start = time.perf_counter()
        found = peers.at_bytes(bench.model.network, int(bench.dense_bytes / share))
        took = (time.perf_counter() - start) / len(found)
        for peer in found:
            key = bench.key(peer.name, share, peer.setting)
            if not bench.rows.get(**key):
                bench.measure(key, peer.bytes, peer.network, took)
        bench.rows.put(bench.key("peers", share) | {"peers": "done"})
    for n_clusters, turned in SON:
        peer = peers.son(bench.model.network, n_clusters, turned=turned)
        key = bench.key(peer.name, None, peer.setting)
        if not bench.rows.get(**key):
            bench.measure(key, peer.bytes, peer.network, 0.0)
    packed = compression.compress(bench.model.network, peer.clustering, precision="fp16")
    bench.trained(bench.key(f"{peer.name}, trained", None, peer.setting), peer.bytes, packed, "son")


def pointwise(images: datasets.ImageSet) -> Callable[[models.Model], nn.Module]:
    """Return what clusters the kernels of 1×1 and 7×7 pixels of a network, and packs them."""

    def compressed(model: models.Model) -> nn.Module:
        network = model.network
        for size, k in ((1, 32), (7, 64)):
            found = sequential.cluster(
                replace(model, network=network), images, k, size=size, dense=model.network
            )
            network = compression.compress(found.network, found.clustering, precision="fp16")
        return network

    return compressed


def bench_of(model: models.Model, images: networks.Images, recipe, folder: Path, rows: Rows) -> Bench:
    """Evaluate the dense model and return what it is measured in."""
    test = datasets.load()
    dense = evaluation.evaluate(model, test, precision=PRECISION)
    bench = Bench(model, images, test, dense, recipe, folder, rows)
    key = bench.key("dense", None)
    if not rows.get(**key):
        bench.measure(key, bench.dense_bytes, model.network, 0.0)
    return bench


def main() -> None:
    rows, images = Rows(OUT), networks.images()
    folder = files.data_dir() / "cache" / "recovery"
    folder.mkdir(parents=True, exist_ok=True)
    shipped = bench_of(models.load(), images, RECIPE, folder, rows)
    own(shipped)
    own(bench_of(networks.resnet18(folder), images, RECIPE, folder, rows), pointwise(images.calibration))
    others(shipped)
    if (features := networks.features_file()) is not None:
        own(bench_of(networks.probed_vgg16(features, folder), images, SMALL, folder, rows))
    table = pd.DataFrame(rows.rows).dropna(subset="top1")
    print(
        table[["network", "method", "share", "setting", "bytes", "ratio", "top1", "drop"]].to_string(
            index=False
        )
    )


if __name__ == "__main__":
    main()
