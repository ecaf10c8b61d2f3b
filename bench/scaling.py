"""Counts what many ranks send per step against the least possible, how evenly they share Newton-Schulz, and times them.

    python -m bench.scaling --model 88m                          counted, no GPU needed
    python -m bench.scaling --model nano --measure               ranks as processes of this machine, over gloo

The least for one step: every gradient to its owner and every weight back, 2 (N - 1) / N of the parameters' bytes from
each rank, in one message each way. The projection compares that with the speed of light of the computation.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import tyro

from bench.harness import JsonFlag, print_table, write_figures
from engine import speed
from engine.cli import BadInput, Count, check_limits, exit_with_a_sentence, one_of
from engine.ranks import Sharding, unit_cost
from engine.step import TrainingStep
from model import SIZES, Transformer
from optim import build_optimizers, step_cost

# Bytes/s that one GPU can send, by data sheet: PCIe 4 x16 between 4090s (no peer to peer: through the host), NVLink 4,
# and one GPU's eighth of 8 x 400 Gb/s between nodes.
LINKS = {"PCIe 4 x16": 25e9, "NVLink 4": 450e9, "400 Gb/s per GPU": 50e9}
GPUS = {"4090": "NVIDIA GeForce RTX 4090", "H200": "NVIDIA H200"}
LAUNCH_SECONDS = 15e-6  # of one NCCL message, typical
TIMED_STEPS, UNTIMED_STEPS = 8, 2


@dataclass(frozen=True)
class Arguments(JsonFlag):
    """Count or measure what many ranks cost."""

    model: Annotated[str, one_of(SIZES)] = "88m"
    """Named size."""
    vocab_size: int = 49_152
    """Vocabulary."""
    ranks: tuple[int, ...] = (2, 3, 4, 8, 16)
    """Numbers of ranks."""
    batch_tokens: Count = 2**19
    """Tokens per step over all ranks, for the projection."""
    optimizer: str = "muon"
    """muon or adamw."""
    measure: bool = False
    """Time real steps of so many processes over gloo on this machine's CPU instead."""


def count(a: Arguments, ranks: int) -> dict[str, float]:
    """What the busiest rank of `ranks` sends and computes; no memory is allocated."""
    with torch.device("meta"):
        model = Transformer(SIZES[a.model], a.vocab_size)
    sharding = Sharding(model, 0, ranks)
    sent, messages = sharding.traffic()
    parameter_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    ideal = 2 * parameter_bytes * (ranks - 1) / ranks
    costs = [_matrix_cost(Sharding(model, rank, ranks)) for rank in range(ranks)]
    return {
        "ranks": ranks,
        "bytes_sent": sent,
        "bytes_ideal": ideal,
        "bytes_ratio": sent / ideal,
        "messages": messages,
        "newton_schulz_imbalance": max(costs) * ranks / sum(costs),
    }


def _matrix_cost(sharding: Sharding) -> float:
    """Newton-Schulz's work of one rank, in FLOPs of one plain product each."""
    shares = [sharding.share_of[id(p)] for p in sharding.banks]
    return sum((share.stop - share.start) * unit_cost(share.parameter) for share in shares)


def project(a: Arguments, row: dict[str, float]) -> dict[str, float]:
    """Seconds of communication per link, and the least time of the computation on an RTX 4090 and an H200."""
    ranks = int(row["ranks"])
    with torch.device("meta"):
        model = Transformer(SIZES[a.model], a.vocab_size)
    optimizers = build_optimizers(model, a.optimizer, lr=1.0, adamw_lr=1.0, sharding=Sharding(model, 0, ranks))
    work = (model, step_cost(optimizers), a.batch_tokens, SIZES[a.model].seq_len)
    found = {f"light on {gpu}": speed.light_seconds(*work, speed.DEVICES[name], ranks) for gpu, name in GPUS.items()}
    return found | {link: row["bytes_sent"] / rate + row["messages"] * LAUNCH_SECONDS for link, rate in LINKS.items()}


def measure(a: Arguments, ranks: int) -> dict[str, float]:
    """The median step of `ranks` processes, and what they counted as sent."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
        words = ("-m", "bench.scaling", "--model", a.model, "--vocab-size", a.vocab_size, "--optimizer", a.optimizer)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "SCALING_RANK_WRITES": str(out)}
        done = subprocess.run(
            [*command, *map(str, words)], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise BadInput(f"{ranks} ranks: {(done.stdout or done.stderr).strip().splitlines()[-1]}")
        return json.loads(out.read_text(encoding="utf-8"))


def one_rank(a: Arguments, out: Path) -> None:
    """Runs in each process of `measure`."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    config = SIZES[a.model]
    model = Transformer(config, a.vocab_size)
    sharding = Sharding(model, rank, ranks)
    optimizers = build_optimizers(model, a.optimizer, lr=0.01, adamw_lr=0.01, sharding=sharding)
    step = TrainingStep(model, optimizers, micro_batch=1, sharding=sharding)
    sequences = max(1, 12 // ranks)
    seconds = []
    for number in range(UNTIMED_STEPS + TIMED_STEPS):
        tokens = torch.randint(a.vocab_size, (sequences, config.seq_len + 1))
        dist.barrier()
        sharding.bytes_sent = sharding.messages = 0
        start = time.perf_counter()
        step.gradients(tokens)
        between = time.perf_counter()
        step.apply()
        if number >= UNTIMED_STEPS:
            seconds.append((between - start, time.perf_counter() - between))
    if (sharding.bytes_sent, sharding.messages) != sharding.traffic():
        sys.exit(f"counted {sharding.traffic()}, sent {sharding.bytes_sent, sharding.messages}: not reported")
    if rank == 0:
        gradients, apply = (statistics.median(part) for part in zip(*seconds, strict=True))
        tokens = sequences * ranks * config.seq_len
        figures = {"ranks": ranks, "gradients_ms": 1e3 * gradients, "apply_ms": 1e3 * apply}
        figures |= {"tokens_per_second": tokens / (gradients + apply), "bytes_sent": sharding.bytes_sent}
        out.write_text(json.dumps(figures | {"messages": sharding.messages}), encoding="utf-8")
    dist.destroy_process_group()


@exit_with_a_sentence
def main() -> int:
    a = tyro.cli(Arguments, description=__doc__)
    check_limits(a)
    if a.optimizer not in ("muon", "adamw"):
        raise BadInput(f"--optimizer {a.optimizer}: choose from muon, adamw")
    if not a.ranks or min(a.ranks) < 1:
        raise BadInput(f"--ranks {' '.join(map(str, a.ranks))}: must be at least 1")
    if "SCALING_RANK_WRITES" in os.environ:
        one_rank(a, Path(os.environ["SCALING_RANK_WRITES"]))
        return 0
    if a.measure:
        rows = [measure(a, ranks) for ranks in a.ranks]
        print(f"{a.model}, {a.optimizer}, processes of one thread over gloo, 12 sequences per step; medians")
        print_table([_measured(r) for r in rows])
    else:
        rows = [row | project(a, row) for row in (count(a, ranks) for ranks in a.ranks)]
        print(f"{a.model}, {a.optimizer}: counted; PREDICTED milliseconds per step of {a.batch_tokens:,} tokens")
        print_table([_counted(r) for r in rows])
    write_figures(a.json, {"model": a.model, "rows": rows})
    return 0


def _measured(r: dict[str, float]) -> dict[str, str]:
    row = {"ranks": str(r["ranks"]), "tok/s": f"{r['tokens_per_second']:,.0f}"}
    row |= {"gradients ms": f"{r['gradients_ms']:.1f}", "optimizer and gather ms": f"{r['apply_ms']:.1f}"}
    return row | {"MB sent": f"{r['bytes_sent'] / 1e6:.2f}", "messages": str(r["messages"])}


def _counted(r: dict[str, float]) -> dict[str, str]:
    row = {"ranks": str(r["ranks"]), "MB sent": f"{r['bytes_sent'] / 1e6:.1f}", "of ideal": f"{r['bytes_ratio']:.2f}"}
    row |= {"msgs (2)": str(r["messages"]), "imbalance": f"{r['newton_schulz_imbalance']:.2f}"}
    row |= {link: f"{1e3 * r[link]:.2f}" for link in LINKS}
    return row | {gpu: f"{1e3 * r[f'light on {gpu}']:.1f}" for gpu in GPUS}


if __name__ == "__main__":
    sys.exit(main())
