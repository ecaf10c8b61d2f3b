"""Spectral metrics of every weight matrix, and the JSONL files they are written to.

    recorder = SpectraRecorder(model, path); recorder.before_update(); optimizer.step(); recorder.record(step, tokens)

One singular value decomposition of W and one of its update dW per projection and event, in float64 on the CPU. A value
that is undefined is None (JSON null), never 0.0 or NaN.
"""

import functools
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import runfiles
from model import Transformer

SUBSPACE_RANK = 5  # of the singular subspaces whose alignment is measured
UPDATE_KEYS = (
    "left_alignment",
    "right_alignment",
    "grad_norm",
    "update_norm",
    "update_effective_rank",
)


class JsonlWriter:
    """Appends one JSON object per line; a killed run leaves whole lines but for the last."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record, allow_nan=False) + "\n")
        self.file.flush()


def cut_jsonl(path: Path, last_step: int) -> None:
    """Drop the lines after `last_step`, and a torn last line, so that a resumed run can append."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    runfiles.write_whole(path, lambda file: file.write("".join(line + "\n" for line in kept)), mode="w")


def finite(value: float) -> float | None:
    """The value to 7 digits, None where it is not a number."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


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


def top_subspaces(matrix: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Left (m, k) and right (n, k) singular subspaces and all singular values; None where it fails."""
    if not matrix.isfinite().all():
        return None
    try:
        U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:
        return None
    return U[:, :k], s, Vh[:k].mT


def has_rank(singular_values: Tensor, k: int, shape: tuple[int, int]) -> bool:
    """Whether s_k is above the rounding of a float64 decomposition."""
    return bool(singular_values[k - 1] > singular_values[0] * max(shape) * torch.finfo(torch.float64).eps)


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


def projection_record(weight: Tensor, update: Tensor | None, gradient: Tensor | None) -> dict[str, Any]:
    """Every metric of one projection (out, in); update keys are None without an update."""
    shape = tuple(weight.shape)
    k = min(SUBSPACE_RANK, *shape)
    of_weight = top_subspaces(weight.double(), k)
    singular_values = of_weight[1] if of_weight else torch.full((min(shape),), math.nan, dtype=torch.float64)
    record = spectral_metrics(singular_values) | dict.fromkeys(UPDATE_KEYS)
    record["left_alignment_chance"] = finite(chance_alignment(shape[0], k))
    record["right_alignment_chance"] = finite(chance_alignment(shape[1], k))
    if gradient is not None:
        record["grad_norm"] = finite(torch.linalg.vector_norm(gradient.double()).item())
    if update is not None:
        record["update_norm"] = finite(torch.linalg.vector_norm(update.double()).item())
        of_update = top_subspaces(update.double(), k)
        if of_update:
            record["update_effective_rank"] = finite(math.exp(entropy_nats(of_update[1])))
        if of_weight and of_update and has_rank(of_weight[1], k, shape) and has_rank(of_update[1], k, shape):
            record["left_alignment"] = finite(alignment(of_weight[0], of_update[0]))
            record["right_alignment"] = finite(alignment(of_weight[2], of_update[2]))
    return record


class SpectraRecorder:
    """Writes one line per projection to manifold_stats.jsonl at each event."""

    def __init__(self, model: Transformer, path: Path) -> None:
        self.model, self.writer = model, JsonlWriter(path)
        self.gradients: list[Tensor] | None = None
        self.weights_before: list[Tensor] | None = None

    def before_update(self) -> None:
        """Keep weights and gradients as they are before clipping and before the optimizer touches either."""
        self.weights_before = [bank.parameter.detach().clone() for bank in self.model.banks()]
        self.gradients = [bank.parameter.grad.detach().clone() for bank in self.model.banks()]

    @torch.no_grad()
    def record(self, step: int, tokens: int) -> None:
        """Measure the weights now and, if `before_update` was called, the update since."""
        weights = [p.weight.cpu() for p in self.model.projections()]
        before = self._views(self.weights_before)
        gradients = self._views(self.gradients)
        for i, projection in enumerate(self.model.projections()):
            values = projection_record(
                weights[i], weights[i] - before[i] if before else None, gradients[i] if gradients else None
            )
            line = {"step": step, "tokens": tokens, "layer": projection.layer, "proj": projection.name}
            if projection.expert is not None:
                line["expert"] = projection.expert
            self.writer.write(line | values)
        self.gradients = self.weights_before = None

    def _views(self, banks: list[Tensor] | None) -> list[Tensor] | None:
        return banks and [p.weight.cpu() for p in self.model.projections(banks)]
