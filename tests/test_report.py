import html.parser
import json
import os
import re
import shlex
import shutil
import time

import numpy as np
import pytest
import scipy.stats
import tyro

import report
from analysis import pages, plots, verdict
from analysis.questions import answers
from analysis.runs import load_run
from bench.synthetic import spectral_line, write_run
from engine.files import ROOT

RECORDS = sorted(path.parent for path in (ROOT / "runs" / "records").glob("*/record.json"))
VOID = {"meta", "img", "br", "hr", "link", "input"}


class WellFormed(html.parser.HTMLParser):
    """Fails where a tag is closed that is not open, and keeps what a reader sees."""

    def __init__(self):
        super().__init__()
        self.open, self.images, self.links, self.text, self.tags = [], [], [], [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attributes))
        self.links += [value for key, value in attributes if key in ("href", "src")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def read_page(path):
    reader = WellFormed()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture
def pair(tmp_path):
    muon = write_run(tmp_path / "run-muon", final=3.0, spectra=False)
    return [muon, write_run(tmp_path / "run-adamw", final=3.5, optimizer="adamw", spectra=False)]


def test_the_report_of_six_runs_is_one_file_that_says_who_won_and_why_one_may_believe_it(run_main, tmp_path):
    losses = {"muon": [3.0, 3.02, 3.05], "adamw": [3.5, 3.42, 3.6]}
    runs = [
        write_run(
            tmp_path / f"{optimizer}-{seed}", optimizer=optimizer, seed=seed, final=loss, gap=True, projections="qv"
        )
        for optimizer in losses
        for seed, loss in enumerate(losses[optimizer])
    ]
    code, out, _ = run_main(report.main, *runs, "--out", tmp_path / "r")
    assert code == 0
    expected = scipy.stats.ttest_rel(losses["muon"], losses["adamw"])
    interval = expected.confidence_interval()
    assert f"p = {expected.pvalue:.2g} (paired t-test)" in out
    assert f"{interval.low:+.4f} to {interval.high:+.4f}" in out
    page = read_page(tmp_path / "r" / "report.html")
    words = "".join(page.text)
    first_screen = words[: words.index("Curves")]
    difference = np.mean(losses["adamw"]) - np.mean(losses["muon"])
    for fact in (f"Muon ends {difference:.4f} nats below AdamW", "Significant", f"{expected.pvalue:.2g}", "tokens/s"):
        assert fact in first_screen
    assert all(image["alt"] and image["src"].startswith("data:image/") for image in page.images)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    markdown = (tmp_path / "r" / "report.md").read_text()
    pictures = re.findall(r"\]\((plots/[^)]+)\)", markdown)
    assert len(pictures) == len(page.images) >= 18
    for picture in pictures:
        assert (tmp_path / "r" / picture).read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / "r" / picture).with_suffix(".svg").read_text()
    assert (tmp_path / "r" / "report.html").stat().st_size < 8e6
    for sentence in ("Which layer stands out?", f"Muon ends {difference:.4f} nats", "git checkout c0ffee"):
        assert sentence in words
        assert sentence in markdown


def test_two_layers_are_compared_on_request(run_main, no_drawing, tmp_path):
    run = write_run(tmp_path / "run", layers=4)
    code, _, _ = run_main(report.main, run, "--out", tmp_path / "r", "--layers", 1, 3)
    assert code == 0
    page = (tmp_path / "r" / "report.md").read_text()
    assert "layers 1 and 3 are" in page
    for layer in (1, 3):
        for plot in ("singular_value_fan", "singular_value_spectrum", "layer_mri"):
            assert f"](plots/{plot}_{layer}.png)" in page
    assert "plots/layer_mri.png" not in page
    for pair in ((1, 4), (2, 2)):
        code, _, error = run_main(report.main, run, "--out", tmp_path / "r", "--layers", *pair)
        assert code == 2
        assert error.strip() == f"error: --layers {pair[0]} {pair[1]}: two layers from 0 to 3"


def test_a_report_of_sixty_runs_stays_readable(run_main, no_drawing, tmp_path):
    (tmp_path / "runs").mkdir()
    for i in range(60):
        lr, seed, optimizer = 0.01 * (1 + i % 15), i // 30, ("muon", "adamw")[i // 15 % 2]
        final = 3 + 0.4 * (optimizer == "adamw") + abs(lr - 0.05) + 0.01 * seed
        write_run(tmp_path / "runs" / f"{i:02}", optimizer=optimizer, lr=lr, seed=seed, final=final, projections="qv")
    began = time.process_time()
    code, out, _ = run_main(report.main, tmp_path / "runs", "--out", tmp_path / "r")
    assert code == 0
    assert time.process_time() - began < 30
    assert "Muon ends 0.4000 nats below AdamW" in out
    assert "best of 15 of Muon and 15 of AdamW" in out
    page = read_page(tmp_path / "r" / "report.html")
    assert "learning_rate_sensitivity" in (tmp_path / "r" / "report.md").read_text()
    assert len(page.images) < 30


@pytest.mark.parametrize(
    "run",
    [
        {"done": 0, "status": None},
        {"done": 4, "status": None},
        {"done": 3, "status": "failed"},
        {"done": 5, "status": "stopped"},
        {"spectra": False},
        {"final": float("nan")},
    ],
    ids=["no steps", "in progress", "failed", "stopped", "no spectra", "diverged"],
)
@pytest.mark.filterwarnings("error")
def test_a_report_of_one_run_in_any_state(run_main, no_drawing, tmp_path, run):
    folder = write_run(tmp_path / "only", **run)
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("NaN", "null"))
    code, out, err = run_main(report.main, folder, "--out", tmp_path / "r")
    assert (code, err) == (0, "")
    words = "".join(read_page(tmp_path / "r" / "report.html").text)
    assert run.get("status", "finished") in (None, "finished") or f"only is {run['status']}" in words
    assert ("Spectra" in words) == run.get("spectra", True)
    if run.get("done") == 0:
        assert "only the initial spectra" in words
    assert "nan" not in out


def test_runs_without_validation_are_shown_with_those_that_have_it(run_main, no_drawing, pair, tmp_path):
    (pair[1] / "metrics.jsonl").unlink()
    (pair[1] / "summary.json").unlink()
    code, out, _ = run_main(report.main, *pair, "--out", tmp_path / "r")
    assert code == 0
    assert "run-adamw is running at step 0 of 10" in out


def test_a_running_pair_is_compared_at_its_last_common_step(run_main, no_drawing, tmp_path):
    a = write_run(tmp_path / "a", done=6, status=None, final=3.0, spectra=False)
    b = write_run(tmp_path / "b", done=4, status=None, final=4.0, optimizer="adamw", spectra=False)
    _, out, _ = run_main(report.main, a, b, "--out", tmp_path / "r")
    assert "at step 4 of 10 Muon is 0.4000 nats below AdamW (4.2000 against 4.6000)" in out


def test_watch_rewrites_the_page_until_the_last_run_is_over(run_main, no_drawing, monkeypatch, pair, tmp_path):
    summary = (pair[0] / "summary.json").read_text()
    (pair[0] / "summary.json").unlink()
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        page = (tmp_path / "r" / "report.html").read_text()
        assert 'http-equiv="refresh" content="7"' in page
        if len(slept) == 2:
            (pair[0] / "summary.json").write_text(summary)

    monkeypatch.setattr(report.time, "sleep", sleep)
    code, out, _ = run_main(report.main, *pair, "--out", tmp_path / "r", "--watch", "7")
    assert code == 0
    assert slept == [7, 7]
    assert "http-equiv" not in (tmp_path / "r" / "report.html").read_text()
    assert "Muon ends 0.5000 nats below AdamW" in out


def test_watch_needs_no_number_and_gives_up_on_a_silent_run(run_main, no_drawing, monkeypatch, pair, tmp_path):
    assert report.read_arguments(["--watch", "runs/a"]).watch == report.WATCH_SECONDS
    assert report.read_arguments(["runs/a", "--watch"]).watch == report.WATCH_SECONDS
    (pair[0] / "summary.json").unlink()
    for file in pair[0].iterdir():
        os.utime(file, (0, time.time() - 2 * report.SILENT_SECONDS))
    monkeypatch.setattr(report.time, "sleep", lambda seconds: pytest.fail("waited for a dead run"))
    assert run_main(report.main, *pair, "--out", tmp_path / "r", "--watch")[0] == 0
    assert run_main(report.main, *pair, "--out", tmp_path / "r", "--watch", "-3")[0] == 2


def test_strings_from_files_are_escaped(run_main, no_drawing, pair, tmp_path):
    evil = write_run(tmp_path / "evil", model="<script>alert('$x|y')</script>", seed=7)
    code, _, _ = run_main(report.main, evil, pair[0], "--out", tmp_path / "r")
    assert code == 0
    assert "<script>" not in (tmp_path / "r" / "report.html").read_text()
    markdown = (tmp_path / "r" / "report.md").read_text()
    assert "<script>" not in markdown[: markdown.index("```")]  # the commands are code, and not touched


def test_every_string_of_a_page_is_text_and_never_markup(tmp_path):
    made = []

    def evil():
        made.append(f"<script>{len(made)}</script>\" onload='x' &lt;| `")
        return made[-1]

    for kind in ("png", "svg"):
        (tmp_path / f"figure.{kind}").write_bytes(bytes(30))
    table = pages.Table([evil(), evil()], [[evil(), evil() + "long " * 20]])
    made[-1] += "long " * 20
    items = [
        pages.Table([evil()], [[evil()]], whole=True),
        pages.Picture("figure", evil(), evil()),
        pages.Section(evil(), [evil(), evil()]),
        pages.Code([evil(), "```", evil()]),
    ]
    chapters = [pages.Chapter(evil(), items), pages.Chapter(evil(), [], folded=True)]
    tiles = [(evil(), evil())]
    page = pages.Page(evil(), evil(), [evil()], tiles, table, [evil()], [evil()], chapters, [(evil(), "other")])
    (tmp_path / "page.html").write_text(pages.html_page(page, tmp_path))
    read = read_page(tmp_path / "page.html")
    assert "script" not in read.tags
    said = "\n".join([*read.text, *(image["alt"] for image in read.images)])
    assert [text for text in made if text not in said] == []
    markdown = pages.markdown_page(page)
    code = markdown[markdown.index("````\n") : markdown.rindex("````")]
    assert "<script>" in code
    assert "<script>" not in markdown.replace(code, "")


def test_the_reproducing_command_sets_every_flag_again(pair):
    from settings import Settings

    run = load_run(pair[0])
    words = shlex.split(report.command(run))
    assert words[:2] == ["python", "train.py"]
    parsed = tyro.cli(Settings, args=words[2:])
    for key, value in run.settings().items():
        assert getattr(parsed, key) == value


@pytest.mark.parametrize(
    ("missing", "words"), [("all", "no such run"), ("config.json", "config.json"), ("metrics.jsonl", "no validation")]
)
def test_a_folder_that_is_not_a_run_is_named(run_main, pair, tmp_path, missing, words):
    folder = tmp_path / "run"
    if missing == "all":
        folder = tmp_path / "nowhere"
    else:
        shutil.copytree(pair[0], folder)
        (folder / missing).unlink()
    code, _, err = run_main(report.main, folder, "--out", tmp_path / "r")
    assert code == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "r").exists()


def test_a_broken_line_in_the_middle_is_named_and_a_torn_last_one_left_out(run_main, pair, tmp_path):
    metrics = pair[0] / "metrics.jsonl"
    whole = load_run(pair[0])
    metrics.write_text(metrics.read_text() + '{"kind": "val", "st')
    torn = load_run(pair[0])
    np.testing.assert_array_equal(torn.val["val_loss"], whole.val["val_loss"])
    text = metrics.read_text().splitlines()
    text[3] = "{"
    metrics.write_text("\n".join(text))
    code, _, err = run_main(report.main, pair[0], "--out", tmp_path / "r")
    assert code == 2
    assert "metrics.jsonl: line 4" in err


def test_an_event_that_was_cut_short_is_left_out(tmp_path):
    run = write_run(tmp_path / "run")
    spectra = run / "manifold_stats.jsonl"
    lines = spectra.read_text().splitlines()
    spectra.write_text("\n".join(lines[:-1]) + "\n")
    assert load_run(run).grid("q", "spectral_norm")[0].tolist() == [0, 5]


def test_a_report_is_not_mixed_with_something_else(run_main, no_drawing, pair, tmp_path):
    code, _, err = run_main(report.main, pair[0], "--out", pair[1])
    assert code == 2
    assert "not a report" in err
    for _ in range(2):  # but an earlier report is replaced
        assert run_main(report.main, pair[0], "--out", tmp_path / "r")[0] == 0


def sentences(runs):
    verdicts = verdict.judge(runs)
    return " ".join([s for v in verdicts for s in v.sentences()] + verdict.warnings(runs))


def test_unlike_unfinished_and_repeated_runs_are_not_pooled(tmp_path):
    first = load_run(write_run(tmp_path / "first"))
    again = load_run(write_run(tmp_path / "again"))
    assert "single seed" in sentences([first, again])
    assert "2 seeds, 95 %" in sentences([first, load_run(write_run(tmp_path / "other", seed=1))])
    longer = load_run(write_run(tmp_path / "longer", steps=20, optimizer="adamw"))
    said = sentences([first, longer])
    assert "differ in token budget" in said
    assert "below" not in said
    stopped = load_run(write_run(tmp_path / "stopped", optimizer="adamw", status="stopped", seed=2))
    said = sentences([first, again, stopped])
    assert "stopped is stopped at step 10 of 10" in said
    assert "ends" not in said


def test_one_seed_allows_no_statement_about_chance(pair):
    said = sentences([load_run(path) for path in pair])
    assert "Muon ends 0.5000 nats below AdamW" in said
    assert "One seed each, so no statement about chance" in said
    assert "ignificant" not in said
    assert "after about 8 of 10 steps, 15 s" in said  # 5 - 0.2 t = 3.5 at t = 7.5


def test_the_cost_is_given_as_times_and_ratios(tmp_path):
    muon = load_run(write_run(tmp_path / "muon", step_ms=3000.0))
    adamw = load_run(write_run(tmp_path / "adamw", optimizer="adamw", final=3.5))
    said = sentences([adamw, muon])
    assert "a step of Muon takes 1.50 times as long as a step of AdamW (3,000.0 against 2,000.0 ms)" in said
    assert "30.0 against 20.0 s of training" in said
    assert "1.00 GiB" in said


def spectral_run(folder, events, **settings):
    """A run whose layer 1 has the singular values `events[step]` in Q; everything else stays as it was."""
    path = write_run(folder, spectra=False, **settings)
    with (path / "manifold_stats.jsonl").open("w") as file:
        for step, values in events.items():
            for layer in range(3):
                for proj in ("q", "v"):
                    s = values if (layer, proj) == (1, "q") else [1.0] * 4
                    file.write(json.dumps(spectral_line(step, layer, proj, s, None if step == 0 else 0.9)) + "\n")
    return load_run(path)


def answer(run, word):
    return next(" ".join(found) for question, found in answers([run]) if word in question)


def test_the_fall_of_effective_rank_is_found_where_and_when_it_happens(tmp_path):
    # 4 equal values have rank 4; at 5, (1, 1, 1, 0.3): 3.698 > 0.9 x 4; at 10, (1, 1, 0.3, 0.3): 3.282 < 3.6
    events = {0: [1, 1, 1, 1], 5: [1, 1, 1, 0.3], 10: [1, 1, 0.3, 0.3]}
    run = spectral_run(tmp_path / "falls", events)
    fall = answer(run, "effective rank fall")
    p = np.array([1, 1, 0.3, 0.3]) / 2.6
    rank = np.exp(-(p * np.log(p)).sum())
    assert f"in 1 of 6 matrices, first in Q of layer 1 at step 10 (4.0 to {rank:.1f})" in fall
    assert f"{100 * rank / 4:.1f} %" in fall
    assert "Q of layer 1 falls by 10 % at step 10" in answer(run, "collapse")
    assert "layer 1 differs most" in answer(run, "stands out")
    steady = spectral_run(tmp_path / "steady", {0: [1, 1, 1, 1], 5: [2, 2, 2, 2]})
    assert "in none of 6 matrices" in answer(steady, "effective rank fall")
    assert "none" in answer(steady, "collapse")


def test_a_fall_that_is_made_up_is_no_collapse_but_half_the_rank_is(tmp_path):
    back = spectral_run(tmp_path / "back", {0: [1, 1, 1, 1], 5: [1, 1, 0, 0], 10: [1, 1, 1, 1]})
    assert "first in Q of layer 1 at step 5" in answer(back, "effective rank fall")
    assert "none" in answer(back, "collapse")
    gone = spectral_run(tmp_path / "gone", {0: [1, 1, 1, 1], 5: [1, 0.05, 0, 0]})
    assert "has lost more than half" in answer(gone, "collapse")


def test_high_spectral_norms_are_flagged_with_the_step_that_crossed(tmp_path):
    run = spectral_run(tmp_path / "high", {0: [1, 1, 1, 1], 5: [4.5, 1, 1, 1], 10: [5.5, 1, 1, 1]})
    said = answer(run, "spectral norms")
    assert "1 of 6 matrices end above 4 and 1 above 5; the largest is 5.50, Q of layer 1" in said
    assert "Q of layer 1 at step 5" in said
    calm = spectral_run(tmp_path / "calm", {0: [1, 1, 1, 1], 5: [3.5, 1, 1, 1]})
    assert "no, the largest is 3.50, Q of layer 1" in answer(calm, "spectral norms")


def test_entropy_q_against_v_and_alignment_are_answered_with_numbers(tmp_path):
    run = spectral_run(tmp_path / "run", {0: [1, 1, 1, 1], 5: [1, 1, 1, 0.3]})
    energy = np.array([1, 1, 1, 0.09]) / 3.09
    entropy = -(energy * np.log(energy)).sum() / np.log(4)
    assert f"deepest in Q of layer 1, by {1 - entropy:.3f} to {entropy:.3f} at step 5" in answer(run, "entropy drop")
    assert "V has effective rank 4.0 of 4 (100.0 % of its start)" in answer(run, "Q and V")
    assert "100 % of 6 measured updates" in answer(run, "strong directions")
    assert "1.50 times chance" in answer(run, "strong directions")


def test_compare_prints_the_difference_of_two_groups(run_main, tmp_path):
    losses = {"muon": [3.0, 3.02, 3.05], "adamw": [3.5, 3.42, 3.6]}
    for optimizer, values in losses.items():
        (tmp_path / optimizer).mkdir()
        for seed, loss in enumerate(values):
            write_run(tmp_path / optimizer / f"{optimizer}-{seed}", optimizer=optimizer, seed=seed, final=loss)
    listed = ",".join(str(tmp_path / "adamw" / f"adamw-{seed}") for seed in range(3))
    expected = scipy.stats.ttest_rel(losses["muon"], losses["adamw"])
    for other in (listed, tmp_path / "adamw", tmp_path / "adamw" / "adamw-*"):
        code, out, _ = run_main(report.main, "compare", tmp_path / "muon", other)
        assert code == 0
        assert f"p = {expected.pvalue:.2g} (paired t-test)" in out
        assert "Muon ends 0.4833 nats below AdamW" in out
        assert "Settings that differ: optimizer muon against adamw" in out


def test_groups_with_different_seeds_get_welchs_test(run_main, tmp_path):
    losses = {"muon": {0: 3.0, 1: 3.02, 2: 3.05}, "adamw": {0: 3.5, 1: 3.42, 7: 3.6}}
    for optimizer, by_seed in losses.items():
        for seed, loss in by_seed.items():
            write_run(tmp_path / optimizer / str(seed), optimizer=optimizer, seed=seed, final=loss, spectra=False)
    expected = scipy.stats.ttest_ind(*(list(side.values()) for side in losses.values()), equal_var=False)
    interval = expected.confidence_interval()
    _, out, _ = run_main(report.main, "compare", tmp_path / "muon", tmp_path / "adamw")
    assert "over 3 and 3 seeds" in out
    assert f"{interval.low:+.4f} to {interval.high:+.4f}, p = {expected.pvalue:.2g} (Welch's t-test)" in out


@pytest.mark.parametrize("folder", RECORDS, ids=lambda folder: folder.name)
def test_a_record_its_report_and_compare_give_the_same_interval(run_main, folder):
    record = json.loads((folder / "record.json").read_text())["figures"]["muon_minus_adamw"]
    runs = sorted(path.parent for path in folder.glob("*/config.json"))
    (found,) = verdict.judge([load_run(path) for path in runs])
    sides = [",".join(str(path) for path in runs if name in path.name) for name in ("muon", "adamw")]
    _, compared, _ = run_main(report.main, "compare", *sides)
    interval = (
        f"95 % interval {record['low']:+.4f} to {record['high']:+.4f}, p = {record['p_value']:.2g} (paired t-test)"
    )
    assert interval in found.significance
    assert interval in compared
    figure = plots.optimizer_comparison(*reversed(found.pair))
    drawn = figure.axes[0].collections[0].get_paths()[0].vertices
    at_end = drawn[drawn[:, 0] == drawn[:, 0].max(), 1]
    assert (at_end.min(), at_end.max()) == pytest.approx((-record["high"], -record["low"]))
    plots.plt.close(figure)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data_fingerprint": "beef"}, "data fingerprints differ (a has f00d, b has beef)"),
        ({"steps": 20}, "token budgets differ (a has 640, b has 1,280)"),
        ({"eval_tokens": 99}, "--eval-tokens differ"),
        ({"done": 4, "status": None}, "b is running after 4 of 10 steps"),
    ],
)
def test_compare_refuses_what_does_not_compare_without_anyway(run_main, tmp_path, change, words):
    a = write_run(tmp_path / "a", spectra=False)
    b = write_run(tmp_path / "b", spectra=False, optimizer="adamw", final=3.5, **change)
    code, out, err = run_main(report.main, "compare", a, b)
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.strip().splitlines()) == 1
    code, out, _ = run_main(report.main, "compare", a, b, "--anyway")
    assert code == 0
    assert words in out


def test_compare_names_a_side_that_is_no_run_or_on_both_sides(run_main, pair, tmp_path):
    for words in (tmp_path / "nowhere", f"{tmp_path}/no-*", ","):
        code, _, err = run_main(report.main, "compare", pair[0], words)
        assert code == 2
        assert len(err.strip().splitlines()) == 1
    code, _, err = run_main(report.main, "compare", pair[0], f"{pair[1]},{pair[0]}")
    assert code == 2
    assert "run-muon: is on both sides" in err
