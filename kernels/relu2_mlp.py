"""The two-layer perceptron with squared ReLU, differentiable; its (tokens, F) activation is written once.

    y = h down, h = relu(x upᵀ)²        dpre = 2 sqrt(h) (dy downᵀ)
                                        dx = dpre up, dup = dpreᵀ x, ddown = hᵀ dy

x is (tokens, D), up and down are (F, D). h and dpre are each one Triton product with an epilogue on the fp32
accumulator: neither the pre-activation nor dh is ever in memory. sqrt(h) is relu(x upᵀ), so h is the only tensor of its
size kept for backward. The other four products are cuBLAS's. FLOPs 12 tokens D F, as without fusion.

Bytes, in activations of tokens F items: 2 forward (h out and in) and 5 backward (h in twice, dpre out and in twice).
Under torch.compile 4 and 7: x upᵀ and dh go out and in as well, and both x upᵀ and h are kept. At 88m (D 512, F 2048,
16,384 tokens, bf16) an activation is 67 MB, the smaller operands of the six products are 113 MB: 583 MB instead of 851,
and 67 MB less to keep per layer. Saved: 0.29 ms of memory time per layer on an RTX 4090 (0.93 TB/s), 0.06 ms on an H200
(4.3 TB/s); the arithmetic takes 1.25 and 0.26 ms (206 GFLOP at 165.2 and 788 TFLOP/s). Bound: arithmetic; the product
for h has 400 FLOP per byte, that for dpre 224, the GPUs balance at 178 and 183. So fusion pays while these two run at
more than about 0.6 of cuBLAS's rate. Nothing here was timed. Programs go along a row of tiles: up and the rows of x in
flight fit the L2 cache without grouping.

Precision: h is rounded once, from fp32. A relative error u of h is u / 2 in sqrt(h), half of what keeping x upᵀ in the
same dtype costs. Only fp16 has an edge: below relu(x upᵀ) = 2^-7 h is subnormal, below 2^-12.5 zero, and so is dpre.
"""

import torch
from torch import Tensor

from . import configs
from .configs import OPS, tl, triton
from .matmul_add import accumulate


def relu2_reference(A: Tensor, B: Tensor, h: Tensor | None) -> Tensor:
    """relu(A Bᵀ)², or with h 2 sqrt(h) (A Bᵀ), computed in at least fp32 and rounded once; the CPU path."""
    wide = torch.promote_types(A.dtype, torch.float32)
    product = A.to(wide) @ B.to(wide).mT
    if h is None:
        return product.relu_().square_().to(A.dtype)
    # h / sqrt(h): the root that PyTorch takes from MKL needs 6 times as long where half of h is zero (Zen 3).
    h = h.to(wide)
    root = (h + torch.finfo(wide).tiny).rsqrt_().mul_(h)
    return product.mul_(root.mul_(2)).to(A.dtype)


@triton.jit
def relu2_kernel(
    a_ptr,
    b_ptr,
    h_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bn,
    stride_bk,
    stride_hm,
    stride_hn,
    stride_om,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BACKWARD: tl.constexpr,
    MASKED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of out = relu(A Bᵀ)², BACKWARD 2 sqrt(h) (A Bᵀ); columns of out are adjacent."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    offs_m = ((pid // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = ((pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m = offs_m < M
    mask_n = offs_n < N
    a_ptrs = a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak
    b_ptrs = b_ptr + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = accumulate(acc, a_ptrs, b_ptrs, mask_m, mask_n, offs_k, K, stride_ak, stride_bk, BLOCK_K, MASKED, WIDEN)

    inside = mask_m[:, None] & mask_n[None, :]
    if BACKWARD:
        h_ptrs = h_ptr + offs_m[:, None] * stride_hm + offs_n[None, :] * stride_hn
        if MASKED:
            h = tl.load(h_ptrs, mask=inside, other=0.0)
        else:
            h = tl.load(h_ptrs)
        x = acc * (2.0 * tl.sqrt(h.to(tl.float32)))
    else:
        x = tl.where(acc < 0.0, 0.0, acc)  # NaN stays; tl.maximum drops it on a GPU but not in the interpreter
        x = x * x
    out_ptrs = out_ptr + offs_m[:, None] * stride_om + offs_n[None, :]
    if MASKED:
        tl.store(out_ptrs, x.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(out_ptrs, x.to(out_ptr.dtype.element_ty))


def launch_relu2(A: Tensor, B: Tensor, h: Tensor | None) -> Tensor:
    """The kernel on (m, k), (n, k) and, for backward, (m, n), any strides."""
    (m, k), n = A.shape, B.shape[0]
    tile, masked = configs.full_tile(configs.capability(A.device), A.dtype, m, n, k)
    out = configs.empty_matrices(A, 1, m, n)[0]
    if m == 0:
        return out
    configs.launch(
        relu2_kernel,
        (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),),
        A,
        B,
        out if h is None else h,
        out,
        m,
        n,
        k,
        *A.stride(),
        *B.stride(),
        *(0, 0) if h is None else h.stride(),
        out.stride(0),
        BACKWARD=h is not None,
        **configs.tile_constants(tile, masked, A.dtype),
    )
    return out


def _relu2(A: Tensor, B: Tensor, h: Tensor | None) -> Tensor:
    return launch_relu2(A, B, h) if configs.runs_triton(A) else relu2_reference(A, B, h)


def _empty_activation(A: Tensor, B: Tensor) -> Tensor:
    m, n = A.shape[0], B.shape[0]
    return configs.empty_matrices(A, 1, m, n)[0] if configs.runs_triton(A) else A.new_empty(m, n)


@torch.library.custom_op(f"{OPS}::relu2_mlp", mutates_args=())
def _relu2_mlp_op(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        h = _relu2(x, up, None)
        return h @ down, h


@_relu2_mlp_op.register_fake
def _(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _empty_activation(x, up)


@torch.library.custom_op(f"{OPS}::relu2_dpre", mutates_args=())
def _relu2_dpre_op(dy: Tensor, down: Tensor, h: Tensor) -> Tensor:
    with torch.autocast(dy.device.type, enabled=False):
        return _relu2(dy, down, h)


@_relu2_dpre_op.register_fake
def _(dy: Tensor, down: Tensor, h: Tensor) -> Tensor:
    return _empty_activation(dy, down)


def _keep_for_backward(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    h = output[1]
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)  # no zeros of h's size for the gradient it does not have
    ctx.save_for_backward(*inputs, h)


def _gradients(ctx, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None
    x, up, down, h = ctx.saved_tensors
    needs_x, needs_up, needs_down = ctx.needs_input_grad
    dpre = _relu2_dpre_op(dy, down, h) if needs_x or needs_up else None
    with torch.autocast(dy.device.type, enabled=False):
        return (
            dpre @ up if needs_x else None,
            dpre.mT @ x if needs_up else None,
            h.mT @ dy if needs_down else None,
        )


_relu2_mlp_op.register_autograd(_gradients, setup_context=_keep_for_backward)


def relu2_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """relu(x upᵀ)² down for x (..., D), up and down (F, D), all of one float dtype; returns (..., D) in that dtype.

    Any strides, differentiable once in all three. fp16, bf16 and fp32 on CUDA sm_80 and newer run in Triton, the rest
    in PyTorch. autocast does not touch it. Raises ValueError for shapes or dtypes that do not fit.
    """
    if x.ndim == 0 or up.ndim != 2 or up.shape != down.shape or up.shape[1] != x.shape[-1] or 0 in up.shape:
        raise ValueError(f"x {tuple(x.shape)}, up {tuple(up.shape)} and down {tuple(down.shape)} do not fit")
    if {up.dtype, down.dtype} != {x.dtype} or not x.is_floating_point():
        raise ValueError(f"x, up and down must have one float dtype, got {x.dtype}, {up.dtype}, {down.dtype}")
    return _relu2_mlp_op(x.reshape(-1, x.shape[-1]), up, down)[0].reshape(x.shape)
