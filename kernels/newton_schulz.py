"""Newton-Schulz: the nearest (semi-)orthogonal matrix by matrix products alone, for a whole batch at once.

`orthogonalize(G)` maps G = U diag(s) Vᵀ to U diag(p(s)) Vᵀ with p(s) close to 1, without an SVD.

With X = G / |G|_F (m <= n, else transposed), each of `steps` iterations computes

    A = X Xᵀ        B = b A + c A²        X <- a X + B X

FLOPs per matrix and step 4 m² n + 2 m³; bytes 6 m n + 8 m² times the item size if nothing stays in cache. At
m = 512, n = 2048 that is 200 FLOP per byte in fp16: compute-bound on a 4090 (164) only if caches are used well.
"""

import torch
from torch import Tensor

# Odd quintic polynomials a x + b x³ + c x⁵, one row per iteration; the last row repeats when more steps are asked for.
# quintic: Jordan et al. 2024, slope at zero maximised, singular values end in [0.68, 1.14].
# polar_express: Amsel et al. 2025, Algorithm 1 for singular values in [1e-3, 1], cushion 0.02, safety 1.02; stored
#   before the safety factor is applied, because the last iteration goes without it. A test recomputes the rows by
#   Remez exchange.
COEFFICIENTS: dict[str, tuple[tuple[float, float, float], ...]] = {
    "quintic": ((3.4445, -4.7750, 2.0315),),
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
SAFETY = {"quintic": 1.0, "polar_express": 1.02}

# X is divided by this times |G|_F. Polar Express overflows its interval quickly: p(1.02) = 1.137, p(1.05) diverges, so
# it gets room for the rounding of low-precision iterates (costs 6 % of the slope at zero).
NORM_MARGIN = {"quintic": 1.0, "polar_express": 1.01 * 1.05}

METHODS = ("auto", "standard")


def coefficient_schedule(name: str, steps: int) -> list[tuple[float, float, float]]:
    """The (a, b, c) of each of `steps` iterations, safety factor applied to all but the last."""
    if name not in COEFFICIENTS:
        raise ValueError(f"unknown Newton-Schulz coefficients {name!r}; choose from {', '.join(COEFFICIENTS)}")
    if steps < 1:
        raise ValueError(f"Newton-Schulz needs at least 1 step, got {steps}")
    rows, safety = COEFFICIENTS[name], SAFETY[name]
    schedule = [rows[min(i, len(rows) - 1)] for i in range(steps)]
    return [(a / safety, b / safety**3, c / safety**5) for a, b, c in schedule[:-1]] + schedule[-1:]


def iteration_dtype(G: Tensor) -> torch.dtype:
    """fp16 on CUDA (4 to 8 times more exact than bf16 at the same rate), fp32 on the CPU, fp64 for fp64 input."""
    if G.dtype == torch.float64:
        return torch.float64
    return torch.float16 if G.is_cuda else torch.float32


def _normalize(G: Tensor, margin: float) -> Tensor:
    """G / (margin |G|_F) per matrix in at least fp32. Divides by max|G| first: the squares of 1e-30 and 1e30 do not fit
    fp32. Zero stays zero; a NaN or infinity makes its whole matrix NaN."""
    X = G.to(torch.promote_types(G.dtype, torch.float32))
    largest = X.abs().amax(dim=(-2, -1), keepdim=True)
    X = X / torch.where(largest == 0, 1.0, largest)
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    return X / torch.where(norm == 0, 1.0, norm * margin)


def orthogonalize(G: Tensor, *, steps: int = 5, coefficients: str = "polar_express", method: str = "auto") -> Tensor:
    """Orthogonalise each matrix of G (..., m, n) to rounding of the polynomial; any m, n, strides and float dtype.

    Returns a tensor of G's shape and dtype with G's singular vectors and singular values near 1 (Polar Express, 5
    steps: within [0.84, 1.15] wherever s / |G|_F >= 1.25e-3). Zero matrices stay zero; NaN stays NaN.
    `method`: "standard" iterates on X itself; "auto" chooses, today always "standard".
    Raises ValueError for unknown names, fewer than 1 step, or a tensor that is not a float matrix.
    Source: Jordan et al., "Muon", 2024 (quintic); Amsel et al., "The Polar Express", 2025 (polar_express).
    """
    if G.ndim < 2 or not G.is_floating_point():
        raise ValueError(f"orthogonalize needs a float tensor (..., m, n), got {G.dtype} of shape {tuple(G.shape)}")
    if method not in METHODS:
        raise ValueError(f"unknown Newton-Schulz method {method!r}; choose from {', '.join(METHODS)}")
    schedule = coefficient_schedule(coefficients, steps)
    if G.numel() == 0:
        return G.clone()
    tall = G.shape[-2] > G.shape[-1]
    X = _normalize(G.mT if tall else G, NORM_MARGIN[coefficients])
    X = X.to(iteration_dtype(G)).reshape(-1, *X.shape[-2:])
    for a, b, c in schedule:
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    X = X.to(G.dtype).reshape((*G.shape[:-2], *X.shape[-2:]))
    return X.mT if tall else X
