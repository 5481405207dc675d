"""Readers of strangers' files under random damage; `make fuzz` goes on far longer than CI does."""

import json
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from kclib import clustering, compression, kernels
from kclib.compression import _container
from kclib.errors import KclibError
from kclib.experiments import _profiles
from kclib.models import _model

pytestmark = pytest.mark.usefixtures("one_thread")
LONG = settings(max_examples=max(500, settings().max_examples), deadline=None)
PROFILE = {
    "note": "x",
    "sweep": {
        "models": ["vgg16-fashion", {"name": "a:b", "weights": "w"}], "data": ["fashion-mnist"], "limit": 9,
        "scopes": ["layer"], "clusters": [2], "methods": ["plain"], "seeds": [0], "precision": "fp32",
    },
    "notebooks": {"05-accuracy": {"parameters": {"limit": 5}, "seconds": 3, "timeout": 8}},
    "parameters": {"seed": 0},
}  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just("layer"),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=9), x, max_size=3),
    max_leaves=6,
)  # fmt: skip


@cache
def compressed() -> bytes:
    network = tiny_model().network
    found = clustering.cluster(kernels.extract(network), 3, scaled=True, turned=True, progress=False)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        compression.save(compression.compress(network, found), path)
        return path.read_bytes()


def read(content: bytes, suffix: str, reader):
    """Return what a reader makes of a file with this content, or the sentence that it raises."""
    with NamedTemporaryFile(suffix=suffix) as file:
        file.write(content)
        file.flush()
        try:
            return reader(file.name)
        except KclibError as error:
            sentence = str(error)
    assert "\n" not in sentence
    return sentence


def load(path):
    return compression.load(path, architecture=tiny_model().network)


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """Bytes with some changed, some left out, some doubled, or cut."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(content) - 1)))
        length = draw(st.integers(0, 40))
        kind = draw(st.sampled_from(["change", "remove", "insert", "cut", "digits"]))
        if kind == "change":
            content[start : start + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "remove":
            del content[start : start + length]
        elif kind == "insert":
            content[start:start] = draw(st.binary(max_size=20))
        elif kind == "cut":
            del content[start:]
        else:
            content[start : start + 1] = draw(st.sampled_from([b"0", b"9", b"-", b"[", b'"', b"e"]))
    return bytes(content)


@LONG
@given(damaged(compressed()))
def test_a_damaged_checkpoint_is_told_or_read_as_the_same_network(content):
    found = read(content, ".safetensors", load)
    if not isinstance(found, str):
        whole = read(compressed(), ".safetensors", load)
        images = torch.ones(1, 3, 8, 8)
        assert torch.equal(found.network(images), whole.network(images)), "its hash would have told"


def change(draw, content: dict) -> dict:
    """Return a copy with one value changed, at any depth."""
    content = json.loads(json.dumps(content))
    part = content
    while True:
        key = draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
        if not (isinstance(part[key], (dict, list)) and part[key] and draw(st.integers(0, 3))):
            part[key] = draw(VALUES)
            return content
        part = part[key]


@LONG
@given(st.data())
def test_a_checkpoint_described_otherwise_under_a_right_hash_is_told_or_read(data):
    description, _, tensors = read(compressed(), ".safetensors", lambda path: _container.read(Path(path)))
    description = change(data.draw, description)
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(tensors)))
        tensors[name] = data.draw(st.sampled_from([tensors[name].float(), tensors[name][:1], torch.zeros(0)]))
    with TemporaryDirectory() as folder:
        _container.write(Path(folder) / "x.safetensors", description, tensors)
        content = (Path(folder) / "x.safetensors").read_bytes()
    read(content, ".safetensors", load)


@LONG
@given(st.binary(max_size=200) | damaged(compressed()), st.sampled_from([".pt", ".safetensors"]))
def test_weights_of_strangers_are_told_or_read(content, suffix):
    read(content, suffix, _model.read_weights)


@LONG
@given(st.text(max_size=200) | st.text("[]{}:,-&*!|>'\"#%@\n \tabc019.~", max_size=80))
def test_a_text_as_a_profile_is_told_or_read(text):
    read(text.encode("utf-8", "surrogatepass"), ".yaml", _profiles.load)


@LONG
@given(damaged(yaml.safe_dump(PROFILE, sort_keys=False).encode()))
def test_a_damaged_profile_is_told_or_read(content):
    read(content, ".yaml", _profiles.load)


@LONG
@given(st.data())
def test_a_profile_with_another_value_is_told_or_read_with_the_types_it_promises(data):
    text = yaml.safe_dump(change(data.draw, PROFILE), sort_keys=False)
    found = read(text.encode(), ".yaml", _profiles.load)
    if isinstance(found, _profiles.Profile) and found.sweep is not None:
        assert all(type(k) is int and k > 0 for k in found.sweep.clusters)
        assert all(type(x) is int and x >= 0 for x in (found.sweep.limit, *found.sweep.seeds))
        assert set(found.sweep.scopes) <= {"layer", "global"}
