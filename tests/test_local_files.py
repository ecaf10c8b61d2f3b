"""Local files: exactly the documents that are in them, or one sentence that names the file."""

import gzip
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard

from corpus import commands
from corpus.documents import training_sample
from corpus.local_files import PIECE_BYTES, TextFiles, find_files
from corpus.sources import Column
from engine.cli import BadInput
from engine.files import ROOT
from tests.conftest import random_documents


def documents(*paths, column="text"):
    return list(TextFiles(find_files(paths).files, Column(column)).open())


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def compressed(data, ending):
    return gzip.compress(data) if ending == ".gz" else zstandard.ZstdCompressor().compress(data)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
@pytest.mark.parametrize("lost", [0.5, 0.99, -1])
def test_an_incomplete_stream_is_refused_by_name(tmp_path, ending, kind, lost):
    texts = random_documents(2000)
    whole = compressed(
        jsonl({"text": text} for text in texts) if kind == ".jsonl" else "\n".join(texts).encode(), ending
    )
    path = tmp_path / f"x{kind}{ending}"
    path.write_bytes(whole)
    assert len(documents(path)) > 1
    path.write_bytes(whole[: int(lost * len(whole)) if lost > 0 else lost])
    with pytest.raises(BadInput, match=f"x{kind}{ending}: cannot be read"):
        documents(path)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_streams_of_several_parts_are_read_to_the_end(tmp_path, ending):
    parts = [compressed(f"part {i}\n".encode(), ending) for i in range(3)]
    (tmp_path / f"x.txt{ending}").write_bytes(b"".join(parts))
    assert documents(tmp_path) == ["part 0\npart 1\npart 2\n"]


def test_other_columns_may_be_and_become_anything(tmp_path):
    """Over 10 MB, which is where a schema inferred from the beginning of a file used to end."""
    rows = [{"text": f"{i} " + "word " * 20, "url": None, "n": 1, "id": i, "meta": {"a": 1}} for i in range(90_000)]
    rows += [{"text": "a", "url": "http://x", "n": 1.5, "id": "x7", "meta": {"a": "b", "c": [{}]}, "new": []}]
    rows += [{"text": "2026-01-01", "message": "words"}, {"text": "2026-01-02", "message": {"role": "user"}}]
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl(rows) + b'{"text": "twice", "id": 1, "id": 2}\n\n  \n')
    assert path.stat().st_size > 10_000_000
    assert documents(path) == [row["text"] for row in rows] + ["twice"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": 5}', r"x.jsonl: row 3: column 'text' holds int, not text"),
        ('{"text": ["a"]}', r"x.jsonl: row 3: column 'text' holds list, not text"),
        ('["text"]', r"x.jsonl: row 3 holds a JSON list, not an object"),
        ('{"text": "a"', r"x.jsonl: row 3 is not JSON"),
        ("[" * 100_000, r"x.jsonl: row 3 is not JSON"),
        ("\ufeff{}", r"x.jsonl: row 3 is not JSON"),  # a byte order mark inside a file
    ],
)
def test_a_bad_row_is_named(tmp_path, line, words):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(BadInput, match=words):
        documents(path)


def test_parquet_reads_its_column_alone(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    maps = pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64()))
    table = pa.table({"m": maps, "text": ["one", None], "date": pa.array([1, 2], pa.timestamp("s"))})
    parquet.write_table(table, tmp_path / "x.parquet")
    reader = TextFiles([tmp_path / "x.parquet"]).open()
    assert list(reader) == ["one"]
    assert reader.without_text == 1
    with pytest.raises(BadInput, match=r"x.parquet: row 1: column 'date' holds datetime, not text"):
        documents(tmp_path, column="date")
    with pytest.raises(BadInput, match=r"x.parquet: no column 'words'; it has m, text, date"):
        documents(tmp_path, column="words")


@pytest.mark.parametrize("rows_per_group", [7, 1000])
@pytest.mark.parametrize("stop", [0, 1, 6, 7, 8, 40, 99])
def test_every_format_continues_from_any_position(tmp_path, rows_per_group, stop):
    import pyarrow as pa
    from pyarrow import parquet

    texts = [f"{i} é " + "x" * (i % 5) for i in range(50)]
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": text} for text in texts))
    parquet.write_table(pa.table({"text": texts[::-1]}), tmp_path / "b.parquet", row_group_size=rows_per_group)
    source = TextFiles(find_files([tmp_path]).files)
    reader = source.open()
    begun = iter(reader)
    first = [next(begun) for _ in range(stop)]
    position = json.loads(json.dumps(reader.position()))
    assert first + list(source.open(position)) == texts + texts[::-1]


@pytest.mark.parametrize("name", ["a[1].jsonl", "a*.jsonl", "a?.jsonl", "zip::a.jsonl", "a{b,c}.jsonl", "ün.jsonl"])
def test_a_path_is_a_path_never_a_pattern(tmp_path, name):
    for other in ("a1.jsonl", "a.jsonl", "ab.jsonl"):
        (tmp_path / other).write_bytes(jsonl([{"text": other}]))
    (tmp_path / name).write_bytes(jsonl([{"text": "mine"}]))
    assert documents(tmp_path / name) == ["mine"]
    assert sorted(documents(tmp_path)) == ["a.jsonl", "a1.jsonl", "ab.jsonl", "mine"]


def test_folders_are_walked_through_links_and_what_is_left_out_is_named(tmp_path, run_main):
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for made in (folder, elsewhere, folder / ".ipynb_checkpoints"):
        made.mkdir()
    (elsewhere / "b.txt").write_text("linked")
    (folder / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)  # a cycle
    (folder / "A.TXT").write_text("capitals")
    (folder / "c.JSONL.GZ").write_bytes(gzip.compress(jsonl([{"text": "capitals too"}])))
    (folder / "a.json").write_text("{}")
    (folder / "._a.txt").write_bytes(b"\x00\x05\x16\x07 not text \xff")
    (folder / ".ipynb_checkpoints" / "d.txt").write_text("a copy")
    (folder / "empty.jsonl").write_bytes(b"")
    found = find_files([folder])
    assert sorted(TextFiles(found.files).open()) == ["capitals", "capitals too", "linked"]
    assert found.left_out == "left out 2 files: a.json, empty.jsonl (empty)"
    _, out, _ = run_main(commands.main, "text", folder, "--out", tmp_path / "s", "--vocab-size", 300)
    assert out.splitlines()[0] == found.left_out


def test_a_parquet_without_rows_is_passed_over_and_said(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    parquet.write_table(pa.table({"text": ["one"]}), tmp_path / "one.parquet")
    assert documents(tmp_path) == ["one"]
    assert find_files([tmp_path]).left_out == "left out 1 file: none.parquet (empty)"


@pytest.mark.parametrize("letter", ["x", "é", "€", "𝄞"])
@pytest.mark.parametrize("ending", ["", ".zst"])
def test_a_text_without_newlines_is_cut_between_characters(tmp_path, letter, ending):
    text = "-" + letter * 300_000
    path = tmp_path / f"x.txt{ending}"
    path.write_bytes(compressed(text.encode(), ending) if ending else text.encode())
    pieces = documents(path)
    assert "".join(pieces) == text
    assert max(len(piece.encode()) for piece in pieces) < 2 * PIECE_BYTES + 4


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.txt.gz"])
def test_a_byte_order_mark_is_dropped(tmp_path, name):
    data = b"\xef\xbb\xbf" + (b'{"text": "one"}\n' if "jsonl" in name else b"one")
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert documents(tmp_path / name) == ["one"]


def test_rows_without_text_are_counted_also_over_an_interruption(tmp_path, run_main):
    rows = [
        {"text": text} if i % 3 else {"id": i} if i % 2 else {"text": None}
        for i, text in enumerate(random_documents(300))
    ]
    (tmp_path / "x.jsonl").write_bytes(jsonl(rows))
    code, out, _ = run_main(commands.main, "text", tmp_path / "x.jsonl", "--out", tmp_path / "s", "--vocab-size", 300)
    assert code == 0
    assert "100 rows had no text in the column and were left out" in out
    assert json.loads((tmp_path / "s" / "meta.json").read_text())["rows_without_text"] == 100


def test_a_column_that_no_row_has_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(jsonl([{"body": "a", "id": 1}] * 3))
    with pytest.raises(BadInput, match=r"x.jsonl: no column 'text'; it has body, id; choose with --text-column"):
        documents(tmp_path)


def build(tmp_path, *words, **environment):
    command = (
        sys.executable,
        "data.py",
        "text",
        *map(os.fspath, words),
        "--vocab-size",
        "300",
        "--val-fraction",
        "0.2",
    )
    env = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_a_home_that_cannot_be_written_does_not_matter(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(jsonl({"text": text} for text in random_documents(50)))
    home = {"HOME": "/dev/null/nobody", "XDG_CACHE_HOME": "/dev/null/cache", "HF_HOME": "/dev/null/hf"}
    done = build(tmp_path, tmp_path / "x.jsonl", "--out", tmp_path / "s", **home)
    assert done.returncode == 0, done.stderr


def test_an_ascii_locale_builds_and_reads_a_folder_with_an_umlaut(tmp_path):
    folder = tmp_path / "ün"
    folder.mkdir()
    (folder / "é.jsonl").write_bytes(jsonl({"text": text} for text in random_documents(100)))
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = build(tmp_path, folder, "--out", tmp_path / "sün", **ascii_only)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "sün" / "meta.json").read_text(encoding="utf-8"))["source"] == f"text {folder}"
    words = (sys.executable, "data.py", "inspect", os.fspath(tmp_path / "sün"))
    done = subprocess.run(words, cwd=ROOT, env=os.environ | ascii_only, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


READ_AND_MEASURE = """
import re, sys
from pathlib import Path
from corpus.local_files import TextFiles
count = sum(len(text) for text in TextFiles([Path(sys.argv[1])]).open())
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(count, int(peak[1]) // 1024)
"""


def peak_mib_of_reading(path, characters):
    words = (sys.executable, "-c", READ_AND_MEASURE, path)
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    count, peak = map(int, done.stdout.split())
    assert count == characters
    return peak


def test_memory_does_not_grow_with_a_parquets_row_group(tmp_path):
    """One row group of 20 and of 160 MB: without bounded batches the peaks are as far apart as the files."""
    import pyarrow as pa
    from pyarrow import parquet

    peaks, text = [], random.Random(0).randbytes(500).hex()
    for rows in (20_000, 160_000):
        path = tmp_path / f"{rows}.parquet"
        table = pa.table({"text": [f"{i} {text}" for i in range(rows)], "id": list(range(rows))})
        parquet.write_table(table, path, row_group_size=rows, compression="NONE", use_dictionary=False)
        peaks.append(peak_mib_of_reading(path, sum(len(f"{i} {text}") for i in range(rows))))
    assert peaks[1] - peaks[0] < 60


def test_memory_does_not_grow_with_a_value_that_a_parquet_repeats(tmp_path):
    """500 MB in a file of some KB: its dictionary holds the text once."""
    import pyarrow as pa
    from pyarrow import parquet

    text = pa.array(["z" * 100_000]).dictionary_encode()
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), text.dictionary)
    parquet.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    assert peak_mib_of_reading(tmp_path / "x.parquet", 500_000_000) < 400


@pytest.mark.parametrize("name", ["x.txt.gz", "x.jsonl.zst", "x.parquet"])
def test_a_stream_or_a_parquet_cut_to_nothing_is_refused(tmp_path, name):
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(BadInput, match=f"{name}: cannot be read"):
        documents(tmp_path)


@pytest.mark.parametrize("data", [b"\x80" * 20_000_000, b"x" * 200_000_000, b"a line\n" * 10_000_000])
def test_time_is_linear_whatever_the_bytes(tmp_path, data):
    """Bytes that all continue a character, and streams of which a kilobyte holds a megabyte; quadratic: minutes."""
    path = tmp_path / ("x.txt.zst" if data[0] < 128 else "x.txt")
    path.write_bytes(compressed(data, ".zst") if data[0] < 128 else data)
    began = time.perf_counter()
    if data[0] < 128:
        assert sum(map(len, TextFiles([path]).open())) == len(data)
    else:
        with pytest.raises(BadInput, match=r"x.txt: not UTF-8 text"):
            documents(path)
    assert time.perf_counter() - began < 10


def test_what_is_not_a_file_is_named_and_nothing_waits_for_it(tmp_path):
    (tmp_path / "a.txt").write_text("good")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "lost.jsonl").symlink_to("gone")
    (tmp_path / "self.jsonl").symlink_to("self.jsonl")
    (tmp_path / "two\nlines.json").touch()
    assert documents(tmp_path) == ["good"]
    names = "lost.jsonl, pipe.txt, self.jsonl, 'two\\nlines.json'"
    assert find_files([tmp_path]).left_out == f"left out 4 files: {names}"
    with pytest.raises(BadInput, match=r"pipe.txt: not a file or folder"):
        documents(tmp_path / "pipe.txt")
    with pytest.raises(BadInput, match="cannot be read"):
        documents(tmp_path / ("x" * 300 + ".txt"))


def test_folders_may_be_as_deep_as_the_system_allows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    Path("a.txt").write_text("deep")
    os.chdir(tmp_path)
    try:
        assert documents(tmp_path) == ["deep"]
    finally:
        subprocess.run(("rm", "-r", tmp_path / "d"), check=True)  # Python's rmtree recurses


def test_a_number_of_any_length_in_another_column(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "one", "n": ' + "1" * 5000 + "}\n")
    assert documents(tmp_path) == ["one"]


def test_half_a_surrogate_pair_is_named_with_its_row(tmp_path):
    rows = '{"text": "\\ud83d\\ude00", "other": "\\ud83d"}\n{"text": "\\uD83D"}\n'
    (tmp_path / "x.jsonl").write_text(rows)
    with pytest.raises(BadInput, match=r"x.jsonl: row 2: column 'text' holds half of a surrogate pair"):
        documents(tmp_path)
    (tmp_path / "x.jsonl").write_text(rows.splitlines()[0])
    assert documents(tmp_path) == ["😀"]


def test_a_large_file_without_the_column_is_refused_at_once(tmp_path):
    rows = [{"body": "a"}] * 9000
    (tmp_path / "x.jsonl").write_bytes(jsonl([*rows, {"text": "late"}]))
    assert documents(tmp_path) == ["late"]
    (tmp_path / "x.jsonl").write_bytes(jsonl([*rows, *rows]) + b"never read")
    with pytest.raises(BadInput, match=r"first 10,000 rows: no column 'text'; it has body"):
        documents(tmp_path)


def test_whatever_pyarrow_raises_on_a_damaged_parquet_is_a_sentence(tmp_path, monkeypatch):
    """A flipped bit of the schema gave ArrowNotImplementedError, which is neither OSError nor ValueError."""
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["one"]}), tmp_path / "x.parquet")

    def damaged(*arguments, **options):
        raise pa.ArrowNotImplementedError("Integers with more than 64 bits not implemented")

    monkeypatch.setattr(parquet, "ParquetFile", damaged)
    with pytest.raises(BadInput, match=r"x\.parquet: cannot be read \(Integers with more"):
        documents(tmp_path)


READ_DAMAGED = """
import sys
from pathlib import Path
from corpus.local_files import TextFiles
from engine.cli import BadInput
path, counts = Path(sys.argv[1]), [0, 0]
whole = path.read_bytes()
for place in range(len(whole) - 2000, len(whole)):
    damaged = bytearray(whole)
    damaged[place] ^= 2
    path.write_bytes(damaged)
    try:
        list(TextFiles([path]).open())
        counts[0] += 1
    except BadInput:
        counts[1] += 1
print(*counts)
"""


def test_a_damaged_footer_of_a_parquet_neither_kills_the_process_nor_raises(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"text": [f"{i} words" for i in range(200)], "list": [[1]] * 200, "id": list(range(200))})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=60)
    words = (sys.executable, "-c", READ_DAMAGED, tmp_path / "x.parquet")
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    read, refused = map(int, done.stdout.split())
    assert read > 100
    assert refused > 100


def test_a_footer_that_promises_other_rows_than_the_file_has_is_refused(tmp_path, monkeypatch):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["one", "two", "three"]}), tmp_path / "x.parquet")
    iter_batches = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        parquet.ParquetFile, "iter_batches", lambda *words, **more: list(iter_batches(*words, **more))[:0]
    )
    with pytest.raises(BadInput, match=r"x.parquet: row group 0 has 3 rows by its footer"):
        documents(tmp_path)


def test_a_damaged_page_with_a_checksum_is_refused(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "x.parquet"
    table = pa.table({"text": ["some words", "other words"]})
    parquet.write_table(
        table, path, compression="NONE", use_dictionary=False, write_page_checksum=True, write_statistics=False
    )
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"other words", b"OTHER words", 1))
    with pytest.raises(BadInput, match=r"x.parquet: cannot be read"):
        documents(tmp_path)


def test_an_ascii_locale_reads_a_parquet_and_a_zst_with_an_umlaut(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": random_documents(60)}), tmp_path / "ü.parquet")
    (tmp_path / "ü.txt.zst").write_bytes(compressed("größe\n".encode() * 9, ".zst"))
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = build(tmp_path, tmp_path / "ü.parquet", tmp_path / "ü.txt.zst", "--out", tmp_path / "s", **ascii_only)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("run", ["A", "7", "a1", "=", "_=", "\u0301", " ", "\n", "\x1c!", "漢"])
def test_no_word_of_the_training_text_is_long(run):
    """Words as the tokenizer itself cuts them; ordinary text stays as it is."""
    from tokenizers import pre_tokenizers

    cut = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = "some words " * 50 + run * 10_000 + " and more"
    pieces = list(training_sample(iter([text]), 0.0))
    assert "".join(pieces) == text
    lengths = [end - begin for piece in pieces for _, (begin, end) in cut.pre_tokenize_str(piece)]
    assert max(lengths) <= 513  # two blocks, and the space in front of a word
    ordinary = random_documents(20)
    assert list(training_sample(iter(ordinary), 0.0)) == ordinary


def test_the_training_text_holds_a_limited_amount_of_long_words():
    genome = "".join(random.Random(0).choices("ACGT", k=100_000))
    kept = sum(map(len, training_sample((genome[i:] + str(i) for i in range(100)), 0.0)))
    assert 3_000_000 < kept < 4_100_000


def test_rows_without_text_are_counted_up_to_the_last_token(tmp_path, run_main):
    rows = [{"text": text} if i % 2 else {"text": None} for i, text in enumerate(random_documents(300))]
    (tmp_path / "x.jsonl").write_bytes(jsonl(rows))
    words = ("text", tmp_path / "x.jsonl", "--out", tmp_path / "s", "--vocab-size", 300)
    code, out, err = run_main(commands.main, *words, "--max-tokens", 30_000, "--val-fraction", 0.2)
    assert code == 0, err
    assert "150 rows had no text" in out
    (tmp_path / "x.jsonl").write_bytes(jsonl([{"text": None}] * 9))
    code, _, err = run_main(commands.main, *words[:3], tmp_path / "none", *words[4:])
    assert code == 2
    assert "no document fell into train; 9 rows had no text" in err
