import copy

import pytest
import torch
import torchvision
from torch import nn

from kclib import prefix

pytestmark = pytest.mark.usefixtures("one_thread")


def conv(inputs=4, outputs=4):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Counted(nn.Conv2d):
    """A convolution that tells how often it computes."""

    runs = 0

    def forward(self, x):
        Counted.runs += 1
        return super().forward(x)


class Block(nn.Module):
    """A residual block that adds in place, with a branch that runs after the main one."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(inplace=True), conv())
        self.norm, self.beside, self.relu = nn.BatchNorm2d(4), conv(), nn.ReLU(inplace=True)

    def forward(self, x):
        result = self.norm(self.body(x))
        result += self.beside(x)
        return self.relu(result)


class Shared(nn.Module):
    """Modules called twice, in another order than they are registered."""

    def __init__(self):
        super().__init__()
        self.last, self.again, self.first = conv(), nn.Sequential(conv(), nn.ReLU(inplace=True)), conv()

    def forward(self, x):
        x = self.first(x)
        x = self.again(self.again(x))
        return self.again[0](self.last(x)) + x


class Writing(nn.Module):
    """A sequence that writes to what it was given, which is read again afterwards; answers left unread."""

    def __init__(self):
        super().__init__()
        self.start, self.end, self.relu = conv(), conv(), nn.ReLU(inplace=True)
        self.body = nn.Sequential(nn.ReLU(inplace=True), conv(), nn.Identity(), conv())

    def forward(self, x):
        x = self.start(x)
        y = self.end(x + self.body(x))
        self.relu(y)
        flat = nn.Flatten()(y)
        flat *= 2
        return y, {"flat": flat}


class Nested(nn.Module):
    """Views that are written to through another name, and answers that are no tensors."""

    def __init__(self):
        super().__init__()
        self.parts, self.flatten, self.mix = Writing(), nn.Flatten(), conv()

    def forward(self, x):
        y, more = self.parts(x)
        flat = self.flatten(y)
        flat += more["flat"]
        return self.mix(y)


class Adding(nn.Module):
    """Adds to what it is given, in place."""

    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x):
        x += 1
        return self.conv(x)


class Aliased(nn.Module):
    """A sequence that writes to its own input, under another name, before that is read again."""

    def __init__(self):
        super().__init__()
        self.start, self.body = conv(), nn.Sequential(nn.Identity(), Adding())

    def forward(self, x):
        x = self.start(x)
        return self.body(x) + x


def vgg():
    torch.manual_seed(0)
    features = torchvision.models.vgg.make_layers([4, 4, "M", 6, "M"], batch_norm=False)
    features[0] = nn.Conv2d(4, 4, 3, padding=1)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


def mixed():
    return nn.Sequential(nn.Identity(), Block(), nn.Sequential(Block(), nn.MaxPool2d(2), Block()), Shared())


NETWORKS = {
    "vgg": vgg,
    "residual": lambda: nn.Sequential(Block(), Block()),
    "shared": Shared,
    "writing": Writing,
    "nested": Nested,
    "mixed": mixed,
    "adding": lambda: nn.Sequential(Adding(), nn.Sequential(conv(), Adding(), conv())),
    "aliased": Aliased,
    "one": conv,
    "repeated": lambda: (lambda c: nn.Sequential(c, nn.ReLU(inplace=True), c, conv(), c))(conv()),
}


def made(name):
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return network


def inputs():
    return torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def changed(convolution):
    with torch.no_grad():
        convolution.weight.add_(0.3 * torch.randn_like(convolution.weight))


def assert_same(one, other):
    if torch.is_tensor(one):
        assert torch.equal(one, other)
    else:
        assert len(one) == len(other) == 2
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1]["flat"], other[1]["flat"])


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("inference", [False, True])
def test_the_rest_of_a_run_answers_as_a_whole_run_to_the_bit(name, inference):
    network = made(name)
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    with torch.inference_mode(inference):
        x = inputs()
        recording = prefix.record(network, x, layers)
        assert_same(recording.output, network(x.clone()))
        for layer in reversed(layers):
            before = copy.deepcopy(layer.weight.data)
            changed(layer)
            whole = network(x.clone())
            for _ in range(2):
                assert_same(recording.again([layer]), whole)
            layer.weight.data.copy_(before)
        assert_same(recording.again([layers[0]]), recording.output)
    assert torch.equal(x, inputs())


@torch.no_grad()
def test_several_changes_count_from_the_first_and_one_that_is_not_called_makes_a_whole_run():
    network = made("mixed")
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    stray = conv()
    recording = prefix.record(network, inputs(), [*layers, stray])
    for layer in (layers[1], layers[-1]):
        changed(layer)
    assert torch.equal(recording.again([layers[-1], layers[1]]), network(inputs()))
    changed(layers[0])
    assert torch.equal(recording.again([layers[-1], stray]), network(inputs()))
    assert not torch.equal(recording.again([layers[-1]]), network(inputs()))


class Glued(nn.Module):
    """Counted convolutions with functions between them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (Counted(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x):
        return self.c(torch.relu_(self.b(torch.relu_(self.a(x)))))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sequence", "glued"])
def test_nothing_before_the_change_is_computed_again(kind):
    parts = [Counted(4, 4, 3, padding=1), nn.ReLU(inplace=True), Counted(4, 4, 3, padding=1), nn.ReLU()]
    network = Glued() if kind == "glued" else nn.Sequential(*parts, Counted(4, 4, 3, padding=1))
    layers = [module for module in network.modules() if isinstance(module, Counted)]
    Counted.runs = 0
    recording = prefix.record(network, inputs(), layers)
    assert Counted.runs == 3
    for i, layer in enumerate(layers):
        Counted.runs = 0
        recording.again([layer])
        assert Counted.runs == 3 - i


def test_the_network_is_as_it_was_also_after_an_error():
    network = made("mixed")
    own = network[1].forward
    network[1].forward = lambda x: own(x) + 1
    state = {id(module): dict(vars(module)) for module in network.modules()}
    prefix.record(network, inputs(), [network[1].beside]).again([network[1].beside])
    with pytest.raises(RuntimeError):
        prefix.record(network, inputs()[:, :3], [])
    assert {id(module): dict(vars(module)) for module in network.modules()} == state
