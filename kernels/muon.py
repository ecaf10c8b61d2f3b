"""The passes of a Muon step around Newton-Schulz: momentum and norm in one, then the update with weight decay in one.

    g <- g / grad_scale, m <- lerp(m, g, 1 - mu), u = lerp(g, m, mu) with Nesterov, else m
    X = u / (margin |u|_F) in fp16, rows and columns padded to multiples of 16
    W <- (1 - lr wd) W - lr scale O

If found_inf is not zero, m and W stay as they are: the step is skipped, and the host does not wait to know.
Norms of 1e-30 and 1e30 do not survive fp32 squares, so each block of u is stored divided by the power of two of its
largest entry, next to (exponent, sum of squares); a second pass scales all blocks of a matrix by its norm. Bytes per
parameter 14 + 4 + 10 = 28, all of them memory-bound.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import configs
from .configs import tl, triton

BLOCK_ELEMENTS = 4096
PARTIALS_AT_ONCE = 256


def normalize_reference(u: Tensor, margin: float) -> Tensor:
    """u / (margin |u|_F) for each matrix of (..., m, n), in at least fp32. Zero stays zero; NaN and infinity make their
    whole matrix NaN. Divides by max|u| first: the squares of 1e-30 and 1e30 do not fit fp32."""
    X = u.to(torch.promote_types(u.dtype, torch.float32))
    largest = X.abs().amax(dim=(-2, -1), keepdim=True)
    X = X / torch.where(largest == 0, 1.0, largest)
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    return X / torch.where(norm == 0, 1.0, norm * margin)


@triton.jit
def place(blocks, COLS, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's matrix, its block in it, and the block's rows and columns, all but the block in 64 bits."""
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    blocks_c = tl.cdiv(COLS, BLOCK_C)
    offs_r = ((block // blocks_c) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    offs_c = ((block % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    return batch, block, offs_r, offs_c


@triton.jit
def momentum_kernel(
    g_ptr,
    m_ptr,
    x_ptr,
    partial_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    ROWS,
    COLS,
    ROWS_PADDED,
    COLS_PADDED,
    blocks,
    momentum,
    stride_gb,
    stride_gr,
    stride_gc,
    stride_mb,
    stride_mr,
    stride_mc,
    stride_xb,
    stride_xr,
    HAS_MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """m <- lerp(m, g, 1 - momentum); x = u / 2^e and (e, |x|²) for each block, zeros in the padding."""
    batch, block, offs_r, offs_c = place(blocks, COLS_PADDED, BLOCK_R, BLOCK_C)
    inside = (offs_r < ROWS)[:, None] & (offs_c < COLS)[None, :]
    g = tl.load(
        g_ptr + batch * stride_gb + offs_r[:, None] * stride_gr + offs_c[None, :] * stride_gc, mask=inside, other=0.0
    ).to(tl.float32)
    u = g
    if HAS_MOMENTUM:
        g = g / tl.load(grad_scale_ptr)
        m_ptrs = m_ptr + batch * stride_mb + offs_r[:, None] * stride_mr + offs_c[None, :] * stride_mc
        m = tl.load(m_ptrs, mask=inside, other=0.0).to(tl.float32)
        m = m + (1.0 - momentum) * (g - m)
        if tl.load(found_inf_ptr) == 0.0:
            tl.store(m_ptrs, m.to(m_ptr.dtype.element_ty), mask=inside)
        u = m
        if NESTEROV:
            u = g + momentum * (m - g)

    # 2^(127 - e) brings the largest entry to [1, 2); e = 253 at most, so that the factor stays a normal number.
    largest = tl.max(tl.max(tl.abs(u), axis=1), axis=0)
    exponent = tl.minimum((largest.to(tl.int32, bitcast=True) >> 23) & 255, 253)
    x = u * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    slot = partial_ptr + (batch * blocks + block) * 2
    tl.store(slot, exponent.to(tl.float32))
    tl.store(slot + 1, tl.sum(tl.sum(x * x, axis=1), axis=0))
    x_ptrs = x_ptr + batch * stride_xb + offs_r[:, None] * stride_xr + offs_c[None, :]
    tl.store(
        x_ptrs, x.to(x_ptr.dtype.element_ty), mask=(offs_r < ROWS_PADDED)[:, None] & (offs_c < COLS_PADDED)[None, :]
    )


@triton.jit
def rescale_kernel(
    x_ptr,
    partial_ptr,
    sums_ptr,
    ROWS_PADDED,
    COLS_PADDED,
    blocks,
    sums,
    margin,
    stride_xb,
    stride_xr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """x <- x 2^e / (margin |u|_F), the norm computed from `sums` pairs (exponent, sum of squares) of the matrix."""
    batch, block, offs_r, offs_c = place(blocks, COLS_PADDED, BLOCK_R, BLOCK_C)
    greatest, total = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(0, sums, CHUNK):
        offs_s = start + tl.arange(0, CHUNK)
        slots = sums_ptr + (batch * sums + offs_s) * 2
        exponents = tl.load(slots, mask=offs_s < sums, other=0.0)
        squares = tl.load(slots + 1, mask=offs_s < sums, other=0.0)
        greater = tl.maximum(greatest, tl.max(exponents, axis=0))
        total *= tl.exp2(2.0 * (greatest - greater))
        total += tl.sum(squares * tl.exp2(2.0 * (exponents - greater)), axis=0)
        greatest = greater
    norm = tl.sqrt(total) * margin
    own = tl.load(partial_ptr + (batch * blocks + block) * 2)
    factor = tl.exp2(own - greatest) / tl.where(norm == 0.0, 1.0, norm)
    ptrs = x_ptr + batch * stride_xb + offs_r[:, None] * stride_xr + offs_c[None, :]
    mask = (offs_r < ROWS_PADDED)[:, None] & (offs_c < COLS_PADDED)[None, :]
    x = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(ptrs, (x * factor).to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def update_kernel(
    w_ptr,
    o_ptr,
    lr_ptr,
    scale_ptr,
    found_inf_ptr,
    ROWS,
    COLS,
    blocks,
    weight_decay,
    stride_wb,
    stride_wr,
    stride_wc,
    stride_ob,
    stride_or,
    stride_oc,
    CAUTIOUS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """W <- (1 - lr weight_decay) W - lr scale[batch] O; CAUTIOUS decays only the entries where W O >= 0."""
    batch, _, offs_r, offs_c = place(blocks, COLS, BLOCK_R, BLOCK_C)
    inside = (offs_r < ROWS)[:, None] & (offs_c < COLS)[None, :]
    lr = tl.load(lr_ptr).to(tl.float32)
    scale = tl.load(scale_ptr + batch)
    w_ptrs = w_ptr + batch * stride_wb + offs_r[:, None] * stride_wr + offs_c[None, :] * stride_wc
    w = tl.load(w_ptrs, mask=inside).to(tl.float32)
    o = tl.load(o_ptr + batch * stride_ob + offs_r[:, None] * stride_or + offs_c[None, :] * stride_oc, mask=inside).to(
        tl.float32
    )
    decay = lr * weight_decay
    if CAUTIOUS:
        decay = tl.where(w * o >= 0.0, decay, 0.0)
    w = w * (1.0 - decay) - lr * scale * o
    if tl.load(found_inf_ptr) == 0.0:
        tl.store(w_ptrs, w.to(w_ptr.dtype.element_ty), mask=inside)


def _blocks(rows: int, cols: int) -> tuple[int, int, int]:
    """Rows and columns of a block of BLOCK_ELEMENTS, and how many cover (rows, cols)."""
    block_c = min(256, triton.next_power_of_2(cols))
    block_r = BLOCK_ELEMENTS // block_c
    return block_r, block_c, triton.cdiv(rows, block_r) * triton.cdiv(cols, block_c)


class Momentum(NamedTuple):
    """Turns a gradient into an update: the buffer, changed in place, and 0-D fp32 tensors on its device."""

    buffer: Tensor
    momentum: float
    nesterov: bool
    grad_scale: Tensor
    found_inf: Tensor


def launch_normalize(G: Tensor, margin: float, dtype: torch.dtype, state: Momentum | None = None) -> Tensor:
    """u / (margin |u|_F) of a (batch, rows, cols) bank as `dtype`, zero-padded to multiples of 16; u is G, or with a
    `state` what Muon makes of both. Two launches up to 2^20 elements a matrix, then 8."""
    batch, rows, cols = G.shape
    rows_padded, cols_padded = configs.padded(rows), configs.padded(cols)
    block_r, block_c, blocks = _blocks(rows_padded, cols_padded)
    X = G.new_empty(batch, rows_padded, cols_padded, dtype=dtype)
    partial = G.new_empty(batch, blocks, 2, dtype=torch.float32)
    m, momentum, nesterov, grad_scale, found_inf = state or Momentum(G, 0.0, False, partial, partial)
    configs.launch(
        momentum_kernel,
        (batch * blocks,),
        G,
        m,
        X,
        partial,
        grad_scale,
        found_inf,
        rows,
        cols,
        rows_padded,
        cols_padded,
        blocks,
        momentum,
        *G.stride(),
        *m.stride(),
        *X.stride()[:2],
        HAS_MOMENTUM=state is not None,
        NESTEROV=nesterov,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=4,
    )
    sums = partial if blocks <= PARTIALS_AT_ONCE else _gathered(partial)
    configs.launch(
        rescale_kernel,
        (batch * blocks,),
        X,
        partial,
        sums,
        rows_padded,
        cols_padded,
        blocks,
        sums.shape[1],
        margin,
        *X.stride()[:2],
        CHUNK=PARTIALS_AT_ONCE,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return X


def _gathered(partial: Tensor) -> Tensor:
    """One pair (exponent, sum of squares) for each matrix: 16,384 blocks reading 16,384 pairs each are 2 GB."""
    exponents, squares = partial.unbind(dim=2)
    greatest = exponents.amax(dim=1, keepdim=True)
    total = (squares * torch.exp2(2.0 * (exponents - greatest))).sum(dim=1, keepdim=True)
    return torch.stack((greatest, total), dim=2)


def launch_update(
    W: Tensor,
    update: Tensor,
    lr: Tensor,
    scale: Tensor,
    found_inf: Tensor,
    weight_decay: float,
    cautious: bool = False,
) -> None:
    """W <- (1 - lr weight_decay) W - lr scale update, in place, unless found_inf is not zero; lr and found_inf are 0-D
    fp32 tensors, scale is (batch,). `cautious` decays only the entries where W and update have one sign."""
    batch, rows, cols = W.shape
    block_r, block_c, blocks = _blocks(rows, cols)
    configs.launch(
        update_kernel,
        (batch * blocks,),
        W,
        update,
        lr,
        scale,
        found_inf,
        rows,
        cols,
        blocks,
        weight_decay,
        *W.stride(),
        *update.stride(),
        CAUTIOUS=cautious,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=4,
    )
