"""The networks that losing less is measured on: the shipped one, and two that nothing was tuned to."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torchvision.transforms import v2
from tqdm.auto import tqdm

import kclib
from data.train import start_from_features
from kclib import datasets, models, training
from kclib._util import files
from kclib.datasets import _loader

CALIBRATION = 1024
PROBE_IMAGES = 10_000
RESNET_RECIPE = training.Recipe(epochs=4, peak_rate=2e-3)


@dataclass(frozen=True)
class Images:
    """Training images: to train on, to choose by, and to correct by (without labels)."""

    train: kclib.ImageSet
    held_back: kclib.ImageSet
    calibration: kclib.ImageSet


def images() -> Images:
    """Return Fashion-MNIST's training images, cut as training cuts them."""
    train = kclib.load_data("fashion-mnist", "train")
    kept, held = training.split(train, training.Recipe())
    return Images(train, held, _loader.select(kept, torch.arange(CALIBRATION)))


def fewer(images: Images) -> Images:
    """Return these with fewer to choose and to correct by, for inputs of more pixels."""
    held, calibration = datasets.limited(images.held_back, 1000), datasets.limited(images.calibration, 256)
    return Images(images.train, held, calibration)


def resnet18(cache: Path) -> kclib.Model:
    """Return torchvision's ResNet-18 trained briefly on Fashion-MNIST by the project's own training."""
    torch.manual_seed(RESNET_RECIPE.seed)
    network = torchvision.models.resnet18(num_classes=10)
    data = kclib.load_data("fashion-mnist", "train")
    preprocess = models.fashion_preprocess()
    trained = training.train(network, data, preprocess, RESNET_RECIPE, cache / "resnet18.pt")
    return kclib.Model("resnet18-fashion", trained.model, preprocess, data.classes)


def probed_vgg16(features: Path, cache: Path) -> kclib.Model:
    """Return VGG-16 with ImageNet's convolutions and a linear probe on what they answer, for 64×64 inputs.

    Parameters
    ----------
    features : path
        Safetensors file in the layout of ``VGG16_Weights.IMAGENET1K_FEATURES``.
    """
    base = models.vgg16_fashion()
    start_from_features(base, features)
    network = nn.Sequential()
    network.features, network.flatten = base.features, nn.Flatten()
    network.classifier = nn.Linear(512 * 2 * 2, 10)
    preprocess = v2.Compose([models.fashion_preprocess(), v2.Resize(64, antialias=True)])
    network.eval()
    _fit_probe(network, preprocess, cache / "probe.npz")
    return kclib.Model("vgg16-imagenet-probe", network, preprocess, kclib.load_data().classes)


def _fit_probe(network: nn.Sequential, preprocess, cache: Path) -> None:
    """Set the classifier of a network, in place, to a logistic regression on its features."""
    if not cache.exists():
        data = datasets.limited(kclib.load_data("fashion-mnist", "train"), PROBE_IMAGES)
        found, total = [], PROBE_IMAGES // 100
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for inputs, _ in tqdm(datasets.batches(data, preprocess, 100), total=total, desc="probe"):
                found.append(network.flatten(network.features(inputs)).float().numpy())
        fit = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
        fit.fit(np.concatenate(found), data.labels.numpy())
        scale, line = fit[0], fit[1]
        weight = line.coef_ / scale.scale_
        bias = line.intercept_ - weight @ scale.mean_
        with files.replacing(cache) as temporary, open(temporary, "wb") as out:
            np.savez(out, weight=weight.astype(np.float32), bias=bias.astype(np.float32))
    with np.load(cache) as found, torch.no_grad():
        network.classifier.weight.copy_(torch.from_numpy(found["weight"]))
        network.classifier.bias.copy_(torch.from_numpy(found["bias"]))


def features_file() -> Path | None:
    """Return where ImageNet's VGG-16 features lie: ``$WEIGHTS``, if given."""
    return Path(os.environ["WEIGHTS"]) if os.environ.get("WEIGHTS") else None
