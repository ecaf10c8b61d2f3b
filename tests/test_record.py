"""Records: made by the command, repeated from their files, and every way in which one can be wrong is named."""

import json
import math
import shutil
import subprocess

import numpy as np
import pytest

import train
from analysis.runs import load_run
from bench import record, record_pages
from bench.record import ROOT
from engine import files
from engine.cli import BadInput
from suites import launcher
from tests.conftest import SMALL_MODEL

RECORDS = ROOT / "runs" / "records"
COMMITTED = sorted(path.parent for name in ("record.json", "bench.json") for path in RECORDS.glob(f"*/{name}"))
SEEDS = (0, 1, 2)
STANDARD = record.standard


def head() -> str:
    git = ("git", "-C", str(ROOT), "rev-parse", "HEAD")
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "0" * 40


def in_this_process(jobs, slots):
    """What launcher.run_here does, with a smaller model and without processes."""
    for job in jobs:
        words = [*SMALL_MODEL, *job.command()[2:], "--layers", "1", "--eval-every", "2", "--spectra-every", "3"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["train.py", *words])
            assert train.main() == 0


@pytest.fixture(scope="module")
def workplace(shards_folder, tmp_path_factory):
    """Records' folder with the list of corpora, a clean commit, and training in this process."""
    root = tmp_path_factory.mktemp("root")
    records = root / "runs" / "records"
    records.mkdir(parents=True)
    fingerprint = json.loads((shards_folder / "meta.json").read_text())["fingerprint"]
    corpora = {fingerprint: {"name": "random words", "command": "python data.py text words.txt"}}
    (records / "corpora.json").write_text(json.dumps(corpora))
    for name in ("README.md", "runs/records/README.md", "runs/records/prior.json"):
        shutil.copy(ROOT / name, root / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.identity._git_commit", head)
        patch.setattr(launcher, "run_here", in_this_process)
        patch.setattr(record, "standard", lambda model: {"batch_tokens": 256, "eval_tokens": 512, "seq_len": 32})
        patch.setattr(record, "PLOTS", ("loss_curves",))  # a figure takes as long as a run
        yield root


@pytest.fixture(scope="module")
def made(workplace, shards_folder):
    """A record of six small runs."""
    out = workplace / "runs" / "records" / "small"
    words = record.Make(
        out=out, tracks=("time-to-loss",), model="nano", tokens=1536, data=shards_folder, runs_dir=workplace / "runs"
    )
    assert record.make(words) == 0
    return out


@pytest.fixture
def copy(made, tmp_path):
    """The record again, to be damaged."""
    shutil.copy(made.parent / "corpora.json", tmp_path)
    return shutil.copytree(made, tmp_path / "small")


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=2) + "\n")


def edit_line(path, kind, number, **changes):
    """Change one of the lines of this kind."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    [line for line in lines if line["kind"] == kind][number].update(changes)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def val_lines(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "val"]


def test_a_record_holds_what_counts_and_passes_its_check(made):
    assert record.check(made) == []
    assert {path.name for path in made.iterdir() if path.is_dir()} == {
        "plots",
        *(f"nano-{optimizer}-{seed}" for optimizer in ("muon", "adamw") for seed in SEEDS),
    }
    kept = {path.name for path in (made / "nano-muon-0").iterdir()}
    assert kept == {"config.json", "log.txt", "manifold_stats.jsonl.xz", "metrics.jsonl", "summary.json"}
    found = json.loads((made / "record.json").read_text())
    assert found["command"].startswith("python -m bench.record make time-to-loss --model nano --tokens 1536 --data ")
    assert found["git_commit"] == head()


def test_a_race_over_another_course_is_no_record(made, monkeypatch):
    monkeypatch.setattr(record, "standard", STANDARD)
    faults = " ".join(record.check(made))
    for words in ("batch_tokens is 256, and of this model 8192", "eval_tokens is 512", "seq_len is 32"):
        assert words in faults


def test_its_figures_equal_a_calculation_from_the_lines_of_its_runs(made):
    figures = json.loads((made / "record.json").read_text())["figures"]
    target = np.mean([val_lines(made / f"nano-adamw-{seed}")[-1]["val_loss"] for seed in SEEDS])
    assert figures["target_loss"] == pytest.approx(target)
    for optimizer in ("muon", "adamw"):
        entry = figures["optimizers"][optimizer]
        for i, seed in enumerate(SEEDS):
            lines = val_lines(made / f"nano-{optimizer}-{seed}")
            assert entry["best_val_loss"]["by_seed"][i] == min(line["val_loss"] for line in lines)
            reached = entry["tokens_to_target"]["by_seed"][i]
            after = next((k for k, line in enumerate(lines) if line["val_loss"] <= target), None)
            assert (reached is None) == (after is None)
            if after:
                (x0, y0), (x1, y1) = ((line["tokens"], line["val_loss"]) for line in lines[after - 1 : after + 1])
                assert reached == pytest.approx(x0 + (x1 - x0) * (y0 - target) / (y0 - y1))
        losses = entry["best_val_loss"]["by_seed"]
        half = 4.302653 * np.std(losses, ddof=1) / math.sqrt(3)  # Student's t, two degrees of freedom
        assert entry["best_val_loss"]["low"] == pytest.approx(np.mean(losses) - half, rel=1e-6)


def test_packed_spectra_are_the_runs_to_five_digits(workplace, made):
    whole = load_run(workplace / "runs" / "record-small" / "nano-muon-0").spectra
    packed = load_run(made / "nano-muon-0").spectra
    assert len(packed) == len(whole) > 0
    for ours, exact in zip(packed, whole, strict=True):
        np.testing.assert_allclose(ours["singular_values"], exact["singular_values"], rtol=5.1e-5)
        assert ours["effective_rank"] == pytest.approx(exact["effective_rank"], rel=5.1e-5)
        assert (ours["step"], ours["proj"]) == (exact["step"], exact["proj"])
    damaged = workplace / "damaged.jsonl.xz"
    damaged.write_bytes((made / "nano-muon-0" / "manifold_stats.jsonl.xz").read_bytes()[:300])
    with pytest.raises(BadInput, match="not readable"):
        files.read_jsonl(workplace / "damaged.jsonl")


def without(name):
    return lambda folder: (folder / name).unlink()


DAMAGES = {
    "no report": (without("report.md"), "report.md: is missing"),
    "no spectra": (without("nano-muon-1/manifold_stats.jsonl.xz"), "manifold_stats.jsonl.xz: is missing"),
    "no plot": (without("plots/loss_curves.png"), "loss_curves.png: is missing"),
    "no run": (lambda folder: shutil.rmtree(folder / "nano-adamw-2"), "nano-adamw-2/config.json: is missing"),
    "loss not finite": (
        lambda folder: edit_line(folder / "nano-muon-0" / "metrics.jsonl", "train", 3, train_loss=None),
        "has a train_loss that is not finite",
    ),
    "loss changed in the lines": (
        lambda folder: edit_line(folder / "nano-muon-0" / "metrics.jsonl", "val", -1, val_loss=1.0),
        "its final_val_loss is not that of metrics.jsonl",
    ),
    "an update missing": (
        lambda folder: edit_line(folder / "nano-adamw-0" / "metrics.jsonl", "train", 5, step=7),
        "lacks a step from 1 to 6",
    ),
    "figure changed in the JSON": (
        lambda folder: edit(folder / "record.json", lambda r: r["figures"].update(target_loss=1.0)),
        "its figures are not those of its runs",
    ),
    "figure changed in the README": (
        lambda folder: (folder / "README.md").write_text((folder / "README.md").read_text().replace("1,536", "1,537")),
        "README.md: is not what its JSON gives",
    ),
    "not finished": (
        lambda folder: edit(folder / "nano-muon-2" / "summary.json", lambda s: s.update(status="stopped")),
        "nano-muon-2: is not a finished run",
    ),
    "another setting": (
        lambda folder: edit(folder / "nano-muon-2" / "config.json", lambda c: c.update(lr=0.5)),
        "its runs are adamw and muon and muon",
    ),
    "a seed twice": (
        lambda folder: edit(folder / "nano-muon-2" / "config.json", lambda c: c.update(seed=1)),
        "its seeds are",
    ),
    "another corpus": (
        lambda folder: edit(folder / "nano-muon-2" / "config.json", lambda c: c.update(data_fingerprint="0" * 16)),
        "its runs are adamw and muon and muon",
    ),
    "unknown corpus": (lambda folder: (folder.parent / "corpora.json").write_text("{}"), "knows no corpus"),
    "uncommitted changes": (
        lambda folder: edit(folder / "record.json", lambda r: r.update(git_commit=r["git_commit"] + "+")),
        "a record needs one commit without changes",
    ),
    "a track with its own budget": (
        lambda folder: edit(folder / "record.json", lambda r: r.update(tracks=["2m"])),
        "the track 2m has 2,015,232",
    ),
    "another device": (
        lambda folder: edit(folder / "record.json", lambda r: r["machine"].update(device="NVIDIA H200")),
        "its runs are of cpu, not of NVIDIA H200",
    ),
    "no form": (lambda folder: (folder / "record.json").write_text('{"runs": 3}'), "has not the form of a record"),
    "NaN": (lambda folder: (folder / "record.json").write_text('{"runs": NaN}'), "not readable as JSON"),
    "too large": (lambda folder: (folder / "more.bin").write_bytes(bytes(2**22)), "a record has at most"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_every_damage_is_named(copy, damage, words):
    damage(copy)
    assert words in "\n".join(record.check(copy))


def test_a_commit_that_is_nowhere_is_named(copy, monkeypatch, capsys):
    nowhere = "1" * 40
    for path in (copy / "record.json", *copy.glob("*/config.json")):
        edit(path, lambda value: value.update(git_commit=nowhere))
    edit(copy / "record.json", lambda r: r["machine"].update(git_commit=nowhere))
    (copy / "README.md").write_text(record_pages.record_page(json.loads((copy / "record.json").read_text())))
    answers = {"cat-file": None, "rev-parse": "false"}
    monkeypatch.setattr(record, "_git", lambda *words: answers[words[0]])
    assert [fault.split(": ")[1] for fault in record.check(copy)] == [f"its commit {nowhere} does not exist here"]
    answers["rev-parse"] = "true"  # a shallow clone cannot tell
    assert record.check(copy) == []
    assert "has no history" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tokens", 1536), "--tokens 1536: the track 2m has 2,015,232"),
        (("time-to-loss", "--seeds", 0, 1), "--seeds 0 1: at least 3 different ones"),
        (("time-to-loss", "--seeds", 0, 1, 1), "--seeds 0 1 1: at least 3"),
    ],
)
def test_make_refuses_what_breaks_a_rule(workplace, run_main, words, said):
    code, _, err = run_main(record.main, "make", *words, "--out", workplace / "runs" / "records" / "other")
    assert code == 2
    assert said in err


def test_make_refuses_a_record_that_is_there_a_changed_tree_and_an_unknown_corpus(
    made, run_main, monkeypatch, tmp_path, shards_folder
):
    words = ("make", "time-to-loss", "--model", "nano", "--tokens", 1536, "--data", shards_folder)
    assert "exists" in run_main(record.main, *words, "--out", made)[2]
    (tmp_path / "corpora.json").write_text("{}")
    assert "knows no corpus" in run_main(record.main, *words, "--out", tmp_path / "new")[2]
    monkeypatch.setattr("engine.identity._git_commit", lambda: head() + "+")
    assert "commit first" in run_main(record.main, *words, "--out", made.parent / "new")[2]


def test_a_make_that_is_stopped_or_fails_leaves_no_record(workplace, run_main, monkeypatch, shards_folder):
    out = workplace / "runs" / "records" / "stopped"
    words = ("make", "time-to-loss", "--model", "nano", "--tokens", 1536, "--data", shards_folder, "--out", out)

    def stops(jobs, slots):
        raise launcher.Interrupted

    monkeypatch.setattr(launcher, "run_here", stops)
    code, said, _ = run_main(record.main, *words, "--runs-dir", workplace / "runs")
    assert (code, out.exists()) == (0, False)
    assert "stopped; run the same command to continue" in said
    monkeypatch.setattr(launcher, "run_here", lambda jobs, slots: None)  # as where a run fails
    code, _, err = run_main(record.main, *words, "--runs-dir", workplace / "runs")
    assert (code, out.exists()) == (2, False)
    assert "no record was written" in err


def test_runs_begun_by_another_commit_are_not_gone_on_with(tmp_path):
    (tmp_path / "machine.json").write_text(json.dumps({"git_commit": "a" * 40, "command": "make it"}))
    with pytest.raises(BadInput, match="begun by commit aaaa"):
        record.begun(tmp_path, "b" * 40, "make it")
    with pytest.raises(BadInput, match="another command"):
        record.begun(tmp_path, "a" * 40, "make another")
    assert record.begun(tmp_path, "a" * 40, "make it")["git_commit"] == "a" * 40


def rival(name, losses, seconds, unsteady=1.0):
    entry = {"seeds": [0, 1, 2], "train_seconds": {"mean": seconds}, "slowest_over_fastest": unsteady}
    entry["seconds_to_target"] = {"mean": seconds / 2}
    entry["best_val_loss"] = {"by_seed": losses, "mean": sum(losses) / 3}
    return name, {"figures": {"optimizers": {"muon": entry}}}, "muon"


def test_the_lower_loss_is_ahead_and_of_a_tie_the_quicker():
    slow, quick = rival("slow", [4.0, 4.2, 4.1], 90.0), rival("quick", [4.1, 4.1, 4.2], 30.0)
    clear = rival("clear", [5.0, 5.2, 5.1], 1.0)  # worse by 1 for every seed
    assert [name for name, *_ in record_pages.ranked([clear, slow, quick])] == ["quick", "slow", "clear"]
    better = rival("better", [3.99, 4.192, 4.091], 900.0)  # by about 0.009 for every seed: small, but no tie
    assert [name for name, *_ in record_pages.ranked([slow, better])] == ["better", "slow"]
    doubtful = rival("doubtful", [4.1, 4.1, 4.2], 10.0, unsteady=1.3)  # on a busy machine: its time does not count
    assert [name for name, *_ in record_pages.ranked([doubtful, slow, quick])] == ["quick", "slow", "doubtful"]
    assert sorted([doubtful, slow, quick], key=record_pages.soonest) == [quick, slow, doubtful]


def test_a_figure_that_drifts_in_any_readme_is_found_and_mended(made, workplace, run_main, monkeypatch):
    monkeypatch.setattr(record, "ROOT", workplace)
    assert run_main(record.main, "figures")[0] == 0
    assert run_main(record.main, "figures", "--check")[0] == 0
    readme = workplace / "README.md"
    entry = json.loads((made / "record.json").read_text())["figures"]["muon_minus_adamw"]
    shown = f"{abs(entry['difference']):.3f} nats"
    assert readme.read_text().count(shown) == 1
    for path in (readme, workplace / "runs" / "records" / "README.md", made / "README.md"):
        before = path.read_text()
        assert "| nano |" in before or shown in before
        path.write_text(before.replace(shown, "9.999 nats").replace("| nano |", "| nono |"))
        code, out, _ = run_main(record.main, "figures", "--check")
        assert code == 1
        assert out == f"{path.relative_to(workplace)}: is not up to date; run make readme-figures\n"
        assert run_main(record.main, "figures")[0] == 0
        assert path.read_text() == before


def test_the_readme_shows_every_goal_of_a_machine_met_or_not_and_nothing_else(tmp_path):
    empty = dict.fromkeys(("peer", "peer_name", "ratio", "floor", "share"))
    rows = [
        empty | {"figure": "first batch", "ours": 0.08, "unit": "s", "goal": "< 1 s", "met": True},
        empty | {"figure": "loader", "ours": 5.0, "unit": "tokens/s", "goal": "≥ 9 tokens/s", "met": False},
        empty | {"figure": "Muon's step", "ours": 17.0, "unit": "ms", "goal": "≥ 1x (GPU only)", "met": None},
    ]
    described = {"device": "cpu", "cpu": "AMD EPYC", "cores": 2, "date": "2026-11-22", "git_commit": "a" * 40}
    (tmp_path / "ours").mkdir()
    bench = {"machine": described, "command": "python -m bench.all", "rows": rows}
    (tmp_path / "ours" / "bench.json").write_text(json.dumps(bench))
    shown = record.pages.performance(tmp_path)
    assert "| first batch | 0.0800 s | - | < 1 s | yes |" in shown
    assert "| loader | 5.00 tokens/s | - | ≥ 9 tokens/s | **no** |" in shown
    assert "step" not in shown
    assert "All 3 figures: [runs/records/ours](runs/records/ours/README.md)." in shown


def test_the_first_screen_repeats_what_the_fair_fight_found(tmp_path):
    assert record_pages.fight(tmp_path) == []
    (tmp_path / "nano-fight").mkdir()
    found = {
        "fair-trials": ["much"],
        "fair-fight": ["A wins.", "Equal tokens: a wins.", "Equal time: b wins."] + 6 * ["More."],
    }
    (tmp_path / "nano-fight" / "findings.json").write_text(json.dumps(found))
    (said,) = record_pages.fight(tmp_path)
    assert said.startswith("A wins. From [the fair fight](runs/records/nano-fight/report.md)")
    assert "\n\n- Equal tokens: a wins.\n- Equal time: b wins.\n- More." in said
    assert said.count("More.") == 4
    assert "much" not in said


def test_no_figure_of_this_repository_has_drifted():
    for path, text in record_pages.generated(ROOT).items():
        assert path.read_text() == text, f"{path}: run make readme-figures"


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_the_committed_records_have_no_fault(folder, monkeypatch):
    monkeypatch.setattr(record, "standard", STANDARD)
    assert record.check(folder) == []


@pytest.mark.parametrize(
    ("difference", "low", "high", "words"),
    [
        (-0.3, -0.4, -0.2, "0.300 nats below AdamW's (95 % interval 0.200 to 0.400, p = 0.01, paired t-test)"),
        (-0.01, -0.05, 0.03, "0.010 nats below AdamW's (95 % interval -0.030 to 0.050, p = 0.5, paired t-test: a tie)"),
        (0.01, -0.03, 0.05, "0.010 nats above AdamW's (95 % interval -0.030 to 0.050, p = 0.5, paired t-test: a tie)"),
    ],
)
def test_an_interval_has_the_sign_of_its_sentence(difference, low, high, words):
    found = {"difference": difference, "low": low, "high": high, "p_value": 0.01 if low * high > 0 else 0.5}
    figures = {name: rival("", [4.0, 4.2, 4.1], 1.0)[1]["figures"]["optimizers"]["muon"] for name in ("muon", "adamw")}
    record = {"figures": {"muon_minus_adamw": found, "optimizers": figures}}
    assert record_pages.difference_sentence(record) == f"Muon's best validation loss is {words}"
