import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import covariance
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from kclib.errors import InvalidValueError
from kclib.recovery import _moments
from kclib.recovery._moments import LayerMoments

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
    read = _moments.measure(
        dense, small, LayerMoments("2", 1, None), lambda: iter(inputs().split(2)), n_images=5
    )
    own = _moments.grouped(small[2])
    with torch.no_grad():
        zero = torch.zeros(6)
        answers = [x[2]._conv_forward(x[:2](inputs()), x[2].weight, zero) for x in (dense, small)]
    difference, raw = (answers[0] - answers[1]).double(), read.about_zero()
    for found, wanted in (
        (raw.error(own), difference.square().mean((0, 2, 3))),
        (read.error(own), difference.var((0, 2, 3), unbiased=False)),
        (raw.power(own), answers[1].double().square().mean((0, 2, 3))),
        (read.power(own), answers[1].double().var((0, 2, 3), unbiased=False)),
    ):
        torch.testing.assert_close(found.reshape(-1), wanted, rtol=1e-3, atol=1e-5)


def test_moments_are_those_of_unfolded_inputs():
    dense = both(nn.Conv2d(4, 4, 3, padding=1), convolution(kernel_size=3, padding=1))
    small = moved(dense)
    read = _moments.measure(dense, small, LayerMoments("2", 1, None), lambda: iter([inputs()]), n_images=5)
    with torch.no_grad():
        d, s = (F.unfold(x[:2](inputs()), 3, padding=1).transpose(1, 2).flatten(0, 1) for x in (dense, small))
    raw = read.about_zero()
    torch.testing.assert_close(raw.small[0], s.T @ s / len(s), rtol=1e-4, atol=1e-5)
    answers = d @ dense[2].weight.detach().flatten(1).T
    torch.testing.assert_close(raw.wanted[0], answers.T @ s / len(s), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(read.small[0], s.T.cov(correction=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(read.small_mean[0], s.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(read.answer_mean[0], answers.mean(0), rtol=1e-4, atol=1e-5)


def test_positions_are_drawn_where_there_are_too_many(monkeypatch):
    monkeypatch.setattr(_moments, "POSITIONS", 10)
    dense = nn.Sequential(convolution(kernel_size=3)).eval()
    read = _moments.measure(dense, dense, LayerMoments("0", 1, None), lambda: iter([inputs()]), n_images=5)
    again = _moments.measure(dense, dense, LayerMoments("0", 1, None), lambda: iter([inputs()]), n_images=5)
    other = _moments.measure(
        dense, dense, LayerMoments("0", 1, None), lambda: iter([inputs()]), n_images=5, seed=1
    )
    assert np.linalg.matrix_rank(read.about_zero().small[0].numpy(), tol=1e-3) == 10
    assert torch.equal(read.small, again.small)
    assert not torch.equal(read.small, other.small)
    torch.testing.assert_close(read.heard(_moments.grouped(dense[0])), read.wanted)


class Backwards(nn.Module):
    """Layers that run in another order than they are named in, one of them twice."""

    def __init__(self):
        super().__init__()
        self.last, self.twice, self.first = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.norm, self.idle = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.last(self.twice(self.twice(self.norm(self.first(x)))).relu())


def test_steps_are_in_the_order_of_running_with_calls_and_norms():
    found = _moments.steps(Backwards().eval(), inputs(1), {"last", "first", "twice"})
    assert found == [
        LayerMoments("first", 1, "norm"),
        LayerMoments("twice", 2, None),
        LayerMoments("last", 1, None),
    ]


def test_a_layer_that_runs_twice_is_measured_at_both_its_inputs():
    network = Backwards().eval()
    read = _moments.measure(
        network, network, LayerMoments("twice", 2, None), lambda: iter([inputs()]), n_images=5
    )
    with torch.no_grad():
        x = network.norm(network.first(inputs()))
        seen = torch.cat([x, network.twice(x)])
        rows = F.unfold(seen, 3, padding=1).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(read.small[0], rows.T.cov(correction=0), rtol=1e-4, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("offset", [0, 1e3, 1e6])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e18])
def test_moments_keep_their_digits_far_from_zero_and_at_any_scale(offset, scale):
    draw = np.random.default_rng(0)
    x = (scale * (offset + draw.normal(size=(12, 2, 3, 3)))).astype(np.float32)
    x[:, 1] = np.float32(scale * offset)
    dense = nn.Sequential(nn.Conv2d(2, 2, 3, padding=0, bias=False)).eval()
    parts = lambda: iter(torch.from_numpy(x).split([1, 4, 7]))  # noqa: E731
    read = _moments.measure(dense, dense, LayerMoments("0", 1, None), parts, n_images=12)
    rows = x.reshape(12, 18).astype(float) / scale
    ours = read.small[0].double().numpy() * (read.unit / scale) ** 2
    np.testing.assert_allclose(ours, np.cov(rows.T, ddof=0), atol=1e-5 * max(1, offset / 1e3))
    assert not ours[9:].any()
    weight = dense[0].weight.detach().reshape(1, 2, 18)
    assert (read.error(weight) <= 1e-5 * read.answer_power).all()
    assert torch.linalg.eigvalsh(read.small.double()).min() >= -1e-6 * read.small.max()


def test_batches_of_another_scale_change_the_unit():
    whole = torch.randn(6, 4, 3, 3) * torch.tensor([1e-25, 1, 1, 1e20, 1, 0])[:, None, None, None]
    dense = nn.Sequential(convolution(kernel_size=3)).eval()
    read = _moments.measure(
        dense, dense, LayerMoments("0", 1, None), lambda: iter(whole.split(1)), n_images=6
    )
    rows = whole.reshape(6, 36).double()
    wanted = rows.T.cov(correction=0)
    torch.testing.assert_close(read.small[0].double() * read.unit**2, wanted, rtol=1e-4, atol=1e-6 * 1e40)


class Around(nn.Module):
    """A layer whose output is changed in place before the norm reads it, and one called by name."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.c = nn.Conv2d(4, 4, 3, padding=1)
        self.norm_a, self.norm_b, self.shared = nn.BatchNorm2d(4), FrozenBatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.norm_a(torch.relu_(self.a(input=x)))
        x = self.norm_b(self.b(input=x))
        try:
            return {"masks": self.shared(self.shared(self.c(x)))}
        except Exception:
            return None


def test_only_a_norm_that_reads_the_output_as_it_is_and_once_counts():
    found = _moments.steps(Around().eval(), inputs(1), {"a", "b", "c"})
    assert found == [LayerMoments("a", 1, None), LayerMoments("b", 1, "norm_b"), LayerMoments("c", 1, None)]


def test_any_answer_and_any_catching_of_errors_will_do():
    network = Around().eval()
    read = _moments.measure(
        network, network, LayerMoments("c", 1, None), lambda: iter([inputs()]), n_images=5
    )
    assert read.small.shape == (1, 36, 36)


def test_what_does_not_run_is_no_step():
    assert [x.name for x in _moments.steps(Backwards().eval(), inputs(1), {"first", "idle"})] == ["first"]


def test_what_cannot_be_measured_is_said():
    class Sometimes(Backwards):
        def forward(self, x):
            return super().forward(x) if len(x) > 1 else x

    once = Sometimes().eval()
    with pytest.raises(InvalidValueError, match="first does not run for every image"):
        _moments.measure(
            once, once, LayerMoments("first", 1, None), lambda: iter(inputs(3).split(2)), n_images=3
        )
    dense = nn.Sequential(convolution(kernel_size=3)).eval()
    with pytest.raises(InvalidValueError, match="inputs of layer 0 are not finite"):
        _moments.measure(dense, dense, LayerMoments("0", 1, None), lambda: iter([inputs() / 0]), n_images=5)


@pytest.mark.parametrize("n", [30, 300, 30000])
def test_moments_of_few_images_are_damped_as_by_oracle_approximating_shrinkage(n):
    x = np.random.default_rng(0).normal(size=(n, 8)) * np.linspace(1, 3, 8)
    x -= x.mean(0)
    small = torch.from_numpy(x.T @ x / n).float()[None]
    zero = torch.zeros(1, 1)
    read = _moments.Moments(small, zero, zero, zero, zero, n)
    shrinkage = covariance.oas(x, assume_centered=True)[1]
    found = float(read.damping(1e-6))
    assert found == pytest.approx(shrinkage / (1 - shrinkage), rel=1e-3)
    assert float(read.damping(0.9)) == max(0.9, found)
