"""Reports registers, shared memory, spills and occupancy of every kernel, for GPUs that this machine need not have.

    python -m bench.static [--capability 89] [--json FILE]

Compiles each kernel with each tile that kernels/configs.py can choose, aligned and masked, with Triton's own compiler,
and reads its code. Exits 1 on a spill, on missing tensor-core or asynchronous-copy instructions, or on a
configuration that does not fit. About a second per variant and core, once; Triton caches the results.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from bench.harness import NS_COEFFICIENTS, NS_STEPS, print_table
from kernels import configs, cross_entropy, grouped_matmul, matmul_add, muon, newton_schulz, relu2_mlp, small, symmetric
from kernels.configs import Tile


@dataclass(frozen=True)
class Limits:
    """Resources of one streaming multiprocessor (CUDA C++ Programming Guide, table of compute capabilities)."""

    block_shared_bytes: int
    sm_shared_bytes: int
    sm_threads: int
    sm_blocks: int


LIMITS = {
    80: Limits(166_912, 167_936, 2048, 32),
    86: Limits(101_376, 102_400, 1536, 16),
    89: Limits(101_376, 102_400, 1536, 24),
    90: Limits(232_448, 233_472, 2048, 32),
    120: Limits(101_376, 102_400, 1536, 24),
}
SM_REGISTERS, REGISTER_UNIT, RESERVED_SHARED_BYTES = 65_536, 256, 1024
TRITON_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
INTEGERS = ("M", "N", "K", "ROWS", "COLS", "ROWS_PADDED", "COLS_PADDED", "blocks", "sums", "V")
UNALIGNED = ("blocks", "sums")  # other sizes and strides are multiples of 16 in the sizes of this project
POINTERS = {"partial_ptr": "*fp32", "sums_ptr": "*fp32", "losses_ptr": "*fp32", "targets_ptr": "*i64"}
POINTERS["offsets_ptr"] = "*i32"
POINTERS |= dict.fromkeys(("lr_ptr", "scale_ptr", "grad_scale_ptr", "found_inf_ptr"), "*fp32")


@dataclass(frozen=True)
class Variant:
    """One kernel as it is launched: its constants, and which strides are 1."""

    kernel: str
    capability: int
    dtype: str
    constants: tuple[tuple[str, Any], ...]
    unit_strides: tuple[str, ...]
    num_warps: int
    num_stages: int

    @property
    def config(self) -> str:
        blocks = "x".join(str(v) for k, v in self.constants if k.startswith("BLOCK_"))
        masked = " masked" if dict(self.constants).get("MASKED") else ""
        half_sums = " half sums" if dict(self.constants).get("HALF_SUMS") else ""
        return f"{self.dtype} {blocks} w{self.num_warps} s{self.num_stages}{masked}{half_sums}"


@dataclass(frozen=True)
class Result:
    """A row of the table and of the JSON file."""

    kernel: str
    config: str
    capability: int
    registers: int
    shared_bytes: int
    spill_bytes: int
    ctas_per_sm: int
    tensor_core_instructions: int
    asynchronous_copies: int

    def faults(self) -> list[str]:
        """Everything wrong with this variant, in words."""
        is_matmul = self.kernel.split()[0] in MATMULS
        return [
            words
            for wrong, words in (
                (self.spill_bytes > 0, f"spills {self.spill_bytes} B"),
                (self.shared_bytes > LIMITS[self.capability].block_shared_bytes, "does not fit shared memory"),
                (is_matmul and "fp32" not in self.config and not self.tensor_core_instructions, "no tensor cores"),
                (is_matmul and not self.asynchronous_copies, "no asynchronous copies"),
            )
            if wrong
        ]


KERNELS = {
    "symmetric_matmul": symmetric.symmetric_matmul_kernel,
    "matmul_add": matmul_add.matmul_add_kernel,
    "small": small.small_kernel,
    "momentum": muon.momentum_kernel,
    "rescale": muon.rescale_kernel,
    "update": muon.update_kernel,
    "relu2_mlp": relu2_mlp.relu2_kernel,
    "grouped_matmul": grouped_matmul.grouped_matmul_kernel,
    "grouped_outer": grouped_matmul.grouped_outer_kernel,
    "softmax_gradient": cross_entropy.softmax_gradient_kernel,
}

MATMULS = ("small", "symmetric_matmul", "matmul_add", "relu2_mlp", "grouped_matmul", "grouped_outer")


def variants(capability: int) -> list[Variant]:
    """Every kernel with every tile that the table can choose for this architecture, without repetition."""
    found: dict[Variant, None] = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for m in (128, 144, 256, 272, 512, 528):  # aligned, and with an edge of 16
            found |= dict.fromkeys(_symmetric_variants(capability, dtype, m))
            found |= dict.fromkeys(_matmul_variants(capability, dtype, m))
    found |= dict.fromkeys(_small_variants(capability))
    tile = Tile(16, 256, 0, 4, 1)
    block = {"BLOCK_R": tile.block_m, "BLOCK_C": tile.block_n}
    momentum = {"HAS_MOMENTUM": True, "NESTEROV": True}
    for name, constants, unit in (
        ("momentum", momentum | block, ("stride_gc", "stride_mc")),
        ("rescale", {"CHUNK": muon.PARTIALS_AT_ONCE} | block, ()),
        ("update", {"CAUTIOUS": False} | block, ("stride_wc", "stride_oc")),
        ("update", {"CAUTIOUS": True} | block, ("stride_wc", "stride_oc")),
    ):
        found[_variant(name, capability, torch.float32, constants, unit, tile)] = None
    tile = Tile(1, cross_entropy.BLOCK_V, 0, cross_entropy.SOFTMAX_WARPS, 1)
    for dtype in (torch.bfloat16, torch.float32):
        found[_variant("softmax_gradient", capability, dtype, {"BLOCK_V": tile.block_n}, (), tile)] = None
    return list(found)


def _symmetric_variants(capability: int, dtype: torch.dtype, m: int) -> list[Variant]:
    tile, masked = configs.symmetric_tile(divmod(capability, 10), dtype, m, m)
    made = []
    for name, unit, has_c, has_d in (
        ("gram", ("stride_ak", "stride_bk"), False, False),
        ("tall gram", ("stride_am", "stride_bm"), False, False),
        ("product", ("stride_ak", "stride_bm"), True, False),
        ("product, two addends", ("stride_ak", "stride_bm"), True, True),
    ):
        if has_d and dtype != torch.float16:  # inside Newton-Schulz only
            continue
        constants = {"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "HAS_C": has_c}
        constants |= {"HAS_D": has_d, "MASKED": masked, "WIDEN": False, "SPLIT": configs.splits(tile, masked)}
        made.append(_variant(f"symmetric_matmul {name}", capability, dtype, constants, unit, tile))
    return made


def _small_variants(capability: int) -> list[Variant]:
    a, b, c = zip(*newton_schulz.coefficient_schedule(NS_COEFFICIENTS, NS_STEPS), strict=True)
    made = []
    for tile, tall, masked in itertools.product(configs.SMALL, (False, True), (False, True)):
        restarts = newton_schulz.restarts_of(tile.block_m)
        constants = {"A": a, "B": b, "C": c, "SEGMENTS": 1 + sum(i < NS_STEPS for i in restarts)}
        constants |= {"FIRST": restarts.start, "EVERY": restarts.step, "TALL": tall, "BLOCK_M": tile.block_m}
        constants |= {"BLOCK_N": tile.block_n, "MASKED": masked}
        made.append(_variant("small tall" if tall else "small", capability, torch.float16, constants, (), tile))
    return made


def _matmul_variants(capability: int, dtype: torch.dtype, m: int) -> list[Variant]:
    """The kernels whose tiles are not square."""
    pair = divmod(capability, 10)
    full = configs.full_tile(pair, dtype, m, 4 * m, m)
    unit = ("stride_ak", "stride_bk", "stride_hn")
    calls = [(f"relu2_mlp {name}", {"BACKWARD": name == "backward"}, unit, full) for name in ("forward", "backward")]
    if dtype == torch.float16:
        half_sums = {"HALF_SUMS": configs.sums_in_half(pair, dtype, full[0], m)}
        calls.append(("matmul_add", half_sums, ("stride_ak", "stride_bn", "stride_cn"), full))
    else:
        rows = configs.full_tile(pair, dtype, grouped_matmul.ANY_LENGTH, m, m)
        outer = configs.tail_tile(pair, dtype, 4 * m, m)
        calls += [
            ("grouped_matmul", {"GROUPS": 8}, ("stride_ak", "stride_wk"), rows),  # by up.mT, and dx of down
            ("grouped_matmul rows", {"GROUPS": 8}, ("stride_ak", "stride_wn"), rows),
            ("grouped_outer", {}, ("stride_am", "stride_yn"), outer),
        ]
    made = []
    for name, constants, unit, (tile, masked) in calls:
        blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
        constants = constants | blocks | {"MASKED": masked, "WIDEN": False}
        made.append(_variant(name, capability, dtype, constants, unit, tile))
    return made


def _variant(name: str, capability: int, dtype: torch.dtype, constants: dict, unit: tuple, tile: Tile) -> Variant:
    words = (name, capability, TRITON_TYPES[dtype], tuple(constants.items()), unit)
    return Variant(*words, tile.num_warps, tile.num_stages)


def compile_variant(variant: Variant) -> Result:
    """Compile, and read registers and stack from the machine code, tensor-core and copy instructions from the PTX."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = KERNELS[variant.kernel.split()[0]]
    constants = dict(variant.constants) | dict.fromkeys(variant.unit_strides, 1)
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        half = name in ("x_ptr", "o_ptr") and variant.dtype == "fp32"
        pointer = "*fp16" if half else POINTERS.get(name, f"*{variant.dtype}")
        is_integer = name in INTEGERS or name.startswith("stride")
        signature[name] = pointer if name.endswith("_ptr") else "i32" if is_integer else "fp32"
        if name.endswith("_ptr") or (
            is_integer and name not in UNALIGNED
        ):  # the cast pass pads rows to multiples of 16
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", variant.capability, 32), options=options)
    registers, stack = registers_and_stack(compiled.asm["cubin"])
    return Result(
        variant.kernel,
        variant.config,
        variant.capability,
        registers,
        compiled.metadata.shared,
        stack,
        ctas_per_sm(variant.capability, registers, compiled.metadata.shared, variant.num_warps),
        len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", compiled.asm["ptx"])),
        len(re.findall(r"\bcp\.async\.(?:ca|cg|bulk)\b", compiled.asm["ptx"])),
    )


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of each thread; the stack holds what is spilled."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))


def ctas_per_sm(capability: int, registers: int, shared_bytes: int, num_warps: int) -> int:
    """How many programs one multiprocessor holds at once."""
    limits = LIMITS[capability]
    warp_registers = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    return min(
        SM_REGISTERS // (warp_registers * num_warps),
        limits.sm_shared_bytes // (shared_bytes + RESERVED_SHARED_BYTES),
        limits.sm_threads // (32 * num_warps),
        limits.sm_blocks,
    )


def compile_all(work: list[Variant]) -> list[Result]:
    """On all cores."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_variant, work, chunksize=4))


@dataclass(frozen=True)
class Arguments:
    """Compile every kernel for GPUs that this machine need not have, and print the resources it takes."""

    capability: tuple[int, ...] = tuple(LIMITS)
    """Architectures: 80, 86, 89, 90, 120."""
    json: Path | None = None
    """Write the rows here too."""


def main() -> int:
    arguments = tyro.cli(Arguments, description=__doc__)
    results = compile_all([variant for capability in arguments.capability for variant in variants(capability)])
    print_table([row_of(r) for r in results])
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n", encoding="utf-8")
    faulty = [r for r in results if r.faults()]
    print(f"{len(results)} variants, {len(faulty)} with faults")
    return int(bool(faulty))


def row_of(r: Result) -> dict[str, str]:
    """A line of the printed table."""
    row = {"sm": str(r.capability), "kernel": r.kernel, "config": r.config, "registers": str(r.registers)}
    row |= {"shared B": f"{r.shared_bytes:,}", "spill B": str(r.spill_bytes), "CTAs/SM": str(r.ctas_per_sm)}
    return row | {"faults": "; ".join(r.faults())}


if __name__ == "__main__":
    sys.exit(main())
