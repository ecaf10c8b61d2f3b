"""One run: settings -> ranks -> shards -> model -> optimizers -> loader -> folder -> loop -> summary.

    python train.py --model nano --optimizer muon
    torchrun --standalone --nproc_per_node=1 train.py --model 88m --optimizer muon

The clock (train_seconds) runs over steps and their spectra, not over compilation, warm-up, validation or checkpoints.
"""

import contextlib
import dataclasses
import gc
import itertools
import os
import signal
import sys
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

if "OMP_WAIT_POLICY" not in os.environ:  # before torch: a waiting thread soon leaves its core to others (LOG.md)
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.distributed as dist
import tyro

from corpus.frequency import yardstick_of
from corpus.shards import Shards
from data import Loader, TokenStream, target_counts, validation_batches
from engine import files
from engine.checkpoint import Layout, Progress, has_checkpoint, restore, state_of
from engine.cli import BadInput, CannotWrite, TrainingFailed, exit_with_a_sentence
from engine.compiling import mark_warm
from engine.files import finite
from engine.memory import MemoryCount, available_bytes, choose_micro_batch
from engine.norm_watch import NormWatch
from engine.ranks import Rank, join_ranks
from engine.run_folder import RunFolder, is_lost_rank, reason_of
from engine.shared_memory import sharding_of
from engine.speed import Point, Speed, Stopwatch, Times, device_name, point, seconds_between
from engine.start import copy_weights
from engine.step import VALIDATION_TOKENS, PendingStats, TrainingStep, evaluate, prepare_torch
from engine.workers import workers
from kernels.configs import capability
from kernels.newton_schulz import reach
from kernels.optimizer import NOT_ITERATED
from metrics import Momenta, MuonStep, SpectraRecorder, WorkerFailed
from model import HEADED, ModelConfig, Transformer
from optim import (
    apart_from_muon,
    build_optimizers,
    lr_multiplier,
    muon_names,
    ns_steps_at,
    parameter_layout,
    set_lr,
    set_ns_steps,
    step_cost,
)
from sample import Greedy, write_samples
from settings import (
    Settings,
    chosen_kernels,
    compiled_code,
    describe,
    optimizer_options,
    resolve,
    starting_model,
)


class StepInFlight(NamedTuple):
    """One step on its way through the device: what the host knows at once, and what `collect` reads on arrival."""

    step: int
    lr_multiplier: float
    stats: PendingStats
    times: Times
    start: Point
    stop: Point


@exit_with_a_sentence
def main() -> int:
    prepare_torch()
    given = tyro.cli(Settings, description=__doc__)
    rank = join_ranks(given.device)
    try:
        s, config, shards = resolve(given, rank)
        with workers(s.workers, s.threads, rank) as rank:
            return run(s, config, shards, rank)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run(s: Settings, config: ModelConfig, shards: Shards, rank: Rank) -> int:
    """Set up one run, train it, and write its summary however it ends; returns the exit code."""
    device = torch.device(s.device, rank.local) if s.device == "cuda" else torch.device("cpu")
    if s.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(s.deterministic)
    torch.manual_seed(s.seed)

    # Model. Initialised on the CPU, so that every device starts from the same weights.
    on_muon = muon_names(s.muon_on, config)
    model = Transformer(config, shards.vocab_size, apart_from_muon(s.muon_on, config)).to(device)
    if s.init_from and not (s.resume and has_checkpoint(s.runs_dir / s.name)):
        copy_weights(model, starting_model(s, config, shards.vocab_size))
    model.compute_dtype = torch.bfloat16 if s.precision == "bf16" else torch.float32
    model.kernels = chosen_kernels(s.kernels, capability(device))
    model.document_start = shards.eot_id if s.doc_mask else None
    sequences, compiled = s.batch_tokens // (s.seq_len * rank.count), s.compile == "on"
    code = compiled_code(s, config, shards)  # as `resolve` names it
    layout = parameter_layout(model, s.optimizer, s.decay_on, s.muon_on)
    orthogonalised = sum(p.numel() for group in layout[0] for p in group)
    memory = MemoryCount(model, s.optimizer, sequences, s.seq_len, compiled=compiled, on_muon=orthogonalised)
    # GPUs may have different amounts of memory free: the smallest decides.
    s = dataclasses.replace(s, micro_batch=rank.least(choose_micro_batch(memory, s.micro_batch, device), device))

    # Optimizers. Each rank owns a share of every parameter and optimizes that alone.
    sharding = sharding_of(model, rank, whole=[model.embedding] if "embedding" in on_muon else [])
    optimizers = build_optimizers(model, s.optimizer, sharding=sharding, **optimizer_options(s))
    work = TrainingStep(
        model, optimizers, micro_batch=s.micro_batch, grad_clip=s.grad_clip, compiled=compiled, sharding=sharding
    )
    speed = Speed(model, step_cost(optimizers), s.batch_tokens, s.seq_len, device_name(device), rank.count)

    # Data. Every rank reads its slice of the same global batches.
    folder = RunFolder(s.runs_dir / s.name, rank, device, resume=s.resume, views=s.views)
    loader = Loader(
        TokenStream(shards, "train"),
        s.batch_tokens // s.seq_len,
        s.seq_len,
        s.seed,
        rank=rank.index,
        world_size=rank.count,
        packing=s.packing,
        pin_memory=s.device == "cuda",
        say=folder.out.say,
    )
    val_stream = TokenStream(shards, "val")

    progress, clock, spectra, signals = Progress(), Stopwatch(device), None, []
    try:
        with contextlib.ExitStack() as threads:  # on every way out they end first and write their last lines
            # What a loss means: how frequent each token is in training, and its bytes of text.
            yardstick = yardstick_of(shards, target_counts(val_stream, s.eval_tokens, s.seq_len))
            deciles = torch.from_numpy(yardstick.deciles).to(device)

            # Folder. An interrupted run continues from its last checkpoint.
            loaded = folder.last_checkpoint(describe(s, shards, model, rank.count, speed.name, yardstick))
            if folder.is_over:
                folder.out.say(f"{folder}: finished already; nothing to do")
                return 0
            if fresh := loaded is None:
                folder.open(-1)
            else:
                progress = Progress.of(loaded)
                clock = Stopwatch(device, progress.train_seconds, progress.wall_seconds)
                if progress.step >= s.steps:
                    folder.out.say(f"{folder}: finished already, at step {progress.step}; nothing to do")
                    if not folder.has_summary():  # killed between the last checkpoint and the end
                        folder.summarize("finished", None, progress, speed)
                    return 0
                folder.open(progress.step)
            if rank.index == 0 and s.spectra_every:
                listeners = [NormWatch(folder.out.say, s.optimizer)]
                listeners += [folder.live.write_spectra] if folder.live else []
                path, blocked = folder.path / files.SPECTRA, progress.spectra_seconds_blocked
                cut = HEADED if s.heads_per_matrix else ()
                spectra = SpectraRecorder(model, path, listeners, blocked, cut)
                threads.callback(spectra.close)
            threads.callback(loader.close)
            stop_on(signals)
            introduce(folder, model, memory, loader, s)
            writer = Greedy(model, shards, val_stream, s.data) if s.sample_every and rank.index == 0 else None

            # Warm-up, off the clock. It zeroes optimizer state, so the checkpoint is restored after it.
            set_lr(optimizers, 1e-3)
            rows = min(2, sequences // s.micro_batch) * s.micro_batch  # two micro-batches accumulate as any number does
            work.warm_up(torch.randint(shards.vocab_size, (rows, s.seq_len + 1)))
            if compiled and rank.index == 0:
                mark_warm(code)
            if loaded is not None:
                restore(folder, loaded, work, layout, loader)
                loaded = None  # its memory is wanted
                folder.out.say(f"{folder}: resuming at step {progress.step} of {s.steps}")
            gc.collect()
            gc.freeze()  # what exists now stays: collections need not walk it again in every step
            threads.callback(gc.unfreeze)

            train(
                s,
                work,
                layout=layout,
                loader=loader,
                val_stream=val_stream,
                deciles=deciles,
                folder=folder,
                spectra=spectra,
                writer=writer,
                speed=speed,
                progress=progress,
                clock=clock,
                signals=signals,
                fresh=fresh,
            )
        read_clocks(progress, clock, spectra)
        status, which = ("finished", "final") if progress.step == s.steps else ("stopped", "last")
        folder.summarize(
            status, None if status == "finished" else f"signal after step {progress.step}", progress, speed
        )
    except BaseException as raised:
        error = rank.crew.cause(raised) if rank.crew and is_lost_rank(raised) else raised
        read_clocks(progress, clock, spectra)
        if not failed(error, s, folder, memory, speed, progress):
            if error is raised:
                raise
            raise error from raised
        return 1
    else:
        if status == "finished" and rank.index == 0:
            write_samples(folder.path, device)
            if s.plots:
                draw_plots(folder.path)
        with contextlib.suppress(CannotWrite):
            done = f"{status} after {progress.step} steps, {which} validation loss {progress.val_loss}"
            folder.out.say(f"{folder}: {done}")
        return 0
    finally:
        folder.close()


def train(
    s: Settings,
    work: TrainingStep,
    *,
    layout: Layout,
    loader: Loader,
    val_stream: TokenStream,
    deciles: torch.Tensor,  # of each token id
    folder: RunFolder,
    spectra: SpectraRecorder | None,  # on rank 0
    writer: Greedy | None,  # on rank 0
    speed: Speed,
    progress: Progress,
    clock: Stopwatch,
    signals: list[int],
    fresh: bool,
) -> None:
    """The loop: from `progress.step` to the last step, or to a signal. A fresh run logs its state before step 1."""
    device, rank = work.device, folder.rank
    step, stop, in_flight = progress.step, False, deque[StepInFlight]()
    folder.out.start_bar(step, s.steps)
    last = clock.start()
    if fresh:
        if spectra is not None:
            spectra.record(step, 0)
        clock.stop()
        validate(s, work, val_stream, deciles, folder, progress, clock)
        last = clock.start()

    # Several ranks must stop at the same step, so they agree on it in its statistics; a single one just looks.
    while step < s.steps and not stop and not (signals and rank.count == 1):
        multiplier = lr_multiplier(step, s.steps, s.schedule, s.warmup, s.min_lr)
        set_lr(work.optimizers, multiplier)
        set_ns_steps(work.optimizers, ns_steps_at(step, s.steps, s.ns_steps))
        if s.dropout or s.inner_dropout or s.router_noise:  # drawn from (seed, step, rank) alone: a resumed run's too
            torch.manual_seed(int(np.random.SeedSequence([s.seed, step, rank.index]).generate_state(1)[0]))

        # One step on one global batch; nothing here waits for the GPU.
        stats = work.gradients(next(loader), stop_requested=bool(signals))
        measures, validates = is_due(step + 1, s.spectra_every, s), is_due(step + 1, s.eval_every, s)
        saves = (step + 1) % s.checkpoint_every == 0 and step + 1 < s.steps
        writes = is_due(step + 1, s.sample_every, s)
        if spectra is not None:
            spectra.check()
        if measures:
            gradients, momenta = work.sharding.bank_gradients(), work.bank_momenta()  # every rank takes part
            if spectra is not None:
                iterated = s.ns_method not in NOT_ITERATED
                least = reach(s.ns_coefficients, ns_steps_at(step, s.steps, s.ns_steps)) if iterated else None
                muon = muon_step(s, work.model.config, multiplier)
                spectra.before_update(gradients, muon, momenta and Momenta(momenta, least))
            del gradients, momenta
            work.sharding.settle()
        times = work.apply()
        step += 1
        now = point(device)
        in_flight.append(StepInFlight(step, multiplier, stats, times, last, now))
        last = now

        # A GPU keeps one step in flight, so that it always has work, unless this step's outcome is needed now.
        needed = measures or validates or saves or writes or device.type == "cpu"
        began = time.perf_counter()
        stop = collect(in_flight, 0 if needed else 1, s, folder, speed, progress)
        if measures and spectra is not None:
            if device.type == "cuda":
                spectra.seconds_blocked += time.perf_counter() - began
            spectra.record(step, step * s.batch_tokens)
        if measures:
            last = point(device)  # the event's time belongs to no step
        if saves and spectra is not None:
            spectra.flush()  # what a checkpoint vouches for is on disk before it
        if validates or saves or writes:
            clock.stop()
            if validates:
                validate(s, work, val_stream, deciles, folder, progress, clock)
            if writer is not None and writes:
                folder.out.line({"step": f"{step}/{s.steps}", "sample": writer.line()})
            if saves:
                read_clocks(progress, clock, spectra)
                save(work, layout, loader, folder, progress)
            last = clock.start()

    collect(in_flight, 0, s, folder, speed, progress)
    try:
        if spectra is not None:
            spectra.flush()
    except WorkerFailed:  # at the end the weights are kept; a stopped run repeats the steps that were not measured
        if step == s.steps:
            read_clocks(progress, clock, spectra)
            save(work, layout, loader, folder, progress)
        raise
    clock.stop()
    read_clocks(progress, clock, spectra)
    save(work, layout, loader, folder, progress)


def muon_step(s: Settings, config: ModelConfig, multiplier: float) -> MuonStep | None:
    """What Muon makes its next update with; None where it makes none, or none that can be measured."""
    if s.optimizer != "muon" or s.decay_rule != "plain":  # else what Muon subtracted cannot be told from the decay
        return None
    return MuonStep(muon_names(s.muon_on, config), s.lr * multiplier, s.weight_decay, s.lr_scale)


def is_due(step: int, every: int, s: Settings) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after `step`; 0 = never."""
    return bool(every) and (step % every == 0 or step == s.steps)


def collect(
    in_flight: deque[StepInFlight], keep: int, s: Settings, folder: RunFolder, speed: Speed, progress: Progress
) -> bool:
    """Read and log all but the last `keep` steps in flight; returns whether any rank was told to stop.

    Raises TrainingFailed for a step that is not finite. It changed no weight, nor did those after it.
    """
    stop = False
    while len(in_flight) > keep:
        sent = in_flight.popleft()
        stats = sent.stats.read()  # waits until the device has passed it
        if not stats.finite:
            where = f"; not finite in {', '.join(stats.not_finite)}" if stats.not_finite else ""
            raise TrainingFailed(f"step {sent.step}: loss {stats.loss}, gradient norm {stats.grad_norm}{where}")
        progress.step, progress.train_loss = sent.step, stats.loss
        seconds = seconds_between(sent.start, sent.stop)
        mfu = speed.mfu(s.batch_tokens / seconds)
        folder.log_step(sent.step, sent.lr_multiplier, stats, seconds, mfu, speed.fields(sent.times, seconds))
        stop = stop or stats.stop_requested
    return stop


def validate(
    s: Settings,
    work: TrainingStep,
    stream: TokenStream,
    deciles: torch.Tensor,
    folder: RunFolder,
    progress: Progress,
    clock: Stopwatch,
) -> None:
    """Mean loss and next-token accuracy over the first --eval-tokens validation tokens, shared out over the ranks."""
    rank = folder.rank
    rows = max(1, VALIDATION_TOKENS[work.device.type] // s.seq_len)
    batches = validation_batches(stream, s.eval_tokens, s.seq_len, rows)
    mine = itertools.islice(batches, rank.index, None, rank.count)
    found = evaluate(work.model, mine, deciles, rank.count)
    stream.wait_until_checked()
    progress.val_loss, progress.val_accuracy = finite(found.loss), found.accuracy
    if found.loss < progress.best_val_loss:
        progress.best_val_loss = found.loss
        if progress.step and rank.index == 0:
            result = {"val_loss": progress.val_loss, "val_accuracy": found.accuracy}
            folder.save_best({"model": work.model.state_dict(), "step": progress.step, **result})
    folder.log_validation(progress.step, found, clock.seconds())


def stop_on(signals: list[int]) -> None:
    """On a signal finish the step, then stop; a second one ends the process at once. SIGHUP comes from a terminal that
    is closed (ignored under nohup, as it should be), SIGUSR1 from Slurm before a job's time is up."""

    def note(number: int, frame: object) -> None:
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, note)


def introduce(folder: RunFolder, model: Transformer, memory: MemoryCount, loader: Loader, s: Settings) -> None:
    """Say what is about to be trained."""
    folder.out.say(f"memory of one step: {memory.describe(s.micro_batch)}")
    if model.config.experts:
        params, active = model.parameter_count(), model.active_parameter_count()
        folder.out.say(f"{params:,} parameters, {active:,} active per token ({active / params:.1%})")
    if s.packing != "stream":
        folder.out.say(f"{loader.windows:,} windows, {loader.waste:.1%} of the training tokens left out")


def read_clocks(progress: Progress, clock: Stopwatch, spectra: SpectraRecorder | None) -> None:
    progress.train_seconds, progress.wall_seconds = clock.seconds(), clock.wall_seconds()
    if spectra is not None:
        progress.spectra_seconds_blocked = spectra.seconds_blocked


def save(work: TrainingStep, layout: Layout, loader: Loader, folder: RunFolder, progress: Progress) -> None:
    """Write a checkpoint, from rank 0; every rank must call it."""
    loader.stream.wait_until_checked()  # no checkpoint vouches for tokens that may be damaged
    contents = state_of(work, layout, loader, progress)
    if folder.rank.index == 0:
        folder.save(contents)


def failed(
    error: BaseException, s: Settings, folder: RunFolder, memory: MemoryCount, speed: Speed, progress: Progress
) -> bool:
    """Write and say why a run ended, as far as that can be written; False for a bug or bad input, to be raised."""
    rank, device = folder.rank, folder.device
    reason = reason_of(error, progress.step, rank.count, lambda: memory.misfit(s.micro_batch, available_bytes(device)))
    with contextlib.suppress(CannotWrite):
        if folder.is_open:
            folder.summarize("failed", reason or f"{type(error).__name__}: {error}", progress, speed)
    if reason is None or isinstance(error, BadInput):
        return False
    with contextlib.suppress(CannotWrite):
        folder.out.say(f"failed: {reason}")
    if rank.index and not isinstance(error, TrainingFailed):  # all ranks know of that one
        print(f"rank {rank.index}: failed: {reason}", file=sys.stderr, flush=True)
    return True


def draw_plots(folder: Path) -> None:
    """Draw the run's plots if Matplotlib is installed; a training box may do without."""
    try:
        from analysis.report_figures import draw
        from analysis.runs import load_run
    except ModuleNotFoundError as missing:
        print(f"no plots: {missing.name} is not installed; python report.py draws them elsewhere")
        return
    draw([load_run(folder)], folder / "plots")


if __name__ == "__main__":
    sys.exit(main())
