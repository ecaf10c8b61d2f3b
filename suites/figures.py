"""Which figures the page of a suite has: conditions, curves, sensitivity, rare tokens, experts, spectra where logged.

pictures = analysis.plots.save_all(figures(results), folder, ("png",))
"""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure

from analysis import (
    plots,
    plots_conditions,
    plots_layer,
    plots_momentum,
    plots_seeds,
    plots_settings,
    plots_spectra,
    plots_tokens,
)
from analysis.plots import Caption, Drawing, drawing
from analysis.plots_conditions import Series
from analysis.runs import Group, Run, condition_name, group_seeds, optimizer_name, stem_of
from suites import plots as suite_plots
from suites.results import Outcome, Results
from suites.suite import AS_WRITTEN, OPTIMIZERS

# What the axis of a sensitivity curve says; a value of 0 that means "off" is drawn beyond the largest.
SETTING_WORDS = {
    "momentum": "momentum",
    "weight_decay": "weight decay",
    "ns_steps": "Newton-Schulz steps",
    "warmup": "warm-up, as a share of the steps",
    "grad_clip": "largest gradient norm",
    "min_lr": "last rate, as a share of the peak",
    "adamw_lr": "rate of embedding, gains and router",
    "heads_per_matrix": "heads in a matrix",
}
ZERO_WORDS = {"grad_clip": "off", "heads_per_matrix": "all"}
DEFAULTS = {"heads_per_matrix": 0}  # of conditions that do not set what their suite varies
PAIR_EACH = tuple(plots_settings.SCALED)  # suites that vary one of these compare the optimizers at each value
SCANNED = 3  # seeds of each optimizer in the quick scan


def value_of(outcome: Outcome, setting: str) -> float | None:
    """The numeric setting that the suite varies, None where it is not a number."""
    value = outcome.condition.fields.get(setting, DEFAULTS.get(setting))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return math.inf if value == 0 and setting in ZERO_WORDS else float(value)


def pair_name(outcome: Outcome) -> str:
    """What the two optimizers of a pair share: '192 wide' of 'muon 192 wide', nothing of 'muon'."""
    return outcome.name.removeprefix(outcome.optimizer).removesuffix(AS_WRITTEN).strip(" ,")


def series(results: Results) -> list[Series]:
    """The conditions with finished runs; sizes and the optimizers of a sweep have panels of their own."""
    varies = results.suite.varies
    found = []
    for outcome in results.outcomes:
        if not outcome.losses():
            continue
        panel = ""
        if varies in PAIR_EACH:
            panel = pair_name(outcome)
        elif varies == "lr":
            panel = optimizer_name(outcome.optimizer) if outcome.arm == outcome.optimizer else outcome.arm
        versus = None if varies == "lr" else outcome.condition.versus
        value = None if varies in PAIR_EACH else value_of(outcome, varies)
        found.append(Series(outcome.name, tuple(outcome.finished()), versus, panel, value))
    return found


def arms_of(results: Results) -> dict[str, list[Run]]:
    """The finished runs by arm, where arms share an optimizer: they need panels of their own."""
    found = {arm: [run for o in results.of_arm(arm) for run in o.finished()] for arm in results.arms()}
    return {arm: runs for arm, runs in found.items() if runs} if len(found) > len(OPTIMIZERS) else {}


def label_of(outcome: Outcome, varies: str) -> str:
    """What figures call a condition; nothing, so that they name the optimizer, of a pair at each value."""
    return "" if varies in PAIR_EACH else condition_name(outcome.name, outcome.optimizer)


def named(outcome: Outcome, varies: str) -> list[Run]:
    """The finished runs under their condition's name."""
    return [replace(run, condition=label_of(outcome, varies)) for run in outcome.finished()]


def fair_runs(results: Results) -> list[Run]:
    return [run for o in results.outcomes if not o.as_written for run in named(o, results.suite.varies)]


def comparable(results: Results) -> list[Outcome]:
    """The fair conditions whose runs can share a panel, where the suite compares optimizers: of pairs at several sizes
    or budgets, the last that both optimizers have finished."""
    crosses = results.crosses()
    if crosses and results.suite.varies in PAIR_EACH:
        return list(crosses[-1])
    return [o for o in results.outcomes if o.finished() and not o.as_written] if crosses else []


def watched(results: Results) -> list[Run]:
    """The comparable runs that have logged spectra."""
    return [run for o in comparable(results) for run in named(o, results.suite.varies) if run.projections()]


def shared_name(results: Results) -> str:
    """The size or budget of the comparable runs; empty where the suite has one alone."""
    return pair_name(comparable(results)[0]) if results.suite.varies in PAIR_EACH and comparable(results) else ""


def routed(results: Results) -> list[Outcome]:
    """The conditions whose experts are shown: of two optimizers, and of all where the balancing varies."""
    shown = results.outcomes if results.suite.varies == "balance" else [o for pair in results.crosses() for o in pair]
    return [outcome for outcome in shown if any(run.experts for run in outcome.finished())]


def figures(results: Results) -> list[Drawing]:
    """The suite's figures, as far as there are runs for them."""
    conditions = series(results)
    if not conditions:
        return []
    varies, crosses, shared = results.suite.varies, results.crosses(), shared_name(results)

    def of_suite(kind: str, plot: Callable[..., Figure], *arguments: Any, about: str = "", **more: Any) -> Drawing:
        return drawing(plot, *arguments, stem=f"{results.name}_{kind}", about=about, **more)

    found, arms = [], arms_of(results) if varies == "lr" else {}
    if varies == "lr":
        if arms:
            found.append(of_suite("rates", plots_settings.rates_of_arms, arms))
        elif plots_settings.has_rates(results.runs()):
            found.append(of_suite("rates", plots_settings.learning_rate_sensitivity, results.runs()))
    else:
        found.append(of_suite("bars", suite_plots.condition_bars, results))
    if varies in PAIR_EACH:
        caption = plots_settings.SCALED[varies].caption
        found.append(of_suite("sizes", plots_settings.model_scaling, fair_runs(results), varies, caption=caption))
    numeric = [one for one in conditions if one.value is not None]
    if varies in SETTING_WORDS and len({one.value for one in numeric}) == len(numeric) > 2:  # one at each value
        words = SETTING_WORDS[varies], ZERO_WORDS.get(varies, "0")
        found.append(of_suite("sensitivity", plots_conditions.sensitivity, numeric, *words))
    if not arms and any(len(run.val["step"]) > 1 for one in conditions for run in one.runs):
        caption = curves_caption([run for one in conditions for run in one.runs], any(one.versus for one in conditions))
        found.append(of_suite("curves", plots_conditions.training_curves, conditions, caption=caption))
    if crosses and varies not in PAIR_EACH:
        found.append(of_suite("losses", plots.loss_curves, fair_runs(results)))
    if crosses and all(len(run.val["step"]) > 2 for one in conditions for run in one.runs):
        adamw = crosses[-1 if varies in PAIR_EACH else 0][1]
        compared, by_name = [a for a, b in crosses if b is adamw], varies not in PAIR_EACH
        timed = suite_plots.time_to_loss, results, compared, adamw, by_name
        found.append(of_suite("time_to_loss", *timed, about=shared))
    if varies == "schedule":
        found.append(of_suite("schedules", plots.learning_rate_schedules, results.runs()))
    found += deciles(results)
    shares = [run for outcome in routed(results) for run in outcome.finished() if run.experts]
    highest = plots_conditions.highest_share(shares) if shares else 0.0
    for outcome in routed(results):
        runs = [run for run in outcome.finished() if run.experts]
        about = condition_name(outcome.name, outcome.optimizer)
        kind = f"experts_{stem_of(outcome.name)}"
        found.append(of_suite(kind, plots_conditions.experts_by_seed, runs, about, highest, about=about))
    if runs := watched(results):
        found += spectra(runs, functools.partial(of_suite, about=shared))
        muon, adamw = (Group(tuple(o.finished())) for o in crosses[-1])
        if len(muon.runs) > 1 and len(adamw.runs) > 1:
            for key, caption in plots_seeds.CAPTIONS.items():
                kind = f"seeds_{key}"
                found.append(of_suite(kind, plots_seeds.seed_grid, muon, adamw, key, caption=caption, about=shared))
    return found


def deciles(results: Results) -> list[Drawing]:
    """The losses of frequent and rare tokens of a suite that compares optimizers."""
    runs = [run for outcome in comparable(results) for run in named(outcome, results.suite.varies)]
    if not (logged := plots_tokens.with_deciles(runs)):
        return []
    stem, about, (_, adamw) = f"{results.name}_deciles", shared_name(results), results.crosses()[0]
    behind = label_of(adamw, results.suite.varies)
    return [drawing(plots_tokens.loss_by_decile, logged, behind, stem=stem, about=about)]


def curves_caption(runs: list[Run], compared: bool) -> Caption:
    """With second panels where conditions are compared, and the loss of token frequencies alone, which the axis may not
    reach."""
    caption = plots_conditions.training_curves.caption
    how = [caption.how_to_read, *([plots_conditions.DIFFERENCES] if compared else [])]
    if levels := plots.unigram_levels(runs):
        words = " or ".join(f"{level:.2f}" for level in levels)
        how.append(f"Dotted where the axis reaches it: what token frequencies alone give, {words} nats.")
    return Caption(caption.title, " ".join(how))


def scan_caption() -> Caption:
    caption = plots_spectra.quick_scan.caption
    return Caption(caption.title, f"{caption.how_to_read} Here: the first {SCANNED} seeds of each optimizer.")


def spectra(runs: list[Run], of_suite: Callable[..., Drawing]) -> list[Drawing]:
    """The rank of every run, the documents' four figures of the weights, and what the updates are made of."""
    captions, over_time = plots_spectra.OVER_TIME_CAPTIONS, plots_spectra.metric_over_time
    first_seeds = [run for group in group_seeds(runs) for run in group.runs[:SCANNED]]
    found = [
        of_suite("scan", plots_spectra.quick_scan, first_seeds, caption=scan_caption()),
        of_suite("rank_grid", plots_spectra.rank_grid, runs),
        of_suite("norm", plots_spectra.spectral_norm_by_depth, runs),
        of_suite("entropy", over_time, runs, "spectral_entropy", caption=captions["spectral_entropy"]),
        of_suite("alignment", plots_spectra.alignment_with_chance, runs),
        of_suite("spectrum", plots_layer.singular_value_spectrum, runs),
        of_suite("rank", over_time, runs),
    ]
    if logged := plots_momentum.with_momentum(runs):
        found.append(of_suite("momentum", plots_momentum.momentum_over_time, logged))
        first = [group.runs[0] for group in group_seeds(logged)]
        found.append(of_suite("momentum_spectra", plots_momentum.momentum_spectra, first))
    if logged := plots_spectra.with_logged(runs, plots_momentum.RESIDUAL):
        found.append(of_suite("residual", plots_momentum.newton_schulz_residual, logged))
    return found
