"""Checks that a training killed again and again ends with the weights of an undisturbed one, to the bit.

    python -m bench.soak --minutes 30

A reference run, then the same one killed (SIGKILL) some steps into each start, about 80 times in a long run. One time
in four its newest checkpoint is then cut in half, as a power cut may leave it. Every start is the same command with
--resume.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from bench.harness import JsonFlag, write_figures
from engine import files
from engine.cli import AT_LEAST_1, POSITIVE, BadInput, check_limits, exit_with_a_sentence

TRAIN = files.ROOT / "train.py"
BATCH_TOKENS, PROBE_STEPS = 2048, 20
REFERENCE_SHARE = 0.33  # of the minutes for the undisturbed run; the killed one takes twice as long
CHECKPOINT_EVERY = 8  # a start makes at least as many steps, so that the training goes on on any machine
STARTS = 80  # of a long run, about
CUT_SHARE = 0.25  # of the kills after which the newest checkpoint is cut


@dataclass(frozen=True)
class Arguments(JsonFlag):
    """Kill a training at random until it is finished, and compare it with an undisturbed one."""

    minutes: Annotated[float, POSITIVE] = 30.0
    """About how long all of it takes."""
    updates: Annotated[int, AT_LEAST_1] | None = None
    """Steps of each run, instead of as many as fit the minutes."""
    data: Path | None = None
    """Folder of token shards (default: the embedded shards that make speedrun builds)."""
    seed: int = 0
    """Of the kills, not of the training."""


def start(folder: Path, name: str, steps: int, data: Path | None) -> subprocess.Popen[bytes]:
    words = ["--model", "nano", "--batch-tokens", BATCH_TOKENS, "--tokens", steps * BATCH_TOKENS, "--device", "cpu"]
    words += ["--checkpoint-every", CHECKPOINT_EVERY, "--spectra-every", 16, "--eval-every", 32, "--eval-tokens", 4096]
    words += [
        "--no-plots",
        "--dropout",
        0.1,
        "--runs-dir",
        folder,
        "--name",
        name,
        "--resume",
        *(("--data", data) if data else ()),
    ]
    with (folder / f"{name}.txt").open("ab") as output:
        return subprocess.Popen([sys.executable, str(TRAIN), *map(str, words)], stdout=output, stderr=output)


def train_to_the_end(folder: Path, name: str, steps: int, data: Path | None) -> float:
    """Training seconds of an undisturbed run, by its median step: the first ones share the cores with spectra."""
    if start(folder, name, steps, data).wait():
        raise BadInput(
            f"the run to compare with failed: {(folder / f'{name}.txt').read_text(encoding='utf-8').splitlines()[-1]}"
        )
    return steps * statistics.median(line["step_ms"] for line in steps_logged(folder / name)) / 1e3


def steps_logged(run: Path) -> list[dict[str, Any]]:
    path = run / files.METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if '"train"' in line and line.endswith("}")]


def last_step(run: Path) -> int:
    return max((line["step"] for line in steps_logged(run)), default=0)


def train_with_kills(folder: Path, name: str, steps: int, data: Path | None, rng: random.Random) -> dict[str, int]:
    """Kill and restart a run until it is finished; counts of starts, kills and damaged checkpoints."""
    run, done = folder / name, {"starts": 0, "kills": 0, "cut_checkpoints": 0}
    while True:
        before, process = last_step(run), start(folder, name, steps, data)
        done["starts"] += 1
        end = before + rng.randint(CHECKPOINT_EVERY, max(2 * CHECKPOINT_EVERY, 2 * steps // STARTS))
        while process.poll() is None and last_step(run) < end:
            time.sleep(0.05)
        time.sleep(rng.uniform(0.0, 0.1))  # anywhere in a step
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            done["kills"] += 1
            newest = run / files.CHECKPOINT
            if (run / files.PREVIOUS_CHECKPOINT).exists() and newest.exists() and rng.random() < CUT_SHARE:
                os.truncate(newest, newest.stat().st_size // 2)
                done["cut_checkpoints"] += 1
        elif process.returncode:
            sys.exit(f"start {done['starts']} ended with {process.returncode}; see {folder / f'{name}.txt'}")
        else:
            return done


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two runs, times left out."""
    found = []
    ours, theirs = (torch.load(run / files.CHECKPOINT, weights_only=True) for run in (one, other))
    found += [f"weight {name}" for name, w in ours["model"].items() if not torch.equal(w, theirs["model"][name])]
    for number, (a, b) in enumerate(zip(ours["optimizer"], theirs["optimizer"], strict=True)):
        for key, state in a["state"].items():
            equal = all(torch.equal(value, b["state"][key][part]) for part, value in state.items())
            found += [] if equal else [f"state {key} of optimizer {number}"]
    for name in (files.METRICS, files.SPECTRA):
        lines = [list(map(_timeless, (run / name).read_text(encoding="utf-8").splitlines())) for run in (one, other)]
        if lines[0] != lines[1]:
            found.append(f"{name} ({len(lines[0])} and {len(lines[1])} lines)")
    return found


def _timeless(line: str) -> dict[str, Any]:
    timed = ("step_ms", "tokens_per_second", "train_seconds", "mfu")
    return {key: value for key, value in json.loads(line).items() if key not in timed}


@exit_with_a_sentence
def main() -> int:
    a = tyro.cli(Arguments, description=__doc__)
    check_limits(a)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = a.updates
        if steps is None:
            step_seconds = train_to_the_end(folder, "probe", PROBE_STEPS, a.data) / PROBE_STEPS
            steps = max(PROBE_STEPS, round(REFERENCE_SHARE * 60 * a.minutes / step_seconds))
        train_to_the_end(folder, "reference", steps, a.data)
        done = train_with_kills(folder, "killed", steps, a.data, random.Random(a.seed))
        differ = differences(folder / "killed", folder / "reference")
    minutes = (time.monotonic() - began) / 60
    print(
        f"{steps} steps, {done['starts']} starts, {done['kills']} kills survived, {done['cut_checkpoints']} newest "
        f"checkpoints cut in half, {minutes:.1f} minutes: {'the same to the bit' if not differ else 'NOT THE SAME'}"
    )
    for difference in differ:
        print(f"differs: {difference}")
    write_figures(a.json, done | {"updates": steps, "minutes": minutes, "differ": differ})
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
