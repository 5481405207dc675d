"""What a set of labelled images is."""

from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from kclib.errors import InvalidValueError


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one split.

    Attributes
    ----------
    name : str
        Name and split, for tables and store keys.
    images : torch.Tensor or torch.utils.data.Dataset
        Either ``(n, c, h, w)`` held in memory, or a map-style data set of ``(image, label)``. An image is a
        PIL image or uint8, for a model's preprocessing; or floating numbers, which a network gets as they
        are.
    labels : torch.Tensor
        int64 ``(n,)``, an index into `classes`; -1 where the class is unknown.
    classes : tuple of str
        Class names in label order.
    fingerprint : str
        SHA-256 over images and labels, or over the checksums of their files.
    notes : tuple of str
        Sentences that a reader of results must know: which split was taken, how classes were matched, which
        files were left out.

    Raises
    ------
    InvalidValueError
        Images or labels of another kind or number; labels that are no classes.

    Examples
    --------
    >>> import kclib, torch
    >>> pictures = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
    >>> images = kclib.ImageSet("noise", pictures, torch.arange(12) % 2, ("shirt", "coat"), fingerprint="1")
    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    >>> kclib.evaluate(network, images).labels[:4]
    array([0, 1, 0, 1])
    """

    name: str
    images: torch.Tensor | Dataset
    labels: torch.Tensor
    classes: tuple[str, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        labels, n_classes = self.labels, len(self.classes)
        if not torch.is_tensor(labels) or labels.dtype != torch.int64 or labels.ndim != 1:
            raise InvalidValueError(f"the labels of {self.name} must be an int64 tensor (n,).")
        if len(labels) and not -1 <= labels.min() <= labels.max() < n_classes:
            raise InvalidValueError(
                f"{self.name} has labels {labels.min()} to {labels.max()}; they must be "
                f"0 to {n_classes - 1}, for its {n_classes} classes, or -1 if unknown."
            )
        images = self.images
        if torch.is_tensor(images) and (
            images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point())
        ):
            raise InvalidValueError(
                f"the images of {self.name} are {images.dtype} {tuple(images.shape)}; "
                "they must be torch.uint8 (n, c, h, w), or floating numbers as the network takes them."
            )
        if not hasattr(self.images, "__len__") or len(self.images) != len(labels):
            raise InvalidValueError(f"{self.name} must have an image for each of its {len(labels)} labels.")

    def __len__(self) -> int:
        return len(self.labels)
