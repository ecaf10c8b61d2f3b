"""The training benchmark: its table and JSON are whole, and a wrong gradient or a bad flag stops it."""

import contextlib
import json
import math

import psutil
import pytest
import torch

from bench import train as bench_train
from bench import train_cpu
from engine.cli import BadInput
from model import SIZES

TINY_NANOGPT = """
import torch
from types import SimpleNamespace as GPTConfig

class GPT(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        self.table = torch.nn.Embedding(c.vocab_size, c.vocab_size)
        torch.nn.init.zeros_(self.table.weight)

    def forward(self, tokens, targets):
        logits = self.table(tokens)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.view(-1))
"""
SMALL = ("--model", "nano", "--seq-len", 16, "--batch-tokens", 64, "--vocab-size", 300, "--steps", 1, "--rounds", 2)


def test_processes_take_turns_and_every_candidate_has_a_row(run_main, tmp_path, monkeypatch):
    some = ["products", "ours, muon", "ours, adamw", "nanoGPT, adamw", "ours, muon, compiled"]
    assert set(some) < set(train_cpu.names(tmp_path))
    monkeypatch.setattr(train_cpu, "names", lambda nanogpt: some)
    beside = []
    monkeypatch.setattr(train_cpu, "busy_process", lambda: contextlib.nullcontext(beside.append("started")))
    (tmp_path / "model.py").write_text(TINY_NANOGPT)
    file, words = tmp_path / "record.json", ("--compile", "off", "--nanogpt", tmp_path, "--beside", 2)
    code, out, _ = run_main(bench_train.main, *SMALL, *words, "--json", file)
    assert code == 0
    record = json.loads(file.read_text())
    assert [row["candidate"] for row in record["rows"]] == some[1:-1]
    for row in record["rows"]:
        assert f"\n{row['candidate']} " in out
        assert row["tokens_per_second"] == pytest.approx(64 / row["step_ms"] * 1e3)
        light = row["tokens_per_second"] / record["light_tokens_per_second"]
        assert row["light_share"] == pytest.approx(light)
    speed = {row["candidate"]: row["tokens_per_second"] for row in record["rows"]}
    ratio = record["ratios"]["ours, muon / nanoGPT, adamw"]
    assert ratio == pytest.approx(speed["ours, muon"] / speed["nanoGPT, adamw"])
    assert beside == ["started"] * 2
    assert record["device"] == "cpu"
    assert record["surroundings"]["spectra_worker_seconds"] > 0
    assert not [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("name", ["plain GPT, adamw", "baseline, stacked muon", "baseline, muon"])
def test_the_others_learn_the_rows_that_they_are_timed_on(name):
    step = train_cpu.theirs(train_cpu.Task(name, "nano", 300, 16, 64), compiled=False)
    losses = [step() for _ in range(4)]
    assert losses[0] == pytest.approx(math.log(300), abs=train_cpu.LOSS_MARGIN)
    assert losses == sorted(losses, reverse=True)


def test_a_file_that_is_not_nanogpts_is_one_sentence(tmp_path):
    (tmp_path / "model.py").write_text("GPT = None")
    with pytest.raises(BadInput, match=r"model\.py is not nanoGPT's"):
        train_cpu.nanogpt_model(tmp_path / "model.py", SIZES["nano"], 300)
    with pytest.raises(BadInput, match=r"model\.py is not nanoGPT's"):
        train_cpu.nanogpt_model(tmp_path / "absent" / "model.py", SIZES["nano"], 300)


def test_a_loss_that_no_fresh_model_has_is_not_timed():
    server = train_cpu.Server.__new__(train_cpu.Server)
    server.task, server.first = train_cpu.Task("ours, muon", "nano", 300, 16, 64), {"loss": 3.0}
    with pytest.raises(SystemExit, match=r"a first loss of 3\.000, not about 5\.704"):
        server.check()


def test_in_one_process_every_candidate_has_a_row_with_its_phases(capsys):
    place = bench_train.Workplace(bench_train.Arguments("nano", 300, 16, 64, steps=1, rounds=2))
    record = bench_train.time_here(place.candidates(), place)
    out = capsys.readouterr().out
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


def test_a_spectra_event_hardly_blocks_and_the_loader_is_timed():
    place = bench_train.Workplace(bench_train.Arguments("nano", 300, 16, 64))
    found = bench_train.time_surroundings(place, 0.1)
    assert 0 < found["spectra_blocked_seconds"] < 0.5 * found["spectra_worker_seconds"]  # the worker's time is its own
    assert found["loader_share"] > 0


def test_a_wrong_gradient_is_not_timed(run_main, monkeypatch):
    build = bench_train.Workplace.ours

    def tampered(place, optimizer, kernels=frozenset()):
        candidate = build(place, optimizer, kernels)
        if optimizer == "adamw":
            candidate.model.weights["k_v"].register_hook(lambda gradient: 1.01 * gradient)
        return candidate

    monkeypatch.setattr(bench_train.Workplace, "ours", tampered)
    code, out, _ = run_main(bench_train.main, *SMALL)
    assert "ours, adamw, attention, cross_entropy: the gradient of matrix 1 differs" in str(code)
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
