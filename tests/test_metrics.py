import json
import math

import numpy as np
import pytest
import torch

from metrics import SpectraRecorder, chance_alignment, cut_jsonl, projection_record
from model import ModelConfig, Transformer
from optim import build_optimizers

UPDATE_KEYS = ("left_alignment", "right_alignment", "update_norm", "update_effective_rank")


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
    Ud, sd, Vdt = np.linalg.svd(dW)
    pd = sd[sd > 0] / sd.sum()
    record["update_effective_rank"] = math.exp(-(pd * np.log(pd)).sum())
    k = min(5, r)
    record["left_alignment"] = np.linalg.svd(U[:, :k].T @ Ud[:, :k], compute_uv=False).mean()
    record["right_alignment"] = np.linalg.svd(Vt[:k] @ Vdt[:k].T, compute_uv=False).mean()
    return record


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (32, 32), (1, 20), (20, 1), (3, 40)])
def test_every_metric_agrees_with_numpy(shape):
    rng = np.random.default_rng(0)
    W, dW, G = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
    found = projection_record(*map(torch.from_numpy, (W, dW, G)))
    for key, expected in numpy_record(*(M.astype(np.float64) for M in (W, dW, G))).items():
        assert found[key] == (None if expected is None else pytest.approx(expected, rel=1e-5)), key
    np.testing.assert_allclose(
        found["singular_values"], np.linalg.svd(W.astype(np.float64), compute_uv=False), rtol=1e-6
    )


def test_an_orthogonal_matrix_has_full_rank_and_no_error():
    Q = torch.linalg.qr(torch.randn(40, 24, dtype=torch.float64)).Q
    found = projection_record(3 * Q, None, None)
    assert found["spectral_norm"] == pytest.approx(3)
    assert found["effective_rank"] == pytest.approx(24)
    assert found["stable_rank"] == pytest.approx(24)
    assert found["spectral_entropy"] == pytest.approx(1)
    assert found["orthogonality_error"] == pytest.approx(0, abs=1e-7)


def test_alignment_is_one_for_the_same_subspace_and_null_for_too_low_a_rank():
    W = torch.randn(30, 20, dtype=torch.float64)
    same = projection_record(W, -0.1 * W, W)
    assert same["left_alignment"] == pytest.approx(1)
    assert same["right_alignment"] == pytest.approx(1)
    low_rank = torch.randn(30, 3, dtype=torch.float64) @ torch.randn(3, 20, dtype=torch.float64)
    for weight, update in ((low_rank, W), (W, low_rank), (W, torch.zeros(30, 20))):
        found = projection_record(weight, update, W)
        assert found["left_alignment"] is None
        assert found["right_alignment"] is None


def test_undefined_values_are_null_and_the_line_is_strict_json():
    zero = torch.zeros(8, 6)
    found = projection_record(zero, zero, zero)
    assert found["spectral_norm"] == 0.0
    assert found["weight_norm"] == 0.0
    for key in ("entropy", "effective_rank", "spectral_entropy", "stable_rank", "orthogonality_error"):
        assert found[key] is None, key
    assert found["update_effective_rank"] is None
    broken = projection_record(torch.full((8, 6), math.nan), torch.ones(8, 6), torch.full((8, 6), math.inf))
    assert broken["spectral_norm"] is None
    assert broken["grad_norm"] is None
    for record in (found, broken):
        assert "NaN" not in json.dumps(record, allow_nan=False)


def test_without_an_update_the_update_keys_are_null():
    found = projection_record(torch.randn(8, 6), None, None)
    for key in (*UPDATE_KEYS, "grad_norm"):
        assert found[key] is None, key
    assert found["left_alignment_chance"] is not None


@pytest.mark.parametrize(("dimension", "expected"), [(256, 0.116), (512, 0.081), (2048, 0.041)])
def test_chance_level_of_alignment_equals_the_published_simulation(dimension, expected):
    assert chance_alignment(dimension, 5) == pytest.approx(expected, rel=0.02)


def test_random_updates_are_aligned_at_the_chance_level():
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(40, 2, 64, 96, generator=generator)
    records = [projection_record(W, dW, W) for W, dW in pairs]
    for side in ("left", "right"):
        mean = np.mean([record[f"{side}_alignment"] for record in records])
        assert mean == pytest.approx(records[0][f"{side}_alignment_chance"], rel=0.1)


def test_recorded_gradient_norm_is_the_gradients_and_the_update_is_this_steps(tmp_path):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(32, 2, 4, 2, 48, seq_len=16), vocab_size=40)
    optimizers = build_optimizers(model, "muon", lr=0.05, adamw_lr=0.01)
    recorder = SpectraRecorder(model, tmp_path / "spectra.jsonl")
    recorder.record(0, 0)
    tokens = torch.randint(40, (2, 17))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    projections = [(p.layer, p.name, p.weight) for p in model.projections()]
    banks = [bank.parameter for bank in model.banks()]
    gradients = torch.autograd.grad(loss, banks, retain_graph=True)
    expected = {(p.layer, p.name): p.weight.norm().item() for p in model.projections(gradients)}
    before = {(layer, name): weight.detach().clone() for layer, name, weight in projections}
    loss.backward()
    recorder.before_update()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    for optimizer in optimizers:
        optimizer.step()
    recorder.record(1, 32)
    lines = [json.loads(line) for line in (tmp_path / "spectra.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0] * 12 + [1] * 12
    for line in lines[12:]:
        key = line["layer"], line["proj"]
        weight = next(w for layer, name, w in projections if (layer, name) == key)
        assert line["grad_norm"] == pytest.approx(expected[key], rel=1e-5)
        assert line["update_norm"] == pytest.approx((weight - before[key]).norm().item(), rel=1e-5)
        assert len(line["singular_values"]) == min(weight.shape)


def test_cutting_a_jsonl_drops_later_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(5)) + '{"step": 5, "lo')
    cut_jsonl(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]
    assert path.read_text().endswith("\n")
