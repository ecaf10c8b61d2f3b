"""Trains Muon and AdamW on the same data for a given number of seconds, then writes a report with the key plots.

    python -m bench.speedrun --seconds 120 --out runs/short [--json FILE]

Uses the embedded shards, or builds a few. The token budget comes from --tokens-per-second and is at most the track's
2,015,232. Fewer tokens cannot rank the optimizers; they show that everything works and how fast this machine is.
"""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

import report
from analysis.runs import load_run
from bench.harness import JsonFlag, write_figures
from bench.record_pages import BUDGET, PLOTS, as_written, figures_of
from engine.cli import POSITIVE, BadInput, check_limits, exit_with_a_sentence, make_folder
from engine.defaults import NANO, default_data, defaults_of
from engine.files import ROOT
from suites.suite import OPTIMIZERS

LEAST_STEPS, EVENTS = 4, 6  # of a run; events are validations with spectra
SPENT_ELSEWHERE = {"cuda": 180.0, "cpu": 50.0}  # starts, compilation, validation and report, measured on idle machines
FALLBACK_RATE = {"cuda": 50_000.0, "cpu": 4000.0}
SMALL_CORPUS = 1_000_000  # tokens, where there are no shards yet


@dataclass(frozen=True)
class Arguments(JsonFlag):
    """Train both optimizers as long as the time allows and compare them."""

    out: Path
    """Folder for the runs, with their checkpoints, and the report."""
    seconds: Annotated[float, POSITIVE] = 120.0
    """Limit for everything together."""
    model: str | None = None
    """Named size (default: 88m with CUDA, else nano)."""
    tokens_per_second: Annotated[float, POSITIVE] | None = None
    """Training speed of this machine, if it is known."""


def run(*words: object) -> None:
    """Run a command of this project; BadInput with its last line where it fails."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise BadInput(f"{words[0]}: {lines[-1].removeprefix('error: ')}")


def shards_for(model: str, out: Path) -> Path:
    """The embedded shards, or some built here from the standard library."""
    found = ROOT / default_data(model)
    if found.exists():
        return found
    built = out / "shards"
    if not built.exists():
        size = 4096 if model in NANO else 49_152
        run("data.py", "embedded", "--vocab-size", size, "--max-tokens", SMALL_CORPUS, "--out", built.resolve())
    return built


@exit_with_a_sentence
def main() -> int:
    a = tyro.cli(Arguments, description=__doc__)
    check_limits(a)
    end = time.monotonic() + a.seconds
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    model = a.model or ("88m" if kind == "cuda" else "nano")
    make_folder(a.out, exist_ok=True)
    data = shards_for(model, a.out).resolve()
    batch = defaults_of(model).batch_tokens
    rate = a.tokens_per_second or FALLBACK_RATE[kind]
    left = max(0.0, end - time.monotonic() - SPENT_ELSEWHERE[kind])
    tokens = min(BUDGET, max(LEAST_STEPS, int(rate * left / len(OPTIMIZERS) / batch)) * batch)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    every = max(1, tokens // batch // EVENTS)
    folders = []
    for optimizer in OPTIMIZERS:
        name = f"{model}-{optimizer}-{stamp}"
        words = ("--model", model, "--optimizer", optimizer, "--tokens", tokens, "--data", data, "--no-plots")
        words = (*words, "--eval-every", every, "--spectra-every", every)
        run("train.py", *words, "--runs-dir", a.out.resolve(), "--name", name)
        folders.append(a.out / name)
    runs = [load_run(folder) for folder in folders]
    page = report.write_report(runs, a.out / "report", only=PLOTS)
    for verdict in report.judge(runs):
        print("\n".join(verdict.sentences()))
    print(f"report: {page}")
    figures = {"model": model, "tokens": tokens, "data_fingerprint": runs[0].config["data_fingerprint"]}
    write_figures(a.json, figures | {"figures": as_written(figures_of(runs))})
    return 0


if __name__ == "__main__":
    sys.exit(main())
