"""The names of a run's files in runs/<name>/, and writing them whole or not at all.

Training writes through this file and reports read by its names; importing it does not import torch.
"""

import contextlib
import errno
import gzip
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cli import BadInput, first_line

CONFIG, SUMMARY, LOG = "config.json", "summary.json", "log.txt"
METRICS, SPECTRA = "metrics.jsonl", "manifold_stats.jsonl"
PACKED = ".gz"  # how a record keeps spectra
CHECKPOINT, PREVIOUS_CHECKPOINT, BEST = "checkpoint.pt", "checkpoint.prev.pt", "best.pt"


class CannotWrite(RuntimeError):
    """A file of the run cannot be written (full disk, read-only folder); the message is one sentence that names it."""


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn what the system says while `path` is written into CannotWrite."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError where the disk is full
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise CannotWrite(f"{path}: cannot be written ({reason})") from error


def is_safe_name(name: str) -> bool:
    """A single path component that cannot leave the runs folder or hide in it."""
    return re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}", name) is not None


def write_whole(path: Path, write: Callable[[Any], None], mode: str = "wb") -> None:
    """Call `write(file)` on a temporary file beside `path`, force it to disk and rename it into place; CannotWrite
    leaves what was there."""
    unfinished = _written(path, write, mode)
    with writing(path):
        os.replace(unfinished, path)
        _sync_folder(path.parent)


def temporary(path: Path) -> Path:
    """What `path` is called until it is whole; a kill may leave it behind, and the next write takes it over."""
    return path.with_name(path.name + ".tmp")


def _written(path: Path, write: Callable[[Any], None], mode: str) -> Path:
    """A complete temporary file beside `path`, or none."""
    unfinished = temporary(path)
    try:
        with writing(path), open(unfinished, mode) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except CannotWrite:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
    return unfinished


def _sync_folder(folder: Path) -> None:
    """A rename survives a power cut only when its folder is on disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    unfinished = _written(path, lambda file: torch.save(contents, file), "wb")
    with writing(path):
        if name == CHECKPOINT and path.exists():
            os.replace(path, folder / PREVIOUS_CHECKPOINT)
        os.replace(unfinished, path)
        _sync_folder(folder)


def load_checkpoint(folder: Path, say: Callable[[str], None]) -> tuple[dict[str, Any] | None, list[Path]]:
    """The newest complete checkpoint of a run, on the CPU, None without one, and the damaged ones before it, which are
    named. BadInput where all that there are, are damaged."""
    import torch

    damaged: list[Path] = []
    for path in (folder / CHECKPOINT, folder / PREVIOUS_CHECKPOINT):
        if not path.exists():
            continue
        try:
            with zipfile.ZipFile(path) as archive:  # torch writes checksums and does not look at them
                if archive.testzip() is not None:
                    raise ValueError("a checksum in it does not match")
            contents = torch.load(path, map_location="cpu", weights_only=True)
            _check_checkpoint(contents)
            return contents, damaged
        except Exception as error:  # torch, zipfile and pickle raise many kinds on a damaged file
            # The file may be good where the system cannot read it now; a damaged archive asks for invalid places.
            if isinstance(error, OSError | MemoryError) and getattr(error, "errno", None) != errno.EINVAL:
                raise BadInput(f"{path}: cannot be read ({first_line(error)})") from None
            damaged.append(path)
            say(f"{path}: damaged ({first_line(error)})")
    if damaged:
        raise BadInput(f"{' and '.join(map(str, damaged))}: damaged, and there is no other checkpoint to resume from")
    return None, []


def set_aside(damaged: Iterable[Path]) -> None:
    """Rename damaged checkpoints to *.damaged, so that the next save does not put one in place of a good one."""
    for path in damaged:
        with writing(path):
            os.replace(path, path.with_suffix(".damaged"))


CHECKPOINT_PARTS = {
    **{"model": dict, "optimizer": list, "step": int, "tokens": int, "loader": dict, "rng": dict, "config": dict},
    **{"clock": dict, "losses": dict},
}


def _check_checkpoint(contents: Any) -> None:
    """ValueError unless a checkpoint has its parts, each of its kind, and the numbers that a run goes on with."""
    if not isinstance(contents, dict):
        raise ValueError(f"it holds a {type(contents).__name__}")
    for part, kind in CHECKPOINT_PARTS.items():
        if not isinstance(contents.get(part), kind):
            raise ValueError(f"its {part} is no {kind.__name__}")
    clock, losses, loader = contents["clock"], contents["losses"], contents["loader"]
    for name, count in (("step", contents["step"]), *((key, loader.get(key)) for key in ("epoch", "position"))):
        if type(count) is not int or count < 0:
            raise ValueError(f"its {name} is no count")
    seconds = {key: clock.get(key) for key in ("train_seconds", "wall_seconds")}
    seconds["spectra_seconds_blocked"] = clock.get("spectra_seconds_blocked", 0.0)
    results = {
        key: losses.get(key, math.nan) for key in ("train_loss", "val_loss", "val_accuracy")
    }  # None at the start
    for name, number in (*seconds.items(), *((key, value) for key, value in results.items() if value is not None)):
        if not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"its {name} is no number")
    if not isinstance(losses.get("best_val_loss"), int | float):  # infinite before there is one
        raise ValueError("its best_val_loss is no number")
    if not isinstance(contents["config"].get("config_hash"), str):
        raise ValueError("its config has no config_hash")


def _parsed(text: str) -> Any:
    """A JSON value; ValueError for what Python's reader takes beyond JSON, and for half a letter, which nothing can
    write out again."""
    value = json.loads(text, parse_constant=_no_number)
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file or of its .gz, none if both are missing; a torn last line of a running run is left
    out. BadInput names the line that is something else."""
    packed = path.with_name(path.name + PACKED)
    if not path.exists() and packed.exists():
        path = packed
    try:
        lines = (gzip.decompress(path.read_bytes()) if path == packed else path.read_bytes()).decode().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: not readable as text ({first_line(error)})") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = _parsed(line)
        except (ValueError, RecursionError):
            if number < len(lines):
                raise BadInput(f"{path}: line {number} is not JSON") from None
            break
        if not isinstance(record, dict):
            raise BadInput(f"{path}: line {number} holds a JSON {type(record).__name__}, not an object")
        records.append(record)
    return records


def load_json(path: Path, most_bytes: int = 2**24) -> dict[str, Any]:
    """A JSON object from a file; BadInput names the file where it is missing, too large or something else."""
    try:
        if path.stat().st_size > most_bytes:
            raise BadInput(f"{path}: {path.stat().st_size:,} bytes, more than the {most_bytes:,} that it may have")
        value = _parsed(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not readable as JSON ({first_line(error)})") from None
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
            log, self.log = self.log, None  # not asked again where it fails
            with writing(log.name):
                log.write(line + "\n")
                log.flush()
            self.log = log

    def start_bar(self, done: int, total: int) -> None:
        if self.speaks and sys.stderr.isatty():
            self.bar = tqdm(initial=done, total=total, unit="update")

    def line(self, values: dict[str, Any], terminal: bool = True) -> None:
        """A line of `key:value` pairs."""
        self.say(" ".join(f"{key}:{value}" for key, value in values.items() if value is not None), terminal)
