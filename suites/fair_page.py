"""The pages of fair-trials and fair-fight: the ways to win as one table, the trials, the search space.

    FINDINGS["fair-fight"](results, known); chapters(results, known, pictures); drawings(results, known)

Differences are of the final validation loss in nats; ratios are the reference's tokens or seconds over the arm's.
"""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from analysis.pages import Chapter, Picture, Section, Table, counted, number
from analysis.plots import Drawing, drawing
from analysis.plots_tokens import loss_by_decile, with_deciles
from engine.own_optimizer import is_own, options_of
from suites.arms import value_of
from suites.fair import EQUAL_TIME, EQUAL_TOKENS, FIGHT, TRIALS
from suites.fair_plots import PLANE, fight_curves, setting_effects, trial_planes, tuning_curves
from suites.fair_ways import decile_sentence, fight_findings, lead_sentences, time_sentences, ways_table
from suites.results import Outcome, Results
from suites.tables import conditions_table, p_cell
from suites.tuning import ON_EDGE, band, by_arm, effects, expected_best, lead, powers, trials_needed


def trial_findings(results: Results) -> list[str]:
    sentences = []
    own = by_arm(results)
    for arm in results.arms():
        if lost := sum(o.lost for o in results.of_arm(arm)):
            sentences.append(f"{arm}: {counted(lost, 'trial')} failed without diverging, so left out (--retry).")
    for arm, values in own.items():
        n, curve, diverged = len(values), expected_best(values), sum(o.diverged for o in results.of_arm(arm))
        few = [k for k in (1, 4, 16) if k < n]
        after = ", ".join(f"{curve[k - 1]:.4f} after {counted(k, 'trial')}" for k in few)
        near = trials_needed(values, 1.01 * values.min())
        sentences.append(
            f"{arm}: best of {n} trials {values.min():.4f}, {diverged} diverged; expected {after}; within 1 % of its "
            f"best after {counted(near, 'trial')}."
        )
    for arm, values in own.items():
        for other, theirs in own.items():
            if arm != other and values.min() <= theirs.min():
                many = counted(trials_needed(values, theirs.min()), "trial")
                sentences.append(
                    f"{arm} is expected to reach the best of {len(theirs)} trials of {other} after {many}."
                )
    if edges := on_edges(results):
        sentences.append(f"ON THE EDGE of the range, so a wider one may do better: {', '.join(edges)}.")
    return sentences


def on_edges(results: Results) -> list[str]:
    """The settings whose best trial asks for a wider range, with its place on the axis."""
    found, best = effects(results), {arm: results.best(arm) for arm in results.arms()}
    told = []
    for (arm, setting), one in found.items():
        axis, value = results.space(arm)[setting], best[arm] and value_of(best[arm].condition.fields, setting)
        if value is not None and one.edge(axis, value) == ON_EDGE:
            told.append(f"{setting} of {arm} at {100 * axis.place(value):.0f} %")
    return told


def expectation_table(results: Results) -> Table | None:
    """The figure's numbers at powers of two, with the band where it holds, and each arm's lead over the reference."""
    rows, trials, reference = [], by_arm(results), results.arms()[0]
    for arm, own in trials.items():
        curve, (low, high) = expected_best(own), band(own)
        bands = [f" ({a:.3f} to {b:.3f})" for a, b in zip(low, high, strict=True)]
        row = {
            "arm": arm,
            "trials": str(len(own)),
            "diverged": str(sum(o.diverged for o in results.of_arm(arm))),
            "median": f"{np.median(own):.4f}",
        }
        ks = powers(len(own))
        rows.append(row | {f"best of {k}": f"{curve[k - 1]:.4f}{bands[k - 1] if k <= len(bands) else ''}" for k in ks})
    for arm in [arm for arm in trials if arm != reference and reference in trials]:
        by_k = lead(trials[arm], trials[reference]).by_k
        row = {"arm": f"lead of {arm}", "median": f"{np.median(trials[reference]) - np.median(trials[arm]):.4f}"}
        rows.append(row | {f"best of {k}": f"{by_k[k - 1]:.4f}" for k in powers(len(by_k))})
    columns = dict.fromkeys(key for row in rows for key in row)
    return Table.of([{key: row.get(key, "-") for key in columns} for row in rows], whole=True) if rows else None


def space_table(results: Results) -> Table | None:
    """The declared search space, where the best trial is in it, and what each setting does."""
    rows, found = [], effects(results)
    for arm in results.arms():
        best = results.best(arm)
        for setting, axis in results.space(arm).items():
            if best is None or (arm, setting) not in found:
                continue
            value, own = value_of(best.condition.fields, setting), found[arm, setting]
            row = {
                "arm": arm,
                "setting": setting,
                "from": f"{axis.low:g}",
                "to": f"{axis.high:g}",
                "even in": axis.along,
                "best trial": f"{value:g}",
                "place": f"{100 * axis.place(value):.0f} %",
                "edge": own.edge(axis, value),
                "rank correlation": number(own.rho, "+.2f"),
                "p Holm": p_cell(own.p_holm),
                "worst - best third": number(own.nats, ".4f", " nats"),
                "noise alone": number(own.noise, ".4f", " nats"),
            }
            rows.append(row)
    return Table.of(rows, whole=True) if rows else None


def trials_table(results: Results) -> Table:
    """Every trial with its settings, the best of each arm first."""
    settings = list(dict.fromkeys(key for arm in results.arms() for key in results.space(arm)))
    rows = []
    for arm in results.arms():
        for o in sorted(results.of_arm(arm), key=lambda o: (math.isnan(o.loss), o.loss)):
            state = "to go" if o.to_go else "failed" if o.lost else "diverged" if o.failed else f"{o.loss:.4f}"
            values = {key: value_of(o.condition.fields, key) for key in settings}
            shown = {key: "-" if value is None else f"{value:g}" for key, value in values.items()}
            rows.append({"trial": o.name, "final loss": state, **shown})
    return Table.of(rows)


def _trial_items(results: Results) -> list[Table | Section]:
    tables = (
        ("The best loss to expect, with its 95 % band", expectation_table(results)),
        ("The search space, and where the best trial is", space_table(results)),
        ("Every trial", trials_table(results)),
    )
    return [item for title, table in tables if table is not None for item in (Section(title, []), table)]


def chapters(results: Results, known: Mapping[str, Results], pictures: Sequence[Picture]) -> list[Chapter]:
    """Everything about one of the two suites; the page of the fight includes the trials."""
    trials = known.get(TRIALS)
    answer = Section(results.suite.question, FINDINGS[results.name](results, known) or ["No run has finished yet."])
    if results.name == TRIALS:
        found = [Chapter(TRIALS, [answer, *_trial_items(results)]), Chapter("Figures", list(pictures))]
    else:
        table = ways_table(results)
        fight = [answer, *([table] if table else [])]
        fight.append(Section("Equal time, and whether times count", time_sentences(results)))
        if deciles := decile_sentence(results):
            fight.append(Section("Rare and frequent tokens, at equal tokens", deciles))
        found = [Chapter(FIGHT, fight), Chapter("Figures", list(pictures))]
        if trials is not None:
            answer = Section(trials.suite.question, trial_findings(trials))
            found.append(Chapter("The trials", [answer, *_trial_items(trials)]))
        conditions: list[Table | Section] = [conditions_table(results)]
        if fairness := results.fairness(by_design):
            conditions.append(Section("Fairness", fairness))
        found.append(Chapter("Conditions", conditions))
    return [chapter for chapter in found if chapter.items]


def by_design(outcome: Outcome) -> set[str]:
    """The settings in which an arm may differ from others: those tuned for it, and its tokens in equal time."""
    return {*outcome.condition.space, *(("tokens",) if outcome.name.endswith(EQUAL_TIME) else ())}


def flags(results: Results, known: Mapping[str, Results]) -> str:
    """The flags that repeat a fight."""
    trials, arms, space = known[TRIALS], [], {}
    for arm in trials.arms():
        first = trials.of_arm(arm)[0].condition
        own = is_own(first.fields["optimizer"])
        arms.append(first.fields["optimizer"] if own else arm)
        if own:
            space |= {key: f"{axis.low:g}:{axis.high:g}" for key, axis in first.space.items()}
            options = options_of(first.fields["optimizer_options"])
            space |= {key: value for key, value in options.items() if key not in first.space}
    words = ["--arms", *arms, *(["--space"] if space else []), *(f"{key}={value}" for key, value in space.items())]
    words += ["--trials", str(len(trials.of_arm(trials.arms()[0])))]
    words += [word for steps in {run.config["steps"] for run in trials.runs()} for word in ("--steps", str(steps))]
    return shlex.join([*words, "--seeds", *map(str, sorted({run.config["seed"] for run in results.runs()}))])


def drawings(results: Results, known: Mapping[str, Results]) -> list[Drawing]:
    found = []
    if results.name == FIGHT and results.finished():
        found.append(drawing(fight_curves, results, stem=f"{FIGHT}_curves"))
        equal = [run for o in results.outcomes if o.name.endswith(EQUAL_TOKENS) for run in o.finished()]
        if runs := with_deciles(equal):
            found.append(drawing(loss_by_decile, runs, stem=f"{FIGHT}_deciles"))
    trials = known.get(TRIALS)
    if trials is not None and any(math.isfinite(o.loss) for o in trials.outcomes):
        found.append(drawing(tuning_curves, trials, stem=f"{TRIALS}_tuning"))
        found.append(drawing(setting_effects, trials, stem=f"{TRIALS}_settings"))
        if any({*PLANE} <= {*trials.space(arm)} for arm in trials.arms()):
            found.append(drawing(trial_planes, trials, stem=f"{TRIALS}_planes"))
    return found


FINDINGS: dict[str, Callable[[Results, Mapping[str, Results]], list[str]]] = {
    TRIALS: lambda results, known: trial_findings(results) + lead_sentences(results),
    FIGHT: fight_findings,
}
NOTES = (
    "Every arm gets the same number of trials, drawn from the space declared for it before any was trained, on one "
    "seed; the best one is trained on fresh seeds. A diverged trial counts as the worst trial of any arm.",
    "Equal tokens: final losses, paired by seed. Equal time: each arm has the steps that take as long as the slowest "
    "arm's, by its speed at equal tokens, and a schedule that ends with them. Times are judged where the runs were "
    "steady: the slowest step of one condition's seeds at most 1.2 times the fastest.",
    "Tokens and seconds to the loss: when each equal-token run first has the final loss of the reference's run with "
    "the same seed, its schedule not yet over. The ratio is the reference's whole budget over that: of tokens, the "
    "token multiplier. It is a geometric mean over seeds with a t-interval of logarithms, which holds the noise of "
    "both sides; the sentences give its inverse as a share saved.",
    "All tests of a table are corrected together, p values by Holm, intervals by Bonferroni: the ways to win, and the "
    "rank correlations of all settings. These hold for the settings found. 'Over draws of trials' draws the trials of "
    "each arm anew with replacement and takes the best of each; no draw is better than the best trial there was.",
    "'Worst - best third' is the greatest minus the least median loss over the thirds of a setting's values, which "
    "chance makes positive too: 'noise alone' is its mean over random orders of the losses. ON THE EDGE: the best "
    "trial is in the outer 15 % of the range, and the loss falls significantly towards that end, so widen the range. "
    "Near an end: within 5 %, where one best trial in ten lies by chance.",
)
