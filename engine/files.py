"""The names of a run's files in runs/<name>/, writing them whole or not at all, and JSON in and out of them.

Training writes through this file and reports read through it; importing it does not import torch.
"""

import contextlib
import fcntl
import json
import lzma
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from engine.cli import BadInput, CannotWrite, first_line

ROOT = Path(__file__).resolve().parent.parent  # of the source tree
CONFIG, SUMMARY, LOG = "config.json", "summary.json", "log.txt"
FINDINGS = "findings.json"  # of a report on suites: {suite: its sentences}
METRICS, SPECTRA = "metrics.jsonl", "manifold_stats.jsonl"
WANDB_ID = "wandb_id.txt"  # of the run in Weights & Biases that a resumed run continues
TOKENIZER = "tokenizer.json"  # of an imported run; others read that of their shards
PACKED, PACKED_DIGITS = ".xz", 5  # how a record keeps spectra
SUBSPACE_RANK = 5  # dimension of the singular subspaces whose alignment manifold_stats.jsonl holds
DECILES = 10  # of tokens by their frequency, whose losses metrics.jsonl holds
CHECKPOINT, PREVIOUS_CHECKPOINT, BEST = "checkpoint.pt", "checkpoint.prev.pt", "best.pt"
SAMPLES = "samples.json"  # three short texts of the best checkpoint


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn a failure to write `path` into CannotWrite."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise CannotWrite(f"{path}: cannot be written ({reason})") from error


def shown(path: Path) -> str:
    """A path as text that can be written as UTF-8, also one whose bytes the locale cannot decode."""
    return os.fsencode(path).decode("utf-8", errors="replace")


def lock(descriptor: int, name: object, say: Callable[[str], None] = print) -> bool:
    """Lock an open file or folder for this process and those that inherit it; False if another process has it.

    If the file system cannot lock, says so and returns True.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        say(f"{name}: cannot be locked ({error.strerror}); do not start a second process on it")
    return True


def is_safe_name(name: str) -> bool:
    """A single path component that cannot leave the runs folder or hide in it."""
    return re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}", name) is not None


def write_whole(path: Path, write: Callable[[Any], None], mode: str = "wb") -> None:
    """Call `write(file)` on a temporary file, sync it and rename it to `path`; CannotWrite keeps the old file."""
    unfinished = written(path, write, mode)
    with writing(path):
        os.replace(unfinished, path)
        sync_folder(path.parent)


def temporary(path: Path) -> Path:
    """What `path` is called until it is whole; a kill may leave it behind, and the next write takes it over."""
    return path.with_name(path.name + ".tmp")


def written(path: Path, write: Callable[[Any], None], mode: str) -> Path:
    """Write and sync a temporary file next to `path`; nothing is left of it after a failure."""
    unfinished = temporary(path)
    try:
        with writing(path), open(unfinished, mode, encoding=None if "b" in mode else "utf-8") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except CannotWrite:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
    return unfinished


def sync_folder(folder: Path) -> None:
    """A rename survives a power cut only when its folder is on disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_whole(path, lambda file: file.write(json.dumps(value, indent=2, allow_nan=False) + "\n"), mode="w")


def _parsed(text: str) -> Any:
    """A JSON value; ValueError for what Python's reader takes beyond JSON, and for half a letter, which nothing can
    write out again."""
    value = json.loads(text, parse_constant=_no_number)
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is not a number")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file or of its .xz, none if both are missing; a torn last line of a running run is left
    out. BadInput names the line that is something else."""
    packed = path.with_name(path.name + PACKED)
    if not path.exists() and packed.exists():
        path = packed
    try:
        lines = (lzma.decompress(path.read_bytes()) if path == packed else path.read_bytes()).decode().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError, lzma.LZMAError) as error:
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


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a user's text file that are not blank, each with its place as words; BadInput if it has none."""
    found = False
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    found = True
                    yield f"{path}: line {number}", line.rstrip("\n")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not readable as text ({first_line(error)})") from None
    if not found:
        raise BadInput(f"{path}: holds no line of text")


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a user's JSONL file, each with its place as words; BadInput names a line that holds none."""
    for where, line in text_lines(path):
        try:
            value = _parsed(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where}: is not JSON ({first_line(error)})") from None
        if not isinstance(value, dict):
            raise BadInput(f"{where}: holds a JSON {type(value).__name__}, not an object")
        yield where, value


def pack(records: Iterable[dict[str, Any]], path: Path) -> None:
    """Write path.xz, JSONL of these records, the same bytes whenever it is done; with rounded numbers a fifth of the
    unpacked file."""
    content = "".join(f"{json.dumps(record, allow_nan=False)}\n" for record in records).encode()
    path.with_name(path.name + PACKED).write_bytes(lzma.compress(content))


def rounded(value: Any, digits: int = PACKED_DIGITS) -> Any:
    """A value, list or record with its fractions rounded to so many digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, list):
        return [rounded(item, digits) for item in value]
    return {key: rounded(item, digits) for key, item in value.items()} if isinstance(value, dict) else value


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


class JsonlWriter:
    """Appends one JSON object per line; a killed run leaves whole lines but perhaps for the last."""

    def __init__(self, path: Path) -> None:
        with writing(path):
            self.file = path.open("a", encoding="utf-8")

    def write(self, *records: dict[str, Any]) -> None:
        with writing(self.file.name):
            self.file.write("".join(json.dumps(record, allow_nan=False) + "\n" for record in records))
            self.file.flush()

    def sync(self) -> None:
        """What was written survives a power cut."""
        with writing(self.file.name):
            os.fsync(self.file.fileno())


def cut_jsonl(path: Path, last_step: int) -> None:
    """Drop the lines after `last_step`, and a torn last line, so that a resumed run can append."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):  # damaged
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
    write_whole(path, lambda file: file.write("".join(line + "\n" for line in kept)), mode="w")


def finite(value: float) -> float | None:
    """The value to 7 digits, None where it is not a number."""
    return float(f"{value:.7g}") if math.isfinite(value) else None
