"""Executes every kernel as compiled code on the CPU, with every tile, and checks results and accesses; or counts.

    python -m bench.compiled [--capability 80 86 89 120] [--quick]        python -m bench.compiled --count

Compiles for GPUs that this machine need not have and runs the PTX in `ptx/`: bounds, alignment, races, copies in
flight, barriers, values nobody wrote; results against float64. By default for 89 and 120: for the same tile, the code
for 80 and 86 differs from 89's in its header alone. About 8 minutes each of one core; --quick, of which `make test` has
89 and part of 120, a minute. Exit code 1 where something is wrong. ptxas, which makes machine code of PTX, is not
checked.
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from tqdm import tqdm

from bench import compiled_counts
from bench.compiled_cases import Outcome, groups, run_group
from bench.compiled_launches import CAPABILITIES
from bench.harness import JsonFlag, print_table, write_figures
from engine.cli import BadInput, exit_with_a_sentence, one_of
from kernels.configs import HAS_TRITON, INTERPRETED, Tile


@dataclass(frozen=True)
class Arguments(JsonFlag):
    """Execute every kernel as compiled code on the CPU."""

    capability: Annotated[tuple[int, ...], tyro.conf.arg(metavar="[{80,86,89,120} ...]")] = ()
    """Architectures to compile for; by default 89 and 120, with --count 89."""
    quick: bool = False
    """Only what is part of `make test`: each architecture's own tiles at three sizes."""
    count: bool = False
    """Print cycles by unit of a 4090 for each launch at the sizes of the 88M model, and stop."""
    tile: tuple[int, int, int, int, int] | None = None
    """With --count: take this tile for every 16-bit product: BLOCK_M BLOCK_N BLOCK_K warps stages."""


def row_of(outcome: Outcome) -> dict[str, str]:
    """A line of the printed table."""
    row = {"sm": str(outcome.capability), "kernel": outcome.group.name, "tile": outcome.group.config}
    row |= {"checks": str(outcome.checks), "launches": str(outcome.launches)}
    row |= {"M instructions": f"{outcome.instructions / 1e6:.1f}", "wrong": str(len(outcome.wrong))}
    return row | {"s": f"{outcome.seconds:.0f}"}


def run_all(capabilities: tuple[int, ...], quick: bool) -> list[Outcome]:
    """All groups, one process per core, with a progress bar in a terminal."""
    work = [(group, capability, quick) for capability in capabilities for group in groups(capability, quick)]
    with ProcessPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        outcomes = pool.map(run_group, *zip(*work, strict=True))
        return list(tqdm(outcomes, total=len(work), unit="group", disable=None, leave=False))


@exit_with_a_sentence
def main() -> int:
    a = tyro.cli(Arguments, description=__doc__)
    allowed = one_of(tuple(map(str, CAPABILITIES)))
    for capability in a.capability:
        if not allowed.holds(str(capability)):
            raise BadInput(f"--capability {capability}: {allowed.sentence}")
    if INTERPRETED or not HAS_TRITON:
        raise BadInput("this compiles kernels: install triton, and leave TRITON_INTERPRET unset")
    if a.tile and not a.count:
        raise BadInput("--tile: goes with --count")
    if a.count:
        if len(a.capability) > 1:
            raise BadInput("--count: takes one --capability")
        compiled_counts.report((*a.capability, 89)[0], Tile(*a.tile) if a.tile else None, a.json)
        return 0
    outcomes = run_all(a.capability or (89, 120), a.quick)
    print_table([row_of(outcome) for outcome in outcomes])
    for outcome in outcomes:
        for sentence in outcome.wrong:
            print(f"WRONG sm_{outcome.capability} {outcome.group.name} {outcome.group.config}: {sentence}")
    checks, launches, wrong = (
        sum(numbers) for numbers in zip(*((o.checks, o.launches, len(o.wrong)) for o in outcomes), strict=True)
    )
    print(f"{checks} checks, {launches} launches, {wrong} wrong")
    write_figures(a.json, {"rows": [row_of(o) | {"said": o.wrong} for o in outcomes]})
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
