import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kclib.recovery import _assignment
from kclib.recovery._assignment import CountedCodebook, Metric

pytestmark = pytest.mark.usefixtures("one_thread")


def layer(seed=0, *, inputs=3, out=6, area=4, k=4, together=True):
    """Return moments, a target and a codebook; channels go together or know nothing of each other."""
    torch.manual_seed(seed)
    d = inputs * area
    read = torch.randn(400, d) @ torch.randn(d, d)
    h = read.T @ read / 400
    if not together:
        h = h * torch.block_diag(*[torch.ones(area, area)] * inputs)
    return h, torch.randn(out, d), torch.randn(k, area)


def prices(k=4):
    return torch.arange(1.0, k + 1) * 3


def cost(h, target, codebook, codes, price):
    """Return the error of each row's weights under some moments, and its prices."""
    error = target - codebook[codes].reshape(len(target), -1)
    return ((error @ h) * error).sum(1) + price[codes].sum(1)


def test_channels_that_know_nothing_of_each_other_get_the_best_of_all_codes():
    h, target, codebook = layer(together=False)
    price, ridge = prices(), 1e-4 * h.diagonal().mean()
    found = Metric.of(h, 4, 1e-4).assigned(target, codebook, price)
    every = torch.tensor(list(itertools.product(range(4), repeat=3)))
    damped = h + ridge * torch.eye(len(h))
    least = torch.stack([cost(damped, target, codebook, x.expand(len(target), 3), price) for x in every])
    assert torch.equal(found, every[least.argmin(0)])


@pytest.mark.parametrize("priced", [False, True])
def test_each_channel_gets_the_code_of_least_cost_once_later_channels_make_the_best_of_it(priced):
    h, target, codebook = layer(1)
    price = prices() if priced else torch.zeros(4)
    metric = Metric.of(h, 4, 0.01)
    found = metric.assigned(target, codebook, price if priced else None)
    damped = (h + 0.01 * h.diagonal().mean() * torch.eye(len(h))).double().numpy()
    order = metric.columns[::4].numpy() // 4
    for row in range(len(target)):
        fixed = []  # channels, and their errors
        for channel in order:
            costs = []
            for code in range(4):
                error = (target[row, 4 * channel : 4 * channel + 4] - codebook[code]).double().numpy()
                costs.append(after_the_rest(damped, [*fixed, (channel, error)]) + float(price[code]))
            best = int(np.argmin(costs))
            assert found[row, channel] == best
            fixed.append((channel, (target[row].reshape(3, 4)[channel] - codebook[best]).double().numpy()))


def after_the_rest(h, fixed):
    """Return the least error, where some channels' errors are fixed and the others' are free."""
    places = np.concatenate([np.arange(4 * c, 4 * c + 4) for c, _ in fixed])
    free = np.setdiff1d(np.arange(len(h)), places)
    error = np.concatenate([e for _, e in fixed])
    inner = h[np.ix_(places, places)]
    if len(free):
        across = h[np.ix_(places, free)]
        inner = inner - across @ np.linalg.solve(h[np.ix_(free, free)], across.T)
    return error @ inner @ error


def test_a_price_of_nothing_changes_nothing():
    h, target, codebook = layer(2)
    metric = Metric.of(h, 4, 0.01)
    assert torch.equal(metric.assigned(target, codebook), metric.assigned(target, codebook, torch.zeros(4)))


@given(st.integers(0, 1000), st.floats(0, 10), st.floats(0, 10))
def test_a_higher_price_never_buys_more_bits(seed, one, other):
    torch.manual_seed(seed)
    points, centres = torch.randn(60, 3), torch.randn(5, 3)
    bits = torch.rand(5) * 8
    low, high = sorted((one, other))
    spent = [float(bits[_assignment.nearest(points, centres, x * bits)].double().sum()) for x in (low, high)]
    assert spent[1] <= spent[0] + 1e-3


def test_bits_are_those_of_the_entropy():
    indices = torch.tensor([0, 0, 0, 0, 2, 2, 3, 3])
    book = CountedCodebook.of(torch.arange(4.0)[:, None], indices)
    assert book.values.tolist() == [[0], [2], [3]]
    assert book.price(0.5).tolist() == [0.5, 1, 1]
    assert book.price(0) is None


def test_what_is_solved_gives_back_the_right_side():
    h, target, _ = layer(3)
    metric = Metric.of(h, 4, 0.1)
    damped = h + 0.1 * h.diagonal().mean() * torch.eye(len(h))
    torch.testing.assert_close(metric.solved(target @ damped), target, rtol=1e-3, atol=1e-3)
