"""Operands of PTX instructions as functions of a machine: values that are read, registers that are written, addresses.

    read = source(program, "%r3", "f32"); write = sink(program, "%r4", "f16x2"); where = pointer(program, ("%rd1", 16))

Arrays broadcast to (programs, threads): what is the same for all threads is computed once. Packed types (f16x2) have an
axis of 2 at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .formats import DTYPES, UNSIGNED, WIDTHS, Array, PtxError, bf16_bits, bf16_values
from .parser import Program

if TYPE_CHECKING:
    from .machine import Machine

Mask = Array | None  # the threads that take part; None: all
Source = Callable[["Machine"], Array]
Sink = Callable[["Machine", Array, Mask], None]
SHARED_MEMORY = "global_smem"  # Triton's name for the first byte of it
SPECIAL = ("%laneid", "%warpid")  # and those with a dot, like %tid.x


def source(program: Program, operand: str, kind: str) -> Source:
    """Reads a register or a constant as `kind`."""
    if kind.endswith("x2"):
        return _packed_source(program, operand, kind.removesuffix("x2"))
    if not operand.startswith("%"):
        constant = _constant(operand, kind)
        return lambda m: constant
    dtype, width = DTYPES[kind], WIDTHS[kind]
    if "." in operand or operand in SPECIAL:
        return lambda m: m.special[operand].astype(dtype)
    if kind == "pred":
        return lambda m: m.registers[operand]
    if kind == "bf16":
        return lambda m: bf16_values(m.registers[operand])
    if np.dtype(program.register_type(operand)).itemsize == width:
        return lambda m: m.registers[operand].view(dtype)
    return lambda m: m.registers[operand].astype(UNSIGNED[width]).view(dtype)


def _constant(operand: str, kind: str) -> Array:
    width = WIDTHS[kind]
    if operand == SHARED_MEMORY:
        bits = np.zeros((1, 1), UNSIGNED[width])
    elif operand[:2] in ("0f", "0F"):
        bits = np.array([[int(operand[2:], 16)]], np.uint32)
    elif operand[:2] in ("0d", "0D"):
        bits = np.array([[int(operand[2:], 16)]], np.uint64)
    else:
        try:
            number = int(operand.removesuffix("U"), 0)
        except ValueError:
            raise PtxError(f"operand {operand} is not known to this interpreter") from None
        if kind == "pred":
            return np.array([[bool(number)]])
        bits = np.array([[number & ((1 << 8 * width) - 1)]], UNSIGNED[width])
    return bf16_values(bits) if kind == "bf16" else bits.view(DTYPES[kind])


def _packed_source(program: Program, operand: str, kind: str) -> Source:
    width = WIDTHS[kind]
    whole = source(program, operand, f"b{16 * width}")

    def read(m: Machine) -> Array:
        parts = np.ascontiguousarray(whole(m))
        parts = parts.view(UNSIGNED[width]).reshape(*parts.shape, 2)
        return bf16_values(parts) if kind == "bf16" else parts.view(DTYPES[kind])

    return read


def sink(program: Program, operand: str, kind: str) -> Sink:
    """Puts a value of `kind` into a register, for the threads of a mask."""
    if operand == "_":
        return lambda m, value, mask: None
    own = program.register_type(operand)
    size = np.dtype(own).itemsize

    def write(m: Machine, value: Array, mask: Mask) -> None:
        if kind == "bf16":
            value = bf16_bits(value)
        elif kind == "bf16x2":
            value = np.ascontiguousarray(bf16_bits(value)).view(np.uint32)[..., 0]
        elif kind.endswith("x2"):
            value = np.ascontiguousarray(value).view(own)[..., 0]
        if value.dtype != own:
            value = value.view(own) if value.dtype.itemsize == size else value.astype(own)
        m.registers[operand] = value if mask is None else np.where(mask, value, m.registers[operand])

    return write


def pointer(program: Program, address: tuple[str, int]) -> Source:
    """Byte addresses of [base + offset]; shared memory begins at 0."""
    base, offset = address
    if not base.startswith("%"):
        constant = np.array([[offset + (0 if base == SHARED_MEMORY else int(base, 0))]], np.int64)
        return lambda m: constant
    signed = np.int64 if np.dtype(program.register_type(base)).itemsize == 8 else np.int32
    return lambda m: m.registers[base].view(signed).astype(np.int64) + offset


def as_list(operand: str | list[str]) -> list[str]:
    """The registers of an operand with or without braces."""
    return operand if isinstance(operand, list) else [operand]
