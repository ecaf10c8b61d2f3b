"""Every figure draws what its runs hold, in the same style whatever Matplotlib is told elsewhere."""

import os
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from analysis import (
    pages,
    plots,
    plots_layer,
    plots_momentum,
    plots_settings,
    plots_spectra,
    plots_tokens,
    report_figures,
)
from analysis.runs import group_seeds, load_run
from analysis.stats import chance_spread
from bench.synthetic import write_run
from engine.files import ROOT


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two optimizers, two seeds each; update gaps, losses by token frequency and momenta are logged."""
    folder = tmp_path_factory.mktemp("runs")
    made = []
    for optimizer, final in (("muon", 3.0), ("adamw", 3.5)):
        for seed in (0, 1):
            path = folder / f"{optimizer}-{seed}"
            logged = {"gap": True, "by_token": True, "momentum": True, "experts": 4}
            made.append(write_run(path, optimizer=optimizer, seed=seed, final=final + 0.1 * seed, **logged))
    return [load_run(path) for path in made]


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    matplotlib.pyplot.close("all")


FIGURES = {
    "loss_curves": lambda runs: plots.loss_curves(runs),
    "optimizer_comparison": lambda runs: plots.optimizer_comparison(*group_seeds(runs)),
    "ablation_bars": lambda runs: plots_settings.ablation_bars(runs),
    "model_scaling": lambda runs: plots_settings.model_scaling(runs),
    "loss_by_decile": plots_tokens.loss_by_decile,
    "loss_by_decile_of_one": lambda runs: plots_tokens.loss_by_decile(runs[:1]),
    "learning_rate_schedules": lambda runs: plots.learning_rate_schedules(runs),
    "expert_utilization": lambda runs: plots.expert_utilization(runs[0]),
    "spectral_norm_by_depth": plots_spectra.spectral_norm_by_depth,
    "depth_profiles": lambda runs: plots_spectra.depth_profiles(runs, "spectral_entropy"),
    "metric_over_time": lambda runs: plots_spectra.metric_over_time(runs, "effective_rank"),
    "alignment_with_chance": plots_spectra.alignment_with_chance,
    "metric_heatmap": lambda runs: plots_spectra.metric_heatmap(runs, "weight_norm"),
    "alignment_heatmap": lambda runs: plots_spectra.metric_heatmap(runs, "right_alignment"),
    "quick_scan": plots_spectra.quick_scan,
    "rank_grid": plots_spectra.rank_grid,
    "pair_grid": lambda runs: plots_spectra.pair_grid(runs[0], runs[1], "effective_rank"),
    "momentum_spectra": lambda runs: plots_momentum.momentum_spectra(runs[::2]),
    "momentum_over_time": plots_momentum.momentum_over_time,
    "newton_schulz_residual": lambda runs: plots_momentum.newton_schulz_residual(runs[:2]),
    "singular_value_fan": lambda runs: plots_layer.singular_value_fan(runs[::2]),
    "singular_value_spectrum": plots_layer.singular_value_spectrum,
    "layer_mri": lambda runs: plots_layer.layer_mri(runs[::2]),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_something_in_each_panel_and_words_at_the_outer_axes(name, runs):
    figure = FIGURES[name](runs)
    assert isinstance(figure, Figure)
    panels = [ax for ax in figure.axes if ax.get_label() != "<colorbar>" and ax.get_visible()]
    for ax in panels:
        assert ax.lines or ax.collections or ax.patches or ax.images, f"{name}: an empty panel"
    below = [ax for ax in panels if ax.get_subplotspec().is_last_row()]
    beside = [ax for ax in panels if ax.get_subplotspec().is_first_col()]
    assert all(ax.get_xlabel() for ax in below), f"{name}: a bottom axis has no words"
    if name != "ablation_bars":  # its rows are labelled one by one
        assert all(ax.get_ylabel() for ax in beside), f"{name}: a left axis has no words"


@pytest.mark.parametrize("name", ["metric_heatmap", "layer_mri", "singular_value_fan", "alignment_with_chance"])
@pytest.mark.filterwarnings("error")
def test_figures_of_a_run_with_only_its_initial_spectra_do_not_fail(name, tmp_path):
    run = load_run(write_run(tmp_path / "young", done=0, status=None, gap=True))
    figure = FIGURES[name]([run, run])
    plots.save(figure, tmp_path, "figure", ("png",))
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_no_two_figures_of_a_report_share_a_file(runs, tmp_path):
    more = [load_run(write_run(tmp_path / f"{seed}", lr=0.04, seed=seed)) for seed in (0, 1)]  # a second Muon
    drawings = [*report_figures.curve_drawings([*runs, *more]), *report_figures.spectra_drawings([*runs, *more])]
    stems = [drawing.picture.stem for drawing in drawings]
    assert {"pair_grid_muon", "pair_grid_adamw", "rank_grid", "loss_curves", "ablation_bars"} <= set(stems)
    assert {"loss_by_decile", "momentum_spectra", "momentum_over_time"} <= set(stems)
    assert len(set(stems)) == len(stems)
    assert all(drawing.picture.how_to_read.endswith(".") for drawing in drawings)


def test_curves_show_the_mean_over_seeds(runs):
    ax = plots.loss_curves(runs).axes[0]
    curves = {line.get_label(): line.get_ydata() for line in ax.lines}
    np.testing.assert_allclose(curves["Muon"], 5 + (3.05 - 5) * np.arange(11) / 10)
    np.testing.assert_allclose(curves["AdamW"], 5 + (3.55 - 5) * np.arange(11) / 10)


def test_losses_by_decile_and_the_lead_on_each(runs):
    left, right = plots_tokens.loss_by_decile(runs).axes
    curves = {line.get_label(): line.get_ydata() for line in left.lines}
    factors = 0.55 + 0.1 * np.arange(10)
    np.testing.assert_allclose(curves["Muon"], 3.05 * factors)
    np.testing.assert_allclose(curves["AdamW"], 3.55 * factors)
    leads = {line.get_label(): line.get_ydata() for line in right.lines}
    np.testing.assert_allclose(leads["Muon"], 0.5 * factors)
    assert "AdamW" not in leads
    assert right.get_title() == "ahead of AdamW by"


def test_momentum_is_drawn_in_shares_of_its_norm_with_the_reach(runs):
    figure = plots_momentum.momentum_spectra(runs[::2])
    assert len(figure.axes) == 2 * 6
    for ax in figure.axes[:1]:  # q: 8 singular values of each of 3 layers, and the dashed reach
        reach, *layers = ax.lines
        assert (reach.get_ydata()[0], reach.get_linestyle(), len(layers)) == (0.05, "--", 3)
        for line in layers:
            np.testing.assert_allclose(
                line.get_ydata(), 2.0 ** -np.arange(8) / np.sqrt((1 - 4.0**-8) / (1 - 0.25)), rtol=1e-6
            )
        assert ax.get_yscale() == "log"
    above, below = plots_momentum.momentum_over_time(runs).axes[0], plots_momentum.momentum_over_time(runs).axes[6]
    np.testing.assert_allclose(above.lines[0].get_ydata(), (1 - 4.0**-8) / (1 - 0.25))
    np.testing.assert_allclose(below.lines[0].get_ydata(), 100 * 3 / 8)  # 2^-5, 2^-6 and 2^-7 over 1.155
    assert list(below.lines[0].get_xdata()) == [5, 10]


def test_the_residual_of_newton_schulz_is_a_line_for_each_projection(runs):
    (ax,) = plots_momentum.newton_schulz_residual(runs[:2]).axes
    assert [line.get_label() for line in ax.lines] == ["Q", "K", "V", "O", "MLP up", "MLP down"]
    for line in ax.lines:
        np.testing.assert_allclose(line.get_xydata(), [(5, 0.2), (10, 0.2)])  # 0.1, 0.2 and 0.3 by layer


def test_a_gated_model_has_a_panel_more(tmp_path):
    names = ("q", "k", "v", "o", "gate", "up", "down")
    run = load_run(write_run(tmp_path / "gated", projections=names, gap=True))
    for plot in (plots_spectra.spectral_norm_by_depth, plots_spectra.alignment_with_chance):
        shown = [ax for ax in plot([run]).axes if ax.get_visible() and ax.get_title()]
        assert [ax.get_title() for ax in shown] == ["Q", "K", "V", "O", "MLP gate", "MLP up", "MLP down"]
        assert all(ax.lines for ax in shown)


def test_losses_have_an_axis_in_bits_per_byte_where_the_runs_share_their_tokens(runs, tmp_path):
    ax = plots.loss_curves(runs).axes[0]
    (bits,) = ax.child_axes
    ax.figure.draw_without_rendering()
    np.testing.assert_allclose(bits.get_ylim(), np.array(ax.get_ylim()) / 4 / np.log(2))  # a token has 4 bytes
    assert bits.get_ylabel() == "bits per byte"
    older = load_run(write_run(tmp_path / "older", spectra=False))  # did not log the size, has the same tokens
    assert plots.loss_curves([*runs, older]).axes[0].child_axes
    assert not plots.loss_curves([older]).axes[0].child_axes
    other = load_run(write_run(tmp_path / "other", data_fingerprint="beef", by_token=True, spectra=False))
    assert not plots.loss_curves([*runs, other]).axes[0].child_axes


def test_runs_of_before_have_no_figures_of_momentum_or_of_token_frequency(tmp_path):
    old = [load_run(write_run(tmp_path / f"{seed}", seed=seed)) for seed in (0, 1)]
    stems = {
        drawing.picture.stem for drawing in report_figures.curve_drawings(old) + report_figures.spectra_drawings(old)
    }
    assert "loss_curves" in stems
    assert not [stem for stem in stems if "momentum" in stem or "decile" in stem]


def test_the_unigram_loss_is_a_line_where_it_is_in_sight_and_a_word_above(runs, tmp_path):
    ax = plots.loss_curves(runs).axes[0]
    assert [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == ":"] == [4.5]
    assert [text.get_text() for text in ax.texts] == ["token frequencies alone: 4.50"]
    old, rare = (
        load_run(write_run(tmp_path / name, by_token=name == "rare", unigram_val_loss=level))
        for name, level in (("old", None), ("rare", 9.0))
    )
    for run, words in ((old, []), (rare, ["token frequencies alone: 9.00 ↑"])):
        ax = plots.loss_curves([run]).axes[0]
        assert not [line for line in ax.lines if line.get_linestyle() == ":"]
        assert [text.get_text() for text in ax.texts] == words


def test_an_optimizer_keeps_its_colour_and_settings_differ_by_line_style(runs, tmp_path):
    other = load_run(write_run(tmp_path / "other", lr=0.04))
    styles = {style.label: style for style in plots.line_styles(group_seeds([*runs, other]))}
    assert set(styles) == {"Muon, lr 0.02", "Muon, lr 0.04", "AdamW"}
    assert styles["Muon, lr 0.02"].color == styles["Muon, lr 0.04"].color != styles["AdamW"].color
    assert styles["Muon, lr 0.02"].linestyle != styles["Muon, lr 0.04"].linestyle


def test_of_many_settings_the_best_of_each_optimizer_stands_out(tmp_path):
    losses = {0.01: 3.4, 0.02: 3.1, 0.04: 3.2, 0.08: 3.3, 0.16: 3.5}
    made = [write_run(tmp_path / f"{lr}", lr=lr, final=loss, spectra=False) for lr, loss in losses.items()]
    strong = [
        style.label for style in plots.line_styles(group_seeds([load_run(path) for path in made])) if style.strong
    ]
    assert strong == ["Muon, lr 0.02"]


def test_sensitivity_joins_the_best_at_each_rate_and_marks_failed_runs(tmp_path):
    made = [write_run(tmp_path / f"{lr}", lr=lr, final=loss) for lr, loss in ((0.01, 3.3), (0.02, 3.0), (0.04, 3.5))]
    made.append(write_run(tmp_path / "worse", lr=0.02, adamw_lr=0.1, final=3.2))
    made.append(write_run(tmp_path / "failed", lr=0.08, status="failed"))
    figure = plots_settings.learning_rate_sensitivity([load_run(path) for path in made])
    loss, _, perplexity, _ = figure.axes
    joined = max(loss.lines, key=lambda line: len(line.get_xdata()))
    np.testing.assert_allclose(joined.get_xydata(), [(0.01, 3.3), (0.02, 3.0), (0.04, 3.5)])
    joined = max(perplexity.lines, key=lambda line: len(line.get_xdata()))
    np.testing.assert_allclose(joined.get_ydata(), np.exp([3.3, 3.0, 3.5]))
    assert [line.get_xdata() for line in loss.lines if line.get_marker() == "x"] == [[0.08]]
    assert all(ax.get_ylabel() for ax in figure.axes)
    assert "learning rate" in figure.axes[2].get_xlabel()


def test_heatmaps_show_the_numbers_of_the_files_on_a_scale_shared_down_each_column(runs):
    pair = [runs[0], runs[2]]
    figure = plots_spectra.metric_heatmap(pair, "effective_rank")
    meshes = [ax.collections[0] for ax in figure.axes[:12]]
    for column, proj in enumerate(pair[0].projections()):
        upper, lower = meshes[column], meshes[column + 6]
        assert upper.get_clim() == lower.get_clim()
        np.testing.assert_allclose(lower.get_array(), pair[1].grid(proj, "effective_rank")[1])


def test_the_quick_scan_shares_one_scale_over_six_runs(runs):
    figure = plots_spectra.quick_scan([*runs, *runs[:2]])
    meshes = [ax.collections[0] for ax in figure.axes[:6]]
    assert len({mesh.get_clim() for mesh in meshes}) == 1
    scan = np.asarray(meshes[0].get_array())
    assert scan.shape == (6 * 3, 3)  # projections x layers, events
    np.testing.assert_allclose(scan[3:6], runs[0].grid("k", "effective_rank")[1] / 4)


def test_the_pair_grid_ends_with_the_difference(runs):
    figure = plots_spectra.pair_grid(runs[0], runs[2], "left_alignment")
    gaps = np.asarray(figure.axes[12].collections[0].get_array())
    expected = runs[0].grid("q", "left_alignment")[1] - runs[2].grid("q", "left_alignment")[1]
    np.testing.assert_allclose(gaps[:, 1:], expected[:, 1:])


def test_the_fan_holds_every_singular_value_of_the_layer(runs):
    ax = plots_layer.singular_value_fan([runs[0]], layer=1).axes[0]
    segments = ax.collections[0].get_segments()
    assert len(segments) == 8
    steps, values = runs[0].singular_values("q", 1)
    np.testing.assert_allclose(segments[3], np.column_stack([steps, values[:, 3]]))
    assert ax.get_yscale() == "log"


def test_alignment_is_drawn_with_chance_and_the_gap_only_where_it_was_logged(runs, tmp_path):
    figure = plots_spectra.alignment_with_chance(runs)
    assert len(figure.axes) == 12
    chance = figure.axes[0]
    assert any(np.allclose(line.get_ydata(), 0.6) for line in chance.lines)
    gap = figure.axes[6].lines[0].get_ydata()
    np.testing.assert_allclose(gap, 0.01 / (0.2 / np.sqrt(8)))
    older = load_run(write_run(tmp_path / "older"))
    assert len(plots_spectra.alignment_with_chance([older]).axes) == 6


def test_the_chance_band_agrees_with_random_subspaces_of_a_finite_dimension():
    bases = np.linalg.qr(np.random.default_rng(1).standard_normal((4000, 128, 5)))[0]
    aligned = np.linalg.svd(bases[:, :5], compute_uv=False).mean(axis=1)
    low, high = np.quantile(aligned, (0.025, 0.975)) / np.mean(aligned)
    assert chance_spread(5) == pytest.approx((low, high), abs=0.03)


def test_experts_are_shown_as_shares(runs):
    figure = plots.expert_utilization(runs[0])
    shares = np.asarray(figure.axes[0].collections[0].get_array())
    np.testing.assert_allclose(shares[:, 0], [0.4, 0.2, 0.2, 0.2])


def test_files_of_a_figure_are_the_same_each_time(runs, tmp_path):
    for stem in ("a", "b"):
        plots.save(plots.loss_curves(runs), tmp_path, stem)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    width = int.from_bytes((tmp_path / "a.png").read_bytes()[16:20], "big")
    assert width == 2 * 100 * plots.WIDTH


def test_png_files_are_small_and_keep_their_colours(runs, tmp_path):
    figure = plots_spectra.metric_heatmap(runs, "effective_rank")
    plots.save(figure, tmp_path, "heatmap", ("png",))
    figure.savefig(tmp_path / "full.png", dpi=plots.PNG_DPI)
    small, full = (Image.open(tmp_path / f"{name}.png") for name in ("heatmap", "full"))
    assert small.mode == "P"
    assert (tmp_path / "heatmap.png").stat().st_size < 0.7 * (tmp_path / "full.png").stat().st_size
    away = np.abs(np.asarray(small.convert("RGB"), dtype=int) - np.asarray(full.convert("RGB"), dtype=int))
    assert away.max() <= 255 / 25


DRAW_ON_TWO_CORES = """
import sys, time
from pathlib import Path
from matplotlib.figure import Figure
from analysis import plots
plots.free_cores = lambda: 2

def slow():
    time.sleep(0.5)
    return Figure()

def wrong():
    raise ValueError("no such layer")

folder, last = Path(sys.argv[1]), {"slow": slow, "wrong": wrong}[sys.argv[2]]
caption = plots.Caption("title", "how")
drawings = [plots.drawing(draw, stem=stem, caption=caption) for stem, draw in (("a", Figure), ("b", last))]
pictures = plots.save_all(drawings, folder, ("png",))
print([picture.stem for picture in pictures], sorted(path.name for path in folder.glob("*.png")))
"""


def test_figures_of_all_cores_are_there_when_drawing_returns(tmp_path):
    words = (sys.executable, "-c", DRAW_ON_TWO_CORES, str(tmp_path))
    done = subprocess.run((*words, "slow"), cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "['a', 'b'] ['a.png', 'b.png']\n"


def test_an_error_on_another_core_is_raised_once(tmp_path):
    words = (sys.executable, "-c", DRAW_ON_TWO_CORES, str(tmp_path))
    done = subprocess.run((*words, "wrong"), cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("ValueError: no such layer") == 1


def test_figures_are_drawn_the_same_whatever_matplotlib_is_told(tmp_path):
    """A notebook's backend in the environment, and a matplotlibrc that asks for LaTeX and another font size."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom analysis import plots\nfrom analysis.runs import load_run\n"
        "plots.save(plots.loss_curves([load_run(Path(sys.argv[1]))]), Path(sys.argv[2]), 'curves')\n"
    )
    run = write_run(tmp_path / "run")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 30\nsavefig.dpi: 7\n")
    told = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    drawn = []
    for name, more in (("plain", {}), ("told", told)):
        (tmp_path / name).mkdir()
        words = (sys.executable, "-c", script, str(run), str(tmp_path / name))
        environment = {key: value for key, value in os.environ.items() if key not in told} | more
        subprocess.run(words, cwd=ROOT, env=environment, check=True, timeout=60)
        drawn.append((tmp_path / name / "curves.png").read_bytes())
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("dpi", [150, 200])
def test_a_page_shows_a_picture_at_the_size_of_its_figure(tmp_path, dpi):
    figure, _ = plots.plt.subplots(figsize=(8, 1))
    plots.save(figure, tmp_path, "wide", ("png",), dpi)
    chapters = [pages.Chapter("c", [pages.Picture("wide", "t", "h")])]
    page = pages.Page("", "", [], [], pages.Table.of([{"a": "b"}]), [], [], chapters)
    assert 'style="width:800px"' in pages.html_page(page, tmp_path, linked=True)
