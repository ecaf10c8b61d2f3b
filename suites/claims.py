"""The claims of the five documents, each judged from the runs, with the numbers.

    for claim, finding in judge_all(results_by_suite, "nano"): print(claim.statement, finding.verdict, finding.numbers)

A verdict needs three finished seeds a side and an interval, corrected for every test of its suite, that excludes zero.
Otherwise, and where a run failed or has not finished, the claim is "not testable here" (at full scale, with three
seeds, "not confirmed"). Times are judged on a GPU only.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.runs import Run
from analysis.stats import CONFIDENCE, Contrast, difference, family, learning_rate_tolerance, p_words, slope
from suites.results import Outcome, Results

CONFIRMED, NOT_CONFIRMED, NOT_TESTABLE = "confirmed", "not confirmed", "not testable here"
FEWEST_SEEDS = 3


@dataclass(frozen=True)
class Finding:
    verdict: str
    numbers: str


@dataclass(frozen=True)
class Context:
    """A claim is judged from its suite, the others, and the scale."""

    results: Results
    others: Mapping[str, Results]
    scale: str

    def verdict(self, n: int, low: float, high: float, expected: int) -> str:
        """`expected` is the sign of the claim; `low` and `high` the corrected interval."""
        if n < FEWEST_SEEDS:
            return NOT_TESTABLE
        if low > 0 or high < 0:
            return CONFIRMED if (low > 0) == (expected > 0) else NOT_CONFIRMED
        return NOT_TESTABLE if self.scale == "nano" else NOT_CONFIRMED

    def of_contrast(self, test: Contrast, expected: int) -> str:
        """No verdict where a run diverged: the survivors would flatter their condition."""
        failed = sum(o.failed for o in self.results.outcomes if o.name in (test.name_a, test.name_b))
        return NOT_TESTABLE if failed else self.verdict(min(test.n), test.low, test.high, expected)

    def one_sample(self, values: Mapping[int, float]) -> tuple[float, float, float]:
        """Mean and corrected interval of a number of each seed."""
        confidence = 1 - (1 - CONFIDENCE) / max(1, self.results.family_size)
        test = difference(values, dict.fromkeys(values, 0.0), confidence)
        return test.difference, test.low, test.high


Judge = Callable[[Context], Finding | None]  # None: the runs that it needs are missing


@dataclass(frozen=True)
class Claim:
    """A statement of a document; `extra` unless its test is one of its suite's own tests of the loss."""

    source: str
    suite: str
    statement: str
    theirs: str
    judge: Judge
    extra: bool = True


def interval(mean: float, low: float, high: float, unit: str, form: str = ".3f") -> str:
    if math.isnan(mean):
        return "no finished run on one side"
    if math.isnan(low):
        return f"{mean:{form}}{unit}, single seed"
    return f"{mean:{form}}{unit} (corrected interval {low:{form}} to {high:{form}})"


def in_words(test: Contrast, unit: str = " nats", form: str = ".3f") -> str:
    words = interval(test.difference, test.low, test.high, unit, form)
    return f"{words}, {test.test}, Holm {p_words(test.p_holm)}, n = {min(test.n)}" if test.tested else words


def lead(
    expected: int, value_of: Callable[[Run], float] | None = None, unit: str = " nats", form: str = ".3f"
) -> Judge:
    """Muon minus AdamW, of the last pair of the suite (of several sizes, the largest)."""

    def judge(c: Context) -> Finding | None:
        test = c.results.tests(value_of)[-1]
        return Finding(c.of_contrast(test, expected), f"{test.name_a} - {test.name_b}: {in_words(test, unit, form)}")

    return judge


def accuracy(run: Run) -> float:
    return 100 * float(run.val["val_accuracy"][-1])


def log_step_time(run: Run) -> float:
    return math.log(run.step_ms)


def slower(c: Context) -> Finding | None:
    """How much longer Muon's step takes; meaningful on a GPU that runs nothing else."""
    test = c.results.tests(log_step_time)[-1]
    mean, low, high = (100 * math.expm1(value) for value in (test.difference, test.low, test.high))
    numbers = f"Muon's step takes {interval(mean, low, high, ' %', '+.1f')} longer"
    if any(run.config["device"] != "cuda" for run in c.results.runs()):
        return Finding(NOT_TESTABLE, numbers + ", on a CPU shared with other runs")
    return Finding(c.of_contrast(test, 1), numbers)


def _is_best(c: Context, name: str, own: Sequence[Contrast]) -> Finding:
    """Whether a condition is better than every other, by tests of each other minus it; one that diverged is worse."""
    diverged = {o.name for o in c.results.outcomes if o.failed}
    tested = [test for test in own if test.name_a not in diverged and min(test.n) > 0]
    enough = name not in diverged and all(min(test.n) >= FEWEST_SEEDS for test in tested)
    worse = sum(test.low > 0 for test in tested) + sum(test.name_a in diverged for test in own)
    if enough and any(test.high < 0 for test in tested):
        verdict = NOT_CONFIRMED
    elif enough and worse == len(own):
        verdict = CONFIRMED
    else:
        verdict = NOT_TESTABLE if c.scale == "nano" or not enough else NOT_CONFIRMED
    counted = f"significantly worse: {worse} of {len(own)}; " if enough else ""
    if not tested:
        return Finding(verdict, f"{counted}every other condition diverged")
    best = min(tested, key=lambda test: test.difference)
    return Finding(verdict, f"{counted}the best other, {best.name_a}, minus {name}: {in_words(best)}")


def chosen(name: str) -> Judge:
    """Whether the condition that the others of its suite are tested against is the best."""
    return lambda c: _is_best(c, name, [test for test in c.results.tests() if test.name_b == name])


def beats_reference(name: str) -> Judge:
    """Whether a condition is better than the one it is tested against."""

    def judge(c: Context) -> Finding | None:
        test = next(test for test in c.results.tests() if test.name_a == name)
        return Finding(c.of_contrast(test, -1), f"{test.name_a} - {test.name_b}: {in_words(test)}")

    return judge


def best_rate(optimizer: str, rate: float) -> Judge:
    """Whether a rate is the best of a sweep."""

    def judge(c: Context) -> Finding | None:
        best, tried = c.results.best(optimizer), {o.condition.fields["lr"]: o for o in c.results.outcomes}
        if best is None:
            return None
        edge = ", on the edge of the grid" if c.results.on_edge(best) else ""
        numbers = f"best at {best.condition.fields['lr']:g}{edge} (loss {best.loss:.3f})"
        if rate not in tried:
            return Finding(NOT_TESTABLE, f"{numbers}; {rate:g} was not tried")
        mine = tried[rate]
        others = [(o.name, mine.name, o.losses(), mine.losses()) for o in tried.values() if o is not mine]
        finding = _is_best(c, mine.name, family(others, c.results.suite.extra_tests))
        return Finding(finding.verdict, f"{numbers}; {finding.numbers}")

    return judge


def wider(c: Context) -> Finding | None:
    """How much wider Muon's range of good rates is than AdamW's: seed by seed, within 5 %."""
    sweeps = {"muon": c.results, "adamw": c.others.get("moe-lr-adam")}
    if sweeps["adamw"] is None or sweeps["adamw"].to_go:
        return None
    words = []
    for share in (0.01, 0.05):
        pair = [sweep.tolerance(optimizer, share) for optimizer, sweep in sweeps.items()]
        if None in pair:
            return None
        muon, adamw = (f"{'at least ' * (t.open_low or t.open_high)}{t.decades:.2f}" for t in pair)
        words.append(f"within {100 * share:g} %: Muon {muon}, AdamW {adamw} decades")
    open_ended = pair[1].open_low or pair[1].open_high  # AdamW's may be wider than it seems
    decades = {optimizer: _decades_by_seed(sweep.outcomes) for optimizer, sweep in sweeps.items()}
    both = {seed: decades["muon"][seed] - decades["adamw"][seed] for seed in decades["muon"].keys() & decades["adamw"]}
    mean, low, high = c.one_sample(both)
    numbers = f"{'; '.join(words)}; difference within 5 % {interval(mean, low, high, ' decades', '.2f')}"
    return Finding(NOT_TESTABLE if open_ended else c.verdict(len(both), low, high, 1), numbers)


def _decades_by_seed(outcomes: Sequence[Outcome]) -> dict[int, float]:
    """The width within 5 % of each seed that finished at every rate."""
    rates = [o.condition.fields["lr"] for o in outcomes]
    losses = [o.losses() for o in outcomes]
    seeds = set.intersection(*map(set, losses))
    return {s: learning_rate_tolerance(rates, [of[s] for of in losses], 0.05).decades for s in sorted(seeds)}


def final_mean(run: Run, key: str, proj: Sequence[str] | None = None, column: int = -1) -> float:
    """A spectral metric at one event, averaged over layers and then over projections."""
    values = [np.nanmean(run.grid(name, key)[1][:, column]) for name in proj or run.projections()]
    return float(np.mean(values)) if values else math.nan


def above_chance(run: Run) -> float:
    return final_mean(run, "left_alignment") - final_mean(run, "left_alignment_chance")


def tiers_at_start(c: Context) -> Finding | None:
    """Whether effective rank is ordered MLP > Q/O > K/V before any training."""
    by_seed: dict[str, dict[int, float]] = {"MLP - Q/O": {}, "Q/O - K/V": {}}
    for run in c.results.runs():
        if not run.projections():
            continue
        mlp, qo, kv = (
            final_mean(run, "effective_rank", names, 0) for names in (("up", "down"), ("q", "o"), ("k", "v"))
        )
        by_seed["MLP - Q/O"][run.config["seed"]] = mlp - qo
        by_seed["Q/O - K/V"][run.config["seed"]] = qo - kv
    if not by_seed["MLP - Q/O"]:
        return None
    intervals = {name: c.one_sample(values) for name, values in by_seed.items()}
    n = len(by_seed["MLP - Q/O"])
    there_already = n >= FEWEST_SEEDS and all(low > 0 for _, low, _ in intervals.values())
    numbers = "; ".join(f"{name} {interval(*values, '', '.1f')}" for name, values in intervals.items())
    words = "at initialisation already: " if there_already else "at initialisation: "
    return Finding(NOT_CONFIRMED if there_already else NOT_TESTABLE, words + numbers)


def _leads(c: Context) -> dict[float, dict[int, float]]:
    """Muon's loss minus AdamW's by seed, for each size (parameters) at which no run failed."""
    found: dict[float, dict[int, float]] = {}
    for a, b in c.results.crosses():
        left, right = a.losses(), b.losses()
        if not a.failed and not b.failed and left.keys() & right.keys():
            both = {seed: left[seed] - right[seed] for seed in left.keys() & right.keys()}
            found[float(a.runs[0].config["params"])] = both
    return dict(sorted(found.items()))


def _budgets(c: Context) -> str:
    tokens = sorted({run.budget for run in c.results.runs()})
    return "" if len(tokens) < 2 else f" (sizes trained on {tokens[0]:,} to {tokens[-1]:,} tokens)"


def lead_grows(c: Context) -> Finding | None:
    """Slope of Muon's loss minus AdamW's per tenfold of parameters, seed by seed."""
    leads = _leads(c)
    if len(leads) < 2:
        return None
    slopes = slope(leads)
    mean, low, high = c.one_sample(slopes)
    numbers = f"Muon's loss minus AdamW's, per tenfold of parameters: {interval(mean, low, high, ' nats')}{_budgets(c)}"
    return Finding(c.verdict(len(slopes), low, high, -1), numbers)


def largest_breaks_down(c: Context) -> Finding | None:
    """How much AdamW falls behind Muon from the second largest size to the largest.

    Sizes have different token budgets, so their losses do not compare directly.
    """
    largest = c.results.pairs()[-1][1]
    if largest.failed >= FEWEST_SEEDS and largest.failed == largest.planned:
        return Finding(CONFIRMED, f"{largest.name} diverged with all of {largest.planned} seeds")
    leads = list(_leads(c).values())
    if largest.failed or len(leads) < 2:
        return Finding(NOT_TESTABLE, f"{largest.failed} of {largest.planned} runs of {largest.name} diverged")
    small, large = leads[-2:]
    behind = {seed: small[seed] - large[seed] for seed in small.keys() & large.keys()}
    mean, low, high = c.one_sample(behind)
    numbers = f"AdamW falls behind Muon by {interval(mean, low, high, ' nats')} from the size before{_budgets(c)}"
    return Finding(c.verdict(len(behind), low, high, 1), numbers)


CLAIMS = (
    Claim(
        "S0",
        "speedrun-2m",
        "Muon ends the 2M-token run lower",
        "0.84 nats; 0.41 against AdamW at 0.0005",
        lead(-1),
        extra=False,
    ),
    Claim(
        "S0",
        "speedrun-2m",
        "Muon predicts more tokens rightly",
        "16.29 against 10.10 %",
        lead(1, accuracy, " points", ".2f"),
    ),
    Claim("S0", "speedrun-2m", "Muon's step takes longer", "9 %", slower),
    Claim(
        "S0",
        "speedrun-2m",
        "Muon's updates align less with the weights than AdamW's",
        "lower, no chance level",
        lead(-1, above_chance, " above chance"),
    ),
    Claim("S0", "speedrun-2m", "Training made the rank tiers MLP > Q/O > K/V", "seen after training", tiers_at_start),
    Claim(
        "S1",
        "baseline",
        "Muon keeps more effective rank than AdamW",
        "no collapse under Muon",
        lead(1, lambda run: final_mean(run, "effective_rank"), " directions", ".2f"),
    ),
    Claim("S3", "baseline", "The lead lasts", "0.058 nats after 1.7B tokens", lead(-1), extra=False),
    Claim("S3", "baseline", "Muon's throughput is lower", "97.9k against 81.4k tokens/s", slower),
    Claim(
        "S2", "model-size", "Muon beats AdamW at the largest size", "accuracy .946 against .284", lead(-1), extra=False
    ),
    Claim("S2", "model-size", "The lead grows with the model", "-.010, .013, .044, .662 of accuracy", lead_grows),
    Claim("S2", "model-size", "AdamW breaks down at the largest size", ".917 to .284 of accuracy", largest_breaks_down),
    Claim("S2", "model-size", "Muon's step takes longer", "3.5 to 5.1 %", slower),
    Claim(
        "S4",
        "moe-lr-muon",
        "Muon's range of good rates is wider",
        "30 times in words; 4.5 against 2.86 in its table",
        wider,
    ),
    Claim("S4", "moe-lr-muon", "Muon's best rate is 0.07", "5.720 at 0.07", best_rate("muon", 0.07)),
    Claim("S4", "moe-lr-adam", "AdamW's best rate is 0.001", "6.726 after 200 steps", best_rate("adamw", 0.001)),
    Claim("S4", "moe-momentum", "Momentum 0.9 is best", "chosen", chosen("momentum 0.9"), extra=False),
    Claim("S4", "moe-weight-decay", "Weight decay 0.1 is best", "chosen", chosen("weight_decay 0.1"), extra=False),
    Claim("S4", "moe-ns-steps", "Five Newton-Schulz steps are best", "chosen", chosen("ns_steps 5"), extra=False),
    Claim("S4", "moe-nesterov", "Nesterov momentum helps", "chosen", chosen("with Nesterov"), extra=False),
    Claim("S4", "moe-warmup", "A warm-up of 5 % is best", "counted in micro-steps", chosen("warmup 0.05"), extra=False),
    Claim("S4", "moe-schedule", "Cosine is best", "fell to 0.905 of the peak only", chosen("cosine"), extra=False),
    Claim(
        "S4",
        "moe-aux-ratio",
        "A tenth of Muon's rate suits the rest",
        "0.007 to 0.07",
        chosen("aux/Muon 1/10"),
        extra=False,
    ),
    Claim("S4", "moe-clip", "Clipping at 1 is best", "chosen", chosen("grad_clip 1"), extra=False),
    Claim("S4", "moe-min-lr", "A last rate of a tenth is best", "chosen", chosen("min_lr 0.1"), extra=False),
    Claim(
        "S4",
        "moe-adam",
        "AdamW is better constant, without warm-up",
        "5.548, its best",
        beats_reference("constant, no warm-up"),
        extra=False,
    ),
    Claim("S4", "moe-long", "Muon leads in a longer run too", "longer runs of both", lead(-1), extra=False),
    Claim("S4", "moe-final", "The best Muon beats the best AdamW", "5.158 against 5.548", lead(-1), extra=False),
)


def judge_all(results: Mapping[str, Results], scale: str) -> list[tuple[Claim, Finding]]:
    """Every claim whose suite is among `results`, with its finding."""
    found = []
    for claim in CLAIMS:
        if claim.suite not in results:
            continue
        own = results[claim.suite]
        if own.to_go:
            finding = Finding(NOT_TESTABLE, f"{own.to_go} of {own.planned} runs have not finished")
        else:
            no_runs = Finding(NOT_TESTABLE, "the runs that it needs have not finished")
            finding = claim.judge(Context(own, results, scale)) or no_runs
        found.append((claim, finding))
    return found
