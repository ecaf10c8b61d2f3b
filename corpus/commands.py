"""Build token shards from text, and inspect them.

    python data.py embedded --out shards/stdlib          # the Python sources on this machine, no network
    python data.py text notes.txt corpus.parquet --out shards/mine
    python data.py hf smollm-mix --max-tokens 1e9 --out shards/smollm-1b
    python data.py inspect shards/mine

To continue an interrupted build, run the same command again.
"""

import difflib
import resource
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from corpus.build import MixPart, build_shards
from corpus.inspection import verify
from corpus.local_files import TextFiles, find_files
from corpus.shards import MAX_VOCAB_SIZE, TRAIN_PATTERN, digest
from corpus.sources import (
    Column,
    Repeated,
    embedded_documents,
    embedded_files,
    hub_dataset,
    stamp,
)
from engine.cli import AT_LEAST_1, BadInput, CannotWrite, Count, Limit, check_limits, exit_with_a_sentence
from engine.files import shown


@dataclass(frozen=True)
class Preset:
    """A known mix: (dataset, configuration, share of the tokens) of each part, and the tokenizer for it."""

    parts: tuple[tuple[str, str, float], ...]
    tokenizer: str = "HuggingFaceTB/SmolLM2-135M"  # vocabulary 49,152


VOCAB_SIZES = Limit(f"must be 257 to {MAX_VOCAB_SIZE:,}; a token is a uint16", lambda n: 257 <= n <= MAX_VOCAB_SIZE)
PROPER_SHARE = Limit("must be above 0 and below 1", lambda share: 0 < share < 1)
SMOLLM = "HuggingFaceTB/smollm-corpus"
PRESETS = {
    "smollm-mix": Preset(((SMOLLM, "fineweb-edu-dedup", 0.7), (SMOLLM, "cosmopedia-v2", 0.3))),
    "cosmopedia": Preset(((SMOLLM, "cosmopedia-v2", 1.0),)),
    "fineweb-edu": Preset((("HuggingFaceFW/fineweb-edu", "sample-10BT", 1.0),)),
}


@dataclass(kw_only=True)
class Build:
    out: Path
    """Create this folder for the shards."""
    vocab_size: Annotated[int, VOCAB_SIZES] = 49_152
    """Train a tokenizer of this many entries, 257 to 65,536; 4096 suits the nano model."""
    tokenizer: str | None = None
    """Use this tokenizer.json or hub name instead of training a tokenizer."""
    max_tokens: Annotated[Count, AT_LEAST_1] | None = None
    """Stop after this many tokens, both splits and end-of-text ids included."""
    max_documents: Annotated[Count, AT_LEAST_1] | None = None
    """Stop after this many documents of both splits; duplicates do not count."""
    val_fraction: Annotated[float, PROPER_SHARE] = 0.02
    """Put this share of the documents into validation, by the hash of their text."""


@dataclass(kw_only=True)
class BuildFromRows(Build):
    text_column: str = "text"
    """Read the text from this column; .txt files have none."""
    ids_column: str | None = None
    """Read token ids from this column, if --tokenizer has tokenised the data already."""

    def column(self) -> Column:
        if self.ids_column is None:
            return Column(self.text_column)
        if self.tokenizer is None:
            raise BadInput(f"--ids-column {self.ids_column}: needs the --tokenizer that made the ids")
        return Column(self.ids_column, ids=True)

    def digest_of(self, files: Iterable[Path]) -> str:
        return digest([self.text_column, self.ids_column, stamp(files)])


@dataclass(kw_only=True)
class Embedded(Build):
    """Build from the Python sources on this machine: real text without a network."""

    scope: Literal["stdlib", "all"] = "stdlib"
    """Read the standard library, or site-packages too."""

    def parts(self) -> list[MixPart]:
        return [MixPart(self.source(), Repeated(lambda: embedded_documents(self.scope)))]

    def source(self) -> str:
        return f"embedded {self.scope} of Python {sys.version.split()[0]}"

    def identity(self) -> str:
        return digest(stamp(embedded_files(self.scope)))


@dataclass(kw_only=True)
class Text(BuildFromRows):
    """Build from local .txt and .jsonl (also .gz, .zst) and .parquet files, or folders of them."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Read these files and folders; a row, or a 64 KiB piece of a .txt, is a document."""

    def parts(self) -> list[MixPart]:
        if not self.paths:
            raise BadInput("text: name at least one file or folder")
        found = find_files(self.paths)
        if found.left_out:
            print(found.left_out, flush=True)
        if not found.files:
            raise BadInput(f"text {' '.join(map(str, self.paths))}: every file is empty")
        return [MixPart(self.source(), TextFiles(found.files, self.column()))]

    def source(self) -> str:
        return "text " + " ".join(map(shown, self.paths))

    def identity(self) -> str:
        return self.digest_of(find_files(self.paths).files)


@dataclass(kw_only=True)
class Hub(BuildFromRows):
    """Build from streamed Hugging Face datasets: one, a mix of several, or smollm-mix, cosmopedia, fineweb-edu."""

    names: tyro.conf.Positional[tuple[str, ...]]
    """Stream these datasets: names on the hub, local folders that `datasets` understands, or one preset."""
    config: tuple[str, ...] = ()
    """Use this configuration of each dataset."""
    shares: tuple[float, ...] = ()
    """Take this share of the tokens from each dataset (default: equal shares)."""
    split: str = "train"
    """Read this split of the datasets."""

    def __post_init__(self) -> None:
        if self.preset():
            self.tokenizer = self.tokenizer or self.preset().tokenizer

    def preset(self) -> Preset | None:
        return PRESETS.get(self.names[0]) if len(self.names) == 1 else None

    def parts(self) -> list[MixPart]:
        return [
            MixPart(" ".join(filter(None, (name, config))), hub_dataset(name, config, self.split, self.column()), share)
            for name, config, share in self.datasets()
        ]

    def datasets(self) -> Sequence[tuple[str, str | None, float]]:
        """Name, configuration and share of each dataset; BadInput if the flags do not fit each other."""
        count = len(self.names)
        if not self.names:
            raise BadInput(f"hf: name a dataset, or a preset: {', '.join(PRESETS)}")
        if self.preset():
            if self.config or self.shares:
                raise BadInput(f"hf {self.names[0]}: a preset has its own --config and --shares")
            return self.preset().parts
        for flag, given in (("--config", self.config), ("--shares", self.shares)):
            if given and len(given) != count:
                raise BadInput(f"{flag}: {len(given)} given for {count} datasets")
        if len(set(zip(self.names, self.config or self.names, strict=True))) < count:
            raise BadInput(f"hf {' '.join(self.names)}: names a dataset twice")
        if not all(0 < share < float("inf") for share in self.shares):
            raise BadInput(f"--shares {' '.join(map(str, self.shares))}: must be positive numbers")
        for name in self.names:  # a dataset's name has an owner in front, except for a few old datasets
            near = () if "/" in name or Path(name).exists() else difflib.get_close_matches(name, PRESETS)
            if near:
                raise BadInput(f"hf {name}: no such preset; did you mean {near[0]}?")
        return list(zip(self.names, self.config or (None,) * count, self.shares or (1.0,) * count, strict=True))

    def source(self) -> str:
        shares = ("shares " + " ".join(map(str, self.shares)),) if self.shares else ()
        return " ".join(("hf", *self.names, *self.config, self.split, *shares))

    def identity(self) -> str:
        return self.digest_of(path for name in self.names for path in sorted(Path(name).rglob("*")) if path.is_file())


@dataclass(kw_only=True)
class Inspect:
    """Describe a folder of shards and check all of it."""

    folder: tyro.conf.Positional[Path]
    """Read this folder of shards, ours or llm.c's."""
    data_pattern: str = TRAIN_PATTERN
    """Match the file names of training shards; validation shards have val in place of train."""


@dataclass(kw_only=True)
class Verify(Inspect):
    """Check every header, checksum and token of a folder of shards; the exit code is 1 if one is damaged."""


Command = (
    Annotated[Embedded, tyro.conf.subcommand("embedded")]
    | Annotated[Text, tyro.conf.subcommand("text")]
    | Annotated[Hub, tyro.conf.subcommand("hf")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
)


@exit_with_a_sentence
def main() -> int:
    command = tyro.cli(Command, description=__doc__, config=(tyro.conf.ConsolidateSubcommandArgs,))
    if isinstance(command, Inspect):
        return verify(command.folder, command.data_pattern, describe=not isinstance(command, Verify))
    check_limits(command)
    try:
        meta = build_shards(
            command.parts(),
            command.out,
            source=command.source(),
            tokenizer=command.tokenizer,
            vocab_size=command.vocab_size,
            max_tokens=command.max_tokens,
            max_documents=command.max_documents,
            val_fraction=command.val_fraction,
            identity=command.identity(),
        )
    except CannotWrite as full:
        print(f"error: {full}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command to continue from the last save", file=sys.stderr)
        return 130
    documents = meta["documents"]
    print(
        f"{command.out}: {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens, vocabulary "
        f"{meta['vocab_size']:,}, from {documents['train']:,} + {documents['val']:,} documents "
        f"({documents['duplicates']:,} duplicates left out), fingerprint {meta['fingerprint']}"
    )
    if without_text := meta.get("rows_without_text"):
        print(f"{without_text:,} rows had no text in the column and were left out")
    for name, part in meta.get("parts", {}).items():
        share = part["tokens"] / (meta["train_tokens"] + meta["val_tokens"])
        print(f"{name}: {part['tokens']:,} tokens ({share:.2%}) from {part['documents']:,} documents")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")
    return 0
