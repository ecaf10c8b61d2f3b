"""What the claims measure: functions that make a measure, from a suite's context to the evidence that is judged.

    measure = lower("muon", "adamw"); finding = judge(measure(context), tests=4)

Losses in nats; ratios on the log scale; a number of each seed where a claim is about a trend or an interaction.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from analysis.runs import Run
from analysis.stats import (
    MARGIN,
    difference,
    finite_only,
    first_reaching,
    mean_over_seeds,
    slope,
    unsteadiness,
)
from suites.judging import (
    CONFIRMED,
    FEWEST_SEEDS,
    NOT_TESTABLE,
    REFUTED,
    UNDECIDED,
    Context,
    Evidence,
    Finding,
    Lacking,
    Unit,
)
from suites.launcher import diverged
from suites.results import Outcome
from suites.suite import AS_WRITTEN
from suites.tables import accuracy, mean_of

Measure = Callable[[Context], Evidence | Sequence[Evidence] | Finding]
Number = Callable[[Run], float]
LOG_RATIO = "ratio on the log scale"


@dataclass(frozen=True)
class Claim:
    """A statement with the words or figures of its source; `tests` counts the tests that the claim adds to those of its
    suite's own pairs."""

    statement: str
    quotes: tuple[str, ...]
    measure: Measure
    tests: int = 0
    source: str = ""
    suite: str = ""


def about(suite: str, source: str, *claims: Claim) -> list[Claim]:
    return [replace(claim, source=source, suite=suite) for claim in claims]


def log_share(value: float) -> float:
    """A relative difference in per cent from the logarithm of a ratio."""
    return 100 * math.expm1(value)


NATS, POINTS, DECADES = Unit(" nats"), Unit(" points", ".2f"), Unit(" decades", ".2f")
TIMES, PERCENT = Unit(" times", ".3g", math.exp), Unit(" %", "+.1f", log_share)
HUNDREDTHS = Unit(" %", "+.2f", lambda share: 100 * share)


def loss(run: Run) -> float:
    return run.final_loss


def log_step_time(run: Run) -> float:
    return math.log(run.step_ms)


def log_accuracy(run: Run) -> float:
    return math.log(max(accuracy(run), 1e-3))


def log_memory(run: Run) -> float:
    return math.log(run.memory_bytes)


def loss_at(run: Run, share: float) -> float:
    """Validation loss after a share of the run's steps, linear between validations."""
    return float(np.interp(share * run.config["steps"], run.val["step"], run.val["val_loss"]))


def compare(c: Context, a: Outcome, b: Outcome, number: Number, expected: int, show: Unit, **more) -> Evidence:
    """Number of a minus number of b; conditions with a diverged run are Lacking."""
    test = difference(*(c.ready(outcome).values(number) for outcome in (a, b)))
    return Evidence(what=f"{a.name} - {b.name}", test=test, expected=expected, show=show, **more)


def of_loss(c: Context, a: Outcome, b: Outcome, expected: int, **more) -> Evidence:
    """Final losses; within 1 % they count as equivalent."""
    mean = float(np.mean(list(c.ready(b).losses().values()))) if b.losses() else math.nan
    return compare(c, a, b, loss, expected, NATS, margin=MARGIN * mean, relative_to=mean, **more)


def lower(a: str = "muon", b: str = "adamw") -> Measure:
    """Condition a ends with a lower loss than b."""
    return lambda c: of_loss(c, c.outcome(a), c.outcome(b), -1)


def higher(a: str, b: str) -> Measure:
    """Condition a ends with a higher loss than b, or diverges where b does not."""

    def measure(c: Context) -> Evidence | Finding:
        worse, better = c.ended(a), c.outcome(b)
        return broken_down(worse) or of_loss(c, worse, better, 1)

    return measure


def broken_down(worse: Outcome) -> Finding | None:
    """What confirms without a test that a condition is the worse one: it diverged with every seed."""
    if FEWEST_SEEDS <= worse.planned == worse.diverged:
        return Finding(CONFIRMED, f"{worse.name} diverged with all of {worse.planned} seeds")
    return None


def prevents_divergence(without: str, prevented: str) -> Measure:
    """Every run of the first condition diverges and none of the second does: counted, not tested. Undecided where fewer
    or none of the first does."""

    def measure(c: Context) -> Finding:
        bare, safe = c.ended(without), c.ended(prevented)
        numbers = "; ".join(f"{o.name}: {o.diverged} of {o.planned} runs diverged" for o in (bare, safe))
        least = min(bare.planned, safe.planned)
        if least < FEWEST_SEEDS:
            raise Lacking(f"{numbers}; {FEWEST_SEEDS} seeds are the least for a verdict")
        verdict = REFUTED if safe.diverged else CONFIRMED if broken_down(bare) else UNDECIDED
        numbers += "" if bare.diverged else ": there was nothing to prevent"
        return Finding(verdict, numbers, f"count, n = {least}")

    return measure


def as_good(a: str, b: str) -> Measure:
    """The losses differ by less than 1 %."""
    return lambda c: of_loss(c, c.outcome(a), c.outcome(b), 0)


def no_better(b: str, *names: str) -> Measure:
    """None of the conditions beats b by 1 % or more; one that diverged with every seed does not."""
    return lambda c: against_all(c, c.outcome(b), [c.ended(name) for name in names], 0, one_sided=True)


def best(name: str, among: Callable[[Outcome], bool] = lambda outcome: True) -> Measure:
    """Every condition (of `among`) that is tested against `name` is worse; one that diverged with every seed is."""

    def measure(c: Context) -> Sequence[Evidence] | Finding:
        own = c.outcome(name)
        others = [a for a, b in c.results.pairs() if b.name == name and among(a)]
        if not others:
            raise Lacking(f"{name} has no condition to compare with")
        return against_all(c, own, others, 1)

    return measure


def best_of(name: str, *others: str) -> Measure:
    """Every one of the others is worse; one that diverged with every seed is."""
    return lambda c: against_all(c, c.outcome(name), [c.ended(other) for other in others], 1)


def against_all(
    c: Context, own: Outcome, others: Sequence[Outcome], expected: int, **more
) -> Sequence[Evidence] | Finding:
    """The losses of the others minus `own`'s; those that diverged with every seed are counted."""
    gone = [other for other in others if broken_down(c.over(other))]
    remark = f", {len(gone)} of {len(others)} diverged" if gone else ""
    found = [of_loss(c, other, own, expected, remark=remark, **more) for other in others if other not in gone]
    return found or Finding(CONFIRMED, f"diverged: {', '.join(other.name for other in gone)}")


def versus(
    number: Number, expected: int, show: Unit, a: str = "muon", b: str = "adamw", method: str = "", margin: float = 0.0
) -> Measure:
    """A number of each run, a minus b."""
    return lambda c: compare(c, c.outcome(a), c.outcome(b), number, expected, show, method=method, margin=margin)


def named(words: str, measure: Callable[[Context], Evidence]) -> Measure:
    """A measure with words on what its number is."""

    def told(c: Context) -> Evidence:
        found = measure(c)
        return replace(found, what=f"{words}, {found.what}")

    return told


def timed(measure: Measure) -> Measure:
    """Times count on a GPU that did nothing else: otherwise the number is shown without a verdict."""

    def judged(c: Context) -> Evidence | Sequence[Evidence] | Finding:
        found, tests = measure(c), c.results.family_size
        if not isinstance(found, Evidence):
            return found
        numbers, words = found.numbers(tests), found.test_words(tests)
        if any(run.config.get("device") != "cuda" for run in c.results.runs()):
            return Finding(NOT_TESTABLE, f"{numbers}, on a CPU shared with other runs: needs a GPU", words)
        if any(outcome.busy for outcome in c.results.outcomes):
            return Finding(UNDECIDED, f"{numbers}; the steps of some seeds took longer than those of others", words)
        return found

    return judged


def step_time(expected: int, a: str = "muon", b: str = "adamw") -> Measure:
    """How much longer a's step takes than b's."""
    return timed(versus(log_step_time, expected, PERCENT, a, b, method=LOG_RATIO))


def small_overhead(
    most: float, at: Callable[[Context], tuple[Outcome, Outcome]], cost: Number = log_step_time, of: str = "step"
) -> Measure:
    """Muon's step takes at most a share longer than AdamW's, or another cost (its logarithm) is at most so much higher,
    for one pair of conditions."""
    return timed(lambda c: ratio_below(*at(c), cost, math.log1p(most), PERCENT, of))


def ratio_below(a: Outcome, b: Outcome, log_number: Number, limit: float, show: Unit, of: str) -> Evidence:
    """A number of a over that of b is below a limit, given by its logarithm."""
    test = difference(a.values(lambda run: log_number(run) - limit), b.values(log_number))
    what = f"{of} of {a.name} over that of {b.name}, limit {show(limit)}"
    return Evidence(what=what, test=test, expected=-1, show=show, against=limit, method=LOG_RATIO)


def muon_and_adamw(c: Context) -> tuple[Outcome, Outcome]:
    return c.outcome("muon"), c.outcome("adamw")


def still_above(longer: str, times: int = 2) -> Measure:
    """AdamW at the end of another suite's runs, which have `times` the tokens, is above Muon's final loss here."""

    def measure(c: Context) -> Evidence:
        muon, adamw = c.outcome("muon"), c.suite(longer).outcome("adamw")
        budgets = {run.budget for run in muon.runs}, {run.budget for run in adamw.runs}
        if budgets[1] != {times * budget for budget in budgets[0]}:
            raise Lacking(f"the runs of {longer} do not have {times} times the tokens: a schedule must be over")
        test = difference(adamw.values(loss), muon.values(loss))
        return Evidence(what=f"AdamW after {times} times the tokens - Muon", test=test, expected=1, show=NATS)

    return measure


def between(names: Sequence[str], low: str, high: str) -> Measure:
    """Each condition ends higher than `low` and lower than `high`."""

    def measure(c: Context) -> list[Evidence]:
        ends = [(c.outcome(low), 1), (c.outcome(high), -1)]
        return [of_loss(c, c.outcome(name), end, expected) for name in names for end, expected in ends]

    return measure


def unclear(words: str) -> Measure:
    """A claim that no run decides, and why."""
    return lambda c: Finding(NOT_TESTABLE, words)


def spent_until(column: str, share: float, muon: Outcome, adamw: Outcome) -> tuple[dict[int, float], int]:
    """The logarithm of what Muon spends until AdamW's loss after a share of its run, over what AdamW spends (tokens,
    train_seconds), by seed, and how many runs never get there: these count with their whole length."""
    ratios, never = {}, 0
    runs = {run.config["seed"]: run for run in adamw.finished()}
    for run in muon.finished():
        if (other := runs.get(run.config["seed"])) is None:
            continue
        target = loss_at(other, share)
        mine, theirs = (first_reaching(r.val[column], r.val["val_loss"], target) for r in (run, other))
        never += mine is None
        mine = run.val[column][-1] if mine is None else mine
        ratios[run.config["seed"]] = math.log(mine / theirs) if mine > 0 and theirs else math.nan
    return ratios, never


def until(column: str, share: float, at: Callable[[Context], tuple[Outcome, Outcome]] | None = None) -> Measure:
    """How soon Muon reaches the loss that AdamW has after a share of its run, seed by seed (`spent_until`), for the
    pair of conditions `at` (default: the suite's only one)."""

    def measure(c: Context) -> Evidence:
        ratios, never = spent_until(column, share, *(at or muon_and_adamw)(c))
        remark = f", never in {never} of {len(ratios)} runs" if never else ""
        what = f"{column.replace('train_', '')} to AdamW's loss after {100 * share:g} % of its run, Muon over AdamW"
        return per_seed(what, ratios, -1, TIMES, method=LOG_RATIO, remark=remark)

    return measure


def per_seed(what: str, values: Mapping[int, float], expected: int, show: Unit, **more) -> Evidence:
    """The mean of one number per seed, against zero."""
    return Evidence(what=what, test=mean_over_seeds(finite_only(values)), expected=expected, show=show, **more)


def log_ratio_at(share: float) -> Number:
    return lambda run: math.log(loss_at(run, share))


def gains_after(share: float) -> Number:
    return lambda run: loss_at(run, share) - loss_at(run, 1.0)


def trend(setting: str, expected: int, least: float = -math.inf) -> Measure:
    """The slope of the final loss against a setting, seed by seed."""

    def measure(c: Context) -> Evidence:
        tried = [o for o in c.results.outcomes if o.condition.fields.get(setting, -math.inf) >= least]
        losses = {float(o.condition.fields[setting]): c.ready(o).losses() for o in tried}
        if len(losses) < 3:
            raise Lacking(f"a trend needs three values of {setting}")
        width = max(losses) - min(losses)
        slopes = {seed: width * value for seed, value in slope(losses, scale=np.asarray).items()}
        what = f"loss from {setting} {min(losses):g} to {max(losses):g} along the line through all"
        mean = float(np.mean([value for by_seed in losses.values() for value in by_seed.values()]))
        more = {"margin": MARGIN * mean, "relative_to": mean, "method": "trend"}
        return per_seed(what, slopes, expected, NATS, **more)

    return measure


def opposite(suite: str, muon: tuple[str, str], adamw: tuple[str, str]) -> Measure:
    """The step from the second to the first setting costs Muon loss, gains AdamW some, whose pair is of this suite, and
    costs Muon more than AdamW: the difference of the two differences, seed by seed."""

    def measure(c: Context) -> list[Evidence]:
        theirs, ours = tuple(map(c.suite(suite).outcome, muon)), tuple(map(c.outcome, adamw))
        losses = [o.losses() for o in (*theirs, *ours)]
        seeds = set.intersection(*map(set, losses))
        values = {s: losses[0][s] - losses[1][s] - (losses[2][s] - losses[3][s]) for s in seeds}
        both = per_seed("of Muon minus of AdamW", values, 1, NATS, method="difference of differences")
        parts = [(of_loss(c, *theirs, 1), "Muon"), (of_loss(c, *ours, -1), "AdamW")]
        return [*(replace(part, what=f"{name}: {part.what}") for part, name in parts), both]

    return measure


def sizes(c: Context) -> list[tuple[Outcome, Outcome]]:
    """Muon and AdamW at each size, the smallest first, at the fair settings."""
    return [(a, b) for a, b in c.results.pairs() if a.optimizer != b.optimizer and not a.as_written]


def accuracy_at(place: int, expected: int) -> Measure:
    """Muon's accuracy minus AdamW's at one of the sizes; the side that diverges with every seed is behind."""

    def measure(c: Context) -> Evidence | Finding:
        muon, adamw = sizes(c)[place]
        ahead, behind = (muon, adamw) if expected > 0 else (adamw, muon)
        c.ready(ahead)
        written = [c.results.outcome(f"{outcome.name} {AS_WRITTEN}") for outcome in (muon, adamw)]
        means = [mean_of(outcome, accuracy) for outcome in written if outcome is not None]
        known = len(means) == 2 and np.isfinite(means).all()
        remark = f"; {AS_WRITTEN}: {POINTS(means[0] - means[1])}" if known else ""
        return broken_down(c.over(behind)) or compare(c, muon, adamw, accuracy, expected, POINTS, remark=remark)

    return measure


def at_largest(c: Context) -> tuple[Outcome, Outcome]:
    return tuple(map(c.ready, sizes(c)[-1]))


def smoother(c: Context) -> Evidence:
    """Muon's training loss deviates less from its trend at the end of the runs of the largest size."""
    muon, adamw = sizes(c)[-1]
    found = compare(c, muon, adamw, unsteadiness, -1, NATS)
    return replace(found, what=f"unsteadiness of {muon.name} - of {adamw.name}")


def _leads(c: Context, along: str) -> dict[float, dict[int, float]]:
    """Muon's loss minus AdamW's by seed, for each value of a setting (model size) at which no run diverged."""
    found: dict[float, dict[int, float]] = {}
    for a, b in sizes(c):
        left, right = a.losses(), b.losses()
        if not c.over(a).diverged and not c.over(b).diverged and left.keys() & right.keys():
            both = {seed: left[seed] - right[seed] for seed in left.keys() & right.keys()}
            found[float(a.runs[0].config[along])] = both
    return dict(sorted(found.items()))


def _budgets(c: Context) -> str:
    tokens = sorted({run.budget for run in c.results.runs()})
    return "" if len(tokens) < 2 else f" (sizes trained on {tokens[0]:,} to {tokens[-1]:,} tokens)"


def _lead_slope(c: Context, along: str) -> dict[int, float]:
    """Of Muon's loss minus AdamW's, per tenfold of a setting, by seed."""
    leads = _leads(c, along)
    if len(leads) < 2:
        raise Lacking("a trend needs two settings without a diverged run")
    return slope(leads)


def lead_grows(c: Context) -> Evidence:
    """Muon's lead grows with the model."""
    what = "Muon's loss minus AdamW's, per tenfold of parameters"
    return per_seed(what, _lead_slope(c, "params"), -1, NATS, method="trend", remark=_budgets(c))


def lead_lasts(along: str, words: str) -> Measure:
    """Muon leads at the greatest value of a setting, and along it the lead falls by less than 1 % of the loss per
    tenfold."""

    def measure(c: Context) -> list[Evidence]:
        gains = {seed: -value for seed, value in _lead_slope(c, along).items()}
        mean = float(np.mean([loss for _, b in sizes(c) for loss in b.losses().values()]))
        more = {"margin": MARGIN * mean, "one_sided": True, "relative_to": mean, "method": "trend"}
        lead = per_seed(f"Muon's lead over AdamW, per tenfold of {words}", gains, 0, NATS, **more)
        return [of_loss(c, *sizes(c)[-1], -1), lead]

    return measure


def largest_breaks_down(c: Context) -> Evidence | Finding:
    """AdamW's accuracy at the largest size is less than half of that at the size before."""
    *smaller, (muon, largest) = sizes(c)
    c.ready(muon)
    if finding := broken_down(c.over(largest)):
        return finding
    if not smaller:
        raise Lacking("needs two sizes")
    before = smaller[-1][1]
    found = ratio_below(*map(c.ready, (largest, before)), log_accuracy, math.log(0.5), TIMES, "accuracy")
    return replace(found, remark=_budgets(c))


def none_diverges(source: str) -> Measure:
    """No run of a document's suites diverged: counted, not tested."""

    def measure(c: Context) -> Finding:
        begun = [r for r in c.others.values() if r.suite.source == source and r.finished()]
        runs = {run.path: run for r in begun for run in r.runs()}  # suites share runs
        failed = sum(diverged(run.summary) for run in runs.values())
        if to_go := sum(r.to_go for r in begun):
            raise Lacking(f"{to_go} runs of {source}'s suites have not finished")
        if lost := sum(outcome.lost for r in begun for outcome in r.outcomes):
            raise Lacking(f"{lost} runs of {source}'s suites failed without diverging")
        verdict = REFUTED if failed else CONFIRMED
        return Finding(verdict, f"{failed} of {len(runs)} runs diverged", f"count, n = {len(runs)}")

    return measure
