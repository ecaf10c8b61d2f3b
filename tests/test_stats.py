"""Numbers worked by hand or from tables, and SciPy where it has the same test; error rates by simulation."""

import math

import numpy as np
import pytest
import scipy.stats

from analysis import plots
from analysis.runs import group_seeds, load_run, representative
from analysis.stats import (
    OVER_SEEDS,
    PAIRED,
    WELCH,
    balance,
    best_rate,
    compare,
    difference,
    family,
    first_reaching,
    hedges_g,
    holm,
    largest_spike,
    learning_rate_tolerance,
    mean_over_seeds,
    median_time,
    slope,
    spread_factors,
    t_interval,
    tail_index,
    thin,
)
from bench.synthetic import write_run

A, B = {0: 5.0, 1: 7.0, 2: 6.0}, {0: 4.0, 1: 5.0, 2: 3.0}  # differences 1, 2, 3


def test_the_t_interval_is_scipys():
    a = [3.3154, 3.3098, 3.2927]
    mean, low, high = t_interval(a)
    assert (low, high) == pytest.approx(scipy.stats.t.interval(0.95, 2, loc=np.mean(a), scale=scipy.stats.sem(a)))
    assert high - mean == pytest.approx(4.302653 * np.std(a, ddof=1) / 3**0.5, rel=1e-6)
    half = 4.3027 * 2 / math.sqrt(3)  # the t table's 0.975 quantile with 2 degrees of freedom
    assert t_interval([2.0, 4.0, 6.0]) == pytest.approx((4, 4 - half, 4 + half), abs=1e-3)
    assert np.isnan(t_interval([1.0])[1])
    assert np.isnan(t_interval([])[0])


def test_groups_are_pooled_over_seeds_alone(tmp_path):
    runs = [load_run(write_run(tmp_path / f"{i}", seed=i, final=3 + i)) for i in range(2)]
    runs.append(load_run(write_run(tmp_path / "lr", lr=0.04)))
    runs.append(load_run(write_run(tmp_path / "elsewhere", seed=5, log_every=3, device_name="gpu", final=4.0)))
    groups = group_seeds([*runs, runs[0]])
    assert [[run.name for run in group.runs] for group in groups] == [["0", "1", "elsewhere"], ["lr"]]
    assert compare(*groups).difference == pytest.approx(np.mean([3, 4, 4]) - 3)
    assert plots.run_labels(runs) == [
        "Muon, lr 0.02, seed 0",
        "Muon, lr 0.02, seed 1",
        "Muon, lr 0.04",
        "Muon, lr 0.02, seed 5",
    ]


def test_representatives_are_the_best_of_each_optimizer_in_their_order(tmp_path):
    losses = [("muon", 0.1, 3.0), ("muon", 0.2, 2.9), ("adamw", 0.1, 3.5), ("adamw", 0.2, 3.4), ("muon", 0.3, 2.95)]
    runs = [load_run(write_run(tmp_path / f"{o}{lr}", optimizer=o, lr=lr, final=loss)) for o, lr, loss in losses]
    names = [group.runs[0].name for group in representative(group_seeds(runs), 3)]
    assert names == ["muon0.2", "adamw0.2", "muon0.3"]


def test_first_reaching_interpolates_and_knows_never():
    x, loss = np.array([0.0, 10.0, 20.0]), np.array([5.0, 4.0, 3.0])
    assert first_reaching(x, loss, 3.5) == 15.0
    assert first_reaching(x, loss, 5.0) == 0.0
    assert first_reaching(x, loss, 2.9) is None


def test_tolerance_interpolates_in_the_logarithm_and_tells_an_open_end():
    found = learning_rate_tolerance([1e-3, 1e-2, 1e-1], [3.2, 3.0, float("nan")], share=0.1 / 3)
    assert found.best == pytest.approx(1e-2)
    assert found.low == pytest.approx(10**-2.5)
    assert (found.high, found.open_low, found.open_high) == (pytest.approx(1e-2), False, False)
    open_ended = learning_rate_tolerance([1e-3, 1e-2, 1e-1], [3.01, 3.0, 3.3], share=0.05)
    assert (open_ended.low, open_ended.open_low, open_ended.open_high) == (1e-3, True, False)
    assert open_ended.decades == pytest.approx(1 + 0.5)  # 3.15 is half-way between 3.0 and 3.3
    assert learning_rate_tolerance([1e-3, 1e-2], [3.05, 3.0]).best == 1e-2
    assert learning_rate_tolerance([1e-3, 1e-2], [float("nan")] * 2) is None


def test_long_curves_are_thinned_by_means_and_spikes_are_measured(tmp_path):
    x, y = thin(np.arange(7.0), np.array([0, 2, 4, 6, 8, 10, 12.0]), most=3)
    np.testing.assert_allclose(x, [1, 4, 6])
    np.testing.assert_allclose(y, [2, 8, 12])
    run = load_run(write_run(tmp_path / "run"))
    run.train["train_loss"][:] = [5, 4, 4.5, 3, 3.2, 2, 2.9, 1, 1, 1]
    assert largest_spike(run) == pytest.approx(0.9)


def test_the_paired_test_by_hand():
    test = difference(A, B)
    half = 4.3027 / math.sqrt(3)  # standard deviation 1
    assert (test.difference, test.low, test.high) == pytest.approx((2.0, 2 - half, 2 + half), abs=1e-3)
    freedom, t = 2, 2 * math.sqrt(3)
    assert test.p_value == pytest.approx(1 - t / math.sqrt(freedom + t**2))  # the t distribution with 2 degrees
    assert (test.test, test.n) == (PAIRED, (3, 3))


def test_pairing_is_by_seed_not_by_order():
    assert difference(A, {2: 3.0, 0: 4.0, 1: 5.0}) == difference(A, B)


def test_other_seeds_get_welchs_test_by_hand():
    a, b = {0: 3.1, 1: 2.9, 2: 3.4, 3: 3.3}, {0: 2.5, 1: 2.9, 7: 2.0}
    test = difference(a, b)
    va, vb = (np.var(list(side.values()), ddof=1) / len(side) for side in (a, b))
    freedom = (va + vb) ** 2 / (va**2 / 3 + vb**2 / 2)
    half = scipy.stats.t.ppf(0.975, freedom) * math.sqrt(va + vb)
    gap = np.mean(list(a.values())) - np.mean(list(b.values()))
    assert (test.difference, test.low, test.high) == pytest.approx((gap, gap - half, gap + half))
    assert test.p_value == pytest.approx(2 * scipy.stats.t.sf(gap / math.sqrt(va + vb), freedom))
    assert (test.test, test.n) == (WELCH, (4, 3))


@pytest.mark.filterwarnings("error")
def test_without_spread_there_is_no_p_value():
    assert not difference({0: 1.0, 1: 1.0}, {2: 2.0, 3: 2.0}).tested
    one_side = difference({0: 1.0, 1: 1.0}, {2: 2.0, 3: 2.1})
    assert one_side.p_value == pytest.approx(scipy.stats.ttest_1samp([2.0, 2.1], 1.0).pvalue)
    constant = difference({0: 3.0, 1: 3.1, 2: 3.3}, {0: 3.5, 1: 3.6, 2: 3.8})  # -0.5 but for rounding
    assert (constant.low, constant.high) == pytest.approx((-0.5, -0.5))
    assert not constant.tested


@pytest.mark.filterwarnings("error")
def test_conditions_that_did_the_same_are_not_different():
    same = difference(A, dict(A))
    assert (same.difference, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert not family([("a", "b", A, dict(A))])[0].excludes_zero


def test_one_seed_is_not_tested():
    (test,) = family([("a", "b", {0: 1.0}, {0: 2.0})])
    assert test.difference == -1.0
    assert not test.tested
    assert not test.excludes_zero
    assert math.isnan(test.p_holm)


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
        (alone.high - alone.low) * scipy.stats.t.ppf(1 - 0.05 / 8, 2) / scipy.stats.t.ppf(0.975, 2)
    )
    assert (with_others.low, with_others.p_holm) == pytest.approx((four.low, four.p_holm))
    assert four.p_holm == pytest.approx(4 * alone.p_value)


def test_unpaired_seeds_fall_back_on_welch():
    (test,) = family([("a", "b", A, {0: 4.0, 1: 5.0, 7: 3.0})])
    assert not test.paired
    expected = scipy.stats.ttest_ind([5, 7, 6], [4, 5, 3], equal_var=False).pvalue
    assert test.p_value == test.p_welch == pytest.approx(expected)


def test_a_diverged_seed_is_left_out_and_unpairs():
    (test,) = family([("a", "b", A | {2: math.nan}, B)])
    assert test.n == (2, 3)
    assert not test.paired


def test_median_time_with_censoring_by_hand():
    # 4 runs: at 2 one in 4 is there, at 3 one of the 3 that are left: S = 3/4 x 2/3 = 1/2
    found = median_time([2.0, None, 3.0, None])
    assert (found.n, found.never, found.median) == (4, 2, 3.0)
    assert median_time([2.0, None, 3.0]).median == 3.0  # S(2) = 2/3, S(3) = 1/3
    assert median_time([2.0, None, None]).median is None
    assert median_time([None]).never == 1
    assert median_time([]).median is None


def test_the_best_rate_is_the_vertex_of_a_parabola_in_the_logarithm():
    rates = [0.01, 0.1, 1.0, 10.0]
    losses = [(math.log10(rate) + 0.7) ** 2 for rate in rates]
    assert best_rate(rates, losses) == pytest.approx(10**-0.7)
    assert best_rate(rates[::-1], losses[::-1]) == pytest.approx(10**-0.7)
    assert best_rate(rates, [1.0, 2.0, 3.0, 4.0]) == pytest.approx(0.01)  # on the edge
    assert best_rate(rates, [math.nan, 2.0, 3.0, 4.0]) == pytest.approx(0.1)  # next to a diverged run


def test_the_tail_index_is_hills():
    assert tail_index(np.ones(40)) == 0.0
    s = [32.0, 16.0, 8.0, 4.0, 2.0, 1.0, 0.5]  # of the largest five over the sixth: log 2 x (5 + 4 + 3 + 2 + 1) / 5
    assert tail_index(s) == pytest.approx(3 * math.log(2))
    pareto = scipy.stats.pareto.ppf((np.arange(20_000) + 0.5) / 20_000, 2.5)
    assert tail_index(pareto) == pytest.approx(1 / 2.5, rel=0.01)
    assert math.isnan(tail_index([1.0] * 5))


def test_the_balance_of_experts_by_hand():
    even = balance([0.25] * 4)
    assert (even.evenness, even.max_over_mean, even.dead) == (pytest.approx(1.0), pytest.approx(1.0), 0)
    found = balance([4.0, 2.0, 2.0, 0.0])  # a half, two quarters, none: 1.5 bits of 2
    assert (found.evenness, found.max_over_mean, found.dead) == (pytest.approx(0.75), pytest.approx(2.0), 1)
    assert balance([0.9, 0.09, 0.01]).dead == 1  # 3 % of an even share


def test_the_interval_of_a_spread_is_that_of_chi_square():
    expected = math.sqrt(2 / 7.3778), math.sqrt(2 / 0.050636)  # of the table, two degrees of freedom
    assert spread_factors(2, 0.95) == pytest.approx(expected, rel=1e-4)


def test_the_standard_error_gives_the_interval_at_any_confidence():
    for b in (B, {0: 4.0, 1: 5.0, 7: 3.5}):
        test, wide = difference(A, b), difference(A, b, 0.995)
        assert test.interval(0.95) == pytest.approx((test.low, test.high))
        assert test.interval(0.995) == pytest.approx((wide.low, wide.high))
    assert difference(A, B).error == pytest.approx(1 / math.sqrt(3))
    alone = mean_over_seeds({0: 1.0, 1: 2.0, 2: 3.0})
    assert (alone.test, alone.n) == (OVER_SEEDS, (3, 3))
    assert alone.p_value == pytest.approx(scipy.stats.ttest_1samp([1, 2, 3], 0).pvalue)


def test_slope_of_a_line_in_the_logarithm():
    values = {10.0: {0: 1.0, 1: 3.0}, 100.0: {0: 1.5, 1: 3.0}, 1000.0: {0: 2.0, 1: 3.0, 2: 0.0}}
    assert slope(values) == pytest.approx({0: 0.5, 1: 0.0})
    assert slope({0.0: {0: 1.0}, 0.1: {0: 1.5}, 0.2: {0: 2.0}}, scale=np.asarray) == pytest.approx({0: 5.0})


def simulated_suite(rng, lead):
    """Four sizes, three seeds; what a seed's batches do to a run, they do to it under both optimizers."""
    pairs = []
    for size in range(4):
        luck = rng.normal(0, 0.05, 3)
        muon, adamw = (dict(enumerate(5 + luck + rng.normal(mean, 0.01, 3))) for mean in (-lead, 0.0))
        pairs.append((f"muon {size}", f"adamw {size}", muon, adamw))
    return pairs


def test_two_identical_optimizers_are_told_apart_in_5_percent_of_suites():
    rng, suites = np.random.default_rng(0), 1000
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


def test_runs_of_before_and_after_a_new_setting_are_seeds_of_one_group(tmp_path):
    folders = [write_run(tmp_path / "old"), write_run(tmp_path / "new", seed=1, left_lr=None, doc_mask=False)]
    folders.append(write_run(tmp_path / "other", seed=2, left_lr=0.1))
    groups = group_seeds([load_run(folder) for folder in folders])
    assert [len(group.runs) for group in groups] == [2, 1]
