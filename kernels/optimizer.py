"""Muon: momentum, orthogonalised, as a torch.optim.Optimizer that needs nothing but this folder.

    optimizer = Muon(matrices, lr=0.02); loss.backward(); optimizer.step()

Costs one batched Newton-Schulz per parameter and step. On CUDA sm_80 or newer the step runs in Triton kernels.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import configs
from .muon import Momentum, launch_normalize, launch_update, normalize_reference
from .newton_schulz import (
    COEFFICIENTS,
    METHODS,
    NORM_MARGIN,
    coefficient_schedule,
    iterate,
    orthogonalize,
)
from .variants import exact_polar, normalize_rows, norms_of, restore_norms

LR_SCALES = ("spectral", "rms", "none")
NOT_ITERATED = ("svd", "none")  # in the place of Newton-Schulz
NS_METHODS = (*METHODS, *NOT_ITERATED)
DECAY_RULES = ("plain", "cautious", "hyperball")
# Options that states saved by earlier versions lack, at the value that means the same.
ADDED_LATER = {"ns_before_momentum": False, "normalize_rows": False, "decay_rule": "plain", "row_blocks": None}
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
    `ns_method` "svd" orthogonalises exactly, by an SVD in fp32; "none" does not: it scales u so that its Frobenius norm
    is sqrt(min(rows, cols)), as that of an orthogonal matrix. `normalize_rows` is NorMuon's (kernels/variants.py).
    `decay_rule` "cautious" decays only the entries of W that the update shrinks or leaves alone, W o update >= 0 (Chen
    et al. 2025, arXiv 2510.12402); "hyperball" scales each matrix back to its initial Frobenius norm after each step,
    and takes no weight decay.
    Parameters are 2-D, 3-D or 4-D; the last two dimensions are the matrix. Four options belong to a parameter group:
    `flatten`: True for convolutions: a parameter (out, in, ...) is one matrix (out, everything else);
    `row_splits`: row counts of the projections fused into one matrix, each orthogonalised by itself. Without it a
    fused matrix is orthogonalised as one;
    `row_blocks`: for each entry of a bank's first dimension, into how many blocks of equal height its rows are cut,
    each orthogonalised by itself (heads of attention);
    `transposed`: for each entry of a bank's first dimension (one entry for a single matrix), True where the map is the
    transpose of what is stored (for `lr_scale`).
    Speaks GradScaler's protocol for fused optimizers: with attributes `grad_scale` and `found_inf` (0-D tensors)
    gradients are divided by the first, and the step is skipped if the second is not zero; on CUDA the host never waits,
    except for an SVD, which no CUDA graph can hold.
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
        normalize_rows: bool = False,
        decay_rule: str = "plain",
        capture: bool = True,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"Muon's momentum must be in [0, 1), got {momentum}")
        if not (lr >= 0 and weight_decay >= 0):
            raise ValueError(f"Muon's lr and weight_decay must not be negative, got {lr} and {weight_decay}")
        if ns_coefficients not in COEFFICIENTS or ns_steps < 1 or ns_method not in NS_METHODS:
            raise ValueError(f"Muon does not know {ns_coefficients=}, {ns_steps=} or {ns_method=}")
        if lr_scale not in LR_SCALES or decay_rule not in DECAY_RULES:
            raise ValueError(f"Muon does not know {lr_scale=} or {decay_rule=}")
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
            "normalize_rows": normalize_rows,
            "decay_rule": decay_rule,
            "flatten": False,
            "row_splits": None,
            "row_blocks": None,
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
        for group, (option, value) in itertools.product(self.param_groups, ADDED_LATER.items()):
            group.setdefault(option, value)
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
        blocks, decay = group["row_blocks"], group["weight_decay"]
        if group["decay_rule"] == "hyperball" and decay:
            return f"Muon's hyperball keeps the norm of each matrix, so weight_decay must be 0, got {decay}"
        if any(transposed or ()) and group["normalize_rows"] and (flatten or splits):
            return "normalize_rows takes no matrices that are transposed and flattened or split"
        for p in group["params"]:
            if not p.numel() or p.ndim < 2 or not (flatten or p.ndim <= 4):
                return f"Muon takes matrices and banks of them, got a parameter of shape {tuple(p.shape)}"
            if not (p.is_contiguous() or (flatten and p.movedim(1, -1).is_contiguous())):
                return f"Muon takes contiguous matrices, got shape {tuple(p.shape)} with strides {p.stride()}"
            rows = len(p) if flatten else p.shape[-2]
            if splits and (sum(splits) != rows or min(splits) < 1):
                return f"row_splits {splits} do not add up to {rows} rows"
            for name, entries in (("transposed", transposed), ("row_blocks", blocks)):
                if entries and len(entries) != (1 if flatten or p.ndim == 2 else len(p)):
                    return f"{name} needs one entry for each layer of matrices of a bank of shape {tuple(p.shape)}"
            for i, cut in enumerate(blocks or ()):
                if cut < 1 or rows % cut:
                    return f"row_blocks {blocks} cannot cut matrices of {rows} rows evenly"
                if cut > 1 and (splits or (transposed and transposed[i])):
                    return f"row_blocks {blocks} cannot cut matrices that are split or stored transposed"
        return None

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, p in self._with_gradient():
            state = self.state[p]
            for key, shape in state_shapes(p.shape, group).items():
                if key not in state:
                    state[key] = torch.zeros_like(p) if shape == p.shape else p.new_zeros(shape)
            state["momentum_buffer"] = _strided_as(p, state["momentum_buffer"])
        if not all(configs.runs_triton(p) for group in self.param_groups for p in group["params"]):
            self._step_reference()
        elif any(True for _ in self._with_gradient()):
            self._set_scalars()
            waits = any(group["ns_method"] == "svd" for group in self.param_groups)  # for the host: no graph holds it
            if self.capture and self.updated is None and not waits and not torch.cuda.is_current_stream_capturing():
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
            for part in parts_of(p, gradient, self.state[p], group):
                W, G, M = part.weight, part.gradient, part.momentum
                if group["ns_before_momentum"]:
                    G = _direction(G, group)
                M.lerp_(G, 1 - group["momentum"])
                update = _mixed(G, M, group)
                if not group["ns_before_momentum"]:
                    update = _direction(update, group)
                no_inf = torch.zeros((), device=p.device)
                update = self._rows_normalized(update, part, group, no_inf)
                norms = norms_of(W) if group["decay_rule"] == "hyperball" else None
                decay = group["lr"] * group["weight_decay"]
                W.mul_(1 - (decay * (W * update >= 0) if group["decay_rule"] == "cautious" else decay))
                W.add_(update * update.new_tensor(part.scales).view(-1, 1, 1), alpha=-group["lr"])
                if norms is not None:
                    restore_norms(W, norms, no_inf)
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
            for part in parts_of(p, p.grad, self.state[p], group):
                state = Momentum(part.momentum, group["momentum"], group["nesterov"], grad_scale, found_inf)
                early = group["ns_before_momentum"]
                update = _launch_direction(part.gradient, group, None if early else state)
                if early:
                    update = _averaged(update.float(), state)
                update = self._rows_normalized(update, part, group, found_inf)
                norms = norms_of(part.weight) if group["decay_rule"] == "hyperball" else None
                scale, cautious = self._constant(part.scales, p.device), group["decay_rule"] == "cautious"
                rate, decay = rate_of[id(group)], group["weight_decay"]
                launch_update(part.weight, update, rate, scale, found_inf, decay, cautious)
                if norms is not None:
                    restore_norms(part.weight, norms, found_inf)
            if self.updated is not None:
                self.updated(p)

    def _rows_normalized(self, update: Tensor, part: "Part", group: dict[str, Any], found_inf: Tensor) -> Tensor:
        if not group["normalize_rows"]:
            return update
        flipped = self._constant(part.transposed, update.device).view(-1, 1, 1) if any(part.transposed) else None
        return normalize_rows(update, flipped, part.row_moment, part.column_moment, found_inf)

    def _step_captured(self) -> None:
        """`_step_fused` as a CUDA graph, one for each set of addresses and settings that repeats.

        The first step with new addresses runs eagerly (and compiles), the second is captured, later ones replay. Other
        threads may allocate meanwhile (the loader pins memory), hence the thread-local capture mode.
        """
        tensors = [t for _, p in self._with_gradient() for t in (p, p.grad, *self.state[p].values())]
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

    def _constant(self, values: tuple[float, ...] | tuple[bool, ...], device: torch.device) -> Tensor:
        key = (values, type(values[0]), device)  # (True,) == (1.0,)
        if key not in self.constants:
            self.constants[key] = torch.tensor(values, device=device)
        return self.constants[key]


def state_shapes(shape: torch.Size, group: dict[str, Any]) -> dict[str, torch.Size]:
    """The tensors that Muon keeps for a parameter of this shape, by name; each has as many dimensions as it, so that
    ranks share them out alike."""
    found = {"momentum_buffer": shape}
    if group["normalize_rows"]:
        per_row = shape[:1] + (1,) * (len(shape) - 1) if group["flatten"] else (*shape[:-1], 1)
        found["row_moment"] = torch.Size(per_row)
        if not group["flatten"]:  # for matrices that are stored transposed
            found["column_moment"] = torch.Size((*shape[:-2], 1, shape[-1]))
    return found


class Part(NamedTuple):
    """Matrices of one shape that a step takes as one batch: views (batch, rows, cols) of a parameter, its gradient and
    its momentum, what `normalize_rows` keeps, (batch, rows, 1) and (batch, 1, cols), and for each matrix its
    `update_scale` and whether its map is the transpose."""

    weight: Tensor
    gradient: Tensor
    momentum: Tensor
    row_moment: Tensor | None
    column_moment: Tensor | None
    scales: tuple[float, ...]
    transposed: tuple[bool, ...]


def parts_of(p: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Iterator[Part]:
    """The matrices of a parameter, as `row_blocks` and `row_splits` cut them."""
    named = (p, _strided_as(p, gradient), *map(state.get, ("momentum_buffer", "row_moment")))
    tall = [None if t is None else as_bank(t, group) for t in named]
    (batch, rows, _), columns = tall[0].shape, state.get("column_moment")
    flags, blocks, start = group["transposed"] or (False,), group["row_blocks"] or (1,), 0
    for count, entries in itertools.groupby(blocks):
        stop = start + batch // len(blocks) * len(list(entries))
        transposed = tuple(flags[i * len(flags) // batch] for i in range(start, stop) for _ in range(count))
        column_moment = as_bank(columns, group)[start:stop] if any(transposed) and columns is not None else None
        # A block of the rows of a contiguous matrix is a contiguous matrix, so all of these are views.
        run = [None if t is None else t[start:stop].view(-1, rows // count, t.shape[2]) for t in tall]
        heights = group["row_splits"] or (rows // count,)
        pieces = [[None] * len(heights) if t is None else t.split(heights, dim=1) for t in run]
        for cut in zip(*pieces, strict=True):
            scales = scales_of(cut[0].shape, {**group, "transposed": transposed})
            yield Part(*cut, column_moment, tuple(scales), transposed)
        start = stop


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


def _direction(u: Tensor, group: dict[str, Any]) -> Tensor:
    """Each matrix of (batch, rows, cols) orthogonalised by the group's method."""
    method = group["ns_method"]
    if method == "none":
        return normalize_reference(u, min(u.shape[1:]) ** -0.5)
    if method == "svd":
        return exact_polar(u)
    return orthogonalize(u, steps=group["ns_steps"], coefficients=group["ns_coefficients"], method=method)


def _launch_direction(gradient: Tensor, group: dict[str, Any], state: Momentum | None) -> Tensor:
    """The same of what momentum makes of the gradient, in Triton kernels."""
    (_, rows, cols), method, coefficients = gradient.shape, group["ns_method"], group["ns_coefficients"]
    if method == "none":
        out = launch_normalize(gradient, min(rows, cols) ** -0.5, torch.float32, state)
    elif method == "svd":
        out = exact_polar(launch_normalize(gradient, 1.0, torch.float32, state))
    else:
        X = launch_normalize(gradient, NORM_MARGIN[coefficients], torch.float16, state)
        out = iterate(X, coefficient_schedule(coefficients, group["ns_steps"]), method)
    return out[:, :rows, :cols]


def _averaged(update: Tensor, state: Momentum) -> Tensor:
    """Momentum of updates that are orthogonal already; the buffer stays if found_inf is not zero."""
    moved = state.buffer.lerp(update, 1 - state.momentum)
    state.buffer.copy_(torch.where(state.found_inf == 0, moved, state.buffer))
    return update.lerp(moved, state.momentum) if state.nesterov else moved
