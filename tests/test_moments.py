import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kclib import moments
from kclib.errors import InvalidValueError
from kclib.moments import Step

pytestmark = pytest.mark.usefixtures("one_thread")

GEOMETRIES = {
    "plain": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": (2, 1)},
    "dilated": {"kernel_size": (3, 2), "dilation": (2, 1), "padding": (2, 0)},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "reflected": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "same": {"kernel_size": 3, "dilation": 2, "padding": "same"},
}


def convolution(seed=0, **geometry):
    torch.manual_seed(seed)
    return nn.Conv2d(4, 6, **geometry)


def moved(network, by=0.1):
    """Return a copy whose parameters are a little different."""
    import copy

    result = copy.deepcopy(network)
    torch.manual_seed(9)
    with torch.no_grad():
        for value in result.parameters():
            value += by * torch.randn_like(value)
    return result


def inputs(n=5, side=6):
    torch.manual_seed(1)
    return torch.randn(n, 4, side, side)


def both(first, second):
    return nn.Sequential(first, nn.ReLU(), second).eval()


@pytest.mark.parametrize("name", GEOMETRIES)
def test_errors_are_those_of_the_convolutions_answers(name):
    dense = both(nn.Conv2d(4, 4, 3, padding=1), convolution(**GEOMETRIES[name]))
    small = moved(dense)
    read = moments.measure(dense, small, Step("2", 1, None), lambda: iter(inputs().split(2)), n_images=5)
    own, original = (moments.grouped(x[2], x[2].weight) for x in (small, dense))
    with torch.no_grad():
        zero = torch.zeros(6)
        answers = [x[2]._conv_forward(x[:2](inputs()), x[2].weight, zero) for x in (dense, small)]
    wanted = (answers[0] - answers[1]).square().mean((0, 2, 3))
    torch.testing.assert_close(read.error(original, own).reshape(-1), wanted, rtol=1e-3, atol=1e-5)
    about = (answers[0] - answers[1]).var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(read.centred().error(original, own).reshape(-1), about, rtol=1e-3, atol=1e-5)
    power = answers[1].square().mean((0, 2, 3))
    torch.testing.assert_close(read.power(own).reshape(-1), power, rtol=1e-3, atol=1e-5)


def test_moments_are_those_of_unfolded_inputs():
    dense = both(nn.Conv2d(4, 4, 3, padding=1), convolution(kernel_size=3, padding=1))
    small = moved(dense)
    read = moments.measure(dense, small, Step("2", 1, None), lambda: iter([inputs()]), n_images=5)
    with torch.no_grad():
        d, s = (F.unfold(x[:2](inputs()), 3, padding=1).transpose(1, 2).flatten(0, 1) for x in (dense, small))
    torch.testing.assert_close(read.small[0], s.T @ s / len(s), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(read.cross[0], d.T @ s / len(s), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(read.small_mean[0], s.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(read.dense_mean[0], d.mean(0), rtol=1e-4, atol=1e-5)


def test_positions_are_drawn_where_there_are_too_many(monkeypatch):
    monkeypatch.setattr(moments, "POSITIONS", 10)
    dense = nn.Sequential(convolution(kernel_size=3)).eval()
    read = moments.measure(dense, dense, Step("0", 1, None), lambda: iter([inputs()]), n_images=5)
    again = moments.measure(dense, dense, Step("0", 1, None), lambda: iter([inputs()]), n_images=5)
    other = moments.measure(dense, dense, Step("0", 1, None), lambda: iter([inputs()]), n_images=5, seed=1)
    assert np.linalg.matrix_rank(read.small[0].numpy(), tol=1e-3) == 10
    assert torch.equal(read.small, again.small)
    assert not torch.equal(read.small, other.small)
    torch.testing.assert_close(read.small, read.cross)


class Backwards(nn.Module):
    """Layers that run in another order than they are named in, one of them twice."""

    def __init__(self):
        super().__init__()
        self.last, self.twice, self.first = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.norm, self.idle = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.last(self.twice(self.twice(self.norm(self.first(x)))).relu())


def test_steps_are_in_the_order_of_running_with_calls_and_norms():
    found = moments.steps(Backwards().eval(), inputs(1), {"last", "first", "twice"})
    assert found == [Step("first", 1, "norm"), Step("twice", 2, None), Step("last", 1, None)]


def test_a_layer_that_runs_twice_is_measured_at_both_its_inputs():
    network = Backwards().eval()
    read = moments.measure(network, network, Step("twice", 2, None), lambda: iter([inputs()]), n_images=5)
    with torch.no_grad():
        x = network.norm(network.first(inputs()))
        seen = torch.cat([x, network.twice(x)])
        rows = F.unfold(seen, 3, padding=1).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(read.small[0], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_what_cannot_be_measured_is_said():
    with pytest.raises(InvalidValueError, match="layer idle does not run"):
        moments.steps(Backwards().eval(), inputs(1), {"first", "idle"})
    dense = nn.Sequential(convolution(kernel_size=3)).eval()
    with pytest.raises(InvalidValueError, match="inputs of layer 0 are not finite"):
        moments.measure(dense, dense, Step("0", 1, None), lambda: iter([inputs() / 0]), n_images=5)
