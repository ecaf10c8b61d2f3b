"""Newton-Schulz: the nearest (semi-)orthogonal matrix by matrix products alone, for a whole batch at once.

`orthogonalize(G)` maps G = U diag(s) Vᵀ to U diag(p(s)) Vᵀ with p(s) close to 1, without an SVD. With X = G / |G|_F and
m x n its smaller and larger side, a = n / m, each of T iterations computes

    standard    A = X Xᵀ, B = b A + c A², X <- a X + B X                           half products: T (3 m² n + m³) FLOPs
    gram        R = X Xᵀ once, then on m x m matrices alone: Z = b R + c R², Q <- Q (aI + Z), R <- (aI + Z) R (aI + Z),
                and X <- Q X at the end; X and R are computed afresh (a restart) before iterations 3, 5, 7, ...
                (1, 3, 5, ... up to 32 wide)

All products but the last of each form are symmetric (kernels/symmetric.py). 5 steps at a = 4: 65 m³ against 38 m³ FLOPs
(dense: 90). Tall G needs no transposed copy. Compute-bound only while R, Z, Q stay in L2: where it pays, a batch is cut
into chunks that fit.
"""

import functools
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from . import configs, small
from .configs import OPS
from .matmul_add import matmul_add
from .muon import launch_normalize, normalize_reference
from .symmetric import product

# Odd quintic polynomials a x + b x³ + c x⁵, one row per iteration; the last row repeats for more steps.
# cubic: the classical iteration, quadratic convergence to 1 from every s in (0, sqrt 3), slope 1.5 at zero.
# quintic: Jordan et al. 2024, slope at zero maximised, singular values end in [0.68, 1.14].
# polar_express: Amsel et al. 2025, Algorithm 1 for singular values in [1e-3, 1], cushion 0.02, safety 1.02; stored
#   before the safety factor is applied, because the last iteration goes without it. A test recomputes the rows by
#   Remez exchange.
COEFFICIENTS: dict[str, tuple[tuple[float, float, float], ...]] = {
    "quintic": ((3.4445, -4.7750, 2.0315),),
    "cubic": ((1.5, -0.5, 0.0),),
    "polar_express": (
        (8.31968561540051, -23.859450318966715, 17.531445041810237),
        (4.1237885338700675, -2.9808456861620494, 0.5520601040380058),
        (3.9695011583385176, -2.942182363267835, 0.5587364505634645),
        (3.351468730910769, -2.513077963371051, 0.5128347598303039),
        (2.3465413258596373, -1.7097828382687053, 0.4232355116930521),
        (1.9003834757310267, -1.2779237188293104, 0.3778031533636336),
        (1.87502235952849, -1.2500248436948633, 0.3750024843770449),
        (1.875, -1.25, 0.375),
    ),
}
SAFETY = {"quintic": 1.0, "cubic": 1.0, "polar_express": 1.02}

# X is divided by this times |G|_F. Polar Express overflows its interval quickly: p(1.02) = 1.137, p(1.05) diverges, so
# it gets room for the rounding of low-precision iterates (costs 6 % of the slope at zero).
NORM_MARGIN = {"quintic": 1.0, "cubic": 1.0, "polar_express": 1.01 * 1.05}

METHODS = ("auto", "standard", "gram")
GRAM_ASPECT = 2  # auto uses gram from this n / m on: at 2 it needs 26 m³ FLOPs against 35, at 1 both need 20
# The entries of Q grow with the product of the a's since the last restart, and their rounding with them: 30 times over
# iterations 2 to 4, 7.7 times over 3 and 4, so the published restart before iteration 2 is worse at the same cost.
RESTARTS = range(3, 1000, 2)
# Up to 32 wide a rounded R has eigenvalues far enough below zero that three iterations can make them large: 16x64 of a
# log-uniform spectrum ends at 43, with these at 1.14 (fp16, 33 kinds of input).
NARROW, NARROW_RESTARTS = 32, range(1, 1000, 2)
L2_SHARE = 0.75  # of the L2 cache that a chunk's matrices may fill


def coefficient_schedule(name: str, steps: int) -> list[tuple[float, float, float]]:
    """The (a, b, c) of each of `steps` iterations, safety factor applied to all but the last."""
    if name not in COEFFICIENTS:
        raise ValueError(f"unknown Newton-Schulz coefficients {name!r}; choose from {', '.join(COEFFICIENTS)}")
    if steps < 1:
        raise ValueError(f"Newton-Schulz needs at least 1 step, got {steps}")
    rows, safety = COEFFICIENTS[name], SAFETY[name]
    schedule = [rows[min(i, len(rows) - 1)] for i in range(steps)]
    return [(a / safety, b / safety**3, c / safety**5) for a, b, c in schedule[:-1]] + schedule[-1:]


@functools.cache
def reach(coefficients: str, steps: int) -> float:
    """The least s / |G|_F that `steps` iterations bring to half or more, where 1 is the aim: the direction of a smaller
    singular value s is still small in the update. To 0.1 %, from the composed polynomial, by a scan from zero: five
    steps of Polar Express reach down to 5.6e-4, of Jordan's quintic to 1.1e-3, of the cubic to 7.1e-2."""
    start = torch.logspace(-9, 0, 20_001, dtype=torch.float64)
    s = start / NORM_MARGIN[coefficients]
    for a, b, c in coefficient_schedule(coefficients, steps):
        s = a * s + b * s**3 + c * s**5
    return start[s >= 0.5][0].item()


def restarts_of(m: int) -> range:
    """The iterations before which the Gram form starts afresh, for m = the smaller side."""
    return NARROW_RESTARTS if m <= NARROW else RESTARTS


def iterate_standard(X: Tensor, schedule: list[tuple[float, float, float]]) -> Tensor:
    """The polynomials applied to the singular values of a normalised (batch, rows, cols), 3 launches each."""
    tall = X.shape[1] > X.shape[2]
    for a, b, c in schedule:
        A = product(X.mT, X) if tall else product(X, X.mT)
        B = product(A, A, A, alpha=c, beta=b)
        X = matmul_add(X, B, X, beta=a) if tall else matmul_add(B, X, X, beta=a)
    return X


def iterate_gram(X: Tensor, schedule: list[tuple[float, float, float]]) -> Tensor:
    """The same through the small Gram matrix; 18 launches for 5 steps (Gram Newton-Schulz, Dao AI Lab 2026).

    The accumulated polynomial is q I + Q with the number q kept apart: where its eigenvalue is near 1, q is 8 to 120,
    and fp16 would round the sum on the diagonal by up to 0.4 %, which later iterations amplify 25 times.
    """
    tall = X.shape[1] > X.shape[2]
    starts = [0, *(i for i in restarts_of(min(X.shape[1:])) if i < len(schedule)), len(schedule)]
    for start, stop in pairwise(starts):
        R = product(X.mT, X) if tall else product(X, X.mT)
        Q, q = None, 1.0
        for i in range(start, stop):
            a, b, c = schedule[i]
            Z = product(R, R, R, alpha=c, beta=b)
            Q = Z if Q is None else product(Q, Z, Q, beta=a, D=Z, gamma=q)  # (q I + Q) (a I + Z) - q a I
            q *= a
            if i + 1 < stop:
                RZ = product(R, Z, R, beta=a)
                R = product(Z, RZ, RZ, beta=a)
        X = matmul_add(X, Q, X, beta=q) if tall else matmul_add(Q, X, X, beta=q)
    return X


def chunk_count(shape: torch.Size, method: str, item_bytes: int, l2_bytes: int) -> int:
    """Into how many pieces to cut a (batch, rows, cols) so that what an iteration touches again stays in L2."""
    batch, m, n = shape[0], min(shape[1:]), max(shape[1:])
    items = 4 * m * m if method == "gram" else 2 * m * n + 2 * m * m
    return min(batch, -(-batch * items * item_bytes // int(L2_SHARE * l2_bytes)))


def method_of(shape: Sequence[int]) -> str:
    """What `auto` means for a (batch, rows, cols)."""
    return "gram" if max(shape[1:]) >= GRAM_ASPECT * min(shape[1:]) else "standard"


def half_product_cost(shape: Sequence[int], method: str, steps: int) -> tuple[float, float, int]:
    """FLOPs (symmetric products count half), bytes if every operand came from memory once, and launches."""
    batch, m, n = shape[0], min(shape[1:]), max(shape[1:])
    if method == "standard":
        return batch * steps * (3.0 * m * m * n + m**3), batch * steps * 2.0 * (4 * m * n + 5 * m * m), 3 * steps
    segments = 1 + sum(i < steps for i in restarts_of(m))
    squares = 4 * steps - 3 * segments
    flops = batch * (segments * 3.0 * m * m * n + squares * m**3)
    if small.fits(shape):
        return flops, batch * 2.0 * 2 * m * n, 1
    moved = segments * (3 * m * n + 2 * m * m) + 3.5 * squares * m * m
    return flops, batch * 2.0 * moved, 2 * segments + squares


def iterate(X: Tensor, schedule: list[tuple[float, float, float]], method: str) -> Tensor:
    """Newton-Schulz on a normalised (batch, rows, cols): small matrices in one launch, others in chunks that pay."""
    if method == "auto":
        method = method_of(X.shape)
    if method == "gram" and X.dtype == torch.float16 and configs.runs_triton(X) and small.fits(X.shape):
        return small.launch_small(X, schedule, restarts_of(min(X.shape[1:])))
    run = iterate_gram if method == "gram" else iterate_standard
    if not (configs.runs_triton(X) and configs.row(configs.capability(X.device)).chunked):
        return run(X, schedule)
    chunks = chunk_count(X.shape, method, X.element_size(), configs.l2_bytes(X.device))
    return torch.cat([run(part, schedule) for part in X.tensor_split(chunks)]) if chunks > 1 else run(X, schedule)


@torch.library.custom_op(f"{OPS}::orthogonalize", mutates_args=())
def _orthogonalize_op(G: Tensor, steps: int, coefficients: str, method: str) -> Tensor:
    schedule, margin = coefficient_schedule(coefficients, steps), NORM_MARGIN[coefficients]
    with torch.autocast(G.device.type, enabled=False):
        if configs.runs_triton(G):
            X = launch_normalize(G, margin, torch.float16)
        else:
            X = normalize_reference(G, margin)
        return iterate(X, schedule, method)[:, : G.shape[1], : G.shape[2]].to(G.dtype).contiguous()


@_orthogonalize_op.register_fake
def _(G: Tensor, steps: int, coefficients: str, method: str) -> Tensor:
    return G.new_empty(G.shape)


def orthogonalize(G: Tensor, *, steps: int = 5, coefficients: str = "polar_express", method: str = "auto") -> Tensor:
    """Orthogonalise each matrix of G (..., m, n), to the precision of the polynomial; any m, n, strides, float dtype.

    Returns a contiguous tensor of G's shape and dtype with G's singular vectors and singular values near 1 (Polar
    Express, 5 steps: within [0.84, 1.15] wherever s / |G|_F >= 1.25e-3). Iterates in fp16 on CUDA (4 to 8 times more
    exact than bf16 at the same rate), in fp32 on the CPU, in fp64 for fp64. Zero matrices stay zero; NaN stays NaN.
    `method`: "standard", "gram" or "auto", gram where one side is at least twice the other.
    Has no gradient. Raises ValueError for unknown names, fewer than 1 step, or a tensor that is not a float matrix.
    Source: Jordan et al., "Muon", 2024 (quintic); Amsel et al., "The Polar Express", 2025 (polar_express).
    """
    if G.ndim < 2 or not G.is_floating_point():
        raise ValueError(f"orthogonalize needs a float tensor (..., m, n), got {G.dtype} of shape {tuple(G.shape)}")
    if method not in METHODS:
        raise ValueError(f"unknown Newton-Schulz method {method!r}; choose from {', '.join(METHODS)}")
    coefficient_schedule(coefficients, steps)
    if G.numel() == 0:
        return G.clone()
    return _orthogonalize_op(G.reshape(-1, *G.shape[-2:]), steps, coefficients, method).reshape(G.shape)
