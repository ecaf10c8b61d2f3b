"""How long a plan takes, from its settings alone: seconds of one core per run at nano scale; and the disk it fills.

    minutes([run_seconds({"model": "nano", "tokens": 262_144, "batch_tokens": 2048})], slots=2)

Counts floating-point operations and divides by the rate of one core that has nothing else to do (bench/LOG.md);
`slowness` tells how this machine's core compares. At full scale nobody has timed a run yet, so there is no estimate.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from engine.cpu import prepare_cpu
from engine.defaults import NANO, defaults_of
from model import SIZES, ModelConfig, Transformer
from settings import EVENTS_PER_RUN

# Of a Zen 5: nano trains 26,500 tokens/s of 9.0 MFLOP on two cores, 120 GFLOP/s each. A sixth is left for what two runs
# that share a machine cost each other.
CORE_FLOPS = 100e9
SHARE_OF_PRODUCT = 0.45  # CORE_FLOPS is this share of the rate of that core's fp32 product, 220 GFLOP/s
START_SECONDS = 1.5  # to fork, warm up, write the last checkpoint
VOCABULARY = 4096  # of the shards for nano models
SHAPE = ("layers", "d_model", "heads", "kv_heads", "d_ff", "ffn", "seq_len", "experts", "top_k")


def run_seconds(fields: Mapping[str, Any], tokens: int | None = None) -> float:
    """One run on one core, with its validations and spectra; NaN above nano. `tokens` overrides the budget."""
    if fields["model"] not in NANO:
        return math.nan
    shape = tuple((key, fields[key]) for key in SHAPE if fields.get(key) is not None)
    forward_backward, decomposition = _work(fields["model"], shape)
    suited = defaults_of(fields["model"])
    batch = fields.get("batch_tokens") or suited.batch_tokens
    steps = math.ceil((tokens or fields["tokens"]) / batch)
    cadence = max(1, steps // EVENTS_PER_RUN)
    validations = 1 + math.ceil(steps / (fields.get("eval_every") or cadence))
    every = fields.get("spectra_every", cadence)
    events = 1 + math.ceil(steps / every) if every else 0
    forward = validations * (fields.get("eval_tokens") or suited.eval_tokens) / 3  # of forward and backward
    work = forward_backward * (steps * batch + forward) + events * decomposition
    return START_SECONDS + work / CORE_FLOPS


@functools.cache
def _work(name: str, shape: tuple[tuple[str, Any], ...]) -> tuple[float, float]:
    """Operations per training token, and those of one spectra event at the same rate."""
    config = dataclasses.replace(SIZES[name], **dict(shape))
    with torch.device("meta"):
        built = Transformer(config, VOCABULARY)
    sides = [sorted(projection.weight.shape) for projection in built.projections()]
    # Gram matrix and all eigenvectors of weight and update, in float64 at about a tenth of the rate.
    decomposition = sum(10 * 2 * (2 * a * a * b + 10 * a**3) for a, b in sides)
    return float(built.flops_per_token(config.seq_len)), float(decomposition)


@functools.cache
def weight_bytes(config: ModelConfig, vocabulary: int) -> int:
    """fp32 weights of a model: what best.pt holds."""
    with torch.device("meta"):
        return 4 * Transformer(config, vocabulary).parameter_count()


def minutes(seconds: Sequence[float], slots: int) -> float:
    """Of runs that share `slots` cores evenly; NaN where one has no estimate."""
    return sum(seconds) / slots / 60


def slowness() -> float:
    """How many times as long as `run_seconds` a run takes on this machine when it is idle: by the best of many fp32
    products of one thread, so short that a busy core makes some without a pause. 1 where they run at 220 GFLOP/s."""
    prepare_cpu()
    threads, side = torch.get_num_threads(), 256
    A, seconds = torch.ones(side, side), []
    torch.set_num_threads(1)
    for _ in range(50):
        began = time.perf_counter()
        A @ A
        seconds.append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    return CORE_FLOPS / (SHARE_OF_PRODUCT * 2 * side**3 / min(seconds))
