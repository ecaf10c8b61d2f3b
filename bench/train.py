"""Times the whole training step, ours against the baseline, interleaved in one run, with Muon and AdamW.

    python -m bench.train [--model 88m] [--json FILE]      python -m bench.train --predict

Refuses to time a step whose loss or gradients differ from the baseline's. Each round times every candidate once, in
turn, on the same random tokens; medians and quartiles over rounds. On a CPU candidates are processes, see train_cpu.py.
"light" is the share of the speed of light (engine.speed.light_seconds), "gap" the share of time in which the GPU ran no
kernel. Also times a spectra event and the loader, which a run adds to the step.
"""

import dataclasses
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from bench import baseline, machine, train_cpu
from bench.harness import (
    JsonFlag,
    print_table,
    quartiles,
    require,
    this_device,
    write_figures,
)
from corpus.build import build_shards
from corpus.shards import open_shards
from data import Loader, TokenStream
from engine import files, speed
from engine.cli import AT_LEAST_1, NOT_NEGATIVE, BadInput, Count, check_limits, exit_with_a_sentence, one_of
from engine.defaults import defaults_of
from engine.memory import GIB, MemoryCount, available_bytes, choose_micro_batch
from engine.speed import Times, point, seconds_between
from engine.step import TrainingStep, prepare_torch
from kernels.newton_schulz import reach
from metrics import Momenta, SpectraRecorder
from model import KERNELS, SIZES, Transformer
from optim import build_optimizers, step_cost
from settings import CPU_KERNELS_THAT_PAY

WARMUP_STEPS = 3
PROFILED_STEPS = 2
CANDIDATES = 9
DEFAULT_VOCAB, NANO_VOCAB = 49_152, 4096  # of the embedded shards
SPECTRA_EVERY = 250  # steps between spectra events of a long run, for their share of the time
# Of the loss, absolute, and of each matrix's gradient, as a share of its norm.
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Arguments(JsonFlag):
    """Time training steps of our model and of the baseline on random tokens."""

    model: Annotated[str, one_of(SIZES)] = "88m"
    """Named size."""
    vocab_size: Annotated[int, AT_LEAST_1] | None = None
    """Vocabulary (default: 49,152; nano 4,096)."""
    seq_len: int | None = None
    """Tokens per sequence, instead of the size's."""
    batch_tokens: Annotated[Count, AT_LEAST_1] | None = None
    """Tokens per step (default: 16,384; nano 8,192)."""
    micro_batch: Literal["auto"] | int = "auto"
    """Sequences per forward pass, the same for all; auto is the most that fits a GPU, 1k tokens on a CPU."""
    steps: Annotated[int, AT_LEAST_1] | None = None
    """Steps of each candidate in each round (default: 10; on a CPU 2)."""
    rounds: Annotated[int, AT_LEAST_1] | None = None
    """Rounds (default: 5; on a CPU 3)."""
    kernels: bool = True
    """Time ours with each fused kernel too."""
    seconds: float | None = None
    """Start no further round so long after the first one."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile for all of them; auto = on CUDA, and on a CPU both ways."""
    nanogpt: Path | None = None
    """A checkout of nanoGPT: on a CPU its model.py is timed too."""
    beside: Annotated[int, NOT_NEGATIVE] = 0
    """Processes that never sleep next to every candidate, on a CPU."""
    predict: bool = False
    """Print the speed of light on every GPU of engine/speed.py and stop."""


@dataclass
class Candidate:
    """Something that trains: `step(rows, times)` sends one step to the device and marks its phases, `gradients(rows)`
    gives the loss and each matrix's gradient as the map's (out, in) and leaves the weights as they are."""

    name: str
    optimizer: str
    model: torch.nn.Module
    optimizers: list[torch.optim.Optimizer]
    step: Callable[[Tensor, Times | None], Any]
    gradients: Callable[[Tensor], tuple[float, list[Tensor]]]
    seconds: list[float] = dataclasses.field(default_factory=list)
    phases: list[dict[str, float]] = dataclasses.field(default_factory=list)
    peak_bytes: int = 0


class Workplace:
    """The device, the shape of the work, and how candidates are built for it."""

    def __init__(self, a: Arguments) -> None:
        check_limits(a)
        self.cuda = torch.cuda.is_available()
        self.steps = (10 if self.cuda else 2) if a.steps is None else a.steps
        self.rounds = (5 if self.cuda else 3) if a.rounds is None else a.rounds
        self.fused = a.kernels
        self.seconds = math.inf if a.seconds is None else a.seconds
        size, nano = SIZES[a.model], a.model == "nano"
        seq_len = size.seq_len if a.seq_len is None else a.seq_len
        self.vocab_size = (NANO_VOCAB if nano else DEFAULT_VOCAB) if a.vocab_size is None else a.vocab_size
        self.suited = defaults_of(a.model)
        self.batch_tokens = self.suited.batch_tokens if a.batch_tokens is None else a.batch_tokens
        self.config = dataclasses.replace(size, seq_len=seq_len)
        self.sequences, rest = divmod(self.batch_tokens, seq_len)
        if rest or not self.sequences:
            raise BadInput(f"--batch-tokens {self.batch_tokens}: not divisible by --seq-len {seq_len}")
        self.device = torch.device("meta") if a.predict else this_device()
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.compiled = a.compile == "on" or (a.compile == "auto" and self.cuda)
        self.gpu = speed.DEVICES.get(machine.device_name())
        self.micro_batch = 1 if a.predict else self._micro_batch(a.micro_batch)

    def _micro_batch(self, asked: Literal["auto"] | int) -> int:
        count = MemoryCount(self.transformer(), "adamw", self.sequences, self.config.seq_len, compiled=self.compiled)
        if asked == "auto" and self.cuda:  # all candidates are in memory at once with their optimizers
            others = (CANDIDATES - 1) * count.resident_bytes()
            return count.largest_micro_batch(available_bytes(self.device) - others)
        return choose_micro_batch(count, asked, self.device)

    def transformer(self, kernels: frozenset[str] = frozenset()) -> Transformer:
        torch.manual_seed(0)
        model = Transformer(self.config, self.vocab_size).to(self.device)
        model.compute_dtype, model.kernels = self.dtype, kernels
        return model

    def ours(self, optimizer: str, kernels: frozenset[str] = frozenset()) -> Candidate:
        """Our model and training step with some of the fused kernels."""
        model = self.transformer(kernels)
        optimizers = build_optimizers(model, optimizer, **self.suited.rates(optimizer))
        work = TrainingStep(model, optimizers, micro_batch=self.micro_batch, compiled=self.compiled)

        def step(rows: Tensor, times: Times | None) -> None:
            work.gradients(rows, times=times)
            work.apply()

        def gradients(rows: Tensor) -> tuple[float, list[Tensor]]:
            loss = work.gradients(rows).read().loss
            found = [p.weight for p in model.projections([bank.parameter.grad for bank in model.banks()])]
            return loss, [*found, model.embedding.grad]

        named = "" if not kernels else ", all kernels" if kernels == KERNELS else f", {', '.join(sorted(kernels))}"
        return Candidate(f"ours, {optimizer}{named}", optimizer, model, optimizers, step, gradients)

    def theirs(self, optimizer: str) -> Candidate:
        """The baseline with one of its optimizers."""
        model, optimizers = baseline.build(
            self.config,
            self.vocab_size,
            optimizer,
            **self.suited.rates(optimizer),
            device=self.device,
            compile=self.compiled,
        )
        baseline.copy_weights(self.transformer(), model)

        def step(rows: Tensor, times: Times | None) -> None:
            mark = None if times is None else times.mark
            baseline.train_step(model, optimizers, rows, self.micro_batch, mark=mark)

        def gradients(rows: Tensor) -> tuple[float, list[Tensor]]:
            loss = baseline.train_step(model, [], rows, self.micro_batch, grad_clip=0.0)
            names = [(p.layer, p.name) for p in self.transformer().projections()]
            found = [getattr(model.blocks[layer], name).weight.grad for layer, name in names]
            return loss.item(), [*found, model.embedding.weight.grad]

        name = {"adamw": "baseline, adamw", "loop": "baseline, muon", "stacked": "baseline, stacked muon"}[optimizer]
        return Candidate(name, "adamw" if optimizer == "adamw" else "muon", model, optimizers, step, gradients)

    def candidates(self) -> list[Candidate]:
        """Everything that is compared."""
        each = [frozenset((kernel,)) for kernel in sorted(KERNELS)]
        more = (*each, KERNELS) if self.fused else ()
        ours = [self.ours("muon", kernels) for kernels in (frozenset(), *more)]
        ours += [self.ours("adamw", kernels) for kernels in (frozenset(), *more[-1:])]
        return ours + [self.theirs(optimizer) for optimizer in baseline.OPTIMIZERS]

    def cpu_candidates(self) -> list[Candidate]:
        """Of what train_cpu.py times, ours and the baseline that it must agree with."""
        ours = [self.ours(optimizer, CPU_KERNELS_THAT_PAY) for optimizer in ("muon", "adamw")]
        return [*ours, self.theirs("adamw")]

    def random_rows(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(self.vocab_size, (self.sequences, self.config.seq_len + 1), generator=generator)
        return rows.to(self.device)


def check(candidates: list[Candidate], place: Workplace) -> None:
    """SystemExit unless every candidate starts with the baseline's loss and with its gradient of every matrix."""
    rows, wanted = place.random_rows(0), None
    for c in reversed(candidates):  # the baseline comes last
        loss, gradients = c.gradients(rows)
        wanted = wanted or (loss, [g.clone() for g in gradients])
        if not abs(loss - wanted[0]) <= LOSS_TOLERANCE[place.dtype]:
            sys.exit(f"{c.name}: loss {loss:.5f} where the baseline has {wanted[0]:.5f}, not timed")
        for i, (found, exact) in enumerate(zip(gradients, wanted[1], strict=True)):
            what = f"{c.name}: the gradient of matrix {i}"
            require(what, found, exact, GRADIENT_TOLERANCE[place.dtype], "the baseline's")
        c.model.zero_grad(set_to_none=True)


def time_all(candidates: list[Candidate], place: Workplace) -> None:
    """Fills in seconds and phases of each candidate, round by round; every round draws its own tokens."""
    began = time.monotonic()
    for i in range(-1, place.rounds):
        if i > 0 and time.monotonic() - began > place.seconds:
            break
        rows = place.random_rows(i + 1)
        for c in candidates:
            if place.cuda:
                c.model.zero_grad(set_to_none=True)
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                others = torch.cuda.memory_allocated() - state_bytes(c)
            for _ in range(WARMUP_STEPS if i < 0 else 1):  # another candidate has filled the caches
                c.step(rows, None)
            if i < 0:
                continue
            taken = [Times(place.device) for _ in range(place.steps)]
            start = point(place.device)
            for times in taken:
                times.start()
                c.step(rows, times)
            stop = point(place.device)
            c.seconds.append(seconds_between(start, stop) / place.steps)
            c.phases += [times.milliseconds() for times in taken]
            if place.cuda:
                c.peak_bytes = max(c.peak_bytes, torch.cuda.max_memory_allocated() - others)
            c.model.zero_grad(set_to_none=True)


def state_bytes(c: Candidate) -> int:
    """Weights and optimizer state, which stay allocated while other candidates run."""
    state = [t for o in c.optimizers for s in o.state.values() for t in s.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in [*c.model.parameters(), *state])


def gap_share(c: Candidate, place: Workplace) -> float | None:
    """Share of the step in which the GPU ran no kernel, from the profiler; None on a CPU."""
    if not place.cuda:
        return None
    rows = place.random_rows(0)
    c.step(rows, None)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED_STEPS):
            c.step(rows, None)
        torch.cuda.synchronize()
    spans = sorted((e.time_range.start, e.time_range.end) for e in profile.events() if e.device_type.name == "CUDA")
    if not spans:
        return None
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - spans[0][0])


def row_of(c: Candidate, place: Workplace) -> dict[str, Any]:
    """A candidate's figures, as printed and as written to the JSON file."""
    spread = quartiles(c.seconds)
    seconds = spread[1]
    row: dict[str, Any] = {"candidate": c.name, "tokens_per_second": place.batch_tokens / seconds}
    row |= {"step_ms": 1e3 * seconds, "step_ms_quartiles": [1e3 * q for q in spread]}
    for phase in ("forward", "backward", "optimizer"):
        row[f"{phase}_ms"] = statistics.median(phases.get(phase, 0.0) for phases in c.phases)
    row |= {"gap_share": gap_share(c, place), "mfu": None, "mfu_causal": None, "light_share": None}
    row["peak_memory_bytes"] = c.peak_bytes or None
    if place.gpu:
        model, rate = place.transformer(), place.batch_tokens / seconds / place.gpu.bf16_flops
        seq_len = place.config.seq_len
        row |= {"mfu": rate * model.flops_per_token(seq_len), "mfu_causal": rate * model.flops_per_token(seq_len, True)}
        optimizers = build_optimizers(model, c.optimizer, **place.suited.rates(c.optimizer))
        least = speed.light_seconds(model, step_cost(optimizers), place.batch_tokens, seq_len, place.gpu)
        row |= {"light_ms": 1e3 * least, "light_share": least / seconds}
    return row


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The comparisons of interest, each ours over theirs in tokens/s."""
    speed = {row["candidate"]: row["tokens_per_second"] for row in rows}
    pairs = [
        *((ours, "baseline, muon") for ours in ("ours, muon", "ours, muon, all kernels")),
        *((ours, "baseline, stacked muon") for ours in ("ours, muon", "ours, muon, all kernels")),
        *((ours, "baseline, adamw") for ours in ("ours, adamw", "ours, adamw, all kernels")),
        *((f"ours, muon, {kernel}", "ours, muon") for kernel in sorted(KERNELS)),
        ("ours, muon", "ours, adamw"),
    ]
    return {f"{ours} / {theirs}": speed[ours] / speed[theirs] for ours, theirs in pairs if ours in speed}


def time_surroundings(place: Workplace, step_seconds: float) -> dict[str, float | None]:
    """How long the loop waits for a spectra event and for a batch, and how long an event keeps the worker busy.

    A batch's times are None where the package that builds shards is absent.
    """
    model = place.transformer()
    optimizers = build_optimizers(model, "muon", **place.suited.rates("muon"))
    work = TrainingStep(model, optimizers, micro_batch=place.micro_batch)
    with tempfile.TemporaryDirectory() as folder:
        recorder = SpectraRecorder(model, Path(folder) / files.SPECTRA)
        for step in range(2):  # the first one simulates levels of chance, once per run
            work.gradients(place.random_rows(step))
            recorder.seconds_blocked, start = 0.0, time.perf_counter()
            momenta = Momenta(work.bank_momenta(), reach("polar_express", 5))
            recorder.before_update(work.sharding.bank_gradients(), momenta=momenta)
            work.apply()
            recorder.record(step, 0)
            blocked_seconds = recorder.seconds_blocked  # the loop does not wait for the worker, the next line does
            recorder.flush()
            worker_seconds = time.perf_counter() - start
        recorder.close()
        builds = find_spec("tokenizers") is not None
        loader_seconds = _loader_seconds(place, Path(folder) / "shards", step_seconds) if builds else None
    return {
        "spectra_blocked_seconds": blocked_seconds,
        "spectra_blocked_share": blocked_seconds / (SPECTRA_EVERY * step_seconds),
        "spectra_worker_seconds": worker_seconds,
        "loader_wait_seconds": loader_seconds,
        "loader_share": None if loader_seconds is None else loader_seconds / step_seconds,
    }


def _loader_seconds(place: Workplace, folder: Path, step_seconds: float) -> float:
    """Median wait for a batch by a loop that takes one every `step_seconds`."""
    words = np.random.default_rng(0).integers(0, 50, size=(200, 3000))
    build_shards(
        lambda: iter(" ".join(map(str, row)) for row in words),
        folder,
        source="random numbers",
        vocab_size=300,
        val_fraction=0.05,
    )
    stream = TokenStream(open_shards(folder), "train")
    loader = Loader(stream, place.sequences, place.config.seq_len, 0, pin_memory=place.cuda, say=lambda line: None)
    waits = []
    try:
        for _ in range(10):
            time.sleep(min(step_seconds, 0.5))
            start = time.perf_counter()
            next(loader)
            waits.append(time.perf_counter() - start)
    finally:
        loader.close()
    return statistics.median(waits)


def show(rows: list[dict[str, Any]]) -> None:
    shown = []
    for r in rows:
        low, _, high = r["step_ms_quartiles"]
        line = {
            "candidate": r["candidate"],
            "tok/s": f"{r['tokens_per_second']:,.0f}",
            "step ms": f"{r['step_ms']:.1f}",
        }
        line |= {"low": f"{low:.1f}", "high": f"{high:.1f}"}
        line |= {phase: f"{r[f'{phase}_ms']:.1f}" for phase in ("forward", "backward", "optimizer")}
        for name, key in (("gap", "gap_share"), ("mfu", "mfu"), ("causal", "mfu_causal"), ("light", "light_share")):
            line[name] = "-" if r[key] is None else f"{r[key]:.1%}"
        line["GiB"] = "-" if r["peak_memory_bytes"] is None else f"{r['peak_memory_bytes'] / GIB:.2f}"
        shown.append(line)
    print_table(shown)


def predict(place: Workplace) -> None:
    """The speed of light of one step per GPU and optimizer: counted, not timed."""
    print("PREDICTION from counted FLOPs and bytes; nothing here was timed, and nothing can be faster")
    for optimizer in ("muon", "adamw"):
        model = place.transformer()
        optimizers = build_optimizers(model, optimizer, lr=1.0, adamw_lr=1.0)
        work = place.batch_tokens * model.flops_per_token(place.config.seq_len, causal=True)
        flops, moved = step_cost(optimizers)
        print(f"{optimizer}: {work / 1e12:.2f} TFLOP, optimizer {flops / 1e12:.2f} TFLOP and {moved / 1e9:.2f} GB")
        for name, gpu in speed.DEVICES.items():
            seconds = speed.light_seconds(model, step_cost(optimizers), place.batch_tokens, place.config.seq_len, gpu)
            print(f"  {name:26} {1e3 * seconds:7.1f} ms {place.batch_tokens / seconds:11,.0f} tokens/s at most")


def time_processes(a: Arguments, place: Workplace) -> dict[str, Any]:
    """On a CPU: every candidate as a process of its own, as its user starts it."""
    nanogpt = None if a.nanogpt is None else str(a.nanogpt.resolve())
    shape = (a.model, place.vocab_size, place.config.seq_len, place.batch_tokens)
    tasks = [train_cpu.Task(name, *shape, nanogpt) for name in train_cpu.names(a.nanogpt)]
    if a.compile == "off":
        tasks = [task for task in tasks if not task.name.endswith("compiled")]
    with train_cpu.servers(tasks, a.beside) as running:
        train_cpu.time_all(running, place.steps, place.rounds, place.seconds)
        found = train_cpu.figures(running, place.transformer().flops_per_token(place.config.seq_len, causal=True))
    train_cpu.show(found)
    return {"beside": a.beside} | found


def time_here(candidates: list[Candidate], place: Workplace) -> dict[str, Any]:
    """On a GPU: all candidates in this process."""
    time_all(candidates, place)
    rows = [row_of(c, place) for c in candidates]
    show(rows)
    compared = ratios(rows)
    for name, ratio in compared.items():
        print(f"{name:50} {ratio:6.3f}x")
    return {"compiled": place.compiled, "rows": rows, "ratios": compared}


@exit_with_a_sentence
def main() -> int:
    prepare_torch()
    a = tyro.cli(Arguments, description=__doc__)
    place = Workplace(a)
    if a.predict:
        predict(place)
        return 0
    print(
        f"{machine.device_name()}, torch {torch.__version__}; {a.model}, vocabulary {place.vocab_size:,}, "
        f"{place.batch_tokens:,} tokens per step in micro-batches of {place.micro_batch} x {place.config.seq_len}"
    )
    candidates = place.candidates() if place.cuda else place.cpu_candidates()
    check(candidates, place)
    found = time_here(candidates, place) if place.cuda else time_processes(a, place)
    surroundings = time_surroundings(place, found["rows"][0]["step_ms"] / 1e3)
    print(
        f"a spectra event blocks {1e3 * surroundings['spectra_blocked_seconds']:.1f} ms, "
        f"{surroundings['spectra_blocked_share']:.3%} of the time at every {SPECTRA_EVERY} steps, and keeps the "
        f"worker busy for {surroundings['spectra_worker_seconds']:.2f} s"
    )
    if surroundings["loader_share"] is None:
        print("loader: not timed, the package tokenizers is absent")
    else:
        waited, share = 1e3 * surroundings["loader_wait_seconds"], surroundings["loader_share"]
        print(f"the loop waits {waited:.2f} ms for a batch, {share:.3%} of a step")
    figures = {"model": a.model, "batch_tokens": place.batch_tokens, "seq_len": place.config.seq_len}
    figures |= {"micro_batch": place.micro_batch, "vocab_size": place.vocab_size}
    write_figures(a.json, figures | found | {"surroundings": surroundings})
    return 0


if __name__ == "__main__":
    sys.exit(main())
