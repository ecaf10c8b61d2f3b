"""Times Newton-Schulz and Muon's step against what others would run on this device, or predicts them for two GPUs.

    python -m bench.newton_schulz [--json FILE] [--small]      python -m bench.newton_schulz --predict

Inputs rotate through more memory than the L2 cache ("cold") or stay ("hot"); on CUDA every candidate runs eagerly and
as a CUDA graph. Medians and quartiles.
Reference: the same coefficients and steps, bf16, batched by shape, torch.baddbmm form, torch.compile's default mode.
Ideal: the same dense products alone by torch.bmm, epilogues free, which nobody ships. Ceiling: this device's measured
cuBLAS rate times what the half products save; the last column is the share of it that was reached.
"""

import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from bench import machine, peers
from bench.baseline import StackedMuon, reference
from bench.cycles import RTX_4090, tiled_launches
from bench.harness import (
    NS_COEFFICIENTS,
    NS_STEPS,
    JsonFlag,
    fault,
    interleaved,
    polynomials,
    print_table,
    quartiles,
    relative_error,
    require,
    this_device,
    write_figures,
)
from engine.cli import AT_LEAST_1, check_limits, exit_with_a_sentence
from engine.speed import DEVICES
from engine.step import prepare_torch
from kernels import configs
from kernels.muon import normalize_reference
from kernels.newton_schulz import NORM_MARGIN, RESTARTS, coefficient_schedule, half_product_cost, iterate, method_of
from kernels.symmetric import gram
from model import SIZES, Transformer
from optim import MUON_BYTES, Muon, step_cost

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
SQUARES = {f"32 x {m}x{m}": (32, m, m) for m in (256, 512, 1024)} | {"44 x 512x512": (44, 512, 512)}
SMALL_GROUPS = {"nano q, o": (8, 128, 128), "nano up, down": (8, 512, 128)}
SMALL_SQUARES = {"8 x 128x128": (8, 128, 128)}
PREDICTED = {"RTX 4090": DEVICES["NVIDIA GeForce RTX 4090"], "H200": DEVICES["NVIDIA H200"]}
LAUNCH_SECONDS = 1.5e-6  # of one kernel inside a CUDA graph, typical
ALLOWED, PEER_ALLOWED = 0.02, 0.05  # relative error of ours in fp16 and of others' bf16

Shape = tuple[int, int, int]


def dense_flops(shape: Shape, steps: int = NS_STEPS) -> float:
    """What the same iterations cost with full products: 4 m² n + 2 m³ each."""
    batch, m, n = shape[0], min(shape[1:]), max(shape[1:])
    return batch * steps * (4.0 * m * m * n + 2.0 * m**3)


def floor_us(shape: Shape, gpu: str = "RTX 4090") -> float:
    """The larger of arithmetic and memory time of one orthogonalisation, launches not included."""
    flops, moved, _ = half_product_cost(shape, method_of(shape), NS_STEPS)
    return 1e6 * max(flops / PREDICTED[gpu].bf16_flops, moved / PREDICTED[gpu].bytes_per_second)


def tiled_us(shape: Shape) -> float:
    """The same on a 4090 by the tiles that our kernels compute: the busier of tensor cores and L2 in each launch."""
    return 1e6 * sum(RTX_4090.seconds(launch.work) for launch in tiled_launches(shape, method_of(shape)))


def predict() -> None:
    """Least times by counted FLOPs, bytes, tiles and launches: floors, not forecasts."""
    print("PREDICTION from counted FLOPs, bytes and launches; nothing was timed. floor = max(FLOP, byte) + launches;")
    print(
        "tiles = whole tiles at 512 FLOP per clock and SM (fp16 sums: 1,024) or 2,048 B per clock from L2, the slower,"
    )
    print("+ launches: below the floor where fp16 sums help, or operands stay in L2 that the floor reads from memory")
    rows = []
    for name, shape in GROUPS.items():
        method = method_of(shape)
        flops, moved, launches = half_product_cost(shape, method, NS_STEPS)
        row = {
            "group": name,
            "method": method,
            "GFLOP": f"{flops / 1e9:.1f}",
            "dense": f"{dense_flops(shape) / 1e9:.1f}",
        }
        row |= {"MB": f"{moved / 1e6:.0f}", "launches": str(launches)}
        for gpu in PREDICTED:
            row[f"{gpu} us"] = f"{floor_us(shape, gpu) + 1e6 * launches * LAUNCH_SECONDS:.0f}"
        if configs.HAS_TRITON:
            row["RTX 4090 tiles us"] = f"{tiled_us(shape) + 1e6 * launches * LAUNCH_SECONDS:.0f}"
        rows.append(row)
    print_table(rows)
    groups = [shape for name, shape in GROUPS.items() if name.startswith("88m")]
    flops = sum(half_product_cost(g, method_of(g), NS_STEPS)[0] for g in groups)
    parameters = sum(b * m * n for b, m, n in groups)
    for gpu, device in PREDICTED.items():
        light = flops / device.bf16_flops + MUON_BYTES * parameters / device.bytes_per_second
        print(f"whole 88m step, {gpu}: {1e3 * light:.2f} ms at the speed of light ({MUON_BYTES} B per parameter)")
    if configs.HAS_TRITON:
        tiled = 1e-6 * sum(map(tiled_us, groups)) + MUON_BYTES * parameters / PREDICTED["RTX 4090"].bytes_per_second
        print(f"whole 88m step, RTX 4090: {1e3 * tiled:.2f} ms by whole tiles")


def ideal(X: Tensor, method: str) -> Tensor:
    """The dense products of one orthogonalisation and nothing else."""
    R = torch.bmm(X, X.mT)
    if method == "standard":
        for _ in range(NS_STEPS):
            torch.bmm(R, torch.bmm(X, X.mT))
            out = torch.bmm(R, X)
        return out
    segments = 1 + sum(i < NS_STEPS for i in RESTARTS)
    for _ in range(4 * NS_STEPS - 3 * segments):
        torch.bmm(R, R)
    for _ in range(segments):
        R = torch.bmm(X, X.mT)
        out = torch.bmm(R, X)
    return out


def cublas_flops(device: torch.device, repeats: int) -> float:
    """FLOP/s of this device's own matmul at Newton-Schulz's precision: the best of one large and two batched shapes."""
    dtype, cuda = (torch.float16, True) if device.type == "cuda" else (torch.float32, False)
    shapes = [(1, 8192, 8192), (44, 512, 512), (44, 2048, 2048)] if cuda else [(1, 1024, 1024), (8, 128, 128)]
    best = 0.0
    for shape in shapes:
        A = torch.randn(shape, device=device, dtype=dtype)
        seconds = interleaved({"": lambda i, A=A: torch.bmm(A, A)}, device, repeats)[""]
        rate = 2 * shape[0] * shape[1] ** 3 / statistics.median(seconds)
        print(f"cuBLAS or CPU matmul, {shape[0]} x {shape[1]}x{shape[2]} {dtype}: {rate / 1e12:.2f} TFLOP/s")
        best = max(best, rate)
    return best


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
    name: str, shape: Shape, device: torch.device, repeats: int, device_flops: float
) -> list[dict[str, Any]]:
    """Rows of one shape group: every candidate, eager and captured, cold and hot."""
    cuda = device.type == "cuda"
    method = method_of(shape)
    bytes_each = 2 * shape[0] * shape[1] * shape[2]
    copies = min(16, max(1, -(-3 * configs.l2_bytes(device) // bytes_each)) if cuda else 3)
    runs = candidates_of(name, [torch.randn(shape, device=device) for _ in range(copies)], method)
    ceiling = device_flops * dense_flops(shape) / half_product_cost(shape, method, NS_STEPS)[0]
    rows = []
    for memory in ("cold", "hot"):
        pick = (lambda i: i % copies) if memory == "cold" else (lambda i: 0)
        calls = {n: lambda i, run=run, pick=pick: run(pick(i)) for n, run in runs.items()}
        timed = {"eager": interleaved(calls, device, repeats)}
        if cuda:
            graphs = {n: g for n, run in runs.items() if (g := _graphs(n, run, copies))}
            calls = {n: lambda i, g=g, pick=pick: g[pick(i)]() for n, g in graphs.items()}
            timed["graph"] = interleaved(calls, device, repeats)
        for mode, times in timed.items():
            for row in _rows({"group": name, "method": method, "mode": mode, "memory": memory}, times, "reference"):
                reached = dense_flops(shape) / row["median_us"] * 1e6
                row |= {"dense_tflops": reached / 1e12, "ceiling_tflops": ceiling / 1e12, "share": reached / ceiling}
                rows.append(row)
    return rows


def candidates_of(name: str, matrices: list[Tensor], method: str) -> dict[str, Callable[[int], Any]]:
    """What is compared, each called with the number of its input; SystemExit where ours or the reference is wrong."""
    device, schedule = matrices[0].device, coefficient_schedule(NS_COEFFICIENTS, NS_STEPS)
    ours_dtype, theirs_dtype = (torch.float16, torch.bfloat16) if device.type == "cuda" else (torch.float32,) * 2
    inputs = [normalize_reference(X, 1.0) for X in matrices]
    ours = [(X / NORM_MARGIN[NS_COEFFICIENTS]).to(ours_dtype) for X in inputs]
    wide = [(X if X.shape[1] <= X.shape[2] else X.mT.contiguous()).to(theirs_dtype) for X in ours]
    torch._dynamo.reset()  # it counts specialisations per function, and gives up after 8
    compiled = torch.compile(reference, dynamic=False)
    runs: dict[str, Callable[[int], Any]] = {
        "ours": lambda i: iterate(ours[i], schedule, "auto"),
        "reference": lambda i: compiled(wide[i], schedule),
        "ideal": lambda i: ideal(wide[i], method),
    }
    require(f"{name}, ours", runs["ours"](0)[:2], polynomials(ours[0][:2]), ALLOWED)
    require(f"{name}, reference", runs["reference"](0)[:2], polynomials(wide[0][:2]), PEER_ALLOWED)
    for peer, run in peers.installed(schedule, device).items():
        if wrong := fault(run(inputs[0])[:2], polynomials(inputs[0][:2]), PEER_ALLOWED):
            print(f"{name}, {peer} {wrong}")
        else:
            runs[peer] = lambda i, run=run: run(inputs[i])
    return runs


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
    spread = {candidate: quartiles(seconds) for candidate, seconds in times.items()}
    return [
        {
            **fields,
            "candidate": candidate,
            "median_us": 1e6 * q[1],
            "quartiles_us": [1e6 * value for value in q],
            "speedup": spread[baseline][1] / q[1],
        }
        for candidate, q in spread.items()
    ]


def bench_squares(device: torch.device, repeats: int, shapes: dict[str, Shape]) -> list[dict[str, Any]]:
    """The symmetric product X Xᵀ alone against torch.bmm, on a CPU made symmetric."""
    rows = []
    for name, shape in shapes.items():
        X = torch.randn(shape, device=device, dtype=torch.float16 if device.type == "cuda" else torch.float32)
        require(f"X Xt {name}", gram(X), X.double() @ X.double().mT, allowed=1e-3)
        peer = "torch.bmm" if device.type == "cuda" else "torch.bmm, made symmetric"  # on a CPU ours is that
        runs = {"ours": lambda i, X=X: gram(X), peer: lambda i, X=X: _bmm(X, symmetric=X.device.type == "cpu")}
        modes = {"eager": runs}
        if device.type == "cuda":  # at these sizes an eager call is mostly the host's work
            graphs = {n: captured(lambda run=run: run(0)) for n, run in runs.items()}
            modes["graph"] = {n: (lambda i, replay=replay: replay()) for n, replay in graphs.items()}
        for mode, calls in modes.items():
            fields = {"group": f"X Xt {name}", "method": "gram", "mode": mode, "memory": "hot"}
            rows += _rows(fields, interleaved(calls, device, repeats), peer)
    return rows


def _bmm(X: Tensor, symmetric: bool) -> Tensor:
    """X Xᵀ; its rounding is not symmetric to the bit unless that is asked for, as `gram` gives it."""
    product = torch.bmm(X, X.mT)
    return (product + product.mT).mul_(0.5) if symmetric else product


@dataclass
class MuonStep:
    """A whole Muon step: the optimizer, its matrices (out, in), and what gives them gradients."""

    optimizer: torch.optim.Optimizer
    weights: list[Tensor]
    give_gradients: Callable[[], None]
    ours: bool = True
    """With our coefficients; others have the quintic ones."""

    def run(self) -> None:
        self.give_gradients()
        self.optimizer.step()

    def changes(self) -> list[Tensor]:
        """What the next step changes of each matrix, in float64."""
        before = [W.detach().double() for W in self.weights]
        self.run()
        return [W.detach().double() - old for old, W in zip(before, self.weights, strict=True)]

    def error(self, changes: Sequence[Tensor], gradients: Sequence[Tensor]) -> float:
        """The largest relative error of a first step's directions against the polynomials in float64."""
        name = NS_COEFFICIENTS if self.ours else "quintic"
        exact = [-polynomials(G.double() / G.double().norm() / NORM_MARGIN[name], name) for G in gradients]
        pairs = zip(changes, exact, strict=True)
        return max(relative_error(found / found.norm(), right / right.norm()) for found, right in pairs)


def muon_steps(net: Transformer, lr: float) -> dict[str, MuonStep]:
    """Ours on the model's banks, the stacked compiled form and others' Muons on copies of its matrices."""
    banks = net.banks()
    gradients = [p.weight.contiguous() for p in net.projections([b.parameter.grad for b in banks])]
    ours = Muon([{"params": [b.parameter], "transposed": b.transposed} for b in banks], lr=lr)
    steps = {"ours": MuonStep(ours, [p.weight for p in net.projections()], lambda: None)}  # its gradients stay

    def copied(build: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], ours: bool) -> MuonStep:
        weights = [torch.nn.Parameter(p.weight.clone(memory_format=torch.contiguous_format)) for p in net.projections()]

        def give_gradients() -> None:  # some packages free them
            for W, G in zip(weights, gradients, strict=True):
                W.grad = G

        return MuonStep(build(weights), weights, give_gradients, ours)

    schedule, margin = coefficient_schedule(NS_COEFFICIENTS, NS_STEPS), NORM_MARGIN[NS_COEFFICIENTS]
    stacked = functools.partial(StackedMuon, lr=lr, schedule=schedule, norm_margin=margin)
    steps["reference"] = copied(stacked, ours=True)
    for name in peers.muons_installed():
        steps[name] = copied(functools.partial(peers.MUONS[name], lr=lr), ours=False)
    return steps


def bench_step(model: str, device: torch.device, repeats: int, device_flops: float) -> list[dict[str, Any]]:
    """The whole Muon step, momentum to updated weights: ours and every other that is installed."""
    net = Transformer(SIZES[model], vocab_size=64).to(device)
    for bank in net.banks():
        bank.parameter.grad = torch.randn_like(bank.parameter)
    gradients = [p.weight.clone() for p in net.projections([b.parameter.grad for b in net.banks()])]
    steps, changes = muon_steps(net, lr=0.02), {}
    for name, step in list(steps.items()):
        try:
            changes[name] = step.changes()
        except Exception as error:  # another project's step may fail in any way; the comparison continues without it
            if step.ours:
                raise
            print(f"{name}: installed but not usable here ({type(error).__name__}: {error})")
            del steps[name]
    for i, (mine, theirs) in enumerate(zip(changes["ours"], changes["reference"], strict=True)):
        require(f"whole step, matrix {i}: ours", mine, theirs, PEER_ALLOWED, "the reference")
    errors = {name: step.error(changes[name], gradients) for name, step in steps.items()}
    for name in ("ours", "reference"):
        if not errors[name] <= PEER_ALLOWED:
            sys.exit(f"whole step: {name} differs from float64 by {errors[name]:.2g}, not timed")
    fields = {"group": f"{model} whole step", "method": "auto", "mode": "as used", "memory": "hot"}
    products, moved = step_cost([steps["ours"].optimizer])
    light_us = 1e6 * (products / device_flops + moved / bytes_per_second(device, repeats))
    calls = {name: (lambda i, step=step: step.run()) for name, step in steps.items()}
    rows = _rows(fields, interleaved(calls, device, repeats), "reference")
    return [
        row | {"light_us": light_us, "light_share": light_us / row["median_us"], "error": errors[row["candidate"]]}
        for row in rows
    ]


def bytes_per_second(device: torch.device, repeats: int) -> float:
    """This device's memory bandwidth by a copy, read and write counted."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    seconds = interleaved({"": lambda i: target.copy_(source)}, device, min(repeats, 20))[""]
    return 2 * 4 * source.numel() / statistics.median(seconds)


@dataclass(frozen=True)
class Arguments(JsonFlag):
    """Time Newton-Schulz here, or predict it for a 4090 and an H200."""

    predict: bool = False
    """Print the counted roofline and stop."""
    repeats: Annotated[int, AT_LEAST_1] = 100
    """Timed rounds of each comparison (a CPU gets a tenth)."""
    small: bool = False
    """Only the nano model's shapes; the default on a CPU."""
    model: Literal["nano", "88m"] | None = None
    """Whose matrices the whole step has (default: 88m; nano with --small and on a CPU)."""
    only: tuple[Literal["groups", "products", "step"], ...] = ("groups", "products", "step")
    """What to time: Newton-Schulz by group of matrices, the symmetric product alone, Muon's whole step."""


@exit_with_a_sentence
def main() -> int:
    a = tyro.cli(Arguments, description=__doc__)
    if a.predict:
        predict()
        return 0
    check_limits(a)
    prepare_torch()  # products as train.py has them
    device = this_device()
    small = a.small or device.type == "cpu"
    repeats = max(5, a.repeats if device.type == "cuda" else a.repeats // 10)
    rows: list[dict[str, Any]] = []
    print(f"{machine.device_name()}, torch {torch.__version__}; losses are printed like wins")
    device_flops = cublas_flops(device, repeats)
    peers.report_absent()
    if "groups" in a.only:
        for name, shape in (SMALL_GROUPS if small else GROUPS).items():
            rows += _show(bench_group(name, shape, device, repeats, device_flops))
    if "products" in a.only:
        rows += _show(bench_squares(device, repeats, SMALL_SQUARES if small else SQUARES))
    if "step" in a.only:
        rows += _show(bench_step(a.model or ("nano" if small else "88m"), device, repeats, device_flops))
    write_figures(a.json, {"rows": rows})
    return 0


def _show(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    shown = []
    for r in rows:
        row = {key: r[key] for key in ("group", "candidate", "mode", "memory")}
        low, median, high = r["quartiles_us"]
        row |= {
            "median us": f"{median:.1f}",
            "low": f"{low:.1f}",
            "high": f"{high:.1f}",
            "speedup": f"{r['speedup']:.2f}x",
        }
        if "share" in r:
            row |= {"dense TFLOP/s": f"{r['dense_tflops']:.2f}", "ceiling": f"{r['ceiling_tflops']:.1f}"}
            row["share"] = f"{r['share']:.1%}"
        if "error" in r:
            row["error"] = f"{r['error']:.1e}"
        if "light_us" in r:
            row |= {"speed of light us": f"{r['light_us']:.1f}", "share of it": f"{r['light_share']:.1%}"}
        shown.append(row)
    print_table(shown)
    return rows


if __name__ == "__main__":
    sys.exit(main())
