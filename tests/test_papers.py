"""The suites that retest papers: their plans, and their measures on hand-written runs."""

import dataclasses
import math

import pytest
import torch

import model
from settings import Settings
from suites import papers
from suites.catalog import SUITES
from suites.judging import CONFIRMED, REFUTED, UNDECIDED
from suites.paper_claims import AT_MOST, CONTROL
from suites.planner import Selection
from suites.scales import SCALES
from suites.suite import RETESTS
from tests.test_suites import FRESH_SEEDS, results_of, verdicts, winners

NAMES = [name for name, suite in SUITES.items() if suite.group == RETESTS]


def test_retests_are_on_six_seeds_that_chose_nothing():
    assert Selection(suite="retests").suites() == NAMES
    sweeps = [name for name in NAMES if SUITES[name].varies == "lr"]
    assert (len(NAMES), sweeps) == (10, ["retest-lr", "batch-size-lr"])
    for scale in SCALES.values():
        assert all(SUITES[name].seeds_at(scale) == FRESH_SEEDS for name in NAMES if name not in sweeps)
        assert all(SUITES[name].seeds_at(scale) == (0, 1, 2) for name in sweeps)
    assert all("fair-trials" in SUITES[name].needs for name in NAMES)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", NAMES)
def test_a_plan_is_valid(name, scale):
    conditions = SUITES[name].plan(SCALES[scale], winners)
    names = [condition.name for condition in conditions]
    assert len(set(names)) == len(names)
    assert {c.versus for c in conditions} - {None} <= set(names)
    assert all(Settings(**c.fields).optimizer in ("muon", "adamw") for c in conditions)
    different = {(c.arm, *sorted((k, str(v)) for k, v in c.fields.items())) for c in conditions}
    assert len(different) == len(conditions)


@pytest.mark.parametrize(("scale", "vocabulary"), [("full", 49_152), ("nano", 4096)])
def test_lengths_are_tokens_per_parameter(scale, vocabulary):
    smallest = next(iter(SCALES[scale].sizes.values()))
    shape = {key: smallest[key] for key in ("layers", "d_model", "heads", "kv_heads", "d_ff") if key in smallest}
    with torch.device("meta"):
        built = model.Transformer(dataclasses.replace(model.SIZES[smallest["model"]], **shape), vocabulary)
    for ratio, budget in SCALES[scale].lengths.items():
        assert budget["tokens"] / built.parameter_count() == pytest.approx(ratio, rel=0.01)


def test_both_optimizers_train_as_their_best_trial_did():
    def best(suite, arm):
        return winners(suite, arm) | {"beta1": 0.6, "beta2": 0.9, "tokens": 1, "model": "88m", "eval_every": 1}

    for name in NAMES:
        for c in SUITES[name].plan(SCALES["nano"], best):
            assert (c.fields["model"], c.fields["beta1"], c.fields["warmup"]) == ("nano", 0.6, 0.05), name
            assert (c.fields["tokens"] > 1, c.fields["spectra_every"]) == (True, 0)
    full = [c.fields for name in NAMES for c in SUITES[name].plan(SCALES["full"], best)]
    assert {fields.get("eval_every") for fields in full} & {1} == set()  # a trial validates once, at its end


def test_parts_of_muon_differ_from_each_other_and_from_adamw_in_nothing_else():
    def best(suite, arm):
        mine = {"lr": 0.5 if arm == "Muon" else 0.4} if suite == "retest-lr" else {}
        return winners(suite, arm) | ({"beta1": 0.6} if arm == "adamw" else {"beta1": 0.8}) | mine

    parts = {c.name: dict(c.fields) for c in SUITES["muon-parts"].plan(SCALES["nano"], best)}
    differ = ("optimizer", "lr", "left_lr", "muon_on")
    found = [tuple(fields.pop(key, None) for key in differ) for fields in parts.values()]
    part = ("muon", 0.5, 0.4)
    wholes = [("adamw", 0.4, None, "blocks"), ("muon", 0.5, None, "blocks")]
    assert found == [*wholes, (*part, "v,o,up,down"), (*part, "q,k")]
    assert len({tuple(sorted(fields.items())) for fields in parts.values()}) == 1
    assert parts["Muon on q, k"]["beta1"] == 0.8  # Muon's


def test_every_arm_of_a_retest_has_a_sweep_around_the_rate_of_its_optimizers_best_trial():
    found = {}
    for c in SUITES["retest-lr"].plan(SCALES["nano"], winners):
        found.setdefault(c.arm, []).append(c.fields["lr"])
    assert set(found) == set(papers.ARMS)
    for arm, rates in found.items():
        assert rates == ([0.0015, 0.003, 0.006] if arm.startswith("AdamW") else [0.01, 0.02, 0.04])

    def marked(suite, arm):
        return winners(suite, arm) | ({"lr": 1 + list(papers.ARMS).index(arm)} if suite == "retest-lr" else {})

    for name in set(NAMES) - {"retest-lr", "batch-size-lr", "tokens-per-parameter"}:
        for c in SUITES[name].plan(SCALES["nano"], marked):
            if c.fields["batch_tokens"] == 2048:
                assert c.fields["lr"] >= 1, (name, c.name)


def test_rates_of_the_large_batch_are_swept_around_the_best():
    conditions = SUITES["batch-size-lr"].plan(SCALES["nano"], winners)
    assert [c.fields["lr"] for c in conditions] == [0.02, 0.04, 0.08, 0.003, 0.006, 0.012]
    assert {(c.fields["batch_tokens"], c.fields["tokens"]) for c in conditions} == {(8192, 128 * 2048)}

    def swept(suite, arm):
        return winners(suite, arm) | ({} if suite == "fair-trials" else {"lr": 0.5})

    large = {c.name: c.fields["lr"] for c in SUITES["batch-size"].plan(SCALES["nano"], swept)}
    assert [rate for name, rate in large.items() if "8,192" in name] == [0.5, 0.5]
    sizes = {c.name: c.fields["lr"] for c in SUITES["tokens-per-parameter"].plan(SCALES["nano"], winners)}
    assert (sizes["muon, 8 a parameter"], sizes["adamw, 8 a parameter"]) == (0.02, 0.006)  # half as wide


@pytest.mark.parametrize(
    ("share", "nearly", "little"),
    [(1.0, CONFIRMED, REFUTED), (0.9, CONFIRMED, REFUTED), (0.5, REFUTED, REFUTED), (0.1, REFUTED, CONFIRMED)],
)
def test_a_part_of_the_matrices_makes_a_share_of_the_gain(tmp_path, share, nearly, little):
    noise = (0.0, 0.002, -0.001)
    finals = {CONTROL: [4.0 + x for x in noise], "Muon on every projection": [3.0 - x for x in noise]}
    finals |= {name: [4.0 - share + x / 2 for x in noise] for name in ("Muon on v, o, up, down", "Muon on q, k")}
    found = [f for words, f in verdicts(results_of(tmp_path, "muon-parts", finals)).items() if "alone" in words]
    assert [f.verdict for f in found] == [nearly, little]
    assert all(f"it makes {100 * share:.0f} % of the gain" in f.numbers for f in found)
    finals[CONTROL], finals["Muon on every projection"] = finals["Muon on every projection"], finals[CONTROL]
    none = verdicts(results_of(tmp_path / "no gain", "muon-parts", finals))
    assert {f.verdict for words, f in none.items() if "alone" in words} == {REFUTED}


@pytest.mark.parametrize(
    ("svd", "verdict"),
    [((3.0, 3.01, 2.99), CONFIRMED), ((3.3, 3.31, 3.29), CONFIRMED), ((2.7, 2.71, 2.69), REFUTED)],
)
def test_no_better_is_not_refuted_by_what_is_worse(tmp_path, svd, verdict):
    plain = (3.001, 3.009, 2.992)
    finals = {"Polar Express, 5 steps": plain, "exact, by SVD": svd, "cubic, 5 steps": plain, "quintic, 5 steps": plain}
    found = verdicts(results_of(tmp_path, "muon-exactness", finals))
    assert found[f"An exact polar factor beats Polar Express {AT_MOST}"].verdict == verdict


def with_leads(tmp_path, name, setting, leads):
    """Muon's lead (nats) by the value of a setting, over AdamW's 3, with a little spread."""
    labels = {c.name.split(", ")[1]: c.fields[setting] for c in SUITES[name].plan(SCALES["nano"], winners)}
    finals = {}
    for (label, _), lead in zip(labels.items(), leads, strict=True):
        finals[f"muon, {label}"] = tuple(3 - lead + noise for noise in (0.001, -0.001, 0.002))
        finals[f"adamw, {label}"] = (3.0, 3.001, 2.999)
    return results_of(tmp_path, name, finals, **{setting: lambda words: labels[words.split(", ")[1]]})


@pytest.mark.parametrize(
    ("leads", "shrinks"),
    [
        ((0.5, 0.4, 0.3, 0.2), CONFIRMED),
        ((0.2, 0.3, 0.4, 0.5), REFUTED),
        ((0.3, 0.3, 0.3, 0.3), UNDECIDED),
        ((-0.1, -0.2, -0.3, -0.4), UNDECIDED),  # never there: counts with its whole length, as AdamW's
    ],
)
def test_a_speed_up_that_shrinks_with_the_tokens(tmp_path, leads, shrinks):
    found = verdicts(with_leads(tmp_path, "tokens-per-parameter", "tokens", leads))
    finding = found["Muon's speed-up shrinks with tokens per parameter"]
    assert finding.verdict == shrinks
    if shrinks == CONFIRMED:  # Muon falls from 5 to 3 - lead, so it is at 3 after 2 / (2 + lead) of the way
        shares = [math.log(2 / (2 + lead)) for lead in leads]
        assert f"over AdamW's, 360 a parameter: {math.exp(shares[0]):.3g} times" in finding.numbers
        slope = sum(x * y for x, y in zip((-1.5, -0.5, 0.5, 1.5), shares, strict=True)) / 5  # per doubling
        assert f"through all: {math.exp(3 * slope):.3g} times" in finding.numbers


@pytest.mark.parametrize(
    ("leads", "lasts"),
    [
        ((0.3, 0.3), CONFIRMED),
        ((0.2, 0.5), CONFIRMED),
        ((0.5, 0.2), REFUTED),
        ((-0.3, -0.3), REFUTED),  # there is no lead that could last
    ],
)
def test_a_lead_lasts_unless_it_falls_by_a_hundredth_of_the_loss(tmp_path, leads, lasts):
    found = verdicts(with_leads(tmp_path, "batch-size", "batch_tokens", leads))
    assert found["Muon keeps its lead at large batches"].verdict == lasts


def test_a_lead_on_rare_tokens_is_the_difference_of_two_differences(tmp_path):
    finals = {"muon": (3.0, 3.01, 2.99), "adamw": (3.5, 3.52, 3.5)}
    found = verdicts(results_of(tmp_path / "a", "rare-tokens", finals, by_token=True))
    lead = 3.0 - 10.52 / 3
    # the last three deciles have 1.35 times the loss on average, the first three 0.65 times
    rare, more = (found[words] for words in found if "rare" in words)
    assert (rare.verdict, more.verdict) == (CONFIRMED, CONFIRMED)
    assert f"{1.35 * lead:.3f} nats" in rare.numbers
    assert f"{0.7 * lead:.3f} nats" in more.numbers
    older = verdicts(results_of(tmp_path / "b", "rare-tokens", finals))
    assert all("not logged" in finding.numbers for words, finding in older.items() if "rare" in words)
