from collections import OrderedDict
from unittest.mock import Mock

import pytest
import torch
import typer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from data import train
from kclib import datasets, models
from kclib.errors import InvalidValueError
from kclib.models import _model
from kclib.training import Recipe, Trained

RECIPE = Recipe(epochs=2, batch_size=8, peak_rate=1e-9, shift=1, square=2, held_back=12)


@pytest.fixture
def script():
    app = typer.Typer()
    app.command()(train.main)
    return lambda *arguments: CliRunner().invoke(app, [str(x) for x in arguments])


def test_the_recipe_comes_from_the_options(script, monkeypatch, tmp_path):
    asked = []
    trained = Trained(None, ({"held_back": 93.456}, {"held_back": 90.0}))
    monkeypatch.setattr(train, "train_fashion", lambda *options: asked.append(options) or trained)
    ended = script("--out", tmp_path / "w.safetensors", "--epochs", 3, "--seed", 4)
    assert (ended.exit_code, "93.46 %" in ended.output) == (0, True)
    assert asked == [(tmp_path / "w.safetensors", None, Recipe(epochs=3, seed=4), "cpu")]


def test_no_epochs_no_start_and_a_folder_to_write_are_exit_code_2(script, tmp_path):
    assert script("--out", tmp_path / "w.safetensors", "--epochs", 0).exit_code == 2
    absent = tmp_path / "absent.safetensors"
    ended = script("--out", tmp_path / "w.safetensors", "--start", absent)
    assert (ended.exit_code, ended.stderr) == (2, f"weights file {absent} does not exist.\n")
    ended = script("--out", tmp_path)
    assert (ended.exit_code, "it is a folder" in ended.stderr) == (2, True)


def test_the_shipped_recipe_sees_the_training_split_alone_and_leaves_halves(tmp_path, monkeypatch):
    layers = {"features": nn.Sequential(nn.Conv2d(3, 2, 3)), "pool": nn.AdaptiveAvgPool2d(1)}
    net = nn.Sequential(OrderedDict(layers, flatten=nn.Flatten(), classifier=nn.Linear(2, 2)))
    start = {"features.0.weight": torch.full((2, 3, 3, 3), 0.25), "features.0.bias": torch.zeros(2)}
    save_file(start, tmp_path / "start.safetensors")
    values = torch.arange(60, dtype=torch.uint8)[:, None, None, None]
    images = datasets.ImageSet(
        "tiny/train", values.expand(60, 1, 28, 28), torch.arange(60) % 2, ("a", "b"), "60"
    )
    monkeypatch.setenv("KCLIB_DATA", str(tmp_path))
    monkeypatch.setattr(models, "vgg16_fashion", lambda: net)
    monkeypatch.setattr("kclib.load_data", load := Mock(return_value=images))
    out = tmp_path / "out.safetensors"
    trained = train.train_fashion(out, tmp_path / "start.safetensors", RECIPE)
    load.assert_called_once_with("fashion-mnist", "train")
    written, state = _model.read_weights(out), trained.model.state_dict()
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name].half()) for name in state)
    assert torch.allclose(trained.model.features[0].weight, torch.tensor(0.25))
    assert safe_open(out, "pt").metadata()["held_back"] == f"{trained.held_back:.2f}"


def test_a_start_without_the_thirteen_convolutions_is_refused(tmp_path):
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "start.safetensors")
    with pytest.raises(InvalidValueError, match="13 convolutions"):
        train.start_from_features(models.vgg16_fashion(), tmp_path / "start.safetensors")


def test_weights_that_half_precision_cannot_hold_are_not_written(tmp_path):
    network = nn.Linear(2, 2)
    network.weight.data[0, 1] = 1e6
    with pytest.raises(InvalidValueError, match="weight has values"):
        train.save_half(network, tmp_path / "x.safetensors", {})
    assert not list(tmp_path.iterdir())
