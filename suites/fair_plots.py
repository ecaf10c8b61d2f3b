"""Figures of a fair fight: the best loss after k trials, every setting against the loss, and the fight itself.

plots.save(tuning_curves(trials), folder, "fair-trials_tuning")
"""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, MaxNLocator

from analysis.plots import OPTIMIZER_COLORS, WIDTH, captioned, legend_below
from suites.arms import EDGE, Axis, value_of
from suites.fair import EQUAL_TIME, EQUAL_TOKENS
from suites.results import Outcome, Results
from suites.tuning import band, by_arm, effects, expected_best, tried

# Okabe-Ito again, then Tol's muted ones.
MORE_COLORS = (
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#999933",
    "#000000",
    "#882255",
    "#44AA99",
    "#661100",
    "#888888",
)


def arm_colors(arms: Sequence[str]) -> dict[str, str]:
    others = [arm for arm in arms if arm not in OPTIMIZER_COLORS]
    more = {arm: MORE_COLORS[i % len(MORE_COLORS)] for i, arm in enumerate(others)}
    return {arm: OPTIMIZER_COLORS.get(arm) or more[arm] for arm in arms}


def _handles(colors: dict[str, str]) -> list[Line2D]:
    return [Line2D([], [], color=color, linewidth=2, label=arm) for arm, color in colors.items()]


@captioned(
    "The best loss to expect after k trials",
    "Lower is better, and flatter is easier to tune. The line is exact: the mean, over all choices of k of the trials, "
    "of the least loss. The band is a 95 % bootstrap over trials, which cannot fall below the best of them: at the "
    "right end it is too narrow. A diverged trial counts as the worst of all.",
)
def tuning_curves(results: Results) -> Figure:
    """Expected least loss of k trials, by arm."""
    figure, ax = plt.subplots(figsize=(WIDTH, 4.2))
    colors, lowest, typical = arm_colors(results.arms()), math.inf, -math.inf
    trials = by_arm(results)
    for arm, own in trials.items():
        curve, (low, high), k = expected_best(own), band(own), np.arange(1, len(own) + 1)
        ax.plot(k, curve, color=colors[arm], linewidth=2, marker="o", markersize=3)
        ax.fill_between(k, low, high, color=colors[arm], alpha=0.18, linewidth=0)
        lowest, typical = min(lowest, low.min()), max(typical, curve[0])
    ax.set_ylim(lowest - 0.05 * (typical - lowest), typical + 0.1 * (typical - lowest))
    ax.set_xscale("log", base=2)
    most = max(map(len, trials.values()))
    ax.xaxis.set_major_locator(FixedLocator([*(2**i for i in range(int(math.log2(most)) + 1)), most]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda k, _: f"{k:g}"))
    ax.set_xlabel("trials")
    ax.set_ylabel("best final loss to expect (nats per token)")
    legend_below(figure, _handles(colors))
    return figure


@captioned(
    "What each setting does to the loss",
    "A dot is a trial, all other settings varying with it; a star is the arm's best, a cross at the top a diverged "
    "one, a triangle one above the panel. Grey marks the ends of the search space: a star there may be chance, and "
    "asks for a wider space where the table says ON THE EDGE. Titles: Spearman's rank correlation; the median loss of "
    "the worst third of the values minus that of the best, and what noise alone gives.",
)
def setting_effects(results: Results) -> Figure:
    """Final loss against every tuned setting, a row for each arm."""
    arms = results.arms()
    columns, found = max(len(results.space(arm)) for arm in arms), effects(results)
    figure, axes = plt.subplots(len(arms), columns, figsize=(1.25 * WIDTH, 2.6 * len(arms)), squeeze=False, sharey=True)
    finite = [o.loss for o in results.outcomes if math.isfinite(o.loss)]
    least, top = min(finite), float(np.quantile(finite, 0.85))
    span = max(top - least, 1e-3)
    for arm, row in zip(arms, axes, strict=True):
        shown = tried(results, arm)
        for ax, (setting, axis) in zip(row, results.space(arm).items(), strict=False):
            _panel(ax, shown, results.best(arm), setting, axis, least + 1.12 * span, arm_colors(arms)[arm])
            own = found.get((arm, setting))
            words = "" if own is None else f"\nρ = {own.rho:+.2f}\n{own.nats:.2f} nats, noise {own.noise:.2f}"
            ax.set_title(setting + words)
        for ax in row[len(results.space(arm)) :]:
            ax.set_visible(False)
        row[0].set_ylabel(f"{arm}\nfinal loss (nats)")
    axes[0, 0].set_ylim(least - 0.08 * span, least + 1.2 * span)
    return figure


def _panel(
    ax: plt.Axes, shown: Sequence[Outcome], best: Outcome | None, setting: str, axis: Axis, top: float, color: str
) -> None:
    for outcome in shown:
        x, loss = axis.place(value_of(outcome.condition.fields, setting)), outcome.loss
        marker = "x" if math.isnan(loss) else "^" if loss > top else "*" if outcome is best else "o"
        size = 11 if outcome is best else 4
        edge = {"markeredgecolor": "black", "zorder": 3} if outcome is best else {"alpha": 0.7}
        ax.plot(x, top if marker in "x^" else loss, marker, color=color, markersize=size, **edge)
    for low, high in ((0, EDGE), (1 - EDGE, 1)):
        ax.axvspan(low, high, color="#dddddd", linewidth=0, zorder=0)
    ax.set_xlim(-0.03, 1.03)
    ax.set_xticks((0, 0.5, 1), [_words(axis, place) for place in (0, 0.5, 1)], fontsize=8)


def _words(axis: Axis, place: float) -> str:
    value = axis.value(place)
    return f"{value:.3g}" if axis.along == "log of 1 - value" else f"{value:.2g}"


@captioned(
    "The fight: equal tokens, and equal time",
    "Lower and further left is better. Thin lines are runs, thick ones their mean. Left: every arm trains on the same "
    "tokens; where a line crosses the dashed one it has the reference's mean final loss (the table compares seed by "
    "seed). Right: every schedule ends when the slowest arm's time is over. Only the lower losses are shown.",
)
def fight_curves(results: Results) -> Figure:
    """Validation loss over tokens and over training seconds."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 4.2), sharey=True)
    colors = arm_colors(results.arms())
    finals = [loss for outcome in results.outcomes for loss in outcome.losses().values()]
    starts = [float(run.val["val_loss"][0]) for o in results.outcomes for run in o.finished()]
    for ax, way, column in ((axes[0], EQUAL_TOKENS, "tokens"), (axes[1], EQUAL_TIME, "train_seconds")):
        for arm, color in colors.items():
            outcome = results.outcome(f"{arm}, {way}")
            runs = outcome.finished() if outcome is not None else []
            for run in runs:
                ax.plot(run.val[column], run.val["val_loss"], color=color, alpha=0.35, linewidth=0.8)
            if runs and len({len(run.val["step"]) for run in runs}) == 1:
                x, y = (np.mean([run.val[key] for run in runs], axis=0) for key in (column, "val_loss"))
                ax.plot(x, y, color=color, linewidth=2)
        ax.set_title(way)
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(MaxNLocator(5))
    handles, reference = _handles(colors), results.outcome(f"{results.arms()[0]}, {EQUAL_TOKENS}")
    if reference is not None and math.isfinite(reference.loss):
        dashed = {"color": "#555555", "linewidth": 1, "linestyle": (0, (4, 3))}
        axes[0].axhline(reference.loss, **dashed)
        handles.append(Line2D([], [], **dashed, label=f"{reference.arm}'s mean final loss, {reference.loss:.3f}"))
    low = min(finals)
    axes[0].set_ylim(low - 0.03 * (max(starts) - low), low + 0.45 * (max(starts) - low))
    axes[0].set_ylabel("validation loss (nats per token)")
    axes[0].set_xlabel("training tokens")
    axes[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[1].set_xlabel("training time (s)")
    legend_below(figure, handles)
    return figure
