"""Documents: where text comes from, which of it is new, on which side of the split it falls, who tokenises it.

Sources are generators of str (this machine's Python files, local text, Hugging Face datasets); data.py turns them into
shards. Nothing is held but the current piece and 8 to 16 bytes per document.
"""

import hashlib
import io
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from cli import BadInput, first_line

MAX_TOKENIZER_BYTES = 2**27  # the largest published ones have 30 MB
EOT = "<|endoftext|>"
EOT_NAMES = (EOT, "<|end_of_text|>", "</s>", "<eos>")
TRAIN_CHARS = 200_000_000  # of text that a new tokenizer is trained on, at most
PIECE_BYTES = 64 * 1024  # a longer .txt is cut at the next newline


def embedded_documents(scope: Literal["stdlib", "all"]) -> Iterator[str]:
    """The Python sources of this machine: the standard library, with `all` also site-packages."""
    paths = sysconfig.get_paths()
    roots = [Path(paths["stdlib"])] + ([Path(paths["purelib"])] if scope == "all" else [])
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            if root == roots[0] and "site-packages" in path.parts[len(root.parts) :]:
                continue
            try:
                yield path.read_bytes().decode("utf-8")
            except (UnicodeDecodeError, OSError):
                continue  # test files with deliberately broken encodings


def text_files(paths: Iterable[Path]) -> list[Path]:
    """Files as given, folders searched for readable ones; BadInput for what is missing or of no known kind."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise BadInput(f"{path}: no such file or folder")
        found = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p)) if path.is_dir() else [path]
        if not found or not all(map(_kind, found)):
            raise BadInput(f"{path}: no .txt, .jsonl (also .gz, .zst) or .parquet here")
        files += found
    return files


def _kind(path: Path) -> str | None:
    if path.suffix == ".parquet":  # compressed inside, never outside
        return "parquet"
    suffixes = [s for s in path.suffixes[-2:] if s not in (".gz", ".zst")]
    return {".txt": "text", ".jsonl": "json"}.get(suffixes[-1] if suffixes else "")


def text_documents(files: list[Path], column: str) -> Iterator[str]:
    """Rows of .jsonl and .parquet through `datasets`; pieces of .txt cut at a newline after each 64 KiB.

    .txt is read here because `datasets` either forgets where a file ends or loads a whole file at once.
    """
    for path in files:
        if path.stat().st_size == 0:
            continue  # `datasets` fails on them
        if _kind(path) == "text":
            yield from _txt_pieces(path)
        else:
            os.environ["HF_HUB_OFFLINE"] = "1"  # local files: nothing to ask the hub
            open_rows = partial(_load_dataset(), _kind(path), data_files=str(path), split="train", streaming=True)
            yield from _rows(open_rows, column, str(path))


def _txt_pieces(path: Path) -> Iterator[str]:
    import fsspec

    try:
        with fsspec.open(str(path), "rb", compression="infer") as opened, io.BufferedReader(opened) as file:
            while piece := file.read(PIECE_BYTES) + file.readline():
                yield piece.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text ({error.reason})") from None
    except Exception as error:  # every decompressor has its own
        raise BadInput(f"{path}: cannot be read ({first_line(error)})") from None


def hub_documents(name: str, config: str | None, split: str, column: str) -> Iterator[str]:
    """Rows of a Hugging Face dataset (or of a local folder that `datasets` understands), streamed."""
    yield from _rows(partial(_load_dataset(), name, config, split=split, streaming=True), column, name)


def _load_dataset() -> Callable[..., Iterable[dict]]:
    from datasets import load_dataset
    from datasets.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # `_rows` says what it raises, in one sentence
    return load_dataset


def _rows(open_rows: Callable[[], Iterable[dict]], column: str, where: str) -> Iterator[str]:
    rows = None
    while True:
        try:
            rows = iter(open_rows()) if rows is None else rows
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # datasets, pyarrow and every decompressor have their own
            raise BadInput(f"{where}: cannot be read ({first_line(error)})") from None
        if column not in row:
            raise BadInput(f"{where}: no column {column!r}; it has {', '.join(row)}; choose with --text-column")
        if row[column] is not None:
            if not isinstance(row[column], str):
                raise BadInput(f"{where}: column {column!r} holds {type(row[column]).__name__}, not text")
            yield row[column]


class SeenHashes:
    """A set of 64-bit hashes in sorted runs, merged like a binary counter: 8 bytes each, 16 while two merge."""

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Boolean mask of the hashes not seen before, in this call or an earlier one."""
        fresh = np.zeros(len(hashes), dtype=bool)
        fresh[np.unique(hashes, return_index=True)[1]] = True
        for run in self.runs:
            at = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            fresh &= run[at] != hashes
        if fresh.any():
            self.runs.append(np.sort(hashes[fresh]))
        while len(self.runs) > 1 and len(self.runs[-2]) <= 2 * len(self.runs[-1]):
            last = self.runs.pop()
            self.runs[-1] = np.sort(np.concatenate((self.runs[-1], last)))
        return fresh


def content_hash(text: str) -> int:
    try:
        return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")
    except UnicodeEncodeError:
        raise BadInput(f"a document holds a lone surrogate and is no Unicode text: {text[:40]!a}…") from None


def is_validation(text_hash: int, fraction: float) -> bool:
    """The side of a document depends on its text alone, so no text is on both sides."""
    return text_hash < fraction * 2**64


def load_tokenizer(name: str):
    """A tokenizer.json or a hub name -> tokenizers.Tokenizer that treats spelled-out special tokens as text."""
    from tokenizers import Tokenizer

    if name.endswith(".json") and not Path(name).exists():
        raise BadInput(f"--tokenizer {name}: no such file")
    if Path(name).exists() and Path(name).stat().st_size > MAX_TOKENIZER_BYTES:
        raise BadInput(f"--tokenizer {name}: larger than the {MAX_TOKENIZER_BYTES:,} bytes that a tokenizer may have")
    try:
        tokenizer = Tokenizer.from_file(name) if Path(name).exists() else Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises bare Exception for every fault
        raise BadInput(f"--tokenizer {name}: cannot be loaded ({first_line(error)})") from None
    tokenizer.no_truncation()  # hub tokenizers often carry a maximum length
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """A byte-level BPE (GPT-2's pre-tokenisation) of at most `vocab_size` entries, end-of-text first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def training_sample(documents: Iterator[str], val_fraction: float) -> Iterator[str]:
    """Training documents up to TRAIN_CHARS: the tokenizer does not see the validation text."""
    chars = 0
    for text in documents:
        if not is_validation(content_hash(text), val_fraction):
            yield text
            chars += len(text)
            if chars > TRAIN_CHARS:
                return
