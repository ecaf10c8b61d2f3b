"""Estimates the expected best loss after k trials, its band, and each setting's effect.

    curve = expected_best(losses); low, high = band(losses); effect(values, losses).rho

Losses are one number a trial (nats), every trial counted: a diverged one as `losses` says.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from analysis.stats import CONFIDENCE
from suites.results import Results

RESAMPLES = 2000


def losses(results: Results, arm: str) -> np.ndarray:
    """The losses of the arm's trials that are over, in the order drawn. A diverged one counts as the worst trial of any
    arm."""
    finite = [o.loss for o in results.outcomes if math.isfinite(o.loss)]
    own = [o.loss for o in results.of_arm(arm) if not o.to_go]
    return np.array([loss if math.isfinite(loss) else max(finite, default=math.nan) for loss in own])


@functools.cache
def _weights(n: int) -> np.ndarray:
    """(n, n): row k - 1 has the probabilities that the i-th smallest of n trials is the least of k of them,
    C(n - i, k - 1) / C(n, k)."""
    return np.array([[math.comb(n - i, k - 1) / math.comb(n, k) for i in range(1, n + 1)] for k in range(1, n + 1)])


def expected_best(losses: Sequence[float]) -> np.ndarray:
    """(n,): the mean over all choices of k of the n trials of the least loss, for k = 1 to n. Exact, as in Dodge et al.
    2019 (arXiv 1909.03004), but without replacement."""
    return _weights(len(losses)) @ np.sort(losses)


def band(losses: Sequence[float], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(n,), (n,): the 95 % percentile interval of `expected_best` when the trials are drawn anew, with replacement."""
    n = len(losses)
    drawn = np.random.default_rng(seed).choice(np.asarray(losses, dtype=float), (RESAMPLES, n))
    curves = np.sort(drawn, axis=1) @ _weights(n).T
    low, high = np.quantile(curves, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return low, high


def trials_needed(losses: Sequence[float], target: float) -> int | None:
    """The fewest trials whose expected best loss is at most `target`; None if more than there are."""
    enough = np.flatnonzero(expected_best(losses) <= target)
    return int(enough[0]) + 1 if len(enough) else None


@dataclass(frozen=True)
class Effect:
    """Spearman's rank correlation of setting and loss, its two-sided p value (not corrected), and the median loss of
    the worst third of the range minus that of the best (nats)."""

    rho: float
    p_value: float
    nats: float


def effect(values: Sequence[float], losses: Sequence[float]) -> Effect:
    """Of one setting, all others varying at random; NaN correlation where one side does not vary."""
    values, losses = np.asarray(values, dtype=float), np.asarray(losses, dtype=float)
    thirds = np.array_split(losses[np.argsort(values, kind="stable")], 3)
    medians = [float(np.median(third)) for third in thirds]
    varies = min(np.ptp(values), np.ptp(losses)) > 0
    found = stats.spearmanr(values, losses) if varies else (math.nan, math.nan)
    return Effect(float(found[0]), float(found[1]), max(medians) - min(medians))
