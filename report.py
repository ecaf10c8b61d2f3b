"""Runs -> one report: report.html (self-contained), report.md and plots/.

    python report.py runs/my-muon runs/my-adamw --out runs/my-report          one page for 1 to 60 runs, finished or not
    python report.py runs/my-muon runs/my-adamw --watch                       the same, rewritten until they are over
    python report.py compare runs/muon-0,runs/muon-1 runs/adamw-0             two runs or groups, in the terminal

In place of a run's folder, a folder that holds runs means all of them. Reads only the runs' folders and takes about
half a minute; it needs no torch and no network.
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
from analysis.pages import Chapter, Code, Page, Picture, Section, Table, counted, number, write_pages
from analysis.questions import answers
from analysis.report_figures import curve_drawings, draw, watched
from analysis.runs import Run, find_runs, group_seeds, load_runs, read_samples, representative
from analysis.stats import t_interval
from analysis.verdict import comparable_sets, judge, memory, warnings
from engine import files
from engine.cli import BadInput, exit_with_a_sentence

MOST_SAMPLED = 4  # runs whose texts a report shows
WATCH_SECONDS = 30.0
SILENT_SECONDS = 1800.0  # a run that has written nothing for this long was killed; --watch does not wait for it


@dataclass(frozen=True)
class Arguments:
    """Compare training runs in one page."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders to show, or folders that hold runs."""
    out: Path = Path("runs/report")
    """Folder for report.html, report.md and plots/; an earlier report there is replaced."""
    layers: tuple[int, int] | None = None
    """Compare the spectra of these two layers and draw each, as in --layers 3 9 (default: the two that differ most,
    and the middle layer drawn)."""
    watch: float | None = None
    """Rewrite the report at this interval in seconds (default 30) until all runs are over."""


def last(run: Run, key: str) -> float:
    return float(run.val[key][-1]) if run.val else np.nan


def run_row(run: Run, label: str) -> dict[str, str]:
    """A row of the table of runs: column -> cell."""
    rates = [run.config.get(key) for key in ("lr", "adamw_lr")]
    losses = run.val["val_loss"] if run.val else np.array([np.nan])
    best = np.nanmin(losses) if np.isfinite(losses).any() else np.nan
    return {
        "run": label,
        "folder": run.name,
        "status": run.status,
        "learning rate": " / ".join("-" if rate is None else f"{rate:g}" for rate in rates),
        "steps": f"{run.steps_done:,} of {run.config['steps']:,}",
        "tokens": f"{run.tokens:,.0f}",
        "last val. loss": number(last(run, "val_loss"), ".4f"),
        "best val. loss": number(best, ".4f"),
        "bits/byte": number(run.bits_per_byte, ".4f"),
        "val. accuracy": number(100 * last(run, "val_accuracy"), ".2f", " %"),
        "tokens/s": number(run.tokens_per_second, ",.0f"),
        "ms/step": number(run.step_ms, ",.1f"),
        "training time": number(run.train_seconds, ",.1f", " s"),
        "memory": memory(run.memory_bytes),
    }


def summary_table(runs: Sequence[Run]) -> Table:
    """A row for each setting, the best first within the runs that compare."""
    groups = group_seeds(runs)
    set_of = {run.path: number for number, members in enumerate(comparable_sets(runs)) for run in members}
    rows = []
    for group, label in zip(groups, plots.group_labels(groups), strict=True):
        samples = group.samples()
        shown = samples or [run for run in group.runs if run.val]
        mean, low, high = t_interval([last(run, "val_loss") for run in shown])
        interval = f"{low:.4f} to {high:.4f}" if samples and np.isfinite(low) else "-"
        accuracy = np.mean([last(run, "val_accuracy") for run in shown]) if shown else np.nan
        open_runs = [run for run in group.runs if run.status != "finished"]
        progress = f" ({', '.join(sorted({run.status for run in open_runs}))})" if open_runs else ""
        place = set_of[group.runs[0].path], mean if samples and np.isfinite(mean) else np.inf
        row = {
            "setting": label,
            "seeds": f"{len(group.runs)}{progress}",
            "val. loss": number(mean, ".4f"),
            "95 %": interval,
            "bits/byte": number(np.mean([run.bits_per_byte for run in shown]) if shown else np.nan, ".4f"),
            "perplexity": number(float(np.exp(min(mean, 700))), ",.2f"),
            "accuracy": number(100 * accuracy, ".2f", " %"),
            "tokens/s": number(group.mean("tokens_per_second"), ",.0f"),
            "ms/step": number(group.mean("step_ms"), ",.1f"),
            "training time": number(group.mean("train_seconds"), ",.1f", " s"),
        }
        rows.append((place, row))
    return Table.of([row for _, row in sorted(rows, key=lambda pair: pair[0])])


def command(run: Run) -> str:
    """The command that trains this run again: every setting of its config except where it wrote."""
    ranks = int(run.config.get("world_size") or 1)
    words = ["python"] if ranks == 1 else ["torchrun", "--standalone", f"--nproc_per_node={ranks}"]
    words.append("train.py")
    for key, value in run.settings().items():
        flag = key.replace("_", "-")
        if value is None or key in ("runs_dir", "name", "resume"):
            continue
        if key == "optimizer_options":
            words += [f"--{flag}", *shlex.split(str(value))]
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)


def provenance(runs: Sequence[Run], names: Sequence[str]) -> list[Table | Section | Code]:
    """What the runs share, what they differ in, and the commands that repeat them."""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    values = {key: [str(run.config.get(key)) for run in runs] for key in keys}
    shared = [[key, values[key][0]] for key in keys if len(set(values[key])) == 1]
    different = [key for key in keys if len(set(values[key])) > 1]
    items: list[Table | Section | Code] = []
    if different:
        rows = [[name, *(values[key][i] for key in different)] for i, name in enumerate(names)]
        items += [Section("What differs", []), Table(["run", *different], rows)]
    items += [Section("What all runs share" if len(runs) > 1 else "Settings", []), Table(("setting", "value"), shared)]
    commits = sorted({str(run.config["git_commit"]) for run in runs if run.config.get("git_commit")})
    prints = sorted({str(run.config["data_fingerprint"]) for run in runs if run.config.get("data_fingerprint")})
    words = (
        ["A commit that ends in + had uncommitted changes."] if any(commit.endswith("+") for commit in commits) else []
    )
    if prints:
        words.insert(0, f"Build or fetch the shards first; their fingerprint must be {' or '.join(prints)}.")
    checkout = [f"git checkout {commit.rstrip('+')}" for commit in commits]
    lines = [*checkout, *dict.fromkeys(command(run) for run in runs)]
    return [*items, Section("Commands to reproduce", words), Code(lines)]


def samples(runs: Sequence[Run]) -> list[Section | Code]:
    """What the first runs that have samples write, one of each setting."""
    items: list[Section | Code] = []
    sampled = [run for group in group_seeds(runs) for run in group.runs[:1] if (run.path / files.SAMPLES).exists()]
    for run in sampled[:MOST_SAMPLED]:
        checkpoint, texts = read_samples(run.path / files.SAMPLES)
        for place, (prompt, text) in enumerate(texts, start=1):
            words = (
                f"Prompt, the first words of a validation document: {prompt!r}. The rest is the model's, drawn once."
            )
            items.append(Section(f"{run.name}: sample {place} of {len(texts)} from {checkpoint}", [words]))
            items.append(Code([_printable(line) for line in (prompt + text).splitlines()]))
    return items


def _printable(line: str) -> str:
    """A line without commands to a terminal or a browser."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in line.expandtabs(4))


def build_page(runs: Sequence[Run], pictures: Sequence[Picture], layers: tuple[int, int] | None = None) -> Page:
    """Every word of the report, around the pictures that were drawn; `layers` are the two that it compares."""
    names = plots.run_labels(runs)
    groups = plots.group_labels(group_seeds(runs))
    title = " and ".join(groups) if len(groups) <= 2 else f"{len(groups)} settings"
    title += f", {counted(len(runs), 'run')}"
    first, *others = judge(runs)
    spectra = watched(runs)
    curves = {drawing.picture.stem for drawing in curve_drawings(runs)}
    chapters = [
        Chapter("Curves", [picture for picture in pictures if picture.stem in curves]),
        Chapter("Runs", [Table.of([run_row(run, name) for run, name in zip(runs, names, strict=True)])]),
    ]
    elsewhere = ""
    if others:
        elsewhere = f"Losses compare only within each of {1 + len(others)} sets of runs; each has its verdict below."
        verdicts = [Section(verdict.title, verdict.sentences()) for verdict in (first, *others)]
        chapters.insert(0, Chapter("Verdicts", verdicts))
    if spectra:
        two = [run for group in representative(group_seeds(spectra), 2) for run in group.runs]
        chapters.append(Chapter("Findings in the spectra", [Section(*reply) for reply in answers(two, layers)]))
        chapters.append(Chapter("Spectra", [picture for picture in pictures if picture.stem not in curves]))
    chapters.append(Chapter("Settings and provenance", provenance(runs, names), folded=True))
    chapters.append(Chapter("Samples", samples(runs)))
    cautions = warnings(runs)
    if len(cautions) > 6:
        cautions = [*cautions[:5], f"… and {len(cautions) - 5} more notes: see the table of runs."]
    return Page(
        title=f"muon-speedrun: {title}",
        headline=(f"{first.title}: " if first.title else "") + first.headline,
        lead=[sentence for sentence in (first.significance, first.cost, elsewhere) if sentence],
        tiles=first.tiles,
        summary=summary_table(runs),
        notes=first.notes,
        warnings=cautions,
        chapters=[chapter for chapter in chapters if chapter.items],
    )


def check_out(out: Path) -> None:
    """BadInput where a report would be mixed with something else."""
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out}: is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "report.html").exists():
        raise BadInput(f"--out {out}: holds something that is not a report; choose another folder")


def write_report(
    runs: Sequence[Run],
    out: Path,
    refresh_seconds: float | None = None,
    only: Collection[str] | None = None,
    layers: tuple[int, int] | None = None,
) -> Path:
    """Draw the figures, or `only` those, and write both pages; returns the path of report.html."""
    pictures = draw(runs, out / "plots", ("png", "svg"), only, layers or ())
    return write_pages(build_page(runs, pictures, layers), out, refresh_seconds)


def load(paths: Sequence[Path]) -> list[Run]:
    return load_runs(folder for path in paths for folder in find_runs(path))


def is_over(run: Run) -> bool:
    """Finished, stopped or failed, or killed: it has written nothing for SILENT_SECONDS."""
    if run.summary:
        return True
    latest = max((file.stat().st_mtime for file in run.path.iterdir() if file.is_file()), default=0.0)
    return time.time() - latest > SILENT_SECONDS


def watch(paths: Sequence[Path], out: Path, seconds: float, layers: tuple[int, int] | None = None) -> list[Run]:
    """Rewrite the report every `seconds` until all runs are over; returns these runs."""
    while True:
        runs = load(paths)
        over = all(is_over(run) for run in runs)
        if any(run.val for run in runs):
            began = time.monotonic()
            page = write_report(runs, out, None if over else seconds, layers=layers)
            words = ", ".join(f"{run.name} {run.steps_done}/{run.config['steps']}" for run in runs[:4])
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
    deepest = max((run.layers for run in runs), default=0)
    if arguments.layers and not (0 <= min(arguments.layers) < max(arguments.layers) < max(deepest, 1)):
        raise BadInput(f"--layers {' '.join(map(str, arguments.layers))}: two layers from 0 to {max(deepest - 1, 0)}")
    if arguments.watch is not None:
        runs = watch(arguments.runs, arguments.out, arguments.watch, arguments.layers)
    if not any(run.val for run in runs):
        raise BadInput(f"{runs[0].path}: has logged no validation yet")
    if arguments.watch is None:
        write_report(runs, arguments.out, layers=arguments.layers)
    page = arguments.out / "report.html"
    for verdict in judge(runs):
        for sentence in verdict.sentences():
            print(f"{verdict.title}: {sentence}" if verdict.title else sentence)
    for sentence in warnings(runs):
        print(sentence)
    print(f"report: {page}")
    return None


if __name__ == "__main__":
    sys.exit(main())
