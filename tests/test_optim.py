import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import Muon, orthogonalize
from kernels.newton_schulz import coefficient_schedule
from kernels.optimizer import update_scale
from model import SIZES, Bank, ModelConfig, Transformer
from optim import SCHEDULES, build_optimizers, lr_multiplier, ns_schedule, ns_steps_at, set_lr

SMALL = ModelConfig(32, 2, 4, 2, 64, seq_len=16)


def small_model():
    torch.manual_seed(0)
    return Transformer(SMALL, vocab_size=40)


def take_gradients(model, seed=1):
    tokens = torch.randint(40, (2, 17), generator=torch.Generator().manual_seed(seed))
    model(tokens[:, :-1], tokens[:, 1:]).backward()


def rates(schedule, updates=100, warmup=0.1, min_lr=0.1):
    return [lr_multiplier(t, updates, schedule, warmup, min_lr) for t in range(updates)]


@given(schedule=st.sampled_from(SCHEDULES), updates=st.integers(1, 500), warmup=st.floats(0, 1), min_lr=st.floats(0, 1))
def test_first_rate_is_not_zero_and_none_exceeds_the_peak(schedule, updates, warmup, min_lr):
    factors = rates(schedule, updates, warmup, min_lr)
    assert factors[0] > 0
    assert all(0 <= f <= 1 for f in factors)
    after_warmup = factors[round(warmup * updates) :]
    assert after_warmup == sorted(after_warmup, reverse=True)


def test_warmup_rises_in_updates_and_ends_at_the_peak():
    assert rates("constant")[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])
    for schedule in ("cosine", "linear", "wsd"):
        assert rates(schedule)[9] == rates(schedule)[10] == 1.0


def test_decay_ends_at_min_lr_on_the_last_update():
    for schedule in ("cosine", "linear", "wsd"):
        assert rates(schedule)[-1] == pytest.approx(0.1)
    middle = 10 + 89 / 2
    assert rates("linear")[54] == pytest.approx(1 - 0.9 * 44 / 89)
    assert rates("cosine")[54] == pytest.approx(0.55 + 0.45 * math.cos(math.pi * 44 / 89))
    assert rates("cosine")[54] > 0.55 > rates("cosine")[math.ceil(middle)]


def test_step_halves_twice_and_wsd_falls_over_the_last_fifth():
    assert [rates("step", warmup=0)[t] for t in (0, 39, 40, 79, 80, 99)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert rates("wsd")[79] == 1.0
    assert rates("wsd")[80] == pytest.approx(1 - 0.9 / 20)


def test_update_scale_follows_out_and_in():
    assert update_scale(2048, 512, "spectral") == 2.0
    assert update_scale(512, 2048, "spectral") == 1.0
    assert update_scale(512, 2048, "rms") == pytest.approx(0.2 * 2048**0.5)
    assert update_scale(512, 2048, "none") == 1.0


def test_newton_schulz_iterations_change_at_shares_of_the_run():
    assert [ns_steps_at(t, 4, 5) for t in range(4)] == [5, 5, 5, 5]
    assert [ns_steps_at(t, 8, "3:0.5,5") for t in range(8)] == [3, 3, 3, 3, 5, 5, 5, 5]
    assert [ns_steps_at(t, 10, "1:0.25,7:0.3,2") for t in range(10)] == [1, 1, 1, 2, 2, 2, 2, 2, 2, 2]
    assert ns_schedule("3:0.5,5") == [(3, 0.5), (5, 1.0)]


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("three", "must be a number of iterations"),
        ("3:0.5", "must be a number of iterations"),
        ("3,5", "must be a number of iterations"),
        ("3.5", "must be a number of iterations"),
        ("", "must be a number of iterations"),
        ("3:0.5,5:0.4,7", "shares of the run must rise between 0 and 1"),
        ("3:0,5", "shares of the run must rise"),
        ("3:1,5", "shares of the run must rise"),
        ("3:nan,5", "shares of the run must rise"),
        ("0:0.5,5", "must be at least 1"),
        (0, "must be at least 1"),
    ],
)
def test_iterations_that_make_no_sense_are_refused(words, fault):
    with pytest.raises(ValueError, match=fault):
        ns_schedule(words)


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (64, 64)])
def test_agrees_with_torchs_muon(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    options = {"lr": 0.05, "momentum": 0.95, "nesterov": True, "weight_decay": 0.1}
    mine = Muon([ours], ns_coefficients="quintic", **options)
    reference = torch.optim.Muon([theirs], **options)
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        before = ours.detach().clone()
        mine.step()
        theirs.data.copy_(before)  # compare single updates, momentum carried along
        reference.step()
        update = (theirs - before).norm()
        assert (ours - theirs).norm() / update < 0.02


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
def test_agrees_with_a_plain_fp32_loop(nesterov, coefficients):
    torch.manual_seed(0)
    bank = torch.nn.Parameter(torch.randn(3, 40, 24))
    expected = bank.detach().clone()
    momenta = torch.zeros(3, 40, 24)
    optimizer = Muon(
        [{"params": [bank], "transposed": (False, True, False)}],
        lr=0.02,
        momentum=0.9,
        nesterov=nesterov,
        weight_decay=0.5,
        ns_coefficients=coefficients,
    )
    for _ in range(4):
        bank.grad = torch.randn(3, 40, 24)
        optimizer.step()
        for i in range(3):
            g = bank.grad[i]
            momenta[i] = 0.9 * momenta[i] + 0.1 * g
            u = 0.1 * g + 0.9 * momenta[i] if nesterov else momenta[i]
            x = u.T / u.norm() / (1.01 * 1.05 if coefficients == "polar_express" else 1.0)
            for a, b, c in coefficient_schedule(coefficients, 5):
                xx = x @ x.T
                x = a * x + (b * xx + c * xx @ xx) @ x
            scale = 1.0 if i == 1 else (40 / 24) ** 0.5
            expected[i] = (1 - 0.02 * 0.5) * expected[i] - 0.02 * scale * x.T
    assert (bank - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("nesterov", [True, False])
def test_newton_schulz_before_momentum_is_the_documents_loop_at_a_rate_scaled_by_its_sum(nesterov):
    """S4, appendix C.1: g <- NS(g), buf <- m buf + g, W <- W - lr (g + m buf), whose buf sums where ours averages."""
    torch.manual_seed(0)
    bank = torch.nn.Parameter(torch.randn(2, 12, 20))
    expected, buffer = bank.detach().double().numpy(), np.zeros((2, 12, 20))
    options = {"nesterov": nesterov, "ns_coefficients": "cubic", "ns_steps": 25, "ns_before_momentum": True}
    optimizer = Muon([bank], lr=0.05, momentum=0.9, **options)
    for _ in range(5):
        bank.grad = torch.randn(2, 12, 20)
        optimizer.step()
        U, _, Vh = np.linalg.svd(bank.grad.double().numpy(), full_matrices=False)
        buffer = 0.9 * buffer + U @ Vh
        expected = expected - 0.05 * (1 - 0.9) * (U @ Vh + 0.9 * buffer if nesterov else buffer)
    np.testing.assert_allclose(bank.detach().numpy(), expected, rtol=0, atol=1e-5)


def test_muon_takes_a_state_that_was_saved_before_its_options():
    optimizer = Muon([torch.nn.Parameter(torch.randn(4, 6))])
    state = optimizer.state_dict()
    for option in ("ns_before_momentum", "normalize_rows", "decay_rule", "row_blocks"):
        del state["param_groups"][0][option]
    optimizer.load_state_dict(state)
    optimizer.param_groups[0]["params"][0].grad = torch.randn(4, 6)
    optimizer.step()


def test_the_update_of_every_projection_is_orthogonal():
    model = small_model()
    optimizers = build_optimizers(model, "muon", lr=0.1, adamw_lr=0.01)
    before = {(p.layer, p.name): p.weight.detach().clone() for p in model.projections()}
    take_gradients(model)
    for optimizer in optimizers:
        optimizer.step()
    for p in model.projections():
        update = (p.weight.detach() - before[p.layer, p.name]) / 0.1
        rows, cols = update.shape
        s = torch.linalg.svdvals(update) / max(1, rows / cols) ** 0.5
        assert s[0] < 1.15, p.name
        assert s[len(s) // 2] > 0.8, p.name  # small gradients of a fresh model may have rank below r


def test_a_fused_bank_is_split_by_rows_or_merged_on_request():
    torch.manual_seed(0)
    gradient = torch.randn(2, 64, 32)
    split, merged = torch.nn.Parameter(torch.zeros(2, 64, 32)), torch.nn.Parameter(torch.zeros(2, 64, 32))
    split.grad, merged.grad = gradient.clone(), gradient.clone()
    options = {"lr": 1.0, "momentum": 0.0, "lr_scale": "none"}
    Muon([{"params": [split], "row_splits": (32, 16, 16)}], **options).step()
    Muon([merged], **options).step()
    q, k, v = (orthogonalize(-gradient[:, rows]) for rows in (slice(0, 32), slice(32, 48), slice(48, 64)))
    torch.testing.assert_close(split.detach(), torch.cat((q, k, v), dim=1), rtol=0, atol=1e-6)
    torch.testing.assert_close(merged.detach(), orthogonalize(-gradient), rtol=0, atol=1e-6)


@pytest.mark.parametrize("decay_on", ["blocks", "matrices"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_parameter_is_in_exactly_one_group_with_the_rate_of_its_kind(optimizer, decay_on):
    model = Transformer(SIZES["moe-nano"], vocab_size=64)
    optimizers = build_optimizers(model, optimizer, lr=0.03, adamw_lr=0.004, weight_decay=0.2, decay_on=decay_on)
    groups = [(o, group) for o in optimizers for group in o.param_groups]
    found = {}
    for o, group in groups:
        for p in group["params"]:
            assert id(p) not in found
            found[id(p)] = (type(o).__name__, group["lr"], group["weight_decay"])
    for name, p in model.named_parameters():
        if name.startswith("weights."):
            assert found[id(p)] == ("Muon" if optimizer == "muon" else "AdamW", 0.03, 0.2), name
        else:
            decays = decay_on == "matrices" and name in ("embedding", "router")
            assert found[id(p)] == ("AdamW", 0.004, 0.2 if decays else 0.0), name


def test_a_parameter_in_no_group_is_noticed():
    model = small_model()
    stranger = Bank(torch.nn.Parameter(torch.zeros(2, 4, 4)), ("q",), 2)
    model.banks = lambda: [stranger, *Transformer.banks(model)[1:]]
    with pytest.raises(AssertionError, match="exactly one group"):
        build_optimizers(model, "muon", lr=0.03, adamw_lr=0.004)


def test_the_embedding_moves_at_its_own_rate():
    moved = {}
    for adamw_lr in (0.001, 0.002):
        model = small_model()
        optimizers = build_optimizers(model, "muon", lr=0.02, adamw_lr=adamw_lr)
        set_lr(optimizers, 0.5)
        before = [p.detach().clone() for p in (model.embedding, model.banks()[0].parameter)]
        take_gradients(model)
        for o in optimizers:
            o.step()
        after = (model.embedding, model.banks()[0].parameter)
        moved[adamw_lr] = [(a - b).abs().max().item() for a, b in zip(after, before, strict=True)]
    assert moved[0.001][0] == pytest.approx(0.0005, rel=0.01)  # AdamW's first step is its rate
    assert moved[0.002][0] == pytest.approx(0.001, rel=0.01)
    assert moved[0.001][1] == moved[0.002][1]


@pytest.mark.parametrize(
    ("options", "word"),
    [({"momentum": 1.0}, "momentum"), ({"lr": -1.0}, "lr"), ({"ns_coefficients": "sextic"}, "sextic")],
)
def test_muon_refuses_settings_out_of_range(options, word):
    with pytest.raises(ValueError, match=word):
        Muon([torch.nn.Parameter(torch.zeros(2, 2))], **options)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((3,), {}),
        ((4, 6), {"row_splits": (2, 3)}),
        ((4, 6), {"row_splits": (4, 0)}),
        ((2, 4, 6), {"transposed": (True,)}),
        ((1, 1, 1, 1, 1), {}),
        ((8,), {"flatten": True}),
        ((4, 2, 3, 3), {"flatten": True, "row_splits": (2, 1)}),
        ((4, 2, 3, 3), {"flatten": True, "transposed": (True,) * 4}),
    ],
)
def test_muon_refuses_parameters_that_are_no_matrices(shape, options):
    group = {"params": [torch.nn.Parameter(torch.zeros(shape))], **options}
    with pytest.raises(ValueError, match=r"matri|row_splits"):
        Muon([group])
    optimizer = Muon([torch.nn.Parameter(torch.zeros(2, 2))])
    with pytest.raises(ValueError, match=r"matri|row_splits"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


def test_loading_a_state_or_copying_forgets_captured_steps():
    optimizer = Muon([torch.nn.Parameter(torch.zeros(2, 2))], capture=False)
    optimizer.graphs, optimizer.scalars = {("stale",): None}, [torch.zeros(())]
    duplicate = copy.deepcopy(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    for muon in (optimizer, duplicate):
        assert muon.graphs == {}
        assert muon.capture is False
        assert muon.scalars == []
    assert duplicate.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
