"""What `python -m bench.compiled` checks: each kernel with each tile, whole orthogonalisations, whole steps of Muon.

    for group in groups(quick=True):
        outcome = run_group(group, capability=89, quick=True); outcome.wrong

Each check compares one result with float64: sizes with and without overhang, one and several steps of K, transposed and
sliced operands, batches of 1 and 3. A group is right when no check is wrong and no launch has a fault.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import ptx
from bench.compiled_launches import CAPABILITIES, compiled_launches, faults_of, only_tile
from kernels import configs, cross_entropy, grouped_matmul, matmul_add, muon, newton_schulz, relu2_mlp, small, symmetric
from kernels.configs import Tile
from optim import Muon

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
ROWS, TALL, SLICED, PADDED = LAYOUTS = ("rows", "tall", "sliced", "padded")


class Check(NamedTuple):
    """What was compared, and what is wrong with it; nothing: an empty string."""

    what: str
    wrong: str


@dataclass(frozen=True)
class Group:
    """Checks of one kernel; `tile` is None where the kernels choose their own."""

    name: str
    tile: Tile | None = None
    dtype: torch.dtype | None = None

    @property
    def config(self) -> str:
        if self.tile is None:
            return "as chosen"
        words = f"{self.tile.block_m}x{self.tile.block_n}x{self.tile.block_k}"
        return f"{str(self.dtype).removeprefix('torch.')} {words} w{self.tile.num_warps} s{self.tile.num_stages}"


@dataclass
class Outcome:
    """What running a group gave."""

    group: Group
    capability: int
    checks: int = 0
    launches: int = 0
    instructions: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


def matrix(batch: int, m: int, k: int, layout: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal (batch, m, k): in C order, transposed, every second element of something larger, or with longer rows."""
    generator = torch.Generator().manual_seed(seed)
    if layout == TALL:
        return torch.randn(batch, k, m, generator=generator).to(dtype).mT
    if layout == SLICED:
        return torch.randn(batch, 2 * m, 2 * k, generator=generator).to(dtype)[:, ::2, ::2]
    if layout == PADDED:
        return torch.randn(batch, m, k + 16, generator=generator).to(dtype)[:, :, :k]
    return torch.randn(batch, m, k, generator=generator).to(dtype)


def as_exact_as_torch(found: Tensor, exact: Tensor, rounded: Tensor) -> str:
    """Error against float64 at most twice PyTorch's own at the same dtype, plus 4 eps of the largest output."""
    slack = 4 * torch.finfo(found.dtype).eps * exact.abs().max().item()
    allowed = 2 * (rounded.double() - exact).abs().max().item() + slack
    error = (found.double() - exact).abs().max().item()
    return "" if error <= allowed else f"off by {error:.3g}, {allowed:.3g} allowed"


def off_by_ratio(found: Tensor, exact: Tensor, relative: float, absolute: float) -> str:
    """How many elements differ by more than their share."""
    wrong = ~((found.double() - exact).abs() <= relative * exact.abs() + absolute)
    return f"{int(wrong.sum())} of {wrong.numel()} elements wrong" if wrong.any() else ""


def symmetric_to_the_bit(found: Tensor) -> str:
    return "" if torch.equal(found, found.mT) else "not symmetric; "


def symmetric_checks(tile: Tile, dtype: torch.dtype, quick: bool) -> Iterator[Check]:
    """Gram matrices; then products of commuting matrices with one and two addends."""
    b, k = tile.block_m, tile.block_k
    sizes = [(2 * b, 5 * k), (b + 16, 3 * k + 16), (2 * b - 7, 2 * k + 1)]
    if not quick:
        sizes += [(b, k), (3 * b, 2 * k), (13, 40), (b, 7 * k)]
    for n, (m, depth) in enumerate(sizes):
        for layout in LAYOUTS if n < 3 and not quick else (LAYOUTS[n % 4],):
            X = matrix(1 if n % 2 else 3, m, depth, layout, dtype)
            found = symmetric.launch_symmetric_matmul(X, X.mT, None, 1.0, 0.0)
            wrong = symmetric_to_the_bit(found) + as_exact_as_torch(found, X.double() @ X.double().mT, X @ X.mT)
            yield Check(f"gram {m}x{depth} {layout}", wrong)
    for n, (m, _) in enumerate(sizes[:2] if quick else sizes):
        X = matrix(3 if n % 2 else 1, m, m, LAYOUTS[n % 4], dtype) / m**0.5
        A, D = (X.double() @ X.double().mT).to(dtype), (X.double().mT @ X.double()).to(dtype)
        D = D.mT.contiguous().mT if n % 3 == 0 else D  # an addend that lies by columns
        exact = 0.5 * A.double() @ A.double() - 2.0 * A.double()
        rounded = torch.baddbmm(A, A, A, beta=-2.0, alpha=0.5)
        for gamma in (0.0, 3.0):
            found = symmetric.launch_symmetric_matmul(A, A, A, 0.5, -2.0, *((D, gamma) if gamma else ()))
            wrong = as_exact_as_torch(found, exact + gamma * D.double(), rounded + gamma * D)
            yield Check(f"product {m} gamma {gamma}", symmetric_to_the_bit(found) + wrong)


def full_checks(tile: Tile, dtype: torch.dtype, quick: bool) -> Iterator[Check]:
    """A B + beta C, and its transpose."""
    bm, bn, bk = tile[:3]
    sizes = [(2 * bm, bn, 5 * bk), (bm + 16, bn + 32, 2 * bk + 16), (2 * bm - 5, bn + 1, 3 * bk + 3)]
    if not quick:
        sizes += [(bm, bn, bk), (9, 200, 40)]
    for n, (m, cols, k) in enumerate(sizes):
        for layout in LAYOUTS if n < 2 and not quick else (LAYOUTS[n % 4],):
            batch = 3 if n % 2 else 1
            A, B = matrix(batch, m, k, ROWS, dtype) / k**0.5, matrix(batch, k, cols, layout, dtype, 1)
            C = matrix(batch, m, cols, layout, dtype, 2)
            exact = A.double() @ B.double() + 0.75 * C.double()
            for turned in (False, True):
                operands = (B.mT, A.mT, C.mT) if turned else (A, B, C)
                found = matmul_add.launch_matmul_add(*operands, 0.75)
                near = torch.baddbmm(operands[2], *operands[:2], beta=0.75)
                wrong = as_exact_as_torch(found, exact.mT if turned else exact, near)
                yield Check(f"{m}x{cols}x{k} {layout}{' turned' * turned}", wrong)


def relu2_checks(tile: Tile, dtype: torch.dtype, quick: bool) -> Iterator[Check]:
    bm, bn, bk = tile[:3]
    sizes = [(2 * bm, bn, 3 * bk), (bm + 9, bn + 17, 2 * bk + 5)]
    sizes += [] if quick else [(bm, 2 * bn, bk), (5, 2 * bn, 48)]
    for n, (m, width, k) in enumerate(sizes):
        A, B = matrix(1, m, k, LAYOUTS[n % 4], dtype)[0], matrix(1, width, k, ROWS, dtype, 1)[0] / k**0.5
        h = relu2_mlp.launch_relu2(A, B, None)
        exact = A.double() @ B.double().mT
        wrong = as_exact_as_torch(h, exact.relu().square(), (A @ B.mT).relu().square())
        yield Check(f"forward {m}x{width}x{k} {LAYOUTS[n % 4]}", wrong)
        found = relu2_mlp.launch_relu2(A, B, h)
        wrong = as_exact_as_torch(found, 2 * h.double().sqrt() * exact, 2 * h.sqrt() * (A @ B.mT))
        yield Check(f"backward {m}x{width}x{k} {LAYOUTS[n % 4]}", wrong)


def grouped_checks(tile: Tile, dtype: torch.dtype, quick: bool) -> Iterator[Check]:
    bm, bn, bk = tile[:3]
    cases = [((bm, 0, bm + 3, 5), 2 * bk, bn), ((1, 70, 0, 22), 3 * bk + 8, bn + 24)]
    cases += [] if quick else [((0, 0, 65, 0), 40, 71), ((bm,) * 3, bk, 2 * bn)]
    for n, (counts, k, cols) in enumerate(cases):
        offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
        x, dy = (matrix(1, sum(counts), width, LAYOUTS[n % 3], dtype, width)[0] for width in (k, cols))
        weights = matrix(len(counts), k, cols, LAYOUTS[(n + 1) % 3], dtype, 1) / k**0.5
        found = grouped_matmul.launch_grouped_matmul(x, weights, offsets)
        exact = grouped_matmul.grouped_matmul_reference(x.double(), weights.double(), offsets)
        yield Check(f"product {counts} {k} {cols}", as_exact_as_torch(found, exact, exact.to(dtype)))
        found = grouped_matmul.launch_grouped_outer(x, dy, offsets)
        exact = grouped_matmul.grouped_outer_reference(x.double(), dy.double(), offsets)
        yield Check(f"outer product {counts} {k} {cols}", as_exact_as_torch(found, exact, exact.to(dtype)))


def pass_checks(quick: bool) -> Iterator[Check]:
    """The momentum, rescale and update passes, at scales whose squares do not fit fp32."""
    cases = [((2, 5, 7), 1.0), ((3, 70, 33), 1e-38), ((2, 33, 300), 1e30)]
    cases += [] if quick else [((1, 129, 512), 1.0), ((1, 512, 48), 1e-30)]
    for n, ((shape, scale), nesterov) in enumerate(itertools.product(cases, (True, False))):
        g, m = matrix(*shape, ROWS, FLOAT) * scale, matrix(*shape, TALL, FLOAT, 1) * scale
        expected = 0.9 * m.double() + 0.1 * g.double() / 4
        u = 0.1 * g.double() / 4 + 0.9 * expected if nesterov else expected
        state = muon.Momentum(m, 0.9, nesterov, torch.tensor(4.0), torch.tensor(0.0))
        X = muon.launch_normalize(g, 1.01, HALF, state)
        inside = X[:, : shape[1], : shape[2]]
        wrong = off_by_ratio(inside, u / (1.01 * torch.linalg.matrix_norm(u, keepdim=True)), 2e-3, 1e-7)
        yield Check(f"normalised {shape} {scale} Nesterov {nesterov}", wrong)
        yield Check(f"momentum {shape} {scale}", off_by_ratio(m, expected, 1e-6, 1e-6 * scale))
        yield Check(f"padding {shape}", "" if X.abs().sum() == inside.abs().sum() else "not zero")
        W, scales = matrix(*shape, LAYOUTS[n % 3], FLOAT, 3), torch.linspace(0.5, 2, shape[0])
        exact = W.double() * (1 - 0.1 * 0.3) - 0.1 * scales.double().view(-1, 1, 1) * inside.double()
        muon.launch_update(W, inside, torch.tensor(0.1), scales, torch.tensor(0.0), 0.3)
        yield Check(f"update {shape}", off_by_ratio(W, exact, 1e-6, 1e-6))
    G = matrix(2, 60, 70, ROWS, FLOAT)
    G[:, :10] *= 1e-20
    with mock.patch.multiple(muon, BLOCK_ELEMENTS=256, PARTIALS_AT_ONCE=4):
        X = muon.launch_normalize(G, 1.0, HALF)[:, :60, :70]
    exact = G.double() / torch.linalg.matrix_norm(G.double(), keepdim=True)
    yield Check("norm of many partial sums", off_by_ratio(X, exact, 2e-3, 1e-7))


def softmax_checks(quick: bool) -> Iterator[Check]:
    """The softmax pass of the head, rows with a neighbour that must stay as it is."""
    sizes = [(3, 7), (5, 64), (3, 1000)] + ([] if quick else [(2, 100), (2, 9001), (3, 4096), (2, 12288)])
    for (rows, V), dtype in itertools.product(sizes, (FLOAT, BFLOAT)):
        wide = (4 * matrix(1, rows, V + 3, ROWS, FLOAT, V)[0]).to(dtype)
        logits, beside = wide[:, :V], wide[:, V:].clone()
        targets = torch.randint(V, (rows,), generator=torch.Generator().manual_seed(V))
        exact = logits.double()
        gradient, losses = exact.softmax(-1) - F.one_hot(targets, V), F.cross_entropy(exact, targets, reduction="none")
        found = cross_entropy.launch_softmax_gradient(logits, targets)
        name = f"{rows}x{V} {str(dtype).removeprefix('torch.')}"
        yield Check(f"losses {name}", off_by_ratio(found, losses, 1e-5, 1e-5))
        yield Check(f"gradient {name}", off_by_ratio(logits, gradient, 2**-7 if dtype == BFLOAT else 1e-5, 1e-6))
        yield Check(f"beside {name}", "" if torch.equal(wide[:, V:], beside) else "changed")


def orthogonalize_checks(quick: bool) -> Iterator[Check]:
    """Whole orthogonalisations against the polynomials in float64."""
    shapes = [(2, 96, 192), (1, 130, 100)] + ([] if quick else [(3, 64, 256), (1, 130, 200), (1, 256, 256)])
    for shape, method, name in itertools.product(
        shapes, ("auto",) if quick else ("standard", "gram"), newton_schulz.COEFFICIENTS
    ):
        G = matrix(*shape, ROWS, FLOAT)
        found = newton_schulz.orthogonalize(G, method=method, coefficients=name).double()
        X = G.double() / (newton_schulz.NORM_MARGIN[name] * torch.linalg.matrix_norm(G.double(), keepdim=True))
        X = X if shape[1] <= shape[2] else X.mT
        for a, b, c in newton_schulz.coefficient_schedule(name, 5):
            A = X @ X.mT
            X = a * X + (b * A + c * A @ A) @ X
        exact = X if shape[1] <= shape[2] else X.mT
        error = ((found - exact).norm() / exact.norm()).item()
        yield Check(f"{shape} {method} {name}", "" if error < 0.02 else f"relative error {error:.2g}, 0.02 allowed")


def small_checks(quick: bool) -> Iterator[Check]:
    """Whole small matrices in one program against the polynomials in float64."""
    shapes = [(2, 64, 96), (1, 80, 40), (3, 16, 48)]
    shapes += [] if quick else [(1, 64, 512), (2, 512, 64), (1, 33, 100), (2, 32, 128), (1, 70, 20), (1, 1, 5)]
    runs = [(name, 5) for name in newton_schulz.COEFFICIENTS]  # some repeat one row: another program
    runs += [] if quick else [("polar_express", steps) for steps in (1, 2, 3, 4, 7)]
    for shape, (name, steps) in itertools.product(shapes, runs):
        schedule = newton_schulz.coefficient_schedule(name, steps)
        X = muon.normalize_reference(matrix(*shape, ROWS, FLOAT), newton_schulz.NORM_MARGIN[name]).to(HALF)
        restarts = newton_schulz.restarts_of(min(shape[1:]))
        found = small.launch_small(X, schedule, restarts).double()
        exact = newton_schulz.iterate_standard(X.double(), schedule)
        error = ((found - exact).norm() / exact.norm()).item()
        allowed = 0.02 if min(shape[1:]) > 1 else 0.08
        yield Check(
            f"{shape} {name} {steps} steps", "" if error < allowed else f"relative error {error:.2g}, {allowed} allowed"
        )


def muon_checks(quick: bool) -> Iterator[Check]:
    """Whole fused steps over banks against the same steps in PyTorch operations, one of them with found_inf."""
    cases: list[tuple[tuple[int, ...], dict]] = [((4, 48, 80), {"transposed": (False, False, True, True)})]
    if not quick:
        cases += [((2, 3, 80, 48), {}), ((2, 128, 64), {"row_splits": (64, 32, 32)}), ((130, 70), {})]
    for shape, options in cases:
        start, *gradients = (torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in range(3, 6))
        results = []
        for fused in (True, False):
            with mock.patch.object(configs, "runs_triton", lambda x, fused=fused: fused):
                results.append(_stepped(start, gradients, options))
        error = ((results[0] - results[1]).norm() / (results[1] - start).norm()).item()
        yield Check(f"{shape} {options}", "" if error < 0.01 else f"relative error {error:.2g}, 0.01 allowed")


def _stepped(start: Tensor, gradients: list[Tensor], options: dict) -> Tensor:
    p = torch.nn.Parameter(start.clone())
    optimizer = Muon([{"params": [p], **options}], lr=0.1, weight_decay=0.2, capture=False)
    for i, gradient in enumerate(gradients):
        p.grad = gradient.clone()
        optimizer.grad_scale, optimizer.found_inf = (torch.tensor(v) for v in (1.0 + i, float(i == 1)))
        optimizer.step()
    return p.detach()


PRODUCTS: dict[str, Callable[[Tile, torch.dtype, bool], Iterator[Check]]] = {
    "symmetric_matmul": symmetric_checks,
    "matmul_add": full_checks,
    "relu2": relu2_checks,
    "grouped": grouped_checks,
}
OTHERS: dict[str, Callable[[bool], Iterator[Check]]] = {
    "passes of Muon": pass_checks,
    "softmax_gradient": softmax_checks,
    "orthogonalize": orthogonalize_checks,
    "small matrices": small_checks,
    "Muon's step": muon_checks,
}


def tiles_of(capability: int | None = None) -> list[Tile]:
    """The 16-bit tiles that an architecture can choose, or all that one of CAPABILITIES can."""
    rows = [configs.row(divmod(c, 10)) for c in (CAPABILITIES if capability is None else (capability,))]
    return list(dict.fromkeys(tile for row in (*rows, configs.DEFAULT) for tile in row if isinstance(tile, Tile)))


def groups(capability: int, quick: bool) -> list[Group]:
    """Every kernel with every tile; quick: the tiles that this architecture takes, mostly in one type."""
    found = [Group(name) for name in OTHERS]
    for name in PRODUCTS:
        types = {"symmetric_matmul": (HALF, BFLOAT), "relu2": (BFLOAT, HALF), "grouped": (BFLOAT,)}.get(name, (HALF,))
        for tile in tiles_of(capability if quick else None):
            if name == "symmetric_matmul" and tile.block_m != tile.block_n:
                continue
            found += [Group(name, tile, dtype) for dtype in (types[:1] if quick else types)]
        found.append(Group(name, configs.FP32_TAIL if name == "grouped" else configs.FP32, FLOAT))
    return found


def run_group(group: Group, capability: int, quick: bool) -> Outcome:
    """Run the checks of a group; a launch that breaks off ends them."""
    outcome, started = Outcome(group, capability), time.perf_counter()
    forced = contextlib.nullcontext() if group.tile is None else only_tile(capability, group.tile)
    with compiled_launches(capability) as launches, forced:
        checks = (
            OTHERS[group.name](quick) if group.tile is None else PRODUCTS[group.name](group.tile, group.dtype, quick)
        )
        try:
            for check in checks:
                outcome.checks += 1
                outcome.wrong += [f"{check.what}: {check.wrong}"] if check.wrong else []
        except ptx.PtxError as error:
            outcome.wrong.append(str(error))
    outcome.wrong += faults_of(launches)
    outcome.launches = len(launches)
    outcome.instructions = sum(launch.instructions.total() for launch in launches)
    outcome.seconds = time.perf_counter() - started
    return outcome
