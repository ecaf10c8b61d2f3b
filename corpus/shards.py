"""Token shards on disk: llm.c's .bin format; ours add vocabulary size, end-of-text id and checksum to the header.

    shards = open_shards(folder)             # checks every header; data.TokenStream reads the tokens

A shard is 256 little-endian int32 (magic, version, token count, then our extras; zero = absent) and uint16 tokens.
Reading holds a few MB; a damaged file is named in the error.
"""

import contextlib
import fnmatch
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.cli import BadInput
from engine.files import TOKENIZER as TOKENIZER  # which shards and imported runs have
from engine.files import load_json, writing

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = HEADER_INTS * 4
SLOT_VOCAB_SIZE, SLOT_EOT_ID, SLOT_CRC32 = 3, 4, 5
SHARD_TOKENS = 10**8
MAX_VOCAB_SIZE = 2**16  # a token is a uint16
GPT2_VOCAB_SIZE, GPT2_EOT_ID = 50_257, 50_256  # of published llm.c shards, whose headers do not name a vocabulary
SPLITS = ("train", "val")
TRAIN_PATTERN = "*train_*.bin"
META = "meta.json"
MAX_META_BYTES = 2**24  # 10^5 shards
CHECKED_AT_ONCE_BYTES = 2**24  # 6 ms; a larger payload is checked while training begins
CHUNK_BYTES = 2**22
WRITE_TOKENS = 2**19


class ShardWriter:
    """Appends tokens to `split`_%06d.bin in `folder`; a shard's header, with its checksum, is written last."""

    def __init__(self, folder: Path, split: str, vocab_size: int, eot_id: int) -> None:
        self.folder, self.split, self.vocab_size, self.eot_id = folder, split, vocab_size, eot_id
        self.tokens, self.sha256, self.file = 0, {}, None
        self.waiting: list[np.ndarray] = []
        self.waiting_tokens = 0

    @property
    def path(self) -> Path:
        return self.folder / f"{self.split}_{len(self.sha256):06d}.bin"

    def write(self, tokens: np.ndarray) -> None:
        self.waiting.append(tokens)
        self.waiting_tokens += len(tokens)
        self.tokens += len(tokens)
        if self.waiting_tokens >= WRITE_TOKENS:
            self._write_waiting()

    def _write_waiting(self) -> None:
        tokens = np.concatenate(self.waiting) if self.waiting else np.empty(0, np.uint16)
        self.waiting, self.waiting_tokens = [], 0
        while len(tokens):
            if self.file is None:
                with writing(self.path):
                    self.file, self.crc, self.count = self.path.open("w+b"), 0, 0
                    self.file.write(bytes(HEADER_BYTES))
            part, tokens = np.split(tokens, [SHARD_TOKENS - self.count])
            payload = part.astype("<u2").tobytes()
            with writing(self.path):
                self.file.write(payload)
            self.crc = zlib.crc32(payload, self.crc)
            self.count += len(part)
            if self.count == SHARD_TOKENS:
                self._finish()

    def _finish(self) -> None:
        header = np.zeros(HEADER_INTS, dtype="<u4")
        header[:3] = MAGIC, VERSION, self.count
        header[[SLOT_VOCAB_SIZE, SLOT_EOT_ID, SLOT_CRC32]] = self.vocab_size, self.eot_id, self.crc
        path = self.path
        with writing(path):
            self.file.seek(0)
            self.file.write(header.tobytes())
            self.file.flush()
            os.fsync(self.file.fileno())
        self.file.seek(0)
        self.sha256[path.name] = hashlib.file_digest(self.file, "sha256").hexdigest()
        self.file.close()
        self.file = None

    def close(self) -> None:
        self._write_waiting()
        if self.file is not None:
            self._finish()

    def abandon(self) -> None:
        """Close the unfinished file as it is."""
        if self.file is not None:
            with contextlib.suppress(OSError):  # closing writes the buffer, which a full disk refuses again
                self.file.close()

    def save(self) -> dict[str, Any]:
        """Force the tokens written so far to disk; the returned state is what `resume` needs."""
        self._write_waiting()
        state = {"tokens": self.tokens, "sha256": dict(self.sha256), "open_tokens": 0, "crc": 0}
        if self.file is not None:
            with writing(self.path):
                self.file.flush()
                os.fsync(self.file.fileno())
            state |= {"open_tokens": self.count, "crc": self.crc}
        return state

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from a saved state and cut off what was written after it. BadInput if the file is shorter."""
        self.tokens, self.sha256, self.crc, self.count = (state[k] for k in ("tokens", "sha256", "crc", "open_tokens"))
        path = self.path
        for later in self.folder.glob(f"{self.split}_*.bin"):
            if later.name not in self.sha256 and (later != path or not self.count):
                later.unlink()
        if self.count:
            end = HEADER_BYTES + 2 * self.count
            if not path.exists() or path.stat().st_size < end:
                raise BadInput(f"{path}: shorter than the unfinished build recorded; delete {self.folder}")
            self.file = path.open("r+b")
            self.file.truncate(end)
            self.file.seek(end)


def digest(value: object) -> str:
    """16 hex digits of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _ends(path: Path) -> str:
    """Hash of the first and last MB, to tell shards without checksums apart."""
    with path.open("rb") as file:
        first = file.read(2**20)
        file.seek(-min(2**20, path.stat().st_size), os.SEEK_END)
        return hashlib.sha256(first + file.read()).hexdigest()


@dataclass(frozen=True)
class Shards:
    """A folder of shards whose headers were checked; payloads are checked when a stream first opens them."""

    vocab_size: int
    eot_id: int | None  # the token that begins a document; None where the shards do not name it
    fingerprint: str
    files: dict[str, list[Path]]
    counts: dict[str, list[int]]

    def tokens(self, split: str) -> int:
        return sum(self.counts[split])


def read_header(path: Path) -> np.ndarray:
    """The 256 integers of a shard's header; BadInput unless magic, version and file size agree."""
    try:
        size = path.stat().st_size
        if size < HEADER_BYTES:
            raise BadInput(f"{path}: {size} bytes are too few for a shard's header")
        header = np.fromfile(path, dtype="<u4", count=HEADER_INTS)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    if header[0] != MAGIC or header[1] != VERSION:
        raise BadInput(f"{path}: not a token shard (magic {header[0]}, version {header[1]})")
    held = (size - HEADER_BYTES) // 2
    if held != header[2] or size % 2:
        raise BadInput(f"{path}: header promises {header[2]} tokens, file holds {held}; rebuild it with data.py")
    if header[SLOT_VOCAB_SIZE] > MAX_VOCAB_SIZE:
        raise BadInput(f"{path}: vocabulary of {header[SLOT_VOCAB_SIZE]:,}, but uint16 holds {MAX_VOCAB_SIZE:,}")
    return header


def find_shards(folder: Path, pattern: str = TRAIN_PATTERN) -> dict[str, list[Path]]:
    """The shard files of each split; `pattern` matches the training shards, and the validation shards with val for
    train."""
    if "train" not in pattern or "/" in pattern:
        raise BadInput(f"--data-pattern {pattern}: must be a file name with train in it, such as fineweb_train_*.bin")
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder of shards; build one with python data.py")
    before, _, after = pattern.rpartition("train")
    patterns = {split: before + split + after for split in SPLITS}
    held = sorted(path for path in folder.iterdir() if path.is_file())
    files = {split: [p for p in held if fnmatch.fnmatchcase(p.name, patterns[split])] for split in SPLITS}
    for split in SPLITS:
        if not files[split]:
            advice = "build it with python data.py" if pattern == TRAIN_PATTERN else "is --data-pattern right?"
            raise BadInput(f"{folder}: no {patterns[split].lstrip('*')} in it; {advice}")
    return files


def open_shards(folder: Path, pattern: str = TRAIN_PATTERN) -> Shards:
    """Find the shards of a folder, ours or llm.c's, and check every header; does not read the tokens."""
    files = find_shards(folder, pattern)
    headers = {path: read_header(path) for paths in files.values() for path in paths}
    kinds = {(int(h[SLOT_VOCAB_SIZE]), int(h[SLOT_EOT_ID])) for h in headers.values()}
    if len(kinds) > 1:
        raise BadInput(f"{folder}: shards of different vocabularies {sorted(size for size, _ in kinds)}")
    vocab_size, eot_id = kinds.pop()
    if not vocab_size:
        vocab_size, eot_id = GPT2_VOCAB_SIZE, GPT2_EOT_ID
    fingerprint, meta_path = None, folder / META
    if meta_path.exists():
        meta = read_meta(meta_path)
        eot_id = meta.get("eot_id", eot_id if meta["vocab_size"] == vocab_size else None)
        vocab_size = meta["vocab_size"]
        if pattern == TRAIN_PATTERN:
            fingerprint = meta["fingerprint"]
            check_names(folder, set(meta["sha256"]), {path.name for path in headers})
    if not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise BadInput(f"{meta_path}: vocabulary of {vocab_size:,}, but uint16 holds {MAX_VOCAB_SIZE:,}")
    if eot_id is not None and not 0 <= eot_id < vocab_size:
        eot_id = None
    if fingerprint is None:
        fingerprint = digest([[path.name, header.tolist()[:6], _ends(path)] for path, header in headers.items()])
    counts = {split: [int(headers[path][2]) for path in files[split]] for split in SPLITS}
    return Shards(vocab_size, eot_id, fingerprint, files, counts)


def read_meta(path: Path) -> dict[str, Any]:
    """A folder's meta.json, with the entries that reading shards needs checked."""
    meta = load_json(path, MAX_META_BYTES)
    vocab_size, fingerprint, digests = (meta.get(key) for key in ("vocab_size", "fingerprint", "sha256"))
    if type(vocab_size) is not int or not isinstance(fingerprint, str) or not isinstance(digests, dict):
        raise BadInput(f"{path}: not a description of shards (vocab_size, fingerprint and sha256 are needed)")
    if not isinstance(meta.get("eot_id"), int | None):
        raise BadInput(f"{path}: its eot_id is not a token id")
    return meta


def check_names(folder: Path, named: set[str], held: set[str]) -> None:
    """BadInput if a folder holds other shards than its meta.json names."""
    for wrong, words in ((named - held, "is missing"), (held - named, "is not in its meta.json")):
        if wrong:
            raise BadInput(f"{folder}: {', '.join(sorted(wrong))} {words}")


def payload_chunks(path: Path) -> Iterator[bytes]:
    """The tokens of a shard as bytes. They are read, not mapped: touching the lost part of a mapped file that was cut
    short meanwhile would kill the process."""
    try:
        with path.open("rb") as file:
            file.seek(HEADER_BYTES)
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None


def check_payload(path: Path, crc32: int) -> None:
    """BadInput unless the tokens of a shard have this CRC32."""
    found = 0
    for chunk in payload_chunks(path):
        found = zlib.crc32(chunk, found)
    if found != crc32:
        raise BadInput(f"{path}: its checksum does not match, the file is damaged; rebuild it with data.py")
