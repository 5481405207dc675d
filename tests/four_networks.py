"""Four networks as other people have them, untrained, and pictures for them to look at."""

from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet


def mobilenet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.mobilenet_v3_small(num_classes=10)


class _Narrow(ResNet):
    """A ResNet whose blocks are an eighth as wide, so that it takes a sixty-fourth of the time."""

    def _make_layer(self, block, planes, *arguments, **options):
        return super()._make_layer(block, planes // 8, *arguments, **options)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    network = _Narrow(BasicBlock, [2, 2, 2, 2])
    network.fc = nn.Linear(64, 10)
    return network


def lenet() -> nn.Module:
    """Return a LeNet of one channel, for 28×28 pixels and for no others."""
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)]
    second = [nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()]
    return nn.Sequential(
        *first, *second, nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Linear(84, 10)
    )


def convolutional() -> nn.Module:
    """Return a network of convolutions alone, which answers one pixel of logits for each image."""
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    second = [nn.Conv2d(16, 24, 3, stride=2), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.Conv2d(24, 10, 1), nn.AdaptiveAvgPool2d(1))


def write_pictures(folder: Path) -> Path:
    """Write 200 pictures of waves in ten classes as small JPEGs, a folder a class, and return the folder."""
    draw = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32] / 32
    for i in range(10):
        (place := folder / f"class {i}").mkdir(parents=True)
        for j in range(20):
            phase = draw.uniform(0, 6, 3) + 0.3 * i
            wave = np.sin(6 * ((i % 5 + 1) * x + (i // 5 + 1) * y)[..., None] + phase)
            pixels = 128 + 60 * wave + draw.normal(0, 20, (32, 32, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{j}.jpg")
    return folder
