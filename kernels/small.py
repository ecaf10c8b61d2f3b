"""Newton-Schulz on small matrices: one program does all of it for one matrix, so a bank is one launch instead of 18.

    if fits(X.shape): X = launch_small(X, coefficient_schedule("polar_express", 5), RESTARTS)

The Gram form of newton_schulz.py, rounded to fp16 where it rounds, with m x m the smaller side squared: R, Z and Q stay
in registers, the second operand of each product in shared memory; X is read twice and written once between restarts.
Iterates are symmetric to rounding. FLOPs of T steps in s segments: s 4 m² n + (4 T - 3 s) 2 m³, nothing halved; bytes:
s 6 m n. Bound by tensor cores: at 64x512 47,104 cycles of one SM against 24,576 of its share of L2 (RTX 4090).
Why m <= 64 and n <= 2048, whatever the batch: up to 64 the many launches also have one program per matrix, but for the
last product of each segment, whose n columns they spread over idle SMs: at most 16 n cycles. 17 launches of 1.5 us are
64,000 cycles, more than the 2 x 16 n of 5 steps. At m = 128 they split all products in 3 or more, and this loses.
"""

from collections.abc import Sequence

from torch import Tensor

from . import configs
from .configs import tl, triton

MAX_SIDES = (64, 2048)  # of the smaller and the larger side


def fits(shape: Sequence[int]) -> bool:
    """Whether a (batch, rows, cols) is small enough to gain: see above."""
    small, large = sorted(shape[1:])
    return small <= MAX_SIDES[0] and large <= MAX_SIDES[1]


@triton.jit
def coefficients(i, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """(a, b, c) of iteration i, by selection: a table in memory would have to be there before a graph is captured."""
    a, b, c = tl.full((), A[0], tl.float32), tl.full((), B[0], tl.float32), tl.full((), C[0], tl.float32)
    for j in tl.static_range(1, len(A)):
        a, b, c = tl.where(i == j, A[j], a), tl.where(i == j, B[j], b), tl.where(i == j, C[j], c)
    return a, b, c


@triton.jit
def load_columns(ptrs, offs_m, offs_n, M, N, TALL: tl.constexpr, MASKED: tl.constexpr):
    """Some columns of X, and the mask of what exists of them; of tall X some rows."""
    if TALL:
        inside = (offs_n < N)[:, None] & (offs_m < M)[None, :]
    else:
        inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    if MASKED:
        x = tl.load(ptrs, mask=inside, other=0.0)
    else:
        x = tl.load(ptrs)
    return x, inside


@triton.jit
def small_kernel(
    x_ptr,
    out_ptr,
    M,
    N,
    stride_b,
    stride_r,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    SEGMENTS: tl.constexpr,
    FIRST: tl.constexpr,
    EVERY: tl.constexpr,
    TALL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """out = the polynomials A, B, C of X, restarted before FIRST, FIRST + EVERY, ...; columns of both are adjacent.

    M is the smaller side. Rows and columns beyond the edge are zero and stay zero."""
    half: tl.constexpr = out_ptr.dtype.element_ty
    offset = tl.program_id(0).to(tl.int64) * stride_b
    source_ptr = x_ptr + offset
    out_ptr += offset
    offs_m, offs_n = tl.arange(0, BLOCK_M).to(tl.int64), tl.arange(0, BLOCK_N).to(tl.int64)
    if TALL:
        element = offs_n[:, None] * stride_r + offs_m[None, :]
        step = tl.full((), 1, tl.int64) * stride_r
    else:
        element = offs_m[:, None] * stride_r + offs_n[None, :]
        step = tl.full((), 1, tl.int64)

    for segment in range(SEGMENTS):
        # Not carried from segment to segment: with equal coefficients Triton 3.7.1 then takes it for 0 in all of them.
        # Two forms, 0 for the first and FIRST + EVERY (segment - 1) for the others: either alone spills on sm_80.
        if FIRST > EVERY:
            start = EVERY * segment + (FIRST - EVERY) * tl.minimum(segment, 1)
        else:
            start = tl.maximum(EVERY * segment + FIRST - EVERY, 0)
        acc = tl.zeros((BLOCK_M, BLOCK_M), dtype=tl.float32)
        for n in range(0, N, BLOCK_N):
            x, inside = load_columns(source_ptr + n * step + element, offs_m, offs_n, M, N - n, TALL, MASKED)
            acc = tl.dot(tl.trans(x), x, acc) if TALL else tl.dot(x, tl.trans(x), acc)
        R = acc.to(half)

        a, b, c = coefficients(start, A, B, C)
        Z = (c * tl.dot(R, R) + b * R.to(tl.float32)).to(half)
        Q, q = Z, a
        stop = tl.minimum(FIRST + EVERY * segment, len(A))
        for i in range(start + 1, stop):
            RZ = (tl.dot(R, Z) + a * R.to(tl.float32)).to(half)
            R = (tl.dot(Z, RZ) + a * RZ.to(tl.float32)).to(half)
            a, b, c = coefficients(i, A, B, C)
            Z = (c * tl.dot(R, R) + b * R.to(tl.float32)).to(half)
            Q = (tl.dot(Q, Z) + a * Q.to(tl.float32) + q * Z.to(tl.float32)).to(half)  # (q I + Q) (a I + Z) - q a I
            q *= a

        for n in range(0, N, BLOCK_N):
            x, inside = load_columns(source_ptr + n * step + element, offs_m, offs_n, M, N - n, TALL, MASKED)
            x = (tl.dot(x, Q) if TALL else tl.dot(Q, x)) + q * x.to(tl.float32)
            if MASKED:
                tl.store(out_ptr + n * step + element, x.to(half), mask=inside)
            else:
                tl.store(out_ptr + n * step + element, x.to(half))
        source_ptr = out_ptr
        tl.debug_barrier()  # the next segment's threads read what others stored


def launch_small(X: Tensor, schedule: Sequence[tuple[float, float, float]], restarts: range) -> Tensor:
    """The kernel on a normalised (batch, rows, cols) that fits; contiguous, restarted before those in `restarts`."""
    X = X.contiguous()
    out = X.new_empty(X.shape)
    m, n = sorted(X.shape[1:])
    tile = configs.small_tile(m)
    A, B, C = zip(*schedule, strict=True)
    configs.launch(
        small_kernel,
        (X.shape[0],),
        X,
        out,
        m,
        n,
        *X.stride()[:2],
        A=A,
        B=B,
        C=C,
        SEGMENTS=1 + sum(i < len(schedule) for i in restarts),
        FIRST=restarts.start,
        EVERY=restarts.step,
        TALL=X.shape[1] > X.shape[2],
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        MASKED=bool(m % tile.block_m or n % tile.block_n),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out
