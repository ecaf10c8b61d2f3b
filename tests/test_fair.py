"""The fair fight: equal trials, equal time, the ways to win, and both pages from fake runs."""

import dataclasses
import itertools
import json
import math
import re
import shutil

import numpy as np
import pytest
from scipy import stats

import experiments
from bench.synthetic import write_run
from engine.cli import BadInput
from settings import Settings
from suites import fair_page, fair_plots, fair_ways, launcher
from suites import results as results_module
from suites.arms import ARMS, Arm, draw, value_of
from suites.catalog import SUITES
from suites.fair import FIGHT, TRIALS, equal_time
from suites.planner import Planner, Selection, unique
from suites.scales import SCALES
from suites.tuning import effects, losses
from tests.test_suites import winners


@pytest.mark.parametrize("scale", SCALES)
def test_every_arm_has_as_many_trials_on_the_same_budget(scale):
    conditions = SUITES[TRIALS].plan(SCALES[scale], winners)
    by_arm = {arm: [c for c in conditions if c.arm == arm] for arm in ("adamw", "muon")}
    assert [len(own) for own in by_arm.values()] == [32, 32]
    tuned = {setting for arm in ARMS.values() for setting in arm.space} | {"optimizer"}
    rest = {json.dumps({k: v for k, v in c.fields.items() if k not in tuned}) for c in conditions}
    assert len(rest) == 1
    assert all(Settings(**c.fields).steps == (128 if scale == "nano" else 123) for c in conditions)


def test_equal_time_gives_each_arm_the_steps_of_the_slowest_ones_time():
    seconds = {"muon": 2e-4, "adamw": 1.6e-4, "sgd": 1e-4}
    steps = equal_time(100, seconds)
    assert steps == {"muon": 100, "adamw": 125, "sgd": 200}
    for arm, own in steps.items():
        assert own * seconds[arm] == pytest.approx(100 * 2e-4)
    fields = {c.name: c.fields for c in SUITES[FIGHT].plan(SCALES["nano"], winners)}
    assert {name: f["tokens"] // 2048 for name, f in fields.items()} == {
        "adamw, equal tokens": 128,
        "muon, equal tokens": 128,
        "adamw, equal time": 160,
        "muon, equal time": 128,
    }


def fake_training(job):
    """What train.py would leave: the loss has an optimum in rate and decay, Muon's steps take longer and it diverges
    above a rate of 0.15."""
    words = job.command()[2:]
    flags = {k[2:].replace("-", "_"): v for k, v in itertools.pairwise(words) if k.startswith("--")}
    steps, seed, muon = job.steps, int(flags.get("seed", 0)), flags.get("optimizer", "muon") == "muon"
    numbers = {
        key: float(flags[key]) for key in ("adamw_lr", "weight_decay", "warmup", "beta1", "beta2") if key in flags
    }
    lr = numbers["lr"] = float(flags["lr"])
    final = 3 + loss_above_best(muon, lr, numbers.get("weight_decay", 0.5)) + 0.01 * (seed * (7 if muon else 3) % 5)
    final += 0.3 * (not muon) - 0.001 * (steps - 128) + 0.5 * ("--no-nesterov" in words)
    state = "failed" if muon and lr > 0.15 else "finished"
    settings = {"optimizer": flags.get("optimizer", "muon"), "seed": seed, "batch_tokens": 2048} | numbers
    ms = {True: 100.0, False: 80.0}[muon] if seed else 90.0  # a trial's speed, of seed 0, is not the fight's
    write_run(job.folder, final=final, steps=steps, status=state, spectra=False, step_ms=ms, by_token=True, **settings)
    reason = "step 7: loss nan, gradient norm nan" if state == "failed" else None
    summary = json.loads((job.folder / "summary.json").read_text()) | {"final_val_loss": final, "reason": reason}
    (job.folder / "summary.json").write_text(json.dumps(summary))


def loss_above_best(muon, lr, decay):
    return 0.3 * abs(math.log10(lr / (0.03 if muon else 0.003))) + 0.1 * abs(math.log10(decay / 0.5))


@pytest.fixture
def fight(tmp_path, shards_folder, run_main, monkeypatch):
    """run(command, suite, *flags) with a training that writes its run at once; returns exit code, output, errors, and
    the runs that were trained."""
    trained = []

    def run_here(jobs, slots, later, keep_checkpoints):
        for job in jobs:
            if job.state() not in launcher.OVER:
                trained.append(job.name)
                fake_training(job)

    def run(command, suite, *flags):
        where = ("--scale", "nano", "--runs-dir", tmp_path / "runs", "--data", shards_folder)
        code, out, err = run_main(experiments.main, command, suite, *where, *flags)
        return code, out, err, trained

    monkeypatch.setattr(experiments, "run_here", run_here)
    return run


def plan_of(runs, shards_folder, **chosen):
    return Planner(Selection(suite=FIGHT, scale="nano", runs_dir=runs, data=shards_folder, **chosen))


FLAGS, SAME = ("--trials", 8, "--seeds", 1, 2, 3, 4), {"trials": 8, "seeds": (1, 2, 3, 4)}


@pytest.fixture(scope="module")
def fought(tmp_path_factory, shards_folder):
    """The folder of a fight that is over."""
    runs = tmp_path_factory.mktemp("fought")
    for name in (TRIALS, FIGHT, FIGHT):  # equal time is planned when equal tokens are over
        for job in unique(plan_of(runs, shards_folder, **SAME).plan(name)):
            if job.state() not in launcher.OVER:
                fake_training(job)
    return runs


def test_a_fight_is_trained_in_two_stages_and_each_arm_fights_with_its_best_trial(fight, tmp_path, shards_folder):
    later = plan_of(tmp_path / "runs", shards_folder).estimate([[FIGHT]])  # six seeds
    assert (later.runs, later.tokens) == (18, 6 * 2048 * (2 * 128 + 141))  # as if the second arm were a tenth faster
    failed = sum(trial["lr"] > 0.15 for trial in draw(ARMS["muon"], 8))
    code, out, err, trained = fight("run", FIGHT, *FLAGS)
    assert code == 0, out + err
    assert failed
    assert f"{failed} of 16 trials diverged, which counts as the worst loss" in out
    assert "failed: " not in out
    assert [line for line in out.splitlines() if line.endswith("to go")] == [
        "fair-trials: 16 runs, 16 to go",
        "fair-fight: 8 runs, 8 to go",
        "fair-fight: 12 runs, 4 to go",  # Muon's runs of equal time are those of equal tokens
    ]
    assert len(trained) == len(set(trained)) == 28
    seeds = [name.rpartition("-seed")[2] for name in trained[16:]]
    assert seeds == [seed for seed in "1234" for _ in range(2)] + [*"1234"]  # the arms in turns, then equal time
    fight("run", FIGHT, *FLAGS)
    assert len(trained) == 28
    plan = plan_of(tmp_path / "runs", shards_folder, **SAME)
    assert plan.seeds(TRIALS) == (0,)
    for name, muon in (("muon", True), ("adamw", False)):
        kept = [t for t in draw(ARMS[name], 8) if not muon or t["lr"] <= 0.15]
        best = min(kept, key=lambda t, muon=muon: loss_above_best(muon, t["lr"], t["weight_decay"]))
        for p in plan.plan(FIGHT):
            if p.condition.arm == name:
                assert {k: v for k, v in p.condition.fields.items() if k in best} == best
    steps = {p.condition.name: p.condition.fields["tokens"] // 2048 for p in plan.plan(FIGHT)}
    assert (steps["adamw, equal tokens"], steps["adamw, equal time"], steps["muon, equal time"]) == (128, 160, 128)


def test_the_ways_to_win_are_paired_and_corrected_together(fought, shards_folder):
    results = plan_of(fought, shards_folder, **SAME).results(FIGHT)
    by_name = {way.name: way for way in fair_ways.ways(results)}
    mine, theirs = (results.outcome(f"{arm}, equal tokens").losses() for arm in ("muon", "adamw"))
    gaps = np.array([mine[seed] - theirs[seed] for seed in (1, 2, 3, 4)])
    half = stats.t.ppf(1 - 0.05 / 4 / 2, 3) * gaps.std(ddof=1) / 2  # four tests, four pairs
    first = by_name["equal tokens"]
    assert (first.test.low, first.test.high) == pytest.approx((gaps.mean() - half, gaps.mean() + half))
    assert first.winner == "muon"
    said, gap = fair_ways.fight_findings(results, {}), -gaps.mean()
    assert said[0].startswith(
        f"Muon wins in 3 of 4 ways. A model of 1k parameters, trained on 262k tokens (128 steps, 1 CPU thread), ends "
        f"with a loss {gap:.3f} nats lower with Muon than with AdamW; Muon reaches AdamW's loss with "
    )
    assert said[1].startswith(
        f"Equal tokens: Muon ends {gap:.3f} nats lower ({gap - half:.3f} to {gap + half:.3f}), p "
    )
    assert said[5] == "Given these settings: the intervals (95 %) and p values are over 4 seeds, corrected for 4 tests."
    worse = dataclasses.replace(first, arm=first.reference, reference=first.arm)
    worse = dataclasses.replace(worse, test=dataclasses.replace(first.test, difference=0.2, low=-0.1, high=0.5))
    assert "AdamW ends 0.200 nats higher (-0.100 to 0.500), p " in fair_ways.outcome_words(worse)
    assert by_name["equal time"].test.difference == pytest.approx(gaps.mean() + 0.001 * 32)
    # Losses fall linearly from 5, so the share of the budget to the loss of the same seed follows by hand.
    logs = np.log([(5 - mine[seed]) / (5 - theirs[seed]) for seed in (1, 2, 3, 4)])
    half = stats.t.ppf(1 - 0.05 / 4 / 2, 3) * logs.std(ddof=1) / 2
    for name, faster in (("tokens to the loss", 1.0), ("seconds to the loss", 80 / 100)):
        bounds = faster * np.exp([logs.mean(), logs.mean() - half, logs.mean() + half])
        assert by_name[name].ratio() == pytest.approx(tuple(bounds), rel=1e-6)


def test_both_pages_have_the_numbers(fought, shards_folder, run_main, tmp_path, no_drawing):
    where = ("--scale", "nano", "--runs-dir", fought, "--data", shards_folder, "--out", tmp_path)
    code, _, err = run_main(experiments.main, "report", FIGHT, *where, *FLAGS)
    assert code == 0, err
    page, trials = (tmp_path / "report.md").read_text(), plan_of(fought, shards_folder, **SAME).results(TRIALS)
    failed = sum(trial["lr"] > 0.15 for trial in draw(ARMS["muon"], 8))
    assert failed
    assert f"muon: best of 8 trials {trials.best('muon').loss:.4f}, {failed} diverged" in page
    losses = [o.loss if math.isfinite(o.loss) else math.inf for o in trials.of_arm("muon")]
    worst = max(o.loss for o in trials.outcomes if math.isfinite(o.loss))
    pairs = [min(a, b, worst) for a, b in itertools.combinations(losses, 2)]
    assert f"{np.mean(pairs):.4f} (" in page  # the column best of 2
    assert "Muon took as long as AdamW (12.8 against 12.8 s)" in page
    assert "128 steps in equal time, the same runs; they took 12.80 s" in page
    assert "not equal" not in page
    mine, theirs = (
        plan_of(fought, shards_folder, **SAME).results(FIGHT).outcome(f"{a}, equal tokens").loss
        for a in ("muon", "adamw")
    )
    rare, frequent = ((0.55 + 0.1 * decile) * (mine - theirs) for decile in (9, 0))
    assert f"Muon minus AdamW: on the rarest tenth of the text {rare:+.3f} nats (" in page
    assert f", on the most frequent tenth {frequent:+.3f} nats (" in page
    assert "Finished runs: 27, in 2 suites" in page  # of 16 trials some diverged
    assert "(6 settings tuned for AdamW, 5 for Muon)" in page
    assert "Chosen for each arm: adamw_lr, beta1, beta2, lr, momentum, tokens, warmup, weight_decay." in page
    assert "No other setting differs: schedule, clipping and validation tokens are the same." in page
    assert "Deviation" not in page
    assert "adamw: 800 tokens/s at equal tokens, so 160 steps in equal time; they took 12.80 s" in page
    plots = {path.name for path in (tmp_path / "plots").iterdir()}
    names = (
        "fair-fight_curves",
        "fair-fight_deciles",
        "fair-trials_tuning",
        "fair-trials_settings",
        "fair-trials_planes",
    )
    assert plots == {f"{name}.png" for name in names}
    assert "run fair-fight --scale nano --arms adamw muon --trials 8 --steps 128 --seeds 1 2 3 4" in page
    assert not (tmp_path / "power.json").exists()  # of the claims, as it was
    assert run_main(experiments.main, "report", TRIALS, *where, "--trials", 8)[0] == 0
    assert "Who wins" not in (tmp_path / "report.md").read_text()


def test_p_values_of_settings_are_corrected_over_all_of_them(fought, shards_folder):
    found = effects(plan_of(fought, shards_folder, **SAME).results(TRIALS))
    assert len(found) == len(ARMS["adamw"].space) + len(ARMS["muon"].space) == 11
    ordered = sorted(found.values(), key=lambda one: one.p_value)
    highest = 0.0
    for rank, one in enumerate(ordered):
        highest = max(highest, min(1.0, (11 - rank) * one.p_value))
        assert one.p_holm == pytest.approx(highest)


def test_an_arm_whose_trials_all_failed_leaves_a_page_on_the_others(fought, shards_folder):
    results = plan_of(fought, shards_folder, **SAME).results(TRIALS)
    gone = [dataclasses.replace(o, failed=1, runs=()) if o.arm == "muon" else o for o in results.outcomes]
    results = dataclasses.replace(results, outcomes=tuple(gone))
    for draw_figure in (fair_plots.tuning_curves, fair_plots.setting_effects):
        fair_plots.plt.close(draw_figure(results))
    assert [row[0] for row in fair_page.expectation_table(results).rows] == ["adamw"]
    assert {arm for arm, _ in effects(results)} == {"adamw"}
    assert fair_page.trial_findings(results)[0].startswith("muon: 8 trials failed without diverging")


def test_a_diverged_fighter_is_counted_and_not_tested(fought, shards_folder, tmp_path):
    shutil.copytree(fought, tmp_path / "runs")
    for path in (tmp_path / "runs").glob("*-seed2/summary.json"):
        if json.loads((path.parent / "config.json").read_text())["optimizer"] == "muon":
            path.write_text('{"status": "failed", "reason": "step 3: loss nan, gradient norm nan"}')
    results = plan_of(tmp_path / "runs", shards_folder, **SAME).results(FIGHT)
    assert {way.winner for way in fair_ways.ways(results)} == {"open"}
    assert "Equal tokens: 1 run of Muon and AdamW failed, so no test." in fair_ways.fight_findings(results, {})
    results.outcome("muon, equal tokens").runs[0].config["tokens"] = 1
    assert [line for line in results.fairness(fair_page.by_design) if "Deviation: tokens" in line]


def test_equal_time_is_planned_when_each_arm_has_a_speed(fought, shards_folder, tmp_path):
    shutil.copytree(fought, tmp_path / "runs")
    jobs = {
        p.condition.name: p.jobs
        for p in plan_of(fought, shards_folder, **SAME).plan(FIGHT)
        if "tokens" in p.condition.name
    }
    (tmp_path / "runs" / jobs["muon, equal tokens"][0].name / "summary.json").unlink()
    plan = plan_of(tmp_path / "runs", shards_folder, **SAME)
    assert [p.condition.name for p in plan.plan(FIGHT)] == list(jobs)
    assert fair_ways.time_sentences(plan.results(FIGHT))[0].startswith("No runs of equal time: their steps follow from")
    for job in jobs["muon, equal tokens"]:
        reason = {"status": "failed", "reason": "step 3: loss nan, gradient norm nan"}
        (tmp_path / "runs" / job.name / "summary.json").write_text(json.dumps(reason))
    assert [p.condition.name for p in plan_of(tmp_path / "runs", shards_folder, **SAME).plan(FIGHT)] == list(jobs)


@pytest.mark.parametrize("lost", ["killed", "out of memory"])
def test_a_trial_that_failed_without_diverging_is_no_trial_and_there_is_no_winner(
    fought, shards_folder, tmp_path, lost
):
    runs = tmp_path / "runs"
    shutil.copytree(fought, runs)
    trials = [p for p in plan_of(runs, shards_folder, **SAME).plan(TRIALS) if p.condition.arm == "muon"]
    before = losses(plan_of(runs, shards_folder, **SAME).results(TRIALS), "muon")
    (job,) = trials[5].jobs
    assert job.state() == "finished"
    if lost == "killed":
        (job.folder / "summary.json").unlink()
        job.log.parent.mkdir()
        job.log.write_text(3 * f"{launcher.DEATH}-9\n")
        reason = f"the process exited 3 times without a summary; see {job.log}"
    else:
        reason = "out of GPU memory"
        (job.folder / "summary.json").write_text(json.dumps({"status": "failed", "reason": reason}))
    results_module._load.cache_clear()
    plan = plan_of(runs, shards_folder, **SAME)
    assert losses(plan.results(TRIALS), "muon").tolist() == np.delete(before, 5).tolist()
    rows = {row[0]: row[1] for row in fair_page.trials_table(plan.results(TRIALS)).rows}
    assert rows["muon 06"] == "failed"
    assert plan(TRIALS, "adamw")
    assert fair_page.trial_findings(plan.results(TRIALS))[0].startswith("muon: 1 trial failed without diverging")
    words = f"{TRIALS}: {job.name} failed without diverging ({reason}), so muon lacks a trial; --retry tries it again"
    with pytest.raises(BadInput, match=re.escape(words)):
        plan(TRIALS, "muon")


def test_one_seed_reaches_the_loss_without_a_test(fought, shards_folder):
    results = plan_of(fought, shards_folder, trials=8, seeds=(1,)).results(FIGHT)
    loss, other = (results.outcome(f"{arm}, equal tokens").loss for arm in ("muon", "adamw"))
    share = (5 - other) / (5 - loss)
    assert fair_ways.fight_findings(results, {}) == [
        "No clear winner between Muon and AdamW.",
        f"Equal tokens: Muon ends {other - loss:.3f} nats lower; one seed, so no test.",
        f"Equal time: Muon ends {other - 0.032 - loss:.3f} nats lower; one seed, so no test; Muon took "
        "as long as AdamW (12.8 against 12.8 s).",
        f"Tokens to AdamW's final loss: Muon needs {100 * (1 - share):.0f} % fewer; one seed, so no test.",
        f"Seconds to AdamW's final loss: Muon needs {100 * (share / 0.8 - 1):.0f} % more; one seed, so no test.",
    ]


def test_times_are_judged_where_the_runs_were_steady_and_unequal_ones_are_told(fought, shards_folder, monkeypatch):
    results = plan_of(fought, shards_folder, **SAME).results(FIGHT)
    assert fair_ways.unequal_words(results) == []
    monkeypatch.setattr(results_module.Outcome, "slowdown", 1.3)
    assert {way.name for way in fair_ways.ways(results) if way.winner == "muon"} == {
        "equal tokens",
        "tokens to the loss",
    }
    said = fair_ways.fight_findings(results, {})[1:5]
    assert ["not judged, as the runs were not steady" in line for line in said] == [False, True, False, True]
    assert fair_ways.fight_findings(results, {})[0].startswith(
        "Muon wins in 2 of 4 ways; equal time and seconds to the loss are not judged. A model of"
    )
    assert "(limit 1.2): not steady" in fair_ways.time_sentences(results)[-1]
    seconds = property(lambda run: 12.8 * (1.05 if run.optimizer == "muon" else 1.0))
    monkeypatch.setattr(results_module.Run, "train_seconds", seconds)
    (said,) = fair_ways.unequal_words(results)
    assert said.startswith("Equal time is not equal: Muon took 5.0 % longer than AdamW (13.4 against 12.8 s)")


def test_an_arm_with_more_time_has_not_won_in_equal_time(fought, shards_folder, monkeypatch):
    results = plan_of(fought, shards_folder, **SAME).results(FIGHT)

    def equal_time():
        return next(way for way in fair_ways.ways(results) if way.name == "equal time")

    assert equal_time().test.difference < 0
    for longer, winner in ((1.0, "muon"), (1.05, "open"), (1.01, "muon"), (0.9, "muon")):
        seconds = property(lambda run, factor=longer: 12.8 * (factor if run.optimizer == "muon" else 1.0))
        monkeypatch.setattr(results_module.Run, "train_seconds", seconds)
        assert equal_time().winner == winner
        assert fair_ways.outcome_words(equal_time()).endswith("so this stays open") == (winner == "open")


def test_a_run_that_does_not_reach_the_loss_of_its_own_seed_is_counted(fought, shards_folder, tmp_path):
    shutil.copytree(fought, tmp_path / "runs")
    results = plan_of(tmp_path / "runs", shards_folder, **SAME).results(FIGHT)
    (folder,) = (run.path for run in results.outcome("adamw, equal tokens").finished() if run.config["seed"] == 3)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: 0.8 * v if k == "val_loss" else v for k, v in line.items()} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results_module._load.cache_clear()
    results = plan_of(tmp_path / "runs", shards_folder, **SAME).results(FIGHT)
    mine, theirs = (results.outcome(f"{arm}, equal tokens").losses() for arm in ("muon", "adamw"))
    assert theirs[3] < min(mine.values()) < max(mine.values()) < np.mean(list(theirs.values()))
    way = next(way for way in fair_ways.ways(results) if way.name == "tokens to the loss")
    assert (way.never, way.winner) == (1, "open")
    reached = {seed: 128 * 64 * (5 - theirs[seed]) / (5 - mine[seed]) for seed in (1, 2, 4)}
    assert way.times == pytest.approx(reached | {3: None})
    assert math.isnan(way.spent)
    others = {seed: time for seed, time in way.times.items() if time is not None}
    assert dataclasses.replace(way, times=others).spent == pytest.approx(np.mean(list(reached.values())))


def test_arms_that_share_an_optimizer_are_told_apart(fight, tmp_path, shards_folder, monkeypatch):
    plain = Arm("muon-plain", {"optimizer": "muon", "nesterov": False}, ARMS["muon"].space)
    monkeypatch.setitem(ARMS, plain.name, plain)
    fight("run", FIGHT, "--arms", "muon-plain", "muon", "--trials", 4, "--seeds", 1, 2, "--steps", 32)
    chosen = {"trials": 4, "seeds": (1, 2), "steps": 32, "arms": ("muon-plain", "muon")}
    results = plan_of(tmp_path / "runs", shards_folder, **chosen).results(FIGHT)
    assert [o.condition.fields.get("nesterov", True) for o in results.outcomes] == [False, True, False, True]
    assert results.outcomes[1].condition.versus == "muon-plain, equal tokens"
    assert fair_ways.ways(results)[0].test.difference == pytest.approx(-0.5)
    assert {run.config["steps"] for o in results.outcomes for run in o.finished()} == {32}


def test_every_declared_arm_can_be_trained_and_tunes_what_it_has(tmp_path, shards_folder):
    plan = plan_of(tmp_path, shards_folder, arms=tuple(ARMS), trials=4).plan(TRIALS)  # settings that clash are refused
    assert len(unique(plan)) == 4 * len(ARMS)
    lacking = {arm: ARMS["muon"].space.keys() - ARMS[arm].space.keys() for arm in ARMS if arm != "adamw"}
    assert {arm: axes for arm, axes in lacking.items() if axes} == {
        "muon-hyperball": {"weight_decay"},
        "muon-no-momentum": {"momentum"},
    }
    fixed = {json.dumps(arm.fixed) for arm in ARMS.values()}
    assert len(fixed) == len(ARMS)


SGD = """
import torch


class MySGD(torch.optim.SGD):
    def __init__(self, params, lr, momentum=0.0, weight_decay=0.0, nesterov=False):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
"""


def test_an_optimizer_of_ones_own_fights_like_ours(fight, tmp_path, shards_folder, no_drawing):
    file = tmp_path / "my file.py"
    file.write_text(SGD)
    space = ("momentum=0.7:0.99", "nesterov=True", "weight_decay=0:0.1", "lr=0.1:3")
    flags = ("--arms", "muon-rows", f"{file}:MySGD", "--trials", 4, "--seeds", 1, 2, "--space", *space)
    code, out, err, trained = fight("run", FIGHT, *flags)
    assert code == 0, out + err
    assert sum(name.startswith("nano-MySGD-") for name in trained) == 4 + 2 * 2  # its equal time is longer
    chosen = {"arms": ("muon-rows", f"{file}:MySGD"), "trials": 4, "seeds": (1, 2), "space": space}
    trials = plan_of(tmp_path / "runs", shards_folder, **chosen).results(TRIALS)
    ranges = {"lr": (0.1, 3), "adamw_lr": (0.001, 0.3), "warmup": (0, 0.3), "momentum": (0.7, 0.99)}
    ranges["weight_decay"] = (0, 0.1)
    for outcome in trials.of_arm("MySGD"):
        fields = outcome.condition.fields
        options = dict(word.split("=") for word in fields["optimizer_options"])
        assert options.keys() == {"momentum", "nesterov", "weight_decay"}
        for key, (low, high) in ranges.items():
            value = float(options.get(key, fields.get(key)))
            assert low <= value <= high
            assert value == value_of(fields, key)
    code, out, err, _ = fight("report", FIGHT, *flags, "--out", tmp_path)
    assert code == 0, out + err
    page = (tmp_path / "report.md").read_text()
    assert "| MySGD | momentum | 0.7 | 0.99 | log of 1 - value |" in page
    words = "--space lr=0.1:3 adamw_lr=0.001:0.3 warmup=0:0.3 momentum=0.7:0.99 weight_decay=0:0.1 nesterov=True"
    assert f"--arms muon-rows '{file}:MySGD' {words} --trials 4" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("fair-fight", "--arms", "muon", "sgd"),
            f"--arms sgd: no such arm; choose from {', '.join(ARMS)} or FILE.py:CLASS",
        ),
        (("fair-fight", "--arms", "a.py:X", "b.py:X"), "--arms a.py:X b.py:X: name two or more, each once"),
        (
            ("fair-fight", "--space", "lr=0.1:3"),
            "--space lr=0.1:3: for an optimizer of your own, FILE.py:CLASS in --arms",
        ),
        (
            ("fair-fight", "--arms", "muon", "a.py:X", "--space", "lr=3"),
            "--space lr=3: must be a range, as lr=0.1:3",
        ),
        (
            ("fair-fight", "--arms", "muon", "a.py:X", "--space", "beta=0.9:0.5"),
            "--space beta=0.9:0.5: the range must go from a number to a greater one",
        ),
        (("fair-fight", "--arms", "muon", "a.py:X", "--space", "lr=0:1"), "--space lr=0:1: must be above 0"),
        (
            ("fair-trials", "--arms", "muon", "no.py:X"),
            "--optimizer no.py:X: no.py cannot be read (No such file or directory)",
        ),
        (("fair-fight", "--arms", "muon"), "--arms muon: name two or more, each once"),
        (("fair-trials", "--arms", "muon", "muon"), "--arms muon muon: name two or more, each once"),
        (("fair-fight", "--trials", "3"), "--trials 3: must be at least 4"),
        (("fair-fight", "--steps", "0"), "--steps 0: must be at least 1"),
        (("fair-fight", "--tokens", "4096"), "--tokens: fair-fight counts its budget in --steps"),
        (("moe-final", "--trials", "8"), "--trials: belongs to fair-trials and fair-fight, not to moe-final"),
    ],
)
def test_a_fight_that_cannot_be_is_refused_in_a_sentence(tmp_path, shards_folder, run_main, arguments, words):
    where = ("--data", shards_folder, "--runs-dir", tmp_path / "runs", "--scale", "nano")
    for command in ("run", "status", "report"):
        code, _, err = run_main(experiments.main, command, *arguments, *where)
        assert (code, err) == (2, f"error: {words}\n")
