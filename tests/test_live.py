"""Live views: TensorBoard and Weights & Biases get the run's numbers, and none of them can end a training."""

import json
import sys
import types

import pytest

import settings
import train
from engine import live
from engine.live import SPECTRA_SHOWN, LiveView
from tests.conftest import ask_to_stop

PROJECTIONS = ("q", "k", "v", "o", "up", "down")
A_KEY = "0123456789abcdef" * 2 + "01234567"  # as long as a real one


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Board:
    """A stand-in for TensorBoard's writer: keeps what is written."""

    def __init__(self, folder, purge_step):
        self.written, self.purge_step, self.is_closed = [], purge_step, False

    def add_scalar(self, name, value, step):
        assert not self.is_closed
        self.written.append((name, value, step))

    def close(self):
        self.is_closed = True


class WandbRun:
    """A stand-in for a run of Weights & Biases."""

    url, offline = "https://wandb.example/run", False

    def __init__(self, **given):
        self.given, self.rows, self.summary, self.exit_codes, self.metrics = given, [], {}, [], []

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, row):
        assert not self.exit_codes
        self.rows.append(row)

    def finish(self, exit_code):
        self.exit_codes.append(exit_code)


@pytest.fixture
def stand_ins(monkeypatch):
    """(boards, runs) that are opened in place of the two packages."""
    boards, runs = [], []

    def stand_in(module, **contents):
        made = types.ModuleType(module)
        vars(made).update(contents)
        monkeypatch.setitem(sys.modules, module, made)

    def opened(into, made):
        into.append(made)
        return made

    stand_in("torch.utils.tensorboard", SummaryWriter=lambda *given, **more: opened(boards, Board(*given, **more)))
    stand_in("wandb", init=lambda **given: opened(runs, WandbRun(**given)), Settings=dict, Image=lambda path: path)
    monkeypatch.setattr(settings, "find_spec", lambda name: name)
    return boards, runs


def test_both_views_see_a_run_to_its_end_and_a_resumed_one_continues(train_small, before_step, stand_ins, monkeypatch):
    boards, runs = stand_ins

    def draw(folder):
        (folder / "plots").mkdir()
        (folder / "plots/curves.png").touch()

    monkeypatch.setattr(train, "draw_plots", draw)
    monkeypatch.setenv("WANDB_API_KEY", A_KEY)
    arguments = ("run", "--tokens", 4 * 256, "--log", "wandb,tensorboard", "--spectra-every", 2)
    take_back = before_step(2, ask_to_stop)
    _, folder, _, _ = train_small(*arguments, plots=True)
    take_back()
    stopped = json.loads((folder / "summary.json").read_text())
    code, _, out, _ = train_small(*arguments, "--resume", plots=True)
    assert code == 0
    config, finished = (json.loads((folder / name).read_text()) for name in ("config.json", "summary.json"))
    metrics = lines_of(folder / "metrics.jsonl")

    assert [board.purge_step for board in boards] == [0, stopped["steps"] + 1]
    assert all(board.is_closed for board in boards)
    written = [entry for board in boards for entry in board.written]
    for kind, key in (("train", "train_loss"), ("train", "adamw_lr"), ("val", "val_loss")):
        logged = [(line[key], line["step"]) for line in metrics if line["kind"] == kind]
        assert [(value, step) for name, value, step in written if name == f"{kind}/{key}"] == logged
        name = f"{kind}/{key}"
        assert [(row[name], row["step"]) for run in runs for row in run.rows if name in row] == logged

    first, second = runs
    assert first.given["id"] == second.given["id"] == (folder / "wandb_id.txt").read_text().strip()
    assert (second.given["name"], second.given["resume"], second.given["dir"]) == ("run", "allow", folder)
    assert second.given["config"] == config
    assert A_KEY not in str([run.given for run in runs])
    assert second.metrics == [("*", "step")]
    assert first.summary == {key: value for key, value in stopped.items() if value is not None}
    assert second.summary == {key: value for key, value in finished.items() if value is not None}
    assert second.rows[-1] == {"plots/curves": str(folder / "plots/curves.png")}
    assert [run.exit_codes for run in runs] == [[0], [0]]
    assert f"wandb: {second.url}" in out.splitlines()
    shown = [row for run in runs for row in run.rows if any(name.startswith("spectra/") for name in row)]
    assert {row["step"] for row in shown} == {0, 2, 4}
    series = {name for row in shown for name in row} - {"step"}
    assert series == {f"spectra/{key}/{name}" for key in SPECTRA_SHOWN for name in PROJECTIONS}


def test_views_get_the_numbers_of_a_line_and_means_over_layers(stand_ins, tmp_path):
    (boards, runs), said = stand_ins, []
    view = LiveView(("tensorboard", "wandb"), tmp_path, {}, 6, said.append)
    view.write({"kind": "val", "step": 7, "tokens": 70, "val_loss": 2.5, "val_accuracy": None, "by_decile": [1.0]})
    view.write({"kind": "experts", "step": 7, "layer": 0, "utilization": [0.5, 0.5]})
    empty = dict.fromkeys(SPECTRA_SHOWN)
    view.write_spectra([{"step": 7, "proj": "q", **empty, "spectral_norm": norm} for norm in (1.0, 3.0)])
    assert boards[0].written == [("val/val_loss", 2.5, 7), ("spectra/spectral_norm/q", 2.0, 7)]
    assert runs[0].rows == [{"step": 7, "val/val_loss": 2.5}, {"step": 7, "spectra/spectral_norm/q": 2.0}]
    view.close({"status": "failed", "reason": "loss nan"}, [])
    assert runs[0].exit_codes == [1]


def test_a_view_that_fails_says_one_line_and_the_other_stays(stand_ins, tmp_path, monkeypatch):
    (boards, _), said = stand_ins, []
    view = LiveView(("tensorboard", "wandb"), tmp_path, {}, -1, said.append)
    said.clear()

    def broken(run, *_, **__):
        raise ConnectionError("lost\nfor good")

    for method in ("log", "finish"):
        monkeypatch.setattr(WandbRun, method, broken)
    for step in (1, 2):
        view.write({"kind": "train", "step": step, "train_loss": 2.0})
    view.close({}, [])
    assert said == ["--log wandb ends here: ConnectionError: lost"]
    assert [step for _, _, step in boards[0].written] == [1, 2]
    assert boards[0].is_closed


def test_a_view_that_cannot_be_opened_does_not_end_the_run(train_small, stand_ins, monkeypatch):
    def refuse(**given):
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    code, folder, out, _ = train_small("run", "--tokens", 256, "--log", "wandb", "--spectra-every", 0)
    assert code == 0
    sentence = "--log wandb ends here: RuntimeError: api_key not configured (no-tty)"
    assert [line for line in out.splitlines() if "wandb" in line] == [sentence]
    assert sentence in (folder / "log.txt").read_text().splitlines()


@pytest.mark.parametrize("view", sorted(live.VIEWS))
def test_a_view_without_its_package_is_one_sentence(view, train_small, monkeypatch):
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    code, folder, _, err = train_small("run", "--tokens", 512, "--log", view)
    assert code == 2
    assert err.splitlines() == [f"error: --log {view}: the package is not installed; pip install {view}"]
    assert not folder.exists()


def test_an_unknown_view_is_one_sentence(train_small):
    code, folder, _, err = train_small("run", "--tokens", 512, "--log", "jsonl,mlflow")
    assert code == 2
    assert err.splitlines() == [
        "error: --log jsonl,mlflow: choose from jsonl, tensorboard, wandb, or several by commas"
    ]
    assert not folder.exists()


def test_wandb_itself_keeps_the_run_offline_and_no_key(train_small, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", A_KEY)
    try:
        code, folder, out, _ = train_small("run", "--tokens", 3 * 256, "--log", "wandb", "--spectra-every", 3)
    finally:
        wandb.teardown()
    assert code == 0
    (kept,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert kept.name == f"run-{(folder / 'wandb_id.txt').read_text().strip()}.wandb"
    assert f"wandb: offline; to send it: wandb sync {kept.parent}" in out.splitlines()
    log = kept.read_bytes()
    metrics = lines_of(folder / "metrics.jsonl")
    losses = [line[key] for line in metrics for key in ("train_loss", "val_loss") if key in line]
    assert len(losses) == 3 + 4
    assert [loss for loss in losses if str(loss).encode() not in log] == []
    for word in (b"spectra/effective_rank/q", b"config_hash", b"final_val_accuracy", b"muon-speedrun"):
        assert word in log
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert "requirements.txt" not in {path.name for path in files}
    assert [path for path in files if A_KEY.encode() in path.read_bytes()] == []
