"""Newton-Schulz and Muon's step against what others would run, on this device, or predicted for two that are not here.

    python -m bench.newton_schulz [--json FILE] [--small]      python -m bench.newton_schulz --predict

Correctness first: a wrong result is not timed. Candidates are interleaved; medians and quartiles; inputs rotate through
more memory than the L2 cache ("cold") or stay ("hot"); on CUDA every candidate is timed eagerly and as a CUDA graph.
Reference: the same coefficients and steps, bf16, batched by shape, torch.baddbmm form, torch.compile's default mode.
Ideal: the same dense products alone by torch.bmm, epilogues free, which nobody ships.
"""

import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

import runfiles
from kernels import configs
from kernels.muon import normalize_reference
from kernels.newton_schulz import GRAM_ASPECT, NORM_MARGIN, RESTARTS, coefficient_schedule, iterate
from kernels.symmetric import gram
from model import SIZES, Transformer
from optim import Muon

STEPS, COEFFICIENTS = 5, "polar_express"
GROUPS = {
    "88m q, o": (44, 512, 512),
    "88m k, v": (44, 256, 512),
    "88m up, down": (44, 2048, 512),
    "moe-79m experts": (48, 1536, 384),
    "108m q, k, v, o": (30, 768, 768),
    "108m up, down": (20, 3072, 768),
    "1 x 1024x4096": (1, 1024, 4096),
    "1 x 4096x16384": (1, 4096, 16384),
}
SQUARES = {f"32 x {m}x{m}": (32, m, m) for m in (256, 512, 1024)}
SMALL_GROUPS = {"nano q, o": (8, 128, 128), "nano up, down": (8, 512, 128)}


@dataclass(frozen=True)
class Device:
    """What a prediction is counted against; the peaks are vendor figures or others' measurements (kernels' sources)."""

    name: str
    flops: float
    bytes_per_second: float
    launch_seconds: float


PREDICTED = (
    Device("RTX 4090", 165.2e12, 0.93e12, 1.5e-6),
    Device("H200", 788e12, 4.3e12, 1.5e-6),
)


def half_product_flops(shape: tuple[int, int, int], method: str, steps: int = STEPS) -> tuple[float, float, int]:
    """FLOPs, bytes if every operand came from memory once, and launches of one group; symmetric products count half."""
    batch, m, n = shape[0], min(shape[1:]), max(shape[1:])
    if method == "standard":
        return batch * steps * (3.0 * m * m * n + m**3), batch * steps * 2.0 * (4 * m * n + 5 * m * m), 3 * steps
    segments = 1 + sum(i < steps for i in RESTARTS)
    squares = 4 * steps - 3 * segments
    flops = segments * 3.0 * m * m * n + squares * 1.0 * m**3
    return (
        batch * flops,
        batch * 2.0 * (segments * (3 * m * n + 2 * m * m) + 3.5 * squares * m * m),
        2 * segments + squares,
    )


def dense_flops(shape: tuple[int, int, int], steps: int = STEPS) -> float:
    """What the same iterations cost with full products: 4 m² n + 2 m³ each."""
    batch, m, n = shape[0], min(shape[1:]), max(shape[1:])
    return batch * steps * (4.0 * m * m * n + 2.0 * m**3)


def method_of(shape: tuple[int, int, int]) -> str:
    return "gram" if max(shape[1:]) >= GRAM_ASPECT * min(shape[1:]) else "standard"


def predict() -> None:
    """The roofline: per group the larger of arithmetic and memory time, plus the launches; a floor, not a forecast."""
    print(
        "PREDICTION from counted FLOPs, bytes and launches; nothing here was timed. floor = max(FLOP, byte) + launches"
    )
    header = f"{'group':18} {'method':9} {'GFLOP':>8} {'dense':>8} {'MB':>8} {'launches':>8}"
    print(header + "".join(f" {d.name + ' us':>12}" for d in PREDICTED))
    for name, shape in GROUPS.items():
        method = method_of(shape)
        flops, moved, launches = half_product_flops(shape, method)
        floors = [max(flops / d.flops, moved / d.bytes_per_second) + launches * d.launch_seconds for d in PREDICTED]
        row = f"{name:18} {method:9} {flops / 1e9:8.1f} {dense_flops(shape) / 1e9:8.1f} {moved / 1e6:8.0f} {launches:8}"
        print(row + "".join(f" {1e6 * floor:12.0f}" for floor in floors))
    groups = [GROUPS[name] for name in list(GROUPS)[:3]]
    flops = sum(half_product_flops(g, method_of(g))[0] for g in groups)
    parameters = sum(b * m * n for b, m, n in groups)
    for d in PREDICTED:
        light = flops / d.flops + 24 * parameters / d.bytes_per_second
        print(f"whole 88m step, {d.name}: {1e3 * light:.2f} ms at the speed of light (24 B per parameter)")


def reference(X: Tensor, schedule: list[tuple[float, float, float]]) -> Tensor:
    """What a careful PyTorch user writes, for wide (batch, m, n)."""
    for a, b, c in schedule:
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X


def ideal(X: Tensor, method: str) -> Tensor:
    """The dense products of one orthogonalisation and nothing else."""
    R = torch.bmm(X, X.mT)
    if method == "standard":
        for _ in range(STEPS):
            torch.bmm(R, torch.bmm(X, X.mT))
            out = torch.bmm(R, X)
        return out
    segments = 1 + sum(i < STEPS for i in RESTARTS)
    for _ in range(4 * STEPS - 3 * segments):
        torch.bmm(R, R)
    for _ in range(segments):
        R = torch.bmm(X, X.mT)
        out = torch.bmm(R, X)
    return out


def check(name: str, shape: tuple[int, int, int], device: torch.device, work: torch.dtype) -> None:
    """SystemExit unless ours agrees with the exact polynomial on two matrices of this group's shape."""
    G = torch.randn(2, *shape[1:], device=device)
    schedule = coefficient_schedule(COEFFICIENTS, STEPS)
    X = normalize_reference(G, NORM_MARGIN[COEFFICIENTS])
    exact = X.double()
    for a, b, c in schedule:
        left = exact.shape[1] <= exact.shape[2]
        A = exact @ exact.mT if left else exact.mT @ exact
        B = b * A + c * A @ A
        exact = a * exact + (B @ exact if left else exact @ B)
    error = ((iterate(X.to(work), schedule, "auto").double() - exact).norm() / exact.norm()).item()
    if not error < 0.02:
        sys.exit(f"{name}: relative error {error:.3g} against float64, not timed")


def measure(candidates: dict[str, Callable[[int], Any]], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of each candidate(i), interleaved; i picks the input, so the caller decides what is hot."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(-3, repeats):
        for name, run in candidates.items():
            seconds = _seconds(lambda run=run, i=i: run(i), device)
            if i >= 0:
                times[name].append(seconds)
    return times


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as a CUDA graph, warmed up first."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def bench_group(name: str, shape: tuple[int, int, int], device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Rows of one shape group: every candidate, eager and captured, cold and hot."""
    cuda = device.type == "cuda"
    ours_dtype, theirs_dtype = (torch.float16, torch.bfloat16) if cuda else (torch.float32, torch.float32)
    check(name, shape, device, ours_dtype)
    method, schedule = method_of(shape), coefficient_schedule(COEFFICIENTS, STEPS)
    bytes_each = 2 * shape[0] * shape[1] * shape[2]
    copies = max(1, -(-3 * configs.l2_bytes(device) // bytes_each)) if cuda else 3
    inputs = [normalize_reference(torch.randn(shape, device=device), 1.06) for _ in range(min(copies, 16))]
    ours = [X.to(ours_dtype) for X in inputs]
    wide = [(X if X.shape[1] <= X.shape[2] else X.mT.contiguous()).to(theirs_dtype) for X in inputs]
    torch._dynamo.reset()  # it counts specialisations per function, and gives up after 8
    compiled = torch.compile(reference, dynamic=False)
    runs: dict[str, Callable[[int], Any]] = {
        "ours": lambda i: iterate(ours[i], schedule, "auto"),
        "reference": lambda i: compiled(wide[i], schedule),
        "ideal": lambda i: ideal(wide[i], method),
    }
    rows = []
    for memory in ("cold", "hot"):
        picks = {n: (lambda i, r=r: r(i % len(inputs) if memory == "cold" else 0)) for n, r in runs.items()}  # noqa: B023 (used in this pass of the loop only)
        timed = {("eager", n): t for n, t in measure(picks, device, repeats).items()}
        if cuda:
            graphs = {n: [captured(lambda r=r, i=i: r(i)) for i in range(len(inputs))] for n, r in runs.items()}
            picks = {n: (lambda i, g=g: g[i % len(g) if memory == "cold" else 0]()) for n, g in graphs.items()}  # noqa: B023 (as above)
            timed |= {("graph", n): t for n, t in measure(picks, device, repeats).items()}
        for (mode, candidate), seconds in timed.items():
            quartiles = statistics.quantiles(seconds, n=4)
            median = quartiles[1]
            baseline = statistics.median(timed[mode, "reference"])
            row = {"group": name, "method": method, "candidate": candidate, "mode": mode, "memory": memory}
            row |= {"median_us": 1e6 * median, "quartiles_us": [1e6 * q for q in quartiles]}
            row |= {"dense_tflops": dense_flops(shape) / median / 1e12, "speedup": baseline / median}
            row["ceiling_speedup"] = dense_flops(shape) / half_product_flops(shape, method)[0]
            rows.append(row)
    return rows


def bench_squares(device: torch.device, repeats: int, shapes: dict[str, tuple[int, int, int]]) -> list[dict[str, Any]]:
    """The symmetric product X Xᵀ alone against torch.bmm."""
    rows = []
    for name, shape in shapes.items():
        X = torch.randn(shape, device=device, dtype=torch.float16 if device.type == "cuda" else torch.float32)
        runs = {"ours": lambda i, X=X: gram(X), "torch.bmm": lambda i, X=X: torch.bmm(X, X.mT)}
        times = {n: statistics.median(t) for n, t in measure(runs, device, repeats).items()}
        for n, median in times.items():
            row = {"group": f"X Xt {name}", "method": "gram", "candidate": n, "mode": "eager", "memory": "hot"}
            rows.append(
                row | {"median_us": 1e6 * median, "speedup": times["torch.bmm"] / median, "ceiling_speedup": 2.0}
            )
    return rows


def bench_step(model: str, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """The whole Muon step, momentum to updated weights: ours, the stacked compiled form, torch.optim.Muon's loop."""
    net = Transformer(SIZES[model], vocab_size=64).to(device)
    banks = net.banks()
    for bank in banks:
        bank.parameter.grad = torch.randn_like(bank.parameter)
    ours = Muon([{"params": [b.parameter], "transposed": b.transposed} for b in banks])
    singles = [torch.nn.Parameter(W.detach().clone()) for b in banks for W in b.parameter]
    for W, g in zip(singles, (g for b in banks for g in b.parameter.grad), strict=True):
        W.grad = g.clone()
    loop = torch.optim.Muon(singles)
    schedule = coefficient_schedule(COEFFICIENTS, STEPS)
    state = [(b.parameter.detach().clone(), b.parameter.grad, torch.zeros_like(b.parameter)) for b in banks]

    @torch.compile(dynamic=False)
    def stacked(W: Tensor, g: Tensor, m: Tensor) -> None:
        m.lerp_(g, 0.05)
        u = g.lerp(m, 0.95).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
        u = u if u.shape[1] <= u.shape[2] else u.mT
        X = u / (u.norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-7)
        out = reference(X, schedule)
        W.sub_(0.02 * (out if out.shape == W.shape else out.mT))

    def run_stacked(i: int) -> None:
        with torch.no_grad():
            for tensors in state:
                stacked(*tensors)

    runs = {"ours": lambda i: ours.step(), "reference": run_stacked, "torch.optim.Muon": lambda i: loop.step()}
    times = {n: statistics.median(t) for n, t in measure(runs, device, repeats).items()}
    rows = []
    for n, median in times.items():
        row = {"group": f"{model} whole step", "method": "auto", "candidate": n, "mode": "as used", "memory": "hot"}
        rows.append(row | {"median_us": 1e6 * median, "speedup": times["reference"] / median, "ceiling_speedup": None})
    return rows


@dataclass(frozen=True)
class Arguments:
    """Time Newton-Schulz here, or predict it for a 4090 and an H200."""

    predict: bool = False
    """Print the counted roofline and stop."""
    json: Path | None = None
    """Write the rows here too, with device, versions and date."""
    repeats: int = 100
    """Timed rounds of each comparison (a CPU gets a tenth)."""
    small: bool = False
    """Only the nano model's shapes; the default on a CPU."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    if arguments.predict:
        return predict()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    small = arguments.small or not cuda
    repeats = arguments.repeats if cuda else max(5, arguments.repeats // 10)
    rows: list[dict[str, Any]] = []
    print(f"{torch.cuda.get_device_name() if cuda else 'cpu'}, torch {torch.__version__}; losses are printed like wins")
    for package in ("gram_newton_schulz", "emerging_optimizers"):
        if importlib.util.find_spec(package) is None:
            print(f"{package}: absent")
    columns = f"{'group':22} {'candidate':18} {'mode':8} {'memory':6} {'median us':>10}"
    print(f"{columns} {'speedup':>8} {'ceiling':>8} {'dense TFLOP/s':>13}")
    for name, shape in (SMALL_GROUPS if small else GROUPS).items():
        rows += _show(bench_group(name, shape, device, repeats))
    rows += _show(
        bench_squares(
            device, repeats, {"8 x 128x128": (8, 128, 128)} if small else SQUARES | {"44 x 512x512": GROUPS["88m q, o"]}
        )
    )
    rows += _show(bench_step("nano" if small else "88m", device, repeats))
    if arguments.json:
        described = {"device": torch.cuda.get_device_name() if cuda else "cpu", "date": time.strftime("%Y-%m-%d")}
        described |= {"command": " ".join(sys.argv), **runfiles.provenance(), "rows": rows}
        arguments.json.write_text(json.dumps(described, indent=1) + "\n")


def _show(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for r in rows:
        ceiling = "" if r["ceiling_speedup"] is None else f"{r['ceiling_speedup']:8.2f}"
        if "dense_tflops" in r:
            ceiling += f" {r['dense_tflops']:12.2f}"
        print(
            f"{r['group']:22} {r['candidate']:18} {r['mode']:8} {r['memory']:6} {r['median_us']:10.1f} "
            f"{r['speedup']:7.2f}x {ceiling}",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
