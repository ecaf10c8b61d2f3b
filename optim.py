"""Muon, AdamW, which parameter goes to which, and the learning-rate schedules.

    optimizers = build_optimizers(model, "muon", lr=0.02, adamw_lr=0.005)

Matrices in the blocks go to Muon, embedding, gains and router to AdamW, at a rate of its own; `muon_on` moves them.
Muon costs one batched Newton-Schulz per bank and step: about 2 % of the model's FLOPs at 65k tokens per step.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.ranks import Sharding
from kernels import Muon
from kernels.newton_schulz import half_product_cost, method_of
from model import PROJECTIONS, ModelConfig, Transformer

SCHEDULES = ("constant", "cosine", "linear", "step", "wsd")
WSD_DECAY_SHARE = 0.2
BLOCKS = "blocks"  # in `muon_on`: every block matrix
# Per parameter and step. Muon: gradient, momentum and weight read, the last two written in fp32, X and the update once
# each in fp16. AdamW: gradient, weight and two moments read, all but the gradient written.
MUON_BYTES, ADAMW_BYTES = 24, 28


def lr_multiplier(step: int, steps: int, schedule: str, warmup: float, min_lr: float) -> float:
    """What the peak rate is multiplied by at step 0 .. steps-1; `warmup` is a share of the run, `min_lr` of the peak.

    Counts optimizer steps, never micro-batches, and is never zero at the first one.
    """
    warmup_steps = round(warmup * steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    x = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    if schedule == "cosine":
        return min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * x))
    if schedule == "linear":
        return 1 - (1 - min_lr) * x
    if schedule == "step":
        return 0.5 ** ((step >= 0.4 * steps) + (step >= 0.8 * steps))
    if schedule == "wsd":
        decay_steps = round(WSD_DECAY_SHARE * steps)
        into_decay = step - (steps - 1 - decay_steps)
        return 1 - (1 - min_lr) * max(0, into_decay) / decay_steps if decay_steps else 1.0
    if schedule == "constant":
        return 1.0
    raise ValueError(f"unknown schedule {schedule!r}; choose from {', '.join(SCHEDULES)}")


def ns_schedule(ns_steps: int | str) -> list[tuple[int, float]]:
    """Newton-Schulz iterations and the share of the run until which each number holds, the last one until 1.

    5 is five throughout; "3:0.5,5" is three in the first half and then five. ValueError for anything else.
    """
    found: list[tuple[int, float]] = []
    *early, last = str(ns_steps).split(",")
    for words in (*early, f"{last}:1"):
        count, _, until = words.partition(":")
        try:
            found.append((int(count), float(until)))
        except ValueError:
            raise ValueError("must be a number of iterations, or numbers with shares of the run, as 3:0.5,5") from None
    shares = [0.0, *(share for _, share in found)]
    if not all(a < b for a, b in itertools.pairwise(shares)) or shares[-1] != 1.0:
        raise ValueError("shares of the run must rise between 0 and 1")
    if min(count for count, _ in found) < 1:
        raise ValueError("must be at least 1")
    return found


def ns_steps_at(step: int, steps: int, ns_steps: int | str) -> int:
    """Newton-Schulz iterations of step 0 .. steps-1."""
    return next(count for count, until in ns_schedule(ns_steps) if step < until * steps)


def set_ns_steps(optimizers: Sequence[torch.optim.Optimizer], ns_steps: int) -> None:
    """Let Muon make `ns_steps` iterations from now on. It captures its step anew where the number changes."""
    for o in optimizers:
        for group in o.param_groups if isinstance(o, Muon) else ():
            group["ns_steps"] = ns_steps


def step_cost(optimizers: Sequence[torch.optim.Optimizer]) -> tuple[float, float]:
    """FLOPs of Newton-Schulz's half products and bytes of gradients, weights and moments in one step of all."""
    flops = moved = 0.0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                moved += (MUON_BYTES if isinstance(optimizer, Muon) else ADAMW_BYTES) * p.numel()
                if isinstance(optimizer, Muon):
                    shape, method = (p[..., 0, 0].numel(), *p.shape[-2:]), group["ns_method"]
                    method = method_of(shape) if method == "auto" else method
                    flops += half_product_cost(shape, method, group["ns_steps"])[0]
    return flops, moved


def muon_names(muon_on: str, config: ModelConfig) -> tuple[str, ...]:
    """The matrices that a comma-separated `muon_on` names, in the order of the model: projections ("blocks" is all of
    them), embedding and router. ValueError for names that a model of this shape lacks, and for none."""
    projections = [name for name in PROJECTIONS if name != "gate" or config.ffn == "swiglu"]
    known = [*projections, "embedding", *(["router"] if config.experts else [])]
    named = [word.strip() for word in muon_on.split(",") if word.strip()]
    for word in named:
        if word == "head":
            raise ValueError("head: the head is the embedding; name embedding")
        if word not in (BLOCKS, *known):
            raise ValueError(f"{word}: this model has no such matrices; choose from {BLOCKS}, {', '.join(known)}")
    if not named:
        raise ValueError("no matrices are named; --optimizer adamw trains without Muon")
    return tuple(name for name in known if name in named or (BLOCKS in named and name in projections))


def build_optimizers(
    model: Transformer,
    optimizer: str,
    *,
    lr: float,
    adamw_lr: float,
    weight_decay: float = 0.0,
    decay_on: str = "blocks",
    muon_on: str = BLOCKS,
    betas: Sequence[float] = (0.9, 0.95),
    adam_eps: float = 1e-8,
    sharding: Sharding | None = None,
    **muon_options: Any,
) -> list[torch.optim.Optimizer]:
    """Muon plus AdamW, or AdamW alone. `lr` is Muon's rate, or that of the block matrices under AdamW alone; `adamw_lr`
    is that of all else. `weight_decay` applies to the block matrices, under `decay_on` "matrices" to embedding and
    router too. `muon_on` names the matrices for Muon (`muon_names`), whose banks hold no others. Every group carries
    its `peak_lr`; every parameter is in exactly one group (asserted). With `sharding` they hold this rank's shares."""
    layout = parameter_layout(model, optimizer, decay_on, muon_on)
    grouped = [id(p) for groups in layout for group in groups for p in group]
    assert sorted(grouped) == sorted(map(id, model.parameters())), "every parameter belongs to exactly one group"
    sharding = sharding or Sharding(model)
    own = sharding.own
    adamw_groups = [
        {"params": [t for p in group for t in own(p)], "lr": adamw_lr, "weight_decay": weight_decay if i else 0.0}
        for i, group in enumerate(layout[-1])
    ]
    if optimizer == "adamw":
        adamw_groups[-1]["lr"] = lr  # the block matrices
    optimizers: list[torch.optim.Optimizer] = []
    if optimizer == "muon":
        entries = {id(bank.parameter): bank.transposed for bank in model.banks()}
        groups = []
        for (p,) in layout[0]:
            decays = id(p) in entries or decay_on == "matrices"
            stored = sharding.own_entries(p, entries[id(p)]) if id(p) in entries else None
            groups.append({"params": own(p), "transposed": stored, "weight_decay": weight_decay if decays else 0.0})
        optimizers.append(Muon(groups, lr=lr, **muon_options))
        if sharding.world_size > 1:
            sharding.send_first([p for (p,) in layout[0]])
            optimizers[0].updated = sharding.updated
    optimizers.append(torch.optim.AdamW(adamw_groups, betas=tuple(betas), eps=adam_eps, fused=True))
    for o in optimizers:
        for group in o.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def parameter_layout(
    model: Transformer, optimizer: str, decay_on: str = "blocks", muon_on: str = BLOCKS
) -> list[list[list[Tensor]]]:
    """Which parameters are in which group of which optimizer that `build_optimizers` makes; a group of Muon has one."""
    banks, names = model.banks(), muon_names(muon_on, model.config) if optimizer == "muon" else ()
    muons = [bank.parameter for bank in banks if set(bank.members) <= set(names)]
    if stray := [bank.members for bank in banks if 0 < len(set(bank.members) & set(names)) < len(bank.members)]:
        raise ValueError(f"Muon gets part of the bank {stray[0]}: build the model with those `apart`")
    muons += [getattr(model, name) for name in ("embedding", "router") if name in names]
    taken, in_banks = {id(p) for p in muons}, {id(bank.parameter) for bank in banks}
    blocks = [bank.parameter for bank in banks if id(bank.parameter) not in taken]
    others = {name: p for name, p in model.named_parameters() if id(p) not in taken | in_banks}
    decayed = [p for name, p in others.items() if decay_on == "matrices" and not name.endswith("gain")]
    kept = [p for p in others.values() if not any(p is d for d in decayed)]
    if optimizer == "adamw":
        return [[kept, decayed, blocks] if decayed else [kept, blocks]]
    return [[[p] for p in muons], [kept, decayed + blocks] if decayed + blocks else [kept]]


def set_lr(optimizers: Sequence[torch.optim.Optimizer], multiplier: float) -> None:
    """Set every group's rate to `multiplier` times its peak."""
    for o in optimizers:
        for group in o.param_groups:
            group["lr"] = group["peak_lr"] * multiplier
