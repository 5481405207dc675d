import subprocess
import sys

import numpy as np
import pytest

from kclib import compression
from kclib.clustering import Clustering, Group
from kclib.compression import compress, residence
from kclib.errors import DamagedFileError, KclibError, MissingFileError
from kclib.kernels import extract
from kclib.models import _loading

PHASES = ["loading", "loaded", "answering", "answered"]


def clustered(network, n_clusters):
    """Return a clustering of a network, made at random: what it means takes no memory."""
    draw = np.random.default_rng(0)
    groups = []
    for layer in extract(network).layers:
        codebook = 0.05 * draw.standard_normal((min(n_clusters, layer.n_kernels), 3, 3)).astype("f")
        indices = draw.integers(0, len(codebook), layer.n_kernels).astype("i4")
        groups.append(Group(layer.name, (layer,), codebook, indices, 0.0))
    return Clustering(tuple(groups), "layer", 0)


@pytest.fixture(scope="module")
def network():
    """The shipped network, untrained and compressed to 256 kernels a layer."""
    dense = _loading.architecture("vgg16-fashion").network.eval()
    return compress(dense, clustered(dense, 256))


@pytest.fixture(scope="module")
def path(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("residence") / "model.safetensors"
    compression.save(network, path, architecture="vgg16-fashion")
    return path


@pytest.fixture(scope="module")
def measured(path):
    """What one process held packed, and another dense."""
    return residence.measure_each(path, answers=4)


@pytest.fixture
def child(monkeypatch, tmp_path):
    """Take a shell script in place of the process that is watched."""

    def be(script):
        (tmp_path / "child.sh").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "child.sh").chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "child.sh"))

    return be


def dense_bytes():
    return sum(x.nbytes for x in _loading.architecture("vgg16-fashion").network.state_dict().values())


def test_a_packed_model_takes_a_fraction_of_the_dense_ones_memory(measured):
    assert measured["packed"].model < 0.25 * measured["dense"].model
    assert 0.85 * dense_bytes() < measured["dense"].model < 1.15 * dense_bytes()
    assert measured["packed"].peak < 0.5 * measured["dense"].peak


def test_a_packed_model_takes_the_bytes_of_its_tensors(measured, network):
    held = sum(x.nbytes for x in network.state_dict().values())
    assert 0.9 * held < measured["packed"].model < 1.5 * held


@pytest.mark.parametrize("resident", ["packed", "dense"])
def test_a_trace_goes_through_all_phases_and_grows_as_the_model_is_loaded(measured, resident):
    trace = measured[resident].trace
    assert trace.columns.tolist() == ["seconds", "bytes", "phase"]
    assert trace.phase.drop_duplicates().tolist() == PHASES
    assert (trace.phase != trace.phase.shift()).sum() == len(PHASES)
    assert trace.seconds.iloc[0] >= 0
    assert trace.seconds.is_monotonic_increasing
    assert trace.seconds.is_unique
    phases = trace.groupby("phase").bytes
    assert phases.median()["answered"] == measured[resident].model
    assert phases.max()["answering"] == measured[resident].peak >= phases.median()["loaded"]
    if resident == "dense":
        assert phases.median()["loaded"] > 0.9 * measured[resident].model


def test_looks_are_put_into_the_phases_in_which_they_fell():
    ends = {"begin": 10.0, "loading": 11.0, "loaded": 12.0, "answering": 13.0, "answered": 14.0}
    looks = [
        (9.0, 90), (9.5, 100), (9.9, 500),
        (10.0, 110), (10.9, 900), (11.0, 400), (11.5, 410),
        (12.0, 450), (12.4, 700), (12.9, 600), (13.0, 430), (13.5, 420), (13.9, 480),
        (14.0, 5000), (15.0, 6000),
    ]  # fmt: skip
    result = residence._residence(looks, ends)
    assert (
        result.trace.phase.tolist() == ["loading"] * 2 + ["loaded"] * 2 + ["answering"] * 3 + ["answered"] * 3
    )
    np.testing.assert_allclose(result.trace.seconds, [0, 0.9, 1, 1.5, 2, 2.4, 2.9, 3, 3.5, 3.9])
    assert result.trace.bytes.tolist() == [10, 800, 300, 310, 350, 600, 500, 330, 320, 380]
    assert (result.model, result.peak) == (330, 600)


def test_what_was_held_before_the_rest_is_not_what_there_was_before_loading():
    ends = {"rest": 5.0, "begin": 6.0, "loading": 7.0, "loaded": 8.0, "answering": 9.0, "answered": 10.0}
    looks = [(4.0, 900), (4.3, 900), (4.6, 900), (4.9, 900), (5.0, 100), (5.5, 120), (5.9, 110)]
    looks += [(second, 410) for second in (6.5, 7.5, 8.5, 9.5)]
    assert residence._residence(looks, ends).model == 300


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 3", r"failed: exit code 3$"),
        (
            "echo page >&2; echo 'kclib.errors.X: no such thing.' >&2; exit 1",
            r"failed: kclib.errors.X: no such",
        ),
        ("echo warm; read go; echo 'MemoryError' >&2; exit 1", r"failed: MemoryError$"),
        ("echo warm; read go; kill -9 $$", r"failed: exit code -9$"),
    ],
    ids=["silent", "at first", "later", "killed"],
)
def test_a_process_that_fails_is_one_sentence(child, path, script, message):
    child(script)
    with pytest.raises(KclibError, match=message) as error:
        residence.measure(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_the_process_is_told_what_to_load_how_and_the_number_of_answers(child, path, tmp_path):
    child(f'echo "$@" > {tmp_path}/told; exit 1')
    how = {"resident": "dense", "answers": 7, "input_shape": (3, 8, 8)}
    with pytest.raises(KclibError):
        residence.measure(path, architecture="module:factory", **how)
    told = (tmp_path / "told").read_text().split()
    assert told[:2] == ["-m", "kclib.compression.residence"]
    assert told[2:] == [str(path), "module:factory", "dense", "7", "[3,", "8,", "8]"]


@pytest.mark.parametrize(("content", "error"), [(None, MissingFileError), (b"damaged", DamagedFileError)])
def test_no_process_is_started_for_a_file_that_cannot_be_read(monkeypatch, tmp_path, content, error):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    if content is not None:
        (tmp_path / "model").write_bytes(content)
    with pytest.raises(error, match="model"):
        residence.measure(tmp_path / "model")
