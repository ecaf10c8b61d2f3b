"""Figures of one layer: loaded runs that have logged spectra -> a Matplotlib figure.

    figure = singular_value_fan(runs, layer=2); plots.save(figure, Path("plots"), "singular_value_fan")

The default is the middle layer; the style is that of plots.py, axes and titles those of plots_spectra.py.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.plots import REFERENCE_COLOR, captioned, group_handles, legend_below, line_styles
from analysis.plots_spectra import (
    ORDER_COLORS,
    PROJECTION_LOOKS,
    PROJECTION_TITLES,
    initial_handle,
    log_axis,
    projection_panels,
    run_panels,
)
from analysis.runs import Run, group_seeds


def _largest_to_smallest(values: np.ndarray) -> tuple[float, float]:
    """Limits of a log axis: a value under a thousandth of the largest would only stretch it."""
    positive = values[values > 0]
    if not len(positive):
        return 0.1, 1.0
    return float(max(positive.min(), positive.max() / 1e3) / 1.15), float(positive.max() * 1.15)


def middle_layer(run: Run) -> int:
    return run.layers // 2


@captioned(
    "Singular values while training",
    "Every singular value of one layer is a line. A fan that opens upwards grows a few strong directions; lines "
    "that dive have lost directions.",
)
def singular_value_fan(runs: Sequence[Run], layer: int | None = None) -> Figure:
    """Every singular value of one layer (default: the middle one) against steps: a fan, largest dark, smallest light.

    A row per run, one log scale down each column; values under a thousandth of the largest fall off the panel.
    """
    layer = middle_layer(runs[0]) if layer is None else layer
    names = runs[0].projections()
    titles = [PROJECTION_TITLES[name] for name in names]
    figure, axes = run_panels(runs, titles, "singular value", sharex="row", sharey="col")
    for column, name in enumerate(names):
        spectra = [run.singular_values(name, layer) for run in runs]
        limits = _largest_to_smallest(np.concatenate([values.ravel() for _, values in spectra]))
        for row, (steps, values) in enumerate(spectra):
            ax = axes[row, column]
            lines = [np.column_stack([steps, trace]) for trace in np.maximum(values, 1e-12).T]
            order = np.linspace(0, 1, len(lines))
            ax.add_collection(LineCollection(lines, array=order, cmap=ORDER_COLORS, linewidth=0.6, rasterized=True))
            ax.set_xlim(steps.min(), max(steps.max(), steps.min() + 1))
            ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes[0, column].set_ylim(*limits)
        log_axis(axes[0, column])
        axes[0, column].set_ylim(*limits)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), ORDER_COLORS), ax=axes, aspect=30, pad=0.01)
    bar.set_ticks([0, 1], labels=["largest", "smallest"])
    bar.ax.invert_yaxis()
    figure.suptitle(f"All singular values of layer {layer} while it trains, one log scale down each column")
    return figure


@captioned(
    "Singular values at the end",
    "Every singular value of one layer, largest first, against the initial ones. A flat line is an orthogonal matrix.",
)
def singular_value_spectrum(runs: Sequence[Run], layer: int | None = None) -> Figure:
    """All singular values of one layer (default: the middle one) by index, at initialisation and at the last event."""
    layer = middle_layer(runs[0]) if layer is None else layer
    groups = group_seeds(runs)
    words = "index of the singular value", "singular value"
    figure, panels = projection_panels(runs[0].projections(), *words, sharex=False)
    for name, ax in panels:
        drawn = []
        for group, style in zip(groups, line_styles(groups), strict=True):
            spectra = [run.singular_values(name, layer)[1] for run in group.pool()]
            spectra = [values for values in spectra if len(values)]
            if not spectra:
                continue
            last, first = (np.mean([values[i] for values in spectra], axis=0) for i in (-1, 0))
            index = np.arange(1, len(last) + 1)
            ax.plot(index, first, color=REFERENCE_COLOR, linestyle=":", linewidth=1.2)
            ax.plot(index, last, **style.line())
            drawn += [first, last]
        ax.set_ylim(*_largest_to_smallest(np.concatenate(drawn)) if drawn else (0.1, 1))
        limits = ax.get_ylim()
        log_axis(ax)
        ax.set_ylim(limits)
    figure.suptitle(f"Singular values of layer {layer}, at the last event")
    legend_below(figure, [*group_handles(groups), initial_handle()])
    return figure


MRI_PANELS = (
    ("spectral_norm", "spectral norm"),
    ("spectral_entropy", "spectral entropy"),
    ("effective_rank", "effective rank\n/ smaller side"),
    ("stable_rank", "stable rank"),
    ("left_alignment", "alignment − chance\n(output directions)"),
    ("update_norm", "update norm\n/ weight norm"),
)


@captioned(
    "MRI of one layer",
    "The projections of one layer through training. Alignment is shown as its distance from chance; the update "
    "norm as a share of the weight norm, the relative change of one step.",
)
def layer_mri(runs: Sequence[Run], layer: int | None = None) -> Figure:
    """One layer (default: the middle one) over training: six metrics, a line per projection, a row per run."""
    layer = middle_layer(runs[0]) if layer is None else layer
    names = runs[0].projections()
    figure, axes = run_panels(runs, [words for _, words in MRI_PANELS], "", sharex="row", sharey="col")
    for row, run in enumerate(runs):
        for column, (key, _) in enumerate(MRI_PANELS):
            ax = axes[row, column]
            for name in names:
                steps, values = run.grid(name, key)
                if layer >= len(values):
                    continue
                line = values[layer]
                if key == "effective_rank":
                    line = line / run.full_rank(name)
                elif key == "left_alignment":
                    line = line - run.grid(name, "left_alignment_chance")[1][layer]
                elif key == "update_norm":
                    line = line / run.grid(name, "weight_norm")[1][layer]
                ax.plot(steps, line, linewidth=1.5, label=PROJECTION_TITLES[name], **PROJECTION_LOOKS[name])
            if key == "left_alignment":
                ax.axhline(0, color=REFERENCE_COLOR, linestyle=":", linewidth=1.2)
            if key == "update_norm" and any(np.nanmax(line.get_ydata(), initial=0) > 0 for line in ax.lines):
                log_axis(ax)
            ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    figure.suptitle(f"MRI of layer {layer}: its projections while it trains")
    handles = [Line2D([], [], linewidth=1.8, label=PROJECTION_TITLES[n], **PROJECTION_LOOKS[n]) for n in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names))
    return figure
