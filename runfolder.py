"""What a run leaves on disk while it is trained: every rank looks into its folder, rank 0 writes.

    folder = RunFolder(Path("runs/name"), rank, device, resume=True); contents = folder.last_checkpoint(config)
    folder.open(config, last_step); folder.write({"kind": "val", ...}); folder.save(contents)

The names of the files, and writing one whole or not at all, are in runfiles.py.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import runfiles
from cli import BadInput, make_folder
from live import TensorBoard
from metrics import JsonlWriter, cut_jsonl
from settings import NOT_IN_HASH, Rank


class RunFolder:
    """runs/<name>/; `out` is what the run says, to the terminal and, once the folder is open, to log.txt."""

    def __init__(
        self, path: Path, rank: Rank, device: torch.device, *, resume: bool = False, tensorboard: bool = False
    ) -> None:
        self.path, self.rank, self.device, self.resume, self.tensorboard = path, rank, device, resume, tensorboard
        self.out = runfiles.Output(speaks=rank.index == 0)
        self.metrics: JsonlWriter | None = None  # rank 0 opens them
        self.live: TensorBoard | None = None

    def __str__(self) -> str:
        return str(self.path)

    def last_checkpoint(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """The newest complete checkpoint, the same on every rank; None where the run is to start at the beginning.

        A damaged one is named and renamed to *.damaged. BadInput where the name is taken, the folder is no run's or
        another run's than that of `config`, ranks read different checkpoints, or none can be read.
        """
        contents, damaged = runfiles.load_checkpoint(self.path, self.out.say) if self.may_go_on() else (None, [])
        self.agree_on_checkpoint(contents)
        if contents is not None:
            runfiles.check_same_run(self.path.name, contents["config"], config, NOT_IN_HASH)
        elif self.resume:
            self.out.say(f"{self}: no checkpoint to resume from, starting at the beginning")
        if self.rank.index == 0:
            runfiles.set_aside(damaged)
        return contents

    def may_go_on(self) -> bool:
        """Whether the folder exists; BadInput where its name is taken or it is something else."""
        named, first = f"--name {self.path.name}: {self}", self.path / runfiles.CONFIG
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
        if first not in inside and inside - {runfiles.temporary(first)}:  # a run killed at once leaves no more
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
        with runfiles.writing(self.path / runfiles.SUMMARY):
            (self.path / runfiles.SUMMARY).unlink(missing_ok=True)  # of the part before
        for name in (runfiles.METRICS, runfiles.SPECTRA):
            cut_jsonl(self.path / name, last_step)
        runfiles.write_json(self.path / runfiles.CONFIG, config)
        with runfiles.writing(self.path / runfiles.LOG):
            self.out.log = (self.path / runfiles.LOG).open("a", encoding="utf-8")
        self.metrics = JsonlWriter(self.path / runfiles.METRICS)
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
        runfiles.save_checkpoint(self.path, contents)

    def save_best(self, contents: dict[str, Any]) -> None:
        """Write best.pt."""
        runfiles.save_checkpoint(self.path, contents, runfiles.BEST)

    def has_summary(self) -> bool:
        """Whether the run came to its end, however that was."""
        return (self.path / runfiles.SUMMARY).exists()

    def summarize(self, summary: dict[str, Any]) -> None:
        """Write summary.json."""
        runfiles.write_json(self.path / runfiles.SUMMARY, summary)

    def draw_plots(self) -> None:
        """Draw plots/*.png where Matplotlib is installed: a training box may do without."""
        try:
            from report import draw
            from stats import load_run
        except ModuleNotFoundError as missing:
            print(f"no plots: {missing.name} is not installed; python report.py draws them elsewhere")
            return
        draw([load_run(self.path)], self.path / "plots")

    def close(self) -> None:
        """End the live view. Lines are flushed one by one, and log.txt takes the last words after this."""
        if self.live is not None:
            self.live.close()
