"""Networks of other people run: what they answer made logits, and what they raise made one sentence."""

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from kclib._util import limits
from kclib._util.traces import where
from kclib.errors import InvalidValueError, KclibError, NotEnoughMemoryError, reason

_NAMES = ("logits", "out")  # of what networks of several answers call the one that counts
_CONVOLUTION = ("in_channels", "out_channels", "kernel_size")  # what convolutions have, clustered ones too

_CONTIGUOUS = weakref.WeakSet()  # networks that stand no other layout


def answers(network: nn.Module, inputs: Tensor) -> Tensor:
    """Return the logits that a network answers to a batch, whatever it wraps them in.

    Read are a tensor; what has ``logits`` or ``out``, as a key or as an attribute (Hugging Face,
    torchvision's segmentation networks, named tuples); and a tuple or list, of which the first counts
    (networks with auxiliary heads). A map of one position is one answer.

    Parameters
    ----------
    network : torch.nn.Module
        As it is: its mode and its device are the caller's.
    inputs : torch.Tensor
        ``(b, ...)``.

    Returns
    -------
    torch.Tensor
        float32 or float64 ``(b, n)``, on the network's device.

    Raises
    ------
    InvalidValueError
        The network does not run on such inputs, or answers something else.
    NotEnoughMemoryError
    """
    answer, n_images = run(network, inputs), len(inputs)
    logits = counting(answer)
    if logits is None or logits.is_complex() or logits.layout is not torch.strided:
        raise InvalidValueError(
            f"{_called(network)} answers {described(answer)}; it must answer logits: a tensor (b, n), or one "
            "that is first in a tuple or has the name logits or out."
        )
    if logits.ndim == 4 and logits.shape[2:] == (1, 1):
        logits = logits[:, :, 0, 0]
    if logits.ndim != 2 or len(logits) != n_images or not logits.shape[1]:
        advice = ", one row for each image"
        if logits.ndim == 4:
            advice += "; wrap it in a network that answers their mean over positions"
        if logits is answer and logits.ndim == 4:
            advice += ": nn.Sequential(network, nn.AdaptiveAvgPool2d(1))"
        raise InvalidValueError(
            f"{_called(network)} answers {described(answer)} to {n_images} images; "
            f"it must answer logits (b, n){advice}."
        )
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def run(network: nn.Module, inputs: Tensor):
    """Return what a network answers to a batch, of whatever kind it is.

    A network that does not stand the layout of the inputs, such as channels_last where it calls ``view``, is
    given contiguous ones from then on.

    Parameters
    ----------
    network : torch.nn.Module
    inputs : torch.Tensor

    Raises
    ------
    InvalidValueError
        The network raises: the sentence says where, with what input, and what may help.
    NotEnoughMemoryError
    """
    if network in _CONTIGUOUS:
        inputs = inputs.contiguous()
    try:
        return network(inputs)
    except KclibError:
        raise
    except Exception as error:  # other people's code can raise anything
        if inputs.is_contiguous() or limits.is_memory(error):
            raise _told(network, inputs, error) from error
    answer = run(network, inputs.contiguous())
    _CONTIGUOUS.add(network)
    return answer


@contextmanager
def answering(network: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield `answers` of a network for one batch after the other, in channels_last layout if they come so.

    From the second batch on, its convolutions' weights are in that layout too, where the network stands it;
    afterwards they are what they were.
    """
    with ExitStack() as layout:
        tried = False

        def answer(inputs: Tensor) -> Tensor:
            nonlocal tried
            try:
                logits = answers(network, inputs)
            except InvalidValueError:
                if not tried:
                    raise
                layout.close()  # some networks reshape their weights
                return answers(network, inputs)
            if not tried and not inputs.is_contiguous() and network not in _CONTIGUOUS:
                layout.enter_context(_channels_last(network))
            tried = True
            return logits

        yield answer


@contextmanager
def _channels_last(network: nn.Module) -> Iterator[None]:
    """While it lasts, the weights of convolutions have the layout that torch would give them at each call."""
    weights = [x for x in network.parameters() if x.ndim == 4 and not x.is_inference()]
    before = [x.data for x in weights]
    for weight in weights:
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        for weight, data in zip(weights, before, strict=True):
            weight.data = data
        torch.clear_autocast_cache()


@contextmanager
def evaluating(network: nn.Module) -> Iterator[nn.Module]:
    """While it lasts, a network is in eval mode; afterwards each of its modules is in the mode it was in."""
    modes = [(module, module.training) for module in network.modules() if hasattr(module, "training")]
    if not any(training for _, training in modes) or not _switched(network, False):
        yield network
        return
    try:
        yield network
    finally:
        _switched(network, modes[0][1])
        for module, training in modes:
            module.training = training


def precision_of(network: nn.Module) -> torch.dtype:
    """Return the dtype of a network's first parameter that has a floating one; float32 if it has none."""
    return next((x.dtype for x in network.parameters() if x.is_floating_point()), torch.float32)


def on_device(network: nn.Module, device: str | torch.device) -> bool:
    """Tell whether all values of a network are on a device.

    Raises
    ------
    InvalidValueError
        Some values are not there yet: the network is lazy, or on the meta device.
    """
    device, places = torch.zeros(0, device=device).device, set()
    for name, value in (*network.named_parameters(), *network.named_buffers()):
        if isinstance(value, nn.parameter.UninitializedTensorMixin) or value.is_meta:
            raise InvalidValueError(
                f"{name} has no values yet (lazy or on the meta device); load the network's weights first."
            )
        places.add(value.device)
    return places <= {device}


def channels(network: nn.Module | None) -> int | None:
    """Return how many channels the first convolution of a network reads, in the order of its modules."""
    modules = network.modules() if isinstance(network, nn.Module) else ()
    convolutions = (x for x in modules if all(hasattr(x, name) for name in _CONVOLUTION))
    return next((x.in_channels for x in convolutions), None)


def described(answer) -> str:
    """Return in words what a network answered, or a preprocessing made: kinds, names and shapes."""
    kind = type(answer).__name__
    if isinstance(answer, Tensor):
        return f"shape {tuple(answer.shape)}"
    if isinstance(answer, Mapping):
        parts = [f"{name}: {_part(value)}" for name, value in list(answer.items())[:4]]
    elif isinstance(answer, tuple | list):
        parts = [_part(value) for value in answer[:4]]
    else:
        return f"a {kind}"
    more = ", ..." if len(answer) > 4 else ""
    return f"a {kind} ({', '.join(parts)}{more})"


def _part(value) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def counting(answer) -> Tensor | None:
    """Return the tensor that counts among what a network answered; None if that would be a guess."""
    if isinstance(answer, Tensor):
        return answer
    for name in _NAMES:
        inner = answer.get(name) if isinstance(answer, Mapping) else getattr(answer, name, None)
        if isinstance(inner, Tensor):
            return inner
    return counting(answer[0]) if isinstance(answer, tuple | list) and len(answer) else None


def _told(network: nn.Module, inputs: Tensor, error: Exception) -> KclibError:
    """Return in one sentence what a network raised, where, on what, and what may help."""
    if limits.is_memory(error):
        return NotEnoughMemoryError(
            f"a batch of {len(inputs)} images does not fit into memory ({reason(error)}); "
            "give a smaller batch_size."
        )
    kind = str(inputs.dtype).removeprefix("torch.")
    return InvalidValueError(
        f"{_called(network)} does not run on inputs of shape {tuple(inputs.shape)}, {kind}: "
        f"{type(error).__name__}{where(error)} ({reason(error)}); {_advice(network, inputs, error)}."
    )


def _called(network: nn.Module) -> str:
    return f"the network ({type(network).__name__})"


def _switched(network: nn.Module, training: bool) -> bool:
    """Put a network into a mode; return whether it has one, as exported programs have not."""
    try:
        network.train(training)
        return True
    except NotImplementedError:
        return False
    except Exception as error:  # other people's train() can raise anything
        raise InvalidValueError(
            f"{_called(network)} cannot be put into {'training' if training else 'eval'} mode "
            f"({reason(error)}); give it in eval mode."
        ) from error


def _advice(network: nn.Module, inputs: Tensor, error: Exception) -> str:
    """Return what helps against the cause of an error."""
    text = str(error)
    if wanted := _wanted(network):
        return f"its forward wants {wanted}, so wrap it in a network that takes images alone"
    if inputs.ndim == 4 and (wanted := channels(network)) not in (None, inputs.shape[1]):
        return (
            f"its first convolution reads {_counted(wanted)} and the images have {inputs.shape[1]}: give a "
            "preprocess that makes such images"
        )
    if inputs.dtype != torch.float32 and "not implemented for" in text:
        return "this device cannot run it in this precision: give network.float()"
    kinds = {x.dtype for x in (*network.parameters(), *network.buffers(), inputs) if x.is_floating_point()}
    if len(kinds) > 1 and "type" in text:
        return "its values are of several dtypes: give network.float()"
    if "same device" in text or "expected device" in text:
        return "it holds a tensor that does not move with it: register that as a buffer"
    return "give images of the kind and size it was made for (a Model with its preprocess, or input_shape)"


def _wanted(network: nn.Module) -> str | None:
    """Return in words what a network's forward wants beside one input; None if nothing."""
    try:
        signature = inspect.signature(network.forward)
        signature.bind(None)
    except TypeError:
        return f"({', '.join(signature.parameters)})" if signature.parameters else "no images"
    except ValueError:  # no Python function
        return None
    return None


def _counted(n: int) -> str:
    return f"{n} channel{'s' * (n != 1)}"
