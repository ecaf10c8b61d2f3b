"""A run's folder runs/<name>/: the names of its files, and writing them whole or not at all.

Training writes through this file and reports read by its names; importing it does not import torch.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cli import BadInput, first_line

CONFIG, SUMMARY, LOG = "config.json", "summary.json", "log.txt"
METRICS, SPECTRA = "metrics.jsonl", "manifold_stats.jsonl"
CHECKPOINT, PREVIOUS_CHECKPOINT, BEST = "checkpoint.pt", "checkpoint.prev.pt", "best.pt"


def is_safe_name(name: str) -> bool:
    """A single path component that cannot leave the runs folder or hide in it."""
    return re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}", name) is not None


def write_whole(path: Path, write: Callable[[Any], None], mode: str = "wb") -> None:
    """Call `write(file)` on a temporary file beside `path`, force it to disk and rename it into place."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, mode) as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_whole(path, lambda file: file.write(json.dumps(value, indent=2, allow_nan=False) + "\n"), mode="w")


def config_hash(config: dict[str, Any], leave_out: Iterable[str]) -> str:
    """16 hex digits over the settings that decide what is learned."""
    kept = {key: value for key, value in config.items() if key not in set(leave_out)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def check_same_run(name: str, old: dict[str, Any], new: dict[str, Any], ignored: Iterable[str]) -> None:
    """BadInput that names every setting in which the run to resume and the one asked for differ."""
    if old["config_hash"] == new["config_hash"]:
        return
    identity = list(new)[: list(new).index("vocab_size") + 1]  # what the hash is made of comes first
    changed = [key for key in identity if key not in ignored and old.get(key) != new[key]]
    said = ", ".join(f"{key} was {old.get(key)}, is {new[key]}" for key in changed)
    raise BadInput(f"--resume {name}: its settings differ ({said}); repeat them or choose another name")


def provenance() -> dict[str, Any]:
    """Commit and versions that a run's config.json records; None where something is absent."""
    versions = {}
    for package in ("torch", "triton", "numpy", "tokenizers", "datasets"):
        try:
            versions[f"{package}_version"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[f"{package}_version"] = None
    return {"git_commit": _git_commit(), "python_version": platform.python_version(), **versions}


def _git_commit() -> str | None:
    """The commit of this source tree, with + where tracked files differ from it."""
    git = ("git", "-C", str(Path(__file__).resolve().parent))
    try:
        commit = subprocess.run((*git, "rev-parse", "HEAD"), capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run((*git, "diff", "--quiet", "HEAD"), capture_output=True, check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(dirty)


def save_checkpoint(folder: Path, contents: dict[str, Any], name: str = CHECKPOINT) -> None:
    """Write a checkpoint; the one it replaces stays as checkpoint.prev.pt."""
    import torch

    path = folder / name
    if name == CHECKPOINT and path.exists():
        os.replace(path, folder / PREVIOUS_CHECKPOINT)
    write_whole(path, lambda file: torch.save(contents, file))


def load_checkpoint(folder: Path, say: Callable[[str], None], set_aside: bool) -> dict[str, Any] | None:
    """The newest complete checkpoint of a run, on the CPU; None without one. A damaged one is named and, with
    `set_aside`, renamed to *.damaged."""
    import torch

    damaged = []
    for path in (folder / CHECKPOINT, folder / PREVIOUS_CHECKPOINT):
        if not path.exists():
            continue
        try:
            contents = torch.load(path, map_location="cpu", weights_only=True)
            missing = {"model", "optimizer", "step", "tokens", "loader", "rng", "config"} - contents.keys()
            if missing:
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
            return contents
        except Exception as error:  # torch, zipfile and pickle raise many kinds on a damaged file
            damaged.append(str(path))
            aside = path.with_suffix(".damaged")  # so that the next save does not put it in place of a good one
            if set_aside:
                os.replace(path, aside)
            say(f"{path}: damaged, set aside as {aside.name} ({first_line(error)})")
    if damaged:
        raise BadInput(f"{' and '.join(damaged)}: damaged, and there is no other checkpoint to resume from")
    return None


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; BadInput names the file where it is missing or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: holds a JSON {type(value).__name__}, not an object")
    return value


class Output:
    """What rank 0 says: to the terminal, around the progress bar if there is one, and to log.txt."""

    def __init__(self, speaks: bool) -> None:
        self.speaks, self.log, self.bar = speaks, None, None

    def say(self, line: str, terminal: bool = True) -> None:
        if not self.speaks:
            return
        if terminal and self.bar is not None:
            self.bar.write(line)
        elif terminal:
            print(line, flush=True)
        if self.log is not None:
            self.log.write(line + "\n")
            self.log.flush()

    def start_bar(self, done: int, total: int) -> None:
        if self.speaks and sys.stderr.isatty():
            self.bar = tqdm(initial=done, total=total, unit="update")

    def line(self, values: dict[str, Any], terminal: bool = True) -> None:
        """A line of `key:value` pairs."""
        self.say(" ".join(f"{key}:{value}" for key, value in values.items() if value is not None), terminal)
