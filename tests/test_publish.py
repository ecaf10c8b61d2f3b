"""Publishing the runs of suites: everything a report needs, nothing else, in a folder that a clone can carry."""

import json

import numpy as np
import pytest

from analysis.runs import load_run
from bench import suites as publishing
from bench.synthetic import write_run
from engine import files
from suites.planner import Planner, Selection


@pytest.fixture
def finished(tmp_path, shards_folder):
    """Every run of a sweep, with spectra and a checkpoint."""
    where = {"scale": "nano", "data": shards_folder, "runs_dir": tmp_path / "runs", "seeds": (0, 1)}
    planner = Planner(Selection(suite="moe-lr-muon", **where))
    jobs = [job for planned in planner.plan("moe-lr-muon") for job in planned.jobs]
    for number, job in enumerate(jobs[:-1]):
        lr = float(job.flags[job.flags.index("--lr") + 1])
        write_run(job.folder, final=3 + 0.01 * number + 1 / 7, lr=lr, seed=number % 2, model="moe-nano")
        (job.folder / files.CHECKPOINT).write_bytes(b"large")
        summary = json.loads((job.folder / files.SUMMARY).read_text()) | {"final_val_loss": 3.0}
        (job.folder / files.SUMMARY).write_text(json.dumps(summary))
    words = ["moe-lr-muon", "--scale", "nano", "--data", shards_folder, "--runs-dir", tmp_path / "runs"]
    return jobs, [*words, "--seeds", "0", "1", "--out", tmp_path / "out"]


def test_published_runs_are_packed_and_read_like_the_originals(finished, tmp_path, run_main, monkeypatch):
    jobs, words = finished
    monkeypatch.setattr(publishing.experiments, "report", lambda arguments: None)  # tested elsewhere
    code, out, err = run_main(publishing.main, *words)
    assert code == 0, err
    assert f"{len(jobs) - 1} of {len(jobs)} runs" in out  # the last was not trained
    kept = sorted(path.name for path in (tmp_path / "out" / jobs[0].name).iterdir())
    assert kept == ["config.json", "manifold_stats.jsonl.xz", "metrics.jsonl.xz", "summary.json"]
    before, after = load_run(jobs[0].folder), load_run(tmp_path / "out" / jobs[0].name)
    assert after.final_loss == pytest.approx(before.final_loss, rel=1e-6)
    assert after.final_loss != before.final_loss  # seven digits
    assert after.grid("q", "effective_rank")[1] == pytest.approx(before.grid("q", "effective_rank")[1], rel=1e-4)
    (steps, ours), (_, exact) = (run.singular_values("q", 0) for run in (after, before))
    assert len(steps) > 2
    assert ours[[0, -1]] == pytest.approx(exact[[0, -1]], rel=1e-4)
    assert ours[1:-1] == pytest.approx(exact[1:-1], rel=0.051)
    between = np.array([float(f"{value:.1e}") for value in exact[1]], dtype=np.float32)  # two digits
    assert np.array_equal(ours[1].astype(np.float32), between)


def test_a_folder_that_is_too_large_is_refused(finished, run_main, monkeypatch):
    monkeypatch.setattr(publishing.experiments, "report", lambda arguments: None)
    monkeypatch.setattr(publishing, "MOST_BYTES", 1000)
    code, _, err = run_main(publishing.main, *finished[1])
    assert code == 2
    assert "more than the 0 MB that it may have" in err
    code, _, err = run_main(publishing.main, *finished[1][:-2])
    assert code == 2
    assert "--out: name a folder" in err
