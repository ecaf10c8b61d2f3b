"""Tokenise documents into a folder of shards: on every core, in order, and resumable to the byte.

    build_shards([MixPart("mine", TextFiles(files))], out, source="text mine", vocab_size=4096)

One thread per source reads and hashes ahead, two tokenise (the tokenizer itself uses all cores), and the main thread
mixes, deduplicates and writes. Memory: a few batches, and 8 to 16 bytes per document. The command is python data.py.
"""

import contextlib
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
    vocabulary,
)
from corpus.shards import MAX_VOCAB_SIZE, META, SPLITS, TOKENIZER, ShardWriter, digest
from corpus.sources import Document, Repeated, Source
from engine.cli import BadInput, make_folder
from engine.files import load_json, lock, write_json, write_whole, writing

RECORD, HASHES = "build.json", "hashes.bin"  # of an unfinished build: its state, and the hashes of its documents
FEED_STATE = ("begin", "used", "tokens", "documents", "skipped")
POSITIONS = 2  # version of `begin`, the sources' positions
BATCH_DOCUMENTS, BATCH_CHARS = 16_384, 2_000_000  # per call of the tokenizer: enough for every core
BATCHES_AHEAD, ENCODERS = 2, 2  # one encoder turns ids into arrays while the other uses the cores
SAVE_SECONDS = 5.0  # the most work that an interruption loses


@dataclass(frozen=True)
class MixPart:
    """A source in a mix: its name, and its share of the tokens."""

    name: str
    source: Source
    share: float = 1.0


def build_shards(
    documents: Callable[[], Iterable[Document]] | Sequence[MixPart],
    out: Path,
    *,
    source: str,
    tokenizer: str | None = None,
    vocab_size: int = 49_152,
    max_tokens: int | None = None,
    max_documents: int | None = None,
    val_fraction: float = 0.02,
    identity: str = "",
) -> dict[str, Any]:
    """Tokenise documents into shards, tokenizer.json and meta.json under `out`; returns meta.

    `documents` are the parts of a mix, or a function that gives the same documents at each call. A tokenizer is trained
    on them unless one is named. `max_tokens` and `max_documents` count both splits, tokens with end-of-text. The build
    works in `out`.partial and renames it at the end; after an interruption, a call with the same arguments and the same
    `identity` of the input continues there. BadInput for what the user can fix, CannotWrite for a full disk.
    """
    parts = [MixPart(source, Repeated(documents))] if callable(documents) else documents
    if out.exists():
        raise BadInput(f"{out}: already exists; delete it or choose another --out")
    partial = out.with_name(out.name + ".partial")
    request = {"source": source, "tokenizer": tokenizer, "vocab_size": vocab_size, "max_tokens": max_tokens}
    request |= {} if max_documents is None else {"max_documents": max_documents}
    request |= {"val_fraction": val_fraction, "input": digest([identity, [[p.name, p.share] for p in parts]])}
    make_folder(partial, exist_ok=True)
    with _locked(partial):
        record = _unfinished(partial, request)
        build = None
        try:
            if record is None:
                encoder = _new_tokenizer(parts, tokenizer, vocab_size, val_fraction)
                write_whole(partial / TOKENIZER, lambda file: file.write(encoder.to_str(pretty=True)), mode="w")
                record = {"asked": request, "positions": POSITIONS, "saved": None}
                write_json(partial / RECORD, record)
            build = _Build(partial, parts, record)
            build.write(f"building {out}")
            meta = build.finish()
        except BaseException:
            if not (record and record["saved"]) and not (build and build.saved_tokens):
                shutil.rmtree(partial, ignore_errors=True)  # nothing is saved that a later call could use
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
    """Hold a lock on the folder; BadInput if another build holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not lock(descriptor, folder):
            raise BadInput(f"{folder}: another build is running there")
        yield
    finally:
        os.close(descriptor)


def _unfinished(partial: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The record of an unfinished build, None if there is none; BadInput if another build left it."""
    if not (partial / RECORD).exists():
        for path in partial.iterdir():
            if path.suffix not in (".bin", ".tmp") and path.name != TOKENIZER:
                raise BadInput(f"{partial}: holds {path.name}, which no build made; choose another --out")
        for path in partial.iterdir():
            path.unlink()
        return None
    record = load_json(partial / RECORD)
    old = record.get("asked")
    if not isinstance(old, dict) or "saved" not in record:
        raise BadInput(f"{partial / RECORD}: not the record of an unfinished build; delete {partial}")
    if record.get("positions") != POSITIONS:
        raise BadInput(f"{partial}: an unfinished build of another version; delete it or choose another --out")
    changed = ", ".join(
        f"{key} was {old.get(key)}, is {request[key]}" for key in request if old.get(key) != request[key]
    )
    if changed:
        raise BadInput(
            f"{partial}: an unfinished build of something else ({changed}); delete it or choose another --out"
        )
    return record


def _new_tokenizer(parts: Sequence[MixPart], name: str | None, vocab_size: int, val_fraction: float):
    """The named tokenizer, or one trained on each part's share; BadInput if shards cannot hold its tokens."""
    if name is not None:
        encoder = load_tokenizer(name)
    else:
        whole = sum(part.share for part in parts)
        samples = (
            training_sample(iter(part.source.open()), val_fraction, round(TRAIN_CHARS * part.share / whole))
            for part in parts
        )
        encoder = train_tokenizer((text for sample in samples for text in sample), vocab_size)
    size, eot_id = vocabulary(encoder)
    if size > MAX_VOCAB_SIZE:
        raise BadInput(f"--tokenizer {name}: {size:,} entries, but a uint16 shard holds {MAX_VOCAB_SIZE:,}")
    if eot_id is None:
        raise BadInput(f"--tokenizer {name}: has none of {', '.join(EOT_NAMES)} to mark the end of a document")
    return encoder


class _Encode:
    """Turns documents into arrays of uint16, each with the end-of-text id in front."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self.vocab_size, self.eot_id = vocabulary(encoder)

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
            known = f"a vocabulary of {self.vocab_size:,}"
            raise BadInput(f"token id {ids.max()} in {known}; is --tokenizer the one that made the ids?")
        inside = np.flatnonzero(ids != self.eot_id)
        return ids[inside[0] : inside[-1] + 1] if len(inside) else ids[:0]


class _Feed:
    """One part's documents, read, hashed and tokenised ahead by a thread and the pool."""

    def __init__(self, part: MixPart, encode: _Encode, pool: ThreadPoolExecutor, state: dict[str, Any]) -> None:
        self.part, self.encode, self.pool = part, encode, pool
        self.begin, self.used = state["begin"], state["used"]  # current batch: its position, how many are written
        self.skipped = self.without_text = state["skipped"]  # rows without text: before the batch, to its end
        self.tokens, self.documents = state["tokens"], state["documents"]
        self.hashes: np.ndarray = np.empty(0, np.uint64)
        self.known, self.encoded = np.empty(0, bool), []
        self.fetched = False
        self._queue: Queue = Queue(BATCHES_AHEAD)
        self._stop = Event()
        self._thread = Thread(target=self._read, daemon=True, name=f"reading {part.name}")
        self._thread.start()

    def state(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in FEED_STATE}

    def fetch(self) -> bool:
        """Take the next batch; False if there is none."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        if isinstance(item, int):
            self.without_text = item
            return False
        self.used = 0 if self.fetched else self.used  # a resumed build has written some of its first batch
        self.fetched = True
        self.begin, self.hashes, future, without_text = item
        self.skipped, self.without_text = self.without_text, without_text
        self.encoded = future.result()
        return True

    def _read(self) -> None:
        try:
            reader = self.part.source.open(self.begin)
            begin, before = self.begin, self.skipped
            for batch in batches(iter(reader)):
                hashes = np.array([content_hash(document) for document in batch], dtype=np.uint64)
                future: Future = self.pool.submit(self.encode, batch)
                if not self._put((begin, hashes, future, before + reader.without_text)):
                    return
                begin = reader.position()
            self._put(before + reader.without_text)
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
    """Documents in lists of a size that suits the tokenizer."""
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
    """Writes shards into `folder` from the feeds; its state can be saved between any two documents."""

    def __init__(self, folder: Path, parts: Sequence[MixPart], record: dict[str, Any]) -> None:
        self.folder, self.request = folder, record["asked"]
        encode = _Encode(load_tokenizer(str(folder / TOKENIZER)))
        self.vocab_size, self.eot_id = encode.vocab_size, encode.eot_id
        self.writers = {split: ShardWriter(folder, split, self.vocab_size, self.eot_id) for split in SPLITS}
        self.counts = {"train": 0, "val": 0, "duplicates": 0}
        self.seen, self.recent = SeenHashes(), set()  # hashes of earlier batches; of the documents since
        self.unsaved, self.saved_hashes, self.saved_tokens = [], 0, 0
        feeds = [{"begin": None, "used": 0, "tokens": 0, "documents": 0, "skipped": 0} for _ in parts]
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
        return [{key: part[key] for key in FEED_STATE} for part in saved["parts"]]

    @property
    def tokens(self) -> int:
        return sum(writer.tokens for writer in self.writers.values())

    def write(self, description: str) -> None:
        """Write documents until a part is used up or a limit is reached; BadInput tells what is kept."""
        try:
            self._write(description)
        except BadInput as error:
            if not self.saved_tokens:
                raise
            kept = f"{self.saved_tokens:,} tokens are kept in {self.folder}"
            raise BadInput(f"{error}; {kept}; run the same command to continue") from None

    def _write(self, description: str) -> None:
        from tqdm import tqdm

        most, fraction, last_save = self.request["max_tokens"], self.request["val_fraction"], time.monotonic()
        left = (sys.maxsize if most is None else most) - self.tokens
        documents = self.request.get("max_documents", sys.maxsize)
        with tqdm(total=most, initial=self.tokens, unit="tok", unit_scale=True, desc=description, disable=None) as bar:
            while left and self.counts["train"] + self.counts["val"] < documents:
                feed = min(self.feeds, key=lambda feed: feed.tokens / feed.part.share)  # furthest behind its share
                if not self._has_document(feed):
                    if len(self.feeds) > 1:
                        end = f"{feed.part.name}: used up after {feed.tokens:,} tokens, so the mix ends"
                        bar.write(end, file=sys.stderr)
                    return
                if time.monotonic() - last_save > SAVE_SECONDS:
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
        """Fetch a batch if the feed needs one; False if the part is used up."""
        while feed.used == len(feed.hashes) or not feed.fetched:
            if not feed.fetch():
                return False
            self._note_recent()
        return True

    def _note_recent(self) -> None:
        """Move the recent hashes into `seen` and look up every feed's batch in it."""
        recent = np.fromiter(self.recent, np.uint64, len(self.recent))
        self.seen.add(recent)
        self.unsaved.append(recent)
        self.recent = set()
        for feed in self.feeds:
            feed.known = self.seen.known(feed.hashes)

    def _save(self) -> None:
        """Force everything so far to disk, then record it: an interrupted build continues from the last record."""
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
        write_json(self.folder / RECORD, {"asked": self.request, "positions": POSITIONS, "saved": saved})
        self.saved_tokens = self.tokens

    def finish(self) -> dict[str, Any]:
        """Close the shards and write meta.json."""
        without_text = sum(feed.without_text for feed in self.feeds)
        for split, writer in self.writers.items():
            writer.close()
            if not writer.tokens:
                advice = "give more text or another --val-fraction"
                if without_text:
                    advice = f"{without_text:,} rows had no text; {advice}"
                raise BadInput(f"{self.request['source']}: no document fell into {split}; {advice}")
        sha256 = self.writers["train"].sha256 | self.writers["val"].sha256
        meta = {
            "tokenizer": self.request["tokenizer"] or f"byte-level BPE trained on {self.request['source']}",
            "vocab_size": self.vocab_size,
            "eot_id": self.eot_id,
            "source": self.request["source"],
            "train_tokens": self.writers["train"].tokens,
            "val_tokens": self.writers["val"].tokens,
            "documents": self.counts,
            "split": {"val_fraction": self.request["val_fraction"], "rule": "blake2b-64 of the document's text"},
            "sha256": sha256,
        }
        if without_text:
            meta["rows_without_text"] = without_text
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
