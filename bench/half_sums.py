"""Simulates fp16 sums inside Newton-Schulz on the CPU: errors over 33 kinds of input, or nano trained with them.

    python -m bench.half_sums [--shape 128 512] [--k 64] [--products all] [--toward-zero]
    python -m bench.half_sums --train 3 --data SHARDS

Iterates are fp16, as on CUDA; the sums of --products are fp32, or fp16 over --k products and fp32 over those.
An fp16 sum takes in 8 products exactly and is rounded to nearest, as an A100's tensor cores do (Fasi et al., "Numerical
behavior of NVIDIA tensor cores", 2021); --toward-zero is the pessimist's rounding. Prints, of the worst kind each, the
largest singular value, the deviation from the polynomial in directions of s / |X|_F > 1e-2, and what leaks between them
(rms per row).
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import torch
import tyro
from torch import Tensor

import train
from bench.harness import NS_COEFFICIENTS, NS_STEPS, JsonFlag, print_table, write_figures
from engine import files
from engine.cli import exit_with_a_sentence
from kernels import newton_schulz
from kernels.configs import HALF_SUM_K
from kernels.muon import normalize_reference
from kernels.newton_schulz import METHODS, NORM_MARGIN, coefficient_schedule

AT_ONCE = 8  # products between two roundings of an fp16 sum
PRODUCTS = {"full": ("full",), "Gram": ("Gram",), "with-X": ("full", "Gram"), "all": ("full", "Gram", "square")}

# One direction carries nearly the whole norm, where the polynomial has a slope of 95, and sits in a few elements, so
# that their rounding does not average out: the Gram form's amplitude is off by up to 0.21 there (bench/LOG.md).
LONE_DIRECTIONS = ("cauchy", "heavy tails of low rank")


def zoo(m, n):
    """Inputs that Newton-Schulz meets or that were made to hurt it: name -> (m, n) in float64."""
    rng = np.random.default_rng(0)
    U = np.linalg.qr(rng.standard_normal((m, m)))[0]
    V = np.linalg.qr(rng.standard_normal((n, m)))[0]
    index = np.arange(m)

    def spectrum(s):
        return U * s @ V.T

    return {
        "gaussian": rng.standard_normal((m, n)),
        "log-uniform 1e-3": spectrum(10.0 ** (-3 * index / (m - 1))),
        "log-uniform 1e-5": spectrum(10.0 ** (-5 * index / (m - 1))),
        "rank 3": spectrum((index < 3) * 1.0),
        "rank half": spectrum((index < m // 2) * 1.0),
        "rank three quarters": spectrum((index < 3 * m // 4) * 1.0),
        "two levels": spectrum(np.where(index < m // 2, 1.0, 1e-2)),
        "power law": spectrum(1.0 / (1 + index)),
        "spiked": spectrum(np.where(index == 0, 10.0, 0.1)),
        "heavy tails": rng.standard_t(2, (m, n)),
        "duplicate rows": np.repeat(rng.standard_normal((m // 2, n)), 2, axis=0),
        "zero rows": rng.standard_normal((m, n)) * (index % 3 > 0)[:, None],
        "all ones": np.ones((m, n)),
        "rank one": np.outer(rng.standard_normal(m), rng.standard_normal(n)),
        "signs": rng.choice([-1.0, 1.0], (m, n)),
        "signs of rank one": np.sign(np.outer(rng.standard_normal(m), rng.standard_normal(n))),
        "rank 16": spectrum((index < 16) * 1.0),
        "rank 16 and noise": spectrum((index < 16) + 1e-3),
        "half rank and noise": spectrum((index < m // 2) + 1e-4),
        "two levels 1e-3": spectrum(np.where(index < m // 2, 1.0, 1e-3)),
        "log-uniform 1e-1": spectrum(10.0 ** (-index / (m - 1))),
        "power law 2": spectrum(1.0 / (1.0 + index) ** 2),
        "exponential": spectrum(0.8**index),
        "one small": spectrum(np.where(index == m - 1, 1e-2, 1.0)),
        "cauchy": rng.standard_cauchy((m, n)),
        "outliers": rng.standard_normal((m, n)) * np.where(rng.random((m, n)) < 1e-3, 1e3, 1.0),
        "one element": np.pad([[1.0]], ((0, m - 1), (0, n - 1))),
        "heavy tails of low rank": rng.standard_t(2, (m, 4)) @ rng.standard_t(2, (4, n)),
        "constant columns": np.tile(rng.standard_normal((m, 1)), (1, n)),
        "positive": np.abs(rng.standard_normal((m, n))),
        "block diagonal": np.kron(np.eye(2), rng.standard_normal((m // 2, n // 2))),
        "uneven rows": rng.standard_normal((m, n)) * 10.0 ** (-3 * index / m)[:, None],
        "identity": np.eye(m, n),
    }


def rounded(x: Tensor, toward_zero: bool = False) -> Tensor:
    """fp32 numbers as fp16 holds them, in fp32."""
    if not toward_zero:
        return x.half().float()
    normal = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return torch.where(x.abs() < 2.0**-14, (x * 2.0**24).trunc() * 2.0**-24, normal)


def half_summed(A: Tensor, B: Tensor, k: int = HALF_SUM_K, toward_zero: bool = False) -> Tensor:
    """A B in fp32 for (batch, m, K) and (batch, K, n) in fp16: each `k` products summed in fp16."""
    A, B = A.float().contiguous(), B.float().contiguous()
    total = torch.zeros(len(A), A.shape[1], B.shape[2])
    for start in range(0, A.shape[2], k):
        part = torch.zeros_like(total)
        for i in range(start, min(start + k, A.shape[2]), AT_ONCE):
            part = rounded(part.baddbmm_(A[:, :, i : i + AT_ONCE], B[:, i : i + AT_ONCE]), toward_zero)
        total += part
    return total


@contextlib.contextmanager
def cuda_arithmetic(k: int, products: str = "full", toward_zero: bool = False) -> Iterator[None]:
    """Newton-Schulz on the CPU computes as on CUDA: fp16 iterates, symmetric products mirrored. With `k` products to
    an fp16 sum, 0 for none, in some of the products."""

    def multiply(A: Tensor, B: Tensor, kind: str) -> Tensor:
        return half_summed(A, B, k, toward_zero) if k and kind in PRODUCTS[products] else A.float() @ B.float()

    def product(A, B, C=None, alpha=1.0, beta=0.0, D=None, gamma=0.0):
        x = alpha * multiply(A, B, "Gram" if C is None else "square")
        for addend, factor in ((C, beta), (D, gamma)):
            x = x if addend is None else x + factor * addend.float()
        return (x.tril() + x.tril(-1).mT).half()

    def matmul_add(A: Tensor, B: Tensor, C: Tensor, beta: float) -> Tensor:
        return (multiply(A, B, "full") + beta * C.float()).half()

    iterate = newton_schulz.iterate
    changes = {"product": product, "matmul_add": matmul_add, "iterate": lambda X, *rest: iterate(X.half(), *rest)}
    with mock.patch.multiple(newton_schulz, **changes):
        yield


def departure(X: Tensor, out: Tensor, schedule: list[tuple[float, float, float]], margin: float) -> list[float]:
    """(largest singular value, deviation from the polynomial, rms per row off it) of `out` for a normalised (m, n)."""
    U, s, Vh = np.linalg.svd(X.double().numpy(), full_matrices=False)
    strong = s * margin > 1e-2
    expected = s[strong]
    for a, b, c in schedule:
        expected = a * expected + b * expected**3 + c * expected**5
    core = (U.T @ out.double().numpy() @ Vh.T)[np.ix_(strong, strong)]
    off = core - np.diag(np.diag(core))
    largest = np.linalg.norm(out.double().numpy(), 2)
    return [largest, np.abs(np.diag(core) - expected).max(), np.linalg.norm(off) / len(core) ** 0.5]


@dataclass(frozen=True)
class Arguments(JsonFlag):
    """Simulate fp16 sums inside Newton-Schulz."""

    shape: tuple[int, int] = (128, 512)
    """Rows and columns, rows the smaller."""
    method: tuple[str, ...] = METHODS[1:]
    """Forms of Newton-Schulz."""
    kinds: tuple[str, ...] = ()
    """Only these kinds of input (default: all)."""
    coefficients: str = NS_COEFFICIENTS
    """Newton-Schulz polynomials."""
    k: int = HALF_SUM_K
    """Products to an fp16 sum."""
    products: Literal["full", "Gram", "with-X", "all"] = "full"
    """Which products sum in fp16: Q X, X Xᵀ, both, or those of small matrices too."""
    toward_zero: bool = False
    """Round fp16 sums toward zero."""
    train: int = 0
    """Train nano with this many seeds instead, with fp32 and with fp16 sums."""
    tokens: int = 65_536
    """Of each training, 1,024 to a step."""
    data: Path | None = None
    """Token shards (default: those of make speedrun)."""


def rows_of(a: Arguments) -> list[dict[str, str]]:
    """A line for each form and way of summing."""
    schedule, margin = coefficient_schedule(a.coefficients, NS_STEPS), NORM_MARGIN[a.coefficients]
    inputs = {name: G for name, G in zoo(*a.shape).items() if name in (a.kinds or zoo(*a.shape))}
    inputs = {name: normalize_reference(torch.from_numpy(G)[None].float(), margin).half() for name, G in inputs.items()}
    rows = []
    for method in a.method:
        for k in (0, a.k):
            with cuda_arithmetic(k, a.products, a.toward_zero):
                outs = {name: newton_schulz.iterate(X, schedule, method) for name, X in inputs.items()}
            found = {name: departure(X[0], outs[name][0], schedule, margin) for name, X in inputs.items()}
            row = {"form": method, "shape": f"{a.shape[0]}x{a.shape[1]}", "sums": f"fp16 over {k}" if k else "fp32"}
            for i, measure in enumerate(("sigma max", "deviation", "off-diagonal")):
                worst = max(found, key=lambda name: found[name][i])
                row |= {measure: f"{found[worst][i]:.4f}", f"of {measure}": worst}
            rows.append(row)
    return rows


def train_nano(a: Arguments) -> list[dict[str, str]]:
    """Final validation losses by seed and way of summing; the runs stay in runs/half-sums-*."""
    rows = []
    for seed in range(a.train):
        for k in (0, a.k):
            name = f"half-sums-{seed}-{k}"
            words = ["train.py", "--model", "nano", "--seed", str(seed), "--tokens", str(int(a.tokens)), "--name", name]
            words += ["--workers", "1", "--compile", "off", "--spectra-every", "0", "--no-plots", "--resume"]
            words += ["--batch-tokens", "1024", "--eval-every", "1000"]
            words += ["--data", str(a.data)] if a.data else []
            with cuda_arithmetic(k, a.products, a.toward_zero), mock.patch.object(sys, "argv", words):
                train.main()
            loss = json.loads((files.ROOT / "runs" / name / "summary.json").read_text(encoding="utf-8"))[
                "final_val_loss"
            ]
            rows.append({"seed": str(seed), "sums": f"fp16 over {k}" if k else "fp32", "final loss": f"{loss:.4f}"})
    return rows


@exit_with_a_sentence
def main() -> int:
    a = tyro.cli(Arguments, description=__doc__)
    torch.set_num_threads(1)
    rows = train_nano(a) if a.train else rows_of(a)
    print_table(rows)
    write_figures(a.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
