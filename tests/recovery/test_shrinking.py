from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import kclib
from kclib import clustering, compression, kernels
from kclib.compression import byte_counts
from kclib.datasets import ImageSet
from kclib.errors import InvalidValueError
from kclib.models import Model
from kclib.recovery import _shrinking
from kclib.recovery._shrinking import Shrunk

pytestmark = pytest.mark.usefixtures("one_thread")


def model():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    body += [nn.Conv2d(32, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 4)]
    return Model("small", nn.Sequential(*body).eval(), lambda x: x.float() / 128 - 1)


def images(n=48, seed=1):
    """Smooth images with the labels that the model gives them."""
    torch.manual_seed(seed)
    coarse = torch.rand(n, 3, 3, 3)
    whole = (255 * nn.functional.interpolate(coarse, size=8, mode="bilinear")).to(torch.uint8)
    with torch.no_grad():
        labels = model().network(whole.float() / 128 - 1).argmax(1)
    return ImageSet("smooth", whole, labels, tuple("abcd"), str(seed))


def apart(first, second):
    inputs = images(200, 2).images.float() / 128 - 1
    with torch.no_grad():
        return float((first(inputs) - second(inputs)).square().mean())


@pytest.mark.parametrize("ratio", [8, 16])
def test_a_ratio_is_met_with_answers_nearer_than_plain_clustering_of_as_many_bytes(ratio):
    dense = model()
    whole = byte_counts.convolution_bytes(dense.network)
    found = kclib.shrink(dense, images(), ratio=ratio, progress=False)
    assert 0.8 * whole / ratio <= found.n_bytes <= whole / ratio
    assert found.drop is None
    packed = compression.compress(found.model, found.clustering, precision="fp16")
    assert byte_counts.stored_bytes(packed) == found.n_bytes
    bank, k = kernels.extract(dense.network), 2
    while (
        byte_counts.clustered_bytes(
            dense.network, clustering.cluster(bank, k + 1, progress=False), coding="entropy"
        )
        < found.n_bytes
    ):
        k += 1
    plain = compression.compress(dense.network, clustering.cluster(bank, k, progress=False), precision="fp16")
    assert apart(dense.network, packed.network) < 0.7 * apart(dense.network, plain)


def test_a_higher_price_makes_it_smaller():
    tried = kclib.shrink(model(), images(), ratio=16, progress=False).table.sort_values("price")
    assert tried.bytes.is_monotonic_decreasing
    assert len(tried) >= 2


def test_a_drop_is_kept_on_the_images_held_back():
    found = kclib.shrink(model(), images(), max_drop=2.0, held_back=images(100, 3), progress=False)
    assert found.drop.points.estimate <= 2
    smaller = found.table[found.table.bytes < found.n_bytes]
    assert (smaller["drop"] > 2).all()
    assert np.isfinite(found.table["drop"]).all()


def trials(bytes_of):
    """Return trials of networks that take bytes by a rule, of 1,000 kernels and 100 other bytes."""

    def made(price):
        stands_in = SimpleNamespace(n_clusters=1)
        return Shrunk(None, stands_in, int(bytes_of(price)), price, None, pd.DataFrame())

    return _shrinking._Trials(made, 100, 1000, 250, SimpleNamespace(update=lambda: None))


@pytest.mark.parametrize("power", [0.2, 0.34, 1.0])
@pytest.mark.parametrize("budget", [300, 700, 3000])
def test_few_trials_meet_a_number_of_bytes(power, budget):
    given = trials(lambda price: 100 + 500 * (0.1 / price) ** power)
    _shrinking._search_bytes(given, budget)
    (found,) = given.best
    assert 0.93 * budget <= found.n_bytes <= budget
    assert found.n_bytes == max(row["bytes"] for row in given.rows if row["bytes"] <= budget)
    assert len(given.rows) <= 6


def test_goals_that_cannot_be_met_are_said():
    for goal, said in (({"n_bytes": 90}, "n_bytes is 90"), ({"ratio": 4000}, "ratio is 4000")):
        with pytest.raises(InvalidValueError, match=f"{said}; the convolutions were brought to"):
            kclib.shrink(model(), images(), **goal, progress=False)
    none = trials(lambda price: 400)
    none.rows.extend({"bytes": 400, "drop": drop} for drop in (9.0, 7.0))
    assert "loses 7.00 points on smooth" in _shrinking._unreached(none, None, None, 1.0, images())


def test_one_goal_is_asked_for():
    with pytest.raises(InvalidValueError, match="give one goal of ratio, n_bytes and max_drop; none"):
        kclib.shrink(model(), images())
    with pytest.raises(InvalidValueError, match="ratio, n_bytes was given"):
        kclib.shrink(model(), images(), ratio=3, n_bytes=5)
    with pytest.raises(InvalidValueError, match="max_drop needs held_back"):
        kclib.shrink(model(), images(), max_drop=1)
    with pytest.raises(InvalidValueError, match=r"ratio is 0\.5"):
        kclib.shrink(model(), images(), ratio=0.5)
