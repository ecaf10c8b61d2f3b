"""Which function of arrays an arithmetic instruction of PTX is, and of which types its operands and its result are.

    function, operand_kinds, result_kind = arithmetic(instruction)

Sums and products are rounded once, in the instruction's own type. Approximate functions (ex2, rsqrt, ...) are NumPy's,
which are more exact than the hardware's; a fused multiply-add of fp32 is rounded twice in rare cases.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import bits
from .formats import DTYPES, Array, is_float, tf32
from .parser import Instruction


class Arithmetic(NamedTuple):
    """A function of arrays, the types that it reads and the one that it gives."""

    function: Callable[..., Array]
    operand_kinds: list[str]
    result_kind: str


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """By way of float64, where the product of two fp32 numbers is exact."""
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def maximum_with_nan(name: str, keeps_nan: bool) -> Callable[[Array, Array], Array]:
    """min or max of PTX: a NaN loses unless the instruction says NaN."""
    if name == "min":
        return np.minimum if keeps_nan else np.fmin
    return np.maximum if keeps_nan else np.fmax


COMPARISONS = {
    **{
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    },
    **{"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal},
}
OPPOSITES = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}
OF_PREDICATES = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
OF_BITS = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
SUMS_AND_PRODUCTS = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fused_multiply_add}
OF_ONE_OPERAND = {
    "abs": np.abs,
    "neg": np.negative,
    "sqrt": np.sqrt,
    "rcp": lambda a: a.dtype.type(1) / a,
    "rsqrt": lambda a: a.dtype.type(1) / np.sqrt(a),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "popc": lambda a: np.bitwise_count(a).astype(np.uint32),
    "cvta": lambda a: a,
}


def arithmetic(instruction: Instruction) -> Arithmetic:
    """Raises PtxError for an instruction, or a form of one, that is not covered."""
    kinds = [word for word in instruction.words[1:] if word.removesuffix("x2") in DTYPES]
    for recognise in (_sum_or_product, _division_or_extreme, _bitwise, _choice, _conversion, _of_one_operand):
        if found := recognise(instruction, kinds):
            return found
    raise instruction.unknown()


def _sum_or_product(instruction: Instruction, kinds: list[str]) -> Arithmetic | None:
    name, words = instruction.name, instruction.words
    if name not in ("add", "sub", "mul", "mad", "fma"):
        return None
    kind = kinds[-1]
    if len(kinds) == 2 and kinds[0] == "f32":  # since sm_100: fp32 and a narrow type mixed
        narrow = [kind] * (2 if name == "fma" else 1)
        return Arithmetic(SUMS_AND_PRODUCTS[name], [*narrow, "f32"], "f32")
    if "wide" in words:
        wide = kind[0] + str(2 * int(kind[1:]))
        dtype = DTYPES[wide]
        if name == "mul":
            return Arithmetic(lambda a, b: a.astype(dtype) * b.astype(dtype), [kind] * 2, wide)
        return Arithmetic(lambda a, b, c: a.astype(dtype) * b.astype(dtype) + c, [kind, kind, wide], wide)
    if name == "mul" and "hi" in words:
        return Arithmetic(bits.high_product, [kind] * 2, kind)
    if name == "mad" and not is_float(kind):
        return Arithmetic(lambda a, b, c: a * b + c, [kind] * 3, kind) if "lo" in words else None
    if set(words[1:]) - {"rn", "ftz", "lo", *kinds}:  # carries, saturation, other roundings
        return None
    function = SUMS_AND_PRODUCTS["fma" if name == "mad" else name]
    return Arithmetic(function, [kind] * (3 if name in ("mad", "fma") else 2), kind)


def _division_or_extreme(instruction: Instruction, kinds: list[str]) -> Arithmetic | None:
    name = instruction.name
    if name == "div":
        return Arithmetic(np.divide if is_float(kinds[-1]) else bits.truncated_division, kinds * 2, kinds[-1])
    if name == "rem":
        return Arithmetic(bits.remainder, kinds * 2, kinds[-1])
    if name not in ("min", "max"):
        return None
    kind, count = kinds[-1], len(instruction.operands) - 1
    of_two = maximum_with_nan(name, not is_float(kind) or "NaN" in instruction.words)
    return Arithmetic(of_two if count == 2 else lambda a, b, c: of_two(of_two(a, b), c), [kind] * count, kind)


def _bitwise(instruction: Instruction, kinds: list[str]) -> Arithmetic | None:
    name, words = instruction.name, instruction.words
    kind = kinds[-1] if kinds else ""
    if name in OF_BITS:
        table = OF_PREDICATES if kind == "pred" else OF_BITS
        return Arithmetic(table[name], [kind] * 2, kind)
    if name == "not":
        return Arithmetic(np.logical_not if kind == "pred" else np.invert, [kind], kind)
    if name in ("shl", "shr"):
        return Arithmetic(lambda a, n: bits.shifted(a, n, name == "shl"), [kind, "u32"], kind)
    if name == "bfe":
        return Arithmetic(bits.bit_field, [kind, "u32", "u32"], kind)
    if name == "bfi" and kind == "b32":
        return Arithmetic(bits.insert_bits, [kind, kind, "u32", "u32"], kind)
    if words == ("prmt", "b32"):
        return Arithmetic(bits.permuted_bytes, ["u32"] * 3, "u32")
    if words == ("lop3", "b32"):
        return Arithmetic(bits.three_way_logic, ["u32"] * 4, "u32")
    if name == "shf":
        left, clamp = "l" in words, "clamp" in words
        return Arithmetic(lambda a, b, n: bits.funnel_shift(a, b, n, left, clamp), ["u32"] * 3, "u32")
    return None


def _choice(instruction: Instruction, kinds: list[str]) -> Arithmetic | None:
    """selp, and setp with or without a predicate to combine with."""
    if instruction.name == "selp":
        return Arithmetic(lambda a, b, p: np.where(p, a, b), [kinds[-1], kinds[-1], "pred"], kinds[-1])
    if instruction.name != "setp":
        return None
    kind, compare = kinds[-1], _comparison(instruction.words[1], kinds[-1])
    if len(instruction.operands) == 3:
        return Arithmetic(compare, [kind, kind], "pred")
    combine = OF_PREDICATES[instruction.words[2]]
    return Arithmetic(lambda a, b, p: combine(compare(a, b), p), [kind, kind, "pred"], "pred")


def _comparison(word: str, kind: str) -> Callable[[Array, Array], Array]:
    """Ordered comparisons are false for NaN, those that end in u are true."""

    def ordered(name: str) -> Callable[[Array, Array], Array]:
        if name == "ne" and is_float(kind):  # the one that NumPy answers with True for NaN
            return lambda a, b: (a < b) | (a > b)
        return COMPARISONS[name]

    if word in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (word == "nan")
    if word in OPPOSITES:
        opposite = ordered(OPPOSITES[word])
        return lambda a, b: ~opposite(a, b)
    return ordered(word)


def _conversion(instruction: Instruction, kinds: list[str]) -> Arithmetic | None:
    if instruction.name != "cvt":
        return None
    (to, origin), dtype = kinds, DTYPES[kinds[0].removesuffix("x2")]
    roundings = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    to_whole = next((roundings[word] for word in instruction.words if word in roundings), None)
    if {"rz", "rm", "rp", "sat", "satfinite", "relu"} & set(instruction.words):
        return None
    if to.endswith("x2") and len(instruction.operands) == 3:  # the first operand goes to the high half
        pair = lambda high, low: np.stack(np.broadcast_arrays(low, high), axis=-1).astype(dtype)  # noqa: E731 (a value)
        return Arithmetic(pair, [origin] * 2, to)
    if to == "tf32":  # half of the last place that is kept is added before the rest is cut off
        nearest = lambda a: tf32((a.view(np.uint32) + np.uint32(0x1000)).view(np.float32))  # noqa: E731 (a value)
        return Arithmetic(nearest, ["f32"], "f32")
    if is_float(origin) and not is_float(to):
        return None if to_whole is None else Arithmetic(_to_integers(to_whole, dtype), [origin], to)
    if to_whole and is_float(to):
        return Arithmetic(lambda a: to_whole(a).astype(dtype), [origin], to)
    return Arithmetic(lambda a: a.astype(dtype), [origin], to)


def _to_integers(to_whole: Callable[[Array], Array], dtype: type) -> Callable[[Array], Array]:
    """Out of range becomes the nearest integer that exists, NaN zero."""
    least, most = np.iinfo(dtype).min, np.iinfo(dtype).max

    def convert(values: Array) -> Array:
        whole = to_whole(values.astype(np.float64))
        low, high = whole <= least, whole >= most
        inside = np.where(low | high | np.isnan(whole), 0, whole).astype(dtype)
        return np.where(low, least, np.where(high, most, inside)).astype(dtype)

    return convert


def _of_one_operand(instruction: Instruction, kinds: list[str]) -> Arithmetic | None:
    function = OF_ONE_OPERAND.get(instruction.name)
    if function is None or len(instruction.operands) != 2:
        return None
    kind = kinds[-1] if kinds else ""
    return Arithmetic(function, [kind], "u32" if instruction.name == "popc" else kind)
