"""Every wrong input of `test_bad_input.py`: what is called, with what, and what its one sentence must say.

Each call gets `given`: a folder of its own, and a tiny model with its images, kernels and clustering.
"""

import pickle
import tarfile
import threading
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tiny import tiny_data, tiny_model, write_pictures
from torch import nn

from kclib import clustering as clusterings
from kclib import (
    combination,
    compression,
    datasets,
    evaluation,
    experiments,
    explorers,
    kernels,
    kmeans,
    loading,
    models,
    plots,
    recovery,
    similarity,
    training,
)
from kclib._util import files
from kclib.clustering import Clustering, _clustering, _scopes
from kclib.combination import _pipeline, _pruning, _sparse_clustering, _stages, factorial, orthogonality
from kclib.compression import (
    _architectures,
    _checkpoint,
    _container,
    _entropy_coding,
    _exporting,
    _extra_state,
    _formats,
    _packing,
    _precisions,
    _trial_run,
    byte_counts,
    latency,
    residence,
)
from kclib.datasets import _class_names, _image_folders, _labelled, _loader, _pictures, _preprocessing
from kclib.errors import (
    DamagedFileError,
    InvalidValueError,
    MissingFileError,
    StoppedError,
    StorageError,
    UnknownNameError,
)
from kclib.evaluation import _accuracy, _methods, attribution, damage, peers
from kclib.experiments import (
    _batch,
    _cell,
    _compare,
    _documents,
    _first_try,
    _grid,
    _pool,
    _profiles,
    _reports,
    adapting,
    parameters,
    reports,
)
from kclib.explorers import _background, _clusterer, _controls, interactive_map
from kclib.kernels import _bank, _convolutions, _copying
from kclib.kmeans import _entropy, _streaming, symmetric
from kclib.models import _checkpoint_files, _factories, _inference, _loading, _model, _state_dicts
from kclib.recovery import (
    _calibration,
    _moments,
    _sequential,
    restoration,
    sensitivity,
)
from kclib.similarity import _neighbours, distances, embedding, null_models
from kclib.store import Entry, Store

NAN, INFINITE = float("nan"), float("inf")
WRONG, UNKNOWN, MISSING, DAMAGED, STORAGE, STOPPED = (
    InvalidValueError, UnknownNameError, MissingFileError, DamagedFileError, StorageError, StoppedError,
)  # fmt: skip


class Idle(nn.Sequential):
    """A network that does not run its convolutions, and keeps what no file does."""

    def forward(self, x):
        return x

    def get_extra_state(self):
        return {1, 2}


class Mapping(nn.Module):
    """A network that does not say which of its answers counts."""

    def forward(self, x):
        return {"a": x, "b": None, "c": 1}


@dataclass
class Given:
    """What a call is given, made when it is asked for."""

    folder: Path
    model: models.Model = field(default_factory=tiny_model)
    data: datasets.ImageSet = field(default_factory=tiny_data)

    @cached_property
    def network(self) -> nn.Module:
        return self.model.network

    @cached_property
    def bank(self) -> kernels.KernelBank:
        return kernels.extract(self.network)

    @cached_property
    def points(self) -> np.ndarray:
        return self.bank.points

    @cached_property
    def clustering(self) -> Clustering:
        return clusterings.cluster(self.bank, 3, progress=False)

    @cached_property
    def small(self) -> nn.Module:
        return compression.compress(self.network, self.clustering)

    @cached_property
    def answers(self) -> evaluation.Evaluation:
        return evaluation.evaluate(self.model, self.data, progress=False)

    @cached_property
    def graph(self) -> embedding.Graph:
        return embedding.graph(self.points, store=self.store)

    @cached_property
    def importance(self) -> np.ndarray:
        return np.ones(len(self.bank), np.float32)

    @property
    def store(self) -> Store:
        return Store(self.folder / "store")

    @cached_property
    def explorer(self) -> explorers.ClusterExplorer:
        return explorers.ClusterExplorer(self.model, self.data, n_clusters=4)

    @property
    def twisted(self) -> nn.Module:
        """A network whose kernels are no squares."""
        return nn.Sequential(nn.Conv2d(3, 4, (1, 3)))

    @property
    def locked(self) -> nn.Module:
        """A network that holds what cannot be copied."""
        self.network.lock = threading.Lock()
        return self.network

    @property
    def other(self) -> nn.Module:
        """A network of another architecture."""
        return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 2, 3))

    @property
    def none(self) -> datasets.ImageSet:
        """A data set without images."""
        return _loader.select(self.data, torch.zeros(0, dtype=torch.int64))

    def broken(self, value: float) -> nn.Module:
        """Return the network with one weight that is no number, or infinite."""
        with torch.no_grad():
            self.network[0].weight[1, 2, 0, 0] = value
        return self.network

    def path(self, name: str, content: bytes | str = b"") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def compressed(self) -> Path:
        compression.save(self.small, self.folder / "small.safetensors")
        return self.folder / "small.safetensors"

    def cut(self) -> Path:
        content = self.compressed().read_bytes()
        return self.path("cut.safetensors", content[: len(content) // 2])

    def bomb(self, name: str = "bomb.pt") -> Path:
        """Return the path of a pickle that would make a folder if it were unpickled."""
        return self.path(name, pickle.dumps(Bomb(self.folder / "exploded")))

    def slip(self) -> Path:
        """Place an archive of a data set whose member would land outside its folder."""
        import os

        os.environ["KCLIB_DATA"] = str(self.folder)
        with tarfile.open(self.folder / "imagenette2-160.tgz", "w:gz") as archive:
            evil = self.path("evil", "out")
            archive.add(evil, "../../escaped")
        return self.folder

    def table(self, **columns) -> pd.DataFrame:
        row = {
            "model": "m", "data": "d", "scope": "layer", "k": 2, "method": "plain", "seed": 0, "images": 8,
            "images_hash": "x", "right": b"\xff", "top1": 100.0, "bytes": 9,
        }  # fmt: skip
        return pd.DataFrame([row | columns])

    @property
    def photos(self) -> dict:
        """What a grid of a model and images that fit each other has."""
        folder = write_pictures(self.folder / "photos")
        return {"models": (_profiles.ModelSource("tiny:photo_model"),), "data": (f"folder:{folder}",)}

    @property
    def store_in_a_file(self) -> Store:
        """A store whose folder is a file, so that nothing can be written to it."""
        (self.folder / "file").touch()
        return Store(self.folder / "file")

    def grid(self, **changed) -> _profiles.Grid:
        levels = {"limit": 0, "scopes": ("layer",), "clusters": (2,)}
        source = _profiles.ModelSource("tiny:tiny_model")
        return _profiles.Grid(**{"models": (source,), "data": ("fashion-mnist",)} | levels | changed)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def nowhere(temporary: Path) -> Path:
    """Ask for a cache as a user who may write nowhere, and whose folder for temporary files is a file."""
    with (
        mock.patch.object(files.places, "is_writable", return_value=False),
        mock.patch.object(files.tempfile, "gettempdir", return_value=str(temporary)),
    ):
        return files.cache_dir()


def opened(context):
    with context:
        pass


# What is called; how; the exception; what its sentence says.
WRONG_INPUTS = [
    # Models and kernels
    (loading.load_model, lambda g: loading.load_model("vgg16-fashin"), UNKNOWN, "did you mean 'vgg16-fashion'"),
    (loading.load_model, lambda g: loading.load_model(""), UNKNOWN, "unknown model ''"),
    (loading.load_model, lambda g: loading.load_model("../../etc/passwd"), UNKNOWN, "unknown model '../../etc/passwd'"),
    (loading.load_model, lambda g: loading.load_model("模型"), UNKNOWN, "unknown model '模型'"),
    (loading.load_model, lambda g: loading.load_model(None), UNKNOWN, "unknown model None"),
    (loading.load_model, lambda g: loading.load_model("tiny:absent"), WRONG, "could not be imported"),
    (loading.load_model, lambda g: loading.load_model("no_module:x"), WRONG, "No module named 'no_module'"),
    (loading.load_model, lambda g: loading.load_model("tiny:tiny_data"), WRONG, "ImageSet"),
    (loading.load_model, lambda g: loading.load_model(device="gpu9"), WRONG, "device 'gpu9' cannot be used here"),
    (loading.load_model, lambda g: loading.load_model(weights=g.folder / "absent.pt"), MISSING, "absent.pt"),
    (loading.load_model, lambda g: loading.load_model(weights=g.folder), MISSING, "folder"),
    (loading.load_model, lambda g: loading.load_model(weights=g.bomb()), DAMAGED, "bomb.pt is damaged or holds more"),
    (loading.load_model, lambda g: loading.load_model(weights=g.bomb("bomb.safetensors")), DAMAGED, "bomb.safetensors"),
    (loading.load_model, lambda g: loading.load_model(weights=g.path("empty.pt")), DAMAGED, "empty.pt"),
    (loading.load_model, lambda g: loading.load_model(weights=g.cut()), DAMAGED, "cut.safetensors"),
    (loading.load_model, lambda g: loading.load_model(weights=g.compressed()), WRONG, "this architecture does not have"),
    (_loading.architecture, lambda g: _loading.architecture("resnet81"), UNKNOWN, "did you mean 'resnet"),
    (loading.load_model, lambda g: loading.load_model(weights=3), WRONG, "weights are a int"),
    (loading.load_model, lambda g: loading.load_model(weights={}), DAMAGED, "the mapping of weights holds no state dict"),
    (loading.load_model, lambda g: loading.load_model(weights={"a": torch.ones(1)}), WRONG, "the mapping of weights does not fit"),
    (loading.load_model, lambda g: loading.load_model("w.pt"), WRONG, "'w.pt' is a file's name"),
    (_factories.made, lambda g: _factories.made("tiny:absent"), WRONG, "has no 'absent'"),
    (datasets.load_data, lambda g: datasets.load_data(str(g.folder)), WRONG, "is a folder"),
    (_state_dicts.read_all, lambda g: _state_dicts.read_all(g.path("x.pt", b"\x89HDF\r\n")), WRONG, "x.pt is an HDF5 file"),
    (_state_dicts.read_all, lambda g: _state_dicts.read_all(g.path("x.pt::ema", b"PK\3\4")), DAMAGED, "x.pt::ema"),
    (_state_dicts.read, lambda g: _state_dicts.read(g.path("x.pt", b"PK\3\4")), DAMAGED, "x.pt"),
    (_state_dicts.read, lambda g: _state_dicts.read(g.folder / "absent.pt::ema"), MISSING, "absent.pt does not exist"),
    (_state_dicts.fill, lambda g: _state_dicts.fill(g.network, {"": {"a": torch.ones(1)}}, "w.pt"), WRONG, "w.pt does not fit"),
    (_checkpoint_files.read, lambda g: _checkpoint_files.read(g.path("x.pt", b"<html>")), WRONG, "web page"),
    (_checkpoint_files.read, lambda g: _checkpoint_files.read(g.path("x.pt", "{}")), DAMAGED, "no index"),
    (_model.moved, lambda g: _model.moved(nn.Conv2d(1, 1, 3, device="meta"), "cpu"), WRONG, "no values yet"),
    (_inference.answers, lambda g: models.answers(g.network, torch.ones(2, 7)), WRONG, "does not run on inputs of shape (2, 7)"),
    (_inference.answers, lambda g: models.answers(nn.Flatten(0), torch.ones(2, 7)), WRONG, "answers shape (14,) to 2 images"),
    (_inference.answers, lambda g: _inference.answers(Mapping(), torch.ones(2, 7)), WRONG, "a: (2, 7)"),
    (_inference.run, lambda g: _inference.run(g.network, torch.ones(2, 1, 8, 8)), WRONG, "reads 3 channels and the images have 1"),
    (_inference.on_device, lambda g: _inference.on_device(nn.LazyLinear(2), "cpu"), WRONG, "weight has no values yet"),
    (loading.load_model, lambda g: loading.load_model("vgg16-fashion", input_shape=(3, 8, 8)), WRONG, "makes (3, 32, 32)"),
    (loading.load_model, lambda g: loading.load_model("tiny:tiny_model", input_shape=(3, 8)), WRONG, "(channels, height, width)"),
    (models.network_of, lambda g: models.network_of("vgg16"), WRONG, "is a str"),
    (_model.as_model, lambda g: _model.as_model(g.bank), WRONG, "is a KernelBank"),
    (models.plain, lambda g: models.plain("x", g.network, (3, 0, 8)), WRONG, "height of input_shape is 0"),
    (_model.told, lambda g: _model.told(g.model, classes="by position"), WRONG, "must be a list of the names"),
    (_model.told, lambda g: _model.told(g.model, input_shape=(3, 0, 8)), WRONG, "is 0"),
    (models.input_shape, lambda g: models.input_shape(g.network), WRONG, "give input_shape"),
    (models.fingerprint, lambda g: models.fingerprint(None), WRONG, "is a NoneType"),
    (models.fingerprint, lambda g: models.fingerprint(nn.Linear(2, 2, device="meta")), WRONG, "no values yet"),
    (kernels.extract, lambda g: kernels.extract(nn.Linear(3, 3)), WRONG, "no"),
    (kernels.extract, lambda g: kernels.extract(nn.Sequential()), WRONG, "no"),
    (kernels.extract, lambda g: kernels.extract("vgg16"), WRONG, "it must be a Model or a torch.nn.Module"),
    (kernels.extract, lambda g: kernels.extract(g.broken(NAN)), WRONG, "NaN"),
    (kernels.extract, lambda g: kernels.extract(g.broken(INFINITE)), WRONG, "infinit"),
    (kernels.extract, lambda g: kernels.extract(nn.Conv2d(1, 1, 3, device="meta")), WRONG, "meta device"),
    (kernels.extract, lambda g: kernels.extract(nn.LazyConv2d(1, 3)), WRONG, "no values yet"),
    (kernels.extract, lambda g: kernels.extract(g.network, size=7), WRONG, "7"),
    (kernels.insert, lambda g: kernels.insert(g.other, g.bank), WRONG, "use the architecture"),
    (kernels.insert, lambda g: kernels.insert(g.network, g.clustering), WRONG, "the bank is a Clustering"),
    (kernels.insert, lambda g: kernels.insert(g.network, replace(g.bank, kernels=g.bank.kernels * NAN)), WRONG, "finite in torch.float32"),
    (_bank.bank_of, lambda g: clusterings.cluster(g.points, 4), WRONG, "kmeans.fit clusters points (n, d)"),
    (_bank.bank_of, lambda g: clusterings.cluster(torch.tensor(g.points), 4), WRONG, "the kernels are a Tensor"),
    (_bank.bank_of, lambda g: clusterings.cluster("vgg16-fashion", 4), WRONG, "the kernels are a str"),
    (_bank.bank_of, lambda g: clusterings.cluster(g.small, 4), WRONG, "compressed already"),
    (_convolutions.set_weight, lambda g: _convolutions.set_weight(g.network[0], torch.ones(3)), WRONG, "3 values"),
    (_convolutions.usable, lambda g: _convolutions.usable(nn.Conv2d(1, 1, 3, device="meta")), WRONG, "no values yet"),
    (_copying.copied, lambda g: _copying.copied(g.locked), WRONG, "network.lock"),
    (models.network_of, lambda g: kernels.extract(g.bank), WRONG, "the network is a KernelBank"),
    (_bank.matched, lambda g: _bank.matched(nn.Linear(1, 1), g.bank.layers), WRONG, "no such layer"),
    (kernels.sample, lambda g: kernels.sample(g.bank, 0), WRONG, "per_layer is 0"),
    (kernels.sample, lambda g: kernels.sample(g.bank, 1, seed=-1), WRONG, "seed is -1"),
    (kernels.KernelBank.origin, lambda g: g.bank.origin(np.array([999])), WRONG, "rows must be whole numbers"),
    # Similarity
    (similarity.named, lambda g: similarity.named("cosin"), UNKNOWN, "did you mean 'cosine'"),
    (distances.Distance.prepared, lambda g: similarity.named("cosine").prepared([["a"]]), WRONG, "real numbers"),
    (null_models.drawn, lambda g: null_models.drawn("shuffle", g.points), UNKNOWN, "unknown null model 'shuffle'"),
    (similarity.pair_histogram, lambda g: similarity.pair_histogram(g.points, [0, 0]), WRONG, "edges must be"),
    (similarity.pair_histogram, lambda g: similarity.pair_histogram(g.points[:1], [0, 1]), WRONG, "at least 2"),
    (similarity.comparable, lambda g: similarity.comparable(g.bank, share=-1), WRONG, "share is -1"),
    (similarity.closest, lambda g: similarity.closest(g.bank, 999, 1), WRONG, "rows must be whole numbers"),
    (similarity.closest, lambda g: similarity.closest(g.bank, 0, 0), WRONG, "k is 0"),
    (_neighbours.nearest, lambda g: _neighbours.nearest(g.points * NAN), WRONG, "NaN"),
    (_neighbours.nearest, lambda g: _neighbours.nearest(g.points, k=len(g.points)), WRONG, "k is 36"),
    (_neighbours.nearest, lambda g: _neighbours.nearest(g.points, n_threads=0), WRONG, "n_threads is 0"),
    (embedding.graph, lambda g: embedding.graph(g.points, n_neighbors=1), WRONG, "n_neighbors is 1"),
    (embedding.layout, lambda g: embedding.layout(g.graph, min_dist=2, store=g.store), WRONG, "min_dist is 2"),
    (embedding.placed, lambda g: embedding.placed(g.graph, np.ones((2, 4))), WRONG, "must be (n, 9)"),
    (interactive_map.interactive, lambda g: interactive_map.interactive(np.ones((2, 2)), g.bank, np.arange(3), clusters={}), WRONG, "3"),
    (plots.kernel_sheet, lambda g: plots.kernel_sheet(np.ones(9)), WRONG, "must be (m, kh, kw)"),
    (plots.accuracy_curve, lambda g: plots.accuracy_curve(pd.DataFrame()), WRONG, "no column 'scope'"),
    # Clustering
    (kmeans.fit, lambda g: kmeans.fit(g.points, 0), WRONG, "n_clusters is 0; it must be a whole number, 1 to 36, the number of kernels"),
    (kmeans.fit, lambda g: kmeans.fit(g.points, 37), WRONG, "n_clusters is 37"),
    (kmeans.fit, lambda g: kmeans.fit(g.points, 3, quality="good"), UNKNOWN, "known: fast, best"),
    (clusterings.cluster, lambda g: clusterings.cluster(g.bank, 3, quality="best", scaled=True), WRONG, "quality is best; it must be fast where kernels are scaled"),
    (kmeans.fit, lambda g: kmeans.fit(g.points, 2.5), WRONG, "n_clusters is 2.5"),
    (kmeans.fit, lambda g: kmeans.fit(np.ones(9), 1), WRONG, "shape"),
    (kmeans.fit, lambda g: kmeans.fit(np.full((4, 9), NAN), 2), WRONG, "NaN"),
    (kmeans.fit, lambda g: kmeans.fit(g.points, 2, sample_weight=-g.importance), WRONG, "sample_weight"),
    (kmeans.fit, lambda g: kmeans.fit(g.points, 2, sample_weight=[1]), WRONG, "sample_weight"),
    (kmeans.fit, lambda g: kmeans.fit(g.points, 2, seed=-1), WRONG, "seed is -1"),
    (kmeans.fit, lambda g: kmeans.fit(g.points, 2, init=np.ones((3, 9))), WRONG, "init"),
    (kmeans.tree, lambda g: kmeans.tree(g.points, leaves=0), WRONG, "leaves is 0"),
    (kmeans.Tree.cut, lambda g: kmeans.tree(g.points, leaves=9).cut(10), WRONG, "n_clusters is 10; it must be a whole number, 1 to 9"),
    (kmeans.Tree.fit, lambda g: kmeans.tree(g.points).fit(37), WRONG, "n_clusters is 37; it must be a whole number, 1 to 36"),
    (kmeans.Options, lambda g: kmeans.Options(25, NAN, 1.6, 0, 1), WRONG, "tol is nan"),
    (_streaming.Parts, lambda g: _streaming.Parts(7), WRONG, "the points are 7"),
    (symmetric.fit, lambda g: symmetric.fit(np.ones((4, 6)), 2, turned=True), WRONG, "square"),
    (_entropy.fit, lambda g: _entropy.fit(g.points, 2, price=-1), WRONG, "price is -1"),
    (clusterings.cluster, lambda g: clusterings.cluster(g.bank, 37, scope="global"), WRONG, "37"),
    (clusterings.cluster, lambda g: clusterings.cluster(g.bank, 2, scope="gobal"), UNKNOWN, "did you mean 'global'"),
    (_cell.stored_clustering, lambda g: _cell.stored_clustering(g.bank, 2, method="turn"), UNKNOWN, "did you mean 'turned'"),
    (_cell.clustering_key, lambda g: _cell.clustering_key(g.bank, 2, scope="layer", method="", seed=0), UNKNOWN, "method ''"),
    (_scopes.grouping, lambda g: _scopes.grouping(g.bank, {"0": "a"}), WRONG, "every layer"),
    (_scopes.largest, lambda g: _scopes.largest(g.bank, {"0": "a"}), WRONG, "every layer"),
    (adapting.clusters, lambda g: adapting.clusters(g.bank, 0), WRONG, "n_clusters is 0"),
    (adapting.several, lambda g: adapting.several(g.bank, [2], []), WRONG, "scopes is empty"),
    (adapting.images, lambda g: adapting.images(g.data, -1), WRONG, "test images is -1"),
    (adapting.budgets, lambda g: adapting.budgets(g.model, g.bank, [0.5]), WRONG, "a share is 0.5"),
    (adapting.about, lambda g: adapting.about(g.model, g.none), WRONG, "no images"),
    (_scopes.wanted, lambda g: clusterings.cluster(g.bank, {"9": 2}), WRONG, "name every group"),
    (_sparse_clustering.cluster, lambda g: _sparse_clustering.cluster(g.bank, 2, price=NAN), WRONG, "price is nan"),
    (_clusterer.Clusterer.clustering, lambda g: _clusterer.Clusterer(g.bank, 0).clustering(_clusterer.ClusterQuestion(("0",), n_clusters=2), _background.Progress(lambda: True)), STOPPED, "a newer question came"),
    (explorers.ClusterExplorer.evaluate, lambda g: g.explorer.evaluate(41), WRONG, "is 41"),
    (_controls.whole, lambda g: _controls.whole("K", "3.7", 9), WRONG, "3.7 is no whole number: K is 1 to 9"),
    (_background.Explorer.choose, lambda g: g.explorer.choose(n_clusters=37), WRONG, "37"),
    (_sequential.correct, lambda g: _sequential.correct(g.model, g.none, 2), WRONG, "no images"),
    (_sequential.correct, lambda g: _sequential.correct(g.model, g.data, 2, dense=g.other), WRONG, "use the architecture"),
    (sensitivity.importance, lambda g: sensitivity.importance(g.model, g.data, g.bank, kind="fischer"), UNKNOWN, "'fisher'"),
    (sensitivity.importance, lambda g: sensitivity.importance(g.model, g.none, g.bank), WRONG, "no images"),
    # Replacement and bytes
    (byte_counts.largest_k, lambda g: byte_counts.largest_k(g.model, 9), WRONG, "n_bytes is 9"),
    (compression.compress, lambda g: compression.compress(g.other, g.clustering), WRONG, "use the architecture"),
    (compression.compress, lambda g: compression.compress(g.network, g.clustering, precision="int3"), UNKNOWN, "'int3'"),
    (compression.replaced, lambda g: compression.replaced(g.other, g.clustering), WRONG, "use the architecture"),
    (compression.compress, lambda g: compression.compress(tiny_model(seed=1), g.clustering), WRONG, "other kernels"),
    (compression.compress, lambda g: compression.compress(g.model, g.clustering, inputs=3), WRONG, "inputs is a int"),
    (compression.expand, lambda g: compression.expand(Idle(*g.small)), WRONG, "layer 0"),
    (compression.expand, lambda g: compression.expand("small"), WRONG, "Model or a torch.nn.Module"),
    (_trial_run.check, lambda g: _trial_run.check(Idle(*g.network), ["0"]), WRONG, "never uses layer 0"),
    (_extra_state.stored, lambda g: _extra_state.stored(Idle(*g.network)), WRONG, "holds a set"),
    (_extra_state.fill, lambda g: _extra_state.fill(g.folder, g.network, {}, {"0": ["plain", 1]}), WRONG, "takes none"),
    (compression.save, lambda g: compression.save(Idle(*g.small), g.folder / "x"), WRONG, "holds a set"),
    (compression.footprint, lambda g: compression.footprint(g.other, g.clustering), WRONG, "use the architecture"),
    (_entropy_coding.decode, lambda g: _entropy_coding.decode(np.zeros(1, np.uint32), np.array([1, 1], np.uint32), 9), DAMAGED, "the entropy-coded indices are damaged"),
    (_entropy_coding.unpacked_counts, lambda g: _entropy_coding.unpacked_counts(np.zeros(5, np.uint8), 2), DAMAGED, "a table of frequencies is damaged"),
    (_packing.pack, lambda g: _packing.pack(np.array([8]), 3), WRONG, "8"),
    (_packing.pack, lambda g: _packing.pack(np.array([1]), 25), WRONG, "bits of an index is 25"),
    (_precisions.float_type, lambda g: _precisions.float_type("fp8"), UNKNOWN, "'fp8'"),
    (_precisions.store, lambda g: _precisions.store(torch.tensor([[1e9]]), "fp16"), WRONG, "fp16"),
    (_precisions.quantize, lambda g: _precisions.quantize(g.network, linear="int9"), UNKNOWN, "'int9'"),
    (_precisions.linear_bytes, lambda g: _precisions.linear_bytes(g.network, "int9", entropy_coded=True), UNKNOWN, "'int9'"),
    (_exporting.kind_of, lambda g: _exporting.kind_of("x.tflite"), WRONG, "must end in .onnx or .pt2"),
    (_precisions.unpack, lambda g: _precisions.unpack({"values": torch.zeros(2, dtype=torch.uint8)}, "int4", (9,)), DAMAGED, "are not stored in 5 bytes"),
    (_precisions.checked, lambda g: _precisions.checked(torch.tensor([INFINITE]), "fp16"), WRONG, "no finite fp16"),
    (_calibration.calibrate, lambda g: _calibration.calibrate(g.model, g.network, g.data), WRONG, "clustered"),
    (_calibration.calibrate, lambda g: _calibration.calibrate(replace(g.model, network=g.small), g.network, g.data, damping=0), WRONG, "damping is 0"),
    (_moments.batches, lambda g: _moments.batches(g.none, g.model.preprocess, 4, "cpu"), WRONG, "no images"),
    (_moments.steps, lambda g: _moments.steps(nn.ModuleDict({"a": nn.Conv2d(3, 3, 3)}), torch.ones(1, 3, 8, 8), {"a"}), WRONG, "does not run"),
    (_moments.measure, lambda g: _moments.measure(g.network, g.network, _moments.LayerMoments("0", 1, None), lambda: iter([torch.full((2, 3, 8, 8), NAN)]), n_images=2), WRONG, "the inputs of layer 0 are not finite"),
    (restoration.restore_worst, lambda g: restoration.restore_worst(g.model, g.clustering, -1), WRONG, "budget is -1"),
    (damage.by_cluster, lambda g: damage.by_cluster(kernels.extract(g.other), g.clustering), WRONG, "layer"),
    (damage._restored, lambda g: damage._restored(g.model, g.clustering, pd.DataFrame()), WRONG, "no column 'group'"),
    (_clustering.dense_kernels, lambda g: _clustering.dense_kernels(g.other, g.clustering), WRONG, "use the architecture"),
    (_pruning.prune, lambda g: _pruning.prune(g.model, 1), WRONG, "sparsity is 1"),
    (_pruning.sparse_bytes, lambda g: _pruning.sparse_bytes(g.network, precision="x"), UNKNOWN, "'x'"),
    (_methods.palettized, lambda g: _methods.palettized(g.network, 0), WRONG, "bits is 0"),
    (_methods.product_quantized, lambda g: _methods.product_quantized(g.network, 0, 3), WRONG, "0"),
    (_methods.quantized, lambda g: _methods.quantized(g.network, 99), WRONG, "bits is 99"),
    (_methods.pruned, lambda g: _methods.pruned(g.network, 0), WRONG, "keep is 0"),
    (peers.at_bytes, lambda g: peers.at_bytes(g.network, 0), WRONG, "budget is 0"),
    (peers.son, lambda g: peers.son(g.network, 37, turned=False), WRONG, "37"),
    (peers.son, lambda g: peers.son(g.twisted, 2, turned=True), WRONG, "square"),
    (_stages.thinned, lambda g: _stages.thinned(g.clustering, 1, None), WRONG, "are to go"),
    (combination.Pipeline, lambda g: combination.Pipeline(("prune",)), WRONG, "'prune' is no step"),
    (combination.Prune, lambda g: combination.Prune(-0.1), WRONG, "sparsity is -0.1"),
    (combination.Pipeline.run, lambda g: combination.Pipeline((combination.Train(),)).run(g.model), WRONG, "train"),
    (_pipeline.Combined.save, lambda g: combination.Pipeline((combination.Prune(0.5),)).run(g.model).save(g.folder / "x"), WRONG, "nothing is clustered"),
    (factorial.cells, lambda g: factorial.cells(sparsities=[7]), WRONG, "sparsity is 7"),
    (factorial.run, lambda g: factorial.run(g.model, g.none, factorial.cells(sparsities=[0]), store=g.store), WRONG, "no images"),
    (factorial.trained, lambda g: factorial.trained(g.model, g.none, pd.DataFrame(), g.data, g.folder), WRONG, "no images"),
    (orthogonality.effects, lambda g: orthogonality.effects(pd.DataFrame()), WRONG, "no column"),
    (orthogonality.orthogonality, lambda g: orthogonality.orthogonality(pd.DataFrame()), WRONG, "no column"),
    (training.Recipe, lambda g: training.Recipe(epochs=0), WRONG, "epochs is 0"),
    (_formats.half, lambda g: _formats.half(np.array([1e9])), WRONG, "fp16"),
    # Data and evaluation
    (datasets.load_data, lambda g: datasets.load_data("fashion"), UNKNOWN, "did you mean 'fashion-mnist'"),
    (datasets.load_data, lambda g: datasets.load_data(split="val"), UNKNOWN, "'val'"),
    (datasets.load_data, lambda g: datasets.load_data(limit=0), WRONG, "limit of fashion-mnist/test is 0"),
    (datasets.load_data, lambda g: datasets.load_data(limit=1.5), WRONG, "is 1.5; it must be a whole number"),
    (datasets.load_data, lambda g: datasets.load_data(f"folder:{g.folder / 'absent'}"), MISSING, "absent"),
    (datasets.load_data, lambda g: datasets.load_data(f"folder:{g.folder}"), MISSING, "holds no images"),
    (datasets.load_data, lambda g: datasets.load_data(f"folder:{g.path('file', 'x')}"), MISSING, "file"),
    (datasets.load_data, lambda g: g.slip() and datasets.load_data("imagenette"), MISSING, "imagenette"),
    (datasets.ImageSet, lambda g: replace(g.data, labels=g.data.labels + 99), WRONG, "has labels"),
    (datasets.ImageSet, lambda g: replace(g.data, images=g.data.images.int()), WRONG, "torch.uint8"),
    (datasets.ImageSet, lambda g: replace(g.data, labels=g.data.labels[:3]), WRONG, "an image for each"),
    (_loader.select, lambda g: _loader.select(g.data, torch.tensor([40])), WRONG, "0 to 39"),
    (_loader.aligned, lambda g: _loader.aligned(g.data, ("a",), 1), WRONG, "classes"),
    (_loader.aligned, lambda g: _loader.aligned(g.data, (), 7), WRONG, "7 outputs without names"),
    (_loader.aligned, lambda g: _loader.aligned(g.data, (), 6, classes="by name"), WRONG, "'by name'"),
    (_loader.aligned, lambda g: _loader.aligned(g.data, (), 6, classes=("a", "b")), WRONG, "2 names"),
    (_loader.aligned, lambda g: _loader.aligned(g.data, (), 6, classes=3), WRONG, "a name for each"),
    (datasets.limited, lambda g: datasets.limited(g.data, 41), WRONG, "is 41"),
    (datasets.limited, lambda g: datasets.limited(g.network, 4), WRONG, "a Sequential"),
    (datasets.as_image_set, lambda g: datasets.as_image_set(None), WRONG, "a NoneType"),
    (datasets.as_image_set, lambda g: datasets.as_image_set([1, 2]), WRONG, "comes as an int"),
    (datasets.train_and_test, lambda g: datasets.train_and_test("fashion"), UNKNOWN, "'fashion-mnist'"),
    (datasets.batches, lambda g: next(datasets.batches(g.data, lambda x: 1 / 0, 4)), WRONG, "ZeroDivisionError"),
    (datasets.batches, lambda g: next(datasets.batches(g.data, list, 4)), WRONG, "answers a list of 4"),
    (datasets.batches, lambda g: next(datasets.batches(g.data, torch.sum, 4)), WRONG, "the number of images"),
    (_class_names.places, lambda g: _class_names.places("x", ["a"], [True], ["b"], 1), WRONG, "no output is a"),
    (_class_names.places, lambda g: _class_names.places("x", ["a"], [True], ["b"], 2), WRONG, "a name for each"),
    (_class_names.places, lambda g: _class_names.places("x", ["3"], [True], [], 3), WRONG, "0 to 2"),
    (_class_names.by_position, lambda g: _class_names.by_position("x", ["a", "b"], 1), WRONG, "has 2 classes"),
    (_image_folders.find, lambda g: _image_folders.find(g.folder / "absent", "test"), MISSING, "absent"),
    (_image_folders.find, lambda g: _image_folders.find(g.path("a.png").parent, "test"), MISSING, "1 images"),
    (_labelled.read, lambda g: _labelled.read(torch.ones(3)), WRONG, "a Tensor of torch.float32 (3,)"),
    (_labelled.read, lambda g: _labelled.read((np.ones((2, 8, 8), int), [0, 1])), WRONG, "int64"),
    (_labelled.read, lambda g: _labelled.read((g.data.images, torch.ones(40, 3, 3))), WRONG, "one whole number"),
    (_labelled.digests, lambda g: _labelled.digests([("absent.png", 0)], "x"), DAMAGED, "absent.png"),
    (_pictures.read, lambda g: _pictures.read(g.path("x.png", b"x")), DAMAGED, "x.png"),
    (_pictures.as_rgb, lambda g: _pictures.as_rgb(Image.new("F", (2, 2))), WRONG, "no known white"),
    (_preprocessing.item, lambda g: _preprocessing.item([], 0, "x"), WRONG, "IndexError"),
    (_preprocessing.image_tensor, lambda g: _preprocessing.image_tensor(np.ones((2, 3, 9, 3), np.uint8)), WRONG, "not clear"),
    (_preprocessing.item, lambda g: _preprocessing.item([("a.png", 1)], 0, "x"), WRONG, "is a str"),
    (datasets.load_data, lambda g: datasets.load_data(str(g.folder)), WRONG, "'folder:"),
    (_preprocessing.item, lambda g: _preprocessing.item([5], 0, "x"), WRONG, "comes as"),
    (evaluation.evaluate, lambda g: evaluation.evaluate(g.model, g.none), WRONG, "no images"),
    (evaluation.evaluate, lambda g: evaluation.evaluate(g.model, g.data, precision="fp12"), UNKNOWN, "'fp12'"),
    (evaluation.evaluate, lambda g: evaluation.evaluate(g.model, g.data, batch_size=0), WRONG, "batch_size is 0"),
    (evaluation.evaluate, lambda g: evaluation.evaluate(g.model, g.data, device="meta"), WRONG, "holds no values"),
    (evaluation.evaluate, lambda g: evaluation.evaluate(replace(g.model, network=g.other), g.data), WRONG, "answers shape"),
    (evaluation.evaluate, lambda g: evaluation.evaluate(replace(g.model, network=g.broken(NAN)), g.data), WRONG, "answers NaN"),
    (evaluation.evaluate, lambda g: evaluation.evaluate(replace(g.model, network=nn.Conv2d(9, 1, 3)), g.data), WRONG, "does not run"),
    (latency.of_network, lambda g: latency.of_network(g.small, (1, 9, 9), [2]), WRONG, "reads 3 channels and the images have 1"),
    (latency.ways, lambda g: latency.ways(g.small, (1, 9, 9), 2), WRONG, "reads 3 channels and the images have 1"),
    (evaluation.evaluate, lambda g: evaluation.evaluate("vgg16", g.data), WRONG, "is a str"),
    (evaluation.evaluate, lambda g: evaluation.evaluate(g.model, 7), WRONG, "int"),
    (_accuracy.matched, lambda g: _accuracy.matched(g.model, replace(g.data, labels=torch.full((len(g.data),), -1))), WRONG, "no image whose class is known"),
    (evaluation.evaluate, lambda g: evaluation.evaluate(g.model, replace(g.data, labels=torch.full((len(g.data),), -1))), WRONG, "no image whose class is known"),
    (_accuracy.paired, lambda g: _accuracy.paired(np.ones(3, bool), np.ones(1, bool)), WRONG, "bool (3,) before and bool (1,) after"),
    (evaluation.drop, lambda g: evaluation.drop(g.answers, replace(g.answers, labels=g.answers.labels[1:])), WRONG, "different images"),
    (attribution.by_layer, lambda g: attribution.by_layer(g.model, g.clustering, g.data, ways=["lone"]), UNKNOWN, "'alone'"),
    (attribution.by_class, lambda g: attribution.by_class(g.answers, replace(g.answers, labels=g.answers.labels[1:])), WRONG, "different images"),
    (attribution.flipped, lambda g: attribution.flipped(g.answers, replace(g.answers, labels=g.answers.labels[1:])), WRONG, "different images"),
    (experiments.sweep_layers, lambda g: experiments.sweep_layers(g.model, g.data, [0], store=g.store), WRONG, "n_clusters is 0"),
    (experiments.sweep, lambda g: experiments.sweep(g.model, g.data, [99], store=g.store), WRONG, "no K of [99]"),
    (experiments.sweep, lambda g: experiments.sweep(g.model, g.data, [0], store=g.store), WRONG, "n_clusters is 0"),
    (experiments.sweep, lambda g: experiments.sweep(g.model, g.data, [2], scopes=["layr"], store=g.store), UNKNOWN, "'layer'"),
    (_cell.Subject.cells, lambda g: _cell.Subject(g.model, g.data, g.store, "fp32", "cpu").cells([2], methods=["plane"]), UNKNOWN, "did you mean 'plain'"),
    (recovery.shrink, lambda g: recovery.shrink(g.model, g.data, n_bytes=-1), WRONG, "n_bytes is -1"),
    (recovery.finetune, lambda g: recovery.finetune(g.model, g.data, g.folder / "c.pt"), WRONG, "give at least 129"),
    (training.split, lambda g: training.split(g.data, training.Recipe(held_back=40, batch_size=8)), WRONG, "it must be 1 to 32"),
    (training.train, lambda g: training.train(g.network, g.data, g.model.preprocess, training.Recipe(held_back=8, batch_size=8), g.bomb()), DAMAGED, "bomb.pt"),
    # Files
    (compression.load, lambda g: compression.load(g.folder / "absent"), MISSING, "absent"),
    (compression.load, lambda g: compression.load(g.folder), MISSING, "folder"),
    (compression.load, lambda g: compression.load(g.folder / "a\r\n\x1b[2Jb"), MISSING, r"a\r\n\x1b[2Jb does not exist"),
    (compression.load, lambda g: compression.load(g.bomb()), DAMAGED, "bomb.pt"),
    (compression.load, lambda g: compression.load(g.cut()), DAMAGED, "truncated"),
    (compression.load, lambda g: compression.load(g.compressed(), resident="pakced"), UNKNOWN, "did you mean 'packed'"),
    (compression.load, lambda g: compression.load(g.compressed()), WRONG, "architecture"),
    (compression.save, lambda g: compression.save(g.small, g.folder), STORAGE, "could not be written"),
    (compression.save, lambda g: compression.save(g.small, g.folder / "a\0b"), STORAGE, "NUL"),
    (compression.save, lambda g: compression.save(g.small, g.folder / ("x" * 300)), STORAGE, "could not be written"),
    (compression.save, lambda g: compression.save(g.small, g.folder / "x", accuracy=101), WRONG, "accuracy is 101"),
    (_checkpoint.encoded, lambda g: _checkpoint.encoded(g.small, indices="huffman"), UNKNOWN, "'huffman'"),
    (_container.inspect, lambda g: _container.inspect(g.path("x", b"\xff" * 64)), DAMAGED, "truncated"),
    (_container.read, lambda g: _container.read(g.path("x", b"\0" * 8)), DAMAGED, "x"),
    (_container.write, lambda g: _container.write(g.path("file") / "below", {}, {}), STORAGE, "could not be written"),
    (_architectures.fill, lambda g: _architectures.fill(g.folder, g.network, {}, {}), WRONG, "does not fit this architecture"),
    (_architectures.of, lambda g: compression.load(g.compressed(), architecture="vgg16_fashion"), UNKNOWN, "'vgg16-fashion'"),
    (residence.measure, lambda g: residence.measure(g.folder / "absent"), MISSING, "absent"),
    (compression.to_onnx, lambda g: compression.to_onnx(g.small, g.folder / "x.onnx", (3, 8)), WRONG, "(3, 8)"),
    (compression.export, lambda g: compression.export(g.small, g.folder / "x.txt"), WRONG, "must end in .onnx or .pt2"),
    (explorers.explore, lambda g: explorers.explore(nn.Linear(2, 3)), WRONG, "has no 2D kernels"),
    (_exporting.to_program, lambda g: _exporting.to_program(g.small, g.folder / "x.pt2", (3, 0, 8)), WRONG, "height is 0"),
    (files.shipped, lambda g: files.shipped(g.path("x"), "0" * 64), DAMAGED, "x"),
    (files.replacing, lambda g: opened(files.replacing(g.path("file") / "below")), STORAGE, "could not be written"),
    (Store.table, lambda g: g.store.table("evaluations"), UNKNOWN, "did you mean 'evaluation'"),
    (Store.put, lambda g: Store(g.path("file")).put(Entry({"kind": "layers"}, {}, {})), STORAGE, "could not be written"),
    (Store.gc, lambda g: g.store.gc(days=-1), WRONG, "days is -1"),
    (files.cache_dir, lambda g: nowhere(g.path("file")), STORAGE, "set KCLIB_STORE"),
    (Store.claim, lambda g: opened(Store(g.path("file")).claim({"kind": "layers"}, wait=True)), STORAGE, "could not be locked"),
    (Store.once, lambda g: Store(g.path("file")).once({"kind": "layers"}, lambda: None), STORAGE, "could not be locked"),
    # Profiles, sweeps and reports
    (_profiles.load, lambda g: _profiles.load("smok"), UNKNOWN, "did you mean 'smoke'"),
    (_profiles.load, lambda g: _profiles.load(str(g.folder / "absent.yaml")), MISSING, "absent.yaml"),
    (_profiles.load, lambda g: _profiles.load(str(g.path("p.yaml", "a: !!python/object/apply:os.system [x]"))), DAMAGED, "line 1"),
    (_profiles.load, lambda g: _profiles.load(str(g.path("p.yaml", "sweep: {}"))), WRONG, "sweep has no models"),
    (_profiles.load, lambda g: _profiles.load(str(g.path("p.yaml", b"\xff\xfe\0"))), DAMAGED, "p.yaml"),
    (_profiles.load, lambda g: _profiles.load(str(g.path("p.yaml", 'notebooks: {"a\\nb": null}'))), MISSING, r"a\nb.ipynb does not exist"),
    (_profiles.load, lambda g: _profiles.load("smoke", changes={"seeed": 1}), UNKNOWN, "did you mean 'seed'"),
    (parameters.check, lambda g: parameters.check({"__annotations__": {"k": int}, "k": "2e3"}), WRONG, "such as 2000"),
    (_profiles.load, lambda g: _profiles.load("smoke", changes={"seed": "x"}), WRONG, "seed is 'x'"),
    (_profiles.declared, lambda g: _profiles.declared(g.path("n.ipynb", "[]")), DAMAGED, "n.ipynb"),
    (_documents.Document.check, lambda g: _profiles.load(str(g.path("p.yaml", "note: 3\nsweep: {}"))), WRONG, "note is 3"),
    (_documents.Document.read, lambda g: _documents.Document.read(g.path("p.yaml", "a: 1\na: 2")), DAMAGED, "line 2"),
    (_grid.plan, lambda g: _grid.plan(g.grid(data=("fashion",)), g.store), UNKNOWN, "did you mean 'fashion-mnist'"),
    (_grid.plan, lambda g: _grid.plan(g.grid(data=(f"folder:{g.folder}",)), g.store), MISSING, "holds no images"),
    (_grid.run, lambda g: _grid.run(_grid.plan(g.grid(**g.photos), g.store_in_a_file), _pool.Workers(), progress=False), STORAGE, "could not be written"),
    (_pool.Workers, lambda g: _pool.Workers(0), WRONG, "jobs is 0"),
    (_pool.Workers, lambda g: _pool.Workers(backend="slurm"), UNKNOWN, "known: loky, dask, ray"),
    (_pool.Workers.joined, lambda g: opened(_pool.Workers(2, "dask", "tcp://localhost:1").joined()), WRONG, "no Dask scheduler answers at 'tcp://localhost:1'"),
    (_compare.read, lambda g: _compare.read(g.folder), MISSING, "results.parquet"),
    (_compare.read, lambda g: _compare.read(g.path("r.parquet", "PAR1")), DAMAGED, "r.parquet"),
    (_compare.compare, lambda g: _compare.compare(g.table(), pd.DataFrame()), WRONG, "no column 'model'"),
    (_compare.compare, lambda g: _compare.compare(g.table(), pd.concat([g.table()] * 2)), WRONG, "twice"),
    (_compare.broken, lambda g: _compare.broken(g.table(), -1), WRONG, "max_drop is -1"),
    (reports.keep, lambda g: reports.keep(pd.DataFrame(), g.folder), STORAGE, "could not be written"),
    (_reports.rebuild, lambda g: _reports.rebuild(g.folder, "x"), MISSING, "has no report"),
    (_first_try.run, lambda g: _first_try.run(g.model, g.data, g.path("file"), progress=False), STORAGE, "could not be written"),
    (_batch.run, lambda g: _batch.run(replace(_profiles.load("smoke"), name="x"), g.path("file")), STORAGE, "could not be written"),
    (_batch.run, lambda g: _batch.run(_profiles.load("smoke"), g.folder, 0), WRONG, "jobs is 0"),
]  # fmt: skip

# Arguments of the command line, with {folder} for a folder of its own; what the sentence says.
WRONG_COMMANDS = [
    (["sweep", "smok"], "did you mean 'smoke'"),
    (["sweep", "{folder}/absent.yaml"], "absent.yaml"),
    (["sweep", "{folder}"], "unknown profile"),
    (["sweep", "{folder}/tiny.yaml", "--jobs", "0"], "jobs is 0"),
    (["sweep", "{folder}/tiny.yaml", "--jobs", "two"], "unable to parse string as an integer"),
    (["sweep", "{folder}/tiny.yaml", "--backend", "dsk"], "did you mean 'dask'"),
    (["sweep", "{folder}/tiny.yaml", "--scheduler", "tcp://localhost:1"], "loky has none"),
    (["sweep", "{folder}/notebooks.yaml"], "has no sweep"),
    (["sweep", "{folder}/nan.yaml"], "it must be a whole number"),
    (["sweep"], "Missing argument"),
    (["sweeep", "smoke"], "No such command"),
    (["report", "{folder}/tiny.yaml", "--out", "{folder}/none"], "has no report"),
    (["results", "evaluations"], "did you mean 'evaluation'"),
    (["results", "--where", "k >"], "is no query"),
    (["results", "--where", "nothing == 1"], "is no query"),
    (["results", "--columns", "scop"], "did you mean 'scope'"),
    (["results", "--csv", "{folder}"], "could not be written"),
    (["gc", "--days", "-1"], "days is -1"),
    (["gc", "--days", "nan", "--yes"], "days is nan"),
    (["compress", "vgg16-fashion", "--clusters", "5", "-o", "{folder}"], "it is a folder"),
    (["export", "{folder}/text.parquet", "{folder}"], "must end in .onnx"),
    (["compare", "{folder}/a", "{folder}/b", "--out", "{folder}"], "it is a folder"),
    (["gc", "--days", "soon"], "unable to parse string as a number"),
    (["compare", "{folder}/a", "{folder}/b"], "does not exist"),
    (["compare", "{folder}/text.parquet", "{folder}/text.parquet"], "no whole parquet file"),
    (["batch", "--profile", "smok"], "did you mean 'smoke'"),
    (["batch", "--set", "seed=2e3"], "such as 2000"),
    (["batch", "--set", "limit=yes"], "limit is True"),
    (["batch", "--set", "kk=3"], "unknown parameter 'kk'"),
    (["batch", "--set", "k=!!python/object/apply:os.getcwd []"], "is not plain YAML"),
    (["compress", "vgg16-fashin", "--clusters", "5", "-o", "{folder}/x"], "did you mean 'vgg16-fashion'"),
    (["compress", "vgg16-fashion", "--clusters", "0", "-o", "{folder}/x"], "is not a whole number, 1 or more"),
    (["compress", "vgg16-fashion", "--clusters", "5", "-o", "{folder}/x", "--scope", "laye"], "did you mean 'layer'"),
    (["inspect", "{folder}/absent"], "absent"),
    (["inspect", "{folder}"], "{folder}"),
    (["evaluate", "{folder}/text.parquet"], "truncated"),
    (["export", "{folder}/text.parquet", "{folder}/x.tflite"], "must end in .onnx or .pt2"),
    (["--debugg", "gc"], "No such option"),
]  # fmt: skip
COMMAND_FILES = {
    "tiny.yaml": "sweep: {models: ['tiny:tiny_model'], data: [fashion-mnist], limit: 9, scopes: [layer], clusters: [2]}",
    "notebooks.yaml": "notebooks: {05-accuracy: }",
    "nan.yaml": "sweep: {models: [a], data: [b], limit: .nan, scopes: [layer], clusters: [2]}",
    "text.parquet": "no table",
}  # fmt: skip
