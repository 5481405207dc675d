"""Pairs, nearest neighbours, maps and the slider of the shipped model: against peers, and as they grow."""

import json
import math
import statistics
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree
from scipy.spatial.distance import pdist
from sklearn.neighbors import NearestNeighbors
from tqdm.auto import tqdm

import kclib
from benchmarks.kmeans import timed
from kclib import kernels
from kclib._util import files, threads
from kclib.explorers import ClusterExplorer, _background
from kclib.similarity import _neighbours, distances, embedding, pair_histogram
from kclib.store import Store

OUT = Path("reports/bench")
PAIRS_OF, REPEATS, MOVES, BINS = 10_000, 5, 50, 80


def pairs(points: np.ndarray) -> list[dict]:
    """Pairs a second, in all five distances, beside pdist's (one thread) in the two that it has."""
    points = points[np.random.default_rng(0).choice(len(points), PAIRS_OF, replace=False)]
    n_pairs, rows = PAIRS_OF * (PAIRS_OF - 1) // 2, []
    for name, distance in tqdm(distances.named_distances.items(), desc="pairs"):
        longest = 2 * float(np.linalg.norm(points, axis=1).max())
        edges = np.linspace(0, longest if math.isinf(distance.largest) else distance.largest, BINS + 1)
        ours = partial(pair_histogram, points, edges, distance=name)
        ways = {"million pairs a second": ours, "on one thread": partial(ours, n_threads=1)}
        if name in ("euclidean", "cosine"):
            ways["pdist and histogram"] = partial(scipy_histogram, points, edges, name)
        pair_histogram(points[:600], edges, distance=name)  # numba's compiler
        took = {way: [timed(call)[0] for _ in range(REPEATS)] for way, call in ways.items()}
        speeds = {way: n_pairs / statistics.median(seconds) / 1e6 for way, seconds in took.items()}
        rows.append({"distance": name} | speeds)
    return rows


def scipy_histogram(points: np.ndarray, edges: np.ndarray, name: str) -> np.ndarray:
    return np.histogram(pdist(points, name), edges)[0]


def nearest(points: np.ndarray) -> list[dict]:
    """Seconds to the exact nearest neighbour of every kernel."""
    n_threads, rows = threads.threads(), []
    _neighbours.nearest(points[:2000])  # numba's compiler
    for n in (4096, 65_536, len(points)):
        some = np.ascontiguousarray(points[-n:])
        ours, found = timed(lambda some=some: _neighbours.nearest(some))
        row = {"kernels": n, "ours (s)": ours}
        row["cKDTree (s)"], (apart, _) = timed(partial(scipy_nearest, some, n_threads))
        assert np.allclose(np.sqrt(found.squared[:, 0]), apart[:, 1], rtol=1e-4)
        row["scikit-learn (s)"], _ = timed(partial(scikit_nearest, some, n_threads))
        rows.append(row)
    return rows


def scipy_nearest(points: np.ndarray, n_threads: int) -> tuple[np.ndarray, np.ndarray]:
    return cKDTree(points).query(points, 2, workers=n_threads)


def scikit_nearest(points: np.ndarray, n_threads: int) -> tuple[np.ndarray, np.ndarray]:
    return NearestNeighbors(n_neighbors=1, algorithm="kd_tree", n_jobs=n_threads).fit(points).kneighbors()


def maps(bank: kclib.KernelBank, store: Store) -> list[dict]:
    """Seconds of a UMAP fit, and its trustworthiness, as the sample grows."""
    rows = []
    for per_layer in tqdm((80, 160, 400, 800, 1600, 4000), desc="maps"):
        sample = bank.points[kernels.sample(bank, per_layer, seed=0)]
        seconds, graph = timed(lambda sample=sample: embedding.graph(sample, n_neighbors=15, store=store))
        first, layout = timed(lambda graph=graph: embedding.layout(graph, store=store))
        rows.append(
            {
                "kernels": len(sample),
                "neighbours (s)": seconds,
                "layout (s)": first,
                "trustworthiness": embedding.trustworthiness(graph, layout),
            }
        )
    return rows


def slider(model: kclib.Model) -> list[dict]:
    """Seconds from a move of the slider to the new picture, over moves drawn evenly on the slider."""
    seconds, explorer = timed(lambda: ClusterExplorer(model))
    ready, _ = timed(explorer.show)
    rows = []
    for largest in (16_384, explorer.largest):
        draw, took = np.random.default_rng(0), []
        for position in tqdm(draw.uniform(1, math.log2(largest), MOVES), desc="slider", leave=False):
            k = round(2**position)

            def move(k=k) -> None:
                explorer.choose(n_clusters=k)
                explorer.wait()
                _background.png(explorer.answer.figure)

            took.append(timed(move)[0])
        median, late = np.percentile(took, [50, 95])
        rows.append({"K up to": largest, "median (s)": median, "95th percentile (s)": late,
                     "ready after (s)": seconds + ready})  # fmt: skip
    return rows


def main() -> None:
    model = kclib.load_model("vgg16-fashion")
    bank = kclib.extract(model)
    path, store = OUT / "similarity.json", Store(OUT / "store")
    parts = {
        "pairs": lambda: pairs(bank.points),
        "nearest": lambda: nearest(bank.points),
        "slider": lambda: slider(model),
        "maps": lambda: maps(bank, store),
    }
    found = json.loads(path.read_text()) if path.is_file() else {}  # of a run that was cut short
    for name, measure in parts.items():
        if name not in found:
            found[name] = measure()
        print(pd.DataFrame(found[name]).to_string(index=False, float_format="{:.3g}".format))
        with files.replacing(path) as temporary:
            temporary.write_text(json.dumps(found, indent=1))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
