"""Train the shipped VGG-16 on Fashion-MNIST; a second call goes on where the first stopped."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from torch import nn

import kclib
from kclib import models, training
from kclib._util import files
from kclib.errors import InvalidValueError, KclibError
from kclib.models import _model


def train_fashion(out: Path, start: Path | None, recipe: training.Recipe, device="cpu") -> training.Trained:
    """Train ``vgg16-fashion`` from ImageNet features and write it to `out`.

    The state after each epoch lies in the data folder's cache; the same call resumes.
    """
    torch.manual_seed(recipe.seed)  # the classifier starts at random
    network = models.vgg16_fashion()
    start_from_features(network, start)
    data = kclib.load_data("fashion-mnist", "train")
    checkpoint = files.cache_dir() / f"{out.stem}.training.pt"
    trained = training.train(network, data, models.fashion_preprocess(), recipe, checkpoint, device=device)
    metadata = {"recipe": json.dumps(asdict(recipe)), "held_back": f"{trained.held_back:.2f}"}
    save_half(trained.model, out, metadata)
    return trained


def save_half(network: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Write a network's state as fp16 safetensors, whole or not at all."""
    state = {k: v.detach().cpu().half().contiguous() for k, v in network.state_dict().items()}
    if lost := [k for k, v in state.items() if not v.isfinite().all()]:
        raise InvalidValueError(f"{lost[0]} has values that are no finite fp16, so {path} is not written.")
    with files.replacing(path) as temporary:
        save_file(state, temporary, metadata=metadata)


def start_from_features(network: nn.Module, path: Path | None) -> None:
    """Fill the convolutions of a `vgg16_fashion` in place from ImageNet weights.

    `path` is a safetensors file in the layout of ``VGG16_Weights.IMAGENET1K_FEATURES``; None takes
    that file itself from torch hub's cache or the network.
    """
    if path is None:
        from torchvision.models import VGG16_Weights

        state = VGG16_Weights.IMAGENET1K_FEATURES.get_state_dict(weights_only=True)
    else:
        state = _model.read_weights(path)
    features = {k: v.float() for k, v in state.items() if k.startswith("features.")}
    wanted = {k: v.shape for k, v in network.state_dict().items() if k.startswith("features.")}
    if {k: v.shape for k, v in features.items()} != wanted:
        raise InvalidValueError(f"{path} does not hold the 13 convolutions of VGG-16.")
    network.load_state_dict(features, strict=False)


def main(
    out: Annotated[Path, typer.Option(help="Where the fp16 safetensors go.")],
    start: Annotated[
        Path | None,
        typer.Option(help="Safetensors of VGG-16 features; torchvision's own if not given."),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 12,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps.")] = "cpu",
) -> None:
    """Train the shipped VGG-16 on Fashion-MNIST; a second call goes on where the first stopped."""
    try:
        files.check_output(out, binary=True)
        trained = train_fashion(out, start, training.Recipe(epochs=epochs, seed=seed), device)
    except KclibError as error:
        typer.echo(error, err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{out.resolve()}: {trained.held_back:.2f} % on the held-back training images")


if __name__ == "__main__":
    typer.run(main)
