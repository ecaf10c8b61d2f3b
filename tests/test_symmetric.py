"""The matmul kernels themselves: under TRITON_INTERPRET=1 on the CPU (make test does that), or on a GPU."""

import itertools

import pytest
import torch

from kernels import configs
from kernels.matmul_add import launch_matmul_add
from kernels.symmetric import launch_symmetric_matmul

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (configs.INTERPRETED or torch.cuda.is_available()), reason="needs TRITON_INTERPRET=1 or a GPU"
    ),
]
DEVICE = "cpu" if configs.INTERPRETED else "cuda"
SIZES = (1, 7, 16, 33, 64, 100, 129, 200)
# Every size meets every other over the two lists without running the full product of both.
PAIRS = [(m, SIZES[(i + shift) % len(SIZES)]) for i, m in enumerate(SIZES) for shift in (0, 3)]
LAYOUTS = ("rows", "tall", "sliced")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Whatever a kernel forgets to write stays NaN."""
    new_empty = torch.Tensor.new_empty

    def poisoned(*arguments, **options):
        fresh = new_empty(*arguments, **options)
        return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def matrix(batch, m, k, layout, dtype, seed=0):
    """Random (batch, m, k) in C order, as a transposed view, or as every second element of something larger."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "tall":
        return torch.randn(batch, k, m, generator=generator).to(DEVICE, dtype).mT
    if layout == "sliced":
        return torch.randn(batch, 2 * m, 2 * k, generator=generator).to(DEVICE, dtype)[:, ::2, ::2]
    return torch.randn(batch, m, k, generator=generator).to(DEVICE, dtype)


def assert_as_exact_as_torch(found, exact, rounded):
    """Error against float64 at most twice PyTorch's own at the same dtype, plus 4 eps of the largest output."""
    assert found.isfinite().all()
    slack = 4 * torch.finfo(found.dtype).eps * exact.abs().max().item()
    allowed = 2 * (rounded.double() - exact).abs().max().item() + slack
    assert (found.double() - exact).abs().max().item() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "k"), PAIRS)
def test_gram_matches_float64_and_is_symmetric_to_the_bit(m, k, dtype):
    layout, batch = LAYOUTS[(m + k) % 3], 1 + 2 * (k % 2)
    X = matrix(batch, m, k, layout, dtype)
    found = launch_symmetric_matmul(X, X.mT, None, 1.0, 0.0)
    assert torch.equal(found, found.mT)
    assert_as_exact_as_torch(found, X.double() @ X.double().mT, X @ X.mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("m", SIZES)
def test_one_and_two_fused_addends_match_float64(m, dtype):
    batch = 1 + 2 * (m % 2)
    X = matrix(batch, m, m, LAYOUTS[m % 3], dtype) / m**0.5
    A = launch_symmetric_matmul(X, X.mT, None, 1.0, 0.0)
    D = launch_symmetric_matmul(X.mT, X, None, 1.0, 0.0)
    exact = 0.5 * A.double() @ A.double() - 2.0 * A.double()
    rounded = torch.baddbmm(A, A, A, beta=-2.0, alpha=0.5)
    for gamma in (None, 3.0):
        found = launch_symmetric_matmul(A, A, A, 0.5, -2.0, *(() if gamma is None else (D, gamma)))
        addend = 0.0 if gamma is None else gamma * D
        assert torch.equal(found, found.mT)
        assert_as_exact_as_torch(found, exact + (addend if gamma is None else addend.double()), rounded + addend)


def test_a_product_of_commuting_matrices_is_symmetric_to_the_bit():
    X = matrix(2, 100, 100, "rows", torch.float16) / 10
    R = launch_symmetric_matmul(X, X.mT, None, 1.0, 0.0)
    Z = launch_symmetric_matmul(R, R, R, 0.25, -1.0)
    found = launch_symmetric_matmul(R, Z, R, 1.0, 2.0)
    assert torch.equal(found, found.mT)
    assert_as_exact_as_torch(found, R.double() @ Z.double() + 2.0 * R.double(), torch.baddbmm(R, R, Z, beta=2.0))


@pytest.mark.parametrize(("m", "n"), [(7, 33), (64, 64), (100, 129), (129, 16), (200, 1), (1, 200)])
@pytest.mark.parametrize(("layout", "dtype"), list(itertools.product(LAYOUTS, (torch.float32, torch.float16))))
def test_full_product_with_addend_matches_float64(m, n, layout, dtype):
    B = matrix(2, m, m, "rows", dtype) / m**0.5
    X = matrix(2, m, n, layout, dtype, seed=1)
    for A, right, C in ((B, X, X), (X.mT, B, X.mT)):
        found = launch_matmul_add(A, right, C, 0.75)
        exact = A.double() @ right.double() + 0.75 * C.double()
        assert_as_exact_as_torch(found, exact, torch.baddbmm(C, A, right, beta=0.75))


@pytest.mark.parametrize("tiles", range(1, 7))
def test_the_grid_is_exactly_the_lower_triangle(tiles, monkeypatch):
    launched = []
    launch = configs.launch
    monkeypatch.setattr(
        configs, "launch", lambda kernel, grid, *a, **k: (launched.append(grid), launch(kernel, grid, *a, **k))
    )
    tile, _ = configs.symmetric_tile(configs.capability(torch.device(DEVICE)), torch.float16, 64 * tiles, 16)
    m = tile.block_m * tiles
    X = matrix(3, m, 16, "rows", torch.float16)
    found = launch_symmetric_matmul(X, X.mT, None, 1.0, 0.0)
    assert launched == [(3 * tiles * (tiles + 1) // 2,)]
    assert_as_exact_as_torch(found, X.double() @ X.double().mT, X @ X.mT)


def test_nan_stays_in_its_own_matrix():
    X = matrix(2, 70, 70, "rows", torch.float16)
    X[0, 3, 5] = torch.nan
    found = launch_symmetric_matmul(X, X.mT, None, 1.0, 0.0)
    assert found[0, 3].isnan().all()
    assert found[1].isfinite().all()
