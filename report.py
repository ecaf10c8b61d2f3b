"""Runs -> one report: report.html (self-contained), report.md and plots/.

    python report.py runs/my-muon runs/my-adamw --out runs/my-report          one page for 1 to 60 runs, finished or not
    python report.py runs/my-muon runs/my-adamw --watch                       the same, rewritten until they are over
    python report.py compare runs/muon-0,runs/muon-1 runs/adamw-0             two runs or groups, in the terminal

Where a run's folder is asked for, a folder that holds runs stands for all of them. Reads only the runs' folders and
takes about half a minute; it needs no torch and no network.
"""

import shlex
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from analysis import compare, plots
from analysis.figures import curve_drawings, draw, watched
from analysis.pages import Code, Page, Part, Picture, Table, Verse, html_page, markdown_page
from analysis.questions import answers
from analysis.runs import Run, find_runs, group_seeds, load_run, representative
from analysis.stats import t_interval
from analysis.verdict import arenas, careful, judge, memory
from engine import files
from engine.cli import BadInput, exit_with_a_sentence

WATCH_SECONDS = 30.0
SILENT_SECONDS = 1800.0  # a run that has written nothing for so long was killed: --watch does not wait for it


@dataclass(frozen=True)
class Arguments:
    """Compare training runs in one page."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders to show, or folders that hold runs."""
    out: Path = Path("runs/report")
    """Folder for report.html, report.md and plots/; an earlier report there is replaced."""
    watch: float | None = None
    """Rewrite the report every so many seconds (30 without a number) until all runs are over."""


def number(value: float, form: str, unit: str = "") -> str:
    return format(value, form) + unit if np.isfinite(value) else "-"


def last(run: Run, key: str) -> float:
    return float(run.val[key][-1]) if run.val else np.nan


RUN_COLUMNS = (
    *("run", "folder", "status", "learning rate", "updates", "tokens", "last val. loss", "best val. loss"),
    *("val. accuracy", "tokens/s", "ms/update", "training time", "memory"),
)


def run_row(run: Run, label: str) -> list[str]:
    """The cells of `RUN_COLUMNS` for one run."""
    rates = [run.config.get(key) for key in ("lr", "adamw_lr")]
    losses = run.val["val_loss"] if run.val else np.array([np.nan])
    best = np.nanmin(losses) if np.isfinite(losses).any() else np.nan
    return [
        label,
        run.name,
        run.status,
        " / ".join("-" if rate is None else f"{rate:g}" for rate in rates),
        f"{run.updates:,} of {run.config['steps']:,}",
        f"{run.tokens:,.0f}",
        number(last(run, "val_loss"), ".4f"),
        number(best, ".4f"),
        number(100 * last(run, "val_accuracy"), ".2f", " %"),
        number(run.tokens_per_second, ",.0f"),
        number(run.step_ms, ",.1f"),
        number(run.train_seconds, ",.1f", " s"),
        memory(run.memory_bytes),
    ]


def summary_table(runs: Sequence[Run]) -> Table:
    """A row for each setting, the best first within the runs that compare."""
    header = (
        "setting",
        "seeds",
        "val. loss",
        "95 %",
        "perplexity",
        "accuracy",
        "tokens/s",
        "ms/update",
        "training time",
    )
    groups = group_seeds(runs)
    parts = [{run.path for run in part} for part in arenas(runs)]
    rows = []
    for group, label in zip(groups, plots.group_labels(groups), strict=True):
        samples = group.samples()
        shown = samples or [run for run in group.runs if run.val]
        mean, low, high = t_interval([last(run, "val_loss") for run in shown])
        interval = f"{low:.4f} to {high:.4f}" if samples and np.isfinite(low) else "-"
        accuracy = np.mean([last(run, "val_accuracy") for run in shown]) if shown else np.nan
        open_runs = [run for run in group.runs if run.status != "finished"]
        progress = f" ({', '.join(sorted({run.status for run in open_runs}))})" if open_runs else ""
        rows.append(
            (
                next(i for i, part in enumerate(parts) if group.runs[0].path in part),
                mean if samples and np.isfinite(mean) else np.inf,
                [
                    label,
                    f"{len(group.runs)}{progress}",
                    number(mean, ".4f"),
                    interval,
                    number(float(np.exp(min(mean, 700))), ",.2f"),
                    number(100 * accuracy, ".2f", " %"),
                    number(group.mean("tokens_per_second"), ",.0f"),
                    number(group.mean("step_ms"), ",.1f"),
                    number(group.mean("train_seconds"), ",.1f", " s"),
                ],
            )
        )
    return Table(header, [cells for *_, cells in sorted(rows, key=lambda row: row[:2])])


def command(run: Run) -> str:
    """The command that trains this run again: every setting of its config but where it wrote."""
    ranks = int(run.config.get("world_size") or 1)
    words = ["python"] if ranks == 1 else ["torchrun", "--standalone", f"--nproc_per_node={ranks}"]
    words.append("train.py")
    for key, value in run.settings().items():
        flag = key.replace("_", "-")
        if value is None or key in ("runs_dir", "name", "resume"):
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)


def provenance(runs: Sequence[Run], names: Sequence[str]) -> list[Table | Verse | Code]:
    """What the runs share, what they differ in, and the commands that repeat them."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    values = {key: [str(run.config.get(key)) for run in runs] for key in keys}
    shared = [[key, values[key][0]] for key in keys if len(set(values[key])) == 1]
    different = [key for key in keys if len(set(values[key])) > 1]
    tables: list[Table | Verse | Code] = []
    if different:
        rows = [[name, *(values[key][i] for key in different)] for i, name in enumerate(names)]
        tables += [Verse("What differs", []), Table(["run", *different], rows)]
    tables += [Verse("What all runs share" if len(runs) > 1 else "Settings", []), Table(("setting", "value"), shared)]
    commits = sorted({str(run.config["git_commit"]) for run in runs if run.config.get("git_commit")})
    prints = sorted({str(run.config["data_fingerprint"]) for run in runs if run.config.get("data_fingerprint")})
    words = (
        ["A commit that ends in + had uncommitted changes."] if any(commit.endswith("+") for commit in commits) else []
    )
    if prints:
        words.insert(0, f"Build or fetch the shards first; their fingerprint must be {' or '.join(prints)}.")
    checkout = [f"git checkout {commit.rstrip('+')}" for commit in commits]
    lines = [*checkout, *dict.fromkeys(command(run) for run in runs)]
    return [*tables, Verse("Commands to reproduce", words), Code(lines)]


def build_page(runs: Sequence[Run], pictures: Sequence[Picture]) -> Page:
    """Every word of the report, around the pictures that were drawn."""
    names = plots.run_labels(runs)
    groups = plots.group_labels(group_seeds(runs))
    title = " and ".join(groups) if len(groups) <= 2 else f"{len(groups)} settings"
    title += f", {len(runs)} run{'s' * (len(runs) > 1)}"
    first, *others = judge(runs)
    spectra = watched(runs)
    curves = {drawing.picture.stem for drawing in curve_drawings(runs)}
    parts = [
        Part("Curves", [picture for picture in pictures if picture.stem in curves]),
        Part("Runs", [Table(RUN_COLUMNS, [run_row(run, name) for run, name in zip(runs, names, strict=True)])]),
    ]
    if others:
        verses = [Verse(verdict.title, verdict.sentences()) for verdict in (first, *others)]
        parts.insert(0, Part("Verdicts", verses))
    if spectra:
        asked = [group.runs for group in representative(group_seeds(spectra), 2)]
        replies = answers([run for members in asked for run in members])
        parts.append(Part("What the spectra say", [Verse(*reply) for reply in replies]))
        shown = [picture for picture in pictures if picture.stem not in curves]
        parts.append(Part("Spectra", shown))
    parts.append(Part("Settings and provenance", provenance(runs, names), folded=True))
    elsewhere = (
        f"That is one of {1 + len(others)} sets of runs whose losses do not compare: each has its verdict below."
    )
    elsewhere = elsewhere if others else ""
    warnings = careful(runs)
    if len(warnings) > 6:
        warnings = [*warnings[:5], f"… and {len(warnings) - 5} more of this kind: see the table of runs."]
    return Page(
        title=f"muon-speedrun: {title}",
        headline=(f"{first.title}: " if first.title else "") + first.headline,
        lead=[sentence for sentence in (first.significance, first.cost, elsewhere) if sentence],
        tiles=first.tiles,
        summary=summary_table(runs),
        notes=first.notes,
        warnings=warnings,
        parts=[part for part in parts if part.items],
    )


def check_out(out: Path) -> None:
    """BadInput where a report would be mixed with something else."""
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out}: is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "report.html").exists():
        raise BadInput(f"--out {out}: holds something that is no report; choose another folder")


def write_report(
    runs: Sequence[Run], out: Path, refresh_seconds: float | None = None, only: Collection[str] | None = None
) -> Path:
    """Draw the figures, or `only` those, and write both pages; returns the path of report.html."""
    pictures = draw(runs, out / "plots", ("png", "svg"), only)
    page = build_page(runs, pictures)
    for name, text in (
        ("report.md", markdown_page(page)),
        ("report.html", html_page(page, out / "plots", refresh_seconds)),
    ):
        files.write_whole(out / name, lambda file, text=text: file.write(text.encode()))
    return out / "report.html"


def load(paths: Sequence[Path]) -> list[Run]:
    """The runs of all folders named, each once."""
    found = [folder for path in paths for folder in find_runs(path)]
    return [load_run(folder) for folder in {folder.resolve(): folder for folder in found}.values()]


def is_over(run: Run) -> bool:
    """Finished, stopped or failed, or so long without a word that nothing more is to be expected."""
    if run.summary:
        return True
    latest = max((file.stat().st_mtime for file in run.path.iterdir() if file.is_file()), default=0.0)
    return time.time() - latest > SILENT_SECONDS


def watch(paths: Sequence[Path], out: Path, seconds: float) -> list[Run]:
    """Rewrite the report every `seconds` until all runs are over; returns them as they ended."""
    while True:
        runs = load(paths)
        over = all(is_over(run) for run in runs)
        if any(run.val for run in runs):
            began = time.monotonic()
            page = write_report(runs, out, None if over else seconds)
            words = ", ".join(f"{run.name} {run.updates}/{run.config['steps']}" for run in runs[:4])
            more = f" and {len(runs) - 4} more" if len(runs) > 4 else ""
            print(f"{page}: {words}{more}, drawn in {time.monotonic() - began:.0f} s", flush=True)
        if over:
            return runs
        time.sleep(seconds)


def read_arguments(words: Sequence[str]) -> Arguments:
    """tyro's flags, and --watch without a number."""
    given = list(words)
    for i, word in enumerate(given):
        if word == "--watch" and not _is_number(given[i + 1] if i + 1 < len(given) else ""):
            given[i] = f"--watch={WATCH_SECONDS:g}"
    return tyro.cli(Arguments, args=given, description=__doc__)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


@exit_with_a_sentence
def main() -> None:
    if sys.argv[1:2] == ["compare"]:
        return compare.main(sys.argv[2:])
    arguments = read_arguments(sys.argv[1:])
    if not arguments.runs:
        raise BadInput("report.py: name at least one run folder")
    if arguments.watch is not None and not 0 < arguments.watch < float("inf"):
        raise BadInput(f"--watch {arguments.watch:g}: a number of seconds above 0")
    check_out(arguments.out)
    runs = load(arguments.runs)
    if arguments.watch is not None:
        runs = watch(arguments.runs, arguments.out, arguments.watch)
    if not any(run.val for run in runs):
        raise BadInput(f"{runs[0].path}: has logged no validation yet")
    page = arguments.out / "report.html" if arguments.watch is not None else write_report(runs, arguments.out)
    for verdict in judge(runs):
        for sentence in verdict.sentences():
            print(f"{verdict.title}: {sentence}" if verdict.title else sentence)
    for sentence in careful(runs):
        print(sentence)
    print(f"report: {page}")
    return None


if __name__ == "__main__":
    sys.exit(main())
