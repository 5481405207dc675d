"""Our k-means against faiss and scikit-learn: time and inertia at each K, and how cost grows with K and N."""

import argparse
import json
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import faiss
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
from safetensors.numpy import load_file
from sklearn.cluster import BisectingKMeans, KMeans, MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from tqdm.auto import tqdm

import kclib
from kclib import kmeans
from kclib._util import files
from kclib._util import threads as util_threads
from kclib.kmeans import _fitting, _lloyd, _nearest, _starting

OUT = Path("reports/bench")
LADDER = [*(2**power for power in range(4, 18)), 235_367]
SLOW = {"scikit-learn KMeans, 25 iterations"}  # like all at more than 4,096 clusters, run once
SLOPE_KS = [2**power for power in range(8, 18)]


def faiss_kmeans(k: int, iterations: int, seeding: str, seed: int = 1) -> Callable:
    """Faiss at its best: all points, and as many threads as we use."""
    method = {
        "random": faiss.ClusteringInitMethod_RANDOM,
        "k-means++": faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
    }[seeding]

    def fit(points: np.ndarray) -> np.ndarray:
        engine = faiss.Kmeans(
            points.shape[1], k, niter=iterations, seed=seed, init_method=method,
            min_points_per_centroid=1, max_points_per_centroid=len(points),
        )  # fmt: skip
        engine.train(points)
        return engine.centroids

    return fit


def scikit_kmeans(k: int) -> Callable:
    return lambda points: (
        KMeans(k, init="random", n_init=1, max_iter=25, random_state=0).fit(points).cluster_centers_
    )


def scikit_bisecting(k: int) -> Callable:
    return lambda points: BisectingKMeans(k, max_iter=25, random_state=0).fit(points).cluster_centers_


def scikit_minibatch(k: int) -> Callable:
    return lambda points: (
        MiniBatchKMeans(k, batch_size=16_384, n_init=1, random_state=0).fit(points).cluster_centers_
    )


def peers(k: int) -> dict[str, Callable]:
    if k <= 4096:
        found = {f"faiss, 25 iterations, {s}": faiss_kmeans(k, 25, s) for s in ("random", "k-means++")}
        found["kclib, best quality"] = lambda points: kmeans.fit(points, k, quality="best").centres
        if k == 256:
            found["scikit-learn BisectingKMeans"] = scikit_bisecting(k)
        if k == 4096:
            found["scikit-learn KMeans, 25 iterations"] = scikit_kmeans(k)
            found["scikit-learn MiniBatchKMeans"] = scikit_minibatch(k)
        return found
    return {
        f"faiss, {n} iterations, random": faiss_kmeans(k, n, "random") for n in ((25,) if k < 1e5 else (5,))
    }


def timed(call: Callable):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def inertia(points: np.ndarray, centres: np.ndarray) -> float:
    centres = np.ascontiguousarray(centres, np.float32)
    return float(_nearest.nearest(points, centres).errors.sum(dtype=np.float64))


def against_peers(points: np.ndarray, repeats: int, rows: list[dict]) -> Iterator[list[dict]]:
    """Yield the rows so far, those of an earlier run first."""
    known = {(row["K"], row["peer"]) for row in rows}
    for k in (256, 1024, 4096, 65_536, 235_367):
        for name, peer in peers(k).items():
            if (k, name) in known:
                continue
            times, ratios = [], []
            turns = repeats if k <= 4096 and name not in SLOW else 1
            for seed in tqdm(range(turns), desc=f"K = {k:,}: {name}", leave=False):
                ours, found = timed(lambda k=k, seed=seed: kmeans.fit(points, k, seed=seed))
                theirs, centres = timed(lambda peer=peer: peer(points))
                if not seed:
                    theirs_inertia = inertia(points, centres)
                times.append((ours, theirs))
                ratios.append(found.inertia / theirs_inertia)
            rows.append(
                {
                    "K": k,
                    "peer": name,
                    "ours (s)": statistics.median(a for a, _ in times),
                    "peer (s)": statistics.median(b for _, b in times),
                    "time ratio": statistics.median(a / b for a, b in times),
                    "inertia ratio": statistics.median(ratios),
                    "repeats": turns,
                }
            )
            yield rows


def against_single_fits(points: np.ndarray, repeats: int) -> tuple[dict, list[dict]]:
    runs = []
    for seed in range(repeats):
        singles = [
            timed(lambda k=k, seed=seed: kmeans.fit(points, k, seed=seed)) for k in tqdm(LADDER, leave=False)
        ]
        whole, (tree, rungs) = timed(lambda seed=seed: laddered(points, seed))
        runs.append((singles, whole, rungs, tree))
    rungs = [
        {
            "K": k,
            "alone (s)": statistics.median(singles[i][0] for singles, *_ in runs),
            "inertia ratio": statistics.median(
                rungs[i].inertia / singles[i][1].inertia for singles, _, rungs, _ in runs
            ),
            "cut alone, estimated": statistics.median(
                tree.cut(k).inertia / singles[i][1].inertia for singles, _, _, tree in runs
            )
            if k <= runs[0][3].n_leaves
            else None,
            "cut (s)": timed(lambda k=k: runs[0][3].cut(k))[0] if k <= runs[0][3].n_leaves else None,
        }
        for i, k in enumerate(LADDER)
    ]
    total = {
        "ladder (s)": statistics.median(whole for _, whole, *_ in runs),
        "single fits (s)": statistics.median(sum(t for t, _ in singles) for singles, *_ in runs),
        "ratio": statistics.median(whole / sum(t for t, _ in singles) for singles, whole, *_ in runs),
        "to the largest alone": statistics.median(whole / singles[-1][0] for singles, whole, *_ in runs),
        "a K between, K = 3,000 (s)": statistics.median(
            timed(lambda tree=tree: tree.fit(3000, max_iter=1))[0] for *_, tree in runs
        ),
    }
    return total, rungs


def laddered(points: np.ndarray, seed: int) -> tuple[kmeans.Tree, list[kmeans.KMeans]]:
    """Return one tree, and from it, in a round each, a clustering for every K of the ladder."""
    tree = kmeans.tree(points, seed=seed)
    return tree, [tree.fit(k, max_iter=1) for k in LADDER]


def growth(points: np.ndarray, repeats: int) -> dict:
    """Time against K at all points, before and with the last exact pass, and against N at K = N / 100."""
    by_k = []
    for k in tqdm(SLOPE_KS, desc="growth with K", leave=False):
        runs = []
        for seed in range(repeats):
            whole, found = timed(lambda k=k, seed=seed: kmeans.fit(points, k, seed=seed))
            last, _ = timed(lambda found=found: _nearest.nearest(points, found.centres, guess=found.labels))
            runs.append((whole, last))
        whole, last = (statistics.median(column) for column in zip(*runs, strict=True))
        by_k.append(
            {
                "K": k,
                "all (s)": whole,
                "last exact pass (s)": last,
                "up to it (s)": whole - last,
                "an approximate one would lose (%)": 100 * lost(points, k),
            }
        )
    by_n = []
    for n in [len(points) >> shift for shift in range(6, -1, -1)]:
        part = points[np.sort(np.random.default_rng(0).choice(len(points), n, replace=False))]
        times = [
            timed(lambda part=part, s=s: kmeans.fit(part, len(part) // 100, seed=s))[0]
            for s in range(repeats)
        ]
        by_n.append({"N": n, "all (s)": statistics.median(times)})
    slopes = {"slope in N at K = N/100": slope(by_n, "N", "all (s)")}
    for name, column in (("whole fit", "all (s)"), ("up to the last exact pass", "up to it (s)")):
        slopes[f"{name}: slope in K"] = slope(by_k, "K", column)
        slopes[f"{name}: slope in K from 4,096"] = slope([r for r in by_k if r["K"] >= 4096], "K", column)
    return {"K": by_k, "N": by_n} | slopes


def memory(points: np.ndarray, repeats: int) -> list[dict]:
    """Peak memory beside the points: all of them at the largest K, and 20 million in a memory-mapped file."""
    with tempfile.TemporaryDirectory() as folder:
        few, many = Path(folder) / "few.npy", Path(folder) / "many.npy"
        np.save(few, points)
        mapped = np.lib.format.open_memmap(many, "w+", np.float32, (20_000_000, points.shape[1]))
        draw = np.random.default_rng(0)
        for start in range(0, len(mapped), len(points)):  # the kernels again, each time a little other
            part = points[: len(mapped) - start]
            mapped[start : start + len(part)] = part * draw.normal(1, 0.1, part.shape).astype(np.float32)
        mapped.flush()
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
            return list(fresh.map(peak, (few, many), (235_367, 4096)))


def peak(file: Path, k: int) -> dict:
    """Fit in a process that has done nothing before, and watch its memory without mapped files."""
    process, high, done = psutil.Process(), [], threading.Event()
    points = np.load(file, mmap_mode="r")
    kmeans.tree(points[:20_000]).fit(5000)  # compile

    def private() -> int:
        info = process.memory_info()
        return info.rss - info.shared

    def watch() -> None:
        while not done.wait(0.02):
            high.append(private())

    before = private()
    watcher = threading.Thread(target=watch)
    watcher.start()
    seconds, _ = timed(lambda: kmeans.fit(points, k))
    done.set()
    watcher.join()
    return {
        "N": len(points),
        "K": k,
        "seconds": seconds,
        "peak beside the points (GiB)": (max(high) - before) / 2**30,
        "estimate (GiB)": _fitting.memory(*points.shape, k) / 2**30,
    }


def lost(points: np.ndarray, k: int) -> float:
    """How much more inertia labels have that are looked for as in the rounds, not exactly."""
    options, threads = kmeans.Options(25, None, 1.6, 0, None), util_threads.threads()
    centres, guess = _starting.start(points, None, k, options)
    guess = _nearest.nearest(points, centres, guess=guess, reach=1.6).labels
    centres = _lloyd.means(points, None, guess, centres, threads)
    near, exact = (_nearest.nearest(points, centres, guess=guess, reach=reach) for reach in (1.6, None))
    return _lloyd.total(near.errors, None) / _lloyd.total(exact.errors, None) - 1


def slope(rows: list[dict], x: str, y: str) -> float:
    return float(np.polyfit(np.log([r[x] for r in rows]), np.log([r[y] for r in rows]), 1)[0])


def draw(result: dict, path: Path) -> None:
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    by_k, by_n = pd.DataFrame(result["K"]), pd.DataFrame(result["N"])
    for name, column in (("whole fit", "all (s)"), ("up to the last exact pass", "up to it (s)")):
        slopes = result[f"{name}: slope in K"], result[f"{name}: slope in K from 4,096"]
        label = "{}: slope {:.2f} ({:.2f} from 4,096)".format(name, *slopes)
        left.loglog(by_k["K"], by_k[column], "o-", label=label)
    left.loglog(by_k["K"], by_k["last exact pass (s)"], "s--", color="0.5", label="last exact pass")
    left.set(xlabel="clusters K", ylabel="time (s)", title=f"N = {by_n['N'].max():,} kernels")
    right.loglog(by_n["N"], by_n["all (s)"], "o-", label=f"slope {result['slope in N at K = N/100']:.2f}")
    right.set(xlabel="kernels N", ylabel="time (s)", title="K = N / 100")
    left.set_ylim(top=12 * by_k["all (s)"].max())  # room for the legend
    for ax in (left, right):
        ax.grid(alpha=0.3, which="both")
        ax.legend()
    with files.replacing(path) as temporary:
        fig.savefig(temporary, dpi=150, format="png")


def load(name: str) -> np.ndarray:
    if name == "vgg16-fashion":
        return np.ascontiguousarray(kclib.extract(kclib.load_model(name)).points)
    weights = [w for w in load_file(name).values() if w.ndim == 4 and w.shape[2:] == (3, 3)]
    return np.concatenate([w.astype(np.float32).reshape(-1, 9) for w in weights])


def keep(result: dict, path: Path) -> None:
    with files.replacing(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "weights", nargs="?", default="vgg16-fashion", help="vgg16-fashion, or a safetensors file"
    )
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    points = load(options.weights)
    kmeans.tree(points[:20_000]).fit(5000)  # compile
    name = Path(options.weights).name.split(".")[0]
    path = OUT / f"kmeans-{name}.json"
    result = json.loads(path.read_text()) if path.exists() else {}  # a run that was stopped goes on
    result |= {"weights": name, "points": len(points), "threads": util_threads.threads()}
    for step, call in {"growth": growth, "ladder": against_single_fits, "memory": memory}.items():
        if step not in result:
            result[step] = call(points, 1 if step == "ladder" else options.repeats)
            keep(result, path)
    for rows in against_peers(points, options.repeats, result.setdefault("peers", [])):
        result["peers"] = sorted(rows, key=lambda row: row["K"])
        keep(result, path)
    draw(result["growth"], OUT / f"kmeans-{name}.png")
    print(pd.DataFrame(result["peers"]).round(3).to_string(index=False))
    print(pd.DataFrame(result["ladder"][1]).round(3).to_string(index=False))
    print(pd.DataFrame(result["memory"]).round(2).to_string(index=False))
    print(pd.Series(result["ladder"][0]).round(3).to_string())
    print({key: round(value, 2) for key, value in result["growth"].items() if "slope" in key})


if __name__ == "__main__":
    main()
