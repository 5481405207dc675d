"""Train a classifier from given weights by a `Recipe`: seeded, and resumable after every epoch."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from kclib import datasets, models
from kclib._util import checks, files, small_maps
from kclib._util.progress_bars import tqdm
from kclib.datasets import _loader
from kclib.errors import DamagedFileError, InvalidValueError, reason
from kclib.kernels import _copying
from kclib.models import _model

_LEAST = {"epochs": 1, "batch_size": 1, "shift": 0, "square": 0, "held_back": 1, "images": 0, "patience": 0}


@dataclass(frozen=True)
class Recipe:
    """How to train; rates are AdamW's, shifts and squares in pixels.

    Attributes
    ----------
    label_smoothing : float
        Of the labels; a teacher's answers are taken as they are.
    images : int
        Images an epoch, drawn anew for each; 0 takes all that are not held back.
    patience : int
        Epochs in a row without a better held-back check than an earlier epoch's after which training ends; 0
        never ends it early. The start is no epoch: high rates first lose some of what it was.
    temperature : float
        What a teacher's logits and the network's are divided by before they are compared.
    """

    epochs: int = 12
    batch_size: int = 128
    peak_rate: float = 2e-4
    weight_decay: float = 0.02
    label_smoothing: float = 0.1
    shift: int = 2
    square: int = 8
    held_back: int = 5000
    seed: int = 0
    images: int = 0
    patience: int = 0
    temperature: float = 2.0

    def __post_init__(self):
        for name, least in _LEAST.items():
            object.__setattr__(self, name, checks.check_whole(name, getattr(self, name), least))
        object.__setattr__(self, "seed", checks.check_seed(self.seed))
        for name in ("peak_rate", "temperature"):
            checks.check_real(name, getattr(self, name), lambda x: x > 0, "finite and above 0")
        for name in ("weight_decay", "label_smoothing"):
            checks.check_real(name, getattr(self, name), lambda x: 0 <= x <= 1, "0 to 1")


@dataclass(frozen=True)
class Trained:
    """A trained network.

    Attributes
    ----------
    model : Model or torch.nn.Module
        As what was given, in eval mode, as it was at its best check.
    history : tuple of dict
        A row an epoch: ``epoch``, mean ``loss``, and the check on the held-back images in percent:
        ``held_back``, their accuracy, or ``agreement``, how many are answered as the teacher answers them.
        Epoch 0 is the start, which has no loss.
    """

    model: models.Model | nn.Module
    history: tuple[dict, ...]

    @property
    def held_back(self) -> float:
        """Accuracy (with a teacher, agreement) in percent on the held-back images, at the best check."""
        return max(map(_score, self.history))


def train(
    network: nn.Module,
    data: datasets.ImageSet,
    preprocess: Callable,
    recipe: Recipe,
    checkpoint: Path,
    *,
    teacher: nn.Module | None = None,
    after_epoch: Callable[[nn.Module], nn.Module] | None = None,
    device: str = "cpu",
) -> Trained:
    """Train a copy of `network` under `recipe` and return it as it was at its best check.

    The held-back images are checked before training and after every epoch; the start is among what may be
    returned, so that the answer is never worse on them than what was given. After every check the whole state
    goes to `checkpoint`; the same call goes on from there and ends in the same weights as in one go.

    Parameters
    ----------
    network : torch.nn.Module
        float32. Parameters that require no gradient stay.
    data : ImageSet
        Training images; `recipe.held_back` of them choose the stopping point. Those in memory are changed at
        random (`augment`) before they are preprocessed; those that are read file by file after it, where what
        is blanked is 0. Without a teacher, those of unknown label are left out.
    preprocess : callable
        To the network's input, and the teacher's.
    checkpoint : path
    teacher : torch.nn.Module, optional
        float32, unchanged. Its answers take the place of all labels, which are then never read: the loss is
        the KL divergence from its softened answers (Hinton, Vinyals and Dean 2015, *Distilling the Knowledge
        in a Neural Network*, section 2), and the check is agreement with them.
    after_epoch : callable, optional
        Called before each check, with the network that is trained. It may change it in place, and returns
        what is checked and kept: that network or a changed copy.
    device : str

    Raises
    ------
    InvalidValueError
        A recipe that leaves no batch to train on or no image to hold back; images or parameters of another
        kind; a loss that is not finite; a checkpoint of another recipe, start, teacher or data set.
    DamagedFileError
        A checkpoint that cannot be read.
    """
    if teacher is None:
        data = _loader.known(data)
    kept, held = split(data, recipe)
    identity = _identity(network, data, recipe, teacher)
    network = _copied(network, device)
    if teacher is not None:
        teacher = _copied(teacher, device).eval()
        held = replace(held, labels=_answers(teacher, held, preprocess, device))
    parts = _parts(network, recipe, len(kept))
    history, best = _resume(checkpoint, identity, parts) if checkpoint.exists() else ([], {})
    while not _ended(history, recipe):
        row = {"epoch": len(history)}
        if history:
            row["loss"] = _epoch(parts, kept, preprocess, recipe, row["epoch"], teacher, device)
        checked = after_epoch(network) if after_epoch else network
        right = _answers(checked, held, preprocess, device) == held.labels
        row["held_back" if teacher is None else "agreement"] = 100 * right.sum().item() / len(right)
        if _score(row) > max(map(_score, history), default=-1.0):
            best = {name: value.detach().clone() for name, value in checked.state_dict().items()}
        history.append(row)
        tqdm.write(", ".join(f"{name} {value:.6g}" for name, value in row.items()))
        _write(checkpoint, parts, {"identity": identity, "history": history, "best": best})
    network.load_state_dict(best)
    return Trained(network.eval(), tuple(history))


def _identity(network: nn.Module, data: datasets.ImageSet, recipe: Recipe, teacher: nn.Module | None) -> dict:
    """Return what a checkpoint must share with a call to be resumed by it."""
    return {
        "recipe": asdict(recipe),
        "start": models.fingerprint(network),
        "teacher": None if teacher is None else models.fingerprint(teacher),
        "data": data.fingerprint,
    }


def _copied(network: nn.Module, device: str) -> nn.Module:
    """Return a copy of a network to train or to ask, on its device."""
    for name, value in network.named_parameters():
        if value.dtype != torch.float32:
            raise InvalidValueError(f"parameter {name} is {value.dtype}; call .float() on the network first.")
    return _model.moved(_copying.copied(network), device).to(memory_format=torch.channels_last)


def _steps(recipe: Recipe, n_images: int) -> int:
    return (recipe.images or n_images) // recipe.batch_size


def _parts(network: nn.Module, recipe: Recipe, n_images: int) -> dict:
    """Return what training changes, by name: the network, its optimizer and the rates to come."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.peak_rate, weight_decay=recipe.weight_decay)
    total = recipe.epochs * _steps(recipe, n_images)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.peak_rate, total_steps=total, pct_start=0.15
    )
    return {"network": network, "optimizer": optimizer, "schedule": schedule}


def _score(row: dict) -> float:
    """Return the check of an epoch in percent."""
    return row["agreement" if "agreement" in row else "held_back"]


def _ended(history: list[dict], recipe: Recipe) -> bool:
    """Tell whether the epochs or the patience of a recipe are used up."""
    scores = [_score(row) for row in history[1:]]
    idle = len(scores) - 1 - scores.index(max(scores)) if scores else 0
    return len(scores) == recipe.epochs or 0 < recipe.patience <= idle


@torch.random.fork_rng()  # leaves the caller's global generator as it was
def _epoch(parts, data, preprocess, recipe, epoch, teacher, device) -> float:
    """Train one epoch; its randomness hangs on (seed, epoch) alone, so that a resumed run repeats it."""
    network = parts["network"].train()
    seed = recipe.seed * 1000 + epoch - 1
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout draws from the global generator
    steps = _steps(recipe, len(data))
    order = torch.randperm(len(data), generator=generator)[: steps * recipe.batch_size]
    batches = _changed(data, order, preprocess, recipe, generator)
    total = 0.0
    for inputs, labels in tqdm(batches, f"epoch {epoch}/{recipe.epochs}", steps, mininterval=2):
        inputs = _placed(inputs, device)
        with torch.autocast(torch.device(device).type, torch.bfloat16), small_maps.SideBySide():
            logits = models.answers(network, inputs).float()
            if teacher is None:
                loss = F.cross_entropy(logits, labels.to(device), label_smoothing=recipe.label_smoothing)
            else:
                loss = _divergence(logits, teacher, inputs, recipe.temperature)
        parts["optimizer"].zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        parts["optimizer"].step()
        parts["schedule"].step()
        total += loss.item()
    if not math.isfinite(total):
        raise InvalidValueError(
            f"the loss of epoch {epoch} is {total}; take a peak_rate below {recipe.peak_rate}."
        )
    return total / max(steps, 1)


def _changed(data, order, preprocess, recipe, generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of inputs and labels in an order, each image changed at random."""
    if not torch.is_tensor(data.images):
        for inputs, labels in _read(_loader.select(data, order), preprocess, recipe.batch_size):
            yield _augment(inputs, recipe, generator), labels
        return
    for chosen in order.split(recipe.batch_size):
        images = _augment(data.images[chosen], recipe, generator)
        part = replace(data, images=images, labels=data.labels[chosen])
        yield from datasets.batches(part, preprocess, recipe.batch_size)


def _augment(images: torch.Tensor, recipe: Recipe, generator: torch.Generator) -> torch.Tensor:
    """Return images ``(b, c, h, w)`` each mirrored, shifted and with a square made 0, at random."""
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


def _read(data, preprocess, batch_size) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of inputs and labels in order."""
    return datasets.batches(data, preprocess, batch_size, workers=_loader.readers(data))


def _placed(inputs: torch.Tensor, device: str) -> torch.Tensor:
    """Return float32 inputs on a device, images in the layout that convolutions are fastest in."""
    layout = torch.channels_last if inputs.ndim == 4 else torch.contiguous_format
    return inputs.to(device, torch.float32, memory_format=layout)


def _divergence(logits: torch.Tensor, teacher: nn.Module, inputs: torch.Tensor, temperature: float):
    """Return the KL divergence from a teacher's softened answers.

    Times the temperature squared, so that gradients keep their magnitude whatever it is (Hinton et al. 2015).
    """
    with torch.no_grad():
        wanted = F.log_softmax(models.answers(teacher, inputs).float() / temperature, dim=1)
    log_shares = F.log_softmax(logits / temperature, dim=1)
    return F.kl_div(log_shares, wanted, reduction="batchmean", log_target=True) * temperature**2


@torch.inference_mode()
def _answers(network, data, preprocess, device) -> torch.Tensor:
    """Return the class that a network answers for each image, int64 ``(n,)`` on the CPU."""
    network.eval()
    answers = []
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        for inputs, _ in _read(data, preprocess, 250):
            inputs = _placed(inputs, device)
            answers.append(models.answers(network, inputs).argmax(1).cpu())
    return torch.cat(answers)


def split(data: datasets.ImageSet, recipe: Recipe) -> tuple[datasets.ImageSet, datasets.ImageSet]:
    """Return the images that `train` trains on and those it holds back, drawn by the recipe's seed.

    Raises
    ------
    InvalidValueError
        Too few images for the recipe.
    """
    largest = len(data) - recipe.batch_size
    if largest < 1:
        raise InvalidValueError(
            f"{len(data)} images are too few to train on in batches of {recipe.batch_size} with some held "
            f"back; give at least {recipe.batch_size + 1}, or a recipe of a smaller batch_size."
        )
    if not 1 <= recipe.held_back <= largest:
        raise InvalidValueError(
            f"held_back is {recipe.held_back}; of {len(data)} images it must be 1 to {largest}, "
            f"so that a batch of {recipe.batch_size} is left to train on."
        )
    n_kept = len(data) - recipe.held_back
    if recipe.images and not recipe.batch_size <= recipe.images <= n_kept:
        raise InvalidValueError(
            f"images is {recipe.images}; it must be {recipe.batch_size} (a batch) to {n_kept}, or 0 for all."
        )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(recipe.seed))
    held, kept = order[: recipe.held_back], order[recipe.held_back :]
    return _loader.select(data, kept), _loader.select(data, held)


def _write(checkpoint: Path, parts: dict, rest: dict) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    with files.replacing(checkpoint) as temporary:
        torch.save(state | rest, temporary)


def _resume(checkpoint: Path, identity: dict, parts: dict) -> tuple[list[dict], dict]:
    """Load a checkpoint into `parts`; return its history and its best weights."""
    try:
        state = torch.load(checkpoint, weights_only=True)
    except Exception as error:  # a damaged file can make torch raise almost anything
        raise DamagedFileError(f"{checkpoint} is not a whole checkpoint ({reason(error)}).") from error
    if not isinstance(state, dict) or set(state) != {*parts, "identity", "history", "best"}:
        raise DamagedFileError(f"{checkpoint} is no checkpoint of a training; remove it to start anew.")
    if state["identity"] != identity:
        raise InvalidValueError(
            f"{checkpoint} belongs to another recipe, start, teacher or data set; "
            "give those again or remove the file."
        )
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        max(map(_score, state["history"]))
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DamagedFileError(f"{checkpoint} is not a whole checkpoint ({reason(error)}).") from error
    return state["history"], state["best"]
