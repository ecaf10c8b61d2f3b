"""The passes around Newton-Schulz and the whole fused step: under TRITON_INTERPRET=1 on the CPU, or on a GPU."""

import pytest
import torch

from kernels import Muon, configs, muon, orthogonalize
from kernels.muon import Momentum, launch_normalize, launch_update, normalize_reference
from tests.test_symmetric import DEVICE, poisoned_memory, pytestmark  # noqa: F401 (a fixture and a mark of this module)


@pytest.fixture
def kernels_on(monkeypatch):
    """Take the kernels' path on the CPU too, in the interpreter."""
    monkeypatch.setattr(configs, "runs_triton", lambda x: True)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 16, 16), (3, 70, 33), (2, 33, 300), (1, 129, 512)])
def test_normalize_matches_float64_at_any_scale_and_pads_with_zeros(shape, scale):
    G = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale).to(DEVICE)
    X = launch_normalize(G, 1.01, torch.float16)
    batch, rows, cols = shape
    assert X.shape == (batch, configs.padded(rows), configs.padded(cols))
    inside = X[:, :rows, :cols]
    expected = G.double() / (1.01 * torch.linalg.matrix_norm(G.double(), keepdim=True))
    torch.testing.assert_close(inside.double(), expected, rtol=2e-3, atol=1e-7)
    assert X.abs().sum() == inside.abs().sum()  # the padding is zero, not poison


def test_normalize_keeps_zeros_and_shows_nan_and_infinity():
    G = torch.randn(4, 20, 30, device=DEVICE)
    G[0] = 0
    G[1, 3, 4] = torch.nan
    G[2, 5, 6] = torch.inf
    X = launch_normalize(G, 1.0, torch.float16)
    assert (X[0] == 0).all()
    assert X[1, :20, :30].isnan().all()
    assert X[2].isnan().any()
    assert X[3].isfinite().all()
    assert (normalize_reference(torch.zeros(1, 3, 3), 1.0) == 0).all()


def scalar(value):
    return torch.tensor(value, device=DEVICE)


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_pass_updates_the_buffer_and_normalizes_what_muon_uses(nesterov):
    generator = torch.Generator().manual_seed(1)
    g, m = (torch.randn(2, 40, 50, generator=generator).to(DEVICE) for _ in range(2))
    g = g.mT.contiguous().mT  # a gradient need not lie in C order
    scaled = g.double() / 4
    expected = 0.9 * m.double() + 0.1 * scaled
    u = 0.1 * scaled + 0.9 * expected if nesterov else expected
    state = Momentum(m, 0.9, nesterov, grad_scale=scalar(4.0), found_inf=scalar(0.0))
    X = launch_normalize(g, 1.0, torch.float16, state)
    torch.testing.assert_close(m.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        X[:, :40, :50].double(), u / torch.linalg.matrix_norm(u, keepdim=True), rtol=2e-3, atol=1e-7
    )


def test_found_inf_leaves_momentum_and_weights_as_they_are():
    g, m, W = (torch.randn(2, 20, 30, device=DEVICE) for _ in range(3))
    g[1, 2, 3] = torch.inf
    before = m.clone(), W.clone()
    X = launch_normalize(g, 1.0, torch.float16, Momentum(m, 0.9, True, scalar(1.0), scalar(1.0)))
    launch_update(W, X[:, :20, :30], scalar(0.1), torch.ones(2, device=DEVICE), scalar(1.0), 0.5)
    assert torch.equal(m, before[0])
    assert torch.equal(W, before[1])


def test_the_norm_is_put_together_from_many_blocks(monkeypatch):
    monkeypatch.setattr(muon, "BLOCK_ELEMENTS", 256)
    monkeypatch.setattr(muon, "PARTIALS_AT_ONCE", 4)
    G = torch.randn(2, 60, 70, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    G[:, :10] *= 1e-20
    X = launch_normalize(G, 1.0, torch.float16)[:, :60, :70]
    expected = G.double() / torch.linalg.matrix_norm(G.double(), keepdim=True)
    torch.testing.assert_close(X.double(), expected, rtol=2e-3, atol=1e-7)


def test_update_pass_decays_and_scales_each_matrix():
    W = torch.randn(3, 37, 21, device=DEVICE)
    update = torch.randn(3, 48, 32, device=DEVICE).half()[:, :37, :21]
    scale = torch.tensor([1.0, 2.0, 0.5], device=DEVICE)
    expected = W.double() * (1 - 0.1 * 0.3) - 0.1 * scale.double().view(-1, 1, 1) * update.double()
    launch_update(W, update, scalar(0.1), scale, scalar(0.0), 0.3)
    torch.testing.assert_close(W.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize("method", ["standard", "gram", "auto"])
@pytest.mark.parametrize("shape", [(2, 40, 40), (1, 33, 100), (2, 100, 33), (1, 1, 5)])
def test_orthogonalize_through_the_kernels_agrees_with_fp32(shape, method, monkeypatch):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    found = orthogonalize(G.to(DEVICE), method=method).cpu()
    monkeypatch.setattr(configs, "runs_triton", lambda x: False)
    expected = orthogonalize(G, method="standard")
    assert found.shape == G.shape
    # A single direction has sigma / norm = 1, where the polynomial is steep: see the tolerances of test_newton_schulz.
    assert (found - expected).norm() / expected.norm() < (0.01 if min(shape[1:]) > 1 else 0.08)


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((4, 24, 40), {"transposed": (False, False, True, True)}),
        ((2, 3, 20, 12), {}),
        ((2, 64, 20), {"row_splits": (32, 16, 16)}),
        ((30, 17), {}),
        ((12, 5, 3, 2), {"flatten": True, "row_splits": (8, 4)}),
        ((9, 2, 3, 2, 2), {"flatten": True}),
        ((2, 40, 24), {"ns_before_momentum": True, "transposed": (False, True)}),
        ((12, 5, 3, 2), {"flatten": True, "row_splits": (8, 4), "ns_before_momentum": True, "nesterov": False}),
        ((2, 40, 24), {"ns_method": "svd", "transposed": (False, True)}),
        ((2, 40, 24), {"ns_method": "none", "ns_before_momentum": True}),
        ((2, 40, 24), {"ns_method": "none", "decay_rule": "cautious"}),  # in fp32: a sign decides
        ((3, 40, 24), {"normalize_rows": True, "transposed": (False, True, True), "row_blocks": (4, 1, 1)}),
        ((12, 5, 3, 2), {"flatten": True, "row_splits": (8, 4), "normalize_rows": True}),
        ((2, 40, 24), {"decay_rule": "hyperball", "weight_decay": 0.0, "row_splits": (24, 16)}),
    ],
)
def test_the_fused_step_agrees_with_the_reference_step(shape, options, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(shape, generator=generator)
    gradients = [torch.randn(shape, generator=generator) for _ in range(3)]
    results = []
    for fused in (True, False):
        device = DEVICE if fused else "cpu"
        monkeypatch.setattr(configs, "runs_triton", lambda x, fused=fused: fused)
        p = torch.nn.Parameter(start.clone().to(device))
        optimizer = Muon([{"params": [p], **options}], lr=0.1, weight_decay=0.2, capture=False)
        for i, gradient in enumerate(gradients):
            p.grad = gradient.to(device)
            optimizer.grad_scale, optimizer.found_inf = (
                torch.tensor(v, device=device) for v in (1.0 + i, float(i == 1))
            )
            optimizer.step()
        results.append(p.detach().cpu())
    moved = (results[1] - start).norm()
    # fp16 iterates: at (2, 3, 20, 12) the order of the sums decides between 0.0050 (interpreter) and 0.0051 (compiled).
    assert (results[0] - results[1]).norm() / moved < 0.01


@pytest.mark.usefixtures("kernels_on")
def test_the_fused_step_takes_convolutions_in_channels_last():
    """Weight in channels_last, gradient and a loaded momentum not: the numbers are those of the usual format."""
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        generator = torch.Generator().manual_seed(5)
        start, gradient, momentum = (torch.randn(6, 4, 3, 3, generator=generator).to(DEVICE) for _ in range(3))
        p = torch.nn.Parameter(start.to(memory_format=memory_format, copy=True))
        optimizer = Muon([{"params": [p], "flatten": True}], lr=0.1, capture=False)
        optimizer.state[p]["momentum_buffer"] = momentum
        p.grad = gradient
        optimizer.step()
        results.append((p.detach() - start, optimizer.state[p]["momentum_buffer"]))
    (expected, expected_momentum), (found, found_momentum) = results
    torch.testing.assert_close(found_momentum, expected_momentum)
    assert (found - expected).norm() / expected.norm() < 0.005


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_equals_an_eager_one_to_the_bit():
    results = []
    for capture in (True, False):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(4, 256, 128, device="cuda"))
        p.grad = torch.empty_like(p)
        optimizer = Muon([p], lr=0.1, weight_decay=0.1, capture=capture)
        for step in range(6):
            p.grad.normal_()
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            optimizer.step()
        assert len(optimizer.graphs) == int(capture)
        results.append(p.detach().clone())
    assert torch.equal(*results)
