import numpy as np
import pytest
import torch

from kernels.newton_schulz import COEFFICIENTS, NORM_MARGIN, SAFETY, coefficient_schedule, orthogonalize


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
    torch.testing.assert_close(orthogonalize(G.mT), orthogonalize(G).mT, rtol=0, atol=0)


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
