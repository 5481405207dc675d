"""Does a codebook of less inertia answer better? Drops at the same K, by its maker and by seed."""

import json
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from tqdm.auto import tqdm

import kclib
from benchmarks.kmeans import faiss_kmeans
from kclib import kmeans
from kclib._util import files
from kclib.clustering._clustering import of_fits

CLUSTERS = (4096, 8192, 16_384)  # where one codebook for all loses points, but not all
SEEDS = (0, 1, 2)
IMAGES = 4000
OUT = Path("docs/inertia.json")


def ways(points: np.ndarray, k: int) -> dict[str, Callable[[int], kmeans.KMeans]]:
    """Return what makes a codebook of K from a seed, each by its name, worst first."""

    def drawn(seed: int) -> np.ndarray:
        return points[np.random.default_rng(seed).choice(len(points), k, replace=False)]

    def of_faiss(seed: int) -> kmeans.KMeans:
        centres = faiss_kmeans(k, 25, "random", seed)(points)
        return kmeans.fit(points, k, init=np.ascontiguousarray(centres), max_iter=1)

    return {
        "random kernels, 2 rounds": lambda seed: kmeans.fit(points, k, init=drawn(seed), max_iter=2),
        "faiss, 25 iterations": of_faiss,
        "kclib": lambda seed: kmeans.fit(points, k, seed=seed),
        "kclib, best": lambda seed: kmeans.fit(points, k, seed=seed, quality="best"),
    }


def measured(name: str) -> list[dict]:
    """Return a row for each K, way and seed: inertia and paired drop, one codebook for all layers."""
    model, data, rows = kclib.load_model(name), kclib.load_data("fashion-mnist", limit=IMAGES), []
    bank = kclib.extract(model)
    points, before = np.ascontiguousarray(bank.points), kclib.evaluate(model, data, progress=False)
    cells = [(k, how, seed) for k in CLUSTERS for how in ways(points, k) for seed in SEEDS]
    for k, how, seed in tqdm(cells, desc="inertia", unit="codebook"):
        fit = ways(points, k)[how](seed)
        clusters = of_fits(bank, {"global": fit}, {"global": k}, scope="global", seed=seed)
        after = kclib.evaluate(kclib.compress(model, clusters), data, progress=False)
        lost = kclib.drop(before, after).points
        row = {"K": k, "codebook": how, "seed": seed, "inertia": float(fit.inertia)}
        rows.append(row | {"drop": lost.estimate, "drop_low": lost.low, "drop_high": lost.high})
    return rows


def draw(found: dict, path: Path) -> None:
    """Draw the drop over the inertia, both by K: a point a seed."""
    rows = pd.DataFrame(found["rows"])
    rows["share"] = rows.inertia / rows.groupby("K").inertia.transform("min")
    fig, axes = plt.subplots(1, len(CLUSTERS), figsize=(12, 3.6), layout="constrained")
    colours = dict(zip(dict.fromkeys(rows.codebook), sns.color_palette("colorblind"), strict=False))
    for ax, (k, each) in zip(axes, rows.groupby("K"), strict=True):
        for how, mine in each.groupby("codebook", sort=False):
            ends = mine["drop"] - mine.drop_low, mine.drop_high - mine["drop"]
            ax.errorbar(mine.share, mine["drop"], ends, fmt="o", color=colours[how], label=how, alpha=0.8)
        ax.set(title=f"K = {k:,}", xlabel="inertia / least")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel(f"drop (points, {found['images']:,} images)")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    with files.replacing(path) as temporary:
        fig.savefig(temporary, dpi=150, format="png")
    plt.close(fig)


def main() -> None:
    found = {"images": IMAGES, "rows": measured("vgg16-fashion")}
    print(pd.DataFrame(found["rows"]).round(3).to_string(index=False))
    with files.replacing(OUT) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {OUT}")


if __name__ == "__main__":
    main()
