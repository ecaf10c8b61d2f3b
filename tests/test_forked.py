"""Runs as forks: what they are given, how they end, and that they train as a new process does."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from engine import files
from engine.cli import RunFailed
from suites import forked, launcher
from suites.forked import Forks
from tests.conftest import SMALL_MODEL

SCRIPT = """
import os, sys, time

def main():
    if sys.argv[1] == "wait":
        os.write(1, b"ready")
        time.sleep(60)
    print(sys.argv[1:], os.environ["X"], os.getcwd(), os.getsid(0) == os.getpid(), flush=True)
    os.system("echo of a child")
    print("an error", file=sys.stderr)
    return 3
"""
DEADLINE = 60


@pytest.fixture
def nursery(tmp_path, monkeypatch):
    """start(arguments ...) forks a script that holds `lock`; returns the fork and its log."""
    script, log = tmp_path / "script.py", tmp_path / "log.txt"
    script.write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    forks = Forks(script, {**launcher.ONE_THREAD, "X": "y"})

    def start(*arguments):
        lock = os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR)
        assert files.lock(lock, tmp_path / "lock")
        with log.open("ab") as file:
            fork = forks.start(arguments, file.fileno(), lock)
        os.close(lock)
        return fork, log

    start.forks = forks
    yield start
    forks.close()


def wait_for(condition):
    end = time.monotonic() + DEADLINE
    while (found := condition()) in (None, ""):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def is_locked(path):
    lock = os.open(path, os.O_RDWR)
    try:
        return not files.lock(lock, path)
    finally:
        os.close(lock)


def test_a_fork_is_what_a_new_process_would_be(nursery, tmp_path):
    before = dict(os.environ)
    fork, log = nursery("--a", "b")
    assert wait_for(fork.poll) == 3
    assert log.read_text() == f"['--a', 'b'] y {tmp_path} True\nof a child\nan error\n"
    assert dict(os.environ) == before
    status = Path(f"/proc/{nursery.forks.process.pid}/status").read_text().splitlines()
    assert "Threads:\t1" in status  # a fork would lose the others, with what they hold


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_fork_holds_its_lock_until_a_signal_ends_it(nursery, tmp_path, number):
    fork, log = nursery("wait")
    wait_for(log.read_text)
    assert is_locked(tmp_path / "lock")
    assert fork.poll() is None
    fork.send_signal(number)
    assert wait_for(fork.poll) == -number
    fork.send_signal(number)  # as Popen's, to a process that has ended: nothing
    assert not is_locked(tmp_path / "lock")


def test_a_fork_outlives_its_nursery_and_is_seen_to_end(nursery, tmp_path):
    fork, log = nursery("wait")
    wait_for(log.read_text)
    nursery.forks.process.kill()
    nursery.forks.process.wait()
    assert fork.poll() is None
    assert is_locked(tmp_path / "lock")
    fork.send_signal(signal.SIGKILL)
    assert wait_for(fork.poll) == forked.LOST
    with pytest.raises(RunFailed, match="the process that starts the runs has ended, exit code -9"):
        nursery("wait")


def test_forks_record_the_commit_of_the_moment_when_their_code_was_imported(tmp_path):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").touch()
    head = "Path(__file__).with_name('HEAD').read_text()"
    code = f"from pathlib import Path\ndef provenance(): return {{'git_commit': {head}}}"
    (tmp_path / "engine" / "identity.py").write_text(code)
    (tmp_path / "engine" / "HEAD").write_text("first")
    (tmp_path / "script.py").write_text(
        "from engine.identity import provenance\ndef main(): print(provenance()['git_commit'])"
    )
    forks = Forks(tmp_path / "script.py", launcher.ONE_THREAD)
    with (tmp_path / "log").open("ab") as log:
        for head in ("first", "second"):
            (tmp_path / "engine" / "HEAD").write_text(head)
            fork = forks.start([], log.fileno(), log.fileno())
            assert wait_for(fork.poll) == 0
    forks.close()
    assert (tmp_path / "log").read_text() == "first\nfirst\n"


def test_a_script_that_cannot_be_imported_ends_in_a_sentence(tmp_path):
    (tmp_path / "script.py").write_text("import no_such_module")
    forks = Forks(tmp_path / "script.py", launcher.ONE_THREAD)
    with (tmp_path / "log").open("ab") as log, pytest.raises(RunFailed, match="has ended, exit code 1"):
        forks.start([], log.fileno(), log.fileno())
    forks.close()


def test_a_fork_trains_as_this_process_does(tmp_path, shards_folder, train_small):
    flags = ("--tokens", "1024", "--eval-every", "4", "--spectra-every", "0")
    job = launcher.Job(
        "fork", (*SMALL_MODEL, "--data", str(shards_folder), *flags), steps=4, tokens=1024, runs_dir=tmp_path
    )
    launcher.run_here([job], [launcher.ONE_THREAD])
    code, here, _, _ = train_small("here", *flags)
    assert (job.state(), code) == ("finished", 0)
    forked, ours = (torch.load(f / "checkpoint.pt", weights_only=False)["model"] for f in (job.folder, here))
    assert forked.keys() == ours.keys()
    assert all(torch.equal(weight, ours[key]) for key, weight in forked.items())
