"""One function per figure: loaded runs -> a Matplotlib figure. Here: the common style, losses, schedules, experts.

    figure = loss_curves([load_run(Path("runs/a")), load_run(Path("runs/b"))]); save(figure, Path("plots"), "curves")

An optimizer keeps its colour (Okabe-Ito, safe for colour-blind readers), settings of one optimizer differ by line
style, seeds are pooled into a mean and a band. A figure's caption is written above its function: a page prints it.
"""

import functools
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["MPLBACKEND"] = "Agg"  # before the import, which refuses a notebook's backend outside of one
import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image

from analysis.pages import Picture
from analysis.runs import Group, Run, bits_per_nat, group_seeds, optimizer_name, representative
from analysis.stats import difference, thin
from engine.cores import free_cores

OPTIMIZER_COLORS = {"muon": "#0072B2", "adamw": "#D55E00"}
OTHER_COLOR = "#009E73"
REFERENCE_COLOR = "#666666"
LINE_STYLES = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
FEW_GROUPS = 4  # up to here every group is drawn in full; of more, the best of each optimizer stands out
DIRECT_LABELS = 5  # lines that are labelled at their end instead of in a legend
PNG_DPI = 200  # pages show figures at 100 points per inch
SVG_DPI = 120  # of the images in a file, heatmaps and fans: it stays small
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
    "svg.hashsalt": "muon-speedrun",  # the same figure is the same file
    "text.parse_math": False,  # names of runs may hold dollar signs
}
plt.rcParams.update(matplotlib.rcParamsDefault | STYLE | {"backend": "Agg"})  # whatever the user's matplotlibrc says


@dataclass(frozen=True)
class Caption:
    title: str
    how_to_read: str


def captioned(title: str, how_to_read: str) -> Callable[[Callable[..., Figure]], Callable[..., Figure]]:
    """Attach a figure's caption to the function that draws it."""

    def attach(plot: Callable[..., Figure]) -> Callable[..., Figure]:
        plot.caption = Caption(title, how_to_read)
        return plot

    return attach


@dataclass(frozen=True)
class Drawing:
    """A picture of a page, and how to draw it."""

    picture: Picture
    draw: Callable[[], Figure]


def drawing(
    plot: Callable[..., Figure], *arguments: Any, stem: str = "", about: str = "", caption: Caption | None = None
) -> Drawing:
    """The captioned figure of these arguments, to be drawn later; `about` completes its title."""
    caption = caption or plot.caption
    title = f"{caption.title}: {about}" if about else caption.title
    picture = Picture(stem or plot.__name__, title, caption.how_to_read)
    return Drawing(picture, functools.partial(plot, *arguments))


def save_all(
    drawings: Sequence[Drawing], folder: Path, formats: Sequence[str] = ("png", "svg"), png_dpi: int = PNG_DPI
) -> list[Picture]:
    """Draw and save all, on every free core; returns what a page needs to show them.

    A process that runs threads, as a training does, is not forked: it draws alone.
    """

    def draw(some: Sequence[Drawing]) -> None:
        for one in some:
            save(one.draw(), folder, one.picture.stem, formats, png_dpi)

    def draw_in_child(some: Sequence[Drawing]) -> None:
        try:
            draw(some)
        except BaseException:
            os._exit(1)  # said where it is drawn again

    may_fork = "torch" not in sys.modules and threading.active_count() == 1
    count = min(free_cores(), len(drawings)) if may_fork and len(drawings) > 1 else 1
    shares = [drawings[i::count] for i in range(count)]
    others = [multiprocessing.get_context("fork").Process(target=draw_in_child, args=(share,)) for share in shares[1:]]
    for process in others:
        process.start()
    for share in shares[:1]:
        draw(share)
    for process, share in zip(others, shares[1:], strict=True):
        process.join()
        if process.exitcode:
            draw(share)  # so that its error is raised here
    return [one.picture for one in drawings]


def save(
    figure: Figure, folder: Path, stem: str, formats: Sequence[str] = ("png", "svg"), png_dpi: int = PNG_DPI
) -> None:
    """Write folder/stem.png, by default at twice the screen's resolution, and folder/stem.svg, and close the figure.

    Laid out once and drawn once per file; `savefig` lays out and draws each file twice.
    """
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")
    if "png" in formats:
        figure.set_dpi(png_dpi)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        _with_a_palette(drawn).save(folder / f"{stem}.png", optimize=True, dpi=(png_dpi, png_dpi))
    if "svg" in formats:
        figure.set_dpi(SVG_DPI)
        FigureCanvasSVG(figure).print_svg(folder / f"{stem}.svg", metadata={"Date": None})
    plt.close(figure)


def _with_a_palette(image: Image.Image) -> Image.Image:
    """Of 256 colours: a third of the bytes, and no channel is off by more than a thirtieth."""
    return image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)


def optimizer_color(optimizer: str) -> str:
    return OPTIMIZER_COLORS.get(optimizer, OTHER_COLOR)


def setting(key: str, value: Any) -> str:
    """'lr 0.02', 'no-nesterov', 'schedule cosine': a setting in a label, under its flag's name."""
    words = key.replace("_", "-")
    if isinstance(value, bool):
        return words if value else f"no-{words}"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{words} {text if len(text) <= 24 else text[:23] + '…'}"


def group_labels(groups: Sequence[Group]) -> list[str]:
    """The names of a suite's conditions, else the optimizer, with as many of the settings that differ as tell the
    groups apart, model and rate first."""
    conditions = [group.runs[0].condition for group in groups]
    if all(conditions) and len(set(conditions)) == len(groups):
        return conditions
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
class LineStyle:
    """How a group's line is drawn; one that is not strong is thin, pale and not in the legend."""

    label: str
    color: str
    linestyle: Any
    strong: bool

    def line(self) -> dict[str, Any]:
        if not self.strong:
            return {"color": self.color, "linewidth": 0.8, "alpha": 0.35}
        return {"color": self.color, "linestyle": self.linestyle, "linewidth": 1.8, "zorder": 3, "label": self.label}


def line_styles(groups: Sequence[Group]) -> list[LineStyle]:
    strong = representative(groups, FEW_GROUPS)
    if len(groups) > FEW_GROUPS:
        strong = representative(groups, len({(group.optimizer, group.config["model"]) for group in groups}))
    seen: dict[str, int] = {}
    result = []
    for group, label in zip(groups, group_labels(groups), strict=True):
        stands_out = any(group is one for one in strong)
        place = seen.get(group.optimizer, 0)
        seen[group.optimizer] = place + stands_out
        color = optimizer_color(group.optimizer)
        result.append(LineStyle(label, color, LINE_STYLES[place % len(LINE_STYLES)], stands_out))
    return result


def legend_below(figure: Figure, handles: Sequence[Line2D]) -> None:
    if handles:
        rows = -(-len(handles) // 4)
        figure.legend(handles=handles, loc="outside lower center", ncols=-(-len(handles) // rows))


def group_handles(groups: Sequence[Group]) -> list[Line2D]:
    everyone = line_styles(groups)
    handles = [Line2D([], [], **style.line()) for style in everyone if style.strong]
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


def whole_steps(ax: plt.Axes, most: int = 6) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(most, integer=True))
    ax.set_xlabel("step")


@captioned(
    "Loss and accuracy",
    "Lower loss and higher accuracy are better. The left column compares at equal steps, the right column at equal "
    "training time, which excludes compilation, validation and checkpoints. A band spans the seeds. Dotted where the "
    "axis reaches it: the loss of a model that knows how frequent each token is in the training text, and nothing "
    "else.",
)
def loss_curves(runs: Sequence[Run]) -> Figure:
    """Validation loss and accuracy against steps and against training seconds.

    A group's mean over seeds, with a band from the lowest to the highest; where there are few groups, the training loss
    of the first seed as a thin line. The axis is chosen for validation.
    """
    groups = group_seeds([run for run in runs if run.val])
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 6.6), sharey="row", sharex="col")
    ends: tuple[list, list] = ([], [])
    tops = []
    for group, style in zip(groups, line_styles(groups), strict=True):
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
                    *_training_loss(group.runs[0], column == 1), color=style.color, alpha=0.25, linewidth=0.7
                )
            for ax, values, row in ((axes[0, column], losses, 0), (axes[1, column], accuracy, 1)):
                marker = "o" if len(x) == 1 else None
                ax.plot(x, values.mean(axis=0), marker=marker, **style.line())
                if len(values) > 1 and style.strong:
                    band = {"color": style.color, "alpha": 0.18, "linewidth": 0}
                    ax.fill_between(x, values.min(axis=0), values.max(axis=0), **band)
                if column == 1 and style.strong:
                    ends[row].append((float(values[:, -1].mean()), style.label, style.color))
    axes[0, 0].set_ylabel("validation loss (nats per token)")
    axes[1, 0].set_ylabel("next-token accuracy (%)")
    axes[0, 0].set_title("against steps")
    axes[0, 1].set_title("against training time")
    if len(tops) == len(groups) and np.isfinite(tops).all():
        lowest = min(float(np.min(group.curve("val_loss")[1])) for group in groups)
        axes[0, 0].set_ylim(lowest - 0.06 * (max(tops) - lowest), max(tops))  # the first steps would hide the rest
    for level in unigram_levels(runs):
        unigram_line(axes[0, 0], level)
    bits_axis(axes[0, 0], runs)
    whole_steps(axes[1, 0])
    axes[1, 1].set_xlabel("training time (s)")
    axes[1, 0].set_ylim(bottom=0)
    strong = [style.color for style in line_styles(groups) if style.strong]
    if len(strong) == len(set(strong)) <= DIRECT_LABELS and len(groups) <= FEW_GROUPS:  # colours tell which is which
        for ax, labels in zip(axes[:, 1], ends, strict=True):
            label_ends(ax, labels)
    else:
        legend_below(figure, group_handles(groups))
    seeds = max((len(group.runs) for group in groups), default=1)
    words = "Validation loss and accuracy"
    if seeds > 1:
        words += ": mean over seeds, band from the lowest to the highest"
    figure.suptitle(words + ("; thin: training loss of one seed" if len(groups) <= FEW_GROUPS else ""))
    return figure


def unigram_levels(runs: Sequence[Run]) -> list[float]:
    """The losses of token frequencies alone, one where all runs are validated on the same tokens."""
    return sorted({run.config["unigram_val_loss"] for run in runs if run.config.get("unigram_val_loss") is not None})


def unigram_line(ax: plt.Axes, level: float, words: bool = True) -> None:
    """The level where it is in sight, else a word at the edge."""
    low, high = ax.get_ylim()
    arrow = " ↑" if level > high else " ↓" if level < low else ""
    if not arrow:
        ax.axhline(level, color=REFERENCE_COLOR, linestyle=":", linewidth=1.2)
    if words:
        place = (0.985, float(np.clip(level, low, high)))
        style = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "top" if level > high else "bottom"}
        ax.annotate(f"token frequencies alone: {level:.2f}{arrow}", place, color=REFERENCE_COLOR, fontsize=8, **style)
    ax.set_ylim(low, high)


def bits_axis(ax: plt.Axes, runs: Sequence[Run], side: str = "right") -> None:
    """Repeat an axis in nats per token in bits per byte, on the right or on top, where the runs agree in the factor."""
    bits = bits_per_nat(runs)
    if np.isfinite(bits):
        add = ax.secondary_xaxis if side == "top" else ax.secondary_yaxis
        other = add(side, functions=(lambda nats: nats * bits, lambda found: found / bits))
        (other.set_xlabel if side == "top" else other.set_ylabel)("bits per byte")


def _training_loss(run: Run, against_seconds: bool) -> tuple[np.ndarray, np.ndarray]:
    x = run.train["step"] - 1  # a batch's loss belongs to the weights before its step
    if against_seconds:  # from the validations: training time includes more than the steps' own
        x = np.interp(x, run.val["step"], run.val["train_seconds"]) if run.val else x * np.nan
    return thin(x, run.train["train_loss"])


@captioned(
    "The lead over training",
    "The difference of the two validation losses at equal steps and at equal training time. Runs that share a seed "
    "are paired. Where the band (95 % over seeds, drawn with two seeds or more) excludes zero, the lead is "
    "significant at that point.",
)
def optimizer_comparison(a: Group, b: Group) -> Figure:
    """How far b is ahead of a in validation loss at equal steps and at equal training time.

    Each panel shows mean(a) - mean(b), above zero where b is better; the band is the 95 % interval of
    `stats.difference` at each point. At equal time the curves are interpolated linearly.
    """
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.8), sharey=True)
    name_a, name_b = group_labels([a, b])
    spreads = [1e-6]
    for ax, key in zip(axes, ("step", "train_seconds"), strict=True):
        sides = [[run for run in group.pool() if run.val] for group in (a, b)]
        end = min(run.val[key][-1] for side in sides for run in side)
        x = sides[1][0].val[key] if key == "step" else np.linspace(0, end, 60)
        x = x[x <= end]
        losses = [
            {run.config["seed"]: np.interp(x, run.val[key], run.val["val_loss"]) for run in side} for side in sides
        ]
        tests = [
            difference(*({seed: values[i] for seed, values in side.items()} for side in losses)) for i in range(len(x))
        ]
        gap, low, high = np.array([(test.difference, test.low, test.high) for test in tests]).T
        color = optimizer_color(b.optimizer)
        ax.plot(x, gap, color=color, linewidth=1.8)
        if np.isfinite(low).any():
            ax.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
        ax.axhline(0, color=REFERENCE_COLOR, linewidth=1.0)
        spreads.append(np.nanmax(np.abs(gap)))
    axes[0].set_ylim(-1.25 * max(spreads), 1.25 * max(spreads))  # from the curves: bands of few seeds are very wide
    axes[0].set_title("at equal steps")
    axes[1].set_title("at equal training time")
    whole_steps(axes[0])
    axes[1].set_xlabel("training time (s)")
    axes[0].set_ylabel("difference of validation loss\n(nats per token)")
    for words, y, va in ((f"{name_b} ahead", 0.97, "top"), (f"{name_a} ahead", 0.03, "bottom")):
        axes[0].annotate(words, (0.985, y), xycoords="axes fraction", ha="right", va=va, color=REFERENCE_COLOR)
    band = f"; band: 95 % interval, {tests[-1].test}" if tests[-1].tested else ""
    figure.suptitle(f"{name_a} minus {name_b}{band}")
    return figure


@captioned(
    "Learning-rate schedules",
    "The learning rate of each step. Schedules count steps, and the first already has a rate above zero.",
)
def learning_rate_schedules(runs: Sequence[Run]) -> Figure:
    """The learning rates of every step: of the block matrices, and of embedding and gains."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.6))
    groups = group_seeds([run for run in runs if "lr" in run.train])
    everyone = line_styles(groups)
    for i, (group, style) in enumerate(zip(groups, everyone, strict=True)):
        later = min(2, sum(other.strong for other in everyone[i + 1 :])) if len(groups) <= FEW_GROUPS else 0
        train = max(group.runs, key=lambda run: run.steps_done).train
        for ax, key in zip(axes, ("lr", "adamw_lr"), strict=True):
            if key in train:
                marker = "o" if len(train["step"]) == 1 else None
                line = style.line()
                line["linewidth"] += 1.3 * later  # the lines below stay visible where rates agree
                ax.plot(*thin(train["step"], train[key]), marker=marker, **line)
    for ax, words in zip(axes, ("block matrices", "embedding and gains"), strict=True):
        ax.set_title(words)
        ax.set_ylim(bottom=0)
        whole_steps(ax)
    axes[0].set_ylabel("learning rate")
    legend_below(figure, group_handles(groups))
    return figure


def expert_shares(run: Run, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps and the share of a layer's tokens that each expert receives, (experts, events)."""
    lines = sorted((line for line in run.experts if line["layer"] == layer), key=lambda line: line["step"])
    shares = np.array([line["utilization"] for line in lines], dtype=float).T
    return np.array([line["step"] for line in lines]), shares / shares.sum(axis=0)


@captioned(
    "Use of the experts",
    "The share of tokens that each expert receives. The line on the bar marks an even share; an expert that stays dark "
    "learns nothing.",
)
def expert_utilization(run: Run) -> Figure:
    """Share of the routed tokens that each expert receives, against steps, a panel per layer; one colour scale."""
    layers = sorted({line["layer"] for line in run.experts})
    columns = min(6, len(layers))
    rows = -(-len(layers) // columns)
    size = (max(5.0, 1.2 + 1.8 * columns), 1.4 + 1.7 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    grids = [expert_shares(run, layer) for layer in layers]
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
        ax.set_xlabel("step")
    for ax in axes[:, 0]:
        ax.set_ylabel("expert")
    bar = figure.colorbar(mesh, ax=axes, label="share of tokens", pad=0.01)
    bar.ax.axhline(1 / len(grids[0][1]), color="white", linewidth=3.0)
    bar.ax.axhline(1 / len(grids[0][1]), color="black", linewidth=1.4)
    figure.suptitle("Tokens of each expert (line on the bar: an even share)")
    return figure
