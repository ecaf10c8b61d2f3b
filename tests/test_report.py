import base64
import json
import re
import shutil

import matplotlib
import numpy as np
import pytest
import scipy.stats

import plots
import report
from stats import first_reaching, load_run, t_interval


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory):
    """Two runs of two layers, written by hand: every number in them is known."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    for optimizer, final in (("muon", 3.0), ("adamw", 3.5)):
        run = folder / f"run-{optimizer}"
        run.mkdir()
        config = {"optimizer": optimizer, "seed": 0, "model": "nano", "steps": 10, "lr": 0.02, "adamw_lr": 0.005}
        (run / "config.json").write_text(json.dumps(config | {"data_fingerprint": "f"}))
        with (run / "metrics.jsonl").open("w") as file:
            for step in range(11):
                loss = 5 + (final - 5) * step / 10
                val = {"step": step, "tokens": 100 * step, "val_loss": loss, "val_accuracy": 0.01 * step}
                file.write(json.dumps({"kind": "val", **val, "train_seconds": 2.0 * step}) + "\n")
                train = {"step": step + 1, "tokens": 100 * step + 100, "train_loss": loss, "step_ms": 2000.0}
                file.write(json.dumps({"kind": "train", **train}) + "\n")
            file.write('{"kind": "val", "st')  # killed while writing
        (run / "summary.json").write_text(json.dumps({"status": "finished"}))
        with (run / "manifold_stats.jsonl").open("w") as file:
            for step in (0, 5, 10):
                for layer in range(2):
                    for proj in ("q", "k", "v", "o", "up", "down"):
                        values = dict.fromkeys(("spectral_norm", "spectral_entropy", "effective_rank"), rng.random())
                        aligned = None if step == 0 else rng.random()
                        values |= {"left_alignment": aligned, "left_alignment_chance": 0.1}
                        values["singular_values"] = sorted(rng.random(4), reverse=True)
                        file.write(json.dumps({"step": step, "layer": layer, "proj": proj, **values}) + "\n")
    return [folder / "run-muon", folder / "run-adamw"]


def test_the_report_is_self_contained_and_says_who_won(run_main, finished_runs, tmp_path):
    code, out, _ = run_main(report.main, *finished_runs, "--out", tmp_path / "r")
    assert code == 0
    assert "Muon ends 0.5000 nats below AdamW" in out
    assert "after about 8 of 10 updates, 15 s" in out  # 5 - 0.2 t = 3.5 at t = 7.5
    page = (tmp_path / "r" / "report.html").read_text()
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == 8
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    assert not re.search(r'(src|href)="(?!data:)', page)
    markdown = (tmp_path / "r" / "report.md").read_text()
    for link in re.findall(r"\]\((plots/[^)]+)\)", markdown):
        assert (tmp_path / "r" / link).stat().st_size > 1000
    assert "3.5000" in page
    assert "3.5000" in markdown


def test_strings_from_files_are_escaped(run_main, finished_runs, tmp_path):
    config = json.loads((finished_runs[0] / "config.json").read_text())
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "config.json").write_text(json.dumps(config | {"model": "<script>alert(1)</script>"}))
    (evil / "metrics.jsonl").write_bytes((finished_runs[0] / "metrics.jsonl").read_bytes())
    code, _, _ = run_main(report.main, evil, finished_runs[0], "--out", tmp_path / "r")
    assert code == 0
    assert "<script>" not in (tmp_path / "r" / "report.html").read_text()


def test_figures_show_the_numbers_of_the_files(finished_runs):
    runs = [load_run(path) for path in finished_runs]
    axes = plots.loss_curves(runs).axes
    curve = next(line for line in axes[0].lines if line.get_label() == "AdamW")
    np.testing.assert_allclose(curve.get_ydata(), 5 - 0.15 * np.arange(11))
    assert axes[0].get_ylabel() == "loss (nats per token)"
    assert axes[3].get_xlabel() == "training time (s)"
    figure = plots.metric_heatmap(runs, "effective_rank")
    meshes = [ax.collections[0] for ax in figure.axes[:12]]
    for column in range(6):
        upper, lower = meshes[column], meshes[column + 6]
        assert upper.get_clim() == lower.get_clim()
        _, values = runs[1].grid(runs[1].projections()[column], "effective_rank")
        np.testing.assert_allclose(lower.get_array(), values)
    chance = plots.metric_over_time(runs, "left_alignment").axes[0]
    assert any(np.allclose(line.get_ydata(), 0.1) for line in chance.lines)
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize(
    ("missing", "words"), [("all", "no such run"), ("config.json", "config.json"), ("metrics.jsonl", "no validation")]
)
def test_a_folder_that_is_no_run_is_named(run_main, finished_runs, tmp_path, missing, words):
    folder = tmp_path / "run"
    if missing != "all":
        folder.mkdir()
        for path in finished_runs[0].iterdir():
            if path.name != missing:
                (folder / path.name).write_bytes(path.read_bytes())
    code, _, err = run_main(report.main, folder, "--out", tmp_path / "r")
    assert code == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "r").exists()


def test_a_broken_line_in_the_middle_is_named(run_main, finished_runs, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for path in finished_runs[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    text = (folder / "metrics.jsonl").read_text().splitlines()
    text[3] = "{"
    (folder / "metrics.jsonl").write_text("\n".join(text))
    code, _, err = run_main(report.main, folder, "--out", tmp_path / "r")
    assert code == 2
    assert "metrics.jsonl: line 4" in err


def test_unlike_unfinished_and_repeated_runs_are_not_pooled(finished_runs, tmp_path):
    def copy(name, config=None, status="finished"):
        folder = tmp_path / name
        shutil.copytree(finished_runs[0], folder)
        old = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(old | (config or {})))
        (folder / "summary.json").write_text(json.dumps({"status": status}))
        return load_run(folder)

    first = copy("first")
    assert "single seed" in " ".join(report.findings([first, copy("again")]))
    assert "2 seeds, 95 %" in " ".join(report.findings([first, copy("other", {"seed": 1})]))
    longer = report.findings([first, copy("longer", {"steps": 99})])
    assert longer == ["Careful: these runs differ in steps, so their losses do not compare."]
    stopped = report.findings([first, copy("stopped", {"optimizer": "adamw"}, "stopped")])
    assert not any("below" in sentence for sentence in stopped)
    assert "stopped is stopped" in stopped[-1]


def test_a_report_is_not_mixed_with_something_else(run_main, finished_runs, tmp_path):
    code, _, err = run_main(report.main, finished_runs[0], "--out", finished_runs[1])
    assert code == 2
    assert "no report" in err
    for _ in range(2):  # but an earlier report is replaced
        assert run_main(report.main, finished_runs[0], "--out", tmp_path / "r")[0] == 0


def test_t_interval_equals_a_worked_example():
    values = [3.3154, 3.3098, 3.2927]
    mean, low, high = t_interval(values)
    assert mean == pytest.approx(3.30597, abs=1e-5)
    assert high - mean == pytest.approx(4.302653 * np.std(values, ddof=1) / 3**0.5, rel=1e-6)
    assert mean - low == pytest.approx(high - mean)
    assert (low, high) == pytest.approx(
        scipy.stats.t.interval(0.95, 2, loc=np.mean(values), scale=scipy.stats.sem(values))
    )
    assert np.isnan(t_interval([1.0])[1])


def test_first_reaching_interpolates_and_knows_never():
    x, loss = np.array([0.0, 10.0, 20.0]), np.array([5.0, 4.0, 3.0])
    assert first_reaching(x, loss, 3.5) == 15.0
    assert first_reaching(x, loss, 5.0) == 0.0
    assert first_reaching(x, loss, 2.9) is None
