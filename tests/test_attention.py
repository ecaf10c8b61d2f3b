"""Attention by batched products against the formula in float64: values, gradients, causality, compiled code."""

import math

import pytest
import torch

from kernels.attention import BLOCK, causal_attention

SHAPES = [  # B, T, H, K, E
    (1, 1, 1, 1, 2),
    (2, 5, 2, 1, 4),
    (1, BLOCK, 3, 3, 8),
    (2, BLOCK + 1, 4, 2, 6),
    (1, 3 * BLOCK - 1, 6, 1, 10),
]


def by_the_formula(q, k, v):
    """softmax(q kᵀ / sqrt(E)) v, one head and one query at a time."""
    B, T, H, E = q.shape
    out = torch.empty_like(q)
    for b, h, t in ((b, h, t) for b in range(B) for h in range(H) for t in range(T)):
        shared = h // (H // k.shape[2])
        scores = k[b, : t + 1, shared] @ q[b, t, h] / math.sqrt(E)
        out[b, t, h] = scores.softmax(0) @ v[b, : t + 1, shared]
    return out


def problem(B, T, H, K, E, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, T, H, E), (B, T, K, E), (B, T, K, E), (B, T, H, E))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def outputs(attention, q, k, v, dout):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = attention(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def dense(q, k, v):
    """The same in whole tensors, so that autograd is quick."""
    T, sharing = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(sharing, dim=2) for t in (k, v))
    scores = torch.einsum("bthe,bshe->bhts", q, k) / math.sqrt(q.shape[3])
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    return torch.einsum("bhts,bshe->bthe", scores.masked_fill(later, -math.inf).softmax(-1), v)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_formula_and_its_gradients(shape):
    q, k, v, dout = problem(*shape)
    torch.testing.assert_close(causal_attention(q, k, v), by_the_formula(q, k, v))
    for found, exact in zip(outputs(causal_attention, q, k, v, dout), outputs(dense, q, k, v, dout), strict=True):
        torch.testing.assert_close(found, exact)


def test_fp32_is_as_exact_as_pytorchs():
    q, k, v, dout = problem(2, 200, 4, 2, 32, torch.float32)

    def fused(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(
            1, 2
        )

    exact = outputs(dense, *(t.double() for t in (q, k, v, dout)))
    for mine, theirs, right in zip(
        outputs(causal_attention, q, k, v, dout), outputs(fused, q, k, v, dout), exact, strict=True
    ):
        assert (mine.double() - right).norm() <= 2 * (theirs.double() - right).norm() + 1e-7 * right.norm()


def test_a_query_sees_no_later_key():
    q, k, v, _ = problem(1, 2 * BLOCK, 2, 1, 4)
    before = causal_attention(q, k, v)
    k[:, BLOCK + 3 :], v[:, BLOCK + 3 :] = 1e3, 1e3
    after = causal_attention(q, k, v)
    assert torch.equal(before[:, : BLOCK + 3], after[:, : BLOCK + 3])
    assert not torch.isclose(before[:, BLOCK + 3 :], after[:, BLOCK + 3 :]).any()


def test_large_scores_do_not_overflow():
    q, k, v, dout = problem(1, BLOCK + 2, 2, 2, 4, torch.float32)
    for found in outputs(causal_attention, 1e3 * q, 1e3 * k, v, dout):
        assert found.isfinite().all()


def test_it_compiles_to_one_graph_and_takes_any_strides():
    q, k, v, dout = problem(2, 70, 4, 2, 8, torch.float32)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    compiled = torch.compile(causal_attention, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(outputs(compiled, *strided, dout), outputs(causal_attention, q, k, v, dout), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((1, 4, 3, 2), (1, 4, 2, 2), (1, 4, 2, 2)), "do not fit"),
        (((1, 4, 2, 2), (1, 5, 2, 2), (1, 5, 2, 2)), "do not fit"),
        (((1, 4, 2, 2), (1, 4, 2, 3), (1, 4, 2, 3)), "do not fit"),
        (((1, 0, 2, 2), (1, 0, 2, 2), (1, 0, 2, 2)), "do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(shapes, words):
    with pytest.raises(ValueError, match=words):
        causal_attention(*(torch.zeros(shape) for shape in shapes))
    with pytest.raises(ValueError, match="one float dtype"):
        causal_attention(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2).double(), torch.zeros(1, 2, 2, 2))
