"""Windows that begin at documents, and checksums that a thread checks in the background."""

import json
import time

import numpy as np
import pytest

import data
from corpus.shards import open_shards
from data import Loader, TokenStream, aligned_windows, document_starts
from engine.cli import BadInput


def test_aligned_windows_begin_at_documents_and_leave_out_only_tails(shards_folder):
    shards = open_shards(shards_folder)
    stream = TokenStream(shards, "train")
    tokens = stream.read(0, len(stream)).tolist()
    starts, at, T = [], 0, 64
    while at + T < len(tokens):  # the rule, token by token
        if tokens[at] == shards.eot_id:
            starts.append(at)
            at += T
        else:
            at += 1
    loader = Loader(stream, 4, T, seed=0, packing="bos-aligned")
    assert loader.starts.tolist() == starts
    assert loader.waste == pytest.approx(1 - len(starts) * T / (len(tokens) - 1))
    assert 0.05 < loader.waste < 0.9
    rows = np.concatenate([loader.batch(i) for i in range(-(-loader.windows // 4))])[: loader.windows]
    expected = [bytes(np.array(tokens[s : s + T + 1], np.int32)) for s in starts]
    assert sorted(map(bytes, rows)) == sorted(expected)
    assert (rows[:, 0] == shards.eot_id).all()


@pytest.mark.parametrize(
    ("starts", "tokens", "expected"), [([], 100, []), ([0, 3, 12], 14, [0]), ([0, 10], 21, [0, 10]), ([0, 10], 20, [0])]
)
def test_aligned_windows_end_with_the_tokens(starts, tokens, expected):
    assert aligned_windows(np.array(starts, np.int64), tokens, 10).tolist() == expected


def test_documents_are_found_across_chunks_and_shards(tmp_path, monkeypatch):
    from corpus.build import build_shards
    from tests.conftest import random_documents

    monkeypatch.setattr("corpus.shards.SHARD_TOKENS", 1000)
    monkeypatch.setattr("data.CHUNK_TOKENS", 77)
    build_shards(lambda: iter(random_documents(60)), tmp_path / "s", source="x", vocab_size=300, val_fraction=0.2)
    stream = TokenStream(open_shards(tmp_path / "s"), "train")
    whole = stream.read(0, len(stream))
    np.testing.assert_array_equal(document_starts(stream, stream.eot_id), np.flatnonzero(whole == stream.eot_id))


def test_alignment_needs_to_know_the_end_of_text(shards_folder, tmp_path, train_small):
    import shutil

    shutil.copytree(shards_folder, tmp_path / "s")
    meta = json.loads((tmp_path / "s" / "meta.json").read_text())
    (tmp_path / "s" / "meta.json").write_text(json.dumps(meta | {"eot_id": None}))
    code, _, _, err = train_small("a", "--packing", "bos-aligned", data_folder=tmp_path / "s")
    assert code == 2
    assert "--packing bos-aligned" in err
    code, folder, out, _ = train_small("b", "--packing", "bos-aligned", "--tokens", 512)
    assert code == 0
    assert "% of the training tokens left out" in out
    assert json.loads((folder / "config.json").read_text())["packing"] == "bos-aligned"


@pytest.fixture
def damaged(shards_folder, tmp_path, monkeypatch):
    """A damaged shard that counts as large, whose check takes a second."""
    import shutil

    shutil.copytree(shards_folder, tmp_path / "s")
    path = tmp_path / "s" / "train_000000.bin"
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.write_bytes(raw)
    monkeypatch.setattr(data, "CHECKED_AT_ONCE_BYTES", 0)
    check = data.check_payload
    monkeypatch.setattr(data, "check_payload", lambda *a: (time.sleep(1.0), check(*a)))
    return path


def test_a_large_shard_is_checked_in_the_background(damaged):
    stream = TokenStream(open_shards(damaged.parent), "train")
    stream.read(0, 100)  # at once
    with pytest.raises(BadInput, match=r"train_000000\.bin: its checksum"):
        stream.wait_until_checked()
    with pytest.raises(BadInput, match=r"train_000000\.bin: its checksum"):
        stream.read(0, 100)


def test_no_checkpoint_is_written_before_the_tokens_are_checked(damaged, train_small):
    """Without waiting, the run would finish before the check does."""
    code, folder, _, err = train_small("a", "--tokens", 512, "--checkpoint-every", 1, data_folder=damaged.parent)
    assert code != 0
    assert "its checksum does not match" in err
    assert not (folder / "checkpoint.pt").exists()
