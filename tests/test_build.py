"""Builds from mixes of sources, interrupted anywhere: every document comes out once, with the same bytes."""

import errno
import fcntl
import gzip
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from corpus import build, commands, local_files, shards
from corpus.build import MixPart, build_shards
from corpus.local_files import TextFiles
from corpus.shards import open_shards
from corpus.sources import Repeated
from engine.cli import BadInput
from engine.files import ROOT
from tests.conftest import random_documents


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
        texts += [
            tokenizer.decode(ids[a + 1 : b].tolist(), skip_special_tokens=False) for a, b in itertools.pairwise(starts)
        ]
    return texts


def odd_text(rng):
    """Any Unicode: all planes, controls, NUL, combining marks, spelled-out special tokens, or an empty text."""
    pieces = (
        "\x00",
        "\r\n",
        "🙂👩‍👩‍👧",
        "e\u0301",
        "<|endoftext|>",
        "<|im_start|>",
        "\ufeff",
        "\u202e",
        " ",
        "\t",
        "العربية",
        "漢字",
    )
    points = [p for p in (rng.randrange(0x110000) for _ in range(rng.randrange(60))) if not 0xD800 <= p < 0xE000]
    words = [*map(chr, points), *rng.choices(pieces, k=rng.randrange(6))]
    rng.shuffle(words)
    return "".join(words)


def test_a_thousand_odd_texts_come_back_as_they_were(tmp_path):
    rng = random.Random(0)
    texts = list(
        dict.fromkeys(
            [*(odd_text(rng) for _ in range(1000)), "", "\x00", "some words " * 910_000, "x" * 100_000, "🙂" * 1000]
        )
    )
    rows = "".join(json.dumps({"text": text}, ensure_ascii=rng.random() < 0.5) + "\n" for text in texts)
    (tmp_path / "odd.jsonl").write_text(rows, encoding="utf-8", newline="")
    parts = [MixPart("odd", TextFiles([tmp_path / "odd.jsonl"]))]
    build_shards(parts, tmp_path / "s", source="odd", vocab_size=600, val_fraction=0.2)
    assert sorted(documents_of(tmp_path / "s")) == sorted(texts)


@pytest.mark.parametrize("row", ['{"text": "\\ud800 alone"}', '{"text": "fine"}\n{"text": "\\udc00"}'])
def test_a_lone_surrogate_is_refused_with_a_sentence(tmp_path, run_main, row):
    (tmp_path / "a.jsonl").write_text(row + "\n")
    code, _, err = run_main(commands.main, "text", tmp_path / "a.jsonl", "--out", tmp_path / "s", "--vocab-size", 300)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert "a.jsonl" in err or "surrogate" in err
    assert not (tmp_path / "s").exists()


def test_a_lone_surrogate_from_any_source_is_refused(tmp_path):
    with pytest.raises(BadInput, match="lone surrogate"):
        build_shards(lambda: iter(["fine", "\ud800"]), tmp_path / "s", source="test", vocab_size=300)


def write_three_parts(folder):
    """Write files of three kinds that share some of their documents."""
    texts = random_documents(4000)
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[:2000]))
    (folder / "b.txt.gz").write_bytes(gzip.compress("\n".join(texts[1300:2700]).encode()))
    import pandas

    pandas.DataFrame({"text": texts[1500:4000]}).to_parquet(folder / "c.parquet", row_group_size=50)


BUILD_AND_DIE = """
import json, os, random, signal, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import datasets
from corpus import build, shards
from tests.test_build import small_pieces, build_three_parts
small_pieces(build, shards)
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
rng, killed, places = random.Random(1), 0, set()

def kept_tokens():
    record = out.with_name(out.name + ".partial") / build.RECORD
    saved = json.loads(record.read_text())["saved"] if record.exists() else None
    return sum(writer["tokens"] for writer in saved["writers"].values()) if saved else 0

while not out.exists():
    child = os.fork()  # saves the imports; no thread runs here yet
    if not child:
        build_three_parts(folder, out)
        os._exit(0)
    before, end = kept_tokens(), time.monotonic() + 5
    if killed < 20:
        while kept_tokens() == before and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        killed += 1
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    places.add(before)
print(killed, len(places))
"""


def small_pieces(build_module, shardfiles_module):
    """Make many batches and shards, and save after almost every document."""
    build_module.BATCH_CHARS, build_module.SAVE_SECONDS = 4000, 0.01
    shardfiles_module.SHARD_TOKENS, shardfiles_module.WRITE_TOKENS = 20_000, 700


def build_three_parts(folder, out):
    parts = [
        MixPart("a", TextFiles([folder / "a.jsonl"]), 0.5),
        MixPart("b and c", TextFiles([folder / "b.txt.gz", folder / "c.parquet"]), 0.25),
        MixPart("c again", TextFiles([folder / "c.parquet"]), 0.25),
    ]
    return build_shards(parts, out, source="three", vocab_size=300, val_fraction=0.1)


def test_a_build_killed_twenty_times_ends_with_the_same_bytes(tmp_path, monkeypatch):
    write_three_parts(tmp_path)
    words = [sys.executable, "-c", BUILD_AND_DIE, str(tmp_path), str(tmp_path / "killed")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    killed, places = map(int, done.stdout.split())
    assert killed == 20
    assert places > 15, "too few different places to prove anything"
    monkeypatch.setattr(shards, "SHARD_TOKENS", 20_000)
    build_three_parts(tmp_path, tmp_path / "undisturbed")
    assert shard_bytes(tmp_path / "killed") == shard_bytes(tmp_path / "undisturbed")
    assert len(open_shards(tmp_path / "killed").files["train"]) > 3


def test_a_mix_keeps_its_shares_and_no_document_twice(tmp_path):
    texts = random_documents(1200)
    lists = (texts[:600], texts[300:900], texts[500:1200] + texts[:100])
    shares = (0.5, 0.3, 0.2)
    parts = [
        MixPart(str(number), Repeated(lambda mine=mine: mine), share)
        for number, (mine, share) in enumerate(zip(lists, shares, strict=True))
    ]
    most = 40_000
    meta = build_shards(parts, tmp_path / "s", source="mix", vocab_size=300, val_fraction=0.1, max_tokens=most)
    assert meta["train_tokens"] + meta["val_tokens"] == most
    found = [part["tokens"] / most for part in meta["parts"].values()]
    assert np.allclose(found, shares, atol=0.01)
    found = documents_of(tmp_path / "s")
    assert len(set(found)) == len(found)
    assert len(set(found) - set(texts)) <= 1  # the one that was cut


def test_a_mix_ends_where_a_part_is_used_up(tmp_path, capsys):
    texts = random_documents(300)
    parts = [MixPart("short", Repeated(lambda: texts[:50])), MixPart("long", Repeated(lambda: texts[50:]))]
    meta = build_shards(parts, tmp_path / "s", source="mix", vocab_size=300, val_fraction=0.2)
    assert "short: used up" in capsys.readouterr().err
    assert meta["parts"]["short"]["documents"] == 50
    assert abs(meta["parts"]["long"]["tokens"] / meta["parts"]["short"]["tokens"] - 1) < 0.05


def test_a_preset_names_known_datasets_and_their_tokenizer(monkeypatch, run_main, tmp_path):
    request = {}
    monkeypatch.setattr(
        commands, "build_shards", lambda parts, out, **more: request.update(parts=parts, **more) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        run_main(commands.main, "hf", "smollm-mix", "--out", tmp_path / "s", "--max-tokens", "1e9")
    names = [("HuggingFaceTB/smollm-corpus fineweb-edu-dedup", 0.7), ("HuggingFaceTB/smollm-corpus cosmopedia-v2", 0.3)]
    assert [(part.name, part.share) for part in request["parts"]] == names
    assert request["tokenizer"] == "HuggingFaceTB/SmolLM2-135M"
    assert request["max_tokens"] == 10**9


def test_token_ids_are_taken_as_they_are(tmp_path, run_main):
    import pandas

    texts = random_documents(60)
    build_shards(lambda: iter(texts), tmp_path / "text", source="text", vocab_size=300, val_fraction=0.2)
    tokenizer = Tokenizer.from_file(str(tmp_path / "text" / "tokenizer.json"))
    rows = [[*([0] * (i % 2)), *tokenizer.encode(text).ids, *([0] * (i % 3))] for i, text in enumerate(texts)]
    pandas.DataFrame({"input_ids": rows}).to_parquet(tmp_path / "ids.parquet")
    words = ("text", tmp_path / "ids.parquet", "--out", tmp_path / "ids", "--val-fraction", 0.2)
    named = ("--tokenizer", tmp_path / "text" / "tokenizer.json")
    code, _, err = run_main(commands.main, *words, *named)
    assert (code, "--ids-column" in err) == (2, True)
    code, _, err = run_main(commands.main, *words, "--ids-column", "input_ids")
    assert (code, "--tokenizer" in err) == (2, True)
    code, _, err = run_main(commands.main, *words, "--ids-column", "input_ids", *named)
    assert code == 0, err
    assert sorted(documents_of(tmp_path / "ids")) == sorted(texts)
    pandas.DataFrame({"input_ids": [[5, 300_000]]}).to_parquet(tmp_path / "ids.parquet")
    code, _, err = run_main(commands.main, *words[:3], tmp_path / "more", "--ids-column", "input_ids", *named)
    assert (code, "token id 300000" in err) == (2, True)


def test_an_unfinished_build_of_something_else_is_not_touched(tmp_path, monkeypatch, run_main):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in random_documents(300)))
    monkeypatch.setattr(build, "SAVE_SECONDS", 0)
    monkeypatch.setattr(build._Build, "finish", lambda self: 1 / 0)
    words = ("text", tmp_path / "a.jsonl", "--out", tmp_path / "s", "--vocab-size")
    with pytest.raises(ZeroDivisionError):
        run_main(commands.main, *words, 300)
    before = shard_bytes(tmp_path / "s.partial")
    code, _, err = run_main(commands.main, *words, 310)
    assert code == 2
    assert "vocab_size was 300, is 310" in err
    assert shard_bytes(tmp_path / "s.partial") == before
    monkeypatch.undo()
    assert run_main(commands.main, *words, 300)[0] == 0


def test_a_second_build_of_a_folder_is_refused(tmp_path):
    def meanwhile():
        with pytest.raises(BadInput, match="another build"):
            build_shards(lambda: iter("abc"), tmp_path / "s", source="test", vocab_size=300)
        yield from random_documents(50)

    build_shards(meanwhile, tmp_path / "s", source="test", vocab_size=300, val_fraction=0.2)


def test_a_build_continues_where_the_file_system_cannot_lock(tmp_path, run_main, monkeypatch):
    def flock(descriptor, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in random_documents(100)))
    code, out, err = run_main(commands.main, "text", tmp_path / "a.jsonl", "--out", tmp_path / "s", "--vocab-size", 300)
    assert code == 0, err
    assert f"{tmp_path / 's.partial'}: cannot be locked (Function not implemented)" in out


def test_memory_of_a_build_does_not_grow_with_the_text(tmp_path):
    """Three times the text, 44 MB more, has the same peak, in batches so small that both builds fill every queue."""
    script = "import sys; from corpus import build, commands; build.BATCH_CHARS = 100_000; sys.exit(commands.main())"
    peaks = {}
    for count in (25_000, 75_000):
        with (tmp_path / f"{count}.jsonl").open("w") as file:
            for i in range(count):
                file.write(json.dumps({"text": f"{i} " + "some words of a text " * 40}) + "\n")
        words = [sys.executable, "-c", script, "text", str(tmp_path / f"{count}.jsonl"), "--vocab-size", "300"]
        words += ["--out", str(tmp_path / str(count)), "--tokenizer", str(tokenizer_of_words(tmp_path))]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks[count] = float(done.stdout.split("peak memory ")[1].split()[0].replace(",", ""))
    assert peaks[75_000] < peaks[25_000] + 35, peaks


def tokenizer_of_words(folder):
    path = folder / "tokenizer" / "tokenizer.json"
    if not path.exists():
        build_shards(lambda: iter(random_documents(50)), path.parent, source="words", vocab_size=300, val_fraction=0.2)
    return path


def test_a_folder_that_no_build_made_is_left_alone(tmp_path, run_main):
    (tmp_path / "notes.partial").mkdir()
    (tmp_path / "notes.partial" / "thesis.tex").write_text("years of work")
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    code, _, err = run_main(commands.main, "text", tmp_path / "a.txt", "--out", tmp_path / "notes", "--vocab-size", 300)
    assert code == 2
    assert "thesis.tex" in err
    assert (tmp_path / "notes.partial" / "thesis.tex").read_text() == "years of work"


def test_a_full_disk_is_one_sentence(tmp_path, run_main, monkeypatch):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in random_documents(300)))
    real = Path.open

    def full(path, *mode, **more):
        return open("/dev/full", "r+b") if path.suffix == ".bin" else real(path, *mode, **more)

    monkeypatch.setattr(Path, "open", full)
    code, _, err = run_main(commands.main, "text", tmp_path / "a.jsonl", "--out", tmp_path / "s", "--vocab-size", 300)
    assert code == 1
    assert "cannot be written (No space left on device)" in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "s").exists()


@pytest.fixture
def interrupted(tmp_path, monkeypatch, run_main):
    """The command of a build that failed after some documents, and kept them."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in random_documents(300)))
    words = ("text", tmp_path / "a.jsonl", "--out", tmp_path / "s", "--vocab-size", 300)
    monkeypatch.setattr(build, "SAVE_SECONDS", 0)
    monkeypatch.setattr(build, "BATCH_CHARS", 4000)
    with monkeypatch.context() as broken:
        fetch = build._Feed.fetch

        def lost(feed):
            if feed.documents > 100:
                raise BadInput("the connection is gone")
            return fetch(feed)

        broken.setattr(build._Feed, "fetch", lost)
        code, _, err = run_main(commands.main, *words)
    assert code == 2
    assert "the connection is gone; " in err
    assert "tokens are kept in" in err
    return words


def test_an_interrupted_build_continues_from_what_it_kept(interrupted, tmp_path, run_main, monkeypatch):
    begun = []
    monkeypatch.setattr(local_files.TextFiles, "open", spy(begun))
    assert run_main(commands.main, *interrupted)[0] == 0
    assert begun[-1]["at"] is not None, "started again"
    assert sorted(documents_of(tmp_path / "s")) == sorted(random_documents(300))


def test_hashes_of_documents_that_were_not_kept_are_dropped(interrupted, tmp_path, run_main, monkeypatch):
    """A kill after writing the hashes and before the record leaves them; the next start must not count them."""
    hashes, sizes, save = tmp_path / "s.partial" / build.HASHES, [], build._Build._save
    with hashes.open("ab") as file:
        file.write(bytes(40))

    def saved(self):
        save(self)
        sizes.append((hashes.stat().st_size, 8 * self.saved_hashes))

    monkeypatch.setattr(build._Build, "_save", saved)
    assert run_main(commands.main, *interrupted)[0] == 0
    assert sizes
    assert all(held == counted for held, counted in sizes)


def spy(begun):
    real = local_files.TextFiles.open

    def opened(self, position=None):
        begun.append(position)
        return real(self, position)

    return opened


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("text", "something else"),
        ("shard", "shorter than"),
        ("record", "build.json"),
        ("version", "another version"),
        ("feed", "damaged"),
    ],
)
def test_an_interrupted_build_that_was_changed_is_refused_and_kept(interrupted, tmp_path, run_main, how, words):
    partial = tmp_path / "s.partial"
    if how == "text":
        (tmp_path / "a.jsonl").write_text(json.dumps({"text": "another"}) + "\n")
    elif how == "shard":
        os.truncate(partial / "train_000000.bin", 1100)
    elif how in ("version", "feed"):  # "version": as written when `datasets` read local files
        record = json.loads((partial / "build.json").read_text())
        (feed,) = record["saved"]["parts"]
        if how == "version":
            del record["positions"]
            feed["begin"] = {"file": 0, "at": {"examples_iterable": {"shard_idx": 0}, "epoch": 0}}
        del feed["skipped"]
        (partial / "build.json").write_text(json.dumps(record))
    else:
        (partial / "build.json").write_text('{"asked"')
    before = {path.name for path in partial.iterdir()}
    code, _, err = run_main(commands.main, *interrupted)
    assert code == 2
    assert words in err
    assert {path.name for path in partial.iterdir()} == before


def test_a_misspelt_preset_is_refused_without_a_network(tmp_path, run_main):
    code, _, err = run_main(commands.main, "hf", "smollm-mx", "--out", tmp_path / "s")
    assert (code, err) == (2, "error: hf smollm-mx: no such preset; did you mean smollm-mix?\n")


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (("a/a", "b/b", "--config", "c"), "--config: 1 given for 2 datasets"),
        (("a/a", "b/b", "--shares", "1", "2", "3"), "--shares: 3 given for 2 datasets"),
        (("a/a", "b/b", "--shares", "1", "-2"), "must be positive"),
        (("a/a", "a/a"), "names a dataset twice"),
        (("smollm-mix", "--shares", "1"), "a preset has its own"),
    ],
)
def test_an_impossible_mix_is_one_sentence(tmp_path, run_main, words, refusal):
    code, _, err = run_main(commands.main, "hf", *words, "--out", tmp_path / "s")
    assert code == 2
    assert refusal in err
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
