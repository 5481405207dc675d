import re

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.contingency_tables import mcnemar
from tiny import tiny_data, tiny_model

from kclib import experiments
from kclib.evaluation import _intervals
from kclib.experiments import _compare
from kclib.store import Store

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("store"))
    return experiments.sweep(tiny_model(), tiny_data(), (2, 5), scopes=("layer",), seeds=(0, 1), store=store)


def row(right, k=2, images_hash="x", **changed) -> pd.DataFrame:
    """A table of one cell that answers these images rightly."""
    right = np.array(right, bool)
    found = {
        "model": "m", "data": "d", "scope": "layer", "k": k, "method": "plain", "seed": 0, "bytes": 10,
        "images": len(right), "images_hash": images_hash, "right": np.packbits(right).tobytes(),
        "top1": 100 * right.mean(),
    }  # fmt: skip
    return pd.DataFrame([found | changed])


def test_a_run_against_itself_moves_nothing(table):
    found = _compare.compare(table, table)
    assert len(found) == len(table) == 5
    assert (found.change == 0).all()
    assert (found.p_value == 1).all()
    assert found.paired.all()
    assert _compare.broken(found, 0) == []
    told = _compare.answer(found)
    assert told.startswith("5 cells are in both runs; 0 of them moved beyond chance. The worst of them ")
    assert "shows no loss that" in told


def test_the_same_images_are_compared_in_pairs():
    before, after = [1] * 90 + [0] * 10, [0] * 12 + [1] * 82 + [0] * 6
    found = _compare.compare(row(before), row(after)).iloc[0]
    assert found.change == pytest.approx(-8)
    assert found.p_value == pytest.approx(mcnemar([[78, 12], [4, 6]], exact=True).pvalue)
    ends = _intervals.of_mean([-1, 0, 1], [12, 84, 4], -1, 1)
    assert (found.change_low, found.change_high) == pytest.approx((100 * ends[0], 100 * ends[1]))
    assert found.change_low < -8 < found.change_high < 0


def test_other_images_are_compared_as_independent():
    found = _compare.compare(row([1] * 56 + [0] * 14), row([1] * 48 + [0] * 32, images_hash="y")).iloc[0]
    assert not found.paired
    assert found.change == pytest.approx(100 * (48 / 80 - 56 / 70))
    # Newcombe (1998), table II, example (a), method 10: 56/70 - 48/80 is 0.0524 to 0.3339
    assert found.change_low == pytest.approx(-33.39, abs=0.005)
    assert found.change_high == pytest.approx(-5.24, abs=0.005)


def test_a_gate_names_what_lost_more_than_it_may_and_what_is_gone():
    right = [1] * 50 + [0] * 50
    before = pd.concat([row(right, k=k) for k in (2, 3, 4)])
    after = pd.concat([row([0] * 6 + right[6:], k=2), row([0, *right[1:]], k=3), row(right, k=9)])
    found = _compare.compare(before, after)
    lost, gone = _compare.broken(found, 2)
    assert lost.startswith("m on d, scope layer, K = 2, plain, seed 0: from 50.00 to 44.00 %, a loss of 6.00")
    assert lost.endswith("] on 100 images.")
    assert gone == "m on d, scope layer, K = 4, plain, seed 0: is missing in the second run."
    assert _compare.broken(found, 6) == [gone], "a drop of just so much is allowed"
    assert _compare.answer(found).endswith("Cells gone: 1; new: 1.")


def test_the_page_says_first_what_broke_the_gate_and_shows_all_cells(tmp_path, table):
    found = _compare.compare(table, table)
    _compare.write(tmp_path / "x.html", found, ["K = <2> lost."], before="a<b", after="c")
    page = (tmp_path / "x.html").read_text()
    assert page.index("K = &lt;2&gt; lost.") < page.index("5 cells are in both runs")
    assert page.count("<tr") == 6
    assert "a&lt;b" in page
    assert not re.search(r"(src|href)=.?https?:", page)


def test_as_many_points_as_may_be_lost_may_be_lost_whatever_the_rounding():
    change = 100 * (0.930 - 0.937)  # -0.7 and a little
    assert change < -0.7
    cell = {"model": "m", "data": "d", "scope": "layer", "k": 2, "method": "plain", "seed": 0}
    rates = {"top1_before": 93.7, "top1_after": 93.0, "change_low": -1.0, "change_high": 0.0, "images": 1000}
    table = pd.DataFrame([cell | rates | {"change": change}])
    assert _compare.broken(table, 0.7) == []
    assert len(_compare.broken(table, 0.69)) == 1
