"""Figures, tables and advice of conditions: made-up runs whose numbers are known."""

import json
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest

from analysis import plots, plots_conditions, plots_seeds
from analysis.plots_conditions import Effect, Series
from analysis.questions import layers_apart
from analysis.runs import Group, load_run
from bench.synthetic import write_run
from suites import advice, tables
from suites.catalog import SUITES
from suites.figures import figures, series, watched
from suites.papers import ARMS
from suites.report import size_words, suite_chapters, suite_page, write_suite_report
from suites.scales import SCALES
from tests.test_suites import results_of, winners


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    matplotlib.pyplot.close("all")


def runs_of(folder, finals, **settings):
    """A run for each final loss, seeds 0, 1, ..."""
    settings = {"spectra": False, **settings}
    made = [write_run(folder / f"{seed}", seed=seed, final=final, **settings) for seed, final in enumerate(finals)]
    return tuple(load_run(path) for path in made)


@pytest.fixture
def momentum(tmp_path):
    """0.9 is the reference; 0.95 is 0.1 and 0.3 higher, seed by seed, 0.85 is 0.2 lower."""
    reference = Series("momentum 0.9", runs_of(tmp_path / "a", (3.0, 3.4)), value=0.9)
    higher = Series("momentum 0.95", runs_of(tmp_path / "b", (3.1, 3.7)), "momentum 0.9", value=0.95)
    lower = Series("momentum 0.85", runs_of(tmp_path / "c", (2.8, 3.2)), "momentum 0.9", value=0.85)
    return [lower, reference, higher]


def test_curves_show_the_mean_every_seed_and_the_difference_seed_by_seed(momentum):
    figure = plots_conditions.training_curves(momentum)
    losses, gaps = figure.axes
    drawn = [line.get_ydata() for line in losses.lines]
    assert len(drawn) == 9  # a mean and two seeds for each of three
    steps = np.arange(11) / 10
    mean, first, second = drawn[3:6]
    np.testing.assert_allclose(first, 5 + (3.0 - 5) * steps)
    np.testing.assert_allclose(second, 5 + (3.4 - 5) * steps)
    np.testing.assert_allclose(mean, (first + second) / 2)
    ends = [line.get_ydata()[-1] for line in gaps.lines if len(line.get_ydata()) == 11]
    np.testing.assert_allclose(ends, [-0.2, -0.2, -0.2, 0.2, 0.1, 0.3])
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["momentum 0.85", "momentum 0.9 (reference)", "momentum 0.95"]


def test_sizes_have_a_panel_each_and_the_optimizers_their_colours(tmp_path):
    made = []
    for size, lead in (("64 wide", 0.1), ("96 wide", 0.2)):
        for optimizer, final in (("adamw", 3.5), ("muon", 3.5 - lead)):
            runs = runs_of(tmp_path / f"{optimizer}{size}", (final,), optimizer=optimizer)
            versus = f"adamw {size}" if optimizer == "muon" else None
            made.append(Series(f"{optimizer} {size}", runs, versus, size))
    figure = plots_conditions.training_curves(made)
    assert [ax.get_title() for ax in figure.axes[:2]] == ["64 wide", "96 wide"]
    assert [[line.get_color() for line in ax.lines] for ax in figure.axes[:2]] == [["#D55E00", "#0072B2"]] * 2
    assert [ax.lines[0].get_ydata()[-1] for ax in figure.axes[2:]] == pytest.approx([-0.1, -0.2])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["AdamW (reference)", "Muon"]


def test_a_sensitivity_curve_has_each_value_its_interval_and_the_band_of_one_per_cent(momentum):
    figure = plots_conditions.sensitivity(momentum, "momentum")
    left, right = figure.axes
    mean = next(line for line in left.lines if line.get_linewidth() == 1.8)
    np.testing.assert_allclose(mean.get_xydata(), [(0.85, 3.0), (0.9, 3.2), (0.95, 3.4)])
    thin = [line.get_ydata() for line in right.lines if line.get_linewidth() == 0.6]
    np.testing.assert_allclose(thin, [[-0.2, 0, 0.1], [-0.2, 0, 0.3]])
    (band,) = right.patches
    assert band.get_y() + band.get_height() == pytest.approx(0.032)
    assert [text.get_text() for text in right.get_xticklabels()] == ["0.85", "0.9", "0.95"]


def test_no_clipping_is_drawn_beyond_the_largest_value(tmp_path):
    values = {"0.5": 0.5, "1": 1.0, "off": np.inf}
    made = [
        Series(name, runs_of(tmp_path / name, (3.0, 3.1)), None if name == "1" else "1", value=value)
        for name, value in values.items()
    ]
    left = plots_conditions.sensitivity(made, "norm").axes[0]
    assert [text.get_text() for text in left.get_xticklabels()] == list(values)
    assert list(left.get_xticks()) == [0.5, 1.0, 1.5]


def test_experts_of_every_seed_with_their_balance(tmp_path):
    runs = runs_of(tmp_path, (3.0, 3.1, 3.2), experts=4, layers=2)
    figure = plots_conditions.experts_by_seed(runs)
    panels = figure.axes[:6]
    np.testing.assert_allclose(np.asarray(panels[0].collections[0].get_array())[:, 0], [0.4, 0.2, 0.2, 0.2])
    assert len({ax.collections[0].get_clim() for ax in panels}) == 1
    p = np.array([0.4, 0.2, 0.2, 0.2])
    evenness = -(p * np.log(p)).sum() / np.log(4)
    words = f"evenness {evenness:.3f}, max / mean 1.60, dead 0"
    assert [ax.get_title() for ax in panels] == [f"layer 0\n{words}", f"layer 1\n{words}", *[words] * 4]
    assert panels[0].collections[0].norm.vcenter == 0.25
    wider = plots_conditions.experts_by_seed(runs, highest=0.9)
    assert wider.axes[0].collections[0].get_clim() == (0, 0.9)


def test_seeds_and_optimizers_share_a_scale_and_so_do_their_differences(tmp_path):
    groups = []
    for optimizer, decay in (("muon", 0.0), ("adamw", 0.05)):
        runs = runs_of(tmp_path / optimizer, (3.0, 3.1), optimizer=optimizer, decay=decay, spectra=True)
        groups.append(Group(runs))
    muon, adamw = groups
    figure = plots_seeds.seed_grid(muon, adamw, "effective_rank")
    rows = [figure.axes[6 * row : 6 * row + 6] for row in range(7)]
    values = [row[0].collections[0] for row in rows]
    assert len({mesh.get_clim() for mesh in values[:4]}) == 1
    assert len({mesh.get_clim() for mesh in values[4:]}) == 1
    low, high = values[6].get_clim()
    assert low == -high
    of = [np.mean([run.grid("q", "effective_rank")[1] for run in group.runs], axis=0) for group in groups]
    np.testing.assert_allclose(np.asarray(values[6].get_array()), of[0] - of[1])
    np.testing.assert_allclose(np.asarray(values[4].get_array()), 0, atol=1e-12)  # decay makes no seed differ
    assert np.asarray(values[6].get_array())[:, -1].min() > 0.1
    assert [row[0].get_ylabel() for row in rows][5:] == ["AdamW\n0 − 1", "Muon −\nAdamW"]


def test_effects_are_filled_where_the_interval_excludes_zero():
    found = [
        Effect("momentum", "0.85", "muon", -0.5, -1.0, 0.2, 3),
        Effect("momentum", "0.99", "muon", 2.0, 1.5, 2.5, 3),
        Effect("decay", "0", "adamw", 1.0, np.nan, np.nan, 1),
    ]
    (ax,) = plots_conditions.effects(found).axes
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert [float(dot.get_xdata()[0]) for dot in dots] == [-0.5, 2.0, 1.0]
    assert [dot.get_markerfacecolor() for dot in dots] == ["white", "#0072B2", "white"]
    assert dots[2].get_color() == "#D55E00"
    assert [text.get_text() for text in ax.get_yticklabels()] == ["0.85 (n = 3)", "0.99 (n = 3)", "0 (n = 1)"]


def test_two_layers_are_told_apart_by_how_much_since_when_and_how_surely(tmp_path):
    runs = runs_of(tmp_path, (3.0, 3.1, 3.2), spectra=True)
    for run, factor in zip(runs, (1.9, 2.0, 2.1), strict=True):
        for line in run.spectra:
            if line["layer"] == 2 and line["step"] == 10:
                line["spectral_norm"] *= factor
    words = layers_apart(Group(runs))
    assert words.startswith("layers 0 and 2, which differ most, are ")
    # a factor of 2 in one of three metrics: exp(ln 2 / 3) - 1, averaged over the seeds' grids (mean factor 2.0)
    assert f"are {100 * (2 ** (1 / 3) - 1):.1f} % apart" in words
    assert "(0.0 % at initialisation, and half of the rise was there by step 10)" in words
    logs = -np.log([1.9, 2.0, 2.1])
    half = 4.302653 * np.std(logs, ddof=1) / np.sqrt(3)  # t quantile with two degrees of freedom
    low, high = np.exp(np.mean(logs) - half), np.exp(np.mean(logs) + half)
    assert f"(ratio {np.exp(np.mean(logs)):.3g}, 95 % interval {low:.3g} to {high:.3g}, n = 3)" in words
    assert layers_apart(Group(runs), (0, 1)).startswith("layers 0 and 1 are 0.0 % apart")
    assert "no such pair" in layers_apart(Group(runs), (0, 9))


def test_the_tables_hold_train_best_and_final_loss_accuracy_time_and_relative_difference(tmp_path):
    finals = {"muon": (3.0, 3.2), "adamw": (4.0, 4.4)}
    results = results_of(tmp_path, "moe-long", finals, experts=4, step_ms=250.0, by_token=True)
    muon = dict(zip(*_cells(tables.conditions_table(results), 0), strict=True))
    assert muon["final val. loss"] == "3.1000"
    assert muon["best val. loss"] == "3.1000"
    assert muon["train loss"] == f"{5 + (3.1 - 5) * 0.9:.4f}"  # the batch before the last step
    assert (muon["accuracy"], muon["ms/step"], muon["s/run"]) == ("10.00 %", "250.0", "2.5")
    test = dict(zip(*_cells(tables.tests_table(results), 0), strict=True))
    assert test["nats"] == "-1.1000"
    assert test["bits/byte"] == f"{-1.1 / 4 / np.log(2):+.4f}"  # a token has 4 bytes
    assert test["relative"] == f"{-110 / 4.2:+.2f} %"
    balance = tables.experts_table(results)
    assert [row[1] for row in balance.rows] == ["0", "1", "0", "1"]
    assert balance.rows[0][3] == "1.60, 1.60, 1.60"


def test_times_of_a_busy_machine_are_not_compared(tmp_path):
    finals = {"muon": (3.0, 3.2), "adamw": (4.0, 4.4)}
    results = results_of(tmp_path, "moe-long", finals, step_ms=250.0)
    run = results.outcomes[0].finished()[0]

    def told(factor):
        run.train["step_ms"] = np.full(len(run.train["step_ms"]), 250.0 * factor)
        test = dict(zip(*_cells(tables.tests_table(results), 0), strict=True))
        page = suite_page(results, {results.name: results}, [], "nano", [])
        return test["time per step"], page.warnings

    assert told(1.19) == ("+9.5 %", [])
    ((time, (words,)), name) = told(1.5), results.outcomes[0].name
    assert time == "-"
    assert f"a step of {name} took 1.5 times as long with one seed" in words


def _cells(table, row):
    return table.header, table.rows[row]


def test_sizes_side_by_side_with_the_improvement(tmp_path):
    finals = {"adamw 64 wide": (4.0, 4.1), "muon 64 wide": (3.0, 3.1)}
    table = tables.sizes_table(results_of(tmp_path, "model-size", finals, params=5000, by_token=True))
    row = dict(zip(*_cells(table, 0), strict=True))
    assert (row["size"], row["parameters"], row["seeds"]) == ("64 wide", "5,000", "2 and 2")
    assert (row["AdamW loss"], row["Muon loss"]) == ("4.0500", "3.0500")
    assert row["Muon bits/byte"] == f"{3.05 / 4 / np.log(2):.4f}"
    assert row["relative loss"] == f"{100 * (3.05 / 4.05 - 1):+.2f} %"
    assert row["improvement"] == "+0.0 %"  # both have the same made-up accuracy


def test_every_suite_has_curves_and_the_numeric_settings_a_sensitivity_curve(tmp_path):
    numeric = {"moe-momentum", "moe-weight-decay", "moe-ns-steps", "moe-warmup", "moe-clip", "moe-min-lr"}
    for name in (*sorted(numeric), "moe-schedule", "moe-aux-ratio", "moe-nesterov", "moe-adam"):
        suite = SUITES[name]
        conditions = suite.plan(SCALES["nano"], winners)
        results = results_of(tmp_path, name, {c.name: (3.0, 3.1) for c in conditions}, spectra=False)
        kinds = {drawing.picture.stem.removeprefix(f"{name}_") for drawing in figures(results)}
        assert {"bars", "curves"} <= kinds, name
        assert ("sensitivity" in kinds) == (name in numeric | {"moe-aux-ratio"}), name
        assert len(series(results)) == len(conditions)


def test_the_page_of_two_optimizers_has_all_that_the_documents_draw(tmp_path):
    finals = {"muon": (3.0, 3.1, 2.9), "adamw": (3.5, 3.6, 3.4)}
    results = results_of(tmp_path, "speedrun-2m", finals, gap=True, by_token=True, momentum=True)
    drawings = figures(results)
    kinds = {drawing.picture.stem.removeprefix("speedrun-2m_") for drawing in drawings}
    spectral = {"scan", "rank_grid", "norm", "entropy", "alignment", "spectrum", "rank"}
    updates = {"momentum", "momentum_spectra", "residual"}
    seeds = {"seeds_entropy", "seeds_left_alignment", "seeds_effective_rank"}
    assert kinds == {"bars", "curves", "losses", "time_to_loss", "deciles"} | spectral | updates | seeds
    assert all(drawing.picture.how_to_read.endswith(".") for drawing in drawings)
    muon, adamw = (outcome.finished() for outcome in results.outcomes)
    drawn = {drawing.picture.stem.removeprefix("speedrun-2m_"): drawing.draw.args[0] for drawing in drawings}
    paths = {kind: [run.path for run in drawn[kind]] for kind in ("scan", "rank_grid", "deciles", "residual")}
    assert paths.pop("residual") == [run.path for run in muon]  # AdamW has none
    assert all(found == [run.path for run in (*muon, *adamw)] for found in paths.values())
    assert [run.path for run in drawn["momentum_spectra"]] == [muon[0].path, adamw[0].path]


def test_spectra_of_several_sizes_are_those_of_the_largest_that_both_optimizers_finished(tmp_path):
    finals = {f"{o} {size}": (3.0, 3.1) for size in ("64 wide", "96 wide") for o in ("muon", "adamw")}
    finals["muon 128 wide"] = (2.9, 3.0)
    results = results_of(
        tmp_path, "model-size", finals, by_token=True, layers=lambda name: 2 + ("96" in name) + 2 * ("128" in name)
    )
    assert [run.layers for run in watched(results)] == [3, 3, 3, 3]
    spectral = [
        d for d in figures(results) if d.picture.stem.split("_")[1] in ("norm", "alignment", "seeds", "deciles")
    ]
    assert len(spectral) == 6
    assert all(drawing.picture.title.endswith(": 96 wide") for drawing in spectral)
    chapters = {chapter.title for chapter in suite_chapters(results, {results.name: results}, [])}
    assert "Findings in the spectra: 96 wide" in chapters


def test_the_experts_of_every_condition_are_shown_where_the_balancing_varies(tmp_path):
    names = [c.name for c in SUITES["moe-balance"].plan(SCALES["nano"], winners)]
    results = results_of(tmp_path, "moe-balance", dict.fromkeys(names, (3.0, 3.1)), experts=4, spectra=False)
    shown = [d.picture for d in figures(results) if "_experts_" in d.picture.stem]
    assert [picture.title.partition(": ")[2] for picture in shown] == [
        "Muon",
        "Muon, no balancing",
        "AdamW",
        "AdamW, no balancing",
    ]
    assert len({picture.stem for picture in shown}) == 4
    (chapter,) = suite_chapters(results, {}, [])[:1]
    assert len(chapter.items[-1].rows) == 8  # two seeds of each
    other = results_of(tmp_path, "moe-momentum", {"momentum 0.9": (3.0, 3.1)}, experts=4, spectra=False)
    assert not [d for d in figures(other) if "_experts_" in d.picture.stem]


def test_pairs_at_several_budgets_have_panels_and_an_axis_of_the_budget(tmp_path):
    names = [c.name for c in SUITES["batch-size"].plan(SCALES["nano"], winners)]
    batch = {name: int(name.rpartition(" ")[2].replace(",", "")) for name in names}
    finals = {name: (3.0 + ("adamw" in name), 3.1) for name in names}
    results = results_of(tmp_path, "batch-size", finals, batch_tokens=batch.get, spectra=False)
    found = {drawing.picture.stem.removeprefix("batch-size_"): drawing for drawing in figures(results)}
    assert "losses" not in found
    loss = found["sizes"].draw().axes[0]
    muon, adamw = (line for line in loss.lines if np.allclose(line.get_xdata(), sorted(set(batch.values())), rtol=0.03))
    np.testing.assert_allclose(adamw.get_ydata() - muon.get_ydata(), 0.5)
    curves = found["curves"].draw()
    assert [ax.get_title() for ax in curves.axes[:2]] == [
        f"batches of {value:,}" for value in sorted(batch.values())[::2]
    ]
    assert [text.get_text() for text in curves.legends[0].get_texts()] == ["Muon", "AdamW (reference)"]


def test_arms_of_one_optimizer_have_panels_of_their_own(tmp_path):
    names = [c.name for c in SUITES["retest-lr"].plan(SCALES["nano"], winners)]
    rates = {name: float(name.rpartition(" ")[2]) for name in names}
    finals = {name: (3.0 + abs(rates[name] - 0.02), 3.1 + abs(rates[name] - 0.02)) for name in names}
    results = results_of(tmp_path, "retest-lr", finals, lr=rates.get, spectra=False)
    (drawn,) = figures(results)
    titles = [ax.get_title() for ax in drawn.draw().axes if ax.get_visible()]
    assert titles == [f"{arm}: {0.006 if arm.startswith('AdamW') else 0.02:g}" for arm in ARMS]


def test_conditions_of_one_optimizer_keep_their_names_and_one_reference(tmp_path):
    """Of a chain of comparisons: momentum without orthogonalisation against Muon, Muon against AdamW."""
    level = {"AdamW": 3.5, "Muon": 3.0, "Muon without momentum": 3.1, "momentum, not orthogonalised": 3.6}
    finals = {name: (loss, loss + 0.1) for name, loss in level.items()}
    rates = {name: 0.01 * place for place, name in enumerate(level, start=1)}
    results = results_of(tmp_path, "muon-momentum", finals, lr=rates.get, by_token=True, spectra=False)
    found = {drawing.picture.stem.removeprefix("muon-momentum_"): drawing for drawing in figures(results)}
    assert "sensitivity" not in found  # two of them have the same momentum
    curves = found["curves"].draw()
    names = [text.get_text() for text in curves.legends[0].get_texts()]
    assert names == ["AdamW (reference)", *list(level)[1:]]
    ends = [line.get_ydata()[-1] for line in curves.axes[1].lines if line.get_linewidth() > 1.5]
    np.testing.assert_allclose(ends, [loss - 3.5 for loss in list(level.values())[1:]], atol=1e-6)
    timed = found["time_to_loss"].draw()
    assert [text.get_text() for text in timed.legends[0].get_texts()][:3] == ["Muon", "Muon without momentum", "AdamW"]
    start = min(float(run.val["val_loss"][:2].min()) for run in results.runs())
    assert max(max(line.get_ydata()) for line in timed.axes[0].lines) <= start  # which no run has before it trains
    deciles = found["deciles"].draw()
    assert deciles.axes[1].get_title() == "ahead of AdamW by"
    assert [text.get_text() for text in deciles.legends[0].get_texts()] == list(level)


def test_the_front_page_says_how_large_its_models_and_runs_are():
    sizes = {"params": 1000, "tokens": 4096, "steps": 2, "vocab_size": 320, "eval_tokens": 512}
    runs = [SimpleNamespace(config=sizes | {"params": params, "steps": 8}) for params in (1000, 250, 2000)]
    (words,) = size_words(runs)
    assert "models of 250 to 2,000 parameters, 4,096 training tokens in 8 steps, a vocabulary of 320" in words
    assert size_words([*runs, SimpleNamespace(config={})]) == []


def test_all_heads_together_are_drawn_beyond_the_largest_group_of_heads(tmp_path):
    names = [c.name for c in SUITES["muon-heads"].plan(SCALES["nano"], winners)]
    results = results_of(tmp_path, "muon-heads", dict.fromkeys(names, (3.0, 3.1)), spectra=False)
    (drawn,) = [d for d in figures(results) if d.picture.stem == "muon-heads_sensitivity"]
    ax = drawn.draw().axes[0]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "2", "all"]
    assert ax.get_xlabel() == "heads in a matrix"


def test_the_loss_of_token_frequencies_is_a_line_where_the_curves_reach_it_and_in_the_caption(tmp_path):
    for level, lines in ((4.5, [4.5]), (9.0, [])):
        runs = dict.fromkeys(("momentum 0.9", "momentum 0.85"), (3.0, 3.1))
        results = results_of(
            tmp_path / f"{level}", "moe-momentum", runs, by_token=True, unigram_val_loss=level, spectra=False
        )
        (curves,) = [drawing for drawing in figures(results) if drawing.picture.stem.endswith("_curves")]
        ax = curves.draw().axes[0]
        assert [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == ":"] == lines
        assert ax.get_ylim()[1] < 4.7
        assert f"{level:.2f} nats" in curves.picture.how_to_read


@pytest.mark.parametrize(
    ("finals", "holds", "use"),
    [
        ({"momentum 0.9": (3.0, 3.01, 2.99), "momentum 0.85": (3.2, 3.22, 3.19)}, advice.HOLDS, "momentum 0.9"),
        ({"momentum 0.9": (3.2, 3.22, 3.19), "momentum 0.85": (3.0, 3.01, 2.99)}, advice.NOT, "momentum 0.85"),
        ({"momentum 0.9": (3.005, 3.014, 2.996), "momentum 0.85": (3.0, 3.01, 2.99)}, advice.HOLDS, "momentum 0.85"),
        ({"momentum 0.9": (3.1, 3.3, 2.9), "momentum 0.85": (3.0, 2.8, 3.2)}, advice.OPEN, "momentum 0.85"),
    ],
    ids=["the best", "clearly worse", "within 1 %", "unclear"],
)
def test_advice_holds_where_it_is_best_or_as_good(tmp_path, finals, holds, use):
    results = results_of(tmp_path, "moe-momentum", finals, spectra=False)
    (row,) = advice.advice({"moe-momentum": results})
    assert (row.holds, row.n, row.setting) == (holds, 3, "momentum of Muon")
    assert row.use.split(" (")[0] == use
    assert "nats" in row.evidence
    assert "interval" in row.evidence


def test_advice_on_a_rate_gives_its_range_and_what_the_documents_rate_costs(tmp_path):
    valley = {"adamw lr 0.0005": 5.6, "adamw lr 0.001": 5.5, "adamw lr 0.002": 5.0, "adamw lr 0.005": 5.3}
    finals = {name: (loss, loss + 0.01, loss - 0.01) for name, loss in valley.items()}
    results = results_of(tmp_path, "moe-lr-adam", finals, spectra=False)
    (row,) = advice.advice({"moe-lr-adam": results})
    assert row.setting == "learning rate of AdamW, mixture of experts"
    assert row.holds == advice.NOT  # S4's 0.001 ends a tenth higher than 0.002
    assert row.reason.startswith("it costs 10.0 %")
    assert row.n == 3
    low = 0.002 * 0.5 ** (0.05 / 0.5)  # 1 % of 5 is a tenth of the way down to 0.001, in logarithms
    assert row.use.startswith(f"{low:.2g} to ")


def test_advice_names_where_it_comes_from(tmp_path):
    finals = {"muon": (3.0, 3.01, 2.99), "adamw": (3.5, 3.52, 3.49)}
    made = [results_of(tmp_path, name, finals, spectra=False) for name in ("baseline", "moe-final")]
    rates = {
        name: (x, x + 0.01, x - 0.01)
        for name, x in (("muon lr 0.01", 3.2), ("muon lr 0.02", 3.0), ("muon lr 0.05", 3.3))
    }
    made.append(results_of(tmp_path, "lr-sensitivity", rates, spectra=False))
    blocks = {"Muon on the blocks": (3.0, 3.01, 2.99), "Muon on every matrix": (3.2, 3.22, 3.19)}
    made.append(results_of(tmp_path, "moe-muon-on", blocks, spectra=False))
    said = [(row.suite, row.document, row.holds) for row in advice.advice({r.name: r for r in made})]
    assert said == [
        ("baseline", "no advice in S3; Muon is ahead in the author's stored runs", "-"),
        ("moe-final", "Muon (S4: 7% better validation loss than optimized Adam)", advice.HOLDS),
        ("lr-sensitivity", "0.01 (the author's code for S2)", advice.NOT),
        ("moe-muon-on", "Muon for high-dimensional parameters (attention, FFN) (S4)", advice.HOLDS),
        ("moe-muon-on", "for all 2D parameter updates (S0)", advice.NOT),
    ]
    assert [effect.label for effect in advice.effects({"moe-muon-on": made[-1]})] == ["Muon on every matrix"]


def test_a_report_on_several_suites_has_a_page_for_each_and_one_of_advice(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        plots, "save", lambda figure, folder, stem, *rest: drawn.append(stem) or save_stub(folder, stem)
    )
    momentum = {f"momentum {value}": (3.0 + rise, 3.01 + rise, 2.99 + rise) for value, rise in RISES.items()}
    made = [
        results_of(tmp_path, "moe-momentum", momentum, spectra=False),
        results_of(tmp_path, "speedrun-2m", {"muon": (3.0, 3.1, 2.9), "adamw": (3.5, 3.6, 3.4)}),
    ]
    out = tmp_path / "out"
    (out / "plots").mkdir(parents=True)
    (out / "plots" / "older.png").write_bytes(b"")
    front = write_suite_report(made, {r.name: r for r in made}, [], "nano", out)
    assert front == out / "report.html"
    pages = {path.stem for path in out.glob("*.html")}
    assert pages == {"report", "advice", "moe-momentum", "speedrun-2m"} == {path.stem for path in out.glob("*.md")}
    assert not (out / "plots" / "older.png").exists()
    said = json.loads((out / "findings.json").read_text())
    assert list(said) == ["moe-momentum", "speedrun-2m"]
    assert "-0.5000" in said["speedrun-2m"][0]
    text = (out / "speedrun-2m.html").read_text()
    for words in (
        "How do two layers differ?",
        "time per step",
        "Two seeds, effective rank",
        "Muon ends the 2M-token run",
    ):
        assert words in text
    assert 'src="plots/speedrun-2m_norm.png"' in text
    assert "data:image" not in text
    assert [f'href="{page}.html"' in text for page in sorted(pages)] == [True] * 4
    assert "[Advice](advice.md)" in (out / "report.md").read_text()
    advised = (out / "advice.md").read_text()
    assert "momentum of Muon" in advised
    assert "plots/advice.png" in advised
    assert {"advice", "moe-momentum_sensitivity", "speedrun-2m_seeds_entropy"} <= set(drawn)
    assert (out / "power.json").exists()


RISES = {0.9: 0.0, 0.85: 0.2, 0.95: 0.1}


def save_stub(folder, stem):
    (folder / f"{stem}.png").write_bytes(b"\x89PNG" + 60 * b"\0")
