"""Times the data path: shards built against tokenizers alone, batches per second, the first batch, memory.

    python -m bench.data --json FILE

Builder and tokenizer take turns on the same text and cores, and the builder's documents must be the tokenizer's. The
loader shuffles a billion tokens of sparse files in memory, timed after their checksums are verified.
"""

import json
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import tyro

from bench.harness import JsonFlag, interleaved, write_figures
from corpus import shards
from corpus.build import MixPart, batches, build_shards
from corpus.documents import load_tokenizer
from corpus.local_files import TextFiles
from corpus.shards import open_shards
from corpus.sources import embedded_documents
from data import Loader, TokenStream
from engine.cli import AT_LEAST_1, POSITIVE, BadInput, check_limits, exit_with_a_sentence

RATE_OF_A_4090 = 150_000  # tokens/s that training may need; the loader must be far above
GOALS = {
    "builder": 0.85,  # of what tokenizers.encode_batch alone reaches
    "loader": 50 * RATE_OF_A_4090,
    "first_batch": 1.0,  # seconds
    "loader_anonymous": 200,  # MB; mapped shards are the page cache's
}
VOCAB_SIZE = 4096


@dataclass(frozen=True)
class Arguments(JsonFlag):
    """Measure the data path."""

    megabytes: Annotated[float, POSITIVE] = 16
    """Of text for the builder."""
    repeats: Annotated[int, AT_LEAST_1] = 5
    """Turns that builder and tokenizer take."""
    shards: Annotated[int, AT_LEAST_1] = 10
    """Sparse shards of 10^8 tokens for the loader."""
    seconds: Annotated[float, POSITIVE] = 3
    """How long each loader runs."""


def texts_of(megabytes: float) -> list[str]:
    """Different Python sources; where there are too few, the same again under another first line."""
    texts: dict[str, None] = {}
    chars = 0
    while chars < 1e6 * megabytes:
        again = f"# {len(texts)}\n" if texts else ""
        for text in embedded_documents("stdlib"):
            chars += len(again + text) * (again + text not in texts)
            texts[again + text] = None
            if chars >= 1e6 * megabytes:
                break
    return list(texts)


def builder(folder: Path, megabytes: float, repeats: int) -> dict[str, Any]:
    """Seconds of builder and tokenizer by turn; BadInput where they disagree on the tokens."""
    texts = texts_of(megabytes)
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    parts = [MixPart("text", TextFiles([source]))]
    build_shards(lambda: iter(texts[:400]), folder / "first", source="bench", vocab_size=VOCAB_SIZE, val_fraction=0.1)
    tokenizer = str(folder / "first" / shards.TOKENIZER)
    encoder = load_tokenizer(tokenizer)
    counts: set[int] = set()

    def tokenize(encode: Callable[..., Any]) -> None:
        encoded = (encode(batch, add_special_tokens=False) for batch in batches(iter(texts)))  # all at once is slower
        counts.add(sum(len(encoding) + 1 for batch in encoded for encoding in batch))

    def build(turn: int) -> None:
        meta = build_shards(parts, folder / str(turn), source="bench", tokenizer=tokenizer, val_fraction=0.1)
        counts.add(meta["train_tokens"] + meta["val_tokens"])

    candidates = {
        "encode_batch": lambda turn: tokenize(encoder.encode_batch),
        "encode_batch_fast": lambda turn: tokenize(encoder.encode_batch_fast),
        "builder": build,
    }
    seconds = interleaved(candidates, torch.device("cpu"), repeats, warmup=0)
    if len(counts) > 1 or documents_in(folder / "0") != documents_by(encoder, texts):
        raise BadInput(f"builder and tokenizer differ ({counts} tokens): no time is reported")
    return {"tokens": counts.pop(), "seconds": seconds}


def documents_in(folder: Path) -> list[bytes]:
    """The documents of a folder of shards as token ids, sorted, without their end-of-text id."""
    opened, found = open_shards(folder), []
    for split in shards.SPLITS:
        stream = TokenStream(opened, split)
        tokens = stream.read(0, len(stream))
        starts = np.flatnonzero(tokens == opened.eot_id)
        found += [document[1:].tobytes() for document in np.split(tokens, starts[1:])]
    return sorted(found)


def documents_by(encoder: Any, texts: list[str]) -> list[bytes]:
    encodings = encoder.encode_batch_fast(texts, add_special_tokens=False)
    return sorted(np.array(encoding.ids, dtype=np.int32).tobytes() for encoding in encodings)


def sparse_shards(folder: Path, count: int) -> None:
    """`count` training shards of 10^8 zeros, which take no room, with headers and checksums, and a validation shard."""
    crc = 0
    for _ in range(200):
        crc = zlib.crc32(bytes(10**6), crc)
    for name, tokens, crc32 in (
        *((f"train_{i:06d}.bin", 10**8, crc) for i in range(count)),
        ("val_000000.bin", 10**6, zlib.crc32(bytes(2 * 10**6))),
    ):
        header = np.zeros(shards.HEADER_INTS, "<u4")
        header[:3] = shards.MAGIC, shards.VERSION, tokens
        header[[shards.SLOT_VOCAB_SIZE, shards.SLOT_EOT_ID, shards.SLOT_CRC32]] = 4096, 1, crc32
        with (folder / name).open("wb") as file:
            file.write(header.tobytes())
            file.truncate(shards.HEADER_BYTES + 2 * tokens)


def anonymous_mb() -> float | None:
    """Memory of this process without mapped files, None where the system does not tell them apart."""
    memory = psutil.Process().memory_info()
    return (memory.rss - memory.shared) / 1e6 if hasattr(memory, "shared") else None


def loader(folder: Path, seconds: float) -> dict[str, Any]:
    """First batch and rate of a shuffling loader, at the 88M model's batches and at nano's."""
    found: dict[str, Any] = {}
    before = anonymous_mb()
    for name, rows, seq_len in (("88m", 8, 2048), ("nano", 32, 256)):
        began = time.perf_counter()
        windows = Loader(TokenStream(open_shards(folder), "train"), rows, seq_len, seed=0)
        next(windows)
        found[f"first_batch_seconds_{name}"] = time.perf_counter() - began
        windows.stream.wait_until_checked()
        next(windows)
        began, tokens = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            tokens += rows * (next(windows).shape[1] - 1)
        found[f"tokens_per_second_{name}"] = tokens / (time.perf_counter() - began)
        after = anonymous_mb()
        windows.close()
    found["anonymous_mb"] = None if before is None else after - before
    return found


@exit_with_a_sentence
def main() -> None:
    a = tyro.cli(Arguments, description=__doc__)
    check_limits(a)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sparse").mkdir()
        sparse_shards(folder / "sparse", a.shards)
        read = loader(folder / "sparse", a.seconds)
        built = builder(folder, a.megabytes, a.repeats)
    rates = {name: [built["tokens"] / s for s in seconds] for name, seconds in built["seconds"].items()}
    for name, each in rates.items():
        median, low, high = statistics.median(each), min(each), max(each)
        print(f"{name:18} {median:12,.0f} tokens/s ({low:,.0f} to {high:,.0f})")
    ratios = [ours / peer for ours, peer in zip(rates["builder"], rates["encode_batch"], strict=True)]
    fast = [ours / peer for ours, peer in zip(rates["builder"], rates["encode_batch_fast"], strict=True)]
    figures = {
        "builder_ratio": statistics.median(ratios),
        "builder_ratio_to_fast": statistics.median(fast),
        "builder_tokens_per_second": statistics.median(rates["builder"]),
        "loader_tokens_per_second": read["tokens_per_second_88m"],
        "loader_tokens_per_second_nano": read["tokens_per_second_nano"],
        "first_batch_seconds": read["first_batch_seconds_88m"],
        "loader_anonymous_mb": read["anonymous_mb"],
    }
    goals = (
        ("builder / encode_batch", figures["builder_ratio"], GOALS["builder"], ".2f", ">="),
        ("loader, 8 x 2048, tokens/s", figures["loader_tokens_per_second"], GOALS["loader"], ",.0f", ">="),
        ("loader, 32 x 256, tokens/s", figures["loader_tokens_per_second_nano"], GOALS["loader"], ",.0f", ">="),
        ("first batch, s", figures["first_batch_seconds"], GOALS["first_batch"], ".3f", "<="),
        ("loader, anonymous MB", figures["loader_anonymous_mb"], GOALS["loader_anonymous"], ".0f", "<="),
    )
    for what, value, goal, form, relation in goals:
        if value is None:
            print(f"{what:28} not measured here")
            continue
        met = value >= goal if relation == ">=" else value <= goal
        print(f"{what:28} {value:>14{form}}  goal {relation} {goal:{form}}: {'met' if met else 'NOT met'}")
    write_figures(a.json, figures | {f"{name}_goal": goal for name, goal in GOALS.items()} | {"rates": rates})


if __name__ == "__main__":
    sys.exit(main())
