"""Publish the runs of the suites: pack the files of each, and write the report next to them.

    python -m bench.suites everything --scale nano --out runs/records/nano-suites

Keeps config, metrics, spectra and summary of every run that is over, no checkpoint, with rounded numbers: most so the
singular values between the first spectra event and the last. Refuses a folder over 15 MB.
"""

import contextlib
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro

import experiments
from engine import files
from engine.cli import BadInput, exit_with_a_sentence, make_folder
from experiments import ReportArguments
from suites.launcher import OVER, Job
from suites.planner import NotYet, Planner

Record = dict[str, Any]
MOST_BYTES = 15 * 10**6  # every clone carries it
VALIDATION_DIGITS, BETWEEN_DIGITS = 7, 2  # others have files.PACKED_DIGITS


def publish(job: Job, out: Path) -> None:
    """Copy a run without its checkpoints, its JSONL files rounded and packed."""
    folder = out / job.name
    make_folder(folder, exist_ok=True)
    for name in (files.CONFIG, files.SUMMARY):
        if (job.folder / name).exists():
            shutil.copyfile(job.folder / name, folder / name)
    for name, shorten in ((files.METRICS, shortened_metrics), (files.SPECTRA, shortened_spectra)):
        if records := files.read_jsonl(job.folder / name):
            files.pack(shorten(records), folder / name)


def shortened_metrics(records: Sequence[Record]) -> list[Record]:
    def digits(record: Record) -> int:
        return files.PACKED_DIGITS if record["kind"] == "train" else VALIDATION_DIGITS

    return [files.rounded(record, digits(record)) for record in records]


def shortened_spectra(records: Sequence[Record]) -> list[Record]:
    ends = records[0]["step"], records[-1]["step"]

    def digits(record: Record, value: Any) -> int:
        return BETWEEN_DIGITS if isinstance(value, list) and record["step"] not in ends else files.PACKED_DIGITS

    return [{key: files.rounded(value, digits(record, value)) for key, value in record.items()} for record in records]


def size(folder: Path) -> int:
    """Bytes of all its files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@exit_with_a_sentence
def main() -> int:
    arguments = tyro.cli(ReportArguments, description=__doc__)
    if arguments.out is None or arguments.out.resolve() == arguments.folder.resolve():
        raise BadInput("--out: name a folder for the published runs, another than theirs")
    planner = Planner(arguments)
    jobs: dict[str, Job] = {}
    for name in (name for stage in planner.stages() for name in stage):
        with contextlib.suppress(NotYet):  # the report says so
            jobs |= {job.name: job for p in planner.plan(name) for job in p.jobs}
    over = [job for job in jobs.values() if job.state() in OVER and job.folder.exists()]
    for job in over:
        publish(job, arguments.out)
    experiments.report(replace(arguments, runs_dir=arguments.out))
    total = size(arguments.out)
    print(f"{len(over)} of {len(jobs)} runs, {total / 1e6:.1f} MB in {arguments.out}")
    if total > MOST_BYTES:
        raise BadInput(
            f"{arguments.out}: {total / 1e6:.1f} MB, more than the {MOST_BYTES / 1e6:.0f} MB that it may have"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
