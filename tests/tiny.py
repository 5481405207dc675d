"""A tiny model and its images, importable by processes that sweep over them."""

from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from kclib.datasets import ImageSet
from kclib.models import Model


def tiny_model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return Model("tiny", network.eval(), lambda images: images.float() / 255 - 0.5)


def photo_model() -> Model:
    """Return a tiny model that takes pictures as PIL reads them."""
    return replace(tiny_model(), preprocess=lambda picture: pil_to_tensor(picture).float() / 255 - 0.5)


def tiny_data(seed: int = 0) -> ImageSet:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (40, 3, 1, 1), dtype=torch.uint8, generator=draw).expand(40, 3, 8, 8)
    labels = tiny_model().network(images / 255 - 0.5).argmax(1)
    labels[:8] = 5
    return ImageSet("tiny/test", images, labels, tuple("abcdef"), str(seed))


def write_pictures(folder: Path) -> Path:
    """Write the tiny images as a folder of classes and return it; each class has one more."""
    data = tiny_data()
    labels = [*data.labels, *range(len(data.classes))]
    for i, (image, label) in enumerate(zip(data.images[torch.arange(len(labels)) % 40], labels, strict=True)):
        place = folder / "test" / data.classes[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{i:02}.png")
    return folder
