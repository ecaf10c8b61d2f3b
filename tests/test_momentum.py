"""What the optimizers make their updates of agrees with the state in checkpoints, the reach with Newton-Schulz."""

import json
import math

import numpy as np
import pytest
import torch

from analysis import plots_momentum
from analysis.runs import load_run
from engine.cli import BadInput
from kernels import orthogonalize
from kernels.newton_schulz import COEFFICIENTS, reach
from metrics import momentum_record
from model import PROJECTIONS, ModelConfig, Transformer
from optim import muon_names, parameter_layout

SMALL = ModelConfig(32, 2, 2, 1, 64, seq_len=32, ffn="relu2", qk_norm=True)
MIXED = ModelConfig(32, 2, 2, 1, 64, seq_len=32, ffn="silu", qk_norm=True, experts=3, top_k=2)
MOMENTUM, BETA1, STEPS = 0.8, 0.7, 6


@pytest.mark.parametrize("steps", [1, 3, 5, 8])
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_a_singular_value_at_the_reach_comes_out_as_a_half(coefficients, steps):
    """Of the orthogonalised matrix itself; below, every singular value comes out smaller."""
    least = reach(coefficients, steps)
    for share in (0.25, 0.5, 0.9, 0.998, 1.002):
        s = share * least
        G = torch.diag(torch.tensor([math.sqrt(1 - s**2), s], dtype=torch.float64))  # of norm 1
        found = orthogonalize(G, steps=steps, coefficients=coefficients)[1, 1].item()
        assert (found >= 0.5) == (share > 1), (share, found)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_a_momentums_record_agrees_with_numpy(shape):
    rng = np.random.default_rng(0)
    u = rng.standard_normal(shape) * 10.0 ** -np.arange(shape[1])
    s = np.linalg.svd(u, compute_uv=False)
    found = momentum_record(torch.from_numpy(s.copy()), 1e-3)
    p = s / s.sum()
    assert found["momentum_stable_rank"] == pytest.approx((np.linalg.norm(u) / np.linalg.norm(u, 2)) ** 2)
    assert found["momentum_effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert found["momentum_below_range"] == pytest.approx(np.mean(s / np.linalg.norm(u) < 1e-3))
    assert found["momentum_below_range"] > 0.2
    np.testing.assert_allclose(found["momentum_singular_values"], s, rtol=5e-4)


@pytest.mark.parametrize("s", [[0.0, 0.0], [math.nan, math.nan]])
def test_what_is_undefined_of_a_momentum_is_null(s):
    found = momentum_record(torch.tensor(s, dtype=torch.float64), 1e-3)
    assert {found[f"momentum_{key}"] for key in ("stable_rank", "effective_rank", "below_range")} == {None}
    json.dumps(found, allow_nan=False)
    assert set(momentum_record(None, None).values()) == {None}


def matrices(folder, optimizer, muon_on, config):
    """(layer, projection, expert) -> {key: state, as the map} of the checkpoints after the last step and one before."""
    apart = frozenset(PROJECTIONS).difference(muon_names(muon_on, config))  # as train.py stores them
    found = {}
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        contents = torch.load(folder / name, weights_only=True)
        model = Transformer(config, len(contents["model"]["embedding"]), apart=apart)
        state = {}
        layout = parameter_layout(model, optimizer, muon_on=muon_on)
        for groups, of_optimizer in zip(layout, contents["optimizer"], strict=True):
            for number, p in enumerate(p for group in groups for p in group):
                state[id(p)] = of_optimizer["state"][number]
        banks = [state[id(bank.parameter)] for bank in model.banks()]
        for key in ("momentum_buffer", "exp_avg"):
            parameters = zip(banks, model.weights.values(), strict=True)
            held = [bank.get(key, torch.full_like(p, torch.nan)) for bank, p in parameters]
            for p in model.projections(held):
                found.setdefault((p.layer, p.name, p.expert), {})[key, name] = p.weight.double().numpy()
    return found


@pytest.mark.parametrize(
    ("words", "muon_on", "config"),
    [
        (("--optimizer", "adamw"), "blocks", SMALL),
        (("--optimizer", "muon", "--no-nesterov"), "blocks", SMALL),
        (("--optimizer", "muon"), "blocks", SMALL),
        (
            ("--optimizer", "muon", "--muon-on", "q,down", "--experts", 3, "--top-k", 2, "--ffn", "silu"),
            "q,down",
            MIXED,
        ),
    ],
    ids=["adamw", "muon", "nesterov", "both, mixture"],
)
def test_logged_momenta_are_those_of_the_checkpoint(train_small, words, muon_on, config):
    """Clipped gradients go in: --grad-clip is far below their norm. Nesterov's mix needs the gradient, which follows
    from two buffers one step apart: m' = mu m + (1 - mu) g."""
    arguments = ("--tokens", STEPS * 256, "--checkpoint-every", STEPS - 1, "--spectra-every", 3, "--grad-clip", 0.01)
    code, folder, _, _ = train_small("run", *words, *arguments, "--momentum", MOMENTUM, "--beta1", BETA1)
    assert code == 0
    states = matrices(folder, words[1], muon_on, config)
    lines = [json.loads(line) for line in (folder / "manifold_stats.jsonl").read_text().splitlines()]
    assert all(line["momentum_singular_values"] is None for line in lines if line["step"] == 0)
    last = [line for line in lines if line["step"] == STEPS]
    assert len(last) == len(states) > 0
    for line in last:
        state = states[line["layer"], line["proj"], line.get("expert")]
        if np.isfinite(u := state["momentum_buffer", "checkpoint.pt"]).all():
            assert muon_on == "blocks" or line["proj"] in muon_on
            if "--no-nesterov" not in words:
                gradient = (u - MOMENTUM * state["momentum_buffer", "checkpoint.prev.pt"]) / (1 - MOMENTUM)
                u = (1 - MOMENTUM) * gradient + MOMENTUM * u
        else:
            u = state["exp_avg", "checkpoint.pt"]
        s, norm = np.linalg.svd(u, compute_uv=False), np.linalg.norm(u)
        p = s[s > 0] / s.sum()
        assert line["momentum_stable_rank"] == pytest.approx((norm / s[0]) ** 2, rel=1e-4)
        assert line["momentum_effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-3)
        np.testing.assert_allclose(line["momentum_singular_values"], s, rtol=1e-3, atol=1e-5 * s[0])
        assert line["momentum_range"] == pytest.approx(5.6e-4, rel=0.01)
        assert line["momentum_below_range"] == pytest.approx(np.mean(s / norm < line["momentum_range"]), abs=1 / len(s))


def test_the_gradient_is_fed_where_it_is_orthogonalised_before_the_momentum(train_small):
    words = ("--ns-before-momentum", "--ns-steps", "2:0.5,4", "--tokens", 4 * 256, "--spectra-every", 1)
    _, folder, _, _ = train_small("run", *words)
    for line in map(json.loads, (folder / "manifold_stats.jsonl").read_text().splitlines()):
        if line["step"]:
            assert line["momentum_effective_rank"] == pytest.approx(line["grad_effective_rank"], rel=1e-5)
            assert line["momentum_range"] == pytest.approx(reach("polar_express", 2 if line["step"] <= 2 else 4), 1e-6)


def test_no_reach_is_claimed_where_nothing_is_iterated_nor_a_residual_of_what_is_cut(train_small):
    words = ("--ns-method", "svd", "--heads-per-matrix", 1, "--tokens", 2 * 256, "--spectra-every", 1)
    _, folder, _, _ = train_small("run", *words)
    for line in map(json.loads, (folder / "manifold_stats.jsonl").read_text().splitlines()):
        assert line["momentum_range"] is None
        assert line["momentum_below_range"] is None
        if line["step"]:
            assert line["momentum_stable_rank"] > 1
            cut = line["proj"] in ("q", "k", "v")
            assert (line["ns_residual"] is None) == cut
            assert cut or line["ns_residual"] < 1e-3
    runs = plots_momentum.with_momentum([load_run(folder)])
    figure = plots_momentum.momentum_spectra(runs)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["first layer", "last layer"]
    plots_momentum.momentum_over_time(runs)


def test_heads_apart_hide_the_reach_of_their_projections_alone(train_small):
    words = ("--heads-per-matrix", 1, "--tokens", 256, "--spectra-every", 1)
    _, folder, _, _ = train_small("run", *words)
    found = {}
    for line in map(json.loads, (folder / "manifold_stats.jsonl").read_text().splitlines()):
        found.setdefault(line["step"] and line["proj"], []).append(line["momentum_range"])
    assert set(found["q"] + found["k"] + found["v"]) == {None}
    assert found["o"] + found["up"] + found["down"] == pytest.approx([5.6e-4] * 6, rel=0.01)


def test_momentum_values_of_the_wrong_number_are_refused(train_small):
    _, folder, _, _ = train_small("run", "--tokens", 512, "--spectra-every", 1)
    run = load_run(folder)
    steps, values = run.singular_values("q", 1, "momentum_singular_values")
    assert (steps.tolist(), values.shape) == ([1, 2], (2, 32))
    path = folder / "manifold_stats.jsonl"
    *others, last = path.read_text().splitlines()
    last = json.loads(last)
    last["momentum_singular_values"] = last["momentum_singular_values"][1:]
    path.write_text("\n".join([*others, json.dumps(last)]) + "\n")
    with pytest.raises(BadInput, match="31 singular values, earlier lines of down have 32"):
        load_run(folder)
