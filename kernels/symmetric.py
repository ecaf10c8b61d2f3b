"""Products known to be symmetric, batched: only the tiles on and below the diagonal are computed.

    gram(X) = X Xᵀ                      symmetric_matmul(A, B, C, alpha, beta) = alpha A B + beta C

A is (..., m, k), B (..., k, m), C (..., m, m) symmetric; A B is symmetric where B = Aᵀ or where A and B commute.
Newton-Schulz adds a second addend, gamma D, in the same pass. One launch of exactly batch x t (t + 1) / 2 programs, t =
ceil(m / tile); each computes one square tile and stores it twice, so the result is symmetric to the bit. FLOPs
m² k (t + 1) / t instead of 2 m² k, with split diagonal tiles m² k (t + 1/2) / t; bytes 2 m k + 2 m² items (3 m² with C)
if every operand comes from memory once.
Bound: a tile of b rows does b / 2 FLOP per byte of L2 traffic.
"""

import torch
from torch import Tensor

from . import configs
from .configs import OPS, tl, triton
from .matmul_add import accumulate, add_product, matmul_add_reference


def symmetric_matmul_reference(A: Tensor, B: Tensor, C: Tensor | None, alpha: float, beta: float) -> Tensor:
    """alpha A B + beta C for (batch, m, k), symmetric to the bit: the lower triangle, mirrored. The CPU path."""
    product = matmul_add_reference(A, B, C, alpha, beta)
    return product.tril() + product.tril(-1).mT


@triton.jit
def store_tile(
    acc,
    row_start,
    col_start,
    M,
    pointers,
    scales,
    strides,
    BLOCK: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Store alpha acc + beta C + gamma D of a square tile, and what lies opposite the diagonal."""
    c_ptr, d_ptr, out_ptr = pointers
    alpha, beta, gamma = scales
    stride_cm, stride_dm, stride_om = strides
    offs = tl.arange(0, BLOCK).to(tl.int64)
    mask_m, mask_n = row_start + offs < M, col_start + offs < M
    inside = mask_m[:, None] & mask_n[None, :]
    x = acc * alpha
    if HAS_C:
        c_ptrs = c_ptr + row_start * stride_cm + col_start + (offs[:, None] * stride_cm + offs[None, :])
        if MASKED:
            c = tl.load(c_ptrs, mask=inside, other=0.0)
        else:
            c = tl.load(c_ptrs)
        x += beta * c.to(tl.float32)
    if HAS_D:
        d_ptrs = d_ptr + row_start * stride_dm + col_start + (offs[:, None] * stride_dm + offs[None, :])
        if MASKED:
            d = tl.load(d_ptrs, mask=inside, other=0.0)
        else:
            d = tl.load(d_ptrs)
        x += gamma * d.to(tl.float32)
    out = x.to(out_ptr.dtype.element_ty)
    element = offs[:, None] * stride_om + offs[None, :]
    tile_ptrs = out_ptr + row_start * stride_om + col_start + element
    turned = tl.trans(out)
    if row_start == col_start:
        # A B of a diagonal tile is not symmetric to the bit by itself: its lower half is taken for both, in registers,
        # because a store with a mask for each element writes 2 bytes at a time.
        out = tl.where(offs[:, None] >= offs[None, :], out, turned)
    else:
        mirror_ptrs = out_ptr + col_start * stride_om + row_start + element
        if MASKED:
            tl.store(mirror_ptrs, turned, mask=mask_n[:, None] & mask_m[None, :])
        else:
            tl.store(mirror_ptrs, turned)
    if MASKED:
        tl.store(tile_ptrs, out, mask=inside)
    else:
        tl.store(tile_ptrs, out)


@triton.jit
def accumulate_lower(
    a_ptrs,
    b_ptrs,
    start,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bm,
    BLOCK_K: tl.constexpr,
    HALF: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Upper left, lower left and lower right HALF-square of the tile at (start, start)."""
    offs = start + tl.arange(0, HALF).to(tl.int64)
    a_upper, a_lower = a_ptrs + offs[:, None] * stride_am, a_ptrs + (offs + HALF)[:, None] * stride_am
    b_left, b_right = b_ptrs + offs[None, :] * stride_bm, b_ptrs + (offs + HALF)[None, :] * stride_bm
    step_a = tl.full((), BLOCK_K, tl.int64) * stride_ak
    step_b = tl.full((), BLOCK_K, tl.int64) * stride_bk
    upper_left = tl.zeros((HALF, HALF), dtype=tl.float32)
    lower_left = tl.zeros((HALF, HALF), dtype=tl.float32)
    lower_right = tl.zeros((HALF, HALF), dtype=tl.float32)
    for _ in range(0, tl.cdiv(K, BLOCK_K)):
        upper, lower, left, right = tl.load(a_upper), tl.load(a_lower), tl.load(b_left), tl.load(b_right)
        upper_left = add_product(upper_left, upper, left, WIDEN)
        lower_left = add_product(lower_left, lower, left, WIDEN)
        lower_right = add_product(lower_right, lower, right, WIDEN)
        a_upper += step_a
        a_lower += step_a
        b_left += step_b
        b_right += step_b
    return upper_left, lower_left, lower_right


@triton.jit
def symmetric_matmul_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    d_ptr,
    out_ptr,
    M,
    K,
    alpha,
    beta,
    gamma,
    stride_ab,
    stride_am,
    stride_ak,
    stride_bb,
    stride_bk,
    stride_bm,
    stride_cb,
    stride_cm,
    stride_db,
    stride_dm,
    stride_ob,
    stride_om,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_D: tl.constexpr,
    MASKED: tl.constexpr,
    WIDEN: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """out = alpha A B + beta C + gamma D; columns of C, D and out are adjacent. With SPLIT a tile on the diagonal is
    computed as three squares of half its side, because its upper right quarter is the mirror of its lower left."""
    tiles = tl.cdiv(M, BLOCK_M)
    tiles_per_matrix = tiles * (tiles + 1) // 2
    pid = tl.program_id(0)
    batch = (pid // tiles_per_matrix).to(tl.int64)
    # Tile number t of the lower triangle, row by row: t = i (i + 1) / 2 + j. The float root is off by at most one.
    t = pid % tiles_per_matrix
    i = ((tl.sqrt(8.0 * t + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
    j = t - i * (i + 1) // 2

    # 64-bit offsets: beyond 2^31 elements they must be, and with them the compiler folds columns into immediates
    # (108 registers instead of 195 on sm_90 with 128-tiles).
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    row_start, col_start = (i * BLOCK_M).to(tl.int64), (j * BLOCK_M).to(tl.int64)
    a_ptrs = a_ptr + batch * stride_ab + offs_k[None, :] * stride_ak
    b_ptrs = b_ptr + batch * stride_bb + offs_k[:, None] * stride_bk
    pointers = c_ptr + batch * stride_cb, d_ptr + batch * stride_db, out_ptr + batch * stride_ob
    scales, strides = (alpha, beta, gamma), (stride_cm, stride_dm, stride_om)
    if SPLIT and (i == j):
        HALF: tl.constexpr = BLOCK_M // 2
        squares = accumulate_lower(
            a_ptrs, b_ptrs, row_start, K, stride_am, stride_ak, stride_bk, stride_bm, BLOCK_K, HALF, WIDEN
        )
        for s in tl.static_range(3):
            row, col = row_start + HALF * (s > 0), row_start + HALF * (s > 1)
            store_tile(squares[s], row, col, M, pointers, scales, strides, HALF, HAS_C, HAS_D, MASKED)
    else:
        offs = tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m, mask_n = row_start + offs < M, col_start + offs < M
        a_tile = a_ptrs + (row_start + offs)[:, None] * stride_am
        b_tile = b_ptrs + (col_start + offs)[None, :] * stride_bm
        acc = tl.zeros((BLOCK_M, BLOCK_M), dtype=tl.float32)
        acc = accumulate(acc, a_tile, b_tile, mask_m, mask_n, offs_k, K, stride_ak, stride_bk, BLOCK_K, MASKED, WIDEN)
        store_tile(acc, row_start, col_start, M, pointers, scales, strides, BLOCK_M, HAS_C, HAS_D, MASKED)


def launch_symmetric_matmul(
    A: Tensor, B: Tensor, C: Tensor | None, alpha: float, beta: float, D: Tensor | None = None, gamma: float = 0.0
) -> Tensor:
    """The kernel on (batch, m, k) x (batch, k, m)."""
    batch, m, k = A.shape
    tile, masked = configs.symmetric_tile(configs.capability(A.device), A.dtype, m, k)
    out = configs.empty_matrices(A, batch, m, m)
    C, D = (_with_adjacent_columns(addend) for addend in (C, D))
    tiles = triton.cdiv(m, tile.block_m)
    configs.launch(
        symmetric_matmul_kernel,
        (batch * (tiles * (tiles + 1) // 2),),
        A,
        B,
        out if C is None else C,
        out if D is None else D,
        out,
        m,
        k,
        alpha,
        beta,
        gamma,
        *A.stride(),
        *B.stride(),
        *(0, 0) if C is None else C.stride()[:2],
        *(0, 0) if D is None else D.stride()[:2],
        *out.stride()[:2],
        HAS_C=C is not None,
        HAS_D=D is not None,
        **configs.tile_constants(tile, masked, A.dtype, square=True),
        SPLIT=configs.splits(tile, masked),
    )
    return out


def _with_adjacent_columns(X: Tensor | None) -> Tensor | None:
    """A symmetric matrix as it is, or read by rows instead of columns, or copied."""
    if X is None or X.stride(-1) == 1:
        return X
    return X.mT if X.stride(-2) == 1 else X.contiguous()


def product(
    A: Tensor,
    B: Tensor,
    C: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    D: Tensor | None = None,
    gamma: float = 0.0,
) -> Tensor:
    """alpha A B + beta C + gamma D for 3-D tensors whose product is symmetric: the operation of Newton-Schulz.

    On the CPU symmetric only to rounding: mirroring would cost as much there as a small product."""
    if configs.runs_triton(A):
        return launch_symmetric_matmul(A, B, C, alpha, beta, D, gamma)
    if D is None:
        return matmul_add_reference(A, B, C, alpha, beta)
    addends = beta * C.to(torch.promote_types(C.dtype, torch.float32)) + gamma * D
    return matmul_add_reference(A, B, addends, alpha, 1.0).to(A.dtype)


@torch.library.custom_op(f"{OPS}::symmetric_matmul", mutates_args=())
def _symmetric_matmul_op(A: Tensor, B: Tensor, C: Tensor | None, alpha: float, beta: float) -> Tensor:
    if configs.runs_triton(A):
        return launch_symmetric_matmul(A, B, C, alpha, beta)
    with torch.autocast(A.device.type, enabled=False):
        return symmetric_matmul_reference(A, B, C, alpha, beta)


@_symmetric_matmul_op.register_fake
def _(A: Tensor, B: Tensor, C: Tensor | None, alpha: float, beta: float) -> Tensor:
    if configs.runs_triton(A):
        return configs.empty_matrices(A, A.shape[0], A.shape[1], A.shape[1])
    return A.new_empty(A.shape[0], A.shape[1], A.shape[1])


def symmetric_matmul(A: Tensor, B: Tensor, C: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """alpha A B + beta C for A (..., m, k) and B (..., k, m) whose product, like C (..., m, m), is symmetric.

    fp16, bf16 or fp32, any strides, fp32 accumulation; returns A's dtype, symmetric to the bit. That A B is symmetric
    is the caller's promise: only its lower triangle is computed. Has no gradient. Raises ValueError
    for shapes or dtypes that do not fit.
    """
    m, k = A.shape[-2:]
    if B.shape != (*A.shape[:-2], k, m) or (C is not None and C.shape != (*A.shape[:-2], m, m)):
        raise ValueError(
            f"A {tuple(A.shape)}, B {tuple(B.shape)} and C {C if C is None else tuple(C.shape)} do not fit"
        )
    if {A.dtype} != {B.dtype, A.dtype if C is None else C.dtype}:
        raise ValueError(f"A, B and C must have one dtype, got {A.dtype}, {B.dtype}, {None if C is None else C.dtype}")
    C = None if beta == 0 else C  # as in torch.baddbmm, a C times 0 is not read
    if min(A.numel(), m) == 0:
        return A.new_zeros(*A.shape[:-2], m, m) if C is None else beta * C
    flat = [None if X is None else X.reshape(-1, *X.shape[-2:]) for X in (A, B, C)]
    return _symmetric_matmul_op(*flat, alpha, beta).reshape(*A.shape[:-2], m, m)


def gram(X: Tensor) -> Tensor:
    """X Xᵀ for X (..., m, k), symmetric to the bit; pass X.mT for XᵀX, no copy is made."""
    return symmetric_matmul(X, X.mT)
