"""Cells of an experiment: networks that are evaluated once, kept, and compared with the dense one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kclib import evaluation
from kclib.datasets import ImageSet
from kclib.evaluation import _accuracy
from kclib.evaluation._accuracy import Evaluation
from kclib.models import Model
from kclib.store import Entry, Store


@dataclass(frozen=True)
class Cells:
    """What the cells of an experiment are computed from, and where they are kept.

    Attributes
    ----------
    model : Model
        Dense; unchanged.
    data : ImageSet
    store : Store
    precision, device : str
        As in `evaluation.evaluate`.
    """

    seconds: ClassVar[str] = "seconds"  # the name by which an entry has how long evaluating took

    model: Model
    data: ImageSet
    store: Store
    precision: str = "fp32"
    device: str = "cpu"

    def evaluated(self, key: dict, model: Model, row: Mapping, *, progress: bool = False) -> Entry:
        """Return the entry of a cell's network: what is known of it, and what it answers."""
        answers = evaluation.evaluate(
            model, self.data, precision=self.precision, device=self.device, progress=progress
        )
        row = {**row, "images": len(answers.correct), "classes": list(answers.classes)}
        row |= {"top1": answers.top1.estimate, "top5": answers.top5.estimate, self.seconds: answers.seconds}
        arrays = {"predictions": answers.predictions, "labels": answers.labels, "in_top5": answers.in_top5}
        return Entry(key, row, arrays)

    def answers(self, entry: Entry) -> Evaluation:
        """Return what a cell's network answered."""
        kept = entry.arrays
        right = kept["predictions"], kept["labels"], kept["in_top5"].astype(bool)
        return Evaluation(*right, tuple(entry.row["classes"]), entry.row[self.seconds])

    def compared(self, entry: Entry, dense: Evaluation) -> dict[str, object]:
        """Return the columns that tell a cell by its accuracy.

        Those of `_accuracy.accuracy`, with paired intervals against the dense model; ``images``, their
        number; ``right``, which are answered rightly, a bit each (`numpy.packbits`).
        """
        answers = self.answers(entry)
        right = {"images": len(answers.correct), "right": np.packbits(answers.correct).tobytes()}
        return _accuracy.accuracy(answers, dense) | right
