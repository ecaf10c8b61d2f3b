"""--optimizer FILE.py:CLASS: a user's class trains, resumes, is measured and reported; faults are one sentence."""

import html
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import experiments
import report
from analysis import plots
from analysis.report_figures import spectra_drawings
from bench.synthetic import write_run
from engine.own_optimizer import load_class, options_of, try_out
from engine.ranks import Sharding
from model import ModelConfig, Transformer
from optim import ADAMW_BYTES, OWN_BYTES, build_optimizers, set_lr, step_cost
from suites import planner
from suites.catalog import SUITES
from suites.suite import Condition, Suite
from tests.conftest import ask_to_stop
from tests.processes import command, run
from tests.test_sharding import TWELVE, assert_same_training
from tests.test_train import lines, losses, weights

MY_SGD = """
import torch

class MySGD(torch.optim.Optimizer):
    def __init__(self, params, lr=0.01, momentum=0.0, shapes=None):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                assert p.ndim == 2
                buffer = self.state[p].setdefault("buffer", torch.ones_like(p))  # a start that is not zero
                buffer.mul_(group["momentum"]).add_(p.grad)
                p.sub_(buffer, alpha=group["lr"])
            group["steps"] = group.get("steps", 0) + 1  # state outside `state`

class OfAll(MySGD):
    '''Its rate depends on all matrices.'''
    def step(self):
        norm = sum(p.grad.square().sum() for group in self.param_groups for p in group["params"]).sqrt()
        for group in self.param_groups:
            for p in group["params"]:
                p.grad /= norm
        super().step()

class WithClosure(MySGD):
    def step(self, closure):
        super().step()

class WithSet(MySGD):
    def step(self):
        super().step()
        for state in self.state.values():
            state["seen"] = {object}

class WithoutRate(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {})
    def step(self):
        pass

class OfParameters(torch.nn.Module):
    pass
"""


@pytest.fixture
def my_file(tmp_path):
    path = tmp_path / "my file.py"
    path.write_text(MY_SGD)
    return path


def test_a_class_of_a_file_outside_the_repository_trains_resumes_and_is_reported(
    train_small, before_step, my_file, tmp_path
):
    flags = ("--optimizer", f"{my_file}:MySGD", "--optimizer-options", "momentum=0.9", "shapes=(1, 2)", "--lr", "0.5")
    flags += ("--tokens", "5120", "--checkpoint-every", "5", "--adamw-lr", "0.01")
    code, whole, out, err = train_small("whole", *flags)
    assert code == 0, out + err
    undo = before_step(8, ask_to_stop)
    _, halves, _, _ = train_small("halves", *flags)
    undo()
    assert len(losses(halves)) < 20
    code, _, out, _ = train_small("halves", *flags, "--resume")
    assert "resuming at step" in out
    assert losses(halves) == losses(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights(halves).values(), weights(whole).values(), strict=True))
    assert losses(whole)[-1] < losses(whole)[0] - 0.3
    (saved, _) = torch.load(halves / "checkpoint.pt", weights_only=True)["optimizer"]
    assert saved["param_groups"][0]["steps"] == 20  # none of the warm-up's

    config = json.loads((whole / "config.json").read_text())
    assert (config["optimizer"], config["optimizer_options"]) == (
        f"{my_file.name}:MySGD",
        "momentum=0.9 'shapes=(1, 2)'",
    )
    measured = [line for line in lines(whole, "manifold_stats.jsonl") if line["step"]]
    assert all(line["update_norm"] > 0 and line.get("ns_residual") is None for line in measured)
    assert lines(whole, kind="train")[-1]["lr"] == pytest.approx(0.05)  # the schedule's end

    _, muon, _, _ = train_small("muon", "--tokens", "5120")
    runs = report.load([whole, muon])
    page = html.unescape(report.write_report(runs, tmp_path / "report", only={"loss_curves"}).read_text())
    (verdict,) = report.judge(runs)
    assert all("MySGD" in words for words in (verdict.headline, plots.run_labels(runs)[0], page))
    assert plots.optimizer_color(runs[0].optimizer) not in plots.OPTIMIZER_COLORS.values()
    assert "--optimizer-options momentum=0.9 'shapes=(1, 2)'" in page

    my_file.write_text(MY_SGD.replace("p.sub_(", "p.add_("))
    code, _, _, err = train_small("halves", *flags, "--resume")
    assert (code, "optimizer_code was" in err) == (2, True)


def test_each_matrix_gets_its_own_update_in_its_own_orientation(my_file):
    """Against the formula, matrix by matrix; `down` is stored transposed, experts are matrices too."""
    for experts in (0, 3):
        torch.manual_seed(0)
        model = Transformer(ModelConfig(16, 2, 2, 1, 24, seq_len=8, experts=experts), vocab_size=40)
        own = load_class(f"{my_file}:MySGD", ("momentum=0.5",))
        optimizers = build_optimizers(model, "own", lr=0.2, adamw_lr=0.01, own=own)
        expected = {p[:3]: p.weight.detach().double().numpy().copy() for p in model.projections()}
        buffers = {key: np.ones_like(W) for key, W in expected.items()}
        set_lr(optimizers, 0.5)
        for step in range(3):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            gradients = [bank.parameter.grad.clone() for bank in model.banks()]
            for o in optimizers:
                o.grad_scale, o.found_inf = torch.tensor(2.0), torch.tensor(float(step == 1))
                o.step()
                o.zero_grad()
            for p in model.projections(gradients) if step != 1 else ():
                buffers[p[:3]] = 0.5 * buffers[p[:3]] + p.weight.double().numpy() / 2
                expected[p[:3]] -= 0.1 * buffers[p[:3]]
        assert all(p.grad is None for p in model.parameters())
        shapes = set()
        for p in model.projections():
            np.testing.assert_allclose(p.weight.detach().numpy(), expected[p[:3]], rtol=0, atol=1e-6)
        for matrix in (matrix for owned in optimizers[0].owned for matrix in owned.matrices):
            shapes.add(tuple(matrix.shape))
        assert {(24, 16), (16, 24)} <= shapes  # up and down as maps


def test_a_class_of_pytorch_that_takes_only_matrices_works(tmp_path):
    path = tmp_path / "theirs.py"
    path.write_text("from torch.optim import Muon")
    own = load_class(f"{path}:Muon", ("nesterov=false", "ns_steps=3"))
    assert own.options == {"nesterov": False, "ns_steps": 3}
    assert try_out(own, 0.02, torch.device("cpu"))


def test_state_goes_from_one_rank_to_three_and_back(my_file):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(32, 3, 4, 2, 48, seq_len=16), vocab_size=40)
    own = load_class(f"{my_file}:MySGD")

    def optimizer_of(sharding):
        return build_optimizers(model, "own", lr=0.2, adamw_lr=0.01, own=own, sharding=sharding)[0]

    alone = optimizer_of(Sharding(model))
    for bank in model.banks():
        bank.parameter.grad = torch.randn_like(bank.parameter)
    alone.step()
    whole = alone.whole_state()
    assert len(whole["state"]) == 3 * 6
    assert whole["param_groups"][0]["steps"] == 1
    found = {}
    for rank in range(3):
        part = optimizer_of(Sharding(model, rank, 3))
        part.load_whole_state(whole)
        part.sharding.world_size = 1  # so that nothing is sent
        state = part.whole_state()["state"]
        assert not found.keys() & state.keys()
        found |= state
    assert found.keys() == whole["state"].keys()
    assert all(torch.equal(found[n]["buffer"], whole["state"][n]["buffer"]) for n in found)


def test_two_workers_train_like_one_process(train_small, shards_folder, tmp_path, my_file):
    flags = ("--optimizer", f"{my_file}:MySGD", "--optimizer-options", "momentum=0.9", "--lr", "0.5")
    arguments = (*TWELVE[-6:], "--checkpoint-every", "6", "--spectra-every", "6", *flags)
    _, one, _, _ = train_small("one", *arguments)
    done = run([*command(shards_folder, tmp_path, "two", *arguments), "--workers", "2"])
    assert done.returncode == 0, done.stderr
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["optimizer"] for name in ("one", "two")]
    assert states[0][0]["state"].keys() == states[1][0]["state"].keys()
    assert_same_training(tmp_path / "two", one)


def test_a_step_moves_gradient_and_weight_and_what_it_keeps_is_not_known(my_file):
    model = Transformer(ModelConfig(16, 2, 2, 1, 24, seq_len=8), vocab_size=40)
    own = load_class(f"{my_file}:MySGD")
    flops, moved = step_cost(build_optimizers(model, "own", lr=0.2, adamw_lr=0.01, own=own))
    blocks = sum(p.numel() for p in model.weights.values())
    others = model.parameter_count() - blocks
    assert (flops, moved) == (0.0, OWN_BYTES * blocks + ADAMW_BYTES * others)


def test_groups_keep_the_rates_that_a_class_gives_them(tmp_path):
    (tmp_path / "halved.py").write_text(
        "import torch\n\nclass Halved(torch.optim.SGD):\n    def __init__(self, params, lr):\n"
        "        super().__init__([{**group, 'lr': lr / 2} for group in params], lr=lr)\n"
    )
    model = Transformer(ModelConfig(16, 1, 2, 1, 24, seq_len=8), vocab_size=40)
    own = load_class(f"{tmp_path}/halved.py:Halved")
    optimizer, *_ = build_optimizers(model, "own", lr=0.2, adamw_lr=0.01, own=own)
    optimizer.reset()  # as after the warm-up
    set_lr([optimizer], 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.05}


def test_two_seeds_of_a_class_have_every_figure_in_the_folder(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"{seed}", seed=seed, optimizer="/a folder/sgd.py:MySGD", experts=2, momentum=True)
    runs = report.load([tmp_path / "0", tmp_path / "1"])
    stems = [one.picture.stem for one in spectra_drawings(runs)]
    assert any(stem.startswith("pair_grid_") and stem.endswith("MySGD") for stem in stems)
    assert [stem for stem in stems if Path(stem).name != stem or ":" in stem] == []


def test_options_are_read_as_python_writes_them():
    words = ("a=1", "b=1e-3", "c=True", "d=false", "e=(0.9, 0.95)", "f=None", "g=adaptive", "h='1'", "i=x=y")
    found = {"a": 1, "b": 1e-3, "c": True, "d": False, "e": (0.9, 0.95), "f": None, "g": "adaptive", "h": "1"}
    assert options_of(words) == found | {"i": "x=y"}


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("MyAdam", (), "has no class MyAdam"),
        ("OfParameters", (), "OfParameters is not a torch.optim.Optimizer"),
        ("torch", (), "torch is not a torch.optim.Optimizer"),
        (
            "MySGD",
            ("--optimizer-options", "momentun=0.9"),
            "MySGD takes no momentun, only params, lr, momentum, shapes",
        ),
        ("MySGD", ("--optimizer-options", "momentum"), "--optimizer-options momentum: must be key=value"),
        ("MySGD", ("--optimizer-options", "lr=1"), "--optimizer-options lr=1: lr comes from --lr"),
        ("MySGD", ("--optimizer-options", "momentum=1", "momentum=2"), "momentum is given twice"),
        ("MySGD", ("--optimizer-options", "momentum=much"), "a trial with these --optimizer-options failed (TypeError"),
        ("MySGD", ("--weight-decay", "0.1"), "--weight-decay 0.1: a class of a file takes it by --optimizer-options"),
        ("MySGD", ("--muon-on", "q"), "trains nothing by Muon"),
        ("WithClosure", (), "a trial on two matrices failed (TypeError"),
        ("WithSet", (), "its state_dict is more than tensors and numbers"),
        ("WithoutRate", (), "its param_groups have no lr, which the schedule sets"),
        ("OfAll", ("--workers", "2"), "its step of one matrix depends on the others"),
    ],
)
def test_a_class_that_cannot_train_is_one_sentence(train_small, my_file, name, more, words):
    code, folder, _, err = train_small("run", "--optimizer", f"{my_file}:{name}", "--lr", "0.1", *more)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
    assert not folder.exists()


@pytest.mark.parametrize(
    ("source", "flag", "more", "words"),
    [
        (None, "{}:MySGD", ("--lr", "1"), "cannot be read (No such file or directory)"),
        ("import no_such_package", "{}:MySGD", ("--lr", "1"), "cannot be imported (ModuleNotFoundError: No module"),
        ("class MySGD(", "{}:MySGD", ("--lr", "1"), "cannot be imported (SyntaxError"),
        ("raise SystemExit(3)", "{}:MySGD", ("--lr", "1"), "cannot be imported (SystemExit"),
        (MY_SGD, "{}:MySGD", (), "give its peak rate as --lr"),
        (MY_SGD, "sgd", ("--lr", "1"), "--optimizer sgd: choose muon, adamw or FILE.py:CLASS"),
        (MY_SGD, "muon", ("--optimizer-options", "a=1"), "--optimizer-options: only for --optimizer FILE.py:CLASS"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(train_small, tmp_path, source, flag, more, words):
    path = tmp_path / "mine.py"
    if source is not None:
        path.write_text(source)
    code, _, _, err = train_small("run", "--optimizer", flag.format(path), *more)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1


def test_an_optimizer_that_couples_its_matrices_trains_in_one_process(train_small, my_file):
    own = f"{my_file}:OfAll"
    assert not try_out(load_class(own), 0.1, torch.device("cpu"))
    code, folder, out, err = train_small(
        "run", "--optimizer", own, "--lr", "0.1", "--tokens", "512", "--workers", "auto"
    )
    assert code == 0, out + err
    assert json.loads((folder / "config.json").read_text())["workers"] == 1


def test_a_condition_of_a_suite_trains_and_is_reported(tmp_path, shards_folder, run_main, my_file, monkeypatch):
    small = {"model": "nano", "layers": 2, "d_model": 32, "heads": 2, "kv_heads": 1, "d_ff": 64, "seq_len": 32}
    base = {**small, "batch_tokens": 256, "eval_tokens": 512, "tokens": 1024, "adamw_lr": 0.01}
    sgd = {"optimizer": f"{my_file}:MySGD", "optimizer_options": ("momentum=0.9", "shapes=(1, 2)"), "lr": 0.1}
    conditions = [
        Condition("muon", {**base, "optimizer": "muon", "lr": 0.04}, "sgd"),
        Condition("sgd", {**base, **sgd}),
    ]
    suite = Suite("own", "S0", "Is it better?", "optimizer", (), 0, False, False, (), lambda *_: conditions)
    monkeypatch.setitem(SUITES, "own", suite)
    where = ("--scale", "nano", "--runs-dir", tmp_path / "runs", "--data", shards_folder, "--seeds", "0")
    code, out, err = run_main(experiments.main, "run", "own", *where, "--jobs", "1")
    assert code == 0, out + err
    assert "2 runs, 2 to go" in out
    assert len(list((tmp_path / "runs").glob("nano-MySGD-*-seed0/summary.json"))) == 1
    chosen = planner.Selection(suite="own", scale="nano", runs_dir=tmp_path / "runs", data=shards_folder, seeds=(0,))
    results = planner.Planner(chosen).results("own")
    assert results.arms() == ["muon", sgd["optimizer"]]
    ((muon, own),) = results.crosses()
    assert 0 < muon.loss < own.loss
    assert "Same initial weights" in results.fairness()[1]
