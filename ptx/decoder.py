"""A program decoded once: each instruction becomes a function that a machine executes for the threads of a mask.

    code = decode(parse(text)); for execute in code.blocks[number]: execute(machine)

Arithmetic, moves and control are here; what touches memory or other lanes is in the two files that it imports.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import memory_instructions, warp_instructions
from .arithmetic import arithmetic
from .counters import class_of
from .formats import UNSIGNED, WIDTHS, flushed
from .operands import Mask, sink, source
from .parser import Instruction, Program, smallest_accesses

if TYPE_CHECKING:
    from .machine import Machine

Execute = Callable[["Machine", Mask], None]
RETURNED = 1 << 30  # the block of a thread that returned
WITHOUT_EFFECT = ("membar", "fence", "prefetch")  # on one memory, seen by all threads at once


@dataclass(frozen=True)
class Code:
    """The blocks of a program as functions of a machine, and what each block counts."""

    program: Program
    blocks: list[list[Callable[[Machine], None]]]
    counts: list[Counter[str]]
    granules: dict[str, int]


def decode(program: Program) -> Code:
    """Raises PtxError for an instruction that is not covered, executed or not."""
    blocks = [[_guarded(program, i, number) for i in block] for number, block in enumerate(program.blocks)]
    counts = [Counter(map(class_of, block)) for block in program.blocks]
    return Code(program, blocks, counts, smallest_accesses(program))


def _guarded(program: Program, instruction: Instruction, block: int) -> Callable[[Machine], None]:
    """The instruction for the threads that are here and whose guard holds."""
    execute = _decoded(program, instruction, block)
    if instruction.guard is None:
        return lambda m: execute(m, m.mask)
    guard, negated = source(program, instruction.guard, "pred"), instruction.negated

    def run(m: Machine) -> None:
        active = m.active(~guard(m) if negated else guard(m))
        if active is None or active.any():
            execute(m, active)

    return run


def _decoded(program: Program, instruction: Instruction, block: int) -> Execute:
    name = instruction.name
    if name in CONTROL:
        return CONTROL[name](program, instruction, block)
    for operations in (memory_instructions.OPERATIONS, warp_instructions.OPERATIONS):
        if name in operations:
            return operations[name](program, instruction)
    if name in WITHOUT_EFFECT:
        return lambda m, mask: None
    return _move(program, instruction) if name == "mov" else _elementwise(program, instruction)


def _elementwise(program: Program, instruction: Instruction) -> Execute:
    function, kinds, result_kind = arithmetic(instruction)
    operands = instruction.operands
    get = [source(program, operand, kind) for operand, kind in zip(operands[1:], kinds, strict=True)]
    put = sink(program, operands[0].split("|")[0], result_kind)
    flushes = "ftz" in instruction.words and "f32" in instruction.words

    def run(m: Machine, mask: Mask) -> None:
        values = [read(m) for read in get]
        if flushes:
            values = [flushed(value) if value.dtype == np.float32 else value for value in values]
        result = function(*values)
        put(m, flushed(result) if flushes and result.dtype == np.float32 else result, mask)

    return run


def _move(program: Program, instruction: Instruction) -> Execute:
    """mov: of one register, of several into a wider one, or of one into several."""
    (target, origin), kind = instruction.operands, instruction.words[1]
    if isinstance(origin, list):
        return _packing(program, target, origin, kind)
    get = source(program, origin, kind)
    if not isinstance(target, list):
        put = sink(program, target, kind)
        return lambda m, mask: put(m, get(m), mask)
    width = WIDTHS[kind] // len(target)
    puts = [sink(program, register, f"b{8 * width}") for register in target]

    def unpack(m: Machine, mask: Mask) -> None:
        value = get(m)
        for n, put in enumerate(puts):
            put(m, (value >> value.dtype.type(8 * width * n)).astype(UNSIGNED[width]), mask)

    return unpack


def _packing(program: Program, target: str, origins: list[str], kind: str) -> Execute:
    whole = UNSIGNED[WIDTHS[kind]]
    bits = 8 * WIDTHS[kind] // len(origins)
    get = [source(program, register, f"b{bits}") for register in origins]
    put = sink(program, target, kind)
    return lambda m, mask: put(m, sum(read(m).astype(whole) << whole(bits * n) for n, read in enumerate(get)), mask)


def _branch(program: Program, instruction: Instruction, block: int) -> Execute:
    target, after = np.int64(program.labels[instruction.operands[0]]), np.int64(block + 1)

    def run(m: Machine, mask: Mask) -> None:
        if instruction.guard is None or mask is None:
            m.jump(m.mask, target)
        else:
            m.jump(m.mask, np.where(mask, target, after))

    return run


def _return(program: Program, instruction: Instruction, block: int) -> Execute:
    end, after = np.int64(RETURNED), np.int64(block + 1)
    return lambda m, mask: m.jump(m.mask, end if mask is None else np.where(mask, end, after))


def _barrier(program: Program, instruction: Instruction, block: int) -> Execute:
    """The barrier of all threads of a program; a warp's own needs nothing, its lanes are together."""
    words = instruction.words
    if words[1] == "warp":
        return lambda m, mask: None
    if set(words) - {"bar", "barrier", "cta", "sync", "aligned"} or instruction.operands != ("0",):
        raise instruction.unknown()  # barriers of some of the threads, of clusters, with a reduction
    after = np.int64(block + 1)

    def run(m: Machine, mask: Mask) -> None:
        m.jump(m.mask, after)
        m.wait_at_barrier(mask)

    return run


CONTROL = {"bra": _branch, "ret": _return, "exit": _return, "bar": _barrier, "barrier": _barrier}
