import functools
import threading
from collections import deque
from dataclasses import dataclass
from tempfile import TemporaryFile

import pytest
import torch
from torch import nn

from kclib import models
from kclib.errors import InvalidValueError
from kclib.kernels import _copying


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 2, 1)))


@dataclass(slots=True)
class Kept:
    features: torch.Tensor


class Holder:
    def __init__(self, value):
        self.value = value


class Singleton(nn.Module):
    def __deepcopy__(self, memo):
        return self


def uncopyable():
    return [threading.Lock(), (i for i in range(3)), TemporaryFile()]


@pytest.mark.parametrize("thing", uncopyable(), ids=lambda x: type(x).__name__)
@pytest.mark.parametrize(
    ("put", "path"),
    [
        (lambda net, x: setattr(net, "lock", x), "network.lock"),
        (lambda net, x: setattr(net[1][0], "lock", x), "network.1.0.lock"),
        (lambda net, x: setattr(net[0], "held", {"a": [1, x]}), "network.0.held['a'][1]"),
        (lambda net, x: setattr(net, "trainer", Holder(Holder(x))), "network.trainer.value.value"),
        (
            lambda net, x: net[0].register_forward_hook(functools.partial(print, x)),
            "network.0._forward_hooks",
        ),
        (lambda net, x: (setattr(net, "helper", Holder(net)), setattr(net, "lock", x)), "network.lock"),
    ],
    ids=["root", "inner", "list", "object", "hook", "cycle"],
)
def test_what_cannot_be_copied_is_named_by_its_dotted_path(put, path, thing):
    network = small()
    put(network, thing)
    with pytest.raises(InvalidValueError, match="cannot be copied") as found:
        _copying.copied(network)
    assert path in str(found.value)
    assert path + "." not in str(found.value)
    assert type(thing).__name__ in str(found.value)
    assert found.value.__cause__ is not None


@pytest.mark.parametrize(
    "put",
    [
        lambda net, x: setattr(net, "seen", x),
        lambda net, x: setattr(net, "seen", {"first": [x, (x,)]}),
        lambda net, x: setattr(net[1], "seen", deque([Holder(x)])),
        lambda net, x: setattr(net[1], "seen", Kept(x)),
        lambda net, x: net[0].register_forward_hook(functools.partial(lambda *_, kept=None: None, kept=x)),
        lambda net, x: net[0].register_forward_hook(Holder([x]).__init__),
        lambda net, x: setattr(net[0].weight, "grad", x[0, :3, :3, :3].expand(4, 3, 3, 3)),
    ],
    ids=["attribute", "dictionary", "object", "slots", "partial", "bound method", "gradient"],
)
def test_features_of_a_computation_are_copied_detached(put):
    network = small()
    put(network, nn.Conv2d(3, 4, 3)(torch.rand(1, 3, 8, 8)))
    copy = _copying.copied(network)
    assert torch.equal(copy[0].weight, network[0].weight)
    assert copy[0].weight is not network[0].weight


def test_features_kept_by_a_hook_are_the_same_values_without_their_graph():
    network = small()
    network.seen = {}
    network[0].register_forward_hook(lambda m, i, o: network.seen.update(first=o))
    network(torch.rand(1, 3, 8, 8))
    copy = _copying.copied(network)
    assert torch.equal(copy.seen["first"], network.seen["first"])
    assert (copy.seen["first"].grad_fn, network.seen["first"].grad_fn is None) == (None, False)


def test_module_that_gives_itself_as_its_copy_is_refused_by_name():
    network = small()
    network[1].append(Singleton())
    with pytest.raises(InvalidValueError, match=r"network\.1\.1 \(Singleton\)"):
        _copying.copied(network)


def test_replaced_modules_are_put_in_place_and_not_copied():
    network, other = small(), nn.Identity()
    network[1].lock = threading.Lock()
    copy = _copying.copied(network, {id(network[1]): other})
    assert copy[1] is other


def test_copy_of_a_model_is_a_model():
    model = models.plain("mine", small())
    copy = _copying.copied(model)
    assert (type(copy), copy.name, copy.network is model.network) == (models.Model, "mine", False)
    with pytest.raises(InvalidValueError, match="must be a Model or"):
        _copying.copied("mine")
