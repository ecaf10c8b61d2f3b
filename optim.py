"""Muon, AdamW, which parameter goes to which, and the learning-rate schedules.

    optimizers = build_optimizers(model, "muon", lr=0.02, adamw_lr=0.005)

Matrices in the blocks go to Muon (or AdamW), embedding and gains always to AdamW with a learning rate of their own.
Muon costs one batched Newton-Schulz per bank and step: about 2 % of the model's FLOPs at 65k tokens per update.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.newton_schulz import COEFFICIENTS, METHODS, orthogonalize
from model import Transformer

SCHEDULES = ("constant", "cosine", "linear", "step", "wsd")
LR_SCALES = ("spectral", "rms", "none")
WSD_DECAY_SHARE = 0.2


def lr_factor(update: int, updates: int, schedule: str, warmup: float, min_lr: float) -> float:
    """Share of the peak rate for update 0 .. updates-1; `warmup` is a share of the run, `min_lr` a share of the peak.

    Counts updates, never micro-steps, and is never zero at the first one.
    """
    warmup_updates = round(warmup * updates)
    if update < warmup_updates:
        return (update + 1) / warmup_updates
    x = (update - warmup_updates) / max(1, updates - 1 - warmup_updates)
    if schedule == "cosine":
        return min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * x))
    if schedule == "linear":
        return 1 - (1 - min_lr) * x
    if schedule == "step":
        return 0.5 ** ((update >= 0.4 * updates) + (update >= 0.8 * updates))
    if schedule == "wsd":
        decay_updates = round(WSD_DECAY_SHARE * updates)
        into_decay = update - (updates - 1 - decay_updates)
        return 1 - (1 - min_lr) * max(0, into_decay) / decay_updates if decay_updates else 1.0
    if schedule == "constant":
        return 1.0
    raise ValueError(f"unknown schedule {schedule!r}; choose from {', '.join(SCHEDULES)}")


def update_scale(rows: int, cols: int, rule: str) -> float:
    """What an orthogonalised (rows, cols) = (out, in) update is multiplied by, besides the learning rate.

    spectral: sqrt(max(1, rows/cols)) (Jordan et al. 2024); rms: 0.2 sqrt(max(rows, cols)), which gives the update the
    root mean square of AdamW's (Liu et al. 2025); none: 1.
    """
    if rule == "spectral":
        return max(1.0, rows / cols) ** 0.5
    return 0.2 * max(rows, cols) ** 0.5 if rule == "rms" else 1.0


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: W <- (1 - lr wd) W - lr scale orthogonalize(u)  (Jordan et al. 2024).

    m <- lerp(m, g, 1 - momentum), u = lerp(g, m, momentum) with Nesterov, else m. Parameters are 2-D, 3-D or 4-D; the
    last two dimensions are the matrix. Two options belong to a parameter group:
    `transposed`: for each matrix of a bank, True where the map is the transpose of what is stored (for `lr_scale`);
    `row_splits`: row counts of the projections fused into one matrix, each orthogonalised by itself. Without it a
    fused matrix is orthogonalised as one.
    With torch.distributed initialised each rank orthogonalises its share of every bank and gathers the rest; gradients
    must already be equal on all ranks.
    Raises ValueError for settings out of range and for parameters that are no matrices.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
        ns_coefficients: str = "polar_express",
        ns_method: str = "auto",
        lr_scale: str = "spectral",
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"Muon's momentum must lie in [0, 1), got {momentum}")
        if not (lr >= 0 and weight_decay >= 0):
            raise ValueError(f"Muon's lr and weight_decay must not be negative, got {lr} and {weight_decay}")
        if ns_coefficients not in COEFFICIENTS or ns_method not in METHODS or ns_steps < 1 or lr_scale not in LR_SCALES:
            raise ValueError(f"Muon does not know {ns_coefficients=}, {ns_method=}, {ns_steps=} or {lr_scale=}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "ns_method": ns_method,
            "lr_scale": lr_scale,
            "transposed": None,
            "row_splits": None,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            if p.ndim not in (2, 3, 4):
                raise ValueError(f"Muon takes matrices and banks of them, got a parameter of shape {tuple(p.shape)}")
            if group["row_splits"] and sum(group["row_splits"]) != p.shape[-2]:
                raise ValueError(f"row_splits {group['row_splits']} do not add up to {p.shape[-2]} rows")
            if group["transposed"] and (p.ndim < 3 or len(group["transposed"]) != len(p)):
                raise ValueError(f"transposed needs one entry for each matrix of a bank of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(_scaled_orthogonal(update, group), alpha=-group["lr"])
        return loss


def _scaled_orthogonal(update: Tensor, group: dict[str, Any]) -> Tensor:
    """`scale * orthogonalize(update)`, projection by projection."""
    if group["row_splits"]:
        return torch.cat([_scaled_part(part, group) for part in update.split(group["row_splits"], dim=-2)], dim=-2)
    return _scaled_part(update, group)


def _scaled_part(update: Tensor, group: dict[str, Any]) -> Tensor:
    out = _orthogonalize_shared(
        update, steps=group["ns_steps"], coefficients=group["ns_coefficients"], method=group["ns_method"]
    )
    rows, cols = update.shape[-2:]
    scale, scale_transposed = (update_scale(m, n, group["lr_scale"]) for m, n in ((rows, cols), (cols, rows)))
    if not group["transposed"]:
        return out * scale
    scales = [scale_transposed if t else scale for t in group["transposed"]]
    return out * out.new_tensor(scales).view(-1, *[1] * (out.ndim - 1))


def _orthogonalize_shared(update: Tensor, **options: Any) -> Tensor:
    """Orthogonalise a bank, its matrices shared out over the ranks."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size == 1 or update.ndim == 2:
        return orthogonalize(update, **options)
    bank = update.reshape(-1, *update.shape[-2:])
    share = -(-len(bank) // world_size)  # the last ranks may get fewer, or none: padded with zeros
    mine = bank[dist.get_rank() * share :][:share]
    padded = bank.new_zeros(share, *bank.shape[1:])
    padded[: len(mine)] = orthogonalize(mine, **options)
    gathered = bank.new_empty(share * world_size, *bank.shape[1:])
    dist.all_gather_into_tensor(gathered, padded)
    return gathered[: len(bank)].view(update.shape)


def build_optimizers(
    model: Transformer,
    optimizer: str,
    *,
    lr: float,
    adamw_lr: float,
    weight_decay: float = 0.0,
    betas: Sequence[float] = (0.9, 0.95),
    adam_eps: float = 1e-8,
    **muon_options: Any,
) -> list[torch.optim.Optimizer]:
    """Muon plus AdamW, or AdamW alone: `lr` and `weight_decay` drive the block matrices under either, `adamw_lr` the
    embedding and the gains. Every group carries its `peak_lr`; every parameter is in exactly one group (asserted)."""
    banks = model.banks()
    in_banks = {id(bank.parameter) for bank in banks}
    others = {"params": [p for p in model.parameters() if id(p) not in in_banks], "lr": adamw_lr, "weight_decay": 0.0}
    adamw_groups, optimizers = [others], []
    if optimizer == "muon":
        groups = [{"params": [bank.parameter], "transposed": bank.transposed} for bank in banks]
        optimizers.append(Muon(groups, lr=lr, weight_decay=weight_decay, **muon_options))
    else:
        matrices = {"params": [bank.parameter for bank in banks], "lr": lr, "weight_decay": weight_decay}
        adamw_groups.append(matrices)
    optimizers.append(torch.optim.AdamW(adamw_groups, betas=tuple(betas), eps=adam_eps, fused=True))
    grouped = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters())), "every parameter belongs to exactly one group"
    for o in optimizers:
        for group in o.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_lr(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Every group's rate becomes `factor` times its peak."""
    for o in optimizers:
        for group in o.param_groups:
            group["lr"] = group["peak_lr"] * factor
