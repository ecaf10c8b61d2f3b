"""The benchmark of the data path reports every figure with its goal, and refuses to time a wrong builder."""

import json

import numpy as np
import pytest

from bench import data as bench_data
from corpus import build

SMALL = ("--megabytes", 1.5, "--repeats", 1, "--shards", 1, "--seconds", 0.05)


def test_every_figure_has_its_goal(run_main, tmp_path):
    code, out, _ = run_main(bench_data.main, *SMALL, "--json", tmp_path / "data.json")
    assert code == 0
    found = json.loads((tmp_path / "data.json").read_text())
    assert found["builder_ratio"] == pytest.approx(found["rates"]["builder"][0] / found["rates"]["encode_batch"][0])
    for key in ("loader_tokens_per_second", "first_batch_seconds", "loader_anonymous_mb"):
        assert found[key] is None or found[key] > 0
    for goal in ("builder_goal", "loader_goal", "first_batch_goal", "loader_anonymous_goal"):
        assert found[goal] == bench_data.GOALS[goal.removesuffix("_goal")]
    assert "builder / encode_batch" in out


def test_a_builder_that_makes_as_many_other_tokens_is_not_timed(run_main, monkeypatch):
    right = build._Encode.after_eot

    def other(self, ids):
        return np.concatenate((right(self, ids)[:1], right(self, ids)[:0:-1]))

    monkeypatch.setattr(build._Encode, "after_eot", other)
    code, _, err = run_main(bench_data.main, *SMALL)
    assert code == 2
    assert "no time is reported" in err
