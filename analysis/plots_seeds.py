"""Two seeds of each optimizer next to the difference of the optimizers, on shared scales.

    figure = seed_grid(muon, adamw, "effective_rank"); plots.save(figure, Path("plots"), "seeds_effective_rank")

So a reader sees which structure belongs to the optimizer and which to the seed. The style is that of plots.py.
"""

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.plots import Caption
from analysis.plots_spectra import (
    DIFFERENCE_COLORS,
    HEATMAP_COLORS,
    METRIC_TITLES,
    PROJECTION_TITLES,
    heat,
    only_outer_ticks,
)
from analysis.runs import Group, Run, optimizer_name

_HOW = (
    "A column for each projection, layers upwards, steps to the right. The first four rows are two seeds of each "
    "optimizer; the last three are differences: between the two seeds of Muon, between those of AdamW, and between the "
    "optimizers, as a mean over all seeds. Each projection has one scale for values and one for differences. Where the "
    "last row is strong and the two above it are pale, the optimizer made the structure and not the seed."
)
CAPTIONS = {
    "entropy": Caption(
        "Two seeds, entropy of the singular values",
        "In nats, of the shares s / Σs, as S3 defines it; the spectral entropy of other figures is of s² / Σs². "
        f"{_HOW}",
    ),
    "left_alignment": Caption(
        "Two seeds, alignment of update and weight", f"{_HOW} Before the first step there is no update."
    ),
    "effective_rank": Caption("Two seeds, effective rank", _HOW),
}


def _grid(runs: tuple[Run, ...], proj: str, key: str, steps: np.ndarray) -> np.ndarray:
    """The metric at these steps, a mean over the runs: (layers, E)."""
    found = [(run.grid(proj, key)) for run in runs]
    return np.mean([values[:, np.isin(at, steps)] for at, values in found], axis=0)


def seed_grid(muon: Group, adamw: Group, key: str) -> Figure:
    """The first two seeds of both groups, their differences, and the difference of the groups; a scale per projection
    for the values and one for the differences."""
    names = muon.runs[0].projections()
    sides = ((optimizer_name(muon.optimizer), muon.runs), (optimizer_name(adamw.optimizer), adamw.runs))
    rows = [(f"{name}\nseed {run.config['seed']}", (run,), None) for name, runs in sides for run in runs[:2]]
    for name, runs in sides:
        first, second = (run.config["seed"] for run in runs[:2])
        rows.append((f"{name}\n{first} − {second}", runs[:1], runs[1:2]))
    rows.append((f"{sides[0][0]} −\n{sides[1][0]}", sides[0][1], sides[1][1]))
    figure, axes = plt.subplots(7, len(names), figsize=(12, 8.6), sharex=True, sharey=True, squeeze=False)
    for column, name in enumerate(names):
        everyone = [run for _, runs in sides for run in runs]
        steps = everyone[0].grid(name, key)[0]
        for run in everyone[1:]:
            steps = np.intersect1d(steps, run.grid(name, key)[0])
        drawn = []
        for _, left, right in rows:
            values = _grid(left, name, key, steps)
            drawn.append(values if right is None else values - _grid(right, name, key, steps))
        known, gaps = np.stack(drawn[:4]), np.stack(drawn[4:])
        reach = float(np.nanmax(np.abs(gaps))) or 1e-9
        for row, values in enumerate(drawn):
            style = {"vmin": np.nanmin(known), "vmax": np.nanmax(known), "cmap": HEATMAP_COLORS}
            if row >= 4:
                style = {"norm": TwoSlopeNorm(0.0, -reach, reach), "cmap": DIFFERENCE_COLORS}
            mesh = heat(axes[row, column], steps, values, **style)
            if row in (3, 6):
                above = axes[:4, column] if row == 3 else axes[4:, column]
                bar = figure.colorbar(mesh, ax=above, location="bottom", aspect=14, shrink=0.95, pad=0.02)
                bar.ax.tick_params(labelsize=8)
                bar.locator = MaxNLocator(3)
                bar.update_ticks()
        axes[0, column].set_title(PROJECTION_TITLES[name])
        axes[-1, column].set_xlabel("step")
    only_outer_ticks(axes)
    for ax, (label, *_) in zip(axes[:, 0], rows, strict=True):
        ax.set_ylabel(label, fontsize=9)
    figure.suptitle(
        f"{METRIC_TITLES[key]}\nvertical axis: layer; one scale per projection for values, one for differences"
    )
    return figure
