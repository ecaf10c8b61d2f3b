"""Small Triton kernels for tests/test_ptx.py: each uses other instructions, the last two are wrong on purpose.

    ptx.run(dot_kernel, (1, 1), a, b, out, ..., capability=89)

Nothing here is part of the project's own kernels.
"""

import triton
import triton.language as tl


@triton.jit
def softmax_kernel(x_ptr, out_ptr, cols, stride, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + offs, mask=offs < cols, other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, axis=0))
    tl.store(out_ptr + row * stride + offs, (e / tl.sum(e, axis=0)).to(out_ptr.dtype.element_ty), mask=offs < cols)


@triton.jit
def dot_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_om,
    stride_on,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = rows < M, cols < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        a_ptrs = a_ptr + rows[:, None] * stride_am + inner[None, :] * stride_ak
        b_ptrs = b_ptr + inner[:, None] * stride_bk + cols[None, :] * stride_bn
        a = tl.load(a_ptrs, mask=mask_m[:, None] & (inner < K)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(inner < K)[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    out_ptrs = out_ptr + rows[:, None] * stride_om + cols[None, :] * stride_on
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def transpose_kernel(x_ptr, turned_ptr, twice_ptr, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R), tl.arange(0, C)
    x = tl.load(x_ptr + r[:, None] * C + c[None, :])
    tl.store(turned_ptr + c[:, None] * R + r[None, :], tl.trans(x))
    tl.store(twice_ptr + r[:, None] * C + c[None, :], x + x)


@triton.jit
def reductions_kernel(x_ptr, sums_ptr, largest_ptr, where_ptr, scan_ptr, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R), tl.arange(0, C)
    x = tl.load(x_ptr + r[:, None] * C + c[None, :])
    tl.store(sums_ptr + r, tl.sum(x, axis=1))
    tl.store(largest_ptr + c, tl.max(x, axis=0))
    tl.store(where_ptr + r, tl.argmax(x, axis=1))
    tl.store(scan_ptr + r[:, None] * C + c[None, :], tl.cumsum(x, axis=1))


@triton.jit
def loops_kernel(counts_ptr, x_ptr, out_ptr, BLOCK: tl.constexpr):
    """A loop of another length in each program, half of them behind a branch, with reductions (barriers) inside."""
    pid, offs = tl.program_id(0), tl.arange(0, BLOCK)
    count = tl.load(counts_ptr + pid)
    total = tl.zeros((), tl.float32)
    if pid % 2 == 0:
        for i in range(count):
            total += tl.sum(tl.load(x_ptr + i * BLOCK + offs), axis=0)
    else:
        i = 0
        while i * i < count:
            total -= tl.max(tl.load(x_ptr + i * BLOCK + offs), axis=0)
            i += 1
    tl.store(out_ptr + pid, total)


@triton.jit
def floats_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, tl.exp(x))
    tl.store(out_ptr + BLOCK + offs, tl.log(tl.abs(x) + 1.0))
    tl.store(out_ptr + 2 * BLOCK + offs, tl.sqrt(tl.abs(x)))
    tl.store(out_ptr + 3 * BLOCK + offs, tl.math.fma(x, x, -x))
    tl.store(out_ptr + 4 * BLOCK + offs, tl.floor(x))
    tl.store(out_ptr + 5 * BLOCK + offs, tl.sigmoid(x))
    tl.store(out_ptr + 6 * BLOCK + offs, tl.minimum(x, 0.25).to(tl.bfloat16).to(tl.float32))
    tl.store(out_ptr + 7 * BLOCK + offs, (x * 7).to(tl.float16).to(tl.float32))
    tl.store(out_ptr + 8 * BLOCK + offs, tl.erf(x) + tl.rsqrt(tl.abs(x) + 1.0))


@triton.jit
def integers_kernel(x_ptr, i_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x, i = tl.load(x_ptr + offs), tl.load(i_ptr + offs)
    tl.store(out_ptr + offs, i // 7)
    tl.store(out_ptr + BLOCK + offs, i % 7)
    tl.store(out_ptr + 2 * BLOCK + offs, (i.to(tl.int64) * 2654435761 >> 16).to(tl.int32))
    tl.store(out_ptr + 3 * BLOCK + offs, (i ^ (i << 3)) & ~(i >> 5))
    tl.store(out_ptr + 4 * BLOCK + offs, tl.umulhi(i.to(tl.uint32), 0x9E3779B9).to(tl.int32))
    tl.store(out_ptr + 5 * BLOCK + offs, (x * 100).to(tl.int32))
    tl.store(out_ptr + 6 * BLOCK + offs, tl.where(i > 5, i, -i).to(tl.int8).to(tl.int32))
    tl.store(out_ptr + 7 * BLOCK + offs, i.to(tl.float32).to(tl.int32, bitcast=True))


@triton.jit
def atomics_kernel(x_ptr, sums_ptr, largest_ptr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.atomic_add(sums_ptr + x % BINS, x.to(tl.float32))
    tl.atomic_max(largest_ptr, tl.max(x, axis=0))


@triton.jit
def unmasked_kernel(a_ptr, out_ptr, BLOCK: tl.constexpr):
    """Wrong where the tensors are shorter than the programs' blocks."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(a_ptr + offs))


@triton.jit
def racing_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Wrong with two programs: each writes what the other reads."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs + tl.program_id(0))
    tl.store(x_ptr + offs + tl.program_id(0) + 1, x)
    tl.store(out_ptr + tl.program_id(0) * BLOCK + offs, x)
