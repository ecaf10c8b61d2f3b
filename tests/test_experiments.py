"""Suites as processes: killed, interrupted, failed and resumed; free GPUs; what an old GPU gets."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import experiments
import launcher
import settings
from kernels import configs
from model import KERNELS
from settings import Rank, Settings, chosen_kernels, resolve

ROOT = Path(experiments.__file__).parent
SUITE = ("run", "moe-nesterov", "--scale", "nano", "--tokens", "8192", "--seeds", "0", "--jobs", "2")
RUNS, UPDATES = 8, 4  # seven rates of the sweep and the two conditions, of which one is a run of the sweep


def command(tmp_path, shards_folder, *more):
    return [sys.executable, "experiments.py", *SUITE, "--runs-dir", str(tmp_path), "--data", str(shards_folder), *more]


def steps_logged(folder):
    """Steps of the train lines in the order of the file."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record["step"] for record in map(json.loads, lines) if record["kind"] == "train"]


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def children_of(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def assert_complete(tmp_path):
    folders = sorted(path.parent for path in tmp_path.glob("*/config.json"))
    assert len(folders) == RUNS
    for folder in folders:
        assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
        assert steps_logged(folder) == list(range(1, UPDATES + 1)), folder
    return folders


@pytest.mark.parametrize("runs_die_too", [False, True])
def test_a_suite_killed_in_the_middle_loses_and_repeats_nothing(tmp_path, shards_folder, runs_die_too):
    suite = subprocess.Popen(command(tmp_path, shards_folder), cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_until(lambda: len(list(tmp_path.glob("*/summary.json"))) >= 2 and len(children_of(suite.pid)) == 2)
    children = children_of(suite.pid)
    suite.kill()
    suite.wait()
    if runs_die_too:
        for child in children:
            os.kill(child, signal.SIGKILL)
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/summary.json")}
    again = subprocess.run(command(tmp_path, shards_folder), cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert_complete(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    third = subprocess.run(command(tmp_path, shards_folder), cwd=ROOT, capture_output=True, text=True, check=False)
    assert re.findall(r"(\d+) to go", third.stdout) == ["0", "0"]


def test_an_interrupted_suite_stops_its_runs_and_goes_on(tmp_path, shards_folder):
    suite = subprocess.Popen(
        command(tmp_path, shards_folder), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: len(list(tmp_path.glob("*/metrics.jsonl"))) >= 2)
    suite.send_signal(signal.SIGINT)
    _, said = suite.communicate(timeout=60)
    assert suite.returncode == 130
    assert "goes on from here" in said
    for folder in (path.parent for path in tmp_path.glob("*/metrics.jsonl")):
        assert (folder / "checkpoint.pt").exists()
        assert json.loads((folder / "summary.json").read_text())["status"] in ("stopped", "finished")
    again = subprocess.run(command(tmp_path, shards_folder), cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
    assert again.returncode == 0
    assert_complete(tmp_path)


def test_a_suite_runs_as_jobs_of_a_scheduler_and_is_reported(tmp_path, shards_folder, run_main):
    """submitit's own local executor stands for Slurm."""
    narrow = ("--submit", "local", "--only", "with*")
    done = subprocess.run(
        command(tmp_path, shards_folder, *narrow), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folders = assert_complete_at(tmp_path, RUNS)
    where = ("--scale", "nano", "--tokens", "8192", "--seeds", "0", "--runs-dir", tmp_path, "--data", shards_folder)
    code, out, _ = run_main(experiments.main, "status", "moe-nesterov", *where)
    assert (code, out.count("finished, loss")) == (0, 2)
    assert all(folder.name in {path.name for path in tmp_path.iterdir()} for folder in folders)
    code, out, _ = run_main(experiments.main, "report", "moe-nesterov", *where)
    page = (tmp_path / "report" / "report.html").read_text()
    assert code == 0
    assert "single seed" in page
    assert "not testable here" in page
    assert (tmp_path / "report" / "plots" / "moe-nesterov_bars.png").exists()


def assert_complete_at(tmp_path, count):
    folders = [path.parent for path in tmp_path.glob("*/summary.json")]
    assert len(folders) == count
    return folders


def job(tmp_path, name="a", *flags):
    return launcher.Job(name, flags, updates=4, tokens=1024, runs_dir=tmp_path)


def fake_training(tmp_path, monkeypatch, code):
    """Stand in for train.py."""
    script = tmp_path / "fake.py"
    script.write_text(code)
    monkeypatch.setattr(launcher, "TRAIN", script)


def test_a_run_that_keeps_dying_is_given_up(tmp_path, monkeypatch, capsys):
    fake_training(tmp_path, monkeypatch, "import os, pathlib; pathlib.Path('n').open('a').write('x'); os._exit(9)")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    launcher.run_here([job(tmp_path)], [{}])
    assert (tmp_path / "n").read_text() == "xxx"
    assert job(tmp_path).state() == "failed"
    assert "died 3 times" in job(tmp_path).reason()
    launcher.run_here([job(tmp_path)], [{}])
    assert (tmp_path / "n").read_text() == "xxx"
    job(tmp_path).forget()
    launcher.run_here([job(tmp_path)], [{}])
    assert (tmp_path / "n").read_text() == "x" * 6
    assert "[1/1] a: failed" in capsys.readouterr().out


def test_bad_input_fails_at_once_with_its_sentence(tmp_path, shards_folder):
    bad = job(tmp_path, "bad", "--model", "nano", "--data", str(shards_folder), "--lr", "-1", "--device", "cpu")
    good = job(tmp_path, "also-bad", "--data", str(tmp_path / "none"), "--model", "nano")
    launcher.run_here([bad, good], [{}, {}])
    assert bad.deaths() == [2]
    assert bad.reason() == "--lr -1.0: must be a positive number"
    assert "none" in good.reason()


def test_a_diverged_run_is_reported_and_not_tried_again(tmp_path, shards_folder):
    flags = ("--model", "moe-nano", "--data", str(shards_folder), "--lr", "1e30", "--batch-tokens", "512")
    diverged = job(tmp_path, "diverged", *flags, "--tokens", "4096", "--eval-tokens", "512", "--spectra-every", "0")
    launcher.run_here([diverged], [{}])
    assert diverged.state() == "failed"
    assert "loss" in diverged.reason()
    before = diverged.log.read_text()
    launcher.run_here([diverged], [{}])
    assert diverged.log.read_text() == before


def test_a_run_that_another_process_is_at_is_waited_for(tmp_path, monkeypatch):
    summary = '{"status": "finished", "final_val_loss": 1.0}'
    fake_training(
        tmp_path,
        monkeypatch,
        f"import time, pathlib\ntime.sleep(2)\npathlib.Path('a/summary.json').write_text('{summary}')",
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    elsewhere = launcher.start(job(tmp_path), {})
    assert launcher.is_held(job(tmp_path))
    assert launcher.start(job(tmp_path), {}) is None
    launcher.run_here([job(tmp_path)], [{}])
    assert job(tmp_path).state() == "finished"
    assert elsewhere.wait() == 0
    assert not launcher.is_held(job(tmp_path))


def test_one_run_per_free_gpu(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU-a, 3, 24564'\necho 'GPU-b, 20000, 24564'\necho 'GPU-c, 400, 24564'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in launcher.free_slots(None)] == ["GPU-a", "GPU-c"]
    assert len(launcher.free_slots(1)) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # the user's word counts, whatever runs there
    assert launcher.free_slots(None) == [{"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tool.write_text("#!/bin/sh\necho 'GPU-b, 20000, 24564'\n")
    with pytest.raises(experiments.BadInput, match="every GPU"):
        launcher.free_slots(None)
    tool.write_text("#!/bin/sh\nexit 9\n")  # a driver without a GPU
    assert launcher.free_slots(2) == [{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "moe-nonsense"), "no such suite; choose from speedrun-lr"),
        (("run", "baseline", "--only", "sgd*"), "baseline"),
        (("status", "everythin"), "no such suite"),
        (("report", "moe-clip"), "moe-lr-muon"),
        (("run", "lr-sensitivity", "--jobs", "0"), "--jobs 0: must be at least 1"),
        (("run", "lr-sensitivity", "--only", "sgd*"), "no condition of lr-sensitivity has such a name"),
        (("run", "lr-sensitivity", "--seeds", "-1"), "--seed -1"),
        (("run", "lr-sensitivity", "--data", "nowhere"), "nowhere"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, shards_folder, run_main, arguments, words):
    where = () if "--data" in arguments else ("--data", shards_folder)
    more = (*where, "--runs-dir", tmp_path / "runs", "--scale", "nano")
    if arguments[1] == "baseline":
        more += ("--dry-run",)
    code, out, err = run_main(experiments.main, *arguments, *more)
    if arguments[1] == "baseline":
        assert code == 0  # what comes later cannot be planned yet, and is said to be so
        assert words in out
    else:
        assert code == 2
        assert words in err
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_an_old_gpu_trains_in_fp32_without_our_kernels(monkeypatch, shards_folder):
    """A T4, as free notebooks give: compute capability 7.5."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(settings, "KERNELS_THAT_PAY", KERNELS)
    given = Settings(model="nano", data=shards_folder)
    for capability, precision, kernels in (((7, 5), "fp32", frozenset()), ((8, 9), "bf16", KERNELS)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, c=capability: c)
        monkeypatch.setattr(configs, "capability", lambda device, c=capability: c)
        resolved, *_ = resolve(given, Rank())
        assert (resolved.device, resolved.precision) == ("cuda", precision)
        assert chosen_kernels(resolved.kernels, capability) == kernels
        assert configs.runs_triton(torch.zeros(2)) == (capability >= (8, 0))
