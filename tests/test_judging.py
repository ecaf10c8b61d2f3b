"""Verdicts: hand-worked numbers, SciPy's tests as independent calculations, error rates and power by simulation."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from analysis import power
from analysis.stats import common_slope, difference, mean_over_seeds, slope
from suites.judging import (
    CONFIRMED,
    EQUIVALENT,
    REFUTED,
    UNDECIDED,
    Evidence,
    Spread,
    Unit,
    judge,
)

NATS = Unit(" nats")


def evidence(values, expected=-1, **more):
    test = mean_over_seeds(dict(enumerate(values)))
    return Evidence(what="x", test=test, expected=expected, show=NATS, **more)


def test_superiority_by_hand():
    found = evidence([-1.0, -2.0, -3.0])  # mean -2, standard error 1 / sqrt(3), t with 2 degrees: 4.3027
    half = 4.3027 / math.sqrt(3)
    assert found.test.interval(0.95) == pytest.approx((-2 - half, -2 + half), abs=1e-3)
    assert found.verdict(1) == UNDECIDED  # -4.48 to 0.48
    assert evidence([-1.5, -2.0, -2.5]).verdict(1) == CONFIRMED  # half as wide: -3.24 to -0.76
    assert evidence([-1.5, -2.0, -2.5], expected=1).verdict(1) == REFUTED
    assert evidence([-1.5, -2.0, -2.5]).verdict(10) == UNDECIDED  # t at 0.5 %: 14.09, so -6.1 to 2.1
    assert evidence([-1.5, -2.5]).verdict(1) == UNDECIDED


def test_two_one_sided_tests_are_scipys():
    rng = np.random.default_rng(0)
    for margin, tests in ((0.3, 1), (0.6, 4), (1.2, 4), (0.2, 1)):
        values = rng.normal(0.1, 0.3, 6)
        above = scipy.stats.ttest_1samp(values, -margin, alternative="greater").pvalue
        below = scipy.stats.ttest_1samp(values, margin, alternative="less").pvalue
        found = evidence(values, expected=0, margin=margin)
        assert (found.verdict(tests) == CONFIRMED) == (max(above, below) < 0.05 / tests)
        other = evidence(values, expected=0, margin=margin, one_sided=True)
        assert (other.verdict(tests) == CONFIRMED) == (above < 0.05 / tests)


def test_equality_is_refuted_beyond_the_margin_and_a_small_difference_is_equivalent():
    small = [0.010, 0.011, 0.012, 0.013]
    assert evidence(small, expected=0, margin=0.05).verdict(2) == CONFIRMED  # differs from 0, and by little
    assert evidence(small, expected=0, margin=0.005).verdict(2) == REFUTED
    assert evidence(small, expected=0, margin=0.0115).verdict(2) == UNDECIDED
    unclear = [0.01, -0.01, 0.02, -0.015]
    told = [
        evidence(v, expected=0, margin=0.05, one_sided=True).numbers(2) for v in (small, [-x for x in small], unclear)
    ]
    assert ["below zero by less than the margin" in words for words in told] == [False, True, False]
    assert evidence(unclear, margin=0.1).verdict(2) == EQUIVALENT
    assert evidence(unclear, margin=0.01).verdict(2) == UNDECIDED
    assert evidence(unclear).verdict(2) == UNDECIDED
    assert evidence([0.0] * 4, margin=0.01).verdict(2) == EQUIVALENT  # the very same runs


def test_a_claim_of_parts_needs_each_and_falls_with_one():
    yes, no, unclear = [-1.5, -2.0, -2.5], [1.5, 2.0, 2.5], [1.0, -1.0, 0.1]
    for parts, verdict in (((yes, yes), CONFIRMED), ((yes, no), REFUTED), ((yes, unclear), UNDECIDED)):
        assert judge([evidence(part) for part in parts], 1).verdict == verdict
    tied = evidence([0.001, -0.001, 0.0005], margin=0.1)
    assert judge([evidence(yes), tied], 1).verdict == EQUIVALENT
    four = judge([evidence(yes)] * 4, 1)
    assert four.numbers.startswith("4 of 4 comparisons confirm it; most against it: x: -2.000 nats")


def test_spread_is_judged_by_chi_square():
    values = [39.76, 39.83, 39.80, 39.70, 39.90, 39.82]
    spread, n = np.std(values, ddof=1), len(values)
    found = Evidence(what="x", test=Spread.of(values, limit=0.4), expected=-1, show=NATS)
    bounds = spread * np.sqrt((n - 1) / scipy.stats.chi2.ppf([0.975, 0.025], n - 1))
    assert np.exp(found.test.interval(0.95)) * 0.4 == pytest.approx(bounds)
    assert found.verdict(1) == CONFIRMED
    assert Evidence(what="x", test=Spread.of(values, limit=0.02), expected=-1, show=NATS).verdict(1) == REFUTED
    assert Evidence(what="x", test=Spread.of([1.0] * 4, limit=0.02), expected=-1, show=NATS).verdict(1) == CONFIRMED


def test_a_common_slope_is_the_analysis_of_covariance():
    rng = np.random.default_rng(2)
    x = rng.normal(0, 1, (2, 5))
    y = np.array([[3.0], [7.0]]) - 2 * x + rng.normal(0, 0.1, (2, 5))
    found = common_slope([(list(a), list(b)) for a, b in zip(x, y, strict=True)])
    design = np.column_stack([x.ravel(), np.repeat([1, 0], 5), np.repeat([0, 1], 5)])
    beta, residual, *_ = np.linalg.lstsq(design, y.ravel(), rcond=None)
    error = math.sqrt(residual[0] / 7 * np.linalg.inv(design.T @ design)[0, 0])
    assert (found.difference, found.error, found.freedom) == pytest.approx((beta[0], error, 7))
    one = common_slope([(list(x[0]), list(y[0]))])
    line = scipy.stats.linregress(x[0], y[0])
    assert (one.difference, one.error, one.p_value) == pytest.approx((line.slope, line.stderr, line.pvalue))
    assert math.isnan(common_slope([([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])]).difference)


@pytest.mark.parametrize(("alpha", "freedom", "effect"), [(0.05, 5, 3.0), (0.005, 2, 25.0), (0.0125, 9, 2.0)])
def test_power_of_superiority_is_the_noncentral_t(alpha, freedom, effect):
    limit = scipy.stats.t.ppf(1 - alpha / 2, freedom)
    assert power.superiority(effect, alpha, freedom) == pytest.approx(
        scipy.stats.nct.sf(limit, freedom, effect), abs=1e-4
    )
    found = power.detectable(alpha, freedom)
    assert scipy.stats.nct.sf(limit, freedom, found) == pytest.approx(power.POWER, abs=1e-3)


def test_power_of_equivalence_is_the_integral_over_the_estimated_error():
    alpha, freedom, margin, effect = 0.01, 5, 6.0, 0.7
    limit = scipy.stats.t.ppf(1 - alpha, freedom)

    def inside(variance):
        reach = margin - limit * math.sqrt(variance / freedom)
        passed = scipy.stats.norm.cdf(reach - effect) - scipy.stats.norm.cdf(-reach - effect)
        return max(0.0, passed) * scipy.stats.chi2.pdf(variance, freedom)

    expected, _ = scipy.integrate.quad(inside, 0, freedom * (margin / limit) ** 2)
    assert power.equivalence(effect, margin, alpha, freedom) == pytest.approx(expected, abs=1e-3)
    assert power.equivalence(0.0, power.detectable_margin(alpha, freedom), alpha, freedom) == pytest.approx(
        0.8, abs=1e-3
    )


def test_the_row_names_n_margin_and_what_it_could_show():
    found = evidence([-0.1, 0.0, 0.3, -0.2, 0.1, 0.05], margin=0.05)
    could = found.could_show(0.05 / 4)
    assert could == pytest.approx(found.test.error * power.detectable(0.05 / 4, 5))
    assert found.test_words(4) == f"t-test over seeds, n = 6, margin 0.050 nats; could show {could:.3f} nats"
    finding = judge([found], 4)
    assert finding.verdict == UNDECIDED
    assert "seeds would decide" in finding.numbers


def test_so_many_seeds_would_decide():
    values = np.array([-0.25, 0.0, -0.3, 0.2, -0.15])
    found = evidence(values)
    (seeds,) = (int(word) for word in found.would_decide(2).split() if word.isdigit())
    d = abs(values.mean()) / np.std(values, ddof=1)
    for n, enough in ((seeds - 1, False), (seeds, True)):
        limit = scipy.stats.t.ppf(1 - 0.025 / 2, n - 1)
        assert (scipy.stats.nct.sf(limit, n - 1, d * math.sqrt(n)) >= 0.8) == enough


N, TESTS, NOISE = 6, 4, 0.02


def suite(rng, effect=0.0, sizes=(10.0, 100.0, 1000.0)):
    """A suite of four independent tests over six seeds, each with the true effect that is named in standard errors:
    a paired difference, a trend, a difference of differences, and a ratio on the log scale."""

    def noise(*shape):
        return rng.normal(0, NOISE, (*shape, N))

    shift = effect / math.sqrt(N)  # in standard deviations of one seed's number
    luck = rng.normal(0, 0.5, N)  # what a seed's batches do, they do to both sides
    better = 5 + luck + noise() + shift * NOISE * math.sqrt(2)
    pair = difference(dict(enumerate(better)), dict(enumerate(5 + luck + noise())))
    leads, x = noise(3), np.log10(sizes)
    deviation = NOISE / math.sqrt(np.sum((x - x.mean()) ** 2))
    trend = slope({s: dict(enumerate(leads[i] + shift * deviation * x[i])) for i, s in enumerate(sizes)})
    a, b, c, d = noise(4)
    interaction = dict(enumerate(a - b - (c - d) + shift * 2 * NOISE))
    ratio = dict(enumerate(np.log(np.exp(luck + noise() + shift * NOISE) / np.exp(luck))))
    tests = [pair, *(mean_over_seeds(values) for values in (trend, interaction, ratio))]
    return [Evidence(what="x", test=test, expected=1, show=NATS) for test in tests]


def test_a_suite_without_effects_gives_a_verdict_in_5_percent():
    rng, suites = np.random.default_rng(0), 1500
    wrong = sum(any(e.verdict(TESTS) in (CONFIRMED, REFUTED) for e in suite(rng)) for _ in range(suites))
    assert 0.03 <= wrong / suites <= 0.07


def test_the_effect_that_a_row_names_is_found_in_80_percent():
    rng, suites = np.random.default_rng(1), 1000
    effect = power.detectable(0.05 / TESTS, N - 1)
    found = np.array([[e.verdict(TESTS) == CONFIRMED for e in suite(rng, effect)] for _ in range(suites)])
    assert found.mean(axis=0) == pytest.approx([power.POWER] * TESTS, abs=0.05)
    half = np.mean([[e.verdict(TESTS) == CONFIRMED for e in suite(rng, effect / 2)] for _ in range(suites)])
    assert half == pytest.approx(power.superiority(effect / 2, 0.05 / TESTS, N - 1), abs=0.05)


def test_equivalence_errs_in_5_percent_at_the_margin_and_holds_in_80_percent_at_zero():
    rng, alpha = np.random.default_rng(2), 0.05
    margin = NOISE / math.sqrt(N) * power.detectable_margin(alpha, N - 1)
    for mean, expected, apart in ((0.0, power.POWER, 0.05), (margin, alpha, 0.02), (-margin, alpha, 0.02)):
        verdicts = [evidence(rng.normal(mean, NOISE, N), expected=0, margin=margin).verdict(1) for _ in range(1500)]
        assert verdicts.count(CONFIRMED) / 1500 == pytest.approx(expected, abs=apart)


def test_a_spread_at_its_limit_gives_a_verdict_in_5_percent():
    rng = np.random.default_rng(3)
    draws = (Spread.of(list(rng.normal(5, 0.05, N)), limit=0.05) for _ in range(1500))
    verdicts = [Evidence(what="x", test=draw, expected=-1, show=NATS).verdict(1) for draw in draws]
    assert 1 - verdicts.count(UNDECIDED) / 1500 == pytest.approx(0.05, abs=0.02)
