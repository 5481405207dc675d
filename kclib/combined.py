"""What a pipeline of steps is given, and what it makes."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from kclib import checkpoint, datasets, sensitivity
from kclib.checkpoint import Contents
from kclib.clustering import Clustering
from kclib.errors import InvalidValueError
from kclib.models import Model
from kclib.stages import Stage, measured


@dataclass(frozen=True)
class Given:
    """What steps have beside the stage; the fields are those of `Pipeline.run`."""

    model: Model
    images: datasets.ImageSet | None = None
    train: datasets.ImageSet | None = None
    folder: str | Path | None = None
    seed: int = 0
    device: str = "cpu"
    progress: bool = True

    @property
    def running(self) -> dict[str, object]:
        """What every part that runs a network is told."""
        return {"device": self.device, "progress": self.progress}

    def weights(self, stage: Stage) -> np.ndarray:
        """Return what an error in each kernel of a stage costs."""
        return sensitivity.weights(stage.model, self.images, stage.bank, seed=self.seed, **self.running)


@dataclass(frozen=True)
class Combined:
    """What a pipeline made.

    Attributes
    ----------
    network : torch.nn.Module
        Its convolutions are compressed where kernels are clustered, else dense.
    clustering : Clustering or None
        Its inertia is that against the kernels that the pipeline began with.
    n_bytes : int
        Of all convolutions: `footprint.stored_bytes`, with entropy-coded indices, where kernels are
        clustered: a zero weight in a representative that is not all zero saves nothing there. Else
        `pruning.sparse_bytes` of the kind that was pruned, with biases as they are rounded.
    table : pandas.DataFrame
        One row a step, ``dense`` first: ``step``; ``bytes`` of all convolutions then; ``zero_kernels``, the
        share of kernels that are all zero, 0 to 1.
    """

    network: nn.Module
    clustering: Clustering | None
    n_bytes: int
    table: pd.DataFrame = field(compare=False)

    @classmethod
    def of(cls, stage: Stage, network: nn.Module, given: Given, table: pd.DataFrame) -> "Combined":
        """Return the last stage, of a final network."""
        found = stage.clustering and measured(stage.clustering, Stage.of(given.model).bank)
        return cls(network, found, int(table.bytes.iloc[-1]), table)

    def save(self, path: str | Path, *, architecture: str | None = None) -> Contents:
        """Write the network as `checkpoint.save` does.

        Raises
        ------
        InvalidValueError, StorageError
            Nothing is clustered; the file could not be written.
        """
        if self.clustering is None:
            raise InvalidValueError("nothing is clustered, and only clustered networks are stored.")
        return checkpoint.save(self.network, path, architecture=architecture)
