"""Writes runs/<name>/ while it trains: every rank looks into the folder, rank 0 writes its lines, log and summary.

    folder = RunFolder(Path("runs/name"), rank, device, resume=True); contents = folder.last_checkpoint(config)
    folder.open(config, last_step); folder.write({"kind": "val", ...}); folder.save(contents)

The names of the files are in files.py, checkpoints in checkpoint.py.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from engine import files
from engine.checkpoint import load_checkpoint, save_checkpoint, set_aside
from engine.cli import BadInput, make_folder
from engine.files import JsonlWriter, cut_jsonl, writing
from engine.identity import check_same_run
from engine.ranks import Rank

SPECTRA_SHOWN = ("spectral_norm", "effective_rank", "stable_rank", "spectral_entropy", "left_alignment", "update_norm")


class RunFolder:
    """runs/<name>/; `out` is what the run says, to the terminal and, once the folder is open, to log.txt."""

    def __init__(
        self, path: Path, rank: Rank, device: torch.device, *, resume: bool = False, tensorboard: bool = False
    ) -> None:
        self.path, self.rank, self.device, self.resume, self.tensorboard = path, rank, device, resume, tensorboard
        self.out = Output(speaks=rank.index == 0)
        self.metrics: JsonlWriter | None = None  # rank 0 opens them
        self.live: TensorBoard | None = None

    def __str__(self) -> str:
        return str(self.path)

    def last_checkpoint(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """The newest complete checkpoint, the same on every rank; None where the run is to start at the beginning.

        A damaged one is named and renamed to *.damaged. BadInput where the name is taken, the folder is no run's or
        another run's than that of `config`, ranks read different checkpoints, or none can be read.
        """
        contents, damaged = load_checkpoint(self.path, self.out.say) if self.may_go_on() else (None, [])
        self.agree_on_checkpoint(contents)
        if contents is not None:
            check_same_run(self.path.name, contents["config"], config)
        elif self.resume:
            self.out.say(f"{self}: no checkpoint to resume from, starting at the beginning")
        if self.rank.index == 0:
            set_aside(damaged)
        return contents

    def may_go_on(self) -> bool:
        """Whether the folder exists; BadInput where its name is taken or it is something else."""
        named, first = f"--name {self.path.name}: {self}", self.path / files.CONFIG
        try:
            if self.path.is_symlink():
                raise BadInput(f"{named} is a link; runs stay in --runs-dir")
            if not self.path.exists():
                return False
            if not self.resume:
                raise BadInput(f"{named} exists; choose another name, or add --resume")
            inside = set(self.path.iterdir())
        except OSError as error:
            raise BadInput(f"{named} cannot be read ({error.strerror})") from None
        if first not in inside and inside - {files.temporary(first)}:  # a run killed at once leaves no more
            raise BadInput(f"{named} is no run's folder; choose another name")
        return True

    def agree_on_checkpoint(self, contents: dict[str, Any] | None) -> None:
        """BadInput on every rank unless all read the same checkpoint, or none; until all have looked none goes on."""
        if self.rank.count == 1:
            return
        step = float(-1 if contents is None else contents["step"])
        ends = torch.tensor((step, -step), device=self.device)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        if ends[0] != -ends[1]:
            raise BadInput(f"{self}: ranks read different checkpoints in it; --runs-dir must be shared by all")

    def open(self, config: dict[str, Any], last_step: int) -> None:
        """Make the folder, or cut its files back to `last_step`, -1 at the beginning; then lines can be written."""
        if self.rank.index != 0:
            return
        make_folder(self.path, exist_ok=self.resume)
        with writing(self.path / files.SUMMARY):
            (self.path / files.SUMMARY).unlink(missing_ok=True)  # of the part before
        for name in (files.METRICS, files.SPECTRA):
            cut_jsonl(self.path / name, last_step)
        files.write_json(self.path / files.CONFIG, config)
        with writing(self.path / files.LOG):
            self.out.log = (self.path / files.LOG).open("a", encoding="utf-8")
        self.metrics = JsonlWriter(self.path / files.METRICS)
        if self.tensorboard:
            self.live = TensorBoard(self.path, last_step)

    def write(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl, and of the live view."""
        for writer in (self.metrics, self.live):
            if writer is not None:
                writer.write(record)

    def save(self, contents: dict[str, Any]) -> None:
        """Write checkpoint.pt, after the lines that it vouches for are on disk."""
        if self.metrics is not None:
            self.metrics.sync()
        save_checkpoint(self.path, contents)

    def save_best(self, contents: dict[str, Any]) -> None:
        """Write best.pt."""
        save_checkpoint(self.path, contents, files.BEST)

    def has_summary(self) -> bool:
        """Whether the run came to its end, however that was."""
        return (self.path / files.SUMMARY).exists()

    def summarize(self, summary: dict[str, Any]) -> None:
        """Write summary.json."""
        files.write_json(self.path / files.SUMMARY, summary)

    def close(self) -> None:
        """End the live view. Lines are flushed one by one, and log.txt takes the last words after this."""
        if self.live is not None:
            self.live.close()


class TensorBoard:
    """Scalars named kind/key and spectra/key/projection, against updates; a resumed run continues after `last_step`."""

    def __init__(self, folder: Path, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # where it is used: few have the package

        self.writer = SummaryWriter(str(folder), purge_step=last_step + 1)

    def write(self, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if isinstance(value, int | float) and key not in ("step", "tokens", "layer"):
                self.writer.add_scalar(f"{record['kind']}/{key}", value, record["step"])

    def write_spectra(self, lines: Sequence[dict[str, Any]]) -> None:
        for name in dict.fromkeys(line["proj"] for line in lines):
            for key in SPECTRA_SHOWN:
                values = [line[key] for line in lines if line["proj"] == name and line[key] is not None]
                if values:
                    self.writer.add_scalar(f"spectra/{key}/{name}", np.mean(values), lines[0]["step"])

    def close(self) -> None:
        self.writer.close()


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
