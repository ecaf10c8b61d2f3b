import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import train
from corpus import build
from engine.files import ROOT as REPOSITORY
from engine.ranks import Sharding
from engine.step import WARMUP_STEPS, Evaluation, TrainingStep
from tests.conftest import SMALL_MODEL, ask_to_stop, random_documents
from tests.test_data import damage


def lines(folder, name="metrics.jsonl", kind=None):
    records = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [record for record in records if kind is None or record["kind"] == kind]


def losses(folder):
    return [record["train_loss"] for record in lines(folder, kind="train")]


def without_time(records):
    clocks = ("step_ms", "tokens_per_second", "train_seconds")
    return [{key: value for key, value in record.items() if key not in clocks} for record in records]


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_learns_and_its_folder_is_complete(train_small, optimizer, request):
    if optimizer == "adamw":
        request.getfixturevalue("no_drawing")
    arguments = ("--optimizer", optimizer, "--tokens", "1e4", "--checkpoint-every", 10, "--lr", 0.02)
    code, folder, out, _ = train_small("run", *arguments, plots=True)
    assert code == 0
    files = {"config.json", "log.txt", "metrics.jsonl", "manifold_stats.jsonl", "summary.json", "plots"}
    files |= {"samples.json"}
    assert {p.name for p in folder.iterdir()} == files | {"checkpoint.pt", "checkpoint.prev.pt", "best.pt"}
    steps = math.ceil(10_000 / 256)
    assert len(list((folder / "plots").glob("*.png"))) >= 8
    trained = lines(folder, kind="train")
    assert [record["step"] for record in trained] == list(range(1, steps + 1))
    assert trained[-1]["tokens"] == steps * 256
    keys = {
        "kind",
        "step",
        "tokens",
        "train_loss",
        "grad_norm",
        "lr",
        "adamw_lr",
        "step_ms",
        "tokens_per_second",
        "mfu",
    }
    assert all(record.keys() == keys for record in trained)
    validated = lines(folder, kind="val")
    assert [record["step"] for record in validated] == list(range(0, steps + 1, 2))
    of_losses = {"val_loss", "val_accuracy", "val_bpb", "val_loss_by_decile"}
    assert all(record.keys() == {"kind", "step", "tokens", "train_seconds"} | of_losses for record in validated)
    assert validated[0]["val_loss"] == pytest.approx(math.log(320), rel=0.02)
    assert validated[-1]["val_loss"] < validated[0]["val_loss"] - 0.3
    spectra = lines(folder, "manifold_stats.jsonl")
    assert len(spectra) == len(validated) * 2 * 6
    assert {record["step"] for record in spectra} == {record["step"] for record in validated}
    assert all((record["update_norm"] is None) == (record["step"] == 0) for record in spectra)

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert (summary["steps"], summary["tokens"]) == (steps, steps * 256)
    assert summary["final_val_loss"] == validated[-1]["val_loss"]
    assert summary["best_val_loss"] == min(record["val_loss"] for record in validated)
    assert summary["mfu"] is None
    assert 0 < summary["train_seconds"] <= summary["wall_seconds"]
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert {"model", "optimizer", "step", "tokens", "loader", "rng", "config"} <= checkpoint.keys()
    assert torch.load(folder / "checkpoint.prev.pt", weights_only=True)["step"] == 30
    config = json.loads((folder / "config.json").read_text())
    assert config["optimizer"] == optimizer
    assert config["batch_tokens"] == 256
    assert config["data_fingerprint"] == summary["data_fingerprint"]
    assert "step:40/40 train_loss:" in out
    assert (folder / "log.txt").read_text() == out


def test_the_schedule_counts_updates_not_micro_steps(train_small):
    arguments = (
        "--tokens",
        20 * 256,
        "--warmup",
        0.25,
        "--schedule",
        "linear",
        "--min-lr",
        0.1,
        "--lr",
        0.01,
        "--adamw-lr",
        0.005,
    )
    _, folder, _, _ = train_small("run", *arguments, "--micro-batch", 1)
    rates = [record["lr"] for record in lines(folder, kind="train")]
    assert rates[:6] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01, 0.01])
    assert rates[-1] == pytest.approx(0.001)
    assert [record["adamw_lr"] for record in lines(folder, kind="train")] == pytest.approx([r / 2 for r in rates])


def test_same_seed_same_run_other_seed_other_init_and_order(train_small):
    a, b, c = (train_small(name, "--tokens", 2560, "--seed", seed)[1] for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert without_time(lines(a)) == without_time(lines(b))
    assert lines(a, "manifold_stats.jsonl") == lines(b, "manifold_stats.jsonl")
    assert losses(a) != losses(c)
    first = [lines(folder, "manifold_stats.jsonl")[0]["singular_values"] for folder in (a, c)]
    assert first[0] != first[1]
    assert (
        json.loads((a / "config.json").read_text())["config_hash"]
        != (json.loads((c / "config.json").read_text())["config_hash"])
    )


def test_seed_changes_the_data_order_of_equal_weights(train_small, monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", lambda seed: torch.default_generator.manual_seed(7))
    a, c = (train_small(name, "--tokens", 512, "--seed", seed)[1] for name, seed in (("a", 0), ("c", 1)))
    assert lines(a, kind="val")[0]["val_loss"] == lines(c, kind="val")[0]["val_loss"]
    assert losses(a)[0] != losses(c)[0]


def test_micro_batches_do_not_change_the_run(train_small):
    one, many = (train_small(f"m{m}", "--tokens", 2560, "--micro-batch", m)[1] for m in (8, 1))
    assert losses(one) == pytest.approx(losses(many), abs=2e-5)


def test_warm_up_leaves_no_trace(train_small, monkeypatch):
    warm = train_small("warm", "--tokens", 1280, "--dropout", 0.1)[1]
    monkeypatch.setattr("engine.step.WARMUP_STEPS", 0)
    cold = train_small("cold", "--tokens", 1280, "--dropout", 0.1)[1]
    assert losses(warm) == losses(cold)


def test_warm_up_restores_the_random_numbers(train_small, monkeypatch):
    states, warm_up = [], TrainingStep.warm_up

    def watched(work, tokens):
        states.append(torch.get_rng_state())
        warm_up(work, tokens)
        states.append(torch.get_rng_state())

    monkeypatch.setattr(TrainingStep, "warm_up", watched)
    train_small("run", "--tokens", 256, "--dropout", 0.1)
    assert torch.equal(*states)


def test_a_run_stopped_in_warm_up_resumes_without_repeating_lines(train_small, monkeypatch):
    warm_up = TrainingStep.warm_up

    def interrupted(work, tokens):
        ask_to_stop()
        warm_up(work, tokens)

    monkeypatch.setattr(TrainingStep, "warm_up", interrupted)
    _, folder, _, _ = train_small("run", "--tokens", 1024)
    assert json.loads((folder / "summary.json").read_text())["steps"] == 0
    monkeypatch.setattr(TrainingStep, "warm_up", warm_up)
    code, folder, _, _ = train_small("run", "--tokens", 1024, "--resume")
    assert code == 0
    assert [record["step"] for record in lines(folder, kind="val")] == [0, 1, 2, 3, 4]
    assert len(lines(folder, "manifold_stats.jsonl")) == 5 * 12


def test_logged_gradient_norm_is_the_one_before_clipping(train_small):
    clipped, free = (
        train_small(name, "--tokens", 256, "--grad-clip", clip)[1] for name, clip in (("clip", 1e-3), ("free", 0))
    )
    norms = [lines(folder, kind="train")[0]["grad_norm"] for folder in (clipped, free)]
    assert norms[0] == norms[1] > 0.01
    per_projection = [
        [record["grad_norm"] for record in lines(folder, "manifold_stats.jsonl") if record["step"] == 1]
        for folder in (clipped, free)
    ]
    assert per_projection[0] == per_projection[1]
    assert math.hypot(*per_projection[0]) < norms[0]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_stopped_run_resumes_to_the_bit(train_small, before_step, optimizer):
    arguments = ("--optimizer", optimizer, "--tokens", 20 * 256, "--dropout", 0.1, "--spectra-every", 3)
    _, whole, _, _ = train_small("whole", *arguments)
    take_back = before_step(6, ask_to_stop)
    code, parts, out, _ = train_small("parts", *arguments)
    assert code == 0
    assert json.loads((parts / "summary.json").read_text())["status"] == "stopped"
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"kind":"train","step":8,"train_loss":0}\n{"kind":"tr')  # written after the checkpoint, then killed
    take_back()
    code, parts, out, _ = train_small("parts", *arguments, "--resume")
    assert code == 0
    assert "resuming at step 7" in out
    assert without_time(lines(parts)) == without_time(lines(whole))
    assert lines(parts, "manifold_stats.jsonl") == lines(whole, "manifold_stats.jsonl")
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(parts)[name]), name
    code, _, out, _ = train_small("parts", *arguments, "--resume")
    assert code == 0
    assert "nothing to do" in out


def test_a_finished_run_without_its_checkpoints_stays_as_it_is(train_small):
    """As experiments.py leaves it, and as it is published."""
    arguments = ("--tokens", 4 * 256, "--checkpoint-every", 2)
    _, folder, _, _ = train_small("run", *arguments)
    for path in folder.glob("checkpoint*.pt"):
        path.unlink()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    code, _, out, _ = train_small("run", *arguments, "--resume")
    assert (code, out.splitlines()[-1]) == (0, f"{folder}: finished already; nothing to do")
    code, _, _, err = train_small("run", *arguments, "--resume", "--lr", 0.5)
    assert code == 2
    assert "lr was" in err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_resumed_run_takes_up_the_random_state_of_the_checkpoint(train_small, before_step):
    arguments = ("--tokens", 4 * 256, "--dropout", 0.1)
    take_back = before_step(1, ask_to_stop)
    _, folder, _, _ = train_small("run", *arguments)
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)["rng"]["torch"]
    take_back()
    states = []
    before_step(None, lambda: states.append(torch.get_rng_state()))
    train_small("run", *arguments, "--resume")
    assert len(states) == 2
    assert torch.equal(states[0], saved)
    assert not torch.equal(states[1], saved)


@pytest.mark.parametrize("flag", ["--dropout", "--inner-dropout"])
def test_dropout_depends_on_seed_step_and_rank_alone(train_small, monkeypatch, before_step, flag):
    """Only rank 0's random state is in a checkpoint: the other ranks draw the same again without it."""
    arguments = ("--tokens", 4 * 256, flag, 0.1)
    _, undisturbed, _, _ = train_small("undisturbed", *arguments)
    gradients, seeds = TrainingStep.gradients, []

    def watched(step, *rest, **more):
        seeds.append(torch.initial_seed())
        return gradients(step, *rest, **more)

    monkeypatch.setattr(TrainingStep, "gradients", watched)
    before_step(None, lambda: torch.rand(3))
    _, folder, _, _ = train_small("disturbed", *arguments)
    assert losses(folder) == losses(undisturbed)
    drawn = seeds[WARMUP_STEPS:]
    assert drawn == [int(np.random.SeedSequence([0, step, 0]).generate_state(1)[0]) for step in range(4)]
    seeds.clear()
    monkeypatch.setattr(train, "join_ranks", lambda device: train.Rank(index=1))  # which then has no rank 0 beside it
    monkeypatch.setattr(Sharding, "reduce_gradients", lambda sharding: None)
    train_small("other-rank", *arguments)
    assert not set(seeds[WARMUP_STEPS:]) & set(drawn)


def test_the_summary_of_the_part_before_is_gone_while_the_run_goes_on(train_small, before_step, tmp_path):
    """Or it would speak for a run that was killed later."""
    seen, take_back = [], before_step(2, ask_to_stop)
    train_small("run", "--tokens", 10 * 256)
    take_back()
    before_step(None, lambda: seen.append((tmp_path / "run" / "summary.json").exists()))
    _, folder, _, _ = train_small("run", "--tokens", 10 * 256, "--resume")
    assert seen == [False] * 7
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"


def test_the_best_weights_are_kept_also_over_a_resume(train_small, monkeypatch, before_step):
    evaluated = iter((9.0, 5.0, 3.0, 4.0, 6.0))
    monkeypatch.setattr(train, "evaluate", lambda *_: Evaluation(next(evaluated), 0.5, [1.0] * 10))
    take_back = before_step(2, ask_to_stop)
    arguments = ("--tokens", 4 * 256, "--eval-every", 1)
    _, folder, _, _ = train_small("run", *arguments)
    best = (folder / "best.pt").read_bytes()
    found = torch.load(folder / "best.pt", weights_only=True)
    assert (found["step"], found["val_loss"]) == (2, 3.0)
    take_back()
    train_small("run", *arguments, "--resume")
    assert list(evaluated) == []
    assert (folder / "best.pt").read_bytes() == best
    assert json.loads((folder / "summary.json").read_text())["best_val_loss"] == 3.0


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(train_small):
    arguments = ("--tokens", 12 * 256, "--checkpoint-every", 5)
    _, folder, _, _ = train_small("run", *arguments)
    expected = weights(folder)
    (folder / "checkpoint.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:-500])
    code, folder, out, _ = train_small("run", *arguments, "--resume")
    assert code == 0
    assert "checkpoint.pt: damaged" in out
    assert (folder / "checkpoint.damaged").exists()
    assert "resuming at step 10" in out
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(folder).items())


def test_a_non_finite_loss_stops_before_the_update(train_small, monkeypatch):
    gradients, calls = TrainingStep.gradients, []

    def poisoned(step, *arguments, **more):
        calls.append(step)
        if len(calls) != WARMUP_STEPS + 6:
            return gradients(step, *arguments, **more)
        hook = step.model.weights["k_v"].register_hook(lambda gradient: gradient * torch.nan)
        stats = gradients(step, *arguments, **more)
        hook.remove()
        return stats

    monkeypatch.setattr(TrainingStep, "gradients", poisoned)
    code, folder, out, _ = train_small("run", "--tokens", 2560, "--checkpoint-every", 5)
    assert code == 1
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert "step 6" in summary["reason"]
    assert "weights.k_v" in summary["reason"]
    assert f"failed: {summary['reason']}" in out
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 5
    assert all(weight.isfinite().all() for weight in weights(folder).values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--lr", "nan"), "--lr nan"),
        (("--adamw-lr", "-1"), "--adamw-lr"),
        (("--warmup", "2"), "--warmup 2"),
        (("--tokens", "-5"), "--tokens -5"),
        (("--tokens", "1.5"), "--tokens"),
        (("--tokens", "inf"), "--tokens"),
        (("--eval-tokens", "31"), "--eval-tokens 31"),
        (("--seq-len", "0"), "--seq-len 0"),
        (("--batch-tokens", "0"), "--batch-tokens 0"),
        (("--name", "../escape"), "--name ../escape"),
        (("--name", ".hidden"), "--name .hidden"),
        (("--name", "/tmp/escape"), "--name /tmp/escape"),
        (("--name", "a/../../escape"), "--name a/../../escape"),
        (("--model", "7b"), "7b"),
        (("--heads", "64"), "heads"),
        (("--heads", "3"), "heads"),
        (("--ffn", "tanh"), "tanh"),
        (("--schedule", "zigzag"), "zigzag"),
        (("--ns-coefficients", "sextic"), "sextic"),
        (("--momentum", "1"), "--momentum"),
        (("--batch-tokens", "250"), "--batch-tokens 250"),
        (("--micro-batch", "3"), "--micro-batch 3"),
        (("--micro-batch", "0"), "--micro-batch 0"),
        (("--device", "cuda"), "--device cuda"),
        (("--eval-every", "0"), "--eval-every 0"),
        (("--data", "nowhere"), "nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(train_small, tmp_path, arguments, words):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has one")
    code, _, _, err = train_small("run", *arguments)
    assert code == 2
    assert words in err
    assert "Traceback" not in err
    if arguments[1] not in ("1.5", "inf"):  # what cannot even be parsed is framed by tyro
        assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_byte_ends_the_run_with_a_sentence(train_small, tmp_path):
    documents = random_documents(100)
    build.build_shards(lambda: iter(documents), tmp_path / "s", source="test", vocab_size=320, val_fraction=0.2)
    damage(tmp_path / "s" / "train_000000.bin", "flipped byte")
    code, folder, _, err = train_small("run", "--tokens", 2560, data_folder=tmp_path / "s")
    assert code == 2
    shard = tmp_path / "s" / "train_000000.bin"
    assert err.strip() == (f"error: {shard}: its checksum does not match, the file is damaged; rebuild it with data.py")
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"


def test_an_existing_name_is_refused_and_left_alone(train_small):
    _, folder, _, _ = train_small("run", "--tokens", 512)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    code, _, _, err = train_small("run", "--tokens", 512)
    assert code == 2
    assert "exists" in err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    code, _, _, err = train_small("run", "--tokens", 512, "--lr", 0.5, "--resume")
    assert code == 2
    assert "lr was" in err


def test_a_folder_that_is_no_run_is_left_alone(train_small, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.html").write_text("mine")
    code, _, _, err = train_small("report", "--tokens", 512, "--resume")
    assert code == 2
    assert "not a run's folder" in err
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["report.html"]


def test_resume_without_a_checkpoint_starts_afresh(train_small):
    code, folder, out, _ = train_small("run", "--tokens", 512, "--resume")
    assert code == 0
    assert "no checkpoint to resume from" in out
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"


def test_ctrl_c_before_the_training_is_a_word_and_leaves_nothing(run_main, monkeypatch, tmp_path):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "resolve", interrupted)
    assert run_main(train.main, "--runs-dir", tmp_path / "runs") == (130, "", "interrupted\n")
    assert not (tmp_path / "runs").exists()


def test_two_ranks_train_like_one(train_small, shards_folder, tmp_path):
    """With AdamW; tests/test_sharding.py does it with Muon."""
    arguments = ("--optimizer", "adamw", "--tokens", str(12 * 256), "--no-plots")
    _, one, _, _ = train_small("one", *arguments)
    where = ("--data", str(shards_folder), "--runs-dir", str(tmp_path), "--name", "two")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py")
    done = subprocess.run(
        [*torchrun, *SMALL_MODEL, *where, *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    two = tmp_path / "two"
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    assert [r["val_loss"] for r in lines(two, kind="val")] == pytest.approx(
        [r["val_loss"] for r in lines(one, kind="val")], abs=1e-4
    )
    for one_line, line in zip(lines(one, kind="val"), lines(two, kind="val"), strict=True):
        assert line["val_loss_by_decile"] == pytest.approx(one_line["val_loss_by_decile"], abs=1e-3)
        assert line["val_bpb"] == pytest.approx(one_line["val_bpb"], abs=1e-4)
    assert len(lines(two, "manifold_stats.jsonl")) == len(lines(one, "manifold_stats.jsonl"))


def test_the_model_compiles_without_graph_breaks():
    from model import SIZES, Transformer

    model = Transformer(SIZES["nano"], vocab_size=64)
    tokens = torch.zeros(1, 32, dtype=torch.long)
    explanation = torch._dynamo.explain(model)(tokens, tokens)
    assert explanation.graph_break_count == 0
