"""Trainings as processes of their own, and what tests ask of them and their folders."""

import json
import os
import subprocess
import sys
from pathlib import Path

from engine.files import ROOT as REPOSITORY
from tests.conftest import SMALL_MODEL

TEN = ("--tokens", str(10 * 256), "--spectra-every", "5", "--eval-every", "5")


def command(shards_folder, tmp_path, name, *arguments, ranks=0, torchrun=()):
    start = (sys.executable, "train.py")
    if ranks:
        start = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
        start += (*torchrun, "train.py")
    where = ("--data", shards_folder, "--runs-dir", tmp_path, "--name", name, "--no-plots")
    return [*start, *SMALL_MODEL, *map(str, where), *map(str, arguments)]


def run(words, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200, check=False, **options
    )


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def steps_logged(folder):
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["step"] for record in records if record["kind"] == "train"]


def children_of(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def descendants_of(pid):
    return [found for child in children_of(pid) for found in (child, *descendants_of(child))]
