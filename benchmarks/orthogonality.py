"""Pruning x clustering x quantization: what combinations lose beyond the sum, as docs/orthogonality.csv."""

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

import kclib
from kclib import combination, plots, recovery
from kclib._util import files
from kclib.combination import factorial, orthogonality
from kclib.evaluation import _accuracy

OUT = Path("reports/bench/orthogonality.csv")
SPARSITIES = (0, 0.3, 0.5, 0.7)
CLUSTERS = (None, 64, 256, 1024, 4096)
SCOPES = ("layer", "global")
PRECISIONS = (None, "fp16", "int8", "int4")
IMAGES = 1000
RECIPE = replace(recovery.RECIPE, epochs=1)
FOLDER = files.data_dir() / "cache" / "orthogonality"  # states of training


def picture(axes: Axes, path: Path) -> None:
    """Write the figure of some axes."""
    with files.replacing(path) as temporary:
        axes.figure.savefig(temporary, dpi=150, format="png")


def table_of(part: pd.DataFrame, name: str) -> None:
    """Write a table beside the others."""
    with files.replacing(OUT.with_stem(name)) as temporary:
        part.to_csv(temporary, index=False, float_format="%.4f")


def mattering(table: pd.DataFrame) -> pd.DataFrame:
    """Return what training could make usable: int8, one seed, a drop between 1 and 70 points."""
    kept = (table.precision == "int8") & (table.seed == 0) & (table.order != "cluster first")
    return table[kept & table["drop"].between(1, 70)]


def main() -> None:
    model, data = kclib.load_model(), kclib.load_data(limit=IMAGES)
    levels = (SPARSITIES, CLUSTERS, SCOPES, PRECISIONS)
    cells = factorial.cells(*levels)
    cells += [x for x in factorial.cells(*levels, ["cluster first"], [0]) if x not in cells]
    table = factorial.run(model, data, cells, precision="bf16", n_jobs=2)
    table_of(table.drop(columns="right"), OUT.stem)
    excess = orthogonality.orthogonality(table)
    first, kept = (x[x.order != "cluster first"] for x in (table, excess))
    picture(plots.interactions(first)[0], OUT.with_suffix(".png"))
    _, ax = plt.subplots(figsize=(11, 0.6 * kept.clustering.nunique() + 1.8), layout="constrained")
    picture(plots.excess(kept, ax=ax), OUT.with_name("excess.png"))
    print(orthogonality.effects(first, "logit").to_string(index=False))
    print(excess.to_string(index=False))
    options = {"train": kclib.load_data("fashion-mnist", "train"), "folder": FOLDER}
    trained = factorial.trained(model, data, mattering(table), **options, recipe=RECIPE, precision="bf16")
    table_of(trained, "trained")
    print(trained.to_string(index=False))
    smallest(model, table, trained, options)


def smallest(model: kclib.Model, table: pd.DataFrame, trained: pd.DataFrame, options: dict) -> None:
    """Evaluate the smallest trained network that stays within a point on all images; write and weigh it."""
    able = trained[trained["drop"] <= 1]
    row = table.loc[able.bytes.idxmin()]
    combined = (factorial.pipeline(row) >> combination.Train(RECIPE)).run(
        model, seed=int(row.seed), **options
    )
    data = kclib.load_data()
    dense, answers = (kclib.evaluate(x, data, precision="bf16") for x in (model, combined.model))
    file = combined.save(OUT.with_name("combined.safetensors"), architecture=model.name)
    sizes = {"bytes": combined.n_bytes, "ratio": row.ratio, "file": int(file.bytes.sum())}
    kept = row[["pruned", "sparsity", "clustering", "precision", "order"]].to_dict() | sizes
    found = pd.DataFrame([kept | _accuracy.accuracy(answers, dense)])
    table_of(found, "smallest")
    print(found.to_string(index=False))


if __name__ == "__main__":
    main()
