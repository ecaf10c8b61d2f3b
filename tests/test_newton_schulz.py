import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.half_sums import LONE_DIRECTIONS, cuda_arithmetic, departure, zoo
from kernels import Muon, configs, gram, newton_schulz, orthogonalize, symmetric_matmul
from kernels.muon import normalize_reference
from kernels.newton_schulz import COEFFICIENTS, NORM_MARGIN, SAFETY, coefficient_schedule
from model import SIZES, Transformer

# orthogonalize(sin([[1, 2, 3], [4, 5, 6]])) as computed on 2026-11-22, fp32 on a CPU.
REGRESSION = [[0.7975484, 0.2490677, -0.5284064], [0.0140015, -0.6635799, -0.7310712]]


def polynomial_of_singular_values(G, name, steps=5):
    """U p(s) Vᵀ by a float64 SVD, the polynomials applied to the normalised singular values."""
    U, s, Vh = np.linalg.svd(G.double().numpy(), full_matrices=False)
    x = s / (np.linalg.norm(s) * NORM_MARGIN[name])
    for a, b, c in coefficient_schedule(name, steps):
        x = a * x + b * x**3 + c * x**5
    return torch.from_numpy(U * x @ Vh)


def minimax_quintic(low, high):
    """The odd quintic closest to 1 on [low, high], by Remez exchange over the four points of equal error."""
    inner = np.array([(3 * low + high) / 4, (low + 3 * high) / 4])
    for _ in range(100):
        points = np.array([low, *np.sort(inner), high])
        system = np.stack((points, points**3, points**5, [1, -1, 1, -1]), axis=1)
        a, b, c, _ = np.linalg.solve(system, np.ones(4))
        inner = np.sqrt(np.roots([5 * c, 3 * b, a]).real)
    return a, b, c


def test_polar_express_table_is_the_greedy_minimax_composition():
    low, high, cushion = 1e-3, 1.0, 0.02
    for row in COEFFICIENTS["polar_express"][:6]:
        a, b, c = minimax_quintic(max(low, cushion * high), high)

        def p(x, a=a, b=b, c=c):
            return a * x + b * x**3 + c * x**5

        recentre = 2 / (p(low) + p(high)) if cushion * high > low else 1.0
        np.testing.assert_allclose(row, np.array([a, b, c]) * recentre, rtol=1e-9)
        a, b, c = np.array(row) / SAFETY["polar_express"] ** np.array([1, 3, 5])
        low = p(low, a, b, c)
        high = 2 - low


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 33), (64, 64), (100, 40), (2, 3, 16, 48)])
def test_agrees_with_the_polynomial_of_an_exact_svd(name, shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.stack([polynomial_of_singular_values(g, name) for g in G.reshape(-1, *shape[-2:])])
    torch.testing.assert_close(orthogonalize(G, coefficients=name), expected.view(shape), rtol=0, atol=1e-10)
    in_fp32 = orthogonalize(G.float(), coefficients=name)
    assert in_fp32.dtype == torch.float32
    torch.testing.assert_close(in_fp32.double(), expected.view(shape), rtol=0, atol=2e-4)


def test_the_classical_cubic_converges_to_the_polar_factor():
    G = torch.randn(20, 50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    torch.testing.assert_close(orthogonalize(G, coefficients="cubic", steps=16), U @ Vh, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8)])
def test_the_iteration_that_a_document_gives_inverts_and_does_not_orthogonalise(shape):
    """X <- X (2I - A X), which S4 (2.1.3) calls Muon's iteration, ends at the inverse: singular values 1 / s in the
    shape of the transpose, so an update by it would be as badly conditioned as A."""
    A = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    X = A.mT / (torch.linalg.matrix_norm(A, 1) * torch.linalg.matrix_norm(A, torch.inf))
    for _ in range(40):
        X = X @ (2 * torch.eye(shape[0]) - A @ X)
    torch.testing.assert_close(X, torch.linalg.pinv(A), rtol=0, atol=1e-6)
    s = torch.linalg.svdvals(A)
    torch.testing.assert_close(torch.linalg.svdvals(X), 1 / s.flip(0), rtol=0, atol=1e-6)
    assert torch.linalg.cond(X) > 2  # an orthogonal factor has 1
    assert orthogonalize(A).shape == A.shape == X.mT.shape


def test_singular_values_end_in_the_band():
    G = torch.randn(4, 96, 256, generator=torch.Generator().manual_seed(1))
    s = torch.linalg.svdvals(orthogonalize(G))
    assert s.min() > 0.84
    assert s.max() < 1.15


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_does_not_depend_on_the_scale_of_its_input(scale):
    G = torch.randn(24, 40, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(orthogonalize(G * scale), orthogonalize(G), rtol=0, atol=1e-4)


def test_transposing_the_input_transposes_the_output():
    G = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(orthogonalize(G.mT), orthogonalize(G).mT, rtol=0, atol=1e-5)


def test_zero_stays_zero_and_nan_stays_visible_in_its_own_matrix():
    G = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(4))
    G[0] = 0
    G[1, 2, 2] = torch.nan
    out = orthogonalize(G)
    assert torch.equal(out[0], torch.zeros(8, 8))
    assert out[1].isnan().all()
    assert out[2].isfinite().all()


def test_low_rank_input_keeps_its_singular_directions():
    generator = torch.Generator().manual_seed(5)
    G = torch.randn(48, 3, generator=generator) @ torch.randn(3, 64, generator=generator)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    core = U[:, :3].mT @ orthogonalize(G) @ Vh[:3].mT
    assert (core.diagonal() - 1).abs().max() < 0.16
    assert (core - core.diagonal().diag()).abs().max() < 1e-3


@pytest.mark.parametrize("steps", [1, 3, 7, 10])
def test_more_steps_continue_the_table_without_its_last_safety_factor(steps):
    schedule = coefficient_schedule("polar_express", steps)
    assert len(schedule) == steps
    assert schedule[-1] == COEFFICIENTS["polar_express"][min(steps, 8) - 1]


@pytest.mark.parametrize(
    ("arguments", "word"), [({"coefficients": "sextic"}, "sextic"), ({"method": "magic"}, "magic"), ({"steps": 0}, "0")]
)
def test_unknown_settings_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        orthogonalize(torch.ones(2, 2), **arguments)


def test_empty_and_integer_tensors():
    assert orthogonalize(torch.ones(0, 3, 4)).shape == (0, 3, 4)
    with pytest.raises(ValueError, match="float"):
        orthogonalize(torch.ones(2, 2, dtype=torch.int64))


def check_fp16_iterates(name, shape, method):
    sigma_max, deviation, off_diagonal = (1.16, 0.08, 0.03) if method == "gram" else (1.15, 0.06, 0.025)
    if method == "gram" and name in LONE_DIRECTIONS:
        deviation = 0.25
    schedule, margin = coefficient_schedule("polar_express", 5), NORM_MARGIN["polar_express"]
    X = normalize_reference(torch.from_numpy(zoo(*shape)[name])[None].float(), margin).half()
    out = newton_schulz.iterate(X, schedule, method)
    found = departure(X[0], out[0], schedule, margin)
    assert found[0] <= sigma_max
    assert found[1] <= deviation
    assert found[2] <= off_diagonal


@pytest.mark.parametrize(
    ("method", "shape"),
    [
        *(("gram", shape) for shape in [(64, 256), (128, 512), (96, 192), (16, 64), (32, 64), (32, 128)]),
        *(("standard", shape) for shape in [(64, 256), (192, 192)]),
    ],
)
@pytest.mark.parametrize("name", zoo(32, 64))
def test_fp16_iterates_stay_within_the_simulated_tolerances(name, shape, method):
    """The arithmetic of the CUDA path on the CPU: fp16 after every product, fp32 accumulation."""
    check_fp16_iterates(name, shape, method)


@pytest.mark.parametrize(("method", "shape"), [("gram", (128, 512)), ("standard", (64, 256))])
@pytest.mark.parametrize("name", zoo(32, 64))
def test_so_they_do_with_fp16_sums_of_32_in_the_full_products(name, shape, method):
    """As on GeForce cards."""
    with cuda_arithmetic(configs.HALF_SUM_K):
        check_fp16_iterates(name, shape, method)


def test_fp16_sums_of_64_or_in_every_product_miss_them():
    for name, k, products in (("all ones", 64, "full"), ("power law 2", 32, "all")):
        with cuda_arithmetic(k, products), pytest.raises(AssertionError):
            check_fp16_iterates(name, (128, 512), "gram")


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("shape", [(32, 80), (80, 32), (40, 40)])
def test_gram_and_standard_are_the_same_polynomial(shape, steps, coefficients):
    G = torch.randn(2, *shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    options = {"steps": steps, "coefficients": coefficients}
    gram, standard = (orthogonalize(G, method=method, **options) for method in ("gram", "standard"))
    torch.testing.assert_close(gram, standard, rtol=0, atol=1e-9)


@given(
    m=st.integers(1, 24),
    n=st.integers(1, 48),
    seed=st.integers(0, 10**6),
    spectrum=st.sampled_from(["gauss", "log", "low"]),
)
def test_properties_of_the_polar_factor(m, n, seed, spectrum):
    rng = np.random.default_rng(seed)
    r = min(m, n)
    U, V = (np.linalg.qr(rng.standard_normal((size, r)))[0] for size in (m, n))
    s = {
        "gauss": np.sort(np.abs(rng.standard_normal(r)) + 0.05)[::-1],
        "log": 10.0 ** -np.linspace(0, 3, r),
        "low": (np.arange(r) < max(1, r // 2)) + 0.0,
    }[spectrum]
    G = torch.from_numpy(U * s @ V.T).float()
    rotation = torch.from_numpy(np.linalg.qr(rng.standard_normal((m, m)))[0]).float()
    for method in ("standard", "gram"):
        out = orthogonalize(G, method=method).double().numpy()
        core = U.T @ out @ V
        strong = s / np.linalg.norm(s) >= 1e-2
        assert (np.diag(core)[strong] > 0.83).all()
        assert np.linalg.norm(out, 2) < 1.15
        assert np.abs(core - np.diag(np.diag(core))).max() < 2e-3
        np.testing.assert_allclose(orthogonalize(G * 7.3e4, method=method), out, atol=2e-3)
        np.testing.assert_allclose(
            orthogonalize(rotation @ G, method=method), rotation.double().numpy() @ out, atol=5e-3
        )


def test_regression_values():
    G = torch.arange(1.0, 7.0).reshape(2, 3).sin()
    found = orthogonalize(G, method="standard")
    exact = polynomial_of_singular_values(G, "polar_express")
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)
    stored = torch.tensor(REGRESSION)
    torch.testing.assert_close(found, stored, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7), (2, 3, 7, 5), (0, 4, 4), (2, 0, 3), (2, 3, 0)])
def test_gram_and_symmetric_matmul_take_any_batch_and_are_symmetric_to_the_bit(shape):
    generator = torch.Generator().manual_seed(8)
    X = torch.randn(shape, generator=generator)
    found = gram(X)
    assert found.shape == (*shape[:-1], shape[-2])
    assert torch.equal(found, found.mT)
    torch.testing.assert_close(found, X @ X.mT)
    out = symmetric_matmul(found, found, found, alpha=0.5, beta=-2.0)
    assert torch.equal(out, out.mT)
    torch.testing.assert_close(out, 0.5 * found @ found - 2.0 * found, rtol=1e-4, atol=1e-4)
    poison = torch.full_like(found, torch.nan)
    torch.testing.assert_close(symmetric_matmul(X, X.mT, poison, beta=0.0), found)  # times 0 is not read


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.ones(3, 4), torch.ones(3, 4)), "do not fit"),
        ((torch.ones(3, 4), torch.ones(4, 3), torch.ones(4, 4)), "do not fit"),
        ((torch.ones(3, 4), torch.ones(4, 3).half()), "one dtype"),
    ],
)
def test_products_that_do_not_fit_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        symmetric_matmul(*arguments)


def test_survives_fullgraph_compilation():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def caller(x):
        return gram(orthogonalize(x) * 2.0).sum()

    G = torch.randn(2, 6, 12)
    torch.testing.assert_close(caller(G), (4.0 * gram(orthogonalize(G))).sum())


def test_autocast_does_not_touch_the_iteration():
    G = torch.randn(2, 24, 60, generator=torch.Generator().manual_seed(7))
    with torch.autocast("cpu", torch.bfloat16):
        found = orthogonalize(G)
    assert torch.equal(found, orthogonalize(G))


def test_ops_pass_pytorchs_own_checks():
    G = torch.randn(2, 6, 12)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.muon_speedrun.orthogonalize, (G, 5, "quintic", "auto"), test_utils=tests)
    torch.library.opcheck(torch.ops.muon_speedrun.symmetric_matmul, (G, G.mT, None, 1.0, 0.0), test_utils=tests)


def count_launches(monkeypatch, capability, chunked):
    """Kernels launched by one fused Muon step of the 88m model, on tensors without memory."""
    launches = []
    monkeypatch.setattr(configs, "runs_triton", lambda x: True)
    monkeypatch.setattr(configs, "capability", lambda device: capability)
    monkeypatch.setattr(configs, "l2_bytes", lambda device: 72 * 2**20)
    row = configs.row(capability)._replace(chunked=chunked)
    monkeypatch.setitem(configs.TABLE, capability, row)
    monkeypatch.setattr(configs, "launch", lambda *a, **k: launches.append(a[0]))
    for name in ("bmm", "cat"):
        original = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *a, original=original, **k: (launches.append(original), original(*a, **k))[1]
        )
    with torch.device("meta"):
        model = Transformer(SIZES["88m"], vocab_size=64)
    for bank in model.banks():
        bank.parameter.grad = torch.empty_like(bank.parameter)
    groups = [{"params": [bank.parameter], "transposed": bank.transposed} for bank in model.banks()]
    optimizer = Muon(groups, capture=False)
    optimizer.step()
    return len(launches)


@pytest.mark.parametrize("capability", [(8, 9), (9, 0)])
def test_a_step_of_the_88m_model_is_few_launches(monkeypatch, capability):
    assert count_launches(monkeypatch, capability, chunked=False) == 60
    assert count_launches(monkeypatch, capability, chunked=True) <= 100
