"""The compressed model weighed and timed: file against archives, memory and latency against dense."""

import io
import json
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import py7zr
import torch
import torch.nn.functional as F
import zstandard
from torch.utils import benchmark
from tqdm.auto import tqdm

import kclib
from kclib import models
from kclib._util import files
from kclib.compression import _layers, byte_counts, latency, residence

CASES = (("global", 256), ("global", 4096), ("global", 65_536), ("layer", 256))
OUT = Path("reports/bench/memory.json")


def archives(state: bytes) -> dict[str, int]:
    """Return the bytes that archivers at their strongest make of the clustered dense weights."""
    zipped, seven = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        file.writestr("weights", state)
    with py7zr.SevenZipFile(seven, "w") as file:
        file.writestr(state, "weights")
    return {
        "zip -9": zipped.tell(),
        "zstd -19": len(zstandard.compress(state, 19)),
        "7z": len(seven.getvalue()),
    }


def median_ms(call) -> float:
    timer = benchmark.Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange(min_run_time=1).median


@torch.inference_mode()
def decoding(network: torch.nn.Module) -> dict[str, float]:
    """Time the decoding of every weight against an embedding look-up of indices that are unpacked already."""
    modules = _layers.clustered(network).values()
    tables = [module.codebook.table() for module in modules]
    indices = [torch.from_numpy(module.members()) for module in modules]
    ours = median_ms(lambda: [module.weight.shape for module in modules])
    peer = median_ms(lambda: [F.embedding(i, t).shape for i, t in zip(indices, tables, strict=True)])
    n_bytes = sum(4 * int(np.prod(module.shape)) for module in modules)
    return {
        "decode (GB/s)": n_bytes / ours / 1e6,
        "embedding (GB/s)": n_bytes / peer / 1e6,
        "decode time / embedding's": ours / peer,
    }


def case(model: kclib.Model, bank: kclib.KernelBank, scope: str, k: int, folder: Path) -> dict:
    result = kclib.cluster(bank, k, scope=scope)
    packed = kclib.compress(model, result, precision="fp16")
    path = folder / f"{scope}-{k}.safetensors"
    entropy = kclib.save(packed, path, architecture=model.name)
    dense = byte_counts.dense_bytes(model)
    state = b"".join(value.numpy().tobytes() for value in kclib.expand(packed).state_dict().values())
    seen = residence.measure_each(path)
    times = latency.of_network(packed, models.input_shape(model))
    archived = archives(state)
    return {
        "scope": scope,
        "K": k,
        "dense (bytes)": dense,
        "file (bytes)": int(entropy.bytes.sum()),
        "indices and tables (bytes)": int(entropy.bytes[["indices", "frequency tables"]].sum()),
        "entropy of the indices (bytes)": byte_counts.entropy_bound(result),
        **{f"{name} (bytes)": n_bytes for name, n_bytes in archived.items()},
        "file / best archive": float(entropy.bytes.sum() / min(archived.values())),
        "resident (bytes)": seen["packed"].model,
        "resident dense (bytes)": seen["dense"].model,
        "resident / dense weights": seen["packed"].model / dense,
        "peak (bytes)": seen["packed"].peak,
        **{f"latency ratio, batch {batch}": ratio for batch, ratio in times.ratio.items()},
        **decoding(packed),
    }


def main() -> None:
    model = kclib.load_model()
    bank = kclib.extract(model)
    with tempfile.TemporaryDirectory() as folder:
        rows = [case(model, bank, *each, Path(folder)) for each in tqdm(CASES, desc="memory", unit="case")]
    print(pd.DataFrame(rows).T.to_string())
    found = {"threads": torch.get_num_threads(), "rows": rows}
    with files.replacing(OUT) as temporary:
        temporary.write_text(json.dumps(found, indent=1))
    print(f"written to {OUT}")


if __name__ == "__main__":
    main()
