import numpy as np
import pytest

from benchmarks import choices, representatives
from benchmarks.choices import Setting, Trial, first_price, matched
from kclib.kernels import KernelBank, Layer


def random_bank():
    """Return two layers of different numbers of kernels and of filters, the second transposed."""
    weights = np.random.default_rng(0).normal(size=(60 + 150, 3, 3)).astype("f")
    layers = Layer("one", (6, 10, 3, 3), 0), Layer("two", (10, 15, 3, 3), 60, transposed=True)
    return KernelBank(weights, layers, {})


@pytest.mark.parametrize("setting", Setting.every(), ids=str)
@pytest.mark.parametrize("room", [0, 1])
def test_the_largest_k_fits_to_the_byte_and_one_more_does_not(setting, room):
    bank, k = random_bank(), 12

    def taken(k):
        options = {"scope": setting.scope, "scale_bits": min(setting.scale_bits, 4)}
        return representatives.cluster(bank, k, setting.kind, progress=False, **options).n_bytes("fp16")

    small = Setting(setting.kind, setting.scope, min(setting.scale_bits, 4))
    assert small.largest(bank, taken(k) - 1 + room) == k - 1 + room


def test_nothing_fits_where_scales_alone_take_too_much():
    assert Setting("scaled").largest(random_bank(), 2 * 210) == 0
    assert Setting("scaled").largest(random_bank(), 2 * 210 + 2 * 18) == 1
    assert Setting("scaled", "global").largest(random_bank(), 2 * 210 + 18) == 1


@pytest.mark.parametrize("shape", [0.05, 0.3, 0.6])
@pytest.mark.parametrize("start", [7e-7, 1e-5, 5e-5])
def test_a_price_is_found_for_bytes_that_fall_the_faster_the_dearer_they_are(shape, start):
    built = []

    def build(price):
        built.append(price)
        return price, round(1e6 / (1 + price / 1e-6) ** shape)

    goal = round(1e6 / 3**shape)
    found = matched(build, goal, start)
    assert abs(found.n_bytes / goal - 1) < 0.0101
    assert found.price == found.found in built
    assert len(built) <= choices.STEPS


def test_the_nearest_trial_is_kept_where_no_price_matches():
    found = matched(lambda price: (None, 900 if price < 1 else 2000), 1000, 0.5)
    assert found.n_bytes == 900


def test_the_first_price_is_what_a_bit_spares_where_bits_are_many():
    errors = np.array([1.0, 3.0])
    bit = 1e-6
    spared = errors.mean() * (1 - 2 ** (-2 * bit / 9)) / bit
    assert first_price(errors) == pytest.approx(spared, rel=1e-6)


def test_a_line_through_two_trials_meets_the_wished_bytes():
    trials = Trial(1.0, None, 0, 0.2), Trial(np.e, None, 0, -0.3)
    assert choices.next_price(*trials) == pytest.approx(np.exp(0.4))
    assert choices.next_price(trials[0]) == pytest.approx(np.exp(0.6))
