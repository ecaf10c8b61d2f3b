"""Numbers from finished or running runs: load a run's files, intervals over seeds, time to a loss.

    run = load_run(Path("runs/my-run")); run.val["val_loss"][-1]

Reads only files in runs/; needs NumPy and SciPy, never torch.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats as scipy_stats

import runfiles
from cli import BadInput

PROJECTIONS = ("q", "k", "v", "o", "up", "down")  # the six that every dense model logs, in the order they are shown


@dataclass(frozen=True)
class Run:
    """One run's folder in memory; columns are float arrays with NaN where the file says null."""

    path: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    train: dict[str, np.ndarray]
    val: dict[str, np.ndarray]
    spectra: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def optimizer(self) -> str:
        return str(self.config["optimizer"])

    @property
    def status(self) -> str:
        return str(self.summary.get("status", "running"))

    def projections(self) -> list[str]:
        logged = {line["proj"] for line in self.spectra}
        return [name for name in PROJECTIONS if name in logged]

    def grid(self, proj: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Event steps (E,) and the metric as (layers, E), NaN where it is null."""
        lines = [line for line in self.spectra if line["proj"] == proj]
        steps = np.array(sorted({line["step"] for line in lines}))
        layers = 1 + max((line["layer"] for line in lines), default=-1)
        values = np.full((layers, len(steps)), np.nan)
        for line in lines:
            if line[key] is not None:
                values[line["layer"], np.searchsorted(steps, line["step"])] = line[key]
        return steps, values

    def singular_values(self, proj: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Event steps (E,) and all singular values (E, r), descending."""
        lines = [line for line in self.spectra if line["proj"] == proj and line["layer"] == layer]
        values = np.array([line["singular_values"] for line in lines], dtype=float)
        return np.array([line["step"] for line in lines]), values


def load_run(path: Path) -> Run:
    """Read a run's folder, finished or not; BadInput names the folder or file that cannot be read."""
    if not path.is_dir():
        raise BadInput(f"{path}: no such run folder")
    config = runfiles.load_json(path / runfiles.CONFIG)
    summary_path = path / runfiles.SUMMARY
    metrics = _read_jsonl(path / runfiles.METRICS)
    missing = {"optimizer", "seed", "model", "steps"} - config.keys()
    if missing:
        raise BadInput(f"{path / runfiles.CONFIG}: lacks {', '.join(sorted(missing))}")
    spectra = _read_jsonl(path / runfiles.SPECTRA)
    for line in spectra:
        if not {"step", "layer", "proj", "singular_values"} <= line.keys():
            raise BadInput(f"{path / runfiles.SPECTRA}: a line lacks step, layer, proj or singular_values")
    return Run(
        path=path,
        config=config,
        summary=runfiles.load_json(summary_path) if summary_path.exists() else {},
        train=_columns([line for line in metrics if line.get("kind") == "train"]),
        val=_columns([line for line in metrics if line.get("kind") == "val"]),
        spectra=spectra,
    )


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, none if it is missing; a torn last line of a running run is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise BadInput(f"{path}: line {number} is not JSON") from None
    return records


def _columns(lines: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    keys = [key for key in lines[0] if key != "kind"] if lines else []
    return {key: np.array([line.get(key) for line in lines], dtype=float) for key in keys}


def t_interval(values: list[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and the Student-t confidence interval of independent runs; NaN bounds for fewer than two."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    half = scipy_stats.t.ppf((1 + confidence) / 2, len(values) - 1) * scipy_stats.sem(values)
    return mean, mean - float(half), mean + float(half)


def first_reaching(x: np.ndarray, loss: np.ndarray, target: float) -> float | None:
    """The x (steps, seconds) at which the loss is first at `target`, linear between validations; None if never."""
    below = np.flatnonzero(loss <= target)
    if not len(below):
        return None
    i = int(below[0])
    if i == 0:
        return float(x[0])
    share = (loss[i - 1] - target) / (loss[i - 1] - loss[i])
    return float(x[i - 1] + share * (x[i] - x[i - 1]))
