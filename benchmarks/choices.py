"""Which importance, which representatives, which price: what each loses of the shipped model at equal bytes.

Choices are compared by the KL divergence of the answers from the dense model's, on images held back from
training. Few images tell there what accuracy tells on many.
"""

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

import kclib
from benchmarks import networks, representatives
from benchmarks.recovery import PRECISION, Rows
from kclib import datasets, models
from kclib.clustering import _clustering
from kclib.clustering._scopes import grouping
from kclib.compression import _precisions, byte_counts
from kclib.compression._counting import Count
from kclib.compression._layers import N_TURNS
from kclib.kernels import Layer, _copying
from kclib.recovery import sensitivity

OUT = Path("reports/bench/choices.json")
HELD_BACK, TEST, CALIBRATION = 500, 1000, 256  # images
ALONE = 64  # clusters of a layer, the others dense
TOGETHER, SEEDS = (256, 4096), (0,)  # clusters of each layer of all, and seeds
WEIGHTING = "output"  # where it is not what is compared
SHARES = (16, 32)  # the convolutions keep one byte of so many
SCALE_BITS = (16, 4, 2)
KS, SPARE = (256, 1024), 4  # a price starts from so many times the clusters
STEPS, NEAR = 6, 0.01  # most prices tried, and how near to the bytes wished for is near enough


@dataclass(frozen=True)
class Bench:
    """The dense model, its kernels, and what it answers."""

    model: kclib.Model
    bank: kclib.KernelBank
    images: networks.Images
    held_back: kclib.ImageSet
    test: kclib.ImageSet
    answers: Tensor
    dense: kclib.Evaluation
    rows: Rows

    @classmethod
    def of(cls, model: kclib.Model, rows: Rows) -> "Bench":
        """Return the bench of a model, which it evaluates."""
        images, test = networks.images(), kclib.load_data(limit=TEST)
        held_back = datasets.limited(images.held_back, HELD_BACK)
        answers = log_shares(model, held_back)
        dense = kclib.evaluate(model, test, precision=PRECISION)
        return cls(model, kclib.extract(model), images, held_back, test, answers, dense, rows)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense convolutions."""
        return byte_counts.convolution_bytes(self.model)

    @property
    def unclustered(self) -> int:
        """Bytes of the convolutions that no clustering changes."""
        return self.dense_bytes - sum(math.prod(x.shape) * x.itemsize for x in self.bank.layers)

    def importance(self, kind: str = WEIGHTING) -> np.ndarray:
        """Return sample weights of a kind."""
        images = datasets.limited(self.images.calibration, CALIBRATION)
        return sensitivity.importance(self.model, images, self.bank, kind=kind)

    def divergence(self, rows: np.ndarray) -> dict:
        """Return how far the answers are from the dense model's with other kernels, in the bank's rows."""
        answers = log_shares(models.like(self.model, self._with(rows)), self.held_back)
        each = kl_div(answers, self.answers, reduction="none", log_target=True).sum(1)
        return {"kl": float(each.mean()), "kl_error": float(each.std() / math.sqrt(len(each)))}

    def losses(self, rows: np.ndarray) -> dict:
        """Return that, and the accuracy points lost on test images."""
        model = models.like(self.model, self._with(rows))
        answers = kclib.evaluate(model, self.test, precision=PRECISION)
        lost = kclib.drop(self.dense, answers).points
        drop = {"drop": lost.estimate, "drop_low": lost.low, "drop_high": lost.high}
        return self.divergence(rows) | drop

    def mixed(self, rows: np.ndarray, layer: str) -> np.ndarray:
        """Return those rows of one layer among dense ones, or of ``all``."""
        if layer == "all":
            return rows
        own = self.bank.layer(layer).rows
        result = self.bank.kernels.copy()
        result[own] = rows[own]
        return result

    def _with(self, rows: np.ndarray) -> nn.Module:
        return kclib.insert(self.model, replace(self.bank, kernels=rows))


def log_shares(model: kclib.Model, data: kclib.ImageSet) -> Tensor:
    """Return the log-probability of each class, float64 ``(n, classes)``, as `evaluation.evaluate` runs."""
    network = _copying.copied(models.network_of(model)).eval().to(memory_format=torch.channels_last)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        batches = datasets.batches(data, model.preprocess, 64)
        logits = [network(inputs.to(memory_format=torch.channels_last)) for inputs, _ in batches]
    return torch.cat(logits).double().log_softmax(1)


def stored(found: kclib.Clustering) -> np.ndarray:
    """Return what stands for each kernel once codebooks are fp16, in the rows of the bank."""
    return _clustering.quantized(_precisions.stored(found, "fp16"))


def weighting(bench: Bench, kind: str) -> None:
    """Measure sample weights of one kind: on each layer alone, the others dense, and on all together."""
    key = {"table": "weights", "kind": kind}
    alone = [{"layer": x.name, "clusters": ALONE, "seed": 0} for x in bench.bank.layers]
    together = [{"layer": "all", "clusters": k, "seed": seed} for k in TOGETHER for seed in SEEDS]
    missing = [x for x in (*alone, *together) if not bench.rows.get(**key, **x)]
    if not missing:
        return
    sample_weight = bench.importance(kind)
    for k, seed in sorted({(x["clusters"], x["seed"]) for x in missing}):
        found = stored(kclib.cluster(bench.bank, k, sample_weight=sample_weight, seed=seed))
        for which in (x for x in missing if (x["clusters"], x["seed"]) == (k, seed)):
            bench.rows.put(key | which | bench.divergence(bench.mixed(found, which["layer"])))


@dataclass(frozen=True)
class Setting:
    """A kind of representative, where it is shared, and the bits of a scale in the scaled kinds."""

    kind: str
    scope: str = "layer"
    scale_bits: int = 16

    @classmethod
    def every(cls) -> list["Setting"]:
        """Return all kinds in each layer, scaled ones at several bits, and globally what may gain by it."""
        kinds = representatives.KINDS
        found = [cls(x, scale_bits=bits) for x in kinds for bits in (SCALE_BITS if "scaled" in x else (16,))]
        return found + [cls(x, "global") for x in ("mean", "layer-normalised", "filter-normalised")]

    def largest(self, bank: kclib.KernelBank, n_bytes: float) -> int:
        """Return the largest K a group that fits into so many bytes, 0 if none does."""
        groups = list(grouping(bank, self.scope).values())
        scale_bits = self.scale_bits if "scaled" in self.kind else 0
        count = Count("fp16", scale_bits=scale_bits, orbit=N_TURNS if "symmetric" in self.kind else 1)
        beside = self._beside(bank, len(groups))

        def needed(k: int) -> float:
            return beside + sum(count.bytes(x, min(k, sum(y.n_kernels for y in x))) for x in groups)

        return bisect.bisect_right(range(1, len(bank) + 1), n_bytes, key=needed)

    def _beside(self, bank: kclib.KernelBank, n_groups: int) -> int:
        """Return the bytes of tables of scales, and of the scales of layers or filters."""
        if "scaled" in self.kind:
            return 2 * n_groups * (1 << self.scale_bits) if self.scale_bits < 16 else 0
        owners = {"layer-normalised": _one, "filter-normalised": _filters}.get(self.kind)
        return 2 * sum(map(owners, bank.layers)) if owners else 0


def _one(layer: Layer) -> int:
    return 1


def _filters(layer: Layer) -> int:
    return layer.shape[1 if layer.transposed else 0]


def represented(bench: Bench, sample_weight: np.ndarray, share: int, setting: Setting) -> None:
    """Measure one kind of representative at the most clusters that a budget buys, the same in each group."""
    key = {"table": "representatives", "share": share, **vars(setting)}
    if bench.rows.get(**key):
        return
    budget = bench.dense_bytes / share - bench.unclustered
    key["clusters"] = setting.largest(bench.bank, budget)
    if not key["clusters"]:
        bench.rows.put(key)
        return
    found = representatives.cluster(
        bench.bank,
        key["clusters"],
        setting.kind,
        scope=setting.scope,
        sample_weight=sample_weight,
        scale_bits=setting.scale_bits,
    )
    if (n_bytes := found.n_bytes("fp16")) > budget:
        raise AssertionError(f"{setting} takes {n_bytes} bytes, more than {budget}.")
    losses = bench.losses(stored(found.clustering))
    bench.rows.put(key | {"bytes": n_bytes + bench.unclustered} | losses)


def priced(bench: Bench, sample_weight: np.ndarray, scope: str, k: int) -> None:
    """Measure plain k-means, and one of more clusters at the price that makes it as small."""
    key = {"table": "price", "scope": scope, "asked": k}
    if bench.rows.get(**key, method="priced"):
        return

    def build(price: float, k: int) -> tuple[kclib.Clustering, int]:
        found = kclib.cluster(bench.bank, k, scope=scope, sample_weight=sample_weight, price=price)
        return found, byte_counts.clustered_bytes(bench.model, found)

    def keep(method: str, trial: Trial) -> None:
        found = {"method": method, "price": trial.price, "clusters": trial.found.n_clusters}
        bench.rows.put(key | found | {"bytes": trial.n_bytes} | bench.losses(stored(trial.found)))

    plain = Trial(0.0, *build(0.0, k), 0.0)
    if not bench.rows.get(**key, method="plain"):
        keep("plain", plain)
    errors = _clustering.kernel_errors(bench.bank, plain.found)
    price = first_price(errors * sample_weight)
    keep("priced", matched(lambda price: build(price, SPARE * k), plain.n_bytes, price))


def first_price(errors: np.ndarray) -> float:
    """Return the price of a bit that errors of kernels of nine pixels, as they are, come to.

    At many bits, b more of them divide the error of d pixels by 2^(2b/d) (Gersho and Gray 1992, *Vector
    Quantization and Signal Compression*): a bit spares 2 ln 2 / d of it.
    """
    return 2 * math.log(2) / 9 * float(errors.mean(dtype=np.float64))


@dataclass(frozen=True)
class Trial:
    """What was built at a price, its bytes, and the log of their excess over those wished for."""

    price: float
    found: kclib.Clustering
    n_bytes: int
    excess: float


def matched(build: Callable[[float], tuple[kclib.Clustering, int]], goal: int, price: float) -> Trial:
    """Return the trial whose bytes come nearest to `goal`, of a few that start at a price."""
    tried = []
    for _ in range(STEPS):
        found, n_bytes = build(price)
        tried.append(Trial(price, found, n_bytes, math.log(n_bytes / goal)))
        tried.sort(key=lambda trial: abs(trial.excess))
        if abs(tried[0].excess) <= NEAR:
            break
        price = next_price(*tried[:2])
    return tried[0]


def next_price(best: Trial, other: Trial | None = None) -> float:
    """Return where a line through two trials, in logs of price and bytes, has no excess.

    Bytes fall with the price: by its cube root where there is one trial, and never more slowly than by its
    fiftieth.
    """
    slope = -1 / 3
    if other is not None:
        slope = (best.excess - other.excess) / math.log(best.price / other.price)
    return best.price * math.exp(-best.excess / min(slope, -0.02))


def tables(rows: list[dict]) -> list[pd.DataFrame]:
    """Return the three tables to print."""
    found = pd.DataFrame(rows).convert_dtypes()
    weighted = found[found.table == "weights"]
    weighted = weighted.pivot_table(index=["layer", "clusters"], columns="kind", values="kl", sort=False)
    weighted = weighted.assign(best=weighted.astype(float).idxmin(axis=1)).reset_index()
    losses = ["clusters", "bytes", "kl", "kl_error", "drop", "drop_low", "drop_high"]
    kinds = found[found.table == "representatives"][["share", "kind", "scope", "scale_bits", *losses]]
    prices = found[found.table == "price"][["scope", "asked", "method", "price", *losses]]
    return [weighted, kinds, prices]


def main() -> None:
    rows = Rows(OUT)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench.of(kclib.load_model(), rows)
    for kind in sensitivity.KINDS:
        weighting(bench, kind)
    sample_weight = bench.importance()
    for share in SHARES:
        for setting in Setting.every():
            represented(bench, sample_weight, share, setting)
    for scope in ("global", "layer"):
        for k in KS:
            priced(bench, sample_weight, scope, k)
    for table in tables(rows.rows):
        print(table.to_string(index=False, float_format="{:.4g}".format), end="\n\n")


if __name__ == "__main__":
    main()
