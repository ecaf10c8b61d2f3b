"""Which figures a report has for the runs it is given.

    for picture in draw(runs, Path("plots")): print(picture.stem, picture.how_to_read)

A figure is drawn only where the runs have data for it, and with at most as many rows as stay readable: of many
settings, the best of each optimizer and model come first. Captions are in plots*.py, above each figure's function.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from analysis import plots, plots_layer, plots_momentum, plots_settings, plots_spectra, plots_tokens
from analysis.pages import Picture
from analysis.plots import Drawing, drawing
from analysis.runs import Group, Run, group_seeds, representative, stem_of
from analysis.verdict import comparable_sets, judge
from engine.cli import make_folder

MOST_ROWS = 6  # of a figure with a row or a column for each run


def curve_drawings(runs: Sequence[Run]) -> list[Drawing]:
    """Losses, settings, sizes and experts, where the runs have data for them."""
    drawings = []
    for number, (members, verdict) in enumerate(zip(comparable_sets(runs), judge(runs), strict=True), start=1):
        mark = "" if number == 1 else f"_{number}"
        part = [run for run in members if run.val]
        if part:
            drawings.append(drawing(plots.loss_curves, part, stem=f"loss_curves{mark}", about=verdict.title))
        if verdict.pair and all(len(group.curve("val_loss")[0]) > 1 for group in verdict.pair):
            stem = f"optimizer_comparison{mark}"
            drawings.append(
                drawing(plots.optimizer_comparison, *reversed(verdict.pair), stem=stem, about=verdict.title)
            )
        if len([group for group in group_seeds(part) if group.losses()]) > 2:
            stem = f"ablation_bars{mark}"
            drawings.append(drawing(plots_settings.ablation_bars, part, stem=stem, about=verdict.title))
        if counted := plots_tokens.with_deciles(part):
            drawings.append(
                drawing(plots_tokens.loss_by_decile, counted, stem=f"loss_by_decile{mark}", about=verdict.title)
            )
        if plots_settings.has_rates(part):
            stem = f"learning_rate_sensitivity{mark}"
            drawings.append(drawing(plots_settings.learning_rate_sensitivity, part, stem=stem, about=verdict.title))
    if plots_settings.has_sizes(runs):
        drawings.append(drawing(plots_settings.model_scaling, runs))
    if any("lr" in run.train for run in runs):
        drawings.append(drawing(plots.learning_rate_schedules, runs))
    routed = [group.runs[0] for group in group_seeds([run for run in runs if run.experts])]
    for run, stem in zip(routed, ("expert_utilization", "expert_utilization_2"), strict=False):
        drawings.append(drawing(plots.expert_utilization, run, stem=stem, about=run.name))
    return drawings


def watched(runs: Sequence[Run]) -> list[Run]:
    """Runs with spectra of one shape, of the model that most of them have: only these can share panels."""
    shapes: dict[tuple, list[Run]] = {}
    for run in runs:
        if run.projections():
            ranks = tuple((proj, run.full_rank(proj)) for proj in run.projections())
            shapes.setdefault((run.config["model"], run.layers, ranks), []).append(run)
    return max(shapes.values(), key=len, default=[])


def spectra_drawings(runs: Sequence[Run], layers: Sequence[int] = ()) -> list[Drawing]:
    """Figures of the weights, those of one layer for each of `layers` (default: the middle one); `runs` as `watched`
    returns them."""
    if not runs:
        return []
    groups = group_seeds(runs)
    several = representative(groups, plots.FEW_GROUPS)
    pooled = [run for group in several for run in group.runs]
    rows = list(runs) if len(runs) <= MOST_ROWS else [group.runs[0] for group in representative(groups, MOST_ROWS)]
    pair = [group.runs[0] for group in representative(groups, 2)]
    seeded = [group for group in representative(groups, MOST_ROWS) if len(group.runs) > 1]
    seeded = [Group(group.runs[:MOST_ROWS]) for group in seeded]

    def heatmap(key: str) -> Drawing:
        caption = plots_spectra.HEATMAP_CAPTIONS[key]
        return drawing(plots_spectra.metric_heatmap, rows, key, stem=f"{key}_heatmap", caption=caption)

    shown = [layer for layer in layers if layer < runs[0].layers] or [plots_layer.middle_layer(runs[0])]
    of_one = (
        (plots_layer.singular_value_fan, pair),
        (plots_layer.singular_value_spectrum, pooled),
        (plots_layer.layer_mri, pair),
    )

    def of_layer(layer: int, plot: Callable[..., Figure], some: Sequence[Run]) -> Drawing:
        stem, about = (f"{plot.__name__}_{layer}", f"layer {layer}") if len(shown) > 1 else ("", "")
        return drawing(plot, some, layer, stem=stem, about=about)

    drawings = [
        drawing(plots_spectra.alignment_with_chance, pooled),
        drawing(plots_spectra.metric_over_time, pooled, stem="effective_rank_over_time"),
        heatmap("effective_rank"),
        drawing(plots_spectra.quick_scan, rows),
    ]
    if seeded:
        drawings.append(drawing(plots_spectra.rank_grid, [run for group in seeded for run in group.runs]))
    seen: set[str] = set()
    for group, label in zip(seeded, plots.group_labels(seeded), strict=True):
        if group.optimizer not in seen and len(seen) < 2:
            stem = f"pair_grid_{stem_of(group.optimizer)}"
            drawings.append(drawing(plots_spectra.pair_grid, *group.runs[:2], stem=stem, about=label))
            seen.add(group.optimizer)
    if logged := plots_momentum.with_momentum(pooled):
        drawings.append(drawing(plots_momentum.momentum_over_time, logged))
    if logged := plots_momentum.with_momentum(pair):
        drawings.append(drawing(plots_momentum.momentum_spectra, logged))
    if logged := plots_spectra.with_logged(pooled, plots_momentum.RESIDUAL):
        drawings.append(drawing(plots_momentum.newton_schulz_residual, logged))
    return [
        *drawings,
        heatmap("spectral_entropy"),
        drawing(plots_spectra.depth_profiles, pair, stem="spectral_entropy_by_depth"),
        heatmap("left_alignment"),
        drawing(plots_spectra.spectral_norm_by_depth, pooled),
        heatmap("spectral_norm"),
        heatmap("weight_norm"),
        heatmap("update_norm"),
        *(of_layer(layer, plot, some) for layer in shown for plot, some in of_one),
    ]


def draw(
    runs: Sequence[Run],
    folder: Path,
    formats: Sequence[str] = ("png",),
    only: Collection[str] | None = None,
    layers: Sequence[int] = (),
) -> list[Picture]:
    """Save every figure the runs have data for, or `only` those, as folder/<stem>.png (and .svg); returns the
    pictures. `layers` as in spectra_drawings."""
    drawings = curve_drawings(runs) + spectra_drawings(watched(runs), layers)
    drawings = [one for one in drawings if only is None or one.picture.stem in only]
    make_folder(folder, exist_ok=True)
    for old in (*folder.glob("*.png"), *folder.glob("*.svg")):
        old.unlink()
    return plots.save_all(drawings, folder, formats)
