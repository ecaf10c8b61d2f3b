"""The yardstick for tokens/s: our model as a competent PyTorch user writes it in an afternoon, and trains it.

    model, optimizers = build(SIZES["88m"], 49152, "stacked", lr=0.024, adamw_lr=0.006, device="cuda", compile=True)
    loss = train_step(model, optimizers, rows_BT1, micro_batch=8)

One nn.Linear per matrix, autocast to bf16 on CUDA (the residual stream stays fp32), torch.compile, fused AdamW, and for
Muon torch's own loop or stacked matrices. tests/test_baseline.py holds it to our logits and to our loss curve.
Shape letters as in model.py.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.cli import BadInput
from kernels.newton_schulz import coefficient_schedule
from model import INIT_STD, ROPE_BASE, ModelConfig, Transformer

FFNS = {"relu2": lambda x: F.relu(x).square(), "silu": F.silu}
OPTIMIZERS = ("adamw", "loop", "stacked")  # of the block matrices; loop and stacked are Muon
MOMENTUM = 0.95


def rotary(x: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos_TE.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin_TE.to(x.dtype)


class Block(nn.Module):
    """Attention, then a feed-forward layer, each behind its norm; names of matrices as in `model.PROJECTIONS`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, width = config.d_model, config.head_width
        self.width, self.shares_heads = width, config.kv_heads < config.heads
        self.attention_norm = nn.RMSNorm(d)
        self.q = nn.Linear(d, d, bias=False)
        self.k = nn.Linear(d, config.kv_heads * width, bias=False)
        self.v = nn.Linear(d, config.kv_heads * width, bias=False)
        self.o = nn.Linear(d, d, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(width) if config.qk_norm else nn.Identity() for _ in range(2))
        self.ffn_norm = nn.RMSNorm(d)
        self.up = nn.Linear(d, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, d, bias=False)
        self.activation = FFNS[config.ffn]

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attend(self.attention_norm(x_BTD), cos_TE, sin_TE)
        return x_BTD + self.down(self.activation(self.up(self.ffn_norm(x_BTD))))

    def attend(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        q, k, v = (linear(x_BTD).view(B, T, -1, self.width).transpose(1, 2) for linear in (self.q, self.k, self.v))
        q, k = rotary(self.q_norm(q), cos_TE, sin_TE), rotary(self.k_norm(k), cos_TE, sin_TE)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.shares_heads)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


class Baseline(nn.Module):
    """The decoder of `model.Transformer` in ordinary modules; weights fp32, call it under autocast for bf16 compute.

    Raises BadInput for an activation other than relu2 and silu, and for dropout.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        if config.ffn not in FFNS:
            raise BadInput(f"the baseline has no ffn {config.ffn!r}; choose from {', '.join(FFNS)}")
        for name in ("dropout", "inner_dropout"):
            if probability := getattr(config, name):
                raise BadInput(f"the baseline has no dropout, got {name} {probability}")
        self.scale = config.d_model**0.5
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = nn.RMSNorm(config.d_model)
        self.head = nn.Linear(config.d_model, vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=INIT_STD)
        exponents = torch.arange(0, config.head_width, 2, dtype=torch.float64) / config.head_width
        angles = torch.arange(config.seq_len, dtype=torch.float64)[:, None] / ROPE_BASE**exponents
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos_TE", angles.cos().float(), persistent=False)
        self.register_buffer("sin_TE", angles.sin().float(), persistent=False)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits (B, T, V), or with targets the mean cross-entropy in nats, a 0-D fp32 tensor."""
        T = tokens_BT.shape[1]
        x_BTD = self.embedding(tokens_BT) * self.scale
        for block in self.blocks:
            x_BTD = block(x_BTD, self.cos_TE[:T], self.sin_TE[:T])
        logits = self.head(self.final_norm(x_BTD))
        if targets_BT is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets_BT.flatten())


@torch.no_grad()
def copy_weights(ours: Transformer, baseline: nn.Module) -> None:
    """Every weight of `ours` into `baseline`, compiled or not, of the same config and vocabulary."""
    for p in ours.projections():
        getattr(baseline.blocks[p.layer], p.name).weight.copy_(p.weight)
    for layer, block in enumerate(baseline.blocks):
        block.attention_norm.weight.copy_(ours.attention_gain[layer])
        block.ffn_norm.weight.copy_(ours.ffn_gain[layer])
        if ours.config.qk_norm:
            block.q_norm.weight.copy_(ours.q_gain[layer])
            block.k_norm.weight.copy_(ours.k_gain[layer])
    baseline.final_norm.weight.copy_(ours.final_gain)
    baseline.embedding.weight.copy_(ours.embedding)


class StackedMuon(torch.optim.Optimizer):
    """Muon with the matrices of one shape stacked, and one compiled function for each shape (one parameter group).

    Iterates in bf16 on CUDA, in fp32 elsewhere. `schedule`: the (a, b, c) of each Newton-Schulz iteration, by default
    five quintic ones as in torch.optim.Muon; the norm is divided out `norm_margin` times. Update scaled "spectral".
    Every parameter is a matrix (out, in) with a gradient.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.02,
        momentum: float = MOMENTUM,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        schedule: Sequence[tuple[float, float, float]] | None = None,
        norm_margin: float = 1.0,
        compile: bool = True,
    ) -> None:
        same_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for p in params:
            same_shape.setdefault(p.shape, []).append(p)
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__([{"params": same} for same in same_shape.values()], defaults)
        self.schedule, self.norm_margin = list(schedule or coefficient_schedule("quintic", 5)), norm_margin
        # fullgraph: past 8 shapes in a process an error, not quietly eager; torch._dynamo.reset() between models
        self.direction = torch.compile(_direction, dynamic=False, fullgraph=True) if compile else _direction

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = group["params"]
            gradient = torch.stack([p.grad for p in params])
            state = self.state[params[0]]  # of the whole stack
            if not state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            how = (group["momentum"], group["nesterov"], self.schedule, self.norm_margin)
            update = self.direction(gradient, state["momentum_buffer"], *how)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(update.unbind(0)), alpha=-group["lr"])


def reference(X: Tensor, schedule: Sequence[tuple[float, float, float]]) -> Tensor:
    """Newton-Schulz on a normalised, wide (batch, m, n) as a careful PyTorch user writes it."""
    for a, b, c in schedule:
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X


def _direction(g: Tensor, m: Tensor, momentum: float, nesterov: bool, schedule: list, norm_margin: float) -> Tensor:
    """Momentum in place, and the scaled orthogonal update of a stack (batch, rows, cols)."""
    m.lerp_(g, 1 - momentum)
    u = g.lerp(m, momentum) if nesterov else m
    tall = u.shape[1] > u.shape[2]
    X = u.mT if tall else u
    X = X / (norm_margin * torch.linalg.vector_norm(X, dim=(1, 2), keepdim=True)).clamp(min=1e-7)
    X = reference(X.bfloat16() if X.is_cuda else X, schedule).to(g.dtype)
    scale = max(1.0, u.shape[1] / u.shape[2]) ** 0.5
    return (scale * (X.mT if tall else X)).contiguous()


def build(
    config: ModelConfig,
    vocab_size: int,
    optimizer: str,
    *,
    lr: float,
    adamw_lr: float,
    weight_decay: float = 0.0,
    betas: Sequence[float] = (0.9, 0.95),
    adam_eps: float = 1e-8,
    device: torch.device | str = "cpu",
    compile: bool = False,
) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """The model, and its optimizers: `optimizer` for the block matrices, fused AdamW for embedding and gains.

    Split, rates and `peak_lr` are those of `optim.build_optimizers`, so `optim.set_lr` drives these too. `compile`
    holds for the model and for StackedMuon.
    """
    if optimizer not in OPTIMIZERS:
        raise BadInput(f"the baseline has no optimizer {optimizer!r}; choose from {', '.join(OPTIMIZERS)}")
    model = Baseline(config, vocab_size).to(device)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    in_blocks = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in in_blocks]
    adamw: list[dict[str, Any]] = [{"params": others, "lr": adamw_lr, "weight_decay": 0.0}]
    muon = {"lr": lr, "weight_decay": weight_decay, "momentum": MOMENTUM, "nesterov": True}
    optimizers: list[torch.optim.Optimizer] = []
    if optimizer == "loop":
        optimizers.append(torch.optim.Muon(matrices, adjust_lr_fn="original", **muon))
    elif optimizer == "stacked":
        optimizers.append(StackedMuon(matrices, compile=compile, **muon))
    else:
        adamw.append({"params": matrices, "lr": lr, "weight_decay": weight_decay})
    optimizers.append(torch.optim.AdamW(adamw, betas=tuple(betas), eps=adam_eps, fused=True))
    for group in (group for o in optimizers for group in o.param_groups):
        group["peak_lr"] = group["lr"]
    return torch.compile(model, dynamic=False) if compile else model, optimizers


def train_step(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    rows_BT1: Tensor,
    micro_batch: int,
    grad_clip: float = 1.0,
    mark: Callable[[str], None] | None = None,
) -> Tensor:
    """One step on the token rows (B, T + 1), on the model's device; returns the mean loss, without a host sync.

    `mark` is called at the end of each phase: "forward" and "backward" once per micro-batch, then "optimizer", which
    includes clipping. `micro_batch` rows go through at once; the gradient's norm is cut to `grad_clip` (0 = off).
    """
    mark = mark or (lambda phase: None)
    model.zero_grad(set_to_none=True)
    micro_batches = rows_BT1.long().split(micro_batch)
    total = torch.zeros((), device=rows_BT1.device)
    for rows in micro_batches:
        with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.is_cuda):
            loss = model(rows[:, :-1], rows[:, 1:]) * (len(rows) / len(rows_BT1))
        mark("forward")
        loss.backward()
        total += loss.detach()
        mark("backward")
    if grad_clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    for optimizer in optimizers:
        optimizer.step()
    mark("optimizer")
    return total
