"""Figures of a suite: its conditions side by side, and how long each took to a loss.

plots.save(condition_bars(results), folder, "moe-momentum_bars")
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from analysis.plots import LINE_STYLES, WIDTH, bits_axis, captioned, legend_below, optimizer_color
from analysis.runs import condition_name, optimizer_name
from analysis.stats import first_reaching, median_time, t_interval
from suites.results import Outcome, Results


@captioned(
    "Final loss of every condition",
    "Dots are runs, diamonds means, whiskers 95 % t-intervals of each condition by itself. A dashed line is the mean "
    "of the reference, drawn in the rows that are tested against it, seed by seed. Bold: significantly lower (↓) or "
    "higher (↑) than it, the corrected interval of the difference excludes zero.",
)
def condition_bars(results: Results) -> Figure:
    """Final loss of every condition, in the plan's order."""
    shown = [outcome for outcome in results.outcomes if outcome.losses()]
    apart = {test.name_a: "↓" if test.difference < 0 else "↑" for test in results.tests() if test.excludes_zero}
    references = {outcome.condition.versus for outcome in shown}
    figure, ax = plt.subplots(figsize=(WIDTH, 1.6 + 0.34 * len(shown)))
    seen = [loss for outcome in shown for loss in outcome.losses().values()]
    for place, outcome in enumerate(shown):
        color = optimizer_color(outcome.optimizer)
        losses = list(outcome.losses().values())
        mean, low, high = t_interval(losses)
        ax.plot(losses, [place] * len(losses), "o", color=color, alpha=0.45, markersize=4.5)
        ax.plot(mean, place, "D", color=color, markersize=6)
        if np.isfinite(low):
            ax.errorbar(mean, place, xerr=high - mean, color=color, capsize=3, linewidth=1.3)
            seen += [low, high]
        rows = [row for row, other in enumerate(shown) if other.condition.versus == outcome.name]
        for row in (place, *rows) if rows else ():
            ends = row - 0.5, row + 0.5
            ax.plot([mean, mean], ends, color=color, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    most = max(len(outcome.losses()) for outcome in shown)
    ax.set_yticks(range(len(shown)), [_label(outcome, references, most, apart) for outcome in shown])
    for tick, outcome in zip(ax.get_yticklabels(), shown, strict=True):
        tick.set_fontweight("bold" if outcome.name in apart else "normal")
    ax.invert_yaxis()
    ax.set_ylim(len(shown) - 0.4, -0.6)
    pad = 0.05 * max(max(seen) - min(seen), 0.01)
    ax.set_xlim(min(seen) - pad, max(seen) + pad)
    ax.set_xlabel("final validation loss (nats per token): runs, mean, 95 % interval")
    bits_axis(ax, [run for outcome in shown for run in outcome.finished()], "top")
    figure.suptitle(results.suite.question)
    return figure


def _label(outcome: Outcome, references: set[str | None], most: int, apart: Mapping[str, str]) -> str:
    words = condition_name(outcome.name, outcome.optimizer) + (" (reference)" if outcome.name in references else "")
    words += f" (n = {len(outcome.losses())})" if len(outcome.losses()) < most else ""
    words += f", {outcome.failed} failed" if outcome.failed else ""
    return f"{words} {apart.get(outcome.name, '')}".rstrip()


@captioned(
    "Time to each loss",
    "Lower and further left is better. A thin line is a run; a thick one the median over runs, drawn where at least "
    "half of them reach that loss: a run that never does counts as censored, not as missing. Level and dashed: "
    "the mean final loss to reach.",
)
def time_to_loss(results: Results, compared: Sequence[Outcome], b: Outcome, named: bool = False) -> Figure:
    """Training tokens and seconds to each validation loss, of conditions compared with b; `named` by condition, else by
    optimizer."""
    shown, styles = (*compared, b), {}
    for o in shown:
        style = LINE_STYLES[sum(other.optimizer == o.optimizer for other in shown[: len(styles)]) % len(LINE_STYLES)]
        label = condition_name(o.name, o.optimizer) if named else optimizer_name(o.optimizer)
        styles[o.name] = {"color": optimizer_color(o.optimizer), "linestyle": style, "label": label}
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.7), sharey=True)
    runs = [run for outcome in shown for run in outcome.finished()]
    highest = min(float(np.min(run.val["val_loss"][:2])) for run in runs)  # no run has it at its start
    lowest = [float(np.min(run.val["val_loss"])) for run in runs]
    levels = {*np.linspace(highest, min(lowest), 60), *lowest, *(o.loss for o in shown)}
    targets = np.array(sorted((level for level in levels if level <= highest), reverse=True))
    for ax, column, words in zip(
        axes, ("tokens", "train_seconds"), ("training tokens", "training time (s)"), strict=True
    ):
        for outcome in shown:
            color = styles[outcome.name]["color"]
            runs = outcome.finished()
            times = [[first_reaching(run.val[column], run.val["val_loss"], t) for run in runs] for t in targets]
            for run_times in zip(*times, strict=True):
                ax.plot(
                    [np.nan if t is None else t for t in run_times], targets, color=color, alpha=0.35, linewidth=0.8
                )
            medians = [median_time(row).median for row in times]
            ax.plot([np.nan if m is None else m for m in medians], targets, linewidth=2, **styles[outcome.name])
        ax.axhline(b.loss, color="#555555", linewidth=1, linestyle=(0, (4, 3)))
        ax.set_xlabel(words)
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(MaxNLocator(5))
    axes[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[0].set_ylabel("validation loss reached (nats per token)")
    bits_axis(axes[1], [run for outcome in shown for run in outcome.finished()])
    handles = [Line2D([], [], linewidth=2, **style) for style in styles.values()]
    target = f"{optimizer_name(b.optimizer)}'s mean final loss, {b.loss:.3f}"
    handles.append(Line2D([], [], color="#555555", linewidth=1, linestyle=(0, (4, 3)), label=target))
    legend_below(figure, handles)
    return figure
