"""Training that is killed again and again ends with the weights of one that was left alone, to the bit.

    python -m bench.soak --minutes 30

A reference run, then the same one killed (SIGKILL) 5 to 20 s after the first new update of each start, and, one time in
four, with its newest checkpoint cut in half as a power cut may leave it; every start is the same command with --resume.
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
from typing import Any

import torch
import tyro

from engine import files, identity
from engine.cli import BadInput, exit_with_a_sentence

TRAIN = files.ROOT / "train.py"
BATCH_TOKENS, PROBE_UPDATES = 2048, 20
REFERENCE_SHARE = 0.33  # of the minutes for the run that is left alone; to be killed takes twice as long
KILL_AFTER_SECONDS = (5.0, 20.0)
CUT_SHARE = 0.25  # of the kills after which the newest checkpoint is cut


@dataclass(frozen=True)
class Arguments:
    """Kill a training at random until it is finished, and compare it with one that was left alone."""

    minutes: float = 30.0
    """About how long all of it takes."""
    updates: int | None = None
    """Of each run, instead of as many as fit the minutes."""
    data: Path | None = None
    """Folder of token shards (default: the embedded shards that make speedrun builds)."""
    seed: int = 0
    """Of the kills, not of the training."""
    json: Path | None = None
    """Write the figures here too."""


def start(folder: Path, name: str, updates: int, data: Path | None) -> subprocess.Popen[bytes]:
    words = ["--model", "nano", "--batch-tokens", BATCH_TOKENS, "--tokens", updates * BATCH_TOKENS, "--device", "cpu"]
    words += ["--checkpoint-every", 8, "--spectra-every", 16, "--eval-every", 32, "--eval-tokens", 4096, "--no-plots"]
    words += ["--dropout", 0.1, "--runs-dir", folder, "--name", name, "--resume", *(("--data", data) if data else ())]
    with (folder / f"{name}.txt").open("ab") as said:
        return subprocess.Popen([sys.executable, str(TRAIN), *map(str, words)], stdout=said, stderr=said)


def train_to_the_end(folder: Path, name: str, updates: int, data: Path | None) -> float:
    """Seconds of training of a run left alone, by its median update: the first ones share the cores with spectra."""
    if start(folder, name, updates, data).wait():
        raise BadInput(f"the run to compare with failed: {(folder / f'{name}.txt').read_text().splitlines()[-1]}")
    return updates * statistics.median(line["step_ms"] for line in updates_logged(folder / name)) / 1e3


def updates_logged(run: Path) -> list[dict[str, Any]]:
    path = run / files.METRICS
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if '"train"' in line and line.endswith("}")]


def last_step(run: Path) -> int:
    return max((line["step"] for line in updates_logged(run)), default=0)


def torment(
    folder: Path, name: str, updates: int, data: Path | None, rng: random.Random, undisturbed: float
) -> dict[str, int]:
    """Kill and start until the run is finished, which takes so many seconds undisturbed; how often what was done."""
    run, done = folder / name, {"starts": 0, "kills": 0, "cut_checkpoints": 0}
    while True:
        before, process = last_step(run), start(folder, name, updates, data)
        done["starts"] += 1
        while process.poll() is None and last_step(run) <= before:
            time.sleep(0.05)
        low, high = KILL_AFTER_SECONDS
        end = time.monotonic() + rng.uniform(low, min(high, max(low, undisturbed / 2)))
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            done["kills"] += 1
            newest = run / files.CHECKPOINT
            if (run / files.PREVIOUS_CHECKPOINT).exists() and newest.exists() and rng.random() < CUT_SHARE:
                os.truncate(newest, newest.stat().st_size // 2)
                done["cut_checkpoints"] += 1
        elif process.returncode:
            sys.exit(
                f"start {done['starts']} ended with {process.returncode}; {folder / f'{name}.txt'} has what it said"
            )
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
        lines = [list(map(_timeless, (run / name).read_text().splitlines())) for run in (one, other)]
        if lines[0] != lines[1]:
            found.append(f"{name} ({len(lines[0])} and {len(lines[1])} lines)")
    return found


def _timeless(line: str) -> dict[str, Any]:
    timed = ("step_ms", "tokens_per_second", "train_seconds", "mfu")
    return {key: value for key, value in json.loads(line).items() if key not in timed}


@exit_with_a_sentence
def main() -> int:
    a = tyro.cli(Arguments, description=__doc__)
    if not 0 < a.minutes < float("inf"):
        raise BadInput(f"--minutes {a.minutes}: must be a positive number")
    if a.updates is not None and a.updates < 1:
        raise BadInput(f"--updates {a.updates}: must be at least 1")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        updates = a.updates
        if updates is None:
            update_seconds = train_to_the_end(folder, "probe", PROBE_UPDATES, a.data) / PROBE_UPDATES
            updates = max(PROBE_UPDATES, round(REFERENCE_SHARE * 60 * a.minutes / update_seconds))
        undisturbed = train_to_the_end(folder, "reference", updates, a.data)
        done = torment(folder, "tormented", updates, a.data, random.Random(a.seed), undisturbed)
        differ = differences(folder / "tormented", folder / "reference")
    minutes = (time.monotonic() - began) / 60
    print(
        f"{updates} updates, {done['starts']} starts, {done['kills']} kills survived, {done['cut_checkpoints']} newest "
        f"checkpoints cut in half, {minutes:.1f} minutes: {'the same to the bit' if not differ else 'NOT THE SAME'}"
    )
    for difference in differ:
        print(f"differs: {difference}")
    if a.json:
        described = {"command": " ".join(sys.argv), "date": time.strftime("%Y-%m-%d"), **identity.provenance()}
        files.write_json(a.json, described | done | {"updates": updates, "minutes": minutes, "differ": differ})
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
