"""The part of bench.fuzz about text: damaged .txt, .jsonl and .parquet files, compressed or not, with odd names.

    python -m bench.fuzz --cases 0 --texts 2000

Every case must end in exactly the documents that an independent reader finds, in shards too, or in a sentence.
"""

import gzip
import io
import itertools
import json
import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zstandard
from pyarrow import parquet

from corpus.build import MixPart, build_shards
from corpus.documents import train_tokenizer
from corpus.local_files import BYTE_ORDER_MARK, TextFiles, find_files
from corpus.shards import SPLITS, open_shards
from data import TokenStream

ODD_NAMES = (
    "a[1]",
    "a*",
    "b?",
    "zip::c",
    "d{e,f}",
    "ün",
    " space ",
    ".hidden",
    "._a",
    "UPPER",
    "no.such.kind",
    "-x",
    "#1",
)
ODD_ROWS = (
    b'{"text": "new", "url": "http://x", "list": [1, {"a": null}]}',
    b'{"text": "\\u00e9 \\ud83d\\ude00", "n": 1.5, "n": "twice"}',
    b'{"text": null}',
    b'{"id": 7}',
    b"",
    b"   ",
    b'{"text": 5}',
    b'{"text": "half a letter \\ud83d"}',
    b"[1, 2]",
    b"null",
    b'{"text": "no end',
    b"\xff\xfe",
    b'{"text": "number", "n": ' + b"7" * 5000 + b"}",
    b'{"text": "deep", "n": ' + b"[" * 500 + b"]" * 500 + b"}",
    b'{"text": "twice", "text": "again", "\\ud83d": 1}\r',
    b'{"text": "\x00"}',
    b'{"text": "two"} {"text": "rows"}',
    b'{"text": "' + b"long" * 100_000 + b'"}',
)
ODD_PIECES = (b"\x80" * 300_000, b"ACGT" * 100_000, "é€".encode() * 50_000, b"\n" * 200_000, b"\x00" * 200_000, b"\xc3")
ODD_COLUMNS = (
    pa.array([None] * 40, pa.string()),
    pa.array([None] * 40, pa.null()),
    pa.array(range(40)),
    pa.array([b"\xff"] * 40),
    pa.array([f"large {i}" for i in range(40)], pa.large_string()),
    pa.array([f"{i % 3} of three" if i % 4 else None for i in range(40)]).dictionary_encode(),
    pa.array([f"2026-01-{i % 28 + 1:02}" for i in range(40)]),
    pa.array(range(40), pa.timestamp("s")),
    pa.array([{"text": "inside"}] * 40),
    pa.array([["a", "list"]] * 40),
)
SHARDS_EVERY = 50  # cases: their documents are also built into shards and read back


class Texts:
    """Files to damage, and what comes of them: `read` raises BadInput, or Wrong where documents differ."""

    def __init__(self, wrong: type[Exception], rng: random.Random) -> None:
        self.wrong, self.rng, self.cases = wrong, rng, 0

    def write(self, folder: Path) -> None:
        rng = random.Random(0)
        words = ["".join(rng.choices("abcdefghéß", k=rng.randint(1, 8))) for _ in range(300)]
        texts = [f"{i} " + " ".join(rng.choices(words, k=rng.randint(3, 60))) for i in range(120)]
        (folder / "empty").mkdir(parents=True)
        self.tokenizer = folder.with_name("tokenizer.json")
        self.tokenizer.write_text(train_tokenizer(iter(texts), 300).to_str(), encoding="utf-8")
        rows = "".join(json.dumps({"text": text, "id": i, "url": None}) + "\n" for i, text in enumerate(texts[:40]))
        plain, long = "\n".join(texts[40:60]).encode(), "".join(texts[60:80] * 60).encode()
        (folder / "a.txt").write_bytes(plain)
        (folder / "b.jsonl").write_bytes(rows.encode())
        (folder / "c.txt.gz").write_bytes(gzip.compress(long))
        (folder / "d.jsonl.gz").write_bytes(gzip.compress(rows.encode()[:-1]))
        (folder / "e.txt.zst").write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(long))
        (folder / "f.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(rows.encode()))
        table = pa.table({"text": texts[80:], "id": list(range(40)), "m": [[{"a": i}] for i in range(40)]})
        parquet.write_table(table, folder / "g.parquet", row_group_size=15)

    def damage(self, folder: Path, rng: random.Random, damage_bytes: Any) -> None:
        files = [path for path in sorted(folder.iterdir()) if path.is_file()]
        path = rng.choice(files)
        kinds = ("bytes", "bytes", "name", "ending", "link", "loop")
        kind = rng.choice((*kinds, "table", "table") if path.suffix == ".parquet" else (*kinds, "text", "mark"))
        if kind == "bytes":
            damage_bytes(path, rng)
        elif kind == "table":
            _rewrite(path, rng)
        elif kind in ("text", "mark"):
            try:
                data = _decompressed(path)
            except (OSError, EOFError, zlib.error):  # damaged already
                return
            lines = data.split(b"\n")
            if kind == "text":
                lines.insert(rng.randrange(len(lines)), rng.choice(ODD_ROWS if ".jsonl" in path.name else ODD_PIECES))
            data = (BYTE_ORDER_MARK if kind == "mark" else b"") + b"\n".join(lines)
            path.write_bytes(_compressed(data, path.suffix))
        elif kind == "name":
            path.rename(folder / (rng.choice(ODD_NAMES) + "".join(path.suffixes)))
        elif kind == "ending":
            path.rename(path.with_name(path.name.upper() if rng.random() < 0.5 else path.name + ".bak"))
        elif kind == "link":
            (folder / ".store").mkdir(exist_ok=True)
            path.symlink_to(path.rename(folder / ".store" / path.name))
        elif not (folder / "loop").exists():
            (folder / "loop").symlink_to(folder)

    def read(self, folder: Path, whole: Path) -> None:
        self.cases += 1
        found = find_files([folder]).files
        ours = {path: list(TextFiles([path]).open()) for path in found}
        expected = dict(_independently(folder))
        for path in ours.keys() | expected.keys():
            mine, theirs = ours.get(path, []), expected.get(path, [])
            if ".txt" in path.name.lower():  # cut into pieces, whose ends are ours to choose
                mine, theirs = ["".join(mine)], ["".join(theirs)]
            if mine != theirs:
                raise self.wrong(f"{path.name}: {len(mine)} documents, not the {len(theirs)} that another reader finds")
        documents = [document for path in found for document in ours[path]]
        reader = TextFiles(found).open()
        first = list(itertools.islice(reader, self.rng.randrange(len(documents) + 1)))
        if first + list(reader.open(json.loads(json.dumps(reader.position())))) != documents:
            raise self.wrong(f"other documents when reading continues after {len(first)}")
        if self.cases % SHARDS_EVERY == 0:
            self.read_back(folder.with_name("built"), found, documents)

    def read_back(self, out: Path, files: list[Path], documents: list[str]) -> None:
        """The same documents again, each once, from shards."""
        from tokenizers import Tokenizer

        source = [MixPart("texts", TextFiles(files))]
        build_shards(source, out, source="texts", tokenizer=str(self.tokenizer), val_fraction=0.3)
        encoder, shards, built = Tokenizer.from_file(str(self.tokenizer)), open_shards(out), []
        for split in SPLITS:
            stream = TokenStream(shards, split)
            tokens = stream.read(0, len(stream))
            for document in np.split(tokens, np.flatnonzero(tokens == shards.eot_id)[1:]):
                built.append(encoder.decode(document[1:].tolist(), skip_special_tokens=False))
        for path in sorted(out.iterdir()):
            path.unlink()
        out.rmdir()
        if sorted(built) != sorted(set(documents)):
            raise self.wrong(f"{len(built)} documents in shards, {len(set(documents))} different ones in the files")


def _rewrite(path: Path, rng: random.Random) -> None:
    """Write a .parquet in another way, with other columns."""
    try:
        table = parquet.read_table(path)
        columns = dict(zip(table.column_names, table.columns, strict=True))
    except (OSError, pa.ArrowException):  # damaged already
        return
    if rng.random() < 0.6 and len(table) == 40:
        columns[rng.choice(("text", "id", "body"))] = rng.choice(ODD_COLUMNS)
    if rng.random() < 0.2:
        columns.pop(rng.choice(tuple(columns)))
    parquet.write_table(
        pa.table(columns).slice(0, rng.choice((0, 1, 40, 40, 40))),
        path,
        row_group_size=rng.choice((1, 7, 1000)),
        compression=rng.choice(("NONE", "snappy", "gzip", "zstd", "lz4", "brotli")),
        use_dictionary=rng.random() < 0.5,
        data_page_size=rng.choice((10, 1000, 2**20)),
        data_page_version=rng.choice(("1.0", "2.0")),
        write_page_checksum=rng.random() < 0.5,
        store_schema=rng.random() < 0.5,
    )


def _independently(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """The documents of each file by readers that share nothing with corpus/local_files.py: whole files, a text each."""
    paths = [Path(root) / name for root, _, names in os.walk(folder) for name in names]
    for path in paths:
        name = path.name.lower()
        stem = name.removesuffix(".gz").removesuffix(".zst")
        if any(part.startswith(".") for part in path.relative_to(folder).parts) or not path.is_file():
            continue
        if name.endswith(".parquet"):
            table = parquet.ParquetFile(path).read(["text"])
            values = table["text"].to_pylist() if "text" in table.column_names else []
            yield path, [value for value in values if value is not None]
        elif stem.endswith(".txt"):
            yield path, [_decompressed(path).decode("utf-8-sig")]
        elif stem.endswith(".jsonl"):
            rows = [
                json.loads(line, parse_int=float)
                for line in _decompressed(path).decode("utf-8-sig").split("\n")
                if line.strip()
            ]
            yield path, [row["text"] for row in rows if row.get("text") is not None]


def _decompressed(path: Path) -> bytes:
    if path.suffix.lower() == ".gz":
        return gzip.decompress(path.read_bytes())
    if path.suffix.lower() == ".zst":
        return pa.CompressedInputStream(io.BytesIO(path.read_bytes()), "zstd").read()
    return path.read_bytes()


def _compressed(data: bytes, ending: str) -> bytes:
    if ending.lower() == ".gz":
        return gzip.compress(data)
    return zstandard.ZstdCompressor().compress(data) if ending.lower() == ".zst" else data
