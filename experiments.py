"""Every experiment of the documents as one command: plan, run, continue, report.

    python experiments.py list
    python experiments.py run moe-momentum --scale nano        what it needs runs first; Ctrl-C, and run goes on later
    python experiments.py status everything --scale nano
    python experiments.py report everything --scale nano

Runs live in runs/experiments-<scale>/, named by a hash of their settings, so suites share those they have in common and
a finished one is never trained twice.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from engine.cli import exit_with_a_sentence, make_folder
from suites.catalog import SCALES, SUITES, Suite, with_needs
from suites.launcher import OVER, Interrupted, Job, Later, free_slots, is_held, run_here, submit
from suites.planner import NotYet, Planner, Selection, UnknownRates, unique


@dataclass(frozen=True, kw_only=True)
class List:
    """Every suite with its question, conditions and runs."""

    scale: Literal["full", "nano"] = "full"
    """The documents' sizes, or the same experiments on a model for two CPU cores."""


@dataclass(frozen=True, kw_only=True)
class Run(Selection):
    """Train what is missing of a suite, and first of the suites whose winners it takes up."""

    dry_run: bool = False
    """Only say what would be trained."""
    retry: bool = False
    """Try runs again that failed."""
    jobs: int | None = None
    """Runs at once (default: one per free GPU, without a GPU one per core, each with one thread)."""
    submit: Literal["slurm", "local"] | None = None
    """Hand each run to an existing scheduler instead, through submitit; local is its own, for a try."""
    partition: str | None = None
    """Slurm partition."""
    hours: float = 24.0
    """Longest time of a job."""


@dataclass(frozen=True, kw_only=True)
class Status(Selection):
    """Which runs of a suite are finished, at work, waiting or failed."""


@dataclass(frozen=True, kw_only=True)
class Report(Selection):
    """Write one page about the runs that there are: tables, tests, figures, and the claims of the documents."""

    out: Path | None = None
    """Folder for report.html, report.md and plots/ (default: a folder report/ beside the runs)."""


def list_suites(arguments: List) -> None:
    stages = with_needs(list(SUITES))
    for name in (name for stage in stages for name in stage):
        suite = SUITES[name]
        needs = f"  needs {', '.join(suite.needs)}" if suite.needs else ""
        conditions = suite.plan(SCALES[arguments.scale], lambda other, optimizer: UnknownRates())
        print(f"{name:18} {suite.source}  {suite.question}")
        print(f"{'':22} {len(conditions)} conditions x {_seeds(suite)}{needs}")


def _seeds(suite: Suite) -> str:
    return f"{len(suite.seeds)} seed{'s' * (len(suite.seeds) > 1)}"


def run(arguments: Run) -> int:
    """Train stage by stage; 0 if every run of the suites is finished, 1 if some failed, 130 after Ctrl-C."""
    planner = Planner(arguments)
    first = arguments.suites()
    extra = [name for stage in planner.stages() for name in stage if name not in first]
    if extra:
        print(f"{arguments.suite} takes its settings from the best runs of {', '.join(extra)}, which come first")
    slots = free_slots(arguments.jobs) if arguments.submit is None and not arguments.dry_run else []
    seen: dict[str, Job] = {}
    stages = planner.stages()
    for number, stage in enumerate(stages):
        try:
            jobs = unique([p for name in stage for p in planner.plan(name)])
        except NotYet as later:
            if not arguments.dry_run:
                raise
            print(f"{', '.join(stage)}: planned when what they need has finished ({later})")
            break
        if arguments.dry_run:
            say_plan(stage, jobs)
            continue
        make_folder(arguments.folder, exist_ok=True)
        if arguments.retry:
            for job in jobs:
                if job.state() == "failed":
                    job.forget()
        todo = [job for job in jobs if job.state() not in OVER]
        print(f"{', '.join(stage)}: {len(jobs)} runs, {len(todo)} to go", flush=True)
        outlines = [planner.outline(name) for after in stages[number + 1 :] for name in after]
        rest = Later(sum(o.runs for o in outlines), sum(o.tokens for o in outlines))
        try:
            if arguments.submit is not None:
                submit(jobs, arguments.submit, arguments.partition, arguments.hours, rest)
            else:
                run_here(jobs, slots, rest)
        except Interrupted:
            print("stopped; the same command goes on from here", file=sys.stderr)
            return 130
        seen |= {job.name: job for job in jobs}
    for job in seen.values():
        if job.state() == "failed":
            print(f"failed: {job.name}: {job.reason()} (--retry tries it again)")
        elif job.state() != "finished":
            print(f"not finished: {job.name}; {job.log} has what it said")
    return 0 if all(job.state() == "finished" for job in seen.values()) else 1


def say_plan(stage: Sequence[str], jobs: Sequence[Job]) -> None:
    print(f"{', '.join(stage)}: {len(jobs)} runs, {sum(job.tokens for job in jobs):,} tokens")
    for job in jobs:
        print(f"  {job.state():9} {job.name}  {' '.join(job.flags)}")


def status(arguments: Status) -> None:
    """A line per run, the loss of those that have one."""
    planner = Planner(arguments)
    for stage in planner.stages():
        for name in stage:
            if name not in arguments.suites():
                continue
            try:
                planned = planner.plan(name)
            except NotYet as later:
                print(f"{name}: waits for what it needs ({later})")
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
    if is_held(job):
        return f"at work, {job.updates_done()} of {job.updates} updates"
    return f"{job.updates_done()} of {job.updates} updates, stopped" if state == "started" else state


def report(arguments: Report) -> None:
    from suites.report import write_suite_report

    planner = Planner(arguments)
    results, later = {}, []
    for name in (name for stage in planner.stages() for name in stage):
        try:
            results[name] = planner.results(name)
        except NotYet as refusal:
            if name in arguments.suites():
                later.append(f"{name} waits for what it needs: {refusal}.")
    shown = [results[name] for name in arguments.suites() if name in results]
    out = arguments.out or arguments.folder / "report"
    print(f"report: {write_suite_report(shown, results, later, arguments.scale, out)}")


@exit_with_a_sentence
def main() -> int | None:
    command = tyro.cli(
        Annotated[List, tyro.conf.subcommand("list")]
        | Annotated[Run, tyro.conf.subcommand("run")]
        | Annotated[Status, tyro.conf.subcommand("status")]
        | Annotated[Report, tyro.conf.subcommand("report")],
        description=__doc__,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
    )
    if isinstance(command, List):
        return list_suites(command)
    if isinstance(command, Run):
        return run(command)
    return status(command) if isinstance(command, Status) else report(command)


if __name__ == "__main__":
    sys.exit(main())
