"""Figures of what the optimizers make their updates of: loaded runs that have logged it -> a Matplotlib figure.

    figure = momentum_spectra(with_momentum(runs)); plots.save(figure, Path("plots"), "momentum_spectra")

Muon's update is flat by construction; its momentum, which Newton-Schulz flattens, is not. For AdamW it is the first
moment. The style is that of plots.py, axes and titles those of plots_spectra.py.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.plots import (
    REFERENCE_COLOR,
    captioned,
    group_handles,
    group_labels,
    legend_below,
    line_styles,
    whole_steps,
)
from analysis.plots_spectra import (
    ORDER_COLORS,
    PROJECTION_LOOKS,
    PROJECTION_TITLES,
    group_grid,
    log_axis,
    mean_and_band,
    run_panels,
    with_logged,
)
from analysis.runs import MOMENTUM, Run, group_seeds

RESIDUAL = "ns_residual"
BELOW_REACH = 30  # how far below the reach a panel shows values: they span many decades, and are all lost alike


def with_momentum(runs: Sequence[Run]) -> list[Run]:
    """Those of the runs that have logged momentum at an event."""
    return with_logged(runs, MOMENTUM)


@captioned(
    "What Newton-Schulz is fed",
    "The singular values of the momentum (for AdamW: its first moment) at the last event, a line for each layer, as "
    "shares of the Frobenius norm. The run's Newton-Schulz iterations bring a value above the dashed line to 0.5 or "
    "more, where 1 is the aim; directions below it stay small in the update. The steeper a line falls, the more Muon's "
    "update differs from the momentum.",
)
def momentum_spectra(runs: Sequence[Run]) -> Figure:
    """Singular values of the momentum over its Frobenius norm, a row per run, a line per layer, dark to light; dashed
    the least that the run's Newton-Schulz iterations reach (under AdamW: would reach)."""
    names = runs[0].projections()
    titles = [PROJECTION_TITLES[name] for name in names]
    figure, axes = run_panels(runs, titles, "share of the norm", "index", 1.7, sharex="col", sharey=True)
    colors, reaches, lowest = ORDER_COLORS(np.linspace(0, 1, max(2, runs[0].layers))), [], 1.0
    for row, run in enumerate(runs):
        for column, name in enumerate(names):
            ax = axes[row, column]
            ranges = run.grid(name, "momentum_range")[1]
            for reach in ranges[np.isfinite(ranges)][-1:]:  # none where the momentum is not iterated as a whole
                reaches.append(reach)
                ax.axhline(reach, color=REFERENCE_COLOR, linestyle="--", linewidth=1.2)
            for layer in range(run.layers):
                _, values = run.singular_values(name, layer, MOMENTUM)
                s = values[-1] / np.linalg.norm(values[-1])
                lowest = min(lowest, s[s > 0].min(initial=1.0))
                ax.plot(np.arange(1, len(s) + 1), np.where(s > 0, s, np.nan), color=colors[layer], linewidth=1.2)
            ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes[0, 0].set_ylim(max(lowest / 1.5, min(reaches, default=0.0) / BELOW_REACH), 1.0)
    log_axis(axes[0, 0])
    dashed = Line2D([], [], color=REFERENCE_COLOR, linestyle="--", label="least value that Newton-Schulz reaches")
    handles = [dashed] if reaches else []
    ends = ((0, "first layer"), (runs[0].layers - 1, "last layer"))
    handles += [Line2D([], [], color=colors[layer], label=words) for layer, words in ends]
    figure.suptitle("Singular values of the momentum at the last event, as shares of its Frobenius norm")
    legend_below(figure, handles)
    return figure


@captioned(
    "Momentum over time",
    "Above the stable rank of the momentum (for AdamW: its first moment), the number of directions that share most of "
    "its energy: the smaller it is, the more Newton-Schulz changes. Below the share of its singular values that the "
    "run's Newton-Schulz iterations bring to less than 0.5, where 1 is the aim; for AdamW, that they would.",
)
def momentum_over_time(runs: Sequence[Run]) -> Figure:
    """Stable rank of the momentum and the share of its singular values below the reach of Newton-Schulz, against steps.

    A column per projection; mean over layers, band from the lowest to the highest layer.
    """
    names, groups = runs[0].projections(), group_seeds(runs)
    figure, axes = plt.subplots(2, len(names), figsize=(12, 5.8), sharex=True, sharey="row", squeeze=False)
    for column, name in enumerate(names):
        for group, style in zip(groups, line_styles(groups), strict=True):
            mean_and_band(axes[0, column], *group_grid(group, name, "momentum_stable_rank"), style)
            steps, below = group_grid(group, name, "momentum_below_range")
            mean_and_band(axes[1, column], steps, 100 * below, style)
        axes[0, column].set_title(PROJECTION_TITLES[name])
        axes[1, column].set_xlabel("step")
        axes[1, column].xaxis.set_major_locator(MaxNLocator(3, integer=True))
    for ax, words in zip(axes[:, 0], ("stable rank", "singular values\nbelow the reach (%)"), strict=True):
        ax.set_ylim(bottom=0)
        ax.set_ylabel(words)
    figure.suptitle("Momentum, what updates are made of\nmean over layers, band from the lowest to the highest layer")
    legend_below(figure, group_handles(groups))
    return figure


@captioned(
    "What Newton-Schulz leaves over",
    "How far Muon's orthogonalised momentum O is from orthogonal: the Frobenius norm of O Oᵀ − I over the root of the "
    "smaller side, where 0 is exact and 1 is no update. Lines are means over layers and seeds. Directions of the "
    "momentum below the reach of the iterations raise it.",
)
def newton_schulz_residual(runs: Sequence[Run]) -> Figure:
    """The residual against steps, a line per projection, a panel per group; of runs that have logged it."""
    names, groups = runs[0].projections(), group_seeds(runs)
    size = (2.4 + 3.4 * len(groups), 3.4)
    figure, axes = plt.subplots(1, len(groups), figsize=size, sharey=True, squeeze=False)
    for ax, group, label in zip(axes[0], groups, group_labels(groups), strict=True):
        for name in names:
            steps, values = group_grid(group, name, RESIDUAL)
            defined = ~np.isnan(values).all(axis=0)
            mean = np.nanmean(values[:, defined], axis=0)
            ax.plot(steps[defined], mean, marker=".", label=PROJECTION_TITLES[name], **PROJECTION_LOOKS[name])
        ax.set_title(label)
        whole_steps(ax)
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].set_ylabel("residual of Newton-Schulz")
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
