"""Checks every kernel family against float64, values and gradients, at even and odd sizes, on this device.

    python -m bench.correct [--json FILE]

Calls the public functions: Triton kernels on CUDA sm_80 and newer, PyTorch operations elsewhere. Seconds on a CPU; on a
GPU the first call also compiles. Exit code 1 where one is wrong. Needs no pytest; the tests check far more.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from bench import machine
from bench.harness import NS_COEFFICIENTS, JsonFlag, polynomials, relative_error, this_device
from engine import files
from engine.cli import exit_with_a_sentence, first_line
from kernels.cross_entropy import linear_cross_entropy
from kernels.grouped_matmul import grouped_matmul
from kernels.matmul_add import matmul_add
from kernels.newton_schulz import NORM_MARGIN, orthogonalize
from kernels.relu2_mlp import relu2_mlp
from kernels.symmetric import gram, symmetric_matmul
from optim import Muon

ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # allowed, as a share of the norm
NEWTON_SCHULZ = {"cuda": 0.05, "cpu": 1e-4}  # iterates in fp16 and in fp32, against the polynomials in float64
EVEN, ODD = (2, 128, 256), (3, 72, 100)


@dataclass(frozen=True)
class Arguments(JsonFlag):
    """Compare every kernel family with float64."""


@dataclass(frozen=True)
class Case:
    """One call: `ours` and `exact` give the same tensors, each compared by the norm of its error."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    ours: Callable[[], list[Tensor]]
    exact: Callable[[], list[Tensor]]
    allowed: float

    def error(self) -> float:
        """The largest relative error; infinite where something is not finite."""
        with torch.no_grad():
            return max(map(relative_error, self.ours(), self.exact()))


def made(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """The same normal numbers on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def with_gradients(run: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    """The output and the gradients of a fixed weighting of it."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    with torch.enable_grad():
        out = run(*leaves)
        weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def normalized(G: Tensor) -> Tensor:
    """As Newton-Schulz divides its input, in float64."""
    return G.double() / (NORM_MARGIN[NS_COEFFICIENTS] * torch.linalg.matrix_norm(G.double(), keepdim=True))


def first_step(g: Tensor, momentum: float) -> Tensor:
    """Muon's first step in float64 at rate 1: m = (1 - mu) g, Nesterov, scale sqrt(max(1, rows / cols))."""
    u = (1 - momentum) * (1 + momentum) * g.double()
    return max(1.0, g.shape[-2] / g.shape[-1]) ** 0.5 * polynomials(normalized(u))


def cases(device: torch.device) -> list[Case]:
    """Everything that is compared."""
    cuda = device.type == "cuda"
    half, wide = (torch.float16, torch.bfloat16) if cuda else (torch.float32, torch.float32)
    found: list[Case] = []
    for shape in (EVEN, ODD):
        for dtype in dict.fromkeys((half, wide, torch.float32)):
            found += product_cases(device, shape, dtype)
        found += newton_schulz_cases(device, shape)
    for tokens, width, inner in ((256, 128, 512), (100, 72, 136)):
        found += training_cases(device, tokens, width, inner, wide)
    return found


def product_cases(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> list[Case]:
    """The products inside Newton-Schulz; A is symmetric."""
    X, B = (made(device, dtype, *shape, seed=seed) / shape[2] ** 0.5 for seed in (0, 1))
    A = (X.double() @ X.double().mT).to(dtype)
    calls = {
        "gram": (lambda: [gram(X)], lambda: [X.double() @ X.double().mT]),
        "symmetric_matmul": (
            lambda: [symmetric_matmul(A, A, A, 0.5, 2.0)],
            lambda: [0.5 * A.double() @ A.double() + 2.0 * A.double()],
        ),
        "matmul_add": (lambda: [matmul_add(A, B, B, 2.0)], lambda: [A.double() @ B.double() + 2.0 * B.double()]),
    }
    return [Case(name, shape, dtype, ours, exact, ROUNDING[dtype]) for name, (ours, exact) in calls.items()]


def newton_schulz_cases(device: torch.device, shape: tuple[int, ...]) -> list[Case]:
    """Both methods, matrices of a head's size, and Muon's step with wide and tall matrices."""
    G = made(device, torch.float32, *shape)
    heads = G[:, :48]
    calls = [
        ("orthogonalize, standard", G, lambda: orthogonalize(G, method="standard"), lambda: polynomials(normalized(G))),
        ("orthogonalize, gram", G, lambda: orthogonalize(G, method="gram"), lambda: polynomials(normalized(G))),
        ("orthogonalize, small", heads, lambda: orthogonalize(heads), lambda: polynomials(normalized(heads))),
        *(("Muon's step", g, partial(stepped, g), partial(first_step, g, 0.95)) for g in (G, G.mT.contiguous())),
    ]
    return [
        Case(
            name,
            tuple(g.shape),
            g.dtype,
            ours=lambda run=run: [run()],
            exact=lambda run=exact: [run()],
            allowed=NEWTON_SCHULZ[device.type],
        )
        for name, g, run, exact in calls
    ]


def training_cases(device: torch.device, tokens: int, width: int, inner: int, dtype: torch.dtype) -> list[Case]:
    """Head with loss, feed-forward layer and experts, with the gradients of their inputs and weights."""
    x, up, down = (made(device, dtype, n, width, seed=n) / width**0.5 for n in (tokens, inner, inner + 1))
    down = down[:inner]
    experts = made(device, dtype, 4, width, inner, seed=7) / width**0.5
    targets = torch.arange(tokens, device=device) % inner
    ends = torch.tensor([0, tokens // 3, tokens // 3, tokens], device=device, dtype=torch.int32)
    calls = {
        "linear_cross_entropy": (
            lambda x, W: linear_cross_entropy(x, W, targets),
            lambda x, W: F.cross_entropy(x @ W.mT, targets),
            (x, up),
        ),
        "relu2_mlp": (relu2_mlp, lambda x, up, down: (x @ up.mT).relu().square() @ down, (x, up, down)),
        "grouped_matmul": (lambda x, W: grouped_matmul(x, W, ends), lambda x, W: by_group(x, W, ends), (x, experts)),
    }
    return [
        Case(
            name,
            (tokens, width, inner),
            dtype,
            ours=partial(with_gradients, run, *leaves),
            exact=partial(with_gradients, exact, *(leaf.double() for leaf in leaves)),
            allowed=ROUNDING[dtype],
        )
        for name, (run, exact, leaves) in calls.items()
    ]


def stepped(G: Tensor) -> Tensor:
    """What one step of our Muon with gradient G takes off the weights, at rate 1."""
    W = torch.nn.Parameter(torch.zeros_like(G))
    W.grad = G.clone()
    Muon([W], lr=1.0).step()
    return -W.detach()


def by_group(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    begins = [0, *ends.tolist()]
    return torch.cat([x[i:j] @ W for i, j, W in zip(begins, begins[1:], weights, strict=False)])


def measure(case: Case) -> dict[str, Any]:
    """A row of the JSON file; a kernel that cannot run is wrong, with its error message."""
    row = {"kernel": case.name, "shape": list(case.shape), "dtype": str(case.dtype).removeprefix("torch.")}
    try:
        error = case.error()
    except Exception as failure:  # a kernel that does not compile may raise anything; the others are still compared
        return row | {"error": None, "allowed": case.allowed, "right": False, "said": first_line(failure)}
    finite = error if error < torch.inf else None
    return row | {"error": finite, "allowed": case.allowed, "right": error <= case.allowed, "said": None}


@exit_with_a_sentence
def main() -> int:
    a = tyro.cli(Arguments, description=__doc__)
    rows = []
    for case in cases(this_device()):
        row = measure(case)
        rows.append(row)
        found = row["said"] or ("not finite" if row["error"] is None else f"{row['error']:.2g}")
        shape = "x".join(map(str, row["shape"]))
        words = f"{row['kernel']:26} {shape:14} {row['dtype']:9} error {found} of {row['allowed']:.2g} allowed"
        print(words + ("" if row["right"] else "  WRONG"), flush=True)
    right = sum(row["right"] for row in rows)
    print(f"{right} of {len(rows)} right")
    if a.json:
        files.write_json(a.json, {"machine": machine.describe(), "right": right, "cases": rows})
    return int(right < len(rows))


if __name__ == "__main__":
    sys.exit(main())
