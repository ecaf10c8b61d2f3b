"""How long a launch keeps each part of a GPU busy, by counts: of tiles here, of executed code in compiled_counts.

    for launch in tiled_launches((44, 512, 512), "standard"): RTX_4090.cycles(launch.work)

Assumptions, none measured here: an RTX 4090 at 2.52 GHz does 512 FLOP per clock and SM in fp16 with fp32 sums (165.2
TFLOP/s on its data sheet) and 1,024 with fp16 sums, moves 2,048 B per clock from L2 to all SMs, and serves one
wavefront of 128 B of shared memory and 4 instructions per clock and SM. Work is spread evenly over 128 SMs; the busiest
part bounds a launch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench.harness import NS_COEFFICIENTS, NS_STEPS
from engine.speed import DEVICES
from kernels import configs
from kernels.newton_schulz import coefficient_schedule, iterate

HALF_BYTES = 2


class Work(NamedTuple):
    """What a launch asks of each part, all SMs together; DRAM only where operands do not stay in L2."""

    flops: float = 0.0
    half_summed_flops: float = 0.0  # those of `flops` whose sums are fp16
    shared_wavefronts: float = 0.0
    l2_bytes: float = 0.0
    dram_bytes: float = 0.0
    instructions: float = 0.0


@dataclass(frozen=True)
class Rates:
    """A GPU's parts, per clock: FLOP, wavefronts and instructions of one SM, bytes of the whole chip."""

    sms: int
    clock_hz: float
    flops: float
    l2_bytes: float
    dram_bytes: float
    l2_capacity_bytes: int
    shared_wavefronts: float = 1.0
    instructions: float = 4.0

    def cycles(self, work: Work) -> dict[str, float]:
        """Cycles by part; those that are not asked for anything are left out."""
        found = {
            "tensor": (work.flops - work.half_summed_flops / 2) / self.flops / self.sms,
            "shared": work.shared_wavefronts / self.shared_wavefronts / self.sms,
            "L2": work.l2_bytes / self.l2_bytes,
            "DRAM": work.dram_bytes / self.dram_bytes,
            "issue": work.instructions / self.instructions / self.sms,
        }
        return {part: cycles for part, cycles in found.items() if cycles}

    def seconds(self, work: Work) -> float:
        """The busiest part's."""
        return max(self.cycles(work).values()) / self.clock_hz


CLOCK_HZ = 2.52e9
RTX_4090 = Rates(
    sms=128,
    clock_hz=CLOCK_HZ,
    flops=512,
    l2_bytes=2048,
    dram_bytes=DEVICES["NVIDIA GeForce RTX 4090"].bytes_per_second / CLOCK_HZ,
    l2_capacity_bytes=72 * 2**20,
)


class TiledLaunch(NamedTuple):
    """One launch of a product, and what its tiles cost."""

    kernel: str
    work: Work


def tiled_launches(shape: Sequence[int], method: str, capability: int = 89) -> list[TiledLaunch]:
    """The launches of one orthogonalisation of a (batch, rows, cols) bank in fp16, none of them executed."""
    found: list[TiledLaunch] = []

    def note(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        found.append(TiledLaunch(kernel.fn.__name__, tile_work(grid[0], values)))

    pretended = {
        "launch": note,
        "capability": lambda device: divmod(capability, 10),
        "l2_bytes": lambda device: RTX_4090.l2_capacity_bytes,
        "runs_triton": lambda x: True,
    }
    with mock.patch.multiple(configs, **pretended):
        X = torch.empty(tuple(shape), dtype=torch.float16, device="meta")
        iterate(X, coefficient_schedule(NS_COEFFICIENTS, NS_STEPS), method)
    return found


def tile_work(programs: int, values: dict[str, Any]) -> Work:
    """FLOPs of whole tiles, and bytes between L2 and the SMs: the operands of every step of K, addends, and stores. A
    symmetric tile is stored twice, on the diagonal once; a split one there leaves out a quarter of its product."""
    if "SEGMENTS" in values:
        return small_work(programs, values)
    m, n, k = values["BLOCK_M"], values.get("BLOCK_N", values["BLOCK_M"]), values["K"]
    symmetric = "BLOCK_N" not in values
    steps = -(-k // values["BLOCK_K"]) * values["BLOCK_K"]
    addends = values["HAS_C"] + values["HAS_D"] if symmetric else 1
    tiles = -(-values["M"] // m)
    stores = 2 * tiles / (tiles + 1) if symmetric else 1
    computed = 1 - 0.25 * 2 / (tiles + 1) if values.get("SPLIT") else 1
    moved = (m + n) * steps + (addends * computed + stores) * m * n
    flops = programs * computed * 2.0 * m * n * steps
    return Work(flops, flops * values.get("HALF_SUMS", False), l2_bytes=programs * moved * HALF_BYTES)


def small_work(programs: int, values: dict[str, Any]) -> Work:
    """The same of kernels/small.py: each program does every iteration of one matrix, all of it in whole squares."""
    m, n = values["BLOCK_M"], -(-values["N"] // values["BLOCK_N"]) * values["BLOCK_N"]
    segments = values["SEGMENTS"]
    squares = 4 * len(values["A"]) - 3 * segments
    flops = segments * 4.0 * m * m * n + squares * 2.0 * m**3
    return Work(flops=programs * flops, l2_bytes=programs * segments * 3.0 * m * n * HALF_BYTES)
