"""Loads, stores, asynchronous copies, matrix loads and atomics of PTX, on the memories of a machine.

    execute = OPERATIONS["ld"](program, instruction); execute(machine, mask)

Every access is counted, then checked and made by the machine. Atomics run one thread after the other, and no race
between them and ordinary accesses is looked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .counters import sectors, wavefronts
from .formats import DTYPES, ITEMS, UNSIGNED, WARP, Array
from .operands import Mask, Source, as_list, pointer, sink, source
from .parser import Instruction, Program, access_of

if TYPE_CHECKING:
    from .decoder import Execute
    from .machine import Machine

COUNTERS = {"global": sectors, "shared": wavefronts}
ATOMICS = {
    "add": lambda old, v: old + v,
    "min": min,
    "max": max,
    "exch": lambda old, v: v,
    "and": lambda old, v: old & v,
    "or": lambda old, v: old | v,
    "xor": lambda old, v: old ^ v,
    "cas": lambda old, compare, v: v if old == compare else old,
}


def _load(program: Program, instruction: Instruction) -> Execute:
    access = access_of(instruction)
    size, kind = access.size, access.kind if access.kind != "bf16" else "b16"  # loads do not convert
    puts = [sink(program, register, kind) for register in as_list(instruction.operands[0])]
    unsigned, dtype = UNSIGNED[size // access.count], DTYPES[kind]
    if access.space == "param":
        name = instruction.operands[1][0]
        return lambda m, mask: puts[0](m, m.parameters[name].view(dtype), mask)
    where, counter = pointer(program, instruction.operands[1]), COUNTERS[access.space]

    def run(m: Machine, mask: Mask) -> None:
        addresses = where(m)
        m.count(counter, f"ld.{access.space}", instruction, addresses, mask, size)
        items = m.spread(m.load(access.space, addresses, size, mask, instruction), mask)
        if addresses.shape[1] == 1 and (mask is None or mask.shape[1] == 1):
            items = np.ascontiguousarray(items[:, :1])  # one value for all threads of a program
        parts = items.view(unsigned).reshape(*items.shape, access.count)
        for n, put in enumerate(puts):
            put(m, np.ascontiguousarray(parts[..., n]).view(dtype), mask)

    return run


def _store(program: Program, instruction: Instruction) -> Execute:
    access = access_of(instruction)
    size, where = access.size, pointer(program, instruction.operands[0])
    kind = f"b{8 * size // access.count}"
    get = [source(program, register, kind) for register in as_list(instruction.operands[1])]
    counter = COUNTERS[access.space]

    def run(m: Machine, mask: Mask) -> None:
        addresses = where(m)
        m.count(counter, f"st.{access.space}", instruction, addresses, mask, size)
        parts = [m.select(read(m), mask) for read in get]
        items = np.ascontiguousarray(np.stack(parts, axis=-1)).view(ITEMS[size])[:, 0] if access.count > 1 else parts[0]
        m.store(access.space, addresses, items, size, mask, instruction)

    return run


def _matrices(instruction: Instruction) -> tuple[int, bool]:
    """How many 8 x 8 matrices of 16-bit elements, and whether they are transposed."""
    words = instruction.words
    if "m8n8" not in words or "b16" not in words:
        raise instruction.unknown()
    return next(int(word[1:]) for word in words if word in ("x1", "x2", "x4")), "trans" in words


def _matrix_rows(m: Machine, instruction: Instruction, where: Source, count: int, mask: Mask) -> tuple[Array, Mask]:
    """Addresses and mask: thread t has row t % 8 of matrix t // 8; all threads of a warp must take part."""
    if mask is not None:
        by_warp = np.broadcast_to(mask, m.shape).reshape(m.programs, m.warps, WARP)
        if (by_warp.any(2) != by_warp.all(2)).any():
            m.fault("a part of a warp executes an .aligned instruction", instruction, "")
    addresses = where(m)
    if count < 4:
        has_row = m.special["%laneid"] < 8 * count
        mask = has_row if mask is None else has_row & mask
    m.count(wavefronts, instruction.name, instruction, addresses, mask, 16)
    return addresses, mask


def _load_matrices(program: Program, instruction: Instruction) -> Execute:
    count, transposed = _matrices(instruction)
    puts = [sink(program, register, "b32") for register in instruction.operands[0]]
    where = pointer(program, instruction.operands[1])

    def run(m: Machine, mask: Mask) -> None:
        addresses, with_row = _matrix_rows(m, instruction, where, count, mask)
        rows = m.spread(m.load("shared", addresses, 16, with_row, instruction), with_row)
        tiles = rows.view(np.uint16).reshape(m.programs, m.warps, 4, 8, 8)
        if transposed:
            tiles = np.ascontiguousarray(tiles.swapaxes(3, 4))
        words = tiles.view(np.uint32)
        for n, put in enumerate(puts):
            put(m, words[:, :, n].reshape(m.shape), mask)

    return run


def _store_matrices(program: Program, instruction: Instruction) -> Execute:
    count, transposed = _matrices(instruction)
    get = [source(program, register, "b32") for register in instruction.operands[1]]
    where = pointer(program, instruction.operands[0])

    def run(m: Machine, mask: Mask) -> None:
        addresses, with_row = _matrix_rows(m, instruction, where, count, mask)
        words = [np.broadcast_to(read(m), m.shape).reshape(m.programs, m.warps, WARP) for read in get]
        words += [words[0]] * (4 - count)  # rows that no thread has an address for
        tiles = np.ascontiguousarray(np.stack(words, axis=2)).view(np.uint16)
        tiles = tiles.reshape(m.programs, m.warps, 4, 8, 8)
        if transposed:
            tiles = tiles.swapaxes(3, 4)
        rows = np.ascontiguousarray(tiles).view(np.complex128).reshape(m.shape)
        m.store("shared", addresses, m.select(rows, with_row), 16, with_row, instruction)

    return run


def _copy(program: Program, instruction: Instruction) -> Execute:
    """cp.async and the groups that its copies are waited for in."""
    words, operands = instruction.words, instruction.operands
    if words[1] != "async" or {"bulk", "mbarrier"} & set(words):
        raise instruction.unknown()
    if "commit_group" in words:
        return lambda m, mask: m.commit_copies(mask)
    if "wait_group" in words:
        newest = int(operands[0], 0)
        return lambda m, mask: m.wait_for_copies(mask, newest)
    if "wait_all" in words:
        return lambda m, mask: (m.commit_copies(mask), m.wait_for_copies(mask, 0))
    return _copy_to_shared(program, instruction)


def _copy_to_shared(program: Program, instruction: Instruction) -> Execute:
    """cp.async with the size of its source, 0 or all: the rest of shared memory is filled with zeros."""
    operands = instruction.operands
    to, origin, size = pointer(program, operands[0]), pointer(program, operands[1]), int(operands[2], 0)
    source_bytes = source(program, operands[3], "s32") if len(operands) > 3 else None

    def run(m: Machine, mask: Mask) -> None:
        addresses, origins, reading = to(m), origin(m), mask
        m.count(wavefronts, "cp.async.shared", instruction, addresses, mask, size)
        if source_bytes is not None:
            wanted = source_bytes(m)
            if not np.isin(m.select(wanted, mask), (0, size)).all():
                raise instruction.unknown()
            reading = wanted != 0 if mask is None else (wanted != 0) & mask
            reading = None if reading.all() else reading
        items = np.zeros(m.shape, ITEMS[size])
        if reading is None or reading.any():
            m.count(sectors, "cp.async.global", instruction, origins, reading, size)
            items = m.spread(m.load("global", origins, size, reading, instruction), reading)
        m.start_copy(addresses, m.select(items, mask), size, mask, instruction)

    return run


def _atomic(program: Program, instruction: Instruction) -> Execute:
    """One thread after the other, in the order of their numbers."""
    access, returns = access_of(instruction), instruction.name == "atom"
    operation = next((ATOMICS[word] for word in instruction.words[1:] if word in ATOMICS), None)
    if operation is None or access.count > 1 or access.kind.removesuffix("x2") in ("f16", "bf16"):
        raise instruction.unknown()
    address, *values = instruction.operands[1:] if returns else instruction.operands
    where, get = pointer(program, address), [source(program, value, access.kind) for value in values]
    put = sink(program, instruction.operands[0], access.kind) if returns else None
    dtype, counter = DTYPES[access.kind], COUNTERS[access.space]

    def run(m: Machine, mask: Mask) -> None:
        addresses = where(m)
        m.count(counter, f"{instruction.name}.{access.space}", instruction, addresses, mask, access.size)
        memory, _, offsets = m.locate(access.space, addresses, mask, access.size, instruction)
        items, operands = memory.view(dtype), [m.select(read(m), mask) for read in get]
        old = np.empty(len(offsets), dtype)
        for n, index in enumerate(offsets // access.size):
            old[n] = items[index]
            items[index] = operation(old[n], *(value[n] for value in operands))
        if put:
            put(m, m.spread(old, mask), mask)

    return run


OPERATIONS = {
    "ld": _load,
    "st": _store,
    "ldmatrix": _load_matrices,
    "stmatrix": _store_matrices,
    "cp": _copy,
    "atom": _atomic,
    "red": _atomic,
}
