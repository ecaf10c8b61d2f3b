"""Instructions of PTX across the threads of a warp: shuffles, reductions, and products on the tensor cores.

    execute = OPERATIONS["mma"](program, instruction); execute(machine, mask)

Products of 16-bit numbers are exact in fp32, where they are summed; the order of a tensor core's sums is not public. An
fp16 addend takes in 8 products at a time and is rounded to nearest after them, as an A100 does (Fasi et al., "Numerical
behavior of NVIDIA tensor cores", 2021).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from .formats import WARP, WIDTHS, Array, bf16_values, tf32
from .operands import Mask, sink, source
from .parser import Instruction, Program

if TYPE_CHECKING:
    from .decoder import Execute
    from .machine import Machine

HALF_SUM = 8  # products between two roundings of an fp16 sum
REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum}
REDUCTIONS |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def _shuffle(program: Program, instruction: Instruction) -> Execute:
    """shfl.sync: each thread takes the value of another lane of its segment, or keeps its own."""
    mode, targets = instruction.words[2], instruction.operands[0].split("|")
    get, get_lane, get_clamp = (source(program, operand, "b32") for operand in instruction.operands[1:4])
    put = sink(program, targets[0], "b32")
    put_valid = sink(program, targets[1], "pred") if len(targets) > 1 else None

    def run(m: Machine, mask: Mask) -> None:
        value = np.broadcast_to(get(m), m.shape)
        lane, b, c = (x.astype(np.int64) for x in (m.special["%laneid"], get_lane(m) & 31, get_clamp(m)))
        segment = (c >> 8) & 31
        last, first = (lane & segment) | (c & 31 & ~segment), lane & segment
        other = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~segment)}[mode]
        valid = other >= last if mode == "up" else other <= last
        other = np.broadcast_to(np.where(valid, other, lane), m.shape)
        by_warp = (m.programs, m.warps, WARP)
        put(m, np.take_along_axis(value.reshape(by_warp), other.reshape(by_warp), axis=2).reshape(m.shape), mask)
        if put_valid:
            put_valid(m, np.broadcast_to(valid, m.shape), mask)

    return run


def _reduction(program: Program, instruction: Instruction) -> Execute:
    """redux.sync of integers over all lanes."""
    kind, function = instruction.words[-1], REDUCTIONS[instruction.words[2]]
    if kind not in ("s32", "u32", "b32"):
        raise instruction.unknown()
    get, put = source(program, instruction.operands[1], kind), sink(program, instruction.operands[0], kind)

    def run(m: Machine, mask: Mask) -> None:
        value = np.broadcast_to(get(m), m.shape).reshape(m.programs, m.warps, WARP)
        whole = function.reduce(value, axis=2, keepdims=True, dtype=value.dtype)
        put(m, np.broadcast_to(whole, value.shape).reshape(m.shape), mask)

    return run


def _matrix_product(program: Program, instruction: Instruction) -> Execute:
    """mma.sync: D (16, 8) = A (16, k) B (k, 8) + C of each warp.

    e elements fill a register. Thread 4 g + t has A[g, e t ..], A[g + 8, e t ..] and the same 4 e columns on;
    B[e t .., g] and the same 4 e rows on; C and D[g, 2 t ..], [g + 8, 2 t ..].
    """
    shape = next((word for word in instruction.words if re.fullmatch(r"m16n8k\d+", word)), None)
    d_kind, a_kind, b_kind, c_kind = instruction.words[-4:]
    in_half = d_kind == "f16"
    summed = a_kind == "f16" if in_half else d_kind == "f32" and a_kind in ("f16", "bf16", "tf32")
    if shape is None or d_kind != c_kind or a_kind != b_kind or not summed:
        raise instruction.unknown()
    per_register = 4 // WIDTHS[a_kind]
    halves = int(shape.removeprefix("m16n8k")) // (4 * per_register)
    results, a_names, b_names, addends = instruction.operands
    kind = "b32" if in_half else "f32"  # two fp16 numbers in a register
    get_c, put = [source(program, name, kind) for name in addends], [sink(program, name, kind) for name in results]

    def fragment(m: Machine, names: list[str], rows_of_eight: int) -> Array:
        """(programs x warps, rows, k) in fp32; computed once while its registers stay the same arrays."""
        registers = [m.registers[name] for name in names]
        key = tuple(names)
        known = m.fragments.get(key)
        if known and all(a is b for a, b in zip(known[0], registers, strict=True)):
            return known[1]
        values = _elements(np.stack([np.broadcast_to(r, m.shape) for r in registers]), a_kind)
        values = values.reshape(halves, rows_of_eight, m.programs * m.warps, 8, 4, per_register)
        matrix = np.ascontiguousarray(values.transpose(2, 1, 3, 0, 4, 5))
        matrix = matrix.reshape(-1, 8 * rows_of_eight, halves * 4 * per_register)
        m.fragments[key] = (registers, matrix)
        return matrix

    def run(m: Machine, mask: Mask) -> None:
        A, B = fragment(m, a_names, 2), fragment(m, b_names, 1)
        D = (A @ B.swapaxes(1, 2)).reshape(m.programs, m.warps, 2, 8, 4, 2)
        for n, (c, write) in enumerate(zip(get_c, put, strict=True)):
            write(m, D[:, :, n >> 1, :, :, n & 1].reshape(m.shape) + c(m), mask)

    def run_in_half(m: Machine, mask: Mask) -> None:
        A, B = fragment(m, a_names, 2), fragment(m, b_names, 1)
        D = _elements(np.stack([np.broadcast_to(c(m), m.shape) for c in get_c]), "f16")
        D = D.reshape(2, m.programs * m.warps, 8, 8).swapaxes(0, 1).reshape(-1, 16, 8)
        for k in range(0, A.shape[2], HALF_SUM):
            D = D + A[:, :, k : k + HALF_SUM] @ B[:, :, k : k + HALF_SUM].swapaxes(1, 2)
            D = D.astype(np.float16).astype(np.float32)
        rows = D.astype(np.float16).reshape(-1, 2, 8, 8)
        for n, write in enumerate(put):
            write(m, np.ascontiguousarray(rows[:, n]).view(np.uint32).reshape(m.shape), mask)

    return run_in_half if in_half else run


def _elements(registers: Array, kind: str) -> Array:
    """The fp32 values of the elements that 32-bit registers hold."""
    if kind == "tf32":
        return tf32(registers.view(np.float32))
    if kind == "bf16":
        return bf16_values(registers.view(np.uint16))
    return registers.view(np.float16).astype(np.float32)


OPERATIONS = {"shfl": _shuffle, "redux": _reduction, "mma": _matrix_product}
