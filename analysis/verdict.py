"""Which optimizer wins, by how much, is it significant, what does it cost: loaded runs -> sentences with the numbers.

    for verdict in judge(runs): print(verdict.headline, verdict.significance, verdict.cost)

Losses are compared only where validation data, model and token budget agree; a statement about chance needs two seeds
a side.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from analysis.pages import counted
from analysis.plots import group_labels
from analysis.runs import Group, Run, group_seeds, optimizer_name
from analysis.stats import SIGNIFICANT, STEADY, Comparison, compare, first_reaching, p_words, t_interval
from engine.cli import GIB

# Losses of runs that differ here are not compared.
COMPARABLE_KEYS = ("data_fingerprint", "model", "budget", "seq_len", "eval_tokens", "vocab_size", "doc_mask")
KEY_WORDS = {"budget": "token budget", "data_fingerprint": "data fingerprint", "doc_mask": "document mask"}


@dataclass(frozen=True)
class Verdict:
    """The first screen's sentences about runs that compare; empty strings where there is nothing to say."""

    title: str
    headline: str
    significance: str
    cost: str
    notes: list[str]
    scores: list[str]  # a sentence for each group in the headline; a table holds the same numbers
    pair: tuple[Group, Group] | None
    tiles: list[tuple[str, str]] = field(default_factory=list)  # a figure and its meaning

    def sentences(self) -> list[str]:
        return list(filter(None, (self.headline, self.significance, self.cost, *self.notes, *self.scores)))


def comparable_value(run: Run, key: str) -> object:
    if key == "doc_mask":
        return bool(run.config.get(key))  # older runs had none
    return run.budget if key == "budget" else run.config.get(key)


def comparable_sets(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs split into sets whose losses compare, in the order given."""
    sets: dict[tuple, list[Run]] = {}
    for run in runs:
        sets.setdefault(tuple(comparable_value(run, key) for key in COMPARABLE_KEYS), []).append(run)
    return list(sets.values())


def differing_keys(runs: Sequence[Run]) -> list[str]:
    return [key for key in COMPARABLE_KEYS if len({comparable_value(run, key) for run in runs}) > 1]


def warnings(runs: Sequence[Run]) -> list[str]:
    """What a reader must know before believing a comparison."""
    sentences = []
    keys = differing_keys(runs)
    if keys:
        words = " and ".join(KEY_WORDS.get(key, key) for key in keys)
        sentences.append(f"Note: these runs differ in {words}, so their losses do not compare across that.")
    for run in runs:
        if run.status != "finished":
            reason = f" ({run.summary['reason']})" if run.summary.get("reason") else ""
            at = f"at step {run.steps_done:,} of {run.config['steps']:,}"
            sentences.append(f"Note: {run.name} is {run.status} {at}{reason}; the comparison leaves it out.")
        elif not math.isfinite(run.final_loss):
            sentences.append(f"Note: {run.name} ended without a finite validation loss and counts as diverged.")
    for group in group_seeds(runs):
        times = sorted(run.step_ms for run in group.samples() if math.isfinite(run.step_ms))
        if times and times[-1] > STEADY * times[0]:
            sentences.append(
                f"Note: the step time differs between seeds of {optimizer_name(group.optimizer)} ({times[0]:,.1f} to "
                f"{times[-1]:,.1f} ms), so the machine was busy and times mean little."
            )
    for key, words in (("device_name", "devices"), ("git_commit", "commits"), ("torch_version", "versions of torch")):
        found = sorted({str(run.config[key])[:12] for run in runs if run.config.get(key)})
        if len(found) > 1:
            effect = "times do not compare" if key == "device_name" else "a difference may come from there"
            sentences.append(f"Note: these runs come from different {words} ({', '.join(found)}): {effect}.")
    return sentences


def judge(runs: Sequence[Run]) -> list[Verdict]:
    """A verdict for each comparable set of runs."""
    sets = comparable_sets(runs)
    return [_judge_set(members, _title(members, sets)) for members in sets]


def _title(members: Sequence[Run], sets: Sequence[Sequence[Run]]) -> str:
    if len(sets) == 1:
        return ""
    keys = differing_keys([others[0] for others in sets])
    named = {"budget": f"{members[0].budget:,} tokens"}
    return ", ".join(named.get(key, f"{key.replace('_', ' ')} {members[0].config.get(key)}") for key in keys)


def _judge_set(runs: Sequence[Run], title: str) -> Verdict:
    groups = group_seeds(runs)
    finished = [group for group in groups if group.losses()]
    names = dict(zip(map(id, groups), group_labels(groups), strict=True))
    if len(finished) < 2:
        scores = [_score(group, names[id(group)]) for group in finished]
        pair = _interim_pair(groups)
        if pair:
            return Verdict(title, _interim_sentence(*pair, names), "", "", [], scores, pair)
        headline = scores.pop() if scores else _progress(groups, names)
        return Verdict(title, headline, "", _speed(finished[0]) if finished else "", [], [], None)
    leaders: dict[str, Group] = {}
    for group in sorted(finished, key=lambda group: group.loss):
        leaders.setdefault(group.optimizer, group)
    ranked = sorted(leaders.values() if len(leaders) > 1 else finished, key=lambda group: group.loss)
    best, other = ranked[:2]
    result = compare(best, other)
    better, worse = names[id(best)], names[id(other)]
    scores = [_score(group, names[id(group)]) for group in (best, other)]
    if best.optimizer != other.optimizer:  # the scores name their settings
        better, worse = optimizer_name(best.optimizer), optimizer_name(other.optimizer)
    notes = _catches_up(result, better, worse)
    tried = {name: sum(group.optimizer == name for group in finished) for name in leaders}
    if max(tried.values()) > 1:
        counts = " and ".join(f"{count} of {optimizer_name(name)}" for name, count in tried.items())
        notes += scores
        scores = []
        notes.append(
            f"Chosen by the same validation loss as the best of {counts}, so the difference is optimistic (best of "
            "several); confirm it with new seeds."
        )
    return Verdict(
        title=title,
        headline=lead_sentence(result, better, worse),
        significance=chance_sentence(result, better, worse),
        cost=cost_sentence(result, better, worse),
        notes=notes,
        scores=scores,
        pair=(best, other),
        tiles=_tiles(result, better, worse),
    )


def lead_sentence(result: Comparison, better: str, worse: str) -> str:
    """For a comparison whose a is the better group."""
    words = f"{better} ends {-result.difference:.4f} nats below {worse} in validation loss"
    doubt = ", which may be chance" if result.p_value >= SIGNIFICANT else ""
    return f"{words} ({result.a.loss:.4f} against {result.b.loss:.4f}){doubt}."


def chance_sentence(result: Comparison, better: str, worse: str) -> str:
    """Whether the difference could be chance, with interval and test; or why nothing can be said."""
    if min(result.n) < 2:
        if result.n == (1, 1):
            return "One seed each, so no statement about chance."
        return f"{better if result.n[0] < 2 else worse} has one seed, so no statement about chance."
    if not result.tested:
        return "The difference does not vary between seeds, so there is no statement about chance."
    words = "Significant" if result.p_value < SIGNIFICANT else "Not significant"
    seeds = f"{result.n[0]} shared seeds" if result.paired else f"{result.n[0]} and {result.n[1]} seeds"
    return (
        f"{words} over {seeds}: the difference is {result.difference:+.4f} nats, "
        f"95 % interval {result.low:+.4f} to {result.high:+.4f}, {p_words(result.p_value)} ({result.test})."
    )


def cost_sentence(result: Comparison, better: str, worse: str) -> str:
    """Step time, tokens/s, seconds and memory of both, where they were logged."""
    a, b = result.a, result.b
    costs = []
    if math.isfinite(result.step_time_ratio):
        costs.append(
            f"a step of {better} takes {result.step_time_ratio:.2f} times as long as a step of {worse} "
            f"({a.mean('step_ms'):,.1f} against {b.mean('step_ms'):,.1f} ms)"
        )
    if math.isfinite(result.speed_ratio):
        costs.append(f"{a.mean('tokens_per_second'):,.0f} against {b.mean('tokens_per_second'):,.0f} tokens/s")
    if math.isfinite(result.seconds_ratio):
        costs.append(f"{a.mean('train_seconds'):,.1f} against {b.mean('train_seconds'):,.1f} s of training")
    if math.isfinite(result.memory_ratio):
        costs.append(f"peak memory {memory(a.mean('memory_bytes'))} against {memory(b.mean('memory_bytes'))}")
    return f"Cost: {', '.join(costs)}." if costs else ""


def _tiles(result: Comparison, better: str, worse: str) -> list[tuple[str, str]]:
    tiles = [(f"{-result.difference:.4f} nats", f"{better} below {worse}")]
    if result.tested:
        words = "significant" if result.p_value < SIGNIFICANT else "not significant"
        tiles.append((p_words(result.p_value), f"{words}, {result.test}"))
    else:
        tiles.append((counted(min(result.n), "seed"), "no statement about chance"))
    for ratio, words in (
        (result.step_time_ratio, "step time"),
        (result.speed_ratio, "tokens per second"),
        (result.memory_ratio, "peak memory"),
    ):
        if math.isfinite(ratio):
            tiles.append((f"{ratio:.2f} ×", f"{words}, {better} / {worse}"))
    return tiles


def memory(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if math.isfinite(count) else "-"


def _score(group: Group, name: str) -> str:
    losses = group.losses()
    mean, low, high = t_interval(losses)
    spread = "single seed" if len(losses) < 2 else f"{len(losses)} seeds, 95 % [{low:.4f}, {high:.4f}]"
    accuracy = np.mean([run.val["val_accuracy"][-1] for run in group.samples()])
    bits = group.mean("bits_per_byte")
    in_bytes = f", {bits:.4f} bits per byte" if math.isfinite(bits) else ""
    return f"{name}: final validation loss {mean:.4f} ({spread}){in_bytes}, accuracy {100 * accuracy:.2f} %."


def _speed(group: Group) -> str:
    values = group.mean("step_ms"), group.mean("tokens_per_second"), group.mean("train_seconds")
    if not all(map(math.isfinite, values)):
        return ""
    peak = group.mean("memory_bytes")
    extra = f", peak memory {memory(peak)}" if math.isfinite(peak) else ""
    return f"Cost: {values[0]:,.1f} ms per step, {values[1]:,.0f} tokens/s, {values[2]:,.1f} s of training{extra}."


def _catches_up(result: Comparison, better: str, worse: str) -> list[str]:
    steps, losses = result.a.curve("val_loss")
    if not len(steps):
        return []
    mean = losses.mean(axis=0)
    reached = first_reaching(steps, mean, result.b.loss)
    seconds = first_reaching(result.a.curve("train_seconds")[1].mean(axis=0), mean, result.b.loss)
    if reached is None or seconds is None:
        return []
    return [
        f"{better} reaches {worse}'s final loss after about {math.ceil(reached)} of {result.a.config['steps']} steps, "
        f"{seconds:.0f} s of training."
    ]


def _interim_pair(groups: Sequence[Group]) -> tuple[Group, Group] | None:
    """The first two groups, of different optimizers if possible, that run or have finished and share a step."""
    ready = [
        group
        for group in groups
        if any(run.status == "running" and run.steps_done for run in group.runs) or group.losses()
    ]
    for second in sorted(ready[1:], key=lambda group: group.optimizer == ready[0].optimizer):
        if np.intersect1d(ready[0].curve("val_loss")[0], second.curve("val_loss")[0]).any():  # not only step 0
            return ready[0], second
    return None


def _interim_sentence(a: Group, b: Group, names: dict[int, str]) -> str:
    step = np.intersect1d(a.curve("val_loss")[0], b.curve("val_loss")[0])[-1]
    losses = {}
    for group in (a, b):
        steps, values = group.curve("val_loss")
        losses[names[id(group)]] = float(values[:, steps == step].mean())
    (better, low), (worse, high) = sorted(losses.items(), key=lambda pair: pair[1])
    return (
        f"In progress: at step {step:,.0f} of {a.config['steps']:,} {better} is {high - low:.4f} nats below {worse} "
        f"({low:.4f} against {high:.4f})."
    )


def _progress(groups: Sequence[Group], names: dict[int, str]) -> str:
    states = []
    for group in groups:
        run = max(group.runs, key=lambda run: run.steps_done)
        loss = ", no validation yet"
        if run.val:
            last = run.val["val_loss"][-1]
            loss = f", validation loss {last:.4f}" if math.isfinite(last) else ", without a finite validation loss"
        at = f"at step {run.steps_done:,} of {run.config['steps']:,}"
        states.append(f"{names[id(group)]} is {run.status} {at}{loss}")
    return f"No result yet: {'; '.join(states)}."
