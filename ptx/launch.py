"""Compiles a Triton kernel as its launch would, for a GPU that need not exist, and executes the PTX on CPU tensors.

    launch = run(kernel, grid, *tensors_and_numbers, capability=89, BLOCK=256, num_warps=4)
    text = compiled(kernel, grid, arguments, constants, 89).asm["ptx"]; execute(text, {"x_ptr": x}, Launch(...))

Triton specialises on the real arguments. A small launch takes some 10 ms, a 512 x 512 x 512 product 0.3 s; the first
compilation takes a second and is cached. Results are in the tensors, as after a launch on a GPU.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

from .counters import Launch
from .decoder import Code, decode
from .formats import DTYPES, WARP, Array, PtxError
from .machine import Machine
from .memory import Region
from .parser import parse

THREADS_AT_ONCE = 32_768  # more programs together are no faster, and their arrays leave the cache


class _OfflineDriver:
    """What Triton asks of a GPU when it compiles. The device's number is the capability: each has its own cache."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, WARP)


@contextlib.contextmanager
def _pretended_gpu(capability: int) -> Iterator[None]:
    drivers = triton.runtime.driver
    before = drivers._active  # not `active`: that looks for a GPU, and raises where there is none
    drivers.set_active(_OfflineDriver(capability))
    try:
        yield
    finally:
        drivers._active = before


def compiled(kernel: Any, grid: tuple[int, ...], arguments: tuple, constants: dict[str, Any], capability: int) -> Any:
    """Triton's compiled kernel, specialised on these arguments; `.asm["ptx"]` is its text."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise PtxError("TRITON_INTERPRET=1 makes Python functions of kernels, so there is nothing to compile")
    with _pretended_gpu(capability):
        return kernel.run(*arguments, grid=grid, warmup=True, **constants)


def run(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    capability: int,
    check: bool = True,
    rewrite: Callable[[str], str] | None = None,
    **constants: Any,
) -> Launch:
    """Compile a @triton.jit function for this capability and execute it on CPU tensors.

    `check=False` counts without looking for races, in half the time. `rewrite` changes the PTX before it is executed.
    Raises PtxError for an access outside the tensors' elements, a misaligned one, or an instruction that is not
    covered; other faults are in the result.
    """
    made = compiled(kernel, grid, arguments, constants, capability)
    named = {name: value for name, value in constants.items() if name in kernel.signature.parameters}
    bound = kernel.signature.bind(*arguments, **named)
    bound.apply_defaults()
    passed = {name: value for name, value in bound.arguments.items() if made.src.signature[name] != "constexpr"}
    launch = Launch(kernel.fn.__name__, grid, capability, made.metadata.shared, constants)
    text = made.asm["ptx"]
    return execute(rewrite(text) if rewrite else text, passed, launch, check)


def execute(text: str, arguments: dict[str, Any], launch: Launch, check: bool = True) -> Launch:
    """Execute PTX on tensors and numbers in the order of its parameters; fills in `launch` and returns it.

    Triton adds two parameters, pointers to scratch memory that the kernels covered here do not use.
    """
    started = time.perf_counter()
    code = _decoded(text)
    values = [*arguments.values(), 0, 0]
    if len(arguments) > len(code.program.parameters) or len(code.program.parameters) > len(values):
        raise PtxError(f"{launch.kernel} has {len(code.program.parameters)} parameters, not {len(arguments)}")
    regions = _regions(arguments, code.granules["global"])
    pairs = zip(code.program.parameters, values, strict=False)
    parameters = {name: _parameter(value, DTYPES[kind]) for (name, kind), value in pairs}
    machine = Machine(code, launch, regions, parameters, check)
    x, y, z = (*launch.grid, 1, 1)[:3]
    at_once = max(1, THREADS_AT_ONCE // code.program.threads)
    for first in range(0, x * y * z, at_once):
        machine.run(first, min(at_once, x * y * z - first), (x, y, z))
    launch.seconds = time.perf_counter() - started
    return launch


def _regions(arguments: dict[str, Any], granule: int) -> list[Region]:
    """The storages of the tensors, by address."""
    regions: dict[int, Region] = {}
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        if value.device.type != "cpu":
            raise PtxError(f"{name} is on {value.device}; tensors must be on the CPU")
        start = value.untyped_storage().data_ptr()
        if start not in regions:
            regions[start] = Region(value)
        regions[start].add(name, value)
    for region in regions.values():
        region.seal(granule)
    return [regions[start] for start in sorted(regions)]


@functools.lru_cache(maxsize=32)  # a program is some 10,000 objects
def _decoded(text: str) -> Code:
    return decode(parse(text))


def _parameter(value: Any, dtype: type) -> Array:
    if isinstance(value, torch.Tensor):
        value = value.data_ptr()
    if np.dtype(dtype).kind != "f":
        value = int(value) & ((1 << 8 * np.dtype(dtype).itemsize) - 1)
    return np.array([[value]], dtype)
