"""Pruning x clustering x quantization: what combinations lose beyond the sum, as docs/orthogonality.csv."""

from pathlib import Path

import matplotlib.pyplot as plt

from kclib import datasets, factorial, factorial_figures, files, models

OUT = Path("reports/bench/orthogonality.csv")
SPARSITIES = (0, 0.3, 0.5, 0.7)
CLUSTERS = (None, 64, 256, 1024, 4096)
SCOPES = ("layer", "global")
PRECISIONS = (None, "fp16", "int8", "int4")
IMAGES = 1000


def main() -> None:
    model, data = models.load(), datasets.load(limit=IMAGES)
    levels = (SPARSITIES, CLUSTERS, SCOPES, PRECISIONS)
    cells = factorial.cells(*levels) + factorial.cells(*levels, ["cluster first"], [0])
    table = factorial.run(model, data, cells, precision="bf16", n_jobs=2).drop_duplicates(
        list(factorial.CELL)
    )
    excess = factorial.orthogonality(table)
    for part, path in ((table.drop(columns="right"), OUT), (excess, OUT.with_stem("excess"))):
        with files.replacing(path) as temporary:
            part.to_csv(temporary, index=False, float_format="%.4f")
    first, kept = (x[x.order != "cluster first"] for x in (table, excess))
    axes = factorial_figures.interactions(first)
    with files.replacing(OUT.with_suffix(".png")) as temporary:
        axes[0].figure.savefig(temporary, dpi=150, format="png")
    fig, ax = plt.subplots(figsize=(11, 0.6 * kept.clustering.nunique() + 1.8), layout="constrained")
    factorial_figures.excess(kept, ax=ax)
    with files.replacing(OUT.with_name("excess.png")) as temporary:
        fig.savefig(temporary, dpi=150, format="png")
    print(factorial.effects(first, "logit").to_string(index=False))
    print(excess.to_string(index=False))


if __name__ == "__main__":
    main()
