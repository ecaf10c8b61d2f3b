"""Tests over seeds: Welch and paired, Holm's correction within a suite, effect sizes, times that were never reached.

    tests = family([("muon", "adamw", muon_by_seed, adamw_by_seed)]); tests[0].p_holm, tests[0].low, tests[0].high

Values come by seed: two conditions that share their seeds saw the same batches and began with the same weights, so the
paired test is the one that counts, chosen before any number is seen; Welch's stands beside it. With one seed nothing is
tested. Intervals of a family hold together (Bonferroni); p values are corrected by Holm.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats as scipy_stats

from stats import CONFIDENCE, t_interval, welch

BySeed = Mapping[int, float]
Pair = tuple[str, str, BySeed, BySeed]


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
