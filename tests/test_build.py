"""Shards from mixes of sources, interrupted anywhere, over lines that break; what goes in comes out."""

import gzip
import itertools
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

import build
import data
import shardfiles
import sources
from build import Part, build_shards
from cli import BadInput
from shardfiles import open_shards
from sources import TEXT, Column, Repeated, TextFiles
from tests.conftest import random_documents
from tests.hub import Hub

ROOT = Path(build.__file__).parent


def shard_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def documents_of(folder):
    """All documents, by the tokenizer's own decoder; the end-of-text id begins each."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    eot = json.loads((folder / "meta.json").read_text())["eot_id"]
    texts = []
    for split in ("train", "val"):
        ids = np.concatenate([np.fromfile(p, "<u2", offset=1024) for p in sorted(folder.glob(f"{split}_*.bin"))])
        starts = [*np.flatnonzero(ids == eot).tolist(), len(ids)]
        texts += [tokenizer.decode(ids[a + 1 : b].tolist(), skip_special_tokens=False) for a, b in itertools.pairwise(starts)]
    return texts


def odd_text(rng):
    """Any Unicode: all planes, controls, NUL, combining marks, what looks like special tokens, nothing at all."""
    pieces = ("\x00", "\r\n", "🙂👩‍👩‍👧", "e\u0301", "<|endoftext|>", "<|im_start|>", "\ufeff", "\u202e", " ", "\t", "العربية", "漢字")
    points = [p for p in (rng.randrange(0x110000) for _ in range(rng.randrange(60))) if not 0xD800 <= p < 0xE000]
    words = [*map(chr, points), *rng.choices(pieces, k=rng.randrange(6))]
    rng.shuffle(words)
    return "".join(words)


def test_a_thousand_odd_texts_come_back_as_they_were(tmp_path):
    rng = random.Random(0)
    texts = list(dict.fromkeys([*(odd_text(rng) for _ in range(1000)), "", "\x00", "x" * 10_000_000, "🙂" * 1000]))
    rows = "".join(json.dumps({"text": text}, ensure_ascii=rng.random() < 0.5) + "\n" for text in texts)
    (tmp_path / "odd.jsonl").write_text(rows, encoding="utf-8", newline="")
    parts = [Part("odd", TextFiles([tmp_path / "odd.jsonl"]))]
    build_shards(parts, tmp_path / "s", source="odd", vocab_size=600, val_fraction=0.2)
    assert sorted(documents_of(tmp_path / "s")) == sorted(texts)


@pytest.mark.parametrize("row", ['{"text": "\\ud800 alone"}', '{"text": "fine"}\n{"text": "\\udc00"}'])
def test_a_lone_surrogate_is_refused_with_a_sentence(tmp_path, run_main, row):
    (tmp_path / "a.jsonl").write_text(row + "\n")
    code, _, err = run_main(data.main, "text", tmp_path / "a.jsonl", "--out", tmp_path / "s", "--vocab-size", 300)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert "a.jsonl" in err or "surrogate" in err
    assert not (tmp_path / "s").exists()


def test_a_lone_surrogate_from_any_source_is_refused(tmp_path):
    with pytest.raises(BadInput, match="lone surrogate"):
        build_shards(lambda: iter(["fine", "\ud800"]), tmp_path / "s", source="test", vocab_size=300)


def three_parts(folder):
    """Files of three kinds that share some of their documents."""
    texts = random_documents(900)
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[:400]))
    (folder / "b.txt.gz").write_bytes(gzip.compress("\n".join(texts[300:700]).encode()))
    import pandas

    pandas.DataFrame({"text": texts[350:900]}).to_parquet(folder / "c.parquet", row_group_size=50)
    return [
        Part("a", TextFiles([folder / "a.jsonl"]), 0.5),
        Part("b and c", TextFiles([folder / "b.txt.gz", folder / "c.parquet"]), 0.25),
        Part("c again", TextFiles([folder / "c.parquet"]), 0.25),
    ]


BUILD_AND_DIE = """
import os, random, signal, sys, time
from pathlib import Path
import build, shardfiles
from tests.test_build import small_pieces, three_parts_again
small_pieces(build, shardfiles)
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
rng, killed, kept = random.Random(1), 0, set()
while not out.exists():
    child = os.fork()  # nothing is imported anew, and no thread runs here yet
    if not child:
        three_parts_again(folder, out)
        os._exit(0)
    if killed < 20:
        time.sleep(rng.uniform(0.1, 0.6))
        os.kill(child, signal.SIGKILL)
        killed += 1
        kept.add(build._kept_tokens(out.with_name(out.name + ".partial")))
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
print(killed, len(kept))
"""


def small_pieces(build_module, shardfiles_module):
    """Many batches, many shards, a record of progress after almost every document."""
    build_module.BATCH_CHARS, build_module.SAVE_SECONDS = 4000, 0.01
    shardfiles_module.SHARD_TOKENS, shardfiles_module.WRITE_TOKENS = 20_000, 700


def three_parts_again(folder, out):
    paths = [Part("a", TextFiles([folder / "a.jsonl"]), 0.5)]
    paths.append(Part("b and c", TextFiles([folder / "b.txt.gz", folder / "c.parquet"]), 0.25))
    paths.append(Part("c again", TextFiles([folder / "c.parquet"]), 0.25))
    return build_shards(paths, out, source="three", vocab_size=300, val_fraction=0.1)


def test_a_build_killed_twenty_times_ends_with_the_same_bytes(tmp_path, monkeypatch):
    three_parts(tmp_path)
    words = [sys.executable, "-c", BUILD_AND_DIE, str(tmp_path), str(tmp_path / "killed")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    killed, places = map(int, done.stdout.split())
    assert killed == 20
    assert places > 3, "killed at too few different places to show anything"
    monkeypatch.setattr(shardfiles, "SHARD_TOKENS", 20_000)
    three_parts_again(tmp_path, tmp_path / "undisturbed")
    assert shard_bytes(tmp_path / "killed") == shard_bytes(tmp_path / "undisturbed")
    assert len(open_shards(tmp_path / "killed").files["train"]) > 3


def test_a_mix_keeps_its_shares_and_no_document_twice(tmp_path):
    meta = three_parts_again_with(tmp_path, max_tokens=20_000)
    shares = {name: part["tokens"] / 20_000 for name, part in meta["parts"].items()}
    assert sum(part["tokens"] for part in meta["parts"].values()) == 20_000
    for name, share in (("a", 0.5), ("b and c", 0.25), ("c again", 0.25)):
        assert abs(shares[name] - share) < 0.01, shares
    texts = documents_of(tmp_path / "mixed")
    assert len(set(texts)) == len(texts)


def three_parts_again_with(folder, **more):
    parts = three_parts(folder)
    return build_shards(parts, folder / "mixed", source="three", vocab_size=300, val_fraction=0.1, **more)
