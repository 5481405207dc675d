import os
import re
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision import transforms
from torchvision.models import get_model, get_model_weights

from kclib import datasets, evaluation, kernels, loading, models
from kclib._util import files
from kclib.errors import DamagedFileError, InvalidValueError, MissingFileError, UnknownNameError
from kclib.models import _loading, _model

SHIPPED = files.data_dir() / "vgg16_fashion.fp16.safetensors"


@pytest.fixture
def ownnets(tmp_path, monkeypatch):
    """A user's importable module of factories."""
    (tmp_path / "ownnets.py").write_text(
        "from torch import nn\n"
        "from kclib.models._model import Model\n"
        "def network():\n    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.Dropout(0.5))\n"
        "def model():\n    return Model('mine', network(), str, ('cat', 'dog'))\n"
        "def number():\n    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ownnets", raising=False)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """From a torchvision name to its place in a torch hub cache that is empty, with no network."""
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=URLError("no network")))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return lambda name: folder / Path(get_model_weights(name).DEFAULT.url).name


def test_an_unknown_name_lists_the_known_ones_and_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match=r"'vgg16-fashion'\?.*known: .*alexnet"):
        loading.load_model("vgg16-fashon")


def test_vgg16_fashion_has_the_layers_and_kernels_of_configuration_d():
    convolutions = [m for m in models.vgg16_fashion().modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    assert {c.kernel_size for c in convolutions} == {(3, 3)}
    assert sum(c.in_channels * c.out_channels for c in convolutions) == 1_634_496


def test_the_shipped_model_is_its_file_in_eval_mode_and_loads_the_same_twice():
    first, second, stored = (
        loading.load_model(),
        loading.load_model("vgg16-fashion"),
        _model.read_weights(SHIPPED),
    )
    assert all(torch.equal(value, stored[name].float()) for name, value in first.network.state_dict().items())
    assert not any(module.training for module in first.network.modules())
    assert models.fingerprint(first.network) == models.fingerprint(second.network)


def test_the_fingerprint_changes_with_one_bit_or_the_shape_and_not_with_memory_layout():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = models.fingerprint(network)
    assert models.fingerprint(network.to(memory_format=torch.channels_last)) == before
    with torch.no_grad():
        network[0].bias.view(torch.int32)[1] ^= 1
    assert models.fingerprint(network) != before
    flat, square = (nn.ParameterList([torch.zeros(shape)]) for shape in ((4,), (2, 2)))
    assert models.fingerprint(flat) != models.fingerprint(square)


@pytest.mark.parametrize(("factory", "classes"), [("network", ()), ("model", ("cat", "dog"))])
def test_a_factory_may_return_a_network_or_a_model(ownnets, factory, classes):
    model = loading.load_model(f"ownnets:{factory}")
    assert (model.network[0].out_channels, model.network.training, model.classes) == (2, False, classes)
    if factory == "network":  # its preprocessing is RGB from 0 to 1
        assert torch.allclose(model.preprocess(Image.new("L", (4, 4), 51)), torch.full((3, 4, 4), 0.2))


@pytest.mark.parametrize("name", ["nowhere_at_all:network", "ownnets:absent", ":network"])
def test_a_factory_that_is_not_there_is_an_invalid_value(ownnets, name):
    with pytest.raises(InvalidValueError, match=f"'{name}' could not be imported"):
        loading.load_model(name)


def test_a_factory_that_returns_no_network_is_an_invalid_value(ownnets):
    with pytest.raises(InvalidValueError, match="returned int"):
        loading.load_model("ownnets:number")


@pytest.mark.parametrize("kind", ["safetensors", "pth", "pth with state_dict"])
def test_weights_from_a_file_replace_the_factorys_own(ownnets, tmp_path, kind):
    state = {"0.weight": torch.randn(2, 3, 3, 3), "0.bias": torch.tensor([1.0, -2.0])}
    path = tmp_path / f"w.{kind.split()[0]}"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state if kind == "pth" else {"state_dict": state, "epoch": 3}, path)
    loaded = loading.load_model("ownnets:network", weights=path).network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(tmp_path):
    path, target = tmp_path / "bomb.pth", tmp_path / "exploded"
    bomb = type("Bomb", (), {"__reduce__": lambda self: (os.mkdir, (str(target),))})
    torch.save({"weight": bomb()}, path)
    with pytest.raises(DamagedFileError, match=r"bomb\.pth"):
        _model.read_weights(path)
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists(), "the bomb was a dud"


@pytest.mark.parametrize(("save", "name"), [(save_file, "w.safetensors"), (torch.save, "w.pth")])
def test_truncated_weights_are_damaged(tmp_path, save, name):
    save({"a": torch.zeros(100)}, tmp_path / name)
    os.truncate(tmp_path / name, (tmp_path / name).stat().st_size - 50)
    with pytest.raises(DamagedFileError, match="not a whole"):
        _model.read_weights(tmp_path / name)


@pytest.mark.parametrize("content", [torch.zeros(3), {"a": 1}, [torch.zeros(1)]])
def test_a_checkpoint_that_is_no_state_dict_is_damaged(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(DamagedFileError, match="no state dict"):
        _model.read_weights(tmp_path / "w.pth")


def test_weights_that_are_missing_or_do_not_fit_are_named(ownnets, tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(MissingFileError, match=f"{path} does not exist"):
        loading.load_model("ownnets:network", weights=path)
    save_file({"0.weight": torch.zeros(2, 3, 5, 5), "0.bias": torch.zeros(2)}, path)
    with pytest.raises(InvalidValueError, match=f"{path} does not fit"):
        loading.load_model("ownnets:network", weights=path)


def test_one_changed_byte_in_the_shipped_weights_is_named(tmp_path, monkeypatch):
    content = bytearray(SHIPPED.read_bytes())
    content[-1] ^= 1
    copy = tmp_path / SHIPPED.name
    monkeypatch.setenv("KCLIB_DATA", str(tmp_path))
    copy.write_bytes(content)
    with pytest.raises(DamagedFileError, match=f"{copy} has SHA-256"):
        loading.load_model()
    shutil.copyfile(SHIPPED, copy)
    loading.load_model()


def test_an_architecture_needs_no_weights_neither_shipped_nor_published(published, tmp_path, monkeypatch):
    monkeypatch.setenv("KCLIB_DATA", str(tmp_path / "nowhere"))
    shipped = _loading.architecture("vgg16-fashion")
    assert (shipped.name, shipped.classes) == ("vgg16-fashion", _loading.FASHION_CLASSES)
    assert shipped.preprocess(torch.zeros(1, 28, 28, dtype=torch.uint8)).shape == (3, 32, 32)
    model = _loading.architecture("squeezenet1_1")
    assert (model.name, len(model.classes), model.classes[0]) == ("squeezenet1_1", 1000, "tench")
    assert model.preprocess(Image.new("L", (300, 260))).shape == (3, 224, 224)
    with pytest.raises(MissingFileError):
        loading.load_model("vgg16-fashion")
    with pytest.raises(MissingFileError):
        loading.load_model("squeezenet1_1")


def test_an_architecture_takes_the_state_of_the_loaded_network():
    loaded, network = loading.load_model().network, _loading.architecture("vgg16-fashion").network
    network.load_state_dict(loaded.state_dict())
    assert models.fingerprint(network) == models.fingerprint(loaded)


@pytest.mark.parametrize(
    "name",
    ["inception_v3", "googlenet", "densenet121", "efficientnet_b0", "swin_t", "swin_v2_t", "maxvit_t",
     "vit_b_16", "vit_h_14", "mnasnet0_5", "shufflenet_v2_x0_5", "convnext_tiny",
     "vgg16-fashion"],
)  # fmt: skip
def test_an_architecture_is_built_on_the_meta_device_without_a_real_tensor(name):
    with torch.device("meta"):
        model = _loading.architecture(name)
    network = model.network
    held = [
        value for module in network.modules() for value in vars(module).values() if torch.is_tensor(value)
    ]
    assert {value.device.type for value in (*network.parameters(), *network.buffers(), *held)} == {"meta"}
    inputs = model.preprocess(torch.zeros(3, 28, 28, dtype=torch.uint8))
    assert inputs.device.type == "cpu"
    answer = network.eval()(inputs[None].to("meta"))
    assert answer.shape == (1, len(model.classes))


def test_an_unknown_architecture_is_named_and_a_factory_is_called_anew(ownnets):
    with pytest.raises(UnknownNameError, match=r"unknown model 'resnet81' .*mean 'resnet"):
        _loading.architecture("resnet81")
    first, second = _loading.architecture("ownnets:network"), _loading.architecture("ownnets:network")
    assert (first.name, first.classes) == ("ownnets:network", ())
    assert first.network is not second.network
    assert _loading.architecture("ownnets:model").classes == ("cat", "dog")


def test_a_plain_network_is_kept_and_shown_rgb_from_0_to_1():
    network = nn.Flatten()
    model = models.plain("some", network)
    assert (model.name, model.classes) == ("some", ())
    assert model.network is network
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    pixels[0, 0], pixels[0, 1] = 0, 255
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    batch = torch.from_numpy(pixels).permute(2, 0, 1).expand(2, 3, 5, 7)
    for inputs in (model.preprocess(Image.fromarray(pixels)), *model.preprocess(batch)):
        assert (type(inputs), inputs.dtype) == (torch.Tensor, torch.float32)
        torch.testing.assert_close(inputs, expected)
        assert (inputs.min(), inputs.max()) == (0, 1)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_a_plain_networks_input_is_rgb_whatever_the_picture_is(mode):
    picture = Image.new("RGB", (4, 4), (0, 51, 255)).convert(mode)  # 51 is one of P's own levels
    inputs = models.plain("some", nn.Flatten()).preprocess(picture)
    grey = [0.587 * 0.2 + 0.114] * 3
    expected = torch.tensor(grey if mode == "L" else [0, 0.2, 1])[:, None, None].expand(3, 4, 4)
    torch.testing.assert_close(inputs, expected, atol=1 / 255, rtol=0)


def test_published_weights_in_the_hub_cache_load_offline(published):
    ours = get_model("squeezenet1_1", weights=None)
    torch.save(ours.state_dict(), published("squeezenet1_1"))
    model = loading.load_model("squeezenet1_1")
    assert models.fingerprint(model.network) == models.fingerprint(ours)
    assert (len(model.classes), model.classes[0]) == (1000, "tench")
    assert model.preprocess(Image.new("L", (300, 260))).shape == (3, 224, 224)


def test_published_densenets_load_from_their_old_key_names(published):
    ours = get_model("densenet121", weights=None)
    dotted = re.compile(r"(denselayer\d+\.(?:norm|conv))([12])")  # published: denselayer1.norm.1.weight
    state = {dotted.sub(r"\1.\2", key): value for key, value in ours.state_dict().items()}
    torch.save(state, published("densenet121"))
    assert models.fingerprint(loading.load_model("densenet121").network) == models.fingerprint(ours)


def test_vit_h_14_is_built_at_the_image_size_of_its_published_weights(monkeypatch):
    with torch.device("meta"):  # 632 million parameters, none of them real
        state = get_model("vit_h_14", weights=None, image_size=518).state_dict()
        monkeypatch.setattr(get_model_weights("vit_h_14"), "get_state_dict", lambda self, **kwargs: state)
        monkeypatch.setattr(nn.Module, "to", lambda self, device: self)
        assert loading.load_model("vit_h_14").network.encoder.pos_embedding.shape == (1, 37 * 37 + 1, 1280)


def test_published_weights_that_cannot_be_downloaded_say_where_to_place_them(published):
    path = published("mobilenet_v2")
    with pytest.raises(MissingFileError, match=f"place {path.name} at {path}"):
        loading.load_model("mobilenet_v2")


def test_a_damaged_file_in_the_hub_cache_is_named(published):
    published("mobilenet_v2").write_bytes(b"not a checkpoint")
    with pytest.raises(DamagedFileError, match=published("mobilenet_v2").name):
        loading.load_model("mobilenet_v2")


def test_fashion_preprocessing_of_tensor_picture_and_batch_is_as_computed_by_hand():
    pixels = np.arange(28 * 28).astype(np.uint8).reshape(28, 28)
    padded = np.pad(pixels.astype(float), 2)
    expected = torch.tensor(np.stack([padded - mean for mean in (123.68, 116.779, 103.939)])).float()
    preprocess, tensor = models.fashion_preprocess(), torch.from_numpy(pixels)[None]
    for inputs in (preprocess(Image.fromarray(pixels)), preprocess(tensor), *preprocess(tensor[None])):
        assert type(inputs) is torch.Tensor
        torch.testing.assert_close(inputs, expected, atol=1e-4, rtol=0)


def test_the_input_shape_is_known_where_preprocessing_fixes_it():
    assert models.input_shape(_loading.architecture("vgg16-fashion")) == (3, 32, 32)
    assert models.input_shape(_loading.architecture("resnet18")) == (3, 224, 224)
    old = transforms.Compose([transforms.Resize((40, 50)), transforms.ToTensor()])  # takes PIL images alone
    assert models.input_shape(models.Model("old", nn.Flatten(), old)) == (3, 40, 50)
    assert models.input_shape(models.plain("mine", nn.Flatten(), (1, 9, 7))) == (1, 9, 7)


def test_an_input_shape_that_is_that_of_the_image_is_asked_for():
    network = nn.Conv2d(3, 4, 3)
    for given in (network, models.plain("mine", network)):
        with pytest.raises(InvalidValueError, match="input_shape"):
            models.input_shape(given)
        images = torch.zeros(2, 3, 11, 13, dtype=torch.uint8)
        assert models.input_shape(given, (images, torch.zeros(2, dtype=torch.int64))) == (3, 11, 13)
    for shortest in (transforms.Resize(40), transforms.Pad(2)):  # one side, or none, is fixed
        keeping = transforms.Compose([shortest, transforms.ToTensor()])
        with pytest.raises(InvalidValueError, match="input_shape"):
            models.input_shape(models.Model("mine", network, keeping))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_plain_network_reads_images_of_as_many_channels_as_its_first_convolution(channels):
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.Conv2d(channels, 4, 3)), nn.Conv2d(4, 2, 3))
    grey = torch.arange(4 * 16 * 16, dtype=torch.uint8).reshape(4, 1, 16, 16)
    colour = grey.expand(-1, 3, -1, -1)
    for images in (grey, colour):
        found = models.plain("mine", network).preprocess(images)
        torch.testing.assert_close(found, grey.expand(-1, channels, -1, -1) / 255, rtol=2e-4, atol=0)
        picture = models.plain("mine", network).preprocess(Image.fromarray(grey[0, 0].numpy()))
        torch.testing.assert_close(picture, found[0], rtol=2e-4, atol=0)


def test_a_plain_network_is_given_images_of_the_shape_asked_for():
    model = models.plain("mine", nn.Conv2d(3, 4, 3), (1, 8, 6))
    red = torch.zeros(2, 3, 16, 12, dtype=torch.uint8)
    red[:, 0] = 255
    found = model.preprocess(red)
    assert found.shape == (2, 1, 8, 6)
    assert found.flatten().tolist() == pytest.approx([0.299] * 96, abs=0.005)  # luma of red


def test_channels_that_images_do_not_have_are_asked_for_when_an_image_comes():
    model = models.plain("satellite", nn.Conv2d(12, 4, 3))
    assert kernels.extract(model).kernels.shape == (48, 3, 3)
    with pytest.raises(InvalidValueError, match="reads 12 channels"):
        evaluation.evaluate(model, datasets.load_data(limit=2), progress=False)


@pytest.fixture
def shaped(tmp_path, monkeypatch):
    (tmp_path / "shaped_models.py").write_text(
        "from torch import nn\n"
        "from torchvision.transforms import v2\n"
        "from kclib.models._model import Model\n"
        "def alone():\n    return nn.Conv2d(1, 4, 3)\n"
        "def keeping():\n    return Model('mine', nn.Conv2d(3, 4, 3), v2.ToImage())\n"
        "def fixing():\n    return Model('mine', nn.Conv2d(3, 4, 3), v2.Resize((40, 40)))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_an_input_shape_is_taken_where_none_is_known(shaped):
    alone = loading.load_model("shaped_models:alone", input_shape=(1, 9, 8))
    assert models.input_shape(alone) == (1, 9, 8)
    assert alone.preprocess(torch.zeros(2, 3, 30, 30, dtype=torch.uint8)).shape == (2, 1, 9, 8)
    assert models.input_shape(loading.load_model("shaped_models:keeping", input_shape=(3, 9, 8))) == (3, 9, 8)
    assert models.input_shape(loading.load_model("shaped_models:fixing", input_shape=(3, 40, 40))) == (
        3,
        40,
        40,
    )
    with pytest.raises(InvalidValueError, match=r"\(3, 9, 8\), but .* makes \(3, 40, 40\)"):
        loading.load_model("shaped_models:fixing", input_shape=(3, 9, 8))
