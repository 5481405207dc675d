"""A first try: cluster a network once, and show in a table and on a page what that saves and costs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from kclib import clustering, compression, evaluation, kernels, plots
from kclib._util import files, progress_bars
from kclib._util.progress_bars import tqdm
from kclib.clustering import Clustering
from kclib.compression import byte_counts
from kclib.compression._container import Contents
from kclib.datasets import ImageSet
from kclib.evaluation import Drop, Evaluation
from kclib.experiments import _reports, adapting
from kclib.models import Model

# The work and its shares of the time, of the shipped model and 1,000 images on 2 cores.
_SHARES = {
    "clustering": 0.1,
    "packing": 0.2,
    "evaluating the dense network": 0.3,
    "evaluating the clustered network": 0.3,
    "drawing": 0.1,
}
_DRAWN = 128  # representatives of the picture
NEXT: Mapping[str, str] = {
    "kclib try package.module:factory --data folder:images": "your own network and images",
    "make run": "all notebooks on the shipped model, as a report (in the repository)",
    "make lab": "the notebooks, to work in (in the repository)",
}


@dataclass(frozen=True)
class Trial:
    """A network before and after clustering, on the same images.

    Attributes
    ----------
    model, data : str
        Their names.
    clusters : Clustering
    before, after : Evaluation
    n_bytes : pandas.DataFrame
        Rows ``in a file`` and ``in memory``, columns ``dense`` and ``clustered``.
    notes : tuple of str
        What a reader must know beside the numbers.
    """

    model: str
    data: str
    clusters: Clustering
    before: Evaluation
    after: Evaluation
    n_bytes: pd.DataFrame
    notes: tuple[str, ...]

    @property
    def lost(self) -> Drop:
        """What the clustering costs."""
        return evaluation.drop(self.before, self.after)

    @property
    def table(self) -> pd.DataFrame:
        """What is shown of it, as text: columns ``dense`` and ``clustered``."""
        kept, of = self.clusters.n_clusters, self.clusters.n_kernels
        rows = {
            "top-1 (%)": (str(self.before.top1), str(self.after.top1)),
            "drop (points)": ("", str(self.lost.points)),
            "kernels stored": (f"{of:,}", f"{kept:,}"),
            "kernels removed (%)": ("", f"{100 * self.clusters.kernels_removed:.2f}"),
        }
        for where, (dense, small) in self.n_bytes.iterrows():
            rows[f"bytes {where}"] = (f"{dense:,}", f"{small:,}")
            rows[f"times smaller {where}"] = ("", f"{dense / small:.1f}")
        return pd.DataFrame.from_dict(rows, orient="index", columns=["dense", "clustered"])

    @property
    def answer(self) -> str:
        """The whole in one sentence."""
        removed = 100 * self.clusters.kernels_removed
        smaller = self.n_bytes.dense["in a file"] / self.n_bytes.clustered["in a file"]
        return (
            f"With {removed:.2f} % of its kernels removed, {self.model} fits into a file {smaller:.1f} times "
            f"smaller, with {self.lost}, from {self.before.top1.estimate:.2f} % top-1 accuracy."
        )


def run(
    model: Model,
    data: ImageSet,
    out: Path,
    *,
    n_clusters: int = 1024,
    limit: int = 1000,
    classes: str | Sequence[str] | None = None,
    progress: bool = True,
) -> tuple[Trial, Path]:
    """Cluster a network per layer, evaluate it before and after, and write ``small.safetensors`` and a page.

    Parameters
    ----------
    model : Model
    data : ImageSet
    out : Path
        Folder of the two files.
    n_clusters : int
        K, for each layer; where no layer has so many kernels, a quarter of the largest.
    limit : int
        Images, or all where there are fewer.
    classes : "by position" or sequence of str, optional
        As in `evaluation.evaluate`.
    progress : bool

    Returns
    -------
    Trial
    Path
        Of the page.

    Raises
    ------
    KclibError
        As `kernels.extract`, `compression.compress`, `evaluation.evaluate` and `compression.save`.
    """
    out = files.expanded(out)
    files.check_output(out / "index.html")
    with _stages(progress) as begin:
        begin("clustering")
        bank = kernels.extract(model)
        k, less = adapting.clusters(bank, n_clusters)
        images, fewer = adapting.images(data, limit)
        clusters = clustering.cluster(bank, k, progress=False)
        begin("packing")
        small = compression.compress(model, clusters)
        file = compression.save(small, out / "small.safetensors", architecture=model.name)
        n_bytes = _bytes(model, clusters, file)
        before, after = (
            evaluation.evaluate(network, images, classes=classes, progress=begin(stage))
            for network, stage in ((model, "evaluating the dense network"),
                                   (small, "evaluating the clustered network"))
        )  # fmt: skip
        begin("drawing")
        notes = tuple(dict.fromkeys(x for x in (less, fewer, *clusters.notes, *before.notes) if x))
        trial = Trial(model.name, images.name, clusters, before, after, n_bytes, notes)
        page = out / "index.html"
        _write(page, trial)
    return trial, page


def _bytes(model: Model, clusters: Clustering, file: Contents) -> pd.DataFrame:
    """Return the bytes of a network and of its clustered copy, in a file and in memory."""
    dense = byte_counts.dense_bytes(model)
    held = compression.footprint(model, clusters, codings=["fixed"]).loc["model in memory"]
    rows = {"in a file": (dense, file.bytes.sum()), "in memory": (held["dense"], held["fixed_fp32"])}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["dense", "clustered"])


def _write(page: Path, trial: Trial) -> None:
    group = max(trial.clusters.groups, key=lambda x: len(x.indices))
    codebook, counts = clustering.by_use(group)
    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = plots.kernel_sheet(codebook[:_DRAWN], counts=counts[:_DRAWN], columns=16, ax=figure.subplots())
    ax.set_title(f"{group.name}: the {len(codebook[:_DRAWN]):,} representatives that most kernels share")
    _reports.write_page(
        page, "try", trial=trial, next=NEXT, picture=_reports.as_url(figure),
        table=trial.table.to_html(border=0),
    )  # fmt: skip


@contextmanager
def _stages(shown: bool) -> Iterator[Callable[[str], Callable[[float], None]]]:
    """Yield what begins a part of the work: it returns what is told the share of that part that is done."""
    with progress_bars.of_shares("", shown) as bar, progress_bars.ticking(bar):
        yield lambda stage: _begun(bar, stage)


def _begun(bar: tqdm, stage: str) -> Callable[[float], None]:
    names = list(_SHARES)
    start = sum(_SHARES[name] for name in names[: names.index(stage)])
    bar.set_description_str(stage, refresh=False)

    def done(share: float) -> None:
        bar.update(start + share * _SHARES[stage] - bar.n)

    done(0.0)
    return done
