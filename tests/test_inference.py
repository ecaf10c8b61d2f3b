"""Numbers worked by hand or taken from tables, and SciPy where it has the same test; error rates by simulation."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from analysis.stats import family, hedges_g, holm, median_time, paired, slope, summarize, welch

A, B = {0: 5.0, 1: 7.0, 2: 6.0}, {0: 4.0, 1: 5.0, 2: 3.0}  # differences 1, 2, 3


def test_summary_by_hand():
    s = summarize([2.0, 4.0, 6.0])
    assert (s.n, s.mean, s.deviation) == (3, 4.0, 2.0)
    half = 4.3027 * 2 / math.sqrt(3)  # the t table's 0.975 quantile with 2 degrees of freedom
    assert (s.low, s.high) == pytest.approx((4 - half, 4 + half), abs=1e-3)
    assert math.isnan(summarize([2.0]).deviation)
    assert math.isnan(summarize([2.0]).low)
    assert summarize([]).n == 0


def test_paired_test_by_hand_and_by_scipy():
    mean, low, high, p = paired(A, B)
    half = 4.3027 / math.sqrt(3)  # standard deviation 1
    assert (mean, low, high) == pytest.approx((2.0, 2 - half, 2 + half), abs=1e-3)
    assert p == pytest.approx(scipy_stats.ttest_rel([5, 7, 6], [4, 5, 3]).pvalue)
    assert p == pytest.approx(0.0742, abs=1e-4)


def test_pairing_is_by_seed_not_by_order():
    assert paired(A, {2: 3.0, 0: 4.0, 1: 5.0}) == paired(A, B)
    with pytest.raises(ValueError, match="do not pair"):
        paired(A, {0: 4.0, 1: 5.0, 3: 3.0})


def test_conditions_that_did_the_same_are_not_different():
    assert paired(A, dict(A)) == (0.0, 0.0, 0.0, 1.0)
    assert not family([("a", "b", A, dict(A))])[0].excludes_zero


def test_one_seed_is_not_tested():
    (test,) = family([("a", "b", {0: 1.0}, {0: 2.0})])
    assert test.difference == -1.0
    assert not test.tested
    assert not test.excludes_zero
    assert math.isnan(test.p_holm)


def test_welch_is_scipys():
    a, b = [3.1, 2.9, 3.4, 3.3], [2.5, 2.9, 2.0]
    ours, theirs = welch(a, b), scipy_stats.ttest_ind(a, b, equal_var=False)
    interval = theirs.confidence_interval()
    assert ours[1:] == pytest.approx((interval.low, interval.high, theirs.pvalue))


def test_holm_by_hand():
    # 0.005 x 4, 0.01 x 3, 0.03 x 2, then 0.04 x 1, which may not fall below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    found = holm([0.02, math.nan, 0.03])
    assert found[0] == pytest.approx(0.04)
    assert math.isnan(found[1])


def test_effect_size_by_hand():
    # pooled standard deviation 1, difference 2; the table's correction for 4 degrees of freedom is 0.7979
    assert hedges_g([4.0, 5.0, 6.0], [2.0, 3.0, 4.0]) == pytest.approx(2 * 0.7979, abs=1e-4)
    assert math.isnan(hedges_g([1.0], [2.0, 3.0]))


def test_a_family_widens_its_intervals_and_counts_tests_made_elsewhere():
    pair = ("a", "b", A, B)
    alone, (four, *_) = family([pair])[0], family([pair] * 4)
    with_others = family([pair], others=3)[0]
    assert four.high - four.low == pytest.approx(
        (alone.high - alone.low) * scipy_stats.t.ppf(1 - 0.05 / 8, 2) / scipy_stats.t.ppf(0.975, 2)
    )
    assert (with_others.low, with_others.p_holm) == pytest.approx((four.low, four.p_holm))
    assert four.p_holm == pytest.approx(4 * alone.p)


def test_unpaired_seeds_fall_back_on_welch():
    (test,) = family([("a", "b", A, {0: 4.0, 1: 5.0, 7: 3.0})])
    assert math.isnan(test.p_paired)
    assert test.p == pytest.approx(scipy_stats.ttest_ind([5, 7, 6], [4, 5, 3], equal_var=False).pvalue)


def test_a_diverged_seed_is_left_out_and_unpairs():
    (test,) = family([("a", "b", A | {2: math.nan}, B)])
    assert test.n == (2, 3)
    assert math.isnan(test.p_paired)


def test_median_time_with_censoring_by_hand():
    # 4 runs: at 2 one in 4 is there, at 3 one of the 3 that are left: S = 3/4 x 2/3 = 1/2
    found = median_time([2.0, None, 3.0, None])
    assert (found.n, found.never, found.median) == (4, 2, 3.0)
    assert median_time([2.0, None, 3.0]).median == 3.0  # S(2) = 2/3, S(3) = 1/3
    assert median_time([2.0, None, None]).median is None
    assert median_time([None]).never == 1
    assert median_time([]).median is None


def test_slope_of_a_line_in_the_logarithm():
    values = {10.0: {0: 1.0, 1: 3.0}, 100.0: {0: 1.5, 1: 3.0}, 1000.0: {0: 2.0, 1: 3.0, 2: 0.0}}
    assert slope(values) == pytest.approx({0: 0.5, 1: 0.0})


def simulated_suite(rng, lead):
    """Four sizes, three seeds; what a seed's batches do to a run, they do to it under both optimizers."""
    pairs = []
    for size in range(4):
        luck = rng.normal(0, 0.05, 3)
        muon, adamw = (dict(enumerate(5 + luck + rng.normal(mean, 0.01, 3))) for mean in (-lead, 0.0))
        pairs.append((f"muon {size}", f"adamw {size}", muon, adamw))
    return pairs


def test_two_identical_optimizers_are_told_apart_in_5_percent_of_suites():
    rng, suites = np.random.default_rng(0), 2000
    by_holm = by_interval = 0
    for _ in range(suites):
        tests = family(simulated_suite(rng, 0.0))
        by_holm += any(test.p_holm < 0.05 for test in tests)
        by_interval += any(test.excludes_zero for test in tests)
    assert 0.03 <= by_holm / suites <= 0.07
    assert 0.03 <= by_interval / suites <= 0.07


def test_a_real_lead_is_found():
    rng = np.random.default_rng(1)
    found = [family(simulated_suite(rng, 0.2)) for _ in range(50)]
    assert np.mean([test.excludes_zero for tests in found for test in tests]) > 0.9
    assert all(test.difference < 0 for tests in found for test in tests)
