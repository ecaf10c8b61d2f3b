"""One product per group of rows, for experts: rows of group e times matrix e, differentiable, without a host sync.

    out[r] = x[r] W[e] for offsets[e-1] <= r < offsets[e]      dx[r] = dy[r] W[e]ᵀ, dW[e] = x[rows of e]ᵀ dy[rows of e]

x (rows, K) is sorted by group, W (groups, K, N); offsets are where groups end. FLOPs 2 rows K N, however the rows are
shared out; bytes x, out and every W once. At moe-79m (32,768 routed rows, K 384, N 1536, bf16) 39 GFLOP and 135 MB:
286 FLOP per byte, so compute-bound on a 4090 (balance 164). Three ways, the first that device, dtype and strides allow:
torch.nn.functional.grouped_mm (Hopper and Blackwell; elsewhere it is a loop that waits for the device), the Triton
kernels (sm_80 and newer), a loop over groups. No program knows its group before it runs: the grid has room for the
worst case, one partly filled tile per group, and programs without rows end at once. Not yet timed on a GPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import configs
from .configs import OPS, tl, triton
from .matmul_add import accumulate

ANY_LENGTH = 2**20  # replaces a number of rows that only the device knows, where tiles are chosen
TORCH_GROUPED_MAJORS = (9, 10)  # compute capabilities where PyTorch's own kernel is not a loop


def grouped_matmul_reference(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """x[rows of e] @ weights[e], group by group, in at least fp32 and rounded once; the host reads the offsets."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.new_empty(len(x), weights.shape[2], dtype=wide)
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        torch.mm(x[begin:end].to(wide), weights[e].to(wide), out=out[begin:end])
        begin = end
    return out.to(x.dtype)


def grouped_outer_reference(x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    """x[rows of e]ᵀ @ dy[rows of e] for each group e, likewise; zeros where a group has no rows."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.new_empty(len(offsets), x.shape[1], dy.shape[1], dtype=wide)
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        torch.mm(x[begin:end].to(wide).mT, dy[begin:end].to(wide), out=out[e])
        begin = end
    return out.to(x.dtype)


@triton.jit
def grouped_matmul_kernel(
    a_ptr,
    w_ptr,
    offsets_ptr,
    out_ptr,
    N,
    K,
    stride_am,
    stride_ak,
    stride_wb,
    stride_wk,
    stride_wn,
    stride_om,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One (BLOCK_M, BLOCK_N) tile of one group's rows; columns of out are adjacent."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    tile = pid // tiles_n  # counted on from the group at hand: negative once its group is found
    row, stop, group, begin = -1, 0, 0, 0
    for e in range(GROUPS):
        end = tl.load(offsets_ptr + e)
        tiles = tl.cdiv(end - begin, BLOCK_M)
        here = (tile >= 0) & (tile < tiles)
        row = tl.where(here, begin + tile * BLOCK_M, row)
        stop = tl.where(here, end, stop)
        group = tl.where(here, e, group)
        tile -= tiles
        begin = end
    if row >= 0:
        offs_m = row.to(tl.int64) + tl.arange(0, BLOCK_M)
        offs_n = ((pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
        mask_m = offs_m < stop
        mask_n = offs_n < N
        rows = tl.minimum(offs_m, stop - 1)  # the overhang repeats the last row, so that loads need no mask
        a_ptrs = a_ptr + rows[:, None] * stride_am + offs_k[None, :] * stride_ak
        w_ptrs = w_ptr + group.to(tl.int64) * stride_wb + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn

        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        acc = accumulate(acc, a_ptrs, w_ptrs, mask_m, mask_n, offs_k, K, stride_ak, stride_wk, BLOCK_K, MASKED, WIDEN)

        out_ptrs = out_ptr + offs_m[:, None] * stride_om + offs_n[None, :]
        if MASKED:
            tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])
        else:
            tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None])


@triton.jit
def grouped_outer_kernel(
    a_ptr,
    dy_ptr,
    offsets_ptr,
    out_ptr,
    M,
    N,
    stride_ar,
    stride_am,
    stride_yr,
    stride_yn,
    stride_ob,
    stride_om,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of one group's xᵀ dy: whole blocks of its rows, then the rest masked; columns of out are adjacent."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_per_group = tl.cdiv(M, BLOCK_M) * tiles_n
    pid = tl.program_id(0)
    group = pid // tiles_per_group
    t = pid % tiles_per_group
    end = tl.load(offsets_ptr + group)
    begin = tl.load(offsets_ptr + group - 1, mask=group > 0, other=0)
    rest = (end - begin) % BLOCK_K
    whole = end - begin - rest
    offs_m = ((t // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = ((t % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m = offs_m < M
    mask_n = offs_n < N
    rows = begin.to(tl.int64) + offs_k
    a_ptrs = a_ptr + rows[None, :] * stride_ar + offs_m[:, None] * stride_am
    y_ptrs = dy_ptr + rows[:, None] * stride_yr + offs_n[None, :] * stride_yn

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = accumulate(acc, a_ptrs, y_ptrs, mask_m, mask_n, offs_k, whole, stride_ar, stride_yr, BLOCK_K, MASKED, WIDEN)
    skipped = whole.to(tl.int64)
    a_ptrs += skipped * stride_ar
    y_ptrs += skipped * stride_yr
    acc = accumulate(acc, a_ptrs, y_ptrs, mask_m, mask_n, offs_k, rest, stride_ar, stride_yr, BLOCK_K, True, WIDEN)

    out_ptrs = out_ptr + group.to(tl.int64) * stride_ob + offs_m[:, None] * stride_om + offs_n[None, :]
    if MASKED:
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])
    else:
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty))


def launch_grouped_matmul(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """The kernel on (rows, K), (groups, K, N) and int32 (groups,), any strides of x and weights."""
    (m, k), (groups, _, n) = x.shape, weights.shape
    tile, masked = configs.full_tile(configs.capability(x.device), x.dtype, ANY_LENGTH, n, k)
    out = x.new_empty(m, n)
    if m == 0:
        return out
    most_tiles = triton.cdiv(m, tile.block_m) + min(groups, m)
    configs.launch(
        grouped_matmul_kernel,
        (most_tiles * triton.cdiv(n, tile.block_n),),
        x,
        weights,
        offsets,
        out,
        n,
        k,
        *x.stride(),
        *weights.stride(),
        out.stride(0),
        GROUPS=groups,
        **configs.tile_constants(tile, masked, x.dtype),
    )
    return out


def launch_grouped_outer(x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    """The kernel on (rows, M), (rows, N) and int32 (groups,), any strides of x and dy."""
    m, n, groups = x.shape[1], dy.shape[1], len(offsets)
    tile, masked = configs.tail_tile(configs.capability(x.device), x.dtype, m, n)
    out = x.new_empty(groups, m, n)
    configs.launch(
        grouped_outer_kernel,
        (groups * triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),),
        x,
        dy,
        offsets,
        out,
        m,
        n,
        *x.stride(),
        *dy.stride(),
        *out.stride()[:2],
        **configs.tile_constants(tile, masked, x.dtype),
    )
    return out


def torch_takes(*matrices: Tensor) -> bool:
    """Whether torch.nn.functional.grouped_mm exists and takes these: dtype, device, 16-byte rows and columns. On a CPU
    it is a loop like the reference, and 7 % slower (bench/LOG.md)."""
    x = matrices[0]
    cuda = x.device.type == "cuda"
    supported = cuda and x.dtype == torch.bfloat16 and configs.capability(x.device)[0] in TORCH_GROUPED_MAJORS
    return supported and hasattr(F, "grouped_mm") and len(x) > 0 and all(map(_is_aligned, matrices))


def _is_aligned(matrix: Tensor) -> bool:
    unit, item = 16, matrix.element_size()
    (rows, cols), (row, col) = matrix.shape[-2:], matrix.stride()[-2:]
    adjacent = (col == 1 and row >= cols) or (row == 1 and col >= rows)
    apart = (max(row, col), *matrix.stride()[:-2])
    return adjacent and matrix.data_ptr() % unit == 0 and all(s * item % unit == 0 for s in apart)


@torch.library.custom_op(f"{OPS}::grouped_matmul", mutates_args=())
def _grouped_matmul_op(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        if torch_takes(x, weights):
            return F.grouped_mm(x, weights, offs=offsets).contiguous()  # its rows may be padded
        if configs.runs_triton(x):
            return launch_grouped_matmul(x, weights, offsets)
        return grouped_matmul_reference(x, weights, offsets)


@_grouped_matmul_op.register_fake
def _(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(len(x), weights.shape[2])


@torch.library.custom_op(f"{OPS}::grouped_outer", mutates_args=())
def _grouped_outer_op(x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        if torch_takes(x.mT, dy):
            out = F.grouped_mm(x.mT, dy, offs=offsets).contiguous()
            empty = offsets.diff(prepend=offsets.new_zeros(1)) == 0
            return out.masked_fill_(empty[:, None, None], 0.0)  # PyTorch promises nothing for a sum over no rows
        if configs.runs_triton(x):
            return launch_grouped_outer(x, dy, offsets)
        return grouped_outer_reference(x, dy, offsets)


@_grouped_outer_op.register_fake
def _(x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(len(offsets), x.shape[1], dy.shape[1])


def _keep_for_backward(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weights, offsets = ctx.saved_tensors
    needs_x, needs_weights, _ = ctx.needs_input_grad
    return (
        _grouped_matmul_op(dy, weights.mT, offsets) if needs_x else None,
        _grouped_outer_op(x, dy, offsets) if needs_weights else None,
        None,
    )


_grouped_matmul_op.register_autograd(_gradients, setup_context=_keep_for_backward)


def grouped_matmul(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """x[r] @ weights[e] for the rows r of each group e: x (rows, K), weights (groups, K, N) -> (rows, N).

    offsets (groups,) int32, ascending, on x's device: where each group's rows end; the last must be `rows`. Groups may
    be empty. Any strides and one float dtype; differentiable once, in x and weights. Raises ValueError for shapes or
    dtypes that do not fit; the values of the offsets are not checked, as that would wait for the device.
    """
    if x.ndim != 2 or weights.ndim != 3 or weights.shape[1] != x.shape[1] or offsets.shape != weights.shape[:1]:
        shapes = f"x {tuple(x.shape)}, weights {tuple(weights.shape)} and offsets {tuple(offsets.shape)}"
        raise ValueError(f"{shapes} are not (rows, K), (groups, K, N) and (groups,)")
    if weights.dtype != x.dtype or not x.is_floating_point() or offsets.dtype != torch.int32:
        dtypes = f"{x.dtype}, {weights.dtype}, {offsets.dtype}"
        raise ValueError(f"x and weights must have one float dtype and offsets int32, got {dtypes}")
    return _grouped_matmul_op(x, weights, offsets)


class Routing:
    """Which row goes to which group: sorts rows by group, and returns results in the original order.

    groups_NR (rows, choices) integers below `groups`; `counts` (groups,) rows of each, `offsets` their int32 ends.
    No atomics in either direction, so results repeat to the bit.
    """

    def __init__(self, groups_NR: Tensor, groups: int) -> None:
        self.choices = groups_NR.shape[1]
        chosen = groups_NR.flatten()
        self.counts = (chosen[:, None] == torch.arange(groups, device=chosen.device)).sum(0)
        self.offsets = self.counts.cumsum(0).to(torch.int32)
        self.order = chosen.argsort(stable=True)
        places = torch.arange(len(chosen), device=chosen.device)
        self.inverse = torch.empty_like(places).scatter(0, self.order, places)

    def send(self, x: Tensor) -> Tensor:
        """(rows, D) -> (rows x choices, D), sorted by group."""
        return _Send.apply(x, self.order, self.inverse, self.choices)

    def collect(self, y: Tensor) -> Tensor:
        """(rows x choices, D), sorted by group -> (rows, choices, D)."""
        return _Collect.apply(y, self.order, self.inverse).view(-1, self.choices, y.shape[1])


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.choices = choices
        return x.index_select(0, order // choices)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return dy.index_select(0, inverse).view(-1, ctx.choices, dy.shape[1]).sum(1), None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return y.index_select(0, inverse)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return dy.index_select(0, order), None, None
