import numpy as np
import pytest
import scipy.stats

from analysis import plots
from analysis.runs import group_seeds, load_run, representative
from analysis.stats import compare, first_reaching, largest_spike, learning_rate_tolerance, t_interval, thin, welch
from bench.synthetic import write_run


def test_t_interval_and_welch_equal_scipy():
    a, b = [3.3154, 3.3098, 3.2927], [3.3610, 3.3669, 3.3645, 3.35]
    mean, low, high = t_interval(a)
    assert (low, high) == pytest.approx(scipy.stats.t.interval(0.95, 2, loc=np.mean(a), scale=scipy.stats.sem(a)))
    assert high - mean == pytest.approx(4.302653 * np.std(a, ddof=1) / 3**0.5, rel=1e-6)
    expected = scipy.stats.ttest_ind(a, b, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert welch(a, b) == pytest.approx((np.mean(a) - np.mean(b), interval.low, interval.high, expected.pvalue))
    assert np.isnan(t_interval([1.0])[1])
    assert np.isnan(welch([1.0], b)[1:]).all()
    assert np.isnan(welch([1.0, 1.0], [2.0, 2.0])[3])


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
    assert open_ended.decades == pytest.approx(1 + 0.5)  # 3.15 lies half-way between 3.0 and 3.3
    assert not open_ended.at_edge
    assert learning_rate_tolerance([1e-3, 1e-2], [3.05, 3.0]).at_edge
    assert learning_rate_tolerance([1e-3, 1e-2], [float("nan")] * 2) is None


def test_long_curves_are_thinned_by_means_and_spikes_are_measured(tmp_path):
    x, y = thin(np.arange(7.0), np.array([0, 2, 4, 6, 8, 10, 12.0]), most=3)
    np.testing.assert_allclose(x, [1, 4, 6])
    np.testing.assert_allclose(y, [2, 8, 12])
    run = load_run(write_run(tmp_path / "run"))
    run.train["train_loss"][:] = [5, 4, 4.5, 3, 3.2, 2, 2.9, 1, 1, 1]
    assert largest_spike(run) == pytest.approx(0.9)
