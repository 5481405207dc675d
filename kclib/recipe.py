"""How to train: the rates, the length, and how images are changed at random before the network sees them."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from kclib import checks
from kclib.errors import InvalidValueError

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

    Raises
    ------
    InvalidValueError
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
            if not (checks.is_real(getattr(self, name)) and getattr(self, name) > 0):
                raise InvalidValueError(f"{name} is {getattr(self, name)!r}; it must be finite and above 0.")
        for name in ("weight_decay", "label_smoothing"):
            if not (checks.is_real(getattr(self, name)) and 0 <= getattr(self, name) <= 1):
                raise InvalidValueError(f"{name} is {getattr(self, name)!r}; it must be 0 to 1.")


def augment(images: torch.Tensor, recipe: Recipe, generator: torch.Generator) -> torch.Tensor:
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
