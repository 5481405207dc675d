"""Readers of strangers' files under random damage; `make fuzz` goes on for 30 s a kind, CI too.

A kind is a word in the tests' names: compressed, weights, profile, folder.
"""

import json
import math
from functools import cache
from io import BytesIO
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_model
from torchvision.transforms.functional import pil_to_tensor

import kclib
from kclib import clustering, compression, datasets, kernels
from kclib.compression import _container
from kclib.errors import KclibError
from kclib.experiments import _profiles
from kclib.models import _model, _state_dicts

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
        return read_or_told(lambda: reader(file.name))


def read_or_told(reader):
    """Return what a reader answers, or the sentence that it raises."""
    try:
        return reader()
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
def test_a_damaged_compressed_file_is_told_or_read_as_the_same_network(content):
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
def test_a_compressed_file_described_otherwise_under_a_right_hash_is_told_or_read(data):
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


def is_real(value) -> bool:
    return torch.is_tensor(value) and value.is_floating_point() and value.layout == torch.strided


@st.composite
def states(draw):
    """What may be in a file of weights: a state dict with some of it changed, as it is or within others."""
    state = dict(tiny_model().network.state_dict())
    odd_keys = st.text(max_size=9) | st.none() | st.integers() | st.sampled_from(sorted(state))
    odd_values = VALUES | st.sampled_from(
        [torch.zeros(0), torch.zeros(2, 3), torch.tensor(math.nan), torch.ones(4, 3, 3, 3).half(),
         torch.zeros(1, dtype=torch.complex64), torch.zeros(3, dtype=torch.bool), torch.eye(3).to_sparse(),
         torch.zeros(2, device="meta"), np.zeros(3), np.array(["a"])]
    )  # fmt: skip
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(state, key=str)))
        kind = draw(st.sampled_from(["remove", "rename", "change", "add", "cast", "nan"]))
        value = state[name]
        if kind in ("remove", "rename") and len(state) > 1:
            del state[name]
        if kind in ("rename", "add"):
            state[draw(odd_keys)] = value if kind == "rename" else draw(odd_values)
        elif kind == "change":
            state[name] = draw(odd_values)
        elif kind == "cast" and is_real(value):
            state[name] = value.to(draw(st.sampled_from([torch.half, torch.double, torch.int8, torch.bool])))
        elif kind == "nan" and is_real(value):
            state[name] = torch.full_like(value, math.nan)
    prefix = draw(st.sampled_from(["", "module.", "model.", "model.module.", "0."]))
    state = {prefix + k if isinstance(k, str) else k: v for k, v in state.items()}
    around = draw(st.sampled_from([None, "state_dict", "model", "ema"]))
    return state if around is None else {around: state, "epoch": draw(VALUES)}


@LONG
@given(states())
def test_weights_in_a_state_dict_are_told_or_fit_the_network(state):
    network = tiny_model().network
    read_or_told(lambda: _state_dicts.fill(network, _state_dicts.read_all(state), "weights"))
    assert network(torch.ones(1, 3, 8, 8)).dtype == torch.float32


def picture(suffix: str) -> bytes:
    """Return a small picture as a file of a kind has it."""
    with BytesIO() as file:
        Image.new("RGB", (5, 4), (250, 100, 3)).save(file, {"jpg": "JPEG"}.get(suffix, suffix))
        return file.getvalue()


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12)
FILES = st.sampled_from(["png", "jpg", "gif", "bmp"]).flatmap(
    lambda suffix: st.tuples(
        NAMES.map(lambda name: f"{name}.{suffix}"), st.just(picture(suffix)) | damaged(picture(suffix))
    )
)


@LONG
@given(
    st.dictionaries(
        NAMES | st.sampled_from(["train", "test", "val"]), st.lists(FILES, max_size=3), max_size=3
    ),
    st.data(),
)
def test_a_folder_of_odd_pictures_is_told_or_read_whole(classes, data):
    with TemporaryDirectory() as root:
        for name, pictures in classes.items():
            place = Path(root, name)
            if place.exists():  # "." and ".."
                continue
            place.mkdir()
            for file, content in pictures:
                kind = data.draw(st.sampled_from(["file", "file", "file", "folder", "link", "loop"]))
                path = place / file
                if path.exists() or path.is_symlink():
                    continue
                if kind == "file":
                    path.write_bytes(content)
                elif kind == "folder":
                    path.mkdir()
                else:
                    path.symlink_to(place if kind == "loop" else "absent")
        images = read_or_told(lambda: kclib.load_data(f"folder:{root}"))
        if not isinstance(images, str):
            n = read_or_told(lambda: sum(len(x) for x, _ in datasets.batches(images, as_tensor, 4)))
            assert isinstance(n, str) or n == len(images) > 0


def as_tensor(image) -> torch.Tensor:
    return pil_to_tensor(image.resize((4, 4)))


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
