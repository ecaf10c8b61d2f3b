"""One function per figure: loaded runs -> a Matplotlib figure. Here: the common look, losses, settings, sizes, experts.

    figure = loss_curves([load_run(Path("runs/a")), load_run(Path("runs/b"))]); save(figure, Path("plots"), "curves")

One look for all: an optimizer keeps its colour (Okabe-Ito, safe for colour-blind readers), settings of one optimizer
differ by line style, seeds are pooled into a mean and a band. plots_spectra.py and plots_layer.py keep to it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from analysis.runs import Group, Run, group_seeds, representative
from analysis.stats import largest_spike, learning_rate_tolerance, t_interval, thin, welch

OPTIMIZER_NAMES = {"muon": "Muon", "adamw": "AdamW"}
OPTIMIZER_COLORS = {"muon": "#0072B2", "adamw": "#D55E00"}
OTHER_COLOR = "#009E73"
REFERENCE_COLOR = "#666666"
LINE_STYLES = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
FEW_GROUPS = 4  # up to here every group is drawn in full; of more, the best of each optimizer stands out
DIRECT_LABELS = 5  # lines that are labelled at their end instead of in a legend
SVG_DPI = 120
WIDTH = 10.0  # inches, of every figure that does not grow with its content

STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "figure.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,  # twice the 100 points per inch at which pages show them
    "svg.hashsalt": "muon-speedrun",  # the same figure is the same file
    "text.parse_math": False,  # names of runs may hold dollar signs
}
plt.rcParams.update(STYLE)


def save(figure: Figure, folder: Path, stem: str, formats: Sequence[str] = ("png", "svg")) -> None:
    """Write folder/stem.png at twice the screen's resolution and folder/stem.svg, and close the figure."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, not once per file
    if "png" in formats:
        figure.savefig(folder / f"{stem}.png")
    if "svg" in formats:  # its images, of heatmaps and fans, at a resolution that keeps the file small
        figure.savefig(folder / f"{stem}.svg", dpi=SVG_DPI, metadata={"Date": None})
    plt.close(figure)


def optimizer_name(optimizer: str) -> str:
    return OPTIMIZER_NAMES.get(optimizer, optimizer)


def setting(key: str, value: Any) -> str:
    """'lr 0.02', 'no-nesterov', 'schedule cosine': a setting in a label, under its flag's name."""
    words = key.replace("_", "-")
    if isinstance(value, bool):
        return words if value else f"no-{words}"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{words} {text if len(text) <= 24 else text[:23] + '…'}"


def group_labels(groups: Sequence[Group]) -> list[str]:
    """The optimizer, with as many of the settings that differ as tell the groups apart, model and rate first."""
    names: list[tuple] = [(optimizer_name(group.optimizer),) for group in groups]
    experiments = [group.runs[0].experiment() for group in groups]
    keys = list(dict.fromkeys(key for experiment in experiments for key in experiment))
    keys.sort(key=lambda key: {"model": 0, "lr": 1}.get(key, 2))
    for key in keys:
        if len(set(names)) == len(groups):
            break
        longer = [(*name, setting(key, e.get(key))) for name, e in zip(names, experiments, strict=True)]
        if len(set(longer)) > len(set(names)):
            spread = {name: {more[-1] for more in longer if more[:-1] == name} for name in names}
            names = [more if len(spread[name]) > 1 else name for name, more in zip(names, longer, strict=True)]
    if len(set(names)) < len(groups):
        names = [(*name, f"#{i}") for i, name in enumerate(names, start=1)]
    return [", ".join(name) for name in names]


def run_labels(runs: Sequence[Run]) -> list[str]:
    """The label of each run's group, with the seed, or a number where a seed repeats, if the group has more runs."""
    groups = group_seeds(runs)
    named = {}
    for group, label in zip(groups, group_labels(groups), strict=True):
        seeds = [run.config["seed"] for run in group.runs]
        for place, run in enumerate(group.runs, start=1):
            repeated = f" #{place}" if seeds.count(run.config["seed"]) > 1 else ""
            suffix = f", seed {run.config['seed']}{repeated}" if len(group.runs) > 1 else ""
            named[run.path.resolve()] = label + suffix
    return [named[run.path.resolve()] for run in runs]


@dataclass(frozen=True)
class Look:
    """How a group's line is drawn; a group that is not strong stays thin, pale and out of the legend."""

    label: str
    color: str
    linestyle: Any
    strong: bool

    def line(self) -> dict[str, Any]:
        if not self.strong:
            return {"color": self.color, "linewidth": 0.8, "alpha": 0.35}
        return {"color": self.color, "linestyle": self.linestyle, "linewidth": 1.8, "zorder": 3, "label": self.label}


def looks(groups: Sequence[Group]) -> list[Look]:
    strong = representative(groups, FEW_GROUPS)
    if len(groups) > FEW_GROUPS:
        strong = representative(groups, len({(group.optimizer, group.config["model"]) for group in groups}))
    seen: dict[str, int] = {}
    result = []
    for group, label in zip(groups, group_labels(groups), strict=True):
        stands_out = any(group is one for one in strong)
        place = seen.get(group.optimizer, 0)
        seen[group.optimizer] = place + stands_out
        color = OPTIMIZER_COLORS.get(group.optimizer, OTHER_COLOR)
        result.append(Look(label, color, LINE_STYLES[place % len(LINE_STYLES)], stands_out))
    return result


def legend_below(figure: Figure, handles: Sequence[Line2D]) -> None:
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))


def group_handles(groups: Sequence[Group]) -> list[Line2D]:
    everyone = looks(groups)
    handles = [Line2D([], [], **look.line()) for look in everyone if look.strong]
    pale = len(everyone) - len(handles)
    if pale:
        handles.append(Line2D([], [], color="#999999", linewidth=0.8, label=f"{pale} other settings"))
    return handles


def label_ends(ax: plt.Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write (y, text, colour) at the right edge of a panel, moved apart where they would overlap."""
    low, high = ax.get_ylim()
    to_share = ax.transScale + ax.transLimits  # data to the panel's height, also on a log axis
    ends = [end for end in ends if np.isfinite(end[0])]
    shares = [float(np.clip(to_share.transform((ax.get_xlim()[0], y))[1], 0, 1)) for y, _, _ in ends]
    least = 0.085
    placed: list[float] = []
    for i in np.argsort(shares):
        placed.append(max(shares[i], placed[-1] + least) if placed else shares[i])
    excess = max(0.0, placed[-1] - 1.0) if placed else 0.0
    for i, share in zip(np.argsort(shares), placed, strict=True):
        _, text, color = ends[i]
        ax.annotate(
            text, (1.015, share - excess), xycoords="axes fraction", color=color, va="center", annotation_clip=False
        )
    ax.set_ylim(low, high)


def whole_steps(ax: plt.Axes) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_xlabel("updates")


def loss_curves(runs: Sequence[Run]) -> Figure:
    """Validation loss and accuracy against updates and against training seconds.

    A group's mean over seeds, with a band from the lowest to the highest; the training loss thin behind, where few
    groups are shown.
    """
    groups = group_seeds([run for run in runs if run.val])
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 6.6), sharey="row", sharex="col")
    ends: tuple[list, list] = ([], [])
    tops = []
    for group, look in zip(groups, looks(groups), strict=True):
        steps, losses = group.curve("val_loss")
        seconds = group.curve("train_seconds")[1]
        accuracy = 100 * group.curve("val_accuracy")[1]
        if not len(steps):
            continue
        if len(steps) > 5:
            tops.append(float(np.max(losses[:, len(steps) // 10 or 1])))
        for column, x in enumerate((steps, seconds.mean(axis=0))):
            if len(groups) <= FEW_GROUPS and group.runs[0].train:
                axes[0, column].plot(
                    *_training_loss(group.runs[0], column == 1), color=look.color, alpha=0.25, linewidth=0.7
                )
            for ax, values, row in ((axes[0, column], losses, 0), (axes[1, column], accuracy, 1)):
                marker = "o" if len(x) == 1 else None
                ax.plot(x, values.mean(axis=0), marker=marker, **look.line())
                if len(values) > 1 and look.strong:
                    band = {"color": look.color, "alpha": 0.18, "linewidth": 0}
                    ax.fill_between(x, values.min(axis=0), values.max(axis=0), **band)
                if column == 1 and look.strong:
                    ends[row].append((float(values[:, -1].mean()), look.label, look.color))
    axes[0, 0].set_ylabel("validation loss (nats per token)")
    axes[1, 0].set_ylabel("next-token accuracy (%)")
    axes[0, 0].set_title("against updates")
    axes[0, 1].set_title("against training time")
    if len(tops) == len(groups) and np.isfinite(tops).all():
        lowest = min(float(np.nanmin(line.get_ydata())) for line in axes[0, 0].lines)
        axes[0, 0].set_ylim(lowest - 0.06 * (max(tops) - lowest), max(tops))  # the first updates would hide the rest
    whole_steps(axes[1, 0])
    axes[1, 1].set_xlabel("training time (s)")
    axes[1, 0].set_ylim(bottom=0)
    if sum(look.strong for look in looks(groups)) <= DIRECT_LABELS and len(groups) <= FEW_GROUPS:
        for ax, labels in zip(axes[:, 1], ends, strict=True):
            label_ends(ax, labels)
    else:
        legend_below(figure, group_handles(groups))
    seeds = max((len(group.runs) for group in groups), default=1)
    words = "Validation loss and accuracy"
    if seeds > 1:
        words += ": mean over seeds, band from the lowest to the highest"
    figure.suptitle(words + ("; thin: training loss" if len(groups) <= FEW_GROUPS else ""))
    return figure


def _training_loss(run: Run, against_seconds: bool) -> tuple[np.ndarray, np.ndarray]:
    x = run.train["step"] - 1  # a batch's loss belongs to the weights before its update
    if against_seconds:  # the validations tell the time, which has more in it than the steps
        x = np.interp(x, run.val["step"], run.val["train_seconds"]) if run.val else x * np.nan
    return thin(x, run.train["train_loss"])


def optimizer_comparison(a: Group, b: Group) -> Figure:
    """How far b is ahead of a in validation loss at equal updates and at equal training time.

    Each panel shows mean(a) - mean(b), above zero where b is better; the band is the 95 % Welch interval, where both
    have two seeds or more. At equal time the curves are interpolated linearly.
    """
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.8), sharey=True)
    name_a, name_b = group_labels([a, b])
    spreads = [1e-6]
    for ax, key in zip(axes, ("step", "train_seconds"), strict=True):
        curves = [[(run.val[key], run.val["val_loss"]) for run in group.pool() if run.val] for group in (a, b)]
        ends = [x[-1] for side in curves for x, _ in side]
        x = curves[1][0][0] if key == "step" else np.linspace(0, min(ends), 60)
        x = x[x <= min(ends)]
        values = [np.array([np.interp(x, *curve) for curve in side]) for side in curves]
        tested = [welch(values[0][:, i], values[1][:, i]) for i in range(len(x))]
        difference, low, high = np.array(tested)[:, :3].T
        color = OPTIMIZER_COLORS.get(b.optimizer, OTHER_COLOR)
        ax.plot(x, difference, color=color, linewidth=1.8)
        if np.isfinite(low).any():
            ax.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
        ax.axhline(0, color=REFERENCE_COLOR, linewidth=1.0)
        spreads.append(np.nanmax(np.abs(difference)))
    axes[0].set_ylim(-1.25 * max(spreads), 1.25 * max(spreads))  # of the curves: few seeds have boundless bands
    axes[0].set_title("at equal updates")
    axes[1].set_title("at equal training time")
    whole_steps(axes[0])
    axes[1].set_xlabel("training time (s)")
    axes[0].set_ylabel("difference of validation loss\n(nats per token)")
    for words, y, va in ((f"{name_b} ahead", 0.97, "top"), (f"{name_a} ahead", 0.03, "bottom")):
        axes[0].annotate(words, (0.985, y), xycoords="axes fraction", ha="right", va=va, color=REFERENCE_COLOR)
    figure.suptitle(f"{name_a} minus {name_b}")
    return figure


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
    """Labels at these values of a log axis, but for those too close to the one before."""
    least = 0.06 * np.log(ticks[-1] / ticks[0])
    kept: list[int] = []
    for i, tick in enumerate(ticks):
        if not kept or np.log(tick / ticks[kept[-1]]) >= least:
            kept.append(i)
    ax.xaxis.set_major_locator(FixedLocator([ticks[i] for i in kept]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels([words[i] for i in kept], rotation=45, ha="right", rotation_mode="anchor")


def learning_rate_sensitivity(runs: Sequence[Run]) -> Figure:
    """Final loss, accuracy and perplexity against the learning rate, and the largest spike of the training loss.

    Where several groups share a rate, the line joins the best of them and the others are dots. Bars at the bottom: the
    rates whose loss is at most 1 % (dark) and 5 % (light) above the best. Crosses at the top edge: runs that failed.
    """
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 6.6), sharex=True)
    panels: tuple[tuple[str, Callable[[Group], list[float]]], ...] = (
        ("final validation loss (nats per token)", lambda g: g.losses()),
        ("next-token accuracy (%)", lambda g: [100 * float(run.val["val_accuracy"][-1]) for run in g.samples()]),
        ("perplexity, exp of the loss", lambda g: [float(np.exp(loss)) for loss in g.losses()]),
        ("largest rise of training loss (nats)", lambda g: [largest_spike(run) for run in g.runs if run.train]),
    )
    handles = []
    for optimizer, members in _by_rate(group_seeds(runs)).items():
        color = OPTIMIZER_COLORS.get(optimizer, OTHER_COLOR)
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
            shown = {rate: np.mean(values_of(group)) for rate, group in best.items() if values_of(group)}
            ax.plot(list(shown), list(shown.values()), color=color, linewidth=1.8)
        handles.append(Line2D([], [], color=color, linewidth=1.8, label=label))
    ticks = sorted({group.config["lr"] for group in group_seeds(runs) if group.config.get("lr")})
    for ax in axes[1]:
        ax.set_xlabel("peak learning rate of the block matrices")
        ax.set_xscale("log")
        _ticks_at(ax, ticks, [f"{tick:g}" for tick in ticks])
    low, high = axes[0, 0].get_ylim()
    axes[0, 0].set_ylim(low - 0.1 * (high - low), high)  # room for the bars
    figure.suptitle("Sensitivity to the learning rate: dots are runs, lines join the best at each rate")
    figure.legend(handles=handles, loc="outside lower center", ncols=1)
    return figure


def ablation_bars(runs: Sequence[Run]) -> Figure:
    """Final validation loss of every group, the best on top; whiskers are 95 % intervals over seeds, dots the runs."""
    groups = [group for group in group_seeds(runs) if group.losses()]
    named = sorted(zip(groups, group_labels(groups), strict=True), key=lambda pair: pair[0].loss)
    figure, ax = plt.subplots(figsize=(WIDTH, 1.4 + 0.27 * len(named)))
    values = [loss for group, _ in named for loss in group.losses()]
    bounds = [bound for group, _ in named for bound in t_interval(group.losses())[1:] if np.isfinite(bound)]
    low, high = min([*values, *bounds]), max([*values, *bounds])
    base = low - 0.12 * max(high - low, 0.01)
    for place, (group, label) in enumerate(named):
        mean, lower, upper = t_interval(group.losses())
        color = OPTIMIZER_COLORS.get(group.optimizer, OTHER_COLOR)
        ax.barh(place, mean - base, left=base, color=color, alpha=0.35, height=0.66)
        ax.plot(group.losses(), [place] * len(group.losses()), "o", color=color, markersize=4)
        if np.isfinite(lower):
            ax.errorbar(mean, place, xerr=[[mean - lower], [upper - mean]], color="#333333", capsize=3, linewidth=1.1)
        end = max([*group.losses(), upper]) if np.isfinite(upper) else max(group.losses())
        seeds = f" ({len(group.losses())} seeds)" if len(group.losses()) > 1 else ""
        ax.annotate(
            f"{mean:.3f}{seeds}", (end, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9
        )
        named[place] = (group, label)
    ax.set_yticks(range(len(named)), [label for _, label in named])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlim(base, high + 0.16 * (high - base))
    ax.set_xlabel("final validation loss (nats per token); the axis does not start at zero")
    ax.set_title("Every setting, best first")
    return figure


def has_sizes(runs: Sequence[Run]) -> bool:
    return len({run.config.get("params") for run in runs if np.isfinite(run.final_loss)} - {None}) > 1


def model_scaling(runs: Sequence[Run]) -> Figure:
    """Final loss, accuracy, perplexity and training time against the number of parameters, the best group per size."""
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 6.6), sharex=True)
    panels: tuple[tuple[str, Callable[[Run], float]], ...] = (
        ("final validation loss (nats per token)", lambda run: run.final_loss),
        ("next-token accuracy (%)", lambda run: 100 * float(run.val["val_accuracy"][-1])),
        ("perplexity, exp of the loss", lambda run: float(np.exp(run.final_loss))),
        ("training time (s)", lambda run: run.train_seconds),
    )
    handles = []
    groups = [group for group in group_seeds(runs) if group.losses() and group.config.get("params")]
    for optimizer in dict.fromkeys(group.optimizer for group in groups):
        color = OPTIMIZER_COLORS.get(optimizer, OTHER_COLOR)
        best: dict[int, Group] = {}
        for group in groups:
            if group.optimizer == optimizer:
                best[group.config["params"]] = min(best.get(group.config["params"], group), group, key=lambda g: g.loss)
        sizes = sorted(best)
        for ax, (words, value_of) in zip(axes.flat, panels, strict=True):
            values = [[value_of(run) for run in best[size].samples()] for size in sizes]
            intervals = np.array([t_interval(row) for row in values])
            ax.plot(sizes, intervals[:, 0], color=color, linewidth=1.8, marker="o", markersize=4)
            for size, row, (_, low, high) in zip(sizes, values, intervals, strict=True):
                aside = size * 1.02 ** (
                    len(handles) * 2 - 1
                )  # so that the optimizers' intervals do not hide each other
                ax.plot([aside] * len(row), row, "o", color=color, alpha=0.45, markersize=3.5)
                if np.isfinite(low):
                    ax.plot([aside, aside], [low, high], color=color, linewidth=1.1)
            ax.set_ylabel(words)
        handles.append(Line2D([], [], color=color, linewidth=1.8, marker="o", label=optimizer_name(optimizer)))
    for ax in axes[1]:
        ax.set_xlabel("parameters (millions)")
        ax.set_xscale("log")
        ticks = sorted({group.config["params"] for group in groups})
        _ticks_at(ax, ticks, [f"{tick / 1e6:.3g}" for tick in ticks])
    figure.suptitle("Model size: best setting of each optimizer, mean over seeds with its 95 % interval")
    legend_below(figure, handles)
    return figure


def learning_rate_schedules(runs: Sequence[Run]) -> Figure:
    """The learning rates of every update, of the block matrices and of embedding and gains."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.6))
    groups = group_seeds([run for run in runs if "lr" in run.train])
    everyone = looks(groups)
    for i, (group, look) in enumerate(zip(groups, everyone, strict=True)):
        later = min(2, sum(other.strong for other in everyone[i + 1 :])) if len(groups) <= FEW_GROUPS else 0
        train = max(group.runs, key=lambda run: run.updates).train
        for ax, key in zip(axes, ("lr", "adamw_lr"), strict=True):
            if key in train:
                marker = "o" if len(train["step"]) == 1 else None
                line = look.line()
                line["linewidth"] += 1.3 * later  # where rates agree the lines below stay visible
                ax.plot(*thin(train["step"], train[key]), marker=marker, **line)
    for ax, words in zip(axes, ("block matrices", "embedding and gains"), strict=True):
        ax.set_title(words)
        ax.set_ylim(bottom=0)
        whole_steps(ax)
    axes[0].set_ylabel("learning rate")
    legend_below(figure, group_handles(groups))
    return figure


def expert_utilization(run: Run) -> Figure:
    """Share of the routed tokens that each expert gets, against updates, a panel per layer; one colour scale."""
    layers = sorted({line["layer"] for line in run.experts})
    columns = min(6, len(layers))
    rows = -(-len(layers) // columns)
    size = (max(5.0, 1.2 + 1.8 * columns), 1.4 + 1.7 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    grids = []
    for layer in layers:
        lines = sorted((line for line in run.experts if line["layer"] == layer), key=lambda line: line["step"])
        shares = np.array([line["utilization"] for line in lines], dtype=float).T
        grids.append((np.array([line["step"] for line in lines]), shares / shares.sum(axis=0)))
    highest = max(shares.max() for _, shares in grids)
    for ax, layer, (steps, shares) in zip(axes.flat, layers, grids, strict=False):
        experts = np.arange(len(shares))
        mesh = ax.pcolormesh(
            steps, experts, shares, vmin=0, vmax=highest, cmap="cividis", shading="nearest", rasterized=True
        )
        ax.grid(False)
        ax.set_title(f"layer {layer}")
        ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    for ax in axes.flat[len(layers) :]:
        ax.set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel("updates")
    for ax in axes[:, 0]:
        ax.set_ylabel("expert")
    bar = figure.colorbar(mesh, ax=axes, label="share of tokens", pad=0.01)
    bar.ax.axhline(1 / len(grids[0][1]), color="white", linewidth=3.0)
    bar.ax.axhline(1 / len(grids[0][1]), color="black", linewidth=1.4)
    figure.suptitle("Tokens of each expert (line on the bar: an even share)")
    return figure
