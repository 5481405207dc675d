import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kclib import kmeans
from kclib.datasets import ImageSet
from kclib.errors import InvalidValueError, UnknownNameError
from kclib.kernels import extract
from kclib.models import Model
from kclib.recovery.sensitivity import KINDS, importance

pytestmark = pytest.mark.usefixtures("one_thread")
EACH = pytest.mark.parametrize("kind", KINDS)
STEADY = pytest.mark.parametrize("kind", ["input", "output", "fisher"])  # in any layout of the weight


def pictures(n=6, channels=4, side=7, seed=0) -> ImageSet:
    """Images whose labels no network can have answered."""
    shape = (n, channels, side, side)
    images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return ImageSet("pictures/test", images, torch.full((n,), -1), ("a", "b"), "f" * 64)


def scaled(images):
    return images.float() / 64


def measured(network, images=None, *, names=(), preprocess=scaled, **options):
    """Return the sensitivities of a network's kernels in the first two axes of the weight, by layer."""
    bank = extract(network, size=3)
    bank = bank.only(*names) if names else bank
    model = Model("tiny", network, preprocess)
    result = importance(model, pictures() if images is None else images, bank, progress=False, **options)
    assert (result.dtype, result.shape) == (np.float32, (len(bank),))
    assert (np.isfinite(result) & (result >= 0)).all()
    return {layer.name: result[layer.rows].reshape(layer.shape[:2]) for layer in bank.layers}


class Net(nn.Module):
    """Convolutions one after the other, and a linear layer on their sum over positions."""

    def __init__(self, *convolutions, n_classes=3, out=6):
        super().__init__()
        torch.manual_seed(1)
        self.convs = nn.Sequential(*convolutions)
        self.linear = nn.Linear(out, n_classes)

    def forward(self, x):
        return self.linear(torch.tanh(self.convs(x) / 4).sum((2, 3)) / 4)


def conv(*args, seed=0, kind=nn.Conv2d, **options):
    torch.manual_seed(seed)
    return kind(*args, 3, **options)


def read_power(convolution, x):
    """Return E[x²] over images, positions and taps, by unfolding."""
    mode = "constant" if convolution.padding_mode == "zeros" else convolution.padding_mode
    x = F.pad(x, [convolution.padding[1]] * 2 + [convolution.padding[0]] * 2, mode)
    columns = F.unfold(x, 3, dilation=convolution.dilation, stride=convolution.stride)
    return columns.square().unflatten(1, (-1, 9)).mean((0, 2, 3)).numpy()


def drawn(logits, seed):
    """Return labels drawn from the softmax by the inverse of its distribution function."""
    cumulative = np.cumsum(logits.detach().double().softmax(1).numpy(), axis=1)
    draws = np.random.default_rng(seed).random(len(cumulative))
    return torch.tensor([np.searchsorted(c, u, side="right") for c, u in zip(cumulative, draws, strict=True)])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1},
        {"padding": (2, 1), "stride": (2, 3)},
        {"dilation": (2, 1), "padding": 2, "stride": 2},
        {"padding": 2, "padding_mode": "reflect"},
    ],
)
def test_input_is_the_mean_square_of_what_unfolding_shows(options):
    layer = conv(4, 6, **options)
    found = measured(Net(layer), kind="input", batch_size=4)["convs.0"]
    expected = read_power(layer, scaled(pictures().images))
    np.testing.assert_allclose(found, np.tile(expected, (6, 1)), rtol=1e-5)


def test_output_is_input_times_the_squared_gradient_by_the_channel():
    layer = conv(4, 6, padding=1, stride=2)
    network, x = Net(layer), scaled(pictures(50).images)
    answered = layer(x).detach().requires_grad_()
    logits = network.linear(torch.tanh(answered / 4).sum((2, 3)) / 4)
    loss = F.cross_entropy(logits, drawn(logits, 3), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, answered)
    expected = np.outer(gradient.square().sum((2, 3)).mean(0), read_power(layer, x))
    found = measured(network, pictures(50), kind="output", seed=3, batch_size=16)["convs.0"]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_fisher_is_the_mean_squared_gradient_of_single_images():
    network, x = Net(conv(4, 6, padding=1), nn.Tanh(), conv(6, 6, groups=2)), scaled(pictures(20).images)
    parameters = dict(network.named_parameters())

    def loss(parameters, image, label):
        logits = torch.func.functional_call(network, parameters, image[None])
        return F.cross_entropy(logits, label[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, drawn(network(x), 5))
    for name, found in measured(network, pictures(20), kind="fisher", seed=5, batch_size=8).items():
        expected = each[f"{name}.weight"].detach().square().mean((0, 3, 4))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)


def test_labels_come_from_the_models_own_distribution():
    network, many = Net(conv(4, 6, padding=1)), pictures(1)
    many = ImageSet(
        "same", many.images.repeat(4000, 1, 1, 1), torch.zeros(4000, dtype=torch.int64), ("a",), ""
    )
    answered = network.convs(scaled(many.images[:1])).detach().requires_grad_()
    logits = network.linear(torch.tanh(answered / 4).sum((2, 3)) / 4)
    powers = 0
    for label, share in enumerate(logits.softmax(1)[0].tolist()):
        loss = F.cross_entropy(logits, torch.tensor([label]))
        powers += share * torch.autograd.grad(loss, answered, retain_graph=True)[0].square().sum((0, 2, 3))
    expected = np.outer(powers, read_power(network.convs[0], scaled(many.images[:1])))
    found = measured(network, many, kind="output", batch_size=1000)["convs.0"]
    np.testing.assert_allclose(found, expected, rtol=0.08)


class Margin(nn.Module):
    """Answers 0 and a function of the mean of one kernel's answers, so that the loss bends as is known."""

    def __init__(self, bend):
        super().__init__()
        self.conv, self.bend = conv(1, 1, bias=False), bend

    def forward(self, x):
        margin = self.bend(self.conv(x).mean((2, 3)))
        return torch.cat([torch.zeros_like(margin), margin], dim=1)


def curvature(network, x):
    """Return the exact diagonal of the Hessian's mean over images, ``(9,)``."""

    def loss(weight):
        logits = torch.func.functional_call(network, {"conv.weight": weight}, x)
        return F.cross_entropy(logits, logits.detach().argmax(1))

    return torch.autograd.functional.hessian(loss, network.conv.weight.detach()).reshape(9, 9).diagonal()


@pytest.mark.parametrize(("bend", "sign"), [(nn.Identity(), 1), (torch.square, -1)])
def test_hessian_is_exact_where_it_is_diagonal_and_never_negative(bend, sign):
    network, images = Margin(bend), torch.zeros(9, 1, 3, 3, dtype=torch.uint8)
    images.view(9, 9).fill_diagonal_(60)  # each image lights one tap, so no two weights meet
    data = ImageSet("lights", images, torch.zeros(9, dtype=torch.int64), ("a", "b"), "")
    expected = curvature(network, scaled(images)).mean()
    assert sign * expected > 0
    found = measured(network, data, kind="hessian", batch_size=4)["conv"]
    np.testing.assert_allclose(found, [[abs(expected)]], rtol=1e-4)


def test_hessian_converges_where_weights_meet():
    network, images = Margin(nn.Identity()), pictures(1, 1, 5).images // 4
    data = ImageSet("same", images.repeat(400, 1, 1, 1), torch.zeros(400, dtype=torch.int64), ("a", "b"), "")
    found = measured(network, data, kind="hessian", batch_size=1)["conv"]
    np.testing.assert_allclose(found, [[curvature(network, scaled(images)).mean()]], rtol=0.1)


class Stuffed(nn.Module):
    """A transposed convolution as an ordinary one that reads zeros between the inputs."""

    def __init__(self, transposed: nn.ConvTranspose2d):
        super().__init__()
        self.stride, self.end = transposed.stride[0], transposed.output_padding[0]
        self.edge = 2 - transposed.padding[0]
        self.conv = nn.Conv2d(transposed.in_channels, transposed.out_channels, 3, groups=transposed.groups)
        weight = transposed.weight.detach().unflatten(0, (transposed.groups, -1)).transpose(1, 2)
        self.conv.weight = nn.Parameter(weight.flatten(0, 1).flip(2, 3).contiguous())
        self.conv.bias = transposed.bias

    def forward(self, x):
        wide = x.new_zeros(*x.shape[:2], *((side - 1) * self.stride + 1 for side in x.shape[2:]))
        wide[:, :, :: self.stride, :: self.stride] = x
        return self.conv(F.pad(wide, [self.edge, self.edge + self.end] * 2))


@STEADY
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_agree_with_ordinary_ones_on_stuffed_inputs(kind, groups):
    layer = conv(4, 6, kind=nn.ConvTranspose2d, stride=2, padding=1, output_padding=1, groups=groups)
    one, other = Net(layer), Net(Stuffed(layer))
    x = scaled(pictures().images)
    torch.testing.assert_close(one(x), other(x))
    found = measured(one, kind=kind)["convs.0"].reshape(groups, 4 // groups, 6 // groups)
    ordinary = measured(other, kind=kind)["convs.0.conv"].reshape(groups, 6 // groups, 4 // groups)
    np.testing.assert_allclose(found, ordinary.transpose(0, 2, 1), rtol=1e-4)


@STEADY
def test_grouped_convolutions_agree_with_dense_ones(kind):
    layer, dense = conv(4, 6, groups=2, padding=1), conv(4, 6, padding=1)
    with torch.no_grad():
        dense.weight.zero_()
        dense.weight[:3, :2], dense.weight[3:, 2:] = layer.weight[:3], layer.weight[3:]
        dense.bias.copy_(layer.bias)
    found, whole = measured(Net(layer), kind=kind)["convs.0"], measured(Net(dense), kind=kind)["convs.0"]
    np.testing.assert_allclose(found, np.concatenate([whole[:3, :2], whole[3:, 2:]]), rtol=1e-4)


def tied(first, second):
    second.weight = first.weight
    return second


@pytest.mark.parametrize("kind", ["input", "output"])
def test_what_is_called_twice_or_tied_sums_over_its_calls(kind):
    layer, other = conv(4, 4, padding=1), conv(4, 4, padding=1)
    twice = Net(layer, nn.ReLU(inplace=True), layer, out=4)
    apart = Net(layer, nn.ReLU(), copy.deepcopy(layer), out=4)
    alone = [measured(apart, kind=kind, names=[name])[name] for name in ("convs.0", "convs.2")]
    other.bias = layer.bias
    for network in (twice, Net(layer, nn.ReLU(), tied(layer, other), out=4)):
        (found,) = measured(network, kind=kind, batch_size=4).values()
        np.testing.assert_allclose(found, sum(alone), rtol=1e-5)


@given(st.integers(0, 3), st.integers(1, 6), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_input_grows_with_the_square_of_the_channel_it_reads(channel, factor, seed):
    data, network = pictures(3, seed=seed), Net(conv(4, 6, padding=1))
    more = torch.ones(4, 1, 1)
    more[channel] = factor
    before = measured(network, data, kind="input")["convs.0"]
    after = measured(network, data, kind="input", preprocess=lambda x: scaled(x) * more)["convs.0"]
    np.testing.assert_allclose(after, before * more.square().numpy().ravel(), rtol=1e-5)


def test_clusters_weighted_by_input_err_less_in_the_layers_output():
    loudness = torch.tensor([10, 1, 1, 0.1])[:, None, None]
    layer, x = conv(4, 32, padding=1), scaled(pictures().images) * loudness
    network = Net(layer, out=32)
    louder = measured(network, kind="input", preprocess=lambda x: scaled(x) * loudness)["convs.0"].ravel()

    def error(chosen):
        points = extract(network).points
        found = kmeans.fit(points, 16, sample_weight=chosen, n_threads=1)
        changed = torch.from_numpy(found.centres[found.labels] - points).reshape(layer.weight.shape)
        return F.conv2d(x, changed, padding=1).square().mean().item()

    assert error(louder) < 0.5 * error(None)


@EACH
def test_the_callers_model_stays_as_it_was_and_its_mode_does_not_matter(kind):
    network = nn.Sequential(
        conv(4, 6), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten(), nn.Linear(150, 3)
    )
    network[1].running_var.fill_(4)
    expected = measured(network.eval(), kind=kind)["0"]
    network.train()[0].weight.requires_grad_(False)
    network[5].weight.grad = torch.ones(3, 150)
    before = copy.deepcopy(network.state_dict())
    with torch.inference_mode():
        found = measured(network, kind=kind)["0"]
    np.testing.assert_array_equal(found, expected)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [p.requires_grad for p in network.parameters()] == [False] + [True] * 5
    assert [p.grad is None for p in network.parameters()] == [True] * 4 + [False, True]
    assert all(m.training and not m._forward_hooks and not m._backward_hooks for m in network.modules())


@EACH
def test_half_precision_networks_are_measured_in_float32(kind):
    network = Net(conv(4, 6)).half()
    expected = measured(copy.deepcopy(network).float(), kind=kind)["convs.0"]
    found = measured(network, kind=kind, preprocess=lambda x: scaled(x).half())["convs.0"]
    np.testing.assert_allclose(found, expected, rtol=1e-3)


@EACH
def test_the_same_seed_gives_the_same_result_and_only_what_is_drawn_depends_on_it(kind):
    network = Net(conv(4, 6), nn.ReLU(), conv(6, 6))
    first, again, other = (
        np.concatenate([x.ravel() for x in measured(network, kind=kind, seed=seed).values()])
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.array_equal(first, other) == (kind in ("uniform", "input"))


@STEADY
def test_the_batches_do_not_matter(kind):
    network = Net(conv(4, 6))
    one, all_at_once = (measured(network, kind=kind, batch_size=n)["convs.0"] for n in (1, 6))
    np.testing.assert_allclose(one, all_at_once, rtol=1e-4)


def test_uniform_is_one_and_a_bank_of_some_layers_is_measured_as_in_the_whole():
    network = Net(conv(4, 6), nn.ReLU(), conv(6, 6))
    assert (measured(network, kind="uniform")["convs.2"] == 1).all()
    (alone,) = measured(network, names=["convs.2"]).values()
    np.testing.assert_array_equal(alone, measured(network)["convs.2"])


class Odd(Net):
    """A network with a layer that is left out, cut off from the gradients, or makes NaN."""

    def __init__(self, way):
        super().__init__(conv(4, 4, padding=1), out=4)
        self.odd, self.way = conv(4, 4, padding=1), way

    def forward(self, x):
        if self.way == "cut":
            x = self.odd(x).detach()
        return super().forward(x) * (torch.nan if self.way == "nan" else 1)


@pytest.mark.parametrize("kind", ["input", "output", "fisher", "hessian"])
def test_layers_that_cannot_be_measured_are_named(kind):
    idle = measured(Odd("idle"), kind=kind)
    assert not idle["odd"].any()
    assert idle["convs.0"].all()
    if kind == "input":
        assert (measured(Odd("cut"), kind=kind)["odd"] > 0).all()
    else:
        with pytest.raises(InvalidValueError, match="gradients do not reach layer odd"):
            measured(Odd("cut"), kind=kind)
    with pytest.raises(InvalidValueError, match="model tiny answers NaN or infinity"):
        measured(Odd("nan"), kind=kind)


def test_what_cannot_work_is_said():
    network = Net(conv(4, 6))
    with pytest.raises(UnknownNameError, match=r"'fischer'.*'fisher'"):
        measured(network, kind="fischer")
    with pytest.raises(InvalidValueError, match="pictures/test has no images"):
        measured(network, pictures(0))
    with pytest.raises(InvalidValueError, match="batch_size is 0"):
        measured(network, batch_size=0)
    with pytest.raises(InvalidValueError, match="one row for each image"):
        measured(conv(4, 6))
    with pytest.raises(InvalidValueError, match=r"convs.0.*NaN"):
        measured(network, kind="input", preprocess=lambda x: scaled(x) * 1e25)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@EACH
def test_weight_normed_kernels_cost_what_the_same_ordinary_ones_do(kind, norm):
    plain = Net(conv(4, 6))
    normed = copy.deepcopy(plain)
    norm(normed.convs[0])
    for layer, costs in measured(plain, kind=kind).items():
        np.testing.assert_allclose(measured(normed, kind=kind)[layer], costs, rtol=1e-4)
