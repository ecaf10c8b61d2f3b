"""The head and its loss as one function: mean cross-entropy of logits = x Wᵀ, and both gradients; no logits kept.

    loss = linear_cross_entropy(x, W, targets)        p = softmax(x Wᵀ),  loss = mean(-log p[target])
    dlogits = p - onehot(target),  dx = dlogits W / N,  dW = dlogitsᵀ x / N

x is (N, D), W (V, D). The loss is a mean, so its gradients can be formed at once: each row of logits is turned into its
dlogits in place, then two matmuls read it. Of the largest tensor of a small model (98 KB per token at V = 49,152 in
bf16) five passes remain: written, read, written, read, read; PyTorch's compiled cross-entropy makes six, eager
thirteen. The row is read twice, but from L2 the second time. FLOPs 6 N D V, bytes 5 N V items, both for the whole head:
compute-bound (D = 512: 307 FLOP per byte) everywhere but in the softmax pass itself, which moves 3 of the 5.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import configs
from .configs import OPS, tl, triton

BLOCK_V = 4096  # columns at a time
SOFTMAX_WARPS = 16  # 3 rows of 98 KB per SM: 37 MB on a 4090, so that the second reading of a row finds it in L2
# Warps of a shorter row would hold copies of the same logits, and one could read what another has overwritten.
ELEMENTS_PER_WARP = BLOCK_V // SOFTMAX_WARPS
# Logits are made for at most this many bytes of rows at once, so that a large micro-batch does not decide the memory;
# never for fewer than 4,096 rows, because every chunk reads and writes dW.
LOGIT_BYTES, MIN_CHUNK_ROWS = 2**31, 4096
CPU_CHUNK_ROWS = 128  # their logits stay in a core's caches at V = 4,096; fewer rows read and write dW more often
NO_TARGET_IS_IGNORED = -(2**62)


def softmax_gradient_reference(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] of each row in fp32, and logits <- softmax(logits) - onehot(target), in place."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))  # fp32 logits themselves
    at_target, largest = wide.gather(1, targets[:, None]), wide.amax(1, keepdim=True)
    p = torch.softmax(wide, 1, out=wide)
    # -log p[target], which may underflow, from the largest p, which is at least 1 / V.
    losses = largest - p.amax(1, keepdim=True).log() - at_target
    p.scatter_add_(1, targets[:, None], -torch.ones_like(losses))
    logits.copy_(p)
    return losses.squeeze(1)


@triton.jit
def softmax_gradient_kernel(logits_ptr, targets_ptr, losses_ptr, V, stride_n, BLOCK_V: tl.constexpr):
    """One row: its loss, and its logits replaced by softmax - onehot. A target outside [0, V) gives a NaN loss."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_n
    target = tl.load(targets_ptr + row)
    offs = tl.arange(0, BLOCK_V)
    largest = tl.full((), -3.4028234e38, tl.float32)  # finite: -inf - -inf would be NaN
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, V, BLOCK_V):
        x = tl.load(logits_ptr + start + offs, mask=start + offs < V, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), axis=0)
        largest = larger
    valid = (target >= 0) & (target < V)
    x_target = tl.load(logits_ptr + target, mask=valid, other=float("nan")).to(tl.float32)
    tl.store(losses_ptr + row, (largest - x_target) + tl.log(total))
    tl.debug_barrier()  # the target's logit is read before any thread overwrites it
    scale = 1.0 / total
    for start in range(0, V, BLOCK_V):
        x = tl.load(logits_ptr + start + offs, mask=start + offs < V, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(x - largest) * scale - tl.where(start + offs == target, 1.0, 0.0)
        tl.store(logits_ptr + start + offs, gradient.to(logits_ptr.dtype.element_ty), mask=start + offs < V)


def launch_softmax_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """The kernel on (rows, V) logits whose columns are adjacent: returns the losses, overwrites the logits."""
    rows, V = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    block = min(BLOCK_V, triton.next_power_of_2(V))
    arguments = (logits, targets, losses, V, logits.stride(0))
    warps = max(1, min(SOFTMAX_WARPS, block // ELEMENTS_PER_WARP))
    configs.launch(softmax_gradient_kernel, (rows,), *arguments, BLOCK_V=block, num_warps=warps)
    return losses


def chunk_rows(V: int, item_bytes: int, on_gpu: bool) -> int:
    """Rows whose logits exist at once."""
    return max(MIN_CHUNK_ROWS, LOGIT_BYTES // (V * item_bytes)) if on_gpu else CPU_CHUNK_ROWS


@torch.library.custom_op(f"{OPS}::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy_op(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, V = x.shape[0], weight.shape[0]
    chunk = chunk_rows(V, x.element_size(), x.is_cuda)
    losses, dx, dweight, wide = [], torch.empty_like(x), None, torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, rows, chunk):
            piece, piece_targets = x[start : start + chunk], targets[start : start + chunk]
            logits = piece @ weight.mT
            run = launch_softmax_gradient if configs.runs_triton(x) else softmax_gradient_reference
            losses.append(run(logits, piece_targets))
            dx[start : start + chunk] = logits @ weight
            if dweight is None:
                dweight = logits.mT @ piece
            elif x.dtype == wide:
                dweight.addmm_(logits.mT, piece)
            else:
                dweight = dweight.to(wide) + logits.mT @ piece
            del logits  # before the next chunk makes its own
    loss = torch.cat(losses).mean()
    return loss, dx, dweight.to(weight.dtype)


@_linear_cross_entropy_op.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
    return loss, torch.empty_like(x), torch.empty_like(weight)


def _keep_gradients(ctx, inputs, output) -> None:
    _, dx, dweight = output
    ctx.mark_non_differentiable(dx, dweight)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dx, dweight)


def _scale_gradients(ctx, grad_loss: Tensor | None, *unused: None) -> tuple[Tensor | None, Tensor | None, None]:
    """Under torch.compile these products fuse with the next operations: the backward of a norm, the cast to fp32."""
    if grad_loss is None:
        return None, None, None
    dx, dweight = ctx.saved_tensors
    scale = grad_loss / dx.shape[0]
    return (dx * scale).to(dx.dtype), (dweight * scale).to(dweight.dtype), None


_linear_cross_entropy_op.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits x weightᵀ, a 0-D fp32 tensor; x (N, D), weight (V, D), targets (N,) int64.

    bf16 or fp32 (fp64 on the CPU); differentiable once, in x and weight. Logits are rounded to x's dtype as a matmul
    would, the softmax is fp32. Without gradients it is the plain PyTorch loss. Raises ValueError for shapes or dtypes
    that do not fit; on CUDA a target outside [0, V) gives a NaN loss.
    """
    fits = x.ndim == weight.ndim == 2 and targets.shape == x.shape[:1] and x.shape[1] == weight.shape[1]
    if not fits or not len(x) or not len(weight):
        shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and targets {tuple(targets.shape)}"
        raise ValueError(f"{shapes} are not (N, D), (V, D) and (N,) with N and V of at least 1")
    if x.dtype != weight.dtype or x.dtype == torch.float16 or targets.dtype != torch.int64:
        raise ValueError(f"x and weight must both be bf16 or fp32 and targets int64, got {x.dtype}, {weight.dtype}")
    if not torch.is_grad_enabled():
        with torch.autocast(x.device.type, enabled=False):
            logits = (x @ weight.mT).to(torch.promote_types(x.dtype, torch.float32))
            return F.cross_entropy(logits, targets, ignore_index=NO_TARGET_IS_IGNORED)
    return _linear_cross_entropy_op(x.contiguous(), weight.contiguous(), targets.contiguous())[0]
