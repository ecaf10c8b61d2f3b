"""Figures of the spectra of weights: loaded runs that have logged them -> a Matplotlib figure, styled as in plots.py.

    figure = metric_heatmap(runs, "effective_rank"); plots.save(figure, Path("plots"), "effective_rank_heatmap")

Rows are runs or groups, columns the projections; scales are shared where runs are compared; the level at
initialisation, or of chance, is drawn in. Figures of one layer are in plots_layer.py.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import CenteredNorm, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from analysis.plots import (
    REFERENCE_COLOR,
    WIDTH,
    Caption,
    LineStyle,
    captioned,
    group_handles,
    group_labels,
    legend_below,
    line_styles,
    run_labels,
)
from analysis.runs import Group, Run, group_seeds
from analysis.stats import chance_spread
from engine.files import SUBSPACE_RANK

HEATMAP_COLORS = "cividis"
DIFFERENCE_COLORS = "PuOr_r"
# Early to late, or largest to smallest: one dark-to-light ramp whose light end still shows on white.
ORDER_COLORS = LinearSegmentedColormap.from_list("order", plt.get_cmap("cividis")(np.linspace(0, 0.88, 256)))
METRIC_TITLES = {
    "spectral_norm": "Spectral norm, the largest singular value",
    "spectral_entropy": "Spectral entropy of s² / Σs², 1 = all singular values s equal",
    "effective_rank": "Effective rank, exp of the entropy of s / Σs (s: singular values)",
    "entropy": "Entropy of s / Σs in nats (s: singular values)",
    "left_alignment": "Alignment of update and weight, top-5 output directions",
    "right_alignment": "Alignment of update and weight, top-5 input directions",
    "weight_norm": "Frobenius norm of the weight",
    "update_norm": "Frobenius norm of the update",
    "grad_norm": "Frobenius norm of the gradient before clipping",
}
PROJECTION_TITLES = {"q": "Q", "k": "K", "v": "V", "o": "O", "gate": "MLP gate", "up": "MLP up", "down": "MLP down"}
# The Okabe-Ito colours that no optimizer has; dashed for the feed-forward projections.
PROJECTION_LOOKS = {
    "q": {"color": "#E69F00"},
    "k": {"color": "#56B4E9"},
    "v": {"color": "#009E73"},
    "o": {"color": "#CC79A7"},
    "gate": {"color": "#000000", "linestyle": (0, (1.2, 1.2))},
    "up": {"color": "#000000", "linestyle": (0, (5, 1.6))},
    "down": {"color": "#8C8C8C", "linestyle": (0, (5, 1.6))},
}


def group_grid(group: Group, proj: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps at which every run of the group's pool has an event (E,), and the mean over the runs as (layers, E)."""
    grids = [run.grid(proj, key) for run in group.pool()]
    steps = grids[0][0]
    for other, _ in grids[1:]:
        steps = np.intersect1d(steps, other)
    return steps, np.mean([values[:, np.isin(at, steps)] for at, values in grids], axis=0)


def relative_rank(run: Run, proj: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and effective rank as a share of the smaller side, (layers, E)."""
    steps, values = run.grid(proj, "effective_rank")
    return steps, values / run.full_rank(proj)


def projection_panels(
    projections: Sequence[str], x_words: str, y_words: str, sharex: bool = True
) -> tuple[Figure, list[tuple[str, plt.Axes]]]:
    """A figure of two rows with a panel for each projection, words at the outer axes."""
    figure, axes = plt.subplots(2, max(3, -(-len(projections) // 2)), figsize=(WIDTH, 5.8), sharex=sharex)
    panels = list(zip(projections, axes.flat, strict=False))
    for name, ax in panels:
        ax.set_title(PROJECTION_TITLES[name])
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[0, len(panels) - axes.shape[1] :]:  # of an odd number the last one has nothing below it
        ax.tick_params(labelbottom=True)
        ax.set_xlabel(x_words)
    for ax in axes[1]:
        ax.set_xlabel(x_words)
    for ax in axes[:, 0]:
        ax.set_ylabel(y_words)
    return figure, panels


def run_panels(
    runs: Sequence[Run], titles: Sequence[str], y_words: str, x_words: str = "step", height: float = 2.1, **shared: Any
) -> tuple[Figure, np.ndarray]:
    """A figure with a row for each run and a column for each title, words at the outer axes."""
    size = (12, 1.6 + height * len(runs))
    figure, axes = plt.subplots(len(runs), len(titles), figsize=size, squeeze=False, **shared)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title)
    for ax in axes[-1]:
        ax.set_xlabel(x_words)
    for ax, label in zip(axes[:, 0], run_labels(runs), strict=True):
        ax.set_ylabel(f"{label}\n{y_words}".strip())
    return figure, axes


def initial_handle(words: str = "at initialisation") -> Line2D:
    """The legend's entry of the dotted grey line."""
    return Line2D([], [], color=REFERENCE_COLOR, linestyle=":", label=words)


def _layer_ticks(ax: plt.Axes, layers: int, most: int = 8, axis: str = "x") -> None:
    ticks = np.unique(np.linspace(0, layers - 1, min(layers, most)).round())
    (ax.set_xticks if axis == "x" else ax.set_yticks)(ticks)


def log_axis(ax: plt.Axes) -> None:
    """Plain numbers on a log axis, 1-2-5 where it spans less than two decades."""
    ax.set_yscale("log")
    narrow = np.ptp(np.log10(ax.get_ylim())) < 2
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,), numticks=9))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())


@captioned(
    "Spectral norm against depth",
    "The largest factor by which a projection can stretch its input. The dotted line is where training began. Watch "
    "norms above 4 to 5.",
)
def spectral_norm_by_depth(runs: Sequence[Run]) -> Figure:
    """Largest singular value of each projection by layer, at initialisation and at the last event."""
    groups = group_seeds(runs)
    figure, panels = projection_panels(runs[0].projections(), "layer", "spectral norm")
    for name, ax in panels:
        for group, style in zip(groups, line_styles(groups), strict=True):
            _, values = group_grid(group, name, "spectral_norm")
            layers = np.arange(len(values))
            ax.plot(layers, values[:, 0], color=REFERENCE_COLOR, linestyle=":", linewidth=1.2)
            ax.plot(layers, values[:, -1], marker="o", markersize=4, **style.line())
        ax.set_ylim(0, 1.08 * ax.dataLim.ymax)
        _layer_ticks(ax, max(run.layers for run in runs))
    figure.suptitle("Spectral norm against depth, at the last event")
    legend_below(figure, [*group_handles(groups), initial_handle()])
    return figure


@captioned(
    "Spectral entropy against layer",
    "A scan through the depth of the network at five moments, dark (early) to light (late). Layers that leave the pack "
    "late in training do so because of training, not of their shape.",
)
def depth_profiles(runs: Sequence[Run], key: str = "spectral_entropy", steps: Sequence[int] | None = None) -> Figure:
    """A metric against layer at chosen steps (default: five from first to last), a row per run, dark to light."""
    names = runs[0].projections()
    titles, y_words = [PROJECTION_TITLES[name] for name in names], key.replace("_", " ")
    figure, axes = run_panels(runs, titles, y_words, "layer", 1.75, sharey="col", sharex="row")
    for row, run in enumerate(runs):
        defined = [at[~np.isnan(values).all(axis=0)] for at, values in (run.grid(name, key) for name in names)]
        events = defined[0] if steps is None else np.intersect1d(defined[0], steps)
        if steps is None:
            events = events[np.unique(np.linspace(0, len(events) - 1, min(5, len(events))).round().astype(int))]
        colors = ORDER_COLORS(np.linspace(0, 1, max(2, len(events))))
        for column, name in enumerate(names):
            ax = axes[row, column]
            at, values = run.grid(name, key)
            for event, color in zip(events, colors, strict=False):
                profile = values[:, np.searchsorted(at, event)]
                ax.plot(np.arange(len(values)), profile, color=color, marker="o", markersize=3, linewidth=1.4)
            _layer_ticks(ax, len(values), 6)
        handles = [Line2D([], [], color=c, marker="o", markersize=3) for c, _ in zip(colors, events, strict=False)]
        words = [f"{int(event)}" for event in events]
        axes[row, -1].legend(
            handles, words, title="step", loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, title_fontsize=8
        )
    figure.suptitle(f"{METRIC_TITLES[key]}\nagainst layer at chosen steps; one vertical scale down each column")
    return figure


_OVER_TIME = (
    "Averaged over layers and seeds; the band spans the lowest to the highest layer. The dotted line is the value of "
    "the random initial weights, which depends on the shape alone: differences between projections that exist there "
    "were not learned."
)
OVER_TIME_CAPTIONS = {
    "spectral_entropy": Caption(
        "Spectral entropy over time",
        f"1 means that all singular values are equal. {_OVER_TIME} A line that falls far below the dotted one is rank "
        "collapse.",
    ),
}


@captioned("Effective rank over time", _OVER_TIME)
def metric_over_time(runs: Sequence[Run], key: str = "effective_rank") -> Figure:
    """A metric averaged over layers and seeds against steps, a panel per projection; band = least to greatest layer.

    Dotted grey: the value at initialisation, where the metric has one.
    """
    groups = group_seeds(runs)
    figure, panels = projection_panels(runs[0].projections(), "step", key.replace("_", " "))
    for name, ax in panels:
        for group, style in zip(groups, line_styles(groups), strict=True):
            mean_and_band(ax, *group_grid(group, name, key), style)
            initial = group_grid(group, name, key)[1]
            if initial.size and np.isfinite(initial[:, 0]).any():
                ax.axhline(np.nanmean(initial[:, 0]), color=REFERENCE_COLOR, linestyle=":", linewidth=1.2)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    figure.suptitle(f"{METRIC_TITLES[key]}\nmean over layers, band from the lowest to the highest layer")
    legend_below(figure, [*group_handles(groups), initial_handle()])
    return figure


def mean_and_band(ax: plt.Axes, steps: np.ndarray, values: np.ndarray, style: LineStyle) -> None:
    defined = ~np.isnan(values).all(axis=0)
    steps, values = steps[defined], values[:, defined]
    if not len(steps):
        return
    if style.strong:
        low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
        ax.fill_between(steps, low, high, color=style.color, alpha=0.15, linewidth=0)
    ax.plot(steps, np.nanmean(values, axis=0), marker="o" if len(steps) == 1 else None, **style.line())


def with_logged(runs: Sequence[Run], key: str) -> list[Run]:
    """The runs that have logged a metric; records before it was have no such key."""
    return [run for run in runs if any(line.get(key) is not None for line in run.spectra)]


@captioned(
    "Alignment over time, with chance",
    "How far the update pushes along the weight's own five strongest output directions. The dotted line is what random "
    "subspaces reach, the grey band how far a single random pair strays from it; the mean over layers strays less. "
    "Muon's update has nearly equal singular values, so its five strongest directions are nearly arbitrary, and low "
    "alignment alone is not a sign of exploration. The lower row, where it was logged, shows how arbitrary: the nearer "
    "the gap s₅ − s₆ to zero, the more so.",
)
def alignment_with_chance(runs: Sequence[Run], side: str = "left") -> Figure:
    """Alignment of update and weight over time, with its chance band, and below it how distinct the update's top 5 are.

    Grey: the middle 95 % of random pairs of subspaces of that dimension around the logged chance level, for one
    matrix. Lower row: s_5 - s_6 of the update as a share of the r.m.s. of its singular values; near zero, its five
    strongest directions are arbitrary. Runs that did not log the gap have the upper row alone.
    """
    key = f"{side}_alignment"
    names, groups, rows = runs[0].projections(), group_seeds(runs), 1 + bool(with_logged(runs, "update_gap"))
    size = (12, 1.2 + 2.5 * rows)
    figure, axes = plt.subplots(rows, len(names), figsize=size, sharex=True, sharey="row", squeeze=False)
    for column, name in enumerate(names):
        ax = axes[0, column]
        chance = float(np.nanmean(runs[0].grid(name, f"{key}_chance")[1]))
        low, high = chance_spread(min(SUBSPACE_RANK, runs[0].full_rank(name)))
        ax.axhspan(chance * low, chance * high, color=REFERENCE_COLOR, alpha=0.16, linewidth=0)
        ax.axhline(chance, color=REFERENCE_COLOR, linestyle=":", linewidth=1.2)
        for group, style in zip(groups, line_styles(groups), strict=True):
            mean_and_band(ax, *group_grid(group, name, key), style)
            if rows > 1:
                steps, gap = group_grid(group, name, "update_gap")
                # root mean square of the singular values: the Frobenius norm squared is the sum of s²
                rms = group_grid(group, name, "update_norm")[1] / np.sqrt(group.runs[0].full_rank(name))
                relative = np.divide(gap, rms, out=np.full_like(gap, np.nan), where=rms > 0)
                relative[relative <= 0] = np.nan
                mean_and_band(axes[1, column], steps, relative, style)
        ax.set_title(PROJECTION_TITLES[name])
        axes[-1, column].set_xlabel("step")
        axes[-1, column].xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].set_ylabel("alignment")
    if rows > 1:
        log_axis(axes[1, 0])
        axes[1, 0].set_ylabel("gap s₅ − s₆ of the update,\nin r.m.s. singular values")
    figure.suptitle(f"{METRIC_TITLES[key]}\nmean over layers, band from the lowest to the highest layer")
    band = Patch(facecolor=REFERENCE_COLOR, alpha=0.16, label="95 % of random pairs of subspaces")
    legend_below(figure, [*group_handles(groups), initial_handle("chance, their mean"), band])
    return figure


def only_outer_ticks(axes: np.ndarray) -> None:
    """No ticks between the panels of a grid: they repeat the outer ones, and most of the drawing time is theirs."""
    for ax in axes[:-1].flat:
        ax.xaxis.set_visible(False)
    for ax in axes[:, 1:].flat:
        ax.yaxis.set_visible(False)


def heat(ax: plt.Axes, steps: np.ndarray, values: np.ndarray, **style: object) -> ScalarMappable:
    """Rows x events as an image whose cells are centred on their events."""
    mesh = ax.pcolormesh(steps, np.arange(len(values)), values, shading="nearest", rasterized=True, **style)
    ax.grid(False)
    ax.set_facecolor("#f4f4f4")  # where a value is undefined
    _layer_ticks(ax, len(values), 5, axis="y")
    ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    return mesh


HEATMAP_CAPTIONS = {
    "effective_rank": Caption(
        "Effective rank, layer by layer",
        "The number of directions that a matrix uses, between 1 and its smaller side. A dark band that spreads would "
        "be rank collapse. Compare colours down a column, not across.",
    ),
    "spectral_entropy": Caption(
        "Spectral entropy, layer by layer",
        "1 means that all singular values are equal, small values that a few directions carry the matrix. Shapes "
        "differ already at initialisation, so compare colours down a column, not across.",
    ),
    "left_alignment": Caption(
        "Alignment, layer by layer",
        "Of update and weight, output directions. The line on each bar is the level of chance: compare with it.",
    ),
    "spectral_norm": Caption("Spectral norm, layer by layer", "The largest singular value, as it grows."),
    "weight_norm": Caption(
        "Weight norm, layer by layer",
        "The Frobenius norm: the size of a matrix as a whole. Without weight decay it mostly grows.",
    ),
    "update_norm": Caption(
        "Update norm, layer by layer",
        "The size of a single update. For Muon it follows shape and learning rate, for AdamW nearly so.",
    ),
}


def metric_heatmap(runs: Sequence[Run], key: str) -> Figure:
    """Layer x step heatmaps, a row per run and a column per projection; one colour scale per column.

    The line on each colour bar is the value at initialisation (alignment: the level of chance).
    """
    names = runs[0].projections()
    titles = [PROJECTION_TITLES[name] for name in names]
    figure, axes = run_panels(runs, titles, "layer", height=1.5, sharex=True, sharey="row")
    is_alignment = key.endswith("_alignment")
    marked = False
    for column, name in enumerate(names):
        grids = [run.grid(name, key) for run in runs]
        known = np.concatenate([values[np.isfinite(values)] for _, values in grids])
        if not len(known):
            for ax in axes[:, column]:
                ax.annotate("undefined", (0.5, 0.5), xycoords="axes fraction", ha="center", color=REFERENCE_COLOR)
            continue
        start = runs[0].grid(name, f"{key}_chance")[1] if is_alignment else grids[0][1][:, :1]
        mark = float(np.nanmean(start)) if np.isfinite(start).any() else None
        scale = known if mark is None else [*known, mark]
        for row, (steps, values) in enumerate(grids):
            mesh = heat(axes[row, column], steps, values, vmin=min(scale), vmax=max(scale), cmap=HEATMAP_COLORS)
        bar = figure.colorbar(
            mesh, ax=axes[:, column], location="bottom", aspect=12, shrink=0.95, fraction=0.15 / len(runs), pad=0.02
        )
        bar.ax.tick_params(labelsize=8)
        bar.locator = MaxNLocator(3)
        bar.update_ticks()
        if mark is not None:
            marked = True
            bar.ax.axvline(mark, color="white", linewidth=3.0)
            bar.ax.axvline(mark, color="black", linewidth=1.4)
    only_outer_ticks(axes)
    words = "colour shared down each column"
    if marked:
        words += f"; line on each bar: {'chance' if is_alignment else 'the value at initialisation'}"
    figure.suptitle(f"{METRIC_TITLES[key]}\n{words}")
    return figure


@captioned(
    "Quick scan",
    "Each strip is one run and shows all its matrices; one that loses rank darkens to the right, and some are dark "
    "from the start, by their shape. One colour scale for all.",
)
def quick_scan(runs: Sequence[Run]) -> Figure:
    """Effective rank of every matrix of up to six runs at a glance: a strip of scans on one colour scale.

    Each scan stacks the projections, layers downwards within each; the colour is the effective rank as a share of the
    smaller side.
    """
    runs = runs[:6]
    names = runs[0].projections()
    scans = []
    for run in runs:
        per_name = [relative_rank(run, name) for name in names]
        scans.append((per_name[0][0], np.concatenate([values for _, values in per_name])))
    low = min(float(np.nanmin(values)) for _, values in scans)
    high = max(float(np.nanmax(values)) for _, values in scans)
    size = (max(6.0, 1.6 + 1.75 * len(runs)), 5.4)
    figure, axes = plt.subplots(1, len(runs), figsize=size, sharex=True, squeeze=False)
    for ax, run, label, (steps, values) in zip(axes[0], runs, run_labels(runs), scans, strict=True):
        mesh = heat(ax, steps, values, vmin=low, vmax=high, cmap=HEATMAP_COLORS)
        ax.set_title(label.replace(", ", "\n"), fontsize=9)
        ax.set_xlabel("step")
        ax.invert_yaxis()
        for border in range(1, len(names)):
            ax.axhline(border * run.layers - 0.5, color="white", linewidth=1.6)
        middles = (np.arange(len(names)) + 0.5) * run.layers - 0.5
        ax.set_yticks(middles, [PROJECTION_TITLES[name] for name in names] if ax is axes[0, 0] else [""] * len(names))
        ax.tick_params(axis="y", length=0)
    axes[0, 0].set_ylabel("projection, layers from the first (top) to the last")
    figure.colorbar(mesh, ax=axes, label="effective rank / smaller side", aspect=30, pad=0.01)
    figure.suptitle("Quick scan: effective rank of every matrix")
    return figure


@captioned(
    "Effective rank, every seed",
    "A row per setting, a column per seed, one colour scale. Structure that differs between rows but not within them "
    "belongs to the optimizer.",
)
def rank_grid(runs: Sequence[Run]) -> Figure:
    """Effective rank by layer and step, mean over projections: a row per group, a column per seed, one scale."""
    groups = group_seeds(runs)
    columns = max(len(group.runs) for group in groups)
    size = (max(5.0, 1.9 + min(2.6 * columns, 11.0)), 1.5 + 1.9 * len(groups))
    figure, axes = plt.subplots(len(groups), columns, figsize=size, sharex=True, sharey="row", squeeze=False)
    grids = {}
    for group in groups:
        for run in group.runs:
            per_name = [relative_rank(run, name) for name in run.projections()]
            grids[run.path] = per_name[0][0], np.mean([values for _, values in per_name], axis=0)
    low = min(float(np.nanmin(values)) for _, values in grids.values())
    high = max(float(np.nanmax(values)) for _, values in grids.values())
    for row, (group, label) in enumerate(zip(groups, group_labels(groups), strict=True)):
        for column, ax in enumerate(axes[row]):
            if column >= len(group.runs):
                ax.set_visible(False)
                continue
            run = group.runs[column]
            mesh = heat(ax, *grids[run.path], vmin=low, vmax=high, cmap=HEATMAP_COLORS)
            ax.set_title(f"seed {run.config['seed']}")
            ax.set_xlabel("step") if row == len(groups) - 1 else None
        axes[row, 0].set_ylabel(f"{label}\nlayer")
    figure.colorbar(mesh, ax=axes, label="effective rank / smaller side", pad=0.01)
    figure.suptitle("Effective rank, mean over the projections, every seed on one scale")
    return figure


@captioned(
    "Two seeds",
    "The first two seeds on one scale per projection and their difference below, on a scale of its own around zero: "
    "structure that both share is not an accident of the seed.",
)
def pair_grid(a: Run, b: Run, key: str = "effective_rank") -> Figure:
    """Two runs, say two seeds of one setting, on a shared scale per projection, and their difference below."""
    names = a.projections()
    figure, axes = plt.subplots(3, len(names), figsize=(12, 6.4), sharex=True, sharey=True, squeeze=False)
    label_a, label_b = run_labels([a, b])
    reach = 0.0
    for column, name in enumerate(names):
        (steps_a, values_a), (steps_b, values_b) = a.grid(name, key), b.grid(name, key)
        steps = np.intersect1d(steps_a, steps_b)
        values_a, values_b = values_a[:, np.isin(steps_a, steps)], values_b[:, np.isin(steps_b, steps)]
        both = np.concatenate([values_a, values_b])
        scale = {"vmin": np.nanmin(both), "vmax": np.nanmax(both), "cmap": HEATMAP_COLORS}
        mesh = heat(axes[0, column], steps, values_a, **scale)
        heat(axes[1, column], steps, values_b, **scale)
        bar = figure.colorbar(mesh, ax=axes[:2, column], location="bottom", aspect=12, shrink=0.95)
        gap = heat(axes[2, column], steps, values_a - values_b, norm=CenteredNorm(), cmap=DIFFERENCE_COLORS)
        gap_bar = figure.colorbar(gap, ax=axes[2, column], location="bottom", aspect=12, shrink=0.95)
        reach = max(reach, float(np.nanmax(np.abs(values_a - values_b) / np.nanmean(both))))
        for one in (bar, gap_bar):
            one.ax.tick_params(labelsize=8)
            one.locator = MaxNLocator(3)
            one.update_ticks()
        axes[0, column].set_title(PROJECTION_TITLES[name])
        axes[2, column].set_xlabel("step")
    only_outer_ticks(axes)
    for ax, label in zip(axes[:, 0], (label_a, label_b, "difference"), strict=True):
        ax.set_ylabel(f"{label}\nlayer")
    figure.suptitle(
        f"{METRIC_TITLES[key]}\ntwo runs on one scale per projection; "
        f"they differ by at most {100 * reach:.1f} % of a projection's mean"
    )
    return figure
