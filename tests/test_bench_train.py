"""The training benchmark: its table and JSON are whole, and a wrong gradient or a bad flag stops it."""

import json

import pytest
import torch

from bench import train as bench_train
from model import KERNELS

SMALL = ("--model", "nano", "--seq-len", 16, "--batch-tokens", 64, "--vocab-size", 300, "--steps", 1, "--rounds", 2)


def test_prints_a_row_per_candidate_and_writes_the_same(run_main, tmp_path):
    file = tmp_path / "record.json"
    code, out, _ = run_main(bench_train.main, *SMALL, "--json", file)
    assert code == 0
    record = json.loads(file.read_text())
    assert len(record["rows"]) == bench_train.CANDIDATES
    for row in record["rows"]:
        assert f"\n{row['candidate']} " in out
        assert row["tokens_per_second"] == pytest.approx(64 / row["step_ms"] * 1e3)
        parts = row["forward_ms"] + row["backward_ms"] + row["optimizer_ms"]
        assert 0 < parts < 3 * row["step_ms"]
        assert row["mfu"] is None  # a CPU has no peak in the table
    speed = {row["candidate"]: row["tokens_per_second"] for row in record["rows"]}
    ratio = record["ratios"]["ours, adamw / baseline, adamw"]
    assert ratio == pytest.approx(speed["ours, adamw"] / speed["baseline, adamw"])
    found = record["surroundings"]
    assert 0 < found["spectra_blocked_seconds"] < 0.5 * found["spectra_worker_seconds"]  # the worker's time is its own
    assert record["device"] == "cpu"


def test_a_wrong_gradient_is_not_timed(run_main, monkeypatch):
    build = bench_train.Workplace.ours

    def tampered(place, optimizer, kernels=frozenset()):
        candidate = build(place, optimizer, kernels)
        if kernels == KERNELS:
            candidate.model.weights["k_v"].register_hook(lambda gradient: 1.01 * gradient)
        return candidate

    monkeypatch.setattr(bench_train.Workplace, "ours", tampered)
    code, out, _ = run_main(bench_train.main, *SMALL)
    assert "ours, adamw, all kernels: the gradient of matrix 1 differs" in str(code)
    assert "candidate" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "nono"), "--model nono: choose from"),
        (("--steps", 0), "--steps 0: must be at least 1"),
        (("--batch-tokens", 65), "--batch-tokens 65: not divisible"),
        (("--micro-batch", 3), "--micro-batch 3: does not divide"),
    ],
)
def test_bad_flags_are_one_sentence(run_main, arguments, words):
    code, _, err = run_main(bench_train.main, *SMALL, *arguments)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert words in err


def test_the_prediction_is_labelled_and_needs_no_memory(run_main):
    code, out, _ = run_main(bench_train.main, "--predict")
    assert code == 0
    assert out.startswith("PREDICTION")
    assert "RTX 4090" in out
    assert torch.get_default_device() == torch.device("cpu")
