"""Workers: the losses of one process, the same bits after a resume, and an end for all when one dies."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from engine.cli import BadInput, RunFailed
from engine.workers import Crew
from tests.processes import TEN, children_of, command, run, steps_logged, summary
from tests.test_rank_faults import start, steps_logged_so_far

CLOCKS = ("step_ms", "tokens_per_second", "train_seconds")
SENSITIVE = ("gap", "rank", "condition", "momentum", "residual")  # to rounding: they divide by, or subtract, the small
TWO = ("--workers", "2")
STEPS = 40
LONG = ("--tokens", STEPS * 256, "--spectra-every", 0, "--eval-every", STEPS, "--checkpoint-every", 2)


def lines(folder, name):
    read = map(json.loads, (folder / name).read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in CLOCKS} for line in read]


@pytest.fixture(scope="module")
def trained(shards_folder, tmp_path_factory):
    """The same ten steps by one and by three workers; 24 sequences a step."""
    folder = tmp_path_factory.mktemp("trained")
    for count in (1, 3):
        words = ("--workers", count, "--batch-tokens", 768, "--tokens", 7680, *TEN[2:])
        done = run(command(shards_folder, folder, str(count), *words))
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads((folder / str(count) / "config.json").read_text())["world_size"] == count
    return folder


def test_workers_train_to_the_losses_and_spectra_of_one_process(trained):
    for name in ("metrics.jsonl", "manifold_stats.jsonl"):
        alone, shared = lines(trained / "1", name), lines(trained / "3", name)
        assert len(alone) == len(shared) > 0
        for a, b in zip(alone, shared, strict=True):
            assert a.keys() == b.keys()
            for key, value in a.items():
                if not isinstance(value, float | list):
                    assert b[key] == value, key
                elif key not in ("left_alignment", "right_alignment"):  # arbitrary where Muon's update is flat
                    rel = 2e-3 if any(word in key for word in SENSITIVE) else 2e-4
                    if key == "grad_condition":  # the rounding of the largest singular value moves the smallest
                        rel += 4 * torch.finfo(torch.float32).eps * value
                    assert b[key] == pytest.approx(value, rel=rel, abs=2e-5), (key, a["step"])


def test_a_stopped_run_takes_up_its_workers_and_ends_with_the_same_bits(shards_folder, tmp_path):
    words = (*LONG, "--spectra-every", 20)
    assert run(command(shards_folder, tmp_path, "whole", *words, *TWO)).returncode == 0
    process = start(command(shards_folder, tmp_path, "parts", *words, *TWO))
    wait_for_steps(process, tmp_path / "parts")
    process.send_signal(signal.SIGTERM)  # to rank 0 alone: it tells the other
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, summary(tmp_path / "parts")["status"]) == (0, "stopped"), said
    done = run(command(shards_folder, tmp_path, "parts", *words, "--workers", "auto", "--threads", "auto", "--resume"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "parts" / "config.json").read_text())["workers"] == 2
    for name in ("metrics.jsonl", "manifold_stats.jsonl"):
        assert lines(tmp_path / "parts", name) == lines(tmp_path / "whole", name)


def wait_for_steps(process, folder, after=3):
    end = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(steps_logged_so_far(folder)) < after:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)


def ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_worker_that_is_killed_ends_the_run_with_a_sentence(shards_folder, tmp_path):
    process = start(command(shards_folder, tmp_path, "run", *LONG, *TWO))
    wait_for_steps(process, tmp_path / "run")
    (worker,) = children_of(process.pid)
    os.kill(worker, signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "failed: worker 1 was killed by SIGKILL" in said
    assert "Traceback" not in said
    assert summary(tmp_path / "run")["reason"] == "worker 1 was killed by SIGKILL"
    assert run(command(shards_folder, tmp_path, "run", *LONG, *TWO, "--resume")).returncode == 0
    assert steps_logged(tmp_path / "run") == list(range(1, STEPS + 1))


def test_no_worker_outlives_its_parent(shards_folder, tmp_path):
    process = start(command(shards_folder, tmp_path, "run", *LONG, *TWO))
    wait_for_steps(process, tmp_path / "run")
    (worker,) = children_of(process.pid)
    os.kill(worker, signal.SIGSTOP)  # it cannot learn of it from a lost connection
    process.kill()
    process.wait(timeout=60)
    deadline = time.monotonic() + 10
    try:
        while not ended(worker):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        if not ended(worker):
            os.kill(worker, signal.SIGKILL)


def test_bad_input_is_one_sentence_from_all_workers(shards_folder, tmp_path):
    (tmp_path / "run").mkdir()
    done = run(command(shards_folder, tmp_path, "run", *TEN, *TWO))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: --name run: {tmp_path / 'run'} exists; choose another name, or add --resume\n"


@pytest.mark.parametrize(
    ("code", "words", "kind", "sentence"),
    [
        (2, "error: shards/a.bin: vanished", BadInput, "shards/a.bin: vanished"),
        (1, "warning\nrank 1: failed: no space", RunFailed, "worker 1: rank 1: failed: no space"),
        (-9, "", RunFailed, "worker 1 was killed by SIGKILL"),
        (3, "", RunFailed, "worker 1: exit code 3"),
    ],
)
def test_the_cause_is_what_the_lost_worker_said(code, words, kind, sentence):
    crew = Crew(2)
    crew.codes[1] = code
    (crew.folder / "stderr-1").write_text(words)
    cause = crew.cause(RuntimeError("gloo"))
    assert (type(cause), str(cause)) == (kind, sentence)
    crew.end()
    assert not crew.folder.exists()


def test_what_no_worker_caused_stays_what_it_is(monkeypatch):
    monkeypatch.setattr("engine.workers.SECONDS_TO_DIE", 0)
    crew, error = Crew(2), RuntimeError("gloo")
    crew.codes[1] = 0
    assert crew.cause(error) is error
    crew.end()
