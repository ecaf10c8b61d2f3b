"""Options of Muon's step against a loop over single matrices in NumPy and float64, which knows no banks."""

import numpy as np
import pytest
import torch

from engine.cli import BadInput
from engine.identity import check_same_run, config_hash
from engine.ranks import Rank, Sharding
from kernels import Muon
from kernels.variants import exact_polar, normalize_rows, restore_norms
from model import ModelConfig, Transformer
from optim import build_optimizers, step_cost
from settings import Settings, identity, resolve
from tests.conftest import ask_to_stop
from tests.processes import command, run
from tests.test_sharding import TWELVE, assert_same_training
from tests.test_train import losses, weights

LR, MOMENTUM, ROWS_BETA2 = 0.05, 0.9, 0.95
CUBIC = {"ns_coefficients": "cubic", "ns_steps": 25}


def polar(u):
    U, _, Vh = np.linalg.svd(u, full_matrices=False)
    return U @ Vh


def of_equal_norm(u):
    return u / np.linalg.norm(u) * min(u.shape) ** 0.5


class OneMatrix:
    """An (out, in) matrix under Muon."""

    def __init__(self, W, direction, *, nesterov=True, early=False, rows=False, rule="plain", decay=0.0):
        self.W, self.M, self.v, self.norm = W, np.zeros_like(W), np.zeros(len(W)), np.linalg.norm(W)
        self.direction, self.nesterov, self.early, self.rows = direction, nesterov, early, rows
        self.rule, self.decay, self.steps = rule, decay, 0

    def step(self, g):
        self.steps += 1
        g = self.direction(g) if self.early else g
        self.M = MOMENTUM * self.M + (1 - MOMENTUM) * g
        update = (1 - MOMENTUM) * g + MOMENTUM * self.M if self.nesterov else self.M
        update = update if self.early else self.direction(update)
        if self.rows:  # with the bias corrected, which the norm takes out again
            before = np.linalg.norm(update)
            self.v = ROWS_BETA2 * self.v + (1 - ROWS_BETA2) * np.mean(update**2, axis=1)
            update = update / np.sqrt(self.v / (1 - ROWS_BETA2**self.steps))[:, None]
            update = update * before / np.linalg.norm(update)
        shrunk = np.ones_like(self.W)
        if self.rule == "cautious":
            shrunk = (np.sign(update) == np.sign(self.W)).astype(float)
        self.W = self.W - LR * self.decay * shrunk * self.W
        self.W = self.W - LR * max(1.0, update.shape[0] / update.shape[1]) ** 0.5 * update
        if self.rule == "hyperball":
            self.W = self.W / np.linalg.norm(self.W) * self.norm


@pytest.mark.parametrize(
    ("options", "direction", "reference"),
    [
        ({"ns_method": "svd"}, polar, {}),
        ({"ns_method": "none"}, of_equal_norm, {}),
        ({"ns_method": "none", "nesterov": False}, of_equal_norm, {"nesterov": False}),
        ({"ns_method": "svd", "ns_before_momentum": True}, polar, {"early": True}),
        ({"normalize_rows": True} | CUBIC, polar, {"rows": True}),
        ({"normalize_rows": True, "ns_method": "none"}, of_equal_norm, {"rows": True}),
        ({"decay_rule": "cautious", "weight_decay": 2.0} | CUBIC, polar, {"rule": "cautious", "decay": 2.0}),
        ({"decay_rule": "hyperball"} | CUBIC, polar, {"rule": "hyperball"}),
        (
            {"decay_rule": "hyperball", "ns_method": "svd", "normalize_rows": True},
            polar,
            {"rule": "hyperball", "rows": True},
        ),
    ],
)
@pytest.mark.parametrize("cut", ["whole", "heads", "splits"])
def test_agrees_with_a_loop_over_single_matrices(options, direction, reference, cut):
    torch.manual_seed(0)
    bank = torch.nn.Parameter(torch.randn(3, 12, 20))
    # Each as (matrix of the bank, its rows, whether its map is the transpose).
    places = {
        "whole": [(0, slice(0, 12), False), (1, slice(0, 12), True), (2, slice(0, 12), True)],
        "heads": [(i, slice(k, k + 4), False) for i in (0, 2) for k in (0, 4, 8)] + [(1, slice(0, 12), True)],
        "splits": [(i, rows, False) for i in range(3) for rows in (slice(0, 7), slice(7, 12))],
    }[cut]
    group = {
        "whole": {"transposed": (False, True, True)},
        "heads": {"transposed": (False, True, False), "row_blocks": (3, 1, 3)},
        "splits": {"row_splits": (7, 5)},
    }[cut]

    def cuts(tensor):
        parts = [tensor.detach().double().numpy()[i][rows] for i, rows, _ in places]
        return [part.T if flipped else part for part, (_, _, flipped) in zip(parts, places, strict=True)]

    expected = [OneMatrix(W.copy(), direction, **reference) for W in cuts(bank)]
    optimizer = Muon([{"params": [bank], **group}], lr=LR, momentum=MOMENTUM, **options)
    for _ in range(5):
        bank.grad = torch.randn(3, 12, 20)
        optimizer.step()
        for matrix, g in zip(expected, cuts(bank.grad), strict=True):
            matrix.step(g)
    for found, matrix in zip(cuts(bank), expected, strict=True):
        np.testing.assert_allclose(found, matrix.W, rtol=0, atol=3e-5)


def test_cautious_decay_is_the_papers_where_the_update_is_zero():
    """Chen et al. 2025: x <- x - lr (u + wd 1[u x >= 0] x)."""
    W = torch.nn.Parameter(torch.ones(2, 2))
    W.grad = torch.zeros(2, 2)
    Muon([W], lr=0.5, weight_decay=0.1, decay_rule="cautious").step()
    torch.testing.assert_close(W.detach(), torch.full((2, 2), 0.95))


def test_the_exact_polar_factor_has_the_rank_of_the_matrix():
    torch.manual_seed(0)
    a, b = torch.randn(30, 3), torch.randn(3, 20)
    stack = torch.stack((1e-20 * a @ b, torch.zeros(30, 20), torch.full((30, 20), torch.nan), torch.randn(30, 20)))
    low, zero, broken, full = exact_polar(stack)
    s = torch.linalg.svdvals(low)
    torch.testing.assert_close(s[:3], torch.ones(3), rtol=0, atol=1e-5)
    assert s[3:].max() < 1e-5
    assert (zero == 0).all()
    assert broken.isnan().all()
    torch.testing.assert_close(full.mT @ full, torch.eye(20), rtol=0, atol=1e-5)


def test_a_step_that_is_skipped_moves_no_state():
    p = torch.nn.Parameter(torch.randn(4, 6))
    optimizer = Muon([p], lr=0.1, normalize_rows=True, decay_rule="hyperball")
    for found in (0.0, 1.0):
        p.grad = torch.randn(4, 6)
        before = [t.clone() for t in (p.detach(), *optimizer.state[p].values())]
        optimizer.found_inf = torch.tensor(found)
        optimizer.step()
    after = (p.detach(), *optimizer.state[p].values())
    assert len(after) == 4
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    # In the fused step no host knows, so each operation must leave out the step by itself.
    update, rows, columns, flipped = torch.ones(2, 4, 6), torch.ones(2, 4, 1), torch.ones(2, 1, 6), [False, True]
    flipped = torch.tensor(flipped).view(-1, 1, 1)
    for none in (None, flipped):
        normalize_rows(2 * update, none, rows, columns, torch.tensor(1.0))
        assert (rows == 1).all()
        assert (columns == 1).all()
    restore_norms(update, torch.zeros(2, 1, 1), torch.tensor(1.0))
    assert (update == 1).all()
    normalize_rows(2 * update, flipped, rows, columns, torch.tensor(0.0))
    assert (rows != 1).flatten(1).any(1).tolist() == [True, False]
    assert (columns != 1).flatten(1).any(1).tolist() == [False, True]


def test_a_projection_splits_into_matrices_of_heads():
    """nano's shape: q and o share a bank, so its halves are cut differently; the momentum is the gradient."""
    config = ModelConfig(32, 2, 4, 2, 64, seq_len=16)
    torch.manual_seed(0)
    model = Transformer(config, vocab_size=40)
    (muon, _) = build_optimizers(
        model, "muon", lr=1.0, adamw_lr=0.01, heads_per_matrix=2, momentum=0.0, ns_method="svd", lr_scale="none"
    )
    before = {(p.layer, p.name): p.weight.detach().clone() for p in model.projections()}
    for bank in model.banks():
        bank.parameter.grad = torch.randn_like(bank.parameter)
    gradients = {(p.layer, p.name): p.weight for p in model.projections([b.parameter.grad for b in model.banks()])}
    muon.step()
    heights = {"q": 16, "k": 16, "v": 16, "o": 32, "up": 64, "down": 32}  # a head is 8 rows high
    for p in model.projections():
        moved = (before[p.layer, p.name] - p.weight.detach()).split(heights[p.name])
        for part, g in zip(moved, gradients[p.layer, p.name].split(heights[p.name]), strict=True):
            np.testing.assert_allclose(part.numpy(), polar(g.double().numpy()), rtol=0, atol=1e-4)
    apart = build_optimizers(model, "muon", lr=1.0, adamw_lr=0.01, heads_per_matrix=1)
    assert step_cost(apart)[0] < step_cost(build_optimizers(model, "muon", lr=1.0, adamw_lr=0.01))[0]
    assert step_cost([muon])[0] == 0  # an SVD is no Newton-Schulz


def test_a_rank_cuts_the_heads_of_the_matrices_that_it_owns(monkeypatch):
    config = ModelConfig(32, 3, 4, 2, 64, seq_len=16)
    monkeypatch.setattr("engine.ranks.dist.all_gather_into_tensor", lambda *_, **__: None)
    model = Transformer(config, vocab_size=40)
    whole = build_optimizers(model, "muon", lr=1.0, adamw_lr=0.01, heads_per_matrix=1)[0]
    ranks = [Sharding(model, rank, 5) for rank in range(5)]
    parts = [build_optimizers(model, "muon", lr=1.0, adamw_lr=0.01, heads_per_matrix=1, sharding=r)[0] for r in ranks]
    for number, group in enumerate(whole.param_groups):
        assert sum((part.param_groups[number]["row_blocks"] for part in parts), ()) == group["row_blocks"]
    assert {sum(group["row_blocks"]) for group in whole.param_groups} == {3 * (4 + 1), 3 * (2 + 2), 3 * (1 + 1)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ns_method": "exact"}, "ns_method='exact'"),
        ({"decay_rule": "bold"}, "decay_rule='bold'"),
        ({"decay_rule": "hyperball", "weight_decay": 0.1}, "weight_decay must be 0, got 0.1"),
        ({"row_blocks": (3,)}, "4 rows"),
        ({"row_blocks": (2, 2)}, "row_blocks needs one entry"),
        ({"row_blocks": (2,), "row_splits": (2, 2)}, "split or stored transposed"),
        ({"row_blocks": (2,), "transposed": (True,)}, "split or stored transposed"),
        ({"normalize_rows": True, "row_splits": (2, 2), "transposed": (True,)}, "flattened or split"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, words):
    of_group = {key: options.pop(key) for key in ("row_blocks", "row_splits", "transposed") if key in options}
    with pytest.raises(ValueError, match=words):
        Muon([{"params": [torch.nn.Parameter(torch.zeros(4, 6))], **of_group}], **options)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--decay-rule", "hyperball", "--weight-decay", "0.1"), "--weight-decay 0.1: --decay-rule hyperball"),
        (("--decay-rule", "bold"), "--decay-rule bold: choose from plain, cautious, hyperball"),
        (("--ns-method", "qr"), "--ns-method qr: choose from auto, standard, gram, svd, none"),
        (("--heads-per-matrix", "2"), "--heads-per-matrix 2: does not divide the 2 heads and the 1 key/value heads"),
        (("--optimizer", "adamw", "--normalize-rows"), "--normalize-rows: only for --optimizer muon"),
        (("--optimizer", "adamw", "--decay-rule", "cautious"), "--decay-rule: only for --optimizer muon"),
    ],
)
def test_flags_that_do_not_go_together_are_one_sentence(train_small, flags, words):
    code, _, _, err = train_small("run", *flags)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1


def test_options_at_their_defaults_leave_the_hash_of_earlier_runs(shards_folder):
    given = Settings(model="nano", data=shards_folder, workers=1, threads=1, compile="off")
    resolved, _, shards = resolve(given, Rank())
    config = identity(resolved, shards)
    options = ("normalize_rows", "decay_rule", "heads_per_matrix", "optimizer_options")
    earlier = {key: value for key, value in config.items() if key not in options}
    assert config_hash(config) == config_hash(earlier)
    for option, value in zip(options, (True, "cautious", 1, "momentum=0.9"), strict=True):
        changed = config | {option: value}
        with pytest.raises(BadInput, match=f"{option} was "):
            check_same_run("run", earlier | {"config_hash": ""}, changed | {"config_hash": config_hash(changed)})


def test_two_workers_train_all_variants_like_one_process(train_small, shards_folder, tmp_path):
    flags = ("--normalize-rows", "--decay-rule", "hyperball", "--heads-per-matrix", "1", "--ns-method", "svd")
    arguments = (*TWELVE[-6:], "--checkpoint-every", "6", "--spectra-every", "6", *flags)
    code, one, out, err = train_small("one", *arguments)
    assert code == 0, out + err
    done = run([*command(shards_folder, tmp_path, "two", *arguments), "--workers", "2"])
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "two", one)
    state = torch.load(one / "checkpoint.pt", weights_only=True)["optimizer"][0]["state"][0]
    assert state.keys() == {"momentum_buffer", "row_moment", "column_moment"}


def test_a_resumed_run_of_all_variants_ends_with_the_same_bits(train_small, before_step):
    flags = ("--normalize-rows", "--decay-rule", "hyperball", "--ns-method", "none", "--tokens", "2560")
    _, whole, _, _ = train_small("whole", *flags)
    undo = before_step(6, ask_to_stop)
    _, halves, _, _ = train_small("halves", *flags)
    undo()
    assert len(losses(halves)) < 10
    train_small("halves", *flags, "--resume")
    assert losses(halves) == losses(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights(halves).values(), weights(whole).values(), strict=True))


def test_a_matrix_of_zeros_leaves_zero_under_hyperball():
    p = torch.nn.Parameter(torch.zeros(4, 6))
    optimizer = Muon([p], lr=0.1, decay_rule="hyperball")
    p.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert p.detach().norm() > 0.1
