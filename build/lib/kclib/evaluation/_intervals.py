"""Confidence intervals of means of bounded values, as accuracies and their differences are."""

from collections.abc import Sequence

from scipy import optimize, special

_NEAR = 1e-12  # what is taken for no distance


def of_mean(
    values: Sequence[float], counts: Sequence[int], least: float, most: float, level: float = 0.95
) -> tuple[float, float]:
    """Return the score interval of the mean of values that are between two limits.

    It holds the means that a score test does not reject: the variance is the one that the values have if the
    mean is what is tested, at the most likely distribution of that mean over the values found and both
    limits. For 0 and 1 it is Wilson's (1927) interval, for -1, 0 and 1 Tango's (1998, *Equivalence test and
    confidence interval for the difference in proportions for the paired-sample design*). It is within the
    limits, and has a width however alike the values are.

    Parameters
    ----------
    values : sequence of float
        Those that were found, at least `least` and at most `most`.
    counts : sequence of int
        How often each was found; together at least 1.
    least, most : float
        What a value can be.
    level : float
        Confidence, above 0 and below 1.
    """
    n = sum(counts)
    shares = [(float(value), count / n) for value, count in zip(values, counts, strict=True) if count]
    found = sum(value * share for value, share in shares)
    width = special.ndtri((1 + level) / 2) ** 2 / n

    def excess(mean: float) -> float:
        return (found - mean) ** 2 - width * _variance(shares, mean, least, most)

    ends = []
    for limit in (least, most):
        # Next to what was found no mean is rejected; at a limit, where nothing can vary, all are.
        near, far = found + _NEAR * (limit - found), limit - _NEAR * (limit - found)
        ends.append(limit if near == far else optimize.brentq(excess, near, far, xtol=_NEAR))
    return float(ends[0]), float(ends[1])


def _variance(shares: list[tuple[float, float]], mean: float, least: float, most: float) -> float:
    """Return the variance of values at the most likely distribution that has a mean.

    Its probabilities are ``share / (1 + x * (value - mean))``, x a Lagrange multiplier (Owen 1988, *Empirical
    likelihood ratio confidence intervals*). Where they leave a rest, that is a limit's that was not found.
    """
    away = [(value - mean, share) for value, share in shares]

    def moment(x: float) -> float:
        return sum(share * a / (1 + x * a) for a, share in away)

    low, high = -(1 - _NEAR) / (most - mean), (1 - _NEAR) / (mean - least)
    if moment(low) <= 0:
        x, limit = low, most
    elif moment(high) >= 0:
        x, limit = high, least
    else:
        x, limit = optimize.brentq(moment, low, high, xtol=_NEAR * (high - low)), mean
    chances = [share / (1 + x * a) for a, share in away]
    spread = sum(chance * a * a for chance, (a, _) in zip(chances, away, strict=True))
    return spread + (1 - sum(chances)) * (limit - mean) ** 2
