"""Microbenchmarks of every kernel family at shapes of the nano and 88m models, on whatever device there is: make bench.

Each is checked against float64 before it is timed. On a CPU the PyTorch paths are timed, on a GPU the Triton kernels.
"""

import pytest
import torch
import torch.nn.functional as F

from kernels.cross_entropy import linear_cross_entropy
from kernels.matmul_add import matmul_add
from kernels.newton_schulz import orthogonalize
from kernels.relu2_mlp import relu2_mlp
from kernels.symmetric import gram, symmetric_matmul
from model import SIZES, Transformer
from optim import build_optimizers

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.float16) if CUDA else ("cpu", torch.float32)
COMPUTE = torch.bfloat16 if CUDA else torch.float32
TOKENS = 16_384 if CUDA else 256
BANKS = [(8, 128, 128), (8, 64, 128), (8, 512, 128), *([(44, 512, 512), (44, 2048, 512)] if CUDA else [])]
SQUARES = [(batch, m, m) for batch, m in (((32, 256), (32, 512), (32, 1024)) if CUDA else ((4, 128), (4, 256)))]


def random(*shape, dtype=DTYPE, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def timed(benchmark, run):
    def synchronised() -> None:
        run()
        if CUDA:
            torch.cuda.synchronize()

    benchmark(synchronised)


def assert_close(found, exact, allowed):
    assert ((found.double() - exact).norm() / exact.norm()).item() < allowed


@pytest.mark.parametrize("shape", BANKS + SQUARES, ids=str)
def test_orthogonalize(benchmark, shape):
    G = random(*shape, dtype=torch.float32)
    s = torch.linalg.svdvals(orthogonalize(G).float())
    assert s.max() < 1.15
    assert s.quantile(0.1) > 0.8
    timed(benchmark, lambda: orthogonalize(G))


@pytest.mark.parametrize("shape", BANKS + SQUARES, ids=str)
def test_gram(benchmark, shape):
    X = random(*shape)
    assert_close(gram(X), X.double() @ X.double().mT, 1e-3)
    timed(benchmark, lambda: gram(X))


@pytest.mark.parametrize("shape", SQUARES, ids=str)
def test_symmetric_matmul_with_addend(benchmark, shape):
    A = gram(random(*shape) / shape[1] ** 0.5)
    assert_close(symmetric_matmul(A, A, A, 0.5, 2.0), 0.5 * A.double() @ A.double() + 2 * A.double(), 1e-3)
    timed(benchmark, lambda: symmetric_matmul(A, A, A, 0.5, 2.0))


@pytest.mark.parametrize("shape", SQUARES, ids=str)
def test_matmul_add(benchmark, shape):
    A, X = random(*shape) / shape[1] ** 0.5, random(*shape, seed=1)
    assert_close(matmul_add(A, X, X, 2.0), A.double() @ X.double() + 2 * X.double(), 2e-3)
    timed(benchmark, lambda: matmul_add(A, X, X, 2.0))


def test_head_and_loss_with_gradients(benchmark):
    D, V = (512, 49_152) if CUDA else (128, 4096)
    x, W = (random(n, D, dtype=COMPUTE, seed=i).requires_grad_() for i, n in enumerate((TOKENS, V)))
    targets = torch.randint(V, (TOKENS,), device=DEVICE)
    exact = F.cross_entropy((x[:64].double() @ W.double().mT), targets[:64])
    assert_close(linear_cross_entropy(x[:64], W, targets[:64]).detach(), exact.detach(), 1e-2)
    timed(benchmark, lambda: torch.autograd.grad(linear_cross_entropy(x, W, targets), (x, W)))


def test_feed_forward_with_gradients(benchmark):
    D, width = (512, 2048) if CUDA else (128, 512)
    x, up, down = (random(n, D, dtype=COMPUTE, seed=i).requires_grad_() for i, n in enumerate((TOKENS, width, width)))
    exact = (x.double() @ up.double().mT).relu().square() @ down.double()
    assert_close(relu2_mlp(x, up, down).detach(), exact.detach(), 1e-2)
    timed(benchmark, lambda: torch.autograd.grad(relu2_mlp(x, up, down).sum(), (x, up, down)))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_optimizer_step(benchmark, optimizer):
    model = Transformer(SIZES["88m" if CUDA else "nano"], vocab_size=4096).to(DEVICE)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizers = build_optimizers(model, optimizer, lr=1e-3, adamw_lr=1e-3)

    def step() -> None:
        for o in optimizers:
            o.step()

    before = [p.detach().clone() for p in model.parameters()]
    step()
    moved = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
    assert all(0 < (m / 1e-3).square().mean().sqrt() < 1.5 for m in moved)
    timed(benchmark, step)
