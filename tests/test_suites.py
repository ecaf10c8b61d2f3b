"""What the suites plan: the documents' grids, one change at a time, fair to both optimizers; what is found in them."""

import collections
import math

import pytest

import experiments
from claims import CLAIMS, CONFIRMED, NOT_CONFIRMED, NOT_TESTABLE, Context, judge_all
from results import Results
from settings import Settings
from suites import MUON_ABLATIONS, SCALES, SUITES, Condition, with_needs
from tests.synthetic import write_run

ROWS = (  # of the documents' table, each as a suite
    *("speedrun-lr", "speedrun-2m", "baseline", "lr-sensitivity", "model-size", "moe-lr-muon", "moe-lr-adam"),
    *("moe-momentum", "moe-weight-decay", "moe-ns-steps", "moe-nesterov", "moe-warmup", "moe-schedule", "moe-adam"),
    *("moe-aux-ratio", "moe-clip", "moe-min-lr", "moe-long", "moe-final"),
)
WINNERS = {"muon": {"lr": 0.02}, "adamw": {"lr": 0.003}}


def winners(suite, optimizer):
    """As if every sweep had found S4's own settings."""
    found = {"momentum": 0.9, "weight_decay": 0.1, "ns_steps": 5, "nesterov": True, "warmup": 0.05, "adamw_lr": 0.002}
    return found | {"schedule": "cosine", "grad_clip": 1.0, "min_lr": 0.1} | WINNERS[optimizer]


def test_every_experiment_of_the_documents_is_a_suite():
    assert set(SUITES) == set(ROWS)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ROWS)
def test_a_plan_is_valid(name, scale):
    conditions = SUITES[name].plan(SCALES[scale], winners)
    names = {condition.name for condition in conditions}
    assert len(names) == len(conditions)
    for condition in conditions:
        settings = Settings(**condition.fields)  # a field that is no flag raises
        assert condition.versus is None or condition.versus in names
        assert math.ceil(settings.tokens / settings.batch_tokens) >= 60
    different = {tuple(sorted((k, str(v)) for k, v in c.fields.items())) for c in conditions}
    assert len(different) == len(conditions)


def test_the_documents_grids():
    full = SCALES["full"]

    def values(name, key):
        return [c.fields[key] for c in SUITES[name].plan(full, winners)]

    assert values("moe-momentum", "momentum") == [0.85, 0.9, 0.92, 0.95, 0.97, 0.99]
    assert values("moe-ns-steps", "ns_steps") == [3, 5, 7, 10]
    assert values("moe-schedule", "schedule") == ["cosine", "linear", "step", "constant"]
    assert values("moe-clip", "grad_clip") == [0.5, 1.0, 2.0, 0.0]
    assert values("moe-warmup", "warmup") == [0.0, 0.05, 0.1, 0.2]
    assert len(values("moe-adam", "lr")) == 7
    rates = collections.defaultdict(list)
    for c in SUITES["lr-sensitivity"].plan(full, winners):
        rates[c.fields["optimizer"]].append(c.fields["lr"])
    assert rates["adamw"] == [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
    assert rates["muon"] == [0.001, 0.003, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05]
    sizes = {c.fields["model"] for c in SUITES["model-size"].plan(full, winners)}
    assert sizes == {"11m", "29m", "50m", "108m"}
    assert {c.fields["tokens"] for c in SUITES["speedrun-2m"].plan(full, winners)} == {2_015_232}


@pytest.mark.parametrize("name", ["speedrun-2m", "baseline", "model-size", "moe-long", "moe-final"])
def test_both_optimizers_share_all_but_their_rate(name):
    conditions = {c.name: c for c in SUITES[name].plan(SCALES["nano"], winners)}
    pairs = [(c, conditions[c.versus]) for c in conditions.values() if c.versus]
    assert pairs
    for muon, adamw in pairs:
        defaults = vars(Settings())
        for key in (muon.fields.keys() | adamw.fields.keys()) - {"optimizer", "lr", "adamw_lr"}:
            assert {**defaults, **muon.fields}[key] == {**defaults, **adamw.fields}[key], key


@pytest.mark.parametrize("name", MUON_ABLATIONS)
def test_an_ablation_changes_one_setting(name):
    conditions = SUITES[name].plan(SCALES["nano"], winners)
    reference = {c.versus for c in conditions} - {None}
    assert len(reference) == 1
    own = next(c for c in conditions if c.name in reference)
    for c in conditions:
        changed = {key for key in c.fields.keys() | own.fields.keys() if c.fields.get(key) != own.fields.get(key)}
        assert changed <= {SUITES[name].varies}, (c.name, changed)


def test_rates_at_other_sizes_are_scaled_from_the_searched_one():
    rate = {c.name: c.fields["lr"] for c in SUITES["model-size"].plan(SCALES["nano"], winners)}
    assert rate["adamw 128 wide"] == 0.003
    assert rate["adamw 64 wide"] == 0.006
    assert {rate[name] for name in rate if name.startswith("muon")} == {0.02}


def test_a_suite_comes_after_what_it_needs():
    place = {name: i for i, stage in enumerate(with_needs(["moe-final"])) for name in stage}
    assert place["moe-final"] == max(place.values()) == 2
    assert all(place[need] < place[name] for name in place for need in SUITES[name].needs)
    assert "baseline" not in place


def planner(tmp_path, shards_folder, **given):
    chosen = experiments.Selection(suite="moe-nesterov", scale="nano", runs_dir=tmp_path, data=shards_folder, **given)
    return experiments.Planner(chosen)


def test_runs_are_named_by_what_they_train_and_shared_between_suites(tmp_path, shards_folder, monkeypatch):
    plan = planner(tmp_path, shards_folder)
    monkeypatch.setattr(experiments.Planner, "winner", lambda self, suite, optimizer: winners(suite, optimizer))
    jobs = {name: {job.name for p in plan.plan(name) for job in p.jobs} for name in MUON_ABLATIONS}
    shared = set.intersection(*(jobs[name] for name in MUON_ABLATIONS if name != "moe-aux-ratio"))
    assert len(shared) == 3  # S4's own settings, three seeds, once for all
    rate = plan.job((("model", "nano"), ("lr", 0.02)), 0)
    assert rate.name == plan.job((("lr", 0.02), ("model", "nano")), 0).name
    assert rate.name != plan.job((("lr", 0.03), ("model", "nano")), 0).name
    assert rate.name.split("-seed")[0] == plan.job((("model", "nano"), ("lr", 0.02)), 1).name.split("-seed")[0]
    assert rate.name != planner(tmp_path, shards_folder, tokens=4096).job((("model", "nano"), ("lr", 0.02)), 0).name
    assert plan.job((("model", "nano"), ("spectra_every", 0)), 0).name != plan.job((("model", "nano"),), 0).name


def test_the_winner_has_the_least_mean_and_no_diverged_seed(tmp_path, shards_folder, monkeypatch):
    conditions = [
        Condition(f"muon lr {lr}", {"model": "nano", "optimizer": "muon", "lr": lr}) for lr in (0.1, 0.2, 0.3)
    ]
    sweep = SUITES["moe-lr-muon"].__class__("sweep", "S4", "?", "lr", (0, 1), (), lambda scale, winners: conditions)
    monkeypatch.setitem(SUITES, "sweep", sweep)
    finals = {0.1: (3.2, 3.4), 0.2: (3.0, 3.3), 0.3: (2.0, None)}
    plan = planner(tmp_path, shards_folder)
    for p in plan.plan("sweep"):
        for job, final in zip(p.jobs, finals[p.condition.fields["lr"]], strict=True):
            folder = write_run(job.folder, final=final or 3.0, status="finished" if final else "failed", spectra=False)
            if final:
                experiments.runfiles.write_json(
                    folder / "summary.json", {"status": "finished", "final_val_loss": final}
                )
            else:
                experiments.runfiles.write_json(folder / "summary.json", {"status": "failed", "final_val_loss": None})
    assert plan.winner("sweep", "muon")["lr"] == 0.2
    (job.folder / "summary.json").unlink()
    with pytest.raises(experiments.BadInput, match="has not finished"):
        planner(tmp_path, shards_folder).winner("sweep", "muon")


def results_of(tmp_path, name, finals, **settings):
    """A suite of hand-written runs: {condition: (final loss of seed 0, 1, ...)}; None = diverged."""
    conditions = {c.name: c for c in SUITES[name].plan(SCALES["nano"], winners)}
    planned = []
    for i, (words, losses) in enumerate(finals.items()):
        folders = []
        for seed, final in enumerate(losses):
            fields = {k: v for k, v in conditions[words].fields.items() if k in ("optimizer", "lr", "weight_decay")}
            folder = tmp_path / name / f"{i}-{seed}"
            status = "failed" if final is None else "finished"
            write_run(folder, final=final or 9.0, status=status, seed=seed, **(fields | settings))
            folders.append(folder)
        planned.append((conditions[words], folders))
    return Results.load(SUITES[name], planned)


def verdicts(results, scale="nano"):
    judged = judge_all({results.name: results}, scale)
    return {claim.says: finding for claim, finding in judged if claim.suite == results.name}


def test_claims_name_suites_and_conditions_that_exist():
    for claim in CLAIMS:
        assert claim.suite in SUITES, claim.says


@pytest.mark.parametrize(
    ("finals", "verdict"),
    [
        ({"muon": (3.0, 3.01, 2.99), "adamw": (3.5, 3.52, 3.49)}, CONFIRMED),
        ({"muon": (3.5, 3.52, 3.49), "adamw": (3.0, 3.01, 2.99)}, NOT_CONFIRMED),
        ({"muon": (3.0, 3.3, 2.9), "adamw": (3.1, 3.0, 3.2)}, NOT_TESTABLE),
        ({"muon": (3.0, 3.01), "adamw": (3.5, 3.52)}, NOT_TESTABLE),  # two seeds, however clear
        ({"muon": (3.0,), "adamw": (3.5,)}, NOT_TESTABLE),
    ],
)
def test_a_verdict_needs_three_seeds_and_an_interval_without_zero(tmp_path, finals, verdict):
    finding = verdicts(results_of(tmp_path, "moe-final", finals))["The best Muon beats the best AdamW"]
    assert finding.verdict == verdict
    difference = sum(finals["muon"]) / len(finals["muon"]) - sum(finals["adamw"]) / len(finals["adamw"])
    assert f"{difference:.3f} nats" in finding.numbers
    assert ("single seed" in finding.numbers) == (len(finals["muon"]) == 1)


def test_what_a_nano_run_cannot_tell_a_full_one_refutes(tmp_path):
    results = results_of(tmp_path, "moe-final", {"muon": (3.0, 3.3, 2.9), "adamw": (3.1, 3.0, 3.2)})
    assert verdicts(results, "full")["The best Muon beats the best AdamW"].verdict == NOT_CONFIRMED


def test_a_chosen_setting_is_confirmed_only_against_all_others(tmp_path):
    low, high = (3.0, 3.01, 2.99), (3.5, 3.52, 3.48)
    says = "Nesterov momentum helps"
    assert (
        verdicts(results_of(tmp_path / "a", "moe-nesterov", {"with Nesterov": low, "without Nesterov": high}))[
            says
        ].verdict
        == CONFIRMED
    )
    assert (
        verdicts(results_of(tmp_path / "b", "moe-nesterov", {"with Nesterov": high, "without Nesterov": low}))[
            says
        ].verdict
        == NOT_CONFIRMED
    )
    schedules = {"cosine": low, "linear": high, "step": high, "constant": (3.01, 3.0, 2.98)}
    assert verdicts(results_of(tmp_path / "c", "moe-schedule", schedules))["Cosine is best"].verdict == NOT_TESTABLE


def test_times_on_a_cpu_are_never_a_verdict(tmp_path):
    finals = {"muon": (3.0, 3.01, 2.99), "adamw": (3.5, 3.52, 3.49)}
    results = results_of(tmp_path, "speedrun-2m", finals, device="cpu")
    finding = verdicts(results)["Muon's update takes longer"]
    assert finding.verdict == NOT_TESTABLE
    assert "CPU" in finding.numbers


def test_more_claims_on_a_suite_widen_its_intervals(tmp_path):
    results = results_of(tmp_path, "moe-final", {"muon": (3.0, 3.1, 2.9), "adamw": (3.5, 3.5, 3.5)})
    few, many = (next(c for c in CLAIMS if c.suite == "moe-final").judge(Context(results, "nano", n)) for n in (1, 9))
    assert (few.verdict, many.verdict) == (CONFIRMED, NOT_TESTABLE)


def test_a_diverged_run_counts_against_its_condition(tmp_path):
    results = results_of(tmp_path, "moe-final", {"muon": (3.0, None, 2.9), "adamw": (3.5, 3.5, 3.5)})
    muon = results.outcome("muon")
    assert (muon.failed, len(muon.losses())) == (1, 2)
    assert math.isnan(muon.loss)
    assert results.best("muon") is None


def test_deviations_from_fairness_are_listed(tmp_path):
    finals = {"muon": (3.0, 3.1, 2.9), "adamw": (3.5, 3.5, 3.5)}
    same = results_of(tmp_path / "same", "moe-long", finals)
    assert any("No other setting differs" in line for line in same.fairness())
    other = results_of(tmp_path / "other", "moe-long", finals)
    other.outcomes[0].runs[0].config["weight_decay"] = 0.7
    lines = other.fairness()
    assert any(line.startswith("Deviation: weight_decay is 0.7 for muon") for line in lines)


def test_the_best_rate_on_the_edge_of_the_grid_is_told(tmp_path):
    from report_suites import rate_sentences

    finals = {"adamw lr 0.0005": (5.0,), "adamw lr 0.001": (4.5,), "adamw lr 0.002": (4.0,)}
    (sentence,) = rate_sentences(results_of(tmp_path / "edge", "moe-lr-adam", finals), "adamw")
    assert "ON THE EDGE" in sentence
    assert "single seed" in sentence
    (sentence,) = rate_sentences(
        results_of(tmp_path / "inside", "moe-lr-adam", finals | {"adamw lr 0.005": (4.7,)}), "adamw"
    )
    assert "EDGE" not in sentence
