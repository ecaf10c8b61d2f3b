"""What the claims about learning rates measure: the best one, the range of good ones, what lies outside it.

    measure = wider(0.05, "lr-sensitivity", "lr-sensitivity"); finding = judge([measure(context)], tests=4)

Of sweeps, seed by seed; ranges and ratios on the log scale.
"""

import math

import numpy as np

from analysis.stats import best_rate, learning_rate_tolerance
from suites.judging import CONFIRMED, UNDECIDED, Context, Evidence, Finding, Lacking
from suites.measures import DECADES, HUNDREDTHS, LOG_RATIO, TIMES, Measure, of_loss, per_seed


def outside(low: float, high: float, best: str) -> Measure:
    """Every rate below `low` or above `high` ends higher than the document's best one, or diverges."""

    def measure(c: Context) -> list[Evidence] | Finding:
        own = c.outcome(best)
        tried = [o for o, b in c.results.pairs() if b is own and not low <= o.condition.fields["lr"] <= high]
        found = [of_loss(c, o, own, 1) for o in tried if not o.failed]
        if not tried:
            raise Lacking(f"no rate outside {low:g} to {high:g}")
        return found or Finding(CONFIRMED, f"all of {len(tried)} rates outside diverged")

    return measure


def _by_seed(c: Context, optimizer: str) -> dict[int, tuple[list[float], list[float]]]:
    """Rates and losses of each seed that finished at every rate that no seed diverged at; NaN where one did."""
    tried = [o for o in c.results.outcomes if o.optimizer == optimizer]
    for outcome in tried:
        if outcome.to_go:
            c.ready(outcome)
    steady = [o.losses() for o in tried if not o.failed]
    seeds = sorted(set.intersection(*map(set, steady))) if steady else []
    rates = [float(o.condition.fields["lr"]) for o in tried]
    return {s: (rates, [math.nan if o.failed else o.losses()[s] for o in tried]) for s in seeds}


def wider(share: float, muon: str, adamw: str) -> Measure:
    """Muon's range of rates within a share of the best loss is wider than AdamW's, in decades, seed by seed."""

    def measure(c: Context) -> Evidence | Finding:
        widths, ends = {}, {"muon": 0, "adamw": 0}
        for optimizer, suite in (("muon", muon), ("adamw", adamw)):
            tolerances = {
                seed: learning_rate_tolerance(*grid, share)
                for seed, grid in _by_seed(c.suite(suite), optimizer).items()
            }
            widths[optimizer] = {seed: t.decades for seed, t in tolerances.items() if t is not None}
            ends[optimizer] = sum(t.open_low or t.open_high for t in tolerances.values() if t is not None)
        gaps = {seed: widths["muon"][seed] - widths["adamw"][seed] for seed in widths["muon"].keys() & widths["adamw"]}
        words = ", ".join(
            f"{name} {'at least ' * (ends[key] > 0)}{np.mean(list(widths[key].values()) or [math.nan]):.2f}"
            for key, name in (("muon", "Muon"), ("adamw", "AdamW"))
        )
        what = f"within {100 * share:g} %: {words} decades; difference"
        found = per_seed(what, gaps, 1, DECADES, method=LOG_RATIO)
        if ends["adamw"]:  # AdamW's may be wider than it seems
            tests = c.results.family_size
            numbers = f"{found.numbers(tests)}; AdamW's grid ends inside its range"
            return Finding(UNDECIDED, numbers, found.test_words(tests))
        return found

    return measure


def rate_ratio(adamw: str, theirs: float, factor: float = 2.0) -> Measure:
    """Muon's best rate over AdamW's, seed by seed, is within a factor of the document's ratio."""

    def measure(c: Context) -> Evidence:
        found = {}
        for optimizer, context in (("muon", c), ("adamw", c.suite(adamw))):
            found[optimizer] = {seed: best_rate(*grid) for seed, grid in _by_seed(context, optimizer).items()}
        both = found["muon"].keys() & found["adamw"]
        ratios = {seed: math.log(found["muon"][seed] / found["adamw"][seed] / theirs) for seed in both}
        more = {"against": math.log(theirs), "margin": math.log(factor), "method": LOG_RATIO}
        return per_seed("Muon's best rate over AdamW's", ratios, 0, TIMES, **more)

    return measure


def range_ratio(adamw: str, theirs: float, factor: float = 2.0, share: float = 0.05) -> Measure:
    """The highest minus the lowest rate within a share of the best loss, Muon's over AdamW's, seed by seed, is within a
    factor of the document's ratio."""

    def measure(c: Context) -> Evidence:
        widths = []
        for optimizer, context in (("muon", c), ("adamw", c.suite(adamw))):
            found = {s: learning_rate_tolerance(*grid, share) for s, grid in _by_seed(context, optimizer).items()}
            widths.append({s: t.high - t.low for s, t in found.items() if t is not None and t.high > t.low})
        both = widths[0].keys() & widths[1].keys()
        ratios = {seed: math.log(widths[0][seed] / widths[1][seed] / theirs) for seed in both}
        more = {"against": math.log(theirs), "margin": math.log(factor), "method": LOG_RATIO}
        return per_seed(f"width of the range within {100 * share:g} %, Muon over AdamW", ratios, 0, TIMES, **more)

    return measure


def wider_when_longer(longer: str, share: float = 0.05) -> Measure:
    """Muon's range of rates is wider in the longer runs of another suite than in this suite's."""

    def measure(c: Context) -> Evidence:
        decades = [
            {s: learning_rate_tolerance(*grid, share).decades for s, grid in _by_seed(context, "muon").items()}
            for context in (c.suite(longer), c)
        ]
        gaps = {seed: decades[0][seed] - decades[1][seed] for seed in decades[0].keys() & decades[1].keys()}
        return per_seed(f"within {100 * share:g} %, {longer} minus {c.results.name}", gaps, 1, DECADES)

    return measure


def deviation_in(muon: tuple[float, float], adamw: tuple[float, float], suite: str) -> Measure:
    """Mean loss above the best rate's over the rates of a range, relative, seed by seed: Muon's minus AdamW's."""

    def deviations(c: Context, optimizer: str, low: float, high: float) -> dict[int, float]:
        found = {}
        for seed, (rates, losses) in _by_seed(c, optimizer).items():
            inside = [loss for rate, loss in zip(rates, losses, strict=True) if low <= rate <= high]
            found[seed] = float(np.mean(inside) / np.nanmin(losses) - 1)
        return found

    def measure(c: Context) -> Evidence:
        mine, others = deviations(c, "muon", *muon), deviations(c.suite(suite), "adamw", *adamw)
        gaps = {seed: mine[seed] - others[seed] for seed in mine.keys() & others.keys()}
        return per_seed("mean deviation from the best loss, Muon - AdamW", gaps, 1, HUNDREDTHS)

    return measure
