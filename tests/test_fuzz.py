"""A sliver of the fuzz and of the soak: bench/LOG.md has the long ones."""

import subprocess
import sys

import pytest

from bench import fuzz, soak


def test_damaged_files_are_refused_or_read_as_what_they_are(run_main):
    code, out, _ = run_main(fuzz.main, "--cases", "450")
    assert code == 0, out
    assert "450 cases, 0 faults" in out


@pytest.mark.parametrize("part", ["shards", "run", "checkpoint"])
def test_the_fuzz_finds_a_reader_that_believes_everything(tmp_path, part, run_main):
    """Each of its readers calls a fault where nothing is checked."""

    def believing(folder, whole):
        changed = {p.name: p.read_bytes() for p in folder.iterdir()} != {
            p.name: p.read_bytes() for p in whole.iterdir()
        }
        if changed:
            raise fuzz.Accepted("damage")

    makers = {"shards": fuzz.shards_to_damage, "run": fuzz.run_to_damage}
    whole = tmp_path / "whole"
    if part == "checkpoint":
        fuzz.shards_to_damage(tmp_path / "shards")
        whole.mkdir()
        fuzz.Checkpoints(tmp_path / "shards").write(whole)
    else:
        makers[part](whole)
    _, faults = fuzz.try_cases(whole, believing, 30, fuzz.random.Random(1), tmp_path / "damaged")
    assert len(faults) > 25


def test_a_training_killed_again_and_again_ends_with_the_same_weights(shards_folder):
    words = [sys.executable, "-m", "bench.soak", "--minutes", "1", "--data", str(shards_folder)]
    done = subprocess.run(words, cwd=soak.TRAIN.parent, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same to the bit" in done.stdout
    assert " 0 kills" not in done.stdout


def test_the_soak_sees_a_difference(train_small):
    """Another seed is another training, to the weights, the optimizers' state and the lines."""
    folders = [train_small(f"seed-{seed}", "--tokens", 4 * 256, "--seed", seed)[1] for seed in (0, 1)]
    found = " ".join(soak.differences(*folders))
    for words in ("weight embedding", "state 0 of optimizer 0", "metrics.jsonl", "manifold_stats.jsonl"):
        assert words in found
    assert soak.differences(folders[0], folders[0]) == []


def test_deterministic_algorithms_are_asked_for_and_change_no_number_on_a_cpu(train_small):
    import torch

    folders = [
        train_small(name, "--tokens", 4 * 256, *more)[1] for name, more in (("a", ()), ("b", ("--deterministic",)))
    ]
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    assert soak.differences(*folders) == []
