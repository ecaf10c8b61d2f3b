"""Writes runs/<name>/ while it trains: its lock, lines, log, live view and summary. Every rank looks, rank 0 writes.

    folder = RunFolder(Path("runs/name"), rank, device, resume=True); contents = folder.last_checkpoint(config)
    folder.open(last_step); folder.log_validation(step, evaluation, seconds); folder.save(contents)

The names of the files are in files.py, checkpoints in checkpoint.py.
"""

import contextlib
import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from engine import files
from engine.checkpoint import Progress, load_checkpoint, save_checkpoint, set_aside
from engine.cli import BadInput, CannotWrite, RunFailed, first_line, make_folder
from engine.files import JsonlWriter, cut_jsonl, finite, lock, writing
from engine.identity import check_same_run
from engine.live import LiveView
from engine.memory import peak_bytes
from engine.ranks import Rank
from engine.speed import Speed
from engine.step import Evaluation, StepStats


class RunFolder:
    """runs/<name>/; `out` prints to the terminal and, once the folder is open, to log.txt."""

    def __init__(
        self, path: Path, rank: Rank, device: torch.device, *, resume: bool = False, views: Sequence[str] = ()
    ) -> None:
        self.path, self.rank, self.device, self.resume, self.views = path, rank, device, resume, views
        self.out = Output(speaks=rank.index == 0)
        self.config: dict[str, Any] = {}
        self.is_open = False
        self.is_over = False  # finished, and its checkpoint deleted
        self.metrics: JsonlWriter | None = None  # rank 0 opens them
        self.live: LiveView | None = None
        self.summary: dict[str, Any] = {}
        self.lock: int | None = None  # a descriptor of log.txt: network file systems lock files only

    def __str__(self) -> str:
        return str(self.path)

    def last_checkpoint(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """Lock the folder and return its newest complete checkpoint, the same on every rank; None to start afresh, or
        where `is_over`.

        Names a damaged checkpoint and renames it to *.damaged. BadInput if the name is taken, another process trains
        this run, the folder is not a run's or belongs to a run with other settings than `config`, ranks read
        different checkpoints, or none can be read.
        """
        self.config = config
        exists = self._exists()
        mine = not exists or self.rank.index != 0 or self._take_lock()
        contents, damaged = load_checkpoint(self.path, self.out.say) if exists and mine else (None, [])
        self.is_over = exists and contents is None and self._finished()
        self._agree(contents, mine)
        if contents is not None:
            check_same_run(self.path.name, contents["config"], config)
        elif self.is_over:
            check_same_run(self.path.name, files.load_json(self.path / files.CONFIG), config)
        elif self.resume:
            self.out.say(f"{self}: no checkpoint to resume from, starting at the beginning")
        if self.rank.index == 0:
            set_aside(damaged)
        return contents

    def _exists(self) -> bool:
        """Whether the folder exists; BadInput if its name is taken or it is something else than a run."""
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
        if first not in inside and inside - {files.temporary(first), self.path / files.LOG}:  # it was killed at once
            raise BadInput(f"{named} is not a run's folder; choose another name")
        return True

    def _take_lock(self) -> bool:
        """Whether this process is the only one that trains this run; holds the lock until `close` or its end."""
        with writing(self.path / files.LOG):
            self.lock = os.open(self.path / files.LOG, os.O_CREAT | os.O_RDWR)
        return lock(self.lock, self, self.out.say)

    def _agree(self, contents: dict[str, Any] | None, mine: bool) -> None:
        """BadInput on every rank unless rank 0 has the lock and all read the same checkpoint, or none."""
        nothing = -2 if self.is_over else -1
        step, locked_out = float(nothing if contents is None else contents["step"]), float(not mine)
        if self.rank.count > 1:  # no rank continues before all have looked
            shared = torch.tensor((step, -step, locked_out), device=self.device)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
            most, least, locked_out = shared[0].item(), -shared[1].item(), shared[2].item()
            if most != least and not locked_out:
                raise BadInput(f"{self}: ranks read different checkpoints in it; --runs-dir must be shared by all")
        self._refuse_unless(not locked_out)

    def _refuse_unless(self, mine: bool) -> None:
        if not mine:
            raise BadInput(f"--name {self.path.name}: another process is training {self}; wait for it or stop it")

    def open(self, last_step: int) -> None:
        """Make the folder, or cut its files back to `last_step` (-1: the beginning), so that lines can be written.

        BadInput on rank 0 alone if another process has made the same new run since `last_checkpoint`.
        """
        if self.rank.index != 0:
            return
        make_folder(self.path, exist_ok=self.resume)
        if self.lock is None:
            self._refuse_unless(self._take_lock())
        with writing(self.path / files.SUMMARY):
            (self.path / files.SUMMARY).unlink(missing_ok=True)  # of the part before
        for name in (files.METRICS, files.SPECTRA):
            cut_jsonl(self.path / name, last_step)
        files.write_json(self.path / files.CONFIG, self.config)
        with writing(self.path / files.LOG):
            self.out.log = (self.path / files.LOG).open("a", encoding="utf-8")
        self.metrics = JsonlWriter(self.path / files.METRICS)
        if self.views:
            self.live = LiveView(self.views, self.path, self.config, last_step, self.out.say)
        self.is_open = True

    def write(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl, and of the live view."""
        for writer in (self.metrics, self.live):
            if writer is not None:
                writer.write(record)

    def log_step(
        self,
        step: int,
        lr_multiplier: float,
        stats: StepStats,
        seconds: float,
        mfu: float | None,
        fields: dict[str, str],
    ) -> None:
        """A step's line in metrics.jsonl, the experts' shares, and every --log-every steps a printed line."""
        c = self.config
        tokens_per_second = c["batch_tokens"] / seconds
        rates = {key: c[key] * lr_multiplier for key in ("lr", "adamw_lr")}
        losses = {"train_loss": stats.loss}
        if stats.balance_loss is not None:
            losses["balance_loss"] = stats.balance_loss
        numbers = {**losses, "grad_norm": stats.grad_norm, **rates, "step_ms": 1e3 * seconds}
        numbers = {key: finite(value) for key, value in (numbers | {"tokens_per_second": tokens_per_second}).items()}
        self.write({"kind": "train", "step": step, "tokens": step * c["batch_tokens"], **numbers, "mfu": mfu})
        if self.out.bar is not None:
            self.out.bar.update()
            self.out.bar.set_postfix_str(f"loss {stats.loss:.4f}, {tokens_per_second:,.0f} tok/s")
        if step % c["log_every"] and step != c["steps"]:
            return
        for layer, counts in enumerate(stats.expert_counts or ()):
            shares = [finite(count / sum(counts)) for count in counts]
            self.write({"kind": "experts", "step": step, "layer": layer, "utilization": shares})
        line = {
            "step": f"{step}/{c['steps']}",
            "train_loss": f"{stats.loss:.4f}",
            "grad_norm": f"{stats.grad_norm:.3f}",
            "lr": f"{rates['lr']:.5f}",
            "step_ms": f"{1e3 * seconds:.1f}",
            "tok/s": f"{tokens_per_second:.0f}",
        }
        self.out.line(line | fields, terminal=self.out.bar is None)  # on a terminal the bar shows them

    def log_validation(self, step: int, found: Evaluation, train_seconds: float) -> None:
        """A validation's line in metrics.jsonl, printed too."""
        loss, seconds = finite(found.loss), finite(train_seconds)
        bits = self.bits_per_byte("val_bpb", loss)
        numbers = {"val_loss": loss, **bits, "val_accuracy": found.accuracy, "train_seconds": seconds}
        numbers["val_loss_by_decile"] = [finite(value) for value in found.by_decile]
        self.write({"kind": "val", "step": step, "tokens": step * self.config["batch_tokens"], **numbers})
        line = {"step": f"{step}/{self.config['steps']}", "val_loss": f"{found.loss:.4f}"}
        line |= {key: f"{value:.4f}" for key, value in bits.items() if value is not None}
        line |= {"val_accuracy": f"{found.accuracy:.4f}", "train_seconds": f"{train_seconds:.1f}"}
        self.out.line(line)

    def bits_per_byte(self, key: str, loss: float | None) -> dict[str, float | None]:
        """A mean loss over the evaluated tokens, in nats, as bits per byte of their text: the sum of the nats over ln 2
        and the sum of the bytes. No `key` without a tokenizer that tells the bytes."""
        per_token = self.config["bytes_per_token"]
        return {} if per_token is None else {key: None if loss is None else finite(loss / math.log(2) / per_token)}

    def save(self, contents: dict[str, Any]) -> None:
        """Write checkpoint.pt, after the lines that it vouches for are on disk."""
        if self.metrics is not None:
            self.metrics.sync()
        tokens = contents["step"] * self.config["batch_tokens"]
        save_checkpoint(self.path, contents | {"tokens": tokens, "config": self.config})

    def save_best(self, contents: dict[str, Any]) -> None:
        """Write best.pt."""
        save_checkpoint(self.path, contents | {"config": self.config}, files.BEST)

    def has_summary(self) -> bool:
        """Whether the run ended, in whatever way."""
        return (self.path / files.SUMMARY).exists()

    def _finished(self) -> bool:
        return self.has_summary() and files.load_json(self.path / files.SUMMARY).get("status") == "finished"

    def summarize(self, status: str, reason: str | None, progress: Progress, speed: Speed) -> None:
        """Write summary.json, from rank 0."""
        if self.rank.index != 0:
            return
        tokens, seconds = progress.step * self.config["batch_tokens"], progress.train_seconds
        tokens_per_second = tokens / seconds if tokens and seconds else None
        self.summary = {
            "status": status,
            "reason": reason,
            "final_train_loss": progress.train_loss,
            "final_val_loss": progress.val_loss,
            **self.bits_per_byte("final_val_bpb", progress.val_loss),
            "best_val_loss": finite(progress.best_val_loss),
            "final_val_accuracy": progress.val_accuracy,
            "unigram_val_loss": self.config["unigram_val_loss"],
            "tokens": tokens,
            "steps": progress.step,
            "train_seconds": seconds,
            "wall_seconds": progress.wall_seconds,
            "spectra_seconds_blocked": progress.spectra_seconds_blocked,
            "tokens_per_second": tokens_per_second,
            "mfu": speed.mfu(tokens_per_second),
            "peak_memory_bytes": peak_bytes(self.device),
            **{key: self.config[key] for key in ("params", "data_fingerprint", "config_hash")},
        }
        files.write_json(self.path / files.SUMMARY, self.summary)

    def close(self) -> None:
        """End the live view, with the run's figures, and unlock the folder. Lines were flushed one by one."""
        with contextlib.suppress(CannotWrite):  # what a view that fails here says
            if self.live is not None:
                self.live.close(self.summary, sorted(self.path.glob("plots/*.png")))
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None


def reason_of(error: BaseException, step: int, ranks: int, misfit: Callable[[], str]) -> str | None:
    """The sentence for an expected failure, None for a bug; `misfit` names a micro-batch that fits."""
    if isinstance(error, torch.OutOfMemoryError):
        return misfit()
    if isinstance(error, RunFailed | BadInput):
        return str(error)
    lost = is_lost_rank(error) and ranks > 1
    return f"another rank was lost after step {step}: {first_line(error)}" if lost else None


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


class Output:
    """Prints what rank 0 says: to the terminal, around the progress bar if there is one, and to log.txt. The loop and
    the spectra's worker may both speak."""

    def __init__(self, speaks: bool) -> None:
        self.speaks, self.log, self.bar = speaks, None, None
        self.turn = threading.Lock()

    def say(self, line: str, terminal: bool = True) -> None:
        if not self.speaks:
            return
        with self.turn:
            if terminal and self.bar is not None:
                self.bar.write(line)
            elif terminal:
                print(line, flush=True)
            if self.log is not None:
                log, self.log = self.log, None  # not tried again after a failure
                with writing(log.name):
                    log.write(line + "\n")
                    log.flush()
                self.log = log

    def start_bar(self, done: int, total: int) -> None:
        if self.speaks and sys.stderr.isatty():
            self.bar = tqdm(initial=done, total=total, unit="step")

    def line(self, values: dict[str, Any], terminal: bool = True) -> None:
        """A line of `key:value` pairs."""
        self.say(" ".join(f"{key}:{value}" for key, value in values.items() if value is not None), terminal)
