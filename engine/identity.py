"""What makes two runs the same: the settings that decide what is learned, their hash, and where a run came from.

    config_hash(config); check_same_run("my-run", checkpoint["config"], config); provenance()["git_commit"]

This is the one table of settings that do not count; importing it does not import torch.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.cli import BadInput
from engine.files import ROOT

PLACE = ("data", "data_pattern", "runs_dir", "name", "resume", "log", "log_every", "checkpoint_every", "plots")
PLACE += ("init_from",)  # the hash of its weights counts
SPEED = ("micro_batch", "workers", "threads", "compile", "kernels", "device", "deterministic")
MEASUREMENT = ("eval_every", "eval_tokens", "spectra_every", "sample_every")
# Settings that do not change what is learned: runs that differ only here have the same config_hash.
NOT_LEARNED = frozenset((*PLACE, *SPEED, *MEASUREMENT))
# Runs that differ only here are repetitions of one experiment: the same settings, measured on the same tokens.
NOT_COMPARED = (NOT_LEARNED - {"eval_tokens"}) | {"seed"}


# Settings that checkpoints of before do not have, with the value that means the same: it is not hashed.
ADDED_LATER = {"decay_on": "blocks", "muon_on": "blocks", "ns_before_momentum": False, "inner_dropout": 0.0}
ADDED_LATER |= {"normalize_rows": False, "decay_rule": "plain", "heads_per_matrix": 0, "optimizer_options": None}
ADDED_LATER |= {"left_lr": None}
# Settings that are newer than published runs, at the value those runs have: left out of the names of suites' runs.
PUBLISHED_WITHOUT = {"doc_mask": False, "packing": "stream", "sample_every": 0}


def config_hash(config: dict[str, Any], leave_out: Iterable[str] = NOT_LEARNED) -> str:
    """16 hex digits over the settings that decide what is learned."""
    left_out = set(leave_out) | {key for key, value in ADDED_LATER.items() if config.get(key) == value}
    kept = {key: value for key, value in config.items() if key not in left_out}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def check_same_run(name: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """BadInput that names every setting in which the run to resume differs from the one requested."""
    if old["config_hash"] == new["config_hash"]:
        return
    hashed = list(new)[: list(new).index("vocab_size") + 1]  # config.json lists the hashed settings first
    old = ADDED_LATER | old
    changed = [key for key in hashed if key not in NOT_LEARNED and old.get(key) != new[key]]
    differences = ", ".join(f"{key} was {old.get(key)}, is {new[key]}" for key in changed)
    raise BadInput(f"--resume {name}: its settings differ ({differences}); repeat them or choose another name")


def provenance() -> dict[str, Any]:
    """Commit and versions that a run's config.json records; None where something is absent."""
    versions = {}
    for package in ("torch", "triton", "numpy", "tokenizers", "datasets"):
        try:
            versions[f"{package}_version"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[f"{package}_version"] = None
    return {"git_commit": _git_commit(), "python_version": platform.python_version(), **versions}


def _git_commit() -> str | None:
    """The commit of this source tree, with + where tracked files differ from it; None where it is not a repository of
    its own (unpacked inside another one, say)."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def git(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = ("git", "-C", str(ROOT), *words)
        return subprocess.run(command, capture_output=True, text=True, check=check, env=environment)

    try:
        if Path(git("rev-parse", "--show-toplevel").stdout.rstrip("\n")).resolve() != ROOT:
            return None
        commit = git("rev-parse", "HEAD").stdout.strip()
        return commit + "+" * bool(git("diff", "--quiet", "HEAD", check=False).returncode)
    except (OSError, subprocess.CalledProcessError):
        return None
