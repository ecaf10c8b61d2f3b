"""Integer instructions of PTX that NumPy lacks: shifts beyond the width, bit fields, byte permutations, high products.

    shifted(values, counts, left=True), insert_bits(a, b, start, length), permuted_bytes(a, b, selector)

Each follows its definition in the PTX ISA manual, also where NumPy or C leave the result open.
"""

import numpy as np

from .formats import Array, PtxError


def truncated_division(a: Array, b: Array) -> Array:
    """Towards zero; by zero -1, which the manual leaves open and the hardware happens to give."""
    safe = np.where(b == 0, 1, b).astype(b.dtype)
    quotient = np.abs(a) // np.abs(safe) * np.where((a < 0) != (safe < 0), -1, 1) if a.dtype.kind == "i" else a // safe
    return np.where(b == 0, np.array(-1).astype(a.dtype), quotient.astype(a.dtype))


def remainder(a: Array, b: Array) -> Array:
    """a - b times the truncated quotient."""
    return a - truncated_division(a, b) * b


def shifted(values: Array, counts: Array, left: bool) -> Array:
    """A shift whose count may exceed the width: then zero, or the sign of a signed number shifted right."""
    width = 8 * values.dtype.itemsize
    inside = np.minimum(counts, width - 1).astype(values.dtype)
    shifted_values = np.left_shift(values, inside) if left else np.right_shift(values, inside)
    if values.dtype.kind == "i" and not left:
        return shifted_values
    return np.where(counts >= width, values.dtype.type(0), shifted_values)


def bit_field(values: Array, start: Array, length: Array) -> Array:
    """bfe: `length` bits from `start` on, sign-extended for signed types."""
    if values.dtype.itemsize != 4:
        raise PtxError("bfe of 64 bits is not known to this interpreter")
    start, length = (x.astype(np.int64) & 255 for x in (start, length))
    field = np.right_shift(values.astype(np.int64), np.minimum(start, 63))
    kept = np.minimum(length, 32)
    masked = field & ((np.int64(1) << kept) - 1)
    if values.dtype.kind == "i":
        sign = np.where(kept > 0, np.int64(1) << np.maximum(kept - 1, 0), 0)
        masked = np.where(start + length > 32, field, (masked ^ sign) - sign)
    return np.where(length == 0, 0, masked).astype(values.dtype)


def insert_bits(a: Array, b: Array, start: Array, length: Array) -> Array:
    """bfi: the low `length` bits of a over those of b from `start` on."""
    start, length = (x.astype(np.uint64) & np.uint64(255) for x in (start, length))
    mask = ((np.uint64(1) << np.minimum(length, 32)) - np.uint64(1)) << np.minimum(start, 63)
    moved = a.astype(np.uint64) << np.minimum(start, 63)
    return ((b.astype(np.uint64) & ~mask) | (moved & mask)).astype(b.dtype)


def permuted_bytes(a: Array, b: Array, selector: Array) -> Array:
    """prmt in its default mode: byte n of the result is the one of b:a that nibble n names, or eight times its sign."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros((1, 1), np.uint32)
    for n in range(4):
        nibble = (selector >> np.uint32(4 * n)) & np.uint32(15)
        byte = ((both >> ((nibble & np.uint32(7)) * np.uint32(8)).astype(np.uint64)) & np.uint64(255)).astype(np.uint32)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        result = result | (np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * n))
    return result


def three_way_logic(a: Array, b: Array, c: Array, table: Array) -> Array:
    """lop3: bit (a, b, c) of the table, for each bit of the three operands."""
    result, table = np.zeros_like(a), int(table.flat[0])
    for n in range(8):
        if table >> n & 1:
            result = result | ((a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c))
    return result


def funnel_shift(a: Array, b: Array, counts: Array, left: bool, clamp: bool) -> Array:
    """shf: 32 of the 64 bits of b:a; a count beyond 32 is 32 or wraps."""
    counts = (np.minimum(counts, 32) if clamp else counts & 31).astype(np.uint64)
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    return ((both << counts >> np.uint64(32)) if left else both >> counts).astype(np.uint32)


def high_product(a: Array, b: Array) -> Array:
    """mul.hi: the upper half of the product of full width."""
    if a.dtype.itemsize == 4:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return (a.astype(wide) * b.astype(wide) >> wide(32)).astype(a.dtype)
    return (a.astype(object) * b.astype(object) >> 64).astype(a.dtype)
