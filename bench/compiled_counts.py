"""`python -m bench.compiled --count`: which part of an RTX 4090 bounds each launch, by what its compiled code executes.

    report(89, tile=None, path=None)

Runs one matrix of each group of the 88M model, the passes around it and the kernels of the model, and prints cycles per
SM by part, with the assumptions of bench/cycles.py, and what `python -m bench.newton_schulz --predict` says. `issue`
leaves out address arithmetic, because ptxas folds most of it. Nothing is timed.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import ptx
from bench.compiled_launches import compiled_launches, only_tile
from bench.cycles import RTX_4090, Work
from bench.harness import NS_COEFFICIENTS, NS_STEPS, print_table, write_figures
from bench.newton_schulz import GROUPS, floor_us, tiled_us
from kernels import cross_entropy, muon, newton_schulz, relu2_mlp
from kernels.configs import Tile

FLOPS_OF_MMA = 2 * 16 * 8 * 16  # m16n8k16, of 16-bit numbers
SHARED = ("ld.shared", "st.shared", "ldmatrix", "stmatrix", "cp.async.shared")
READ, WRITTEN = ("ld.global", "cp.async.global"), ("st.global",)
FOLDED = ("integer", "mov")  # classes of instructions that ptxas mostly folds into others
COUNTED_GROUPS = tuple(name for name in GROUPS if name.startswith("88m") or "heads" in name)


@dataclass(frozen=True)
class Call:
    """Something that launches kernels: its name, and the bytes of DRAM of its launches, by kernel."""

    name: str
    run: Callable[[], object]
    dram_bytes: dict[str, float]


def work_of(launch: ptx.Launch, dram_bytes: float = 0.0) -> Work:
    """What an executed launch asked of each part."""
    sectors = launch.total(*READ).units + launch.total(*WRITTEN).units
    issued = sum(count for name, count in launch.instructions.items() if name not in FOLDED)
    half_summed = FLOPS_OF_MMA * launch.instructions["mma.f16"]
    flops = FLOPS_OF_MMA * launch.instructions["mma"] + half_summed
    return Work(flops, half_summed, launch.total(*SHARED).units, 32 * sectors, dram_bytes, issued)


def normal(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Normal numbers, scaled so that products stay near 1."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) / shape[-1] ** 0.5).to(dtype)


def calls() -> list[Call]:
    """One matrix of each group of the 88M model, the passes on its largest matrix, and the kernels of the model."""
    schedule = newton_schulz.coefficient_schedule(NS_COEFFICIENTS, NS_STEPS)
    found = []
    for name in COUNTED_GROUPS:
        X = normal(1, *GROUPS[name][1:])
        found.append(Call(name, lambda X=X: newton_schulz.iterate(X, schedule, "auto"), {}))
    W, update = normal(1, 2048, 512, dtype=torch.float32), normal(1, 2048, 512)
    state = muon.Momentum(torch.zeros_like(W), 0.95, True, torch.ones(()), torch.zeros(()))
    moved = {"momentum_kernel": 14.0 * W.numel(), "rescale_kernel": 4.0 * W.numel()}
    found.append(Call("pass 2048x512", lambda: muon.launch_normalize(W, 1.0, torch.float16, state), moved))
    scalars = torch.tensor(0.1), torch.ones(1), torch.zeros(())
    moved = {"update_kernel": 10.0 * W.numel()}
    found.append(Call("pass 2048x512", lambda: muon.launch_update(W, update, *scalars, 0.1), moved))
    x, up = normal(512, 512, dtype=torch.bfloat16), normal(2048, 512, dtype=torch.bfloat16)
    found.append(Call("512 tokens forward", lambda: relu2_mlp.launch_relu2(x, up, None), {}))
    h = normal(512, 2048, dtype=torch.bfloat16).abs()
    found.append(Call("512 tokens backward", lambda: relu2_mlp.launch_relu2(x, up, h), {}))
    logits = normal(8, 49_152, dtype=torch.bfloat16)
    moved = {"softmax_gradient_kernel": 3.0 * 2 * logits.numel()}
    run = lambda: cross_entropy.launch_softmax_gradient(logits, torch.arange(8))  # noqa: E731 (a value of Call)
    return [*found, Call("8 rows of 49152", run, moved)]


def rows_of(call: Call, launches: list[ptx.Launch]) -> list[dict[str, str]]:
    """A row for each different launch, with how often it is made."""
    different: dict[tuple, list[ptx.Launch]] = {}
    for launch in launches:
        different.setdefault(
            (launch.describe(), launch.instructions["mma"], launch.instructions["mma.f16"]), []
        ).append(launch)
    rows = []
    for same in different.values():
        launch = same[0]
        cycles = RTX_4090.cycles(work_of(launch, call.dram_bytes.get(launch.kernel, 0.0)))
        stored = launch.total(*WRITTEN)
        words = launch.describe().split(" grid ")[0].split()[1:]
        row = {"call": call.name, "launch": words[0].removesuffix("_kernel"), "configuration": " ".join(words[1:])}
        row |= {"times": str(len(same)), "programs": str(launch.programs)}
        row |= {part: f"{cycles.get(part, 0):.0f}" for part in ("tensor", "shared", "L2", "DRAM", "issue")}
        row |= {"sectors stored": f"{stored.units:,}", "needed": f"{stored.ideal_units / max(stored.units, 1):.0%}"}
        rows.append(row | {"bound": max(cycles, key=cycles.get)})
    return rows


def report(capability: int, tile: Tile | None, path: Path | None) -> None:
    """Print cycles per launch, then microseconds per group beside the predictions."""
    print(
        "COUNTED by executing PTX; nothing was timed. Cycles per SM of one matrix, spread evenly over a 4090's 128 SMs:"
    )
    print(
        "512 FLOP per clock and SM (fp16, fp32 sums; 1,024 with fp16 sums),"
        " L2 2,048 B per clock, 4 instructions per clock and SM at 2.52 GHz"
    )
    rows, counted = [], {}
    forced = only_tile(capability, tile) if tile else contextlib.nullcontext()
    with compiled_launches(capability, check=False) as launches, forced:
        for call in calls():
            launches.clear()
            call.run()
            rows += rows_of(call, launches)
            if call.name in GROUPS:
                seconds = sum(RTX_4090.seconds(work_of(launch)) for launch in launches)
                counted[call.name] = 1e6 * seconds * GROUPS[call.name][0], len(launches)
    print_table(rows)
    groups = [
        {
            "group": name,
            "launches": str(launch_count),
            "counted us": f"{us:.0f}",
            "whole tiles us (--predict)": f"{tiled_us(GROUPS[name]):.0f}",
            "floor us (--predict)": f"{floor_us(GROUPS[name]):.0f}",
        }
        for name, (us, launch_count) in counted.items()
    ]
    print("\nWhole groups: the busiest part of each launch, summed, without the launches themselves")
    print_table(groups)
    write_figures(path, {"launches": rows, "groups": groups})
