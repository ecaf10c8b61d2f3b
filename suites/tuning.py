"""Estimates the expected best loss after k trials, its band, and each setting's effect.

    curve = expected_best(losses); low, high = band(losses); lead(mine, theirs).lower; effect(values, losses).rho

Losses are one number a trial (nats), a diverged one as `losses` says. Ranks of settings are corrected over all of them.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from analysis.stats import CONFIDENCE, SIGNIFICANT, holm
from suites.arms import Axis, value_of
from suites.results import Outcome, Results

RESAMPLES = 2000
ON_EDGE = "ON THE EDGE"
OUTER = 0.15  # share of an axis at either end where a significant fall of the loss asks for a wider range


def tried(results: Results, arm: str) -> list[Outcome]:
    """The arm's trials that finished or diverged, in the order drawn."""
    return [o for o in results.of_arm(arm) if not o.to_go and not o.lost]


def losses(results: Results, arm: str) -> np.ndarray:
    """The losses of `tried`. A diverged trial counts as the worst of any arm."""
    finite = [o.loss for o in results.outcomes if math.isfinite(o.loss)]
    own = [o.loss for o in tried(results, arm)]
    return np.array([loss if math.isfinite(loss) else max(finite, default=math.nan) for loss in own])


def by_arm(results: Results) -> dict[str, np.ndarray]:
    """The losses of every arm with a trial, once a trial of any arm has finished."""
    found = {arm: losses(results, arm) for arm in results.arms()}
    return {arm: own for arm, own in found.items() if len(own) and np.isfinite(own).all()}


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
    """(n // 2,), (n // 2,): the 95 % percentile interval of `expected_best` when the trials are drawn anew, with
    replacement, for k = 1 to half of the trials: no draw is better than the best trial, so beyond it is too high."""
    n = len(losses)
    drawn = np.random.default_rng(seed).choice(np.asarray(losses, dtype=float), (RESAMPLES, n))
    curves = np.sort(drawn, axis=1) @ _weights(n)[: n // 2].T
    low, high = np.quantile(curves, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return low, high


def powers(n: int) -> list[int]:
    """The powers of two up to n, and n: the numbers of trials that are told."""
    return sorted({*(2**i for i in range(int(math.log2(n)) + 1)), n})


@dataclass(frozen=True)
class Lead:
    """How much lower the best trial of one arm is than that of another, in nats: expected after k trials, with a 95 %
    interval and the probability of a lead above 0 after all."""

    by_k: np.ndarray
    low: float
    high: float
    lower: float


def lead(mine: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Lead:
    """Of `mine` over `theirs`; the interval is a percentile bootstrap, the trials of each arm drawn anew."""
    n, rng = min(len(mine), len(theirs)), np.random.default_rng(seed)
    gaps = -np.subtract(*(rng.choice(np.asarray(own), (10 * RESAMPLES, n)).min(axis=1) for own in (mine, theirs)))
    low, high = np.quantile(gaps, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    by_k = expected_best(theirs)[:n] - expected_best(mine)[:n]
    return Lead(by_k, float(low), float(high), float(np.mean(gaps > 0)))


def trials_needed(losses: Sequence[float], target: float) -> int | None:
    """The fewest trials whose expected best loss is at most `target`; None if more than there are."""
    enough = np.flatnonzero(expected_best(losses) <= target)
    return int(enough[0]) + 1 if len(enough) else None


@dataclass(frozen=True)
class Effect:
    """Spearman's rank correlation of setting and loss, its two-sided p value, the median loss of the worst third of the
    range minus that of the best (nats), and what this difference is on average if the setting does nothing."""

    rho: float
    p_value: float
    nats: float
    noise: float
    p_holm: float = math.nan

    def edge(self, axis: Axis, value: float) -> str:
        """Whether the best trial's `value` is in the outer part of the range and the loss falls significantly towards
        that end, or so near an end that it is told although it may be chance."""
        place = axis.place(value)
        towards = self.rho > 0 if place < 0.5 else self.rho < 0
        if towards and self.p_holm < SIGNIFICANT and not OUTER <= place <= 1 - OUTER:
            return ON_EDGE
        return "near an end, maybe by chance" if axis.on_edge(value) else "inside"


def effect(values: Sequence[float], losses: Sequence[float], seed: int = 0) -> Effect:
    """Of one setting, all others varying at random; NaN correlation where one side does not vary. The noise is that of
    the same losses in random orders."""
    values, losses = np.asarray(values, dtype=float), np.asarray(losses, dtype=float)
    orders = np.random.default_rng(seed).permuted(np.tile(losses, (RESAMPLES, 1)), axis=1)
    nats, *noise = _between_thirds(np.vstack((losses[np.argsort(values, kind="stable")], orders)))
    varies = min(np.ptp(values), np.ptp(losses)) > 0
    found = stats.spearmanr(values, losses) if varies else (math.nan, math.nan)
    return Effect(float(found[0]), float(found[1]), float(nats), float(np.mean(noise)))


def _between_thirds(losses: np.ndarray) -> np.ndarray:
    """(orders,): the greatest minus the least median of the thirds of each row."""
    return np.ptp([np.median(third, axis=1) for third in np.array_split(losses, 3, axis=1)], axis=0)


def effects(results: Results) -> dict[tuple[str, str], Effect]:
    """Of every tuned setting by arm and name, p values corrected over all of them."""
    found = {
        (arm, setting): effect([value_of(o.condition.fields, setting) for o in tried(results, arm)], own)
        for arm, own in by_arm(results).items()
        if len(own) > 2
        for setting in results.space(arm)
    }
    adjusted = holm([one.p_value for one in found.values()])
    return {key: replace(one, p_holm=p) for (key, one), p in zip(found.items(), adjusted, strict=True)}
