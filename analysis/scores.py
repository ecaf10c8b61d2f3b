"""What runs score on the same tokens or questions, with intervals over documents: tables and sentences.

    one = Scores.of("muon", 240, tokens, start, nats, correct, sizes); print_table([score_row(one)])

A document is the unit of sampling: its tokens depend on each other, so an interval over tokens would be too narrow.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.pages import number
from analysis.stats import difference, p_words, share_interval, t_interval


@dataclass(frozen=True)
class Scores:
    """A run's sums over the targets of each document, arrays (documents,): the tokens that it was to predict, their
    loss in bits, how many had the largest logit, and their bytes of text, all 0 where these are not known."""

    name: str
    step: int
    tokens: np.ndarray
    targets: np.ndarray
    nats: np.ndarray
    bits: np.ndarray
    correct: np.ndarray
    text_bytes: np.ndarray

    @classmethod
    def of(
        cls,
        name: str,
        step: int,
        tokens: np.ndarray,
        start: int | None,
        nats: np.ndarray,
        correct: np.ndarray,
        sizes: np.ndarray | None,
    ) -> "Scores":
        """From the loss of every token (N,) but the first, and whether it had the largest logit, both (N - 1,).

        A document begins at each `start` token and ends with the prediction of the next one; `sizes` (vocab,) are the
        bytes of each token id.
        """
        begins = np.zeros(len(nats), bool) if start is None else tokens[:-1] == start
        document = np.cumsum(begins) - begins[0]  # of each target
        text_bytes = np.zeros(len(nats)) if sizes is None else sizes[tokens[1:]]
        values = (np.ones(len(nats)), nats, nats / math.log(2), correct, text_bytes)
        return cls(name, step, tokens, *(np.bincount(document, column) for column in values))

    def mean(self, above: str, below: str) -> float:
        """Over all documents, such as nats per target; NaN where there is nothing below."""
        a, b = getattr(self, above).sum(), getattr(self, below).sum()
        return float(a / b) if b else math.nan

    def per_document(self, above: str, below: str) -> np.ndarray:
        """Values (documents,) whose mean is `mean` and whose spread is its sampling error when documents are drawn:
        r + (a - r b) / mean(b), the linearised ratio (Cochran, Sampling Techniques, 6.4)."""
        a, b, r = getattr(self, above), getattr(self, below), self.mean(above, below)
        return r + (a - r * b) / b.mean()


def score_row(s: Scores) -> dict[str, str]:
    """A run's row: column -> cell."""
    row = {"run": s.name, "step": f"{s.step:,}", "tokens": f"{s.targets.sum():,.0f}"}
    row["documents"] = f"{len(s.targets):,}"
    for name, above, below in (
        ("loss", "nats", "targets"),
        ("bits/byte", "bits", "text_bytes"),
        ("accuracy", "correct", "targets"),
    ):
        mean = s.mean(above, below)
        row[name] = number(mean, ".4f")
        known = math.isfinite(mean)
        row[f"95 % ({name})"] = bounds(t_interval(s.per_document(above, below))) if known else "-"
        if name == "loss":
            row["perplexity"] = number(math.exp(min(mean, 700)), ",.2f")
    return row


def bounds(interval: tuple[float, float, float]) -> str:
    """An interval as a cell."""
    _, low, high = interval
    return f"{low:.4f} to {high:.4f}" if math.isfinite(low) else "-"


def lead_over(one: Scores, first: Scores) -> str:
    """A sentence on how far a run is from the first one: in nats on the same tokens, else in bits per byte of the same
    documents."""
    same = np.array_equal(one.tokens, first.tokens)
    above, below, what = ("nats", "targets", "loss") if same else ("bits", "text_bytes", "bits per byte")
    names = f"{one.name} minus {first.name}"
    if not same and (len(one.targets) != len(first.targets) or not (one.text_bytes.sum() and first.text_bytes.sum())):
        return f"{names}: their tokens differ and their bytes are not known, so they do not compare"
    d = difference(*(dict(enumerate(side.per_document(above, below))) for side in (one, first)))
    sentence = f"{names}: {what} {d.difference:+.4f}"
    if not d.tested:
        return f"{sentence}, on one document: no interval" if len(one.targets) == 1 else sentence
    over = f"{d.test} over {len(one.targets):,} documents"
    return f"{sentence} (95 % {d.low:+.4f} to {d.high:+.4f}), {p_words(d.p_value)}, {over}"


def choice_row(
    name: str, step: int, likelihoods: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], answers: Sequence[int]
) -> dict[str, str]:
    """A run's row on multiple-choice questions: how often the right choice has the largest ln p (`likelihoods`) per
    byte (`sizes`), and in all; and how often a guess is right."""
    per_byte = [int(np.argmax(np.divide(found, size))) for found, size in zip(likelihoods, sizes, strict=True)]
    in_all = [int(np.argmax(found)) for found in likelihoods]
    total, right = len(answers), int(np.sum(np.equal(per_byte, answers)))
    return {
        "run": name,
        "step": f"{step:,}",
        "questions": f"{total:,}",
        "accuracy": f"{right / total:.4f}",
        "95 %": bounds(share_interval(right, total)),
        "not normalised": f"{np.mean(np.equal(in_all, answers)):.4f}",
        "chance": f"{np.mean([1 / len(found) for found in likelihoods]):.4f}",
    }


def print_table(rows: Sequence[dict[str, str]]) -> None:
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
