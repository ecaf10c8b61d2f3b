"""What the claims about spectra, seeds and experts measure.

    measure = spectral("stable_rank", 1, Unit(" directions")); finding = judge([measure(context)], tests=4)

A spectral metric of a run is the mean over its layers and then over its projections, at the last event unless it says
otherwise; alignment is counted above its chance level.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from analysis.runs import Run
from analysis.stats import MARGIN, balance, common_slope, slope, tail_index
from suites.judging import CONFIRMED, Context, Evidence, Lacking, Spread, Unit
from suites.measures import (
    HUNDREDTHS,
    LOG_RATIO,
    TIMES,
    Measure,
    Number,
    compare,
    muon_and_adamw,
    per_seed,
    ratio_below,
    sizes,
    versus,
)
from suites.suite import AS_WRITTEN, OPTIMIZERS

NEAR_ONE = math.log(2)  # a norm between a half and two counts as near one
BALANCED = 0.95  # of the greatest entropy of the experts' shares
SAME_SPREAD = 0.01  # relative deviation between seeds that counts as the same
BAND = (12 / 21, 16 / 21)  # S3's layers 12 to 16 of 22, as shares of the depth
ALIKE = 0.05  # difference of two such entropies that counts as none
SHARES = ENTROPY = Unit("", ".4f")


def event_mean(run: Run, key: str, projections: Sequence[str] | None = None, column: int = -1) -> float:
    """A spectral metric at one event, averaged over layers and then over projections."""
    values = [np.nanmean(run.grid(name, key)[1][:, column]) for name in projections or run.projections()]
    return float(np.mean(values)) if values else math.nan


def watched(run: Run) -> Run:
    if not run.projections():
        raise Lacking("its runs logged no spectra")
    return run


def last(key: str) -> Number:
    return lambda run: event_mean(watched(run), key)


def spectral(key: str, expected: int, show: Unit) -> Measure:
    """A metric at the end of Muon's runs minus that of AdamW's."""
    return beside_written(versus(last(key), expected, show), last(key), show)


def beside_written(measure: Measure, number: Number, show: Unit) -> Measure:
    """A measure of one number that also tells, without a test, its means under a document's own settings."""

    def told(c: Context) -> Evidence:
        evidence, means = measure(c), []
        for optimizer in OPTIMIZERS:
            outcome = c.results.outcome(f"{optimizer} {AS_WRITTEN}")
            values = [number(run) for run in outcome.finished() if run.projections()] if outcome else []
            means += [f"{optimizer} {show(float(np.mean(values)))}"] if values else []
        words = f"; {AS_WRITTEN}: {', '.join(means)}" if len(means) == len(OPTIMIZERS) else ""
        return replace(evidence, remark=evidence.remark + words)

    return told


def collapses(c: Context) -> Evidence | list[Evidence]:
    """AdamW's spectral entropy ends below Muon's and, where that is shown, below AdamW's own start. The second is
    tested only after the first, so the two count as one test (a fixed sequence)."""
    apart = spectral("spectral_entropy", 1, ENTROPY)(c)
    if apart.verdict(c.results.family_size) != CONFIRMED:
        return apart
    starts = {run.config["seed"]: event_mean(run, "spectral_entropy", column=0) for run in c.outcome("adamw").runs}
    falls = {seed: end - starts[seed] for seed, end in c.outcome("adamw").values(last("spectral_entropy")).items()}
    return [apart, per_seed("adamw since the first step", falls, -1, ENTROPY)]


def norm_ratio(times: float = 1.0) -> Measure:
    """So many times Muon's mean spectral norm is below AdamW's."""

    def log_norm(run: Run) -> float:
        return math.log(last("spectral_norm")(run))

    def measure(c: Context) -> Evidence:
        return ratio_below(*muon_and_adamw(c), log_norm, -math.log(times), TIMES, "spectral norm")

    return beside_written(measure, log_norm, Unit("", ".2f", math.exp))


def norm_near_one(c: Context) -> Evidence:
    """Muon's mean spectral norm is between a half and two."""
    norms = c.outcome("muon").values(lambda run: math.log(last("spectral_norm")(run)))
    more = {"margin": NEAR_ONE, "method": LOG_RATIO}
    return per_seed("Muon's mean spectral norm", norms, 0, Unit("", ".2f", math.exp), **more)


def above_chance(run: Run) -> float:
    return last("left_alignment")(run) - last("left_alignment_chance")(run)


def mean_tail(run: Run) -> float:
    """Hill's tail index of the singular values at the last event, a mean over matrices."""
    end = watched(run).spectra[-1]["step"]
    return float(np.nanmean([tail_index(line["singular_values"]) for line in run.spectra if line["step"] == end]))


def energy_in_few(run: Run) -> float:
    """Share of the sum of s² in the largest tenth of a matrix's singular values at the last event, a mean over
    matrices."""
    end = watched(run).spectra[-1]["step"]
    squares = [np.square(line["singular_values"]) for line in run.spectra if line["step"] == end]
    return float(np.mean([s[: max(1, round(len(s) / 10))].sum() / s.sum() for s in squares]))


def concentrated(c: Context) -> Evidence:
    """More than half of the energy of AdamW's matrices is in a tenth of their singular values."""
    shares = {seed: share - 0.5 for seed, share in c.outcome("adamw").values(energy_in_few).items()}
    what = "share of Σ s² in the largest tenth of AdamW's singular values, limit 50 %"
    return per_seed(what, shares, 1, Unit(" %", ".1f", lambda share: 100 * share), against=0.5)


def drift(run: Run, key: str) -> float:
    """Change over the run along the regression line through all events, as a share of the initial value."""
    grids = [watched(run).grid(name, key) for name in run.projections()]
    steps, values = grids[0][0], np.mean([np.nanmean(values, axis=0) for _, values in grids], axis=0)
    if len(steps) < 3:
        raise Lacking("a trend needs three spectra events")
    return float(np.polyfit(steps / steps[-1], values, 1)[0] / values[0])


def unevenness(run: Run) -> float:
    """The logarithm of r / stable rank of the gradients, whose r singular values are equal where it is 0; ln r where
    only one is not 0. A mean over matrices and over the events after the start. s_1 / s_r would depend on rounding."""
    lines = [line for line in watched(run).spectra if line.get("grad_stable_rank")]
    if not lines:
        raise Lacking("its runs logged no spectra of gradients")
    return float(np.mean([math.log(len(line["singular_values"]) / line["grad_stable_rank"]) for line in lines]))


def conditioning_grows(c: Context) -> Evidence:
    """AdamW's gradients are worse conditioned in larger models: by this factor per tenfold of parameters."""
    found = {float(b.runs[0].config["params"]): c.ready(b).values(unevenness) for _, b in sizes(c) if b.runs}
    if len(found) < 2:
        raise Lacking("a trend needs two sizes")
    what = "r / stable rank of AdamW's gradients, per tenfold of parameters"
    return per_seed(what, slope(found), 1, TIMES, method="trend")


def flat(**keys: str) -> Measure:
    """Metrics of Muon's runs, each with its words, change by less than 1 % of their start."""

    def measure(c: Context) -> list[Evidence]:
        found = []
        for key, words in keys.items():
            drifts = c.outcome("muon").values(lambda run, key=key: drift(run, key))
            what = f"trend of Muon's {words} over the run"
            found.append(per_seed(what, drifts, 0, HUNDREDTHS, margin=MARGIN, method="trend"))
        return found

    return measure


def tiers(c: Context) -> list[Evidence]:
    """Effective rank of Muon's runs at the end: MLP > Q/O > K/V; the same at initialisation is remarked."""
    runs = [watched(run) for run in c.outcome("muon").finished()]
    found = []
    for high, low, words in ((("up", "down"), ("q", "o"), "MLP - Q/O"), (("q", "o"), ("k", "v"), "Q/O - K/V")):
        gaps = {
            event: {
                run.config["seed"]: event_mean(run, "effective_rank", high, event)
                - event_mean(run, "effective_rank", low, event)
                for run in runs
            }
            for event in (0, -1)
        }
        start = float(np.mean(list(gaps[0].values()))) if runs else math.nan
        remark = f", {start:.1f} at initialisation already"
        found.append(per_seed(words, gaps[-1], 1, Unit(" directions", ".1f"), remark=remark))
    return found


def key_band(c: Context) -> Evidence:
    """Alignment of Muon's K updates in S3's band of layers minus that in the other layers, averaged over the run."""
    gaps, inside = {}, []
    for run in c.outcome("muon").finished():
        _, values = watched(run).grid("k", "left_alignment")
        low, high = (round(share * (len(values) - 1)) for share in BAND)
        inside = list(range(low, high + 1))
        per_layer = np.nanmean(values[:, 1:], axis=1)  # no update before the first step
        gaps[run.config["seed"]] = float(np.nanmean(per_layer[inside]) - np.nanmean(np.delete(per_layer, inside)))
    layers = " to ".join(map(str, dict.fromkeys((inside[0], inside[-1])))) if inside else "?"
    return per_seed(f"alignment of K in layers {layers} minus the others", gaps, 1, Unit(""))


def same_signature(c: Context) -> Evidence:
    """The standard deviation of a matrix's effective rank over Muon's seeds, relative, is below 1 %: the root mean
    square over matrices."""
    runs = [watched(run) for run in c.outcome("muon").finished()]
    if len(runs) < 2:
        raise Lacking("needs several seeds")
    ranks = [np.concatenate([run.grid(name, "effective_rank")[1][:, -1] for name in run.projections()]) for run in runs]
    show = Unit(" %", ".2f", lambda log: 100 * SAME_SPREAD * math.exp(log))
    what = f"standard deviation of a matrix's effective rank between seeds, limit {show(0)}"
    return Evidence(what=what, test=Spread.of(np.log(ranks), SAME_SPREAD), expected=-1, show=show)


def steady(number: Number, words: str) -> Measure:
    """The standard deviation over Muon's seeds is below 1 % of the mean."""

    def measure(c: Context) -> Evidence:
        values = list(c.outcome("muon").values(number).values())
        limit = SAME_SPREAD * float(np.mean(values)) if values else math.nan
        spread = Spread.of(values, limit)
        what = f"standard deviation of {words} between seeds, limit {limit:.3f}"
        return Evidence(what=what, test=spread, expected=-1, show=Unit("", of=lambda log: limit * math.exp(log)))

    return measure


def rank_and_loss(c: Context) -> Evidence:
    """The slope of the final loss against spectral entropy over the runs of each optimizer, whose mean is removed: so
    the difference between the optimizers does not count."""
    groups = []
    for name in ("muon", "adamw"):
        runs = c.outcome(name).finished()
        groups.append(([last("spectral_entropy")(run) for run in runs], [run.final_loss for run in runs]))
    what = "loss per 0.01 more spectral entropy, within an optimizer"
    return Evidence(
        what=what,
        test=common_slope(groups),
        expected=-1,
        show=Unit(" nats", of=lambda slope: 0.01 * slope),
        method="trend",
    )


def final_balance(run: Run) -> tuple[float, float, int]:
    """Of the last logged shares: mean evenness over layers, greatest share over the mean, dead experts in all."""
    if not run.experts:
        raise Lacking("its runs have no experts")
    end = run.experts[-1]["step"]
    layers = [balance(line["utilization"]) for line in run.experts if line["step"] == end]
    evenness = float(np.mean([layer.evenness for layer in layers]))
    return evenness, max(layer.max_over_mean for layer in layers), sum(layer.dead for layer in layers)


def evenness(run: Run) -> float:
    return final_balance(run)[0]


def experts_balanced(c: Context) -> list[Evidence]:
    """Under either optimizer the entropy of the shares is above 95 % of its maximum."""
    found = []
    for name in ("muon", "adamw"):
        all_runs = [final_balance(run) for run in c.outcome(name).finished()]
        greatest, dead = max(one[1] for one in all_runs), sum(one[2] for one in all_runs)
        values = {s: value - BALANCED for s, value in c.outcome(name).values(evenness).items()}
        remark = f", max over mean {greatest:.2f}, dead experts {dead} in {len(all_runs)} runs"
        what = f"evenness under {name} (entropy over ln E), limit {BALANCED}"
        found.append(per_seed(what, values, 1, SHARES, against=BALANCED, method="balance", remark=remark))
    return found


def evener(optimizers: Sequence[str], without: str) -> Measure:
    """Shares are more even in each condition than in the one that `without` completes the name of."""

    def measure(c: Context) -> list[Evidence]:
        found = []
        for name in optimizers:
            dead = sum(final_balance(run)[2] for run in c.outcome(name + without).finished())
            more = {"method": "balance", "remark": f", dead experts without it {dead}"}
            found.append(compare(c, c.outcome(name), c.outcome(name + without), evenness, 1, SHARES, **more))
        return found

    return measure


alike_experts: Callable[[Context], Evidence] = versus(evenness, 0, SHARES, method="balance", margin=ALIKE)
