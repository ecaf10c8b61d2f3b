"""The suites that retest papers: their plans, and their measures on hand-written runs."""

import dataclasses
import math

import pytest
import torch

import model
from settings import Settings
from suites.catalog import SUITES
from suites.judging import CONFIRMED, REFUTED, UNDECIDED
from suites.planner import Selection
from suites.scales import SCALES
from suites.suite import RETESTS
from tests.test_suites import FRESH_SEEDS, results_of, verdicts, winners

NAMES = [name for name, suite in SUITES.items() if suite.group == RETESTS]


def test_retests_are_on_seeds_that_chose_nothing():
    assert Selection(suite="retests").suites() == NAMES
    assert len(NAMES) == 8
    assert all(SUITES[name].seeds_at(SCALES["nano"]) == FRESH_SEEDS for name in NAMES)
    assert all(set(SUITES[name].needs) <= {"speedrun-lr", "lr-sensitivity"} for name in NAMES)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", NAMES)
def test_a_plan_is_valid(name, scale):
    conditions = SUITES[name].plan(SCALES[scale], winners)
    names = [condition.name for condition in conditions]
    assert len(set(names)) == len(names)
    assert {c.versus for c in conditions} - {None} <= set(names)
    assert all(Settings(**c.fields).optimizer in ("muon", "adamw") for c in conditions)
    different = {tuple(sorted((k, str(v)) for k, v in c.fields.items())) for c in conditions}
    assert len(different) == len(conditions)


@pytest.mark.parametrize(("scale", "vocabulary"), [("full", 49_152), ("nano", 4096)])
def test_lengths_are_tokens_per_parameter(scale, vocabulary):
    smallest = next(iter(SCALES[scale].sizes.values()))
    shape = {key: smallest[key] for key in ("layers", "d_model", "heads", "kv_heads", "d_ff") if key in smallest}
    with torch.device("meta"):
        built = model.Transformer(dataclasses.replace(model.SIZES[smallest["model"]], **shape), vocabulary)
    for ratio, budget in SCALES[scale].lengths.items():
        assert budget["tokens"] / built.parameter_count() == pytest.approx(ratio, rel=0.01)


def test_rates_follow_the_root_of_the_batch_and_one_over_the_width():
    rates = {c.name: c.fields["lr"] for c in SUITES["batch-size"].plan(SCALES["nano"], winners)}
    assert rates["muon, batches of 8,192"] == 2 * rates["muon, batches of 2,048"] == 0.04
    assert rates["adamw, batches of 1,024"] == pytest.approx(0.003 / math.sqrt(2), rel=1e-3)
    rates = {c.name: c.fields["lr"] for c in SUITES["tokens-per-parameter"].plan(SCALES["nano"], winners)}
    assert (rates["muon, 8 a parameter"], rates["adamw, 8 a parameter"]) == (0.02, 0.006)  # half as wide


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
        ((-0.1, -0.2, -0.3, -0.4), REFUTED),  # there is no lead that could shrink
    ],
)
def test_a_lead_that_falls_by_a_tenth_with_each_doubling(tmp_path, leads, shrinks):
    found = verdicts(with_leads(tmp_path, "tokens-per-parameter", "tokens", leads))
    finding = found["The lead shrinks with tokens per parameter"]
    assert finding.verdict == shrinks
    if shrinks == CONFIRMED:
        assert f"{0.1 / math.log10(2):.3f} nats" in finding.numbers


@pytest.mark.parametrize(
    ("leads", "lasts"),
    [
        ((0.3, 0.3, 0.3, 0.3), CONFIRMED),
        ((0.2, 0.3, 0.4, 0.5), CONFIRMED),
        ((0.5, 0.4, 0.3, 0.2), REFUTED),
        ((-0.3, -0.3, -0.3, -0.3), REFUTED),  # nor one that could last
    ],
)
def test_a_lead_lasts_unless_it_falls_by_a_hundredth_of_the_loss(tmp_path, leads, lasts):
    found = verdicts(with_leads(tmp_path, "batch-size", "batch_tokens", leads))
    assert found["Muon keeps its lead at large batches"].verdict == lasts


def test_a_lead_on_rare_tokens_is_the_difference_of_two_differences(tmp_path):
    finals = {"muon": (3.0, 3.01, 2.99), "adamw": (3.5, 3.52, 3.49)}
    found = verdicts(results_of(tmp_path / "a", "rare-tokens", finals, by_token=True))
    finding = found["Muon's lead is larger on rare tokens than on frequent ones"]
    assert finding.verdict == CONFIRMED
    assert f"{0.9 * (3.0 - 10.51 / 3):.3f} nats" in finding.numbers  # the tenth decile has 1.45, the first 0.55 of it
    older = verdicts(results_of(tmp_path / "b", "rare-tokens", finals))
    assert "not logged" in older["Muon's lead is larger on rare tokens than on frequent ones"].numbers
