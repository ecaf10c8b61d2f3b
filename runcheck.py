"""The JSON files of a run, read and checked: what a report relies on is of the kind it should be.

    config = config(folder / "config.json"); lines = spectra(folder / "manifold_stats.jsonl")

A file that a crash, an editor or somebody else made may hold anything; BadInput names the file, the line and the key.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import files
from engine.cli import BadInput

MOST_LAYERS = 10_000  # more are damage, and would be allocated
LARGEST = 2**53  # whole numbers beyond are no counts, and floats do not hold them
CONFIG_NUMBERS = (
    *("lr", "adamw_lr", "weight_decay", "momentum", "warmup", "min_lr", "grad_clip", "dropout", "batch_tokens"),
    *("seq_len", "eval_tokens", "vocab_size", "params", "active_params", "tokens", "world_size", "ns_steps"),
)
TRAIN = ("step", "tokens", "train_loss", "step_ms")
VAL = ("step", "tokens", "val_loss", "val_accuracy", "train_seconds")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e300


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def config(path: Path) -> dict[str, Any]:
    """A run's settings: flat, and with the few that every report needs."""
    read = files.load_json(path)
    missing = {"optimizer", "seed", "model", "steps"} - read.keys()
    if missing:
        raise BadInput(f"{path}: lacks {', '.join(sorted(missing))}")
    for key, value in read.items():
        right = value is None or isinstance(value, str | int | float)
        if key in ("optimizer", "model"):
            right = isinstance(value, str)
        elif key in ("seed", "steps"):
            right = is_count(value)
        elif key in CONFIG_NUMBERS:
            right = value is None or is_number(value)
        if not right:
            raise BadInput(f"{path}: {key} is {_short(value)}")
    return read


def summary(path: Path) -> dict[str, Any]:
    """How a run ended; empty where there is no such file."""
    if not path.exists():
        return {}
    read = files.load_json(path)
    for key, value in read.items():
        words = key in ("status", "reason", "data_fingerprint", "config_hash")
        right = isinstance(value, str) if words else is_number(value)
        if not right and (value is not None or key == "status"):
            raise BadInput(f"{path}: {key} is {_short(value)}")
    return read


def metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    lines = files.read_jsonl(path)
    for number, line in enumerate(lines, start=1):
        kind = line.get("kind")
        if not isinstance(kind, str):
            raise BadInput(f"{path}: line {number} says of no kind what it is")
        where = f"{path}: line {number}"
        if kind == "experts":
            _counts(where, line, ("step", "layer"))
            _list_of_numbers(where, line, "utilization")
        elif kind in ("train", "val"):
            _counts(where, line, ("step", "tokens"))
            _numbers(where, line, TRAIN if kind == "train" else VAL, but=("kind",))
    return lines


def spectra(path: Path) -> list[dict[str, Any]]:
    """The lines of manifold_stats.jsonl; all matrices of one projection are of one size."""
    lines = files.read_jsonl(path)
    sizes: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{path}: line {number}"
        _counts(where, line, ("step", "layer"))
        if not isinstance(line.get("proj"), str):
            raise BadInput(f"{where}: proj is {_short(line.get('proj'))}")
        _list_of_numbers(where, line, "singular_values")
        size = len(line["singular_values"])
        if sizes.setdefault(line["proj"], size) != size:
            raise BadInput(f"{where}: {size} singular values where {sizes[line['proj']]} were before")
        _numbers(where, line, (), but=("proj", "singular_values"))
    return lines


def _counts(where: str, line: dict[str, Any], keys: Sequence[str]) -> None:
    for key in keys:
        if not is_count(line.get(key)) or (key == "layer" and line[key] >= MOST_LAYERS):
            raise BadInput(f"{where}: {key} is {_short(line.get(key))}")


def _numbers(where: str, line: dict[str, Any], needed: Sequence[str], but: Sequence[str]) -> None:
    """The needed keys are there, and every value is a number or null."""
    for key in needed:
        if key not in line:
            raise BadInput(f"{where}: lacks {key}")
    for key, value in line.items():
        if key not in but and value is not None and not is_number(value):
            raise BadInput(f"{where}: {key} is {_short(value)}")


def _list_of_numbers(where: str, line: dict[str, Any], key: str) -> None:
    values = line.get(key)
    if not isinstance(values, list) or not values or not all(value is None or is_number(value) for value in values):
        raise BadInput(f"{where}: {key} is {_short(values)}")


def _short(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 40 else words[:37] + "..."
