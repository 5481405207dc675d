"""Accuracy at equal bytes: clustering as it is and trained, its peers, and the dense model trained too.

With ``ONLY`` in the environment one of the networks is measured.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import nn

import kclib
from benchmarks import networks, nnc
from kclib import models, plots, recovery
from kclib._util import files
from kclib.compression import byte_counts
from kclib.evaluation import peers
from kclib.recovery import _sequential

OUT = Path("reports/bench/recovery.json")
SHARES = (32, 48, 64, 100, 140)  # the convolutions keep one byte of so many
RECIPE = replace(recovery.RECIPE, epochs=3)
SMALL = replace(RECIPE, images=1600, held_back=1000)  # for inputs of four times the pixels
SON = ((64, False), (512, False), (512, True))
QPS = (-24, -23, -22, -21, -20, -19, -18)  # of the standard: from about 1/30 to 1/160
RESNET_SHARES = (16, 24, 32, 48, 64)
RESNET_QPS = (-24, -22, -21, -20, -19, -18, -17)
PRECISION = "bf16"
AGAINST = "clustering less the standard"


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

    model: kclib.Model
    images: networks.Images
    test: kclib.ImageSet
    dense: kclib.Evaluation
    recipe: object
    folder: Path
    rows: Rows
    shares: tuple[int, ...] = SHARES
    qps: tuple[int, ...] = QPS

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense convolutions."""
        return byte_counts.convolution_bytes(self.model)

    def key(self, method: str, share: int | None, setting: str = "") -> dict:
        """Return what a row is found by."""
        return {"network": self.model.name, "method": method, "share": share, "setting": setting}

    def measure(self, key: dict, n_bytes: int, network: nn.Module, seconds: float) -> None:
        """Evaluate a network on the test images and keep its row."""
        model = models.like(self.model, models.network_of(network))
        answers = kclib.evaluate(model, self.test, precision=PRECISION)
        lost = kclib.drop(self.dense, answers).points
        self.rows.put(
            key
            | {"bytes": n_bytes, "ratio": self.dense_bytes / n_bytes, "top1": answers.top1.estimate}
            | {"drop": lost.estimate, "drop_low": lost.low, "drop_high": lost.high, "seconds": seconds}
        )

    def trained(self, key: dict, n_bytes: int, network: nn.Module, name: str) -> None:
        """Fine-tune a network towards the dense one's answers, and measure what comes of it."""
        if self.rows.get(**key):
            return
        start, model = time.perf_counter(), models.like(self.model, models.network_of(network))
        found = kclib.finetune(
            model,
            self.images.train,
            self.folder / f"{name}.pt",
            teacher=self.model,
            recipe=self.recipe,
        )
        self.measure(key, n_bytes, found.model, time.perf_counter() - start)


def clustered(
    bench: Bench, share: int, others: Callable[[kclib.Model], nn.Module] | None = None
) -> nn.Module:
    """Return the compressed network that a budget buys, made once and kept in a file."""
    path = bench.folder / f"{bench.model.name}-{share}.safetensors"
    if path.exists():
        return kclib.load(path, architecture=bench.model)
    start = time.perf_counter()
    base = others(bench.model) if others else bench.model
    # what is compressed already
    spent = byte_counts.stored_bytes(base) - byte_counts.convolution_bytes(base)
    n_bytes = bench.dense_bytes / share - spent
    chosen = kclib.shrink(base, bench.images.calibration, n_bytes=n_bytes, dense=bench.model)
    print(chosen.table.to_string(index=False), flush=True)
    packed = kclib.compress(chosen.model, chosen.clustering, precision="fp16")
    kclib.save(packed, path, architecture=None)
    bench.rows.put(
        bench.key("search", share) | {"seconds": time.perf_counter() - start, "price": chosen.price}
    )
    return kclib.load(path, architecture=bench.model)


def own(bench: Bench, others: Callable | None = None) -> None:
    """Measure clustering at each budget, corrected."""
    for share in bench.shares:
        network, key = clustered(bench, share, others), bench.key("clustering, corrected", share)
        if not bench.rows.get(**key):
            took = bench.rows.get(**bench.key("search", share))["seconds"]
            bench.measure(key, byte_counts.stored_bytes(network), network, took)


def own_trained(bench: Bench) -> None:
    """Measure clustering at each budget, trained too, and the control."""
    for share in bench.shares:
        network, key = clustered(bench, share), bench.key("clustering, trained", share)
        bench.trained(key, byte_counts.stored_bytes(network), network, f"{bench.model.name}-{share}")
    dense = bench.key("dense, trained as long", None)
    bench.trained(dense, bench.dense_bytes, bench.model, f"{bench.model.name}-dense")


def others_at(bench: Bench, share: int) -> None:
    """Measure the peers at one budget."""
    if bench.rows.get(network=bench.model.name, share=share, peers="done"):
        return
    start = time.perf_counter()
    found = peers.at_bytes(bench.model, int(bench.dense_bytes / share))
    took = (time.perf_counter() - start) / len(found)
    for peer in found:
        key = bench.key(peer.name, share, peer.setting)
        if not bench.rows.get(**key):
            bench.measure(key, peer.bytes, peer.network, took)
    bench.rows.put(bench.key("peers", share) | {"peers": "done"})


def others(bench: Bench) -> None:
    """Measure the peers at each budget, and Son et al.'s recipe at its own bytes, also fine-tuned."""
    for share in bench.shares:
        others_at(bench, share)
    for n_clusters, turned in SON:
        peer = peers.son(bench.model, n_clusters, turned=turned)
        key = bench.key(peer.name, None, peer.setting)
        if not bench.rows.get(**key):
            bench.measure(key, peer.bytes, peer.network, 0.0)
    packed = kclib.compress(bench.model, peer.clustering, precision="fp16")
    bench.trained(bench.key(f"{peer.name}, trained", None, peer.setting), peer.bytes, packed, "son")


def standard(bench: Bench) -> None:
    """Measure the standard for coding networks, as it is and corrected by the images that ours is."""
    for qp in bench.qps:
        start = time.perf_counter()
        keys = [bench.key(name, None, f"qp {qp}") for name in (nnc.NAME, nnc.CORRECTED)]
        if all(bench.rows.get(**key) for key in keys):
            continue
        decoded, n_bytes = nnc.coded(bench.model, qp)
        bench.measure(keys[0], n_bytes, decoded, time.perf_counter() - start)
        better, more = nnc.corrected(decoded, bench.model, bench.images.calibration)
        bench.measure(keys[1], n_bytes + more, better, time.perf_counter() - start)


def against_standard(bench: Bench) -> None:
    """Measure what clustering loses beyond the standard on the same test images, which gets more bytes.

    At each budget that is the row of the standard, as it is or corrected, that loses least of those with the
    next number of bytes.
    """
    rows = pd.DataFrame([x for x in bench.rows.rows if x["network"] == bench.model.name])
    for share in bench.shares:
        key, ours = bench.key(AGAINST, share), bench.rows.get(**bench.key("clustering, corrected", share))
        if ours is None or bench.rows.get(**key):
            continue
        larger = rows[rows.method.isin([nnc.NAME, nnc.CORRECTED]) & (rows.bytes >= ours["bytes"])]
        nearest = larger.loc[larger.groupby("method").bytes.idxmin()]
        theirs = nearest.loc[nearest["drop"].idxmin()]
        decoded, _ = nnc.coded(bench.model, int(theirs.setting.removeprefix("qp ")))
        if theirs.method == nnc.CORRECTED:
            decoded, _ = nnc.corrected(decoded, bench.model, bench.images.calibration)
        before, after = (
            kclib.evaluate(models.like(bench.model, models.network_of(x)), bench.test, precision=PRECISION)
            for x in (decoded, clustered(bench, share))
        )
        lost = kclib.drop(before, after).points
        bench.rows.put(
            key
            | {
                "setting": f"{theirs.method}, {theirs.setting}",
                "bytes": ours["bytes"],
                "theirs": theirs.bytes,
            }
            | {"less": lost.estimate, "less_low": lost.low, "less_high": lost.high}
        )


def pointwise(images: kclib.ImageSet) -> Callable[[kclib.Model], nn.Module]:
    """Return what clusters the kernels of 1×1 and 7×7 pixels of a network, and packs them."""

    def compressed(model: kclib.Model) -> nn.Module:
        network = model
        for size, k in ((1, 32), (7, 64)):
            found = _sequential.correct(network, images, k, size=size, dense=model)
            network = kclib.compress(found.model, found.clustering, precision="fp16")
        return network

    return compressed


def bench_of(
    model: kclib.Model, images: networks.Images, recipe, folder: Path, rows: Rows, limit: int | None = None
) -> Bench:
    """Evaluate the dense model and return what it is measured in."""
    test = kclib.load_data(limit=limit)
    dense = kclib.evaluate(model, test, precision=PRECISION)
    bench = Bench(model, images, test, dense, recipe, folder, rows)
    key = bench.key("dense", None)
    if not rows.get(**key):
        bench.measure(key, bench.dense_bytes, model, 0.0)
    return bench


def picture(table: pd.DataFrame) -> None:
    """Draw all methods of the shipped model at equal bytes."""
    fig, ax = plt.subplots(figsize=(11, 6), layout="constrained")
    plots.equal_bytes(table, ax=ax)
    with files.replacing(OUT.with_suffix(".png")) as temporary:
        fig.savefig(temporary, dpi=150, format="png")


def on_fashion(folder: Path, rows: Rows) -> None:
    """Measure the shipped model, with all peers, on Fashion-MNIST."""
    shipped = bench_of(kclib.load_model(), networks.images(), RECIPE, folder, rows)
    own(shipped)
    standard(shipped)
    against_standard(shipped)
    own_trained(shipped)
    others(shipped)


def on_resnet(folder: Path, rows: Rows) -> None:
    """Measure a ResNet-18 on Fashion-MNIST, and the standard on it."""
    images = networks.images()
    bench = bench_of(networks.resnet18(folder), images, RECIPE, folder, rows)
    bench = replace(bench, shares=RESNET_SHARES, qps=RESNET_QPS)
    own(bench, pointwise(images.calibration))
    standard(bench)
    against_standard(bench)
    own_trained(bench)


def on_probed(folder: Path, rows: Rows) -> None:
    """Measure ImageNet's VGG-16 with a linear probe, where its weights are given."""
    if (features := networks.features_file()) is not None:
        probed = networks.probed_vgg16(features, folder)
        bench = bench_of(probed, networks.fewer(networks.images()), SMALL, folder, rows, limit=2000)
        own(bench)
        own_trained(bench)


NETWORKS = {"fashion": on_fashion, "resnet18": on_resnet, "probed": on_probed}


def main() -> None:
    rows, folder = Rows(OUT), files.data_dir() / "cache" / "recovery"
    folder.mkdir(parents=True, exist_ok=True)
    for name in [os.environ["ONLY"]] if "ONLY" in os.environ else NETWORKS:
        NETWORKS[name](folder, rows)
    table = pd.DataFrame(rows.rows).dropna(subset="top1")
    picture(table[table.network == "vgg16-fashion"])
    print(
        table[["network", "method", "share", "setting", "bytes", "ratio", "top1", "drop"]].to_string(
            index=False
        )
    )


if __name__ == "__main__":
    main()
