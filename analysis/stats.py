"""Intervals, tests and corrections over seeds; learning-rate tolerance; time to a loss.

    test = difference(muon_by_seed, adamw_by_seed); test.low, test.high, test.p_value, test.test

Two groups with the same seeds are paired, because a seed fixes batches and initial weights. `difference` is the only
test of two groups: reports, suites, records and figures all call it.
"""

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats as scipy_stats

from analysis.runs import Group, Run

CONFIDENCE = 0.95
SIGNIFICANT = 0.05  # a difference with a p value below this is called significant
MARGIN = 0.01  # share of the loss within which two settings count as equally good
STEADY = 1.2  # slowest over fastest median step of one setting's seeds, up to which times count
PAIRED, WELCH, OVER_SEEDS, REGRESSION = "paired t-test", "Welch's t-test", "t-test over seeds", "regression over runs"
BySeed = Mapping[int, float]
Pair = tuple[str, str, BySeed, BySeed]


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Mean and the Student-t confidence interval of independent runs; NaN bounds for fewer than two."""
    mean = float(np.mean(values)) if len(values) else math.nan
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = scipy_stats.t.ppf((1 + confidence) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return mean, mean - float(half), mean + float(half)


def share_interval(count: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """A share of independent cases and its confidence interval (Wilson 1927), which has a width at 0 and 1 too."""
    found = scipy_stats.binomtest(count, total).proportion_ci(confidence, "wilson")
    return count / total, float(found.low), float(found.high)


@dataclass(frozen=True)
class Difference:
    """mean(a) - mean(b), its confidence interval, the two-sided p value, the test's name and the number of seeds;
    `error` is the standard error, `freedom` the degrees of freedom of its t distribution.

    Interval, p and error are NaN where a side has fewer than two seeds or nothing varies. Of pairs whose differences
    are all equal the interval has no width and p is NaN.
    """

    difference: float
    low: float
    high: float
    p_value: float
    error: float
    freedom: float
    test: str
    n: tuple[int, int]

    @property
    def paired(self) -> bool:
        return self.test == PAIRED

    @property
    def tested(self) -> bool:
        return not math.isnan(self.p_value)

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def interval(self, confidence: float) -> tuple[float, float]:
        """The bounds at another confidence."""
        if self.error == 0:
            return self.difference, self.difference
        half = float(scipy_stats.t.ppf((1 + confidence) / 2, self.freedom)) * self.error
        return self.difference - half, self.difference + half


def difference(a: BySeed, b: BySeed, confidence: float = CONFIDENCE) -> Difference:
    """Test a - b: paired where both have the same seeds, at least two, else by Welch (1947), variances not equal."""
    paired = len(a) > 1 and a.keys() == b.keys()
    x, y = (np.array([side[seed] for seed in sorted(side)], dtype=float) for side in (a, b))
    mean = float(np.mean(x) - np.mean(y)) if len(x) and len(y) else math.nan
    tested = (_paired if paired else _welch)(x, y, confidence)
    return Difference(mean, *tested, PAIRED if paired else WELCH, (len(x), len(y)))


def mean_over_seeds(values: BySeed, confidence: float = CONFIDENCE) -> Difference:
    """Test the mean of one number per seed against zero (Student's one-sample t-test)."""
    return replace(difference(values, dict.fromkeys(values, 0.0), confidence), test=OVER_SEEDS)


Tested = tuple[float, float, float, float, float]  # low, high, p, error, freedom


def _paired(x: np.ndarray, y: np.ndarray, confidence: float) -> Tested:
    """p = 1 where every difference is 0 (both sides did the same), NaN where all are equal otherwise."""
    gaps = x - y
    if np.ptp(gaps) <= 1e-12 * np.abs(gaps).max():  # equal up to rounding
        return float(gaps.mean()), float(gaps.mean()), math.nan if gaps.any() else 1.0, 0.0, len(gaps) - 1.0
    return _tested(scipy_stats.ttest_rel(x, y), confidence)


def _welch(x: np.ndarray, y: np.ndarray, confidence: float) -> Tested:
    if min(len(x), len(y)) < 2 or np.ptp(x) == np.ptp(y) == 0:
        return (math.nan,) * 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # SciPy warns where one side alone does not vary
        return _tested(scipy_stats.ttest_ind(x, y, equal_var=False), confidence)


def _tested(result: Any, confidence: float) -> Tested:
    """From SciPy's result; the standard error is its interval's half width in quantiles of t."""
    low, high = map(float, result.confidence_interval(confidence))
    error = (high - low) / 2 / float(scipy_stats.t.ppf((1 + confidence) / 2, result.df))
    return low, high, float(result.pvalue), error, float(result.df)


def common_slope(groups: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Difference:
    """The slope of y against x that all groups of points (x, y) share, each around its own mean: least squares with
    N - groups - 1 degrees of freedom (analysis of covariance). A group with one point says nothing."""
    centred = [tuple(np.asarray(side, dtype=float) - np.mean(side) for side in group) for group in groups if group[0]]
    used = [group for group in centred if len(group[0]) > 1]
    x, y = (np.concatenate([np.empty(0), *(group[i] for group in used)]) for i in (0, 1))
    total, freedom = len(x), len(x) - len(used) - 1
    if freedom < 1 or not x.any():
        return Difference(*(math.nan,) * 6, REGRESSION, (total, total))
    slope_of_all = float(x @ y / (x @ x))
    error = math.sqrt(float(np.sum((y - slope_of_all * x) ** 2)) / freedom / float(x @ x))
    half = float(scipy_stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    p_value = 2 * float(scipy_stats.t.sf(abs(slope_of_all) / error, freedom)) if error else math.nan
    bounds = slope_of_all - half, slope_of_all + half
    return Difference(slope_of_all, *bounds, p_value, error, freedom, REGRESSION, (total, total))


@dataclass(frozen=True)
class Comparison(Difference):
    """The difference of two groups' final losses in nats, and ratios a / b; NaN where something was not logged."""

    a: Group
    b: Group
    step_time_ratio: float
    speed_ratio: float
    seconds_ratio: float
    memory_ratio: float


def compare(a: Group, b: Group) -> Comparison:
    def ratio(key: str) -> float:
        return a.mean(key) / b.mean(key) if b.mean(key) else math.nan

    return Comparison(
        **vars(difference(a.losses_by_seed(), b.losses_by_seed())),
        a=a,
        b=b,
        step_time_ratio=ratio("step_ms"),
        speed_ratio=ratio("tokens_per_second"),
        seconds_ratio=ratio("train_seconds"),
        memory_ratio=ratio("memory_bytes"),
    )


def first_reaching(x: np.ndarray, loss: np.ndarray, target: float) -> float | None:
    """The x (steps, seconds) at which the loss is first at `target`, linear between validations; None if never."""
    below = np.flatnonzero(loss <= target)
    if not len(below):
        return None
    i = int(below[0])
    if i == 0:
        return float(x[0])
    share = (loss[i - 1] - target) / (loss[i - 1] - loss[i])
    return float(x[i - 1] + share * (x[i] - x[i - 1]))


@dataclass(frozen=True)
class Tolerance:
    """The learning rates around the best whose loss stays near the best loss; `open_*`: the grid ended first."""

    best: float
    low: float
    high: float
    open_low: bool
    open_high: bool

    @property
    def decades(self) -> float:
        return math.log10(self.high / self.low)


def learning_rate_tolerance(rates: Sequence[float], losses: Sequence[float], share: float = 0.01) -> Tolerance | None:
    """The width of the valley around the best rate within which the loss is at most (1 + share) times the best loss.

    Between grid points the loss is taken as linear in the logarithm of the rate. The valley is the one connected piece
    around the best rate; a loss that is NaN or infinite (a diverged run) ends it at its neighbour towards the best;
    where the grid ends inside, the width is a lower bound. None with no finite loss.
    """
    order = np.argsort(rates)
    exact = np.asarray(rates, dtype=float)[order]
    x, y = np.log(exact), np.asarray(losses, dtype=float)[order]
    if not np.isfinite(y).any():
        return None
    best = int(np.nanargmin(np.where(np.isfinite(y), y, np.nan)))
    limit = y[best] * (1 + share)

    def edge(direction: int) -> tuple[float, bool]:
        i = best
        while 0 <= i + direction < len(y):
            after = i + direction
            if not y[after] <= limit:
                if not np.isfinite(y[after]):
                    return float(exact[i]), False
                crossing = (limit - y[i]) / (y[after] - y[i])  # as a share of the way to the next rate, in logarithms
                return math.exp(x[i] + crossing * (x[after] - x[i])), False
            i = after
        return float(exact[i]), True

    (low, open_low), (high, open_high) = edge(-1), edge(1)
    return Tolerance(float(exact[best]), low, high, open_low, open_high)


def unsteadiness(run: Run, share: float = 0.1) -> float:
    """Standard deviation of the last `share` of the training losses around their trend, in nats; NaN below 4 steps."""
    loss = run.train.get("train_loss", np.empty(0))
    last = loss[-max(4, round(share * len(loss))) :]
    if len(loss) < 4 or not np.isfinite(last).all():
        return math.nan
    x = np.arange(len(last))
    trend = np.polyval(np.polyfit(x, last, 1), x)
    return float(np.std(last - trend, ddof=2))  # the line took two degrees of freedom


def largest_spike(run: Run) -> float:
    """Greatest rise of the training loss above its least value so far, in nats; NaN without training."""
    loss = run.train.get("train_loss", np.empty(0))
    loss = loss[np.isfinite(loss)]
    return float(np.max(loss - np.minimum.accumulate(loss))) if len(loss) else math.nan


def thin(x: np.ndarray, y: np.ndarray, most: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """A long curve as at most `most` points, each the mean of as many neighbours."""
    width = math.ceil(len(x) / most) if len(x) else 1
    if width == 1:
        return x, y
    starts = np.arange(0, len(x), width)
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


@functools.cache
def chance_spread(k: int, trials: int = 20_000) -> tuple[float, float]:
    """The middle 95 % of the alignment of two random k-dimensional subspaces, as multiples of its mean.

    In a large dimension d the k x k overlap of the two bases is Gaussian with variance 1/d: its mean singular value
    scales with sqrt(1/d) and its relative spread depends on k alone.
    """
    overlaps = np.random.default_rng(0).standard_normal((trials, k, k))
    means = np.linalg.svd(overlaps, compute_uv=False).mean(axis=1)  # singular values: cosines of principal angles
    low, high = np.quantile(means, (0.025, 0.975)) / means.mean()
    return float(low), float(high)


def finite_only(values: BySeed) -> dict[int, float]:
    return {seed: value for seed, value in values.items() if math.isfinite(value)}


def hedges_g(a: Sequence[float], b: Sequence[float]) -> float:
    """Difference of the means in pooled standard deviations, corrected for small samples by the exact factor
    Gamma(m / 2) / (sqrt(m / 2) Gamma((m - 1) / 2)) with m = na + nb - 2 (Hedges 1981); NaN without spread."""
    freedom = len(a) + len(b) - 2
    if len(a) < 2 or len(b) < 2 or np.ptp(a) == np.ptp(b) == 0:
        return math.nan
    pooled = math.sqrt(((len(a) - 1) * np.var(a, ddof=1) + (len(b) - 1) * np.var(b, ddof=1)) / freedom)
    factor = math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom - 1) / 2)) / math.sqrt(freedom / 2)
    return factor * float(np.mean(a) - np.mean(b)) / pooled


def p_words(value: float) -> str:
    """A p value as readers write it."""
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.2g}"


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values (Holm 1979): the smallest times m, the next times m - 1, ..., never falling, at most 1. A NaN
    is not a test: it stays NaN and does not count in m."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, highest = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))  # never below the one before
        adjusted[i] = highest
    return adjusted


@dataclass(frozen=True)
class Contrast(Difference):
    """Condition `name_a` minus `name_b`; `low` and `high` are widened so that all of the family hold together with
    95 %, `p_welch` is given for reference, `effect` is Hedges' g."""

    name_a: str
    name_b: str
    p_welch: float
    p_holm: float
    effect: float


def family(pairs: Sequence[Pair], others: int = 0) -> list[Contrast]:
    """Every pair of a suite tested, corrected together, and for `others` more tests made elsewhere on the same runs."""
    kept = [(name_a, name_b, finite_only(a), finite_only(b)) for name_a, name_b, a, b in pairs]
    testable = sum(len(a) > 1 and len(b) > 1 for *_, a, b in kept)
    confidence = 1 - (1 - CONFIDENCE) / max(1, testable + others)  # Bonferroni: all intervals hold together
    found = []
    for name_a, name_b, a, b in kept:
        x, y = np.array(list(a.values())), np.array(list(b.values()))
        found.append(
            Contrast(
                **vars(difference(a, b, confidence)),
                name_a=name_a,
                name_b=name_b,
                p_welch=_welch(x, y, confidence)[2],
                p_holm=math.nan,
                effect=hedges_g(x, y),
            )
        )
    adjusted = holm([test.p_value for test in found] + [1.0] * others)
    return [replace(test, p_holm=p_holm) for test, p_holm in zip(found, adjusted, strict=False)]


@dataclass(frozen=True)
class Reached:
    """Time to a loss over `n` runs; `never` counts those that did not reach it, `median` is None if most did not."""

    n: int
    never: int
    median: float | None


def median_time(times: Sequence[float | None]) -> Reached:
    """The median of times, some of them censored: None = not reached in the whole run.

    All runs of a condition have the same budget, so a censored time is longer than every observed one, and the
    Kaplan-Meier median is the time by which half of all runs reached the loss.
    """
    reached, half = sorted(time for time in times if time is not None), math.ceil(len(times) / 2)
    return Reached(len(times), len(times) - len(reached), reached[half - 1] if 0 < half <= len(reached) else None)


def slope(values: Mapping[float, BySeed], scale: Callable[[Any], Any] = np.log10) -> dict[int, float]:
    """For each seed that all keys share, the least-squares slope of its value against `scale` of the key."""
    seeds = set.intersection(*(set(finite_only(by_seed)) for by_seed in values.values()))
    x = scale(np.array(list(values)))
    return {seed: float(np.polyfit(x, [values[key][seed] for key in values], 1)[0]) for seed in sorted(seeds)}


def best_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The rate at the vertex of the parabola through the least loss and its neighbours, in the logarithm of the rate;
    the grid's own rate where the least loss is on the edge or next to a loss that is not finite."""
    order = np.argsort(rates)
    x, y = np.log(np.asarray(rates, dtype=float)[order]), np.asarray(losses, dtype=float)[order]
    best = int(np.nanargmin(np.where(np.isfinite(y), y, np.nan)))
    near = slice(best - 1, best + 2)
    if not 0 < best < len(y) - 1 or not np.isfinite(y[near]).all():
        return math.exp(x[best])
    curve, tilt, _ = np.polyfit(x[near] - x[best], y[near], 2)
    return math.exp(x[best] - tilt / (2 * curve)) if curve > 0 else math.exp(x[best])


def tail_index(singular_values: Sequence[float], share: float = 0.1) -> float:
    """Hill's (1975) estimate of 1 / alpha from the largest `share` of the values, at least five: the mean logarithm of
    their ratio to the next value. 0 for equal values; the heavier the tail, the larger. NaN with fewer than six."""
    s = np.sort(np.asarray(singular_values, dtype=float))[::-1]
    k = max(5, round(share * len(s)))
    return float(np.mean(np.log(s[:k] / s[k]))) if len(s) > k and s[k] > 0 else math.nan


@dataclass(frozen=True)
class Balance:
    """How evenly tokens are shared: entropy of the shares over its maximum ln E, greatest share over the mean, and the
    number of dead experts."""

    evenness: float
    max_over_mean: float
    dead: int


DEAD_SHARE = 0.1  # of an even share, below which an expert counts as dead


def balance(shares: Sequence[float]) -> Balance:
    p = np.asarray(shares, dtype=float) / np.sum(shares)
    used = p[p > 0]
    entropy = float(-(used * np.log(used)).sum())
    return Balance(entropy / math.log(len(p)), float(p.max() * len(p)), int((p * len(p) < DEAD_SHARE).sum()))


def spread_factors(freedom: float, confidence: float) -> tuple[float, float]:
    """The bounds of a standard deviation over its estimate."""
    tails = scipy_stats.chi2.ppf(((1 + confidence) / 2, (1 - confidence) / 2), freedom)
    return tuple(math.sqrt(freedom / float(tail)) for tail in tails)  # type: ignore
