"""Checkpoints as trainers write them: each loads the same values, or one sentence says why not."""

import argparse
import contextlib
import copy
import json
import os
import subprocess
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models import densenet121

from kclib import clustering, compression, kernels, loading
from kclib.errors import DamagedFileError, InvalidValueError, MissingFileError
from kclib.models import _state_dicts


class Net(nn.Module):
    """Two named parts, batch norm, and a head."""

    def __init__(self, n_classes=2):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, n_classes))

    def forward(self, x):
        return self.head(self.features(x))


class Whole(nn.Module):
    """A network that has another as its part, as trainers' classes do."""

    def __init__(self, name="model", extra=None):
        super().__init__()
        setattr(self, name, Net())
        if extra:
            setattr(self, extra, Net())


def drawn(network: nn.Module, seed: int = 0) -> nn.Module:
    """Return a network with all its floating values drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator))
    return network


TRAINED = drawn(Net())
STATE = TRAINED.state_dict()


def prefixed(prefix: str, state=STATE) -> dict:
    return {f"{prefix}{name}": value for name, value in state.items()}


def without(state: dict, end: str) -> dict:
    return {name: value for name, value in state.items() if not name.endswith(end)}


def averaged() -> dict:
    mean = AveragedModel(copy.deepcopy(TRAINED))
    mean.update_parameters(TRAINED)
    return mean.state_dict()


def with_optimizer() -> dict:
    """Return what PyTorch's ImageNet example writes, after a step, so that the optimizer holds tensors."""
    network = copy.deepcopy(TRAINED)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9)
    network(torch.zeros(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    return {
        "epoch": 90, "arch": "net", "state_dict": prefixed("module."),
        "best_acc1": torch.tensor(76.1), "optimizer": optimizer.state_dict(),
        "scheduler": {"last_epoch": 3}, "rng": torch.get_rng_state(),
    }  # fmt: skip


WRITTEN = {
    "plain": STATE,
    "an ordered dict": OrderedDict(STATE),
    "DataParallel": prefixed("module."),
    "DataParallel within": {name.replace("features.", "features.module."): x for name, x in STATE.items()},
    "compiled": prefixed("_orig_mod."),
    "compiled within": {name.replace("features.", "features._orig_mod."): x for name, x in STATE.items()},
    "compiled in DataParallel": prefixed("module._orig_mod."),
    "DataParallel compiled": prefixed("_orig_mod.module."),
    "FSDP": prefixed("_fsdp_wrapped_module."),
    "Lightning": {"state_dict": prefixed("model."), "epoch": 3, "hyper_parameters": {"lr": 0.1}},
    "Lightning, compiled": {"state_dict": prefixed("model._orig_mod.")},
    "Lightning with a loss": {"state_dict": prefixed("net.") | {"criterion.weight": torch.ones(2)}},
    "a prefix of one's own": prefixed("student.encoder."),
    "averaged": averaged(),
    "averaged, in a container": {"model_ema": averaged(), "epoch": 1},
    "two containers": {"state": {"model": STATE}, "step": 5},
    "the ImageNet example": with_optimizer(),
    "other networks beside it": {"generator": STATE, "discriminator": nn.Conv2d(3, 1, 3).state_dict()},
    "an average that is the same": {"model": STATE, "ema": {k: v.clone() for k, v in STATE.items()}},
    "old batch norm": without(STATE, "num_batches_tracked"),
    "counted by thop": STATE | {"total_ops": torch.zeros(1), "features.0.total_params": torch.zeros(1)},
    "a float count of batches": STATE | {"features.1.num_batches_tracked": torch.tensor(0.0)},
    "half": {k: v.half() if v.is_floating_point() else v for k, v in STATE.items()},
    "double": {k: v.double() if v.is_floating_point() else v for k, v in STATE.items()},
} | {
    name: {name: STATE, "epoch": 3}
    for name in ("model", "state_dict", "model_state_dict", "ema", "state_dict_ema", "net", "params")
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_every_way_to_write_a_checkpoint_gives_the_values_that_were_trained(tmp_path, name):
    torch.save(WRITTEN[name], tmp_path / "w.pt")
    network = Net()
    _state_dicts.fill(network, _state_dicts.read_all(tmp_path / "w.pt"), "w.pt")
    assert_same(network, TRAINED, atol=1e-3 if name == "half" else 0)


def assert_same(network: nn.Module, expected: nn.Module, atol: float = 0) -> None:
    found, wanted = network.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("network", "part"),
    [(Whole(), "model"), (nn.DataParallel(Net()), "module"), (torch.compile(Net()), "_orig_mod")],
    ids=["part of a class", "DataParallel", "compiled"],
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_wrapped_network_takes_the_state_of_what_it_wraps(network, part, prefix):
    network = copy.deepcopy(network)
    _state_dicts.fill(network, {"": prefixed(prefix)}, "w.pt")
    assert_same(getattr(network, part), TRAINED)


SUFFIXES = ["w.pt", "w.pth", "w.ckpt", "w.bin", "w.safetensors", "w.pth.tar", "weights"]


@pytest.mark.parametrize("name", SUFFIXES)
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_files_suffix_says_nothing(tmp_path, name, form):
    if form == "safetensors":
        save_file(STATE, tmp_path / name)
    else:
        torch.save(STATE, tmp_path / name, _use_new_zipfile_serialization=form == "zip")
    assert_state(_state_dicts.read(tmp_path / name), STATE)


def assert_state(found, expected) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_checkpoint_in_several_files_is_read_by_its_index(tmp_path):
    names = list(STATE)
    save_file({x: STATE[x] for x in names[:3]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({x: STATE[x] for x in names[3:]}, tmp_path / "model-00002-of-00002.safetensors")
    places = {x: f"model-0000{1 + (x in names[3:])}-of-00002.safetensors" for x in names}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert_state(_state_dicts.read(index), STATE)
    (tmp_path / places[names[0]]).unlink()
    with pytest.raises(MissingFileError, match="model-00001"):
        _state_dicts.read(index)
    index.write_text('{"weight_map": {"a": "../w.safetensors"}}')
    with pytest.raises(DamagedFileError, match="beside it"):
        _state_dicts.read(index)
    index.write_text(json.dumps({"weight_map": {"a": index.name}}))
    with pytest.raises(DamagedFileError, match="no state dict"):
        _state_dicts.read(index)


def test_shared_weights_that_were_written_once_are_taken(tmp_path):
    def tied():
        network = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
        network[1].weight = network[0].weight
        return network

    trained, network = drawn(tied()), tied()
    save_model(trained, tmp_path / "w.safetensors")
    assert len(_state_dicts.read(tmp_path / "w.safetensors")) == 3
    _state_dicts.fill(network, _state_dicts.read_all(tmp_path / "w.safetensors"), "w")
    assert_same(network, trained)


def test_a_published_densenets_old_names_are_known():
    trained, network = drawn(densenet121()), densenet121()
    old = {name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): value
           for name, value in trained.state_dict().items()}  # fmt: skip
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    _state_dicts.fill(network, {"": old}, "w")
    assert_same(network, trained)


def test_a_networks_own_hook_still_renames():
    network = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 2, 3))
    old = {
        "weight_g": torch.full((2, 1, 1, 1), 3.0),
        "weight_v": torch.ones(2, 3, 3, 3),
        "bias": torch.zeros(2),
    }
    _state_dicts.fill(network, {"": old}, "w")
    assert network.weight.detach()[0].norm() == pytest.approx(3)


def test_a_network_without_values_gets_them():
    with torch.device("meta"):
        network = Net()
    _state_dicts.fill(network, {"": STATE}, "w")
    assert_same(network, TRAINED)


def test_a_network_whose_shapes_are_not_known_yet_gets_them():
    network = nn.Sequential(nn.LazyConv2d(4, 3))
    conv = drawn(nn.Sequential(nn.Conv2d(3, 4, 3)))
    _state_dicts.fill(network, {"": conv.state_dict()}, "w")
    assert_same(network, conv)


def two(seed=1) -> dict:
    return {"model": STATE, "ema": drawn(Net(), seed).state_dict()}


@pytest.mark.parametrize(
    ("content", "choices"),
    [
        (two(), {"model": 0, "ema": 1}),
        ({"state_dict": prefixed("net.") | prefixed("ema_net.", two()["ema"])},
         {"state_dict/net": 0, "state_dict/ema_net": 1}),
    ],
    ids=["containers", "prefixes"],
)  # fmt: skip
def test_of_two_that_differ_none_is_taken_in_silence(tmp_path, content, choices):
    path = tmp_path / "w.pt"
    torch.save(content, path)
    with pytest.raises(InvalidValueError, match=" and |, ".join(map(repr, choices))) as error:
        _state_dicts.fill(Net(), _state_dicts.read_all(path), str(path))
    assert f"{path}::" in str(error.value)
    for chosen, seed in choices.items():
        network = Net()
        _state_dicts.fill(network, _state_dicts.read_all(f"{path}::{chosen}"), "w")
        assert_same(network, drawn(Net(), seed))
    with pytest.raises(InvalidValueError, match="no state dict 'mean'"):
        _state_dicts.read_all(f"{path}::mean")


def test_a_network_beside_a_prefixed_other_is_not_taken_for_it(tmp_path):
    with pytest.raises(InvalidValueError, match="2 state dicts"):
        _state_dicts.fill(Net(), {"": STATE | prefixed("ema.", two()["ema"])}, "w")


def renamed(state: dict, old: str, new: str) -> dict:
    return {name.replace(old, new): value for name, value in state.items()}


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (renamed(STATE, "features", "feature"), ["feature.0.weight where it has features.0", "6 names"]),
        (renamed(prefixed("module."), "head.2", "head.fc"), ["head.fc.weight where it has head.2.weight"]),
        ({"a": torch.ones(1), "b": torch.ones(1)}, ["a, b", "features.0.weight, features.0.bias"]),
        (without(STATE, "head.2.bias"), ["lacks head.2.bias"]),
        (STATE | {"head.3.weight": torch.ones(1)}, ["no head.3.weight"]),
        (Net(5).state_dict(), ["head.2.weight is (5, 4) in the file, (2, 4) in the network", "classes"]),
        (STATE | {"features.0.weight": torch.ones(4, 3, 5, 5)}, ["(4, 3, 5, 5) in the file, (4, 3, 3, 3)"]),
        (STATE | {"features.0.weight": torch.ones(4, 3, 3, 3, dtype=torch.int8)}, ["torch.int8", "float32"]),
        (STATE | {"head.2.bias": torch.ones(2, dtype=torch.complex64)}, ["torch.complex64"]),
    ],
    ids=["part", "layer", "nothing alike", "lacks", "too many", "head", "shape", "quantized", "complex"],
)  # fmt: skip
def test_what_does_not_fit_is_said_by_name(state, said):
    with pytest.raises(InvalidValueError, match=r"w\.pt does not fit") as found:
        _state_dicts.fill(Net(), {"": state}, "w.pt")
    text = str(found.value)
    assert all(part in text for part in said), text
    assert text.count("where it has") <= 3
    assert len(text) < 500


class Config:
    """A class of the trainer's own, as options and schedules are."""

    def __init__(self):
        self.rate = 0.1


class Settings(dict):
    """A mapping of the trainer's own."""


@pytest.mark.parametrize(
    "beside",
    [
        argparse.Namespace(lr=0.1, where=Path("data")),
        {"best": np.float64(76.1), "curve": np.arange(3.0), "rng": np.random.PCG64(0).state},
        Path("runs") / "1",
        Config(),
        torch.optim.lr_scheduler.StepLR(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1), 3),
    ],
    ids=["namespace", "numpy", "path", "class", "scheduler"],
)  # fmt: skip
def test_what_a_trainer_keeps_beside_weights_is_left_unread(tmp_path, beside, monkeypatch):
    torch.save({"model": STATE, "epoch": 3, "args": beside}, tmp_path / "w.pt")
    monkeypatch.setattr(Config, "__setattr__", lambda *_: pytest.fail("run"))
    assert_state(_state_dicts.read(tmp_path / "w.pt"), STATE)


def test_a_mapping_of_a_class_of_ones_own_is_named_where_it_cannot_be_left(tmp_path):
    torch.save({"model": STATE, "settings": Settings(lr=0.1)}, tmp_path / "w.pt")
    with pytest.raises(DamagedFileError, match=r"test_state_dicts\.Settings"):
        _state_dicts.read(tmp_path / "w.pt")


def test_a_namespace_in_a_file_of_old_format_is_left_unread(tmp_path):
    content = {"model": STATE, "args": argparse.Namespace(lr=0.1), "best": np.float64(3)}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert_state(_state_dicts.read(tmp_path / "w.pt"), STATE)


class Bomb:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.calls = function, arguments

    def __reduce__(self):
        return self.calls


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "bomb",
    [
        lambda path: Bomb(os.system, f"touch {path}"),
        lambda path: Bomb(os.mkdir, str(path)),
        lambda path: Bomb(exec, f"import os; os.mkdir({str(path)!r})"),
        lambda path: Bomb(eval, f"__import__('os').mkdir({str(path)!r})"),
        lambda path: Bomb(subprocess.check_call, ["touch", str(path)]),
        lambda path: Bomb(Path.touch, path),
    ],
    ids=["system", "mkdir", "exec", "eval", "subprocess", "method"],
)
def test_code_beside_weights_never_runs(tmp_path, bomb, zipped):
    path, target = tmp_path / "w.pt", tmp_path / "exploded"
    torch.save({"model": STATE, "args": bomb(target)}, path, _use_new_zipfile_serialization=zipped)
    with contextlib.suppress(DamagedFileError):  # some are left unread, some make the file be refused
        assert_state(_state_dicts.read(path), STATE)
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists(), "the bomb was a dud"


def test_a_whole_network_in_a_file_is_named_and_not_unpickled(tmp_path, monkeypatch):
    for content in (TRAINED, {"model": TRAINED, "epoch": 2}):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(DamagedFileError, match=r"test_state_dicts\.Net.*state_dict\(\)"):
            _state_dicts.read(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"\x08\x08\x12\x07pytorch", "ONNX"),
        (b"\x93NUMPY\x01", "NumPy"),
    ],
)
def test_a_file_of_another_kind_is_named_for_what_it_is(tmp_path, content, said):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(InvalidValueError, match=rf"w\.pt .*{said}"):
        _state_dicts.read_all(tmp_path / "w.pt")


def test_an_archive_of_another_kind_is_named_for_what_it_is(tmp_path):
    path = tmp_path / "w.pt"
    with open(path, "wb") as file:
        np.savez(file, a=np.ones(3))
    with pytest.raises(InvalidValueError, match="NumPy"):
        _state_dicts.read_all(path)
    traced = "w/code/__torch__.py"
    for name, said in ((traced, "TorchScript"), ("model.weights.h5", "Keras"), ("w.pt", "unpack")):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, b"")
        with pytest.raises(InvalidValueError, match=said):
            _state_dicts.read_all(path)
    torch.export.save(torch.export.export(Net().eval(), (torch.zeros(1, 3, 5, 5),)), tmp_path / "w.pt2")
    with pytest.raises((InvalidValueError, DamagedFileError), match=r"w\.pt2"):
        _state_dicts.read_all(tmp_path / "w.pt2")


def test_a_folder_is_named_with_the_file_in_it(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(MissingFileError, match=r"is a folder.*model\.safetensors"):
        _state_dicts.read_all(tmp_path)


def test_a_home_folder_and_a_relative_path_are_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    torch.save(STATE, "w.pt")
    for path in ("~/w.pt", "w.pt", "./w.pt", Path("~/w.pt")):
        assert_state(_state_dicts.read(path), STATE)
    with pytest.raises(MissingFileError, match="~nobody_here"):
        _state_dicts.read("~nobody_here/w.pt")


@pytest.mark.parametrize("wrong", [3, nn.Conv2d(1, 1, 1), [1], None])
def test_what_is_no_path_is_refused(wrong):
    with pytest.raises(InvalidValueError, match=type(wrong).__name__):
        _state_dicts.read_all(wrong)


FACTORY = "from tests.models.test_state_dicts import Net\ndef make():\n    return Net()\n"


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "kclib_test_nets.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    return "kclib_test_nets:make"


def test_a_state_dict_itself_is_taken_as_weights(factory):
    assert_same(loading.load_model(factory, weights=STATE).network, TRAINED)


@pytest.mark.parametrize("name", ["small.safetensors", "small.pt"])
def test_a_compressed_file_is_taken_as_weights_that_are_dense(factory, tmp_path, name):
    clusters = clustering.cluster(kernels.extract(TRAINED), 3)
    small = compression.compress(TRAINED, clusters)
    compression.save(small, tmp_path / name)
    network = loading.load_model(factory, weights=tmp_path / name).network
    assert_same(network, compression.expand(small).eval())
    assert len(np.unique(kernels.extract(network).kernels, axis=0)) == 3


def test_values_that_the_networks_type_cannot_hold_are_no_infinities():
    state = {name: value.clone() for name, value in Net().state_dict().items()}
    state["head.2.weight"][0, 0] = 1e6
    with pytest.raises(InvalidValueError, match=r"head\.2\.weight in here .*float16"):
        _state_dicts.fill(Net().half(), {"": state}, "here")
    network = Net().bfloat16()
    _state_dicts.fill(network, {"": state}, "here")
    assert network.head[2].weight[0, 0] == torch.tensor(1e6).bfloat16()


def test_a_value_without_an_axis_is_told_by_its_shape():
    network = nn.Linear(2, 3)
    state = network.state_dict() | {"bias": torch.tensor(1.0)}
    with pytest.raises(
        InvalidValueError, match=r"bias is \(\) in the file, \(3,\) in the network; build the"
    ):
        _state_dicts.fill(network, {"": state}, "w.pt")


def test_complex_values_are_refused_where_whole_ones_are_wanted():
    network = nn.BatchNorm2d(1)
    state = network.state_dict() | {"num_batches_tracked": torch.tensor(2 + 0j)}
    with pytest.raises(InvalidValueError, match=r"num_batches_tracked is torch.complex64 in the file"):
        _state_dicts.fill(network, {"": state}, "w.pt")
