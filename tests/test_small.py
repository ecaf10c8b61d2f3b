"""One program for a whole small matrix: under TRITON_INTERPRET=1 on the CPU, on compiled code, or on a GPU."""

import pytest
import torch

from bench.cycles import RTX_4090, tile_work
from kernels import Muon, configs, small
from kernels.muon import normalize_reference
from kernels.newton_schulz import NORM_MARGIN, coefficient_schedule, iterate, iterate_gram, restarts_of
from tests.test_symmetric import DEVICE, poisoned_memory, pytestmark  # noqa: F401 (a fixture and a mark of this module)


def normalized(G, name="polar_express"):
    return normalize_reference(G.float(), NORM_MARGIN[name]).half().to(DEVICE)


def normal(*shape, seed=0, **more):
    return normalized(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), **more)


def by_polynomials(X, schedule):
    """Each iteration in float64, as it is defined."""
    X = X.double().cpu()
    X, tall = (X.mT, True) if X.shape[1] > X.shape[2] else (X, False)
    for a, b, c in schedule:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


def relative(found, exact):
    return ((found.double().cpu() - exact).norm() / exact.norm()).item()


POLAR = [("polar_express", steps) for steps in (1, 2, 3, 4, 5, 7)]


@pytest.mark.parametrize(("name", "steps"), [*POLAR, ("quintic", 5), ("cubic", 5)])  # two repeat one row
@pytest.mark.parametrize("shape", [(2, 64, 96), (1, 100, 40), (3, 16, 48), (1, 33, 32), (1, 3, 70), (2, 70, 64)])
def test_every_number_of_steps_agrees_with_float64(shape, name, steps):
    schedule = coefficient_schedule(name, steps)
    X = normal(*shape, name=name)
    before = X.clone()
    found = small.launch_small(X, schedule, restarts_of(min(shape[1:])))
    assert relative(found, by_polynomials(X, schedule)) < 0.015
    assert torch.equal(X, before)


@pytest.mark.parametrize("shape", [(1, 64, 160), (1, 160, 64), (2, 24, 80)])
def test_it_is_as_exact_as_the_many_launches(shape):
    """fp16 after every product, fp32 sums: the errors of both against float64 are alike."""
    schedule = coefficient_schedule("polar_express", 5)
    X = normal(*shape, seed=1)
    exact = by_polynomials(X, schedule)
    found = relative(small.launch_small(X, schedule, restarts_of(min(shape[1:]))), exact)
    assert found < 1.5 * relative(iterate_gram(X.cpu(), schedule), exact)


def test_a_matrix_is_read_wherever_it_lies():
    schedule = coefficient_schedule("polar_express", 5)
    X = normal(2, 48, 80)
    wider = torch.full((2, 96, 160), torch.nan, dtype=torch.float16, device=DEVICE)
    wider[:, ::2, ::2] = X
    turned = X.mT.contiguous()
    expected = small.launch_small(X, schedule, restarts_of(48))
    assert torch.equal(small.launch_small(wider[:, ::2, ::2], schedule, restarts_of(48)), expected)
    assert torch.equal(small.launch_small(turned.mT, schedule, restarts_of(48)), expected)
    assert relative(small.launch_small(turned, schedule, restarts_of(48)).mT, expected.double().cpu()) < 0.015


def test_zero_stays_zero_and_nan_stays_in_its_own_matrix():
    X = normal(3, 20, 50)
    X[0] = 0
    X[1, 2, 3] = torch.nan
    out = small.launch_small(X, coefficient_schedule("polar_express", 5), restarts_of(20))
    assert (out[0] == 0).all()
    assert out[1].isnan().all()
    assert out[2].isfinite().all()


@pytest.fixture
def launched(monkeypatch):
    """The kernels' names and whole works of what is launched on tensors without memory, for a 4090."""
    found = []

    def note(kernel, grid, *arguments, **constants):
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        name = kernel.fn.__name__
        found.append((name, grid[0], tile_work(grid[0], values).flops if "BLOCK_M" in values else 0.0))

    monkeypatch.setattr(configs, "launch", note)
    monkeypatch.setattr(configs, "capability", lambda device: (8, 9))
    monkeypatch.setattr(configs, "l2_bytes", lambda device: 72 * 2**20)
    monkeypatch.setattr(configs, "runs_triton", lambda x: True)
    monkeypatch.setattr(configs, "INTERPRETED", False)
    return found


def lone_us(launches):
    """Each launch's programs dealt out whole to the SMs, at the tensor cores' rate, and 1.5 us to start it."""
    rounds = [-(-programs // RTX_4090.sms) * flops / programs for _, programs, flops in launches]
    return sum(1e6 * r / RTX_4090.flops / RTX_4090.clock_hz + 1.5 for r in rounds)


@pytest.mark.parametrize("shape", [(b, m, n) for b in (1, 8, 129, 352) for m in (64, 48) for n in (128, 512, 2048)])
def test_one_launch_is_chosen_where_the_count_says_it_gains(shape, launched, monkeypatch):
    schedule = coefficient_schedule("polar_express", 5)
    X = torch.empty(shape, dtype=torch.float16, device="meta")
    iterate(X, schedule, "auto")
    assert [name for name, *_ in launched] == ["small_kernel"]
    alone = lone_us(launched)
    launched.clear()
    monkeypatch.setattr(small, "fits", lambda shape: False)
    iterate(X, schedule, "auto")
    assert len(launched) >= 18
    assert alone < lone_us(launched)


@pytest.mark.parametrize(
    ("shape", "method", "dtype"),
    [
        ((8, 128, 512), "auto", torch.float16),
        ((8, 64, 4096), "auto", torch.float16),
        ((8, 64, 64), "auto", torch.float16),
        ((8, 64, 512), "standard", torch.float16),
        ((8, 64, 512), "auto", torch.float32),
    ],
)
def test_other_matrices_keep_their_launches(shape, method, dtype, launched):
    iterate(torch.empty(shape, dtype=dtype, device="meta"), coefficient_schedule("polar_express", 5), method)
    assert len(launched) >= 15
    assert "small_kernel" not in {name for name, *_ in launched}


def test_a_step_of_muon_over_heads_is_four_launches(launched):
    heads = torch.nn.Parameter(torch.empty(4, 8, 64, 512, device="meta"))
    heads.grad = torch.empty_like(heads)
    Muon([heads], capture=False).step()
    assert [name for name, *_ in launched] == ["momentum_kernel", "rescale_kernel", "small_kernel", "update_kernel"]
