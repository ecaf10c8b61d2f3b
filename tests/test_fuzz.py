"""A sliver of the fuzz and of the soak: bench/LOG.md has the long ones."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import runs
from bench import fuzz, soak
from corpus import local_files
from engine import files
from engine.cli import BadInput

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
NUMBERS = st.lists(st.floats(0, 9), min_size=1, max_size=9)
WORD = st.integers(0, 2**32 - 1)


def is_read(read, *arguments):
    """Whether it was; a refusal is one sentence, and anything else is a fault."""
    try:
        read(*arguments)
    except BadInput as refusal:
        said = str(refusal)
    else:
        return True
    assert len(said.splitlines()) == 1
    return False


def changed(objects):
    """A JSON text: one of these objects with other values and keys, or anything."""
    keys = sorted({key for value in objects for key in value})
    other = st.dictionaries(st.sampled_from(keys) | st.text(max_size=9), VALUES | NUMBERS, max_size=3)
    less = st.sets(st.sampled_from(keys), max_size=1)
    merged = st.builds(
        lambda value, more, gone: {k: v for k, v in (value | more).items() if k not in gone},
        st.sampled_from(objects),
        other,
        less,
    )
    return merged.map(json.dumps) | VALUES.map(json.dumps) | st.text(max_size=30)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Good shards, a good run and good checkpoints, each in a folder of its name."""
    root = tmp_path_factory.mktemp("whole")
    fuzz.shards_to_damage(root / "shards")
    fuzz.run_to_damage(root / "run")
    (root / "checkpoint").mkdir()
    fuzz.Checkpoints(root / "shards").write(root / "checkpoint")
    return root


@pytest.fixture(scope="module")
def copy_of(whole, tmp_path_factory):
    """A fresh copy of one of them."""
    folder = tmp_path_factory.mktemp("copy") / "copy"

    def copy(part):
        shutil.rmtree(folder, ignore_errors=True)
        return shutil.copytree(whole / part, folder)

    return copy


@settings(max_examples=300)
@given(st.data())
def test_a_shard_of_any_header_is_refused_or_gives_the_tokens_it_holds(whole, copy_of, draw):
    tokens = draw.draw(st.lists(st.integers(0, 200), max_size=20) | st.lists(st.integers(0, 2**16 - 1), max_size=5))
    payload = struct.pack(f"<{len(tokens)}H", *tokens) + draw.draw(st.just(b"") | st.binary(max_size=5))
    header = list(struct.unpack("<6I", (whole / "shards" / "train_000000.bin").read_bytes()[:24]))
    header[2], header[5] = len(payload) // 2, draw.draw(st.sampled_from((0, zlib.crc32(payload))))
    for slot, value in draw.draw(st.dictionaries(st.integers(0, 5), st.integers(0, 300) | WORD, max_size=1)).items():
        header[slot] = value
    rest = draw.draw(st.just(bytes(250 * 4)) | st.binary(min_size=250 * 4, max_size=250 * 4))
    content = struct.pack("<6I", *header) + rest + payload
    folder = copy_of("shards")
    (folder / "train_000000.bin").write_bytes(
        content if draw.draw(st.integers(0, 9)) else draw.draw(st.binary(max_size=2000))
    )
    if draw.draw(st.booleans()):
        (folder / "meta.json").unlink()
    if is_read(fuzz.read_shards, folder, folder):  # which compares the tokens with the file's
        content = (folder / "train_000000.bin").read_bytes()
        magic, version, count, _, _, crc = struct.unpack("<6I", content[:24])
        assert (magic, version, 1024 + 2 * count) == (20240520, 1, len(content))
        assert not count or crc in (0, zlib.crc32(content[1024:]))


@settings(max_examples=300)
@given(st.data())
def test_any_description_of_shards_is_refused_or_read(whole, copy_of, draw):
    folder = copy_of("shards")
    good = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(draw.draw(changed([good])), encoding="utf-8")
    if is_read(fuzz.read_shards, folder, whole / "shards"):
        meta = json.loads((folder / "meta.json").read_text())
        assert meta["sha256"].keys() == good["sha256"].keys()
        assert 0 < meta["vocab_size"] <= 2**16


@pytest.mark.parametrize(("part", "name"), [("shards", "meta.json"), ("run", "config.json"), ("run", "summary.json")])
def test_a_file_out_of_all_proportion_is_refused_unread(copy_of, part, name):
    folder = copy_of(part)
    os.truncate(folder / name, 2**28)  # with zeros that take no room on the disk
    with pytest.raises(BadInput, match="more than the"):
        {"shards": fuzz.read_shards, "run": fuzz.read_run}[part](folder, folder)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "manifold_stats.jsonl"])
@pytest.mark.parametrize("text", ["[" * 100_000 + "\n{}\n", '{"model": "half a letter: \\ud800"}\n{}\n'])
def test_what_cannot_be_written_again_is_not_json(copy_of, name, text):
    """Lists nested without end, and a lone surrogate, for which UTF-8 has no bytes."""
    folder = copy_of("run")
    (folder / name).write_text(text if name.endswith("l") else text.splitlines()[0])
    with pytest.raises(BadInput, match=r"line 1 is not JSON|not readable as JSON"):
        fuzz.read_run(folder, folder)


@settings(max_examples=120)
@pytest.mark.parametrize("name", ["config.json", "summary.json"])
@given(draw=st.data())
def test_any_settings_and_any_summary_are_refused_or_read(copy_of, name, draw):
    folder = copy_of("run")
    text = draw.draw(changed([json.loads((folder / name).read_text())]))
    (folder / name).write_text(text, encoding="utf-8")
    if is_read(fuzz.read_run, folder, folder):
        read = runs.read_config if name == "config.json" else runs.read_summary
        assert read(folder / name) == json.loads(text)


@settings(max_examples=120)
@pytest.mark.parametrize("name", ["metrics.jsonl", "manifold_stats.jsonl"])
@given(draw=st.data())
def test_any_line_among_good_ones_is_refused_or_read(copy_of, name, draw):
    folder = copy_of("run")
    lines = (folder / name).read_text().splitlines()
    place = draw.draw(st.integers(0, len(lines) - 1))
    lines[place] = draw.draw(changed([json.loads(line) for line in lines[:12]]))
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    read = runs.read_metrics if name == "metrics.jsonl" else runs.read_spectra
    if is_read(read, folder / name) and place < len(lines) - 1:
        found = read(folder / name)
        assert found == [json.loads(line) for line in lines]
        known = [line for line in found if line.get("kind", "train") in ("train", "val", "experts")]
        assert all(type(line["step"]) is int and line["step"] >= 0 for line in known)
        sizes = {(line["proj"], len(line["singular_values"])) for line in found if "proj" in line}
        assert len(sizes) == len({proj for proj, _ in sizes})
    is_read(fuzz.read_run, folder, folder)


def test_a_projection_of_two_sizes_is_refused(copy_of):
    path = copy_of("run") / "manifold_stats.jsonl"
    *lines, last = path.read_text().splitlines()
    shorter = json.loads(last) | {"singular_values": [1.0]}
    path.write_text("\n".join([*lines, json.dumps(shorter)]) + "\n")
    with pytest.raises(BadInput, match="1 singular values, earlier lines of"):
        runs.read_spectra(path)


@settings(max_examples=120)
@given(st.data())
def test_any_bytes_in_place_of_the_newest_checkpoint_leave_the_one_before(whole, copy_of, draw):
    """Cut, with a piece of it replaced, or whole as an archive with another pickle in it."""
    folder, reader = copy_of("checkpoint"), fuzz.Checkpoints(whole / "shards")
    path = folder / files.CHECKPOINT
    good = path.read_bytes()
    start, end = sorted(draw.draw(st.tuples(*[st.integers(0, len(good))] * 2)))
    piece = draw.draw(st.binary(max_size=40))
    kinds = {"replaced": good[:start] + piece + good[end:], "cut": good[:end], "tail": good[start:], "other": piece}
    path.write_bytes(kinds[draw.draw(st.sampled_from(sorted(kinds)))])
    if draw.draw(st.booleans()):
        with zipfile.ZipFile(whole / "checkpoint" / files.CHECKPOINT) as old, zipfile.ZipFile(path, "w") as new:
            for entry in old.namelist():
                new.writestr(entry, piece if entry.endswith("data.pkl") else old.read(entry))
    damaged = path.read_bytes() != good
    reader.read(folder, whole / "checkpoint")  # which compares the weights
    assert (folder / "checkpoint.damaged").exists() == damaged


@settings(max_examples=120)
@given(st.data())
def test_a_checkpoint_of_any_contents_is_refused_or_read(whole, copy_of, draw):
    folder, reader = copy_of("checkpoint"), fuzz.Checkpoints(whole / "shards")
    contents = torch.load(folder / files.CHECKPOINT, weights_only=True)
    parts = st.sampled_from([key for key in contents if key not in ("model", "step", "config")])
    contents |= draw.draw(st.dictionaries(parts, VALUES | st.lists(VALUES, max_size=2), min_size=1, max_size=2))
    for name in (files.CHECKPOINT, files.PREVIOUS_CHECKPOINT):
        torch.save(contents, folder / name)
    is_read(reader.read, folder, whole / "checkpoint")


def test_damaged_files_are_refused_or_read_as_what_they_are(run_main):
    code, out, _ = run_main(fuzz.main, "--cases", "450", "--texts", "200")
    assert code == 0, out
    assert "650 cases, 0 faults" in out


def test_the_fuzz_finds_a_reader_of_texts_that_takes_half_a_stream_for_a_whole_one(run_main, monkeypatch):
    whole = local_files._open

    def trusting(path):
        return io.BufferedReader(zstandard.open(path)) if path.suffix == ".zst" else whole(path)

    monkeypatch.setattr(local_files, "_open", trusting)
    code, out, _ = run_main(fuzz.main, "--cases", "0", "--texts", "400")
    assert code == 1, out


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
    small = "from bench import soak; soak.BATCH_TOKENS = 512; exit(soak.main())"
    words = [sys.executable, "-c", small, "--updates", "24", "--data", str(shards_folder)]
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
