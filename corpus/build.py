"""Tokenise documents into a folder of shards: on every core, in order, and resumable to the byte.

    build_shards([Part("mine", TextFiles(files))], out, source="text mine", vocab_size=4096)

A thread per source reads and hashes ahead, two more tokenise (the tokenizer itself uses all cores), this one mixes,
deduplicates and writes. Memory: a few batches, and 8 to 16 bytes per document. python data.py is the command.
"""

import contextlib
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Full, Queue
from threading import Event, Thread
from typing import Any

import numpy as np

from corpus.documents import (
    EOT_NAMES,
    TRAIN_CHARS,
    SeenHashes,
    content_hash,
    is_validation,
    load_tokenizer,
    train_tokenizer,
    training_sample,
)
from corpus.shards import MAX_VOCAB_SIZE, META, SPLITS, TOKENIZER, ShardWriter, digest
from corpus.sources import Document, Repeated, Source
from engine.cli import BadInput, make_folder
from engine.files import load_json, write_json, write_whole, writing

RECORD, HASHES = "build.json", "hashes.bin"  # of an unfinished build: how far it is, which documents it has seen
BATCH_DOCUMENTS, BATCH_CHARS = 16_384, 2_000_000  # per call of the tokenizer: enough for every core
BATCHES_AHEAD, ENCODERS = 2, 2  # one turns token ids into arrays while the other has the cores
SAVE_SECONDS = 5.0  # of work that an interruption may cost


@dataclass(frozen=True)
class Part:
    """A source, what to call it, and the share of the tokens that come from it."""

    name: str
    source: Source
    share: float = 1.0


def build_shards(
    documents: Callable[[], Iterable[Document]] | Sequence[Part],
    out: Path,
    *,
    source: str,
    tokenizer: str | None = None,
    vocab_size: int = 49_152,
    max_tokens: int | None = None,
    val_fraction: float = 0.02,
    identity: str = "",
) -> dict[str, Any]:
    """Tokenise documents into shards, tokenizer.json and meta.json under `out`; returns meta.

    `documents` are the parts of a mix, or a function that gives the same ones at each call. A tokenizer is trained on
    them unless one is named. `max_tokens` counts both splits, end-of-text included. Works in `out`.partial and renames
    at the end; an interrupted build goes on there when called again with the same arguments and `identity` of the
    input. BadInput for what the user can mend, CannotWrite for a full disk.
    """
    parts = [Part(source, Repeated(documents))] if callable(documents) else documents
    if out.exists():
        raise BadInput(f"{out}: exists already; delete it or choose another --out")
    partial = out.with_name(out.name + ".partial")
    asked = {"source": source, "tokenizer": tokenizer, "vocab_size": vocab_size, "max_tokens": max_tokens}
    asked |= {"val_fraction": val_fraction, "input": digest([identity, [[p.name, p.share] for p in parts]])}
    make_folder(partial, exist_ok=True)
    with _locked(partial):
        record = _unfinished(partial, asked)
        build = None
        try:
            if record is None:
                encoder = _new_tokenizer(parts, tokenizer, vocab_size, val_fraction)
                write_whole(partial / TOKENIZER, lambda file: file.write(encoder.to_str(pretty=True)), mode="w")
                record = {"asked": asked, "saved": None}
                write_json(partial / RECORD, record)
            build = _Build(partial, parts, record)
            build.write(f"building {out}")
            meta = build.finish()
        except BaseException:
            if not (record and record["saved"]) and not (build and build.saved_tokens):
                shutil.rmtree(partial, ignore_errors=True)  # nothing in it is worth going on from
            raise
        finally:
            if build is not None:
                build.close()
        with writing(out):
            partial.rename(out)
        for name in (RECORD, HASHES):
            (out / name).unlink(missing_ok=True)
    return meta


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """BadInput where another build works in the folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise BadInput(f"{folder}: another build is at work there") from None
    finally:
        os.close(descriptor)


def _unfinished(partial: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The record of an unfinished build, None where there is none; BadInput where it is of another one."""
    if not (partial / RECORD).exists():
        for path in partial.iterdir():
            if path.suffix not in (".bin", ".tmp") and path.name != TOKENIZER:
                raise BadInput(f"{partial}: holds {path.name}, which no build made; choose another --out")
        for path in partial.iterdir():
            path.unlink()
        return None
    record = load_json(partial / RECORD)
    theirs = record.get("asked")
    if not isinstance(theirs, dict) or "saved" not in record:
        raise BadInput(f"{partial / RECORD}: not the record of an unfinished build; delete {partial}")
    changed = [f"{key} was {theirs.get(key)}, is {asked[key]}" for key in asked if theirs.get(key) != asked[key]]
    if changed:
        said = ", ".join(changed)
        raise BadInput(f"{partial}: an unfinished build of something else ({said}); delete it or choose another --out")
    return record


def _new_tokenizer(parts: Sequence[Part], name: str | None, vocab_size: int, val_fraction: float):
    """The named tokenizer, or one trained on each part's share; BadInput where shards cannot hold its tokens."""
    if name is not None:
        encoder = load_tokenizer(name)
    else:
        whole = sum(part.share for part in parts)
        samples = (
            training_sample(iter(part.source.open()), val_fraction, round(TRAIN_CHARS * part.share / whole))
            for part in parts
        )
        encoder = train_tokenizer((text for sample in samples for text in sample), vocab_size)
    size, eot_id = _vocabulary(encoder)
    if size > MAX_VOCAB_SIZE:
        raise BadInput(f"--tokenizer {name}: {size:,} entries, but a uint16 shard holds {MAX_VOCAB_SIZE:,}")
    if eot_id is None:
        raise BadInput(f"--tokenizer {name}: has none of {', '.join(EOT_NAMES)} to mark the end of a document")
    return encoder


def _vocabulary(encoder: Any) -> tuple[int, int | None]:
    """How many ids a tokenizer uses, and which one ends a text."""
    vocabulary = encoder.get_vocab(with_added_tokens=True)
    return max(vocabulary.values()) + 1, next((vocabulary[name] for name in EOT_NAMES if name in vocabulary), None)


class _Encode:
    """Documents to arrays of uint16, each with the end-of-text id before it."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self.vocab_size, self.eot_id = _vocabulary(encoder)

    def __call__(self, documents: list[Document]) -> list[np.ndarray]:
        if isinstance(documents[0], str):
            encodings = self.encoder.encode_batch_fast(documents, add_special_tokens=False)
            return [self.after_eot(encoding.ids) for encoding in encodings]
        return [self.after_eot(self.own_ids(ids)) for ids in documents]

    def after_eot(self, ids: list[int] | np.ndarray) -> np.ndarray:
        tokens = np.empty(len(ids) + 1, dtype=np.uint16)
        tokens[0], tokens[1:] = self.eot_id, ids
        return tokens

    def own_ids(self, ids: np.ndarray) -> np.ndarray:
        """A pre-tokenised document without the end-of-text ids at its ends."""
        if ids.max(initial=0) >= self.vocab_size:
            raise BadInput(
                f"token id {ids.max()} in a vocabulary of {self.vocab_size:,}; is --tokenizer the dataset's?"
            )
        inside = np.flatnonzero(ids != self.eot_id)
        return ids[inside[0] : inside[-1] + 1] if len(inside) else ids[:0]


class _Feed:
    """One part's documents, read, hashed and tokenised ahead by a thread and the pool."""

    def __init__(self, part: Part, encode: _Encode, pool: ThreadPoolExecutor, state: dict[str, Any]) -> None:
        self.part, self.encode, self.pool = part, encode, pool
        self.begin, self.used = state["begin"], state["used"]  # of the present batch: where it begins, what is done
        self.tokens, self.documents = state["tokens"], state["documents"]
        self.hashes: np.ndarray = np.empty(0, np.uint64)
        self.known, self.encoded = np.empty(0, bool), []
        self.fetched = False
        self._queue: Queue = Queue(BATCHES_AHEAD)
        self._stop = Event()
        self._thread = Thread(target=self._read, daemon=True, name=f"reading {part.name}")
        self._thread.start()

    def state(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("begin", "used", "tokens", "documents")}

    def fetch(self) -> bool:
        """Take the next batch; False where there is none."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        if item is None:
            return False
        self.used = 0 if self.fetched else self.used  # the first batch of a resumed build is begun already
        self.fetched = True
        self.begin, self.hashes, future = item
        self.encoded = future.result()
        return True

    def _read(self) -> None:
        try:
            reader = self.part.source.open(self.begin)
            begin = self.begin
            for batch in batches(iter(reader)):
                hashes = np.array([content_hash(document) for document in batch], dtype=np.uint64)
                future: Future = self.pool.submit(self.encode, batch)
                if not self._put((begin, hashes, future)):
                    return
                begin = reader.position()
            self._put(None)
        except BaseException as error:  # raised by `fetch`
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except Full:
                continue
        return False

    def stop(self) -> None:
        self._stop.set()


def batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in lists that suit the tokenizer."""
    batch, chars = [], 0
    for document in documents:
        batch.append(document)
        chars += len(document)
        if chars > BATCH_CHARS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


class _Build:
    """Writes shards into `folder` from the feeds; all its state can be saved between any two documents."""

    def __init__(self, folder: Path, parts: Sequence[Part], record: dict[str, Any]) -> None:
        self.folder, self.asked = folder, record["asked"]
        encode = _Encode(load_tokenizer(str(folder / TOKENIZER)))
        self.vocab_size, self.eot_id = encode.vocab_size, encode.eot_id
        self.writers = {split: ShardWriter(folder, split, self.vocab_size, self.eot_id) for split in SPLITS}
        self.counts = {"train": 0, "val": 0, "duplicates": 0}
        self.seen, self.recent = SeenHashes(), set()  # all hashes of earlier batches; those since
        self.unsaved, self.saved_hashes, self.saved_tokens = [], 0, 0
        feeds = [{"begin": None, "used": 0, "tokens": 0, "documents": 0} for _ in parts]
        if record["saved"] is not None:
            try:
                feeds = self._resume(record["saved"])
            except BadInput:
                raise
            except (KeyError, TypeError, ValueError, AttributeError):
                raise BadInput(f"{folder / RECORD}: damaged; delete {folder}") from None
        self.pool = ThreadPoolExecutor(ENCODERS, thread_name_prefix="encoding")
        self.feeds = [_Feed(part, encode, self.pool, state) for part, state in zip(parts, feeds, strict=True)]

    def _resume(self, saved: dict[str, Any]) -> list[dict[str, Any]]:
        for split, writer in self.writers.items():
            writer.resume(saved["writers"][split])
        self.counts = dict(saved["counts"])
        path, count = self.folder / HASHES, saved["hashes"]
        hashes = np.fromfile(path, np.uint64, count) if path.exists() else np.empty(0, np.uint64)
        if len(hashes) < count:
            raise ValueError("hashes are missing")
        self.seen.add(hashes)
        self.saved_hashes = count
        with writing(path), path.open("ab") as file:
            file.truncate(8 * count)
        self.saved_tokens = self.tokens
        return saved["parts"]

    @property
    def tokens(self) -> int:
        return sum(writer.tokens for writer in self.writers.values())

    def write(self, description: str) -> None:
        """Documents into shards until a part is used up or the tokens are enough; BadInput says what is kept."""
        try:
            self._write(description)
        except BadInput as error:
            if not self.saved_tokens:
                raise
            kept = f"{self.saved_tokens:,} tokens are kept in {self.folder}; the same command on the same input goes on"
            raise BadInput(f"{error}; {kept}") from None

    def _write(self, description: str) -> None:
        from tqdm import tqdm

        most, last_save = self.asked["max_tokens"], time.monotonic()
        left = (sys.maxsize if most is None else most) - self.tokens
        fraction = self.asked["val_fraction"]
        with tqdm(total=most, initial=self.tokens, unit="tok", unit_scale=True, desc=description, disable=None) as bar:
            while left:
                feed = min(self.feeds, key=lambda feed: feed.tokens / feed.part.share)  # the one most behind
                if not self._has_document(feed):
                    if len(self.feeds) > 1:
                        said = f"{feed.part.name}: used up after {feed.tokens:,} tokens, so the mix ends"
                        bar.write(said, file=sys.stderr)
                    return
                now = time.monotonic()
                if now - last_save > SAVE_SECONDS:
                    self._save()
                    last_save = time.monotonic()
                place, feed.used = feed.used, feed.used + 1
                content = int(feed.hashes[place])
                if feed.known[place] or content in self.recent:
                    self.counts["duplicates"] += 1
                    continue
                self.recent.add(content)
                tokens, split = feed.encoded[place][:left], "val" if is_validation(content, fraction) else "train"
                self.writers[split].write(tokens)
                self.counts[split] += 1
                feed.documents += 1
                feed.tokens += len(tokens)
                left -= len(tokens)
                bar.update(len(tokens))

    def _has_document(self, feed: _Feed) -> bool:
        """Fetch what is needed for the next document; False where the part is used up."""
        while feed.used == len(feed.hashes) or not feed.fetched:
            if not feed.fetch():
                return False
            self._note_recent()
        return True

    def _note_recent(self) -> None:
        """Move the newest hashes where whole batches are looked up."""
        recent = np.fromiter(self.recent, np.uint64, len(self.recent))
        self.seen.add(recent)
        self.unsaved.append(recent)
        self.recent = set()
        for feed in self.feeds:
            feed.known = self.seen.known(feed.hashes)

    def _save(self) -> None:
        """Force everything up to here to disk, then say so: an interrupted build goes on from the last such moment."""
        writers = {split: writer.save() for split, writer in self.writers.items()}
        self._note_recent()
        path = self.folder / HASHES
        with writing(path), path.open("ab") as file:
            file.write(np.concatenate(self.unsaved).tobytes())
            file.flush()
            os.fsync(file.fileno())
        self.saved_hashes += sum(map(len, self.unsaved))
        self.unsaved = []
        saved = {"writers": writers, "counts": self.counts, "hashes": self.saved_hashes}
        saved["parts"] = [feed.state() for feed in self.feeds]
        write_json(self.folder / RECORD, {"asked": self.asked, "saved": saved})
        self.saved_tokens = self.tokens

    def finish(self) -> dict[str, Any]:
        """Close the shards and describe them."""
        for split, writer in self.writers.items():
            writer.close()
            if not writer.tokens:
                source = self.asked["source"]
                raise BadInput(f"{source}: no document fell into {split}; give more text or another --val-fraction")
        sha256 = self.writers["train"].sha256 | self.writers["val"].sha256
        meta = {
            "tokenizer": self.asked["tokenizer"] or f"byte-level BPE trained on {self.asked['source']}",
            "vocab_size": self.vocab_size,
            "eot_id": self.eot_id,
            "source": self.asked["source"],
            "train_tokens": self.writers["train"].tokens,
            "val_tokens": self.writers["val"].tokens,
            "documents": self.counts,
            "split": {"val_fraction": self.asked["val_fraction"], "rule": "blake2b-64 of the document's text"},
            "sha256": sha256,
        }
        if len(self.feeds) > 1:
            meta["parts"] = {f.part.name: {"tokens": f.tokens, "documents": f.documents} for f in self.feeds}
        meta["fingerprint"] = digest([self.vocab_size, self.eot_id, sorted(sha256.items())])
        write_json(self.folder / META, meta)
        return meta

    def close(self) -> None:
        for feed in self.feeds:
            feed.stop()
        self.pool.shutdown(cancel_futures=True)
        for writer in self.writers.values():
            writer.abandon()
