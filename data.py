"""Token shards: build them from text, stream them into a run.

    python data.py embedded --out shards/stdlib          # the Python sources of this machine, no network
    python data.py text notes.txt corpus.parquet --out shards/mine
    python data.py hf roneneldan/TinyStories --out shards/stories

A shard is llm.c's .bin: 256 little-endian int32 (magic, version, token count, then our extras: vocabulary size,
end-of-text id, CRC32 of the payload; zero = absent) and uint16 tokens. Readers map shards into memory and hold no more.
"""

import hashlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Annotated, Literal

import numpy as np
import tyro

from cli import BadInput, Count, exit_with_a_sentence, make_folder
from documents import (
    EOT_NAMES,
    SeenHashes,
    content_hash,
    embedded_documents,
    hub_documents,
    is_validation,
    load_tokenizer,
    text_documents,
    text_files,
    train_tokenizer,
    training_sample,
)
from runfiles import load_json

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = HEADER_INTS * 4
SLOT_VOCAB_SIZE, SLOT_EOT_ID, SLOT_CRC32 = 3, 4, 5
SHARD_TOKENS = 10**8
MAX_VOCAB_SIZE = 2**16  # a token is a uint16
GPT2_VOCAB_SIZE = 50_257  # what published llm.c shards hold; they do not say so themselves
GPT2_EOT_ID = 50_256
BATCH_DOCUMENTS = 16_384
BATCH_CHARS = 4_000_000  # per call of the tokenizer: enough for every core, 30 MB of memory
SPLITS = ("train", "val")
MAX_META_BYTES = 2**24  # 10^5 shards


class ShardWriter:
    """Appends tokens to `split`_%06d.bin in `folder`; a shard's header, with its checksum, is written last."""

    def __init__(self, folder: Path, split: str, vocab_size: int, eot_id: int) -> None:
        self.folder, self.split, self.vocab_size, self.eot_id = folder, split, vocab_size, eot_id
        self.tokens, self.sha256, self.file = 0, {}, None

    def write(self, tokens: np.ndarray) -> None:
        while len(tokens):
            if self.file is None:
                self.path = self.folder / f"{self.split}_{len(self.sha256):06d}.bin"
                self.file, self.crc, self.count = self.path.open("w+b"), 0, 0
                self.file.write(bytes(HEADER_BYTES))
            part, tokens = np.split(tokens, [SHARD_TOKENS - self.count])
            payload = part.astype("<u2").tobytes()
            self.file.write(payload)
            self.crc = zlib.crc32(payload, self.crc)
            self.count += len(part)
            self.tokens += len(part)
            if self.count == SHARD_TOKENS:
                self.close()

    def close(self) -> None:
        if self.file is None:
            return
        header = np.zeros(HEADER_INTS, dtype="<u4")
        header[:3] = MAGIC, VERSION, self.count
        header[[SLOT_VOCAB_SIZE, SLOT_EOT_ID, SLOT_CRC32]] = self.vocab_size, self.eot_id, self.crc
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.seek(0)
        self.sha256[self.path.name] = hashlib.file_digest(self.file, "sha256").hexdigest()
        self.file.close()
        self.file = None


def build_shards(
    documents: Callable[[], Iterator[str]],
    out: Path,
    *,
    source: str,
    tokenizer: str | None = None,
    vocab_size: int = 49_152,
    max_tokens: int | None = None,
    val_fraction: float = 0.02,
) -> dict:
    """Tokenise `documents()` into shards, tokenizer.json and meta.json under `out`; returns meta.

    Builds in `out`.partial and renames at the end, so a broken build leaves nothing that looks finished. `documents` is
    called twice when a tokenizer has to be trained. `max_tokens` counts both splits, end-of-text included.
    """
    from tqdm import tqdm

    if out.exists():
        raise BadInput(f"{out}: exists already; delete it or choose another --out")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    if tokenizer is None:
        encoder = train_tokenizer(training_sample(documents(), val_fraction), vocab_size)
    else:
        encoder = load_tokenizer(tokenizer)
    vocabulary = encoder.get_vocab(with_added_tokens=True)
    vocab_size = max(vocabulary.values()) + 1
    eot_id = next((vocabulary[name] for name in EOT_NAMES if name in vocabulary), None)
    if vocab_size > MAX_VOCAB_SIZE:
        raise BadInput(f"--tokenizer {tokenizer}: {vocab_size:,} entries, but a uint16 shard holds {MAX_VOCAB_SIZE:,}")
    if eot_id is None:
        raise BadInput(f"--tokenizer {tokenizer}: has none of {', '.join(EOT_NAMES)} to mark the end of a document")

    make_folder(partial)
    try:
        writers = {split: ShardWriter(partial, split, vocab_size, eot_id) for split in SPLITS}
        counts = {"train": 0, "val": 0, "duplicates": 0}
        seen = SeenHashes()
        left = max_tokens if max_tokens is not None else sys.maxsize
        with tqdm(total=max_tokens, unit="tok", unit_scale=True, desc=f"building {out}", disable=None) as bar:
            for texts in _batches(documents()):
                hashes = np.array([content_hash(text) for text in texts], dtype=np.uint64)
                fresh = seen.add(hashes)
                counts["duplicates"] += int((~fresh).sum())
                kept = [(texts[i], int(hashes[i])) for i in np.flatnonzero(fresh)]
                encodings = encoder.encode_batch_fast([text for text, _ in kept], add_special_tokens=False)
                for (_, text_hash), encoding in zip(kept, encodings, strict=True):
                    tokens = np.array([eot_id, *encoding.ids][:left], dtype=np.uint16)
                    split = "val" if is_validation(text_hash, val_fraction) else "train"
                    writers[split].write(tokens)
                    counts[split] += 1
                    left -= len(tokens)
                    bar.update(len(tokens))
                    if left == 0:
                        break
                if left == 0:
                    break
        for split, writer in writers.items():
            writer.close()
            if not writer.tokens:
                raise BadInput(f"{source}: no document fell into {split}; give more text or another --val-fraction")
        encoder.save(str(partial / "tokenizer.json"))
        meta = {
            "tokenizer": tokenizer or f"byte-level BPE trained on {source}",
            "vocab_size": vocab_size,
            "eot_id": eot_id,
            "source": source,
            "train_tokens": writers["train"].tokens,
            "val_tokens": writers["val"].tokens,
            "documents": counts,
            "split": {"val_fraction": val_fraction, "rule": "blake2b-64 of the document's text"},
            "sha256": writers["train"].sha256 | writers["val"].sha256,
        }
        meta["fingerprint"] = _digest([vocab_size, eot_id, sorted(meta["sha256"].items())])
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return meta


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _ends(path: Path) -> str:
    """Hash of the first and last MB: what tells apart shards that come without checksums."""
    with path.open("rb") as file:
        first = file.read(2**20)
        file.seek(-min(2**20, path.stat().st_size), os.SEEK_END)
        return hashlib.sha256(first + file.read()).hexdigest()


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch, chars = [], 0
    for text in documents:
        batch.append(text)
        chars += len(text)
        if chars > BATCH_CHARS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class Shards:
    """A folder of shards whose headers were checked; payloads are checked when a stream first opens them."""

    vocab_size: int
    fingerprint: str
    files: dict[str, list[Path]]
    counts: dict[str, list[int]]
    eot_id: int | None = None
    """The token that every document starts with; None where nothing says it."""

    def tokens(self, split: str) -> int:
        return sum(self.counts[split])


def read_header(path: Path) -> np.ndarray:
    """The 256 integers of a shard's header; BadInput unless magic, version and file size agree."""
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise BadInput(f"{path}: {size} bytes are too few for a shard's header")
    header = np.fromfile(path, dtype="<u4", count=HEADER_INTS)
    if header[0] != MAGIC or header[1] != VERSION:
        raise BadInput(f"{path}: not a token shard (magic {header[0]}, version {header[1]})")
    held = (size - HEADER_BYTES) // 2
    if held != header[2] or size % 2:
        raise BadInput(f"{path}: header promises {header[2]} tokens, file holds {held}; rebuild it with data.py")
    if header[SLOT_VOCAB_SIZE] > MAX_VOCAB_SIZE:
        raise BadInput(f"{path}: vocabulary of {header[SLOT_VOCAB_SIZE]:,}, but uint16 holds {MAX_VOCAB_SIZE:,}")
    return header


def open_shards(folder: Path) -> Shards:
    """Find the shards of a folder, ours or llm.c's, and check every header; reads no payload."""
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder of shards; build one with python data.py")
    files = {split: sorted(folder.glob(f"*{split}_*.bin")) for split in SPLITS}
    for split in SPLITS:
        if not files[split]:
            raise BadInput(f"{folder}: no {split}_*.bin in it; build it with python data.py")
    headers = {path: read_header(path) for paths in files.values() for path in paths}
    vocab_sizes = {int(h[SLOT_VOCAB_SIZE]) for h in headers.values()}
    if len(vocab_sizes) > 1:
        raise BadInput(f"{folder}: shards of different vocabularies {sorted(vocab_sizes)}")
    meta_path, held, eot_id = folder / "meta.json", {path.name for path in headers}, None
    if meta_path.exists():
        meta = load_json(meta_path, MAX_META_BYTES)
        vocab_size, fingerprint, digests = (meta.get(key) for key in ("vocab_size", "fingerprint", "sha256"))
        if type(vocab_size) is not int or not isinstance(fingerprint, str) or not isinstance(digests, dict):
            raise BadInput(f"{meta_path}: not a description of shards (vocab_size, fingerprint and sha256 are needed)")
        names, eot_id = set(digests), meta.get("eot_id")
        for wrong, words in ((names - held, "is missing"), (held - names, "is not in its meta.json")):
            if wrong:
                raise BadInput(f"{folder}: {', '.join(sorted(wrong))} {words}")
    else:
        vocab_size = vocab_sizes.pop() or GPT2_VOCAB_SIZE
        fingerprint = _digest([[path.name, header.tolist()[:6], _ends(path)] for path, header in headers.items()])
    if not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise BadInput(f"{meta_path}: vocabulary of {vocab_size:,}, but uint16 holds {MAX_VOCAB_SIZE:,}")
    if eot_id is None:
        header = next(iter(headers.values()))
        gpt2 = GPT2_EOT_ID if vocab_size == GPT2_VOCAB_SIZE else None
        eot_id = int(header[SLOT_EOT_ID]) if header[SLOT_VOCAB_SIZE] else gpt2
    if type(eot_id) is not int or not 0 <= eot_id < vocab_size:
        eot_id = None
    counts = {split: [int(headers[path][2]) for path in files[split]] for split in SPLITS}
    return Shards(vocab_size, fingerprint, files, counts, eot_id)


class TokenStream:
    """One split's shards as one sequence of tokens, mapped into memory, each checked when it is first touched."""

    def __init__(self, shards: Shards, split: str) -> None:
        self.paths, self.vocab_size = shards.files[split], shards.vocab_size
        self.starts = np.concatenate(([0], np.cumsum(shards.counts[split])))
        self.maps: dict[int, tuple[np.ndarray, tuple[int, int, int]]] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count, across shard borders, as int32."""
        out = np.empty(count, dtype=np.int32)
        shard, filled = int(np.searchsorted(self.starts, start, side="right")) - 1, 0
        while filled < count:
            offset = start + filled - self.starts[shard]
            part = self._map(shard)[offset : offset + count - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1
        if out.max(initial=0) >= self.vocab_size:
            raise BadInput(f"{self.paths[shard - 1]}: token id {out.max()} in a vocabulary of {self.vocab_size}")
        return out

    def _map(self, shard: int) -> np.ndarray:
        """A shard's tokens; BadInput where the file is damaged, or is no longer the one that was checked: to read on in
        one that was cut short would kill the process."""
        path = self.paths[shard]
        try:
            found = path.stat()
            now = found.st_size, found.st_mtime_ns, found.st_ino
        except OSError as error:
            raise BadInput(f"{path}: vanished while it was read ({error.strerror})") from None
        if shard not in self.maps:
            header, payload = read_header(path), np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)
            if len(payload) != self.starts[shard + 1] - self.starts[shard]:
                raise BadInput(f"{path}: changed since the run opened it; start again with --resume when it is whole")
            if header[SLOT_CRC32] and zlib.crc32(payload) != header[SLOT_CRC32]:
                raise BadInput(f"{path}: its checksum does not match, the file is damaged; rebuild it with data.py")
            self.maps[shard] = payload, now
        payload, checked = self.maps[shard]
        if now != checked:
            raise BadInput(f"{path}: changed while it was read; start again with --resume when it is whole")
        return payload


def shuffle_index(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """A random bijection of 0 .. n-1, evaluated at `index` without ever holding the permutation.

    A six-round Feistel network on the next even power of two, walked until the value falls below n.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(6, np.uint64)
    out = index.astype(np.uint64)
    walking = np.ones(len(out), dtype=bool)
    while walking.any():
        left, right = out[walking] >> half, out[walking] & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        out[walking] = (left << half) | right
        walking &= out >= n
    return out.astype(np.int64)


class LoaderDied(RuntimeError):
    """No batch will come any more."""


class Loader:
    """Shuffled training batches, filled by a background thread.

    The stream is cut into windows of seq_len + 1 tokens that start seq_len apart: every token is predicted once per
    epoch. Global batch i is a pure function of (files, seed, i, batch_size); a rank reads its slice of the rows. The
    whole state is (epoch, position), counted in windows.
    """

    def __init__(
        self,
        stream: TokenStream,
        batch_size: int,
        seq_len: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.windows = (len(stream) - 1) // seq_len
        if self.windows < 1:
            raise BadInput(f"{stream.paths[0].parent}: {len(stream):,} tokens are too few for --seq-len {seq_len}")
        self.stream, self.batch_size, self.seq_len, self.seed = stream, batch_size, seq_len, seed
        self.rank, self.world_size, self.pin_memory, self.say = rank, world_size, pin_memory, say
        self.consumed, self.said_wrap = 0, False
        self._queue: Queue = Queue(maxsize=2)
        self._stop, self._thread = Event(), None

    def batch(self, i: int) -> np.ndarray:
        """This rank's rows of global batch i, int32 (batch_size / world_size, seq_len + 1)."""
        return self._rows(i * self.batch_size)

    def _rows(self, first: int) -> np.ndarray:
        rows = self.batch_size // self.world_size
        counters = first + self.rank * rows + np.arange(rows)
        epochs, positions = np.divmod(counters, self.windows)
        windows = np.empty(rows, dtype=np.int64)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            windows[now] = shuffle_index(positions[now], self.windows, self.seed, int(epoch))
        return np.stack([self.stream.read(int(w) * self.seq_len, self.seq_len + 1) for w in windows])

    def __next__(self):
        """The next batch as a CPU tensor, int32 (rows, seq_len + 1), pinned if asked for."""
        if self._thread is None:
            self._stop.clear()
            self._thread = Thread(target=self._fill, args=(self.consumed,), daemon=True, name="loader")
            self._thread.start()
        while True:
            try:
                item = self._queue.get(timeout=1.0)
                break
            except Empty:
                if not self._thread.is_alive():
                    raise LoaderDied("the data thread died without a word") from None
        if isinstance(item, BaseException):
            raise item
        self.consumed += self.batch_size
        if self.consumed > self.windows and not self.said_wrap:
            self.said_wrap = True
            self.say(f"data: all {self.windows * self.seq_len:,} training tokens were seen once; going round again")
        return item

    def _fill(self, first: int) -> None:
        import torch

        while not self._stop.is_set():
            try:
                item = torch.from_numpy(self._rows(first))
                item = item.pin_memory() if self.pin_memory else item
            except Exception as error:  # handed to the consumer, who raises it
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.2)
                    break
                except Full:
                    continue
            if isinstance(item, Exception):
                return
            first += self.batch_size

    def close(self) -> None:
        """Stop the thread; the next `next()` starts it again from the consumed position."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread, self._queue = None, Queue(maxsize=2)

    def state_dict(self) -> dict[str, int]:
        epoch, position = divmod(self.consumed, self.windows)
        return {"epoch": epoch, "position": position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.close()
        self.consumed = state["epoch"] * self.windows + state["position"]
        self.said_wrap = self.consumed > self.windows


def validation_batches(stream: TokenStream, tokens: int, seq_len: int, rows: int) -> Iterator[np.ndarray]:
    """The first `tokens` tokens of the stream in order, int32 (<= rows, seq_len + 1); the same for every run."""
    windows = min(tokens, len(stream) - 1) // seq_len
    for first in range(0, windows, rows):
        last = min(first + rows, windows)
        yield np.stack([stream.read(w * seq_len, seq_len + 1) for w in range(first, last)])


@dataclass(kw_only=True)
class Build:
    out: Path
    """Folder to create for the shards."""
    vocab_size: int = 49_152
    """Entries of the tokenizer to train, 257 to 65,536; 4096 suits the nano model."""
    tokenizer: str | None = None
    """A tokenizer.json or a hub name to use instead of training one."""
    max_tokens: Count | None = None
    """Stop after this many tokens, both splits and end-of-text ids included."""
    val_fraction: float = 0.02
    """Share of the documents that goes to validation, by the hash of their text."""


@dataclass(kw_only=True)
class Embedded(Build):
    """The Python sources on this machine: real text without a network."""

    scope: Literal["stdlib", "all"] = "stdlib"
    """The standard library, or site-packages too."""

    def documents(self) -> Iterator[str]:
        return embedded_documents(self.scope)

    def source(self) -> str:
        return f"embedded {self.scope} of Python {sys.version.split()[0]}"


@dataclass(kw_only=True)
class Text(Build):
    """Local .txt and .jsonl (also .gz, .zst) and .parquet files, or folders of them."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Files or folders; a row, or a 64 KiB piece of a .txt, is a document."""
    text_column: str = "text"
    """Column of .jsonl and .parquet that holds the text."""

    def documents(self) -> Iterator[str]:
        return text_documents(text_files(self.paths), self.text_column)

    def source(self) -> str:
        return "text " + " ".join(map(str, self.paths))


@dataclass(kw_only=True)
class Hub(Build):
    """A Hugging Face dataset, streamed."""

    name: tyro.conf.Positional[str]
    """Dataset name on the hub, or a local folder that `datasets` understands."""
    config: str | None = None
    """Configuration of the dataset."""
    split: str = "train"
    """Split of the dataset."""
    text_column: str = "text"
    """Column that holds the text."""

    def documents(self) -> Iterator[str]:
        return hub_documents(self.name, self.config, self.split, self.text_column)

    def source(self) -> str:
        return " ".join(filter(None, ("hf", self.name, self.config, self.split)))


Command = (
    Annotated[Embedded, tyro.conf.subcommand("embedded")]
    | Annotated[Text, tyro.conf.subcommand("text")]
    | Annotated[Hub, tyro.conf.subcommand("hf")]
)


@exit_with_a_sentence
def main() -> None:
    build = tyro.cli(Command, description=__doc__, config=(tyro.conf.ConsolidateSubcommandArgs,))
    if not 257 <= build.vocab_size <= MAX_VOCAB_SIZE:
        raise BadInput(f"--vocab-size {build.vocab_size}: must be 257 to {MAX_VOCAB_SIZE:,}; a token is a uint16")
    if build.max_tokens is not None and build.max_tokens < 1:
        raise BadInput(f"--max-tokens {build.max_tokens}: must be positive")
    if not 0 < build.val_fraction < 1:
        raise BadInput(f"--val-fraction {build.val_fraction}: must lie between 0 and 1")
    if isinstance(build, Text) and not build.paths:
        raise BadInput("text: name at least one file or folder")
    meta = build_shards(
        build.documents,
        build.out,
        source=build.source(),
        tokenizer=build.tokenizer,
        vocab_size=build.vocab_size,
        max_tokens=build.max_tokens,
        val_fraction=build.val_fraction,
    )
    documents = meta["documents"]
    print(
        f"{build.out}: {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens, vocabulary "
        f"{meta['vocab_size']:,}, from {documents['train']:,} + {documents['val']:,} documents "
        f"({documents['duplicates']:,} duplicates left out), fingerprint {meta['fingerprint']}"
    )


if __name__ == "__main__":
    sys.exit(main())
