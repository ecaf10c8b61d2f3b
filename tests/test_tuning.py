"""What trials tell: drawn evenly from declared spaces, the best to expect of k, effects of settings and edges."""

import itertools
import json
import math

import numpy as np
import pytest

from suites.arms import ARMS, Axis, draw
from suites.tuning import Effect, band, effect, expected_best, lead, trials_needed


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
def test_more_trials_contain_the_fewer_and_lie_evenly_in_the_declared_range(arm):
    many, few = draw(arm, 64), draw(arm, 24)
    assert many[:24] == few
    assert len({json.dumps(trial) for trial in many}) == 64
    for setting, axis in arm.space.items():
        values = [trial[setting] for trial in many]
        assert axis.low <= min(values) < max(values) <= axis.high, setting
        quarters = np.histogram([axis.place(value) for value in values], bins=4, range=(0, 1))[0]
        assert max(quarters) - min(quarters) <= 4, setting  # 16 in each, but for the rounding
        tuned = [1 - value if "1 - value" in axis.along else value for value in values]
        assert [float(f"{value:.3g}") for value in tuned] == pytest.approx(tuned, rel=1e-6)


def test_axes_are_even_in_what_they_say():
    assert Axis(0.01, 1.0).value(0.5) == pytest.approx(0.1)
    assert Axis(0.0, 0.3, "value").value(0.5) == pytest.approx(0.15)
    assert Axis(0.9, 0.999, "log of 1 - value").value(0.5) == pytest.approx(0.99)
    assert Axis(0.9, 0.999, "log of 1 - value").value(0.9) == pytest.approx(1 - 0.00158, abs=1e-9)
    assert Axis(0.9, 0.999, "log of 1 - value").place(0.99) == pytest.approx(0.5)
    edges = [Axis(0.01, 1.0).on_edge(value) for value in (0.0119, 0.0135, 0.75, 0.85)]
    assert edges == [True, False, False, True]


def test_the_space_of_adamw_reaches_the_best_public_settings():
    space = ARMS["adamw"].space
    for setting, value in {"weight_decay": 1.0, "beta1": 0.9, "beta2": 0.9}.items():
        assert not space[setting].on_edge(value), setting


def test_the_expected_best_is_the_mean_over_every_choice_of_trials():
    values = [3.1, 2.9, 3.3, 3.3, 4.0, 2.95]
    curve = expected_best(values)
    for k in range(1, 7):
        chosen = [min(some) for some in itertools.combinations(values, k)]
        assert curve[k - 1] == pytest.approx(sum(chosen) / len(chosen), rel=1e-12)
    assert trials_needed(values, 3.0) == 1 + next(i for i, value in enumerate(curve) if value <= 3.0)
    assert trials_needed(values, 2.0) is None


def test_the_band_of_one_trial_is_that_of_a_mean():
    values = np.random.default_rng(1).normal(3.0, 0.2, 40)
    low, high = band(values)
    half = 1.96 * values.std() / math.sqrt(40)  # of a mean of 40 resampled values
    assert (low[0], high[0]) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.006)
    curve = expected_best(values)[:20]
    assert len(low) == len(high) == 20  # beyond half of the trials no draw is low enough
    assert (low <= curve).all()
    assert (curve <= high).all()


def test_the_lead_of_the_best_trial_is_that_of_a_bootstrap_with_a_known_law():
    mine, theirs = [1.0, 2.0, 2.0], [1.5, 3.0, 3.0]  # a draw of three has the best of its arm unless all miss it
    found, miss = lead(mine, theirs), (2 / 3) ** 3
    assert found.by_k == pytest.approx([np.mean(theirs) - np.mean(mine), (3 + 3) / 3 - (2 + 2) / 3 + 0 * miss, 0.5])
    assert found.lower == pytest.approx(1 - miss * (1 - miss), abs=0.02)  # behind where only mine misses its best
    assert (found.low, found.high) == (-0.5, 2.0)


def test_the_effect_of_a_setting_is_of_ranks_and_thirds_against_noise():
    values = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    losses = [5.0, 5.1, 4.9, 3.0, 3.1, 2.9, 4.0, 4.1, 99.0]  # best in the middle, one outlier
    found = effect(values, losses)
    ranks = np.argsort(np.argsort(losses))
    assert found.rho == pytest.approx(np.corrcoef(range(9), ranks)[0, 1])
    assert found.nats == pytest.approx(5.0 - 3.0)
    assert math.isnan(effect([1, 1, 1], [1, 2, 3]).rho)
    every = []
    for first in itertools.combinations(range(9), 3):
        rest = [i for i in range(9) if i not in first]
        for second in itertools.combinations(rest, 3):
            third = [i for i in rest if i not in second]
            medians = [sorted(losses[i] for i in some)[1] for some in (first, second, third)]
            every.append(max(medians) - min(medians))
    assert found.noise == pytest.approx(np.mean(every), abs=4 * np.std(every) / math.sqrt(2000))


def test_an_edge_is_told_only_where_the_loss_falls_significantly_towards_it():
    axis = Axis(0.01, 1.0)

    def edge(value, rho, p_holm):
        return Effect(rho, 0.001, 1.0, 0.5, p_holm).edge(axis, value)

    assert edge(0.011, 0.6, 0.01) == edge(0.95, -0.6, 0.01) == "ON THE EDGE"
    chance = {edge(0.011, 0.6, 0.06), edge(0.011, -0.6, 0.01), edge(0.95, 0.6, 0.01), edge(0.95, math.nan, math.nan)}
    assert chance == {"near an end, maybe by chance"}
    assert edge(0.017, 0.6, 0.01) == edge(0.6, -0.6, 0.01) == "ON THE EDGE"  # at 12 and 89 % of the axis
    assert {edge(0.1, 0.9, 0.001), edge(0.6, -0.6, 0.06), edge(0.6, 0.6, 0.01), edge(0.45, -0.9, 0.01)} == {"inside"}
