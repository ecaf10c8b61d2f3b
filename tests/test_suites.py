"""What the suites plan: the documents' grids, one change at a time, fair to both optimizers; what is found in them."""

import collections
import math
import re

import pytest

from bench.synthetic import write_run
from settings import Settings
from suites import planner
from suites.catalog import SUITES, with_needs
from suites.claims import CLAIMS, judge_all
from suites.judging import CONFIRMED, NOT_TESTABLE, REFUTED, UNDECIDED
from suites.mixture import MUON_ABLATIONS
from suites.results import Results
from suites.scales import SCALES
from suites.suite import AS_WRITTEN

DENSE = ("speedrun-lr", "speedrun-2m", "baseline", "lr-sensitivity", "model-size")
MIXTURE = (
    "lr-muon",
    "lr-muon-short",
    "lr-adam",
    "lr-adam-short",
    "momentum",
    "weight-decay",
    "ns-steps",
    "ns-order",
    "muon-on",
    "nesterov",
    "warmup",
    "schedule",
    "adam",
)
MIXTURE_LATER = ("ns-polynomial", "aux-ratio", "clip", "min-lr", "balance", "long", "final")
ROWS = (*DENSE, *(f"moe-{name}" for name in (*MIXTURE, *MIXTURE_LATER)))  # of the documents' table, each a suite
FRESH_SEEDS = (6, 7, 8, 9, 10, 11)
WINNERS = {"muon": {"lr": 0.02}, "adamw": {"lr": 0.003}}


def winners(suite, optimizer):
    """As if every sweep had found S4's own settings."""
    found = {
        "ns_before_momentum": False,
        "muon_on": "blocks",
        "momentum": 0.9,
        "weight_decay": 0.1,
        "ns_steps": 5,
        "nesterov": True,
        "warmup": 0.05,
        "adamw_lr": 0.002,
    }
    return found | {"schedule": "cosine", "grad_clip": 1.0, "min_lr": 0.1} | WINNERS.get(optimizer, WINNERS["muon"])


winners.seconds_per_token = lambda suite, conditions: {"muon": 2e-4, "adamw": 1.6e-4}


def test_every_experiment_of_the_documents_is_a_suite():
    assert {name for name, suite in SUITES.items() if suite.group == "everything"} == set(ROWS)
    assert planner.Selection(suite="everything").suites() == [name for name in SUITES if name in ROWS]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ROWS)
def test_a_plan_is_valid(name, scale):
    conditions = SUITES[name].plan(SCALES[scale], winners)
    names = {condition.name for condition in conditions}
    assert len(names) == len(conditions)
    for condition in conditions:
        settings = Settings(**condition.fields)  # a field that is no flag raises
        assert condition.versus is None or condition.versus in names
        assert math.ceil(settings.tokens / settings.batch_tokens) >= 26
    different = {tuple(sorted((k, str(v)) for k, v in c.fields.items())) for c in conditions}
    assert len(different) == len(conditions)


def test_the_documents_grids():
    full = SCALES["full"]

    def values(name, key):
        return [c.fields[key] for c in SUITES[name].plan(full, winners)]

    assert values("moe-momentum", "momentum") == [0.85, 0.9, 0.92, 0.95, 0.97, 0.99]
    assert values("moe-ns-steps", "ns_steps") == [3, 5, 7, 10, "3:0.5,5"]
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
    pairs = [(c, conditions[c.versus]) for c in conditions.values() if c.versus and AS_WRITTEN not in c.name]
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
    conditions = [c for c in SUITES["model-size"].plan(SCALES["nano"], winners) if AS_WRITTEN not in c.name]
    rate = {c.name: c.fields["lr"] for c in conditions}
    assert rate["adamw 128 wide"] == 0.003
    assert rate["adamw 64 wide"] == 0.006
    assert {rate[name] for name in rate if name.startswith("muon")} == {0.02}


def test_conditions_as_written_have_the_documents_settings():
    final = {c.name: c.fields for c in SUITES["moe-final"].plan(SCALES["full"], winners)}
    assert final["adamw as written"]["lr"] == final["adamw as written"]["adamw_lr"] == 0.001  # one rate for everything
    assert (final["adamw as written"]["beta2"], final["adamw as written"]["schedule"]) == (0.999, "constant")
    assert (final["muon as written"]["lr"], final["muon as written"]["adamw_lr"]) == (0.07, 0.007)
    short = {c.name: c for c in SUITES["speedrun-2m"].plan(SCALES["full"], winners)}
    assert short["adamw as written"].fields["lr"] == 0.006
    assert short["muon as written"].versus == "adamw as written"
    for name in ("speedrun-2m", "baseline", "model-size", "moe-final"):
        written = [c for c in SUITES[name].plan(SCALES["nano"], winners) if AS_WRITTEN in c.name]
        assert len(written) == (8 if name == "model-size" else 2)


def test_full_scale_uses_the_documents_seeds_where_no_sweep_has_used_them():
    full, nano = SCALES["full"], SCALES["nano"]
    assert SUITES["baseline"].seeds_at(full) == SUITES["moe-final"].seeds_at(full) == (42, 137, 256)
    assert SUITES["baseline"].seeds_at(nano) == FRESH_SEEDS
    for scale in (full, nano):
        for suite in SUITES.values():
            chosen_on = {seed for need in suite.needs for seed in SUITES[need].seeds_at(scale)}
            assert len(set(suite.seeds_at(scale))) >= (1 if suite.one_seed else 3)
            assert not suite.confirms or not chosen_on & set(suite.seeds_at(scale)), suite.name
    assert SUITES["moe-momentum"].seeds_at(full) == SUITES["moe-momentum"].seeds_at(nano) == (0, 1, 2, 3, 4, 5)


def test_full_scale_uses_the_documents_corpus_where_it_is_there_and_says_where_not(
    tmp_path, shards_folder, monkeypatch
):
    chosen = planner.Selection(suite="lr-sensitivity", scale="full", runs_dir=tmp_path)
    here = planner.Planner(chosen)
    (corpus,) = {here.scale.corpora["S2"]}
    monkeypatch.chdir(tmp_path)
    (sentence,) = here.missing_corpora()
    assert "S2's corpus shards/cosmopedia-500k is not there" in sentence
    assert corpus.command in sentence
    corpus.folder.parent.mkdir()
    corpus.folder.symlink_to(shards_folder)
    assert here.missing_corpora() == []
    job = here.plan("lr-sensitivity")[0].jobs[0]
    assert job.flags[job.flags.index("--data") + 1] == str(corpus.folder)


def test_a_suite_comes_after_what_it_needs():
    place = {name: i for i, stage in enumerate(with_needs(["moe-final"])) for name in stage}
    assert place["moe-final"] == max(place.values()) == 2
    assert all(place[need] < place[name] for name in place for need in SUITES[name].needs)
    assert "baseline" not in place


DIVERGED = "step 10: loss nan, gradient norm nan"  # as train.py says it


def results_of(tmp_path, name, finals, to_go=0, reason=DIVERGED, **settings):
    """A suite of hand-written runs: {condition: (final loss of seed 0, 1, ...)}; None = failed, for `reason`. Values of
    `settings` may be functions of the condition's name."""
    conditions = {c.name: c for c in SUITES[name].plan(SCALES["nano"], winners)}
    planned = []
    for i, (words, losses) in enumerate(finals.items()):
        states = {}
        for seed, final in enumerate(losses):
            fields = {k: v for k, v in conditions[words].fields.items() if k in ("optimizer", "lr", "weight_decay")}
            fields |= {k: v(words) if callable(v) else v for k, v in settings.items()}
            folder = tmp_path / name / f"{i}-{seed}"
            state = "failed" if final is None else "finished"
            why = reason if final is None else None
            write_run(folder, final=final or 9.0, status=state, reason=why, seed=seed, **fields)
            states[folder] = state
        states |= {tmp_path / name / f"{i}-to-go-{k}": "waiting" for k in range(to_go)}
        planned.append((conditions[words], states))
    return Results.load(SUITES[name], planned)


@pytest.mark.parametrize(
    ("suite", "condition", "edge"),
    [
        ("moe-clip", "grad_clip 0.5", True),
        ("moe-clip", "grad_clip 2", False),  # no clipping is beyond it
        ("moe-clip", "no clipping", False),  # nothing is
        ("moe-weight-decay", "weight_decay 0", False),
        ("moe-weight-decay", "weight_decay 0.2", True),
    ],
)
def test_an_edge_has_something_beyond_it(tmp_path, suite, condition, edge):
    names = [c.name for c in SUITES[suite].plan(SCALES["nano"], winners)]
    results = results_of(tmp_path, suite, {name: (3.0 if name == condition else 3.5,) for name in names})
    assert results.best("muon").name == condition
    assert results.on_edge(results.best("muon")) is edge


def verdicts(results, *others):
    judged = judge_all({r.name: r for r in (results, *others)})
    return {claim.statement: finding for claim, finding in judged if claim.suite == results.name}


def test_every_suite_corrects_for_the_claims_that_are_tested_on_it():
    extra = collections.Counter()
    for claim in CLAIMS:
        extra[claim.suite] += claim.tests
    assert {name: suite.extra_tests for name, suite in SUITES.items() if suite.extra_tests} == dict(+extra)
    assert {claim.suite for claim in CLAIMS} <= set(SUITES)


@pytest.mark.parametrize(
    ("finals", "verdict"),
    [
        ({"muon": (3.0, 3.01, 2.99), "adamw": (3.5, 3.52, 3.49)}, CONFIRMED),
        ({"muon": (3.5, 3.52, 3.49), "adamw": (3.0, 3.01, 2.99)}, REFUTED),
        ({"muon": (3.0, 3.3, 2.9), "adamw": (3.1, 3.0, 3.2)}, UNDECIDED),
        ({"muon": (3.0, 3.01), "adamw": (3.5, 3.52)}, UNDECIDED),  # two seeds, however clear
        ({"muon": (3.0,), "adamw": (3.5,)}, UNDECIDED),
    ],
)
def test_a_verdict_needs_three_seeds_and_an_interval_without_zero(tmp_path, finals, verdict):
    finding = verdicts(results_of(tmp_path, "moe-final", finals))["The best Muon beats the best AdamW"]
    assert finding.verdict == verdict
    difference = sum(finals["muon"]) / len(finals["muon"]) - sum(finals["adamw"]) / len(finals["adamw"])
    assert f"{difference:.3f} nats" in finding.numbers
    assert ("single seed" in finding.numbers) == (len(finals["muon"]) == 1)


def test_a_chosen_setting_is_confirmed_only_against_all_others(tmp_path):
    low, high = (3.0, 3.01, 2.99), (3.5, 3.52, 3.48)
    for name, losses, verdict in (
        ("best", (low, high, high, high), CONFIRMED),
        ("worst", (high, low, high, high), REFUTED),
        ("one is as low", (low, high, high, (3.01, 2.97, 3.02)), UNDECIDED),
    ):
        finals = dict(zip(("cosine", "linear", "step", "constant"), losses, strict=True))
        found = verdicts(results_of(tmp_path / name, "moe-schedule", finals))
        assert found["Cosine is best for Muon"].verdict == verdict


def test_times_on_a_cpu_are_never_a_verdict(tmp_path):
    finals = {"muon": (3.0, 3.01, 2.99), "adamw": (3.5, 3.52, 3.49)}
    results = results_of(tmp_path, "speedrun-2m", finals, device="cpu")
    finding = verdicts(results)["AdamW is faster per step"]
    assert finding.verdict == NOT_TESTABLE
    assert "CPU" in finding.numbers


def test_no_verdict_before_the_suite_is_over(tmp_path):
    finals = {"muon": (3.0, 3.01, 2.99), "adamw": (3.5, 3.52, 3.49)}
    finding = verdicts(results_of(tmp_path, "moe-final", finals, to_go=1))["The best Muon beats the best AdamW"]
    assert (finding.verdict, finding.numbers) == (UNDECIDED, "1 of 4 runs of muon have not finished")


def test_a_diverged_run_counts_against_its_condition(tmp_path):
    finals = {"muon": (3.0, None, 2.9, 3.0), "adamw": (3.5, 3.5, 3.5, 3.5)}
    results = results_of(tmp_path, "moe-final", finals)
    muon = results.outcome("muon")
    assert (muon.failed, len(muon.losses())) == (1, 3)
    assert math.isnan(muon.loss)
    assert results.best("muon") is None
    assert verdicts(results)["The best Muon beats the best AdamW"].verdict == UNDECIDED  # not on the survivors
    ablation = {"min_lr 0.01": (3.5, 3.52, 3.48), "min_lr 0.1": (3.0, 3.01, 2.99), "min_lr 0.5": (None, None, None)}
    (finding,) = verdicts(results_of(tmp_path, "moe-min-lr", ablation)).values()
    assert finding.verdict == CONFIRMED
    some = ablation | {"min_lr 0.5": (None, None, 3.4)}
    (finding,) = verdicts(results_of(tmp_path / "some", "moe-min-lr", some)).values()
    assert (finding.verdict, "2 of 3 runs of min_lr 0.5 diverged" in finding.numbers) == (UNDECIDED, True)


SIZES = ("64 wide", "96 wide", "128 wide", "192 wide")


def size_results(tmp_path, leads, adamw=None, **more):
    """Four sizes; `leads` says by how much Muon leads at each."""
    finals = {}
    for i, (size, lead) in enumerate(zip(SIZES, leads, strict=True)):
        finals[f"adamw {size}"] = (4.0, 4.02, 3.99) if adamw is None or i < 3 else adamw
        finals[f"muon {size}"] = (4.0 - lead, 4.02 - 1.01 * lead, 3.99 - 0.99 * lead)
    sizes = {size: 1000 * 10**i for i, size in enumerate(SIZES)}
    conditions = [c.name for c in SUITES["model-size"].plan(SCALES["nano"], winners)]
    finals = {name: finals[name] for name in conditions if name in finals}
    more |= {"params": lambda name: sizes[name.split(" ", 1)[1]], "device": "cpu"}
    return results_of(tmp_path, "model-size", finals, **more)


def test_a_lead_that_grows_with_the_model(tmp_path):
    found = verdicts(size_results(tmp_path / "grows", (0.1, 0.2, 0.3, 0.4)))
    grows, breaks = "The lead in loss grows with the model", "AdamW breaks down at the largest size"
    breaks += ": it loses half of its accuracy"
    assert found[grows].verdict == CONFIRMED
    assert "-0.100 nats" in found[grows].numbers
    found = verdicts(size_results(tmp_path / "shrinks", (0.4, 0.3, 0.2, 0.1)))
    assert found[grows].verdict == REFUTED
    found = verdicts(size_results(tmp_path / "diverges", (0.1, 0.1, 0.1, 0.1), adamw=(None, None, None)))
    assert found[breaks].verdict == CONFIRMED
    assert found["Muon is ahead at the largest size"].verdict == CONFIRMED
    killed = size_results(tmp_path / "killed", (0.1, 0.1, 0.1, 0.1), adamw=(None, None, None), reason="no memory")
    for claim in (breaks, "Muon is ahead at the largest size"):
        finding = verdicts(killed)[claim]
        assert (finding.verdict, "failed without diverging" in finding.numbers) == (UNDECIDED, True)


def rate_results(tmp_path, name, optimizer, losses):
    rates = [c.name for c in SUITES[name].plan(SCALES["nano"], winners)]
    return results_of(tmp_path, name, dict(zip(rates, losses, strict=True)))


def test_rates_are_judged_over_seeds_and_never_on_one(tmp_path):
    valley = [(5.0 + x, 5.01 + x, 4.99 + x) for x in (0.9, 0.5, 0.3, 0.0, 0.2, 0.6, 0.9)]  # best at 0.07
    muon = rate_results(tmp_path / "three", "moe-lr-muon", "muon", valley)
    assert verdicts(muon)["Muon's best rate is 0.07"].verdict == CONFIRMED
    single = rate_results(tmp_path / "one", "moe-lr-muon", "muon", [x[:1] for x in valley])
    finding = verdicts(single)["Muon's best rate is 0.07"]
    assert finding.verdict == UNDECIDED
    assert "single seed" in finding.numbers
    gone = rate_results(tmp_path / "gone", "moe-lr-muon", "muon", [(None,) if x[0] == 5.0 else x[:1] for x in valley])
    assert verdicts(gone)["Muon's best rate is 0.07"].verdict == UNDECIDED
    narrow = [(5.0 + x, 5.011 + 1.02 * x, 4.99 + 0.99 * x) for x in (2.0, 2.0, 1.0, 0.0, 1.0, 2.0, 2.0)]
    muon = rate_results(tmp_path / "three", "moe-lr-muon-short", "muon", valley)
    adamw = rate_results(tmp_path / "three", "moe-lr-adam-short", "adamw", narrow)
    finding = verdicts(muon, adamw)["Muon's range of good rates is wider"]
    assert finding.verdict == CONFIRMED
    # 5 % of 5 is 0.25: Muon's valley ends 0.25 / 0.3 of the way from 0.07 to 0.04 and 0.05 / 0.4 of that beyond 0.1
    muon_width = math.log10(0.07 / 0.04) * 0.25 / 0.3 + math.log10(0.1 / 0.07) + math.log10(0.15 / 0.1) * 0.05 / 0.4
    adamw_width = 0.25 * (math.log10(0.005 / 0.002) + math.log10(0.01 / 0.005))
    assert f"within 5 %: Muon {muon_width:.2f}, AdamW {adamw_width:.2f} decades" in finding.numbers


def test_time_to_the_others_final_loss_in_tokens_and_seconds(tmp_path):
    finals = {"muon": (3.0, 3.0, 3.0), "adamw": (4.0, 4.0, 4.5)}
    results = results_of(tmp_path, "speedrun-2m", finals, device="cpu")
    (a, b) = results.crosses()[0]
    found = results.reached(a, b)  # 4.1667: Muon's line from 5 to 3 over 640 tokens and 20 s is there at 41.67 %
    assert found["a tokens"].median == pytest.approx(640 * (5 - b.loss) / 2)
    assert found["a train_seconds"].median == pytest.approx(20 * (5 - b.loss) / 2)
    assert (found["b tokens"].never, found["b tokens"].n) == (1, 3)


def test_a_report_in_the_middle_of_a_suite(tmp_path):
    from suites.report import write_suite_report

    finals = {"muon": (3.0, 3.1, None), "adamw": (3.5,)}
    results = results_of(tmp_path, "moe-long", finals, to_go=1, experts=4)
    started = next(iter(results.outcomes[1].runs)).path.parent / "1-to-go-0"
    write_run(started, status=None, done=0, spectra=False)
    (started / "metrics.jsonl").write_text("")
    results = Results.load(
        results.suite,
        [(o.condition, {run.path: run.status for run in o.runs} | {started: "started"}) for o in results.outcomes],
    )
    sweeps = [rate_results(tmp_path, "moe-lr-muon", "muon", [(5.0 - i,) for i in range(7)])]
    page = write_suite_report(
        [results], {r.name: r for r in (results, *sweeps)}, ["x waits."], "nano", tmp_path / "out"
    )
    text = page.read_text()
    assert "2 planned runs to go." in text
    assert "moe-long, muon: 1 run failed." in text
    assert "-0.4500 nats, adamw has a single seed" in text
    assert "From moe-lr-muon: muon lr 0.25, ON THE EDGE OF THE GRID" in text
    assert not re.search(r"\bnan\b", text)


def test_deviations_from_fairness_are_listed(tmp_path):
    finals = {"muon": (3.0, 3.1, 2.9), "adamw": (3.5, 3.5, 3.5)}
    same = results_of(tmp_path / "same", "moe-long", finals)
    assert any("No other setting differs" in line for line in same.fairness())
    other = results_of(tmp_path / "other", "moe-long", finals)
    for run in other.outcomes[0].runs:
        run.config["weight_decay"] = 0.7
    assert any(line.startswith("Deviation: weight_decay is 0.7 for muon") for line in other.fairness())
    other.outcomes[1].runs[2].config["seed"] = 9
    assert "Deviation: seeds 0, 1, 2 for muon, 0, 1, 9 for adamw." in other.fairness()


def test_the_best_rate_on_the_edge_of_the_grid_is_told(tmp_path):
    from suites.report import rate_sentences

    finals = {"adamw lr 0.0005": (5.0,), "adamw lr 0.001": (4.5,), "adamw lr 0.002": (4.0,)}
    (sentence,) = rate_sentences(results_of(tmp_path / "edge", "moe-lr-adam", finals), "adamw")
    assert "ON THE EDGE" in sentence
    assert "single seed" in sentence
    (sentence,) = rate_sentences(
        results_of(tmp_path / "inside", "moe-lr-adam", finals | {"adamw lr 0.005": (4.7,)}), "adamw"
    )
    assert "EDGE" not in sentence
