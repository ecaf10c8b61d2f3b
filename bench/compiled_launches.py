"""Inside, every launch of this project's kernels is compiled for a GPU that need not exist, and executed on the CPU.

    with compiled_launches(89) as launches:
        gram(torch.randn(2, 96, 192).half())
    for launch in launches: print(launch.summary())

Tensors stay on the CPU. `ptx/` executes the code and its docstrings say what is checked; what a kernel forgets to write
is NaN. Used by `bench.compiled` and by the tests' mode PTX_CAPABILITY=89 (tests/compiled.py).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import ptx
from bench.cycles import RTX_4090
from kernels import configs
from kernels.configs import Row, Tile

CAPABILITIES = (80, 86, 89, 120)  # sm_90 takes wgmma, which ptx/ does not know
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@contextlib.contextmanager
def compiled_launches(
    capability: int,
    *,
    everywhere: bool = True,
    check: bool = True,
    rewrite: Callable[[str], str] | None = None,
) -> Iterator[list[ptx.Launch]]:
    """Gives the list that every launch is added to.

    `everywhere`: public functions take the kernels' path too, else only the launch_* functions do. `check=False` counts
    without looking for races. `rewrite` changes the PTX before it is executed: for tests of the checks.
    """
    launches: list[ptx.Launch] = []

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        options = {"capability": capability, "check": check, "rewrite": rewrite}
        launches.append(ptx.run(kernel, grid, *arguments, **options, **constants))

    new_empty = torch.Tensor.new_empty

    def poisoned(*arguments: Any, **options: Any) -> Tensor:
        fresh = new_empty(*arguments, **options)
        return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

    changes = {
        "launch": launch,
        "capability": lambda device: divmod(capability, 10),
        "l2_bytes": lambda device: RTX_4090.l2_capacity_bytes,
        "runs_triton": lambda x: everywhere and x.dtype in TRITON_DTYPES,
        "INTERPRETED": False,
    }
    with mock.patch.multiple(configs, **changes), mock.patch.object(torch.Tensor, "new_empty", poisoned):
        yield launches


@contextlib.contextmanager
def only_tile(capability: int, tile: Tile) -> Iterator[None]:
    """Every 16-bit product takes this tile, whatever its size; fp32 keeps its own."""
    own = configs.row(divmod(capability, 10))
    with mock.patch.dict(configs.TABLE, {divmod(capability, 10): Row(*[tile] * 5, *own[5:])}):
        yield


def faults_of(launches: list[ptx.Launch]) -> list[str]:
    """Everything that the checks found, in words."""
    return [f"{one.describe()}: {fault} ({count} times)" for one in launches for fault, count in one.faults.items()]
