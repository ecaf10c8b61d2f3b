"""A run folder, its checkpoint and its shards, written before the code was laid out in folders, still work."""

import json
import shutil

import pytest

import report
from engine.files import ROOT
from metrics import MOMENTUM_KEYS

BEFORE = ROOT / "tests" / "data" / "before"
SETTINGS = (
    *("--model", "nano", "--layers", "1", "--d-model", "16", "--heads", "2", "--kv-heads", "1", "--d-ff", "32"),
    *("--seq-len", "32", "--batch-tokens", "256", "--micro-batch", "4", "--eval-tokens", "512", "--tokens", "2560"),
    *("--eval-every", "5", "--spectra-every", "5", "--device", "cpu", "--no-plots", "--data", str(BEFORE / "tokens")),
)
ADDED_SINCE = {"grad_effective_rank", "grad_stable_rank", "grad_condition", "ns_residual", *MOMENTUM_KEYS}
CLOCKS = ("step_ms", "tokens_per_second", "train_seconds")


def lines(path):
    read = map(json.loads, path.read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in CLOCKS} for line in read]


def test_a_checkpoint_of_before_resumes_to_the_losses_that_were_logged_then(run_main, tmp_path):
    """The checkpoint is of step 5; the lines of steps 6 to 10 were logged by the code of before."""
    import train

    folder = tmp_path / "run"
    shutil.copytree(BEFORE / "run", folder)
    (folder / "summary.json").unlink()
    code, out, _ = run_main(train.main, *SETTINGS, "--runs-dir", tmp_path, "--name", "run", "--resume", "--workers", 1)
    assert code == 0
    assert "resuming at step 5 of 10" in out
    for name in ("metrics.jsonl", "manifold_stats.jsonl"):
        then, now = lines(BEFORE / "run" / name), lines(folder / name)
        for a, b in zip(then, now, strict=True):
            added = ADDED_SINCE if name == "manifold_stats.jsonl" and a["step"] > 5 else set()
            if a.get("kind") == "val" and a["step"] > 5:
                added = {"val_loss_by_decile", "val_bpb"}
            assert b.keys() - a.keys() == added
            assert a.keys() <= b.keys()
            for key in a:
                # Its products are made by another library, and a difference of two singular values keeps the error.
                assert b[key] == a[key] or b[key] == pytest.approx(a[key], rel=1e-4, abs=2e-6), key


def test_a_run_of_before_is_reported(run_main, no_drawing, tmp_path):
    assert run_main(report.main, BEFORE / "run", "--out", tmp_path / "report")[0] == 0
    page = (tmp_path / "report" / "report.md").read_text()
    final = json.loads((BEFORE / "run" / "summary.json").read_text())["final_val_loss"]
    assert f"{final:.4f}" in page
