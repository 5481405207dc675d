"""How long packed networks take beside dense ones, torch's and onnxruntime's, on the same images."""

import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pandas as pd
import torch
import torchvision
from torch import nn
from tqdm.auto import tqdm

import kclib
from kclib import models
from kclib._util import files
from kclib.compression import _layers, latency

BATCHES = (1, 4, 16, 64)
SECONDS = 3  # that each batch of each network is run for
OUT = Path("docs/latency.json")


def networks() -> dict[str, tuple[nn.Module, tuple[int, int, int]]]:
    """Return compressed networks, and the shape of the images that each takes."""
    vgg = kclib.load_model("vgg16-fashion")
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18(num_classes=10).eval()  # time does not depend on its weights
    shape = models.input_shape(vgg)
    found = {}
    for name, network in (("VGG-16", vgg), ("ResNet-18", resnet)):
        for scope, k, how in (("global", 4096, "for all"), ("layer", 256, "a layer")):
            bank = kclib.extract(network)
            if scope == "layer":  # no layer has fewer kernels than clusters
                bank = bank.only(*(layer.name for layer in bank.layers if layer.n_kernels >= k))
            small = kclib.compress(network, kclib.cluster(bank, k, scope=scope), precision="fp16")
            found[f"{name}, K = {k:,} {how}"] = models.network_of(small), shape
    return found


def calls(packed: nn.Module, images: torch.Tensor, folder: Path) -> dict[str, Callable]:
    """Return what is timed: the packed network, all of it decoded too, and the same network dense."""
    decoding = copy.deepcopy(packed)
    for layer in _layers.clustered(decoding).values():
        layer.way = "decoded"
    dense = kclib.expand(packed, inputs=False)
    last = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    images_last = images.contiguous(memory_format=torch.channels_last)
    path = folder / "dense.onnx"
    if not path.exists():
        kclib.export(packed, path, shape=tuple(images.shape[1:]), dense=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or it slows what runs next
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name, array = session.get_inputs()[0].name, images.numpy()
    return {
        "packed": lambda: packed(images),
        "decoded": lambda: decoding(images),
        "dense": lambda: dense(images),
        "dense, channels_last": lambda: last(images_last),
        "onnxruntime": lambda: session.run(None, {name: array}),
    }


@torch.inference_mode()
def alternating(calls: dict[str, Callable]) -> dict[str, list[float]]:
    """Time calls in turn, so that what else the machine does falls on each; milliseconds.

    Every other round goes backwards: what ran before leaves threads and caches as it needed them.
    """
    times, end, order = {name: [] for name in calls}, None, list(calls)
    while end is None or time.perf_counter() < end or len(times["dense"]) < 5:
        order.reverse()
        for name in order:
            start = time.perf_counter()
            calls[name]()
            times[name].append(1e3 * (time.perf_counter() - start))
        if end is None:  # the first round only warms up
            times, end = {name: [] for name in calls}, time.perf_counter() + SECONDS
    return times


def row(times: dict[str, list[float]]) -> dict[str, float]:
    """Return medians, and the medians of each turn's ratios to the faster dense layout."""
    medians = {name: statistics.median(each) for name, each in times.items()}
    dense = min(("dense", "dense, channels_last"), key=medians.get)

    def ratio(name: str) -> float:
        return statistics.median(x / y for x, y in zip(times[name], times[dense], strict=True))

    return {
        **{f"{name} (ms)": value for name, value in medians.items()},
        **{f"{name} / dense": ratio(name) for name in times if not name.startswith("dense")},
    }


def resident(packed: nn.Module) -> float:
    """Return the bytes of a network's convolutions as a share of their dense weights'."""
    layers = _layers.clustered(packed).values()
    held = {id(x): x.nbytes for layer in layers for x in (layer.indices, layer.codebook.values)}
    return sum(held.values()) / sum(4 * layer.n_kernels * layer.codebook.table().shape[1] for layer in layers)


def main() -> None:
    rows = []
    for name, (packed, shape) in tqdm(networks().items(), desc="latency", unit="network"):
        with tempfile.TemporaryDirectory() as folder:
            for batch in BATCHES:
                images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
                timed = calls(packed, images, Path(folder))
                theirs = {name: timed[name] for name in ("dense", "dense, channels_last", "onnxruntime")}
                del timed["onnxruntime"]  # what runs after it waits for its threads
                found = row(alternating(theirs)) | row(alternating(timed))
                ways = latency.ways(packed, shape, batch).way
                straight = f"{(ways == 'indices').sum()} of {len(ways)}"
                how = {"resident / dense": resident(packed), "straight": straight}
                rows.append({"network": name, "batch": batch, **found, **how})
    print(pd.DataFrame(rows).round(3).to_string(index=False))
    found = {"threads": torch.get_num_threads(), "rows": rows}
    with files.replacing(OUT) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {OUT}")


if __name__ == "__main__":
    main()
