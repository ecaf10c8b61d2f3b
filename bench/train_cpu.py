"""Trainings on a CPU as their users start them, in turns: ours, the yardstick, a plain GPT, and nanoGPT's model.

    python -m bench.train --model nano [--nanogpt FOLDER] [--beside 1]

Each candidate is a process of its own, with its own threads, allocator and settings, that sleeps between its turns.
Ours does what train.py does; the others use every core with PyTorch's defaults and the micro-batch that suits them.
"light" is the share of the speed at which the model's matrix products alone would run, at the rate of the fastest
product that is measured in the same turns.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import baseline
from bench.busy import busy_process
from bench.harness import print_table, quartiles
from engine.cli import BadInput
from engine.defaults import defaults_of
from engine.files import ROOT
from engine.memory import MemoryCount, choose_micro_batch
from engine.ranks import Rank
from engine.shared_memory import sharding_of
from engine.step import TrainingStep, prepare_torch
from engine.workers import workers
from model import SIZES, ModelConfig, Transformer
from optim import build_optimizers
from settings import CPU_KERNELS_THAT_PAY, Settings, chosen_workers

MICRO_BATCHES = (1024, 2048, 8192)  # tokens that the others may choose from
PRODUCT = (1024, 512, 128)  # rows, columns and depth of the product whose rate is the light: nano's feed-forward
PRODUCTS_PER_STEP = 100
LOSS_MARGIN = 1.0  # nats: a model that has seen random tokens only is this close to ln V
Step = Callable[[], float]


@dataclass(frozen=True)
class Task:
    """What one process trains, as JSON on its command line."""

    name: str
    model: str
    vocab_size: int
    seq_len: int
    batch_tokens: int
    nanogpt: str | None = None

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(**asdict(SIZES[self.model]) | {"seq_len": self.seq_len})


def names(nanogpt: Path | None) -> list[str]:
    """Every candidate; a name ends with ", compiled" where torch.compile is used."""
    others = ["baseline, muon", "baseline, stacked muon", "baseline, adamw", "plain GPT, adamw"]
    others += ["nanoGPT, adamw"] if nanogpt else []
    both = ["ours, muon", "ours, adamw", *others]
    return ["products", *both, *(f"{name}, compiled" for name in both)]


class PlainGPT(nn.Module):
    """A GPT as a tutorial has it: LayerNorm, learned positions, GELU, every query head with its own key head."""

    def __init__(self, c: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.heads = c.heads
        self.tokens, self.positions = nn.Embedding(vocab_size, c.d_model), nn.Embedding(c.seq_len, c.d_model)
        self.norms = nn.ModuleList(nn.LayerNorm(c.d_model) for _ in range(2 * c.layers + 1))
        self.qkv = nn.ModuleList(nn.Linear(c.d_model, 3 * c.d_model) for _ in range(c.layers))
        self.out = nn.ModuleList(nn.Linear(c.d_model, c.d_model) for _ in range(c.layers))
        self.up = nn.ModuleList(nn.Linear(c.d_model, c.d_ff) for _ in range(c.layers))
        self.down = nn.ModuleList(nn.Linear(c.d_ff, c.d_model) for _ in range(c.layers))
        self.head = nn.Linear(c.d_model, vocab_size, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        B, T = tokens_BT.shape
        x = self.tokens(tokens_BT) + self.positions(torch.arange(T))
        for i, (qkv, out, up, down) in enumerate(zip(self.qkv, self.out, self.up, self.down, strict=True)):
            q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in qkv(self.norms[2 * i](x)).chunk(3, -1))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + out(y.transpose(1, 2).flatten(2))
            x = x + down(F.gelu(up(self.norms[2 * i + 1](x))))
        return F.cross_entropy(self.head(self.norms[-1](x)).flatten(0, 1), targets_BT.flatten())


def nanogpt_model(file: Path, c: ModelConfig, vocab_size: int) -> nn.Module:
    """The GPT of a nanoGPT checkout's model.py in our shape; BadInput where it is not one."""
    spec = spec_from_file_location("nanogpt_model", file)
    module = sys.modules[spec.name] = module_from_spec(spec)  # where torch.compile looks for it
    try:
        spec.loader.exec_module(module)
        shape = {"n_layer": c.layers, "n_head": c.heads, "n_embd": c.d_model, "block_size": c.seq_len}
        with contextlib.redirect_stdout(sys.stderr):
            gpt = module.GPT(module.GPTConfig(**shape, vocab_size=vocab_size, dropout=0.0, bias=False))
    except (OSError, AttributeError, TypeError, SyntaxError) as error:
        raise BadInput(f"--nanogpt {file.parent}: {file.name} is not nanoGPT's ({error})") from None

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt = gpt

        def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
            return self.gpt(tokens_BT, targets_BT.contiguous())[1]

    return Loss()


def rows_of(task: Task, rank: Rank) -> Tensor:
    sequences = task.batch_tokens // task.seq_len
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(task.vocab_size, (sequences, task.seq_len + 1), generator=generator)
    return rows.tensor_split(rank.count)[rank.index]


def ours(task: Task, optimizer: str, compiled: bool, rank: Rank) -> Step:
    """Our model and step with what train.py chooses on a CPU."""
    model = Transformer(task.config, task.vocab_size)
    model.kernels = CPU_KERNELS_THAT_PAY
    sharding = sharding_of(model, rank)
    optimizers = build_optimizers(model, optimizer, **defaults_of(task.model).rates(optimizer), sharding=sharding)
    rows = rows_of(task, rank)
    memory = MemoryCount(model, optimizer, len(rows), task.seq_len)
    micro_batch = choose_micro_batch(memory, "auto", rows.device)
    work = TrainingStep(model, optimizers, micro_batch=micro_batch, compiled=compiled, sharding=sharding)

    def step() -> float:
        loss = work.gradients(rows).read().loss
        work.apply()
        return loss

    return step


def theirs(task: Task, compiled: bool) -> Step:
    """Another model, at the micro-batch with which its step takes the least time."""
    c, rows = task.config, rows_of(task, Rank())
    who, kind = task.name.removesuffix(", compiled").split(", ")
    if who == "baseline":
        kind = {"muon": "loop", "stacked muon": "stacked"}.get(kind, kind)
        rates = defaults_of(task.model).rates(kind)
        model, optimizers = baseline.build(c, task.vocab_size, kind, **rates, compile=compiled)
    else:
        gpt = nanogpt_model(Path(task.nanogpt) / "model.py", c, task.vocab_size) if who == "nanoGPT" else None
        model = gpt or PlainGPT(c, task.vocab_size)
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)]
        model = torch.compile(model, dynamic=False) if compiled else model

    def seconds(micro_batch: int) -> float:
        baseline.train_step(model, [], rows, micro_batch)  # changes no weight
        began = time.perf_counter()
        baseline.train_step(model, [], rows, micro_batch)
        return time.perf_counter() - began

    sizes = {min(len(rows), max(1, tokens // task.seq_len)) for tokens in MICRO_BATCHES}
    best = min(sorted(size for size in sizes if len(rows) % size == 0), key=seconds)
    print(f"{task.name}: micro-batch {best}", file=sys.stderr)
    return lambda: baseline.train_step(model, optimizers, rows, best).item()


def products() -> Step:
    """The matrix product whose rate is the light."""
    m, n, k = PRODUCT
    A, B = torch.randn(m, k), torch.randn(k, n)
    out = torch.empty(m, n)

    def step() -> float:
        for _ in range(PRODUCTS_PER_STEP):
            torch.mm(A, B, out=out)
        return 0.0

    return step


def serve(task: Task) -> None:
    """Run as many steps as each line of stdin says; answer with their seconds and the last loss."""
    compiled = task.name.endswith(", compiled")
    who, _, kind = task.name.removesuffix(", compiled").partition(", ")
    mine = who in ("ours", "products")
    count, threads = 1, 0
    if mine:
        prepare_torch()
        shape = {"batch_tokens": task.batch_tokens, "seq_len": task.seq_len, "device": "cpu"}
        count, threads = chosen_workers(Settings(**shape), Rank(), before={})
    with workers(count, threads, Rank()) as rank:
        torch.manual_seed(0)
        step = ours(task, kind, compiled, rank) if who == "ours" else products() if mine else theirs(task, compiled)
        loss = step()
        say = (lambda answer: print(json.dumps(answer), flush=True)) if rank.index == 0 else (lambda answer: None)
        say({"loss": loss, "ranks": rank.count})
        while steps := _steps_wanted(rank):
            began = time.perf_counter()
            for _ in range(steps):
                loss = step()
            if rank.count > 1:
                torch.distributed.barrier()
            say({"seconds": time.perf_counter() - began, "loss": loss})


def _steps_wanted(rank: Rank) -> int:
    """The number on the next line of stdin, 0 at its end, the same in every rank."""
    wanted = torch.tensor(int(sys.stdin.readline() or 0) if rank.index == 0 else 0)
    if rank.count > 1:
        torch.distributed.broadcast(wanted, 0)
    return int(wanted)


class Server:
    """A candidate's process."""

    def __init__(self, task: Task) -> None:
        self.task, self.seconds = task, []
        words = [sys.executable, "-m", "bench.train_cpu", json.dumps(asdict(task))]
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(words, cwd=ROOT, env=environment, **pipes)
        self.first = self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise BadInput(f"{self.task.name}: its process ended with exit code {self.process.wait()}")
        return json.loads(line)

    def run(self, steps: int) -> None:
        """Time `steps` steps."""
        print(steps, file=self.process.stdin, flush=True)
        answer = self._answer()
        self.seconds.append(answer["seconds"] / steps)

    def check(self) -> None:
        """SystemExit where the first loss is not that of a model that has learned nothing."""
        wanted = math.log(self.task.vocab_size)
        if self.task.name != "products" and not abs(self.first["loss"] - wanted) < LOSS_MARGIN:
            sys.exit(f"{self.task.name}: a first loss of {self.first['loss']:.3f}, not about {wanted:.3f}, not timed")

    def end(self) -> None:
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def servers(tasks: list[Task], beside: int) -> Iterator[list[Server]]:
    """A process for each task, next to `beside` processes that never sleep."""
    with contextlib.ExitStack() as stack:
        for _ in range(beside):
            stack.enter_context(busy_process())
        started = []
        for task in tasks:
            started.append(Server(task))
            stack.callback(started[-1].end)
        yield started


def time_all(running: list[Server], steps: int, rounds: int, seconds: float) -> None:
    """Fill in the seconds of every candidate, round by round; the first round warms up."""
    for server in running:
        server.check()
    began = time.monotonic()
    for i in range(-1, rounds):
        if i > 0 and time.monotonic() - began > seconds:
            break
        for server in running:
            server.run(steps)
    for server in running:
        del server.seconds[0]


def figures(running: list[Server], flops_per_token: int) -> dict[str, Any]:
    """Every candidate's speed, and its share of the light."""
    light, *others = running
    m, n, k = PRODUCT
    rate = light.first["ranks"] * PRODUCTS_PER_STEP * 2 * m * n * k / quartiles(light.seconds)[1]
    rows = []
    for server in others:
        spread, tokens = quartiles(server.seconds), server.task.batch_tokens
        row = {"candidate": server.task.name, "tokens_per_second": tokens / spread[1], "step_ms": 1e3 * spread[1]}
        row |= {"step_ms_quartiles": [1e3 * value for value in spread]}
        rows.append(row | {"light_share": row["tokens_per_second"] * flops_per_token / rate})
    speed = {row["candidate"]: row["tokens_per_second"] for row in rows}
    ratios = {f"ours, muon / {name}": speed["ours, muon"] / speed[name] for name in speed if name != "ours, muon"}
    adamw = [name for name in speed if "adamw" in name and name != "ours, adamw"]
    ratios |= {f"ours, adamw / {name}": speed["ours, adamw"] / speed[name] for name in adamw}
    products_rate = {"gflops_per_second": rate / 1e9, "light_tokens_per_second": rate / flops_per_token}
    return {"rows": rows, "ratios": ratios, "workers": others[0].first["ranks"]} | products_rate


def show(found: dict[str, Any]) -> None:
    shown = []
    for row in found["rows"]:
        low, _, high = row["step_ms_quartiles"]
        line = {"candidate": row["candidate"], "tok/s": f"{row['tokens_per_second']:,.0f}"}
        line |= {"step ms": f"{row['step_ms']:.1f}", "low": f"{low:.1f}", "high": f"{high:.1f}"}
        shown.append(line | {"light": f"{row['light_share']:.1%}"})
    print_table(shown)
    for name, ratio in found["ratios"].items():
        print(f"{name:50} {ratio:6.2f}x")
    print(
        f"{found['workers']} workers; products run at {found['gflops_per_second']:,.0f} GFLOP/s, "
        f"so the light is {found['light_tokens_per_second']:,.0f} tokens/s"
    )


if __name__ == "__main__":
    serve(Task(**json.loads(sys.argv[1])))
