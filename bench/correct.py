"""Every kernel family against float64, values and gradients, at even and odd sizes, on the device there is.

    python -m bench.correct [--json FILE]

Calls the public functions: on CUDA sm_80 and newer their Triton kernels, elsewhere the PyTorch paths. Seconds on a CPU;
on a GPU the first call also compiles. Exit code 1 where one is wrong. Needs no pytest; the tests ask for far more.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from bench import machine
from engine import files
from engine.cli import exit_with_a_sentence, first_line
from kernels.cross_entropy import linear_cross_entropy
from kernels.grouped_matmul import grouped_matmul
from kernels.matmul_add import matmul_add
from kernels.newton_schulz import NORM_MARGIN, coefficient_schedule, orthogonalize
from kernels.relu2_mlp import relu2_mlp
from kernels.symmetric import gram, symmetric_matmul
from optim import Muon

ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # allowed, as a share of the norm
NEWTON_SCHULZ = {"cuda": 0.05, "cpu": 1e-4}  # iterates in fp16 and in fp32, against the polynomials in float64
EVEN, ODD = (2, 128, 256), (3, 72, 100)
STEPS, COEFFICIENTS = 5, "polar_express"


@dataclass(frozen=True)
class Arguments:
    """Compare every kernel family with float64."""

    json: Path | None = None
    """Write the cases here too."""


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
        """The largest relative error; NaN stays NaN, which is wrong."""
        with torch.no_grad():
            pairs = zip(self.ours(), self.exact(), strict=True)
            return max(((a.double() - b).norm() / b.norm()).nan_to_num(torch.inf).item() for a, b in pairs)


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


def polynomials(G: Tensor) -> Tensor:
    """Newton-Schulz in float64, from its formula alone: X <- a X + b A X + c A A X with A = X Xᵀ."""
    X = G.double() / (NORM_MARGIN[COEFFICIENTS] * torch.linalg.matrix_norm(G.double(), keepdim=True))
    for a, b, c in coefficient_schedule(COEFFICIENTS, STEPS):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X


def first_update(g: Tensor, momentum: float) -> Tensor:
    """Muon's first in float64 at rate 1: m = (1 - mu) g, Nesterov, scale sqrt(max(1, rows / cols))."""
    u = (1 - momentum) * (1 + momentum) * g.double()
    rows, cols = g.shape[-2:]
    return max(1.0, rows / cols) ** 0.5 * (polynomials(u) if rows <= cols else polynomials(u.mT).mT)


def cases(device: torch.device) -> list[Case]:
    """Everything that is compared."""
    cuda = device.type == "cuda"
    half, wide = (torch.float16, torch.bfloat16) if cuda else (torch.float32, torch.float32)
    found: list[Case] = []

    def add(name: str, shape: tuple[int, ...], dtype: torch.dtype, ours: Any, exact: Any, allowed: float = 0.0) -> None:
        found.append(Case(name, shape, dtype, ours, exact, allowed or ROUNDING[dtype]))

    for shape in (EVEN, ODD):
        for dtype in dict.fromkeys((half, wide, torch.float32)):
            X, B = (made(device, dtype, *shape, seed=seed) / shape[2] ** 0.5 for seed in (0, 1))
            A = (X.double() @ X.double().mT).to(dtype)
            add("gram", shape, dtype, lambda X=X: [gram(X)], lambda X=X: [X.double() @ X.double().mT])
            add(
                *("symmetric_matmul", shape, dtype),
                lambda A=A: [symmetric_matmul(A, A, A, 0.5, 2.0)],
                lambda A=A: [0.5 * A.double() @ A.double() + 2.0 * A.double()],
            )
            add(
                *("matmul_add", shape, dtype),
                lambda A=A, B=B: [matmul_add(A, B, B, 2.0)],
                lambda A=A, B=B: [A.double() @ B.double() + 2.0 * B.double()],
            )
        G = made(device, torch.float32, *shape)
        for method in ("standard", "gram"):
            run = lambda G=G, method=method: [orthogonalize(G, method=method)]  # noqa: E731 (one line of a table)
            add(
                f"orthogonalize, {method}",
                shape,
                torch.float32,
                run,
                lambda G=G: [polynomials(G)],
                NEWTON_SCHULZ[device.type],
            )
        for turned in (G, G.mT.contiguous()):
            add(
                *("Muon's step", tuple(turned.shape), torch.float32),
                lambda G=turned: [stepped(G)],
                lambda G=turned: [first_update(G, 0.95)],
                NEWTON_SCHULZ[device.type],
            )
    for tokens, width, inner in ((256, 128, 512), (100, 72, 136)):
        shape = (tokens, width, inner)
        x, up, down = (made(device, wide, n, width, seed=n) / width**0.5 for n in (tokens, inner, inner + 1))
        down = down[:inner]
        targets = torch.arange(tokens, device=device) % inner
        add(
            *("linear_cross_entropy", shape, wide),
            lambda x=x, up=up, t=targets: with_gradients(lambda x, W: linear_cross_entropy(x, W, t), x, up),
            lambda x=x, up=up, t=targets: with_gradients(
                lambda x, W: F.cross_entropy(x @ W.mT, t), x.double(), up.double()
            ),
        )
        add(
            *("relu2_mlp", shape, wide),
            lambda x=x, up=up, down=down: with_gradients(relu2_mlp, x, up, down),
            lambda x=x, up=up, down=down: with_gradients(
                lambda x, up, down: (x @ up.mT).relu().square() @ down, x.double(), up.double(), down.double()
            ),
        )
        ends = torch.tensor([0, tokens // 3, tokens // 3, tokens], device=device, dtype=torch.int32)
        weights = made(device, wide, 4, width, inner, seed=7) / width**0.5
        add(
            *("grouped_matmul", shape, wide),
            lambda x=x, W=weights, ends=ends: with_gradients(lambda x, W: grouped_matmul(x, W, ends), x, W),
            lambda x=x, W=weights, ends=ends: with_gradients(lambda x, W: by_group(x, W, ends), x.double(), W.double()),
        )
    return found


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
    """A row of the JSON file; a kernel that cannot run is wrong, with what it said."""
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
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    rows = []
    for case in cases(device):
        row = measure(case)
        rows.append(row)
        found = row["said"] or ("not finite" if row["error"] is None else f"{row['error']:.2g}")
        shape = "x".join(map(str, row["shape"]))
        words = f"{row['kernel']:26} {shape:14} {row['dtype']:9} error {found} of {row['allowed']:.2g} allowed"
        print(words + ("" if row["right"] else "  WRONG"), flush=True)
    wrong = [row for row in rows if not row["right"]]
    print(f"{len(rows) - len(wrong)} of {len(rows)} right")
    if a.json:
        files.write_json(a.json, {"machine": machine.describe(), "right": len(rows) - len(wrong), "cases": rows})
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
