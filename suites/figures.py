"""Which figures the page of a suite has: its conditions, curves, sensitivity, experts, and the spectra where logged.

pictures = analysis.plots.save_all(figures(results), folder, ("png",))
"""

import math
from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from analysis import plots, plots_conditions, plots_layer, plots_seeds, plots_settings, plots_spectra
from analysis.plots import Drawing, drawing
from analysis.plots_conditions import Series
from analysis.runs import Group, Run, optimizer_name, stem_of
from suites import plots as suite_plots
from suites.results import Outcome, Results

# What the axis of a sensitivity curve says; a value of 0 that means "off" is drawn beyond the largest.
SETTING_WORDS = {
    "momentum": "momentum",
    "weight_decay": "weight decay",
    "ns_steps": "Newton-Schulz steps",
    "warmup": "warm-up, as a share of the steps",
    "grad_clip": "largest gradient norm",
    "min_lr": "last rate, as a share of the peak",
    "adamw_lr": "rate of embedding, gains and router",
}
ZERO_IS_OFF = ("grad_clip",)


def value_of(outcome: Outcome, setting: str) -> float | None:
    """The numeric setting that the suite varies, None where it is not a number."""
    value = outcome.condition.fields.get(setting)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return math.inf if value == 0 and setting in ZERO_IS_OFF else float(value)


def series(results: Results) -> list[Series]:
    """The conditions with finished runs; sizes and the optimizers of a sweep have panels of their own."""
    varies = results.suite.varies
    found = []
    for outcome in results.outcomes:
        if not outcome.losses():
            continue
        panel = ""
        if varies == "params":
            panel = outcome.name.removeprefix(f"{outcome.optimizer} ").removesuffix(" as written")
        elif varies == "lr":
            panel = optimizer_name(outcome.optimizer)
        versus = None if varies == "lr" else outcome.condition.versus
        value = value_of(outcome, varies)
        found.append(Series(outcome.name, tuple(outcome.finished()), versus, panel, value))
    return found


def fair_runs(results: Results) -> list[Run]:
    return [run for outcome in results.outcomes if not outcome.as_written for run in outcome.finished()]


def watched(results: Results) -> list[Run]:
    """The fair runs that have logged spectra, where the suite compares two optimizers."""
    return [run for run in fair_runs(results) if run.projections()] if results.crosses() else []


def figures(results: Results) -> list[Drawing]:
    """The suite's figures, as far as there are runs for them."""
    conditions = series(results)
    if not conditions:
        return []
    varies, crosses = results.suite.varies, results.crosses()

    def of_suite(kind: str, plot: Callable[..., Figure], *arguments: Any, about: str = "", **more: Any) -> Drawing:
        return drawing(plot, *arguments, stem=f"{results.name}_{kind}", about=about, **more)

    found = []
    if varies == "lr":
        if plots_settings.has_rates(results.runs()):
            found.append(of_suite("rates", plots_settings.learning_rate_sensitivity, results.runs()))
    else:
        found.append(of_suite("bars", suite_plots.condition_bars, results))
    if varies == "params":
        found.append(of_suite("sizes", plots_settings.model_scaling, fair_runs(results)))
    elif varies in SETTING_WORDS and sum(one.value is not None for one in conditions) > 2:
        numeric = [one for one in conditions if one.value is not None]
        found.append(of_suite("sensitivity", plots_conditions.sensitivity, numeric, SETTING_WORDS[varies]))
    if any(len(run.val["step"]) > 1 for one in conditions for run in one.runs):
        found.append(of_suite("curves", plots_conditions.training_curves, conditions))
    if crosses and varies != "params":
        found.append(of_suite("losses", plots.loss_curves, fair_runs(results)))
        if all(len(run.val["step"]) > 2 for one in conditions for run in one.runs):
            found.append(of_suite("time_to_loss", suite_plots.time_to_loss, results, *crosses[-1]))
    if varies == "schedule":
        found.append(of_suite("schedules", plots.learning_rate_schedules, results.runs()))
    routed = [outcome for pair in crosses for outcome in pair if any(run.experts for run in outcome.finished())]
    for outcome in routed:
        kind, about = f"experts_{stem_of(outcome.optimizer)}", optimizer_name(outcome.optimizer)
        runs = [run for run in outcome.finished() if run.experts]
        found.append(of_suite(kind, plots_conditions.experts_by_seed, runs, about=about))
    if runs := watched(results):
        found += spectra(runs, of_suite)
        muon, adamw = (Group(tuple(o.finished())) for o in crosses[-1])
        if len(muon.runs) > 1 and len(adamw.runs) > 1:
            for key, caption in plots_seeds.CAPTIONS.items():
                kind = f"seeds_{key}"
                found.append(of_suite(kind, plots_seeds.seed_grid, muon, adamw, key, caption=caption))
    return found


def spectra(runs: list[Run], of_suite: Callable[..., Drawing]) -> list[Drawing]:
    """The documents' four figures of the weights, effective rank, and the spectrum of the middle layer."""
    entropy = plots_spectra.OVER_TIME_CAPTIONS["spectral_entropy"]
    return [
        of_suite("norm", plots_spectra.spectral_norm_by_depth, runs),
        of_suite("entropy", plots_spectra.metric_over_time, runs, "spectral_entropy", caption=entropy),
        of_suite("alignment", plots_spectra.alignment_with_chance, runs),
        of_suite("spectrum", plots_layer.singular_value_spectrum, runs),
        of_suite("rank", plots_spectra.metric_over_time, runs),
    ]
