"""Two runs or groups in the terminal: python report.py compare A B [--anyway].

    python report.py compare runs/muon-0 runs/adamw-0
    python report.py compare runs/muon-0,runs/muon-1 'runs/adamw-*'

A and B are each a run's folder, a folder that holds runs, a pattern in quotes, or several of these joined by commas.
Runs on different data, or with different token budgets, are refused with exit code 2 unless --anyway is given.
"""

import glob
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from analysis.pages import number
from analysis.plots import group_labels, setting
from analysis.runs import Group, Run, find_runs, group_seeds, load_runs
from analysis.stats import compare, t_interval
from analysis.verdict import chance_sentence, comparable_value, cost_sentence, lead_sentence, memory
from engine.cli import BadInput

# What must agree before two losses are compared, and why.
MUST_AGREE = {
    "data_fingerprint": ("data fingerprints", "they were trained and measured on different tokens"),
    "budget": ("token budgets", "more training tokens are an advantage"),
    "eval_tokens": ("--eval-tokens", "their losses are means over different validation tokens"),
    "seq_len": ("--seq-len", "longer sequences give more context to predict from"),
}


@dataclass(frozen=True)
class Arguments:
    """Compare two runs or groups of runs."""

    a: tyro.conf.Positional[str]
    """A run's folder, a folder that holds runs, a quoted pattern, or several of these joined by commas."""
    b: tyro.conf.Positional[str]
    """The other side, in the same form."""
    anyway: bool = False
    """Compare even where data, token budget or progress differ."""


def side(words: str) -> list[Run]:
    """The runs of one side; BadInput where it names none."""
    folders: list[Path] = []
    for word in filter(None, words.split(",")):
        matches = (
            [Path(word)] if Path(word).exists() or not glob.has_magic(word) else map(Path, sorted(glob.glob(word)))
        )
        found = [folder for match in matches if match.is_dir() or match == Path(word) for folder in find_runs(match)]
        if not found:
            raise BadInput(f"{word}: matches no run folder")
        folders += found
    if not folders:
        raise BadInput(f"'{words}': names no run folder")
    return load_runs(folders)


def objections(a: Sequence[Run], b: Sequence[Run]) -> list[str]:
    """Why these losses do not compare, one clause per reason, with the values; empty if they do."""
    found = []
    runs = [*a, *b]
    for key, (words, why) in MUST_AGREE.items():
        values = list(dict.fromkeys(_value(run, key) for run in runs))
        if len(values) > 1:
            named = [
                f"{next(run.name for run in runs if _value(run, key) == value)} has {value}" for value in values[:3]
            ]
            found.append(f"their {words} differ ({', '.join(named)}): {why}")
    for run in runs:
        if run.status != "finished":
            progress = f"{run.steps_done:,} of {run.config['steps']:,} steps"
            found.append(f"{run.name} is {run.status} after {progress}: its loss is not final")
    return found


def _value(run: Run, key: str) -> str:
    value = comparable_value(run, key)
    return f"{value:,}" if isinstance(value, int) else str(value)


def comparison(a: Sequence[Run], b: Sequence[Run]) -> list[str]:
    """The lines that `compare` prints."""
    sides = Group(tuple(a)), Group(tuple(b))
    names = _names(sides)
    lines = []
    for letter, group, name in zip("AB", sides, names, strict=True):
        lines.append(f"{letter}: {name} ({', '.join(run.name for run in group.runs)})")
        if len(group_seeds(group.runs)) > 1:
            lines.append(f"   Note: {letter} mixes settings, so its spread is not that of seeds.")
    lines.append("")
    rows = [("", "A", "B")]
    rows.append(("runs with a final loss", *(str(len(group.losses())) for group in sides)))
    rows.append(("final validation loss", *map(_interval, sides)))
    rows.append(("bits per byte", *(number(group.mean("bits_per_byte"), ".4f") for group in sides)))
    rows.append(("validation accuracy", *(_percent(group) for group in sides)))
    for words, key, form in (
        ("ms per step", "step_ms", ",.1f"),
        ("tokens/s", "tokens_per_second", ",.0f"),
        ("training time (s)", "train_seconds", ",.1f"),
    ):
        rows.append((words, *(number(group.mean(key), form) for group in sides)))
    rows.append(("peak memory", *(memory(group.mean("memory_bytes")) for group in sides)))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append("")
    if all(group.losses() for group in sides):
        order = sorted(zip(sides, names, strict=True), key=lambda pair: pair[0].loss)
        (best, better), (other, worse) = order
        result = compare(best, other)
        lines += [sentence(result, better, worse) for sentence in (lead_sentence, chance_sentence, cost_sentence)]
    else:
        lines.append("No comparison: at least one side has no finished run with a finite loss.")
    differ = _differences(a[0], b[0])
    lines.append(f"Settings that differ: {differ}." if differ else "Only the seed differs.")
    return lines


def _names(sides: tuple[Group, Group]) -> list[str]:
    names = group_labels([Group((group.runs[0],)) for group in sides])
    if len(set(names)) < 2 or any("#" in name for name in names):
        names = [f"{name.split(', #')[0]} ({letter})" for name, letter in zip(names, "AB", strict=True)]
    return names


def _interval(group: Group) -> str:
    mean, low, high = t_interval(group.losses())
    return f"{number(mean, '.4f')} [{low:.4f}, {high:.4f}]" if math.isfinite(low) else number(mean, ".4f")


def _percent(group: Group) -> str:
    values = [float(run.val["val_accuracy"][-1]) for run in group.samples()]
    return f"{100 * sum(values) / len(values):.2f} %" if values else "-"


def _differences(a: Run, b: Run) -> str:
    left, right = a.experiment(), b.experiment()
    keys = [key for key in dict.fromkeys((*left, *right)) if left.get(key) != right.get(key)]
    return ", ".join(f"{setting(key, left.get(key))} against {right.get(key)}" for key in keys)


def main(words: Sequence[str]) -> None:
    """`report.py compare`: prints the comparison, or refuses it with the reasons."""
    arguments = tyro.cli(Arguments, args=list(words), prog="report.py compare", description=__doc__)
    a, b = side(arguments.a), side(arguments.b)
    both = {run.path.resolve() for run in a} & {run.path.resolve() for run in b}
    if both:
        raise BadInput(f"{sorted(both)[0].name}: is on both sides of the comparison")
    for run in (*a, *b):
        if not run.val:
            raise BadInput(f"{run.path}: has logged no validation yet")
    reasons = objections(a, b)
    if reasons and not arguments.anyway:
        raise BadInput(f"not compared, because {'; '.join(reasons)}; use --anyway to compare them anyway")
    for reason in reasons:
        print(f"Note: {reason}.")
    print("\n".join(comparison(a, b)))
