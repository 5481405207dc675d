"""Write tables and pictures of the README and the site from the runs kept in ``docs/``: ``make tables``.

``<!-- rows: NAME -->`` stands above each such table; its two lines of heading are the page's own.
"""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from benchmarks import kmeans, latency, nnc
from kclib import plots
from kclib.experiments import reports

ROOT = Path(__file__).parents[1]
_TABLE = re.compile(r"(<!-- rows: (\w+) -->\n(?:\|.*\n){2})(?:\|.*\n)*")
_SCOPES = {"dense": "dense", "layer": "a layer", "global": "for all"}
_NETWORKS = {
    "resnet18-fashion": "ResNet-18: ",
    "vgg16-imagenet-probe": "ImageNet's VGG-16 and a linear probe: ",
}
_MODELS = {
    "dense": "dense",
    "clustering, corrected": "corrected, not trained",
    "clustering, trained": "corrected and trained",
    "dense, trained as long": "dense, trained as long",
}
_SWEEPS = {
    "plain calls": "plain calls, nothing stored",
    "one job": "`--jobs 1`",
    "two jobs": "`--jobs 2`",
    "dask, two jobs": "`--jobs 2 --backend dask`",
    "stored": "again, all stored",
    "papermill over a script": "a notebook by papermill, beyond the same lines as a script",
}


def pages() -> list[Path]:
    """Return the README and the pages of the site that are written by hand."""
    written = [x for folder in ("docs", "docs/benchmarks") for x in sorted((ROOT / folder).glob("*.md"))]
    return [ROOT / "README.md", *(x for x in written if x.name != "command-line.md")]


def rewritten(text: str) -> str:
    """Return a page with the rows of all marked tables written anew."""
    return _TABLE.sub(
        lambda found: found[1] + "".join(f"| {' | '.join(row)} |\n" for row in ROWS[found[2]]()), text
    )


def _run(name: str) -> dict:
    return json.loads((ROOT / "docs" / f"{name}.json").read_text())


def _drop(row, digits: int = 2) -> str:
    return f"{row['drop']:.{digits}f} [{row['drop_low']:.{digits}f}, {row['drop_high']:.{digits}f}]"


def _megabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:.2f}"


def _results():
    accuracy = pd.read_csv(ROOT / "docs" / "accuracy.csv")
    found = accuracy[(accuracy.scope == "global") & (accuracy.k == 235_367)].iloc[0]
    removed = f"VGG-16: {found.kernels_removed:.1f} % of all kernels removed, as in the report"
    yield [removed, f"1/{100 / (100 - found.bytes_removed):.1f}", f"{found.top1:.2f}", _drop(found)]
    corrected = [r for r in _run("recovery")["rows"] if r["method"] == "clustering, corrected"]
    for share in (64, 100):
        (r,) = (x for x in corrected if x["network"] == "vgg16-fashion" and x["share"] == share)
        what = "VGG-16: each layer corrected, each bit at a price (`kclib.shrink`)"
        yield [what, f"1/{r['ratio']:.1f}", f"{r['top1']:.2f}", _drop(r)]
    for r in _coded("vgg16-fashion"):
        if r["method"] == nnc.CORRECTED and r["setting"] in ("qp -20", "qp -19"):
            what = "VGG-16: the standard for coding networks (ISO/IEC 15938-17), corrected too"
            yield [what, f"1/{r['ratio']:.1f}", f"{r['top1']:.2f}", _drop(r)]


def _accuracy():
    run = pd.read_csv(ROOT / "docs" / "accuracy.csv")
    for _, r in run[run.k.isin([0, 256, 1024, 4096, 16384, 65536, 235367])].iterrows():
        shares = [f"{r.kernels_removed:.2f}", f"{r.bytes_removed:.2f}"]
        yield [_SCOPES[r.scope], f"{r.k:,}" if r.k else "–", f"{r.top1:.2f}", _drop(r), *shares]


def _engine():
    for name, weights in (("shipped", "vgg16-fashion"), ("ImageNet", "vgg16_imagenet_features")):
        for r in _run(f"kmeans-{weights}")["peers"]:
            ratios = [f"{r['time ratio']:.3f}", f"{r['inertia ratio']:.3f}"]
            yield [name, f"{r['K']:,}", r["peer"], f"{r['ours (s)']:.1f}", f"{r['peer (s)']:.1f}", *ratios]


def _recovered(networks):
    for r in _run("recovery")["rows"]:
        if r["network"] in networks and r["method"] in _MODELS and "top1" in r:
            name = networks[r["network"]] + _MODELS[r["method"]]
            yield [name, _megabytes(r["bytes"]), f"{r['ratio']:.1f}", f"{r['top1']:.2f}", _drop(r)]


def _recovery():
    for row in _recovered({"vgg16-fashion": ""}):
        yield ["as shipped, dense" if row[0] == "dense" else row[0], *row[1:]]


def _ways():
    ways = {}
    for r in _run("recovery")["rows"]:
        if r["network"] == "vgg16-fashion" and r["share"] and "top1" in r:
            ways.setdefault(r["method"], {})[r["share"]] = f"{r['drop']:.2f}"
    for name, drops in ways.items():
        yield [name, *(drops.get(share, "–") for share in (16, 24, 32, 48, 64, 100))]


def _coded(network: str) -> list[dict]:
    """Return the rows of the standard on a network, as it is and corrected."""
    rows = (r for r in _run("recovery")["rows"] if r["network"] == network)
    return [r for r in rows if r["method"].startswith(nnc.NAME)]


def _standard(network: str):
    settings = {}
    for r in _coded(network):
        settings.setdefault(r["setting"], []).extend([f"{r['ratio']:.1f}", _drop(r)])
    for setting, cells in settings.items():
        yield [setting, *cells]


def _recipes():
    for r in _run("recovery")["rows"]:
        if r["network"] == "vgg16-fashion" and "Son" in r["method"]:
            yield [f"{r['method']}, {r['setting']}", f"{r['ratio']:.1f}", _drop(r)]


def _choices(table: str) -> list[dict]:
    return [r for r in _run("choices")["rows"] if r["table"] == table]


def _weights():
    divergences = {}
    for r in _choices("weights"):
        divergences.setdefault((r["layer"], r["clusters"]), {})[r["kind"]] = r["kl"]
    for (layer, k), by_kind in divergences.items():
        values = [by_kind[kind] for kind in ("uniform", "input", "output", "fisher", "hessian")]
        cells = (f"**{x:.4f}**" if x == min(values) else f"{x:.4f}" for x in values)
        yield [f"{'all layers' if layer == 'all' else layer}, K = {k:,}", *cells]


def _representatives():
    kinds = {}
    for r in _choices("representatives"):
        bits = f", {r['scale_bits']} bits" if "scaled" in r["kind"] else ""
        fits = [f"{r['clusters']:,}", f"{r['kl']:.3f}", f"{r['drop']:.1f}"] if r["clusters"] else ["–"] * 3
        kinds.setdefault(f"{r['kind']}{bits}, {_SCOPES[r['scope']]}", {})[r["share"]] = fits
    for name, by_share in kinds.items():
        yield [name, *by_share[16], *by_share[32]]


def _prices():
    for r in _run("choices")["rows"]:
        if r["table"] not in ("weights", "representatives"):
            numbers = [f"{r['clusters']:,}", _megabytes(r["bytes"]), f"{r['kl']:.3f}", _drop(r, 1)]
            yield [f"{r['method']}, {_SCOPES[r['scope']]}", *numbers]


def _memory():
    for r in _run("memory")["rows"]:
        sizes = [r["file (bytes)"], r["entropy of the indices (bytes)"], r["indices and tables (bytes)"]]
        sizes.append(min(r[f"{name} (bytes)"] for name in ("zip -9", "zstd -19", "7z")))
        resident = f"{r['resident (bytes)'] / 1e6:.1f}"
        name = {"global": "one for all", "layer": "one a layer"}[r["scope"]]
        yield [name, f"{r['K']:,}", *map(_megabytes, sizes), resident]


def _sweeps():
    run = _run("sweeps")
    for key, name in _SWEEPS.items():
        seconds = run[f"{key} (s)"]
        yield [f"{name} (s)", f"{seconds:.{1 if seconds > 1 else 2}f}"]


def _pairs():
    for r in _run("similarity")["pairs"]:
        speeds = [r["million pairs a second"], r["on one thread"], r.get("pdist and histogram")]
        yield [r["distance"], *("–" if speed is None else f"{speed:,.0f}" for speed in speeds)]


def _nearest():
    for r in _run("similarity")["nearest"]:
        seconds = [r["ours (s)"], r["cKDTree (s)"], r["scikit-learn (s)"]]
        yield [f"{r['kernels']:,}", *(f"{s:.3g}" for s in seconds), f"{seconds[0] / seconds[1]:.3f}"]


def _latency():
    for r in _run("latency")["rows"]:
        names = "packed", "decoded", "bf16", "int8", "onnxruntime", "onnxruntime, int8"
        ratios = [f"{r[f'{name} / dense']:.2f}" for name in names]
        dense = min(r[f"{name} (ms)"] for name in latency.DENSE)
        yield [
            f"{r['network']}, {r['pixels']}×{r['pixels']}",
            f"{r['batch']}",
            f"{dense:.1f}",
            *ratios,
            r["straight"],
            f"{r['resident / dense']:.3f}",
        ]


def _starts():
    for r in _run("latency")["starts"]:
        yield [r["what"], f"{r['seconds']:.1f}", f"{r['peak (MB)']:.0f}"]


def _slider():
    for r in _run("similarity")["slider"]:
        yield [f"{r['K up to']:,}", f"{r['median (s)']:.2f}", f"{r['95th percentile (s)']:.2f}"]


def _maps():
    for r in _run("similarity")["maps"]:
        seconds = [f"{r['neighbours (s)']:.2f}", f"{r['layout (s)']:.1f}"]
        yield [f"{r['kernels']:,}", *seconds, f"{r['trustworthiness']:.3f}"]


def _combinations():
    run = pd.read_csv(ROOT / "docs" / "orthogonality.csv", keep_default_na=False)
    run = run[run.order != "cluster first"]
    means = run.pivot_table(["ratio", "drop"], ["clustering", "sparsity", "precision"])
    for clusters in ("none", "1024 layer", "4096 layer", "4096 global"):
        for sparsity in sorted(run.sparsity.unique()):
            cell = means.loc[clusters, sparsity]
            drops = (f"{cell.loc[name, 'drop']:.1f}" for name in ("none", "int8", "int4"))
            yield [clusters, f"{sparsity:.0%}", f"{cell.loc['int8', 'ratio']:.1f}", *drops]


def draw() -> None:
    """Draw the pictures of the pages from the same runs."""
    docs = ROOT / "docs"
    fig, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    for ax, x in zip(axes, ("kernels_removed", "bytes_removed"), strict=True):
        plots.accuracy_curve(pd.read_csv(docs / "accuracy.csv"), x=x, ax=ax)
        ax.label_outer()
    axes[1].get_legend().remove()
    reports.keep(fig, docs / "accuracy.png")
    fig, ax = plt.subplots(figsize=(11, 6), layout="constrained")
    runs = pd.DataFrame(_run("recovery")["rows"]).dropna(subset="top1")
    reports.keep(
        plots.equal_bytes(runs[runs.network == "vgg16-fashion"], ax=ax).figure, docs / "recovery.png"
    )
    latency.draw(_run("latency"), docs / "roofline.png")
    kmeans.draw(_run("kmeans-vgg16-fashion")["growth"], docs / "kmeans.png")


ROWS = {
    "results": _results, "accuracy": _accuracy, "engine": _engine, "recovery": _recovery,
    "standard": lambda: _standard("vgg16-fashion"),
    "ways": _ways, "recipes": _recipes,
    "networks": lambda: _recovered(_NETWORKS), "weights": _weights,
    "representatives": _representatives, "prices": _prices, "memory": _memory,
    "latency": _latency, "starts": _starts,
    "sweeps": _sweeps, "pairs": _pairs, "nearest": _nearest, "slider": _slider, "maps": _maps,
    "combinations": _combinations,
}  # fmt: skip


if __name__ == "__main__":
    for page in pages():
        page.write_text(rewritten(page.read_text()))
    draw()
