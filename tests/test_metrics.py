import json
import math
import threading
import time

import numpy as np
import pytest
import torch

from engine import eigh
from engine.files import cut_jsonl
from metrics import chance_alignment, decompose, projection_record, singular_values
from model import SIZES, Transformer

UPDATE_KEYS = ("left_alignment", "right_alignment", "update_norm", "update_effective_rank")


def record_of(W, dW=None, G=None):
    """The record of single matrices, as the worker makes it."""
    weight, update = (None if M is None else decompose(M[None]).of(0) for M in (W, dW))
    return projection_record(weight, update, None if G is None else singular_values(G[None])[0])


def numpy_record(W, dW, G):
    """Every metric once more, from its definition, in float64 NumPy."""
    U, s, Vt = np.linalg.svd(W)
    r = min(W.shape)
    p, q = s / s.sum(), s**2 / (s**2).sum()
    p, q = p[p > 0], q[q > 0]
    small = W / s[0] if W.shape[0] >= W.shape[1] else W.T / s[0]
    entropy = -(p * np.log(p)).sum()
    record = {
        "spectral_norm": np.linalg.norm(W, 2),
        "entropy": entropy,
        "effective_rank": math.exp(entropy),
        "spectral_entropy": -(q * np.log(q)).sum() / math.log(r) if r > 1 else None,
        "stable_rank": (np.linalg.norm(W) / np.linalg.norm(W, 2)) ** 2,
        "weight_norm": np.linalg.norm(W),
        "orthogonality_error": np.linalg.norm(small.T @ small - np.eye(r)) / math.sqrt(r),
        "grad_norm": np.linalg.norm(G),
        "update_norm": np.linalg.norm(dW),
    }
    sg = np.linalg.svd(G, compute_uv=False)
    pg = sg[sg > 1e-7 * sg[0]] / sg.sum()
    record["grad_effective_rank"] = math.exp(-(pg * np.log(pg)).sum())
    record["grad_stable_rank"] = (np.linalg.norm(G) / np.linalg.norm(G, 2)) ** 2
    record["grad_condition"] = np.linalg.cond(G) if sg[-1] > 1e-7 * sg[0] else None
    Ud, sd, Vdt = np.linalg.svd(dW)
    pd = sd[sd > 0] / sd.sum()
    record["update_effective_rank"] = math.exp(-(pd * np.log(pd)).sum())
    k = min(5, r)
    record["update_gap"] = sd[4] - sd[5] if r > 5 else None
    record["left_alignment"] = np.linalg.svd(U[:, :k].T @ Ud[:, :k], compute_uv=False).mean()
    record["right_alignment"] = np.linalg.svd(Vt[:k] @ Vdt[:k].T, compute_uv=False).mean()
    if min(s[k - 1] / s[0], sd[k - 1] / sd[0]) < 1e-7:
        record["left_alignment"] = record["right_alignment"] = None
    return record


SHAPES = [(48, 32), (32, 48), (32, 32), (1, 20), (20, 1), (3, 40)]


def matrix_of(kind, shape, rng):
    """A (m, n) of full rank, of half its rank, or orthogonal up to a factor."""
    if kind == "random":
        return rng.standard_normal(shape)
    U, s, Vt = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    return 3.0 * U @ Vt if kind == "orthogonal" else U * (s * (np.arange(len(s)) < max(1, len(s) // 2))) @ Vt


@pytest.mark.parametrize("kind", ["random", "low rank", "orthogonal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_metric_agrees_with_numpy(shape, kind):
    rng = np.random.default_rng(0)
    W, dW, G = matrix_of(kind, shape, rng), rng.standard_normal(shape), matrix_of(kind, shape, rng)
    found = record_of(*map(torch.from_numpy, (W, dW, G)))
    expected = numpy_record(W, dW, G)
    if kind == "orthogonal":  # all of its directions are equally strong: which five come first is arbitrary
        expected = {key: value for key, value in expected.items() if "alignment" not in key}
    for key, value in expected.items():
        assert found[key] == (None if value is None else pytest.approx(value, rel=1e-5, abs=1e-6)), key
    np.testing.assert_allclose(found["singular_values"], np.linalg.svd(W, compute_uv=False), rtol=1e-6, atol=1e-6)


def with_singular_values(s, m, n, seed=0):
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.standard_normal((size, len(s))))[0] for size in (m, n))
    return U * s @ V.T


@pytest.mark.parametrize(("m", "n"), [(64, 64), (96, 32), (32, 96)])
def test_decomposition_is_as_exact_as_an_svd_down_to_a_thousandth_of_the_largest(m, n):
    s = 10.0 ** np.linspace(2, -4, 32)
    matrices = np.stack([with_singular_values(s, m, n, seed) for seed in range(3)])
    found = decompose(torch.from_numpy(matrices))
    U, exact, Vt = np.linalg.svd(matrices, full_matrices=False)
    strong = exact[0, : len(s)] > 1e-3 * exact[0, 0]
    np.testing.assert_allclose(found.singular_values[:, : len(s)][:, strong], exact[:, : len(s)][:, strong], rtol=1e-9)
    assert (found.singular_values[:, len(s) :] < 1e-6).all()
    for ours, theirs in ((found.left.numpy(), U[:, :, :5]), (found.right.numpy(), Vt[:, :5].transpose(0, 2, 1))):
        cosines = np.linalg.svd(ours.transpose(0, 2, 1) @ theirs, compute_uv=False)
        assert np.arccos(np.clip(cosines, 0, 1)).max() < 1e-6  # principal angles
        np.testing.assert_allclose(ours.transpose(0, 2, 1) @ ours, np.tile(np.eye(5), (3, 1, 1)), atol=1e-10)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_decomposition_does_not_mind_the_scale_of_fp32(scale):
    W = torch.randn(2, 20, 30, generator=torch.Generator().manual_seed(0)) * scale
    exact = torch.linalg.svdvals(W.double())
    torch.testing.assert_close(decompose(W).singular_values, exact, rtol=1e-10, atol=0)


def test_a_matrix_that_is_not_finite_or_does_not_converge_spoils_no_other(monkeypatch):
    W = torch.randn(5, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.svdvals(W)
    W[1, 2, 3] = torch.nan
    leading = eigh._leading

    def stubborn(gram, k):
        return None if np.array_equal(gram, np.eye(6)) else leading(gram, k)

    monkeypatch.setattr(eigh, "_leading", stubborn)
    W[3] = torch.eye(8, 6, dtype=torch.float64)
    found = decompose(W).singular_values
    assert found[[1, 3]].isnan().all()
    torch.testing.assert_close(found[[0, 2, 4]], exact[[0, 2, 4]], rtol=1e-9, atol=1e-9)


def test_low_rank_has_exact_zeros_and_the_entropy_of_what_is_left():
    s = np.array([3.0, 2.0, 1.0])
    found = record_of(torch.from_numpy(with_singular_values(s, 40, 30)))
    p = s / s.sum()
    assert found["singular_values"][3:] == [0.0] * 27
    assert found["entropy"] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-6)
    assert found["stable_rank"] == pytest.approx(14 / 9)


def test_the_gap_tells_a_flat_update_from_one_with_five_leading_directions():
    flat = with_singular_values(np.ones(20), 20, 30)
    leading = with_singular_values(np.array([1.0] * 5 + [0.25] * 15), 20, 30)
    W = torch.randn(20, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert record_of(W, torch.from_numpy(flat))["update_gap"] == pytest.approx(0, abs=1e-9)
    assert record_of(W, torch.from_numpy(leading))["update_gap"] == pytest.approx(0.75)
    assert record_of(W[:5], torch.from_numpy(leading)[:5])["update_gap"] is None


@pytest.mark.parametrize(
    ("name", "spectral_norm", "effective_rank", "spectral_entropy"),
    [("q", 0.90, 412, 0.920), ("k", 0.77, 237, 0.954), ("up", 1.35, 495, 0.980)],
)
def test_the_88m_model_starts_at_the_design_s_reference_values(name, spectral_norm, effective_rank, spectral_entropy):
    torch.manual_seed(0)
    bank = next(b for b in Transformer(SIZES["88m"], vocab_size=8).banks() if name in b.members)
    spectra = decompose(bank.parameter.detach()[:4])
    records = [projection_record(spectra.of(i), None, None) for i in range(4)]
    for key, expected in (
        ("spectral_norm", spectral_norm),
        ("effective_rank", effective_rank),
        ("spectral_entropy", spectral_entropy),
    ):
        assert np.mean([record[key] for record in records]) == pytest.approx(expected, rel=0.01)


def test_an_orthogonal_matrix_has_full_rank_and_no_error():
    Q = torch.linalg.qr(torch.randn(40, 24, dtype=torch.float64)).Q
    found = record_of(3 * Q, None, None)
    assert found["spectral_norm"] == pytest.approx(3)
    assert found["effective_rank"] == pytest.approx(24)
    assert found["stable_rank"] == pytest.approx(24)
    assert found["spectral_entropy"] == pytest.approx(1)
    assert found["orthogonality_error"] == pytest.approx(0, abs=1e-7)


def test_alignment_is_one_for_the_same_subspace_and_null_for_too_low_a_rank():
    W = torch.randn(30, 20, dtype=torch.float64)
    same = record_of(W, -0.1 * W, W)
    assert same["left_alignment"] == pytest.approx(1)
    assert same["right_alignment"] == pytest.approx(1)
    low_rank = torch.randn(30, 3, dtype=torch.float64) @ torch.randn(3, 20, dtype=torch.float64)
    for weight, update in ((low_rank, W), (W, low_rank), (W, torch.zeros(30, 20))):
        found = record_of(weight, update, W)
        assert found["left_alignment"] is None
        assert found["right_alignment"] is None


def test_undefined_values_are_null_and_the_line_is_strict_json():
    zero = torch.zeros(8, 6)
    found = record_of(zero, zero, zero)
    assert found["spectral_norm"] == 0.0
    assert found["weight_norm"] == 0.0
    for key in ("entropy", "effective_rank", "spectral_entropy", "stable_rank", "orthogonality_error"):
        assert found[key] is None, key
    assert found["update_effective_rank"] is None
    broken = record_of(torch.full((8, 6), math.nan), torch.ones(8, 6), torch.full((8, 6), math.inf))
    assert broken["spectral_norm"] is None
    assert broken["grad_norm"] is None
    for record in (found, broken):
        assert "NaN" not in json.dumps(record, allow_nan=False)


def test_without_an_update_the_update_keys_are_null():
    found = record_of(torch.randn(8, 6), None, None)
    for key in (*UPDATE_KEYS, "grad_norm"):
        assert found[key] is None, key
    assert found["left_alignment_chance"] is not None


@pytest.mark.parametrize(("dimension", "expected"), [(256, 0.116), (512, 0.081), (2048, 0.041)])
def test_chance_level_of_alignment_equals_the_published_simulation(dimension, expected):
    assert chance_alignment(dimension, 5) == pytest.approx(expected, rel=0.02)


def test_random_updates_are_aligned_at_the_chance_level():
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(40, 2, 64, 96, generator=generator)
    records = [record_of(W, dW, W) for W, dW in pairs]
    for side in ("left", "right"):
        mean = np.mean([record[f"{side}_alignment"] for record in records])
        assert mean == pytest.approx(records[0][f"{side}_alignment_chance"], rel=0.1)


def test_cutting_a_jsonl_drops_later_steps_and_damaged_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(5)) + '{"step": 5, "lo')
    with path.open("a") as file:
        file.write("\n" + "[" * 100_000 + '\n"step"\n[]\n{"step": null}\n{}\n\n')
    cut_jsonl(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]
    assert path.read_text().endswith("\n")


@pytest.mark.parametrize("n", [1, 2, 5, 70])
@pytest.mark.parametrize("threads", [1, 2])
def test_leading_eigenvectors_are_those_of_numpy(n, threads):
    rng = np.random.default_rng(n)
    gram = np.stack([X @ X.T for X in rng.standard_normal((3, n, n))])
    before, k = torch.get_num_threads(), min(5, n)
    torch.set_num_threads(threads)
    try:
        values, vectors = eigh.eigh_leading(torch.from_numpy(np.tril(gram)), k)
    finally:
        torch.set_num_threads(before)
    exact_values, exact_vectors = np.linalg.eigh(gram)
    np.testing.assert_allclose(values.flip(-1), exact_values, rtol=0, atol=1e-12 * exact_values.max())
    overlap = np.abs(np.einsum("bik,bik->bk", vectors, exact_vectors[:, :, ::-1][:, :, :k]))
    np.testing.assert_allclose(overlap, 1, atol=1e-9)


def test_eigenvalues_leave_the_interpreter_to_other_threads():
    """SciPy's wrappers would hold it for all of a reduction, and a training loop would stand still."""
    eigh.eigh_leading(torch.eye(2, dtype=torch.float64)[None], 1)  # finds the libraries
    gram = torch.rand(1, 1000, 1000, dtype=torch.float64)
    worker = threading.Thread(target=eigh.eigh_leading, args=(gram + gram.mT, 5))
    ticks = [time.perf_counter()]
    worker.start()
    while worker.is_alive():
        time.sleep(0.001)
        ticks.append(time.perf_counter())
    assert np.diff(ticks).max() < 0.3 * (ticks[-1] - ticks[0])
