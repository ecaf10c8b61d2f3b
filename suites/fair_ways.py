"""Who wins the fair fight: the ways to win, their tests, and the sentences on them.

    for way in ways(results): print(way.winner)
    fight_findings(results, known); time_sentences(results)

Differences are of the final validation loss in nats, or of logarithms of tokens and seconds. Times are judged where the
runs were steady (Outcome.steady); whether nothing else ran, only who started them knows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from analysis.pages import Table, counted, number
from analysis.plots_tokens import last_by_decile, with_deciles
from analysis.runs import optimizer_name
from analysis.stats import STEADY, Contrast, Difference, difference, family, first_reaching, p_words
from suites.fair import EQUAL_TIME, EQUAL_TOKENS, TRIALS
from suites.results import Outcome, Results
from suites.tables import mean_of, p_cell
from suites.tuning import by_arm, lead, powers

TO_A_LOSS = {"tokens": "tokens to the loss", "train_seconds": "seconds to the loss"}
TIMED = (EQUAL_TIME, TO_A_LOSS["train_seconds"])
UNEQUAL = 0.02  # share by which times may differ and still be called equal


@dataclass(frozen=True)
class Way:
    """One arm against the reference in one of the ways to win. `test` compares losses, or logarithms of times with the
    reference's budget; `times` are the arm's by seed (None: never), where the way is a time to the reference's loss;
    `budget` is the reference's mean."""

    name: str
    arm: Outcome
    reference: Outcome
    test: Contrast
    times: Mapping[int, float | None] | None = None
    budget: float = math.nan

    @property
    def judged(self) -> bool:
        return self.name not in TIMED or (self.arm.steady and self.reference.steady)

    @property
    def winner(self) -> str:
        if not (self.test.tested and self.test.excludes_zero and self.judged):
            return "open"
        return "open" if self.with_more_time else (self.arm if self.test.difference < 0 else self.reference).arm

    @property
    def with_more_time(self) -> bool:
        """Whether the side that ends lower in equal time had more of it."""
        more = -math.copysign(1, self.test.difference) * math.expm1(_log_seconds(self).difference)
        return self.name == EQUAL_TIME and more > UNEQUAL

    @property
    def never(self) -> int:
        return sum(time is None for time in (self.times or {}).values())

    @property
    def spent(self) -> float:
        """The arm's mean time; NaN where a run never gets there."""
        return math.nan if self.never or not self.times else float(np.mean(list(self.times.values())))

    def time(self, value: float) -> str:
        return number(value, ",.0f", " tokens") if self.name == TO_A_LOSS["tokens"] else number(value, ".2f", " s")

    def ratio(self) -> tuple[float, float, float]:
        """The reference's time over the arm's, with its interval: over tokens, the token multiplier."""
        low, mean, high = (math.exp(-value) for value in (self.test.high, self.test.difference, self.test.low))
        return mean, low, high

    def gain(self, bounds: bool = True) -> str:
        """How much lower or higher the arm ends, or fewer or more it needs, than the reference: mean, interval."""
        test, share = self.test, self.times is not None
        mean, low, high = (100 * math.expm1(x) if share else x for x in (test.difference, test.low, test.high))
        sides = ("fewer", "more") if share else ("lower", "higher")
        sign, side = (-1, sides[0]) if mean < 0 else (1, sides[1])
        unit, form = (" %", ".0f") if share else (" nats", ".3f")
        if not (bounds and math.isfinite(low)):
            return f"{abs(mean):{form}}{unit} {side}"
        low, high = sorted((sign * low, sign * high))
        return f"{abs(mean):{form}}{unit} {side} ({low:{form}} to {high:{form}})"


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
            add(name, a, b, *logs, times=times, budget=float(np.mean(list(whole.values()))))
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
        test = way.test
        if way.times is None:
            mine, theirs = (number(o.loss, ".4f", " nats") for o in (way.arm, way.reference))
            gain = number(test.difference, "+.4f", " nats")
            interval = f"{test.low:+.4f} to {test.high:+.4f}" if math.isfinite(test.low) else "no test"
        else:
            mine, theirs = way.time(way.spent), way.time(way.budget)
            ratio, low, high = way.ratio()
            gain = f"not reached by {way.never} of {len(way.times)}" if way.never else number(ratio, ".2f", " x")
            interval = f"{low:.2f} to {high:.2f}" if math.isfinite(low) else "no test"
        row = {
            "way": way.name,
            "arm": way.arm.arm,
            "its mean": mine,
            f"mean of {way.reference.arm}": theirs,
            "difference or ratio": gain,
            "corrected interval": interval,
            "p Holm": p_cell(test.p_holm),
            "test": test.test if test.tested else "-",
            "n": " and ".join(str(n) for n in dict.fromkeys(test.n)),
            "winner": way.winner,
        }
        rows.append(row)
    return Table.of(rows, whole=True) if rows else None


def fight_findings(results: Results, known: Mapping[str, Results]) -> list[str]:
    """Who wins in plain words, an arm a sentence; every way; what the tests hold for; the lead over the tuning."""
    found, trials = ways(results), known.get(TRIALS)
    arms = dict.fromkeys(way.arm.arm for way in found)
    lines = [verdict([way for way in found if way.arm.arm == arm], trials) for arm in arms]
    lines += [f"{way_words(way)}{outcome_words(way)}." for way in found]
    if tested := [way.test for way in found if way.test.tested]:
        lines.append(
            f"Given these settings: the intervals (95 %) and p values are over {tested[0].n[0]} seeds, corrected for "
            f"{counted(len(tested), 'test')}."
        )
    return lines + ([] if trials is None else lead_sentences(trials))


def verdict(own: list[Way], trials: Results | None) -> str:
    """An arm's ways in one sentence for those who read no other."""
    first, won = own[0], {way.winner for way in own} - {"open"}
    arm, reference = optimizer_name(first.arm.arm), optimizer_name(first.reference.arm)
    wins = [way for way in own if way.winner != "open"]
    head = f"No clear winner between {arm} and {reference}."
    if len(won) == 1:
        share = "" if len(wins) == len(own) else f" in {len(wins)} of {len(own)} ways"
        if busy := [way.name for way in own if not way.judged]:
            share += f"; {' and '.join(busy)} {'is' if len(busy) == 1 else 'are'} not judged"
        head = f"{optimizer_name((wins[0].arm if won == {first.arm.arm} else first.reference).arm)} wins{share}."
    if not first.test.tested:
        return head
    config = first.arm.finished()[0].config
    device = str(config["device_name"])
    where = counted(config.get("threads") or 1, "CPU thread") if device == "cpu" else device
    after = "A" if trials is None else f"After {len(trials.of_arm(first.arm.arm))} tuning trials each, a"
    saved = next((way for way in own if way.name == TO_A_LOSS["tokens"] and way.test.tested), None)
    more = "" if saved is None else f"; {arm} reaches {reference}'s loss with {saved.gain(bounds=False)} tokens"
    model = (
        f"model of {_short(config['params'])} parameters, trained on {_short(first.arm.finished()[0].budget)} tokens"
    )
    return (
        f"{head} {after} {model} ({config['steps']} steps, {where}), ends with a loss {first.gain(bounds=False)} with "
        f"{arm} than with {reference}{more}."
    )


def _short(count: float) -> str:
    return next(
        (f"{count / unit:.3g}{word}" for unit, word in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if count >= unit),
        f"{count:g}",
    )


def way_words(way: Way) -> str:
    goal = f"{optimizer_name(way.reference.arm)}'s final loss"
    return way.name.capitalize().replace("the loss", goal)


def outcome_words(way: Way) -> str:
    """What a way to win found, after its name."""
    arm, reference = optimizer_name(way.arm.arm), optimizer_name(way.reference.arm)
    test = way.test
    if failed := way.arm.failed + way.reference.failed:
        return f": {counted(failed, 'run')} of {arm} and {reference} failed, so no test"
    if way.never:
        return f": {way.never} of {len(way.times)} runs of {arm} never reach it, so no test"
    if math.isnan(test.difference):
        return ": no test"
    said = f": {arm} {'ends' if way.times is None else 'needs'} {way.gain()}"
    if not test.tested:
        few = {0: "no test", 1: "one seed, so no test"}
        said += f"; {few.get(min(test.n), 'no variation between seeds, so no test')}"
    else:
        said += f", {p_words(test.p_holm)}{'' if test.excludes_zero else ', open: the interval holds 0'}"
    if way.name == EQUAL_TIME:
        said += f"; {longer(way)}{', so this stays open' if way.test.excludes_zero and way.with_more_time else ''}"
    return said if way.judged else f"{said}; not judged, as the runs were not steady"


def longer(way: Way) -> str:
    """How much longer the arm's runs of equal time took than the reference's."""
    arm, reference = optimizer_name(way.arm.arm), optimizer_name(way.reference.arm)
    mine, theirs = (mean_of(o, lambda run: run.train_seconds) for o in (way.arm, way.reference))
    share = 100 * (mine / theirs - 1)
    how = "as long as" if abs(share) < 0.05 else f"{abs(share):.1f} % {'longer' if share > 0 else 'less'} than"
    return f"{arm} took {how} {reference} ({mine:.1f} against {theirs:.1f} s)"


def unequal_words(results: Results) -> list[str]:
    """A warning for each arm whose equal time was another."""
    return [
        f"Equal time is not equal: {longer(way)}, more than {100 * UNEQUAL:g} % apart."
        for way in ways(results)
        if way.name == EQUAL_TIME and abs(math.expm1(_log_seconds(way).difference)) > UNEQUAL
    ]


def _log_seconds(way: Way) -> Difference:
    return difference(*(o.values(lambda run: math.log(run.train_seconds)) for o in (way.arm, way.reference)))


def time_sentences(results: Results) -> list[str]:
    """The speeds behind the equal-time budgets, the seconds they took, and whether they count."""
    lines = []
    if not any(o.name.endswith(EQUAL_TIME) for o in results.outcomes):
        lines.append(
            "No runs of equal time: their steps follow from the speeds at equal tokens, when these are over and each "
            "arm has a finished run."
        )
    for arm in results.arms():
        outcome, other = (results.outcome(f"{arm}, {way}") for way in (EQUAL_TIME, EQUAL_TOKENS))
        if outcome is None or other is None or not (outcome.finished() and other.finished()):
            continue
        seconds = mean_of(outcome, lambda run: run.train_seconds)
        steps = outcome.finished()[0].config["steps"]
        same = ", the same runs" if [run.path for run in outcome.runs] == [run.path for run in other.runs] else ""
        speed = f"{1 / other.seconds_per_token:,.0f} tokens/s at equal tokens"
        lines.append(f"{arm}: {speed}, so {steps} steps in equal time{same}; they took {seconds:.2f} s (mean).")
    for way in ways(results):
        if way.name == EQUAL_TIME:
            test = _log_seconds(way)
            low, high = (100 * math.expm1(x) for x in (test.low, test.high))
            interval = f"; 95 % interval {low:+.1f} to {high:+.1f} %, {test.test}" if test.tested else ""
            lines.append(f"{longer(way)}{interval}.")
    slowdowns = [o.slowdown for o in results.outcomes if math.isfinite(o.slowdown)]
    if slowdowns:
        worst = max(slowdowns)
        end = "steady, so times are judged" if worst <= STEADY else "not steady, so times of such runs are not judged"
        lines.append(
            f"A step took at most {worst:.2f} times as long with one seed as with another of the same condition "
            f"(limit {STEADY:g}): {end}."
        )
    return lines


def lead_sentences(trials: Results) -> list[str]:
    """The lead of each arm's best trial over the reference's: over draws of trials, and by their number."""
    own, lines = by_arm(trials), []
    reference = trials.arms()[0]
    for arm in trials.arms()[1:]:
        if not {arm, reference} <= own.keys():
            continue
        found, n = lead(own[arm], own[reference]), min(len(own[arm]), len(own[reference]))
        mine, theirs = map(optimizer_name, (arm, reference))
        lines.append(
            f"Over draws of {n} trials: {theirs}'s best minus {mine}'s is {found.by_k[-1]:.3f} nats (95 % interval "
            f"{found.low:.3f} to {found.high:.3f}, bootstrap over trials); {mine}'s is lower with probability "
            f"{found.lower:.2f}."
        )
        by_k = ", ".join(f"{found.by_k[k - 1]:.3f} with {k}" for k in powers(n))
        counts = f"{len(trials.space(reference))} settings tuned for {theirs}, {len(trials.space(arm))} for {mine}"
        lines.append(f"{mine}'s lead in nats by trials of each: {by_k} ({counts}).")
    return lines


def decile_sentence(results: Results) -> list[str]:
    """How far each arm is ahead on the rarest and on the most frequent tenth of the text, at equal tokens."""
    reference, lines = results.outcome(f"{results.arms()[0]}, {EQUAL_TOKENS}"), []
    for arm in results.arms()[1:]:
        both = [results.outcome(f"{arm}, {EQUAL_TOKENS}"), reference]
        if not all(o is not None and with_deciles(o.finished()) for o in both):
            continue
        tests = [
            difference(
                *(
                    {run.config["seed"]: float(last_by_decile(run)[i]) for run in with_deciles(o.finished())}
                    for o in both
                )
            )
            for i in (-1, 0)
        ]
        rare, frequent = (
            f"{test.difference:+.3f} nats" + (f" ({test.low:+.3f} to {test.high:+.3f})" if test.tested else "")
            for test in tests
        )
        lines.append(
            f"{' minus '.join(optimizer_name(o.arm) for o in both)}: on the rarest tenth of the text {rare}, "
            f"on the most frequent tenth {frequent}; 95 % intervals, not corrected."
        )
    return lines
