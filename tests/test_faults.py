"""What can go wrong under a run ends it with one sentence, and nothing that was good is lost."""

import ast
import json
import os
import re
import resource
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import metrics
from corpus import shards
from engine import checkpoint, cli, files
from tests.conftest import ask_to_stop
from tests.processes import REPOSITORY, TEN, command, run, steps_logged, summary


def files_of_at_most(count):
    """What a full disk is to a program: no file can grow further."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))


@pytest.mark.parametrize("named", ["checkpoint.pt", "metrics.jsonl", "*"])
def test_a_full_disk_ends_the_run_with_a_sentence_and_keeps_the_last_checkpoint(
    train_small, shards_folder, tmp_path, before_step, named
):
    sixty = ("--tokens", str(60 * 256), "--spectra-every", "0", "--eval-every", "60")
    take_back = before_step(39, ask_to_stop)
    _, folder, _, _ = train_small("full", *sixty)
    good, logged = (folder / "checkpoint.pt").read_bytes(), (folder / "metrics.jsonl").stat().st_size
    most = {"checkpoint.pt": len(good) - 10_000, "metrics.jsonl": logged + 300, "*": 500}[named]
    done = run(command(shards_folder, tmp_path, "full", *sixty, "--resume"), preexec_fn=files_of_at_most(most))
    assert done.returncode == 1, done.stderr
    where = re.escape(str(folder)) + "/" + (r"\S+" if named == "*" else re.escape(named))
    assert re.search(f"failed: {where}: cannot be written", done.stdout + done.stderr)
    assert "Traceback" not in done.stderr
    assert (folder / "checkpoint.pt").read_bytes() == good
    assert not list(folder.glob("*.tmp"))
    if named == "metrics.jsonl":
        assert "metrics.jsonl: cannot be written" in summary(folder)["reason"]
    take_back()
    code, *_ = train_small("full", *sixty, "--resume")
    assert code == 0
    assert steps_logged(folder) == list(range(1, 61))


@pytest.mark.parametrize("fault", ["vanishes", "is cut short", "is rewritten"])
def test_a_shard_that_changes_under_the_run(train_small, shards_folder, tmp_path, before_step, fault):
    folder = tmp_path / "shards"
    shutil.copytree(shards_folder, folder)
    (shard,) = folder.glob("train_*.bin")

    def damage():
        if fault == "vanishes":
            shard.unlink()
        elif fault == "is cut short":
            os.truncate(shard, 2000)
        else:
            shutil.copy(shards_folder / shard.name, folder / "new")
            os.replace(folder / "new", shard)

    before_step(3, damage)
    code, run_folder, _, err = train_small("run", *TEN, data_folder=folder)
    assert code == 2
    assert str(shard) in err
    assert ("vanished" if fault == "vanishes" else "changed") in err
    assert len(err.splitlines()) == 1
    assert summary(run_folder)["status"] == "failed"
    assert str(shard) in summary(run_folder)["reason"]


def test_a_data_thread_that_dies_ends_the_run_with_a_sentence(train_small, monkeypatch):
    monkeypatch.setattr(data.Loader, "_fill", lambda self, first: None)
    code, folder, out, _ = train_small("run", *TEN)
    assert code == 1
    assert "failed: the data thread stopped unexpectedly" in out
    assert "data thread" in summary(folder)["reason"]


@pytest.mark.parametrize("fault", ["a file above it", "a file in its place", "not allowed"])
def test_a_folder_that_cannot_be_made_is_one_sentence(train_small, tmp_path, monkeypatch, fault):
    """Without file permissions, which do not bind whoever runs the tests as root."""
    runs = tmp_path / "runs"
    if fault == "not allowed":
        mkdir = os.mkdir

        def forbidden(path, *mode, **more):
            if str(path).startswith(str(runs)):
                raise PermissionError(13, "Permission denied", path)
            mkdir(path, *mode)

        monkeypatch.setattr(os, "mkdir", forbidden)
    else:
        runs.mkdir()
        (runs / "run").write_text("mine")
    where = runs / "run" if fault == "a file above it" else runs
    code, _, _, err = train_small("run", *TEN, "--runs-dir", where, "--resume")
    assert code == 2
    assert str(where / "run") in err or str(runs) in err
    assert len(err.splitlines()) == 1
    assert not runs.exists() if fault == "not allowed" else (runs / "run").read_text() == "mine"


def test_a_folder_in_which_nothing_may_be_written_fails_the_run_with_a_sentence(train_small, monkeypatch):
    def forbidden(path, mode, **more):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(files, "open", forbidden, raising=False)
    code, folder, out, _ = train_small("run", *TEN)
    assert code == 1
    assert out.splitlines()[-1] == f"failed: {folder}/config.json: cannot be written (Permission denied)"


def test_a_run_killed_before_its_settings_were_whole_starts_afresh(train_small, tmp_path):
    """Or a loop around it would be told for ever that this is no run's folder."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json.tmp").write_text('{"mod')
    code, folder, *_ = train_small("run", *TEN, "--resume")
    assert code == 0
    assert {p.suffix for p in folder.iterdir()} == {".json", ".jsonl", ".txt", ".pt"}


def test_a_spectra_worker_that_dies_ends_the_run_with_a_sentence(train_small, monkeypatch):
    monkeypatch.setattr(metrics.SpectraRecorder, "_work", lambda self: None)
    code, folder, out, _ = train_small("run", *TEN)
    assert code == 1
    assert "failed: spectra: the worker stopped unexpectedly" in out
    assert "worker stopped" in summary(folder)["reason"]


@pytest.mark.parametrize("end", ["finished", "stopped"])
def test_a_worker_that_fails_last_costs_no_weights_at_the_end_and_no_line_at_a_stop(
    train_small, monkeypatch, before_step, end
):
    """The last weights are kept; a stopped run repeats the updates whose spectra it lost."""
    measure = metrics.SpectraRecorder._measure

    def fail_at_five(recorder, event):
        return 1 / 0 if event.step == 5 else measure(recorder, event)

    settings = ("--tokens", (5 if end == "finished" else 6) * 256, "--spectra-every", 5, "--checkpoint-every", 3)
    monkeypatch.setattr(metrics.SpectraRecorder, "_measure", fail_at_five)
    take_back = before_step(4 if end == "stopped" else -1, ask_to_stop)
    code, folder, out, _ = train_small("run", *settings)
    assert code == 1
    assert "failed: spectra: ZeroDivisionError" in out
    assert summary(folder)["status"] == "failed"
    assert torch.load(folder / "checkpoint.pt")["step"] == (5 if end == "finished" else 3)
    monkeypatch.setattr(metrics.SpectraRecorder, "_measure", measure)
    take_back()
    code, *_ = train_small("run", *settings, "--resume")
    assert code == 0
    measured = {json.loads(line)["step"] for line in (folder / "manifold_stats.jsonl").read_text().splitlines()}
    assert measured == ({0} if end == "finished" else {0, 5, 6})


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "/a", "/tmp/a", "a/b", "a/../../b", ".a", "a\n", "a b", "a" * 201]
)
def test_a_name_that_could_leave_the_runs_folder_or_hide_in_it_is_not_safe(name):
    assert not files.is_safe_name(name)
    assert files.is_safe_name("a-run_1.b")


def test_a_name_that_is_a_link_is_refused(train_small, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    code, _, _, err = train_small("link", *TEN, "--resume")
    assert code == 2
    assert "is a link" in err
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_failed_write_of_a_checkpoint_leaves_both_earlier_ones(tmp_path, monkeypatch):
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, {"step": step})

    def save_half(contents, file):
        file.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(cli.CannotWrite, match=r"checkpoint\.pt: cannot be written"):
        checkpoint.save_checkpoint(tmp_path, {"step": 3})
    steps = [torch.load(tmp_path / name)["step"] for name in ("checkpoint.pt", "checkpoint.prev.pt")]
    assert steps == [2, 1]


@pytest.mark.parametrize("calls", range(6))
def test_a_kill_between_any_two_steps_of_a_save_leaves_a_checkpoint(tmp_path, monkeypatch, calls):
    parts = {name: kind() for name, kind in checkpoint.PARTS.items()}
    parts |= {"config": {"config_hash": "f00d"}, "loader": {"epoch": 0, "position": 0}}

    def save(step):
        progress = vars(checkpoint.Progress(step=step))
        checkpoint.save_checkpoint(tmp_path, parts | {"step": step, "progress": progress})

    save(1)
    save(2)

    class Killed(BaseException):
        pass

    left = iter(range(calls))

    def until_killed(function):
        def call(*arguments):
            if next(left, None) is None:
                raise Killed
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace"):
            patch.setattr(os, name, until_killed(getattr(os, name)))
        try:
            save(3)
            finished = True
        except Killed:
            finished = False
    contents, damaged = checkpoint.load_checkpoint(tmp_path, print)
    assert contents["step"] == (2 if calls < 3 else 3)
    assert finished == (calls >= 4)
    assert damaged == []


def test_a_file_is_whole_on_disk_before_it_takes_its_name_and_its_folder_after(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def watched_sync(descriptor):
        found = os.fstat(descriptor)
        done.append(("sync", found.st_ino, None if os.path.samestat(found, os.stat(tmp_path)) else found.st_size))
        fsync(descriptor)

    def watched_rename(old, new):
        done.append(("rename", os.stat(old).st_ino, new))
        replace(old, new)

    checkpoint.save_checkpoint(tmp_path, {"step": 1})
    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(os, "replace", watched_rename)
    first, newest, previous = (tmp_path / name for name in ("a.json", "checkpoint.pt", "checkpoint.prev.pt"))
    earlier, the_folder = newest.stat().st_ino, ("sync", tmp_path.stat().st_ino, None)
    files.write_json(first, {"key": "value" * 1000})
    checkpoint.save_checkpoint(tmp_path, {"step": 2})
    found = [path.stat() for path in (first, newest)]
    assert done == [
        *[("sync", found[0].st_ino, found[0].st_size), ("rename", found[0].st_ino, first), the_folder],
        *[("sync", found[1].st_ino, found[1].st_size), ("rename", earlier, previous)],
        *[("rename", found[1].st_ino, newest), the_folder],
    ]


def test_lines_are_on_disk_before_the_checkpoint_that_vouches_for_them(train_small, monkeypatch):
    synced, checked, fsync, replace = {}, [], os.fsync, os.replace

    def watched_sync(descriptor):
        fsync(descriptor)
        synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    def watched_rename(old, new):
        if Path(new).name == "checkpoint.pt":
            for name in ("metrics.jsonl", "manifold_stats.jsonl"):
                found = (Path(new).parent / name).stat()
                checked.append(synced.get(found.st_ino) == found.st_size > 0)
        replace(old, new)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(os, "replace", watched_rename)
    train_small("run", *TEN, "--checkpoint-every", "5")
    assert checked == [True] * 4


def test_a_checkpoint_with_code_in_it_is_damaged_and_the_code_is_not_run(train_small, tmp_path):
    _, folder, _, _ = train_small("run", *TEN, "--checkpoint-every", "5")

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made by the code"),)

    contents = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save(contents | {"code": Code()}, folder / "checkpoint.pt")
    code, _, out, _ = train_small("run", *TEN, "--resume")
    assert code == 0
    assert "checkpoint.pt: damaged" in out
    assert "resuming at step 5 of 10" in out
    assert not (tmp_path / "made by the code").exists()


def test_no_file_of_the_project_unpickles():
    sources = [
        *REPOSITORY.glob("*.py"),
        *(p for p in REPOSITORY.glob("*/*.py") if p.parent.name not in ("tests", ".venv")),
    ]
    loads = 0
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & {"pickle", "dill", "joblib", "shelve"}, source
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in ("torch.load", "np.load"):
                assert "weights_only=True" in ast.unparse(node), source
                loads += 1
    assert loads >= 2


def test_local_text_and_a_run_ask_no_network(train_small, tmp_path, monkeypatch):
    asked = tmp_path / "asked.txt"
    no_network = (
        "import socket\n"
        "def refuse(*address, **_):\n"
        f"    open({str(asked)!r}, 'a').write(repr(address))\n"
        "    raise OSError('no network here')\n"
        "socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse\n"
    )
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "sitecustomize.py").write_text(no_network)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "blocked"))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    lines = (json.dumps({"text": f"document {i} of many"}) + "\n" for i in range(300))
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    words = ("data.py", "text", tmp_path / "rows.jsonl", "--out", tmp_path / "s", "--vocab-size", "300")
    done = run([sys.executable, *map(str, words), "--val-fraction", "0.3"])
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(socket.socket, "connect", lambda *address: asked.write_text(repr(address)))
    code, *_ = train_small("run", "--tokens", 512, data_folder=tmp_path / "s")
    assert code == 0
    assert not asked.exists(), asked.read_text()


def test_a_checkpoint_of_another_shape_is_refused_with_a_sentence(train_small):
    _, folder, _, _ = train_small("run", *TEN)
    contents = torch.load(folder / "checkpoint.pt", weights_only=True)
    name = next(iter(contents["model"]))
    contents["step"] = contents["progress"]["step"] = 5
    contents["model"][name] = torch.zeros(3)
    torch.save(contents, folder / "checkpoint.pt")
    code, _, _, err = train_small("run", *TEN, "--resume")
    assert code == 2
    assert "does not fit this run" in err
    assert len(err.splitlines()) == 1


def test_one_flipped_bit_of_a_weight_is_noticed_and_the_checkpoint_before_used(train_small):
    """torch.load itself takes it for another weight."""
    _, folder, _, _ = train_small("run", *TEN, "--checkpoint-every", "5")
    newest = folder / "checkpoint.pt"
    weight = torch.load(newest, weights_only=True)["model"]["embedding"].numpy().tobytes()
    content = bytearray(newest.read_bytes())
    content[content.index(weight) + 1000] ^= 64
    newest.write_bytes(content)
    assert torch.load(newest, weights_only=True)["step"] == 10
    code, _, out, _ = train_small("run", *TEN, "--resume")
    assert code == 0
    assert "checkpoint.pt: damaged" in out
    assert "resuming at step 5 of 10" in out


def test_damaged_checkpoints_are_refused_every_time(train_small):
    """A loop that starts it again must not begin at step 0 and throw away what is there."""
    _, folder, _, _ = train_small("run", *TEN, "--checkpoint-every", "5")
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        os.truncate(folder / name, 1000)
    logged = (folder / "metrics.jsonl").read_bytes()
    for _ in range(2):
        code, _, _, err = train_small("run", *TEN, "--resume")
        assert code == 2
        assert "there is no other checkpoint to resume from" in err
    assert (folder / "metrics.jsonl").read_bytes() == logged


@pytest.mark.parametrize("tokens", [60, 140])
def test_a_shard_that_was_swapped_before_its_first_read_is_noticed(tmp_path, tokens):
    def write(count):
        header = np.zeros(256, "<u4")
        header[:3] = shards.MAGIC, shards.VERSION, count
        content = header.tobytes() + np.arange(count, dtype="<u2").tobytes()
        for split in shards.SPLITS:
            (tmp_path / f"{split}_000000.bin").write_bytes(content)

    write(100)
    opened = shards.open_shards(tmp_path)
    write(tokens)
    with pytest.raises(shards.BadInput, match="changed since"):
        data.TokenStream(opened, "train").read(0, 50)


def test_two_processes_do_not_train_one_run(train_small, shards_folder, tmp_path, before_step):
    """The second --resume of one name gets a sentence and exit code 2 and touches nothing; the first ends as usual."""
    words, second = command(shards_folder, tmp_path, "run", *TEN, "--resume"), []

    def start_another():
        before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
        second.append(run(words))
        assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before

    before_step(7, start_another)
    code, folder, _, _ = train_small("run", *TEN, "--resume", "--checkpoint-every", "5")
    assert code == 0
    (refused,) = second
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        f"error: --name run: another process is training {folder}; wait for it or stop it"
    ]
    assert steps_logged(folder) == list(range(1, 11))
    assert "nothing to do" in run(words).stdout  # the lock went with its process


def test_a_file_system_that_cannot_lock_is_said_and_used(train_small, monkeypatch):
    def no_locks(descriptor, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("engine.files.fcntl.flock", no_locks)
    code, folder, out, _ = train_small("run", "--tokens", 256)
    assert code == 0
    assert f"{folder}: cannot be locked (Function not implemented)" in out


def test_a_last_summary_that_cannot_be_written_fails_the_run_with_a_sentence(train_small, monkeypatch):
    write_json = files.write_json

    def no_summary(path, value):
        if path.name == "summary.json":
            raise cli.CannotWrite(f"{path}: cannot be written (No space left on device)")
        write_json(path, value)

    monkeypatch.setattr(files, "write_json", no_summary)
    code, folder, out, err = train_small("run", "--tokens", 256)
    assert code == 1
    assert f"failed: {folder}/summary.json: cannot be written (No space left on device)" in out
    assert "Traceback" not in err
    assert (folder / "checkpoint.pt").exists()
