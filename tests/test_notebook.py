"""speedrun.ipynb: valid, committed without outputs, and every cell runs, on a tiny budget, in a kernel of its own."""

import json
import subprocess

import nbformat
import pytest
from nbclient import NotebookClient

from engine.files import ROOT

NOTEBOOK = ROOT / "speedrun.ipynb"
TINY = {
    **{"TOKENS": "1024", "TRIAL_TOKENS": "512", "PROMPT": "ab", "FLAGS": "--batch-tokens 512 --eval-tokens 512"},
    **{"MUON_RATES": "0.01 0.04", "ADAMW_RATES": "0.003", "WIDTHS": "64"},
}


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def source_of(notebook, name):
    return next(cell.source for cell in notebook.cells if cell.id == name)


def test_the_notebook_is_valid_and_holds_no_output(notebook):
    nbformat.validate(json.loads(NOTEBOOK.read_text()))
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert cell.metadata == {}
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None), cell.id


@pytest.fixture(scope="module")
def executed(notebook, shards_folder, tmp_path_factory):
    """The executed notebook and the folder of its runs."""
    runs = tmp_path_factory.mktemp("notebook") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (TINY | {"DATA": shards_folder, "RUNS": runs}).items():
            patch.setenv(f"SPEEDRUN_{name}", str(value))
        place = {"metadata": {"path": str(ROOT)}}
        done = NotebookClient(nbformat.from_dict(notebook), timeout=300, resources=place).execute()
    return done, runs


def output_of(executed, name):
    """The text that a cell printed or showed, and the number of its pictures."""
    cell = next(cell for cell in executed[0].cells if cell.id == name)
    shown = [output.get("data", {}) for output in cell.outputs]
    text = [output.text for output in cell.outputs if output.output_type == "stream"]
    return "".join(text + [data.get("text/markdown", "") for data in shown]), sum("image/png" in data for data in shown)


def final_losses(runs, pattern):
    """Of the finished runs whose names match: {name: loss}."""
    summaries = {path.parent.name: json.loads(path.read_text()) for path in runs.glob(f"{pattern}/summary.json")}
    assert {summary["status"] for summary in summaries.values()} == {"finished"}
    return {name: summary["final_val_loss"] for name, summary in summaries.items()}


def test_every_cell_runs_and_shows_its_figures(executed):
    assert [output_of(executed, name)[1] for name in ("race-verdict", "race-spectra", "rates", "sizes")] == [1, 2, 1, 1]


def test_the_race_names_the_winner(executed):
    losses = final_losses(executed[1], "race-*")
    winner = min(losses, key=losses.get).removeprefix("race-")
    said, _ = output_of(executed, "race-verdict")
    assert said.lower().startswith(winner), said
    assert f"{max(losses.values()) - min(losses.values()):.4f}" in said


def test_the_sizes_train_at_the_best_rates_of_the_first_experiment(executed):
    _, runs = executed
    losses = final_losses(runs, "rate-*")
    assert len(losses) == 3
    best = min((name for name in losses if "muon" in name), key=losses.get).removeprefix("rate-muon-")
    rates = {name: json.loads((runs / name / "config.json").read_text())["lr"] for name in final_losses(runs, "64-*")}
    assert rates == {"64-wide-muon": float(best), "64-wide-adamw": pytest.approx(0.003 * 128 / 64)}
    for pattern, cell in (("rate-*", "rates"), ("64-*", "sizes")):
        for name, loss in final_losses(runs, pattern).items():
            assert f"{name}: finished, validation loss {loss:.3f}" in output_of(executed, cell)[0]


def test_the_sample_continues_the_prompt(executed):
    said, _ = output_of(executed, "sample")
    assert TINY["PROMPT"] in said
    assert len(said.strip()) > len(TINY["PROMPT"])


def set_up(notebook, monkeypatch, folder, **installed):
    """Run the cell that sets up in an empty folder; returns the commands that it would run."""
    ran = []

    def run(command, check):
        ran.append(command)
        if command[0] == "git":
            (folder / "muon-speedrun").mkdir()
            (folder / "muon-speedrun/requirements.txt").write_text((ROOT / "requirements.txt").read_text())

    monkeypatch.chdir(folder)
    monkeypatch.setattr(subprocess, "run", run)
    for name, value in installed.items():
        monkeypatch.setenv(f"SPEEDRUN_{name}", value)
    exec(source_of(notebook, "budgets") + "\n" + source_of(notebook, "setup"), {})
    return ran


def test_outside_a_checkout_it_clones_and_installs_what_is_missing(notebook, monkeypatch, tmp_path):
    from importlib import metadata

    versions = {"torch": "2.9.0+cu126", "numpy": "1.0"}  # torch too old, any numpy will do, nothing else

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    clone, install = set_up(notebook, monkeypatch, tmp_path, REPOSITORY="https://host.example/it")
    assert clone[:2] == ["git", "clone"]
    assert clone[-2:] == ["https://host.example/it", "muon-speedrun"]
    pins = [
        line.split()[0].rstrip(";") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line
    ]
    assert [word for word in install if "==" in word] == [pin for pin in pins if not pin.startswith("numpy")]


def test_without_an_address_it_says_what_to_set(notebook, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="REPOSITORY"):
        set_up(notebook, monkeypatch, tmp_path)
