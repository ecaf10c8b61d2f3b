"""What a number of seeds can show: power of the tests, the smallest effect that they find, how many seeds would decide.

    detectable(alpha=0.05 / 4, freedom=5) * error      # the difference found in 80 % of such suites

Everything is in units of the standard error, which counts as known; `alpha` is the suite's 5 % divided by its number of
tests. Averages over the sampling distribution of the estimated error, so no noncentral t or Owen's Q is needed.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
from scipy import special, stats

POWER = 0.8  # the probability with which "could show" holds
MOST_SEEDS = 100  # beyond which we do not look
_GRID = (np.arange(2000) + 0.5) / 2000  # quantiles of the estimated error


@functools.cache
def _errors(freedom: float) -> np.ndarray:
    """Quantiles of the estimated standard error over the true one: sqrt(chi-square / freedom)."""
    return np.sqrt(stats.chi2.ppf(_GRID, freedom) / freedom)


def superiority(effect: float, alpha: float, freedom: float) -> float:
    """P that the two-sided t interval at 1 - alpha excludes zero on the side of the effect (in standard errors)."""
    limit = float(stats.t.ppf(1 - alpha / 2, freedom))
    return float(np.mean(special.ndtr(abs(effect) - limit * _errors(freedom))))


def equivalence(effect: float, margin: float, alpha: float, freedom: float) -> float:
    """P that both one-sided t-tests at alpha put the difference inside -margin .. margin (in standard errors)."""
    reach = margin - float(stats.t.ppf(1 - alpha, freedom)) * _errors(freedom)  # the mean must be at most so far from 0
    inside = special.ndtr(reach - effect) - special.ndtr(-reach - effect)
    return float(np.mean(np.where(reach > 0, inside, 0.0)))


@functools.cache
def detectable(alpha: float, freedom: float) -> float:
    """The effect, in standard errors, that the two-sided test finds with probability `POWER`."""
    return _least(lambda effect: superiority(effect, alpha, freedom))


@functools.cache
def detectable_margin(alpha: float, freedom: float) -> float:
    """The margin, in standard errors, within which equal sides are shown to be equal with probability `POWER`."""
    return _least(lambda margin: equivalence(0.0, margin, alpha, freedom))


def _least(power_at: Callable[[float], float]) -> float:
    """Bisection on an increasing function."""
    low, high = 0.0, 1.0
    while power_at(high) < POWER:
        low, high = high, 2 * high
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if power_at(middle) >= POWER else (middle, high)
    return high


def fewest_seeds(chance: Callable[[float, float], float], deviation: float) -> int | None:
    """The fewest seeds, from three, with which chance(standard error, freedom) is at least `POWER`; `deviation` is the
    standard deviation of one seed's number. None: more than `MOST_SEEDS`."""
    if not 0 < deviation < math.inf:
        return None
    return next((n for n in range(3, MOST_SEEDS + 1) if chance(deviation / math.sqrt(n), n - 1) >= POWER), None)
