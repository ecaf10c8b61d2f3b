"""Suites as processes: killed, interrupted, failed and resumed; one run per free GPU; the settings on an old GPU."""

import dataclasses
import fcntl
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time

import pytest
import torch

import experiments
import settings
from bench.synthetic import write_run
from engine.cli import BadInput
from engine.files import ROOT
from engine.ranks import Rank
from kernels import configs
from model import KERNELS
from settings import Settings, chosen_kernels, resolve
from suites import launcher, planner
from tests.processes import descendants_of, steps_logged

SLIVER = ("run", "moe-lr-muon", "--scale", "nano", "--tokens", "8192", "--seeds", "0")
RUNS, STEPS = 2, 4  # the rates 0.01 and 0.02


def command(tmp_path, shards_folder, *more, jobs=("--jobs", "2")):
    where = ("--runs-dir", str(tmp_path), "--data", str(shards_folder))
    return [sys.executable, "experiments.py", *SLIVER, "--only", "* 0.0[12]", *jobs, *where, *more]


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def assert_complete(tmp_path):
    folders = sorted(path.parent for path in tmp_path.glob("*/config.json"))
    assert len(folders) == RUNS
    for folder in folders:
        assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
        assert steps_logged(folder) == list(range(1, STEPS + 1)), folder
        assert {path.name for path in folder.glob("*.pt")} == {"best.pt"}


@pytest.mark.parametrize("runs_die_too", [False, True])
def test_a_suite_killed_in_the_middle_loses_and_repeats_nothing(tmp_path, shards_folder, runs_die_too, run_main):
    words = command(tmp_path, shards_folder, jobs=("--jobs", "1"))
    suite = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_until(lambda: list(tmp_path.glob("*/summary.json")) and len(list(tmp_path.glob("*/metrics.jsonl"))) == RUNS)
    processes = descendants_of(suite.pid)
    assert len(processes) == 2  # the one that forks, and a run
    suite.kill()
    suite.wait()
    if runs_die_too:
        for process in processes:
            os.kill(process, signal.SIGKILL)
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/summary.json")}
    again = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert_complete(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    _, third, _ = run_main(experiments.main, *words[2:])
    assert re.findall(r"(\d+) to go", third) == ["0"]


def test_an_interrupted_suite_stops_its_runs_and_can_be_continued(tmp_path, shards_folder):
    """The signal reaches every process of the group, as `timeout` and a scheduler send it."""
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    suite = subprocess.Popen(command(tmp_path, shards_folder), cwd=ROOT, start_new_session=True, **silent)
    wait_until(lambda: len(list(tmp_path.glob("*/metrics.jsonl"))) >= 2)
    os.killpg(suite.pid, signal.SIGTERM)
    _, err = suite.communicate(timeout=60)
    assert suite.returncode == 130
    assert "interrupted; run the same command to continue" in err
    for folder in (path.parent for path in tmp_path.glob("*/metrics.jsonl")):
        status = json.loads((folder / "summary.json").read_text())["status"]
        assert status in ("stopped", "finished")
        assert (folder / "checkpoint.pt").exists() == (status == "stopped")
    again = subprocess.run(command(tmp_path, shards_folder), cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
    assert again.returncode == 0
    assert_complete(tmp_path)


def test_a_suite_runs_as_jobs_of_a_scheduler(tmp_path, shards_folder):
    """submitit's local executor replaces Slurm."""
    words = command(tmp_path, shards_folder, "--submit", "local", jobs=())
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=one_thread, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 jobs on local" in done.stdout
    assert_complete(tmp_path)


FAKE_TRAINING = """
import json, sys
from pathlib import Path
flags = dict(zip(sys.argv[1:], sys.argv[2:]))
lr, seed, optimizer = float(flags["--lr"]), int(flags.get("--seed", 0)), flags.get("--optimizer", "muon")
best = 0.04 if optimizer == "muon" else 0.004
final = 3 + abs(lr - best) + 0.001 * (seed * 7 % 5) + 0.2 * (optimizer == "adamw")
folder, made = Path(flags["--runs-dir"], flags["--name"]), Path(__file__).with_name("made")
with Path(flags["--runs-dir"], "starts").open("a") as file:
    file.write(flags["--name"] + "\\n")
folder.mkdir()
lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
for line in lines:  # from 5 to 3, so now from 5 to `final`
    line |= {key: 5 + (line[key] - 5) * (5 - final) / 2 for key in ("val_loss", "train_loss") if key in line}
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
settings = {"optimizer": optimizer, "seed": seed, "lr": lr}
for name, change in (("config.json", settings), ("summary.json", {"final_val_loss": final})):
    (folder / name).write_text(json.dumps(json.loads((made / name).read_text()) | change))
"""


def in_this_process(jobs, slots, later, keep_checkpoints):
    """As launcher.run_here, for hundreds of runs."""
    before = sys.argv
    for one in jobs:
        if one.state() not in launcher.OVER:
            sys.argv = one.command()[1:]
            runpy.run_path(sys.argv[0])
    sys.argv = before


def stand_in(tmp_path, monkeypatch, code):
    """Replace train.py."""
    write_run(tmp_path / "made", final=3.0, spectra=False, model="nano", device="cpu")
    fake_training(tmp_path, monkeypatch, code)


def test_everything_is_planned_in_stages_trained_once_and_reported(
    tmp_path, shards_folder, run_main, no_drawing, monkeypatch
):
    stand_in(tmp_path, monkeypatch, FAKE_TRAINING)
    monkeypatch.setattr(experiments, "run_here", in_this_process)
    few = dataclasses.replace(planner.SCALES["nano"], claim_seeds=(0, 1, 2), documents_seeds=(6, 7, 8))
    monkeypatch.setitem(planner.SCALES, "nano", few)
    where = ("--scale", "nano", "--runs-dir", tmp_path / "runs", "--data", shards_folder)
    code, out, err = run_main(experiments.main, "run", "everything", *where)
    assert code == 0, err
    stages = [line for line in out.splitlines() if line.endswith("to go")]
    assert [line.split(", ")[0].split(":")[0] for line in stages] == ["speedrun-lr", "speedrun-2m", "moe-final"]
    starts = (tmp_path / "runs" / "starts").read_text().split()
    assert len(starts) == len(set(starts)) > 150
    code, out, _ = run_main(experiments.main, "run", "everything", *where)
    assert code == 0
    assert "about" not in out
    assert (tmp_path / "runs" / "starts").read_text().split() == starts
    code, out, _ = run_main(experiments.main, "status", "moe-final", *where)
    assert (code, out.count("finished, loss")) == (0, 12)
    final = {p.condition.name: p.condition.fields for p in planner_of(*where).plan("moe-final")}
    assert (final["muon"]["lr"], final["adamw"]["lr"]) == (0.04, 0.005)  # of the two sweeps, the nearest to the best
    code, out, err = run_main(experiments.main, "report", "moe-final", *where)
    assert code == 0, err
    page = (tmp_path / "runs" / "report" / "report.html").read_text()
    assert "The best Muon beats the best AdamW" in page
    assert re.search(r"[1-9]\d* confirmed", page)
    assert (tmp_path / "runs" / "report" / "plots" / "moe-final_bars.png").exists()


def test_a_grid_that_grows_is_trained_in_one_call_and_told_before(tmp_path, shards_folder, run_main, monkeypatch):
    stand_in(tmp_path, monkeypatch, FAKE_TRAINING.replace("best = 0.04", "best = 0.4"))
    monkeypatch.setattr(experiments, "run_here", in_this_process)
    where = ("--scale", "nano", "--runs-dir", tmp_path / "runs", "--data", shards_folder, "--seeds", "4", "6")
    words = ("run", "speedrun-lr", *where)
    _, out, _ = run_main(experiments.main, *words, "--dry-run")
    assert "speedrun-lr: 20 runs" in out
    assert "speedrun-lr: seeds 4, 6\n" in out
    assert "up to 2 rates more for an optimizer whose best is on the edge of its grid" in out
    code, out, err = run_main(experiments.main, *words)
    assert (code, err) == (0, "")
    assert [line for line in out.splitlines() if line.endswith("to go")] == [
        "speedrun-lr: 20 runs, 20 to go",
        "speedrun-lr: 22 runs, 2 to go",
        "speedrun-lr: 24 runs, 2 to go",
    ]
    assert "the best rate was on the edge of the grid, so also muon lr 0.32, muon lr 0.64" in out
    _, out, _ = run_main(experiments.main, *words, "--dry-run")
    assert "speedrun-lr: 24 runs" in out
    assert "so also muon lr 0.32, muon lr 0.64" in out
    _, out, _ = run_main(experiments.main, "run", "baseline", *where, "--dry-run")
    assert "speedrun-lr: seeds 0, 1\n" in out  # others, since baseline confirms its winner


def planner_of(*words):
    given = dict(zip(words[::2], words[1::2], strict=True))
    chosen = planner.Selection(suite="moe-final", scale="nano", runs_dir=given["--runs-dir"], data=given["--data"])
    return planner.Planner(chosen)


def job(tmp_path, name="a", *flags):
    return launcher.Job(name, flags, steps=4, tokens=1024, runs_dir=tmp_path)


def fake_training(tmp_path, monkeypatch, code):
    """Replace train.py."""
    script = tmp_path / "fake.py"
    script.write_text(code)
    monkeypatch.setattr(launcher, "TRAIN", script)


def test_a_run_that_exits_three_times_without_a_summary_has_failed(tmp_path, monkeypatch, capsys):
    fake_training(tmp_path, monkeypatch, "import os, pathlib; pathlib.Path('n').open('a').write('x'); os._exit(9)")
    monkeypatch.chdir(tmp_path)
    launcher.run_here([job(tmp_path)], [{}])
    assert (tmp_path / "n").read_text() == "xxx"
    assert job(tmp_path).state() == "failed"
    assert "exited 3 times without a summary" in job(tmp_path).reason()
    launcher.run_here([job(tmp_path)], [{}])
    assert (tmp_path / "n").read_text() == "xxx"
    job(tmp_path).forget()
    launcher.run_here([job(tmp_path)], [{}])
    assert (tmp_path / "n").read_text() == "x" * 6
    assert "[1/1] a: failed" in capsys.readouterr().out


@pytest.mark.parametrize("code", [0, 1])
def test_a_run_that_stops_without_progress_does_not_restart_forever(tmp_path, monkeypatch, code):
    """The summary has status stopped, and the process exits without changing it."""
    stop = "" if code else "Path('a/summary.json').unlink(missing_ok=True)"
    fake_training(tmp_path, monkeypatch, f"import os\nfrom pathlib import Path\n{stop}\nos._exit({code})")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "summary.json").write_text('{"status": "stopped"}')
    launcher.run_here([job(tmp_path)], [{}])
    assert job(tmp_path).deaths() == [code] * 3


def test_bad_input_fails_at_once_with_its_sentence(tmp_path, shards_folder):
    bad = job(tmp_path, "bad", "--model", "nano", "--data", str(shards_folder), "--lr", "-1", "--device", "cpu")
    good = job(tmp_path, "also-bad", "--data", str(tmp_path / "none"), "--model", "nano")
    launcher.run_here([bad, good], [{}, {}])
    assert bad.deaths() == [2]
    assert bad.reason() == "--lr -1.0: must be a positive number"
    assert "none" in good.reason()
    assert not bad.diverged


def test_a_diverged_run_is_reported_and_not_tried_again(tmp_path, shards_folder):
    flags = ("--model", "moe-nano", "--data", str(shards_folder), "--lr", "1e30", "--batch-tokens", "512")
    diverged = job(tmp_path, "diverged", *flags, "--tokens", "4096", "--eval-tokens", "512", "--spectra-every", "0")
    launcher.run_here([diverged], [{}])
    assert diverged.state() == "failed"
    assert "loss" in diverged.reason()
    assert diverged.diverged
    before = diverged.log.read_text()
    launcher.run_here([diverged], [{}])
    assert diverged.log.read_text() == before


def test_the_launcher_waits_for_a_run_that_another_process_trains(tmp_path, monkeypatch):
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
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # the user's choice counts, even if the GPU is in use
    assert launcher.free_slots(None) == [{"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")  # none
    assert launcher.free_slots(1) == [launcher.ONE_THREAD]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    tool.write_text("#!/bin/sh\necho 'GPU-b, 20000, 24564'\n")
    with pytest.raises(BadInput, match="every GPU"):
        launcher.free_slots(None)
    tool.write_text("#!/bin/sh\nexit 9\n")  # a driver without a GPU
    assert launcher.free_slots(2) == [{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "moe-nonsense"), "no such suite; choose from speedrun-lr"),
        (("status", "everythin"), "no such suite"),
        (("report", "moe-clip"), "moe-lr-muon"),
        (("run", "lr-sensitivity", "--jobs", "0"), "--jobs 0: must be at least 1"),
        (("run", "lr-sensitivity", "--only", "sgd*"), "no condition of lr-sensitivity matches"),
        (("run", "everything", "--only", "momentum*", "--dry-run"), "leaves no run of muon in speedrun-lr"),
        (("run", "lr-sensitivity", "--seeds", "-1"), "--seed -1"),
        (("run", "lr-sensitivity", "--data", "nowhere"), "nowhere"),
        (("run", "lr-sensitivity", "--data", "nowhere", "--dry-run"), "nowhere"),
        (("status", "lr-sensitivity", "--data", "nowhere"), "nowhere"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, shards_folder, run_main, arguments, words):
    where = () if "--data" in arguments else ("--data", shards_folder)
    code, _, err = run_main(experiments.main, *arguments, *where, "--runs-dir", tmp_path / "runs", "--scale", "nano")
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


def test_a_run_that_was_started_by_hand_is_waited_for(tmp_path):
    """Its process holds log.txt, as engine/run_folder.py does; a second one would be refused and counted as failed."""
    mine = job(tmp_path)
    mine.folder.mkdir(parents=True)
    with (mine.folder / "log.txt").open("w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert launcher.is_held(mine)
        assert launcher.start(mine, {}) is None
    assert not launcher.is_held(mine)
