"""From images to a network's inputs, by the user's code: what it raises or answers amiss is one sentence."""

import multiprocessing
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, get_worker_info
from torchvision.transforms.functional import to_pil_image

from kclib._util import threads
from kclib.datasets import _pictures
from kclib.errors import DamagedFileError, InvalidValueError, KclibError, reason

_IMAGES = ("image", "img", "pixel_values")  # under these, data sets whose items are mappings keep an image
_LABELS = ("label", "labels", "target")
_NOT_ITS_FAULT = (MemoryError, torch.OutOfMemoryError, InterruptedError)
_MODES = (1, 3, 4)  # channels of a tensor that PIL has a mode for


def batches(
    images: torch.Tensor | Dataset, name: str, preprocess: Callable, batch_size: int, workers: int
) -> Iterator[torch.Tensor]:
    """Yield the float inputs ``(b, c, h, w)`` of images in order; see `_loader.batches`."""
    if torch.is_tensor(images):
        yield from _from_memory(images, name, preprocess, batch_size)
        return
    loader = DataLoader(
        _Prepared(images, name, preprocess),
        batch_size,
        num_workers=workers if _can_have_workers() else 0,
        collate_fn=_together,
    )
    for inputs in loader:
        if isinstance(inputs, _Failure):
            raise inputs.error from inputs.cause
        yield inputs


def _can_have_workers() -> bool:
    """Tell whether this process can; those that joblib started cannot have children."""
    return multiprocessing.current_process().name == "MainProcess" and threads.can_share_memory()


def item(images: Dataset, index: int, name: str) -> tuple:
    """Return an image of a map-style data set, a PIL image or a tensor ``(c, h, w)``, and its label.

    Raises
    ------
    DamagedFileError
        The image's file cannot be read.
    InvalidValueError
        The data set's own code raises, or gives no pair of image and label.
    """
    try:
        pair = images[index]
    except (KclibError, *_NOT_ITS_FAULT):
        raise
    except Exception as error:  # a stranger's code raises anything; so does a damaged picture
        path = file_of(images, index)
        if path and not _is_whole(path):
            raise DamagedFileError(
                f"image {path} cannot be read ({reason(error)}); remove or restore it."
            ) from error
        raise InvalidValueError(
            f"the code of the data set {name} raised {said(error)} at image {path or index}; "
            "it must give an image and its label for each index."
        ) from error
    image, label = _pair(pair, index, name)
    if isinstance(image, np.ndarray):
        image = image_tensor(image[None])[0]
    if not isinstance(image, Image.Image | torch.Tensor):
        raise InvalidValueError(
            f"image {index} of the data set {name} is {described(image)}; it must be a PIL image or a tensor."
        )
    return image, label


def _is_whole(path: str) -> bool:
    try:
        return bool(_pictures.read(path))
    except DamagedFileError:
        return False


def _pair(given, index: int, name: str) -> tuple:
    if isinstance(given, Mapping):
        image, label = ([given[key] for key in keys if key in given] for keys in (_IMAGES, _LABELS))
        if len(image) == len(label) == 1:
            return image[0], label[0]
    elif isinstance(given, tuple | list) and len(given) == 2:
        return tuple(given)
    raise InvalidValueError(
        f"image {index} of the data set {name} comes as {described(given)}; "
        "it must be a pair, (image, label)."
    )


def file_of(images: Dataset, index: int) -> str | None:
    """Return the file of an image, also within subsets and concatenations; None if it is not known."""
    while isinstance(images, Subset | ConcatDataset):
        if isinstance(images, Subset):
            images, index = images.dataset, int(images.indices[index])
        else:
            part = next(i for i, end in enumerate(images.cumulative_sizes) if index < end)
            images, index = images.datasets[part], index - ([0, *images.cumulative_sizes][part])
    samples = getattr(images, "samples", None)
    try:
        return samples[index][0] if isinstance(samples[index][0], str) else None
    except (TypeError, LookupError):
        return None


def said(error: Exception) -> str:
    """Return the kind of an exception and what it says."""
    return f"{type(error).__name__} ({reason(error)})"


def described(value) -> str:
    """Return what a value is, for a sentence: its kind, with its shape or size."""
    if isinstance(value, Image.Image):
        return f"a PIL image of mode {value.mode}, {value.width}×{value.height}"
    if isinstance(value, Mapping):
        return f"{_kind(value)} with {', '.join(map(str, list(value)[:5])) or 'nothing'}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{_kind(value)} of {value.dtype} {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{_kind(value)} of {len(value)}"
    return _kind(value)


def _kind(value) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"


def image_tensor(images) -> torch.Tensor:
    """Return images as ``(n, c, h, w)``, uint8 or float32, without a copy where they are so already.

    Parameters
    ----------
    images : torch.Tensor or numpy.ndarray
        uint8 or floating, ``(n, h, w)``, ``(n, c, h, w)``, or ``(n, h, w, c)`` of 1, 3 or 4 channels.

    Raises
    ------
    InvalidValueError
        Other kinds of numbers; a shape in which the channels are not clear.
    """
    is_tensor = torch.is_tensor(images)
    if not is_tensor:
        with warnings.catch_warnings():  # torch warns that it could write into what is read-only
            warnings.simplefilter("ignore", UserWarning)
            taken = images.dtype in (np.uint8, np.float16, np.float32, np.float64)
            images = torch.from_numpy(np.ascontiguousarray(images)) if taken else images
    if images.dtype not in (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise InvalidValueError(f"the images are {images.dtype}; they must be uint8 (0 to 255) or floating.")
    images = images.detach().cpu()
    images = images.float() if images.is_floating_point() else images
    if images.ndim == 3:
        return images[:, None]
    first, last = (images.ndim == 4 and images.shape[axis] in (1, 3, 4) for axis in (1, 3))
    if first != last:
        return images if first else images.permute(0, 3, 1, 2)
    if images.ndim == 4 and is_tensor:  # torch's own order
        return images
    raise InvalidValueError(
        f"the images have shape {tuple(images.shape)}, in which the channels are not clear; "
        "they must be a tensor (n, c, h, w)."
    )


def is_prepared(image) -> bool:
    """Tell whether an image is what a network takes already: a tensor of floating numbers."""
    return torch.is_tensor(image) and image.is_floating_point()


@dataclass(frozen=True)
class _Failure:
    """What went wrong with an image: raised in a worker, it would come out as a page of text."""

    error: KclibError
    cause: BaseException | None

    @classmethod
    def of(cls, error: KclibError) -> "_Failure":
        cause = error.__cause__
        if get_worker_info():  # not every exception can go to another process, and tblib would send the chain
            error.__cause__ = error.__context__ = error.__traceback__ = None
            cause = cause and RuntimeError("".join(traceback.format_exception(cause)))
        return cls(error, cause)


class _Prepared(Dataset):
    """The images of a map-style data set after preprocessing, without their labels."""

    def __init__(self, images: Dataset, name: str, preprocess: Callable):
        self.images, self.name, self.preprocess = images, name, preprocess

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor | _Failure:
        try:
            image, _ = item(self.images, index, self.name)
            if is_prepared(image):
                return image.float()
            where = file_of(self.images, index) or f"image {index} of {self.name}"
            return _one(self.preprocess, image, where)
        except KclibError as error:
            return _Failure.of(error)


def _together(items: list[torch.Tensor | _Failure]) -> torch.Tensor | _Failure:
    """Return a batch, or what is wrong with it."""
    if wrong := [item for item in items if isinstance(item, _Failure)]:
        return wrong[0]
    shapes = {tuple(item.shape) for item in items}
    if len(shapes) > 1:
        text = f"preprocessing makes images of {sorted(shapes)}; it must make them alike, as a resize does."
        return _Failure(InvalidValueError(text), None)
    return torch.stack(items)


def _from_memory(
    images: torch.Tensor, name: str, preprocess: Callable, batch_size: int
) -> Iterator[torch.Tensor]:
    """Yield inputs a batch at a time, by way of PIL images where the first is not taken as a tensor."""
    prepare = _batch
    for start in range(0, len(images), batch_size):
        part, where = images[start : start + batch_size], f"images {start} and on of {name}"
        if is_prepared(part):
            yield part.float()
            continue
        try:
            inputs = prepare(preprocess, part, where)
        except InvalidValueError as error:
            if start or part.shape[1] not in _MODES:
                raise
            inputs = _second(_as_pictures, preprocess, part, where, error)
            prepare = _as_pictures
        yield inputs


def _second(attempt: Callable, preprocess: Callable, image, where: str, first: InvalidValueError):
    """Return what preprocessing makes of PIL images, as many transforms take no others."""
    try:
        return attempt(preprocess, image, where)
    except InvalidValueError as second:
        if not first.__cause__ or not second.__cause__:  # what was answered amiss says more than what raised
            raise (second if first.__cause__ else first) from None
        raise InvalidValueError(
            f"the model's preprocessing raised {said(first.__cause__)} on {described(image)}, and "
            f"{said(second.__cause__)} on PIL images, {where}; it must take one of them."
        ) from first.__cause__


def _batch(preprocess: Callable, part: torch.Tensor, where: str) -> torch.Tensor:
    inputs = _tensor(_called(preprocess, part, where), where)
    if not 1 <= inputs.ndim <= part.ndim or len(inputs) != len(part):
        raise InvalidValueError(
            f"the model's preprocessing makes {described(inputs)} of {described(part)}, {where}; "
            "it must keep the number of images."
        )
    return inputs


def _as_pictures(preprocess: Callable, part: torch.Tensor, where: str) -> torch.Tensor:
    inputs = _together([_picture(preprocess, to_pil_image(image), where) for image in part])
    if isinstance(inputs, _Failure):
        raise inputs.error
    return inputs


def _as_picture(preprocess: Callable, image: torch.Tensor, where: str) -> torch.Tensor:
    return _picture(preprocess, to_pil_image(image), where)


def _picture(preprocess: Callable, image, where: str) -> torch.Tensor:
    inputs = _tensor(_called(preprocess, image, where), where)
    return inputs[0] if inputs.ndim == 4 and len(inputs) == 1 else inputs  # some add a batch of one


def _one(preprocess: Callable, image, where: str) -> torch.Tensor:
    """Return what preprocessing makes of one image, a PIL image or a tensor ``(c, h, w)``."""
    try:
        return _picture(preprocess, image, where)
    except InvalidValueError as error:
        if not torch.is_tensor(image) or image.ndim != 3 or image.shape[0] not in _MODES:
            raise
        return _second(_as_picture, preprocess, image, where, error)


def _called(preprocess: Callable, image, where: str):
    try:
        return preprocess(image)
    except (KclibError, *_NOT_ITS_FAULT):
        raise
    except Exception as error:  # the user's code raises what it likes
        raise InvalidValueError(
            f"the model's preprocessing raised {said(error)} on {described(image)}, {where}; "
            "give a preprocess that takes such an image."
        ) from error


def _tensor(answer, where: str) -> torch.Tensor:
    """Return the tensor in what preprocessing answered: itself, or a mapping's ``pixel_values``."""
    inputs = answer
    if isinstance(answer, Mapping) and "pixel_values" in answer:
        inputs = answer["pixel_values"]
    if not torch.is_tensor(inputs):
        hint = "as ToTensor does" if inputs is answer else "as return_tensors='pt' has it"
        raise InvalidValueError(
            f"the model's preprocessing answers {described(inputs)} for {where}; "
            f"it must answer a tensor, {hint}."
        )
    return inputs
