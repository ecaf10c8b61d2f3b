"""Spectral metrics of every weight matrix, each defined once, and the JSONL files they are written to.

    spectrum = decompose(W_BMN); record = projection_record(spectrum[0], of_update[0], grad_norm)

Float64 throughout, by the symmetric eigenproblem of the smaller Gram matrix: `python -m bench.spectra` shows its error
and its time beside those of an SVD. A value that is undefined is None (JSON null), never 0.0 or NaN.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.eigh import eigh_leading
from engine.files import finite

SUBSPACE_RANK = 5  # of the singular subspaces whose alignment is measured
UPDATE_KEYS = (
    "left_alignment",
    "right_alignment",
    "grad_norm",
    "update_norm",
    "update_effective_rank",
    "update_gap",
)
# Eigenvalues of a Gram matrix below this times its larger side, as a share of the largest, are rounding: singular
# values below 7e-7 of the largest read as 0 at 2048 x 512. Weights in fp32 have no more digits.
ROUNDING = torch.finfo(torch.float64).eps


def entropy_nats(singular_values: Tensor) -> float:
    """-sum p ln p with p = s / sum s; NaN for a zero matrix."""
    p = singular_values / singular_values.sum()
    return -torch.xlogy(p, p).sum().item()


def spectral_metrics(singular_values: Tensor) -> dict[str, Any]:
    """The metrics that need only the singular values (descending, float64) of a matrix.

    spectral_norm s_1; entropy -sum p ln p in nats, p = s / sum s; effective_rank exp(entropy) (Roy & Vetterli 2007);
    spectral_entropy -sum q ln q / ln r, q = s² / sum s²; stable_rank sum s² / s_1²; orthogonality_error
    |(W/s_1)ᵀ(W/s_1) - I|_F / sqrt(r) on the small side; weight_norm |W|_F.
    """
    s, r = singular_values, len(singular_values)
    energy = s.square().sum()
    q = s.square() / energy
    relative = s / s[0]
    entropy = entropy_nats(s)
    values = {
        "spectral_norm": s[0].item(),
        "spectral_entropy": -torch.xlogy(q, q).sum().item() / math.log(r) if r > 1 else math.nan,
        "entropy": entropy,
        "effective_rank": math.exp(entropy),
        "stable_rank": (energy / s[0].square()).item(),
        "weight_norm": energy.sqrt().item(),
        "orthogonality_error": (relative.square() - 1).square().mean().sqrt().item(),
    }
    return {"singular_values": [finite(v) for v in s.tolist()]} | {k: finite(v) for k, v in values.items()}


class Spectrum(NamedTuple):
    """Singular values (r,), descending, and the leading left (m, k) and right (n, k) subspaces of one matrix, or of a
    batch of them with one more dimension in front; all NaN for a matrix that is not finite."""

    singular_values: Tensor
    left: Tensor
    right: Tensor

    @property
    def mT(self) -> "Spectrum":
        """The spectrum of the transpose."""
        return Spectrum(self.singular_values, self.right, self.left)

    def of(self, i: int) -> "Spectrum":
        """The spectrum of one matrix of a batch."""
        return Spectrum(*(tensor[i] for tensor in self))


def decompose(matrices: Tensor) -> Spectrum:
    """The spectra of a batch (B, m, n): singular values to 1e-5 of themselves wherever they exceed 1e-3 of the largest
    (in fact to about 1e-9), subspaces as an SVD gives them."""
    X = matrices.double()
    finite = matrices.isfinite().all(dim=-1).all(dim=-1)
    if not finite.all():
        X = torch.where(finite[:, None, None], X, 0.0)
    m, n = X.shape[1:]
    k = min(SUBSPACE_RANK, m, n)
    small = X.mT if m > n else X
    eigenvalues, near = eigh_leading(small @ small.mT, k)
    largest = eigenvalues[:, :1].clamp(min=0.0)
    eigenvalues = torch.where(eigenvalues <= max(m, n) * ROUNDING * largest, 0.0, eigenvalues)  # NaN stays
    s = torch.where(finite[:, None], eigenvalues.sqrt(), math.nan)
    far = small.mT @ near
    far = far / torch.linalg.vector_norm(far, dim=1, keepdim=True)  # NaN where s_k is 0: there is no such direction
    return Spectrum(s, far, near) if m > n else Spectrum(s, near, far)


def alignment(subspace_a: Tensor, subspace_b: Tensor) -> float:
    """Mean cosine of the principal angles between two subspaces given by orthonormal columns; 1 = the same."""
    return torch.linalg.svdvals(subspace_a.mT @ subspace_b).mean().item()


@functools.cache
def chance_alignment(dimension: int, k: int, trials: int = 1000) -> float:
    """Expected `alignment` of two independent random k-dimensional subspaces of R^dimension, by simulation.

    One of them may be taken as the first k coordinates, so only the top block of the other's basis matters.
    """
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(trials):
        basis = torch.linalg.qr(torch.randn(dimension, k, dtype=torch.float64, generator=generator)).Q
        total += torch.linalg.svdvals(basis[:k]).mean().item()
    return total / trials


def projection_record(weight: Spectrum, update: Spectrum | None, grad_norm: float | None) -> dict[str, Any]:
    """Every metric of one projection (out, in) from its spectra; update keys are None without an update.

    update_gap is s_k - s_{k+1} of the update (k = 5): where it is small beside s_k, the update's top directions are
    arbitrary, and so is their alignment.
    """
    k, rows, cols = weight.left.shape[1], len(weight.left), len(weight.right)
    record = spectral_metrics(weight.singular_values) | dict.fromkeys(UPDATE_KEYS)
    record["left_alignment_chance"] = finite(chance_alignment(rows, k))
    record["right_alignment_chance"] = finite(chance_alignment(cols, k))
    if grad_norm is not None:
        record["grad_norm"] = finite(grad_norm)
    if update is not None:
        s = update.singular_values
        record["update_norm"] = finite(torch.linalg.vector_norm(s).item())
        record["update_effective_rank"] = finite(math.exp(entropy_nats(s)))
        if len(s) > k:
            record["update_gap"] = finite((s[k - 1] - s[k]).item())
        if weight.singular_values[k - 1] > 0 and s[k - 1] > 0:
            record["left_alignment"] = finite(alignment(weight.left, update.left))
            record["right_alignment"] = finite(alignment(weight.right, update.right))
    return record
