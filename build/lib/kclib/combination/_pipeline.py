"""Prune, cluster, quantize and train, in any order: ``Prune(0.5) >> Cluster(256) >> Quantize("int8")``."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from kclib import compression, datasets, models, recovery
from kclib._util import checks
from kclib._util.progress_bars import tqdm
from kclib.clustering import Clustering, cluster, with_inertia
from kclib.combination import _pruning, _sparse_clustering, _stages
from kclib.combination._stages import Stage
from kclib.compression import _precisions
from kclib.compression._container import Contents
from kclib.errors import InvalidValueError
from kclib.models import Model, as_model, fingerprint
from kclib.recovery import _sequential, sensitivity
from kclib.training import Recipe


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
    model : Model
        Its convolutions are compressed where kernels are clustered, else dense.
    clustering : Clustering or None
        Its inertia is that against the kernels that the pipeline began with.
    n_bytes : int
        Of all convolutions: `byte_counts.stored_bytes`, with entropy-coded indices, where kernels are
        clustered: a zero weight in a representative that is not all zero saves nothing there. Else
        `_pruning.sparse_bytes` of the kind that was pruned, with biases as they are rounded.
    table : pandas.DataFrame
        One row a step, ``dense`` first: ``step``; ``bytes`` of all convolutions then; ``zero_kernels``, the
        share of kernels that are all zero, 0 to 1.
    """

    model: Model
    clustering: Clustering | None
    n_bytes: int
    table: pd.DataFrame = field(compare=False)

    @property
    def network(self) -> nn.Module:
        """The bare network of `model`."""
        return self.model.network

    @classmethod
    def of(cls, stage: Stage, network: nn.Module, given: Given, table: pd.DataFrame) -> "Combined":
        """Return the last stage, of a final network."""
        found = stage.clustering and with_inertia(stage.clustering, Stage.of(given.model).bank)
        return cls(models.like(given.model, network), found, int(table.bytes.iloc[-1]), table)

    def save(self, path: str | Path, *, architecture: str | None = None) -> Contents:
        """Write the network as `compression.save` does.

        Raises
        ------
        InvalidValueError, StorageError
            Nothing is clustered; the file could not be written.
        """
        if self.clustering is None:
            raise InvalidValueError("nothing is clustered, and only clustered networks are stored.")
        return compression.save(self.model, path, architecture=architecture)


class Step:
    """One step of a pipeline; ``a >> b`` does b after a."""

    def __rshift__(self, other: "Step | Pipeline") -> "Pipeline":
        return Pipeline((self,)) >> other

    @property
    def needs(self) -> tuple[str, ...]:
        """What `Pipeline.run` must be given for it."""
        return ()

    def after(self, stage: Stage, given: Given) -> Stage:
        """Return what this step makes of a stage."""
        raise NotImplementedError


@dataclass(frozen=True)
class Prune(Step):
    """Make the kernels, filters or weights of the smallest scores zero, as `_pruning.prune` does.

    After `Cluster`, kernels and filters are scored as they stand, by their representatives. The pruned ones
    get one more, zero, the last of their group's; those that stand for none any more go. Of single weights,
    `sparsity` is then the share of the codebooks' that is made zero: those of the smallest square times
    number of kernels served, the squared error that it adds.

    Before `Cluster`, single weights do not stay zero, as representatives are means; only kernels that are all
    zero do.

    Attributes
    ----------
    sparsity : float
        At least 0, below 1.
    kind : {"kernels", "filters", "weights"}
    weighted : bool
        Whether squares count times what an error in their kernel costs (`sensitivity.weights`, by images).
    """

    sparsity: float
    kind: str = "kernels"
    weighted: bool = False

    def __post_init__(self):
        checks.check_known("kind of pruning", self.kind, _pruning.KINDS)
        checks.check_share("sparsity", self.sparsity)

    @property
    def needs(self) -> tuple[str, ...]:
        """What `Pipeline.run` must be given for it."""
        return ("images",) if self.weighted else ()

    def after(self, stage: Stage, given: Given) -> Stage:
        """Return what this step makes of a stage."""
        weights = given.weights(stage) if self.weighted else None
        if stage.clustering is not None and self.kind == "weights":
            stage = stage.clustered(_stages.thinned(stage.clustering, self.sparsity, weights))
            return stage.pruned(stage.model.network, self.kind)
        found = _pruning.prune(stage.model, self.sparsity, kind=self.kind, weights=weights)
        return stage.pruned(found.network, self.kind)


@dataclass(frozen=True)
class Cluster(Step):
    """Cluster the kernels: all, or after `Prune` those that are not zero (`_sparse_clustering.cluster`).

    Attributes
    ----------
    n_clusters, scope
        As in `clustering.cluster`; after `Prune`, zero comes on top.
    weighted : bool
        Whether kernels count by what their errors cost (`sensitivity.weights`, by images).
    corrected : bool
        Whether layers make good what those before them lost (`sequential.correct`, by images). Not after
        `Prune`: what is zero would be moved.
    """

    n_clusters: int | Mapping[str, int]
    scope: str | Mapping[str, str] = "layer"
    weighted: bool = False
    corrected: bool = False

    def __post_init__(self):
        each = self.n_clusters.values() if isinstance(self.n_clusters, Mapping) else [self.n_clusters]
        for k in each:
            checks.check_whole("n_clusters", k, 1)

    @property
    def needs(self) -> tuple[str, ...]:
        """What `Pipeline.run` must be given for it."""
        return ("images",) if self.weighted or self.corrected else ()

    def after(self, stage: Stage, given: Given) -> Stage:
        """Return what this step makes of a stage."""
        options = {"scope": self.scope, "seed": given.seed, "progress": given.progress}
        options["weights"] = given.weights(stage) if self.weighted else None
        if self.corrected:
            options |= {"dense": given.model.network, "precision": stage.precision, "device": given.device}
            found = _sequential.correct(stage.model, given.images, self.n_clusters, **options)
            return stage.on(found.network, clustering=found.clustering).as_stored()
        method = cluster if stage.held is None else _sparse_clustering.cluster
        return replace(stage, clustering=method(stage.bank, self.n_clusters, **options)).as_stored()


@dataclass(frozen=True)
class Quantize(Step):
    """Round to the precision of the file, at once; a file has one, and what later steps make is rounded too.

    Before `Cluster` the kernels themselves are rounded, and then the codebooks found for them. `linear` and
    `biases` are rounded after the last step, wherever this one stands.

    Attributes
    ----------
    codebook : {"fp32", "fp16", "bf16", "int8", "int4"}
        Of codebooks; where nothing is clustered, of the kernels, whole numbers with an fp16 scale for each
        output channel as in `formats.Rounded`.
    linear, biases
        As in `precisions.quantize`; None leaves them.
    """

    codebook: str = "fp16"
    linear: str | None = None
    biases: str | None = None

    def __post_init__(self):
        checks.check_known("precision", self.codebook, _precisions.PRECISIONS)
        checks.check_known("precision", self.linear or "fp32", _precisions.PRECISIONS)
        checks.check_known("precision of biases", self.biases or "fp32", ("fp32", "fp16", "bf16"))

    def after(self, stage: Stage, given: Given) -> Stage:
        """Return what this step makes of a stage."""
        stage = replace(stage, precision=self.codebook, linear=self.linear, biases=self.biases)
        return stage.as_stored()


@dataclass(frozen=True)
class Train(Step):
    """Train with the dense model as teacher (`recovery.finetune`); what was pruned stays zero.

    Kernels that are not clustered are rounded again at the end, to a precision that training did not know.

    Attributes
    ----------
    recipe : Recipe
    """

    recipe: Recipe = recovery.RECIPE

    @property
    def needs(self) -> tuple[str, ...]:
        """What `Pipeline.run` must be given for it."""
        return ("train", "folder")

    def after(self, stage: Stage, given: Given) -> Stage:
        """Return what this step makes of a stage."""
        start = stage.guarded()
        path = Path(given.folder) / f"{fingerprint(start)[:16]}.pt"
        found = recovery.finetune(
            replace(stage.model, network=start), given.train, path, teacher=given.model.network,
            recipe=self.recipe, device=given.device,
        )  # fmt: skip
        return stage.trained(found.network.state_dict())


@dataclass(frozen=True)
class Pipeline:
    """Steps in the order in which they are done; each kind once, but `Train` as often as wanted.

    Orders differ where the arithmetic does. Pruning whole kernels and rounding codebooks commute but for
    ties: zero stays zero, and magnitudes keep their ranks as far as the precision tells them apart.
    Clustering commutes with neither.

    Attributes
    ----------
    steps : tuple of Step

    Raises
    ------
    InvalidValueError
        Something that is no step; a step that is there twice.
    """

    steps: tuple[Step, ...]

    def __post_init__(self):
        if wrong := [step for step in self.steps if not isinstance(step, Step)]:
            raise InvalidValueError(f"{wrong[0]!r} is no step; it must be Prune, Cluster, Quantize or Train.")
        for kind, n in Counter(type(step) for step in self.steps).items():
            if n > 1 and kind is not Train:
                raise InvalidValueError(f"{kind.__name__} is there {n} times; it must be once at most.")

    def __rshift__(self, other: "Step | Pipeline") -> "Pipeline":
        return Pipeline((*self.steps, *(other.steps if isinstance(other, Pipeline) else (other,))))

    def run(
        self,
        model: Model,
        *,
        images: datasets.ImageSet | None = None,
        train: datasets.ImageSet | None = None,
        folder: str | Path | None = None,
        seed: int = 0,
        device: str = "cpu",
        progress: bool = True,
    ) -> Combined:
        """Do all steps.

        The same seed gives the same result, but where a step's own docstring says that it hangs on the number
        of threads (`sequential.correct`, `sensitivity.weights`, training).

        Parameters
        ----------
        model : Model
            Dense; unchanged. Kernels are those of `kernels.extract`; other convolutions stay as they are.
        images : ImageSet, optional
            Some hundred, not the test set, for the steps that need any; their labels are not read.
        train : ImageSet, optional
            Training images, for `Train`.
        folder : path, optional
            For `Train`: where its states go, a file each; the same call resumes.
        seed : int
        device : str
            Where networks are run; the result is on the CPU.
        progress : bool

        Raises
        ------
        InvalidValueError, UnknownNameError
            A step lacks images or a folder; zeros and a corrected clustering; as the steps' own functions.
        """
        model = as_model(model)
        images, train = (x if x is None else datasets.as_image_set(x) for x in (images, train))
        given = Given(model, images, train, folder, seed, device, progress)
        self._check(given)
        stage = Stage.of(model)
        network = stage.final()
        rows = [stage.row("dense", network)]
        for step in tqdm(self.steps, desc="steps", unit="step", delay=2, leave=False, disable=not progress):
            stage = step.after(stage, given)
            network = stage.final()
            rows.append(stage.row(type(step).__name__.lower(), network))
        return Combined.of(stage, network, given, pd.DataFrame(rows))

    def _check(self, given: Given) -> None:
        pruned = False
        for step in self.steps:
            for name in step.needs:
                if getattr(given, name) is None:
                    raise InvalidValueError(f"{step} needs {name}; give {name}=... to run.")
            if pruned and isinstance(step, Cluster) and step.corrected:
                raise InvalidValueError("a corrected clustering would move zeros; prune after it.")
            pruned |= isinstance(step, Prune)
