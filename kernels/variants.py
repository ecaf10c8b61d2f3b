"""Variants of Muon's step: an exact polar factor, NorMuon's rows, hyperball's norm; a few PyTorch operations each.

    update = normalize_rows(exact_polar(u), flipped, rows, columns, found_inf)
    norms = norms_of(W); ...; restore_norms(W, norms, found_inf)

They run between the kernels of muon.py, in fp32. Only the SVD makes the host wait, so a CUDA graph cannot hold it.
"""

import torch
from torch import Tensor

ROWS_BETA2 = 0.95  # of NorMuon's running mean


def exact_polar(u: Tensor) -> Tensor:
    """U Vᵀ of each matrix u = U diag(s) Vᵀ of (..., m, n), in at least fp32, by an SVD.

    Directions whose singular value is rounding (max(m, n) eps of the largest) stay zero, as under Newton-Schulz; a
    matrix that is not finite becomes NaN.
    """
    X = u.to(torch.promote_types(u.dtype, torch.float32))
    finite = X.isfinite().all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    U, s, Vh = torch.linalg.svd(torch.where(finite, X, 0.0), full_matrices=False)
    rounding = max(X.shape[-2:]) * torch.finfo(X.dtype).eps * s[..., :1]
    return torch.where(finite, (U * (s > rounding)[..., None, :]) @ Vh, torch.nan)


def normalize_rows(
    update: Tensor, flipped: Tensor | None, rows: Tensor, columns: Tensor | None, found_inf: Tensor
) -> Tensor:
    """The row of each output neuron over the root of the running mean of its mean square, each matrix then scaled back
    to the Frobenius norm that it had (NorMuon, arXiv 2510.05491, which sets a norm of 0.2 sqrt(m n) there).

    `rows` (batch, m, 1) is that mean, from zero, moved in place unless found_inf is not zero. No bias is corrected:
    1 - beta2^t is the same for every row, and drops out when the norm is restored. Where `flipped` (batch, 1, 1) is
    true a matrix is stored transposed: its neurons are its columns, with means in `columns` (batch, 1, n).
    """
    update = update.to(torch.promote_types(update.dtype, torch.float32))
    square, kept = update.square(), found_inf == 0
    if flipped is None:
        mean = _moved(rows, square.mean(dim=2, keepdim=True), kept)
    else:
        by_row = _moved(rows, square.mean(dim=2, keepdim=True), kept & ~flipped)
        mean = torch.where(flipped, _moved(columns, square.mean(dim=1, keepdim=True), kept & flipped), by_row)
    out = update / torch.where(mean == 0, 1.0, mean.sqrt())  # a row that was always zero stays zero
    norms = norms_of(out)
    return out * (norms_of(update) / torch.where(norms == 0, 1.0, norms))


def _moved(mean: Tensor, square: Tensor, kept: Tensor) -> Tensor:
    moved = mean.lerp(square.to(mean.dtype), 1 - ROWS_BETA2)
    mean.copy_(torch.where(kept, moved, mean))
    return moved.to(square.dtype)


def norms_of(matrices: Tensor) -> Tensor:
    """The Frobenius norm of each matrix of (batch, m, n), in at least fp32, as (batch, 1, 1)."""
    at_least_fp32 = torch.promote_types(matrices.dtype, torch.float32)
    return torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=at_least_fp32)


def restore_norms(W: Tensor, norms: Tensor, found_inf: Tensor) -> None:
    """After a step: scale each matrix back to the norm that it had before, in place, unless found_inf is not zero. That
    is its initial norm, to rounding, since no step changes it.

    A matrix of zeros has no norm to keep, and is left to the step. Hyperball (Wen et al. 2025, "From Weight Decay to
    Hyperball Optimization") also gives the update the weight's norm. Muon's update has a norm of its own: with lr_scale
    "rms" the two are in one ratio for every matrix of one initial deviation, else in one for each shape.
    """
    factors = norms / norms_of(W)
    W.mul_(torch.where((found_inf == 0) & (norms > 0) & factors.isfinite(), factors, 1.0).to(W.dtype))
