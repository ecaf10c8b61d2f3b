"""Any number of ranks trains the same model, and any other number goes on from its checkpoint."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import types

import pytest
import torch

import data
import train
from bench import scaling
from corpus import shards
from engine.checkpoint import Progress, load_optimizers, save_optimizers
from engine.ranks import Rank, Sharding, deal, unit_view
from engine.speed import Stopwatch
from engine.step import Evaluation
from model import SIZES, ModelConfig, Transformer
from optim import build_optimizers, parameter_layout
from tests.conftest import SMALL_MODEL
from tests.processes import REPOSITORY

TWELVE = (
    *SMALL_MODEL,
    "--batch-tokens",
    "384",
    "--micro-batch",
    "1",
    "--tokens",
    str(12 * 384),
)  # sequences, 12 updates
MIXTURE = ("--experts", "3", "--top-k", "2", "--ffn", "silu")


def torchrun(ranks, *arguments):
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "train.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def train_lines(folder):
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == "train"]


def assert_same_training(folder, reference, tolerance=1e-4):
    ours, theirs = train_lines(folder), train_lines(reference)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for key in ("train_loss", "grad_norm"):
        assert [r[key] for r in ours] == pytest.approx([r[key] for r in theirs], rel=tolerance)
    checkpoints = [torch.load(f / "checkpoint.pt", weights_only=True) for f in (folder, reference)]
    for name, weight in checkpoints[1]["model"].items():
        torch.testing.assert_close(checkpoints[0]["model"][name], weight, rtol=0, atol=1e-3 * float(weight.abs().max()))
    for mine, other in zip(checkpoints[0]["optimizer"], checkpoints[1]["optimizer"], strict=True):
        assert mine["state"].keys() == other["state"].keys()
        for number, state in other["state"].items():
            assert mine["state"][number].keys() == state.keys()
            for key, value in state.items():
                found = mine["state"][number][key]
                torch.testing.assert_close(found, value, rtol=0, atol=1e-2 * float(value.abs().max()))
    spectra = [(f / "manifold_stats.jsonl").read_text().splitlines() for f in (folder, reference)]
    assert len(spectra[0]) == len(spectra[1])
    for mine, other in zip(*(map(json.loads, lines) for lines in spectra), strict=True):
        assert (mine["step"], mine["layer"], mine["proj"]) == (other["step"], other["layer"], other["proj"])
        if mine["step"]:
            for key in ("grad_norm", "momentum_stable_rank", "momentum_effective_rank"):
                expected = other[key] and pytest.approx(other[key], rel=1e-2)  # null of a user's optimizer
                assert mine[key] == expected, key


def test_two_ranks_train_like_one_and_one_or_three_go_on_from_their_checkpoint(train_small, shards_folder, tmp_path):
    """Of the banks' 4, 4 and 4 matrices two ranks get 2 each, three ranks 2, 1 and 1."""
    arguments = (*TWELVE[len(SMALL_MODEL) :], "--checkpoint-every", "6", "--spectra-every", "5")
    _, one, _, _ = train_small("one", *arguments)
    where = (*TWELVE, *arguments, "--data", shards_folder, "--runs-dir", tmp_path, "--no-plots", "--name")
    torchrun(2, *where, "two")
    two = tmp_path / "two"
    assert_same_training(two, one)
    for ranks in (1, 3):
        halfway = tmp_path / f"from-two-to-{ranks}"
        shutil.copytree(two, halfway)
        os.replace(halfway / "checkpoint.prev.pt", halfway / "checkpoint.pt")
        if ranks == 1:
            _, _, out, _ = train_small(halfway.name, *arguments, "--resume")
        else:
            out = torchrun(3, *where, halfway.name, "--resume")
        assert "resuming at step 6 of 12" in out
        assert_same_training(halfway, one)


def test_two_ranks_train_a_mixture_like_one(train_small, shards_folder, tmp_path):
    arguments = (*TWELVE[len(SMALL_MODEL) :], *MIXTURE, "--spectra-every", "6", "--balance", "0.5")
    _, one, _, _ = train_small("one", *arguments)
    where = ("--data", shards_folder, "--runs-dir", tmp_path, "--no-plots", "--name", "two")
    said = torchrun(2, *TWELVE, *arguments, *where).splitlines()
    validated = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    once = [f"step:{line['step']}/12" for line in validated if line["kind"] == "val"]
    assert [line.split()[0] for line in said if " val_loss:" in line] == once
    assert len(once) == len(set(once)) > 2
    assert_same_training(tmp_path / "two", one)


@pytest.mark.parametrize(("units", "ranks"), [(44, 4), (22, 8), (4, 3), (2, 8), (1, 1), (7, 7)])
def test_units_are_dealt_evenly_and_extras_to_those_with_less_work(units, ranks):
    loads = [0.0] * ranks
    first = deal(units, 1.0, loads)
    second = deal(units, 1.0, loads)
    for counts in (first, second):
        assert sum(counts) == units
        assert max(counts) - min(counts) <= 1
    assert loads == [a + b for a, b in zip(first, second, strict=True)]
    assert max(loads) - min(loads) <= 1  # not 2: the second bank's extras went elsewhere


def shares_of(model, world_size):
    """Every rank's sharding of one model, in one process: nothing is sent."""
    return [Sharding(model, rank, world_size) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [2, 3, 5, 9])
def test_every_unit_has_one_owner(world_size, monkeypatch):
    monkeypatch.setattr("engine.ranks.KEPT_WHOLE", 100)
    model = Transformer(ModelConfig(32, 2, 4, 2, 48, seq_len=16), vocab_size=40)
    ranks = shares_of(model, world_size)
    for number, share in enumerate(ranks[0].shares):
        owned = [rank.shares[number].own for rank in ranks]
        if not share.split:
            assert all(own is share.parameter for own in owned)
            continue
        pieces = torch.cat([own for own in owned if own is not None])
        assert torch.equal(pieces, unit_view(share.parameter.detach()))
        assert all(own.data_ptr() >= share.parameter.data_ptr() for own in owned if own is not None)  # views, no copies
        assert sum(len(own) for own in owned if own is not None) == len(unit_view(share.parameter))


@pytest.mark.parametrize(("size", "ranks"), [("88m", 3), ("moe-nano", 16), ("odd", 4)])
def test_the_busiest_rank_has_as_little_newton_schulz_as_dealing_allows(size, ranks, monkeypatch):
    """Against every way of dealing the matrices that are left over; moe-nano has a bank of 8 for 16 ranks."""
    monkeypatch.setitem(SIZES, "odd", ModelConfig(32, 3, 4, 2, 64, seq_len=16))
    with torch.device("meta"):
        model = Transformer(SIZES[size], vocab_size=320)
    banks = []
    for bank in model.banks():
        units, rows, cols = unit_view(bank.parameter).shape
        banks.append((units, rows * cols * min(rows, cols)))
    ways = (itertools.combinations(range(ranks), units % ranks) for units, _ in banks)
    least = min(
        max(
            sum(cost * (units // ranks + (rank in more)) for (units, cost), more in zip(banks, way, strict=True))
            for rank in range(ranks)
        )
        for way in itertools.product(*ways)
    )
    mean = sum(units * cost for units, cost in banks) / ranks
    counted = scaling.count(scaling.Arguments(model=size, vocab_size=320), ranks)
    assert counted["newton_schulz_imbalance"] == pytest.approx(least / mean)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_bytes_and_messages_are_those_that_are_handed_to_the_network(world_size, monkeypatch):
    monkeypatch.setattr("engine.ranks.KEPT_WHOLE", 100)
    model = Transformer(ModelConfig(32, 2, 4, 2, 48, seq_len=16), vocab_size=41)
    ours, sent = Sharding(model, 0, world_size), []

    def send(whole, times):
        sent.append(times * whole.numel() * whole.element_size() * (world_size - 1) // world_size)
        return types.SimpleNamespace(wait=lambda: None)

    network = types.SimpleNamespace(
        all_reduce=lambda tensor, **_: send(tensor, 2),
        reduce_scatter_tensor=lambda mine, whole, **_: send(whole, 1),
        all_gather_into_tensor=lambda whole, mine, **_: send(whole, 1),
    )
    monkeypatch.setattr("engine.ranks.dist", network)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    ours.reduce_gradients()
    ours.gather()
    assert (ours.bytes_sent, ours.messages) == (sum(sent), len(sent)) == ours.traffic()
    split = [share for share in ours.shares if share.split]
    assert len(sent) == len(ours.shares) + len(split)
    padded = sum(-(-len(unit_view(s.parameter)) // world_size) * unit_view(s.parameter)[0].numel() for s in split)
    small = sum(s.parameter.numel() for s in ours.shares if not s.split)
    assert sum(sent) == pytest.approx(2 * 4 * (world_size - 1) * (padded + small / world_size), abs=len(sent))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_out_the_validation_and_each_batch_is_read_once(shards_folder, monkeypatch, world_size):
    opened, read = shards.open_shards(shards_folder), []

    def evaluate(model, batches, deciles, count):
        assert count == world_size
        read.append([batch.tobytes() for batch in batches])
        return Evaluation(1.0, 0.5, [1.0] * 10)

    monkeypatch.setattr(train, "evaluate", evaluate)
    stream, nothing = data.TokenStream(opened, "val"), lambda *_: None
    settings = types.SimpleNamespace(eval_tokens=640, seq_len=32)
    work = types.SimpleNamespace(model=None, device=torch.device("cpu"))
    monkeypatch.setitem(train.VALIDATION_TOKENS, "cpu", 4 * 32)
    for index in range(world_size):
        folder = types.SimpleNamespace(rank=Rank(index, world_size), log_validation=nothing, save_best=nothing)
        train.validate(settings, work, stream, None, folder, Progress(), Stopwatch(work.device))
    whole = [batch.tobytes() for batch in data.validation_batches(stream, 640, 32, 4)]
    assert len(whole) == 5
    assert sorted(itertools.chain(*read)) == sorted(whole)


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_is_sent_is_padded_and_back(world_size, monkeypatch):
    monkeypatch.setattr("engine.ranks.KEPT_WHOLE", 0)
    model = Transformer(ModelConfig(32, 2, 4, 2, 48, seq_len=16), vocab_size=41)
    for share in Sharding(model, 0, world_size).shares:
        whole = torch.randn_like(share.parameter)
        padded, back = share.padded(whole), torch.empty_like(whole)
        assert len(padded) == world_size * share.chunk
        share.unpad(padded, back)
        assert torch.equal(back, whole), share.name


def test_the_matrices_of_a_rank_keep_their_orientation():
    """`up` is stored as its map, `down` transposed, in one bank: a rank's part must know which is which."""
    model = Transformer(ModelConfig(32, 2, 4, 2, 48, seq_len=16, experts=3), vocab_size=40)
    for bank in model.banks():
        whole = Sharding(model).own_entries(bank.parameter, bank.transposed)
        each = len(unit_view(bank.parameter)) // len(whole)
        parts = [entry for rank in shares_of(model, 4) for entry in rank.own_entries(bank.parameter, bank.transposed)]
        assert parts == [entry for entry in whole for _ in range(each)]


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_state_that_does_not_fit_is_refused(fault):
    model = Transformer(ModelConfig(32, 2, 4, 2, 48, seq_len=16), vocab_size=40)
    layout, alone = parameter_layout(model, "muon"), Sharding(model)
    optimizers = build_optimizers(model, "muon", lr=0.02, adamw_lr=0.01)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for o in optimizers:
        o.step()
    states = save_optimizers(optimizers, layout, alone)
    if fault == "missing":
        del states[0]["state"][1]
    else:
        states[0]["state"][1]["momentum_buffer"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="momentum_buffer"):
        load_optimizers(optimizers, layout, alone, states)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_state_goes_through_a_checkpoint_of_one_rank_unchanged(optimizer):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(32, 2, 4, 2, 48, seq_len=16), vocab_size=40)
    layout, alone = parameter_layout(model, optimizer), Sharding(model)
    optimizers = build_optimizers(model, optimizer, lr=0.02, adamw_lr=0.01)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for o in optimizers:
        o.step()
    states = save_optimizers(optimizers, layout, alone)
    again = build_optimizers(model, optimizer, lr=0.02, adamw_lr=0.01)
    load_optimizers(again, layout, alone, states)
    for a, b in zip(optimizers, again, strict=True):
        assert a.state.keys() == b.state.keys()
        for p, state in a.state.items():
            for key, value in state.items():
                assert torch.equal(value, b.state[p][key])
