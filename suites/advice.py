"""What to use at this scale, computed: optimizer, rates, every setting, and where the documents' advice does not hold.

    rows = advice(results_by_suite); rows[0].use, rows[0].evidence, rows[0].holds

Each row compares the best condition with the document's choice: paired over seeds, corrected for all tests of the
suite. The best of several conditions is flattered by the choice; moe-final confirms the choices on fresh seeds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.plots import setting
from analysis.plots_conditions import Effect
from analysis.runs import OPTIMIZER_NAMES, optimizer_name
from analysis.stats import MARGIN, SIGNIFICANT, Difference, best_rate, difference, mean_over_seeds, t_interval
from engine.norm_watch import NORM_WARNING
from suites import documents
from suites.figures import watched
from suites.judging import FEWEST_SEEDS
from suites.results import Outcome, Results

HOLDS, NOT, OPEN = "holds", "does not hold", "open"


@dataclass(frozen=True)
class Choice:
    """What a document advises: the condition's name in the suite, and the document's words."""

    suite: str
    setting: str
    condition: str
    source: str
    words: str


# S4's section 7.3 unless it says otherwise.
MATRICES = "matrices that Muon trains"
CHOICES = (
    Choice(
        "moe-muon-on", MATRICES, "Muon on the blocks", "S4", "Muon for high-dimensional parameters (attention, FFN)"
    ),
    Choice("moe-muon-on", MATRICES, "Muon on every matrix", "S0", "for all 2D parameter updates"),
    Choice("moe-momentum", "momentum of Muon", "momentum 0.9", "S4", "momentum = 0.9"),
    Choice("moe-weight-decay", "weight decay of Muon", "weight_decay 0.2", "S4", "weight_decay = 0.2"),
    Choice("moe-ns-steps", "Newton-Schulz steps", "ns_steps 3", "S4", "ns_steps = 3"),
    Choice("moe-nesterov", "Nesterov momentum", "with Nesterov", "S4", "nesterov = True"),
    Choice("moe-warmup", "warm-up of Muon", "warmup 0.05", "S4", "warmup_ratio = 0.05"),
    Choice("moe-schedule", "schedule of Muon", "cosine", "S4", 'lr_schedule = "cosine"'),
    Choice("moe-min-lr", "last rate of Muon", "min_lr 0.1", "S4", "Min LR Ratio: 0.1"),
    Choice("moe-clip", "gradient clipping", "grad_clip 1", "S4", "Max norm 1.0 (prevents divergence)"),
    Choice("moe-aux-ratio", "rate of the rest over Muon's", "aux/Muon 1/10", "S4", "0.007 (10× lower)"),
    Choice(
        "moe-adam",
        "schedule, warm-up and decay of AdamW",
        "constant, no warm-up",
        "S4",
        "LR=0.001, constant, no warmup",
    ),
)
NAMES_RATES = ("S4",)  # documents that do; the rates of the others are those of the author's code
RATES = {
    ("speedrun-lr", "muon"): documents.WRITTEN["S0"]["muon"]["lr"],
    ("speedrun-lr", "adamw"): documents.WRITTEN["S0"]["adamw"]["lr"],
    ("lr-sensitivity", "muon"): documents.WRITTEN["S2"]["muon"]["lr"],
    ("lr-sensitivity", "adamw"): documents.WRITTEN["S2"]["adamw"]["lr"],
    ("moe-lr-muon", "muon"): documents.WRITTEN["S4"]["muon"]["lr"],
    ("moe-lr-adam", "adamw"): documents.WRITTEN["S4"]["adamw"]["lr"],
}
RECIPE = ("lr", "adamw_lr", "schedule", "warmup", "min_lr", "weight_decay", "grad_clip")
MUON_RECIPE = (*RECIPE, "momentum", "nesterov", "ns_steps", "ns_coefficients")
RATE_WORDS = {
    "speedrun-lr": "short run",
    "lr-sensitivity": "search of the rate, constant schedule",
    "moe-lr-muon": "mixture of experts",
    "moe-lr-adam": "mixture of experts",
}
FINALS = {"speedrun-2m": "short run", "baseline": "longer run", "moe-final": "mixture of experts"}
OPTIMIZER_WORDS = {"speedrun-2m": "Continue using Muon", "moe-final": "7% better validation loss than optimized Adam"}
NORM_WORDS = "exceed 4.0-5.0 in Muon, consider adjusting the learning rate or momentum"


@dataclass(frozen=True)
class Advice:
    """One setting: what to use, the evidence with interval and n, what the document says, and whether that holds."""

    setting: str
    use: str
    evidence: str
    n: int
    document: str
    holds: str
    reason: str
    suite: str


def advice(results: Mapping[str, Results]) -> list[Advice]:
    """Every row that the finished runs allow."""
    rows = [_optimizer(results[name]) for name in FINALS if name in results]
    rows += [_rate(results[suite], optimizer, rate) for (suite, optimizer), rate in RATES.items() if suite in results]
    rows += [_setting(results[choice.suite], choice) for choice in CHOICES if choice.suite in results]
    rows += [_norms(results[name]) for name in ("baseline",) if name in results]
    return [row for row in rows if row is not None]


def _numbers(test: Difference, level: float) -> str:
    """A difference of losses with its interval, and in per cent."""
    words = f"{test.difference:+.4f} nats ({100 * test.difference / level:+.2f} %"
    return words + (f", interval {test.low:+.4f} to {test.high:+.4f})" if math.isfinite(test.low) else ", no interval)")


def _against(results: Results, a: Outcome, b: Outcome) -> Difference:
    """a minus b at the suite's corrected confidence."""
    return difference(a.losses(), b.losses(), 1 - SIGNIFICANT / results.family_size)


def _optimizer(results: Results) -> Advice | None:
    crosses = results.crosses()
    if not crosses:
        return None
    muon, adamw = crosses[0]
    test = _against(results, muon, adamw)
    clear = test.excludes_zero
    better = muon if test.difference < 0 else adamw
    source, words = results.suite.source, OPTIMIZER_WORDS.get(results.name)
    ahead = f"no advice in {source}; Muon is ahead in the author's stored runs"
    return Advice(
        setting=f"optimizer, {FINALS[results.name]}",
        use=optimizer_name(better.optimizer) if clear else "either",
        evidence=f"Muon minus AdamW, both tuned: {_numbers(test, adamw.loss)}",
        n=min(test.n),
        document=f"Muon ({source}: {words})" if words else ahead,
        holds=((HOLDS if better is muon else NOT) if clear else OPEN) if words else "-",
        reason="" if clear else "the interval holds zero",
        suite=results.name,
    )


def _rate(results: Results, optimizer: str, theirs: float) -> Advice | None:
    """The best rate with an interval over seeds, and what the document's rate costs against it."""
    tried = [o for o in results.outcomes if o.optimizer == optimizer and not o.as_written and math.isfinite(o.loss)]
    best = results.best(optimizer)
    if best is None or len(tried) < 3:
        return None
    rates = [float(o.condition.fields["lr"]) for o in tried]
    seeds = sorted(set.intersection(*(set(o.losses()) for o in tried)))
    by_seed = {seed: [o.losses()[seed] for o in tried] for seed in seeds}
    logs = [math.log(best_rate(rates, losses)) for losses in by_seed.values()]
    mean, low, high = t_interval(logs)
    interval = f", interval {math.exp(low):.2g} to {math.exp(high):.2g}" if math.isfinite(low) else ", single seed"
    tolerance = results.tolerance(optimizer, MARGIN)
    edge = "; on the edge of the grid" if results.on_edge(best) else ""
    source = results.suite.source
    origin = source if source in NAMES_RATES else f"the author's code for {source}"
    row = {
        "setting": f"learning rate of {OPTIMIZER_NAMES[optimizer]}, {RATE_WORDS[results.name]}",
        "use": f"{tolerance.low:.2g} to {tolerance.high:.2g}",
        "evidence": f"within 1 % of the best loss there; best {math.exp(mean):.2g}{interval}{edge}",
        "n": len(seeds),
        "document": f"{theirs:g} ({origin})",
        "suite": results.name,
    }
    if not min(rates) <= theirs <= max(rates):
        return Advice(**row, holds=OPEN, reason=f"the grid, {min(rates):g} to {max(rates):g}, does not reach it")
    order = np.argsort(rates)
    x = np.log(np.array(rates)[order])
    costs = {
        seed: float(np.interp(math.log(theirs), x, np.array(losses)[order]) / min(losses) - 1)
        for seed, losses in by_seed.items()
    }
    test = mean_over_seeds(costs)
    reason = f"it costs {100 * test.difference:.1f} %"
    if math.isfinite(test.low):
        reason += f" ({100 * test.low:.1f} to {100 * test.high:.1f} %)"
    if len(seeds) < 2:
        return Advice(**row, holds=OPEN, reason=f"{reason}, single seed")
    return Advice(**row, holds=HOLDS if test.high < MARGIN else NOT if test.low > MARGIN else OPEN, reason=reason)


def _setting(results: Results, choice: Choice) -> Advice | None:
    """The best condition against the document's."""
    theirs = results.outcome(choice.condition)
    tried = [o for o in results.outcomes if math.isfinite(o.loss)]
    if theirs is None or not math.isfinite(theirs.loss) or len(tried) < 2:
        return None
    best = min(tried, key=lambda o: o.loss)
    level = best.loss
    alike = [o.name for o in tried if o is not best and _within(results, o, best, level)]
    row = {
        "setting": choice.setting,
        "use": best.name + (f" (as good within 1 %: {', '.join(alike)})" if alike else ""),
        "document": f"{choice.words} ({choice.source})",
        "suite": results.name,
    }
    if best is theirs:
        second = min((o for o in tried if o is not best), key=lambda o: o.loss)
        test = _against(results, best, second)
        evidence = f"{best.name} minus the next best, {second.name}: {_numbers(test, level)}"
        few = min(test.n) < FEWEST_SEEDS
        reason = f"{FEWEST_SEEDS} seeds are the least for a verdict" if few else "it has the lowest mean loss"
        return Advice(**row, evidence=evidence, n=min(test.n), holds=OPEN if few else HOLDS, reason=reason)
    test = _against(results, theirs, best)
    evidence = f"the document's {theirs.name} minus {best.name}: {_numbers(test, level)}"
    holds, reason = OPEN, "neither a difference nor equality within 1 % is shown"
    if min(test.n) < FEWEST_SEEDS:
        reason = f"{FEWEST_SEEDS} seeds are the least for a verdict"
    elif theirs.name in alike:
        holds, reason = HOLDS, "within 1 % of the best"
    elif test.low > 0:
        holds, reason = NOT, f"{best.name} ends lower"
    return Advice(**row, evidence=evidence, n=min(test.n), holds=holds, reason=reason)


def _within(results: Results, a: Outcome, b: Outcome, level: float) -> bool:
    """Two one-sided tests put the difference inside 1 % of the loss."""
    test = difference(a.losses(), b.losses())
    if min(test.n) < 3 or math.isnan(test.low):
        return False
    low, high = test.interval(1 - 2 * SIGNIFICANT / results.family_size)
    return -MARGIN * level < low and high < MARGIN * level


def _norms(results: Results) -> Advice | None:
    """S0's second recommendation: do Muon's runs pass the level that it names, and does it harm them?"""
    runs = [run for run in watched(results) if run.optimizer == "muon"]
    if not runs:
        return None
    tops = []
    for run in runs:
        tops.append(max(float(np.nanmax(run.grid(name, "spectral_norm")[1])) for name in run.projections()))
    mean, low, high = t_interval(tops)
    above = sum(top > NORM_WARNING for top in tops)
    muon, adamw = results.crosses()[0]
    ahead = _against(results, muon, adamw)
    harmless = above == len(runs) and ahead.high < 0
    interval = f", interval {low:.2f} to {high:.2f}" if math.isfinite(low) else ""
    return Advice(
        setting="spectral norms of Muon above 4 to 5",
        use="watch them; act when the loss turns" if harmless else "watch them",
        evidence=f"largest norm {mean:.2f}{interval}; {above} of {len(runs)} runs pass {NORM_WARNING:g}",
        n=len(runs),
        document=f"{NORM_WORDS} (S0)",
        holds=NOT if harmless else OPEN,
        reason="every run passes it and ends below AdamW all the same"
        if harmless
        else "the runs do not decide it"
        if above
        else f"no run passes {NORM_WARNING:g}",
        suite=results.name,
    )


def recipes(results: Mapping[str, Results]) -> list[str]:
    """The flags of both optimizers in moe-final, which has the winner of every sweep."""
    if "moe-final" not in results:
        return []
    lines = []
    for outcome in (results["moe-final"].outcome(name) for name in OPTIMIZER_NAMES):
        if outcome is not None and math.isfinite(outcome.loss):
            fields, keys = outcome.condition.fields, MUON_RECIPE if outcome.optimizer == "muon" else RECIPE
            words = ", ".join(setting(key, fields[key]) for key in keys if key in fields)
            name = optimizer_name(outcome.optimizer)
            lines.append(f"{name} with the winner of every sweep, final loss {outcome.loss:.4f}: {words}.")
    return lines


def effects(results: Mapping[str, Results]) -> list[Effect]:
    """Every tested condition of the suites with a choice: its loss minus its reference's, in per cent."""
    found = []
    for name, choice in {choice.suite: choice for choice in CHOICES}.items():
        if name not in results:
            continue
        pairs: Sequence[tuple[Outcome, Outcome]] = results[name].pairs()
        for test, (a, b) in zip(results[name].tests(), pairs, strict=True):
            level = float(np.mean(list(b.losses().values()))) if b.losses() else math.nan
            if math.isfinite(test.difference):
                percent, low, high = (100 * value / level for value in (test.difference, test.low, test.high))
                group = f"{choice.setting}\nreference: {b.name}"
                found.append(Effect(group, a.name, a.optimizer, percent, low, high, min(test.n)))
    return found
