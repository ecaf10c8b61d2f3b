"""A trained run's tokenizer: text to ids that its model knows, and back; and multiple-choice questions from JSON lines.

codec = Codec("shards/mine/tokenizer.json", 4096); ids = codec.prompt("def ", "--prompt"); codec.text(ids)
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from corpus.documents import load_tokenizer, vocabulary
from corpus.shards import TOKENIZER, open_shards
from engine.cli import BadInput
from engine.files import json_lines
from engine.trained import Trained


def tokenizer_of(trained: Trained, data: Path | None = None, tokenizer: str | None = None) -> str:
    """A run's tokenizer: `tokenizer`, a file or hub name, or that next to its shards, in `data` where they have moved,
    or an imported run's own; BadInput where it is not there."""
    path = data / TOKENIZER if data else trained.tokenizer
    if tokenizer is None and not path.exists():
        raise BadInput(f"{path}: the tokenizer of {trained.folder} is not there; name one with --tokenizer")
    theirs = trained.config["data_fingerprint"]
    if data is not None and open_shards(data, trained.config["data_pattern"]).fingerprint != theirs:
        raise BadInput(f"--data {data}: not the shards of {trained.folder}; name its tokenizer with --tokenizer")
    return tokenizer or str(path)


class Codec:
    """A tokenizer, of a file or hub name, for a model of this vocabulary; `end` is the token that ends a text and
    begins the next one."""

    def __init__(self, path: str, vocab_size: int) -> None:
        self.path, self.vocab_size, self.encoder = path, vocab_size, load_tokenizer(path)
        _, self.end = vocabulary(self.encoder)
        if self.end is None or self.end >= vocab_size:
            raise BadInput(f"{path}: has no end-of-text token in the model's vocabulary of {vocab_size:,}")

    def ids(self, text: str, where: str) -> list[int]:
        """The ids of a text; BadInput says why `where` has none that the model knows."""
        try:
            ids = self.encoder.encode(text, add_special_tokens=False).ids
        except (UnicodeError, TypeError):  # half a surrogate pair: bytes of a command line that are not UTF-8
            raise BadInput(f"{where}: is not Unicode text") from None
        if ids and max(ids) >= self.vocab_size:
            known = f"outside the model's vocabulary of {self.vocab_size:,}"
            raise BadInput(f"{where}: holds token {max(ids)} of {self.path}, {known}; is that the run's tokenizer?")
        return ids

    def prompt(self, text: str, where: str) -> list[int]:
        """A text to continue, behind the token that begins every document; BadInput where it is empty."""
        if not (ids := self.ids(text, where)):
            raise BadInput(f"{where}: is empty; give at least one letter to continue")
        return [self.end, *ids]

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens; bytes that are no whole letter become U+FFFD."""
        return self.encoder.decode(ids, skip_special_tokens=True)


class Question(NamedTuple):
    """A context, its possible continuations, and the number of the right one; `where` it was read."""

    where: str
    context: str
    choices: list[str]
    answer: int


def read_questions(path: Path) -> Iterator[Question]:
    """The questions of a JSONL of {context, choices, answer} or, as in HellaSwag's files, {ctx, endings, label}; other
    keys may hold anything. BadInput names the line that is something else."""
    for where, line in json_lines(path):
        context, choices, answer = (
            line.get(ours, line.get(hellaswag))
            for ours, hellaswag in (("context", "ctx"), ("choices", "endings"), ("answer", "label"))
        )
        if not isinstance(context, str):
            raise BadInput(f'{where}: its "context" (or "ctx") is not a text')
        texts = isinstance(choices, list) and all(isinstance(choice, str) and choice for choice in choices)
        if not texts or len(choices) < 2:
            raise BadInput(f'{where}: its "choices" (or "endings") are not two or more texts')
        answer = int(answer) if isinstance(answer, str) and answer.isdecimal() else answer  # as the hub's copy has it
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise BadInput(f'{where}: its "answer" (or "label") is not a number from 0 to {len(choices) - 1}')
        yield Question(where, context, choices, answer)
