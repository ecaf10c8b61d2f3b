"""inspect describes a folder of shards, and verify names every damage."""

import json
import struct

import numpy as np
import pytest

from corpus import commands
from corpus.build import build_shards
from tests.conftest import random_documents


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Shards of 2,000 tokens."""
    monkeypatch.setattr("corpus.shards.SHARD_TOKENS", 2000)
    monkeypatch.setattr("corpus.shards.WRITE_TOKENS", 500)
    build_shards(lambda: iter(random_documents(90)), tmp_path / "s", source="words", vocab_size=300, val_fraction=0.2)
    return tmp_path / "s"


def test_inspect_says_what_is_in_the_shards(folder, run_main):
    code, out, _ = run_main(commands.main, "inspect", folder)
    assert code == 0
    meta = json.loads((folder / "meta.json").read_text())
    for split in ("train", "val"):
        paths = sorted(folder.glob(f"{split}_*.bin"))
        ids = np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in paths])
        starts = np.flatnonzero(ids == meta["eot_id"])
        lengths = [*(starts[1:] - starts[:-1]), len(ids) - starts[-1]]
        line = next(line for line in out.splitlines() if line.startswith(f"{split}:"))
        assert f"{len(ids):,} tokens in {len(paths)} shard" in line
        assert f"ids {ids.min()} to {ids.max()} ({len(set(ids.tolist()))} different" in line
        assert f"{len(starts)} documents of {np.mean(lengths):.0f} tokens" in line
        assert f"median {np.median(lengths):.0f}" in line
        assert f"longest {max(lengths)}" in line
    first = next(text for text in random_documents(90) if f"first text: '<|endoftext|>{text[:40]}" in out)
    assert first
    assert "every checksum matches" in out


def test_published_shards_are_selected_by_a_pattern(tmp_path, run_main):
    for name, ids in (
        ("fineweb_val_000000.bin", [50256, *range(98)]),
        ("fineweb_train_000001.bin", [50256, 7, 50256, 8]),
    ):
        header = struct.pack("<256i", 20240520, 1, len(ids), *[0] * 253)
        (tmp_path / name).write_bytes(header + struct.pack(f"<{len(ids)}H", *ids))
    (tmp_path / "other_train_000001.bin").write_bytes(b"not a shard")
    code, out, _ = run_main(commands.main, "inspect", tmp_path, "--data-pattern", "fineweb_train_*.bin")
    assert code == 0
    assert "train: 4 tokens in 1 shard; ids 7 to 50256 (3 different" in out
    assert "2 documents of 2 tokens" in out
    assert "none of them with a checksum" in out
    assert run_main(commands.main, "verify", tmp_path)[0] == 1
    for pattern, words in (
        ("fineweb_*.bin", "train in it"),
        ("../train_*.bin", "train in it"),
        ("x_train_*.bin", "no x_train"),
    ):
        code, _, err = run_main(commands.main, "verify", tmp_path, "--data-pattern", pattern)
        assert code == 2
        assert words in err


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("flip", "checksum does not match"),
        ("cut", "header promises"),
        ("other text", "SHA-256"),
        ("gone", "is missing"),
        ("meta", "promises"),
        ("vocabulary", "token id"),
    ],
)
def test_verify_names_every_damage(folder, run_main, how, words):
    assert run_main(commands.main, "verify", folder)[0] == 0
    paths, meta_path = sorted(folder.glob("train_*.bin"))[:2], folder / "meta.json"
    meta = json.loads(meta_path.read_text())
    for path in paths if how in ("flip", "cut", "other text") else paths[:1]:
        raw = bytearray(path.read_bytes())
        if how == "flip":
            raw[-9] ^= 4
        elif how == "cut":
            del raw[-8:]
        elif how == "other text":  # a valid shard without a checksum, but with other tokens
            raw[20:24] = bytes(4)
            raw[-9] ^= 1
        path.write_bytes(raw)
    if how == "gone":
        paths[0].unlink()
    elif how == "meta":
        meta_path.write_text(json.dumps(meta | {"train_tokens": meta["train_tokens"] + 1}))
    elif how == "vocabulary":
        meta_path.write_text(json.dumps(meta | {"vocab_size": 200}))
    code, out, _ = run_main(commands.main, "verify", folder)
    assert code == 1
    assert words in out
    if how in ("flip", "cut", "other text"):
        assert all(path.name in out for path in paths)
