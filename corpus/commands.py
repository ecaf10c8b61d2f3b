"""Token shards: build them from text, look into them, stream them into a run.

    python data.py embedded --out shards/stdlib          # the Python sources of this machine, no network
    python data.py text notes.txt corpus.parquet --out shards/mine
    python data.py hf smollm-mix --max-tokens 1e9 --out shards/smollm-1b
    python data.py inspect shards/mine

This file is the command and the front door: sources.py says where text comes from, build.py makes shards of it,
shardfiles.py has the format, loader.py the batches. An interrupted build goes on with the same command.
"""

import difflib
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from corpus.build import Part, build_shards
from corpus.inspection import verify
from corpus.shards import MAX_VOCAB_SIZE, TRAIN_PATTERN, digest
from corpus.sources import (
    Column,
    Repeated,
    TextFiles,
    embedded_documents,
    embedded_files,
    hub_dataset,
    stamp,
    text_files,
)
from engine.cli import BadInput, CannotWrite, Count, exit_with_a_sentence


@dataclass(frozen=True)
class Preset:
    """A known mix: (dataset, configuration, share of the tokens), and the tokenizer that goes with it."""

    parts: tuple[tuple[str, str, float], ...]
    tokenizer: str = "HuggingFaceTB/SmolLM2-135M"  # vocabulary 49,152


SMOLLM = "HuggingFaceTB/smollm-corpus"
PRESETS = {
    "smollm-mix": Preset(((SMOLLM, "fineweb-edu-dedup", 0.7), (SMOLLM, "cosmopedia-v2", 0.3))),
    "cosmopedia": Preset(((SMOLLM, "cosmopedia-v2", 1.0),)),
    "fineweb-edu": Preset((("HuggingFaceFW/fineweb-edu", "sample-10BT", 1.0),)),
}


@dataclass(kw_only=True)
class Build:
    out: Path
    """Folder to create for the shards."""
    vocab_size: int = 49_152
    """Entries of the tokenizer to train, 257 to 65,536; 4096 suits the nano model."""
    tokenizer: str | None = None
    """A tokenizer.json or a hub name to use instead of training one."""
    max_tokens: Count | None = None
    """Stop after this many tokens, both splits and end-of-text ids included."""
    val_fraction: float = 0.02
    """Share of the documents that goes to validation, by the hash of their text."""

    def identity(self) -> str:
        """What tells apart inputs of one name."""
        return ""


@dataclass(kw_only=True)
class Embedded(Build):
    """The Python sources on this machine: real text without a network."""

    scope: Literal["stdlib", "all"] = "stdlib"
    """The standard library, or site-packages too."""

    def parts(self) -> list[Part]:
        return [Part(self.source(), Repeated(lambda: embedded_documents(self.scope)))]

    def source(self) -> str:
        return f"embedded {self.scope} of Python {sys.version.split()[0]}"

    def identity(self) -> str:
        return digest(stamp(embedded_files(self.scope)))


@dataclass(kw_only=True)
class Text(Build):
    """Local .txt and .jsonl (also .gz, .zst) and .parquet files, or folders of them."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Files or folders; a row, or a 64 KiB piece of a .txt, is a document."""
    text_column: str = "text"
    """Column of .jsonl and .parquet that holds the text."""
    ids_column: str | None = None
    """Column that holds token ids, for data that --tokenizer has tokenised already."""

    def parts(self) -> list[Part]:
        return [Part(self.source(), TextFiles(text_files(self.paths), column(self)))]

    def source(self) -> str:
        return "text " + " ".join(map(str, self.paths))

    def identity(self) -> str:
        return digest([self.text_column, self.ids_column, stamp(text_files(self.paths))])


@dataclass(kw_only=True)
class Hub(Build):
    """Hugging Face datasets, streamed: one, a mix of several, or smollm-mix, cosmopedia, fineweb-edu."""

    names: tyro.conf.Positional[tuple[str, ...]]
    """Dataset names on the hub, local folders that `datasets` understands, or one of the presets."""
    config: tuple[str, ...] = ()
    """Configuration of each dataset."""
    shares: tuple[float, ...] = ()
    """Share of the tokens that comes from each dataset (default: equal ones)."""
    split: str = "train"
    """Split of the datasets."""
    text_column: str = "text"
    """Column that holds the text."""
    ids_column: str | None = None
    """Column that holds token ids, for data that --tokenizer has tokenised already."""

    def __post_init__(self) -> None:
        if len(self.names) == 1 and self.names[0] in PRESETS:
            self.tokenizer = self.tokenizer or PRESETS[self.names[0]].tokenizer

    def parts(self) -> list[Part]:
        if not self.names:
            raise BadInput(f"hf: name a dataset, or a preset: {', '.join(PRESETS)}")
        if len(self.names) == 1 and self.names[0] in PRESETS:
            if self.config or self.shares:
                raise BadInput(f"hf {self.names[0]}: a preset has its own --config and --shares")
            wanted = PRESETS[self.names[0]].parts
        else:
            for flag, given in (("--config", self.config), ("--shares", self.shares)):
                if given and len(given) != len(self.names):
                    raise BadInput(f"{flag}: {len(given)} given for {len(self.names)} datasets")
            if len(set(zip(self.names, self.config or self.names, strict=True))) < len(self.names):
                raise BadInput(f"hf {' '.join(self.names)}: names a dataset twice")
            if not all(0 < share < float("inf") for share in self.shares):
                raise BadInput(f"--shares {' '.join(map(str, self.shares))}: must be positive numbers")
            count = len(self.names)
            for name in self.names:  # a hub's names have an owner, but for a few old ones
                near = () if "/" in name or Path(name).exists() else difflib.get_close_matches(name, PRESETS)
                if near:
                    raise BadInput(f"hf {name}: no such preset; did you mean {near[0]}?")
            wanted = tuple(zip(self.names, self.config or (None,) * count, self.shares or (1.0,) * count, strict=True))
        return [
            Part(" ".join(filter(None, (name, config))), hub_dataset(name, config, self.split, column(self)), share)
            for name, config, share in wanted
        ]

    def source(self) -> str:
        shares = ("shares " + " ".join(map(str, self.shares)),) if self.shares else ()
        return " ".join(("hf", *self.names, *self.config, self.split, *shares))

    def identity(self) -> str:
        local = [path for name in self.names for path in sorted(Path(name).rglob("*")) if path.is_file()]
        return digest([self.text_column, self.ids_column, stamp(local)])


def column(build: Text | Hub) -> Column:
    if build.ids_column is None:
        return Column(build.text_column)
    if build.tokenizer is None:
        raise BadInput(f"--ids-column {build.ids_column}: needs the --tokenizer that made the ids")
    return Column(build.ids_column, ids=True)


@dataclass(kw_only=True)
class Inspect:
    """Print what a folder of shards holds, and check all of it."""

    folder: tyro.conf.Positional[Path]
    """Folder of shards, ours or llm.c's."""
    data_pattern: str = TRAIN_PATTERN
    """File names of the training shards; the validation shards' are the same with val for train."""


@dataclass(kw_only=True)
class Verify(Inspect):
    """Check every header, checksum and token of a folder of shards; the exit code is 1 where one is damaged."""


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
    check_build(command)
    try:
        meta = build_shards(
            command.parts(),
            command.out,
            source=command.source(),
            tokenizer=command.tokenizer,
            vocab_size=command.vocab_size,
            max_tokens=command.max_tokens,
            val_fraction=command.val_fraction,
            identity=command.identity(),
        )
    except CannotWrite as full:
        print(f"error: {full}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "stopped; the same command goes on from what was saved, if it was at work for long enough", file=sys.stderr
        )
        return 130
    documents = meta["documents"]
    print(
        f"{command.out}: {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens, vocabulary "
        f"{meta['vocab_size']:,}, from {documents['train']:,} + {documents['val']:,} documents "
        f"({documents['duplicates']:,} duplicates left out), fingerprint {meta['fingerprint']}"
    )
    for name, part in meta.get("parts", {}).items():
        share = part["tokens"] / (meta["train_tokens"] + meta["val_tokens"])
        print(f"{name}: {part['tokens']:,} tokens ({share:.2%}) from {part['documents']:,} documents")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")
    return 0


def check_build(build: Build) -> None:
    """BadInput for the first flag out of its range."""
    if not 257 <= build.vocab_size <= MAX_VOCAB_SIZE:
        raise BadInput(f"--vocab-size {build.vocab_size}: must be 257 to {MAX_VOCAB_SIZE:,}; a token is a uint16")
    if build.max_tokens is not None and build.max_tokens < 1:
        raise BadInput(f"--max-tokens {build.max_tokens}: must be positive")
    if isinstance(build, Text) and not build.paths:
        raise BadInput("text: name at least one file or folder")
    if not 0 < build.val_fraction < 1:
        raise BadInput(f"--val-fraction {build.val_fraction}: must lie between 0 and 1")


if __name__ == "__main__":
    sys.exit(main())
