"""Intervals, tests and corrections over seeds; learning-rate tolerance; times to a loss.

test = difference(muon_by_seed, adamw_by_seed); test.low, test.high, test.p_value
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats as scipy_stats

from analysis.runs import Group, Run

pass

CONFIDENCE = 0.95
BySeed = Mapping[int, float]
Pair = tuple[str, str, BySeed, BySeed]


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Mean and the Student-t confidence interval of independent runs; NaN bounds for fewer than two."""
    mean = float(np.mean(values)) if len(values) else math.nan
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = scipy_stats.t.ppf((1 + confidence) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return mean, mean - float(half), mean + float(half)


def welch(a: Sequence[float], b: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float, float]:
    """mean(a) - mean(b), its confidence interval and the two-sided p value, variances not assumed equal (Welch 1947).

    t = (mean a - mean b) / sqrt(va + vb), v = s²/n, with (va + vb)² / (va²/(na-1) + vb²/(nb-1)) degrees of freedom.
    Bounds and p are NaN with fewer than two values on a side, or with no spread on either.
    """
    difference = float(np.mean(a) - np.mean(b)) if len(a) and len(b) else math.nan
    if len(a) < 2 or len(b) < 2:
        return difference, math.nan, math.nan, math.nan
    va, vb = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    if va + vb == 0:
        return difference, math.nan, math.nan, math.nan
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    error = math.sqrt(va + vb)
    half = float(scipy_stats.t.ppf((1 + confidence) / 2, freedom)) * error
    p_value = 2 * float(scipy_stats.t.sf(abs(difference) / error, freedom))
    return difference, difference - half, difference + half, p_value


@dataclass(frozen=True)
class Comparison:
    """Two groups side by side; differences are a - b in nats, ratios a / b, NaN where there is nothing to tell."""

    a: Group
    b: Group
    difference: float
    low: float
    high: float
    p_value: float
    step_time_ratio: float
    speed_ratio: float
    seconds_ratio: float
    memory_ratio: float


def compare(a: Group, b: Group) -> Comparison:
    ratios = [_ratio(a.mean(key), b.mean(key)) for key in ("step_ms", "tokens_per_second", "train_seconds")]
    return Comparison(
        a, b, *welch(a.losses(), b.losses()), *ratios, _ratio(a.mean("memory_bytes"), b.mean("memory_bytes"))
    )


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


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
    """The learning rates around the best whose loss stays near the best one's; `open_*`: the grid ended first."""

    best: float
    low: float
    high: float
    open_low: bool
    open_high: bool

    @property
    def decades(self) -> float:
        return math.log10(self.high / self.low)

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the lowest or highest that was tried."""
        return (self.open_low and self.low == self.best) or (self.open_high and self.high == self.best)


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
                return math.exp(x[i] + (limit - y[i]) / (y[after] - y[i]) * (x[after] - x[i])), False
            i = after
        return float(exact[i]), True

    (low, open_low), (high, open_high) = edge(-1), edge(1)
    return Tolerance(float(exact[best]), low, high, open_low, open_high)


def unsteadiness(run: Run, share: float = 0.1) -> float:
    """Standard deviation of the last `share` of the training losses about their line, in nats; NaN below 4 updates."""
    loss = run.train.get("train_loss", np.empty(0))
    last = loss[-max(4, round(share * len(loss))) :]
    if len(loss) < 4 or not np.isfinite(last).all():
        return math.nan
    x = np.arange(len(last))
    return float(np.std(last - np.polyval(np.polyfit(x, last, 1), x), ddof=2))


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
    means = np.linalg.svd(overlaps, compute_uv=False).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975)) / means.mean()
    return float(low), float(high)


def finite(values: BySeed) -> dict[int, float]:
    return {seed: value for seed, value in values.items() if math.isfinite(value)}


@dataclass(frozen=True)
class Summary:
    """n, mean, sample standard deviation and 95 % t-interval; NaN where there is nothing to tell."""

    n: int
    mean: float
    deviation: float
    low: float
    high: float


def summarize(values: Sequence[float]) -> Summary:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return Summary(len(values), *t_interval(values)[:1], deviation, *t_interval(values)[1:])


def paired(a: BySeed, b: BySeed, confidence: float = CONFIDENCE) -> tuple[float, float, float, float]:
    """Mean of a - b over the seeds, its t-interval and the two-sided p value; NaN with fewer than two seeds, p = 1
    where every difference is 0 (the two conditions did the same)."""
    if set(a) != set(b):
        raise ValueError(f"seeds {sorted(a)} and {sorted(b)} do not pair")
    differences = np.array([a[seed] - b[seed] for seed in sorted(a)])
    mean, low, high = t_interval(list(differences), confidence)
    if len(differences) < 2:
        return mean, math.nan, math.nan, math.nan
    if not differences.any():
        return 0.0, 0.0, 0.0, 1.0
    error = float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
    p_value = 2 * float(scipy_stats.t.sf(abs(mean) / error, len(differences) - 1)) if error else math.nan
    return mean, low, high, p_value


def hedges_g(a: Sequence[float], b: Sequence[float]) -> float:
    """Difference of the means in pooled standard deviations, corrected for small samples by the exact factor
    Gamma(m / 2) / (sqrt(m / 2) Gamma((m - 1) / 2)) with m = na + nb - 2 (Hedges 1981); NaN without spread."""
    freedom = len(a) + len(b) - 2
    if len(a) < 2 or len(b) < 2:
        return math.nan
    pooled = math.sqrt(((len(a) - 1) * np.var(a, ddof=1) + (len(b) - 1) * np.var(b, ddof=1)) / freedom)
    if pooled == 0:
        return math.nan
    factor = math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom - 1) / 2)) / math.sqrt(freedom / 2)
    return factor * float(np.mean(a) - np.mean(b)) / pooled


def p_words(value: float) -> str:
    """A p value as readers write it."""
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.2g}"


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values (Holm 1979): the smallest times m, the next times m - 1, ..., never falling, at most 1. A NaN
    is no test: it stays NaN and is not counted in m."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, highest = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        adjusted[i] = highest
    return adjusted


@dataclass(frozen=True)
class Contrast:
    """a - b over seeds. `p` is the test that counts: paired where the seeds pair, else Welch's; `low` and `high` are
    its interval, widened so that all of the family hold together with 95 %."""

    a: str
    b: str
    n: tuple[int, int]
    difference: float
    low: float
    high: float
    p_welch: float
    p_paired: float
    p_holm: float
    effect: float

    @property
    def p(self) -> float:
        return self.p_welch if math.isnan(self.p_paired) else self.p_paired

    @property
    def tested(self) -> bool:
        return not math.isnan(self.p)

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def family(pairs: Sequence[Pair], others: int = 0) -> list[Contrast]:
    """Every pair of a suite tested, corrected together, and for `others` more tests made elsewhere on the same runs."""
    kept = [(a, b, finite(x), finite(y)) for a, b, x, y in pairs]
    testable = sum(len(x) > 1 and len(y) > 1 for _, _, x, y in kept)
    confidence = 1 - (1 - CONFIDENCE) / max(1, testable + others)
    unadjusted = []
    for a, b, x, y in kept:
        difference, low, high, p_welch = welch(list(x.values()), list(y.values()), confidence)
        p_paired = math.nan
        if set(x) == set(y) and len(x) > 1:
            difference, low, high, p_paired = paired(x, y, confidence)
        effect = hedges_g(list(x.values()), list(y.values()))
        unadjusted.append(Contrast(a, b, (len(x), len(y)), difference, low, high, p_welch, p_paired, math.nan, effect))
    p_values = [test.p for test in unadjusted] + [1.0] * others
    return [
        replace(test, p_holm=p_holm) for test, p_holm in zip(unadjusted, holm(p_values)[: len(unadjusted)], strict=True)
    ]


@dataclass(frozen=True)
class Reached:
    """How long it took to reach something over `n` runs, `never` of which did not; `median` is None where fewer than
    half did."""

    n: int
    never: int
    median: float | None


def median_time(times: Sequence[float | None]) -> Reached:
    """The median of times of which some are censored: None = not reached in the whole run.

    All runs of a condition have the same budget, so a censored one outlasts every time that was seen, and the
    Kaplan-Meier median is the time by which half of all runs were there.
    """
    reached, half = sorted(time for time in times if time is not None), math.ceil(len(times) / 2)
    return Reached(len(times), len(times) - len(reached), reached[half - 1] if 0 < half <= len(reached) else None)


def slope(values: Mapping[float, BySeed]) -> dict[int, float]:
    """For each seed that all have, the least-squares slope of its value against log10 of the key."""
    seeds = set.intersection(*(set(finite(by_seed)) for by_seed in values.values()))
    x = np.log10(list(values))
    return {seed: float(np.polyfit(x, [values[key][seed] for key in values], 1)[0]) for seed in sorted(seeds)}
