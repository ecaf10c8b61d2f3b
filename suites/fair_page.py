"""The pages of fair-trials and fair-fight: the ways to win as one table, the trials, the search space.

    FINDINGS["fair-fight"](results); chapters(results, known, pictures); drawings(results, known)

Differences are of the final validation loss in nats; ratios are the reference's tokens or seconds over the arm's.
"""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.pages import Chapter, Picture, Section, Table, counted, number
from analysis.plots import Drawing, drawing
from analysis.runs import OPTIMIZER_NAMES
from analysis.stats import Contrast, Reached, family, first_reaching, median_time, p_words
from engine.own_optimizer import is_own, options_of
from suites.arms import value_of
from suites.fair import EQUAL_TIME, EQUAL_TOKENS, FIGHT, TRIALS
from suites.fair_plots import fight_curves, setting_effects, tuning_curves
from suites.results import Outcome, Results
from suites.tables import conditions_table, mean_of, p_cell
from suites.tuning import band, by_arm, effects, expected_best, trials_needed

TO_A_LOSS = {"tokens": "tokens to the loss", "train_seconds": "seconds to the loss"}


@dataclass(frozen=True)
class Way:
    """One arm against the reference in one of the ways to win. `test` compares losses, or logarithms of times with the
    reference's budget; `times` are the arm's, where the way is a time to the reference's loss; `budget` is the mean."""

    name: str
    arm: Outcome
    reference: Outcome
    test: Contrast
    times: Reached | None = None
    budget: float = math.nan

    @property
    def winner(self) -> str:
        if not (self.test.tested and self.test.excludes_zero):
            return "open"
        return (self.arm if self.test.difference < 0 else self.reference).arm

    def time(self, value: float) -> str:
        return f"{value:,.0f} tokens" if self.name == TO_A_LOSS["tokens"] else f"{value:.2f} s"

    def ratio(self) -> tuple[float, float, float]:
        """The reference's time over the arm's, with its interval: over tokens, the compute multiplier."""
        low, mean, high = (math.exp(-value) for value in (self.test.high, self.test.difference, self.test.low))
        return mean, low, high


def ways(results: Results) -> list[Way]:
    """Every arm against the reference, all tests corrected together. A side with a failed run is not tested, nor a
    time that some run has not reached, or had before its first step."""
    arms, found, pairs = results.arms(), [], []

    def add(name: str, a: Outcome, b: Outcome, mine: dict[int, float], theirs: dict[int, float], **more) -> None:
        found.append((name, a, b, more))
        failed = a.failed or b.failed
        pairs.append((a.name, b.name, {} if failed else mine, {} if failed else theirs))

    for way in (EQUAL_TOKENS, EQUAL_TIME):
        for arm in arms[1:]:
            a, b = results.outcome(f"{arm}, {way}"), results.outcome(f"{arms[0]}, {way}")
            if a is not None and b is not None:
                add(way, a, b, a.losses(), b.losses())
    for column, name in TO_A_LOSS.items():
        for arm in arms[1:]:
            a, b = results.outcome(f"{arm}, {EQUAL_TOKENS}"), results.outcome(f"{arms[0]}, {EQUAL_TOKENS}")
            times, whole = ({}, {}) if a is None or b is None else times_to_loss(a, b, column)
            if not times:
                continue
            reached = all(times.values())
            logs = ({seed: math.log(x) for seed, x in side.items()} if reached else {} for side in (times, whole))
            more = {"times": median_time(list(times.values())), "budget": float(np.mean(list(whole.values())))}
            add(name, a, b, *logs, **more)
    tests = family(pairs)
    return [Way(name, a, b, test, **more) for (name, a, b, more), test in zip(found, tests, strict=True)]


def times_to_loss(a: Outcome, b: Outcome, column: str) -> tuple[dict[int, float | None], dict[int, float]]:
    """When each run of `a` first has the final loss of b's run with the same seed (None: never), and that run's whole
    budget; by the seeds that both have. Each seed has its own target, so that the noise of both sides counts."""
    mine, theirs = ({run.config["seed"]: run for run in o.finished()} for o in (a, b))
    targets = {seed: loss for seed, loss in sorted(b.losses().items()) if seed in mine}
    curves = {seed: mine[seed].val for seed in targets}
    times = {seed: first_reaching(val[column], val["val_loss"], targets[seed]) for seed, val in curves.items()}
    return times, {seed: float(theirs[seed].val[column][-1]) for seed in targets}


def ways_table(results: Results) -> Table | None:
    rows = []
    for way in ways(results):
        test, times = way.test, way.times
        if times is None:
            mine, theirs = (number(o.loss, ".4f") for o in (way.arm, way.reference))
            gain = number(test.difference, "+.4f", " nats")
            interval = f"{test.low:+.4f} to {test.high:+.4f}" if math.isfinite(test.low) else "no test"
        else:
            mine = "-" if times.median is None else way.time(times.median)
            theirs = way.time(way.budget)
            ratio, low, high = way.ratio()
            gain = f"not reached by {times.never} of {times.n}" if times.never else number(ratio, ".2f", " x")
            interval = f"{low:.2f} to {high:.2f}" if math.isfinite(low) else "no test"
        row = {
            "way": way.name,
            "arm": way.arm.arm,
            "its": mine,
            f"{way.reference.arm}'s": theirs,
            "difference or ratio": gain,
            "corrected interval": interval,
            "p Holm": p_cell(test.p_holm),
            "test": test.test if test.tested else "-",
            "n": " and ".join(str(n) for n in dict.fromkeys(test.n)),
            "winner": way.winner,
        }
        rows.append(row)
    return Table.of(rows, whole=True) if rows else None


def fight_findings(results: Results) -> list[str]:
    return [f"{way.name.capitalize()}{outcome_words(way)}." for way in ways(results)]


def outcome_words(way: Way) -> str:
    """What a way to win found, after its name."""
    arm, reference = (OPTIMIZER_NAMES.get(o.arm, o.arm) for o in (way.arm, way.reference))
    test, n = way.test, f"n = {way.test.n[0]}"
    if failed := way.arm.failed + way.reference.failed:
        return f": {counted(failed, 'run')} of {arm} and {reference} failed, so no test"
    few = {0: "no test", 1: "one seed, so no test"}
    untested = few.get(min(test.n), "no variation between seeds, so no test")
    if way.times is None:
        sign, side = (-1, "below") if test.difference < 0 else (1, "above")
        ends = f": {arm} ends {abs(test.difference):.3f} nats {side} {reference}"
        if not test.tested:
            return f"{ends}; {untested}"
        low, high = sorted((sign * test.low, sign * test.high))
        tested = f"(corrected interval {low:.3f} to {high:.3f}, Holm {p_words(test.p_holm)}, {n})"
        return f"{ends} {tested}" if test.excludes_zero else f"{ends}, not significantly {tested}"
    ratio, low, high = way.ratio()
    goal = f" of {reference} with the same seed, {way.reference.loss:.3f} on average"
    what = "compute multiplier" if way.name == TO_A_LOSS["tokens"] else "speed-up"
    if way.times.never:
        return f"{goal}: {way.times.never} of {way.times.n} runs of {arm} never reach it, so no test"
    if test.tested:
        return f"{goal}: {what} of {arm} {ratio:.2f} (corrected interval {low:.2f} to {high:.2f}, {n})"
    return f"{goal}: {arm} reaches it after {way.time(way.times.median)}, {what} {number(ratio, '.2f')}; {untested}"


def time_sentences(results: Results, trials: Results | None) -> list[str]:
    """Lists the speeds behind the equal-time budgets and the seconds they took."""
    lines = []
    for arm in results.arms():
        outcome = results.outcome(f"{arm}, {EQUAL_TIME}")
        if outcome is None or not outcome.finished():
            continue
        speed = "" if trials is None else f"{1 / trials.seconds_per_token(arm):,.0f} tokens/s in the trials, so "
        seconds = mean_of(outcome, lambda run: run.train_seconds)
        steps = outcome.finished()[0].config["steps"]
        lines.append(f"{arm}: {speed}{steps} steps in equal time; they took {seconds:.2f} s (mean).")
    return lines


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
    return sentences


def expectation_table(results: Results) -> Table | None:
    """The figure's numbers at powers of two."""
    rows = []
    for arm, own in by_arm(results).items():
        curve, (low, high) = expected_best(own), band(own)
        ks = sorted({*(2**i for i in range(int(math.log2(len(own))) + 1)), len(own)})
        rows.append(
            {
                "arm": arm,
                "trials": str(len(own)),
                "diverged": str(sum(o.diverged for o in results.of_arm(arm))),
                "median": f"{np.median(own):.4f}",
                **{f"best of {k}": f"{curve[k - 1]:.4f} ({low[k - 1]:.3f} to {high[k - 1]:.3f})" for k in ks},
            }
        )
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
    answer = Section(results.suite.question, FINDINGS[results.name](results) or ["No run has finished yet."])
    if results.name == TRIALS:
        found = [Chapter(TRIALS, [answer, *_trial_items(results)]), Chapter("Figures", list(pictures))]
    else:
        table = ways_table(results)
        fight = [answer, *([table] if table else [])]
        fight.append(Section("Budgets of equal time", time_sentences(results, trials)))
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
    trials = known.get(TRIALS)
    if trials is not None and any(math.isfinite(o.loss) for o in trials.outcomes):
        found.append(drawing(tuning_curves, trials, stem=f"{TRIALS}_tuning"))
        found.append(drawing(setting_effects, trials, stem=f"{TRIALS}_settings"))
    return found


FINDINGS: dict[str, Callable[[Results], list[str]]] = {TRIALS: trial_findings, FIGHT: fight_findings}
NOTES = (
    "Every arm gets the same number of trials, drawn from the space declared for it before any was trained, on one "
    "seed; the best one is trained on fresh seeds. A diverged trial counts as the worst trial of any arm.",
    "Equal tokens: final losses, paired by seed. Equal time: each arm has the steps that take as long as the slowest "
    "arm's, by its speed in the trials, and a schedule that ends with them.",
    "Tokens and seconds to the loss: when each equal-token run first has the final loss of the reference's run with "
    "the same seed, its schedule not yet over; the table shows the median. The ratio is the reference's whole budget "
    "over that: of tokens, the compute multiplier. It is a geometric mean over seeds with a t-interval of logarithms, "
    "which holds the noise of both sides.",
    "All tests of a table are corrected together, p values by Holm, intervals by Bonferroni: the ways to win, and the "
    "rank correlations of all settings.",
    "'Worst - best third' is the greatest minus the least median loss over the thirds of a setting's values, which "
    "chance makes positive too: 'noise alone' is its mean over random orders of the losses. ON THE EDGE: the best "
    "trial is within 5 % of an end of the range, and the loss falls significantly towards it, so widen the range; "
    "without any effect a tenth of the best trials are that near.",
)
