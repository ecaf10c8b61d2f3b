"""Muon: momentum, orthogonalised, as a torch.optim.Optimizer that needs nothing but this folder.

    optimizer = Muon(matrices, lr=0.02); loss.backward(); optimizer.step()

Costs one batched Newton-Schulz per parameter and step. On CUDA sm_80 or newer the step runs in Triton kernels.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import configs
from .muon import Momentum, launch_normalize, launch_update
from .newton_schulz import (
    COEFFICIENTS,
    METHODS,
    NORM_MARGIN,
    coefficient_schedule,
    iterate,
    orthogonalize,
)

LR_SCALES = ("spectral", "rms", "none")
GRAPHS_KEPT = 4  # of Muon's step; gradients usually return to the same addresses every step
KEYS_SEEN = 64


def update_scale(rows: int, cols: int, rule: str) -> float:
    """The factor of an orthogonalised (rows, cols) = (out, in) update, in addition to the learning rate.

    spectral: sqrt(max(1, rows/cols)) (Jordan et al. 2024); rms: 0.2 sqrt(max(rows, cols)), which gives the update the
    root mean square of AdamW's (Liu et al. 2025); none: 1.
    """
    if rule == "spectral":
        return max(1.0, rows / cols) ** 0.5
    return 0.2 * max(rows, cols) ** 0.5 if rule == "rms" else 1.0


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: W <- (1 - lr wd) W - lr scale orthogonalize(u)  (Jordan et al. 2024).

    m <- lerp(m, g, 1 - momentum), u = lerp(g, m, momentum) with Nesterov, else m. With `ns_before_momentum` g is
    orthogonalised instead of u; a momentum that sums, m <- momentum m + g, is then this one at lr / (1 - momentum).
    Parameters are 2-D, 3-D or 4-D; the
    last two dimensions are the matrix. Three options belong to a parameter group:
    `flatten`: True for convolutions: a parameter (out, in, ...) is one matrix (out, everything else);
    `row_splits`: row counts of the projections fused into one matrix, each orthogonalised by itself. Without it a
    fused matrix is orthogonalised as one;
    `transposed`: for each entry of a bank's first dimension (one entry for a single matrix), True where the map is the
    transpose of what is stored (for `lr_scale`).
    Speaks GradScaler's protocol for fused optimizers: with attributes `grad_scale` and `found_inf` (0-D tensors)
    gradients are divided by the first, and the step is skipped if the second is not zero; on CUDA the host never waits.
    On CUDA sm_80 or newer the step runs in Triton kernels with fp16 iterates and, with `capture`, as one CUDA graph
    launch once the addresses of the gradients repeat.
    Where several ranks share the work, the parameters are this rank's share; `updated` is called with each parameter
    once it has its new values, so that sending them overlaps with the orthogonalisation of the next.
    Raises ValueError for settings out of range and for parameters that are not matrices.
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
        ns_before_momentum: bool = False,
        capture: bool = True,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"Muon's momentum must be in [0, 1), got {momentum}")
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
            "ns_before_momentum": ns_before_momentum,
            "flatten": False,
            "row_splits": None,
            "transposed": None,
        }
        super().__init__(params, defaults)
        self.capture = capture
        self.updated: Callable[[Tensor], None] | None = None
        self._step_supports_amp_scaling = True
        self._forget_graphs()

    def _forget_graphs(self) -> None:
        """Drop captured steps, whose tensors may have been replaced, as by load_state_dict."""
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
        for group in self.param_groups:  # saved before there was this option
            group.setdefault("ns_before_momentum", False)
        self._forget_graphs()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        fault = self._fault_of(self.param_groups[-1])
        if fault:
            self.param_groups.pop()
            raise ValueError(fault)

    @staticmethod
    def _fault_of(group: dict[str, Any]) -> str | None:
        flatten, splits, transposed = group["flatten"], group["row_splits"], group["transposed"]
        for p in group["params"]:
            if not p.numel() or p.ndim < 2 or not (flatten or p.ndim <= 4):
                return f"Muon takes matrices and banks of them, got a parameter of shape {tuple(p.shape)}"
            if not (p.is_contiguous() or (flatten and p.movedim(1, -1).is_contiguous())):
                return f"Muon takes contiguous matrices, got shape {tuple(p.shape)} with strides {p.stride()}"
            rows = len(p) if flatten else p.shape[-2]
            if splits and (sum(splits) != rows or min(splits) < 1):
                return f"row_splits {splits} do not add up to {rows} rows"
            if transposed and len(transposed) != (1 if flatten or p.ndim == 2 else len(p)):
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
                if p.grad is not None:
                    buffer = self.state[p].get("momentum_buffer")
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p) if buffer is None else _strided_as(p, buffer)
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
            tensors = (p, _strided_as(p, gradient), self.state[p]["momentum_buffer"])
            W, G, M = (as_bank(t, group) for t in tensors)
            if group["ns_before_momentum"]:
                G = _orthogonal(G, group)
            M.lerp_(G, 1 - group["momentum"])
            update = _mixed(G, M, group)
            if not group["ns_before_momentum"]:
                update = _orthogonal(update, group)
            W.mul_(1 - group["lr"] * group["weight_decay"])
            W.add_(_scaled(update, group), alpha=-group["lr"])
            if self.updated is not None:
                self.updated(p)

    @torch.no_grad()
    def next_input(self, p: Tensor) -> Tensor:
        """A new tensor like parameter `p`: what the next step will orthogonalise of its gradient and momentum."""
        group = next(group for group in self.param_groups if any(p is one for one in group["params"]))
        G = p.grad / self._scaling()[0]
        if group["ns_before_momentum"]:
            return G
        buffer = self.state[p].get("momentum_buffer", torch.zeros_like(p))
        return _mixed(G, buffer.lerp(G, 1 - group["momentum"]), group)

    def _step_fused(self) -> None:
        """The step in Triton kernels: three passes over each bank, and Newton-Schulz."""
        grad_scale, found_inf, *rates = self.scalars
        rate_of = {id(group): rate for group, rate in zip(self.param_groups, rates, strict=True)}
        for group, p in self._with_gradient():
            schedule = coefficient_schedule(group["ns_coefficients"], group["ns_steps"])
            margin = NORM_MARGIN[group["ns_coefficients"]]
            tensors = (p, _strided_as(p, p.grad), self.state[p]["momentum_buffer"])
            banks = [as_bank(t, group) for t in tensors]
            rows = group["row_splits"] or (banks[0].shape[1],)
            parts = zip(*(bank.split(rows, dim=1) for bank in banks), strict=True)
            for W, gradient, buffer in parts:
                state = Momentum(buffer, group["momentum"], group["nesterov"], grad_scale, found_inf)
                early = group["ns_before_momentum"]
                X = launch_normalize(gradient, margin, torch.float16, None if early else state)
                out = iterate(X, schedule=schedule, method=group["ns_method"])
                if early:
                    out = _averaged(out[:, : W.shape[1], : W.shape[2]].float(), state)
                scale = self._constant(tuple(scales_of(W.shape, group)), p.device)
                launch_update(W, out, rate_of[id(group)], scale, found_inf, group["weight_decay"])
            if self.updated is not None:
                self.updated(p)

    def _step_captured(self) -> None:
        """`_step_fused` as a CUDA graph, one for each set of addresses and settings that repeats.

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
        """Not by torch.cuda.graph: it empties the allocator's cache, after which gradients have other addresses."""
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
        """GradScaler's two tensors, or neutral numbers."""
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


def as_bank(t: Tensor, group: dict[str, Any]) -> Tensor:
    """A parameter, or what has its shape and strides, viewed as (batch, rows, cols)."""
    if not group["flatten"]:
        return t.view(-1, *t.shape[-2:])
    # (out, in, h, w) in channels_last is (out, h, w, in) in memory. The columns may come in any order, since
    # orthogonalize(G P) = orthogonalize(G) P for a permutation P.
    return (t if t.is_contiguous() else t.movedim(1, -1)).view(1, len(t), -1)


def _mixed(gradient: Tensor, moved: Tensor, group: dict[str, Any]) -> Tensor:
    """u of a gradient and of the momentum that it has moved."""
    return gradient.lerp(moved, group["momentum"]) if group["nesterov"] else moved


def _strided_as(p: Tensor, t: Tensor) -> Tensor:
    """`t` itself if it is laid out like p, as it usually is, else a copy that is."""
    alike = all(a == b for a, b, size in zip(t.stride(), p.stride(), p.shape, strict=True) if size > 1)
    return t if alike else torch.empty_like(p).copy_(t)


def scales_of(shape: torch.Size, group: dict[str, Any]) -> list[float]:
    """`update_scale` of each matrix of a (batch, rows, cols) bank."""
    rows, cols = shape[-2:]
    scale, transposed_scale = (update_scale(m, n, group["lr_scale"]) for m, n in ((rows, cols), (cols, rows)))
    transposed = group["transposed"] or (False,)
    return [transposed_scale if t else scale for t in transposed for _ in range(shape[0] // len(transposed))]


def _orthogonal(bank: Tensor, group: dict[str, Any]) -> Tensor:
    """`orthogonalize` of a (batch, rows, cols) bank, projection by projection."""
    options = {"steps": group["ns_steps"], "coefficients": group["ns_coefficients"], "method": group["ns_method"]}
    return _by_projection(bank, group, lambda part: orthogonalize(part, **options))


def _scaled(bank: Tensor, group: dict[str, Any]) -> Tensor:
    """Each projection of a (batch, rows, cols) bank times its `update_scale`."""
    return _by_projection(bank, group, lambda part: part * part.new_tensor(scales_of(part.shape, group)).view(-1, 1, 1))


def _by_projection(bank: Tensor, group: dict[str, Any], change: Callable[[Tensor], Tensor]) -> Tensor:
    changed = [change(part) for part in bank.split(group["row_splits"] or (bank.shape[1],), dim=1)]
    return torch.cat(changed, dim=1) if len(changed) > 1 else changed[0]


def _averaged(update: Tensor, state: Momentum) -> Tensor:
    """Momentum of updates that are orthogonal already; the buffer stays if found_inf is not zero."""
    moved = state.buffer.lerp(update, 1 - state.momentum)
    state.buffer.copy_(torch.where(state.found_inf == 0, moved, state.buffer))
    return update.lerp(moved, state.momentum) if state.nesterov else moved
