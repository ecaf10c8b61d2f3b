"""Executes on the CPU the PTX that Triton compiles a kernel to: checks its memory accesses, counts its work.

    launch = ptx.run(kernel, grid, *tensors_and_numbers, capability=89, BLOCK=256)      launch.faults, launch.summary()

Covers sm_80 to sm_120 where Triton emits mma.sync, ldmatrix, stmatrix and cp.async. Not covered, each refused by name:
wgmma, TMA and tcgen05. Not checked: ptxas, which makes machine code of PTX. See docs/kernels.md.
"""

from .counters import Launch, Traffic
from .formats import PtxError
from .launch import compiled, execute, run

__all__ = ["Launch", "PtxError", "Traffic", "compiled", "execute", "run"]
