"""The recorder: what it measures is this update, and nothing of it is lost, reordered or hidden."""

import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import metrics
from engine import run_folder
from engine.norm_watch import NormWatch
from engine.ranks import Sharding
from engine.step import WARMUP_STEPS, TrainingStep
from kernels import orthogonalize
from metrics import QUEUE_EVENTS, MuonStep, SpectraRecorder, WorkerFailed, decompose, projection_record
from model import ModelConfig, Transformer
from optim import build_optimizers
from tests.conftest import ask_to_stop

CONFIG = ModelConfig(32, 2, 4, 2, 48, seq_len=16)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def small_model():
    torch.manual_seed(0)
    return Transformer(CONFIG, vocab_size=40)


def test_recorded_gradient_norm_is_the_gradients_and_the_update_is_this_steps(tmp_path):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(32, 2, 4, 2, 48, seq_len=16), vocab_size=40)
    optimizers = build_optimizers(model, "muon", lr=0.05, adamw_lr=0.01)
    recorder = SpectraRecorder(model, tmp_path / "spectra.jsonl")
    recorder.record(0, 0)
    tokens = torch.randint(40, (2, 17))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    projections = [(p.layer, p.name, p.weight) for p in model.projections()]
    banks = [bank.parameter for bank in model.banks()]
    gradients = torch.autograd.grad(loss, banks, retain_graph=True)
    expected = {(p.layer, p.name): p.weight.norm().item() for p in model.projections(gradients)}
    before = {(layer, name): weight.detach().clone() for layer, name, weight in projections}
    loss.backward()
    recorder.before_update(Sharding(model).bank_gradients())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    for optimizer in optimizers:
        optimizer.step()
    recorder.record(1, 32)
    recorder.close()
    lines = [json.loads(line) for line in (tmp_path / "spectra.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0] * 12 + [1] * 12
    for line in lines[12:]:
        key = line["layer"], line["proj"]
        weight = next(w for layer, name, w in projections if (layer, name) == key)
        assert line["grad_norm"] == pytest.approx(expected[key], rel=1e-5)
        assert line["update_norm"] == pytest.approx((weight - before[key]).norm().item(), rel=1e-5)
        assert len(line["singular_values"]) == min(weight.shape)


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize(("scale", "decay"), [("spectral", 0.3), ("spectral", 0.0), ("rms", 0.3), ("rms", 0.0)])
def test_ns_residual_is_that_of_the_matrix_that_muon_subtracted(tmp_path, scale, decay, experts):
    """Weight decay, rate and scale are taken out again; what AdamW trains has none."""
    torch.manual_seed(0)
    model = Transformer(replace(CONFIG, experts=experts), vocab_size=40, apart=("q", "v"))
    options = {"muon_on": "k,o,up,down", "momentum": 0.0, "weight_decay": decay, "lr_scale": scale, "ns_steps": 3}
    optimizers = build_optimizers(model, "muon", lr=0.05, adamw_lr=0.01, **options)
    recorder = SpectraRecorder(model, tmp_path / "s.jsonl")
    recorder.record(0, 0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    gradients = Sharding(model).bank_gradients()
    used = [orthogonalize(G, steps=3).double() for G in gradients]
    recorder.before_update(gradients, MuonStep(("k", "o", "up", "down"), 0.05, decay, scale))
    for optimizer in optimizers:
        optimizer.step()
    recorder.record(1, 32)
    recorder.close()
    lines = lines_of(tmp_path / "s.jsonl")
    first, second = lines[: len(lines) // 2], lines[len(lines) // 2 :]
    assert all(line["ns_residual"] is None for line in first)
    for line, used_matrix in zip(second, model.projections(used), strict=True):
        s = np.linalg.svd(used_matrix.weight.numpy(), compute_uv=False)
        expected = None if line["proj"] in "qv" else pytest.approx(np.sqrt(np.mean((s**2 - 1) ** 2)), rel=1e-3)
        assert line["ns_residual"] == expected, (line["proj"], line["layer"])


def test_a_run_records_the_residual_of_its_newton_schulz(train_small):
    """Steps of the cubic end at an orthogonal matrix, one step of it does not; AdamW has no such number."""
    residuals = {}
    for name, words in {
        "exact": ("--ns-coefficients", "cubic", "--ns-steps", 40, "--weight-decay", 0.1),
        "rough": ("--ns-coefficients", "cubic", "--ns-steps", 1),
        "adamw": ("--optimizer", "adamw"),
    }.items():
        code, folder, _, _ = train_small(name, "--tokens", 4 * 256, "--spectra-every", 2, *words)
        assert code == 0
        residuals[name] = [line["ns_residual"] for line in lines_of(folder / "manifold_stats.jsonl") if line["step"]]
    assert max(residuals["exact"]) < 1e-3
    assert min(residuals["rough"]) > 0.5
    assert set(residuals["adamw"]) == {None}


def test_iterations_that_change_do_so_in_the_run_and_after_a_resume(train_small, before_step, monkeypatch):
    """Seen in what Muon subtracts: one iteration of the cubic leaves much, sixty leave nothing."""
    words = ("--tokens", 6 * 256, "--spectra-every", 1, "--ns-coefficients", "cubic", "--ns-steps", "1:0.5,60")
    _, whole, _, _ = train_small("whole", *words)
    residuals = [[] for _ in range(7)]
    for line in lines_of(whole / "manifold_stats.jsonl"):
        residuals[line["step"]].append(line["ns_residual"])
    assert min(min(values) for values in residuals[1:4]) > 0.5
    assert max(max(values) for values in residuals[4:]) < 1e-3
    take_back = before_step(4, ask_to_stop)
    train_small("parts", *words)
    take_back()
    code, parts, out, _ = train_small("parts", *words, "--resume")
    assert (code, "resuming at step 5" in out) == (0, True)
    assert lines_of(parts / "manifold_stats.jsonl") == lines_of(whole / "manifold_stats.jsonl")
    from analysis.runs import load_run

    assert load_run(whole).config["ns_steps"] == "1:0.5,60"
    code, _, _, err = train_small("wrong", "--ns-steps", "3:2,5")
    assert (code, err.startswith("error: --ns-steps 3:2,5: shares of the run must rise")) == (2, True)


def test_every_projection_of_the_batched_worker_equals_one_measured_alone(tmp_path):
    model = small_model()
    recorder = SpectraRecorder(model, tmp_path / "s.jsonl")
    recorder.record(0, 0)
    recorder.close()
    lines = lines_of(tmp_path / "s.jsonl")
    for line, p in zip(lines, model.projections(), strict=True):
        assert (line["layer"], line["proj"]) == (p.layer, p.name)
        alone = projection_record(decompose(p.weight.detach()[None]).of(0), None, None)
        assert line.pop("singular_values") == pytest.approx(alone.pop("singular_values"))
        assert {key: line[key] for key in alone} == pytest.approx(alone)


def test_the_loop_goes_on_while_the_worker_measures_and_waits_when_the_queue_is_full(tmp_path, monkeypatch):
    gate, started = threading.Event(), threading.Event()
    decompose_bank = metrics.decompose_bank

    def slow(bank):
        started.set()
        gate.wait(20)
        return decompose_bank(bank)

    monkeypatch.setattr(metrics, "decompose_bank", slow)
    model = small_model()
    recorder = SpectraRecorder(model, tmp_path / "s.jsonl")
    recorder.record(0, 0)
    assert started.wait(20)
    for step in range(1, 1 + QUEUE_EVENTS):
        recorder.record(step, 0)  # returns although nothing was measured yet
    assert (tmp_path / "s.jsonl").read_text() == ""
    unblocked = recorder.seconds_blocked
    with torch.no_grad():  # a snapshot is not the weights themselves
        for p in model.parameters():
            p.zero_()
    threading.Timer(0.5, gate.set).start()
    recorder.record(1 + QUEUE_EVENTS, 0)  # the queue is full: waits
    assert recorder.seconds_blocked - unblocked > 0.4
    recorder.flush()
    lines = lines_of(tmp_path / "s.jsonl")
    assert [line["step"] for line in lines] == [step for step in range(2 + QUEUE_EVENTS) for _ in range(12)]
    assert all(line["spectral_norm"] > 0 for line in lines[: 12 * (1 + QUEUE_EVENTS)])
    assert all(line["spectral_norm"] == 0 for line in lines[-12:])
    recorder.close()


def test_the_worker_takes_one_thread_and_leaves_the_loop_its_own(tmp_path, monkeypatch):
    before, seen = torch.get_num_threads(), []
    decompose_bank = metrics.decompose_bank
    monkeypatch.setattr(
        metrics, "decompose_bank", lambda bank: (seen.append(torch.get_num_threads()), decompose_bank(bank))[1]
    )
    recorder = SpectraRecorder(small_model(), tmp_path / "s.jsonl")
    recorder.record(0, 0)
    recorder.close()
    assert set(seen) == {1}
    assert torch.get_num_threads() == before


def test_a_failing_worker_raises_in_the_loop_and_never_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "finite", lambda value: 1 / 0)
    model = small_model()
    recorder = SpectraRecorder(model, tmp_path / "s.jsonl")
    recorder.record(0, 0)
    with pytest.raises(WorkerFailed, match="ZeroDivisionError"):
        recorder.flush()
    with pytest.raises(WorkerFailed, match="ZeroDivisionError"):
        recorder.record(1, 0)
    recorder.close()
    assert not recorder.worker.is_alive()


def test_a_run_whose_worker_fails_ends_failed_with_the_reason(train_small, monkeypatch):
    monkeypatch.setattr(metrics, "decompose_bank", lambda bank: 1 / 0)
    code, folder, out, _ = train_small("run", "--tokens", 2560)
    assert code == 1
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert "spectra: ZeroDivisionError" in summary["reason"]
    assert "failed: spectra" in out


def test_a_run_says_how_long_spectra_held_it_up(train_small):
    _, with_spectra, _, _ = train_small("with", "--tokens", 512)
    _, without, _, _ = train_small("without", "--tokens", 512, "--spectra-every", 0)
    measured, plain = (json.loads((f / "summary.json").read_text()) for f in (with_spectra, without))
    assert 0 < measured["spectra_seconds_blocked"] < measured["wall_seconds"]
    assert plain["spectra_seconds_blocked"] == 0
    assert not (without / "manifold_stats.jsonl").exists()


def test_waiting_for_a_slow_worker_counts_as_blocked_and_as_training_time(train_small, monkeypatch):
    slow_bank = metrics.decompose_bank

    def slow(bank):
        time.sleep(0.1)
        return slow_bank(bank)

    monkeypatch.setattr(metrics, "decompose_bank", slow)
    _, folder, _, _ = train_small("run", "--tokens", 256, "--spectra-every", 1)
    summary = json.loads((folder / "summary.json").read_text())
    banks = 3
    assert summary["spectra_seconds_blocked"] > 0.1 * 2 * banks  # of two events the second has an update too
    assert summary["train_seconds"] > summary["spectra_seconds_blocked"]


def test_a_live_view_that_fails_does_not_end_the_run(tmp_path, capsys):
    calls, heard = [], []

    def listener(lines):
        calls.append(len(lines))
        raise OSError("disk full")

    recorder = SpectraRecorder(small_model(), tmp_path / "s.jsonl", [listener, heard.append])
    for step in range(2):
        recorder.record(step, 0)
    recorder.flush()
    recorder.close()
    recorder.flush()  # after the end there is nothing to wait for
    assert calls == [12]
    assert len(heard) == 2  # the other listener stays
    assert len(lines_of(tmp_path / "s.jsonl")) == 24
    assert "live view of the spectra ends here: OSError: disk full" in capsys.readouterr().err


def norms(step, by_matrix):
    """Lines of an event as far as a watch of the norms reads them: {(proj, layer): norm}."""
    return [{"step": step, "proj": p, "layer": i, "spectral_norm": norm} for (p, i), norm in by_matrix.items()]


def test_a_matrix_whose_norm_passes_4_or_5_is_named_once_for_each():
    said = []
    watch = NormWatch(said.append)
    watch(norms(0, {("q", 0): 3.9, ("q", 1): None, ("up", 0): 3.0}))
    assert said == []
    watch(norms(10, {("q", 0): 4.25, ("q", 1): 4.5, ("up", 0): 3.0}))
    assert said == [
        "step 10: spectral norm above 4 in q of layers 0, 1 (largest 4.50, q of layer 1); prior work advises to adjust "
        "--lr or --momentum: try a lower --lr first"
    ]
    watch(norms(20, {("q", 0): 4.9, ("q", 1): 3.0, ("up", 0): 3.0}))
    watch(norms(30, {("q", 0): 4.9, ("q", 1): 4.6, ("up", 0): 3.0}))  # a second time
    assert len(said) == 1
    watch(norms(40, {("q", 0): 5.5, ("q", 1): 4.6, ("up", 0): 6.0}))  # up passes both levels at once
    assert said[1:] == ["step 40: spectral norm above 5 in q of layer 0; up of layer 0 (largest 6.00, up of layer 0)"]


def test_many_experts_share_a_line():
    said = []
    lines = [
        {"step": 3, "proj": proj, "layer": layer, "expert": expert, "spectral_norm": 4.5 + 0.01 * expert}
        for proj in ("up", "down")
        for layer in range(6)
        for expert in range(8)
    ]
    NormWatch(said.append, "adamw")(lines)
    (line,) = said
    assert line.startswith("step 3: spectral norm above 4 in down of layers 0, 1, 2, 3, 4, 5; up of layers 0, 1")
    assert "expert 7" in line
    assert "--weight-decay" in line


def test_high_norms_warn_while_the_run_trains(train_small):
    _, folder, out, _ = train_small("run", "--tokens", 2048, "--spectra-every", 1, "--lr", 3.0, "--grad-clip", 1)
    log = (folder / "log.txt").read_text().splitlines()
    warned = [i for i, line in enumerate(log) if "spectral norm above" in line]
    assert warned, log
    assert warned[0] < max(i for i, line in enumerate(log) if line.startswith("step:"))  # not after the end
    assert "--lr" in log[warned[0]]
    assert log[warned[0]] in out
    first = {
        (line["step"], line["layer"], line["proj"])
        for line in lines_of(folder / "manifold_stats.jsonl")
        if line["spectral_norm"] and line["spectral_norm"] > 4
    }
    assert log[warned[0]].startswith(f"step {min(first)[0]}: ")


def test_a_checkpoint_waits_for_the_spectra_before_it(train_small, monkeypatch):
    written = []
    save = run_folder.save_checkpoint

    def look(folder, contents, *name):
        if not name:
            written.append((contents["step"], {line["step"] for line in lines_of(folder / "manifold_stats.jsonl")}))
        save(folder, contents, *name)

    monkeypatch.setattr(run_folder, "save_checkpoint", look)
    train_small("run", "--tokens", 1024, "--checkpoint-every", 1, "--spectra-every", 1)
    assert written == [(step, set(range(step + 1))) for step in range(1, 5)]


def test_sigterm_in_the_middle_of_an_event_loses_no_line(train_small, monkeypatch):
    slow_bank, record = metrics.decompose_bank, metrics.SpectraRecorder.record

    def slow(bank):
        time.sleep(0.03)
        return slow_bank(bank)

    def interrupted(recorder, step, tokens):
        if step == 3:  # the worker is still busy with the events before
            assert recorder.events.unfinished_tasks
            ask_to_stop()
        record(recorder, step, tokens)

    monkeypatch.setattr(metrics, "decompose_bank", slow)
    monkeypatch.setattr(metrics.SpectraRecorder, "record", interrupted)
    code, folder, _, _ = train_small("run", "--tokens", 2560, "--spectra-every", 1)
    assert code == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("stopped", 3)
    steps = [line["step"] for line in lines_of(folder / "manifold_stats.jsonl")]
    assert steps == [step for step in range(4) for _ in range(12)]


def test_an_update_that_failed_leaves_no_event(train_small, monkeypatch):
    gradients, calls = TrainingStep.gradients, []

    def poisoned(step, *rest, **more):
        calls.append(step)
        if len(calls) == WARMUP_STEPS + 3:
            step.model.embedding.data[:] = torch.nan
        return gradients(step, *rest, **more)

    monkeypatch.setattr(TrainingStep, "gradients", poisoned)
    code, folder, _, _ = train_small("run", "--tokens", 2560, "--spectra-every", 1)
    assert code == 1
    assert json.loads((folder / "summary.json").read_text())["steps"] == 2
    assert lines_of(folder / "manifold_stats.jsonl")[-1]["step"] == 2
