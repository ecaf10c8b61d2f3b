"""One function per figure: loaded runs -> a Matplotlib figure.

    figure = loss_curves([load_run(Path("runs/a")), load_run(Path("runs/b"))]); figure.savefig("curves.png")

One look for all: an optimizer keeps its colour (Okabe-Ito, safe for colour-blind readers), runs of one optimizer differ
by line style, scales are shared across the runs compared, levels at initialisation and of chance are drawn in.
"""

from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from stats import Run

OPTIMIZER_NAMES = {"muon": "Muon", "adamw": "AdamW"}
OPTIMIZER_COLORS = {"muon": "#0072B2", "adamw": "#D55E00"}
REFERENCE_COLOR = "#666666"
LINE_STYLES = ("-", "--", ":", "-.")
HEATMAP_COLORS = "cividis"
METRIC_TITLES = {
    "spectral_entropy": "Spectral entropy of s² / Σs², 1 = all singular values s equal",
    "effective_rank": "Effective rank, exp of the entropy of s / Σs (s: singular values)",
    "left_alignment": "Alignment of update and weight, top-5 output directions",
}
PROJECTION_TITLES = {"q": "Q", "k": "K", "v": "V", "o": "O", "up": "MLP up", "down": "MLP down"}

STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
}
plt.rcParams.update(STYLE)


def labels(runs: Sequence[Run]) -> list[str]:
    """Short names: the optimizer, with model, seed and rate as far as needed to tell the runs apart, or numbers."""
    parts = [OPTIMIZER_NAMES.get(run.optimizer, run.optimizer) for run in runs]
    for key in ("model", "seed", "lr"):
        if len(set(parts)) < len(runs) and len({run.config.get(key) for run in runs}) > 1:
            parts = [f"{part}, {key} {run.config.get(key)}" for part, run in zip(parts, runs, strict=True)]
    if len(set(parts)) == len(runs):
        return parts
    return [f"{OPTIMIZER_NAMES.get(run.optimizer, run.optimizer)} #{i}" for i, run in enumerate(runs, start=1)]


def _looks(runs: Sequence[Run]) -> list[dict]:
    """Colour by optimizer, line style by the run's place among those of its optimizer."""
    seen: dict[str, int] = {}
    looks = []
    for run, label in zip(runs, labels(runs), strict=True):
        place = seen.setdefault(run.optimizer, 0)
        seen[run.optimizer] += 1
        color = OPTIMIZER_COLORS.get(run.optimizer, "#009E73")
        looks.append({"color": color, "linestyle": LINE_STYLES[place % len(LINE_STYLES)], "label": label})
    return looks


def _legend_below(figure: Figure, handles: Sequence[Line2D]) -> None:
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))


def _run_handles(runs: Sequence[Run]) -> list[Line2D]:
    return [Line2D([], [], linewidth=1.8, **look) for look in _looks(runs)]


def _projection_panels(runs: Sequence[Run], sharey: bool) -> tuple[Figure, list[tuple[str, plt.Axes]]]:
    """A 2 x 3 figure with a panel for each projection."""
    names = runs[0].projections()
    figure, axes = plt.subplots(2, 3, figsize=(10, 5.8), sharex=True, sharey=sharey)
    panels = list(zip(names, axes.flat, strict=False))
    for name, ax in panels:
        ax.set_title(PROJECTION_TITLES[name])
    return figure, panels


def loss_curves(runs: Sequence[Run]) -> Figure:
    """Validation loss and accuracy against updates and against training seconds; training loss thin behind."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharey="row")
    for run, look in zip(runs, _looks(runs), strict=True):
        for column, x_val in enumerate((run.val["step"], run.val["train_seconds"])):
            if run.train:  # a batch's loss belongs to the weights before its update
                x_train = run.train["step"] - 1
                if column == 1:
                    x_train = np.cumsum(run.train["step_ms"]) / 1e3 - run.train["step_ms"] / 1e3
                axes[0, column].plot(x_train, run.train["train_loss"], color=look["color"], alpha=0.25, linewidth=0.8)
            marker = "o" if len(x_val) == 1 else None
            axes[0, column].plot(x_val, run.val["val_loss"], linewidth=1.8, marker=marker, **look)
            axes[1, column].plot(x_val, 100 * run.val["val_accuracy"], linewidth=1.8, marker=marker, **look)
    axes[0, 0].set_ylabel("loss (nats per token)")
    axes[1, 0].set_ylabel("next-token accuracy (%)")
    axes[0, 0].set_title("against updates")
    axes[0, 1].set_title("against training time")
    for ax, x_label in zip(axes[1], ("updates", "training time (s)"), strict=True):
        ax.set_xlabel(x_label)
    figure.suptitle("Validation loss and accuracy (thin: training loss of each batch)")
    _legend_below(figure, _run_handles(runs))
    return figure


def spectral_norm_by_depth(runs: Sequence[Run]) -> Figure:
    """Largest singular value of each projection by layer, at initialisation and at the last event."""
    figure, panels = _projection_panels(runs, sharey=False)
    for name, ax in panels:
        for run, look in zip(runs, _looks(runs), strict=True):
            _, values = run.grid(name, "spectral_norm")
            layers = np.arange(len(values))
            ax.plot(layers, values[:, -1], marker="o", markersize=4, **look)
            ax.plot(layers, values[:, 0], color=REFERENCE_COLOR, linestyle=":", linewidth=1.2)
        ax.set_ylim(0, 1.08 * ax.dataLim.ymax)
        ax.set_xticks(np.unique(np.linspace(0, len(values) - 1, min(len(values), 8)).round()))
    for ax in figure.axes[3:]:
        ax.set_xlabel("layer")
    for ax in figure.axes[::3]:
        ax.set_ylabel("spectral norm")
    figure.suptitle("Spectral norm against depth, at the last event")
    initial = Line2D([], [], color=REFERENCE_COLOR, linestyle=":", label="at initialisation")
    _legend_below(figure, [*_run_handles(runs), initial])
    return figure


def metric_over_time(runs: Sequence[Run], key: str) -> Figure:
    """A metric averaged over layers against updates, a panel per projection; band = least to greatest layer.

    Dotted grey: the value at initialisation, or for alignments (undefined there) the level of chance.
    """
    figure, panels = _projection_panels(runs, sharey=key.endswith("_alignment"))
    is_alignment = key.endswith("_alignment")
    for name, ax in panels:
        for run, look in zip(runs, _looks(runs), strict=True):
            steps, values = run.grid(name, key)
            defined = ~np.isnan(values).all(axis=0)
            steps, values = steps[defined], values[:, defined]
            if not len(steps):
                continue
            ax.fill_between(
                steps,
                np.nanmin(values, axis=0),
                np.nanmax(values, axis=0),
                color=look["color"],
                alpha=0.15,
                linewidth=0,
            )
            ax.plot(steps, np.nanmean(values, axis=0), linewidth=1.8, **look)
            reference = np.nanmean(run.grid(name, f"{key}_chance")[1]) if is_alignment else np.nanmean(values[:, 0])
            ax.axhline(reference, color=REFERENCE_COLOR, linestyle=":", linewidth=1.2)
    if is_alignment:
        figure.axes[0].set_ylim(bottom=0)  # shared by all panels
    for ax in figure.axes[3:]:
        ax.set_xlabel("updates")
    for ax in figure.axes[::3]:
        ax.set_ylabel(key.replace("_", " "))
    figure.suptitle(f"{METRIC_TITLES[key]}\nmean over layers, band from the lowest to the highest layer")
    words = "chance: two random subspaces" if is_alignment else "at initialisation"
    reference_handle = Line2D([], [], color=REFERENCE_COLOR, linestyle=":", label=words)
    _legend_below(figure, [*_run_handles(runs), reference_handle])
    return figure


def metric_heatmap(runs: Sequence[Run], key: str) -> Figure:
    """Layer x update heatmaps, a row per run and a column per projection; one colour scale per column.

    The tick on each colour bar is the value at initialisation (alignment: the level of chance).
    """
    names = runs[0].projections()
    figure, axes = plt.subplots(
        len(runs), len(names), figsize=(12, 1.4 + 1.7 * len(runs)), sharex=True, sharey=True, squeeze=False
    )
    is_alignment = key.endswith("_alignment")
    for column, name in enumerate(names):
        grids = [run.grid(name, key) for run in runs]
        defined = [values[~np.isnan(values)] for _, values in grids]
        if not any(map(len, defined)):
            continue
        if is_alignment:
            marks = [np.nanmean(runs[0].grid(name, f"{key}_chance")[1])]
        else:
            marks = [np.nanmean(values[:, 0]) for _, values in grids[:1]]
        low = min(*(v.min() for v in defined if len(v)), *marks)
        high = max(*(v.max() for v in defined if len(v)), *marks)
        for row, (steps, values) in enumerate(grids):
            ax = axes[row, column]
            mesh = ax.pcolormesh(
                steps, np.arange(len(values)), values, vmin=low, vmax=high, cmap=HEATMAP_COLORS, shading="nearest"
            )
            ax.grid(False)
            ax.set_yticks(np.unique(np.linspace(0, len(values) - 1, min(len(values), 5)).round()))
        axes[0, column].set_title(PROJECTION_TITLES[name])
        axes[-1, column].set_xlabel("updates")
        bar = figure.colorbar(mesh, ax=axes[:, column], location="bottom", aspect=12, shrink=0.95)
        bar.ax.tick_params(labelsize=8)
        bar.locator = MaxNLocator(3)
        bar.update_ticks()
        for mark in marks:
            bar.ax.axvline(mark, color="white", linewidth=3.0)
            bar.ax.axvline(mark, color="black", linewidth=1.4)
    for row, label in enumerate(labels(runs)):
        axes[row, 0].set_ylabel(f"{label}\nlayer")
    mark_words = "chance" if is_alignment else "the value at initialisation"
    figure.suptitle(f"{METRIC_TITLES[key]}\ncolour shared down each column; line on each bar: {mark_words}")
    return figure


def singular_value_spectrum(runs: Sequence[Run], layer: int | None = None) -> Figure:
    """All singular values of one layer (default: the middle one), at initialisation and at the last event."""
    layer = 1 + max(line["layer"] for line in runs[0].spectra) >> 1 if layer is None else layer
    figure, panels = _projection_panels(runs, sharey=False)
    for name, ax in panels:
        for run, look in zip(runs, _looks(runs), strict=True):
            _, values = run.singular_values(name, layer)
            index = np.arange(1, values.shape[1] + 1)
            ax.plot(index, values[-1], linewidth=1.8, **look)
            ax.plot(index, values[0], color=REFERENCE_COLOR, linestyle=":", linewidth=1.2)
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if np.ptp(np.log10(ax.get_ylim())) < 2 else (1.0,)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    for ax in figure.axes[3:]:
        ax.set_xlabel("index of the singular value")
    for ax in figure.axes[::3]:
        ax.set_ylabel("singular value")
    figure.suptitle(f"Singular values of layer {layer}, at the last event")
    initial = Line2D([], [], color=REFERENCE_COLOR, linestyle=":", label="at initialisation")
    _legend_below(figure, [*_run_handles(runs), initial])
    return figure
