"""The same results on an accelerator as on the processor; skipped where torch has none."""

from functools import partial

import numpy as np
import pytest
import tiny
import torch

from kclib import (
    clustering,
    compression,
    datasets,
    evaluation,
    experiments,
    kernels,
    kmeans,
    loading,
    models,
    training,
)
from kclib.recovery import _calibration, _sequential, sensitivity
from kclib.store import Store

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no CUDA device here")
QUIET = {"progress": False}


@pytest.fixture
def exact():
    """Convolve in full float32, as processors do."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def made():
    model = tiny.tiny_model()
    bank = kernels.extract(model.network)
    return model, tiny.tiny_data(), bank, clustering.cluster(bank, 5, scope="global", **QUIET)


def on_both(call):
    return call(device="cpu"), call(device="cuda")


def assert_same_network(networks):
    here, there = (network.state_dict() for network in networks)
    assert here.keys() == there.keys()
    for name, value in here.items():
        torch.testing.assert_close(there[name].cpu(), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_shipped_model_answers_as_on_the_processor(precision):
    model, data = loading.load_model(), datasets.load_data(limit=1000)
    here, there = on_both(partial(evaluation.evaluate, model, data, precision=precision, **QUIET))
    assert (there.predictions == here.predictions).mean() >= (0.995 if precision == "fp32" else 0.98)


@pytest.mark.parametrize("n_clusters", [2, 40])
def test_k_means_finds_the_same(n_clusters):
    points = np.random.default_rng(0).normal(size=(2000, 9)).astype(np.float32)
    here = kmeans.fit(points, n_clusters, seed=3)
    there = kmeans.fit(points, n_clusters, seed=3, device="cuda")
    assert there.inertia == pytest.approx(here.inertia, rel=0.02)
    squares = np.square(points[:, None].astype(np.float64) - there.centres).sum(2)
    np.testing.assert_allclose(squares[np.arange(2000), there.labels], squares.min(1), rtol=1e-5)
    again = kmeans.fit(points, n_clusters, seed=3, device="cuda")
    np.testing.assert_array_equal(again.labels, there.labels)


@pytest.mark.parametrize("kind", ["output", "input", "fisher", "hessian"])
def test_sensitivities_are_the_same(made, exact, kind):
    model, data, bank, _ = made
    here, there = on_both(partial(sensitivity.importance, model, data, bank, kind=kind, seed=1, **QUIET))
    np.testing.assert_allclose(there, here, rtol=1e-3, atol=1e-6 * here.max())


def test_a_compressed_network_computes_and_loads_there(made, exact, tmp_path):
    model, data, _, found = made
    small = models.Model("tiny", compression.compress(model.network, found), model.preprocess)
    compression.save(small.network, tmp_path / "x.safetensors")
    loaded = compression.load(tmp_path / "x.safetensors", architecture=model.network, device="cuda")
    images = model.preprocess(data.images)
    torch.testing.assert_close(
        loaded.network(images.cuda()).cpu(), small.network(images), rtol=1e-4, atol=1e-5
    )


def test_corrections_are_the_same(made, exact):
    model, data, _, found = made
    small = models.Model("tiny", compression.compress(model.network, found), model.preprocess)
    assert_same_network(on_both(partial(_calibration.calibrate, small, model.network, data, **QUIET)))
    both = on_both(partial(_sequential.correct, model, data, 3, **QUIET))
    assert_same_network(found.network for found in both)


def test_training_there_learns(made, tmp_path):
    model, data, _, _ = made
    recipe = training.Recipe(epochs=3, held_back=8, batch_size=8)
    found = training.train(model.network, data, model.preprocess, recipe, tmp_path / "x.pt", device="cuda")
    assert next(found.model.parameters()).is_cuda
    again = training.train(model.network, data, model.preprocess, recipe, tmp_path / "x.pt", device="cuda")
    assert_same_network((found.model.cpu(), again.model.cpu()))


def test_a_sweep_there_is_that_of_the_processor(made, tmp_path):
    model, data, *_ = made
    here, there = (
        experiments.sweep(model, data, [2, 5], device=device, store=Store(tmp_path / device))
        for device in ("cpu", "cuda")
    )
    for column in ("scope", "k", "top1", "kernels_removed"):
        assert here[column].tolist() == there[column].tolist()
