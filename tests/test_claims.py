"""The rows of the claims: their quotes are in the documents, and each measures what it says, on hand-written runs."""

import ast
import functools
import math
import re

import numpy as np
import pytest

from engine.files import ROOT
from suites import advice, documents, mixture_claims
from suites.catalog import SUITES
from suites.claims import CLAIMS, DOCUMENT_CLAIMS
from suites.dense_claims import STORED_RUNS
from suites.judging import CONFIRMED, NOT_TESTABLE, REFUTED, UNDECIDED
from suites.paper_claims import PAPER_CLAIMS
from suites.scales import SCALES
from tests.test_suites import rate_results, results_of, verdicts, winners

SEEDS = ROOT.parent / "shared" / "seeds"
DOCUMENTS = {"S0": "000", "S1": "001", "S2": "002", "S3": "003", "S4": "004"}


def test_every_row_names_its_document_and_quotes_it():
    assert {claim.source for claim in DOCUMENT_CLAIMS} == {*DOCUMENTS, STORED_RUNS}
    assert all(bool(claim.quotes) == (claim.source in DOCUMENTS) for claim in CLAIMS)
    assert all(re.fullmatch(r"arXiv \d{4}\.\d{5}|track 3", claim.source) for claim in PAPER_CLAIMS)
    rows = [(claim.suite, claim.source, claim.statement) for claim in CLAIMS]
    assert len(rows) == len(set(rows))


@pytest.mark.skipif(not SEEDS.is_dir(), reason="the documents are not part of this repository")
@pytest.mark.parametrize("source", DOCUMENTS)
def test_every_quote_is_in_the_document_that_it_names(source):
    (path,) = SEEDS.glob(f"{DOCUMENTS[source]}_*.txt")
    text = path.read_text(encoding="utf-8")
    quotes = [quote for claim in CLAIMS if claim.source == source for quote in claim.quotes]
    quotes += [choice.words for choice in advice.CHOICES if choice.source == source]
    quotes += [words for suite, words in advice.OPTIMIZER_WORDS.items() if SUITES[suite].source == source]
    quotes += [advice.NORM_WORDS] if source == "S0" else []
    rates = [f"{rate:g}" for (suite, _), rate in advice.RATES.items() if SUITES[suite].source == source]
    quotes += rates if source in advice.NAMES_RATES else []
    for page, rows in documents.DEVIATIONS.items():
        said = [quoted for _, says, _, _ in rows for quoted in re.findall(r'(?:(S\d): )?"([^"]+)"', says)]
        quotes += [words for named, words in said if (named or page) == source]
    assert [quote for quote in quotes if quote not in text] == []
    assert source in advice.NAMES_RATES or not any(re.search(rf"\b{rate}\b", text) for rate in rates)


def test_a_page_says_of_a_document_what_it_quotes_or_that_it_gives_nothing():
    for rows in documents.DEVIATIONS.values():
        for _, says, _, _ in rows:
            own = re.sub(r'"[^"]+"|S1:|C\.1:', "", says)
            assert own != says or says == "not given", says
            assert not re.search(r"\d", own), says
    tokens = {scale.baseline["tokens"] for scale in SCALES.values()}
    (row,) = (row for row in documents.DEVIATIONS["S3"] if row[0] == "tokens")
    assert row[3] == f"{max(tokens) / 1e9:.1f} billion at full scale, {min(tokens):,} at nano scale"


OF_CONDITIONS = ("best", "best_of", "lower", "higher", "as_good", "no_better", "step_time", "between", "outside")
OF_CONDITIONS += ("opposite", "prevents_divergence", "keeps")


@pytest.mark.parametrize("scale", SCALES)
def test_the_conditions_that_rows_name_are_planned(scale):
    """A name that no suite has would leave its row undecided for ever."""
    constants = {"ADAM_DEFAULT": mixture_claims.ADAM_DEFAULT, "CONSTANT": mixture_claims.CONSTANT}
    planned = {c.name for suite in SUITES.values() for c in suite.plan(SCALES[scale], winners)}
    named = {"muon, no balancing", "adamw, no balancing"}  # put together from two words
    for name in ("dense_claims.py", "mixture_claims.py", "paper_claims.py"):
        for node in ast.walk(ast.parse((ROOT / "suites" / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in OF_CONDITIONS:
                arguments = node.args[1:] if node.func.id == "opposite" else node.args  # whose first is a suite
                inside = [one for argument in arguments for one in ast.walk(argument)]
                named |= {one.value for one in inside if isinstance(one, ast.Constant) and isinstance(one.value, str)}
                named |= {constants[one.id] for one in inside if isinstance(one, ast.Name) and one.id in constants}
    assert len(named) > 40
    assert named - planned == set()


LOW, HIGH = (3.0, 3.01, 2.99), (3.5, 3.52, 3.48)


def test_three_steps_are_as_good_as_five_within_a_hundredth_of_the_loss(tmp_path):
    five = (3.0, 3.1, 2.9)
    for name, gaps, verdict in (
        ("equal", (0.001, 0.002, 0.000), CONFIRMED),
        ("one per cent", (0.032, 0.029, 0.03), UNDECIDED),
        ("worse", (0.1, 0.101, 0.099), REFUTED),
    ):
        three = tuple(a + b for a, b in zip(five, gaps, strict=True))
        finals = {"ns_steps 3": three, "ns_steps 5": five, "ns_steps 7": five, "ns_steps 10": five}
        found = verdicts(results_of(tmp_path / name, "moe-ns-steps", finals, device="cpu"))
        finding = found["Three Newton-Schulz steps are as good as five"]
        assert finding.verdict == verdict
        assert "n = 3, margin 0.030 nats" in finding.test
        assert found["Ten steps are no better than five"].verdict == CONFIRMED


def test_a_trend_is_the_slope_of_each_seed(tmp_path):
    values = (0.85, 0.9, 0.92, 0.95, 0.97, 0.99)
    finals = {f"momentum {v:g}": tuple(3 + (v - 0.9) * tilt for tilt in (2.0, 2.01, 1.99)) for v in values}
    results = results_of(tmp_path, "moe-momentum", finals)
    finding = verdicts(results)["Higher momentum is worse"]
    assert finding.verdict == CONFIRMED
    assert "loss from momentum 0.9 to 0.99 along the line through all: 0.180 nats" in finding.numbers


def test_opposite_preferences_are_the_difference_of_the_differences(tmp_path):
    muon = {"cosine": LOW, "linear": LOW, "step": LOW, "constant": (3.2, 3.22, 3.18)}
    schedule = results_of(tmp_path / "a", "moe-schedule", muon)  # constant costs Muon 0.2
    names = [c.name for c in SUITES["moe-adam"].plan(SCALES["nano"], winners)]
    finals = dict.fromkeys(names, HIGH) | {"constant, no warm-up": (3.4, 3.421, 3.379)}  # and AdamW -0.1
    adamw = results_of(tmp_path / "b", "moe-adam", finals)
    finding = verdicts(adamw, schedule)["A constant rate suits AdamW and not Muon"]
    assert finding.verdict == CONFIRMED
    assert "of Muon minus of AdamW: 0.300 nats" in finding.numbers
    assert "Muon: constant - cosine: 0.200 nats" in finding.numbers
    assert "AdamW: constant, no warm-up - no warm-up: -0.100 nats" in finding.numbers
    assert "needs the runs of moe-schedule" in verdicts(adamw)["A constant rate suits AdamW and not Muon"].numbers
    for name, costs, verdict in (
        ("both dislike it", (3.6, 3.621, 3.579), REFUTED),  # AdamW less, so the interaction alone would confirm
        ("unclear", (3.4, 3.8, 3.2), UNDECIDED),
    ):
        both = results_of(tmp_path / name, "moe-adam", dict.fromkeys(names, HIGH) | {names[1]: costs})
        assert verdicts(both, schedule)["A constant rate suits AdamW and not Muon"].verdict == verdict
    likes = results_of(tmp_path / "d", "moe-schedule", muon | {"constant": (2.95, 2.962, 2.938)})  # by 0.05 only
    assert verdicts(adamw, likes)["A constant rate suits AdamW and not Muon"].verdict == REFUTED


def test_other_decays_do_not_help_unless_one_does(tmp_path):
    names = [c.name for c in SUITES["moe-adam"].plan(SCALES["nano"], winners)]
    for decay, verdict in (((3.5, 3.521, 3.482), CONFIRMED), ((3.9, 3.92, 3.88), CONFIRMED), (LOW, REFUTED)):
        finals = dict.fromkeys(names, HIGH) | {"decay 0.2": decay}
        results = results_of(tmp_path / f"{decay[0]}", "moe-adam", finals)
        assert verdicts(results)["Other weight decays do not help AdamW"].verdict == verdict


def test_how_soon_and_how_far_ahead_by_hand(tmp_path):
    """Losses fall along lines from 5 over 640 tokens."""
    finals = {"muon": (3.0, 3.01, 2.99), "adamw": (4.0, 4.01, 3.99)}
    found = verdicts(results_of(tmp_path / "a", "moe-final", finals, device="cpu"))
    # AdamW's loss after 30 %: 4.7; Muon's line is there after 15 %
    sooner = "Muon reaches an early loss sooner (5.8; here AdamW's after 30 % of its run)"
    assert found[sooner].verdict == CONFIRMED
    assert ": 0.5 times" in found[sooner].numbers
    ahead = found["Muon is ahead after two fifths of the run"]
    assert f"{100 * (4.2 / 4.6 - 1):.1f} %" in ahead.numbers
    early = "The lead is larger after two fifths of the run than at its end"
    assert found[early].verdict == REFUTED  # 4.2 / 4.6 early, 3 / 4 at the end
    widens = found["The gap widens between a fifth and two fifths of the run"]
    assert widens.verdict == CONFIRMED
    assert f"{100 * (4.2 / 4.6 / (4.6 / 4.8) - 1):.1f} %" in widens.numbers
    slow = results_of(tmp_path / "b", "moe-final", {"muon": HIGH, "adamw": LOW}, device="cpu")
    assert verdicts(slow)[sooner].verdict == REFUTED


def test_twice_the_tokens_count_at_the_end_of_a_schedule_alone(tmp_path):
    short = results_of(tmp_path / "a", "speedrun-2m", {"muon": (3.9, 3.91, 3.89), "adamw": HIGH}, steps=10)
    claim = "AdamW needs more than twice the tokens for Muon's loss"
    for end, verdict in (((4.1, 4.12, 4.08), CONFIRMED), ((3.5, 3.52, 3.48), REFUTED)):
        longer = results_of(tmp_path / f"{end[0]}", "baseline", {"muon": LOW, "adamw": end}, steps=20)
        finding = verdicts(short, longer)[claim]
        assert finding.verdict == verdict
        assert f"{end[0] - 3.9:.3f} nats" in finding.numbers
    for steps in (10, 40):
        other = results_of(tmp_path / f"{steps} steps", "baseline", {"muon": LOW, "adamw": HIGH}, steps=steps)
        assert "do not have 2 times the tokens" in verdicts(short, other)[claim].numbers


def test_an_overhead_is_judged_against_its_limit_on_a_gpu_alone(tmp_path):
    claim = "Muon's step takes at most 10 % longer"
    for name, longer, verdict in (("a", 1.08, CONFIRMED), ("b", 1.2, REFUTED)):
        steps = {"muon": longer * 1000.0, "adamw": 1000.0}
        finals, more = {"muon": LOW, "adamw": HIGH}, {"step_ms": lambda words, steps=steps: steps[words]}
        finding = verdicts(results_of(tmp_path / name, "moe-final", finals, device="cuda", **more))[claim]
        assert finding.verdict == verdict
        assert f"limit +10.0 %: {100 * (longer - 1):+.1f} %" in finding.numbers
    finding = verdicts(results_of(tmp_path / "cpu", "moe-final", finals, device="cpu", **more))[claim]
    assert finding.verdict == NOT_TESTABLE


def test_what_lies_between_two_ends_and_outside_a_range(tmp_path):
    ends = {"cosine": LOW, "constant": HIGH}
    claim = "Linear and step decay are between the two"
    for name, step, verdict in (("in", (3.2, 3.22, 3.19), CONFIRMED), ("out", (3.9, 3.92, 3.89), REFUTED)):
        results = results_of(tmp_path / name, "moe-schedule", {**ends, "linear": (3.1, 3.12, 3.09), "step": step})
        assert verdicts(results)[claim].verdict == verdict
    rates = [c.name for c in SUITES["moe-lr-adam-short"].plan(SCALES["nano"], winners)]
    finals = dict.fromkeys(rates, HIGH) | {"adamw lr 0.001": LOW, "adamw lr 0.002": LOW, rates[-1]: (None, None, None)}
    claim = "AdamW's loss degrades outside 0.0007 to 0.002"
    assert verdicts(results_of(tmp_path / "narrow", "moe-lr-adam-short", finals))[claim].verdict == CONFIRMED
    assert "1 of" in verdicts(results_of(tmp_path / "counted", "moe-lr-adam-short", finals))[claim].numbers
    for rate in ("adamw lr 0.005", "adamw lr 0.0005"):
        broad = finals | {rate: LOW}
        assert verdicts(results_of(tmp_path / rate, "moe-lr-adam-short", broad))[claim].verdict != CONFIRMED


def test_balancing_makes_the_shares_more_even(tmp_path):
    """Of four experts one gets twice the others' share, of two as well; without it there are two."""
    names = ("muon", "muon, no balancing", "adamw", "adamw, no balancing")
    claim = "The load-balancing loss prevents collapse: without it shares are less even"
    for kept, lost, verdict in ((4, 2, CONFIRMED), (2, 4, REFUTED)):
        experts = {"experts": lambda words, kept=kept, lost=lost: lost if "no" in words.split(", ")[-1] else kept}
        results = results_of(tmp_path / f"{kept}", "moe-balance", dict.fromkeys(names, LOW), spectra=False, **experts)
        assert verdicts(results)[claim].verdict == verdict


def test_balanced_experts_are_judged_by_entropy(tmp_path):
    finals = {"muon": LOW, "adamw": HIGH}
    results = results_of(tmp_path, "moe-long", finals, experts=4, spectra=False)
    finding = verdicts(results)["Both optimizers keep the experts balanced"]
    p = np.array([2, 1, 1, 1]) / 5  # of each layer, another expert first
    evenness = -(p * np.log(p)).sum() / math.log(4)
    assert f"{evenness:.4f}" in finding.numbers
    assert "max over mean 1.60, dead experts 0 in 3 runs" in finding.numbers
    assert finding.verdict == CONFIRMED  # 0.961 of at least 0.95, without spread
    assert verdicts(results)["The experts are used alike under both"].verdict == CONFIRMED


def test_spectral_claims_by_hand(tmp_path):
    """Norms grow from 1 to 2 in ten steps; the smaller half of the values shrinks by `decay` a step."""
    decay = {"muon": 0.0, "adamw": 0.05}
    finals = {"muon": LOW, "adamw": HIGH}
    found = verdicts(results_of(tmp_path, "baseline", finals, device="cpu", decay=lambda name: decay[name]))
    bigger = found["AdamW's spectral norms are a lot bigger: at least twice"]
    assert bigger.verdict == REFUTED
    assert "spectral norm of muon over that of adamw, limit 0.5 times: 1 times" in bigger.numbers
    flat = "Muon's entropy and rank stay flat over time"
    assert found[flat].verdict == CONFIRMED
    assert found["Muon preserves rank, by spectral entropy"].verdict == CONFIRMED
    assert found["Muon's runs have identical spectral signatures"].verdict == CONFIRMED
    stable = found["Muon's spectrum is flatter, by stable rank"]  # of 8, 4, 4, 8, 8, 8: even under Muon
    ratio = (1 + 0.5**2) / 2
    assert f"{(1 - ratio) * 40 / 6:.2f} directions" in stable.numbers
    assert found[flat].numbers.count("+0.00 %") == 2
    swapped = results_of(tmp_path / "b", "baseline", finals, device="cpu", decay=lambda name: 0.05 - decay[name])
    found = verdicts(swapped)
    assert found["Muon's spectrum is flatter, by stable rank"].verdict == REFUTED
    assert found[flat].verdict == REFUTED


def test_the_ratio_of_the_best_rates(tmp_path):
    rates = {
        name: [c.fields["lr"] for c in SUITES[name].plan(SCALES["nano"], winners)]
        for name in ("moe-lr-muon", "moe-lr-adam", "moe-lr-muon-short", "moe-lr-adam-short")
    }

    @functools.cache
    def valley(name, best, steepness=0.1):
        def at(rate, seed):
            return 5 + steepness * (math.log(rate / best) - 0.01 * seed) ** 2

        losses = [tuple(at(rate, seed) for seed in (-1, 0, 1)) for rate in rates[name]]
        return rate_results(tmp_path / f"{name}{best}{steepness}", name, "", losses)

    muon = valley("moe-lr-muon", 0.07)
    finding = verdicts(muon, valley("moe-lr-adam", 0.001 * 1.1))["Muon's best rate is 70 times AdamW's"]
    assert "63.6 times" in finding.numbers
    assert finding.verdict == CONFIRMED  # within a factor of two of 70
    finding = verdicts(muon, valley("moe-lr-adam", 0.01))["Muon's best rate is 70 times AdamW's"]
    assert (finding.verdict, "7 times" in finding.numbers) == (REFUTED, True)
    # Valleys of one shape: the ranges are as many times as wide as the best rates are higher, but for the grids' knots.
    for best, verdict in ((0.0025, CONFIRMED), (0.008, REFUTED)):
        sharp = valley("moe-lr-muon-short", 0.07, 0.3), valley("moe-lr-adam-short", best, 0.3)
        finding = verdicts(*sharp)["Muon's range is 30 times as wide"]
        assert finding.verdict == verdict
        times = float(re.search(r"Muon over AdamW: ([\d.]+) times", finding.numbers)[1])
        assert times == pytest.approx(0.07 / best, rel=0.35)
    flat = rate_results(tmp_path / "flat", "moe-lr-adam-short", "", [(5.0, 5.1, 5.2)] * len(rates["moe-lr-adam"]))
    assert "reaches the end of a grid" in verdicts(sharp[0], flat)["Muon's range is 30 times as wide"].numbers


def test_a_range_that_widens_with_the_run(tmp_path):
    """Losses 5 + steepness x ln(rate / 0.07)^2: within 5 % over 2 sqrt(0.25 / steepness) of the logarithm."""
    rates = [c.fields["lr"] for c in SUITES["moe-lr-muon"].plan(SCALES["nano"], winners)]

    @functools.cache
    def sweep(name, steepness):
        at = [5 + steepness * math.log(rate / 0.07) ** 2 for rate in rates]
        losses = [(loss, loss + 0.01, loss - 0.01) for loss in at]
        return rate_results(tmp_path / f"{name}{steepness}", name, "", losses)

    claim = "The range widens in longer runs"
    # At 0.1 the grid ends inside the range on one side, at 0.01 on both: such a range can only be wider than it seems.
    for long, short, verdict, ends_in in (
        (0.3, 2.0, CONFIRMED, None),
        (2.0, 0.3, REFUTED, None),
        (0.1, 2.0, CONFIRMED, None),
        (2.0, 0.1, REFUTED, None),
        (0.01, 0.1, UNDECIDED, "moe-lr-muon-short"),
        (0.1, 0.01, UNDECIDED, "here"),
    ):
        finding = verdicts(sweep("moe-lr-muon", long), sweep("moe-lr-muon-short", short))[claim]
        assert finding.verdict == verdict
        assert ends_in is None or f"the grid of {ends_in} ends inside its range" in finding.numbers
