"""Mixtures of experts: the model, its optimizer and its run."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from engine.step import TrainingStep
from kernels.optimizer import scales_of
from model import SIZES, ModelConfig, Transformer
from optim import Muon, build_optimizers, step_cost
from tests.conftest import ask_to_stop
from tests.test_train import lines, losses, without_time

SMALL = ModelConfig(d_model=32, layers=2, heads=4, kv_heads=4, d_ff=48, seq_len=24, ffn="silu", experts=4)
MOE = ("--model", "moe-nano", "--kv-heads", 2, "--experts", 4)


def small_model(**changes):
    torch.manual_seed(0)
    return Transformer(replace(SMALL, **changes), vocab_size=50)


def some_tokens():
    return torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(1))


def test_parameter_counts_of_the_79m_mixture_equal_the_published_ones():
    with torch.device("meta"):
        model = Transformer(SIZES["moe-79m"], vocab_size=49_152)
    head, attention, expert, router, gains = 49_152 * 384, 6 * 4 * 384**2, 2 * 1536 * 384, 6 * 8 * 384, 13 * 384
    assert model.parameter_count() == head + attention + 6 * 8 * expert + router + gains == 79_059_840
    assert model.active_parameter_count() == head + attention + 6 * 2 * expert + router + gains
    assert round(100 * model.active_parameter_count() / model.parameter_count(), 1) == 46.3
    assert model.matmul_parameter_count() == head + attention + 6 * 8 * expert + router
    assert model.active_matmul_parameter_count() == head + attention + 6 * 2 * expert + router
    assert model.flops_per_token(512) == 6 * (head + attention + 12 * expert + router) + 12 * 6 * 384 * 512


def test_a_dense_model_is_all_active():
    with torch.device("meta"):
        model = Transformer(SIZES["29m"], vocab_size=49_152)
    assert model.active_parameter_count() == model.parameter_count()
    assert model.active_matmul_parameter_count() == model.matmul_parameter_count()


@pytest.mark.parametrize("ffn", ["silu", "swiglu"])
def test_projections_cover_every_expert_once_with_the_shape_of_the_map(ffn):
    model = small_model(ffn=ffn)
    seen = [(p.layer, p.name, p.expert, tuple(p.weight.shape)) for p in model.projections()]
    routed = {"up": (48, 32), "down": (32, 48)} | ({"gate": (48, 32)} if ffn == "swiglu" else {})
    expected = [(layer, name, None, (32, 32)) for layer in range(2) for name in "qkvo"]
    expected += [(layer, name, e, shape) for layer in range(2) for name, shape in routed.items() for e in range(4)]
    assert sorted(seen, key=str) == sorted(expected, key=str)
    with torch.no_grad():
        for p in model.projections():
            p.weight.add_(1.0)  # each element exactly once
    for bank, before in zip(model.banks(), small_model(ffn=ffn).banks(), strict=True):
        torch.testing.assert_close(bank.parameter.detach(), before.parameter.detach() + 1)


def plain_mixture(model, h_ND, layer, top_k):
    """Every expert on every token from the projections, weighted by the renormalised top of the full softmax."""
    W = {(p.name, p.expert): p.weight for p in model.projections() if p.layer == layer}
    probabilities = (h_ND @ model.router[layer].mT).softmax(-1)
    threshold = probabilities.sort(descending=True).values[:, top_k - 1 : top_k]
    kept = probabilities * (probabilities >= threshold)
    kept = kept / kept.sum(-1, keepdim=True)
    y = torch.zeros_like(h_ND)
    for e in range(model.config.experts):
        hidden = F.silu(h_ND @ W["up", e].mT)
        if ("gate", e) in W:
            hidden = F.silu(h_ND @ W["gate", e].mT) * (h_ND @ W["up", e].mT)
        y = y + kept[:, e : e + 1] * (hidden @ W["down", e].mT)
    shares = (kept > 0).double().mean(0) / top_k
    return y, shares, model.config.experts * (shares * probabilities.mean(0)).sum()


@pytest.mark.parametrize("case", ["as initialised", "all to one", "swiglu", "top 1", "all experts"])
def test_the_model_and_its_gradients_equal_every_expert_on_every_token(case, monkeypatch):
    top_k = {"top 1": 1, "all to one": 1, "all experts": 4}.get(case, 2)
    model = small_model(ffn="swiglu" if case == "swiglu" else "silu", top_k=top_k).double()
    model.compute_dtype = torch.float64
    with torch.no_grad():
        model.router.mul_(50)  # choices that differ from token to token
        if case == "all to one":  # gains of one: the mean of h is what h has in common
            model.router.zero_()
            model.router[:, 2] = 1.0
            model.embedding.add_(0.05)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # no rounding of the router's input
    tokens = some_tokens()
    found = model(tokens, tokens)
    counts = model.expert_counts
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(found, parameters.values())

    def plain(h, w, layer):
        y, share, balance = plain_mixture(model, h, layer, top_k)
        return y, (share * top_k * len(h)).round().long(), 0.01 * balance

    counts = counts.clone()
    monkeypatch.setattr(model, "_mixture", plain)
    expected = model(tokens, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(counts, model.expert_counts)
    for (name, _), mine, theirs in zip(
        parameters.items(), gradients, torch.autograd.grad(expected, parameters.values()), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    if case == "all to one":
        assert counts.tolist() == [[0, 0, 48, 0]] * 2
    else:
        assert (counts > 0).sum() > 4


def test_the_balance_loss_equals_a_hand_calculation_and_counts_in_training_alone():
    model = small_model(top_k=1, experts=2, layers=1)
    tokens = some_tokens()
    with torch.no_grad():
        model.router.zero_()  # every expert has probability 1/2, so P_e = 1/2, and 2 sum f_e / 2 = 1 whatever f is
    pure = model.eval()(tokens, tokens)
    assert model.train()(tokens, tokens).item() == pytest.approx(pure.item() + 0.01, abs=1e-6)
    x = torch.zeros(4, 32)
    x[:, 0] = torch.tensor([3.0, 1.0, 1.0, -1.0]).log()  # odds of expert 0 are 3, 1, 1: the last row is set below
    x[3, 0] = torch.tensor(1 / 3).log()
    with torch.no_grad():
        model.router[0, 0, 0] = 1.0
        model.router[0, 1, 1] = 1.0
        x[1, 1], x[2, 1] = -1e-4, -1e-4  # ties go to expert 0
    w = {p.name: torch.zeros(2, 48, 32) for p in model.projections() if p.expert == 0}
    _, counts, loss = model._mixture(x, w, 0)
    assert counts.tolist() == [3, 1]
    # P_0 = (3/4 + 1/2 + 1/2 + 1/4) / 4 = 1/2 = P_1: balanced probabilities; then of unbalanced ones
    assert loss.item() == pytest.approx(0.01 * 2 * (3 / 4 * 1 / 2 + 1 / 4 * 1 / 2), rel=1e-3)
    _, counts, loss = model._mixture(x[:3], w, 0)
    assert counts.tolist() == [3, 0]
    assert loss.item() == pytest.approx(0.01 * 2 * (3 / 4 + 1 / 2 + 1 / 2) / 3, rel=1e-3)


def test_router_noise_acts_in_training_only():
    model = small_model(router_noise=5.0)
    tokens = some_tokens()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("kernel", ["off", "cross_entropy"])
def test_the_mixture_compiles_without_a_graph_break(kernel):
    model = small_model()
    model.kernels = frozenset(() if kernel == "off" else ("cross_entropy",))
    tokens = some_tokens()
    eager = model(tokens, tokens)
    gradients = torch.autograd.grad(eager, list(model.parameters()))
    counts = model.expert_counts.clone()
    model.expert_counts.zero_()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")(tokens, tokens)
    torch.testing.assert_close(compiled, eager)
    assert torch.equal(model.expert_counts, counts)
    for mine, theirs in zip(torch.autograd.grad(compiled, list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_bf16_activations_stay_close_to_fp32():
    model = small_model()
    tokens = some_tokens()
    exact = model(tokens, tokens)
    model.compute_dtype = torch.bfloat16
    rounded = model(tokens, tokens)
    rounded.backward()
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_experts_go_to_muon_and_the_router_to_adamw(optimizer):
    model = small_model()
    optimizers = build_optimizers(model, optimizer, lr=0.03, adamw_lr=0.004, weight_decay=0.1)
    kind = {
        id(p): (type(o), group["lr"], group["weight_decay"])
        for o in optimizers
        for group in o.param_groups
        for p in group["params"]
    }
    assert kind[id(model.router)] == (torch.optim.AdamW, 0.004, 0.0)
    of_matrices = Muon if optimizer == "muon" else torch.optim.AdamW
    assert {kind[id(bank.parameter)] for bank in model.banks()} == {(of_matrices, 0.03, 0.1)}
    assert [tuple(bank.parameter.shape) for bank in model.banks()] == [(8, 32, 32), (4, 4, 48, 32)]


def test_muon_updates_each_expert_as_if_it_were_alone():
    model = small_model()
    generator = torch.Generator().manual_seed(3)
    bank = model.banks()[1]
    bank.parameter.grad = torch.randn(bank.parameter.shape, generator=generator)
    alone = []
    for place in model.places():
        if place.expert is not None:
            p = torch.nn.Parameter(bank.parameter.detach().flatten(0, 1)[place.index : place.index + 1].clone())
            p.grad = bank.parameter.grad.flatten(0, 1)[place.index : place.index + 1].clone()
            alone.append((place, p, [{"params": [p], "transposed": (place.transposed,)}]))
    optimizer = build_optimizers(model, "muon", lr=0.1, adamw_lr=0.01)[0]
    optimizer.step()
    scales = scales_of(torch.Size((16, 48, 32)), optimizer.param_groups[1])
    for place, p, groups in alone:
        Muon(groups, lr=0.1).step()
        torch.testing.assert_close(bank.parameter.detach().flatten(0, 1)[place.index], p.detach()[0])
        assert scales[place.index] == pytest.approx((48 / 32) ** 0.5 if place.name == "up" else 1.0)


def test_step_cost_counts_every_expert():
    flat, banked = torch.nn.Parameter(torch.zeros(16, 48, 32)), torch.nn.Parameter(torch.zeros(4, 4, 48, 32))
    assert step_cost([Muon([flat])]) == step_cost([Muon([banked])])


@pytest.mark.parametrize(
    ("change", "word"), [({"top_k": 5}, "top_k"), ({"top_k": 0}, "top_k"), ({"balance": -1.0}, "balance")]
)
def test_impossible_mixtures_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        replace(SMALL, **change)


def test_a_run_of_a_mixture_logs_the_use_of_its_experts_and_their_spectra(train_small):
    arguments = ("--tokens", 6 * 256, "--log-every", 2, "--spectra-every", 3)
    code, folder, out, _ = train_small("moe", *MOE, *arguments)
    assert code == 0
    used = lines(folder, kind="experts")
    assert [(line["step"], line["layer"]) for line in used] == [(s, layer) for s in (2, 4, 6) for layer in range(2)]
    for line in used:
        assert line.keys() == {"kind", "step", "layer", "utilization"}
        assert len(line["utilization"]) == 4
        assert sum(line["utilization"]) == pytest.approx(1, abs=1e-6)
    choices = [round(share * 2 * 256, 3) for line in used for share in line["utilization"]]
    assert all(number == int(number) for number in choices)
    assert any(number % 2 for number in choices)  # of the whole batch, not of one of its two micro-batches
    spectra = lines(folder, "manifold_stats.jsonl")
    experts = {(line["layer"], line["proj"], line.get("expert")) for line in spectra if line["step"] == 3}
    expected = {(layer, proj, None) for layer in range(2) for proj in "qkvo"}
    expected |= {(layer, proj, e) for layer in range(2) for proj in ("up", "down") for e in range(4)}
    assert experts == expected
    config = json.loads((folder / "config.json").read_text())
    assert config["active_params"] == config["params"] - 2 * 2 * 2 * 64 * 32
    assert f"{config['params']:,} parameters, {config['active_params']:,} active per token" in out
    assert losses(folder)[0] == pytest.approx(lines(folder, kind="val")[0]["val_loss"], rel=0.02)
    assert lines(folder, kind="train")[0]["balance_loss"] == pytest.approx(2 * 0.01, rel=0.02)  # 2 layers, even shares


def test_a_stopped_run_of_a_mixture_resumes_to_the_bit(train_small, before_step):
    arguments = (*MOE, "--tokens", 8 * 256, "--router-noise", 0.5, "--log-every", 1, "--spectra-every", 4)
    _, whole, _, _ = train_small("whole", *arguments)
    take_back = before_step(3, ask_to_stop)
    train_small("parts", *arguments)
    take_back()
    code, parts, _, _ = train_small("parts", *arguments, "--resume")
    assert code == 0
    for name in ("metrics.jsonl", "manifold_stats.jsonl"):
        assert without_time(lines(parts, name)) == without_time(lines(whole, name))


def gradients_of(micro_batch, tokens, compiled=False):
    model = small_model(balance=0.5)
    optimizers = build_optimizers(model, "muon", lr=0.1, adamw_lr=0.1)
    step = TrainingStep(model, optimizers, micro_batch=micro_batch, compiled=compiled, backend="eager")
    stats = step.gradients(tokens).read()
    return stats, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("micro_batch", "compiled"), [(1, False), (2, False), (4, True)])
def test_the_balance_loss_is_that_of_the_whole_batch_whatever_the_micro_batch(micro_batch, compiled):
    """And its gradients: of the product of two means over the batch, not the mean of products over its parts."""
    tokens = torch.randint(50, (8, SMALL.seq_len + 1), generator=torch.Generator().manual_seed(3))
    whole, expected = gradients_of(8, tokens)
    stats, found = gradients_of(micro_batch, tokens, compiled)
    assert stats.loss == pytest.approx(whole.loss, rel=1e-6)
    assert stats.balance_loss == pytest.approx(whole.balance_loss, rel=1e-6)
    assert stats.expert_counts == whole.expert_counts
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_the_balance_loss_of_a_batch_in_parts_equals_a_hand_calculation():
    """balance X sum_e f_e P_e with f and P over all tokens of the batch, from the logits of the router."""
    model = small_model(balance=0.5, layers=1)
    tokens = torch.randint(50, (4, SMALL.seq_len + 1), generator=torch.Generator().manual_seed(3))
    step = TrainingStep(model, build_optimizers(model, "muon", lr=0.1, adamw_lr=0.1), micro_batch=1)
    stats = step.gradients(tokens).read()
    seen = []
    hook = torch.nn.functional.linear

    def linear(x, weight, *rest):
        if weight.shape == model.router[0].shape:
            seen.append(hook(x, weight).detach())
        return hook(x, weight, *rest)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "linear", linear)
        model.eval()
        pure = model(tokens[:, :-1], tokens[:, 1:]).item()
    (logits,) = seen
    P = logits.softmax(-1).mean(0)
    f = torch.bincount(logits.topk(2).indices.flatten(), minlength=4) / (2 * len(logits))
    assert stats.balance_loss == pytest.approx(0.5 * 4 * (f * P).sum().item(), rel=1e-5)
    assert stats.loss == pytest.approx(pure, rel=1e-5)  # the balance loss is not part of it


def test_twenty_steps_of_a_mixture_do_not_depend_on_the_micro_batch(train_small):
    """Muon turns a small error of a gradient into a large one of the weights, so they would show it."""
    arguments = (*MOE, "--tokens", 20 * 256, "--balance", 0.1, "--eval-every", 20, "--spectra-every", 0)
    arguments += ("--momentum", 0.95, "--beta1", 0.9)  # by shorter memories rounding soon sends tokens to other experts
    one, eight = (train_small(f"by-{n}", *arguments, "--micro-batch", n)[1] for n in (1, 8))
    assert losses(one) == pytest.approx(losses(eight), abs=1e-4)
