"""The part of bench.fuzz about text: damaged .txt, .jsonl and .parquet files, compressed or not, with odd names.

    python -m bench.fuzz --cases 0 --texts 2000

Every case must end in exactly the documents that an independent reader finds, in shards too, or in a sentence.
"""

import gzip
import io
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
        kind = rng.choice(("bytes", "bytes", "rows", "name", "mark", "ending"))
        if kind == "bytes":
            damage_bytes(path, rng)
        elif kind in ("rows", "mark") and path.suffix != ".parquet":
            try:
                data = _decompressed(path)
            except (OSError, EOFError, zlib.error):  # damaged already
                return
            lines = data.split(b"\n")
            if kind == "rows" and ".jsonl" in path.name:
                lines.insert(rng.randrange(len(lines)), rng.choice(ODD_ROWS))
            data = (BYTE_ORDER_MARK if kind == "mark" else b"") + b"\n".join(lines)
            path.write_bytes(_compressed(data, path.suffix))
        elif kind == "name":
            path.rename(folder / (rng.choice(ODD_NAMES) + "".join(path.suffixes)))
        elif kind == "ending":
            path.rename(path.with_name(path.name.upper() if rng.random() < 0.5 else path.name + ".bak"))

    def read(self, folder: Path, whole: Path) -> None:
        self.cases += 1
        found = find_files([folder]).files
        ours = list(TextFiles(found).open())
        expected = list(_independently(folder))
        # A .txt is cut into pieces, whose ends are ours to choose.
        if "".join(ours) != "".join(expected) or len(ours) < len(expected):
            raise self.wrong(f"{len(ours)} documents where another reader finds {len(expected)}")
        if self.cases % SHARDS_EVERY == 0:
            self.read_back(folder.with_name("built"), found, ours)

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


def _independently(folder: Path) -> Iterator[str]:
    """Every document by readers that share nothing with corpus/local_files.py: whole files at once, one per .txt."""
    paths = [Path(root) / name for root, _, names in os.walk(folder, followlinks=True) for name in names]
    for path in sorted(path for path in paths if not path.name.startswith(".")):
        name = path.name.lower()
        if name.endswith(".parquet"):
            if path.stat().st_size:
                column = parquet.read_table(path, columns=["text"])["text"]
                yield from (value for value in column.to_pylist() if value is not None)
            continue
        stem = name.removesuffix(".gz").removesuffix(".zst")
        if not stem.endswith((".txt", ".jsonl")) or not path.stat().st_size:
            continue
        text = _decompressed(path).decode("utf-8-sig")
        if stem.endswith(".txt"):
            yield text
            continue
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        yield from (row["text"] for row in rows if row.get("text") is not None)


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
