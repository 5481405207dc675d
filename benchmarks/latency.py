"""How long packed networks take beside dense ones of torch and onnxruntime, and where a layer's time goes."""

import copy
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import onnxruntime
import pandas as pd
import psutil
import torch
import torchvision
from onnxruntime import quantization
from torch import nn
from tqdm.auto import tqdm

import kclib
from kclib import models
from kclib._util import files
from kclib.compression import _layers, latency

BATCHES = (1, 4, 16, 64)
LARGE = (1, 16)  # batches of 224×224 pixels
SECONDS = 3  # that each batch of each network is run for
ROUNDS = 5  # at least
STARTS = 5  # of fresh processes
LOOK = 0.01  # seconds between looks at their memory
OUT = Path("docs/latency.json")
DENSE = ("dense", "dense, channels_last")


def networks() -> dict[str, models.Model | nn.Module]:
    """Return compressed networks of ten classes for images of 3 channels."""
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18(num_classes=10).eval()  # time does not depend on its weights
    found = {}
    for name, network in (("VGG-16", kclib.load_model("vgg16-fashion")), ("ResNet-18", resnet)):
        for scope, k, how in (("global", 4096, "for all"), ("layer", 256, "a layer")):
            bank = kclib.extract(network)
            if scope == "layer":  # no layer has fewer kernels than clusters
                bank = bank.only(*(layer.name for layer in bank.layers if layer.n_kernels >= k))
            clustering = kclib.cluster(bank, k, scope=scope)
            found[f"{name}, K = {k:,} {how}"] = kclib.compress(network, clustering, precision="fp16")
    return found


def cases(networks: dict[str, models.Model | nn.Module]) -> list[tuple[str, nn.Module, int, int]]:
    """Return what is timed: a name, a network, the pixels of a side and the images of a batch."""
    rows = []
    for name, network in networks.items():
        network = models.network_of(network)
        rows += [(name, network, 32, batch) for batch in BATCHES]
        if "for all" in name:
            rows += [(name, network, 224, batch) for batch in LARGE]
    return rows


class _Given(quantization.CalibrationDataReader):
    """Images that onnxruntime looks at to choose scales."""

    def __init__(self, name: str, images: np.ndarray):
        self.left = [{name: images}]

    def get_next(self):
        """Return the next batch, or None."""
        return self.left.pop() if self.left else None


def int8(dense: nn.Module, images: torch.Tensor) -> nn.Module:
    """Return a network of torch's own whole-number convolutions, its scales from these images."""
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    torch.backends.quantized.engine = "x86"  # fbgemm and oneDNN, whichever is faster
    prepared = quantize_fx.prepare_fx(copy.deepcopy(dense), get_default_qconfig_mapping("x86"), (images,))
    prepared(images)
    return quantize_fx.convert_fx(prepared)


def sessions(packed: nn.Module, images: torch.Tensor, folder: Path) -> dict[str, Callable]:
    """Return calls of onnxruntime: the dense network in float32 and in int8."""
    whole, paths = folder / "dense.onnx", {"onnxruntime": "dense.onnx", "onnxruntime, int8": "int8.onnx"}
    kclib.export(packed, whole, shape=tuple(images.shape[1:]), dense=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or it slows what runs next
    array = images.numpy()
    name = onnxruntime.InferenceSession(whole, providers=["CPUExecutionProvider"]).get_inputs()[0].name
    quantization.quantize_static(whole, folder / "int8.onnx", _Given(name, array[:4]), per_channel=True)
    made = {}
    for how, path in paths.items():
        session = onnxruntime.InferenceSession(folder / path, options, providers=["CPUExecutionProvider"])
        made[how] = lambda session=session: session.run(None, {name: array})
    return made


def calls(packed: nn.Module, images: torch.Tensor) -> dict[str, Callable]:
    """Return calls of torch: the network packed, packed and decoding all of it, dense, bf16 and int8."""
    decoding = copy.deepcopy(packed)
    for layer in _layers.clustered(decoding).values():
        layer.way = "decoded"
    dense = kclib.expand(packed, inputs=False)
    last = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    images_last = images.contiguous(memory_format=torch.channels_last)
    half, images_half = copy.deepcopy(last).bfloat16(), images_last.bfloat16()
    whole = int8(dense, images)
    return {
        "packed": lambda: packed(images),
        "decoded": lambda: decoding(images),
        "dense": lambda: dense(images),
        "dense, channels_last": lambda: last(images_last),
        "bf16": lambda: half(images_half),
        "int8": lambda: whole(images),
    }


@torch.inference_mode()
def alternating(calls: dict[str, Callable]) -> dict[str, list[float]]:
    """Time calls in turn, so that what else the machine does falls on each; milliseconds.

    Every other round goes backwards: what ran before leaves threads and caches as it needed them.
    """
    times, end, order = {name: [] for name in calls}, None, list(calls)
    while end is None or time.perf_counter() < end or len(times[order[0]]) < ROUNDS:
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
    dense = min(DENSE, key=medians.get)

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


def timed(name: str, packed: nn.Module, side: int, batch: int) -> dict:
    """Return the row of one network and batch."""
    images = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    ours = calls(packed, images)
    with tempfile.TemporaryDirectory() as folder:  # what runs after onnxruntime waits for its threads
        theirs = {key: ours[key] for key in DENSE} | sessions(packed, images, Path(folder))
        found = row(alternating(theirs))
    found |= row(alternating(ours))
    ways = latency.ways(packed, (3, side, side), batch).way
    how = {"straight": f"{(ways == 'indices').sum()} of {len(ways)}", "resident / dense": resident(packed)}
    return {"network": name, "pixels": side, "batch": batch, **found, **how}


@torch.inference_mode()
def of_layers(packed: nn.Module, batch: int, side: int = 32) -> list[dict]:
    """Return for each layer its time, dense and packed, the bytes that it must read and what it computes."""
    dense, given = dict(kclib.expand(packed, inputs=False).named_modules()), {}
    clustered = _layers.clustered(packed)
    handles = [
        layer.register_forward_hook(lambda _, x, y, name=name: given.update({name: (x[0].clone(), y)}))
        for name, layer in clustered.items()
    ]
    packed(torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0)))
    for handle in handles:
        handle.remove()
    rows = []
    for name, layer in clustered.items():
        x, answer = given[name]
        times = alternating({"packed": lambda x=x, y=layer: y(x), "dense": lambda x=x, y=dense[name]: y(x)})
        images, weight = x.nbytes + answer.nbytes, dense[name].weight
        rows.append(
            {
                "layer": name,
                "batch": batch,
                "operations": 2 * weight[0].numel() * answer.numel(),
                "dense (bytes)": images + weight.nbytes,
                "packed (bytes)": images + layer.indices.nbytes + layer.codebook.values.nbytes,
                **{f"{key} (ms)": statistics.median(each) for key, each in times.items()},
            }
        )
    return rows


@torch.inference_mode()
def roofs() -> dict[str, float]:
    """Return what the machine can do at most: bytes read and operations a second."""
    numbers, square = torch.ones(64 << 20), torch.randn(2048, 2048)
    times = alternating({"read": numbers.sum, "multiply": lambda: square @ square})
    fastest = {key: min(each) / 1e3 for key, each in times.items()}
    return {
        "bytes a second": numbers.nbytes / fastest["read"],
        "operations a second": 2 * 2048**3 / fastest["multiply"],
    }


STARTED = {
    "kclib, the compressed file": """
import torch, kclib
network = kclib.load("small.safetensors").network
with torch.inference_mode():
    network(torch.zeros(1, 3, 32, 32))""",
    "torch, the dense weights": """
import torch
from collections import OrderedDict
from torch import nn
from torchvision.models.vgg import cfgs, make_layers
network = nn.Sequential(OrderedDict(features=make_layers(cfgs["D"]), pool=nn.AdaptiveAvgPool2d(1),
    flatten=nn.Flatten(), dropout=nn.Dropout(), classifier=nn.Linear(512, 10))).eval()
network.load_state_dict(torch.load("dense.pt", weights_only=True, mmap=True), assign=True)
with torch.inference_mode():
    network(torch.zeros(1, 3, 32, 32))""",
    "onnxruntime, the dense file": """
import numpy, onnxruntime
session = onnxruntime.InferenceSession("dense.onnx", providers=["CPUExecutionProvider"])
session.run(None, {session.get_inputs()[0].name: numpy.zeros((1, 3, 32, 32), "float32")})""",
    "onnxruntime, the compressed file": """
import numpy, onnxruntime
session = onnxruntime.InferenceSession("small.onnx", providers=["CPUExecutionProvider"])
session.run(None, {session.get_inputs()[0].name: numpy.zeros((1, 3, 32, 32), "float32")})""",
}


def starts(packed: models.Model) -> list[dict]:
    """Return seconds to the first answer and peak memory of fresh processes, seen from outside."""
    with tempfile.TemporaryDirectory() as folder:
        kclib.save(packed, Path(folder) / "small.safetensors")
        torch.save(
            kclib.expand(models.network_of(packed), inputs=False).state_dict(), Path(folder) / "dense.pt"
        )
        for name in ("small", "dense"):
            kclib.export(packed, Path(folder) / f"{name}.onnx", shape=(3, 32, 32), dense=name == "dense")
        seen = {name: [] for name in STARTED}
        for turn in range(1 + STARTS):  # the first finds no file in memory, and compiles
            for name, code in STARTED.items():
                start, most = time.perf_counter(), 0
                environment = os.environ | {"PYTHONPATH": os.getcwd()}
                with psutil.Popen([sys.executable, "-c", code], cwd=folder, env=environment) as child:
                    while child.poll() is None:
                        most = max(most, child.memory_info().rss)
                        time.sleep(LOOK)
                if child.returncode:
                    raise RuntimeError(f"{name} failed")
                if turn:
                    seen[name].append((time.perf_counter() - start, most / 1e6))
    medians = {
        name: [statistics.median(each) for each in zip(*all_, strict=True)] for name, all_ in seen.items()
    }
    return [{"what": name, "seconds": s, "peak (MB)": mb} for name, (s, mb) in medians.items()]


def draw(found: dict, path: Path) -> None:
    """Draw each layer under the machine's roof: operations a second over operations a byte."""
    layers, roof = pd.DataFrame(found["layers"]), found["roofs"]
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
    for ax, (batch, rows) in zip(axes, layers.groupby("batch"), strict=True):
        for name, colour, marker in (("dense", "0.55", "o"), ("packed", "tab:blue", "s")):
            x = rows.operations / rows[f"{name} (bytes)"]
            ax.loglog(x, rows.operations / rows[f"{name} (ms)"] / 1e6, marker, color=colour, label=name)
        low, high = ax.get_xlim()
        x = np.geomspace(low, high, 100)
        top = np.minimum(roof["operations a second"], x * roof["bytes a second"]) / 1e9
        ax.loglog(x, top, color="black", linewidth=1, label="roof: reading, then multiplying")
        ax.set_title(f"{batch} image" + "s" * (batch > 1))
        ax.set_xlabel("operations a byte that must be read and written")
        ax.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("operations a second (billions),\nas a direct convolution counts them")
    axes[0].legend(frameon=False, fontsize=9)
    with files.replacing(path) as temporary:
        fig.savefig(temporary, dpi=150, format="png")
    plt.close(fig)


def main() -> None:
    warnings.simplefilter("ignore")  # torch's own quantization is to move to another package
    small = networks()
    rows = [timed(*case) for case in tqdm(cases(small), desc="latency", unit="batch")]
    print(pd.DataFrame(rows).round(3).to_string(index=False))
    vgg = next(iter(small.values()))
    found = {
        "threads": torch.get_num_threads(),
        "rows": rows,
        "layers": [row for batch in (1, 16) for row in of_layers(models.network_of(vgg), batch)],
        "roofs": roofs(),
        "starts": starts(vgg),
    }
    print(pd.DataFrame(found["starts"]).round(2).to_string(index=False))
    with files.replacing(OUT) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {OUT}")


if __name__ == "__main__":
    main()
