"""Train a classifier from given weights, resumable and seeded: how the shipped model was made."""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from kclib import datasets, files, models
from kclib.errors import DamagedFileError, InvalidValueError


@dataclass(frozen=True)
class Recipe:
    """How to train; rates are AdamW's, shifts and squares in pixels."""

    epochs: int = 12
    batch_size: int = 128
    peak_rate: float = 2e-4
    weight_decay: float = 0.02
    label_smoothing: float = 0.1
    shift: int = 2
    square: int = 8
    held_back: int = 5000
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """A trained network in eval mode, and a row an epoch: ``epoch``, mean ``loss``, ``held_back`` (%)."""

    network: nn.Module
    history: tuple[dict, ...]

    @property
    def held_back(self) -> float:
        """Accuracy in percent on the held-back images at the epoch that was kept, the best."""
        return max(row["held_back"] for row in self.history)


def train(
    network: nn.Module,
    data: datasets.ImageSet,
    preprocess: Callable,
    recipe: Recipe,
    checkpoint: Path,
    *,
    device: str = "cpu",
) -> Trained:
    """Train a copy of `network` under `recipe` and return it as it was at its best held-back accuracy.

    After every epoch the whole state goes to `checkpoint`; the same call goes on from there and ends
    in the same weights as an uninterrupted one.

    Parameters
    ----------
    network : torch.nn.Module
    data : ImageSet
        Training images, uint8 in memory; `recipe.held_back` of them choose the stopping point.
    preprocess : callable
        From uint8 ``(b, c, h, w)`` to the network's input.
    checkpoint : path

    Raises
    ------
    InvalidValueError
        A recipe that leaves no batch to train on or no image to hold back; a checkpoint of another
        recipe, start or data set.
    DamagedFileError
        A checkpoint that cannot be read.
    """
    kept, held = _split(data, recipe)
    identity = {"recipe": asdict(recipe), "start": models.fingerprint(network), "data": data.fingerprint}
    network = copy.deepcopy(network).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.peak_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        recipe.peak_rate,
        total_steps=recipe.epochs * (len(kept) // recipe.batch_size),
        pct_start=0.15,
    )
    parts = {"network": network, "optimizer": optimizer, "schedule": schedule}
    history, best = _resume(checkpoint, identity, parts) if checkpoint.exists() else ([], {})
    for epoch in range(len(history), recipe.epochs):
        loss = _epoch(network, kept, preprocess, recipe, optimizer, schedule, epoch, device)
        accuracy = _accuracy(network, held, preprocess, device)
        if accuracy > max((row["held_back"] for row in history), default=-1.0):
            best = {name: value.detach().clone() for name, value in network.state_dict().items()}
        history.append({"epoch": epoch + 1, "loss": loss, "held_back": accuracy})
        tqdm.write(f"epoch {epoch + 1}: loss {loss:.4f}, held-back accuracy {accuracy:.2f} %")
        state = {name: part.state_dict() for name, part in parts.items()}
        with files.replacing(checkpoint) as temporary:
            torch.save(state | {"identity": identity, "history": history, "best": best}, temporary)
    network.load_state_dict(best)
    return Trained(network.eval(), tuple(history))


def train_fashion(out: Path, start: Path | None, recipe: Recipe, device: str = "cpu") -> Trained:
    """Train ``vgg16-fashion`` from ImageNet features and write it to `out`.

    The state after each epoch lies in the data folder's cache; the same call resumes.
    """
    torch.manual_seed(recipe.seed)  # the classifier starts at random
    network = models.vgg16_fashion()
    start_from_features(network, start)
    data = datasets.load("fashion-mnist", "train")
    checkpoint = files.data_dir() / "cache" / f"{out.stem}.training.pt"
    trained = train(network, data, models.fashion_preprocess(), recipe, checkpoint, device=device)
    metadata = {"recipe": json.dumps(asdict(recipe)), "held_back": f"{trained.held_back:.2f}"}
    save_half(trained.network, out, metadata)
    return trained


def save_half(network: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Write a network's state as fp16 safetensors, whole or not at all."""
    state = {k: v.detach().cpu().half().contiguous() for k, v in network.state_dict().items()}
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
        state = models.read_weights(path)
    features = {k: v.float() for k, v in state.items() if k.startswith("features.")}
    problems = network.load_state_dict(features, strict=False)
    if problems.unexpected_keys or any(k.startswith("features.") for k in problems.missing_keys):
        raise InvalidValueError(f"{path} does not hold the 13 convolutions of VGG-16.")


def augment(images: torch.Tensor, recipe: Recipe, generator: torch.Generator) -> torch.Tensor:
    """Return uint8 `images` ``(b, c, h, w)`` each mirrored, shifted and with a square blanked, at random."""
    n, _, height, width = images.shape

    def draw(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (n, 1), generator=generator)

    flip, erase = draw(0, 2).bool(), draw(0, 2).bool()
    rows = torch.arange(height) + draw(0, 2 * recipe.shift + 1)
    columns = torch.arange(width) + draw(0, 2 * recipe.shift + 1)
    columns = torch.where(flip, columns.flip(1), columns)
    padded = F.pad(images, (recipe.shift,) * 4)
    shifted = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )
    offset_y = torch.arange(height) - draw(1 - recipe.square, height)
    offset_x = torch.arange(width) - draw(1 - recipe.square, width)
    inside_y = (offset_y >= 0) & (offset_y < recipe.square) & erase
    inside_x = (offset_x >= 0) & (offset_x < recipe.square)
    return shifted * ~(inside_y[:, None, :, None] & inside_x[:, None, None, :])


@torch.random.fork_rng()  # leaves the caller's global generator as it was
def _epoch(network, data, preprocess, recipe, optimizer, schedule, epoch, device) -> float:
    """Train one epoch; its randomness hangs on (seed, epoch) alone, so that a resumed run repeats it."""
    network.train()
    generator = torch.Generator().manual_seed(recipe.seed * 1000 + epoch)
    torch.manual_seed(recipe.seed * 1000 + epoch)  # dropout draws from the global generator
    order = torch.randperm(len(data), generator=generator)
    total, steps = 0.0, len(data) // recipe.batch_size
    for step in tqdm(range(steps), desc=f"epoch {epoch + 1}/{recipe.epochs}", mininterval=2):
        chosen = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
        inputs = preprocess(augment(data.images[chosen], recipe, generator)).to(
            device, memory_format=torch.channels_last
        )
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = F.cross_entropy(
                network(inputs).float(),
                data.labels[chosen].to(device),
                label_smoothing=recipe.label_smoothing,
            )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
    return total / max(steps, 1)


@torch.inference_mode()
def _accuracy(network, data, preprocess, device) -> float:
    network.eval()
    hits = 0
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        for inputs, labels in datasets.batches(data, preprocess, 250):
            inputs = inputs.to(device, memory_format=torch.channels_last)
            hits += (network(inputs).argmax(1).cpu() == labels).sum().item()
    return 100 * hits / len(data)


def _split(data: datasets.ImageSet, recipe: Recipe) -> tuple[datasets.ImageSet, datasets.ImageSet]:
    """Return the images to train on and those held back, drawn by the recipe's seed."""
    largest = len(data) - recipe.batch_size
    if not 1 <= recipe.held_back <= largest:
        raise InvalidValueError(
            f"held_back is {recipe.held_back}; of {len(data)} images it must be 1 to {largest}, "
            f"so that a batch of {recipe.batch_size} is left to train on."
        )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(recipe.seed))
    held, kept = order[: recipe.held_back], order[recipe.held_back :]
    return datasets.select(data, kept), datasets.select(data, held)


def _resume(checkpoint: Path, identity: dict, parts: dict) -> tuple[list[dict], dict]:
    """Load a checkpoint into `parts`; return its history and its best weights."""
    try:
        state = torch.load(checkpoint, weights_only=True)
    except Exception as error:  # a damaged file can make torch raise almost anything
        raise DamagedFileError(f"{checkpoint} is not a whole checkpoint: {error}") from error
    if state["identity"] != identity:
        raise InvalidValueError(
            f"{checkpoint} belongs to another recipe, start or data set ({state['identity']}); "
            "give those again or remove the file."
        )
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["history"], state["best"]
