"""uint16 shards -> batches: a token stream, cut into windows, shuffled, and read ahead by a thread.

    loader = Loader(TokenStream(open_shards(folder), "train"), batch_size=8, seq_len=2048, seed=0); next(loader)
    python data.py embedded --out shards/mine          # commands that build and inspect shards, in corpus/

Global batch i is a pure function of (files, seed, i, batch size), the same for every world size; the loader's state is
two integers.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Literal

import numpy as np

from corpus.shards import CHECKED_AT_ONCE_BYTES, HEADER_BYTES, SLOT_CRC32, Shards, check_payload, read_header
from engine.cli import BadInput, RunFailed

Packing = Literal["stream", "bos-aligned"]
BATCHES_AHEAD = 2
CHUNK_TOKENS = 2**21  # searched for documents at a time


class TokenStream:
    """One split's shards as one sequence of tokens, mapped into memory.

    Each shard's checksum is checked at the first read from it: at once if it is small, else by a background thread.
    """

    def __init__(self, shards: Shards, split: str) -> None:
        self.paths, self.vocab_size, self.eot_id = shards.files[split], shards.vocab_size, shards.eot_id
        self.starts = np.concatenate(([0], np.cumsum(shards.counts[split])))  # of each shard in the stream, and the end
        self.maps: dict[int, tuple[np.ndarray, tuple[int, int, int]]] = {}
        self.damaged: BadInput | None = None
        self._to_check: Queue[tuple[Path, int]] = Queue()
        self._checker: Thread | None = None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count, across shard borders, as int32."""
        out = np.empty(count, dtype=np.int32)
        shard, filled = int(np.searchsorted(self.starts, start, side="right")) - 1, 0
        while filled < count:
            offset = start + filled - self.starts[shard]
            part = self.payload(shard)[offset : offset + count - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1
        if out.max(initial=0) >= self.vocab_size:
            shard = int(np.searchsorted(self.starts, start + int(out.argmax()), side="right")) - 1
            raise BadInput(f"{self.paths[shard]}: token id {out.max()} in a vocabulary of {self.vocab_size}")
        return out

    def payload(self, shard: int) -> np.ndarray:
        """A shard's tokens; BadInput if the file is damaged or has changed since it was opened: reading the lost part
        of a mapped file kills the process."""
        if self.damaged is not None:
            raise self.damaged
        path = self.paths[shard]
        try:
            found = path.stat()
            now = found.st_size, found.st_mtime_ns, found.st_ino
        except OSError as error:
            raise BadInput(f"{path}: vanished while the run read it ({error.strerror})") from None
        if shard not in self.maps:
            header, payload = read_header(path), np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)
            if len(payload) != self.starts[shard + 1] - self.starts[shard]:
                raise BadInput(f"{path}: changed since the run opened it; restore it and continue with --resume")
            self.maps[shard] = payload, now
            if header[SLOT_CRC32]:
                self._check(path, int(header[SLOT_CRC32]), payload.nbytes)
        payload, opened = self.maps[shard]
        if now != opened:
            raise BadInput(f"{path}: changed while the run read it; restore it and continue with --resume")
        return payload

    def _check(self, path: Path, crc32: int, size: int) -> None:
        if size <= CHECKED_AT_ONCE_BYTES:
            check_payload(path, crc32)
            return
        self._to_check.put((path, crc32))
        if self._checker is None:
            self._checker = Thread(target=self._check_all, daemon=True, name="checksums")
            self._checker.start()

    def _check_all(self) -> None:
        while True:
            try:
                check_payload(*self._to_check.get())
            except BadInput as damaged:
                self.damaged = damaged
            finally:
                self._to_check.task_done()

    def wait_until_checked(self) -> None:
        """Return when every shard read so far has been checked; BadInput if one is damaged."""
        self._to_check.join()
        if self.damaged is not None:
            raise self.damaged


def document_starts(stream: TokenStream, eot_id: int) -> np.ndarray:
    """Positions of the documents' first tokens in a stream, int64; reads every token once."""
    found = [np.empty(0, np.int64)]
    for shard, first in enumerate(stream.starts[:-1]):
        for at in range(0, int(stream.starts[shard + 1] - first), CHUNK_TOKENS):
            chunk = stream.payload(shard)[at : at + CHUNK_TOKENS]
            found.append(np.flatnonzero(chunk == eot_id) + (int(first) + at))
    return np.concatenate(found)


def aligned_windows(starts: np.ndarray, tokens: int, seq_len: int) -> np.ndarray:
    """Starts of windows that each begin at a document and do not overlap: the next window begins at the first document
    that starts at or after the end of the last, so the rest of a document that was cut is not used."""
    following = np.searchsorted(starts, starts + seq_len)
    chosen, document = np.zeros(len(starts), bool), 0
    while document < len(starts) and starts[document] + seq_len < tokens:
        chosen[document] = True
        document = following[document]
    return starts[chosen]


def shuffle_index(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """A random permutation of 0 .. n-1, evaluated at `index` without storing the permutation.

    A six-round Feistel network permutes 0 .. 4^h - 1, the least such range that holds n; a value >= n is permuted again
    until it is below n (cycle walking).
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(6, np.uint64)
    out = index.astype(np.uint64)
    walking = np.ones(len(out), dtype=bool)
    while walking.any():
        left, right = out[walking] >> half, out[walking] & mask
        for key in keys:  # a round XORs the left half with a hash of right half and key, then swaps the halves
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        out[walking] = (left << half) | right
        walking &= out >= n
    return out.astype(np.int64)


class LoaderDied(RunFailed):
    """The data thread ended without a batch."""


class Loader:
    """Shuffled training batches, read ahead by a background thread.

    A window is seq_len + 1 tokens. With `packing` "stream" windows start seq_len apart, so each token is predicted once
    per epoch; with "bos-aligned" each starts at a document, and `waste` is the share of tokens that this leaves out. A
    rank reads its slice of the rows. The state is (epoch, position), in windows.
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
        packing: Packing = "stream",
        pin_memory: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        folder, self.starts = stream.paths[0].parent, None
        self.windows = (len(stream) - 1) // seq_len
        if packing == "bos-aligned":
            if stream.eot_id is None:
                raise BadInput(f"--packing bos-aligned: {folder} does not name the token that begins a document")
            self.starts = aligned_windows(document_starts(stream, stream.eot_id), len(stream), seq_len)
            self.windows = len(self.starts)
        if self.windows < 1:
            what = "tokens are" if self.starts is None else "tokens with so few documents are"
            raise BadInput(f"{folder}: {len(stream):,} {what} too few for --seq-len {seq_len}")
        self.waste = 1 - self.windows * seq_len / (len(stream) - 1)
        self.stream, self.batch_size, self.seq_len, self.seed = stream, batch_size, seq_len, seed
        self.rank, self.world_size, self.pin_memory, self.say = rank, world_size, pin_memory, say
        self.consumed, self.announced_epoch = 0, False  # windows given out by all ranks
        self._queue: Queue = Queue(maxsize=BATCHES_AHEAD)
        self._stop, self._thread = Event(), None

    def batch(self, i: int) -> np.ndarray:
        """This rank's rows of global batch i, int32 (batch_size / world_size, seq_len + 1)."""
        return self._rows(i * self.batch_size)

    def _rows(self, first: int) -> np.ndarray:
        """This rank's rows of the global batch that begins at window number `first`, counted over all epochs."""
        rows = self.batch_size // self.world_size
        counters = first + self.rank * rows + np.arange(rows)
        epochs, positions = np.divmod(counters, self.windows)
        windows = np.empty(rows, dtype=np.int64)
        for epoch in np.unique(epochs):  # two, if the batch crosses the end of one
            now = epochs == epoch
            windows[now] = shuffle_index(positions[now], self.windows, self.seed, int(epoch))
        starts = windows * self.seq_len if self.starts is None else self.starts[windows]
        return np.stack([self.stream.read(int(start), self.seq_len + 1) for start in starts])

    def __next__(self):
        """The next batch as a CPU tensor, int32 (rows, seq_len + 1), in pinned memory with `pin_memory`."""
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
                    raise LoaderDied("the data thread stopped unexpectedly") from None
        if isinstance(item, BaseException):
            raise item
        self.consumed += self.batch_size
        if self.consumed > self.windows and not self.announced_epoch:
            self.announced_epoch = True
            tokens = self.windows * self.seq_len
            self.say(f"data: all {tokens:,} training tokens were seen once; starting another epoch")
        return item

    def _fill(self, first: int) -> None:
        import torch

        while not self._stop.is_set():
            try:
                item = torch.from_numpy(self._rows(first))
                item = item.pin_memory() if self.pin_memory else item
            except Exception as error:  # raised by __next__
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
            self._thread, self._queue = None, Queue(maxsize=BATCHES_AHEAD)

    def state_dict(self) -> dict[str, int]:
        epoch, position = divmod(self.consumed, self.windows)
        return {"epoch": epoch, "position": position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.close()
        self.consumed = state["epoch"] * self.windows + state["position"]
        self.announced_epoch = self.consumed > self.windows


def validation_batches(stream: TokenStream, tokens: int, seq_len: int, rows: int) -> Iterator[np.ndarray]:
    """The stream's first `tokens` tokens in order, as int32 (<= rows, seq_len + 1); the same for every run."""
    windows = min(tokens, len(stream) - 1) // seq_len
    for first in range(0, windows, rows):
        last = min(first + rows, windows)
        yield np.stack([stream.read(w * seq_len, seq_len + 1) for w in range(first, last)])


def target_counts(stream: TokenStream, tokens: int, seq_len: int) -> np.ndarray:
    """How often each token id is what `validation_batches` ask to predict, int64 (vocab,)."""
    counts = np.zeros(stream.vocab_size, np.int64)
    for batch in validation_batches(stream, tokens, seq_len, max(1, CHUNK_TOKENS // seq_len)):
        counts += np.bincount(batch[:, 1:].ravel(), minlength=len(counts))
    return counts


if __name__ == "__main__":
    from corpus.commands import main  # imported here: a machine that only trains needs neither tokenizers nor datasets

    sys.exit(main())
