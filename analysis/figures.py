"""Which figures a report has for the runs it is given, with the words beside them.

    for picture in draw(runs, Path("plots")): print(picture.stem, picture.how_to_read)

A figure is drawn only where the runs have data for it, and with at most as many rows as stay readable: of many
settings, the best of each optimizer and model come first.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from analysis import plots, plots_layer, plots_spectra
from analysis.pages import Picture
from analysis.runs import Group, Run, group_seeds, representative
from analysis.verdict import arenas, judge
from engine.cli import make_folder

MOST_ROWS = 6  # of a figure with a row or a column for each run


@dataclass(frozen=True)
class Drawing:
    """A picture of the report and how to draw it."""

    picture: Picture
    draw: Callable[[], Figure]


def _drawing(stem: str, title: str, how_to_read: str, draw: Callable[[], Figure]) -> Drawing:
    return Drawing(Picture(stem, title, f"{title}. {how_to_read.split('. ')[0].rstrip('.')}.", how_to_read), draw)


def curve_drawings(runs: Sequence[Run]) -> list[Drawing]:
    """Losses, settings, sizes and experts, as far as the runs have something to show."""
    drawings = []
    parts = [[run for run in part if run.val] for part in arenas(runs)]
    for number, (part, verdict) in enumerate(zip(parts, judge(runs), strict=True), start=1):
        mark, title = ("", "") if number == 1 else (f"_{number}", f": {verdict.title}")
        if number == 1 and verdict.title:
            title = f": {verdict.title}"
        if part:
            drawings.append(
                _drawing(
                    f"loss_curves{mark}",
                    f"Loss and accuracy{title}",
                    "Lower loss and higher accuracy are better. The left column asks what each optimizer learns from "
                    "the same tokens, the right column what it learns in the same time; the clock leaves out "
                    "compilation, validation and checkpoints. A band spans the seeds.",
                    lambda part=part: plots.loss_curves(part),
                )
            )
        if verdict.pair and all(len(group.curve("val_loss")[0]) > 1 for group in verdict.pair):
            best, other = verdict.pair
            drawings.append(
                _drawing(
                    f"optimizer_comparison{mark}",
                    f"The lead over training{title}",
                    "The difference of the two validation losses at the same update and at the same second of "
                    "training. Where the band (95 % over seeds, drawn with two seeds or more) does not touch zero, the "
                    "lead is significant at that point.",
                    lambda best=best, other=other: plots.optimizer_comparison(other, best),
                )
            )
        finished = [group for group in group_seeds(part) if group.losses()]
        if len(finished) > 2:
            drawings.append(
                _drawing(
                    f"ablation_bars{mark}",
                    f"Every setting, best first{title}",
                    "Final validation loss of each setting; whiskers are 95 % intervals over seeds, dots single runs. "
                    "Settings whose whiskers overlap widely are not told apart by these runs.",
                    lambda part=part: plots.ablation_bars(part),
                )
            )
        if plots.has_rates(part):
            drawings.append(
                _drawing(
                    f"learning_rate_sensitivity{mark}",
                    f"Sensitivity to the learning rate{title}",
                    "The bars at the bottom of the first panel span the rates whose loss is at most 1 % (dark) and 5 % "
                    "(light) above the best one: the wider, the easier to tune. A best rate at the edge of its line "
                    "says that the grid was too narrow. Crosses at the top edge are runs without a final loss; the "
                    "last panel shows how unsteady training was.",
                    lambda part=part: plots.learning_rate_sensitivity(part),
                )
            )
    if plots.has_sizes(runs):
        drawings.append(
            _drawing(
                "model_scaling",
                "Model size",
                "The best setting of each optimizer at each size. Sizes trained on different token budgets do not "
                "share one curve: read the table beside it.",
                lambda: plots.model_scaling(runs),
            )
        )
    if any("lr" in run.train for run in runs):
        drawings.append(
            _drawing(
                "learning_rate_schedules",
                "Learning-rate schedules",
                "The rate that each update used. Schedules count updates, and the first already has a rate above zero.",
                lambda: plots.learning_rate_schedules(runs),
            )
        )
    routed = [group.runs[0] for group in group_seeds([run for run in runs if run.experts])]
    for number, run in enumerate(routed[:2], start=1):
        drawings.append(
            _drawing(
                f"expert_utilization{'' if number == 1 else f'_{number}'}",
                f"Use of the experts: {run.name}",
                "The share of tokens that each expert is given. An even share is marked on the bar; an expert that "
                "stays dark learns nothing.",
                lambda run=run: plots.expert_utilization(run),
            )
        )
    return drawings


def watched(runs: Sequence[Run]) -> list[Run]:
    """Runs with spectra of one shape, of the model that most of them have: only these can share panels."""
    shapes: dict[tuple, list[Run]] = {}
    for run in runs:
        if run.projections():
            ranks = tuple((proj, run.full_rank(proj)) for proj in run.projections())
            shapes.setdefault((run.config["model"], run.layers, ranks), []).append(run)
    return max(shapes.values(), key=len, default=[])


def spectra_drawings(runs: Sequence[Run]) -> list[Drawing]:
    """Figures of the weights; `runs` as `watched` returns them."""
    if not runs:
        return []
    groups = group_seeds(runs)
    several = representative(groups, plots.FEW_GROUPS)
    pooled = [run for group in several for run in group.runs]
    rows = list(runs) if len(runs) <= MOST_ROWS else [group.runs[0] for group in representative(groups, MOST_ROWS)]
    pair = [group.runs[0] for group in representative(groups, 2)]
    seeded = [group for group in representative(groups, MOST_ROWS) if len(group.runs) > 1]
    seeded = [Group(group.runs[:MOST_ROWS]) for group in seeded]

    def heatmap(key: str, title: str, how_to_read: str) -> Drawing:
        return _drawing(f"{key}_heatmap", title, how_to_read, lambda: plots_spectra.metric_heatmap(rows, key))

    drawings = [
        _drawing(
            "alignment_with_chance",
            "Alignment over time, with chance",
            "How far the update pushes along the weight's own five strongest output directions. The dotted line is "
            "what random subspaces reach, the grey band how far a single random pair strays from it; the mean over "
            "layers strays less. Muon's update has nearly equal singular values, "
            "so its five strongest directions are nearly arbitrary, and low alignment alone is no sign of exploration. "
            "The lower row, where it was logged, shows how arbitrary: the nearer the gap s₅ − s₆ to zero, the more so.",
            lambda: plots_spectra.alignment_with_chance(pooled),
        ),
        _drawing(
            "effective_rank_over_time",
            "Effective rank over time",
            "Averaged over layers and seeds; the band spans the lowest to the highest layer. The dotted line is the "
            "value of the random initial weights, which depends on the shape alone: differences between projections "
            "that exist there were not learned.",
            lambda: plots_spectra.metric_over_time(pooled, "effective_rank"),
        ),
        heatmap(
            "effective_rank",
            "Effective rank, layer by layer",
            "The number of directions that a matrix uses, between 1 and its smaller side. A dark band that spreads "
            "would be rank collapse. Compare colours down a column, not across.",
        ),
        _drawing(
            "quick_scan",
            "Quick scan",
            "Each strip is one run and shows all its matrices, so that a matrix that loses rank stands out as a dark "
            "line; one colour scale for all.",
            lambda: plots_spectra.quick_scan(rows),
        ),
    ]
    if seeded:
        grid_runs = [run for group in seeded for run in group.runs]
        drawings.append(
            _drawing(
                "rank_grid",
                "Effective rank, every seed",
                "A row per setting, a column per seed, one colour scale. What differs between rows but not within "
                "them belongs to the optimizer.",
                lambda: plots_spectra.rank_grid(grid_runs),
            )
        )
    for group in [group for group in seeded if len(group.runs) > 1][:2]:
        label = (
            plots.group_labels(several)[several.index(group)] if group in several else plots.group_labels([group])[0]
        )
        drawings.append(
            _drawing(
                f"pair_grid_{group.optimizer}",
                f"Two seeds of {label}",
                "The first two seeds on one scale per projection and their difference below, on a scale of its own "
                "around zero: structure that both share is no accident of the seed.",
                lambda group=group: plots_spectra.pair_grid(*group.runs[:2], "effective_rank"),
            )
        )
    drawings += [
        heatmap(
            "spectral_entropy",
            "Spectral entropy, layer by layer",
            "1 means that all singular values are equal, small values that a few directions carry the matrix. Shapes "
            "differ already at initialisation, so compare colours down a column, not across.",
        ),
        _drawing(
            "spectral_entropy_by_depth",
            "Spectral entropy against layer",
            "A scan through the depth of the network at five moments, dark (early) to light (late). Layers that leave "
            "the pack late in training do so because of training, not of their shape.",
            lambda: plots_spectra.depth_profiles(pair, "spectral_entropy"),
        ),
        heatmap(
            "left_alignment",
            "Alignment, layer by layer",
            "Of update and weight, output directions. The line on each bar is the level of chance: compare with it.",
        ),
        _drawing(
            "spectral_norm_by_depth",
            "Spectral norm against depth",
            "The largest factor by which a projection can stretch its input. The dotted line is where training began. "
            "Norms above 4 to 5 deserve a look.",
            lambda: plots_spectra.spectral_norm_by_depth(pooled),
        ),
        heatmap("spectral_norm", "Spectral norm, layer by layer", "The largest singular value, as it grows."),
        heatmap(
            "weight_norm",
            "Weight norm, layer by layer",
            "The Frobenius norm: how large a matrix is in all. Without weight decay it mostly grows.",
        ),
        heatmap(
            "update_norm",
            "Update norm, layer by layer",
            "The size of a single update. For Muon it follows shape and learning rate, for AdamW nearly so.",
        ),
        _drawing(
            "singular_value_fan",
            "Singular values while training",
            "Every singular value of the middle layer is a line. A fan that opens upwards grows a few strong "
            "directions; lines that dive have lost directions.",
            lambda: plots_layer.singular_value_fan(pair),
        ),
        _drawing(
            "singular_value_spectrum",
            "Singular values at the end",
            "Every singular value of the middle layer, largest first, against the initial ones. A flat line is an "
            "orthogonal matrix.",
            lambda: plots_layer.singular_value_spectrum(pooled),
        ),
        _drawing(
            "layer_mri",
            "MRI of one layer",
            "The middle layer's six projections through training. Alignment is shown as its distance from chance; the "
            "update norm as a share of the weight norm, the relative change of one update.",
            lambda: plots_layer.layer_mri(pair),
        ),
    ]
    return drawings


def draw(
    runs: Sequence[Run], folder: Path, formats: Sequence[str] = ("png",), only: Collection[str] | None = None
) -> list[Picture]:
    """Save every figure the runs have data for, or `only` those, as folder/<stem>.png (and .svg); returns what was
    drawn."""
    drawings = curve_drawings(runs) + spectra_drawings(watched(runs))
    drawings = [drawing for drawing in drawings if only is None or drawing.picture.stem in only]
    make_folder(folder, exist_ok=True)
    for old in (*folder.glob("*.png"), *folder.glob("*.svg")):
        old.unlink()
    for drawing in drawings:
        plots.save(drawing.draw(), folder, drawing.picture.stem, formats)
    return [drawing.picture for drawing in drawings]
