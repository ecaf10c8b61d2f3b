"""Which tile runs where: one static table per architecture, and the one place where Triton kernels are launched.

    tile, masked = symmetric_tile(capability, dtype, m, k); launch(kernel, programs, *arguments, **constants)

No autotuning at run time: the first step costs nothing, ranks agree, results repeat. Rows come from offline compilation
(`python -m bench.static`: registers, shared memory, no spills) until `python -m bench.tune` has measured them.
"""

import functools
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # PyTorch for CPUs or outside Linux: the kernels are defined but never launched

    class _NoTriton:
        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, function: Any) -> Any:
            return function

    triton = tl = _NoTriton()
    HAS_TRITON = False
else:
    HAS_TRITON = True

# Namespace of our custom operators: this folder may be imported as the project's `kernels` and as `muon_kernels`.
OPS = "muon_speedrun" if __package__ == "kernels" else __package__
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run as Python on CPU tensors: for tests
ALIGNMENT = 16  # elements; rows of such a length load 16 bytes at a time
SMALL_SIDE = 512  # below it, a row's symmetric_small tile
FULL_SMALL_SIDE = 256  # below it, a row's full_small tile
HALF_SUM_K = 32  # the most products to sum in fp16; 64 miss the tolerances for a gradient of equal entries
HALF_SUM_SIDE = 512  # the longest sum that has such parts: at 2,048 they miss them for the same gradient


class Tile(NamedTuple):
    """Block sizes of a matmul kernel (block_m = block_n for symmetric ones), warps per program, pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class Row(NamedTuple):
    """One architecture: tiles by the smaller side of the result, and the roomy tile for variants with more state
    (sizes that are not multiples of the tile). `chunked`: it pays to cut a batch into pieces that stay in L2.
    `half_sums`: the full product of Newton-Schulz sums in fp16, which GeForce cards do at twice the rate."""

    symmetric_small: Tile
    symmetric: Tile
    full_small: Tile
    full: Tile
    roomy: Tile
    chunked: bool
    half_sums: bool = False


T64 = Tile(64, 64, 64, 4, 3)
T128 = Tile(128, 128, 64, 8, 3)
WIDE = Tile(64, 128, 32, 4, 3)
T128_TWO = Tile(128, 128, 32, 4, 4)  # two programs per SM on Ada, where T128 has room for one

# A 64-tile does 32 FLOP per byte of L2 traffic: enough to feed a 4090's tensor cores, and it balances better over the
# SMs below 512. Hopper's tensor cores need 128-tiles throughout. Not measured on any GPU yet.
TABLE = {
    (8, 0): Row(T64, T128, WIDE, T128, T128, chunked=False),
    (8, 6): Row(T64, T128_TWO, WIDE, T128_TWO, T128, chunked=False, half_sums=True),
    (8, 9): Row(T64, T128_TWO, WIDE, T128_TWO, T128, chunked=True, half_sums=True),
    (9, 0): Row(T128, T128, T128, Tile(128, 256, 64, 8, 3), T128, chunked=False),
    (12, 0): Row(T64, T128, WIDE, T128_TWO, T128, chunked=True, half_sums=True),
}
DEFAULT = Row(T64, T64, T64, T64, T64, chunked=False)  # fits every GPU since Ampere
FP32 = Tile(
    64, 64, 32, 4, 3
)  # exact fp32 has no tensor cores; with 8 warps it spills on sm_120, with 2 stages on sm_90
FP32_TAIL = Tile(32, 32, 32, 4, 3)  # with a second, masked loop FP32 spills 750 bytes, 64 x 64 x 16 spills 8
SMALL = (Tile(32, 64, 0, 2, 5), Tile(64, 32, 0, 4, 4))  # block_m rows and columns of R, block_n columns of X at a time
INTERPRETER = Tile(64, 64, 64, 4, 1)  # the interpreter's time grows with the number of blocks


def row(capability: tuple[int, int]) -> Row:
    """The architecture's row, or a conservative one."""
    return TABLE.get(capability, DEFAULT)


def symmetric_tile(capability: tuple[int, int], dtype: torch.dtype, m: int, k: int) -> tuple[Tile, bool]:
    """The tile of a symmetric (m, k) x (k, m) product, and whether its blocks must be masked."""
    own = row(capability)
    return _choose(own.symmetric_small if m < SMALL_SIDE else own.symmetric, own, dtype, m, m, k)


def full_tile(capability: tuple[int, int], dtype: torch.dtype, m: int, n: int, k: int) -> tuple[Tile, bool]:
    """The tile of a full (m, k) x (k, n) product, and whether its blocks must be masked."""
    own = row(capability)
    return _choose(own.full_small if min(m, n) < FULL_SMALL_SIDE else own.full, own, dtype, m, n, k)


def tail_tile(capability: tuple[int, int], dtype: torch.dtype, m: int, n: int) -> tuple[Tile, bool]:
    """The tile of a full product over a length that only the device knows, and whether the blocks of the (m, n) result
    must be masked. Such a kernel has a second, masked loop for the rest of the length, so it holds more state."""
    own = row(capability)
    tile = own.full_small if min(m, n) < FULL_SMALL_SIDE else own.full
    if INTERPRETED:
        tile = INTERPRETER
    elif dtype == torch.float32:
        tile = FP32_TAIL
    elif tile.block_m == own.roomy.block_m:
        tile = own.roomy
    return tile, _overhangs(tile, m, n, tile.block_k)


def splits(tile: Tile, masked: bool) -> bool:
    """Whether a symmetric product computes a tile on the diagonal as three squares of half its side: at 512 a tenth
    fewer FLOPs. With 8 warps the squares would read shared memory for longer than they multiply."""
    return tile.block_m >= 128 and tile.num_warps == 4 and not masked


def sums_in_half(capability: tuple[int, int], dtype: torch.dtype, tile: Tile, k: int) -> bool:
    """Whether the full product of Newton-Schulz, k long, sums each BLOCK_K products in fp16, and those sums in fp32."""
    fits = tile.block_k <= HALF_SUM_K and k <= HALF_SUM_SIDE
    return row(capability).half_sums and dtype == torch.float16 and fits


def small_tile(m: int) -> Tile:
    """The tile of a program that has a whole matrix whose smaller side is m, at most 64. Spills nowhere."""
    return next(tile for tile in SMALL if m <= tile.block_m)


def _choose(tile: Tile, own: Row, dtype: torch.dtype, m: int, n: int, k: int) -> tuple[Tile, bool]:
    if INTERPRETED:
        tile = INTERPRETER
    elif dtype == torch.float32:
        tile = FP32
    elif _overhangs(tile, m, n, k) and tile.block_m == own.roomy.block_m:
        tile = own.roomy
    return tile, _overhangs(tile, m, n, k)


def _overhangs(tile: Tile, m: int, n: int, k: int) -> bool:
    return bool(m % tile.block_m or n % tile.block_n or k % tile.block_k)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability, (0, 0) for anything but CUDA."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.cache
def l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def runs_triton(x: Tensor) -> bool:
    """Whether x is where the Triton kernels run: CUDA sm_80 or newer, with Triton installed. Otherwise PyTorch."""
    return HAS_TRITON and capability(x.device) >= (8, 0) and x.dtype in (torch.float16, torch.bfloat16, torch.float32)


def padded(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def empty_matrices(like: Tensor, batch: int, rows: int, cols: int) -> Tensor:
    """Uninitialised (batch, rows, cols); each row starts at a multiple of 16 elements."""
    return like.new_empty(batch, rows, padded(cols))[:, :, :cols]


def tile_constants(tile: Tile, masked: bool, dtype: torch.dtype, square: bool = False) -> dict[str, int | bool]:
    """What every matmul kernel is compiled with; a `square` one has no BLOCK_N."""
    return {
        "BLOCK_M": tile.block_m,
        **({} if square else {"BLOCK_N": tile.block_n}),
        "BLOCK_K": tile.block_k,
        "MASKED": masked,
        "WIDEN": INTERPRETED and dtype == torch.bfloat16,  # the interpreter's bf16 dot is wrong
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start `kernel` on the device of its first argument; all launches go through here, and a test counts them."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants)
