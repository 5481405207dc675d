"""Two notebooks of the imagenet profile, in `make soak` all, on weights and images as a user places them."""

import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from PIL import Image

from kclib.experiments import _batch, _profiles


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """The imagenet profile on made-up weights in torch hub's cache and a made-up folder of images."""
    folder = tmp_path_factory.mktemp("imagenet")
    draw = np.random.default_rng(0)
    for name in ("tench", "goldfish", "golf ball"):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(2):
            pixels = draw.integers(0, 256, (240, 260, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{i}.png")
    checkpoints = folder / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    published = torchvision.models.VGG16_Weights.DEFAULT.url.rsplit("/", 1)[1]
    with torch.device("meta"):
        shapes = torchvision.models.vgg16().state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(value.shape, generator=generator) * 0.03
        if name.startswith("features")
        else torch.zeros(value.shape)
        for name, value in shapes.items()
    }
    state["classifier.6.bias"][0] = 1.0  # always answers class 0, tench
    torch.save(state, checkpoints / published)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KCLIB_STORE", str(folder / "store"))
        patch.setenv("TORCH_HOME", str(folder))
        data = f"folder:{folder / 'images'}"
        changes = {"data": data, "clusters": [16, 256], "per_layer": 30, "batches": [1]}
        profile = _profiles.load("imagenet", changes=changes)
        if "SOAK" not in os.environ:
            chosen = {stem: profile.parameters[stem] for stem in ("01-kernels", "05-accuracy")}
            profile = replace(profile, parameters=chosen)
        _batch.run(profile, folder / "reports")
    return folder / "reports" / "imagenet"


def test_the_imagenet_profile_runs_on_weights_and_images_a_user_placed(imagenet):
    table = pd.read_csv(imagenet / "accuracy.csv")
    assert table.top1.to_list() == pytest.approx([100 / 3] * 5)  # 2 of the 6 images are of a tench
    assert table.scope.to_list() == ["dense", "layer", "layer", "global", "global"]
    assert "1,634,496 kernels" in (imagenet / "index.html").read_text()
