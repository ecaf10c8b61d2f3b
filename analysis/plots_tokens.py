"""The figure of who learns which tokens: loaded runs that have logged their losses by token frequency -> a figure.

    figure = loss_by_decile(with_deciles(runs)); plots.save(figure, Path("plots"), "loss_by_decile")

The deciles are those of `corpus/frequency.py`; the style is that of plots.py.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from analysis.plots import REFERENCE_COLOR, WIDTH, LineStyle, captioned, group_handles, legend_below, line_styles
from analysis.runs import Group, Run, group_seeds
from analysis.stats import difference
from engine.files import DECILES

PLACES = np.arange(1, DECILES + 1)


def with_deciles(runs: Sequence[Run]) -> list[Run]:
    """Those of the runs whose last validation logged the loss by decile."""
    return [run for run in runs if "val_loss_by_decile" in run.val and np.isfinite(last_by_decile(run)).any()]


def last_by_decile(run: Run) -> np.ndarray:
    """The losses of the last validation, (10,), the most frequent tokens first."""
    return run.val["val_loss_by_decile"][-1]


@captioned(
    "Who learns the rare tokens",
    "The validation loss of frequent and rare tokens apart. Each decile holds about a tenth of the training text: the "
    "first a handful of tokens, the last most of the vocabulary. The right panel shows how far each setting is ahead "
    "of the reference, the one with the highest loss where none is declared; a line that rises to the right is a lead "
    "won on rare tokens. Bands: from the lowest to the highest seed on the left, 95 % over seeds on the right.",
)
def loss_by_decile(runs: Sequence[Run], behind: str = "") -> Figure:
    """Mean loss by decile of token frequency at the last validation, and the lead over the condition `behind`, without
    it over the group with the highest.

    The right panel, drawn where there is more than one group, is tested decile by decile as `stats.difference` does.
    """
    groups = group_seeds(runs)
    styles = line_styles(groups)
    losses = [{run.config["seed"]: last_by_decile(run) for run in group.pool()} for group in groups]
    figure, axes = plt.subplots(1, 1 + (len(groups) > 1), figsize=(WIDTH, 4.2), squeeze=False)
    for by_seed, style in zip(losses, styles, strict=True):
        values = np.array(list(by_seed.values()))
        _line(axes[0, 0], values.mean(axis=0), values.min(axis=0), values.max(axis=0), style)
    axes[0, 0].set_ylabel("validation loss (nats per token)")
    axes[0, 0].set_title("loss at the last validation")
    for ax in axes[0]:
        ax.set_xticks(PLACES)
        ax.set_xlabel("decile of token frequency, 10 = the rarest")
    if len(groups) > 1:
        declared = [i for i, style in enumerate(styles) if style.label == behind]
        worst = declared[0] if declared else max(range(len(groups)), key=lambda i: _last_loss(groups[i]))
        for i, style in enumerate(styles):
            if i != worst:
                _line(axes[0, 1], *_lead(losses[worst], losses[i]), style)
        axes[0, 1].axhline(0, color=REFERENCE_COLOR, linewidth=1.0)
        axes[0, 1].set_title(f"ahead of {styles[worst].label} by")
        axes[0, 1].set_ylabel("nats per token")
    figure.suptitle("Validation loss by decile of token frequency in the training text")
    legend_below(figure, group_handles(groups))
    return figure


def _line(ax: plt.Axes, middle: np.ndarray, low: np.ndarray, high: np.ndarray, style: LineStyle) -> None:
    ax.plot(PLACES, middle, marker="o", markersize=4, **style.line())
    if style.strong and np.nanmax(high - low, initial=0.0) > 0:
        ax.fill_between(PLACES, low, high, color=style.color, alpha=0.18, linewidth=0)


def _last_loss(group: Group) -> float:
    """-inf where it is not finite, so that such a group is no reference."""
    loss = np.mean([run.val["val_loss"][-1] for run in group.pool()])
    return float(loss) if np.isfinite(loss) else -np.inf


def _lead(worse: dict[int, np.ndarray], better: dict[int, np.ndarray]) -> np.ndarray:
    """worse - better with its interval, (3, 10); NaN where a decile has no targets."""
    lead = np.full((3, DECILES), np.nan)
    for i in np.flatnonzero(np.isfinite([*worse.values(), *better.values()]).all(axis=0)):
        test = difference(*({seed: float(values[i]) for seed, values in side.items()} for side in (worse, better)))
        lead[:, i] = test.difference, test.low, test.high
    return lead
