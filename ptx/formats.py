"""Number formats of PTX as NumPy types, and the roundings that NumPy does not have.

    DTYPES["f32"], WIDTHS["bf16"], bf16_bits(values), tf32(values), flushed(values)

A register holds unsigned integers of its width; an instruction views them as its own type. bf16 values are computed in
fp32, which holds each of them, and are rounded when a register takes them.
"""

import numpy as np

Array = np.ndarray
WARP = 32
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # by bytes
ITEMS = UNSIGNED | {16: np.complex128}  # one item per size of access; complex128 stands for 16 bytes that are moved
DTYPES = {
    **{f"{letter}{8 * size}": dtype for letter in "ub" for size, dtype in UNSIGNED.items()},
    **{"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64, "pred": np.bool_},
    **{"f16": np.float16, "bf16": np.float32, "f32": np.float32, "f64": np.float64, "tf32": np.float32},
}
WIDTHS = {name: np.dtype(dtype).itemsize for name, dtype in DTYPES.items()} | {"bf16": 2}  # in bytes
FLOATS = ("f16", "bf16", "f32", "f64")
SMALLEST_NORMAL = np.float32(2.0**-126)


class PtxError(Exception):
    """An access that a kernel must not make, or an instruction that this interpreter does not know."""


def is_float(kind: str) -> bool:
    """Whether a type, packed or not, is a floating-point one."""
    return kind.removesuffix("x2") in FLOATS


def bf16_bits(values: Array) -> Array:
    """fp32 to bf16, to nearest even; NaN becomes 0x7fff."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def bf16_values(bits: Array) -> Array:
    """The fp32 values of bf16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def tf32(values: Array) -> Array:
    """fp32 with a mantissa of 10 bits, as the tensor cores read it."""
    return (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def flushed(values: Array) -> Array:
    """Subnormal fp32 numbers become zero."""
    return np.where(np.abs(values) < SMALLEST_NORMAL, np.copysign(np.float32(0), values), values)


def same_bits(a: Array, b: Array) -> Array:
    """Where two arrays of items hold the same bits; NaN equals itself."""
    a, b = (np.ascontiguousarray(np.broadcast_to(x, a.shape)) for x in (a, b))
    if a.dtype.itemsize == 16:
        return (a.view(np.uint64).reshape(-1, 2) == b.view(np.uint64).reshape(-1, 2)).all(1)
    unsigned = UNSIGNED[a.dtype.itemsize]
    return a.view(unsigned) == b.view(unsigned)
