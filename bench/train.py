"""Tokens per second of the whole training step: ours against the baseline, interleaved in one run, with Muon and AdamW.

    python -m bench.train [--model 88m] [--json FILE]      python -m bench.train --predict

Refuses to time a step whose loss or updated weights differ from the baseline's. Each round times every candidate once,
in turn, on the same random tokens; medians and quartiles over rounds. "light" is the share of the speed of light
(devices.light_seconds), "gap" the time in which the GPU ran no kernel. What a run adds to the step is timed too: a
spectra event and the loader.
"""

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

import devices
import runfiles
from bench import baseline
from cli import BadInput, Count, exit_with_a_sentence
from clock import Times, point, seconds_between
from data import Loader, TokenStream, build_shards, open_shards
from memory import GIB, MemoryCount
from model import SIZES, Transformer
from optim import build_optimizers, step_cost
from settings import BATCH_TOKENS, CPU_MICRO_BATCH_TOKENS, DEFAULT_LR, NANO_BATCH_TOKENS, NANO_LR
from spectra import SpectraRecorder
from step import TrainingStep
from train import COMPILE_CACHE

WARMUP_STEPS = 3
PROFILED_STEPS = 2
SPECTRA_EVERY = 250  # updates between spectra events of a long run, for their share of the time
# A step must leave the same loss as the baseline's, and the same weights to this share of their change (AdamW only:
# torch.optim.Muon runs other polynomials, and in bf16). bf16 gradients of a few small entries differ by as much.
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
CHANGE_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.3}


@dataclass(frozen=True)
class Arguments:
    """Time training steps of our model and of the baseline on random tokens."""

    model: str = "88m"
    """Named size."""
    vocab_size: int | None = None
    """Vocabulary (default: 49,152; nano 4,096)."""
    seq_len: int | None = None
    """Tokens per sequence, instead of the size's."""
    batch_tokens: Count | None = None
    """Tokens per update (default: 16,384; nano 8,192)."""
    micro_batch: Literal["auto"] | int = "auto"
    """Sequences per forward pass, the same for all; auto is the most that fits a GPU, 1k tokens on a CPU."""
    steps: int | None = None
    """Steps of each candidate in each round (default: 10; on a CPU 2)."""
    rounds: int | None = None
    """Rounds (default: 5; on a CPU 3)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile for all of them; auto = on CUDA only."""
    json: Path | None = None
    """Write the rows here too, with device, versions and date."""
    predict: bool = False
    """Print the speed of light on every GPU of devices.py and stop."""


@dataclass
class Candidate:
    """Something that trains: `step(rows, times)` sends one update to the device and marks its phases."""

    name: str
    model: torch.nn.Module
    optimizers: list[torch.optim.Optimizer]
    step: Callable[[Tensor, Times | None], Any]
    seconds: list[float] = dataclasses.field(default_factory=list)
    phases: list[dict[str, float]] = dataclasses.field(default_factory=list)
    peak_bytes: int = 0


class Workplace:
    """The device, the shape of the work, and how candidates are built for it."""

    def __init__(self, a: Arguments) -> None:
        if a.model not in SIZES:
            raise BadInput(f"--model {a.model}: choose from {', '.join(SIZES)}")
        self.cuda = torch.cuda.is_available()
        self.steps, self.rounds = a.steps or (10 if self.cuda else 2), a.rounds or (5 if self.cuda else 3)
        if min(self.steps, self.rounds) < 1:
            raise BadInput(f"--steps {self.steps}, --rounds {self.rounds}: must be at least 1")
        self.device = torch.device("cuda", 0) if self.cuda else torch.device("cpu")
        size, nano = SIZES[a.model], a.model == "nano"
        self.config = dataclasses.replace(size, seq_len=a.seq_len or size.seq_len)
        self.vocab_size = a.vocab_size or (4096 if nano else 49_152)
        self.batch_tokens = a.batch_tokens or (NANO_BATCH_TOKENS if nano else BATCH_TOKENS)
        self.sequences, rest = divmod(self.batch_tokens, self.config.seq_len)
        if rest or not self.sequences:
            raise BadInput(f"--batch-tokens {self.batch_tokens}: not divisible by --seq-len {self.config.seq_len}")
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.compiled = a.compile == "on" or (a.compile == "auto" and self.cuda)
        self.rates = NANO_LR if nano else DEFAULT_LR
        self.gpu = devices.find(self.device_name())
        if a.predict:
            self.device = torch.device("meta")
        self.micro_batch = self._micro_batch(a.micro_batch)

    def _micro_batch(self, asked: Literal["auto"] | int) -> int:
        if asked != "auto":
            if asked < 1 or self.sequences % asked:
                raise BadInput(f"--micro-batch {asked}: does not divide {self.sequences} sequences")
            return asked
        if self.device.type != "cuda":
            fitting = max(1, CPU_MICRO_BATCH_TOKENS // self.config.seq_len)
            return next(m for m in range(min(fitting, self.sequences), 0, -1) if self.sequences % m == 0)
        # Six models with their optimizers lie side by side; the count below is of the transient part on top of them.
        count = MemoryCount(self.transformer(False), "adamw", self.sequences, self.config.seq_len)
        others = 6 * sum(list(count.bytes_by_purpose(1).values())[:4])
        return count.largest_micro_batch(torch.cuda.mem_get_info(self.device)[0] - others)

    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.cuda else "cpu"

    def transformer(self, kernels: bool) -> Transformer:
        torch.manual_seed(0)
        model = Transformer(self.config, self.vocab_size).to(self.device)
        model.compute_dtype, model.kernels = self.dtype, kernels
        return model

    def ours(self, optimizer: str, kernels: bool) -> Candidate:
        model = self.transformer(kernels)
        lr, adamw_lr = self.rates[optimizer]
        optimizers = build_optimizers(model, optimizer, lr=lr, adamw_lr=adamw_lr)
        work = TrainingStep(model, optimizers, micro_batch=self.micro_batch, compiled=self.compiled)

        def step(rows: Tensor, times: Times | None) -> Tensor:
            numbers = work.gradients(rows, times=times)
            work.apply()
            return numbers.values[0]

        name = f"ours, {optimizer}" + (", kernels" if kernels else "")
        return Candidate(name, model, optimizers, step)

    def theirs(self, optimizer: str) -> Candidate:
        lr, adamw_lr = self.rates["adamw" if optimizer == "adamw" else "muon"]
        model, optimizers = baseline.build(
            self.config,
            self.vocab_size,
            optimizer,
            lr=lr,
            adamw_lr=adamw_lr,
            device=self.device,
            compile=self.compiled,
        )
        baseline.copy_weights(self.transformer(False), model)

        def step(rows: Tensor, times: Times | None) -> Tensor:
            mark = None if times is None else times.mark
            return baseline.train_step(model, optimizers, rows, self.micro_batch, mark=mark)

        name = {"adamw": "baseline, adamw", "loop": "baseline, muon", "stacked": "baseline, stacked muon"}[optimizer]
        return Candidate(name, model, optimizers, step)

    def random_rows(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(self.vocab_size, (self.sequences, self.config.seq_len + 1), generator=generator)
        return rows.to(self.device)


def check(candidates: list[Candidate], place: Workplace) -> None:
    """SystemExit unless the first step of every candidate has the baseline's loss, and AdamW's its weights."""
    rows, losses, changes = place.random_rows(0), {}, {}
    for c in candidates:
        before = [p.detach().clone() for p in c.model.parameters()]
        losses[c.name] = float(c.step(rows, None))
        change = [
            (p.detach() - old).norm().double().square() for p, old in zip(c.model.parameters(), before, strict=True)
        ]
        changes[c.name] = torch.stack(change).sum().sqrt().item()
    wanted, wanted_change = losses["baseline, adamw"], changes["baseline, adamw"]
    for name, loss in losses.items():
        if not abs(loss - wanted) <= LOSS_TOLERANCE[place.dtype]:
            sys.exit(f"{name}: loss {loss:.5f} where the baseline has {wanted:.5f}, not timed")
        change = changes[name]
        if "adamw" in name and not abs(change / wanted_change - 1) <= CHANGE_TOLERANCE[place.dtype]:
            sys.exit(f"{name}: the first update moves the weights by {change:.4g}, not {wanted_change:.4g}, not timed")


def time_all(candidates: list[Candidate], place: Workplace) -> None:
    """Fills in seconds and phases of each candidate, round by round; every round draws its own tokens."""
    for i in range(-1, place.rounds):
        rows = place.random_rows(i + 1)
        for c in candidates:
            if place.cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                others = torch.cuda.memory_allocated() - state_bytes(c)
            for _ in range(WARMUP_STEPS if i < 0 else 1):  # after another candidate ran, caches are its
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
    quartiles = statistics.quantiles(c.seconds, n=4) if len(c.seconds) > 1 else c.seconds * 3
    seconds = quartiles[1]
    row: dict[str, Any] = {"candidate": c.name, "tokens_per_second": place.batch_tokens / seconds}
    row |= {"step_ms": 1e3 * seconds, "step_ms_quartiles": [1e3 * q for q in quartiles]}
    for phase in ("forward", "backward", "optimizer"):
        row[f"{phase}_ms"] = statistics.median(phases.get(phase, 0.0) for phases in c.phases)
    row |= {"gap_share": gap_share(c, place), "mfu": None, "mfu_causal": None, "light_share": None}
    row["peak_memory_bytes"] = c.peak_bytes or None
    if place.gpu:
        model, rate = place.transformer(False), place.batch_tokens / seconds / place.gpu.bf16_flops
        seq_len = place.config.seq_len
        row |= {"mfu": rate * model.flops_per_token(seq_len), "mfu_causal": rate * model.flops_per_token(seq_len, True)}
        ours = place.ours("adamw" if "adamw" in c.name else "muon", kernels=False)
        least = devices.light_seconds(ours.model, ours.optimizers, place.batch_tokens, seq_len, place.gpu)
        row |= {"light_ms": 1e3 * least, "light_share": least / seconds}
    return row


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The comparisons that people ask for, each ours over theirs in tokens/s."""
    speed = {row["candidate"]: row["tokens_per_second"] for row in rows}
    pairs = {
        f"{ours} / {theirs}": (ours, theirs)
        for ours in ("ours, muon", "ours, muon, kernels")
        for theirs in ("baseline, muon", "baseline, stacked muon")
    }
    pairs |= {
        f"{ours} / baseline, adamw": (ours, "baseline, adamw") for ours in ("ours, adamw", "ours, adamw, kernels")
    }
    pairs |= {"ours, muon / ours, adamw": ("ours, muon", "ours, adamw")}
    return {name: speed[a] / speed[b] for name, (a, b) in pairs.items()}


def time_surroundings(place: Workplace, step_seconds: float) -> dict[str, float]:
    """A spectra event and a batch from the loader, in seconds and as a share of the time between them."""
    model = place.transformer(False)
    with tempfile.TemporaryDirectory() as folder:
        recorder = SpectraRecorder(model, Path(folder) / runfiles.SPECTRA)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        recorder.before_update()
        start = time.perf_counter()
        recorder.record(0, 0)
        spectra_seconds = time.perf_counter() - start
        loader_seconds = _loader_seconds(place, Path(folder) / "shards", step_seconds)
    return {
        "spectra_event_seconds": spectra_seconds,
        "spectra_share": spectra_seconds / (SPECTRA_EVERY * step_seconds),
        "loader_wait_seconds": loader_seconds,
        "loader_share": loader_seconds / step_seconds,
    }


def _loader_seconds(place: Workplace, folder: Path, step_seconds: float) -> float:
    """Median wait for a batch when one is asked for every `step_seconds`."""
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
    print(
        f"{'candidate':24} {'tok/s':>9} {'step ms':>9} {'quartiles':>17} {'forward':>8} {'backward':>8}"
        f" {'optimizer':>9} {'gap':>6} {'mfu':>6} {'causal':>6} {'light':>6} {'GiB':>6}"
    )
    for r in rows:
        low, _, high = r["step_ms_quartiles"]
        shares = "".join(
            f" {'-' if r[key] is None else f'{r[key]:.1%}':>6}"
            for key in ("gap_share", "mfu", "mfu_causal", "light_share")
        )
        memory = "-" if r["peak_memory_bytes"] is None else f"{r['peak_memory_bytes'] / GIB:.2f}"
        print(
            f"{r['candidate']:24} {r['tokens_per_second']:9,.0f} {r['step_ms']:9.1f} {low:8.1f} {high:8.1f}"
            f" {r['forward_ms']:8.1f} {r['backward_ms']:8.1f} {r['optimizer_ms']:9.1f}{shares} {memory:>6}"
        )


def predict(place: Workplace) -> None:
    """The speed of light of one update per GPU and optimizer: counted, not timed."""
    print("PREDICTION from counted FLOPs and bytes; nothing here was timed, and nothing can be faster")
    for optimizer in ("muon", "adamw"):
        model = place.transformer(False)
        optimizers = build_optimizers(model, optimizer, lr=1.0, adamw_lr=1.0)
        work = place.batch_tokens * model.flops_per_token(place.config.seq_len, causal=True)
        flops, moved = step_cost(optimizers)
        print(f"{optimizer}: {work / 1e12:.2f} TFLOP, optimizer {flops / 1e12:.2f} TFLOP and {moved / 1e9:.2f} GB")
        for name, gpu in devices.DEVICES.items():
            seconds = devices.light_seconds(model, optimizers, place.batch_tokens, place.config.seq_len, gpu)
            print(f"  {name:26} {1e3 * seconds:7.1f} ms {place.batch_tokens / seconds:11,.0f} tokens/s at most")


@exit_with_a_sentence
def main() -> int:
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(COMPILE_CACHE))
    torch.set_float32_matmul_precision("high")
    a = tyro.cli(Arguments, description=__doc__)
    place = Workplace(a)
    if a.predict:
        predict(place)
        return 0
    print(
        f"{place.device_name()}, torch {torch.__version__}; {a.model}, vocabulary {place.vocab_size:,}, "
        f"{place.batch_tokens:,} tokens per update in micro-batches of {place.micro_batch} x {place.config.seq_len}"
    )
    candidates = [place.ours(optimizer, kernels) for optimizer in ("muon", "adamw") for kernels in (False, True)]
    candidates += [place.theirs(optimizer) for optimizer in ("loop", "stacked", "adamw")]
    check(candidates, place)
    time_all(candidates, place)
    rows = [row_of(c, place) for c in candidates]
    show(rows)
    compared = ratios(rows)
    for name, ratio in compared.items():
        print(f"{name:45} {ratio:6.3f}x")
    surroundings = time_surroundings(place, rows[0]["step_ms"] / 1e3)
    print(
        f"spectra event {surroundings['spectra_event_seconds']:.2f} s: {surroundings['spectra_share']:.2%} of the time "
        f"at every {SPECTRA_EVERY} updates; waiting for a batch {1e3 * surroundings['loader_wait_seconds']:.2f} ms: "
        f"{surroundings['loader_share']:.3%}"
    )
    if a.json:
        described = {"device": place.device_name(), "date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv)}
        settings = {"model": a.model, "batch_tokens": place.batch_tokens, "seq_len": place.config.seq_len}
        settings |= {"micro_batch": place.micro_batch, "vocab_size": place.vocab_size, "compiled": place.compiled}
        described |= settings | runfiles.provenance() | {"rows": rows, "ratios": compared, "surroundings": surroundings}
        runfiles.write_json(a.json, described)
    return 0


if __name__ == "__main__":
    sys.exit(main())
