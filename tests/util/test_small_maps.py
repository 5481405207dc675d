import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kclib._util import small_maps


@pytest.fixture
def grids(monkeypatch):
    """The shapes that were convolved in a grid."""
    seen, convolve = [], small_maps._in_a_grid

    def told(x, *arguments, **options):
        seen.append(tuple(x.shape))
        return convolve(x, *arguments, **options)

    monkeypatch.setattr(small_maps, "_in_a_grid", told)
    return seen


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 4), st.integers(1, 4),
    st.sampled_from([1, 3, 5]), st.sampled_from([1, 3]), st.booleans(),
)  # fmt: skip
def test_values_and_gradients_are_those_of_a_convolution(n, height, width, high, wide, biased):
    generator = torch.Generator().manual_seed(n)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, weight, bias = draw(n, 5, height, width), draw(4, 5, high, wide), draw(4) if biased else None
    padding, inputs = (high // 2, wide // 2), [x, weight, *([bias] if biased else [])]
    wanted = torch.conv2d(x, weight, bias, padding=padding)
    found = small_maps._in_a_grid(x, weight, bias, padding)
    upstream = draw(*wanted.shape).detach()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(wanted, inputs, upstream)
    )


def test_many_small_maps_of_many_channels_go_side_by_side_and_no_others(grids):
    few, many = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(8, 256, 3, padding=1)
    kinds = [
        nn.Conv2d(8, 256, 3),
        nn.Conv2d(8, 256, 3, stride=2, padding=1),
        nn.Conv2d(8, 256, 3, padding=2, dilation=2),
        nn.Conv2d(8, 256, 3, padding="same"),
        nn.Conv2d(8, 256, 3, padding=1, groups=2),
    ]
    with torch.no_grad(), small_maps.SideBySide():
        for layer in (few, *kinds):
            layer(torch.randn(40, 8, 4, 4))
        for shape in ((40, 8, 5, 4), (31, 8, 4, 4), (8, 4, 4)):
            many(torch.randn(shape))
        assert grids == []
        x = torch.randn(40, 8, 4, 2)
        found = many(x)
    assert grids == [(40, 8, 4, 2)]
    torch.testing.assert_close(found, many(x))
    assert len(grids) == 1, "outside of it nothing changes"
