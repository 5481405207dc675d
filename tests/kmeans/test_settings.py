import math

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kclib.errors import InvalidValueError
from kclib.kmeans import Options
from kclib.kmeans._fit_progress import FitStep, Progress


def options(**changed):
    return Options(**{"max_iter": 10, "tol": 0.0, "reach": None, "seed": 0, "n_threads": 2, **changed})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_iter", -1),
        ("max_iter", 1.5),
        ("seed", 1.5),
        ("seed", 2**32),
        ("n_threads", True),
        ("tol", -0.1),
        ("tol", math.inf),
        ("tol", math.nan),
        ("reach", 0),
        ("reach", -1.0),
        ("reach", math.inf),
        ("reach", math.nan),
        ("seed", -1),
        ("n_threads", 0),
        ("n_threads", -2),
    ],
)
def test_an_option_out_of_range_is_refused_by_its_name(name, value):
    with pytest.raises(InvalidValueError, match=f"^{name} is {value};"):
        options(**{name: value})


def test_options_at_the_ends_of_their_ranges_are_taken():
    assert options(max_iter=0, tol=0, reach=1e-3, seed=0, n_threads=1).threads == 1
    assert options(n_threads=None).threads >= 1


@given(st.lists(st.floats(0, 1), max_size=20))
@settings(deadline=None, max_examples=25)
def test_shares_told_to_the_caller_never_exceed_one_in_total(shares):
    steps = []
    report = Progress(steps.append)
    for share in shares:
        report(share)
    total = sum(step.share for step in steps)
    assert total == pytest.approx(min(1, sum(shares)))
    assert report.left == pytest.approx(1 - total)
    assert all(step.share >= 0 for step in steps)


def test_a_true_answer_stops_for_good_and_the_inertia_is_passed_on():
    steps, answers = [], iter([None, True, False])
    report = Progress(lambda step: steps.append(step) or next(answers))
    report.part(0.5)(0.5)
    assert not report.stopped
    report.inertia = 7.0
    for _ in range(2):
        report(0.25)
        assert report.stopped
    assert math.isnan(steps[0].inertia)
    assert (steps[0].share, steps[1:]) == (0.25, [FitStep(0.25, 7.0)] * 2)


def test_progress_without_a_caller_never_stops():
    report = Progress()
    report(0.7)
    assert (report.stopped, report.left) == (False, pytest.approx(0.3))
