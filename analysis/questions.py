"""The questions one asks of spectra, answered by computed sentences: runs that have logged them -> answers.

    for question, sentences in answers(runs): print(question, *sentences)

Which layer stands out, how two layers differ, when effective rank falls and where, Q against V, first sign of collapse,
where entropy drops, spectral norms above 4, whether updates are aligned beyond chance. The sentences give measurements,
not causes.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np

from analysis.pages import counted
from analysis.plots import group_labels
from analysis.plots_spectra import PROJECTION_TITLES, group_grid
from analysis.runs import Group, Run, group_seeds
from analysis.stats import chance_spread, t_interval
from engine.files import SUBSPACE_RANK
from engine.norm_watch import NORM_ALARM, NORM_WARNING

FALL = 0.10  # share of its initial effective rank that a matrix must lose to be named
ENTROPY_DROP = 0.01  # of the spectral entropy, between 0 and 1
STANDOUT_KEYS = {"spectral_norm": "spectral norm", "effective_rank": "effective rank", "stable_rank": "stable rank"}


def place(proj: str, layer: int) -> str:
    return f"{PROJECTION_TITLES[proj]} of layer {layer}"


def answers(runs: Sequence[Run], layers: tuple[int, int] | None = None) -> list[tuple[str, list[str]]]:
    """(question, a sentence for each group) for groups of runs that have logged spectra; `layers` are the two to
    compare (default: those that differ most)."""
    groups = group_seeds(runs)
    named = list(zip(groups, group_labels(groups), strict=True))
    questions = (
        ("Which layer stands out?", standout),
        ("How do two layers differ?", functools.partial(layers_apart, layers=layers)),
        ("When does effective rank fall by 10 %, and where?", rank_fall),
        ("What is the first sign of collapse?", collapse),
        ("How do Q and V differ?", q_against_v),
        ("Does entropy drop anywhere, and when?", entropy_drop),
        ("Are spectral norms above 4 to 5?", high_norms),
        ("Do updates follow the weight's strong directions?", beyond_chance),
    )
    return [(words, [f"{name}: {answer(group)}" for group, name in named]) for words, answer in questions]


def _events(group: Group, key: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per projection the steps and the metric (layers, E), as a mean over seeds."""
    return {proj: group_grid(group, proj, key) for proj in group.runs[0].projections()}


def _too_early(group: Group) -> bool:
    events = _events(group, "effective_rank").values()
    return not events or len(next(iter(events))[0]) < 2


TOO_EARLY = "only the initial spectra are logged so far."


def standout(group: Group) -> str:
    """The layer that differs most from the median of the other layers, averaged over projections and three metrics."""
    layers = group.runs[0].layers
    if layers < 3:
        return f"with {counted(layers, 'layer')} none can stand out."
    scores: dict[int, dict[int, list[tuple]]] = {event: {layer: [] for layer in range(layers)} for event in (0, -1)}
    for key, words in STANDOUT_KEYS.items():
        for proj, (_, values) in _events(group, key).items():
            for event in (0, -1):
                column = values[:, event]
                for layer in range(len(column)):
                    others = float(np.nanmedian(np.delete(column, layer)))
                    if column[layer] > 0 and others > 0:
                        distance = abs(math.log(column[layer] / others))  # twice and half are equally far
                        scores[event][layer].append(
                            (distance, f"{PROJECTION_TITLES[proj]} {words}", column[layer], others)
                        )
    means = {
        event: {layer: np.mean([score[0] for score in found]) if found else 0.0 for layer, found in per_layer.items()}
        for event, per_layer in scores.items()
    }
    layer = max(means[-1], key=means[-1].get)
    _, where, value, others = max(scores[-1][layer])
    second = sorted(means[-1].values())[-2]
    sentence = (
        f"layer {layer} differs most from the median of the other layers, by {_percent(means[-1][layer])} on average "
        f"(the next layer by {_percent(second)}), most in its {where}, {value:.3g} against {others:.3g}"
    )
    if _too_early(group):
        return f"{sentence}; {TOO_EARLY}"
    return f"{sentence}; at initialisation it differed by {_percent(means[0][layer])}."


def layers_apart(group: Group, layers: tuple[int, int] | None = None) -> str:
    """Two layers against each other, by default those that differ most: by how much, since when, where most, and how
    sure that is over seeds. The distance is the mean |ln ratio| over projections and three metrics."""
    events = {(proj, key): _events(group, key)[proj] for key in STANDOUT_KEYS for proj in group.runs[0].projections()}
    steps, _ = next(iter(events.values()), ((), ()))  # a damaged run may have none of the projections
    logs = {place: np.log(values) for place, (_, values) in events.items() if (values > 0).all()}
    count = min((len(values) for values in logs.values()), default=0)
    if count < 2 or (layers and max(layers) >= count):
        return f"with {counted(group.runs[0].layers, 'layer')} there is no such pair."

    def distance(a: int, b: int) -> np.ndarray:
        return np.mean([np.abs(values[a] - values[b]) for values in logs.values()], axis=0)

    a, b = layers or max(itertools.combinations(range(count), 2), key=lambda pair: distance(*pair)[-1])
    apart = distance(a, b)
    proj, key = max(logs, key=lambda place: abs(logs[place][a, -1] - logs[place][b, -1]))
    last = [values[:, -1] for values in (run.grid(proj, key)[1] for run in group.pool())]
    mean, low, high = t_interval([math.log(values[a] / values[b]) for values in last])
    ends = [float(np.mean([values[layer] for values in last])) for layer in (a, b)]
    sure = f", 95 % interval {math.exp(low):.3g} to {math.exp(high):.3g}, n = {len(last)}" if math.isfinite(low) else ""
    which = "" if layers else ", which differ most,"
    since = ""
    if len(steps) > 1 and apart[-1] > apart[0]:
        half = int(np.flatnonzero(apart - apart[0] >= (apart[-1] - apart[0]) / 2)[0])
        since = f", and half of the rise was there by step {int(steps[half])}"
    return (
        f"layers {a} and {b}{which} are {_percent(apart[-1])} apart on average over projections, spectral norm, "
        f"effective and stable rank ({_percent(apart[0])} at initialisation{since}); most in {PROJECTION_TITLES[proj]} "
        f"{STANDOUT_KEYS[key]}, {ends[0]:.3g} against {ends[1]:.3g} (ratio {math.exp(mean):.3g}{sure})."
    )


def _percent(log_ratio: float) -> str:
    return f"{100 * math.expm1(log_ratio):.1f} %"


def _falls(group: Group) -> list[tuple[int, str, int, float, float, bool]]:
    """(step, proj, layer, rank before, rank then, still so at the end) of each matrix's first fall by `FALL`."""
    found = []
    for proj, (steps, values) in _events(group, "effective_rank").items():
        for layer, line in enumerate(values):
            below = np.flatnonzero(line <= (1 - FALL) * line[0])
            if len(below):
                first = int(below[0])
                lasting = bool(line[-1] <= (1 - FALL) * line[0])
                found.append((int(steps[first]), proj, layer, float(line[0]), float(line[first]), lasting))
    return sorted(found)


def _lowest(group: Group) -> tuple[float, str]:
    shares = []
    for proj, (_, values) in _events(group, "effective_rank").items():
        shares += [(float(line[-1] / line[0]), place(proj, layer)) for layer, line in enumerate(values) if line[0] > 0]
    return min(shares)


def _matrices(group: Group) -> int:
    return sum(len(values) for _, values in _events(group, "effective_rank").values())


def rank_fall(group: Group) -> str:
    if _too_early(group):
        return TOO_EARLY
    falls, (share, where) = _falls(group), _lowest(group)
    ending = f"at the end {where} keeps the smallest share of its initial rank, {100 * share:.1f} %."
    if not falls:
        return f"in none of {_matrices(group)} matrices; {ending}"
    step, proj, layer, before, then, _ = falls[0]
    per_seed = ""
    if len(group.runs) > 1:
        seeds = sum(bool(_falls(Group((run,)))) for run in group.runs)
        per_seed = f" (some matrix does in {seeds} of {len(group.runs)} seeds)"
    return (
        f"in {len(falls)} of {_matrices(group)} matrices, first in {place(proj, layer)} at step {step} "
        f"({before:.1f} to {then:.1f}){per_seed}; {ending}"
    )


def collapse(group: Group) -> str:
    """A first sign is an effective rank that falls by a tenth and does not recover; half is collapse."""
    if _too_early(group):
        return TOO_EARLY
    lasting = [fall for fall in _falls(group) if fall[-1]]
    share, where = _lowest(group)
    if not lasting:
        least = f"least: {where}, {100 * share:.1f} %"
        return f"none, as no matrix ends more than 10 % below its initial effective rank ({least})."
    step, proj, layer, *_ = lasting[0]
    state = f"no matrix is below half (least: {where}, {100 * share:.1f} %)"
    if share < 0.5:
        state = f"{where} has lost more than half ({100 * share:.1f} % left)"
    return f"{place(proj, layer)} falls by 10 % at step {step} and does not recover by the end; {state}."


def q_against_v(group: Group) -> str:
    if not {"q", "v"} <= set(group.runs[0].projections()):
        return "Q and V are not both logged."
    parts = []
    for proj in ("q", "v"):
        rank, norm, entropy = (
            _events(group, key)[proj][1] for key in ("effective_rank", "spectral_norm", "spectral_entropy")
        )
        full = group.runs[0].full_rank(proj)
        parts.append(
            f"{PROJECTION_TITLES[proj]} has effective rank {np.nanmean(rank[:, -1]):.1f} of {full} "
            f"({100 * np.nanmean(rank[:, -1]) / np.nanmean(rank[:, 0]):.1f} % of its start), spectral norm "
            f"{np.nanmean(norm[:, -1]):.2f} (from {np.nanmean(norm[:, 0]):.2f}), "
            f"entropy {np.nanmean(entropy[:, -1]):.3f} (from {np.nanmean(entropy[:, 0]):.3f})"
        )
    return f"averaged over layers, {parts[0]}; {parts[1]}."


def entropy_drop(group: Group) -> str:
    if _too_early(group):
        return TOO_EARLY
    drops = []
    for proj, (steps, values) in _events(group, "spectral_entropy").items():
        for layer, line in enumerate(values):
            if np.isfinite(line).all():
                low = int(np.argmin(line))
                first = np.flatnonzero(line <= line[0] - ENTROPY_DROP)
                begun = int(steps[first[0]]) if len(first) else None
                drops.append((float(line[0] - line[low]), place(proj, layer), int(steps[low]), float(line[low]), begun))
    if not drops:
        return "spectral entropy is undefined."
    dropped = [drop for drop in drops if drop[4] is not None]
    size, where, step, value, _ = max(drops)
    if not dropped:
        return f"by less than {ENTROPY_DROP} everywhere; the largest drop is {size:.4f}, in {where} at step {step}."
    first = min(dropped, key=lambda drop: drop[4])
    return (
        f"by {ENTROPY_DROP} or more in {len(dropped)} of {len(drops)} matrices, first in {first[1]} at "
        f"step {first[4]}; deepest in {where}, by {size:.3f} to {value:.3f} at step {step}."
    )


def high_norms(group: Group) -> str:
    found, largest = [], (0.0, "")
    for proj, (steps, values) in _events(group, "spectral_norm").items():
        for layer, line in enumerate(values):
            largest = max(largest, (float(line[-1]), place(proj, layer)))
            above = np.flatnonzero(line > NORM_WARNING)
            if len(above) and line[-1] > NORM_WARNING:
                found.append((int(steps[above[0]]), place(proj, layer), float(line[-1])))
    if not found:
        return f"no, the largest is {largest[0]:.2f}, {largest[1]}."
    alarms = sum(norm > NORM_ALARM for *_, norm in found)
    step, where, _ = min(found)
    return (
        f"yes, {len(found)} of {_matrices(group)} matrices end above {NORM_WARNING:g} and {alarms} above "
        f"{NORM_ALARM:g}; the largest is {largest[0]:.2f}, {largest[1]}; the first to cross {NORM_WARNING:g} was "
        f"{where} at step {step}."
    )


def beyond_chance(group: Group) -> str:
    total, above, ratios, gaps = 0, 0, [], []
    for run in group.runs:
        for line in run.spectra:
            aligned, chance = line.get("left_alignment"), line.get("left_alignment_chance")
            if aligned is None or not chance:
                continue
            rank = len(line["singular_values"])
            total += 1
            above += aligned > chance * chance_spread(min(SUBSPACE_RANK, rank))[1]
            ratios.append(aligned / chance)
            if line.get("update_gap") is not None and line.get("update_norm"):
                rms = line["update_norm"] / math.sqrt(rank)  # the Frobenius norm squared is the sum of s²
                gaps.append(line["update_gap"] / rms)
    if not total:
        return "no alignment was logged yet."
    sentence = (
        f"{100 * above / total:.0f} % of {total:,} measured updates are aligned (output side) more than 97.5 % of "
        f"random subspaces; on average alignment is {np.mean(ratios):.2f} times chance"
    )
    if gaps:
        sentence += (
            f"; the median gap s₅ − s₆ of the update is {100 * float(np.median(gaps)):.2g} % of its r.m.s. singular "
            "value, and the smaller it is, the more arbitrary are its top five directions"
        )
    return sentence + "."
