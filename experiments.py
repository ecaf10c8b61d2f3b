"""Every experiment of the documents as one command: plan, run, resume, report.

    python experiments.py list
    python experiments.py run moe-momentum --scale nano        # first runs the suites that it needs; Ctrl-C and rerun
    python experiments.py status everything --scale nano
    python experiments.py report everything --scale nano

Runs are in runs/experiments-<scale>/. A hash of its settings names a run, so suites share runs, and a finished run is
never trained twice.
"""

import math
import shutil
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from engine.cli import AT_LEAST_1, check_limits, exit_with_a_sentence, make_folder
from engine.cores import own_cores
from suites import power_table
from suites.catalog import SUITES, with_needs
from suites.cost import minutes, slowness
from suites.launcher import OVER, Interrupted, Job, LaterStages, free_slots, is_held, run_here, submit
from suites.planner import NotYet, Planner, Selection, Unknown, unique
from suites.scales import SCALES
from suites.suite import MOST_GROWTH

TOO_LITTLE = "; too little"  # said of free disk
WEIGHTS_KEPT = 7  # times its weights: best.pt, and two checkpoints of weights and two moments


@dataclass(frozen=True, kw_only=True)
class ListArguments:
    """List every suite with its question, conditions and runs."""

    scale: Literal["full", "nano"] = "full"
    """Use the documents' sizes, or the same experiments on a model for two CPU cores."""


@dataclass(frozen=True, kw_only=True)
class RunArguments(Selection):
    """Train the missing runs of a suite, after those of the suites that it needs."""

    dry_run: bool = False
    """Print what would be trained, what the seeds can show, time and disk, and stop."""
    retry: bool = False
    """Try failed runs again."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of finished runs too, not only best.pt: up to seven times the disk."""
    jobs: Annotated[int, AT_LEAST_1] | None = None
    """Train so many runs at a time (default: one per free GPU, or one per core, each with one thread)."""
    submit: Literal["slurm", "local"] | None = None
    """Hand each run to a scheduler through submitit; local starts all of them here at once."""
    partition: str | None = None
    """Use this Slurm partition."""
    hours: float = 24.0
    """Limit each job to this time."""


@dataclass(frozen=True, kw_only=True)
class StatusArguments(Selection):
    """Print which runs of a suite are finished, running, waiting or failed."""


@dataclass(frozen=True, kw_only=True)
class ReportArguments(Selection):
    """Write one page about the existing runs: tables, tests, figures, and the claims of the documents."""

    out: Path | None = None
    """Write report.html, report.md and plots/ to this folder (default: report/ in the folder of the runs)."""


def list_suites(arguments: ListArguments) -> None:
    for name in (name for stage in with_needs(list(SUITES)) for name in stage):
        suite = SUITES[name]
        needs = f"  needs {', '.join(suite.needs)}" if suite.needs else ""
        scale = SCALES[arguments.scale]
        conditions = suite.plan(scale, Unknown(scale))
        count = len(suite.seeds_at(scale))
        seeds = f"{count} seed{'s' * (count > 1)}"
        print(f"{name:18} {suite.source}  {suite.question}")
        group = f"  in {suite.group}" if suite.group else ""
        print(f"{'':22} {len(conditions)} conditions x {seeds}{needs}{group}")


def run(arguments: RunArguments) -> int:
    """Train stage by stage; returns 0 if every run of the suites is finished, 1 if some failed, 130 after Ctrl-C. A
    trial that diverges is an outcome of its suite, not a failure."""
    planner = Planner(arguments)
    stages = planner.stages()
    needed = [name for stage in stages for name in stage if name not in arguments.suites()]
    if needed:
        print(f"{arguments.suite} uses the best settings of {', '.join(needed)}, so these run first")
    for sentence in planner.missing_corpora():
        print(sentence)
    slots = free_slots(arguments.jobs) if arguments.submit is None and not arguments.dry_run else []
    seen: dict[str, Job] = {}
    if arguments.dry_run:
        print_plan(planner, stages, arguments)
        return 0
    for number, stage in enumerate(stages):
        jobs = jobs_of(planner, stage)
        try:
            jobs = train_with_growth(planner, stage, jobs, slots, planner.estimate(stages[number + 1 :]), arguments)
        except Interrupted:
            print("interrupted; run the same command to continue", file=sys.stderr)
            return 130
        seen |= {job.name: job for job in jobs}
    trials = jobs_of(planner, [name for stage in stages for name in stage if SUITES[name].one_seed])
    diverged = {job.name for job in trials if job.diverged}
    if diverged:
        print(f"{len(diverged)} of {len(trials)} trials diverged, which counts as the worst loss")
    left = [job for job in seen.values() if job.name not in diverged]
    for job in left:
        if job.state() == "failed":
            print(f"failed: {job.name}: {job.reason()} (--retry tries it again)")
        elif job.state() != "finished":
            print(f"not finished: {job.name}; see {job.log}")
    return 0 if all(job.state() == "finished" for job in left) else 1


def jobs_of(planner: Planner, stage: Sequence[str]) -> list[Job]:
    return list({job.name: job for name in stage for job in unique(planner.plan(name))}.values())


def train_with_growth(
    planner: Planner,
    stage: Sequence[str],
    jobs: list[Job],
    slots: Sequence[dict[str, str]],
    later: LaterStages,
    arguments: RunArguments,
) -> list[Job]:
    """Train a stage, then what its suites have grown by meanwhile, as grids and equal time do; returns all of its
    runs."""
    while True:
        train_stage(stage, jobs, slots, later, arguments)
        more = jobs_of(planner, stage)
        if {job.name for job in more} <= {job.name for job in jobs}:
            return jobs
        jobs, arguments = more, replace(arguments, retry=False)
        for sentence in filter(None, map(planner.grown_sentence, stage)):
            print(sentence)


def train_stage(
    stage: Sequence[str],
    jobs: Sequence[Job],
    slots: Sequence[dict[str, str]],
    later: LaterStages,
    arguments: RunArguments,
) -> None:
    make_folder(arguments.folder, exist_ok=True)
    for job in jobs:
        if arguments.retry and job.state() == "failed":
            job.forget()
    to_go = sum(job.state() not in OVER for job in jobs)
    print(f"{', '.join(stage)}: {len(jobs)} runs, {to_go} to go", flush=True)
    if TOO_LITTLE in (disk := disk_needed(jobs, LaterStages(), arguments)):
        print(disk, flush=True)
    if arguments.submit is not None:
        submit(jobs, arguments.submit, arguments.partition, arguments.hours, later, arguments.keep_checkpoints)
    else:
        run_here(jobs, slots, later, arguments.keep_checkpoints)


def print_plan(planner: Planner, stages: Sequence[Sequence[str]], arguments: RunArguments) -> None:
    """Seeds and grids of every suite, every run that can be planned, the size of the stages after them, what n can
    show, and the time and disk of it all."""
    seen: dict[str, Job] = {}
    later = LaterStages()
    for number, stage in enumerate(stages):
        try:
            jobs = jobs_of(planner, stage)
        except NotYet as refusal:
            rest = [name for stage in stages[number:] for name in stage]
            later = planner.estimate(stages[number:])
            size = f"about {later.runs} runs, {later.tokens:,} tokens"
            print(f"{', '.join(rest)}: cannot be planned yet ({refusal}): {size}")
            print_rules(planner, rest)
            break
        print(f"{', '.join(stage)}: {len(jobs)} runs, {sum(job.tokens for job in jobs):,} tokens")
        print_rules(planner, stage)
        for job in jobs:
            print(f"  {job.state():9} {job.name}  {' '.join(job.flags)}")
        seen |= {job.name: job for job in jobs}
    for line in power_table.table(planner):
        print(line)
    print(time_needed(planner, seen.values(), later))
    print(disk_needed(seen.values(), later, arguments))


def print_rules(planner: Planner, names: Sequence[str]) -> None:
    """The seeds of each suite, and how the grid of a sweep grows or has grown."""
    for name in names:
        seeds, confirms = ", ".join(map(str, planner.seeds(name))), SUITES[name].confirms
        print(f"  {name}: seeds {seeds}{', others than those that chose its settings' * confirms}")
        if planner.grows(name):
            rule = f"  {name}: up to {MOST_GROWTH} rates more for an optimizer whose best is on the edge of its grid"
            print(planner.grown_sentence(name) or rule)


def time_needed(planner: Planner, jobs: Collection[Job], later: LaterStages) -> str:
    """Runs, tokens and minutes of a plan, grids as far as they have grown."""
    left = [job for job in jobs if job.state() not in OVER]
    slots = planner.chosen.jobs or len(own_cores())
    whole, to_go = (minutes([*(job.seconds for job in some), later.seconds], slots) for some in (jobs, left))
    total = f"{len(jobs) + later.runs} runs, {sum(job.tokens for job in jobs) + later.tokens:,} tokens"
    if math.isnan(whole):
        return f"{total}; no estimate of the time: no run of this scale was timed yet"
    slower = slowness()
    return f"{total}; about {whole * slower:.0f} minutes on {slots} idle cores, {to_go * slower:.0f} of them to go"


def disk_needed(jobs: Collection[Job], later: LaterStages, arguments: RunArguments) -> str:
    """Gigabytes that the runs to go will leave, those of later stages counted as the mean of the known ones, and what
    is free; empty without runs."""
    if not jobs:
        return ""
    files_each = WEIGHTS_KEPT if arguments.keep_checkpoints else 1
    mean = files_each * sum(job.weight_bytes for job in jobs) / len(jobs)
    needed = mean * (sum(job.state() not in OVER for job in jobs) + later.runs) / 1e9
    folder = next(path for path in (arguments.folder, *arguments.folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free / 1e9
    short = TOO_LITTLE if needed > free else ""
    return f"disk: about {needed:.3g} GB for the runs to go, {free:.3g} GB free in {folder}{short}"


def status(arguments: StatusArguments) -> None:
    """Print a line per run, with the loss of each finished one."""
    planner = Planner(arguments)
    for stage in planner.stages():
        for name in stage:
            if name not in arguments.suites():
                continue
            try:
                planned = planner.plan(name)
            except NotYet as refusal:
                print(f"{name}: cannot be planned yet ({refusal})")
                continue
            jobs = unique(planned)
            done = sum(job.state() == "finished" for job in jobs)
            print(f"{name}: {done} of {len(jobs)} runs finished")
            for p in planned:
                for job in p.jobs:
                    print(f"  {p.condition.name:32} {_progress(job)}  {job.name}")


def _progress(job: Job) -> str:
    state = job.state()
    if state == "finished":
        loss = job.summary().get("final_val_loss")
        return f"finished, loss {loss:.4f}" if loss is not None else "finished, no loss"
    if state == "failed":
        return f"failed: {job.reason()}"
    steps = f"{job.steps_done()} of {job.steps} steps"
    if is_held(job):
        return f"running, {steps}"
    return f"{steps}, stopped" if state == "started" else state


def report(arguments: ReportArguments) -> None:
    from suites.report import write_suite_report

    planner = Planner(arguments)
    results, not_yet = {}, [f"{sentence}." for sentence in planner.missing_corpora()]
    names = [name for stage in planner.stages() for name in stage]
    for name in dict.fromkeys([*names, *(other for shown in names for other in SUITES[shown].beside)]):
        try:
            results[name] = planner.results(name)
        except NotYet as refusal:
            if name in arguments.suites():
                not_yet.append(f"{name} cannot be planned yet: {refusal}.")
    shown = [results[name] for name in arguments.suites() if name in results]
    out = arguments.out or arguments.folder / "report"
    print(f"report: {write_suite_report(shown, results, not_yet, arguments.scale, out)}")


@exit_with_a_sentence
def main() -> int | None:
    arguments = tyro.cli(
        Annotated[ListArguments, tyro.conf.subcommand("list")]
        | Annotated[RunArguments, tyro.conf.subcommand("run")]
        | Annotated[StatusArguments, tyro.conf.subcommand("status")]
        | Annotated[ReportArguments, tyro.conf.subcommand("report")],
        description=__doc__,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
    )
    check_limits(arguments)
    commands = {ListArguments: list_suites, RunArguments: run, StatusArguments: status, ReportArguments: report}
    return commands[type(arguments)](arguments)


if __name__ == "__main__":
    sys.exit(main())
