"""What the claims about learning rates measure: the best one, the range of good ones, what lies outside it.

    measure = wider(0.05, "lr-sensitivity", "lr-sensitivity"); finding = judge([measure(context)], tests=4)

Of sweeps, seed by seed; ranges and ratios on the log scale.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from analysis.stats import Tolerance, best_rate, learning_rate_tolerance
from suites.judging import CONFIRMED, REFUTED, UNDECIDED, Context, Evidence, Finding, Lacking, Unit
from suites.measures import DECADES, HUNDREDTHS, LOG_RATIO, TIMES, Measure, best, per_seed


def outside(low: float, high: float, name: str) -> Measure:
    """Every rate below `low` or above `high` ends higher than the document's best one, or diverges."""
    return best(name, lambda outcome: not low <= outcome.condition.fields["lr"] <= high)


def _by_seed(c: Context, optimizer: str) -> dict[int, tuple[list[float], list[float]]]:
    """Rates and losses of each seed that finished at every rate that no seed diverged at; NaN where one did."""
    tried = [c.over(o) for o in c.results.outcomes if o.optimizer == optimizer]
    steady = [o.losses() for o in tried if not o.failed]
    seeds = sorted(set.intersection(*map(set, steady))) if steady else []
    rates = [float(o.condition.fields["lr"]) for o in tried]
    return {s: (rates, [math.nan if o.failed else o.losses()[s] for o in tried]) for s in seeds}


def _tolerances(c: Context, optimizer: str, share: float) -> dict[int, Tolerance]:
    found = {seed: learning_rate_tolerance(*grid, share) for seed, grid in _by_seed(c, optimizer).items()}
    return {seed: tolerance for seed, tolerance in found.items() if tolerance is not None}


def _is_open(found: Mapping[int, Tolerance]) -> bool:
    """Whether a grid ends inside the range, which may then be wider than it seems."""
    return any(tolerance.open_low or tolerance.open_high for tolerance in found.values())


def _wider(
    c: Context, share: float, wide: tuple[str, Context, str], narrow: tuple[str, Context, str]
) -> Evidence | Finding:
    """The first range is wider than the second, in decades, seed by seed. Where the grid ends inside a range, that one
    is wider than it seems, so it cannot be shown to be the narrower one."""
    found = {name: _tolerances(sweep, optimizer, share) for name, sweep, optimizer in (wide, narrow)}
    words = ", ".join(
        f"{name} {'at least ' * _is_open(own)}{np.mean([t.decades for t in own.values()] or [math.nan]):.2f}"
        for name, own in found.items()
    )
    first, second = found.values()
    gaps = {seed: first[seed].decades - second[seed].decades for seed in first.keys() & second.keys()}
    what = f"within {100 * share:g} %: {words} decades; difference"
    evidence = per_seed(what, gaps, 1, DECADES, method=LOG_RATIO)
    tests = c.results.family_size
    narrower = {CONFIRMED: narrow[0], REFUTED: wide[0]}.get(evidence.verdict(tests))
    if narrower is not None and _is_open(found[narrower]):
        numbers = f"{evidence.numbers(tests)}; the grid of {narrower} ends inside its range"
        return Finding(UNDECIDED, numbers, evidence.test_words(tests))
    return evidence


def wider(share: float, muon: str, adamw: str) -> Measure:
    """Muon's range of rates within a share of the best loss is wider than AdamW's."""
    return lambda c: _wider(c, share, ("Muon", c.suite(muon), "muon"), ("AdamW", c.suite(adamw), "adamw"))


def wider_when_longer(shorter: str, share: float = 0.05) -> Measure:
    """Muon's range of rates is wider in this suite's runs than in the shorter ones of another."""
    return lambda c: _wider(c, share, ("here", c, "muon"), (shorter, c.suite(shorter), "muon"))


def best_between(low: float, high: float) -> Measure:
    """Muon's best rate is inside a range, in the logarithm."""
    middle, half = math.sqrt(low * high), math.log(high / low) / 2

    def measure(c: Context) -> Evidence:
        logs = {seed: math.log(best_rate(*grid) / middle) for seed, grid in _by_seed(c, "muon").items()}
        show = Unit("", ".3g", lambda log: middle * math.exp(log))
        what = f"Muon's best rate, limits {low:g} and {high:g}"
        return per_seed(what, logs, 0, show, margin=half, method=LOG_RATIO)

    return measure


def _ratio(what: str, number: Callable[..., float], adamw: str, theirs: float, factor: float = 2.0) -> Measure:
    """A number of Muon's grid over that of AdamW's, seed by seed, is within a factor of the document's ratio."""

    def measure(c: Context) -> Evidence:
        sides = ((c, "muon"), (c.suite(adamw), "adamw"))
        mine, its = ({s: number(*grid) for s, grid in _by_seed(*side).items()} for side in sides)
        ratios = {seed: math.log(mine[seed] / its[seed] / theirs) for seed in mine.keys() & its.keys()}
        more = {"against": math.log(theirs), "margin": math.log(factor), "method": LOG_RATIO}
        return per_seed(what, ratios, 0, TIMES, **more)

    return measure


def rate_ratio(adamw: str, theirs: float) -> Measure:
    """Of the best rates."""
    return _ratio("Muon's best rate over AdamW's", best_rate, adamw, theirs)


def range_ratio(adamw: str, theirs: float, share: float = 0.05) -> Measure:
    """Of the highest minus the lowest rate within a share of the best loss; Lacking where a grid does not show both."""

    def width(rates: Sequence[float], losses: Sequence[float]) -> float:
        found = learning_rate_tolerance(rates, losses, share)
        if found is None or found.open_low or found.open_high or found.high == found.low:
            words = f"a range within {100 * share:g} % reaches the end of a grid, or rates that diverge"
            raise Lacking(f"{words}: its width is unknown")
        return found.high - found.low

    return _ratio(f"width of the range within {100 * share:g} %, Muon over AdamW", width, adamw, theirs)


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
