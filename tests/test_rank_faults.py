"""A rank that dies, spoils a gradient or sees another folder ends the others with a sentence; the run goes on after."""

import os
import re
import shlex
import signal
import subprocess
import textwrap
import time
from pathlib import Path

import pytest
import torch

from tests.processes import REPOSITORY, TEN, children_of, command, run, steps_logged, summary


def on_rank_one(tmp_path, monkeypatch, code):
    """Let a second rank begin with these lines."""
    (tmp_path / "patch").mkdir()
    lines = ("import os, sys", "if os.environ.get('RANK') == '1':", f"    sys.path.insert(0, {str(REPOSITORY)!r})")
    (tmp_path / "patch" / "sitecustomize.py").write_text("\n".join(lines) + "\n" + textwrap.indent(code, "    "))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "patch"))


def test_ranks_that_see_different_checkpoints_refuse(shards_folder, tmp_path, monkeypatch):
    """As where nodes do not share the folder: here one rank's own copy of the library reads nothing."""
    words = command(shards_folder, tmp_path, "run", *TEN, "--checkpoint-every", "5", ranks=2)
    assert run(words).returncode == 0
    (tmp_path / "run" / "summary.json").unlink()
    os.replace(tmp_path / "run" / "checkpoint.prev.pt", tmp_path / "run" / "checkpoint.pt")
    blind = "from engine import run_folder\nrun_folder.load_checkpoint = lambda folder, say: (None, [])\n"
    on_rank_one(tmp_path, monkeypatch, blind)
    done = run([*words, "--resume"])
    assert done.returncode != 0
    assert "ranks read different checkpoints" in done.stderr
    assert steps_logged(tmp_path / "run") == list(range(1, 11))


def rank_of(pid):
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(v[5:]) for v in variables if v.startswith(b"RANK=")), None)


def kill_in_training(process, folder, rank, after=3):
    end = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(steps_logged_so_far(folder)) < after:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    (victim,) = (pid for pid in children_of(process.pid) if rank_of(pid) == rank)
    os.kill(victim, signal.SIGKILL)


def steps_logged_so_far(folder):
    return [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"train"' in line]


UPDATES = 60
LONG = ("--tokens", str(UPDATES * 256), "--spectra-every", "0", "--eval-every", str(UPDATES), "--checkpoint-every", "2")


def start(words):
    return subprocess.Popen(
        words,
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_others_and_another_number_goes_on(train_small, shards_folder, tmp_path, rank):
    process = start(command(shards_folder, tmp_path, "run", *LONG, ranks=2))
    folder = tmp_path / "run"
    kill_in_training(process, folder, rank)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "another rank was lost after step" in said
    if rank == 1:  # rank 0 lives to write it
        assert summary(folder)["status"] == "failed"
        assert "another rank was lost after step" in summary(folder)["reason"]
    else:
        assert "rank 1: failed: another rank was lost" in said
    code, _, out, _ = train_small("run", *LONG, "--resume")
    assert code == 0
    assert "resuming at step" in out
    assert steps_logged(folder) == list(range(1, UPDATES + 1))


def test_torchrun_restarts_from_the_newest_checkpoint(shards_folder, tmp_path):
    words = command(shards_folder, tmp_path, "run", *LONG, "--resume", ranks=2, torchrun=("--max-restarts=1",))
    process = start(words)
    kill_in_training(process, tmp_path / "run", rank=1)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "resuming at step" in said
    assert summary(tmp_path / "run")["status"] == "finished"
    assert steps_logged(tmp_path / "run") == list(range(1, UPDATES + 1))


def test_the_documented_loop_continues_after_a_kill_and_ends_at_bad_input(shards_folder, tmp_path):
    page = (REPOSITORY / "docs" / "resume.md").read_text()
    (body,) = re.findall("^until python train.py .*; do (.*); done$", page, re.M)
    words = shlex.join(command(shards_folder, tmp_path, "run", *LONG, "--resume"))
    loop = f"until {words}{{}}; do {body.replace('sleep 10', 'sleep 0.1')}; done"
    process = start(["bash", "-c", loop.format("")])
    kill_in_training(process, tmp_path / "run", rank=None)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert said.count("resuming at step") == 1
    assert steps_logged(tmp_path / "run") == list(range(1, UPDATES + 1))
    said, _ = start(["bash", "-c", loop.format(" --seed 7")]).communicate(timeout=60)
    assert said.count("seed was 0, is 7") == 1


def test_a_gradient_that_one_rank_spoils_for_another_stops_both(shards_folder, tmp_path, monkeypatch):
    """Rank 1 makes it, in a matrix that rank 0 owns: each must learn it from the other."""
    on_rank_one(
        tmp_path,
        monkeypatch,
        "from engine import step\n"
        "gradients, calls = step.TrainingStep.gradients, []\n"
        "def spoil(gradient):\n"
        "    gradient = gradient.clone()\n"
        "    gradient[0] = float('inf')\n"
        "    return gradient\n"
        "def spoiled(work, *arguments, **more):\n"
        "    calls.append(1)\n"
        "    if len(calls) == step.WARMUP_STEPS + 3:\n"
        "        work.model.weights['k_v'].register_hook(spoil)\n"
        "    return gradients(work, *arguments, **more)\n"
        "step.TrainingStep.gradients = spoiled\n",
    )
    done = run(command(shards_folder, tmp_path, "run", *TEN, "--checkpoint-every", "2", ranks=2))
    assert done.returncode != 0
    reason = summary(tmp_path / "run")["reason"]
    assert reason.startswith("step 3: loss ")
    assert reason.endswith("not finite in weights.k_v")
    assert "another rank was lost" not in done.stdout + done.stderr
    assert "Traceback" not in done.stdout
    contents = torch.load(tmp_path / "run" / "checkpoint.pt")
    assert contents["step"] == 2
    assert all(weight.isfinite().all() for weight in contents["model"].values())
