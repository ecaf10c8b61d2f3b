"""Checkpoints: everything the rest of a run depends on, saved whole, verified when read, loaded on any number of ranks.

    contents = state_of(work, layout, loader, progress); save_checkpoint(folder, contents | {"config": config})
    contents, damaged = load_checkpoint(folder, print); restore(folder, contents, work, layout, loader)

A checkpoint holds the optimizer state that a single rank would hold, whatever number of ranks wrote it.
"""

import dataclasses
import errno
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.cli import BadInput, first_line
from engine.files import CHECKPOINT, PREVIOUS_CHECKPOINT, sync_folder, writing, written
from engine.own_optimizer import OwnOptimizer
from engine.ranks import Sharding
from engine.step import TrainingStep
from kernels.optimizer import Muon, state_shapes

Layout = list[list[list[Tensor]]]  # the parameters of each group of each optimizer
PARTS = {"model": dict, "optimizer": list, "step": int, "tokens": int, "loader": dict, "rng": dict, "config": dict}


@dataclass
class Progress:
    """The one list of what survives a restart besides weights, optimizer state, loader and random numbers."""

    step: int = 0
    train_seconds: float = 0.0
    wall_seconds: float = 0.0
    spectra_seconds_blocked: float = 0.0
    train_loss: float | None = None
    val_loss: float | None = None
    val_accuracy: float | None = None
    best_val_loss: float = math.inf

    @classmethod
    def of(cls, contents: dict[str, Any]) -> "Progress":
        """The progress in a checkpoint; ValueError where it is not one. Older ones have it in two parts."""
        parts = [contents.get(part) for part in ("clock", "losses")] if "progress" not in contents else []
        parts.append(contents.get("progress", {"step": contents["step"]}))
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError("its progress is not a dict")
        fields = {key: value for part in parts for key, value in part.items()}
        fields.setdefault("spectra_seconds_blocked", 0.0)
        if wrong := fields.keys() ^ {field.name for field in dataclasses.fields(cls)}:
            raise ValueError(f"its progress lacks or adds {', '.join(sorted(map(str, wrong)))}")
        progress = cls(**fields)
        for name, value in vars(progress).items():
            absent = value is None and name in ("train_loss", "val_loss", "val_accuracy")
            endless = name == "best_val_loss" and value == math.inf  # before there is one
            if not absent and not endless and not _is_number(value):
                raise ValueError(f"its {name} is not a number")
        return progress


class Resumable(Protocol):
    """The methods of a loader that a checkpoint uses."""

    def state_dict(self) -> dict[str, int]: ...
    def load_state_dict(self, state: dict[str, int]) -> None: ...


def state_of(work: TrainingStep, layout: Layout, loader: Resumable, progress: Progress) -> dict[str, Any]:
    """The contents of a checkpoint but for its config; every rank must call it, rank 0 writes what it gets."""
    optimizer = save_optimizers(work.optimizers, layout, work.sharding)
    cuda = torch.cuda.get_rng_state(work.device) if work.device.type == "cuda" else None
    return {
        "model": work.model.state_dict(),
        "optimizer": optimizer,
        "step": progress.step,
        "loader": loader.state_dict(),
        "rng": {"torch": torch.get_rng_state(), "cuda": cuda},
        "progress": dataclasses.asdict(progress),
    }


def restore(folder: object, contents: dict[str, Any], work: TrainingStep, layout: Layout, loader: Resumable) -> None:
    """Take up a checkpoint of `folder`, so that the run continues as if it had never stopped; BadInput if it does not
    fit."""
    try:
        work.model.load_state_dict(contents["model"])
        load_optimizers(work.optimizers, layout, work.sharding, contents["optimizer"])
        loader.load_state_dict(contents["loader"])
        torch.set_rng_state(contents["rng"]["torch"])
        if work.device.type == "cuda" and contents["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(contents["rng"]["cuda"], work.device)
    except (RuntimeError, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise BadInput(f"{folder}: its checkpoint does not fit this run ({first_line(error)})") from error


def save_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], layout: Layout, sharding: Sharding
) -> list[dict[str, Any]]:
    """The state of every optimizer as one rank alone would hold it: {"state": {number of parameter: tensors}}.

    All ranks must call it; empty before the first step.
    """
    states = []
    for o, groups in zip(optimizers, layout, strict=True):
        if isinstance(o, OwnOptimizer):
            states.append(o.whole_state())
            continue
        state: dict[int, dict[str, Tensor]] = {}
        for number, (p, shapes) in enumerate(_kept(o, groups)):
            share = sharding.share_of[id(p)]
            mine = {} if share.own is None else o.state[share.own]
            steps = sharding.largest(float(mine.get("step", 0.0)) if mine else -1.0)
            if steps < 0:  # no rank has made a step
                continue
            # Every rank sends its part; only rank 0, which writes, keeps the whole.
            kept = {key: sharding.whole(share, mine.get(key), shape) for key, shape in shapes.items()}
            kept = {key: tensor.cpu() for key, tensor in kept.items()} if sharding.rank == 0 else {}
            if isinstance(o, torch.optim.AdamW):
                kept["step"] = torch.tensor(steps)
            state[number] = kept
        states.append({"state": state})
    return states


def load_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], layout: Layout, sharding: Sharding, states: Sequence[dict[str, Any]]
) -> None:
    """Give every optimizer this rank's part of what `save_optimizers` returned, on any number of ranks."""
    for o, groups, state in zip(optimizers, layout, states, strict=True):
        if isinstance(o, OwnOptimizer):
            o.load_whole_state(state)
            continue
        mine: dict[int, dict[str, Tensor]] = {}
        place = 0
        for number, (p, shapes) in enumerate(_kept(o, groups)):
            share = sharding.share_of[id(p)]
            if share.own is None:
                continue
            if state["state"]:  # empty before the first step
                _check_state(o, number, shapes, state["state"])
                mine[place] = {key: sharding.part(share, t) for key, t in state["state"][number].items()}
            place += 1
        o.load_state_dict({"state": mine, "param_groups": o.state_dict()["param_groups"]})


def _kept(
    o: torch.optim.Optimizer, groups: Sequence[Sequence[Tensor]]
) -> Iterator[tuple[Tensor, dict[str, torch.Size]]]:
    """Each parameter, and the tensors that its optimizer keeps for it, by name."""
    for parameters, group in zip(groups, o.param_groups, strict=True):
        for p in parameters:
            moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), p.shape)
            yield p, state_shapes(p.shape, group) if isinstance(o, Muon) else moments


def _check_state(
    o: torch.optim.Optimizer, number: int, shapes: dict[str, torch.Size], state: dict[int, dict[str, Tensor]]
) -> None:
    """ValueError unless a checkpoint has the state of a parameter, in its shape."""
    for key, shape in shapes.items():
        found = state.get(number, {}).get(key)
        if found is None or found.shape != shape:
            raise ValueError(f"{type(o).__name__} has no {key} of shape {tuple(shape)} for parameter {number}")


def save_checkpoint(folder: Path, contents: dict[str, Any], name: str = CHECKPOINT) -> None:
    """Write a checkpoint; the one it replaces stays as checkpoint.prev.pt."""
    path = folder / name
    unfinished = written(path, lambda file: torch.save(contents, file), "wb")
    with writing(path):
        if name == CHECKPOINT and path.exists():
            os.replace(path, folder / PREVIOUS_CHECKPOINT)
        os.replace(unfinished, path)
        sync_folder(folder)


class Damaged(BadInput):
    """A checkpoint whose bytes or parts are wrong; the message names the file."""


def load_checkpoint(folder: Path, say: Callable[[str], None]) -> tuple[dict[str, Any] | None, list[Path]]:
    """The newest complete checkpoint of a run, on the CPU, None without one, and the damaged ones that it passed over.

    Names each damaged file; BadInput if every checkpoint is damaged, or one cannot be read now.
    """
    damaged: list[Path] = []
    for path in (folder / CHECKPOINT, folder / PREVIOUS_CHECKPOINT):
        if not path.exists():
            continue
        try:
            return read_checkpoint(path, _check_checkpoint), damaged
        except Damaged as error:
            damaged.append(path)
            say(str(error))
    if damaged:
        raise BadInput(f"{' and '.join(map(str, damaged))}: damaged, and there is no other checkpoint to resume from")
    return None, []


def read_checkpoint(path: Path, check: Callable[[Any], None]) -> dict[str, Any]:
    """A checkpoint's contents, on the CPU, that pass `check`, which raises ValueError; no code in it is run.

    Damaged if a checksum or a part is wrong, BadInput if the system cannot read it now.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums but does not check them
            if archive.testzip() is not None:
                raise ValueError("a checksum in it does not match")
        contents = torch.load(path, map_location="cpu", weights_only=True)
        check(contents)
    except Exception as error:  # torch, zipfile and pickle raise many kinds on a damaged file
        # A file that the system cannot read now may be good; in a damaged archive zipfile seeks wrongly (EINVAL).
        if isinstance(error, OSError | MemoryError) and getattr(error, "errno", None) != errno.EINVAL:
            raise BadInput(f"{path}: cannot be read ({first_line(error)})") from None
        raise Damaged(f"{path}: damaged ({first_line(error)})") from None
    return contents


def has_checkpoint(folder: Path) -> bool:
    """Whether a run has a checkpoint to resume from, damaged or not."""
    return any((folder / name).exists() for name in (CHECKPOINT, PREVIOUS_CHECKPOINT))


def set_aside(damaged: Iterable[Path]) -> None:
    """Rename damaged checkpoints to *.damaged, so that the next save does not replace a good one by one of them."""
    for path in damaged:
        with writing(path):
            os.replace(path, path.with_suffix(".damaged"))


def _check_checkpoint(contents: Any) -> None:
    """ValueError unless a checkpoint has its parts, each of its type, and the numbers that a run continues with."""
    check_parts(contents, PARTS)
    progress, loader = Progress.of(contents), contents["loader"]
    counts = {"step": progress.step, "epoch": loader.get("epoch"), "position": loader.get("position")}
    for name, count in counts.items():
        if type(count) is not int or count < 0:
            raise ValueError(f"its {name} is not a count")
    if progress.step != contents["step"]:
        raise ValueError("its step is not that of its progress")
    if not isinstance(contents["config"].get("config_hash"), str):
        raise ValueError("its config has no config_hash")


def check_parts(contents: Any, parts: dict[str, type]) -> None:
    """ValueError unless a checkpoint is a dict with these parts, each of its type."""
    if not isinstance(contents, dict):
        raise ValueError(f"it holds a {type(contents).__name__}")
    for part, kind in parts.items():
        if not isinstance(contents.get(part), kind):
            raise ValueError(f"its {part} is not a {kind.__name__}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
