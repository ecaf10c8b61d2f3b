"""From text to shards and from shards to batches: nothing is lost, repeated or on both sides; damage is named."""

import gzip
import itertools
import json
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from corpus import commands, documents, local_files, sources
from corpus.build import build_shards
from corpus.shards import open_shards
from data import Loader, TokenStream, shuffle_index, validation_batches
from engine.cli import BadInput
from engine.files import ROOT
from tests.conftest import random_documents


def build(texts, out, **options):
    return build_shards(
        lambda: iter(texts), out, **({"source": "test", "vocab_size": 300, "val_fraction": 0.2} | options)
    )


def text_documents(files, column):
    return iter(local_files.TextFiles(files, sources.Column(column)).open())


def decoded_documents(folder, split):
    """The documents of a split, read with struct and tokenizers alone."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = []
    for path in sorted(folder.glob(f"{split}_*.bin")):
        raw = path.read_bytes()
        header = struct.unpack("<256i", raw[:1024])
        assert header[:2] == (20240520, 1)
        assert header[2] * 2 == len(raw) - 1024
        assert header[5] & 0xFFFFFFFF == zlib.crc32(raw[1024:])
        ids += struct.unpack(f"<{header[2]}H", raw[1024:])
    eot = json.loads((folder / "meta.json").read_text())["eot_id"]
    assert ids[0] == eot
    starts = [i for i, token in enumerate(ids) if token == eot] + [len(ids)]
    pieces = [ids[a + 1 : b] for a, b in itertools.pairwise(starts)]
    return [tokenizer.decode(piece, skip_special_tokens=False) for piece in pieces]


def test_every_document_comes_back_once_on_one_side(tmp_path):
    texts = [*random_documents(60), "emoji 🙂 and\x00NUL\r\n", "<|endoftext|> spelled out", ""]
    meta = build(texts + texts[:10], tmp_path / "s")
    train, val = (decoded_documents(tmp_path / "s", split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(texts)
    assert not set(train) & set(val)
    assert meta["documents"] == {"train": len(train), "val": len(val), "duplicates": 10}


def test_the_side_of_a_document_does_not_depend_on_its_neighbours(tmp_path):
    texts = random_documents(80)
    build(texts, tmp_path / "all")
    build(texts[::-2], tmp_path / "some")
    assert set(decoded_documents(tmp_path / "some", "val")) <= set(decoded_documents(tmp_path / "all", "val"))


def test_no_token_window_is_shared_by_train_and_val(shards_folder):
    shards = open_shards(shards_folder)
    train, val = (TokenStream(shards, split) for split in ("train", "val"))
    loader = Loader(train, 4, 32, seed=0)
    seen = {row.tobytes() for i in range(-(-loader.windows // 4)) for row in loader.batch(i)}
    assert len(seen) == loader.windows
    for batch in validation_batches(val, 10**9, 32, 4):
        assert not {row.tobytes() for row in batch} & seen
    every_train_window = np.lib.stride_tricks.sliding_window_view(train.read(0, len(train)), 33)
    everything = {row.tobytes() for row in every_train_window}
    for batch in validation_batches(val, 10**9, 32, 4):
        assert not {row.tobytes() for row in batch} & everything


def test_meta_describes_the_shards(shards_folder):
    meta = json.loads((shards_folder / "meta.json").read_text())
    expected = {"tokenizer", "vocab_size", "eot_id", "source", "train_tokens", "val_tokens", "documents", "split"}
    assert meta.keys() == expected | {"sha256", "fingerprint"}
    shards = open_shards(shards_folder)
    assert (shards.tokens("train"), shards.tokens("val")) == (meta["train_tokens"], meta["val_tokens"])


def test_same_text_same_fingerprint_other_text_another(tmp_path):
    texts = random_documents(50)
    first, again, other = (build(t, tmp_path / n) for t, n in ((texts, "a"), (texts, "b"), (texts[1:], "c")))
    assert first["fingerprint"] == again["fingerprint"] != other["fingerprint"]


def test_max_tokens_is_exact(tmp_path):
    meta = build(random_documents(100), tmp_path / "s", max_tokens=5000)
    assert meta["train_tokens"] + meta["val_tokens"] == 5000


def test_max_documents_is_exact_and_duplicates_do_not_count(tmp_path):
    texts = random_documents(60)
    meta = build([*texts[:10], *texts[:10], *texts[10:]], tmp_path / "s", max_documents=40, val_fraction=0.1)
    assert meta["documents"]["train"] + meta["documents"]["val"] == 40
    assert meta["documents"]["duplicates"] == 10


def test_a_broken_build_leaves_nothing(tmp_path):
    calls = []

    def texts():
        calls.append(1)
        yield from random_documents(50)
        if len(calls) == 2:  # the first pass trains the tokenizer
            assert (tmp_path / "s.partial").is_dir()
            raise RuntimeError("power loss")

    with pytest.raises(RuntimeError):
        build_shards(texts, tmp_path / "s", source="test", vocab_size=300)
    assert list(tmp_path.iterdir()) == []


def test_text_files_of_every_kind_give_the_same_documents(tmp_path):
    import pandas

    texts = random_documents(30)
    rows = "".join(json.dumps({"text": t, "other": 1}) + "\n" for t in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(rows)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(rows))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(rows))
    pandas.DataFrame({"text": texts}).to_parquet(tmp_path / "d.parquet")
    (tmp_path / "empty.jsonl").touch()
    assert list(text_documents([tmp_path / "empty.jsonl", tmp_path / "a.jsonl"], "text")) == texts
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        assert list(text_documents([tmp_path / name], "text")) == texts, name
    with pytest.raises(BadInput, match="--text-column"):
        list(text_documents([tmp_path / "a.jsonl"], "body"))


def test_a_local_dataset_streams_through_the_hub_path(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in "abc"))
    assert list(sources.hub_dataset(str(tmp_path), None, "train", sources.TEXT).open()) == ["a", "b", "c"]


def test_a_long_txt_is_cut_at_newlines_and_loses_nothing(tmp_path):
    lines = [f"line {i} é {'x' * (i % 300)}\r\n" for i in range(2000)]
    text = "".join(lines)
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.txt.zst").write_bytes(zstandard.compress(text.encode()))
    found = text_documents(local_files.find_files([tmp_path]).files, "text")
    pieces = list(text_documents([tmp_path / "a.txt"], "text"))
    assert list(found) == 3 * pieces
    assert "".join(pieces) == text
    assert len(pieces) > 1
    for piece in pieces[:-1]:
        assert piece.endswith("\n")
        assert 64 * 1024 <= len(piece.encode()) < 64 * 1024 + 400


def test_a_tokenizers_own_truncation_is_ignored(tmp_path):
    build(random_documents(50), tmp_path / "a")
    tokenizer = Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding()
    tokenizer.save(str(tmp_path / "cut.json"))
    again = build(random_documents(50), tmp_path / "b", tokenizer=str(tmp_path / "cut.json"))
    assert again["train_tokens"] == open_shards(tmp_path / "a").tokens("train")


def test_a_set_of_hashes_knows_what_was_added():
    rng = np.random.default_rng(0)
    seen, reference = documents.SeenHashes(), set()
    for _ in range(50):
        hashes = np.unique(rng.integers(0, 2000, 100, dtype=np.uint64))
        known = seen.known(hashes)
        assert known.tolist() == [value in reference for value in hashes.tolist()]
        seen.add(hashes[~known])
        reference |= set(hashes.tolist())
    assert sum(map(len, seen.runs)) == len(reference)
    assert len(seen.runs) <= 12


@pytest.fixture
def split_shards(tmp_path, monkeypatch):
    """The same kind of shards, at most 1,000 tokens each."""
    monkeypatch.setattr("corpus.shards.SHARD_TOKENS", 1000)
    build(random_documents(60), tmp_path / "s")
    shards = open_shards(tmp_path / "s")
    assert len(shards.files["train"]) > 3
    return shards


def test_windows_cross_shard_borders(split_shards):
    stream = TokenStream(split_shards, "train")
    whole = np.concatenate([np.fromfile(p, "<u2", offset=1024) for p in split_shards.files["train"]])
    assert len(stream) == len(whole)
    for start, count in ((0, 5), (990, 25), (999, 1), (1000, 1), (1500, 2200), (len(whole) - 3, 3)):
        np.testing.assert_array_equal(stream.read(start, count), whole[start : start + count])


@given(n=st.integers(1, 5000), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_shuffling_is_a_bijection(n, seed, epoch):
    np.testing.assert_array_equal(np.sort(shuffle_index(np.arange(n), n, seed, epoch)), np.arange(n))


@pytest.mark.parametrize("n", [64, 1000, 4097])
def test_shuffling_depends_on_seed_and_epoch_and_not_on_the_order(n):
    index = np.arange(n)
    a, b, c = (shuffle_index(index, n, seed, epoch) for seed, epoch in ((0, 0), (1, 0), (0, 1)))
    assert (a != b).mean() > 0.9 < (a != c).mean()
    for order in (a, b, c):
        assert abs(np.corrcoef(order, index)[0, 1]) < 4 / np.sqrt(n)
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 4 / np.sqrt(n)


def test_an_epoch_holds_every_window_once_and_epochs_differ(split_shards):
    stream = TokenStream(split_shards, "train")
    loader = Loader(stream, 7, 32, seed=3)
    rows = np.concatenate([loader.batch(i) for i in range(2 * loader.windows // 7 + 1)])
    windows = np.stack([stream.read(w * 32, 33) for w in range(loader.windows)])
    first, second = rows[: loader.windows], rows[loader.windows : 2 * loader.windows]
    assert sorted(map(bytes, first)) == sorted(map(bytes, second)) == sorted(map(bytes, windows))
    assert not np.array_equal(first, second)


def test_the_global_batch_is_the_same_for_every_world_size(split_shards):
    stream = TokenStream(split_shards, "train")
    whole = Loader(stream, 12, 16, seed=1)
    for world_size in (2, 3, 4):
        ranks = [Loader(stream, 12, 16, seed=1, rank=r, world_size=world_size) for r in range(world_size)]
        for i in (0, 5):
            np.testing.assert_array_equal(np.concatenate([loader.batch(i) for loader in ranks]), whole.batch(i))


def test_different_seeds_give_a_different_order(split_shards):
    stream = TokenStream(split_shards, "train")
    assert not np.array_equal(Loader(stream, 8, 16, seed=0).batch(0), Loader(stream, 8, 16, seed=1).batch(0))


def test_iteration_gives_the_pure_batches_and_resumes_anywhere(split_shards):
    lines = []
    loader = Loader(TokenStream(split_shards, "train"), 8, 64, seed=0, say=lines.append)
    steps = 2 * loader.windows // 8 + 3
    for i in range(steps):
        np.testing.assert_array_equal(next(loader).numpy(), loader.batch(i))
        state = loader.state_dict()
        assert state == {"epoch": (i + 1) * 8 // loader.windows, "position": (i + 1) * 8 % loader.windows}
        if i % 5 == 0:
            again = []
            other = Loader(TokenStream(split_shards, "train"), 8, 64, seed=0, say=again.append)
            other.load_state_dict(state)
            np.testing.assert_array_equal(next(other).numpy(), loader.batch(i + 1))
            other.close()
            assert len(again) == ((i + 1) * 8 <= loader.windows < (i + 2) * 8)  # not printed before it was stopped
    loader.close()
    assert len(lines) == 1
    assert "starting another epoch" in lines[0]


def test_validation_is_always_the_first_tokens(split_shards):
    stream = TokenStream(split_shards, "val")
    for rows in (1, 3, 100):
        batches = np.concatenate(list(validation_batches(stream, 320, 32, rows)))
        np.testing.assert_array_equal(batches[:, :-1].ravel(), stream.read(0, 320))
        np.testing.assert_array_equal(batches[:, 1:].ravel(), stream.read(1, 320))


def test_llmc_shards_without_our_extras_can_be_read(tmp_path):
    for name, ids in (("fineweb_val_000000.bin", range(100)), ("fineweb_train_000001.bin", range(50_000, 50_200))):
        header = struct.pack("<256i", 20240520, 1, len(ids), *[0] * 253)
        (tmp_path / name).write_bytes(header + struct.pack(f"<{len(ids)}H", *ids))
    shards = open_shards(tmp_path)
    assert shards.vocab_size == 50_257
    assert Loader(TokenStream(shards, "train"), 2, 16, seed=0).batch(0).shape == (2, 17)


def damage(path, how):
    raw = bytearray(path.read_bytes())
    if how == "flipped byte":
        raw[-7] ^= 1
    elif how == "truncated":
        del raw[-10:]
    elif how == "magic":
        raw[0] ^= 1
    elif how == "header only":
        del raw[100:]
    elif how == "vocabulary":
        raw[12:16] = struct.pack("<I", 70_000)
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("flipped byte", "checksum"),
        ("truncated", "promises"),
        ("magic", "not a token shard"),
        ("header only", "too few"),
        ("vocabulary", "70,000"),
    ],
)
def test_a_damaged_shard_is_named(tmp_path, how, words):
    build(random_documents(50), tmp_path / "s")
    damage(tmp_path / "s" / "train_000000.bin", how)
    with pytest.raises(BadInput, match=words) as refusal:
        next(Loader(TokenStream(open_shards(tmp_path / "s"), "train"), 2, 16, seed=0))
    assert "train_000000.bin" in str(refusal.value)


def test_a_token_outside_the_vocabulary_is_noticed(tmp_path):
    build(random_documents(50), tmp_path / "s")
    meta = json.loads((tmp_path / "s" / "meta.json").read_text())
    (tmp_path / "s" / "meta.json").write_text(json.dumps(meta | {"vocab_size": 100}))
    with pytest.raises(BadInput, match="token id"):
        next(Loader(TokenStream(open_shards(tmp_path / "s"), "train"), 64, 16, seed=0))


def test_a_missing_or_foreign_shard_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("corpus.shards.SHARD_TOKENS", 1000)
    build(random_documents(60), tmp_path / "s")
    shutil.copy(tmp_path / "s" / "train_000001.bin", tmp_path / "s" / "train_000099.bin")
    with pytest.raises(BadInput, match=r"train_000099\.bin"):
        open_shards(tmp_path / "s")
    (tmp_path / "s" / "train_000099.bin").unlink()
    (tmp_path / "s" / "train_000001.bin").unlink()
    with pytest.raises(BadInput, match=r"train_000001\.bin"):
        open_shards(tmp_path / "s")


def test_building_from_the_command_line(run_main, tmp_path):
    for i, text in enumerate(random_documents(100)):
        (tmp_path / f"{i}.txt").write_text(text)
    out = tmp_path / "shards" / "mine"
    options = ("--vocab-size", 300, "--val-fraction", 0.5, "--max-tokens", "2e4")
    code, printed, _ = run_main(commands.main, "text", tmp_path, "--out", out, *options)
    assert code == 0
    meta = json.loads((out / "meta.json").read_text())
    assert meta["train_tokens"] + meta["val_tokens"] == 20_000
    assert meta["fingerprint"] in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("text", "nowhere.txt", "--out", "{}/s"), "nowhere.txt"),
        (("text", "{}/file.doc", "--out", "{}/s"), "no .txt"),
        (("text", "{}/latin1.txt", "--out", "{}/s", "--vocab-size", "300"), "latin1.txt"),
        (("text", "{}/broken.jsonl", "--out", "{}/s", "--vocab-size", "300"), "broken.jsonl"),
        (("text", "{}/file.txt", "--out", "{}"), "exists"),
        (("text", "{}/file.txt", "--out", "{}/s", "--vocab-size", "65537"), "--vocab-size"),
        (("text", "{}/file.txt", "--out", "{}/s", "--tokenizer", "{}/file.txt"), "--tokenizer"),
        (("text", "{}/file.txt", "--out", "{}/s", "--max-tokens", "-5"), "--max-tokens"),
        (("text", "{}/file.txt", "--out", "{}/s", "--val-fraction", "nan"), "--val-fraction"),
        (("text", "{}/cut.jsonl.gz", "--out", "{}/s", "--vocab-size", "300"), "cut.jsonl.gz"),
        (("text", "{}/broken.parquet", "--out", "{}/s", "--vocab-size", "300"), "broken.parquet"),
        (("text", "{}/file.txt", "--out", "{}/file.txt/s", "--vocab-size", "300"), "cannot be created"),
        (("hf", "{}/nothing", "--out", "{}/s"), "nothing"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(run_main, tmp_path, arguments, words):
    for name, content in (("file.doc", b"x"), ("latin1.txt", b"\xff\xfe caf\xe9"), ("file.txt", b"hello " * 100)):
        (tmp_path / name).write_bytes(content)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in random_documents(50)).encode()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(rows)[:-100])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run_main(commands.main, *(a.format(tmp_path) for a in arguments))
    assert code == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tokenizer_file_that_is_far_too_large_is_refused(tmp_path, run_main):
    huge = tmp_path / "tokenizer.json"
    with huge.open("wb") as file:
        file.truncate(2**28)
    (tmp_path / "text.txt").write_text("some text")
    where = (tmp_path / "text.txt", "--out", tmp_path / "out")
    code, _, err = run_main(commands.main, "text", *where, "--tokenizer", huge)
    assert code == 2
    assert "larger than" in err


def test_reading_shards_imports_no_tokenizer_and_no_datasets():
    """A machine that only trains may lack both, and importing them costs seconds."""
    script = "import data, sys; print(sorted({'tokenizers', 'datasets', 'pyarrow', 'tqdm'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
