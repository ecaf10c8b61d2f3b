"""Text from a trained run, and what it scores on other tokens.

    python sample.py runs/NAME --prompt "def "                    one text, token by token; also --interactive
    python sample.py runs/NAME --prompts FILE --out FILE.jsonl    many prompts, a JSON line for each text
    python sample.py evaluate runs/A runs/B --text FILE           loss, accuracy, bits per byte, side by side

Text and tables go to stdout, everything else to stderr. Keys and values are cached (docs/sampling.md has the speed).
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import tyro

from corpus.codec import Codec, Question, read_questions, tokenizer_of
from corpus.frequency import same_tokens, token_bytes
from corpus.local_files import TextFiles, find_files
from corpus.shards import TOKENIZER, TRAIN_PATTERN, Shards, open_shards
from corpus.sources import Column, kind
from data import TokenStream
from engine import files
from engine.cli import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    BadInput,
    CannotWrite,
    Count,
    Limit,
    check_limits,
    exit_with_a_sentence,
    first_line,
)
from engine.decoder import Decoder
from engine.files import json_lines, text_lines
from engine.generate import Sampling, draws_of, generate
from engine.scoring import log_likelihoods, token_scores
from engine.step import VALIDATION_TOKENS, prepare_torch
from engine.trained import Trained, Which, open_trained
from model import Transformer
from settings import trained_model

if TYPE_CHECKING:
    from analysis.scores import Scores

ROWS = 16  # texts that are written at a time
PART_OF_A_LETTER = "\ufffd"  # what the first bytes of one are decoded to
SAMPLES, OPENING, SAMPLE_TOKENS = 3, 8, 64  # of samples.json: texts, tokens of each prompt and of what follows
SEARCHED, GREEDY = 2**16, 32  # validation tokens in which prompts are looked for; tokens of a line of --sample-every
Device = Literal["auto", "cuda", "cpu"]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write text with a trained run; `python sample.py evaluate --help` lists how to measure runs."""

    run: tyro.conf.Positional[Path]
    """Read this run's folder."""
    prompt: str | None = None
    """Continue this text."""
    interactive: bool = False
    """Continue each line of the standard input, as it comes."""
    prompts: Path | None = None
    """Continue each line of this file, or each "prompt" of a .jsonl, and write JSON lines."""
    out: Path | None = None
    """Write the JSON lines of --prompts to this new file instead of the standard output."""
    samples: Annotated[int, AT_LEAST_1] = 1
    """Texts per prompt."""
    tokens: Annotated[Count, AT_LEAST_1] = 200
    """Most tokens of a text; the end-of-text token ends it sooner."""
    temperature: Annotated[float, NOT_NEGATIVE] = 0.8
    """Divide the logits by this; 0 = always take the most probable token."""
    top_k: Annotated[int, Limit("must be 0 (all) or more", lambda value: value >= 0)] = 0
    """Draw from this many of the most probable tokens; 0 = all."""
    top_p: Annotated[float, Limit("must be above 0 and at most 1", lambda value: 0 < value <= 1)] = 0.95
    """Draw from the fewest tokens that hold this share of the probability."""
    seed: Annotated[int, Limit("must be 0 or more", lambda value: value >= 0)] = 0
    """The same seed gives the same text; each prompt and sample has random numbers of its own."""
    checkpoint: Which = "best"
    """The weights with the lowest validation loss, or the last ones."""
    data: Path | None = None
    """Read the tokenizer from this folder, if the run's shards have moved."""
    tokenizer: str | None = None
    """Use this tokenizer.json, or hub name, instead."""
    device: Device = "auto"
    """Where to compute; auto = CUDA if there is one."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Measure trained runs on the same tokens or questions."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Read these runs' folders."""
    data: Path | None = None
    """Measure on the shards of this folder (default: those that the runs were trained on)."""
    data_pattern: str = TRAIN_PATTERN
    """File names of its training shards, as in train.py."""
    split: Literal["val", "train"] = "val"
    """Measure on the validation or the training shards."""
    text: tuple[Path, ...] = ()
    """Measure on these files, or folders of them, instead; .jsonl and .parquet have rows, others are text."""
    text_column: str = "text"
    """Column of .jsonl and .parquet that holds the text."""
    choices: Path | None = None
    """Answer the multiple-choice questions of this JSONL instead."""
    tokens: Annotated[Count, AT_LEAST_1] = 131_072
    """Measure on the first so many tokens; a --text, up to the end of the document that holds the last of them."""
    checkpoint: Which = "best"
    """The weights with the lowest validation loss, or the last ones."""
    tokenizer: str | None = None
    """Use this tokenizer.json, or hub name, instead of that next to the runs' shards."""
    device: Device = "auto"
    """Where to compute; auto = CUDA if there is one."""


class Text(NamedTuple):
    """One text to write: its prompt's number, words and ids, and the number of the sample."""

    number: int
    words: str
    prompt: list[int]
    sample: int


@exit_with_a_sentence
def main() -> int:
    prepare_torch()
    if sys.argv[1:2] == ["evaluate"]:
        return evaluate(tyro.cli(Measure, args=sys.argv[2:], prog="sample.py evaluate", description=__doc__))
    return write(tyro.cli(Arguments, description=__doc__))


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def chosen_device(name: Device) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: this PyTorch sees no CUDA device")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def codec_of(trained: Trained, data: Path | None = None, tokenizer: str | None = None) -> Codec:
    return Codec(tokenizer_of(trained, data, tokenizer), trained.config["vocab_size"])


def write(a: Arguments) -> int:
    """Text from one run."""
    check_limits(a)
    if (a.prompt is not None) + a.interactive + (a.prompts is not None) != 1:
        raise BadInput("sample.py: give one of --prompt, --prompts and --interactive")
    if a.out is not None and a.prompts is None:
        raise BadInput(f"--out {a.out}: goes with --prompts; other texts are printed")
    if a.out is not None and a.out.exists():
        raise BadInput(f"--out {a.out}: exists; choose another file")
    if a.out is not None and not a.out.parent.is_dir():
        raise BadInput(f"--out {a.out}: {a.out.parent} is not a folder")
    if a.interactive and sys.stdin is None:
        raise BadInput("--interactive: there is no standard input")
    trained = open_trained(a.run, a.checkpoint)
    codec = codec_of(trained, a.data, a.tokenizer)
    texts = texts_of(a, codec)
    decoder = Decoder(trained_model(trained, chosen_device(a.device)))
    say(f"{trained.path}: step {trained.step:,}")
    if a.interactive:
        talk(a, decoder, codec)
    elif a.prompts is None:
        stream(a, decoder, codec, texts)
    else:
        write_lines(a, decoder, codec, texts)
    return 0


def batches(texts: Sequence[Text]) -> Iterator[Sequence[Text]]:
    return (texts[first : first + ROWS] for first in range(0, len(texts), ROWS))


def texts_of(a: Arguments, codec: Codec) -> list[Text]:
    """Every text that --prompt or --prompts asks for; each prompt is checked before any text is written."""
    if a.prompts is None:
        prompts = [] if a.prompt is None else [("--prompt", a.prompt)]
    elif a.prompts.suffix == ".jsonl":
        prompts = [(where, line.get("prompt")) for where, line in json_lines(a.prompts)]
    else:
        prompts = list(text_lines(a.prompts))
    texts = []
    for number, (where, words) in enumerate(prompts):
        if not isinstance(words, str):
            raise BadInput(f'{where}: its "prompt" is not a text')
        ids = codec.prompt(words, where)
        texts += [Text(number, words, ids, sample) for sample in range(a.samples)]
    return texts


def continued(a: Arguments, decoder: Decoder, codec: Codec, texts: Sequence[Text]) -> Iterator[list[int | None]]:
    sampling = Sampling(a.temperature, a.top_k, a.top_p)
    draws = [draws_of(a.seed, text.number, text.sample) for text in texts]
    prompts = [text.prompt for text in texts]
    return generate(decoder, prompts, sampling, draws=draws, most=a.tokens, end=codec.end, say=say)


def stream(a: Arguments, decoder: Decoder, codec: Codec, texts: Sequence[Text]) -> None:
    """Print texts that are written at a time: the first token by token, each next one once the one before has ended."""
    for batch in batches(texts):
        ids, going, row, shown = [list(text.prompt) for text in batch], [True] * len(batch), 0, ""
        for tokens in itertools.chain(continued(a, decoder, codec, batch), [[None] * len(batch)]):
            for i, token in enumerate(tokens):
                going[i] = going[i] and token is not None
                ids[i] += [] if token is None else [token]
            while row < len(batch):
                text = codec.text(ids[row])
                text = text.rstrip(PART_OF_A_LETTER) if going[row] else text + "\n"
                print(text[len(shown) :], end="", flush=True)
                shown = text
                if going[row]:
                    break
                row, shown = row + 1, ""


def talk(a: Arguments, decoder: Decoder, codec: Codec) -> None:
    """Continue each line of stdin until it ends; a line that cannot be is named and passed over."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")
    for number in itertools.count():
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            return
        try:
            ids = codec.prompt(line.rstrip("\n"), f"line {number + 1}")
        except BadInput as refusal:
            say(f"error: {refusal}")
            continue
        stream(a, decoder, codec, [Text(number, line, ids, sample) for sample in range(a.samples)])


def write_lines(a: Arguments, decoder: Decoder, codec: Codec, texts: Sequence[Text]) -> None:
    """A JSON line for each text, in the order of the prompts: printed as soon as its batch is done, or all in a file
    that is whole or not there."""

    def lines() -> Iterator[str]:
        for batch in batches(texts):
            for text, ids in zip(batch, finished(continued(a, decoder, codec, batch), len(batch)), strict=True):
                line = {"prompt": text.words, "sample": text.sample, "text": continuation(codec, text.prompt, ids)}
                yield json.dumps(line | {"tokens": len(ids), "ended": len(ids) < a.tokens})

    if a.out is None:
        for line in lines():
            print(line, flush=True)
    else:
        files.write_whole(a.out, lambda file: file.writelines(f"{line}\n" for line in lines()), mode="w")


def finished(steps: Iterator[list[int | None]], rows: int) -> list[list[int]]:
    """The tokens of each row of `generate`."""
    ids: list[list[int]] = [[] for _ in range(rows)]
    for tokens in steps:
        for row, token in zip(ids, tokens, strict=True):
            row += [] if token is None else [token]
    return ids


def continuation(codec: Codec, prompt: list[int], ids: list[int]) -> str:
    """The text of the ids behind a prompt; a letter may have bytes of several tokens."""
    return codec.text(prompt + ids)[len(words_of(codec, prompt)) :]


def words_of(codec: Codec, prompt: list[int]) -> str:
    """The text of a prompt, up to its last whole letter."""
    return codec.text(prompt).rstrip(PART_OF_A_LETTER)


def openings(stream: TokenStream, begin: int, count: int) -> list[list[int]]:
    """The first tokens of a split's first documents that are longer than these; `begin` is the token before each."""
    tokens = stream.read(0, min(len(stream), SEARCHED))
    starts = np.flatnonzero(tokens == begin)
    long = starts[np.diff(starts, append=len(tokens)) > OPENING]
    return [tokens[start : start + OPENING].tolist() for start in long[:count]]


class Greedy:
    """The text that a model in training writes after the same words each time: always the most probable token."""

    def __init__(self, model: Transformer, shards: Shards, val_stream: TokenStream, data: Path) -> None:
        self.model, self.codec = model, Codec(str(data / TOKENIZER), shards.vocab_size)
        self.prompt = next(iter(openings(val_stream, self.codec.end, 1)), [self.codec.end])

    def line(self) -> str:
        """Prompt and text on one line. Draws no random number, and leaves the model in training."""
        self.model.eval()
        steps = generate(Decoder(self.model), [self.prompt], Sampling(0.0), draws=[], most=GREEDY, end=self.codec.end)
        (ids,) = finished(steps, 1)
        self.model.train()
        return f"{words_of(self.codec, self.prompt)!r} -> {continuation(self.codec, self.prompt, ids)!r}"


def write_samples(folder: Path, device: torch.device) -> None:
    """Write a finished run's samples.json, where its shards have a tokenizer and that package is installed."""
    try:
        files.write_json(folder / files.SAMPLES, samples_of(folder, device))
    except (BadInput, CannotWrite, ModuleNotFoundError) as reason:
        say(f"no samples: {reason}")


def samples_of(folder: Path, device: torch.device) -> dict[str, Any]:
    """What samples.json holds: texts behind the first words of validation documents, by a run's best checkpoint; by
    its last where none was better than the first weights."""
    trained = open_trained(folder, "best" if (folder / files.BEST).exists() else "last")
    codec = codec_of(trained)
    shards = open_shards(trained.data, trained.config["data_pattern"])
    prompts = openings(TokenStream(shards, "val"), codec.end, SAMPLES)
    if not prompts:
        raise BadInput(f"{trained.data}: no validation document is longer than {OPENING} tokens")
    sampling = Sampling(temperature=0.8, top_p=0.95)
    draws = [draws_of(0, number) for number in range(len(prompts))]
    steps = generate(
        Decoder(trained_model(trained, device)), prompts, sampling, draws=draws, most=SAMPLE_TOKENS, end=codec.end
    )
    rows = zip(prompts, finished(steps, len(prompts)), strict=True)
    texts = [{"prompt": words_of(codec, prompt), "text": continuation(codec, prompt, ids)} for prompt, ids in rows]
    return {"checkpoint": trained.path.name, "step": trained.step, **dataclasses.asdict(sampling), "samples": texts}


def evaluate(m: Measure) -> int:
    """Tables of what several runs make of the same tokens, or questions."""
    from analysis.scores import (  # SciPy takes a second, and a training imports this file
        lead_over,
        print_table,
        score_row,
    )

    check_limits(m)
    if not m.runs:
        raise BadInput("sample.py evaluate: name at least one run folder")
    if (m.data is not None) + bool(m.text) + (m.choices is not None) > 1:
        raise BadInput("sample.py evaluate: give one of --data, --text and --choices")
    device, runs = chosen_device(m.device), [open_trained(folder, m.checkpoint) for folder in m.runs]
    if m.choices is not None:
        return answer(m, runs, device)
    texts = documents_of(m, codec_of(runs[0], None, m.tokenizer)) if m.text else []
    if not m.text and m.data is None and len({trained.config["data_fingerprint"] for trained in runs}) > 1:
        raise BadInput("sample.py evaluate: these runs were trained on different data; name one folder with --data")
    first, *others = found = [measured(m, trained, texts, device) for trained in runs]
    print_table([score_row(one) for one in found])
    for one in others:
        print(lead_over(one, first))
    return 0


def documents_of(m: Measure, codec: Codec) -> list[str]:
    """The documents of --text, up to the one that holds the last of --tokens of the first run's tokenizer."""
    texts, count = [], 0
    for text in itertools.chain.from_iterable(documents_in(path, m.text_column) for path in m.text):
        texts.append(text)
        count += 1 + len(codec.ids(text, f"--text, document {len(texts)}"))
        if count > m.tokens:
            break
    if count == len(texts):
        raise BadInput(f"--text {' '.join(map(str, m.text))}: too short, it holds no token to predict")
    return texts


def documents_in(path: Path, column: str) -> Iterable[str]:
    """The documents of a file or folder as data.py reads them; a file with another ending is one document."""
    if path.is_file() and kind(path) is None:
        try:
            return [path.read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{path}: not readable as text ({first_line(error)})") from None
    found = find_files([path])
    if found.left_out:
        say(found.left_out)
    return TextFiles(found.files, Column(column)).open()


def measured(m: Measure, trained: Trained, texts: Sequence[str], device: torch.device) -> "Scores":
    """Score the texts, or the shards where there are none."""
    from analysis.scores import Scores

    vocab_size = trained.config["vocab_size"]
    if texts:
        codec = codec_of(trained, None, m.tokenizer)
        ids = (codec.ids(text, f"--text, document {number}") for number, text in enumerate(texts, start=1))
        tokens = np.array([token for document in ids for token in (codec.end, *document)])
        start, path = codec.end, codec.path
    else:
        shards, folder = shards_of(m, trained)
        stream = TokenStream(shards, m.split)
        tokens, start, path = stream.read(0, min(len(stream), m.tokens + 1)), shards.eot_id, folder / TOKENIZER
        stream.wait_until_checked()
        if len(tokens) < 2:
            raise BadInput(f"{folder}: too short, its {m.split} shards hold no token to predict")
    model, seq_len = trained_model(trained, device), trained.config["seq_len"]
    model.document_start = start if trained.config["doc_mask"] else None
    sizes, rows = token_bytes(Path(path), vocab_size), max(1, VALIDATION_TOKENS[device.type] // seq_len)
    return Scores.of(
        trained.folder.name, trained.step, tokens, start, *token_scores(model, tokens, seq_len, rows), sizes
    )


def shards_of(m: Measure, trained: Trained) -> tuple[Shards, Path]:
    """The shards to measure on, and their folder; BadInput where their ids are not those of the run."""
    folder = m.data or trained.data
    shards = open_shards(folder, m.data_pattern if m.data else trained.config["data_pattern"])
    if shards.vocab_size != trained.config["vocab_size"]:
        sizes = f"a vocabulary of {shards.vocab_size:,}, and {trained.folder} one of {trained.config['vocab_size']:,}"
        raise BadInput(f"{folder}: has {sizes}; measure on the text itself with --text")
    ours = folder / TOKENIZER
    if not same_tokens(ours, trained.tokenizer):
        raise BadInput(f"{ours}: another tokenizer than that of {trained.folder}; measure on the text with --text")
    return shards, folder


def answer(m: Measure, runs: Sequence[Trained], device: torch.device) -> int:
    """A table of how many of the questions each run answers right."""
    from analysis.scores import choice_row, print_table

    questions = list(read_questions(m.choices))
    sizes = [[len(choice.encode()) for choice in question.choices] for question in questions]
    rows = []
    for trained in runs:
        codec, model = codec_of(trained, None, m.tokenizer), trained_model(trained, device)
        model.document_start = codec.end if trained.config["doc_mask"] else None
        found = [likelihoods(model, codec, question) for question in questions]
        answers = [question.answer for question in questions]
        rows.append(choice_row(trained.folder.name, trained.step, found, sizes, answers))
    print_table(rows)
    return 0


def likelihoods(model: Transformer, codec: Codec, question: Question) -> list[float]:
    """ln p of each choice behind the context, which a space joins unless there is one."""
    context = [codec.end, *codec.ids(question.context, question.where)]
    joint = "" if not question.context or question.context[-1].isspace() else " "
    texts = [choice if choice[0].isspace() else joint + choice for choice in question.choices]
    choices = [codec.ids(text, question.where) for text in texts]
    if not all(choices):
        raise BadInput(f"{question.where}: a choice has no token in {codec.path}")
    try:
        return log_likelihoods(model, context, choices, model.config.seq_len)
    except ValueError as wrong:
        raise BadInput(f"{question.where}: {wrong}") from None


if __name__ == "__main__":
    sys.exit(main())
