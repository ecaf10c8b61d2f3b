"""How much of its speed a training on the CPU keeps next to one busy process.

    python -m bench.busy --rounds 2

Trains nano alone and next to a process that never sleeps, in turns; train.py then chooses one worker less. That process
has a session of its own, as somebody else's has: the scheduler then shares the cores between two groups, however many
threads each has.
"""

import contextlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bench import machine
from engine.cli import AT_LEAST_1, BadInput, Count, check_limits, exit_with_a_sentence
from engine.files import ROOT, SUMMARY, load_json, write_json

BATCH_TOKENS = 2048
GOAL = 0.55  # of the speed alone


@dataclass(frozen=True)
class Arguments:
    """Time nano alone and next to a busy process."""

    tokens: Annotated[Count, AT_LEAST_1] = 24_576
    """Trained in each turn."""
    rounds: Annotated[int, AT_LEAST_1] = 2
    """Turns of either kind."""
    data: Path | None = None
    """Folder of token shards (default: the embedded shards that make speedrun builds)."""
    json: Path | None = None
    """Write the figures here too."""


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def tokens_per_second(a: Arguments, folder: Path, name: str) -> float:
    """Train once, and return the speed of the whole run as its summary has it."""
    words = ["--model", "nano", "--batch-tokens", BATCH_TOKENS, "--tokens", a.tokens, "--device", "cpu", "--no-plots"]
    words += ["--eval-every", 10**6, "--eval-tokens", 256, "--spectra-every", 0, "--runs-dir", folder, "--name", name]
    words += ["--data", a.data.resolve()] if a.data else []
    command = [sys.executable, str(ROOT / "train.py"), *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BadInput((done.stderr.strip().splitlines() or ["the training failed"])[-1].removeprefix("error: "))
    return float(load_json(folder / name / SUMMARY)["tokens_per_second"])


@exit_with_a_sentence
def main() -> None:
    a = tyro.cli(Arguments, description=__doc__)
    check_limits(a)
    alone, shared = [], []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(a.rounds):
            alone.append(tokens_per_second(a, Path(folder), f"alone-{turn}"))
            with busy_process():
                shared.append(tokens_per_second(a, Path(folder), f"shared-{turn}"))
            print(f"alone {alone[-1]:,.0f}, next to a busy process {shared[-1]:,.0f} tokens/s", flush=True)
    kept = statistics.median(shared) / statistics.median(alone)
    print(f"keeps {kept:.0%} of its speed (goal: at least {GOAL:.0%})")
    if a.json:
        figures = {"alone": alone, "shared": shared, "kept": kept, "goal": GOAL, "machine": machine.describe()}
        write_json(a.json, figures)


if __name__ == "__main__":
    sys.exit(main())
