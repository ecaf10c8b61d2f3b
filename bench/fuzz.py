"""Checks that damaged files are refused with a sentence or read correctly; none crashes, hangs or is misread.

    python -m bench.fuzz --cases 10000

Shards with their meta.json, a run's JSON files and its checkpoints are damaged at random (bytes, lengths, JSON values
and keys, missing files) and read by the code that trains and reports; text files by the code that builds shards.
"""

import contextlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from analysis.questions import answers
from analysis.runs import load_run
from analysis.verdict import judge
from bench.fuzz_text import Texts
from bench.synthetic import write_run
from corpus.build import build_shards
from corpus.shards import HEADER_BYTES, SLOT_CRC32, open_shards
from data import TokenStream
from engine import checkpoint, files
from engine.checkpoint import Progress, load_optimizers, save_optimizers
from engine.cli import BadInput, exit_with_a_sentence
from engine.files import cut_jsonl
from engine.ranks import Rank, Sharding
from model import Transformer
from optim import build_optimizers, parameter_layout
from report import run_row, summary_table
from settings import Settings, resolve

SECONDS_PER_CASE = 20
ODD_VALUES = (None, True, -1, 0, 2**70, 1e308, -0.5, "", "x" * 50, "../../etc", [], [[]], {}, {"a": [1]}, float("nan"))
SMALL = {"model": "nano", "layers": 1, "d_model": 16, "heads": 2, "kv_heads": 1, "d_ff": 16, "seq_len": 16}


@dataclass(frozen=True)
class Arguments:
    """Read damaged files."""

    cases: int = 10_000
    """How many, a third each of shards, run files and checkpoints."""
    texts: int = 1000
    """How many of text files that shards are built from (bench/fuzz_text.py)."""
    seed: int = 0
    """Of the random damage."""


class Hang(BaseException):
    """A case took longer than SECONDS_PER_CASE."""


class Accepted(Exception):
    """A reader accepted wrong contents; the message names them."""


def damage_bytes(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    kind = rng.choice(("flip", "flip", "cut", "grow", "zero", "repeat", "empty", "gone"))
    if kind == "gone":
        path.unlink()
        return
    if kind == "flip" and content:
        for _ in range(rng.choice((1, 1, 2, 8))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[rng.randrange(len(content) + 1) :]
    elif kind == "grow":
        content += rng.randbytes(rng.choice((1, 2, 7, 1024)))
    elif kind in ("zero", "repeat") and content:
        start = rng.randrange(len(content))
        end = min(len(content), start + rng.choice((1, 4, 64)))
        content[start:end] = bytes(end - start) if kind == "zero" else content[start:end] * 2
    elif kind == "empty":
        content.clear()
    path.write_bytes(content)


def damage_json(path: Path, rng: random.Random) -> None:
    """Change one value or key of one line, at any depth."""
    lines = (
        path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text(encoding="utf-8")]
    )
    place = rng.randrange(max(1, len(lines)))
    value: Any = json.loads(lines[place]) if lines else None
    holder, key = value, None
    while isinstance(holder, dict | list):
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            break
        key = rng.choice(keys)
        if not isinstance(holder[key], dict | list) or rng.random() < 0.4:
            break
        holder = holder[key]
    if key is not None:
        if rng.random() < 0.3:
            del holder[key]
        else:
            holder[key] = rng.choice(ODD_VALUES)
    lines[place : place + 1] = [json.dumps(value)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def damage_checkpoint(path: Path, rng: random.Random) -> None:
    """Change or delete an entry under right checksums; not the weights, where any number is valid."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise ValueError("damaged already; saving it again would hide that")
    contents = torch.load(path, weights_only=True)
    holder: Any = contents
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = rng.choice([k for k in keys if k not in ("model", "step", "config")] or [None])
        if key is None:
            return
        if not isinstance(holder[key], dict | list) or rng.random() < 0.3:
            break
        holder = holder[key]
    if rng.random() < 0.3:
        del holder[key]
    else:
        holder[key] = rng.choice((*ODD_VALUES, torch.zeros(3), torch.zeros(3, 3)))
    torch.save(contents, path)


def damage(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.6:
        with contextlib.suppress(ValueError, TypeError):  # damaged already
            damage_json(path, rng)
            return
    if path.suffix == ".pt" and rng.random() < 0.5:
        with contextlib.suppress(Exception):  # damaged already: torch raises many kinds
            damage_checkpoint(path, rng)
            return
    damage_bytes(path, rng)


def read_shards(folder: Path, whole: Path) -> None:
    """Read every token of every split; Accepted where a count or a checked token differs from the files."""
    shards = open_shards(folder)
    for split, paths in shards.files.items():
        stream = TokenStream(shards, split)
        tokens = stream.read(0, len(stream))
        held = np.concatenate([np.fromfile(path, "<u2", offset=HEADER_BYTES) for path in paths])
        if len(tokens) != len(held) or (tokens != held).any() or tokens.max(initial=0) >= shards.vocab_size:
            raise Accepted(f"{split}: {len(tokens)} tokens of {len(held)}")
        crcs = [np.fromfile(path, "<u4", count=256)[SLOT_CRC32] for path in paths]
        original = [np.fromfile(whole / path.name, "<u2", offset=HEADER_BYTES) for path in paths]
        if all(crcs) and not np.array_equal(np.concatenate(original), held):
            raise Accepted(f"{split}: other tokens under a checksum")


def read_run(folder: Path, whole: Path) -> None:
    """Read a run as a report does, and cut its lines as --resume does."""
    run = load_run(folder)
    run_row(run, "a run")
    summary_table([run])
    for verdict in judge([run]):
        verdict.sentences()
    answers([run])
    for name in (files.METRICS, files.SPECTRA):
        cut_jsonl(folder / name, 3)
        for line in (folder / name).read_text(encoding="utf-8").splitlines() if (folder / name).exists() else ():
            if json.loads(line)["step"] > 3:
                raise Accepted(f"{name}: kept a line after step 3")


class Checkpoints:
    """Reads a damaged checkpoint as a resumed run does."""

    def __init__(self, shards_folder: Path) -> None:
        _, config, shards = resolve(Settings(**SMALL, data=shards_folder, batch_tokens=64, tokens=256), Rank())
        torch.manual_seed(0)
        self.model = Transformer(config, shards.vocab_size)
        self.sharding, self.layout = Sharding(self.model), parameter_layout(self.model, "muon")

    def write(self, folder: Path) -> None:
        optimizers = build_optimizers(self.model, "muon", lr=0.1, adamw_lr=0.1)
        for p in self.model.parameters():
            p.grad = torch.ones_like(p)
        for optimizer in optimizers:
            optimizer.step()
        contents = {
            "model": self.model.state_dict(),
            "optimizer": save_optimizers(optimizers, self.layout, self.sharding),
            "step": 3,
            "tokens": 192,
            "loader": {"epoch": 0, "position": 12},
            "rng": {"torch": torch.get_rng_state(), "cuda": None},
            "config": {"config_hash": "0" * 16, "model": "nano"},
            "progress": vars(Progress(3, 1.0, 2.0, 0.0, 5.0, 5.0, 0.1, 5.0)),
        }
        for _ in range(2):
            checkpoint.save_checkpoint(folder, contents)

    def read(self, folder: Path, whole: Path) -> None:
        contents, damaged = checkpoint.load_checkpoint(folder, lambda line: None)
        checkpoint.set_aside(damaged)
        if contents is None:
            return
        original = torch.load(whole / files.CHECKPOINT, weights_only=True)
        if contents["step"] != original["step"] or contents["config"] != original["config"]:
            raise Accepted("another step or config")
        kept = vars(Progress.of(contents)) | {"best_val_loss": None}  # which may be infinite
        json.dumps(kept, allow_nan=False)  # as in the summary of the run that continues
        if any(type(contents["loader"][key]) is not int for key in ("epoch", "position")):
            raise Accepted("another place in the data")
        model = Transformer(self.model.config, len(self.model.embedding))
        optimizers = build_optimizers(model, "muon", lr=0.1, adamw_lr=0.1)
        try:  # as engine/checkpoint.py's restore does
            model.load_state_dict(contents["model"])
            load_optimizers(optimizers, parameter_layout(model, "muon"), Sharding(model), contents["optimizer"])
        except (RuntimeError, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise BadInput(f"the checkpoint does not fit: {type(error).__name__}") from error
        for name, weight in original["model"].items():
            if not torch.equal(model.state_dict()[name], weight):
                raise Accepted(f"another {name}")


def shards_to_damage(folder: Path) -> None:
    rng = random.Random(0)
    documents = [" ".join(rng.choices(("one", "two", "three", "four"), k=40)) for _ in range(150)]
    build_shards(lambda: iter(documents), folder, source="fuzz", vocab_size=300, val_fraction=0.2)


def run_to_damage(folder: Path) -> None:
    write_run(folder, steps=6, layers=1, gap=True, experts=2, by_token=True, momentum=True)


def try_cases(
    whole: Path,
    read: Callable[[Path, Path], None],
    cases: int,
    rng: random.Random,
    folder: Path,
    harm: Callable[[Path, random.Random], None] = damage,
) -> tuple[Counter[str], list[str]]:
    """How many cases ended in which way, and the faults found."""
    counts: Counter[str] = Counter()
    faults: list[str] = []

    def hang(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, hang)
    for case in range(cases):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        for _ in range(rng.choice((1, 1, 1, 2))):
            if any(p.is_file() for p in folder.iterdir()):
                harm(folder, rng)
        signal.alarm(SECONDS_PER_CASE)
        try:
            read(folder, whole)
            counts["read correctly"] += 1
        except BadInput as refusal:
            counts["refused with a sentence"] += 1
            if "\n" in str(refusal):
                faults.append(f"case {case}: more than a sentence: {refusal}")
        except Hang:
            faults.append(f"case {case}: hangs")
        except Accepted as wrong:
            faults.append(f"case {case}: accepted {wrong}")
        except Exception:
            faults.append(f"case {case}: {traceback.format_exc(limit=-2)}")
        finally:
            signal.alarm(0)
    return counts, faults


@exit_with_a_sentence
def main() -> int:
    a = tyro.cli(Arguments, description=__doc__)
    if a.cases < 0 or a.texts < 0:
        raise BadInput(f"--cases {a.cases} --texts {a.texts}: must be 0 or more")
    rng, began = random.Random(a.seed), time.monotonic()
    total: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        shards_to_damage(root / "shards")
        run_to_damage(root / "run")
        checkpoints = Checkpoints(root / "shards")
        (root / "checkpoint").mkdir()
        checkpoints.write(root / "checkpoint")
        texts = Texts(Accepted, rng)
        texts.write(root / "texts")
        share = -(-a.cases // 3)
        parts = {
            "shards": (read_shards, share, damage),
            "run": (read_run, share, damage),
            "checkpoint": (checkpoints.read, share, damage),
            "texts": (texts.read, a.texts, lambda folder, rng: texts.damage(folder, rng, damage_bytes)),
        }
        for part, (read, share, harm) in parts.items():
            counts, faults = try_cases(root / part, read, share, rng, root / "damaged", harm)
            outcomes = ", ".join(f"{count} {words}" for words, count in sorted(counts.items()))
            print(f"{part:10} {share} cases: {outcomes}, {len(faults)} faults", flush=True)
            total += [f"{part}: {fault}" for fault in faults]
    for fault in total[:20]:
        print(fault)
    print(f"{a.cases + a.texts} cases, {len(total)} faults, {time.monotonic() - began:.0f} s")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
