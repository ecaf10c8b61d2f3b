"""Who won, by how much, is it significant, what did it cost: loaded runs -> sentences with the numbers in them.

    for verdict in judge(runs): print(verdict.headline, verdict.significance, verdict.cost)

Losses are compared only where validation data, model and token budget agree; a difference needs two seeds a side
before anything is said about chance.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from analysis.plots import group_labels, optimizer_name
from analysis.runs import Group, Run, group_seeds
from analysis.stats import Comparison, compare, first_reaching, p_words, t_interval

SURE = 0.05  # below this p value a difference is called significant
STEADY = 1.2  # between seeds of one setting, the slowest over the fastest update
# Losses of runs that differ here do not compare.
ARENA = ("data_fingerprint", "model", "budget", "seq_len", "eval_tokens", "vocab_size", "doc_mask")
ARENA_WORDS = {"budget": "token budget", "data_fingerprint": "data fingerprint", "doc_mask": "document mask"}


@dataclass(frozen=True)
class Verdict:
    """What a first screen says about runs that compare; empty strings where there is nothing to say."""

    title: str
    headline: str
    significance: str
    cost: str
    notes: list[str]
    scores: list[str]  # a sentence for each group that the headline is about; a table says the same
    pair: tuple[Group, Group] | None
    tiles: list[tuple[str, str]] = field(default_factory=list)  # a figure and what it is

    def sentences(self) -> list[str]:
        return [
            sentence
            for sentence in (self.headline, self.significance, self.cost, *self.notes, *self.scores)
            if sentence
        ]


def arena_value(run: Run, key: str) -> object:
    if key == "doc_mask":
        return bool(run.config.get(key))  # older runs had none
    return run.budget if key == "budget" else run.config.get(key)


def arenas(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs parted into sets whose losses compare, in the order given."""
    parts: dict[tuple, list[Run]] = {}
    for run in runs:
        parts.setdefault(tuple(arena_value(run, key) for key in ARENA), []).append(run)
    return list(parts.values())


def differing(runs: Sequence[Run]) -> list[str]:
    """Keys of `ARENA` in which the runs differ."""
    return [key for key in ARENA if len({arena_value(run, key) for run in runs}) > 1]


def careful(runs: Sequence[Run]) -> list[str]:
    """What a reader must know before believing a comparison."""
    sentences = []
    keys = differing(runs)
    if keys:
        words = " and ".join(ARENA_WORDS.get(key, key) for key in keys)
        sentences.append(f"Careful: these runs differ in {words}, so their losses do not compare across that.")
    for run in runs:
        if run.status != "finished":
            reason = f" ({run.summary['reason']})" if run.summary.get("reason") else ""
            at = f"at update {run.updates:,} of {run.config['steps']:,}"
            sentences.append(f"Careful: {run.name} is {run.status} {at}{reason}, so it is left out of the comparison.")
        elif not math.isfinite(run.final_loss):
            sentences.append(f"Careful: {run.name} ended without a finite validation loss and counts as diverged.")
    for group in group_seeds(runs):
        times = sorted(run.step_ms for run in group.samples() if math.isfinite(run.step_ms))
        if times and times[-1] > STEADY * times[0]:
            sentences.append(
                f"Careful: the time of an update differs between seeds of {optimizer_name(group.optimizer)} "
                f"({times[0]:,.1f} to {times[-1]:,.1f} ms), so its machine was not free and times mean little."
            )
    for key, words in (("device_name", "devices"), ("git_commit", "commits"), ("torch_version", "versions of torch")):
        found = sorted({str(run.config[key])[:12] for run in runs if run.config.get(key)})
        if len(found) > 1:
            what = "times do not compare" if key == "device_name" else "a difference may come from there"
            sentences.append(f"Careful: these runs come from different {words} ({', '.join(found)}): {what}.")
    return sentences


def judge(runs: Sequence[Run]) -> list[Verdict]:
    parts = arenas(runs)
    return [_judge_one(part, _title(part, parts)) for part in parts]


def _title(part: Sequence[Run], parts: Sequence[Sequence[Run]]) -> str:
    if len(parts) == 1:
        return ""
    keys = differing([members[0] for members in parts])
    named = {"budget": f"{part[0].budget:,} tokens"}
    return ", ".join(named.get(key, f"{key.replace('_', ' ')} {part[0].config.get(key)}") for key in keys)


def _judge_one(runs: Sequence[Run], title: str) -> Verdict:
    groups = group_seeds(runs)
    finished = [group for group in groups if group.losses()]
    names = dict(zip(map(id, groups), group_labels(groups), strict=True))
    if len(finished) < 2:
        scores = [_alone(group, names[id(group)]) for group in finished]
        pair = _so_far(groups)
        if pair:
            return Verdict(title, _so_far_sentence(*pair, names), "", "", [], scores, pair)
        headline = scores.pop() if scores else _progress(groups, names)
        return Verdict(title, headline, "", _speed(finished[0]) if finished else "", [], [], None)
    leaders: dict[str, Group] = {}
    for group in sorted(finished, key=lambda group: group.loss):
        leaders.setdefault(group.optimizer, group)
    ranked = sorted(leaders.values() if len(leaders) > 1 else finished, key=lambda group: group.loss)
    best, other = ranked[:2]
    result = compare(best, other)
    better, worse = names[id(best)], names[id(other)]
    scores = [_alone(group, names[id(group)]) for group in (best, other)]
    if best.optimizer != other.optimizer:  # their settings are told once, in the scores
        better, worse = optimizer_name(best.optimizer), optimizer_name(other.optimizer)
    notes = _catches_up(result, better, worse)
    tried = {name: sum(group.optimizer == name for group in finished) for name in leaders}
    if max(tried.values()) > 1:
        counts = " and ".join(f"{count} of {optimizer_name(name)}" for name, count in tried.items())
        notes += scores
        scores = []
        notes.append(
            f"Chosen as the best of {counts} by the same validation loss, so the difference is on the rosy side: "
            "confirm it with fresh seeds."
        )
    headline = lead_sentence(result, better, worse)
    return Verdict(
        title,
        headline,
        chance_sentence(result, better, worse),
        cost_sentence(result, better, worse),
        notes,
        scores,
        (best, other),
        _tiles(result, better, worse),
    )


def lead_sentence(result: Comparison, better: str, worse: str) -> str:
    """For a comparison whose a is the better group."""
    words = f"{better} ends {-result.difference:.4f} nats below {worse} in validation loss"
    doubt = ", which may be chance" if result.p_value >= SURE else ""
    return f"{words} ({result.a.loss:.4f} against {result.b.loss:.4f}){doubt}."


def chance_sentence(result: Comparison, better: str, worse: str) -> str:
    """Whether the difference could be chance, with its interval; that nothing can be said, with the reason."""
    counts = [len(group.losses()) for group in (result.a, result.b)]
    if min(counts) < 2:
        if counts == [1, 1]:
            return "One seed each, so no statement about chance."
        lonely = better if counts[0] < 2 else worse
        return f"{lonely} has one seed, so no statement about chance."
    if not math.isfinite(result.p_value):
        return "The losses do not vary between seeds, so there is no statement about chance."
    words = "Significant" if result.p_value < SURE else "Not significant"
    return (
        f"{words} over {counts[0]} and {counts[1]} seeds: the difference is {result.difference:+.4f} nats, "
        f"95 % interval {result.low:+.4f} to {result.high:+.4f}, {p_words(result.p_value)} (Welch's t-test)."
    )


def cost_sentence(result: Comparison, better: str, worse: str) -> str:
    """Step time, tokens/s, seconds and memory of both, as far as they were logged."""
    a, b = result.a, result.b
    parts = []
    if math.isfinite(result.step_time_ratio):
        parts.append(
            f"an update of {better} takes {result.step_time_ratio:.2f} times as long as one of {worse} "
            f"({a.mean('step_ms'):,.1f} against {b.mean('step_ms'):,.1f} ms)"
        )
    if math.isfinite(result.speed_ratio):
        parts.append(f"{a.mean('tokens_per_second'):,.0f} against {b.mean('tokens_per_second'):,.0f} tokens/s")
    if math.isfinite(result.seconds_ratio):
        parts.append(f"{a.mean('train_seconds'):,.1f} against {b.mean('train_seconds'):,.1f} s of training")
    if math.isfinite(result.memory_ratio):
        parts.append(f"{memory(a.mean('memory_bytes'))} against {memory(b.mean('memory_bytes'))} at most")
    return f"The cost: {', '.join(parts)}." if parts else ""


def _tiles(result: Comparison, better: str, worse: str) -> list[tuple[str, str]]:
    count = min(len(result.a.losses()), len(result.b.losses()))
    tiles = [(f"{-result.difference:.4f} nats", f"{better} below {worse}")]
    if math.isfinite(result.p_value):
        tiles.append((p_words(result.p_value), "significant" if result.p_value < SURE else "not significant"))
    else:
        tiles.append((f"{count} seed{'s' * (count > 1)}", "no statement about chance"))
    for ratio, words in (
        (result.step_time_ratio, "time of an update"),
        (result.speed_ratio, "tokens per second"),
        (result.memory_ratio, "peak memory"),
    ):
        if math.isfinite(ratio):
            tiles.append((f"{ratio:.2f} ×", f"{words}, {better} / {worse}"))
    return tiles


def memory(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if math.isfinite(count) else "-"


def _alone(group: Group, name: str) -> str:
    losses = group.losses()
    mean, low, high = t_interval(losses)
    spread = "single seed" if len(losses) < 2 else f"{len(losses)} seeds, 95 % [{low:.4f}, {high:.4f}]"
    accuracy = np.mean([run.val["val_accuracy"][-1] for run in group.samples()])
    return f"{name}: final validation loss {mean:.4f} ({spread}), accuracy {100 * accuracy:.2f} %."


def _speed(group: Group) -> str:
    values = group.mean("step_ms"), group.mean("tokens_per_second"), group.mean("train_seconds")
    if not all(map(math.isfinite, values)):
        return ""
    held = group.mean("memory_bytes")
    extra = f", {memory(held)} at most" if math.isfinite(held) else ""
    return f"The cost: {values[0]:,.1f} ms an update, {values[1]:,.0f} tokens/s, {values[2]:,.1f} s of training{extra}."


def _catches_up(result: Comparison, better: str, worse: str) -> list[str]:
    steps, losses = result.a.curve("val_loss")
    if not len(steps):
        return []
    mean = losses.mean(axis=0)
    updates = first_reaching(steps, mean, result.b.loss)
    seconds = first_reaching(result.a.curve("train_seconds")[1].mean(axis=0), mean, result.b.loss)
    if updates is None or seconds is None:
        return []
    return [
        f"{better} is at {worse}'s final loss after about {math.ceil(updates)} of {result.a.config['steps']} updates, "
        f"{seconds:.0f} s of training."
    ]


def _so_far(groups: Sequence[Group]) -> tuple[Group, Group] | None:
    """The first two groups, of different optimizers if there are, that are running or done and share an update."""
    ready = [
        group
        for group in groups
        if any(run.status == "running" and run.updates for run in group.runs) or group.losses()
    ]
    for second in sorted(ready[1:], key=lambda group: group.optimizer == ready[0].optimizer):
        if np.intersect1d(ready[0].curve("val_loss")[0], second.curve("val_loss")[0]).any():  # not only update 0
            return ready[0], second
    return None


def _so_far_sentence(a: Group, b: Group, names: dict[int, str]) -> str:
    step = np.intersect1d(a.curve("val_loss")[0], b.curve("val_loss")[0])[-1]
    losses = {}
    for group in (a, b):
        steps, values = group.curve("val_loss")
        losses[names[id(group)]] = float(values[:, steps == step].mean())
    (better, low), (worse, high) = sorted(losses.items(), key=lambda pair: pair[1])
    return (
        f"Not over yet: at update {step:,.0f} of {a.config['steps']:,} {better} is {high - low:.4f} nats below {worse} "
        f"({low:.4f} against {high:.4f})."
    )


def _progress(groups: Sequence[Group], names: dict[int, str]) -> str:
    parts = []
    for group in groups:
        run = max(group.runs, key=lambda run: run.updates)
        loss = ", no validation yet"
        if run.val:
            last = run.val["val_loss"][-1]
            loss = f", validation loss {last:.4f}" if math.isfinite(last) else ", without a finite validation loss"
        parts.append(f"{names[id(group)]} is {run.status} at update {run.updates:,} of {run.config['steps']:,}{loss}")
    return "No result yet: " + "; ".join(parts) + "."
