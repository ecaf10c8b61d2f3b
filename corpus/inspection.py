"""Describe a folder of token shards and find every damaged file in it.

    python data.py inspect DIR; python data.py verify DIR

One pass over every byte, a few MB at a time. Unlike open_shards it continues after a damaged file, to name them all.
"""

import hashlib
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from corpus.documents import load_tokenizer
from corpus.shards import (
    HEADER_BYTES,
    META,
    SLOT_CRC32,
    SPLITS,
    TOKENIZER,
    TRAIN_PATTERN,
    Shards,
    check_names,
    find_shards,
    open_shards,
    payload_chunks,
    read_header,
    read_meta,
)
from engine.cli import BadInput

FIRST_TOKENS = 120  # decoded and shown


@dataclass
class SplitContents:
    """Counts from one pass over the tokens of a split."""

    tokens: int = 0
    lowest: int = 2**16
    highest: int = -1
    used: np.ndarray = field(default_factory=lambda: np.zeros(2**16, bool))
    starts: list[np.ndarray] = field(default_factory=list)
    shards: int = 0
    unchecked: int = 0  # shards without a checksum

    def add(self, tokens: np.ndarray, eot_id: int | None) -> None:
        if len(tokens):
            self.lowest, self.highest = min(self.lowest, int(tokens.min())), max(self.highest, int(tokens.max()))
            self.used |= np.bincount(tokens, minlength=2**16) > 0
        if eot_id is not None:
            self.starts.append(np.flatnonzero(tokens == eot_id) + self.tokens)
        self.tokens += len(tokens)

    def document_lengths(self) -> np.ndarray:
        """Tokens of each document that begins in the split, its end-of-text id included."""
        starts = np.concatenate(self.starts) if self.starts else np.empty(0, np.int64)
        return np.diff(starts, append=self.tokens)


def check(path: Path, digests: dict[str, str], vocab_size: int, eot_id: int | None, found: SplitContents) -> None:
    """Read a whole shard and add it to `found`; BadInput names the damage."""
    header = read_header(path)
    crc, sha256, highest = 0, hashlib.sha256(header.tobytes()), -1
    for chunk in payload_chunks(path):
        crc = zlib.crc32(chunk, crc)
        sha256.update(chunk)
        tokens = np.frombuffer(chunk, "<u2", len(chunk) // 2)
        highest = max(highest, int(tokens.max(initial=0)))
        found.add(tokens, eot_id)
    if header[SLOT_CRC32] and crc != header[SLOT_CRC32]:
        raise BadInput(f"{path}: its checksum does not match, the file is damaged")
    if path.name in digests and sha256.hexdigest() != digests[path.name]:
        raise BadInput(f"{path}: its SHA-256 is not the one in {META}")
    if highest >= vocab_size:
        raise BadInput(f"{path}: token id {highest} in a vocabulary of {vocab_size:,}")
    found.shards += 1
    found.unchecked += not header[SLOT_CRC32] and path.name not in digests


def examine(folder: Path, pattern: str) -> tuple[list[str], Shards | None, dict[str, SplitContents]]:
    """Read every byte of a folder of shards: a sentence for each damage, the opened shards, the contents of each split.

    BadInput if the folder has no shards; the shards can be None only if something is damaged.
    """
    files = find_shards(folder, pattern)
    damaged, meta, shards, refusal = [], None, None, ""
    try:
        shards = open_shards(folder, pattern)
    except BadInput as wrong:  # it stops at the first damage; the loop below names each
        refusal = str(wrong)
    try:
        meta = read_meta(folder / META) if (folder / META).exists() else None
        if meta and pattern == TRAIN_PATTERN:
            check_names(folder, set(meta["sha256"]), {path.name for paths in files.values() for path in paths})
    except BadInput as wrong:
        damaged.append(str(wrong))
    vocab_size, eot_id = (shards.vocab_size, shards.eot_id) if shards else (2**16, None)
    found = {split: SplitContents() for split in SPLITS}
    for split in SPLITS:
        for path in files[split]:
            try:
                check(path, meta["sha256"] if meta else {}, vocab_size, eot_id, found[split])
            except BadInput as wrong:
                damaged.append(str(wrong))
        promised = meta and pattern == TRAIN_PATTERN and meta.get(f"{split}_tokens")
        if promised and not damaged and promised != found[split].tokens:
            damaged.append(f"{folder / META}: promises {promised} {split} tokens, the files hold {found[split].tokens}")
    if refusal and not damaged:
        damaged.append(refusal)
    return damaged, shards, found


def verify(folder: Path, pattern: str = TRAIN_PATTERN, describe: bool = False) -> int:
    """Print a line for each damage in a folder of shards, or that it is whole; returns the exit code, 1 if damaged.

    With `describe` print first, of whole shards, counts, vocabulary range, document statistics and the first text.
    """
    damaged, shards, found = examine(folder, pattern)
    for line in damaged:
        print(f"damaged: {line}")
    if damaged:
        return 1
    if describe:
        print_description(folder, shards, found)
    unchecked, tokens = (sum(getattr(f, key) for f in found.values()) for key in ("unchecked", "tokens"))
    count = sum(f.shards for f in found.values())
    checked = "every checksum matches"
    if unchecked:
        checked = f"{'none' if unchecked == count else count - unchecked} of them with a checksum to compare"
    print(f"{folder}: {plural(count)}, {tokens:,} tokens, {checked}")
    return 0


def print_description(folder: Path, shards: Shards, found: dict[str, SplitContents]) -> None:
    meta = read_meta(folder / META) if (folder / META).exists() else {}
    print(f"{folder}: {meta.get('source', 'shards without meta.json, assumed to hold GPT-2 tokens')}")
    eot = "unknown" if shards.eot_id is None else shards.eot_id
    print(f"vocabulary {shards.vocab_size:,}, end-of-text {eot}, fingerprint {shards.fingerprint}")
    for split in SPLITS:
        print(split_line(split, shards, found[split]))
    if (folder / TOKENIZER).exists():
        tokens = np.fromfile(shards.files["train"][0], "<u2", FIRST_TOKENS, offset=HEADER_BYTES).tolist()
        text = load_tokenizer(str(folder / TOKENIZER)).decode(tokens, skip_special_tokens=False)
        print(f"first text: {text!r}")


def plural(shards: int) -> str:
    return f"{shards} shard{'s' * (shards != 1)}"


def split_line(split: str, shards: Shards, found: SplitContents) -> str:
    used = int(found.used.sum())
    parts = [f"{split}: {found.tokens:,} tokens in {plural(len(shards.files[split]))}"]
    parts.append(f"ids {found.lowest} to {found.highest} ({used:,} different, {used / shards.vocab_size:.1%})")
    lengths = found.document_lengths()
    if len(lengths):
        middle, most = np.percentile(lengths, (50, 95))
        parts.append(
            f"{len(lengths):,} documents of {lengths.mean():,.0f} tokens on average (median {middle:,.0f}, "
            f"95 % up to {most:,.0f}, longest {lengths.max():,})"
        )
    return "; ".join(parts)
