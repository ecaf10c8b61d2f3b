"""Muon, AdamW or a user's optimizer, which parameter goes to which, and the learning-rate schedules.

    optimizers = build_optimizers(model, "muon", lr=0.02, adamw_lr=0.005)

Matrices in the blocks go to Muon, embedding, gains and router to AdamW, at a rate of its own; `muon_on` moves them.
Muon costs one batched Newton-Schulz per bank and step: about 2 % of the model's FLOPs at 65k tokens per step.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.own_optimizer import OwnClass, OwnOptimizer
from engine.ranks import Sharding
from kernels import Muon
from kernels.newton_schulz import METHODS, half_product_cost, method_of
from model import PROJECTIONS, Bank, ModelConfig, Transformer

SCHEDULES = ("constant", "cosine", "linear", "step", "wsd")
WSD_DECAY_SHARE = 0.2
BLOCKS = "blocks"  # in `muon_on`: every block matrix
# Per parameter and step. Muon: gradient, momentum and weight read, the last two written in fp32, X and the update once
# each in fp16. AdamW: gradient, weight and two moments read, all but the gradient written. A user's: gradient and
# weight read, the weight written, and what it keeps besides is not known.
MUON_BYTES, ADAMW_BYTES, OWN_BYTES = 24, 28, 12


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
    """FLOPs of Newton-Schulz's half products and bytes of gradients, weights and moments in one step of all. An SVD and
    the work of a user's optimizer count as none."""
    flops = moved = 0.0
    for optimizer in optimizers:
        kind = MUON_BYTES if isinstance(optimizer, Muon) else OWN_BYTES
        kind = ADAMW_BYTES if isinstance(optimizer, torch.optim.AdamW) else kind
        for group in optimizer.param_groups:
            for p in group["params"]:
                moved += kind * p.numel()
                if isinstance(optimizer, Muon) and group["ns_method"] in METHODS:
                    flops += _newton_schulz_flops(p, group)
    return flops, moved


def _newton_schulz_flops(p: Tensor, group: dict[str, Any]) -> float:
    """Of one parameter, a matrix or a bank, some of whose entries are cut into blocks of rows."""
    entries, flops = group["row_blocks"] or (1,), 0.0
    for count, same in Counter(entries).items():
        shape = (p[..., 0, 0].numel() * same // len(entries) * count, p.shape[-2] // count, p.shape[-1])
        method = method_of(shape) if group["ns_method"] == "auto" else group["ns_method"]
        flops += half_product_cost(shape, method, group["ns_steps"])[0]
    return flops


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


def apart_from_muon(muon_on: str, config: ModelConfig) -> frozenset[str]:
    """The projections that get banks of their own, since Muon does not train them."""
    return frozenset(PROJECTIONS).difference(muon_names(muon_on, config))


def build_optimizers(
    model: Transformer,
    optimizer: str,
    *,
    lr: float,
    adamw_lr: float,
    left_lr: float | None = None,
    weight_decay: float = 0.0,
    decay_on: str = "blocks",
    muon_on: str = BLOCKS,
    betas: Sequence[float] = (0.9, 0.95),
    adam_eps: float = 1e-8,
    heads_per_matrix: int = 0,
    own: OwnClass | None = None,
    sharding: Sharding | None = None,
    **muon_options: Any,
) -> list[torch.optim.Optimizer]:
    """Muon plus AdamW, AdamW alone, or a user's `own` class plus AdamW. `lr` is the rate of Muon or `own`, or of the
    block matrices under AdamW alone; `adamw_lr` is that of all else, but for block matrices that Muon leaves to AdamW,
    if `left_lr` gives them one of their own. `heads_per_matrix` heads of q, k and v form one
    matrix for Muon; 0 is all of them, and o stays whole. `weight_decay` applies to the block matrices, under `decay_on`
    "matrices" to embedding and router too. `muon_on` names the matrices for Muon (`muon_names`), whose banks hold no
    others. Every group carries its `peak_lr`; every parameter is in exactly one group (asserted). With `sharding` they
    hold this rank's shares."""
    layout = parameter_layout(model, optimizer, decay_on, muon_on)
    banks = {id(bank.parameter): bank for bank in model.banks()}
    grouped = [id(p) for groups in layout for group in groups for p in group]
    assert sorted(grouped) == sorted(map(id, model.parameters())), "every parameter belongs to exactly one group"
    sharding = sharding or Sharding(model)
    blocks_lr = lr if optimizer == "adamw" else left_lr or adamw_lr
    adamw_groups = [
        {
            "params": [t for p in group for t in sharding.own(p)],
            "lr": blocks_lr if id(group[0]) in banks else adamw_lr,
            "weight_decay": weight_decay if i else 0.0,
        }
        for i, group in enumerate(layout[-1])
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if optimizer == "muon":
        groups = []
        for (p,) in layout[0]:
            group: dict[str, Any] = {"params": sharding.own(p)}
            if bank := banks.get(id(p)):
                group["transposed"] = sharding.own_entries(p, bank.transposed)
            if bank and heads_per_matrix:
                group["row_blocks"] = tuple(sharding.own_entries(p, _head_blocks(bank, model.config, heads_per_matrix)))
            group["weight_decay"] = weight_decay if bank or decay_on == "matrices" else 0.0
            groups.append(group)
        optimizers.append(Muon(groups, lr=lr, **muon_options))
        if sharding.world_size > 1:
            sharding.send_first([p for (p,) in layout[0]])
            optimizers[0].updated = sharding.updated
    if own is not None:
        optimizers.append(OwnOptimizer(own, lr=lr, sharding=sharding, banks=list(banks.values())))
    optimizers.append(torch.optim.AdamW(adamw_groups, betas=tuple(betas), eps=adam_eps, fused=True))
    for o in optimizers:
        for group in o.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def _head_blocks(bank: Bank, config: ModelConfig, heads_per_matrix: int) -> list[int]:
    """Into how many blocks of rows the heads cut each entry of a bank."""
    heads = {"q": config.heads, "k": config.kv_heads, "v": config.kv_heads}
    return [heads.get(name, heads_per_matrix) // heads_per_matrix for name in bank.members for _ in range(bank.layers)]


def parameter_layout(
    model: Transformer, optimizer: str, decay_on: str = "blocks", muon_on: str = BLOCKS
) -> list[list[list[Tensor]]]:
    """Which parameters are in which group of which optimizer that `build_optimizers` makes: a group of Muon has one,
    and the block matrices under AdamW are their own. A user's optimizer gets the matrices of its parameters one
    by one."""
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
    first = {"adamw": [], "muon": [[[p] for p in muons]]}.get(optimizer, [[blocks]])
    by_adamw = (kept, decayed, blocks if optimizer in ("adamw", "muon") else [])
    return [*first, [group for group in by_adamw if group]]


def set_lr(optimizers: Sequence[torch.optim.Optimizer], multiplier: float) -> None:
    """Set every group's rate to `multiplier` times its peak."""
    for o in optimizers:
        for group in o.param_groups:
            group["lr"] = group["peak_lr"] * multiplier
