"""Full products with a fused addend, batched: out = A B + beta C.

A is (batch, m, k), B (batch, k, n), C (batch, m, n), any strides: the last step of a Newton-Schulz iteration, a X + B X
for wide X and a X + X B for tall X, without the copy of X that torch.baddbmm makes first. FLOPs 2 m n k; bytes m k +
k n + m n items (2 m n with C), so compute-bound on a 4090 (164 FLOP per byte) from k of about 256 on.
"""

import torch
from torch import Tensor

from . import configs
from .configs import tl, triton


def matmul_add_reference(A: Tensor, B: Tensor, C: Tensor | None, alpha: float, beta: float) -> Tensor:
    """alpha A B + beta C for (batch, m, n), computed in at least fp32 and rounded once; the CPU path."""
    wide = torch.promote_types(A.dtype, torch.float32)
    if C is None:
        return torch.bmm(A.to(wide), B.to(wide)).mul_(alpha).to(A.dtype)
    if alpha == 0:  # there PyTorch 2.13's batched product by oneDNN is wrong
        return (C.to(wide) * beta).to(A.dtype)
    return torch.baddbmm(C.to(wide), A.to(wide), B.to(wide), beta=beta, alpha=alpha).to(A.dtype)


@triton.jit
def add_product(acc, a, b, WIDEN: tl.constexpr, HALF_SUMS: tl.constexpr = False):
    """acc + a b of two blocks."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    if HALF_SUMS:
        return acc + tl.dot(a, b, out_dtype=tl.float16)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def accumulate(
    acc,
    a_ptrs,
    b_ptrs,
    mask_m,
    mask_n,
    offs_k,
    K,
    stride_ak,
    stride_bk,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    WIDEN: tl.constexpr,
    HALF_SUMS: tl.constexpr = False,
):
    """acc + A B over all of K; the loop of every matmul kernel here. HALF_SUMS: BLOCK_K products are summed in fp16."""
    step_a = tl.full((), BLOCK_K, tl.int64) * stride_ak  # 32 bits overflow at strides from 2^25 on
    step_b = tl.full((), BLOCK_K, tl.int64) * stride_bk
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        if MASKED:
            mask_k = offs_k < K - k * BLOCK_K
            a = tl.load(a_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        else:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        acc = add_product(acc, a, b, WIDEN, HALF_SUMS)
        a_ptrs += step_a
        b_ptrs += step_b
    return acc


@triton.jit
def matmul_add_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    out_ptr,
    M,
    N,
    K,
    beta,
    stride_ab,
    stride_am,
    stride_ak,
    stride_bb,
    stride_bk,
    stride_bn,
    stride_cb,
    stride_cm,
    stride_cn,
    stride_ob,
    stride_om,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    WIDEN: tl.constexpr,
    HALF_SUMS: tl.constexpr,
):
    """One (BLOCK_M, BLOCK_N) tile of one matrix; columns of out are adjacent."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_per_matrix = tl.cdiv(M, BLOCK_M) * tiles_n
    pid = tl.program_id(0)
    batch = (pid // tiles_per_matrix).to(tl.int64)
    t = pid % tiles_per_matrix
    offs_m = ((t // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = ((t % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m = offs_m < M
    mask_n = offs_n < N
    a_ptrs = a_ptr + batch * stride_ab + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak
    b_ptrs = b_ptr + batch * stride_bb + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = accumulate(
        acc, a_ptrs, b_ptrs, mask_m, mask_n, offs_k, K, stride_ak, stride_bk, BLOCK_K, MASKED, WIDEN, HALF_SUMS
    )

    inside = mask_m[:, None] & mask_n[None, :]
    c_ptrs = c_ptr + batch * stride_cb + offs_m[:, None] * stride_cm + offs_n[None, :] * stride_cn
    if MASKED:
        c = tl.load(c_ptrs, mask=inside, other=0.0)
    else:
        c = tl.load(c_ptrs)
    x = acc + beta * c.to(tl.float32)
    out_ptrs = out_ptr + batch * stride_ob + offs_m[:, None] * stride_om + offs_n[None, :]
    if MASKED:
        tl.store(out_ptrs, x.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(out_ptrs, x.to(out_ptr.dtype.element_ty))


def launch_matmul_add(A: Tensor, B: Tensor, C: Tensor, beta: float) -> Tensor:
    """The kernel on (batch, m, k) x (batch, k, n)."""
    batch, m, k = A.shape
    n = B.shape[-1]
    capability = configs.capability(A.device)
    tile, masked = configs.full_tile(capability, A.dtype, m, n, k)
    out = configs.empty_matrices(A, batch, m, n)
    configs.launch(
        matmul_add_kernel,
        (batch * triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),),
        A,
        B,
        C,
        out,
        m,
        n,
        k,
        beta,
        *A.stride(),
        *B.stride(),
        *C.stride(),
        *out.stride()[:2],
        HALF_SUMS=configs.sums_in_half(capability, A.dtype, tile, k),
        **configs.tile_constants(tile, masked, A.dtype),
    )
    return out


def matmul_add(A: Tensor, B: Tensor, C: Tensor, beta: float) -> Tensor:
    """A B + beta C for 3-D tensors of one dtype, returns A's dtype: the operation of Newton-Schulz. Accumulates in
    fp32, and each 32 products of fp16 numbers in fp16 where that is faster (kernels/configs.py, `half_sums`)."""
    if not configs.runs_triton(A):
        return matmul_add_reference(A, B, C, 1.0, beta)
    return launch_matmul_add(A, B, C, beta)
