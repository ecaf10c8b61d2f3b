"""Causal attention of short sequences on a CPU, differentiable: batched products over blocks of queries.

    out = causal_attention(q, k, v)          S = s q kᵀ (causal),  P = softmax(S),  out = P v,  s = 1 / sqrt(E)
                                             dP = dout vᵀ,  dS = P (dP - rowsum(dP P)),  dq = s dS k,  dk = s dSᵀ q

A block of queries meets only the keys up to its own last one, so 1/2 + BLOCK / 2T of the products are made. The query
heads that share a key/value head are rows of one product, so no head is copied. P is kept for the backward pass:
2 T H bytes per token. At T = 256, E = 32 that is 3.4 times as fast as PyTorch's fused kernel (bench/LOG.md), which
recomputes P, forms its products in small tiles and reads shared heads once for each query head. Shape letters: B batch,
T time, H query heads, K key/value heads, E width of a head.
"""

import torch
from torch import Tensor

from .configs import OPS

BLOCK = 64  # queries
MAX_T = 1024  # beyond it P leaves the caches, and the fused kernel is as fast


def _heads(x_BTHE: Tensor, start: int, stop: int, kv_heads: int) -> Tensor:
    """Times start .. stop of the heads, (B K, H / K (stop - start), E): heads that share keys are one matrix."""
    B, T, _, E = x_BTHE.shape
    return x_BTHE.view(B, T, kv_heads, -1, E)[:, start:stop].permute(0, 2, 3, 1, 4).reshape(B * kv_heads, -1, E)


def _put_heads(x_BTHE: Tensor, start: int, stop: int, kv_heads: int, heads: Tensor) -> None:
    """The inverse of `_heads`, into `x_BTHE`."""
    B, T, _, E = x_BTHE.shape
    to = x_BTHE.view(B, T, kv_heads, -1, E)[:, start:stop].permute(0, 2, 3, 1, 4)
    to.copy_(heads.view(to.shape))


def _blocks(T: int, rows_per_query: int, P: Tensor) -> list[tuple[int, int, Tensor]]:
    """For each block of queries its times and its part of the flat P, (B K, H / K queries, keys)."""
    blocks, used = [], 0
    batch = P.numel() // (rows_per_query * _scores(T))
    for start in range(0, T, BLOCK):
        stop = min(start + BLOCK, T)
        rows = rows_per_query * (stop - start)
        part = P[used : used + batch * rows * stop]
        blocks.append((start, stop, part.view(batch, rows, stop)))
        used += part.numel()
    return blocks


def _scores(T: int) -> int:
    """Scores of one head that the blocks compute."""
    stops = [min(start + BLOCK, T) for start in range(0, T, BLOCK)]
    return sum((stop - start) * stop for start, stop in zip(range(0, T, BLOCK), stops, strict=True))


@torch.library.custom_op(f"{OPS}::causal_attention", mutates_args=())
def _causal_attention_op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    (B, T, H, E), K = q.shape, k.shape[2]
    keys, values, out = _heads(k, 0, T, K), _heads(v, 0, T, K), torch.empty_like(q)
    P = q.new_empty(B * H * _scores(T))
    later = torch.full((BLOCK, BLOCK), float("-inf"), dtype=q.dtype).triu(1)
    for start, stop, S in _blocks(T, H // K, P):
        torch.baddbmm(S, _heads(q, start, stop, K), keys[:, :stop].mT, beta=0, alpha=E**-0.5, out=S)
        own = S.view(B * K, H // K, stop - start, stop)[..., start:]  # the square on the diagonal
        own.add_(later[: stop - start, : stop - start])
        torch.softmax(S, -1, out=S)
        _put_heads(out, start, stop, K, S @ values[:, :stop])
    return out, P


@_causal_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return torch.empty_like(q), q.new_empty(B * H * _scores(T))


@torch.library.custom_op(f"{OPS}::causal_attention_backward", mutates_args=())
def _causal_attention_backward_op(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, P: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, H, E), K = q.shape, k.shape[2]
    scale, keys, values = E**-0.5, _heads(k, 0, T, K), _heads(v, 0, T, K)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
    for start, stop, probabilities in _blocks(T, H // K, P):
        d = _heads(dout, start, stop, K)
        dv[:, :stop].baddbmm_(probabilities.mT, d)
        dS = d @ values[:, :stop].mT
        torch._softmax_backward_data(dS, probabilities, -1, dS.dtype, grad_input=dS)
        _put_heads(dq, start, stop, K, torch.baddbmm(d, dS, keys[:, :stop], beta=0, alpha=scale))
        dk[:, :stop].baddbmm_(dS.mT, _heads(q, start, stop, K), alpha=scale)
    dk, dv = (torch.empty_like(k).copy_(x.view(B, K, T, E).transpose(1, 2)) for x in (dk, dv))
    return dq, dk, dv


@_causal_attention_backward_op.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep_for_backward(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _gradients(ctx, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None
    return _causal_attention_backward_op(dout.contiguous(), *ctx.saved_tensors)


_causal_attention_op.register_autograd(_gradients, setup_context=_keep_for_backward)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(E)) v over the keys up to each query's time; q (B, T, H, E), k and v (B, T, K, E), K dividing
    H; returns (B, T, H, E).

    Any float dtype of a CPU, differentiable once. Raises ValueError for shapes or dtypes that do not fit.
    """
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    if not fits or not q.numel() or q.shape[2] % k.shape[2]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"q, k and v must have one float dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    return _causal_attention_op(q.contiguous(), k.contiguous(), v.contiguous())[0]
