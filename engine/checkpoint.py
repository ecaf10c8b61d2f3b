"""Checkpoints: save one whole, verify it when it is read, fall back on the one before.

save_checkpoint(folder, contents); contents, damaged = load_checkpoint(folder, print)
"""

import errno
import math
import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from engine.cli import BadInput, first_line
from engine.files import CHECKPOINT, PREVIOUS_CHECKPOINT, sync_folder, writing, written

CHECKPOINT_PARTS = {
    **{"model": dict, "optimizer": list, "step": int, "tokens": int, "loader": dict, "rng": dict, "config": dict},
    **{"clock": dict, "losses": dict},
}


def save_checkpoint(folder: Path, contents: dict[str, Any], name: str = CHECKPOINT) -> None:
    """Write a checkpoint; the one it replaces stays as checkpoint.prev.pt."""
    path = folder / name
    unfinished = written(path, lambda file: torch.save(contents, file), "wb")
    with writing(path):
        if name == CHECKPOINT and path.exists():
            os.replace(path, folder / PREVIOUS_CHECKPOINT)
        os.replace(unfinished, path)
        sync_folder(folder)


def load_checkpoint(folder: Path, say: Callable[[str], None]) -> tuple[dict[str, Any] | None, list[Path]]:
    """The newest complete checkpoint of a run, on the CPU, None without one, and the damaged ones before it, which are
    named. BadInput where all that there are, are damaged."""
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
