"""--muon-on: Muon gets what is named, AdamW the rest, on one rank and on several, and a resumed run is the same."""

import json

import numpy as np
import pytest
import torch

from engine.ranks import Sharding
from kernels import orthogonalize
from kernels.optimizer import update_scale
from model import PROJECTIONS, SIZES, ModelConfig, Transformer
from optim import build_optimizers, muon_names, parameter_layout
from settings import Settings, resolve
from tests.processes import command, run
from tests.test_sharding import MIXTURE, TWELVE, assert_same_training, torchrun
from tests.test_train import lines as lines_of
from tests.test_train import losses, weights, without_time

DENSE = ModelConfig(32, 2, 4, 2, 64, seq_len=16)
MIXED = ModelConfig(32, 2, 4, 4, 48, seq_len=16, experts=3)
RATES = {"lr": 0.05, "adamw_lr": 0.01, "weight_decay": 0.1}


def model_for(muon_on, config):
    torch.manual_seed(0)
    return Transformer(config, vocab_size=40, apart=frozenset(PROJECTIONS) - set(muon_names(muon_on, config)))


def parts_of(model):
    """Every weight by a name that does not depend on how it is stored."""
    parts = {(p.layer, p.name, p.expert): p.weight for p in model.projections()}
    return parts | {name: p for name, p in model.named_parameters() if not name.startswith("weights.")}


def adamw(weight, gradients, lr, decay, betas=(0.9, 0.95), eps=1e-8):
    """Loshchilov & Hutter 2019, in float64."""
    w, m, v = weight.double().numpy(), 0.0, 0.0
    for t, g in enumerate((g.double().numpy() for g in gradients), start=1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
        w = (1 - lr * decay) * w - lr * (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
    return torch.from_numpy(w)


@pytest.mark.parametrize("config", [DENSE, MIXED], ids=["dense", "mixture"])
@pytest.mark.parametrize(
    ("muon_on", "on_muon"),
    [
        ("blocks", PROJECTIONS),
        ("q,up", ("q", "up")),
        ("o,down,embedding", ("o", "down", "embedding")),
        ("blocks,embedding", (*PROJECTIONS, "embedding")),
    ],
)
@pytest.mark.parametrize("left_lr", [None, 0.002])
def test_what_is_named_gets_muons_update_and_the_rest_adamws(muon_on, on_muon, left_lr, config):
    model = model_for(muon_on, config)
    optimizers = build_optimizers(model, "muon", muon_on=muon_on, left_lr=left_lr, momentum=0.0, **RATES)
    before = {key: p.detach().clone() for key, p in parts_of(model).items()}
    gradients = {key: [] for key in before}
    for seed in (1, 2):
        tokens = torch.randint(40, (2, 17), generator=torch.Generator().manual_seed(seed))
        model.zero_grad()
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        of_banks = [bank.parameter.grad for bank in model.banks()]
        for p in model.projections(of_banks):
            gradients[p.layer, p.name, p.expert].append(p.weight.clone())
        for name in before.keys() - {(p.layer, p.name, p.expert) for p in model.projections()}:
            gradients[name].append(model.get_parameter(name).grad.clone())
        start = {key: p.detach().clone() for key, p in parts_of(model).items()}
        for o in optimizers:
            o.step()
    for key, weight in parts_of(model).items():
        block = isinstance(key, tuple)
        decay = RATES["weight_decay"] * block
        if (key[1] if block else key) in on_muon:
            G = gradients[key][-1]
            scale = update_scale(*G.shape, "spectral")
            expected = (1 - 0.05 * decay) * start[key] - 0.05 * scale * orthogonalize(G)
            tolerance = 1e-4  # a transposed matrix is iterated from its other side
        else:
            expected = adamw(before[key], gradients[key], left_lr if block and left_lr else 0.01, decay).float()
            tolerance = 2e-6
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=tolerance, msg=str(key))


def test_the_router_on_muon_is_orthogonalised_layer_by_layer():
    model = model_for("router", MIXED)
    muon, rest = build_optimizers(model, "muon", muon_on="router", **RATES)
    assert [id(p) for group in muon.param_groups for p in group["params"]] == [id(model.router)]
    assert sum(p.numel() for group in rest.param_groups for p in group["params"]) == (
        model.parameter_count() - model.router.numel()
    )
    start = model.router.detach().clone()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    muon.step()
    for layer in range(2):
        s = torch.linalg.svdvals(model.router[layer].detach() - start[layer]) / 0.05
        assert 0.8 < s.min() < s.max() < 1.2


def test_initial_weights_are_the_same_however_they_are_stored():
    for config in (DENSE, MIXED, SIZES["moe-nano"]):
        plain = parts_of(model_for("blocks", config))
        for muon_on in ("q", "k,o,down", "up,embedding"):
            for key, weight in parts_of(model_for(muon_on, config)).items():
                assert torch.equal(weight, plain[key]), key


def test_a_bank_that_both_optimizers_share_is_refused():
    with pytest.raises(ValueError, match="apart"):
        parameter_layout(Transformer(DENSE, 40), "muon", muon_on="q")


def test_banks_leave_in_the_order_in_which_they_are_ready(monkeypatch):
    """Sending a bank sends all before it in the order, so what AdamW updates later must come after Muon's."""
    monkeypatch.setattr("engine.ranks.KEPT_WHOLE", 100)
    model = model_for("o,down", DENSE)
    sharding = Sharding(model, 0, 2)
    build_optimizers(model, "muon", muon_on="o,down", sharding=sharding, **RATES)
    order = [share.name for share in sharding.order]
    assert order[:2] == ["weights.down", "weights.o"]
    assert sorted(order[2:]) == ["embedding", "weights.k_v", "weights.q", "weights.up"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("--muon-on", "q,knob"),
            "--muon-on knob: this model has no such matrices; choose from blocks, q, k, v, o, up",
        ),
        (("--muon-on", "router"), "--muon-on router: this model has no such matrices"),
        (("--muon-on", "gate"), "--muon-on gate: this model has no such matrices"),
        (("--muon-on", "head"), "--muon-on head: the head is the embedding; name embedding"),
        (("--muon-on", ","), "--muon-on no matrices are named; --optimizer adamw trains without Muon"),
        (("--muon-on", "q", "--optimizer", "adamw"), "--muon-on q: --optimizer adamw trains nothing by Muon"),
        (("--left-lr", "0.1"), "--left-lr 0.1: no block matrix is left to AdamW"),
        (("--left-lr", "0.1", "--optimizer", "adamw"), "--left-lr 0.1: no block matrix is left to AdamW"),
        (("--left-lr", "0", "--muon-on", "q"), "--left-lr 0.0: must be a positive number"),
    ],
)
def test_names_that_make_no_sense_are_refused_in_one_sentence(train_small, arguments, words):
    code, folder, _, err = train_small("run", *arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: {words}")
    assert not folder.exists()


def test_one_choice_has_one_spelling(shards_folder):
    from engine.ranks import Rank

    def spelled(words):
        given = Settings(model="nano", data=shards_folder, muon_on=words, workers=1, threads=1, compile="off")
        return resolve(given, Rank())[0].muon_on

    assert spelled("up, q") == "q,up"
    assert spelled("q,k,v,o,up,down") == spelled("blocks") == "blocks"
    assert spelled("embedding,down,up,o,v,k,q") == "blocks,embedding"


MANY = ("--muon-on", "q,up,embedding,router", "--spectra-every", 3, "--tokens", 6 * 384)


def test_ranks_and_workers_share_what_is_split_between_the_optimizers(train_small, shards_folder, tmp_path):
    arguments = (*TWELVE[len(TWELVE) - 6 :], *MIXTURE, *MANY)
    _, one, _, _ = train_small("one", *arguments)
    where = ("--data", shards_folder, "--runs-dir", tmp_path, "--no-plots", "--name")
    torchrun(2, *TWELVE, *arguments, *where, "ranks")
    assert_same_training(tmp_path / "ranks", one)
    done = run(command(shards_folder, tmp_path, "workers", *arguments, "--workers", 2))
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "workers", one)


def test_a_resumed_run_is_the_same_and_another_choice_is_refused(train_small):
    arguments = ("--tokens", 2560, "--checkpoint-every", 4, "--left-lr", 0.004, "--muon-on", "k,down,embedding")
    _, whole, _, _ = train_small("whole", *arguments)
    _, parts, _, _ = train_small("parts", *arguments)
    (parts / "checkpoint.prev.pt").replace(parts / "checkpoint.pt")
    code, _, out, _ = train_small("parts", *arguments, "--resume")
    assert (code, "resuming at step 8" in out) == (0, True)
    assert losses(parts) == losses(whole)
    assert without_time(lines_of(parts, "manifold_stats.jsonl")) == without_time(
        lines_of(whole, "manifold_stats.jsonl")
    )
    for name, weight in weights(whole).items():
        assert torch.equal(weights(parts)[name], weight)
    assert json.loads((parts / "config.json").read_text())["muon_on"] == "k,down,embedding"
    code, _, _, err = train_small("parts", *arguments[:-1], "k,down", "--resume")
    assert code == 2
    assert "muon_on was k,down,embedding, is k,down" in err
