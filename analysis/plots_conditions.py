"""Figures of conditions: named settings with a run for each seed -> a Matplotlib figure.

    figure = training_curves([Series("momentum 0.9", runs), Series("momentum 0.95", others, versus="momentum 0.9")])

Seeds are thin lines, means thick ones; conditions that share a seed are compared seed by seed. The style is that of
plots.py; a figure's caption is written above its function.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from analysis.plots import (
    LINE_STYLES,
    REFERENCE_COLOR,
    WIDTH,
    bits_axis,
    captioned,
    expert_shares,
    legend_below,
    optimizer_color,
    unigram_levels,
    unigram_line,
    whole_steps,
)
from analysis.runs import Group, Run, condition_name, optimizer_name
from analysis.stats import MARGIN, balance, t_interval

# Okabe-Ito without the optimizers' colours, for conditions without an order.
CONDITION_COLORS = ("#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#8C8C8C")
VALUE_COLORS = plt.get_cmap("viridis")  # of conditions with one, from small to large
REFERENCE_BAND = {"color": REFERENCE_COLOR, "alpha": 0.12, "linewidth": 0}
FEW_BANDS = 4  # conditions of a panel, up to which bands are drawn
OFF = 1.5  # where a sensitivity curve draws "off", in multiples of the largest value


@dataclass(frozen=True)
class Series:
    """A condition with its runs: `versus` is the label of the one it is compared with, `panel` names the panel that it
    shares with others, `value` its place on a numeric axis (None: it has none)."""

    label: str
    runs: tuple[Run, ...]
    versus: str | None = None
    panel: str = ""
    value: float | None = None

    @property
    def optimizer(self) -> str:
        return self.runs[0].optimizer

    def losses(self) -> dict[int, float]:
        return Group(self.runs).losses_by_seed()

    def curves(self) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Validation steps and the losses of each seed there."""
        group = Group(self.runs)
        steps, losses = group.curve("val_loss")
        return steps, dict(zip((run.config["seed"] for run in group.pool() if run.val), losses, strict=True))


def looks(series: Sequence[Series]) -> dict[str, dict[str, Any]]:
    """Colour and line style by label. In a panel of two optimizers they have their colours; one of a single optimizer
    is coloured by order where its conditions have one, else each has a colour of its own."""
    found: dict[str, dict[str, Any]] = {}
    references = {one.versus for one in series} - {None}
    for panel in dict.fromkeys(one.panel for one in series):
        members = [one for one in series if one.panel == panel]
        seen: dict[str, int] = {}
        others = iter(CONDITION_COLORS * len(members))
        values = sorted(one.value for one in members if one.value is not None)
        ordered = len(values) == len(members) > 2
        for one in members:
            if len({other.optimizer for other in members}) > 1:
                place = seen[one.optimizer] = seen.get(one.optimizer, -1) + 1
                look = {"color": optimizer_color(one.optimizer), "linestyle": LINE_STYLES[place % len(LINE_STYLES)]}
            elif ordered:
                look = {"color": VALUE_COLORS(0.9 * values.index(one.value) / (len(values) - 1))}
            else:
                own = one.label in references or len(members) == 1
                look = {"color": optimizer_color(one.optimizer) if own else next(others)}
            found[one.label] = look
    return found


def _seed_lines(
    ax: plt.Axes, steps: np.ndarray, by_seed: Mapping[int, np.ndarray], look: Mapping[str, Any], band: bool
) -> None:
    """Thin lines of the seeds, their mean, and where wanted a band from the lowest to the highest."""
    values = np.array(list(by_seed.values()))
    ax.plot(steps, values.mean(axis=0), linewidth=1.8, zorder=3, **look)
    if len(values) > 1:
        ax.plot(steps, values.T, linewidth=0.5, alpha=0.5, color=look["color"])
    if len(values) > 1 and band:
        shade = {"color": look["color"], "alpha": 0.12, "linewidth": 0}
        ax.fill_between(steps, values.min(axis=0), values.max(axis=0), **shade)


DIFFERENCES = (
    "Second panels show the loss minus the reference's, seed by seed, which removes what the seeds share; below zero "
    "is better."
)


@captioned(
    "Training curves",
    "Validation loss; the axes are chosen for what comes after a fifth of the run. A thick line is the mean over "
    "seeds, thin lines are the seeds, a band spans them where there are few conditions.",
)
def training_curves(series: Sequence[Series]) -> Figure:
    """Validation loss against steps, a panel for each `Series.panel`, and the difference from the panel's reference: of
    a condition that is compared with one that is compared in turn, from the last of them."""
    panels = list(dict.fromkeys(one.panel for one in series))
    compared = [one for one in series if any(one.versus == other.label for other in series)]
    rows = 1 + bool(compared)
    shape = (1, rows) if len(panels) == 1 else (rows, len(panels))
    size = (WIDTH, 3.9 if shape[0] == 1 else 6.0)
    figure, axes = plt.subplots(*shape, figsize=size, sharex="col", squeeze=False, sharey=False)
    grid = axes.T if len(panels) == 1 else axes  # rows: loss, difference
    by_label = {one.label: one for one in series}
    styles, shown = looks(series), []
    for column, panel in enumerate(panels):
        upper = grid[0, column]
        bands = sum(one.panel == panel for one in series) <= FEW_BANDS
        for one in (one for one in series if one.panel == panel):
            steps, losses = one.curves()
            if losses:
                _seed_lines(upper, steps, losses, styles[one.label], bands)
                shown.append(np.concatenate([line[steps >= 0.2 * steps[-1]] for line in losses.values()]))
        for one in compared if rows == 2 else ():
            if one.panel == panel:
                steps, gaps = _gaps(one, by_label[_reference(one, by_label)])
                if gaps:
                    _seed_lines(grid[1, column], steps, gaps, styles[one.label], bands)
        for ax in grid[:, column]:
            if ax.lines:
                ax.set_xlim(left=0.15 * max(line.get_xdata()[-1] for line in ax.lines))
        if panel:
            upper.set_title(panel)
    if shown:  # one scale for all panels; what is worse than an untrained model is off it
        low, high = (float(f([f(values) for values in shown])) for f in (np.nanmin, np.nanmax))
        high = min(high, max(float(run.val["val_loss"][0]) for one in series for run in one.runs if run.val))
        for ax, panel in zip(grid[0], panels, strict=True):
            ax.set_ylim(low - 0.04 * (high - low), high + 0.02 * (high - low))
            _yardsticks(ax, [run for one in series if one.panel == panel for run in one.runs], ax is grid[0, -1])
    for ax in grid.flat:
        whole_steps(ax, 6 if len(panels) < 4 else 3)
        if rows == 2 and ax in grid[1]:
            ax.axhline(0, color=REFERENCE_COLOR, linewidth=1.0)
    for ax in axes[:-1].flat:
        ax.set_xlabel("")
    grid[0, 0].set_ylabel("validation loss (nats per token)")
    if rows == 2:
        grid[1, 0].set_ylabel("minus the reference,\nseed by seed (nats)")
        _focus(grid[1])
    if len(panels) > 1 and all(one.value is not None for one in series):
        _panel_legends(grid[0], panels, series, styles)
    else:
        legend_below(figure, _handles(series, styles))
    figure.suptitle("Validation loss: mean over seeds (thick), every seed (thin)")
    return figure


def _reference(one: Series, by_label: Mapping[str, Series]) -> str:
    """The label of the last in the chain of conditions that it is compared with."""
    while by_label[one.versus].versus in by_label:
        one = by_label[one.versus]
    return one.versus


def _yardsticks(ax: plt.Axes, runs: Sequence[Run], last: bool) -> None:
    """The loss of token frequencies alone, and, at the last panel of a row, bits per byte."""
    for level in unigram_levels(runs):
        unigram_line(ax, level, words=False)
    if last:
        bits_axis(ax, runs)


def _gaps(one: Series, reference: Series) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """At the steps both have: its losses minus the reference's, of the seeds that both have."""
    (steps, losses), (other_steps, others) = one.curves(), reference.curves()
    shared = np.intersect1d(steps, other_steps)
    mine, theirs = np.isin(steps, shared), np.isin(other_steps, shared)
    return shared, {seed: losses[seed][mine] - others[seed][theirs] for seed in losses.keys() & others.keys()}


def _focus(axes: Sequence[plt.Axes]) -> None:
    """One vertical scale for all panels, from the lines after a fifth of the run: the first steps would hide them."""
    kept = []
    for ax in axes:
        for line in ax.lines:
            x, y = np.asarray(line.get_xdata(), dtype=float), np.asarray(line.get_ydata(), dtype=float)
            if len(x) > 2:
                kept.append(y[x >= 0.2 * x[-1]])
    values = np.concatenate(kept) if kept else np.zeros(1)
    low, high = min(0.0, float(np.nanmin(values))), max(0.0, float(np.nanmax(values)))
    pad = 0.06 * max(high - low, 1e-3)
    for ax in axes:
        ax.set_ylim(low - pad, high + pad)


def _panel_legends(
    axes: Sequence[plt.Axes], panels: Sequence[str], series: Sequence[Series], styles: Mapping[str, Mapping[str, Any]]
) -> None:
    """The values of each panel's own conditions."""
    for ax, panel in zip(axes, panels, strict=True):
        members = [one for one in series if one.panel == panel]
        handles = [Line2D([], [], linewidth=1.8, label=f"{one.value:g}", **styles[one.label]) for one in members]
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": -(-len(handles) // 2)}
        ax.legend(handles=handles, title="learning rate", fontsize=8, title_fontsize=8, frameon=False, **below)


def _handles(series: Sequence[Series], styles: Mapping[str, Mapping[str, Any]]) -> list[Line2D]:
    """The legend: by optimizer and place where panels repeat them, else a line for each condition."""
    by_label = {one.label: one for one in series}
    references = {_reference(one, by_label) for one in series if one.versus in by_label}
    panels = {one.panel for one in series}
    entries: dict[str, Mapping[str, Any]] = {}
    for one in series:
        label = one.label.replace(f" {one.panel}", "").rstrip(",") if len(panels) > 1 else one.label
        label = condition_name(label, one.optimizer)
        if one.label in references:
            label += " (reference)"
        entries.setdefault(label, styles[one.label])
    return [Line2D([], [], linewidth=1.8, label=label, **look) for label, look in entries.items()]


@captioned(
    "Sensitivity to the setting",
    "Left: final validation loss; a thin line joins the runs of one seed, the thick one the means, whiskers are 95 % "
    "intervals. Right: the same minus the reference, seed by seed. The grey band is 1 % of the loss: settings whose "
    "whisker stays inside it are as good as the reference for practical purposes.",
)
def sensitivity(series: Sequence[Series], setting: str, off: str = "off") -> Figure:
    """Final loss against a numeric setting, and its difference from the reference, seed by seed; `off` is the word at a
    value of infinity."""
    ordered = sorted((one for one in series if one.losses()), key=lambda one: one.value)
    reference = next((one for one in ordered if one.versus is None), ordered[0])
    places = _places([one.value for one in ordered])
    color = optimizer_color(ordered[0].optimizer)
    level = float(np.mean(list(reference.losses().values())))
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.8))
    base = reference.losses()
    for ax, zero in zip(axes, (None, base), strict=True):
        values = [
            {
                seed: loss - (zero[seed] if zero else 0.0)
                for seed, loss in one.losses().items()
                if not zero or seed in zero
            }
            for one in ordered
        ]
        for seed in sorted({seed for by_seed in values for seed in by_seed}):
            line = [by_seed.get(seed, np.nan) for by_seed in values]
            ax.plot(places, line, color=color, linewidth=0.6, alpha=0.5, marker=".", markersize=4)
        known = [(place, *t_interval(list(v.values()))) for place, v in zip(places, values, strict=True) if v]
        x, mean, low, high = np.array(known).T
        ax.plot(x, mean, color=color, linewidth=1.8, marker="o", markersize=5, zorder=3)
        ax.errorbar(x, mean, yerr=[mean - low, high - mean], color=color, capsize=3, linewidth=1.2, fmt="none")
        middle = 0.0 if zero else level
        ax.axhspan(middle - MARGIN * level, middle + MARGIN * level, **REFERENCE_BAND)
        _numbered(ax, places, [f"{one.value:g}" if np.isfinite(one.value) else off for one in ordered])
        ax.set_xlabel(setting)
    axes[0].set_ylabel("final validation loss (nats per token)")
    bits_axis(axes[0], [run for one in ordered for run in one.runs])
    axes[1].set_ylabel(f"minus {reference.label} (nats)")
    axes[1].axhline(0, color=REFERENCE_COLOR, linewidth=1.0)
    band = Patch(facecolor=REFERENCE_COLOR, alpha=0.2, label=f"1 % of the loss around {reference.label}")
    mean_handle = Line2D([], [], color=color, marker="o", label="mean over seeds, 95 % interval")
    thin_handle = Line2D([], [], color=color, linewidth=0.6, label="one seed")
    legend_below(figure, [mean_handle, thin_handle, band])
    return figure


def _places(values: Sequence[float]) -> list[float]:
    """Where values are drawn: infinity ("off", "all") beyond the largest."""
    largest = max(value for value in values if np.isfinite(value))
    return [value if np.isfinite(value) else OFF * largest for value in values]


def _numbered(ax: plt.Axes, places: Sequence[float], words: Sequence[str]) -> None:
    """A tick at every value, on a log axis where the values span more than a decade and none is zero."""
    if min(places) > 0 and max(places) > 10 * min(places):
        ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(list(places)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels(words)


@dataclass(frozen=True)
class Effect:
    """A setting's loss minus its reference's in per cent, with an interval; `group` says what varies."""

    group: str
    label: str
    optimizer: str
    percent: float
    low: float
    high: float
    n: int


@captioned(
    "What each setting is worth",
    "Final loss of every setting minus that of its reference, named on the right, in per cent, with an interval "
    "corrected within its suite; dots further right are worse. Inside the grey band (1 %) a setting is as good for "
    "practical purposes. Filled dots differ significantly; one beyond the axis is drawn at its edge.",
)
def effects(found: Sequence[Effect]) -> Figure:
    """A row for every setting, grouped by what varies."""
    groups = list(dict.fromkeys(one.group for one in found))
    rows, place = [], 0.0
    for group in groups:
        for one in (one for one in found if one.group == group):
            rows.append((place, one))
            place += 1
        place += 0.7
    figure, ax = plt.subplots(figsize=(WIDTH, 1.4 + 0.235 * place))
    reach = max(2.0, 1.15 * float(np.quantile([abs(one.percent) for _, one in rows], 0.95)))
    ax.axvspan(-100 * MARGIN, 100 * MARGIN, **REFERENCE_BAND)
    ax.axvline(0, color=REFERENCE_COLOR, linewidth=1.0)
    for y, one in rows:
        color, apart = optimizer_color(one.optimizer), one.low > 0 or one.high < 0
        if np.isfinite(one.low):
            ax.plot([one.low, one.high], [y, y], color=color, linewidth=1.3)
        at = float(np.clip(one.percent, -reach, reach))
        face = color if apart else "white"
        ax.plot(at, y, "o", color=color, markerfacecolor=face, markersize=5.5, clip_on=False, zorder=3)
        if at != one.percent:
            offset = {"xytext": (-2, 4), "textcoords": "offset points", "ha": "right", "va": "bottom", "fontsize": 8}
            ax.annotate(f"{one.percent:+.1f} %", (at, y), **offset)
    for group in groups:
        top = min(y for y, one in rows if one.group == group)
        ax.annotate(group, (1.01, top - 0.4), xycoords=("axes fraction", "data"), va="top", fontsize=9)
    ax.set_yticks([y for y, _ in rows], [f"{one.label} (n = {one.n})" for _, one in rows], fontsize=9)
    ax.grid(axis="y", visible=False)
    ax.set_ylim(place - 0.7, -0.8)
    ax.set_xlim(-reach, reach)
    ax.xaxis.set_major_locator(MaxNLocator(9))
    ax.set_xlabel("final loss minus that of the reference (% of the loss)")
    return figure


@captioned(
    "Use of the experts, every seed",
    "The share of tokens that each expert receives: a row for each seed, a column for each layer; white is an even "
    "share, and the conditions of a suite have one colour scale. Above each panel stand the final figures of its "
    "layer: evenness (entropy of the shares over its maximum, 1 = even), the busiest expert's share over an even one, "
    "and the number of dead experts (below a tenth of an even share).",
)
def experts_by_seed(runs: Sequence[Run], name: str = "", highest: float | None = None) -> Figure:
    """Shares of the routed tokens against steps of every seed of a condition, with the balance at the end; colours
    reach to the share `highest` (default: the highest of these runs)."""
    layers = sorted({line["layer"] for line in runs[0].experts})
    size = (min(12.0, 3.2 + 2.6 * len(layers)), 1.3 + 1.3 * len(runs))
    figure, axes = plt.subplots(len(runs), len(layers), figsize=size, sharex=True, sharey=True, squeeze=False)
    grids = [[expert_shares(run, layer) for layer in layers] for run in runs]
    even = 1 / len(grids[0][0][1])
    highest = max(highest or highest_share(runs), 1.01 * even)
    for place, (run, row, panels) in enumerate(zip(runs, grids, axes, strict=True)):
        for ax, layer, (steps, shares) in zip(panels, layers, row, strict=True):
            mesh = ax.pcolormesh(
                steps,
                np.arange(len(shares)),
                shares,
                norm=TwoSlopeNorm(even, 0, highest),
                cmap="PuOr_r",
                shading="nearest",
                rasterized=True,
            )
            ax.grid(False)
            ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            end = balance(shares[:, -1])
            words = f"evenness {end.evenness:.3f}, max / mean {end.max_over_mean:.2f}, dead {end.dead}"
            ax.set_title(f"layer {layer}\n{words}" if place == 0 else words, fontsize=8)
        panels[0].set_ylabel(f"seed {run.config['seed']}\nexpert")
    for ax in axes[-1]:
        ax.set_xlabel("step")
    bar = figure.colorbar(mesh, ax=axes, label="share of tokens", pad=0.02, aspect=30)
    bar.ax.axhline(even, color="black", linewidth=1.4)
    figure.suptitle(
        f"{name or optimizer_name(runs[0].optimizer)}: tokens of each expert (line on the bar: an even share)"
    )
    return figure


def highest_share(runs: Sequence[Run]) -> float:
    """Of the tokens that an expert received at any step, in any layer."""
    layers = {line["layer"] for run in runs for line in run.experts}
    return max(float(expert_shares(run, layer)[1].max()) for run in runs for layer in layers)
