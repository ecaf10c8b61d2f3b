"""Figures of a fair fight: the best loss after k trials, every setting against the loss, two together, and the fight.

plots.save(tuning_curves(trials), folder, "fair-trials_tuning")
"""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, MaxNLocator

from analysis.plots import OPTIMIZER_COLORS, WIDTH, captioned, legend_below
from analysis.runs import optimizer_name
from analysis.stats import p_words
from suites.arms import Axis, value_of
from suites.fair import EQUAL_TIME, EQUAL_TOKENS
from suites.results import Outcome, Results
from suites.tuning import OUTER, band, by_arm, effects, expected_best, powers, tried

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

WORDS = {
    "lr": "rate of the matrices",
    "adamw_lr": "rate of the rest",
    "weight_decay": "weight decay",
    "warmup": "warm-up share",
    "beta1": "β₁",
    "beta2": "β₂",
}  # settings as the figures call them; others as they are
PLANE = ("lr", "weight_decay")
DASHED = {"color": "#555555", "linewidth": 1, "linestyle": (0, (4, 3))}


def arm_colors(arms: Sequence[str]) -> dict[str, str]:
    others = [arm for arm in arms if arm not in OPTIMIZER_COLORS]
    more = {arm: MORE_COLORS[i % len(MORE_COLORS)] for i, arm in enumerate(others)}
    return {arm: OPTIMIZER_COLORS.get(arm) or more[arm] for arm in arms}


def _handles(colors: dict[str, str]) -> list[Line2D]:
    return [Line2D([], [], color=color, linewidth=2, label=optimizer_name(arm)) for arm, color in colors.items()]


@captioned(
    "The best loss to expect after k trials",
    "Lower is better, and flatter is easier to tune. The line is exact: the mean, over all choices of k of the trials, "
    "of the least loss. The band is a 95 % bootstrap over trials; it ends at half of them, since no draw is better "
    "than the best trial there was. A diverged trial counts as the worst of all.",
)
def tuning_curves(results: Results) -> Figure:
    """Expected least loss of k trials, by arm."""
    figure, ax = plt.subplots(figsize=(WIDTH, 4.2))
    colors, trials, shown = arm_colors(results.arms()), by_arm(results), []
    for arm, own in trials.items():
        curve, (low, high), k = expected_best(own), band(own), np.arange(1, len(own) + 1)
        ax.plot(k, curve, color=colors[arm], linewidth=2, marker="o", markersize=3)
        ax.fill_between(k[: len(low)], low, high, color=colors[arm], alpha=0.18, linewidth=0)
        shown += [*curve, *low, *high]
    span = max(shown) - min(shown)
    ax.set_ylim(min(shown) - 0.05 * span, max(shown) + 0.05 * span)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(powers(max(map(len, trials.values())))))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda k, _: f"{k:g}"))
    ax.set_xlabel("trials")
    ax.set_ylabel("best final loss to expect (nats per token)")
    legend_below(figure, _handles(colors))
    return figure


@captioned(
    "What each setting does to the loss",
    "A dot is a trial, all other settings varying with it. Grey marks the outer 15 % of the search space: a star there "
    "asks for a wider space if the loss falls significantly towards that end, which the table calls ON THE EDGE. ρ is "
    "Spearman's rank correlation, p its significance, corrected over all panels. The matrices are those of the blocks; "
    "AdamW trains the rest in every arm of ours.",
)
def setting_effects(results: Results) -> Figure:
    """Final loss against every tuned setting, a row for each arm."""
    arms = results.arms()
    columns, found = max(len(results.space(arm)) for arm in arms), effects(results)
    figure, axes = plt.subplots(len(arms), columns, figsize=(1.25 * WIDTH, 2.5 * len(arms)), squeeze=False, sharey=True)
    finite = [o.loss for o in results.outcomes if math.isfinite(o.loss)]
    least, span = min(finite), max(max(finite) - min(finite), 1e-3)
    for arm, row in zip(arms, axes, strict=True):
        shown = tried(results, arm)
        for ax, (setting, axis) in zip(row, results.space(arm).items(), strict=False):
            _setting_panel(ax, results, shown, setting, axis, max(finite) + 0.08 * span)
            ax.set_ylim(least - 0.08 * span, max(finite) + 0.16 * span)
            title = WORDS.get(setting, setting)
            if (arm, setting) in found:
                one = found[arm, setting]
                title += f"\nρ = {one.rho:+.2f}, {p_words(one.p_holm)}"
            ax.set_title(title, fontsize=10)
        row[0].set_ylabel(f"{optimizer_name(arm)}\nfinal loss (nats)")
        for ax in row[len(results.space(arm)) :]:
            ax.set_visible(False)
    legend_below(figure, _trial_handles(any(o.failed and not o.lost for o in results.outcomes)))
    return figure


def _trial_handles(diverged: bool) -> list[Line2D]:
    marks = [
        ("o", 5, "a trial"),
        ("*", 11, "the arm's best"),
        *([("x", 6, "diverged, drawn at the top")] if diverged else []),
    ]
    style = {"color": "#555555", "linestyle": "none"}
    return [Line2D([], [], marker=marker, markersize=size, label=words, **style) for marker, size, words in marks]


def _setting_panel(
    ax: plt.Axes, results: Results, shown: Sequence[Outcome], setting: str, axis: Axis, top: float
) -> None:
    best = results.best(shown[0].arm) if shown else None
    color = arm_colors(results.arms())[shown[0].arm] if shown else ""
    for outcome in shown:
        x, loss = axis.place(value_of(outcome.condition.fields, setting)), outcome.loss
        marker = "x" if math.isnan(loss) else "*" if outcome is best else "o"
        size = 11 if outcome is best else 4
        edge = {"markeredgecolor": "black", "zorder": 3} if outcome is best else {"alpha": 0.7}
        ax.plot(x, top if marker == "x" else loss, marker, color=color, markersize=size, **edge)
    for low, high in ((0, OUTER), (1 - OUTER, 1)):
        ax.axvspan(low, high, color="#e8e8e8", linewidth=0, zorder=0)
    ax.set_xlim(-0.03, 1.03)
    ax.set_xticks((0, 0.5, 1), [_words(axis, place) for place in (0, 0.5, 1)], fontsize=8)


@captioned(
    "Two settings together",
    "Each dot is a trial in the plane of the matrices' rate and of weight decay, darker where its loss is lower; a "
    "star is the arm's best, a cross a diverged trial. Dark dots along a diagonal would say that the two must be tuned "
    "together, which the panels of single settings cannot show.",
)
def trial_planes(results: Results) -> Figure:
    """Trials by rate and decay, coloured by loss, a panel for each arm that tunes both."""
    arms = [arm for arm in results.arms() if set(PLANE) <= results.space(arm).keys() and tried(results, arm)]
    figure, axes = plt.subplots(1, max(1, len(arms)), figsize=(WIDTH, 4.2), squeeze=False)
    finite = [o.loss for o in results.outcomes if math.isfinite(o.loss)]
    colors = {"cmap": "viridis", "norm": Normalize(min(finite), max(finite))}
    for arm, ax in zip(arms, axes[0], strict=False):
        best = results.best(arm)
        for outcome in tried(results, arm):
            x, y = (value_of(outcome.condition.fields, setting) for setting in PLANE)
            if math.isnan(outcome.loss):
                ax.plot(x, y, "x", color="#888888")
                continue
            style = {"marker": "*", "s": 220, "zorder": 3} if outcome is best else {"s": 45}
            ax.scatter(x, y, c=[outcome.loss], edgecolors="black", linewidths=0.5, **style, **colors)
        for setting, side, scale in zip(PLANE, (ax.xaxis, ax.yaxis), (ax.set_xscale, ax.set_yscale), strict=True):
            axis = results.space(arm)[setting]
            scale("log" if axis.along == "log" else "linear")
            side.set_ticks([axis.value(place) for place in (0, 0.5, 1)])
            side.set_ticks([], minor=True)
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
        ax.set_title(optimizer_name(arm))
        ax.set_xlabel(WORDS[PLANE[0]])
    axes[0, 0].set_ylabel(WORDS[PLANE[1]])
    figure.colorbar(plt.cm.ScalarMappable(**colors), ax=list(axes[0]), label="final loss (nats per token)")
    return figure


def _words(axis: Axis, place: float) -> str:
    value = axis.value(place)
    return f"{value:.3g}" if axis.along == "log of 1 - value" else f"{value:.2g}"


@captioned(
    "The fight: equal tokens, and equal time",
    "Lower and further left is better. Thin lines are runs, thick ones their mean, ending at the mean of the arm's "
    "tokens or seconds. Left: every arm trains on the same tokens; where a line crosses the dashed one it has the "
    "reference's mean final loss (the table compares seed by seed). Right: every schedule was planned to end at the "
    "same time; the labels say when it did. Dashed: the reference's mean final loss in that panel. Only the lower "
    "losses are shown.",
)
def fight_curves(results: Results) -> Figure:
    """Validation loss over tokens and over training seconds."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 4.2), sharey=True)
    colors, reference = arm_colors(results.arms()), results.arms()[0]
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
                ax.plot(x, y, color=color, linewidth=2, marker="o", markevery=[-1], markersize=5)
                if way == EQUAL_TIME:
                    up = 1 if arm == reference else -1
                    place = {"xytext": (4, 9 * up), "textcoords": "offset points", "ha": "center"}
                    ax.annotate(
                        f"{x[-1]:.1f} s", (x[-1], y[-1]), color=color, va="bottom" if up > 0 else "top", **place
                    )
            if arm == reference and runs and math.isfinite(outcome.loss):
                ax.axhline(outcome.loss, **DASHED)
        ax.set_title(way)
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(MaxNLocator(5))
    low = min(finals)
    axes[0].set_ylim(low - 0.05 * (max(starts) - low), low + 0.45 * (max(starts) - low))
    axes[0].set_ylabel("validation loss (nats per token)")
    axes[0].set_xlabel("training tokens")
    axes[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[1].set_xlabel("training time (s)")
    legend_below(
        figure, [*_handles(colors), Line2D([], [], **DASHED, label=f"{optimizer_name(reference)}'s mean final loss")]
    )
    return figure
