"""Runs as forks: what they are given, how they end, and that they train as a new process does."""

import json
import multiprocessing.forkserver
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from engine import files
from suites import launcher
from suites.forked import Forked
from tests.conftest import SMALL_MODEL

LOOK = """
import os, sys
print(sys.argv[1:], os.environ["X"], os.getcwd(), os.getsid(0) == os.getpid(), __name__, flush=True)
os.system("echo of a child")
print("an error", file=sys.stderr)
sys.exit(3)
"""
WAIT = "import os, time\nos.write(1, b'ready')\ntime.sleep(60)\n"


@pytest.fixture
def forked(tmp_path):
    """Start a script as a fork that holds `lock`; returns the process and the log."""

    def start(code, *arguments):
        script, log = tmp_path / "script.py", tmp_path / "log.txt"
        script.write_text(code)
        lock = os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR)
        assert files.lock(lock, tmp_path / "lock")
        process = Forked([str(script), *arguments], {**launcher.ONE_THREAD, "X": "y"}, log, lock)
        process.start()
        os.close(lock)
        return process, log

    return start


def wait_for(process):
    process.join(60)
    return process.poll()


def test_a_fork_is_what_a_new_process_would_be(forked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    process, log = forked(LOOK, "--a", "b")
    assert wait_for(process) == 3
    said = f"['--a', 'b'] y {tmp_path} True __main__\nof a child\nan error\n"
    assert log.read_text() == said
    assert dict(os.environ) == before
    server = multiprocessing.forkserver._forkserver._forkserver_pid
    threads = [line for line in Path(f"/proc/{server}/status").read_text().splitlines() if line.startswith("Threads:")]
    assert threads == ["Threads:\t1"]  # a fork would lose the others, with what they hold


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_fork_holds_its_lock_until_a_signal_ends_it(forked, tmp_path, number):
    process, log = forked(WAIT)
    while not log.exists() or not log.read_text():
        time.sleep(0.02)
    lock = os.open(tmp_path / "lock", os.O_RDWR)
    assert not files.lock(lock, tmp_path / "lock")
    assert process.poll() is None
    assert Path(f"/proc/{process.pid}/comm").read_text() == "script.py\n"
    process.send_signal(number)
    assert wait_for(process) == -number
    process.send_signal(number)  # as Popen, it lets a process be that is gone
    assert files.lock(lock, tmp_path / "lock")
    os.close(lock)


def test_a_fork_trains_as_a_new_process_does(tmp_path, shards_folder):
    flags = (*SMALL_MODEL, "--data", str(shards_folder), "--tokens", "1024", "--eval-every", "2")
    for name, environment in (("forked", launcher.ONE_THREAD), ("new", {})):
        job = launcher.Job(name, flags, steps=4, tokens=1024, runs_dir=tmp_path)
        process = launcher.start(job, environment)
        assert isinstance(process, Forked) == (name == "forked")
        while process.poll() is None:
            time.sleep(0.05)
        assert process.poll() == 0, job.log.read_text()
    weights = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=False)["model"] for name in ("forked", "new")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    lines = [[json.loads(x) for x in (tmp_path / n / "metrics.jsonl").open()] for n in ("forked", "new")]
    losses = [[line["val_loss"] for line in one if line["kind"] == "val"] for one in lines]
    assert losses[0] == losses[1]
