"""Documents before they become shards: duplicates, the train/validation split, and the tokenizer.

    is_validation(content_hash(text), fraction); tokenizer = train_tokenizer(texts, vocab_size)

Duplicates and split depend on a document's content alone; memory is 8 to 16 bytes per document.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from corpus.sources import Document
from engine.cli import BadInput, first_line

MAX_TOKENIZER_BYTES = 2**27  # the largest published tokenizers have 30 MB
EOT = "<|endoftext|>"
EOT_NAMES = (EOT, "<|end_of_text|>", "</s>", "<eos>")
TRAIN_CHARS = 200_000_000  # the most text that a new tokenizer is trained on
# A tokenizer's training takes time with the length of a word, and 80 bytes for each character of a new word. A block of
# characters of one class is inside a word that long: it is cut off, and after MOST_BLOCKS left out.
BLOCK, MOST_BLOCKS = 256, 15_000
ONE_CLASS = re.compile(rf"[^\W_]{{{BLOCK}}}|(?:[^\w\s]|[_\x1c-\x1f]){{{BLOCK}}}|[^\S\x1c-\x1f]{{{BLOCK}}}")


class SeenHashes:
    """A set of 64-bit hashes in sorted runs, merged like a binary counter: 8 bytes each, 16 while two merge."""

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> None:
        """Add hashes that differ from each other and from all in the set."""
        if len(hashes):
            self.runs.append(np.sort(hashes))
        while len(self.runs) > 1 and len(self.runs[-2]) <= 2 * len(self.runs[-1]):
            last = self.runs.pop()
            self.runs[-1] = np.sort(np.concatenate((self.runs[-1], last)))

    def known(self, hashes: np.ndarray) -> np.ndarray:
        """Boolean mask of the hashes that are in the set."""
        found = np.zeros(len(hashes), dtype=bool)
        for run in self.runs:
            at = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            found |= run[at] == hashes
        return found


def content_hash(document: Document) -> int:
    """64-bit hash of a text's UTF-8 bytes, or of its token ids; BadInput if it is not Unicode text."""
    try:
        content = document.encode("utf-8") if isinstance(document, str) else document.tobytes()
    except UnicodeEncodeError:
        raise BadInput(f"a document holds a lone surrogate and is not Unicode text: {document[:40]!a}…") from None
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def is_validation(text_hash: int, fraction: float) -> bool:
    """Whether a document belongs to validation: its text alone decides, so no text is on both sides."""
    return text_hash < fraction * 2**64


def load_tokenizer(name: str):
    """A tokenizer.json or a hub name -> tokenizers.Tokenizer that treats spelled-out special tokens as text."""
    from tokenizers import Tokenizer

    if name.endswith(".json") and not Path(name).exists():
        raise BadInput(f"--tokenizer {name}: no such file")
    if Path(name).exists() and Path(name).stat().st_size > MAX_TOKENIZER_BYTES:
        raise BadInput(f"--tokenizer {name}: larger than the {MAX_TOKENIZER_BYTES:,} bytes that a tokenizer may have")
    try:
        if Path(name).exists():  # read here: the library takes no path that is not UTF-8
            tokenizer = Tokenizer.from_str(Path(name).read_text(encoding="utf-8"))
        else:
            tokenizer = Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises bare Exception for every fault
        advice = "" if Path(name).exists() else "; a hub name needs a network"
        raise BadInput(f"--tokenizer {name}: cannot be loaded ({first_line(error)}){advice}") from None
    tokenizer.no_truncation()  # hub tokenizers often carry a maximum length
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocabulary(encoder: Any) -> tuple[int, int | None]:
    """Number of ids of a tokenizer, and its end-of-text id."""
    ids = encoder.get_vocab(with_added_tokens=True)
    return max(ids.values()) + 1, next((ids[name] for name in EOT_NAMES if name in ids), None)


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


def training_sample(documents: Iterator[str], val_fraction: float, most_chars: int = TRAIN_CHARS) -> Iterator[str]:
    """Training documents up to `most_chars` characters: the tokenizer does not see the validation text.

    A document is given whole, or if it has words of over two blocks in pieces without them.
    """
    chars, blocks = 0, 0
    for text in documents:
        if not is_validation(content_hash(text), val_fraction):
            begin = 0
            for at in range(0, len(text) - BLOCK + 1, BLOCK):
                if ONE_CLASS.match(text, at):
                    yield text[begin:at]
                    if blocks < MOST_BLOCKS:
                        yield text[at : at + BLOCK]
                    begin, blocks = at + BLOCK, blocks + 1
            yield text[begin:]
            chars += len(text)
            if chars > most_chars:
                return
