"""Plans of suites: names and sharing of runs, winners, grids that grow, seeds."""

import dataclasses
import math

import pytest

from bench.synthetic import write_run
from engine import defaults, files
from engine.cli import BadInput
from settings import Settings
from suites import planner
from suites.catalog import SUITES
from suites.mixture import MUON_ABLATIONS
from suites.suite import Condition, Suite
from tests.test_suites import FRESH_SEEDS, winners


def plan_of(tmp_path, shards_folder, **given):
    chosen = planner.Selection(suite="moe-nesterov", scale="nano", runs_dir=tmp_path, data=shards_folder, **given)
    return planner.Planner(chosen)


def test_runs_are_named_by_what_they_train_and_shared_between_suites(tmp_path, shards_folder, monkeypatch):
    plan = plan_of(tmp_path, shards_folder)
    monkeypatch.setattr(planner.Planner, "__call__", lambda self, suite, optimizer: winners(suite, optimizer))
    jobs = {name: {job.name for p in plan.plan(name) for job in p.jobs} for name in MUON_ABLATIONS}
    shared = set.intersection(*(jobs[name] for name in MUON_ABLATIONS if name != "moe-aux-ratio"))
    assert len(shared) == 6  # S4's own settings, six seeds, once for all
    rate = plan.job((("model", "nano"), ("lr", 0.02)), 0)
    assert rate.name == plan.job((("lr", 0.02), ("model", "nano")), 0).name
    assert rate.name != plan.job((("lr", 0.03), ("model", "nano")), 0).name
    assert rate.name.split("-seed")[0] == plan.job((("model", "nano"), ("lr", 0.02)), 1).name.split("-seed")[0]
    assert rate.name != plan_of(tmp_path, shards_folder, tokens=4096).job((("model", "nano"), ("lr", 0.02)), 0).name
    assert plan.job((("model", "nano"), ("spectra_every", 0)), 0).name != plan.job((("model", "nano"),), 0).name


@pytest.mark.parametrize(("record", "count"), [("nano-fight", 82), ("nano-suites", 708), ("nano-retests", 391)])
def test_published_runs_keep_their_names(record, count):
    """So an experiment that continues after an update trains no run again: PUBLISHED_WITHOUT must name new settings."""
    folders = [path.parent for path in (files.ROOT / "runs" / "records" / record).glob("*/config.json")]
    assert len(folders) == count
    new = {f.name: f.default for f in dataclasses.fields(Settings) if f.name != "init_fingerprint"}
    for folder in folders:
        config = files.load_json(folder / "config.json")
        hashed = dict(list(config.items())[: list(config).index("vocab_size") + 1])
        assert planner.run_name(new | hashed | {"precision": "auto"}) == folder.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherDefaults(Settings):
    weight_decay: float = 0.3
    beta2: float = 0.7
    warmup: float = 0.3
    schedule: str = "wsd"
    min_lr: float = 0.5
    grad_clip: float = 0.0


def test_new_defaults_of_training_rename_no_run_of_a_suite(tmp_path, shards_folder, monkeypatch):
    def names():
        return [job.name for p in plan_of(tmp_path, shards_folder).plan("speedrun-lr") for job in p.jobs]

    before = names()
    monkeypatch.setattr(planner, "Settings", OtherDefaults)
    other = defaults.Defaults(
        lr={"muon": 0.1, "adamw": 0.1}, adamw_lr=0.1, momentum=0.7, beta1=0.5, batch_tokens=512, eval_tokens=512
    )
    monkeypatch.setattr(defaults, "SMALL", other)
    assert names() == before


def test_the_winner_has_the_least_mean_and_no_diverged_seed(tmp_path, shards_folder, monkeypatch):
    conditions = [
        Condition(f"muon lr {lr}", {"model": "nano", "optimizer": "muon", "lr": lr}) for lr in (0.1, 0.2, 0.3)
    ]
    sweep = Suite("sweep", "S4", "?", "lr", (), 0, False, False, (), lambda scale, winners: conditions)
    monkeypatch.setitem(SUITES, "sweep", sweep)
    finals = {0.1: (3.2, 3.4), 0.2: (3.0, 3.3), 0.3: (2.0, None)}
    plan = plan_of(tmp_path, shards_folder, seeds=(0, 1))
    for p in plan.plan("sweep"):
        for job, final in zip(p.jobs, finals[p.condition.fields["lr"]], strict=True):
            folder = write_run(job.folder, final=final or 3.0, status="finished" if final else "failed", spectra=False)
            if final:
                files.write_json(folder / "summary.json", {"status": "finished", "final_val_loss": final})
            else:
                files.write_json(folder / "summary.json", {"status": "failed", "final_val_loss": None})
    assert plan("sweep", "muon")["lr"] == 0.2
    (job.folder / "summary.json").unlink()
    with pytest.raises(BadInput, match="has not finished"):
        plan_of(tmp_path, shards_folder, seeds=(0, 1))("sweep", "muon")


def finish(jobs, loss_of):
    """Write a finished run for each job that has none; `loss_of` takes the rate, None = diverged."""
    for job in jobs:
        if job.state() == "waiting":
            flags = dict(zip(job.flags, job.flags[1:], strict=False))
            rate, optimizer = float(flags["--lr"]), flags.get("--optimizer", "muon")
            final = loss_of(optimizer, rate)
            status = "failed" if final is None else "finished"
            write_run(job.folder, final=final or 9.0, status=status, lr=rate, optimizer=optimizer, spectra=False)
            files.write_json(job.folder / "summary.json", {"status": status, "final_val_loss": final})


def sweep_of(tmp_path, shards_folder, **given):
    chosen = planner.Selection(suite="speedrun-lr", scale="nano", runs_dir=tmp_path, data=shards_folder, **given)
    return planner.Planner(chosen)


def rates(plan, optimizer):
    planned = plan.plan("speedrun-lr")
    return [p.condition.fields["lr"] for p in planned if p.condition.fields["optimizer"] == optimizer]


def test_a_grid_grows_while_the_best_is_on_its_edge_and_twice_at_most(tmp_path, shards_folder):
    """Muon's best is far above its grid, AdamW's just below it."""

    def loss_of(optimizer, rate):
        return 3 + abs(math.log(rate / (9.0 if optimizer == "muon" else 0.0005)))

    plan = sweep_of(tmp_path, shards_folder)
    muon, adamw = [0.01, 0.02, 0.04, 0.08, 0.16], [0.001, 0.002, 0.004, 0.008, 0.016]
    grids = [(muon, adamw), ([*muon, 0.32], [0.0005, *adamw]), ([*muon, 0.32, 0.64], [0.00025, 0.0005, *adamw])]
    for number, grid in enumerate(grids):
        assert (rates(plan, "muon"), rates(plan, "adamw")) == grid
        waiting = [job for job in planner.unique(plan.plan("speedrun-lr")) if job.state() == "waiting"]
        assert len(waiting) == (6 if number else 30)  # three seeds
        if number:
            with pytest.raises(BadInput, match="has not finished"):
                sweep_of(tmp_path, shards_folder)("speedrun-lr", "adamw")
        finish(waiting[1:], loss_of)
        assert (rates(plan, "muon"), rates(plan, "adamw")) == grid  # not before all runs are over
        finish(waiting, loss_of)
    assert (rates(plan, "muon"), rates(plan, "adamw")) == grids[-1]
    assert plan("speedrun-lr", "muon")["lr"] == 0.64
    assert plan("speedrun-lr", "adamw")["lr"] == 0.0005
    assert "so also muon lr 0.32, muon lr 0.64, adamw lr 0.00025, adamw lr 0.0005" in plan.grown_sentence("speedrun-lr")
    assert rates(sweep_of(tmp_path, shards_folder, only="muon*"), "muon") == muon  # what was asked for, no more


def test_arms_that_share_an_optimizer_grow_apart(tmp_path, shards_folder, monkeypatch):
    conditions = [
        Condition(f"{arm} lr {rate:g}", {**fields, "optimizer": "muon", "lr": rate}, None, arm)
        for arm, fields, rates in (
            ("plain", {"nesterov": False}, (0.01, 0.02, 0.04, 0.08)),
            ("nesterov", {}, (0.01, 0.02, 0.04)),
        )
        for rate in rates
    ]
    base = {"model": "nano", "tokens": 16_384, "batch_tokens": 2048}
    conditions = [dataclasses.replace(c, fields={**base, **c.fields}) for c in conditions]
    sweep = dataclasses.replace(SUITES["speedrun-lr"], plan=lambda scale, winners: conditions)
    monkeypatch.setitem(SUITES, "speedrun-lr", sweep)
    plan = sweep_of(tmp_path, shards_folder, seeds=(0,))
    jobs = planner.unique(plan.plan("speedrun-lr"))
    for job in jobs:
        best = 0.02 if "--no-nesterov" in job.flags else 0.04
        finish([job], lambda optimizer, rate, best=best: 3 + abs(math.log(rate / best)))
    results = plan.results("speedrun-lr")
    assert [o.name for o in results.outcomes][4:] == [f"nesterov lr {rate:g}" for rate in (0.01, 0.02, 0.04, 0.08)]
    assert [results.best(arm).name for arm in results.arms()] == ["plain lr 0.02", "nesterov lr 0.04"]
    assert "Same batches in the same order: one data fingerprint and the same seeds." in results.fairness()
    user = dataclasses.replace(results, suite=dataclasses.replace(results.suite, needs=("speedrun-lr",)))
    assert user.settings_from_sweeps({"speedrun-lr": results}) == [
        "From speedrun-lr: plain lr 0.02 (mean loss 3.0000).",
        "From speedrun-lr: nesterov lr 0.04 (mean loss 3.0000).",
    ]


def test_a_grid_does_not_grow_towards_rates_that_diverge(tmp_path, shards_folder):
    plan = sweep_of(tmp_path, shards_folder)
    finish(planner.unique(plan.plan("speedrun-lr")), lambda optimizer, rate: None if rate > 0.1 else 3 - rate)
    assert rates(plan, "muon") == [0.01, 0.02, 0.04, 0.08, 0.16]
    assert rates(plan, "adamw")[-1] == 0.032


@pytest.mark.parametrize(
    ("asked", "given", "seeds"),
    [
        ("moe-momentum", (0, 7), {"moe-momentum": (0, 7), "moe-lr-muon": (0, 7)}),
        ("baseline", (0, 1, 5), {"baseline": (0, 1, 5), "speedrun-lr": (2, 3, 4)}),
        ("moe-final", (9,), {"moe-final": (9,), "moe-adam": (0,), "moe-lr-adam": (0,)}),
        ("everything", (1, 0), {"moe-momentum": (1, 0), "moe-lr-muon": (1, 0), "baseline": (2, 3)}),
        ("retests", (6, 7), {"muon-rows": (6, 7), "batch-size-lr": (0, 1), "fair-trials": (0,)}),
        ("moe-final", None, {"moe-final": FRESH_SEEDS, "moe-lr-muon": (0, 1, 2, 3, 4, 5)}),
    ],
)
def test_seeds_are_those_of_what_a_suite_needs_too_but_where_these_must_be_others(asked, given, seeds):
    plan = planner.Planner(planner.Selection(suite=asked, scale="nano", seeds=given))
    assert {name: plan.seeds(name) for name in seeds} == seeds
