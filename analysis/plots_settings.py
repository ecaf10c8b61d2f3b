"""Figures of settings: loaded runs -> a Matplotlib figure. Learning rates, every setting by its loss, model sizes.

    figure = ablation_bars(runs); plots.save(figure, Path("plots"), "ablation_bars")

The style is that of plots.py; a figure's caption is written above its function.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator
from scipy import stats as scipy_stats

from analysis.plots import WIDTH, Caption, bits_axis, captioned, group_labels, legend_below, optimizer_color
from analysis.runs import Group, Run, group_seeds, optimizer_name
from analysis.stats import largest_spike, learning_rate_tolerance, t_interval

PERPLEXITY = "perplexity, exp of the loss"
ARM_COLUMNS = 3


def _by_rate(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Groups of each optimizer that has been tried at two or more rates, by rising rate."""
    tried: dict[str, list[Group]] = {}
    for group in sorted(groups, key=lambda group: group.config.get("lr") or 0):
        if group.config.get("lr"):
            tried.setdefault(group.optimizer, []).append(group)
    return {name: members for name, members in tried.items() if len({g.config["lr"] for g in members}) > 1}


def has_rates(runs: Sequence[Run]) -> bool:
    return any(len({g.config["lr"] for g in members}) > 2 for members in _by_rate(group_seeds(runs)).values())


def _ticks_at(ax: plt.Axes, ticks: Sequence[float], words: Sequence[str]) -> None:
    """Labels at these values of a log axis; those too close to the one before are left out."""
    least = 0.045 * np.log(ticks[-1] / ticks[0])
    kept: list[int] = []
    for i, tick in enumerate(ticks):
        if not kept or np.log(tick / ticks[kept[-1]]) >= least:
            kept.append(i)
    ax.xaxis.set_major_locator(FixedLocator([ticks[i] for i in kept]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels([words[i] for i in kept], rotation=45, ha="right", rotation_mode="anchor")


@captioned(
    "Sensitivity to the learning rate",
    "The bars at the bottom of the first panel span the rates whose loss is at most 1 % (dark) and 5 % (light) above "
    "the best one: the wider, the easier to tune. Between grid points the loss is taken as linear in the logarithm of "
    "the rate. A best rate at the edge of its line means that the grid was too narrow. Crosses at the top edge are "
    "runs without a final loss. The last panel shows how far the training loss rose above its least value so far.",
)
def learning_rate_sensitivity(runs: Sequence[Run]) -> Figure:
    """Final loss, accuracy and perplexity against the learning rate, and the largest spike of the training loss.

    Where several groups share a rate, the line joins the means of the best and the others are dots. Bars at the bottom:
    the rates whose loss is at most 1 % (dark) and 5 % (light) above the best. Crosses at the top: runs that failed.
    """
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 6.6), sharex=True)
    panels: tuple[tuple[str, Callable[[Group], list[float]]], ...] = (
        ("final validation loss (nats per token)", lambda g: g.losses()),
        ("next-token accuracy (%)", lambda g: [100 * float(run.val["val_accuracy"][-1]) for run in g.samples()]),
        (PERPLEXITY, lambda g: [float(np.exp(loss)) for loss in g.losses()]),
        ("largest rise of training loss (nats)", lambda g: [largest_spike(run) for run in g.runs if run.train]),
    )
    handles = []
    for optimizer, members in _by_rate(group_seeds(runs)).items():
        color = optimizer_color(optimizer)
        best: dict[float, Group] = {}
        for group in members:
            held = best.get(group.config["lr"])
            if held is None or not held.loss <= group.loss:
                best[group.config["lr"]] = group
        label = optimizer_name(optimizer)
        for share, alpha in ((0.05, 0.3), (0.01, 0.9)):
            tolerance = learning_rate_tolerance(list(best), [group.loss for group in best.values()], share)
            if tolerance is None:
                continue
            at_bottom = {"transform": axes[0, 0].get_xaxis_transform(), "solid_capstyle": "butt"}
            height = 0.02 + 0.03 * len(handles)
            axes[0, 0].plot(
                [tolerance.low, tolerance.high], [height] * 2, color=color, alpha=alpha, linewidth=5, **at_bottom
            )
            bound = "at least " if tolerance.open_low or tolerance.open_high else ""
            start = f": best {tolerance.best:g}; within" if share == 0.05 else ","
            label += f"{start} {100 * share:g} % over {bound}{tolerance.decades:.2f} decades"
        for ax, (words, values_of) in zip(axes.flat, panels, strict=True):
            ax.set_ylabel(words)
            for group in members:
                values = values_of(group)
                ax.plot([group.config["lr"]] * len(values), values, "o", color=color, alpha=0.45, markersize=3.5)
                if len(values) < len(group.runs) and ax is axes[0, 0]:
                    at_top = {"transform": ax.get_xaxis_transform(), "clip_on": False}
                    ax.plot([group.config["lr"]], [1.0], "x", color=color, markersize=7, **at_top)
            mean = scipy_stats.gmean if words == PERPLEXITY else np.mean  # exp of the mean loss
            shown = {rate: mean(values_of(group)) for rate, group in best.items() if values_of(group)}
            ax.plot(list(shown), list(shown.values()), color=color, linewidth=1.8)
        handles.append(Line2D([], [], color=color, linewidth=1.8, label=label))
    ticks = sorted({group.config["lr"] for group in group_seeds(runs) if group.config.get("lr")})
    for ax in axes[1]:
        ax.set_xlabel("peak learning rate of the block matrices")
        ax.set_xscale("log")
        _ticks_at(ax, ticks, [f"{tick:g}" for tick in ticks])
    low, high = axes[0, 0].get_ylim()
    axes[0, 0].set_ylim(low - 0.1 * (high - low), high)  # room for the bars
    bits_axis(axes[0, 0], runs)
    figure.suptitle("Sensitivity to the learning rate: dots are runs, lines join their means")
    figure.legend(handles=handles, loc="outside lower center", ncols=1)
    return figure


@captioned(
    "Sensitivity of every arm to the learning rate",
    "Lower is better; one scale for all panels, up to an eighth above the lowest loss. Dots are runs, lines join their "
    "means, and a ring is around the best rate, which the panel's title names. On the edge of its line it means that "
    "the grid was too narrow.",
)
def rates_of_arms(arms: Mapping[str, Sequence[Run]]) -> Figure:
    """Final loss against the learning rate, a panel for each arm of its runs."""
    rows = -(-len(arms) // ARM_COLUMNS)
    size = (WIDTH, 0.9 + 1.9 * rows)
    figure, axes = plt.subplots(rows, ARM_COLUMNS, figsize=size, sharey=True, squeeze=False)
    for ax, (arm, runs) in zip(axes.flat, arms.items(), strict=False):
        groups = sorted((g for g in group_seeds(runs) if g.losses()), key=lambda g: g.config["lr"])
        color, best = optimizer_color(groups[0].optimizer), min(groups, key=lambda g: g.loss)
        for group in groups:
            losses = group.losses()
            ax.plot([group.config["lr"]] * len(losses), losses, "o", color=color, alpha=0.45, markersize=3.5)
        rates = [group.config["lr"] for group in groups]
        ax.plot(rates, [group.loss for group in groups], color=color, linewidth=1.8)
        ax.plot(best.config["lr"], best.loss, "o", color=color, markersize=9, fillstyle="none")
        ax.set_title(f"{arm}: {best.config['lr']:g}")
        ax.set_xscale("log")
        _ticks_at(ax, rates, [f"{rate:g}" for rate in rates])
    lowest = min(loss for runs in arms.values() for group in group_seeds(runs) for loss in group.losses())
    axes[0, 0].set_ylim(0.99 * lowest, 1.125 * lowest)
    for ax in list(axes.flat)[len(arms) :]:
        ax.set_visible(False)
    figure.supxlabel("peak learning rate of the block matrices", fontsize="medium")
    figure.supylabel("final validation loss (nats per token)", fontsize="medium")
    return figure


@captioned(
    "Every setting, best first",
    "Final validation loss of each setting; whiskers are 95 % intervals over seeds, dots single runs. Settings whose "
    "whiskers overlap widely cannot be told apart by these runs.",
)
def ablation_bars(runs: Sequence[Run]) -> Figure:
    """Final validation loss of every group, the best on top; whiskers are 95 % intervals over seeds, dots the runs."""
    groups = [group for group in group_seeds(runs) if group.losses()]
    named = sorted(zip(groups, group_labels(groups), strict=True), key=lambda pair: pair[0].loss)
    figure, ax = plt.subplots(figsize=(WIDTH, 1.4 + 0.27 * len(named)))
    values = [loss for group, _ in named for loss in group.losses()]
    bounds = [bound for group, _ in named for bound in t_interval(group.losses())[1:] if np.isfinite(bound)]
    low, high = min([*values, *bounds]), max([*values, *bounds])
    base = low - 0.12 * max(high - low, 0.01)
    for place, (group, _) in enumerate(named):
        mean, lower, upper = t_interval(group.losses())
        color = optimizer_color(group.optimizer)
        ax.barh(place, mean - base, left=base, color=color, alpha=0.35, height=0.66)
        ax.plot(group.losses(), [place] * len(group.losses()), "o", color=color, markersize=4)
        if np.isfinite(lower):
            ax.errorbar(mean, place, xerr=[[mean - lower], [upper - mean]], color="#333333", capsize=3, linewidth=1.1)
        end = max([*group.losses(), upper]) if np.isfinite(upper) else max(group.losses())
        seeds = f" ({len(group.losses())} seeds)" if len(group.losses()) > 1 else ""
        ax.annotate(
            f"{mean:.3f}{seeds}", (end, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9
        )
    ax.set_yticks(range(len(named)), [label for _, label in named])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlim(base, high + 0.16 * (high - base))
    ax.set_xlabel("final validation loss (nats per token); the axis does not start at zero")
    bits_axis(ax, runs, "top")
    ax.set_title("Every setting, best first")
    return figure


def has_sizes(runs: Sequence[Run]) -> bool:
    return len({run.config.get("params") for run in runs if np.isfinite(run.final_loss)} - {None}) > 1


@dataclass(frozen=True)
class Scaled:
    """A setting that grows: its figure's caption, the words of its axis, and the unit there."""

    caption: Caption
    words: str
    unit: float = 1.0


_SCALED = "Each optimizer at each value, at its best setting where several were tried: mean with its 95 % interval."
_BUDGETS = "Sizes trained on different token budgets do not share one curve: see the table of runs."
SCALED = {
    "params": Scaled(Caption("Model size", f"{_SCALED} {_BUDGETS}"), "parameters (millions)", 1e6),
    "tokens": Scaled(Caption("Length of training", _SCALED), "training tokens (millions)", 1e6),
    "batch_tokens": Scaled(
        Caption("Batch size", f"{_SCALED} All train on the same number of tokens."), "tokens in a batch"
    ),
}


@captioned(SCALED["params"].caption.title, SCALED["params"].caption.how_to_read)
def model_scaling(runs: Sequence[Run], key: str = "params") -> Figure:
    """Final loss, accuracy, perplexity and training time against the number of parameters, or another setting that
    grows, the best group at each value."""
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 6.6), sharex=True)
    panels: tuple[tuple[str, Callable[[Run], float]], ...] = (
        ("final validation loss (nats per token)", lambda run: run.final_loss),
        ("next-token accuracy (%)", lambda run: 100 * float(run.val["val_accuracy"][-1])),
        ("perplexity, exp of the loss", lambda run: float(np.exp(run.final_loss))),
        ("training time (s)", lambda run: run.train_seconds),
    )
    handles = []
    groups = [group for group in group_seeds(runs) if group.losses() and group.config.get(key)]
    for optimizer in dict.fromkeys(group.optimizer for group in groups):
        color = optimizer_color(optimizer)
        best: dict[int, Group] = {}
        for group in groups:
            if group.optimizer == optimizer:
                best[group.config[key]] = min(best.get(group.config[key], group), group, key=lambda g: g.loss)
        sizes = sorted(best)
        for ax, (words, value_of) in zip(axes.flat, panels, strict=True):
            values = [[value_of(run) for run in best[size].samples()] for size in sizes]
            intervals = np.array([t_interval(row) for row in values])
            places = [size * 1.02 ** (2 * len(handles) - 1) for size in sizes]  # no interval hides another optimizer's
            ax.plot(places, intervals[:, 0], color=color, linewidth=1.8, marker="o", markersize=4)
            for aside, row, (_, low, high) in zip(places, values, intervals, strict=True):
                ax.plot([aside] * len(row), row, "o", color=color, alpha=0.45, markersize=3.5)
                if np.isfinite(low):
                    ax.plot([aside, aside], [low, high], color=color, linewidth=1.1)
            ax.set_ylabel(words)
        handles.append(Line2D([], [], color=color, linewidth=1.8, marker="o", label=optimizer_name(optimizer)))
    for ax in axes[1]:
        ax.set_xlabel(SCALED[key].words)
        ax.set_xscale("log")
        ticks = sorted({group.config[key] for group in groups})
        _ticks_at(ax, ticks, [f"{tick / SCALED[key].unit:.4g}" for tick in ticks])
    bits_axis(axes[0, 0], runs)
    figure.suptitle(
        f"{SCALED[key].caption.title}: each optimizer at each value, mean over seeds with its 95 % interval"
    )
    legend_below(figure, handles)
    return figure
