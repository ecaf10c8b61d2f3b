"""One product per group of rows: its kernels under TRITON_INTERPRET=1 or on a GPU, PyTorch and the loop always."""

import pytest
import torch
import torch.nn.functional as F

from kernels import configs, grouped_matmul
from kernels.grouped_matmul import (
    Routing,
    grouped_matmul_reference,
    grouped_outer_reference,
    launch_grouped_matmul,
    launch_grouped_outer,
)
from tests.test_symmetric import poisoned_memory  # noqa: F401 (a fixture)
from tests.test_symmetric import pytestmark as needs_kernels

DEVICE = "cuda" if torch.cuda.is_available() and not configs.INTERPRETED else "cpu"
COUNTS = {
    "even": (8, 8, 8, 8),
    "uneven": (70, 3, 1, 22),
    "empty experts": (0, 40, 0, 9),
    "all to one": (0, 0, 65, 0),
    "no rows": (0, 0, 0, 0),
}


def problem(counts, K=48, N=32, dtype=torch.float32):
    """x, weights, dy and offsets for groups of these sizes."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(counts), K), (len(counts), K, N), (sum(counts), N))
    made = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
    return *made, torch.tensor(counts, device=DEVICE).cumsum(0).to(torch.int32)


def dense(x, weights, offsets):
    """Every expert on every row, masked."""
    rows = torch.arange(len(x), device=x.device)
    begins = F.pad(offsets, (1, 0))[:-1]
    masks = (rows >= begins[:, None]) & (rows < offsets[:, None])
    return ((x @ weights) * masks[:, :, None]).sum(0)


def outputs(product, x, weights, dy, offsets):
    leaves = [t.detach().requires_grad_() for t in (x, weights)]
    y = product(*leaves, offsets)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


@pytest.fixture(params=["pytorch", "loop", pytest.param("kernel", marks=needs_kernels)])
def way(request, monkeypatch):
    if request.param != "pytorch":
        monkeypatch.setattr(grouped_matmul, "torch_takes", lambda *matrices: False)
    monkeypatch.setattr(configs, "runs_triton", lambda x: request.param == "kernel")
    return request.param


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(("K", "N", "dtype"), [(48, 32, torch.float32), (40, 71, torch.bfloat16)], ids=str)
def test_grouped_products_and_gradients_equal_every_expert_on_every_row(way, counts, K, N, dtype):
    x, weights, dy, offsets = problem(counts, K, N, dtype)
    found = outputs(grouped_matmul.grouped_matmul, x, weights, dy, offsets)
    exact = outputs(dense, x.double(), weights.double(), dy.double(), offsets)
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    for mine, reference in zip(found, exact, strict=True):
        assert mine.dtype == dtype
        scale = reference.abs().max().item() if reference.numel() else 1.0
        torch.testing.assert_close(mine.double(), reference, rtol=tolerance, atol=tolerance * scale)


def test_the_way_taken_is_the_one_for_the_device(monkeypatch):
    x, weights, _, offsets = problem((5, 3))
    taken, grouped_mm = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *a, **k: (taken.append("torch"), grouped_mm(*a, **k))[1])
    reference = grouped_matmul.grouped_matmul_reference
    loop = lambda *a: (taken.append("loop"), reference(*a))[1]  # noqa: E731 (a spy)
    monkeypatch.setattr(grouped_matmul, "grouped_matmul_reference", loop)
    monkeypatch.setattr(configs, "runs_triton", lambda x: False)
    grouped_matmul.grouped_matmul(x, weights, offsets)
    grouped_matmul.grouped_matmul(x[:, 1:], weights[:, 1:], offsets)  # not aligned
    grouped_matmul.grouped_matmul(x.bfloat16(), weights.bfloat16(), offsets)
    monkeypatch.delattr(F, "grouped_mm")
    grouped_matmul.grouped_matmul(x, weights, offsets)
    assert taken == ["loop"] * 4


@pytest.mark.parametrize("K", [pytest.param(40, marks=needs_kernels), pytest.param(128, marks=needs_kernels)])
def test_kernels_take_any_strides_and_write_every_element_once(K, poisoned_memory):  # noqa: F811
    x, weights, dy, offsets = problem((70, 0, 1, 22), K, 64)
    turned = x.mT.contiguous().mT, weights.mT.contiguous().mT, dy.mT.contiguous().mT
    for a, W, b in ((x, weights, dy), turned):
        y = launch_grouped_matmul(a, W, offsets)
        torch.testing.assert_close(y, grouped_matmul_reference(x, weights, offsets), rtol=1e-4, atol=1e-4)
        outer = launch_grouped_outer(a, b, offsets)
        torch.testing.assert_close(outer, grouped_outer_reference(x, dy, offsets), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change", [{"x": (8, 5)}, {"weights": (2, 48)}, {"offsets": (3,)}, {"dtype": torch.float16}, {"long": True}]
)
def test_operands_that_do_not_fit_are_refused(change):
    x, weights, _, offsets = problem((5, 3))
    x = torch.zeros(change.get("x", x.shape)).to(change.get("dtype", x.dtype))
    weights = torch.zeros(change.get("weights", weights.shape))
    offsets = torch.zeros(change.get("offsets", offsets.shape), dtype=torch.long if "long" in change else torch.int32)
    with pytest.raises(ValueError, match=r"are no|must have"):
        grouped_matmul.grouped_matmul(x, weights, offsets)


def test_rows_sent_to_their_groups_come_back_in_order_with_their_gradients():
    groups = torch.tensor([[2, 0], [0, 3], [2, 3]])
    x = torch.randn(3, 5, requires_grad=True)
    routing = Routing(groups, 5)
    assert routing.counts.tolist() == [2, 0, 2, 2, 0]
    assert routing.offsets.tolist() == [2, 2, 4, 6, 6]
    sent = routing.send(x)
    assert torch.equal(sent, x[[0, 1, 0, 2, 1, 2]])
    back = routing.collect(sent * torch.tensor([1.0, 1, 3, 3, 4, 4])[:, None])
    assert torch.equal(back, x[:, None] * torch.tensor([[3.0, 1], [1, 4], [3, 4]])[:, :, None])
    (gradient,) = torch.autograd.grad(back.sum(), x)
    assert torch.equal(gradient, torch.tensor([4.0, 5, 7])[:, None].expand(3, 5))
