"""Muon, AdamW, which parameter goes to which, and the learning-rate schedules.

    optimizers = build_optimizers(model, "muon", lr=0.02, adamw_lr=0.005)

Matrices in the blocks go to Muon (or AdamW); embedding, gains and router always to AdamW, at a rate of their own.
Muon costs one batched Newton-Schulz per bank and step: about 2 % of the model's FLOPs at 65k tokens per update.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import configs
from kernels.muon import Momentum, launch_normalize, launch_update
from kernels.newton_schulz import (
    COEFFICIENTS,
    METHODS,
    NORM_MARGIN,
    coefficient_schedule,
    half_product_cost,
    iterate,
    method_of,
    orthogonalize,
)
from model import Transformer
from sharding import Sharding

SCHEDULES = ("constant", "cosine", "linear", "step", "wsd")
LR_SCALES = ("spectral", "rms", "none")
WSD_DECAY_SHARE = 0.2
# Per parameter and step. Muon: gradient, momentum and weight read, the last two written in fp32, X and the update once
# each in fp16. AdamW: gradient, weight and two moments read, all but the gradient written.
MUON_BYTES, ADAMW_BYTES = 24, 28
GRAPHS_KEPT = 4  # of Muon's step; gradients usually return to the same addresses every step
KEYS_SEEN = 64


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
    `transposed`: for each entry of a bank's first dimension, True where the map is the transpose of what is stored
    (for `lr_scale`);
    `row_splits`: row counts of the projections fused into one matrix, each orthogonalised by itself. Without it a
    fused matrix is orthogonalised as one.
    Speaks GradScaler's protocol for fused optimizers: with attributes `grad_scale` and `found_inf` (0-D tensors)
    gradients are divided by the one, and nothing happens where the other is not zero; on CUDA the host never waits.
    On CUDA sm_80 or newer the step runs in Triton kernels with fp16 iterates and, with `capture`, as one CUDA graph
    launch once the addresses of the gradients repeat.
    Over several ranks its parameters are this rank's shares (sharding.py); `updated` is called with each when it has
    its new values, so that sending them overlaps with the next one's orthogonalisation.
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
        capture: bool = True,
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
        self.capture = capture
        self.updated: Callable[[Tensor], None] | None = None
        self._step_supports_amp_scaling = True
        self._forget_graphs()

    def _forget_graphs(self) -> None:
        """What was captured read tensors that no longer count, as after load_state_dict."""
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self.seen_keys: set[tuple] = set()
        self.scalars: list[Tensor] = []
        self.constants: dict[tuple, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"capture": self.capture}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("capture", True)
        self.__dict__.setdefault("updated", None)
        self.__dict__.setdefault("_step_supports_amp_scaling", True)
        self._forget_graphs()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        fault = self._fault_of(self.param_groups[-1])
        if fault:
            self.param_groups.pop()
            raise ValueError(fault)

    @staticmethod
    def _fault_of(group: dict[str, Any]) -> str | None:
        splits, transposed = group["row_splits"], group["transposed"]
        for p in group["params"]:
            if p.ndim not in (2, 3, 4) or not p.numel() or not p.is_contiguous():
                return f"Muon takes contiguous matrices and banks of them, got a parameter of shape {tuple(p.shape)}"
            if splits and (sum(splits) != p.shape[-2] or min(splits) < 1):
                return f"row_splits {splits} do not add up to {p.shape[-2]} rows"
            if transposed and (p.ndim < 3 or len(transposed) != len(p)):
                return f"transposed needs one entry for each layer of matrices of a bank of shape {tuple(p.shape)}"
        return None

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        if not all(configs.runs_triton(p) for group in self.param_groups for p in group["params"]):
            self._step_reference()
        elif any(True for _ in self._with_gradient()):
            self._set_scalars()
            if self.capture and self.updated is None and not torch.cuda.is_current_stream_capturing():
                self._step_captured()
            else:
                self._step_fused()
        return loss

    def _step_reference(self) -> None:
        """The step in PyTorch operations; the host reads `found_inf`."""
        grad_scale, found_inf = self._scaling()
        if found_inf:
            return
        for group, p in self._with_gradient():
            gradient = p.grad / grad_scale if grad_scale != 1.0 else p.grad
            momentum = self.state[p]["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(_scaled_orthogonal(update, group), alpha=-group["lr"])
            if self.updated is not None:
                self.updated(p)

    def _step_fused(self) -> None:
        """The step in Triton kernels: three passes over each bank besides Newton-Schulz."""
        grad_scale, found_inf, *rates = self.scalars
        rate_of = {id(group): rate for group, rate in zip(self.param_groups, rates, strict=True)}
        for group, p in self._with_gradient():
            schedule = coefficient_schedule(group["ns_coefficients"], group["ns_steps"])
            margin = NORM_MARGIN[group["ns_coefficients"]]
            rows = group["row_splits"] or (p.shape[-2],)
            flat = (-1, *p.shape[-2:])
            bank = (p.view(flat), p.grad.reshape(flat), self.state[p]["momentum_buffer"].view(flat))
            parts = zip(*(t.split(rows, dim=1) for t in bank), strict=True)
            for W, gradient, buffer in parts:
                state = Momentum(buffer, group["momentum"], group["nesterov"], grad_scale, found_inf)
                X = launch_normalize(gradient, margin, torch.float16, state)
                out = iterate(X, schedule=schedule, method=group["ns_method"])
                scale = self._constant(tuple(scales_of(W.shape, group)), p.device)
                launch_update(W, out, rate_of[id(group)], scale, found_inf, group["weight_decay"])
            if self.updated is not None:
                self.updated(p)

    def _step_captured(self) -> None:
        """`_step_fused` as a CUDA graph, one for each set of addresses and settings that comes back.

        The first step with new addresses runs eagerly (and compiles), the second is captured, later ones replay. Other
        threads may allocate meanwhile (the loader pins memory), hence the thread-local capture mode.
        """
        tensors = [t for _, p in self._with_gradient() for t in (p, p.grad, self.state[p]["momentum_buffer"])]
        settings = [{k: v for k, v in g.items() if k not in ("params", "lr", "peak_lr")} for g in self.param_groups]
        key = (*((t.data_ptr(), t.stride()) for t in tensors), str(settings))
        if key in self.graphs:
            self.graphs[key].replay()
        elif key in self.seen_keys:
            if len(self.graphs) == GRAPHS_KEPT:
                del self.graphs[next(iter(self.graphs))]  # the oldest
            self.graphs[key] = self._capture()
            self.graphs[key].replay()
        else:
            self._step_fused()
            if len(self.seen_keys) == KEYS_SEEN:  # addresses that never return must not pile up
                self.seen_keys.clear()
            self.seen_keys.add(key)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Not by torch.cuda.graph: it empties the allocator's cache, after which gradients lie somewhere else."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None  # one pool for all
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph.capture_begin(*(() if pool is None else (pool,)), capture_error_mode="thread_local")
            try:
                self._step_fused()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph

    def _with_gradient(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    yield group, p

    def _scaling(self) -> tuple[Tensor | float, Tensor | float]:
        """GradScaler's two tensors, or what leaves a step as it is."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        return 1.0 if grad_scale is None else grad_scale, 0.0 if found_inf is None else found_inf

    def _set_scalars(self) -> None:
        """grad_scale, found_inf and each group's learning rate into tensors that a captured step reads."""
        values = [*self._scaling(), *(group["lr"] for group in self.param_groups)]
        for _ in values[len(self.scalars) :]:
            self.scalars.append(torch.zeros((), device=next(p for _, p in self._with_gradient()).device))
        for scalar, value in zip(self.scalars, values, strict=True):
            scalar.copy_(value) if isinstance(value, Tensor) else scalar.fill_(value)

    def _constant(self, values: tuple[float, ...], device: torch.device) -> Tensor:
        if (values, device) not in self.constants:
            self.constants[values, device] = torch.tensor(values, device=device)
        return self.constants[values, device]


def scales_of(shape: torch.Size, group: dict[str, Any]) -> list[float]:
    """`update_scale` of each matrix of a (batch, rows, cols) bank."""
    rows, cols = shape[-2:]
    scale, transposed_scale = (update_scale(m, n, group["lr_scale"]) for m, n in ((rows, cols), (cols, rows)))
    transposed = group["transposed"] or (False,)
    return [transposed_scale if t else scale for t in transposed for _ in range(shape[0] // len(transposed))]


def _scaled_orthogonal(update: Tensor, group: dict[str, Any]) -> Tensor:
    """`scale * orthogonalize(update)`, projection by projection."""
    options = {"steps": group["ns_steps"], "coefficients": group["ns_coefficients"], "method": group["ns_method"]}
    parts = update.reshape(-1, *update.shape[-2:]).split(group["row_splits"] or (update.shape[-2],), dim=1)
    scaled = [
        orthogonalize(part, **options) * part.new_tensor(scales_of(part.shape, group)).view(-1, 1, 1) for part in parts
    ]
    return torch.cat(scaled, dim=1).view(update.shape)


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


def build_optimizers(
    model: Transformer,
    optimizer: str,
    *,
    lr: float,
    adamw_lr: float,
    weight_decay: float = 0.0,
    betas: Sequence[float] = (0.9, 0.95),
    adam_eps: float = 1e-8,
    sharding: Sharding | None = None,
    **muon_options: Any,
) -> list[torch.optim.Optimizer]:
    """Muon plus AdamW, or AdamW alone: `lr` and `weight_decay` drive the block matrices under either, `adamw_lr` the
    embedding, the gains and the router. Every group carries its `peak_lr`; every parameter is in exactly one group
    (asserted). With `sharding` they hold this rank's shares."""
    layout = parameter_layout(model, optimizer)
    grouped = [id(p) for groups in layout for group in groups for p in group]
    assert sorted(grouped) == sorted(map(id, model.parameters())), "every parameter belongs to exactly one group"
    sharding = sharding or Sharding(model)
    own = sharding.own
    others, *matrices = ([t for p in group for t in own(p)] for group in layout[-1])  # AdamW's
    adamw_groups = [{"params": others, "lr": adamw_lr, "weight_decay": 0.0}]
    adamw_groups += [{"params": group, "lr": lr, "weight_decay": weight_decay} for group in matrices]
    optimizers: list[torch.optim.Optimizer] = []
    if optimizer == "muon":
        groups = [
            {"params": own(bank.parameter), "transposed": sharding.own_entries(bank.parameter, bank.transposed)}
            for bank in model.banks()
        ]
        optimizers.append(Muon(groups, lr=lr, weight_decay=weight_decay, **muon_options))
        if sharding.world_size > 1:
            optimizers[0].updated = sharding.updated
    optimizers.append(torch.optim.AdamW(adamw_groups, betas=tuple(betas), eps=adam_eps, fused=True))
    for o in optimizers:
        for group in o.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def parameter_layout(model: Transformer, optimizer: str) -> list[list[list[Tensor]]]:
    """Which parameters are in which group of which optimizer that `build_optimizers` makes."""
    banks = [bank.parameter for bank in model.banks()]
    in_banks = {id(p) for p in banks}
    others = [p for p in model.parameters() if id(p) not in in_banks]
    return [[[p] for p in banks], [others]] if optimizer == "muon" else [[others, banks]]


def _check_state(o: torch.optim.Optimizer, number: int, p: Tensor, state: dict[int, dict[str, Tensor]]) -> None:
    """ValueError unless a checkpoint has the state of a parameter, in its shape."""
    for key in STATE[type(o).__name__]:
        found = state.get(number, {}).get(key)
        if found is None or found.shape != p.shape:
            raise ValueError(f"{type(o).__name__} has no {key} of shape {tuple(p.shape)} for parameter {number}")


STATE = {"Muon": ("momentum_buffer",), "AdamW": ("exp_avg", "exp_avg_sq")}  # tensors shaped like their parameter


def whole_state(
    optimizers: Sequence[torch.optim.Optimizer], layout: list[list[list[Tensor]]], sharding: Sharding
) -> list[dict[str, Any]]:
    """The state of every optimizer as one rank alone would hold it: {"state": {number of parameter: tensors}}. All
    ranks must call it; empty before the first step."""
    states = []
    for o, groups in zip(optimizers, layout, strict=True):
        state: dict[int, dict[str, Tensor]] = {}
        for number, p in enumerate(p for group in groups for p in group):
            share = sharding.share_of[id(p)]
            mine = {} if share.own is None else o.state[share.own]
            steps = sharding.largest(float(mine.get("step", 0.0)) if mine else -1.0)
            if steps < 0:
                continue
            # On the other ranks each whole tensor goes as it came: only rank 0 writes.
            kept = {key: sharding.whole(share, mine.get(key)) for key in STATE[type(o).__name__]}
            kept = {key: tensor.cpu() for key, tensor in kept.items()} if sharding.rank == 0 else {}
            if isinstance(o, torch.optim.AdamW):
                kept["step"] = torch.tensor(steps)
            state[number] = kept
        states.append({"state": state})
    return states


def load_whole_state(
    optimizers: Sequence[torch.optim.Optimizer],
    layout: list[list[list[Tensor]]],
    sharding: Sharding,
    states: Sequence[dict[str, Any]],
) -> None:
    """Give every optimizer this rank's part of what `whole_state` returned, on any number of ranks."""
    for o, groups, state in zip(optimizers, layout, states, strict=True):
        mine, place = {}, 0
        for number, p in enumerate(p for group in groups for p in group):
            share = sharding.share_of[id(p)]
            if share.own is None:
                continue
            if state["state"]:  # of a run that has made no update there is none
                _check_state(o, number, p, state["state"])
                mine[place] = {key: sharding.part(share, t) for key, t in state["state"][number].items()}
            place += 1
        o.load_state_dict({"state": mine, "param_groups": o.state_dict()["param_groups"]})


def set_lr(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Every group's rate becomes `factor` times its peak."""
    for o in optimizers:
        for group in o.param_groups:
            group["lr"] = group["peak_lr"] * factor
