"""What a plan tells before anything is trained: how long it takes and what its seeds can show."""

import itertools
import json
import math
import types

import numpy as np
import pytest
from scipy import stats

import experiments
from suites import cost, power_table
from suites.catalog import SUITES
from suites.claims import CLAIMS
from suites.cost import CORE_FLOPS, START_SECONDS, minutes, run_seconds
from suites.planner import Planner, Selection
from suites.scales import SCALES
from tests.test_suites import results_of

NANO = {"model": "nano", "tokens": 262_144, "batch_tokens": 2048, "eval_every": 16, "eval_tokens": 8192}


def test_the_time_of_a_run_counts_steps_validations_and_spectra():
    flops = 6 * (4 * (128 * (128 + 64 + 64 + 128) + 2 * 128 * 512) + 4096 * 128) + 12 * 4 * 128 * 256
    plain = run_seconds(NANO | {"spectra_every": 0})
    tokens = 262_144 + 9 * 8192 / 3  # the first validation comes before the first step
    assert plain == pytest.approx(START_SECONDS + flops * tokens / CORE_FLOPS)
    assert run_seconds(NANO | {"spectra_every": 0}, tokens=2 * 262_144) == pytest.approx(
        START_SECONDS + flops * (2 * 262_144 + 17 * 8192 / 3) / CORE_FLOPS
    )
    often, seldom = (run_seconds(NANO | {"spectra_every": every}) for every in (1, 128))
    assert (often - plain) / (seldom - plain) == pytest.approx(129 / 2)
    assert run_seconds(NANO | {"spectra_every": 0, "d_model": 192}) > plain
    assert math.isnan(run_seconds({"model": "88m", "tokens": 10**6}))
    assert minutes([60.0, 120.0, 60.0], slots=2) == 2.0


def test_a_slower_core_takes_longer_in_proportion_to_its_best_product(monkeypatch):
    fast, paused = 0.01, 0.05  # seconds of a product; a busy core pauses most of them
    ticks = itertools.accumulate(itertools.cycle((0.0, paused, 0.0, fast)))
    monkeypatch.setattr(cost, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
    rate = 2 * 256**3 / fast
    assert cost.slowness() == pytest.approx(220e9 / rate, rel=0.02)


def test_claims_have_six_seeds_and_128_steps_at_nano_scale_and_the_plan_fits_165_minutes(tmp_path, shards_folder):
    nano, claimed = SCALES["nano"], {claim.suite for claim in CLAIMS}
    claimed.add("moe-lr-adam")  # a claim of moe-lr-muon compares the two
    assert {name for name, suite in SUITES.items() if suite.claimed} == claimed
    planner = Planner(Selection(suite="everything", scale="nano", runs_dir=tmp_path, data=shards_folder))
    later = planner.estimate(planner.stages())
    assert minutes([later.seconds], slots=2) < 165
    for name, suite in SUITES.items():
        seeds = suite.seeds_at(nano)
        assert len(set(seeds)) >= (6 if name in claimed else 1 if suite.one_seed else 3)
        for needed in suite.needs:  # seeds that chose a setting do not judge it
            fresh = name in ("speedrun-2m", "baseline", "model-size", "moe-long", "moe-final")
            assert not fresh or set(seeds).isdisjoint(SUITES[needed].seeds_at(nano)), name
    budgets = [nano.dense, nano.baseline, nano.search, nano.moe, *nano.sizes.values(), nano.moe_long]
    assert min(fields["tokens"] // fields["batch_tokens"] for fields in budgets) >= 128
    assert nano.moe_short["tokens"] / nano.moe["tokens"] == pytest.approx(200 / 500, abs=0.01)


def test_what_a_number_of_seeds_can_show_follows_from_the_spread_seen(tmp_path):
    gaps = np.array([-0.4, -0.5, -0.6])
    results = results_of(tmp_path, "moe-long", {"muon": tuple(3.5 + gaps), "adamw": (3.5, 3.5, 3.5)}, experts=4)
    claim = next(c for c in CLAIMS if c.suite == "moe-long" and c.statement == "The lead lasts")
    found = power_table.claim_power(claim, {"moe-long": results})
    assert (found["seen"], found["n"]) == ("-0.500 nats", 3)
    effect, alpha = float(found["could"]["6"].removesuffix(" nats")), 0.05 / results.family_size
    error = np.std(gaps, ddof=1) / math.sqrt(6)
    noncentral = stats.nct(df=5, nc=effect / error)
    power = noncentral.sf(stats.t.ppf(1 - alpha / 2, 5))  # of the paired t-test, by the noncentral t distribution
    assert power == pytest.approx(0.8, abs=0.01)
    assert float(found["could"]["12"].split()[0]) < effect


def parameters_of_nano(vocabulary):
    """By hand: embedding; q, k, v and o, with k and v of half the heads; up and down; gains, of q and k per head."""
    attention, ffn, gains = 2 * 128 * 128 + 2 * 64 * 128, 2 * 512 * 128, 2 * 128 + 2 * 32
    return vocabulary * 128 + 4 * (attention + ffn + gains) + 128


def test_a_dry_run_tells_what_the_seeds_can_show_and_the_time(tmp_path, shards_folder, run_main, monkeypatch):
    monkeypatch.setattr(experiments, "slowness", lambda: 2.0)
    results = results_of(tmp_path, "lr-sensitivity", {"muon lr 0.01": (3.0, 3.1), "muon lr 0.02": (3.0, 3.1)})
    (tmp_path / "runs" / "report").mkdir(parents=True)
    power_table.write({"lr-sensitivity": results}, tmp_path / "runs" / "report" / "power.json")
    path = tmp_path / "runs" / "report" / "power.json"
    known = json.loads(path.read_text())
    known["lr-sensitivity: AdamW has a sharp peak, Muon has not"] = {
        "seen": "0.4 decades",
        "n": 4,
        "could": {"6": "0.1 d"},
    }
    path.write_text(json.dumps(known))
    where = ("--scale", "nano", "--data", shards_folder, "--runs-dir", tmp_path / "runs", "--dry-run")
    code, out, _ = run_main(experiments.main, "run", "lr-sensitivity", *where)
    assert code == 0
    row = next(line for line in out.splitlines() if line.endswith("AdamW has a sharp peak, Muon has not"))
    assert row.split()[:4] == ["lr-sensitivity", "6", "0.1", "d"]
    assert "0.4 decades (n = 4)" in row
    seconds = 90 * run_seconds({**SCALES["nano"].search})
    assert (
        f"90 runs, {90 * 262_144:,} tokens; about {2 * minutes([seconds], 2):.0f} minutes on 2 idle cores"
        in out.replace(f"on {len(experiments.own_cores())} idle", "on 2 idle")
        or len(experiments.own_cores()) != 2
    )
    gigabytes = 90 * 4 * parameters_of_nano(vocabulary=320) / 1e9
    assert f"disk: about {gigabytes:.3g} GB for the runs to go, " in out
    assert "too little" not in out
    nothing_free = types.SimpleNamespace(free=0)
    monkeypatch.setattr(experiments.shutil, "disk_usage", lambda folder: nothing_free)
    _, out, _ = run_main(experiments.main, "run", "lr-sensitivity", *where, "--seeds", 0, 1, "--keep-checkpoints")
    assert f"about {7 * gigabytes / 3:.3g} GB for the runs to go, 0 GB free in {tmp_path / 'runs'}; too little" in out
    assert "no verdict below 3" in out
    _, out, _ = run_main(experiments.main, "run", "moe-final", *where)
    assert "cannot be planned yet" in out
    assert "minutes on" in out
