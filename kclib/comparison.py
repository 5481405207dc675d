"""Ways to make a network small, side by side: what each keeps of the bytes and of the accuracy."""

from collections.abc import Iterable
from dataclasses import replace

import pandas as pd

from kclib import datasets, evaluation, footprint, models, sweep
from kclib.bars import tqdm
from kclib.datasets import ImageSet
from kclib.evaluation import Evaluation
from kclib.models import Model
from kclib.peers import Peer


def table(
    model: Model,
    data: ImageSet,
    peers: Iterable[Peer],
    *,
    dense: Evaluation | None = None,
    precision: str = "fp32",
    device: str = "cpu",
    progress: bool = True,
) -> pd.DataFrame:
    """Evaluate networks that stand for a model's, all on the same images.

    Parameters
    ----------
    model : Model
        Dense; its preprocessing serves all.
    data : ImageSet
    peers : iterable of Peer
        `peers.at_bytes` makes some; any other network is one too, with its bytes
        (`footprint.stored_bytes`).
    dense : Evaluation, optional
        Of the model on these images, if it is there already.
    precision, device
        As in `evaluation.evaluate`.
    progress : bool

    Returns
    -------
    pandas.DataFrame
        A row for the dense model and one for each peer: ``method``, ``setting``, ``bytes`` of all
        convolutions, ``ratio`` of the dense ones' to them, and what `sweep.accuracy` says.
    """
    model, data = models.as_model(model), datasets.as_image_set(data)
    options = {"precision": precision, "device": device, "progress": False}
    dense = dense or evaluation.evaluate(model, data, **(options | {"progress": progress}))
    n_bytes, peers = footprint.convolution_bytes(model.network), list(peers)
    rows = [{"method": "dense", "setting": "", "bytes": n_bytes, "ratio": 1.0} | sweep.accuracy(dense, dense)]
    for peer in tqdm(peers, desc="evaluating", unit="network", delay=2, leave=False, disable=not progress):
        answers = evaluation.evaluate(
            replace(model, network=models.network_of(peer.network)), data, **options
        )
        what = {"method": peer.name, "setting": peer.setting, "bytes": peer.bytes}
        rows.append(what | {"ratio": n_bytes / peer.bytes} | sweep.accuracy(answers, dense))
    return pd.DataFrame(rows)
