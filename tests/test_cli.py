"""Commands as shells, schedulers and terminals run them: no reader, no room, no terminal, odd ranks."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys

import pytest

from engine import identity
from engine.cli import BadInput
from engine.files import ROOT
from engine.ranks import Rank, rank_from
from tests.conftest import SMALL_MODEL
from tests.processes import TEN, command, run, steps_logged, summary

TALK = """
import sys
from pathlib import Path
from engine.cli import exit_with_a_sentence

@exit_with_a_sentence
def main():
    for number in range(20_000):
        print("line", number, "\\u2192 \\udcff")
        print("word", number, file=sys.stderr)
    Path(sys.argv[1]).write_text("to the end")

sys.exit(main())
"""


def talk(tmp_path, shell, **environment):
    """Run a command that prints 20,000 lines to either stream, through a line of shell; what it did at its end."""
    (tmp_path / "talk.py").write_text(TALK)
    words = f"'{sys.executable}' '{tmp_path / 'talk.py'}' '{tmp_path / 'done'}' {shell}; echo code ${{PIPESTATUS[0]}}"
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(["bash", "-c", words], env=env, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.splitlines()[-1], (tmp_path / "done").read_text(), done.stderr


@pytest.mark.parametrize(
    "shell", ["2>/dev/null | head -1", "> /dev/full 2>/dev/null", "2> /dev/full", ">&-", "2>&-", ">&- 2>&- <&-"]
)
def test_a_command_ends_well_whoever_stops_listening(tmp_path, shell):
    code, done, _ = talk(tmp_path, shell)
    assert (code, done) == ("code 0", "to the end")


def test_letters_that_a_terminal_lacks_are_escaped(tmp_path):
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    code, done, errors = talk(tmp_path, "", **ascii_only)
    assert (code, done) == ("code 0", "to the end")
    assert "Traceback" not in errors


def test_a_training_goes_to_its_end_when_nobody_reads_it(shards_folder, tmp_path):
    words = command(shards_folder, tmp_path, "run", *TEN, "--log-every", 1)
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("memory of one step")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(120) == 0
    assert summary(tmp_path / "run")["status"] == "finished"
    logged = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert [f"step:{step}/10" for step in range(1, 11)] == [line.split()[0] for line in logged if "train_loss" in line]


def test_a_training_whose_terminal_is_closed_under_nohup_goes_to_its_end(shards_folder, tmp_path):
    master, slave = pty.openpty()
    words = command(shards_folder, tmp_path, "run", *TEN, "--log-every", 1)
    streams = {"stdin": slave, "stdout": slave, "stderr": slave}
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    process = subprocess.Popen(words, cwd=ROOT, start_new_session=True, **streams, **ignore)
    os.close(slave)
    os.read(master, 1)  # it runs
    os.close(master)
    assert process.wait(120) == 0
    assert summary(tmp_path / "run")["status"] == "finished"
    assert steps_logged(tmp_path / "run") == list(range(1, 11))


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_closed_terminal_and_slurms_warning_stop_a_run_at_a_checkpoint(train_small, before_step, number):
    signal.signal(number, signal.SIG_DFL)  # the tests themselves may run under nohup
    before_step(3, lambda: os.kill(os.getpid(), number))
    code, folder, _, _ = train_small("run", "--tokens", 2560)
    assert code == 0
    assert json.loads((folder / "summary.json").read_text())["status"] == "stopped"
    assert (folder / "checkpoint.pt").exists()


@pytest.mark.parametrize("columns", [1, 3, 5])
def test_help_has_an_end_on_a_narrow_terminal(columns):
    words = (sys.executable, "report.py", "--help")
    env = os.environ | {"COLUMNS": str(columns)}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0
    assert "--out" in done.stdout


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "3"},
        {"RANK": ""},
        {"WORLD_SIZE": "2"},
        {"LOCAL_RANK": "x"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"},
    ],
)
def test_ranks_that_make_no_sense_are_refused(environment):
    with pytest.raises(BadInput, match=next(iter(environment))):
        rank_from(environment)


def test_ranks_that_make_sense_are_taken():
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node", "MASTER_PORT": "29500"}
    assert rank_from({"HOME": "/root"}) == Rank(0, 1, 0)
    assert rank_from(torchrun) == Rank(5, 8, 1)
    assert rank_from({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}) == Rank(0, 1, 0)


def test_half_an_environment_of_torchrun_trains_nothing(shards_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    done = run(command(shards_folder, tmp_path, "run", *SMALL_MODEL[:2]))
    assert done.returncode == 2
    assert done.stderr.startswith("error: RANK=3 in the environment: ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_no_other_repositorys_commit_is_recorded_as_ours(tmp_path, monkeypatch):
    git = shutil.which("git")

    def in_repository(folder):
        for words in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "x", "--allow-empty")):
            names = ("-c", "user.name=a", "-c", "user.email=a@b.c")
            subprocess.run((git, "-C", folder, *names, *words), check=True)
        words = (git, "-C", folder, "rev-parse", "HEAD")
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()

    ours, other = tmp_path / "other" / "ours", tmp_path / "elsewhere"
    ours.mkdir(parents=True)
    other.mkdir()
    in_repository(tmp_path / "other")
    monkeypatch.setattr(identity, "ROOT", ours)
    assert identity.provenance()["git_commit"] is None  # unpacked inside another repository
    in_repository(other)
    commit = in_repository(ours)
    assert identity.provenance()["git_commit"] == commit
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert identity.provenance()["git_commit"] == commit
