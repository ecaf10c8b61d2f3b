"""From tested numbers to a verdict on a claim: confirmed, refuted, equivalent, or what would decide it.

    finding = judge([Evidence(what="muon - adamw", test=difference(a, b), expected=-1, show=nats)], tests=4)

`tests` is the number of tests of the suite: every interval is widened so that all of them hold together with 95 %
(Bonferroni). A verdict needs three seeds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats as scipy_stats

from analysis import power
from analysis.stats import SIGNIFICANT, Difference, p_words, spread_factors
from suites.results import Outcome, Results

CONFIRMED, REFUTED, EQUIVALENT = "confirmed", "refuted", "equivalent"
UNDECIDED, NOT_TESTABLE = "undecided", "not testable here"
DECIDED = (CONFIRMED, REFUTED, EQUIVALENT)
FEWEST_SEEDS = 3
MOST_SHOWN = 3  # comparisons of one claim that are all printed


@dataclass(frozen=True)
class Unit:
    """How a number is printed: its form, the words after it, and what is done to it first."""

    words: str
    form: str = ".3f"
    of: Callable[[float], float] = float

    def number(self, value: float) -> str:
        return f"{self.of(value):{self.form}}"

    def __call__(self, value: float) -> str:
        return self.number(value) + self.words


@dataclass(frozen=True)
class Finding:
    """A verdict, the numbers behind it, and the test: its n, its margin, and the smallest effect that it could show."""

    verdict: str
    numbers: str
    test: str = "-"


class Lacking(Exception):
    """The runs that a claim needs are missing, so it is undecided; says which."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.finding = Finding(UNDECIDED, reason)


@dataclass(frozen=True)
class Context:
    """A claim is judged from its suite and the others."""

    results: Results
    others: Mapping[str, Results]

    def suite(self, name: str) -> "Context":
        if name not in self.others:
            raise Lacking(f"needs the runs of {name} too: report everything")
        return Context(self.others[name], self.others)

    def over(self, outcome: Outcome) -> Outcome:
        """Lacking unless every run of a condition has finished or diverged: a killed one says nothing."""
        if outcome.to_go:
            raise Lacking(f"{outcome.to_go} of {outcome.planned} runs of {outcome.name} have not finished")
        if outcome.lost:
            raise Lacking(f"{outcome.lost} of {outcome.planned} runs of {outcome.name} failed without diverging")
        return outcome

    def ready(self, outcome: Outcome) -> Outcome:
        """Lacking unless every run of a condition has finished: the survivors would flatter it."""
        if self.over(outcome).diverged:
            raise Lacking(f"{outcome.diverged} of {outcome.planned} runs of {outcome.name} diverged")
        return outcome

    def ended(self, name: str) -> Outcome:
        """A condition whose runs may have diverged."""
        found = self.results.outcome(name)
        if found is None:
            raise Lacking(f"{self.results.name} has no condition {name}")
        return self.over(found)

    def outcome(self, name: str) -> Outcome:
        return self.ready(self.ended(name))


@dataclass(frozen=True)
class Spread(Difference):
    """The logarithm of a standard deviation over its limit, with an interval from the chi-square distribution."""

    @classmethod
    def of(cls, values: Sequence[Sequence[float] | float], limit: float) -> "Spread":
        """`values` by seed. Where a seed has a row of numbers, their variances are averaged, but count as one number:
        those of one run can move together, which makes the interval the widest that it can be."""
        count = len(values)
        spread = math.sqrt(np.mean(np.var(values, axis=0, ddof=1))) if count > 1 else math.nan
        log = math.log(spread / limit) if spread > 0 else -math.inf if spread == 0 else math.nan
        nothing = (math.nan,) * 3
        return cls(log, *nothing, math.nan, count - 1.0, "chi-square test", (count, count))

    def interval(self, confidence: float) -> tuple[float, float]:
        low, high = (self.difference + math.log(factor) for factor in spread_factors(self.freedom, confidence))
        return low, high


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A tested number, and where the claim puts it: below zero (`expected` -1) or above (1), else, with `expected` 0,
    inside -margin .. margin, or only above -margin (`one_sided`).

    A `margin` beside a sign is that within which two sides count as equivalent. `against` is what was subtracted for
    the test, `relative_to` the value of which it is also given in per cent, `remark` further words.
    """

    what: str
    test: Difference
    expected: int
    show: Unit
    margin: float = 0.0
    one_sided: bool = False
    against: float = 0.0
    relative_to: float = math.nan
    method: str = ""
    remark: str = ""

    def verdict(self, tests: int) -> str:
        alpha, n = SIGNIFICANT / tests, min(self.test.n)
        if n < FEWEST_SEEDS or math.isnan(self.test.interval(1 - alpha)[0]):
            return UNDECIDED
        low, high = self.test.interval(1 - 2 * alpha)  # two one-sided tests at alpha each (Schuirmann 1987)
        top = math.inf if self.one_sided else self.margin
        inside = low > -self.margin and high < top
        if not self.expected:
            return CONFIRMED if inside else REFUTED if low > top or high < -self.margin else UNDECIDED
        low, high = self.test.interval(1 - alpha)
        if low > 0 or high < 0:
            return CONFIRMED if (low > 0) == (self.expected > 0) else REFUTED
        return EQUIVALENT if inside and self.margin else UNDECIDED

    def numbers(self, tests: int) -> str:
        value = self.test.difference
        if math.isnan(value):
            return f"{self.what}: no finished run on one side"
        words = f"{self.what}: {self.show(value + self.against)}"
        if math.isfinite(self.relative_to):
            words += f" ({100 * value / self.relative_to:+.1f} %)"
        alpha = SIGNIFICANT / tests
        low, high = self.test.interval(1 - (alpha if self.expected else 2 * alpha)) if min(self.test.n) > 1 else (0, 0)
        if min(self.test.n) < 2 or math.isnan(low):
            return f"{words}, single seed{self.remark}" if min(self.test.n) == 1 else f"{words}, no spread{self.remark}"
        level = "" if self.expected else "90 % "
        ends = " to ".join(self.show.number(bound + self.against) for bound in (low, high))
        words += f" (corrected {level}interval {ends}"
        if self.expected and not math.isnan(self.test.p_value):
            words += f", {p_words(min(1.0, tests * self.test.p_value))}"
        if self.one_sided and -self.margin < low and high < 0:
            words += ", below zero by less than the margin"
        return f"{words}){self.remark}"

    def test_words(self, tests: int) -> str:
        """Which test, n, margin, and the smallest effect that this n finds with a probability of 80 %."""
        n, kind = min(self.test.n), self.test.test
        if not self.expected:
            kind = f"one-sided {kind}" if self.one_sided else f"two one-sided tests ({kind})"
        words = f"{self.method + ', ' if self.method else ''}{kind}, n = {n}"
        if self.margin:
            words += f", margin {self.show(self.margin)}"
        could = self.could_show(SIGNIFICANT / tests)
        if math.isfinite(could):
            words += f"; could show {self.show(could)}" if self.expected else f"; could show {self.show(could)} or less"
        return words

    def could_show(self, alpha: float) -> float:
        """The least effect found, or the least margin held by equal sides, with a probability of 80 %."""
        if isinstance(self.test, Spread):  # how far below the limit the true spread must be
            tails = (
                scipy_stats.chi2.ppf((alpha / 2, power.POWER), self.test.freedom)
                if min(self.test.n) > 1
                else (1, math.nan)
            )
            return 0.5 * math.log(tails[0] / tails[1])
        if min(self.test.n) < 2 or not self.test.error > 0:
            return math.nan
        least = power.detectable if self.expected else power.detectable_margin
        return self.test.error * least(alpha, self.test.freedom)

    def would_decide(self, tests: int) -> str:
        """How many seeds would, if the effect is as large as it looks."""
        n, alpha, effect = min(self.test.n), SIGNIFICANT / tests, abs(self.test.difference)
        if n < FEWEST_SEEDS:
            return f"{FEWEST_SEEDS} seeds are the least for a verdict"

        def chance(error: float, freedom: float) -> float:
            inside = power.equivalence(effect / error, self.margin / error, alpha, freedom) if self.margin else 0.0
            if self.expected:
                return max(inside, power.superiority(effect / error, alpha, freedom))
            return max(inside, power.superiority(max(0.0, effect - self.margin) / error, 2 * alpha, freedom))

        seeds = power.fewest_seeds(chance, self.test.error * math.sqrt(n))
        return (
            f"about {max(seeds, n + 1)} seeds would decide"
            if seeds
            else f"more than {power.MOST_SEEDS} seeds would decide"
        )


def judge(found: Sequence[Evidence], tests: int) -> Finding:
    """A claim of several parts holds if each part does, and is refuted if one is."""
    verdicts = [evidence.verdict(tests) for evidence in found]
    if REFUTED in verdicts:
        verdict = REFUTED
    elif UNDECIDED in verdicts:
        verdict = UNDECIDED
    else:
        verdict = EQUIVALENT if EQUIVALENT in verdicts else CONFIRMED
    open_or_against = [e for e, v in zip(found, verdicts, strict=True) if v != CONFIRMED] or found
    shown = found if len(found) <= MOST_SHOWN else [_most_contrary(open_or_against)]
    numbers = "; ".join(evidence.numbers(tests) for evidence in shown)
    if len(found) > MOST_SHOWN:
        numbers = f"{verdicts.count(CONFIRMED)} of {len(found)} comparisons confirm it; most against it: {numbers}"
    if verdict == UNDECIDED:
        numbers += f"; {_most_contrary(open_or_against).would_decide(tests)}"
    return Finding(verdict, numbers, _most_contrary(open_or_against).test_words(tests))


def _most_contrary(found: Sequence[Evidence]) -> Evidence:
    """The part that speaks most against the claim: the difference that is smallest in the claim's direction."""

    def towards(e: Evidence) -> float:
        if e.expected or e.one_sided:
            return (e.expected or 1) * e.test.difference
        return -abs(e.test.difference)

    return min(found, key=towards)
