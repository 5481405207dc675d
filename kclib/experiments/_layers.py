"""Evaluate each layer clustered alone, at several K; a cell of the store for each K."""

from collections.abc import Iterable

import pandas as pd

from kclib import datasets, models
from kclib._util import checks
from kclib._util.progress_bars import tqdm
from kclib.errors import InvalidValueError
from kclib.evaluation import attribution
from kclib.experiments import _cell, _provenance
from kclib.models import _model
from kclib.store import VERSIONS, Entry, Store

_NUMBERS = ("top1", "drop", "drop_low", "drop_high", "agreement")  # columns of `attribution.by_layer`


def sweep_layers(
    model: models.Model,
    data: datasets.ImageSet,
    ks: Iterable[int],
    *,
    seed: int = 0,
    precision: str = "fp32",
    device: str = "cpu",
    store: Store | None = None,
) -> pd.DataFrame:
    """Return the drop with one layer alone clustered, all others dense, for each layer and K.

    Parameters
    ----------
    model : Model
    data : ImageSet
        A network is evaluated for each layer and K, so a few hundred images.
    ks : iterable of int
        Clusters of the layer; one with fewer kernels keeps all of them.
    seed : int
        Of the clusterings.
    precision, device : str
        As in `evaluation.evaluate`.
    store : Store, optional
        Where what is finished of each K is looked for and kept; the default store if None.

    Returns
    -------
    pandas.DataFrame
        ``k``, then the columns of `attribution.by_layer`; the last row of each K is that of all layers.

    Raises
    ------
    InvalidValueError
        K below 1; none.
    """
    model, data = _model.as_model(model), datasets.as_image_set(data)
    subject = _cell.Subject(model, data, store or Store(), precision, device)
    ks = dict.fromkeys(checks.check_whole("n_clusters", k, 1) for k in checks.several("ks", ks))
    if not ks:
        raise InvalidValueError("ks is empty; name at least one K.")
    with tqdm(ks, desc="layers alone", unit="K") as bar:
        return pd.concat([_of_entry(_entry(subject, k, seed)) for k in bar], ignore_index=True)


def _entry(subject: _cell.Subject, k: int, seed: int) -> Entry:
    """Return the entry of one K, computed if the store has none."""
    versions = {kind: VERSIONS[kind] for kind in ("clustering", "evaluation")}
    key = subject.key | {"kind": "layers", "k": k, "seed": seed} | versions

    def compute() -> Entry:
        result, _ = _cell.stored_clustering(subject.bank, k, seed=seed, store=subject.store)
        options = {"ways": ["alone"], "precision": subject.precision, "device": subject.device}
        table = attribution.by_layer(subject.model, result, subject.data, **options)
        names = {name: table[name].tolist() for name in ("layer", "way")}
        row = names | {"data": subject.data.name, "images": len(subject.data)} | _provenance.stamp()
        return Entry(key, row, {name: table[name].to_numpy() for name in _NUMBERS})

    return subject.store.once(key, compute)


def _of_entry(entry: Entry) -> pd.DataFrame:
    table = pd.DataFrame({"k": entry.key["k"], "layer": entry.row["layer"], "way": entry.row["way"]})
    return table.assign(**{name: entry.arrays[name] for name in _NUMBERS})
