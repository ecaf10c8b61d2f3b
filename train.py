"""One run: settings -> data -> model -> optimizer -> loop -> runs/<name>/.

    python train.py --model nano --optimizer muon
    torchrun --standalone --nproc_per_node=1 train.py --model 88m --optimizer muon

The clock (train_seconds) runs over updates and their spectra; compilation, warm-up, validation and checkpoints are off.
"""

import contextlib
import dataclasses
import gc
import itertools
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import tyro

from corpus.shards import Shards
from data import Loader, TokenStream, validation_batches
from engine import files
from engine.cli import BadInput, CannotWrite, RunFailed, TrainingFailed, exit_with_a_sentence, first_line
from engine.files import finite
from engine.memory import MemoryCount, available_bytes, choose_micro_batch, peak_bytes
from engine.ranks import Rank, Sharding, join_ranks
from engine.run_folder import RunFolder
from engine.speed import Point, Speed, Stopwatch, Times, point, seconds_between
from engine.step import Deferred, Numbers, TrainingStep, evaluate, prepare_torch
from kernels.configs import capability
from metrics import SpectraRecorder, WorkerFailed
from model import ModelConfig, Transformer
from optim import build_optimizers, load_whole_state, lr_factor, parameter_layout, set_lr, step_cost, whole_state
from settings import Settings, chosen_kernels, describe, resolve

WARMUP_UPDATES = 4  # untimed: state is made in the first, Muon's step is captured by the third
VALIDATION_TOKENS = {"cuda": 8192, "cpu": 1024}  # per forward pass: its logits are whole, and in fp32


class Update(NamedTuple):
    """One update on its way through the device: known at once, and what `Run.settle` reads when it has arrived."""

    step: int
    factor: float
    numbers: Deferred
    times: Times
    start: Point
    stop: Point


class Run:
    """The state of one training run, and its loop."""

    def __init__(self, s: Settings, config: ModelConfig, shards: Shards, rank: Rank) -> None:
        self.s, self.rank, self.shards = s, rank, shards
        self.device = torch.device(s.device, rank.local) if s.device == "cuda" else torch.device("cpu")
        live = s.log == "tensorboard"
        self.folder = RunFolder(s.runs_dir / s.name, rank, self.device, resume=s.resume, tensorboard=live)
        self.out = self.folder.out
        self.updates = math.ceil(s.tokens / s.batch_tokens)
        if s.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(s.deterministic)
        torch.manual_seed(s.seed)
        self.model = Transformer(config, shards.vocab_size)  # on the CPU first: the same weights on every device
        self.model.to(self.device).compute_dtype = torch.bfloat16 if s.precision == "bf16" else torch.float32
        self.model.kernels = chosen_kernels(s.kernels, capability(self.device))
        self.model.document_start = shards.eot_id if s.doc_mask else None
        sequences = s.batch_tokens // (s.seq_len * rank.count)
        self.memory = MemoryCount(self.model, s.optimizer, sequences, s.seq_len, compiled=s.compile == "on")
        micro_batch = choose_micro_batch(self.memory, s.micro_batch, self.device)
        if rank.count > 1:  # GPUs may have different amounts of memory free
            smallest = torch.tensor(micro_batch, device=self.device)
            dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
            micro_batch = int(smallest)
        s = self.s = dataclasses.replace(s, micro_batch=micro_batch)
        self.sharding = Sharding(self.model, rank.index, rank.count)
        muon = ("momentum", "nesterov", "ns_steps", "ns_coefficients", "ns_method", "lr_scale")
        self.optimizers = build_optimizers(
            self.model,
            s.optimizer,
            lr=s.lr,
            adamw_lr=s.adamw_lr,
            weight_decay=s.weight_decay,
            betas=(s.beta1, s.beta2),
            adam_eps=s.adam_eps,
            sharding=self.sharding,
            **{key: getattr(s, key) for key in muon},
        )
        self.layout = parameter_layout(self.model, s.optimizer)
        self.work = TrainingStep(
            self.model,
            self.optimizers,
            micro_batch=s.micro_batch,
            grad_clip=s.grad_clip,
            compiled=s.compile == "on",
            sharding=self.sharding,
        )
        self.loader = Loader(
            TokenStream(shards, "train"),
            s.batch_tokens // s.seq_len,
            s.seq_len,
            s.seed,
            rank=rank.index,
            world_size=rank.count,
            packing=s.packing,
            pin_memory=s.device == "cuda",
            say=self.out.say,
        )
        self.val_stream = TokenStream(shards, "val")
        self.validation_rows = max(1, VALIDATION_TOKENS[self.device.type] // s.seq_len)
        self.step, self.watch = 0, Stopwatch(self.device)
        self.signalled = self.stop_asked = False  # a signal reached this rank; all ranks agreed to stop
        self.under_way: deque[Update] = deque()
        self.last_stop: Point = 0.0
        self.began, self.earlier_wall_seconds, self.earlier_spectra_seconds = time.perf_counter(), 0.0, 0.0
        self.spectra: SpectraRecorder | None = None  # rank 0 has one
        self.loaded: dict[str, Any] | None = None  # the checkpoint that this run goes on from
        self.config = describe(s, shards, self.model, self.updates, rank.count, self.device_name())
        self.last_val: dict[str, float | None] = {"val_loss": None, "val_accuracy": None}
        self.best_val_loss, self.last_train_loss = math.inf, None
        work = (self.model, step_cost(self.optimizers), s.batch_tokens, s.seq_len)
        self.speed = Speed(*work, self.device_name(), rank.count)

    def train(self) -> str:
        """Run from the current step to the end or to a signal; returns the summary's status."""
        s = self.s
        self.out.say(f"memory of one update: {self.memory.describe(s.micro_batch)}")
        if self.model.config.experts:
            params, active = self.model.parameter_count(), self.model.active_parameter_count()
            self.out.say(f"{params:,} parameters, of which a token meets {active:,} ({active / params:.1%})")
        if s.packing != "stream":
            self.out.say(f"{self.loader.windows:,} windows, {self.loader.waste:.1%} of the training tokens left out")
        self.warm_up()
        resumed = self.loaded is not None
        if self.loaded is not None:
            self.load(self.loaded)
            self.out.say(f"{self.folder}: resuming at step {self.step} of {self.updates}")
            self.loaded = None  # its memory is wanted
        self.out.start_bar(self.step, self.updates)
        gc.collect()
        gc.freeze()  # what exists now stays: collections need not walk it again in every step
        self.start_clock()
        if not resumed:
            self.spectra_event()
            self.off_clock(self.validate)
        while self.step < self.updates and not self.stops():
            event = bool(s.spectra_every) and self.is_event(self.step + 1, s.spectra_every)
            self.update(event)
            if event:
                waited = time.perf_counter()
                self.settle(0)  # an update that failed is no event
                if self.spectra is not None and self.device.type == "cuda":
                    self.spectra.seconds_blocked += time.perf_counter() - waited
                self.spectra_event()
                self.last_stop = point(self.device)  # what the event held up is no step's time
            validates = self.is_event(self.step, s.eval_every)
            saves = self.step % s.checkpoint_every == 0 and self.step < self.updates
            self.settle(0 if validates or saves or self.device.type == "cpu" else 1)
            if validates:
                self.off_clock(self.validate)
            if saves:
                self.flush_spectra()
                self.off_clock(self.checkpoint)
        self.settle(0)
        try:
            self.flush_spectra()
        except WorkerFailed:  # at the end the weights are kept; a stopped run repeats what it could not measure
            if self.step == self.updates:
                self.checkpoint()
            raise
        self.watch.stop()
        self.checkpoint()
        return "finished" if self.step == self.updates else "stopped"

    def is_event(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.updates

    def stops(self) -> bool:
        """Whether to stop now; several ranks must learn it from the same update, a single one just looks."""
        return self.stop_asked or (self.signalled and self.rank.count == 1)

    def start_clock(self) -> None:
        self.watch.start()
        self.last_stop = point(self.device)

    def off_clock(self, task: Callable[[], None]) -> None:
        self.watch.stop()
        task()
        self.start_clock()

    def update(self, keep_for_spectra: bool) -> None:
        """Send one optimizer step on one global batch to the device; `settle` learns what came of it."""
        s = self.s
        factor = lr_factor(self.step, self.updates, s.schedule, s.warmup, s.min_lr)
        set_lr(self.optimizers, factor)
        if s.dropout or s.router_noise:  # both depend on (seed, step, rank) alone, so a resumed run draws the same
            torch.manual_seed(int(np.random.SeedSequence([s.seed, self.step, self.rank.index]).generate_state(1)[0]))
        numbers = self.work.gradients(next(self.loader), self.signalled)
        if self.spectra is not None:
            self.spectra.check()
        if keep_for_spectra:
            norms = self.sharding.bank_norms()  # on every rank
            if self.spectra is not None:
                self.spectra.before_update(norms)
        times = self.work.apply()
        self.step += 1
        stop = point(self.device)
        self.under_way.append(Update(self.step, factor, numbers, times, self.last_stop, stop))
        self.last_stop = stop

    def settle(self, keep: int) -> None:
        """Read and log all but the last `keep` updates under way; raises TrainingFailed for one that was not finite.

        On a GPU one update stays under way, so that the device always has work. A failed one changed no weight.
        """
        while len(self.under_way) > keep:
            update = self.under_way.popleft()
            numbers = update.numbers.read()
            if not numbers.finite:
                self.step -= 1  # `failed` takes off those still under way
                where = f"; not finite in {', '.join(numbers.not_finite)}" if numbers.not_finite else ""
                raise TrainingFailed(
                    f"step {update.step}: loss {numbers.loss}, gradient norm {numbers.grad_norm}" + where
                )
            self.log_step(update, numbers)
            self.stop_asked = self.stop_asked or numbers.stop_asked

    def ask_to_stop(self, signal_number: int, frame: object) -> None:
        """Finish the step, then stop; a second signal stops at once."""
        self.signalled = True
        signal.signal(signal_number, signal.SIG_DFL)

    def warm_up(self) -> None:
        """Untimed updates on random tokens, so that compilation and first launches are off the clock; all undone.

        Runs before a checkpoint is loaded: there is no optimizer state yet to keep.
        """
        s, weights = self.s, [p.detach().clone() for p in self.model.parameters()]
        cpu_rng, cuda_rng = torch.get_rng_state(), torch.cuda.get_rng_state_all()
        set_lr(self.optimizers, 1e-3)
        rows = min(2, self.memory.sequences // s.micro_batch) * s.micro_batch  # two accumulate, as any number does
        tokens = torch.randint(self.shards.vocab_size, (rows, s.seq_len + 1))
        for _ in range(WARMUP_UPDATES):
            self.work.gradients(tokens)
            self.work.apply()
        with torch.no_grad():
            for p, weight in zip(self.model.parameters(), weights, strict=True):
                p.copy_(weight)
            for tensor in (t for o in self.optimizers for state in o.state.values() for t in state.values()):
                tensor.zero_()  # in place: a captured step goes on reading it
        torch.set_rng_state(cpu_rng)
        torch.cuda.set_rng_state_all(cuda_rng)

    def spectra_event(self) -> None:
        if self.spectra is not None:
            self.spectra.record(self.step, self.step * self.s.batch_tokens)

    def flush_spectra(self) -> None:
        """What a checkpoint vouches for is on disk before it; the wait is on the clock."""
        if self.spectra is not None:
            self.spectra.flush()
            self.last_stop = point(self.device)

    def validate(self) -> None:
        """Mean loss and next-token accuracy over the first --eval-tokens validation tokens, shared out over ranks."""
        batches = validation_batches(self.val_stream, self.s.eval_tokens, self.s.seq_len, self.validation_rows)
        mine = itertools.islice(batches, self.rank.index, None, self.rank.count)
        loss, accuracy = evaluate(self.model, mine, self.rank.count)
        self.val_stream.wait_until_checked()
        self.last_val = {"val_loss": finite(loss), "val_accuracy": accuracy}
        if loss < self.best_val_loss:
            self.best_val_loss = loss
            if self.step and self.rank.index == 0:
                best = {"model": self.model.state_dict(), "step": self.step, "config": self.config} | self.last_val
                self.folder.save_best(best)
        seconds = finite(self.watch.total)
        self.folder.write({"kind": "val", **self.progress(), **self.last_val, "train_seconds": seconds})
        self.out.line(
            {
                "step": f"{self.step}/{self.updates}",
                "val_loss": f"{loss:.4f}",
                "val_accuracy": f"{accuracy:.4f}",
                "train_seconds": f"{self.watch.total:.1f}",
            }
        )

    def log_step(self, update: Update, numbers: Numbers) -> None:
        seconds = seconds_between(update.start, update.stop)
        self.last_train_loss, factor = numbers.loss, update.factor
        tokens_per_second = self.s.batch_tokens / seconds
        rates = {"lr": self.s.lr * factor, "adamw_lr": self.s.adamw_lr * factor}
        record = {"train_loss": numbers.loss, "grad_norm": numbers.grad_norm, **rates, "step_ms": 1e3 * seconds}
        record["tokens_per_second"] = tokens_per_second
        place = {"step": update.step, "tokens": update.step * self.s.batch_tokens}
        self.folder.write(
            {
                "kind": "train",
                **place,
                **{key: finite(value) for key, value in record.items()},
                "mfu": self.speed.mfu(tokens_per_second),
            }
        )
        if self.out.bar is not None:
            self.out.bar.update()
            self.out.bar.set_postfix_str(f"loss {numbers.loss:.4f}, {tokens_per_second:,.0f} tok/s")
        if self.is_event(update.step, self.s.log_every):
            for layer, counts in enumerate(numbers.expert_counts or ()):
                shares = {"layer": layer, "utilization": [finite(count / sum(counts)) for count in counts]}
                self.folder.write({"kind": "experts", "step": update.step, **shares})
            self.out.line(  # on a terminal the bar shows them
                {
                    "step": f"{update.step}/{self.updates}",
                    "train_loss": f"{numbers.loss:.4f}",
                    "grad_norm": f"{numbers.grad_norm:.3f}",
                    "lr": f"{rates['lr']:.5f}",
                    "step_ms": f"{1e3 * seconds:.1f}",
                    "tok/s": f"{tokens_per_second:.0f}",
                    **self.speed.fields(update.times, seconds),
                },
                terminal=self.out.bar is None,
            )

    def progress(self) -> dict[str, int]:
        return {"step": self.step, "tokens": self.step * self.s.batch_tokens}

    def open_folder(self) -> bool:
        """Go on from the folder's last checkpoint, or begin; False if the run is finished already."""
        self.loaded = self.folder.last_checkpoint(self.config)
        if self.loaded is not None:
            self.step = self.loaded["step"]
            self.watch.total = self.loaded["clock"]["train_seconds"]
            self.earlier_wall_seconds = self.loaded["clock"]["wall_seconds"]
            self.earlier_spectra_seconds = self.loaded["clock"].get("spectra_seconds_blocked", 0.0)
            losses = self.loaded["losses"]
            self.best_val_loss, self.last_train_loss = losses["best_val_loss"], losses["train_loss"]
            self.last_val = {key: losses[key] for key in self.last_val}
            if self.step >= self.updates:
                self.out.say(f"{self.folder}: finished already, at step {self.step}; nothing to do")
                if not self.folder.has_summary():  # killed between the last checkpoint and the end
                    self.summarize("finished", None)
                return False
        self.folder.open(self.config, -1 if self.loaded is None else self.step)
        if self.rank.index == 0 and self.s.spectra_every:
            listener = self.folder.live and self.folder.live.write_spectra
            self.spectra = SpectraRecorder(self.model, self.folder.path / files.SPECTRA, listener)
        return True

    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def checkpoint(self) -> None:
        """Write everything that the rest of the run depends on, from rank 0; every rank must call it."""
        self.loader.stream.wait_until_checked()  # no checkpoint vouches for tokens that may be damaged
        states = whole_state(self.optimizers, self.layout, self.sharding)
        if self.rank.index != 0:
            return
        cuda_rng = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        contents = {
            "model": self.model.state_dict(),
            "optimizer": states,
            **self.progress(),
            "loader": self.loader.state_dict(),
            "rng": {"torch": torch.get_rng_state(), "cuda": cuda_rng},
            "config": self.config,
            "clock": {
                "train_seconds": self.watch.total,
                "wall_seconds": self.wall_seconds(),
                "spectra_seconds_blocked": self.spectra_seconds_blocked(),
            },
            "losses": {"best_val_loss": self.best_val_loss, "train_loss": self.last_train_loss, **self.last_val},
        }
        self.folder.save(contents)

    def load(self, contents: dict[str, Any]) -> None:
        """Take up a checkpoint, after which the run goes on as if it had never stopped."""
        try:
            self.model.load_state_dict(contents["model"])
            load_whole_state(self.optimizers, self.layout, self.sharding, contents["optimizer"])
            self.loader.load_state_dict(contents["loader"])
            torch.set_rng_state(contents["rng"]["torch"])
            if self.device.type == "cuda" and contents["rng"]["cuda"] is not None:
                torch.cuda.set_rng_state(contents["rng"]["cuda"], self.device)
        except (RuntimeError, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise BadInput(f"{self.folder}: its checkpoint does not fit this run ({first_line(error)})") from error

    def close(self) -> None:
        """Stop the threads; what they still hold is written first."""
        for part in (self.loader, self.spectra, self.folder):
            if part is not None:
                part.close()

    def misfit(self) -> str:
        """What to say when the device ran out of memory."""
        return self.memory.misfit(self.s.micro_batch, available_bytes(self.device))

    def spectra_seconds_blocked(self) -> float:
        return self.earlier_spectra_seconds + (self.spectra.seconds_blocked if self.spectra else 0.0)

    def wall_seconds(self) -> float:
        return self.earlier_wall_seconds + time.perf_counter() - self.began

    def summarize(self, status: str, reason: str | None) -> None:
        """summary.json, whatever way the run ended."""
        if self.rank.index != 0:
            return
        tokens, seconds = self.step * self.s.batch_tokens, self.watch.seconds()
        speed = tokens / seconds if tokens and seconds else None
        summary = {
            "status": status,
            "reason": reason,
            "final_train_loss": self.last_train_loss,
            "final_val_loss": self.last_val["val_loss"],
            "best_val_loss": finite(self.best_val_loss),
            "final_val_accuracy": self.last_val["val_accuracy"],
            "tokens": tokens,
            "steps": self.step,
            "train_seconds": seconds,
            "wall_seconds": self.wall_seconds(),
            "spectra_seconds_blocked": self.spectra_seconds_blocked(),
            "tokens_per_second": speed,
            "mfu": self.speed.mfu(speed),
            "peak_memory_bytes": peak_bytes(self.device),
            **{key: self.config[key] for key in ("params", "data_fingerprint", "config_hash")},
        }
        self.folder.summarize(summary)


@exit_with_a_sentence
def main() -> int:
    prepare_torch()
    given = tyro.cli(Settings, description=__doc__)
    rank = join_ranks(given.device)
    try:
        return run_training(Run(*resolve(given, rank), rank))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_training(run: Run) -> int:
    """The run from opening its folder to its summary; returns the exit code."""
    opened = False
    try:
        opened = run.open_folder()
        if not opened:
            return 0
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signal_number, run.ask_to_stop)
        status = run.train()
        run.close()
        run.summarize(status, None if status == "finished" else f"signal after step {run.step}")
    except BaseException as error:
        return failed(run, error, opened)
    finally:
        gc.unfreeze()
        with contextlib.suppress(CannotWrite):
            run.close()
    if status == "finished" and run.s.plots and run.rank.index == 0:
        draw_plots(run.folder.path)
    which = "final" if status == "finished" else "last"  # a stopped run does not validate again
    run.out.say(f"{run.folder}: {status} after {run.step} updates, {which} validation loss {run.last_val['val_loss']}")
    return 0


def draw_plots(folder: Path) -> None:
    """Draw the run's plots where Matplotlib is installed; a training box may do without."""
    try:
        from analysis.runs import load_run
        from report import draw
    except ModuleNotFoundError as missing:
        print(f"no plots: {missing.name} is not installed; python report.py draws them elsewhere")
        return
    draw([load_run(folder)], folder / "plots")


def reason_of(error: BaseException, *, step: int, ranks: int, misfit: Callable[[], str]) -> str | None:
    """The sentence for an expected failure, None for a bug; `misfit` says what memory would hold."""
    if isinstance(error, torch.OutOfMemoryError):
        return misfit()
    if isinstance(error, RunFailed | BadInput):
        return str(error)
    lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
    if lost and ranks > 1:
        return f"another rank was lost after step {step}: {first_line(error)}"
    return None


def failed(run: Run, error: BaseException, opened: bool) -> int:
    """Write and say why a run ended, as far as that can be written; raises a bug, and bad input, again."""
    run.step -= len(run.under_way)  # updates whose numbers nobody has read
    reason = reason_of(error, step=run.step, ranks=run.rank.count, misfit=run.misfit)
    with contextlib.suppress(CannotWrite):
        run.close()  # what the worker still holds is written before the summary says that it is over
    if opened:
        with contextlib.suppress(CannotWrite):
            run.summarize("failed", reason or f"{type(error).__name__}: {error}")
    if reason is None or isinstance(error, BadInput):
        raise error
    with contextlib.suppress(CannotWrite):
        run.out.say(f"failed: {reason}")
    if run.rank.index and not isinstance(error, TrainingFailed):  # that one all ranks know
        print(f"rank {run.rank.index}: failed: {reason}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
