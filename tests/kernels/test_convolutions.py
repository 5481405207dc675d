import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from kclib import kernels
from kclib.errors import InvalidValueError
from kclib.kernels import _convolutions, _copying


class Scaled(nn.Module):
    def forward(self, weight):
        return 3 * weight

    def right_inverse(self, weight):
        return weight / 3


class Symmetric(nn.Module):
    """Takes any weight, and gives back another."""

    def forward(self, weight):
        return (weight + weight.flip(-1)) / 2

    def right_inverse(self, weight):
        return weight


def parametrized(*parts):
    module = nn.Conv2d(3, 4, 3)
    for part in parts:
        parametrize.register_parametrization(module, "weight", part)
    return module


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(3, 4, 3),
        lambda: nn.ConvTranspose2d(4, 3, 3),
        lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        lambda: nn.utils.weight_norm(nn.Conv2d(3, 4, 3)),
        lambda: parametrized(Scaled()),
        lambda: parametrized(Scaled(), Scaled()),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weight_that_is_written_is_the_weight_of_the_next_run(make, dtype):
    module = make().to(dtype)
    new = torch.randn(_convolutions.weight(module).shape)
    _convolutions.set_weight(module, new.flatten())
    inputs = torch.randn(1, module.in_channels, 5, 5, dtype=dtype)
    convolve = nn.functional.conv_transpose2d if module.transposed else nn.functional.conv2d
    rounding = 4 * torch.finfo(dtype).eps
    weight = _convolutions.weight(module)
    torch.testing.assert_close(weight, new.to(dtype), rtol=rounding, atol=0)
    torch.testing.assert_close(module(inputs), convolve(inputs, weight, module.bias))


def test_zero_filters_behind_weight_norm_are_zero_and_can_be_written_again():
    module = parametrizations.weight_norm(nn.Conv2d(2, 3, 3))
    _convolutions.set_weight(module, torch.zeros(3, 2, 3, 3))
    assert (module.weight == 0).all()
    _convolutions.set_weight(module, torch.ones(3, 2, 3, 3))
    torch.testing.assert_close(module.weight, torch.ones(3, 2, 3, 3))


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (parametrized(Symmetric()), "Symmetric.* does not come back"),
        (parametrized(Scaled(), nn.Tanh()), "Scaled, Tanh.* cannot be written to"),
        (parametrizations.orthogonal(nn.Conv2d(3, 4, 3)), "Orthogonal"),
        (parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), "SpectralNorm"),
    ],
)
def test_parametrization_that_cannot_be_written_to_is_left_out_with_its_reason(module, says):
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(InvalidValueError, match=says):
        kernels.extract(module)
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_weights_made_plain_in_a_copy_leave_the_network_as_it_is(norm):
    network = nn.Sequential(norm(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 2, 3))
    inputs = torch.rand(1, 3, 8, 8)
    plain = _convolutions.plain(_copying.copied(network))
    torch.testing.assert_close(plain(inputs), network(inputs))
    assert isinstance(plain[0].weight, nn.Parameter)
    assert {id(x) for x in plain.parameters()} == {id(x) for y in plain for x in (y.weight, y.bias)}
    assert len(dict(network.named_parameters())) == 5


def test_other_parametrizations_of_a_module_stay_when_its_weight_is_made_plain():
    module = parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    parametrize.register_parametrization(module, "bias", Scaled())
    inputs, expected = torch.rand(1, 3, 8, 8), None
    expected = module(inputs)
    plain = _convolutions.plain(_copying.copied(module))
    torch.testing.assert_close(plain(inputs), expected)
    assert parametrize.is_parametrized(plain, "bias")
    assert parametrize.is_parametrized(module, "weight")
    torch.testing.assert_close(module(inputs), expected)


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, lambda x: x])
def test_a_weight_put_in_takes_gradients_and_leaves_the_other_as_it_was(norm):
    plain = _convolutions.plain(norm(nn.Conv2d(3, 4, 3)))
    own, other = plain.weight, nn.Parameter(torch.ones(4, 3, 3, 3))
    values = own.detach().clone()
    _convolutions.put(plain, other)
    plain(torch.ones(1, 3, 3, 3)).sum().backward()
    assert plain.weight is other
    torch.testing.assert_close(other.grad, torch.ones(4, 3, 3, 3))
    assert torch.equal(own, values)
    assert own.grad is None


def test_weight_norm_that_is_shared_counts_once():
    network = nn.Sequential(*(parametrizations.weight_norm(nn.Conv2d(3, 3, 3)) for _ in range(2)))
    first, second = (x.parametrizations.weight for x in network)
    second.original0, second.original1 = first.original0, first.original1
    assert kernels.extract(network).left_out == {"1": "shares its weight with 0"}


def test_plain_weights_are_shared_where_the_computed_ones_were():
    network = nn.Sequential(*(parametrizations.weight_norm(nn.Conv2d(3, 3, 3)) for _ in range(2)))
    first, second = (x.parametrizations.weight for x in network)
    second.original0, second.original1 = first.original0, first.original1
    plain = _convolutions.plain(_copying.copied(network))
    assert plain[0].weight is plain[1].weight


def test_quantization_aware_convolutions_are_taken():
    bank = kernels.extract(
        nn.Sequential(
            torch.ao.nn.qat.Conv2d(3, 4, 3, qconfig=torch.ao.quantization.get_default_qat_qconfig("fbgemm"))
        )
    )
    assert len(bank) == 12
