"""Newton-Schulz and Muon's step against what others would run, on this device, or predicted for two that are not here.

    python -m bench.newton_schulz [--json FILE] [--small]      python -m bench.newton_schulz --predict

Correctness first: a wrong result is not timed. Candidates are interleaved; medians and quartiles; inputs rotate through
more memory than the L2 cache ("cold") or stay ("hot"); on CUDA every candidate is timed eagerly and as a CUDA graph.
Reference: the same coefficients and steps, bf16, batched by shape, torch.baddbmm form, torch.compile's default mode.
Ideal: the same dense products alone by torch.bmm, epilogues free, which nobody ships. Ceiling: this device's measured
cuBLAS rate times what the half products save; the last column is the share of it that was reached.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from bench import peers
from bench.baseline import StackedMuon, reference
from engine import files, identity
from engine.cli import BadInput, exit_with_a_sentence
from kernels import configs
from kernels.muon import normalize_reference
from kernels.newton_schulz import NORM_MARGIN, RESTARTS, coefficient_schedule, half_product_cost, iterate, method_of
from kernels.symmetric import gram
from model import SIZES, Transformer
from optim import MUON_BYTES, Muon, step_cost

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


def dense_flops(shape: tuple[int, int, int], steps: int = STEPS) -> float:
    """What the same iterations cost with full products: 4 m² n + 2 m³ each."""
    batch, m, n = shape[0], min(shape[1:]), max(shape[1:])
    return batch * steps * (4.0 * m * m * n + 2.0 * m**3)


def predict() -> None:
    """The roofline: per group the larger of arithmetic and memory time, plus the launches; a floor, not a forecast."""
    print(
        "PREDICTION from counted FLOPs, bytes and launches; nothing here was timed. floor = max(FLOP, byte) + launches"
    )
    header = f"{'group':18} {'method':9} {'GFLOP':>8} {'dense':>8} {'MB':>8} {'launches':>8}"
    print(header + "".join(f" {d.name + ' us':>12}" for d in PREDICTED))
    for name, shape in GROUPS.items():
        method = method_of(shape)
        flops, moved, launches = half_product_cost(shape, method, STEPS)
        floors = [max(flops / d.flops, moved / d.bytes_per_second) + launches * d.launch_seconds for d in PREDICTED]
        row = f"{name:18} {method:9} {flops / 1e9:8.1f} {dense_flops(shape) / 1e9:8.1f} {moved / 1e6:8.0f} {launches:8}"
        print(row + "".join(f" {1e6 * floor:12.0f}" for floor in floors))
    groups = [GROUPS[name] for name in list(GROUPS)[:3]]
    flops = sum(half_product_cost(g, method_of(g), STEPS)[0] for g in groups)
    parameters = sum(b * m * n for b, m, n in groups)
    for d in PREDICTED:
        light = flops / d.flops + MUON_BYTES * parameters / d.bytes_per_second
        print(f"whole 88m step, {d.name}: {1e3 * light:.2f} ms at the speed of light (24 B per parameter)")


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


def fault(run: Callable[[Tensor], Tensor], X: Tensor, allowed: float) -> str | None:
    """In words, where run(X) leaves the polynomials in float64 on the first two matrices of X."""
    exact = X[:2].double()
    for a, b, c in coefficient_schedule(COEFFICIENTS, STEPS):
        left = exact.shape[1] <= exact.shape[2]
        A = exact @ exact.mT if left else exact.mT @ exact
        B = b * A + c * A @ A
        exact = a * exact + (B @ exact if left else exact @ B)
    error = ((run(X)[:2].double() - exact).norm() / exact.norm()).item()
    return None if error < allowed else f"relative error {error:.3g} against float64, not timed"


def cublas_flops(device: torch.device, repeats: int) -> float:
    """FLOP/s of this device's own matmul at Newton-Schulz's precision: the best of one large and two batched shapes."""
    dtype, cuda = (torch.float16, True) if device.type == "cuda" else (torch.float32, False)
    shapes = [(1, 8192, 8192), (44, 512, 512), (44, 2048, 2048)] if cuda else [(1, 1024, 1024), (8, 128, 128)]
    best = 0.0
    for shape in shapes:
        A = torch.randn(shape, device=device, dtype=dtype)
        median = statistics.median(measure({"": lambda i, A=A: torch.bmm(A, A)}, device, repeats)[""])
        rate = 2 * shape[0] * shape[1] ** 3 / median
        print(f"cuBLAS or CPU matmul, {shape[0]} x {shape[1]}x{shape[2]} {dtype}: {rate / 1e12:.2f} TFLOP/s")
        best = max(best, rate)
    return best


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


def bench_group(
    name: str, shape: tuple[int, int, int], device: torch.device, repeats: int, device_flops: float
) -> list[dict[str, Any]]:
    """Rows of one shape group: every candidate, eager and captured, cold and hot."""
    cuda = device.type == "cuda"
    ours_dtype, theirs_dtype = (torch.float16, torch.bfloat16) if cuda else (torch.float32, torch.float32)
    method, schedule = method_of(shape), coefficient_schedule(COEFFICIENTS, STEPS)
    bytes_each = 2 * shape[0] * shape[1] * shape[2]
    copies = max(1, -(-3 * configs.l2_bytes(device) // bytes_each)) if cuda else 3
    inputs = [normalize_reference(torch.randn(shape, device=device), 1.0) for _ in range(min(copies, 16))]
    ours = [(X / NORM_MARGIN[COEFFICIENTS]).to(ours_dtype) for X in inputs]
    wide = [(X if X.shape[1] <= X.shape[2] else X.mT.contiguous()).to(theirs_dtype) for X in ours]
    torch._dynamo.reset()  # it counts specialisations per function, and gives up after 8
    compiled = torch.compile(reference, dynamic=False)
    runs: dict[str, Callable[[int], Any]] = {
        "ours": lambda i: iterate(ours[i], schedule, "auto"),
        "reference": lambda i: compiled(wide[i], schedule),
        "ideal": lambda i: ideal(wide[i], method),
    }
    wrong = fault(lambda X: iterate(X, schedule, "auto"), ours[0], 0.02) or fault(
        lambda X: compiled(X, schedule), wide[0], 0.05
    )
    if wrong:
        sys.exit(f"{name}: {wrong}")
    for other, run in peers.installed(schedule, device).items():
        wrong = fault(run, inputs[0], 0.05)
        if wrong:
            print(f"{name}, {other}: {wrong}")
        else:
            runs[other] = lambda i, run=run: run(inputs[i])
    rows = []
    ceiling = device_flops * dense_flops(shape) / half_product_cost(shape, method, STEPS)[0]
    for memory in ("cold", "hot"):
        picks = {n: (lambda i, r=r: r(i % len(inputs) if memory == "cold" else 0)) for n, r in runs.items()}  # noqa: B023 (used in this pass of the loop only)
        timed = {"eager": measure(picks, device, repeats)}
        if cuda:
            graphs = {n: g for n, r in runs.items() if (g := _graphs(n, r, len(inputs)))}
            picks = {n: (lambda i, g=g: g[i % len(g) if memory == "cold" else 0]()) for n, g in graphs.items()}  # noqa: B023 (as above)
            timed["graph"] = measure(picks, device, repeats)
        for mode, times in timed.items():
            for row in _rows({"group": name, "method": method, "mode": mode, "memory": memory}, times, "reference"):
                reached = dense_flops(shape) / row["median_us"] * 1e6
                row |= {"dense_tflops": reached / 1e12, "ceiling_tflops": ceiling / 1e12, "share": reached / ceiling}
                rows.append(row)
    return rows


def _graphs(name: str, run: Callable[[int], Any], inputs: int) -> list[Callable[[], Any]] | None:
    """One CUDA graph for each input; None, and a line, for a package that cannot be captured."""
    try:
        return [captured(lambda i=i: run(i)) for i in range(inputs)]
    except RuntimeError as error:
        if name not in peers.PEERS:
            raise
        print(f"{name}: cannot be captured as a CUDA graph ({str(error).splitlines()[0]})")
        return None


def _rows(fields: dict[str, str], times: dict[str, list[float]], baseline: str) -> list[dict[str, Any]]:
    """One row per candidate: median, quartiles, and the baseline's median divided by its own."""
    quartiles = {candidate: statistics.quantiles(seconds, n=4) for candidate, seconds in times.items()}
    return [
        {
            **fields,
            "candidate": candidate,
            "median_us": 1e6 * q[1],
            "quartiles_us": [1e6 * value for value in q],
            "speedup": quartiles[baseline][1] / q[1],
        }
        for candidate, q in quartiles.items()
    ]


def bench_squares(device: torch.device, repeats: int, shapes: dict[str, tuple[int, int, int]]) -> list[dict[str, Any]]:
    """The symmetric product X Xᵀ alone against torch.bmm."""
    rows = []
    for name, shape in shapes.items():
        X = torch.randn(shape, device=device, dtype=torch.float16 if device.type == "cuda" else torch.float32)
        exact = X.double() @ X.double().mT
        error = ((gram(X).double() - exact).norm() / exact.norm()).item()
        if not error < 1e-3:
            sys.exit(f"X Xt {name}: relative error {error:.3g} against float64, not timed")
        runs = {"ours": lambda i, X=X: gram(X), "torch.bmm": lambda i, X=X: torch.bmm(X, X.mT)}
        modes = {"eager": runs}
        if device.type == "cuda":  # at these sizes an eager call is mostly the host's work
            graphs = {n: captured(lambda run=run: run(0)) for n, run in runs.items()}
            modes["graph"] = {n: (lambda i, replay=replay: replay()) for n, replay in graphs.items()}
        for mode, calls in modes.items():
            fields = {"group": f"X Xt {name}", "method": "gram", "mode": mode, "memory": "hot"}
            rows += _rows(fields, measure(calls, device, repeats), "torch.bmm")
    return rows


def bench_step(model: str, device: torch.device, repeats: int, device_flops: float) -> list[dict[str, Any]]:
    """The whole Muon step, momentum to updated weights: ours, the stacked compiled form, torch.optim.Muon's loop."""
    lr = 0.02
    net = Transformer(SIZES[model], vocab_size=64).to(device)
    banks = net.banks()
    for bank in banks:
        bank.parameter.grad = torch.randn_like(bank.parameter)
    ours = Muon([{"params": [b.parameter], "transposed": b.transposed} for b in banks], lr=lr)
    gradients = [p.weight.contiguous() for p in net.projections([b.parameter.grad for b in banks])]
    before = [p.weight.detach().clone() for p in net.projections()]

    def own_weights() -> list[torch.nn.Parameter]:
        weights = [torch.nn.Parameter(W.clone(memory_format=torch.contiguous_format)) for W in before]
        for W, gradient in zip(weights, gradients, strict=True):
            W.grad = gradient.clone()
        return weights

    schedule, margin = coefficient_schedule(COEFFICIENTS, STEPS), NORM_MARGIN[COEFFICIENTS]
    theirs = own_weights()
    stacked = StackedMuon(theirs, lr=lr, schedule=schedule, norm_margin=margin)
    loop = torch.optim.Muon(own_weights(), lr=lr, weight_decay=0.0)
    ours.step()
    stacked.step()
    for i, (old, p, W) in enumerate(zip(before, net.projections(), theirs, strict=True)):
        error = ((p.weight.detach() - W).norm() / (W - old).norm()).item()
        if not error < 0.05:
            sys.exit(f"whole step, matrix {i}: ours and the reference differ by {error:.3g}, not timed")
    runs = {"ours": ours.step, "reference": stacked.step, "torch.optim.Muon": loop.step}
    calls = {name: (lambda i, run=run: run()) for name, run in runs.items()}
    fields = {"group": f"{model} whole step", "method": "auto", "mode": "as used", "memory": "hot"}
    products, moved = step_cost([ours])
    light_us = 1e6 * (products / device_flops + moved / bytes_per_second(device, repeats))
    rows = _rows(fields, measure(calls, device, repeats), "reference")
    return [row | {"light_us": light_us, "light_share": light_us / row["median_us"]} for row in rows]


def bytes_per_second(device: torch.device, repeats: int) -> float:
    """This device's memory bandwidth by a copy, read and write counted."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    median = statistics.median(measure({"": lambda i: target.copy_(source)}, device, min(repeats, 20))[""])
    return 2 * 4 * source.numel() / median


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
    only: tuple[Literal["groups", "products", "step"], ...] = ("groups", "products", "step")
    """What to time: Newton-Schulz by group of matrices, the symmetric product alone, Muon's whole step."""


@exit_with_a_sentence
def main() -> int:
    arguments = tyro.cli(Arguments, description=__doc__)
    if arguments.predict:
        predict()
        return 0
    if arguments.repeats < 1:
        raise BadInput(f"--repeats {arguments.repeats}: must be at least 1")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    small = arguments.small or not cuda
    repeats = max(5, arguments.repeats if cuda else arguments.repeats // 10)
    rows: list[dict[str, Any]] = []
    print(f"{torch.cuda.get_device_name() if cuda else 'cpu'}, torch {torch.__version__}; losses are printed like wins")
    device_flops = cublas_flops(device, repeats)
    peers.report_absent()
    columns = f"{'group':22} {'candidate':19} {'mode':8} {'memory':6} {'median us':>10} {'quartiles':>19}"
    print(f"{columns} {'speedup':>8} {'dense TFLOP/s':>14} {'ceiling':>8} {'share':>6}")
    if "groups" in arguments.only:
        for name, shape in (SMALL_GROUPS if small else GROUPS).items():
            rows += _show(bench_group(name, shape, device, repeats, device_flops))
    if "products" in arguments.only:
        squares = {"8 x 128x128": (8, 128, 128)} if small else SQUARES | {"44 x 512x512": GROUPS["88m q, o"]}
        rows += _show(bench_squares(device, repeats, squares))
    if "step" in arguments.only:
        rows += _show(bench_step("nano" if small else "88m", device, repeats, device_flops))
    if arguments.json:
        described = {"device": torch.cuda.get_device_name() if cuda else "cpu", "date": time.strftime("%Y-%m-%d")}
        described |= {"command": " ".join(sys.argv), **identity.provenance(), "rows": rows}
        files.write_json(arguments.json, described)
    return 0


def _show(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for r in rows:
        spread = f"{r['quartiles_us'][0]:9.1f} {r['quartiles_us'][2]:9.1f}"
        row = f"{r['group']:22} {r['candidate']:19} {r['mode']:8} {r['memory']:6} {r['median_us']:10.1f} {spread}"
        row += f" {r['speedup']:7.2f}x"
        if "dense_tflops" in r:
            row += f" {r['dense_tflops']:14.2f} {r['ceiling_tflops']:8.1f} {r['share']:6.1%}"
        if "light_us" in r:
            row += f"   speed of light {r['light_us']:.1f} us, {r['light_share']:.1%} of it"
        print(row, flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
