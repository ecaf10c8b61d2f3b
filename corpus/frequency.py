"""What a validation loss is measured against: how often tokens occur in training, and how many bytes they stand for.

    yardstick = yardstick_of(shards, target_counts(stream, eval_tokens, seq_len)); yardstick.deciles; yardstick.unigram

Counted anew at each start, without a cache: at most COUNTED_TOKENS tokens, about half a second of one core and 200 MB
of reading; 9M tokens of nano take a twentieth of that. The tokenizer's file is read as JSON, without its library.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from corpus.documents import MAX_TOKENIZER_BYTES
from corpus.shards import MAX_VOCAB_SIZE, TOKENIZER, Shards, payload_chunks
from engine.files import DECILES, load_json

COUNTED_TOKENS = 10**8  # the first ones: of billions too, these settle which tokens are rare


class Yardstick(NamedTuple):
    """`deciles` (vocab,): the decile of each token id, 0 the most frequent (`deciles_of`); `unigram`: the cross-entropy
    of the evaluated targets under the training frequencies, in nats; `bytes_per_token` of these targets, None without a
    byte-level tokenizer."""

    deciles: np.ndarray
    unigram: float
    bytes_per_token: float | None


def yardstick_of(shards: Shards, targets: np.ndarray) -> Yardstick:
    """`targets` (vocab,) says how often validation asks for each token id, at least one of them.

    The unigram model predicts every token by its training frequency alone, with one more added to each count so that
    no probability is zero: p = (count + 1) / (sum of counts + vocab). Text bytes per target count special tokens as 0.
    """
    counts = training_counts(shards)
    nats = np.log(counts.sum() + len(counts)) - np.log(counts + 1.0)
    sizes = token_bytes(shards.files["train"][0].parent / TOKENIZER, len(counts))
    text_bytes = 0 if sizes is None else int(targets @ sizes)
    total = int(targets.sum())
    return Yardstick(deciles_of(counts), float(targets @ nats) / total, text_bytes / total if text_bytes else None)


def training_counts(shards: Shards, most: int = COUNTED_TOKENS) -> np.ndarray:
    """How often each token id occurs in the first `most` training tokens, int64 (vocab,)."""
    counts, left = np.zeros(MAX_VOCAB_SIZE, np.int64), most
    for path in shards.files["train"]:
        for chunk in payload_chunks(path):
            tokens = np.frombuffer(chunk, "<u2", len(chunk) // 2)[:left]
            counts += np.bincount(tokens, minlength=MAX_VOCAB_SIZE)
            left -= len(tokens)
            if not left:
                break
        if not left:
            break
    return counts[: shards.vocab_size]  # an id beyond is damage, which reading it for training names


def deciles_of(counts: np.ndarray) -> np.ndarray:
    """The decile, 0 to 9, of each token id by its count in training, int64 (vocab,).

    Ids are put in order of falling count, equal ones by id. An id takes up a stretch as long as its count, behind those
    before it; where the middle of its stretch lies in the whole is its decile: floor(10 (b + c / 2) / n) with count c,
    b the sum of the counts before, n the sum of all. So each decile holds a tenth of the training tokens, as nearly as
    ids that are not split allow: decile 0 a few ids, decile 9 most of the vocabulary, ids that never occur included.
    """
    order = np.argsort(-counts, kind="stable")
    ranked = counts[order]
    before = np.cumsum(ranked) - ranked
    places = DECILES * (2 * before + ranked) // max(1, 2 * int(ranked.sum()))
    deciles = np.empty(len(counts), np.int64)
    deciles[order] = np.minimum(places, DECILES - 1)
    return deciles


def same_tokens(one: Path, other: Path) -> bool:
    """Whether two tokenizer.json give the same ids to the same tokens; also where one is missing or lists none."""
    if not one.exists() or not other.exists():
        return True
    models = [load_json(path, MAX_TOKENIZER_BYTES).get("model") for path in (one, other)]
    vocabularies = [model.get("vocab") if isinstance(model, dict) else None for model in models]
    return vocabularies[0] == vocabularies[1] or None in vocabularies


def token_bytes(path: Path, vocab_size: int) -> np.ndarray | None:
    """The bytes of text that each token id of a tokenizer.json stands for, int64 (vocab_size,); 0 for special tokens
    and for ids that it lacks.

    None where there is no such file, where it is not byte-level (GPT-2's, Llama 3's, SmolLM2's and those that data.py
    trains are: a token has one letter for each byte), or where it has ids beyond the vocabulary, so that the shards are
    not its own. BadInput if it cannot be read as JSON.
    """
    if not path.exists():
        return None
    tokenizer = load_json(path, MAX_TOKENIZER_BYTES)
    sizes = np.zeros(vocab_size, np.int64)
    try:
        decoder = tokenizer["decoder"]
        if not any(part["type"] == "ByteLevel" for part in decoder.get("decoders", [decoder])):
            return None
        for token, number in tokenizer["model"]["vocab"].items():
            sizes[number] = len(token)
        for added in tokenizer["added_tokens"]:  # written as they are, not byte by byte
            sizes[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    except (KeyError, TypeError, AttributeError, IndexError):
        return None
    return sizes
