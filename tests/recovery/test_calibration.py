import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from kclib import clustering, compression, kernels, models
from kclib.compression import _layers, _precisions
from kclib.errors import InvalidValueError
from kclib.recovery import _calibration, _moments
from kclib.recovery._calibration import LeastSquares
from tests.recovery.test_sequential import answers, images, loss, model_of, network

pytestmark = pytest.mark.usefixtures("one_thread")


def compressed(net, k, precision="fp16", **options):
    found = clustering.cluster(kernels.extract(net), k, progress=False, **options)
    return compression.compress(net, found, precision=precision)


def calibrated(net, small, **options):
    return _calibration.calibrate(model_of(small), net, images(), progress=False, **options).network


CODEBOOKS = {
    "k": st.integers(1, 20), "scaled": st.booleans(), "turned": st.booleans(),
    "precision": st.sampled_from(["fp32", "fp16", "int8"]), "seed": st.integers(0, 99), "bias": st.booleans(),
}  # fmt: skip


@given(**CODEBOOKS)
@settings(deadline=None, max_examples=25)
def test_the_error_of_a_layer_never_rises(k, scaled, turned, precision, seed, bias):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=bias)).eval()
    small = compressed(net, k, precision, scaled=scaled, turned=turned)
    before, after = (
        float((answers(net) - answers(x)).square().mean()) for x in (small, calibrated(net, small))
    )
    assert after <= before * (1 + 1e-4) + 1e-9


def test_a_codebook_is_the_least_squares_solution():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 3, bias=False)).eval()
    small = compressed(net, 4, "fp32")
    ours = calibrated(net, small, damping=1e-9)
    with torch.no_grad():
        read = nn.functional.unfold(images().images.float() / 128 - 1, 3).transpose(1, 2).flatten(0, 1)
    members = small[0].members().reshape(12, 3)
    design = np.zeros((12, len(read), 4, 9))
    for out in range(12):
        for i in range(3):
            design[out, :, members[out, i]] += read[:, 9 * i : 9 * i + 9].numpy()
    wanted = (read @ net[0].weight.detach().reshape(12, -1).T).T.numpy()
    best = np.linalg.lstsq(design.reshape(-1, 36), wanted.reshape(-1), rcond=None)[0]
    least = np.square(design.reshape(-1, 36) @ best - wanted.reshape(-1)).mean()
    found = float((answers(net) - answers(ours)).square().mean())
    assert least <= found * (1 + 1e-4)
    before = float((answers(net) - answers(small)).square().mean())
    assert found - least < 0.1 * (before - least)


@pytest.mark.parametrize("norm", [False, True], ids=["biases", "norms"])
def test_new_images_are_answered_nearer(norm):
    gains = []
    for seed in range(4):
        net = network(seed, norm=norm)
        small = compressed(net, 10)
        gains.append(loss(net, calibrated(net, small)) / loss(net, small))
    assert np.median(gains) < 0.75


def test_a_shared_codebook_stays_and_biases_move():
    net = network()
    small = compressed(net, 12, scope="global")
    ours = calibrated(net, small)
    assert torch.equal(ours[0].codebook.values, small[0].codebook.values)
    assert ours[0].codebook is ours[3].codebook
    assert not torch.equal(ours[0].bias, small[0].bias)
    assert loss(net, ours) < loss(net, small)


def test_scales_of_a_shared_codebook_are_fitted():
    net = network()
    small = compressed(net, 6, scope="global", scaled=True)
    ours = calibrated(net, small)
    assert not torch.equal(ours[3].scales, small[3].scales)
    assert torch.equal(ours[3].scales, ours[3].scales.half().float())
    assert loss(net, ours) < loss(net, small)


def test_indices_bytes_and_the_callers_networks_stay():
    net = network()
    small = compressed(net, 10)
    before = models.fingerprint(net), models.fingerprint(small)
    ours = calibrated(net, small)
    assert (models.fingerprint(net), models.fingerprint(small)) == before
    for name, module in _layers.clustered(small).items():
        assert torch.equal(ours.get_submodule(name).indices, module.indices)
        values = ours.get_submodule(name).codebook.values
        assert values.shape == module.codebook.values.shape
        assert torch.equal(values, values.half().float())
        assert values.requires_grad == module.codebook.values.requires_grad


def test_values_that_cannot_be_bettered_come_back():
    torch.manual_seed(0)
    x, values = torch.randn(50, 6), torch.randn(1, 2, 6)
    h = (x.T @ x / 50)[None]
    zero = torch.zeros(1, 6)
    power = ((values @ h) * values).sum(-1)
    read = _moments.Moments(h, values @ h, zero, zero[:, :2], power, 50)
    found = LeastSquares(read, 0.1).fitted(lambda v: v, values, rounded=lambda v: v.round())
    assert torch.equal(found, values)


def test_what_cannot_be_is_said():
    net = network()
    with pytest.raises(InvalidValueError, match="no clustered convolution to calibrate"):
        calibrated(net, net)
    with pytest.raises(InvalidValueError, match="damping is -1"):
        calibrated(net, compressed(net, 4), damping=-1)
    other = nn.Sequential(nn.Conv2d(3, 5, 3))
    with pytest.raises(InvalidValueError, match="no such convolution"):
        calibrated(other, compressed(net, 4))


def test_damping_is_that_of_ridge_regression():
    torch.manual_seed(0)
    x, dense, values = torch.randn(50, 6), torch.randn(1, 2, 6), torch.randn(1, 2, 6)
    h, zero = (x.T @ x / 50)[None], torch.zeros(1, 6)
    power = ((dense @ h) * dense).sum(-1)
    read = _moments.Moments(h, dense @ h, zero, zero[:, :2], power, 50)
    found = LeastSquares(read, 0.5).fitted(lambda v: v, values, rounded=lambda v: v)
    ridge = 0.5 * h.diagonal(dim1=1, dim2=2).mean() * torch.eye(6)
    wanted = values + (dense - values) @ h @ torch.linalg.inv(h + ridge)
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


def with_bias_and_norm(kind=nn.BatchNorm2d):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 3), kind(12), nn.ReLU(), nn.Conv2d(12, 8, 3)).eval()
    with torch.no_grad():
        net[0].bias.uniform_(-2, 2)
        net[1].running_mean.uniform_(-1, 1)
        net[1].running_var.uniform_(1e-6, 1e-4)  # such that eps counts
    return net


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d])
def test_norms_of_every_kind_put_mean_and_variance_right_with_a_bias_before_them(kind):
    net = with_bias_and_norm(kind)
    ours = calibrated(net, compressed(net, 4))
    found, wanted = answers(ours[:2]), answers(net[:2])
    torch.testing.assert_close(found.mean((0, 2, 3)), wanted.mean((0, 2, 3)), rtol=1e-3, atol=1e-2)
    told = ours[1].running_var > 0  # eps leaves no smaller one
    assert told.any()
    ratio = found.var((0, 2, 3)) / wanted.var((0, 2, 3))
    torch.testing.assert_close(ratio[told], torch.ones_like(ratio[told]), rtol=1e-2, atol=0)


def test_calibrating_again_changes_little():
    net = with_bias_and_norm()
    once = calibrated(net, compressed(net, 4))
    again = calibrated(net, once)
    torch.testing.assert_close(again[1].running_var, once[1].running_var, rtol=0.05, atol=1e-6)
    assert loss(net, again) < 1.05 * loss(net, once)


def test_a_channel_that_is_constant_keeps_its_scale():
    net = with_bias_and_norm()
    small = compressed(net, 4)
    net[0].weight.data[:2] = 0
    ours = calibrated(net, small)
    torch.testing.assert_close(ours[1].running_var[:2], net[1].running_var[:2], rtol=1e-3, atol=0)
    assert (ours[1].running_var[2:] != net[1].running_var[2:]).all()


def test_a_network_in_is_a_network_out_and_a_model_a_model():
    net = network()
    small = compressed(net, 5)
    data = (images().images, images().labels)
    alone = _calibration.calibrate(small, models.plain("dense", net), data, progress=False)
    assert isinstance(alone, nn.Module)
    given = _calibration.calibrate(models.plain("small", small), net, images(), progress=False)
    assert given.name == "small"
    assert models.fingerprint(given.network) == models.fingerprint(alone)


def test_what_cannot_be_stored_is_no_improvement():
    far = torch.full((1, 2, 6), 6e4)
    h, zero = torch.eye(6)[None], torch.zeros(1, 6)
    dense = 3 * far
    read = _moments.Moments(h, dense @ h, zero, zero[:, :2], dense.double().square().sum(-1), 50)
    kept = LeastSquares(read, 0.1).fitted(lambda v: v, far, rounded=lambda v: _precisions.rounded(v, "fp16"))
    assert torch.equal(kept, far)
