"""Networks and images that measuring is hard on: dead channels, constants, huge and tiny values."""

import torch
from torch import nn

from kclib.datasets import ImageSet
from kclib.models import Model


def pictures(kind: str = "smooth", n: int = 24) -> ImageSet:
    """Return images 3×8×8, their labels by turns."""
    torch.manual_seed(0)
    made = {
        "smooth": 255 * nn.functional.interpolate(torch.rand(n, 3, 3, 3), size=8, mode="bilinear"),
        "constant": torch.full((n, 3, 8, 8), 200.0),
        "black": torch.zeros(n, 3, 8, 8),
    }[kind]
    return ImageSet(kind, made.to(torch.uint8), torch.arange(n) % 4, tuple("abcd"), kind)


def _network(seed: int = 0, *, norm: bool = True, groups: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    norms = [nn.BatchNorm2d(8), nn.BatchNorm2d(8)] if norm else [nn.Identity(), nn.Identity()]
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), norms[0],
        nn.Conv2d(8, 8, 3, padding=1, groups=groups), norms[1], nn.ReLU(),
        nn.Conv2d(8, 6, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, 1, 2)
            nn.init.uniform_(module.running_var, 0.1, 0.2)
            nn.init.uniform_(module.bias, -1, 1)
    return network.eval()


@torch.no_grad()
def network(kind: str) -> nn.Module:
    """Return the strange network of a name."""
    net = _network(norm=kind != "plain", groups=8 if kind == "depthwise" else 1)
    if kind == "dead channels":
        net[0].bias[:3] = -1e3
    elif kind == "dead layer":
        net[0].bias[:] = -1e6
        net[2].weight[:], net[2].bias[:], net[2].running_mean[:] = 1, 0, 0
    elif kind == "zero layer":
        net[3].weight.zero_()
    elif kind == "equal kernels":
        net[3].weight[:] = net[3].weight[0, 0].clone()
    elif kind == "far from zero":
        net[3].weight += 1000
    elif kind == "norm without variance":
        net[4].running_var.fill_(1e-12)
    elif kind.startswith("weights x "):
        for layer in (net[0], net[3], net[6]):
            layer.weight *= float(kind.removeprefix("weights x "))
    return net


NETWORKS = (
    "ordinary", "plain", "depthwise", "dead channels", "dead layer", "zero layer", "equal kernels",
    "far from zero", "norm without variance", "weights x 1e-6", "weights x 1e6",
)  # fmt: skip


def one_kernel() -> nn.Module:
    """Return a network of a single 2D kernel."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 1, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 4)).eval()


def scaled(images):
    """Map pixels to about -1 to 1."""
    return images.float() / 128 - 1


def raw(images):
    """Leave pixels from 0 to 255."""
    return images.float()


def model(kind: str, preprocess=scaled) -> Model:
    """Return a strange network as a `Model`."""
    return Model(kind, network(kind), preprocess)
