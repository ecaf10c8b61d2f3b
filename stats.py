"""Numbers from finished or running runs: load their files, pool seeds, intervals and tests, learning-rate tolerance.

    run = load_run(Path("runs/my-run")); run.val["val_loss"][-1]; compare(*group_seeds([run, other_run])).p_value

Reads only files in runs/; needs NumPy and SciPy, never torch.
"""

import functools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats as scipy_stats

import runcheck
from engine import files
from engine.cli import BadInput
from engine.identity import NOT_COMPARED

PROJECTIONS = ("q", "k", "v", "o", "up", "down")  # the six that every dense model logs, in the order they are shown
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Run:
    """One run's folder in memory; columns are float arrays with NaN where the file says null."""

    path: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    train: dict[str, np.ndarray] = field(repr=False)
    val: dict[str, np.ndarray] = field(repr=False)
    spectra: list[dict[str, Any]] = field(repr=False)
    experts: list[dict[str, Any]] = field(repr=False)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def optimizer(self) -> str:
        return str(self.config["optimizer"])

    @property
    def status(self) -> str:
        return str(self.summary.get("status", "running"))

    @property
    def updates(self) -> int:
        """Updates done, as far as the files tell."""
        logged = [int(columns["step"][-1]) for columns in (self.train, self.val) if columns]
        return max(logged, default=0)

    @property
    def tokens(self) -> float:
        logged = [float(columns["tokens"][-1]) for columns in (self.train, self.val) if columns]
        return max(logged, default=0.0)

    @property
    def budget(self) -> int:
        """Training tokens in all; without a batch size in the settings, the updates."""
        return int(self.config["steps"]) * int(self.config.get("batch_tokens") or 1)

    @property
    def final_loss(self) -> float:
        """The last validation loss of a finished run, NaN for any other."""
        return float(self.val["val_loss"][-1]) if self.status == "finished" and self.val else math.nan

    @property
    def train_seconds(self) -> float:
        if isinstance(self.summary.get("train_seconds"), int | float):
            return float(self.summary["train_seconds"])
        if self.train:
            return float(np.nansum(self.train["step_ms"])) / 1e3
        return float(self.val["train_seconds"][-1]) if self.val else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.train_seconds if self.train_seconds > 0 else math.nan

    @property
    def step_ms(self) -> float:
        """Median time of an update."""
        return float(np.nanmedian(self.train["step_ms"])) if self.train else math.nan

    @property
    def memory_bytes(self) -> float:
        value = self.summary.get("peak_memory_bytes")
        return float(value) if isinstance(value, int | float) else math.nan

    def settings(self) -> dict[str, Any]:
        """The resolved flags: config.json lists them before what was derived from them, data fingerprint first."""
        keys = list(self.config)
        end = keys.index("data_fingerprint") if "data_fingerprint" in keys else len(keys)
        return {key: self.config[key] for key in keys[:end]}

    def experiment(self) -> dict[str, Any]:
        """What decides the result apart from the seed: runs that agree in it are repetitions."""
        kept = {key: value for key, value in self.settings().items() if key not in NOT_COMPARED}
        return kept | {key: self.config.get(key) for key in ("data_fingerprint", "steps")}

    def projections(self) -> list[str]:
        return [name for name in PROJECTIONS if name in self._by_projection]

    @property
    def layers(self) -> int:
        return 1 + max((line["layer"] for line in self.spectra), default=-1)

    @functools.cached_property
    def _by_projection(self) -> dict[str, list[dict[str, Any]]]:
        groups: dict[str, list[dict[str, Any]]] = {}
        for line in self.spectra:
            groups.setdefault(line["proj"], []).append(line)
        return groups

    def grid(self, proj: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Event steps (E,) and the metric as (layers, E), NaN where it is null or absent; a mean over experts."""
        lines = self._by_projection.get(proj, [])
        steps = np.unique([line["step"] for line in lines])
        layers = 1 + max((line["layer"] for line in lines), default=-1)
        sums, counts = np.zeros((2, layers, len(steps)))
        for line in lines:
            if line.get(key) is not None:
                place = line["layer"], np.searchsorted(steps, line["step"])
                sums[place] += line[key]
                counts[place] += 1
        return steps, np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)

    def singular_values(self, proj: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Event steps (E,) and all singular values (E, r), descending; a mean over experts."""
        by_step: dict[int, list[np.ndarray]] = {}
        for line in self._by_projection.get(proj, []):
            if line["layer"] == layer:
                by_step.setdefault(line["step"], []).append(line["singular_values"])
        steps = sorted(by_step)
        return np.array(steps), np.array([np.mean(by_step[step], axis=0) for step in steps], dtype=float)

    def full_rank(self, proj: str) -> int:
        """The smaller side of a projection."""
        return len(self._by_projection[proj][0]["singular_values"])


def load_run(path: Path) -> Run:
    """Read a run's folder, finished or not; BadInput names the folder or file that cannot be read."""
    if not path.is_dir():
        raise BadInput(f"{path}: no such run folder")
    config, summary = runcheck.config(path / files.CONFIG), runcheck.summary(path / files.SUMMARY)
    metrics, spectra = runcheck.metrics(path / files.METRICS), runcheck.spectra(path / files.SPECTRA)
    for line in spectra:
        line["singular_values"] = np.array(line["singular_values"], dtype=np.float32)  # an eighth of a list's memory
    return Run(
        path=path,
        config=config,
        summary=summary,
        train=_columns([line for line in metrics if line["kind"] == "train"]),
        val=_columns([line for line in metrics if line["kind"] == "val"]),
        spectra=_whole_events(spectra),
        experts=[line for line in metrics if line["kind"] == "experts"],
    )


def find_runs(path: Path) -> list[Path]:
    """The folder itself, or, where it is no run but holds runs, these in the order of their names."""
    if (path / files.CONFIG).exists() or not path.is_dir():
        return [path]
    return sorted(folder.parent for folder in path.glob(f"*/{files.CONFIG}")) or [path]


def _whole_events(spectra: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the last event where a running or killed run has written only some of its lines."""
    counts = Counter(line["step"] for line in spectra)
    if not counts or counts[max(counts)] >= max(counts.values()):
        return spectra
    return [line for line in spectra if line["step"] != max(counts)]


def _columns(lines: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    keys = [key for key in lines[0] if key != "kind"] if lines else []
    return {key: np.array([line.get(key) for line in lines], dtype=float) for key in keys}


@dataclass(frozen=True)
class Group:
    """Repetitions of one experiment: runs whose settings agree but for the seed."""

    runs: tuple[Run, ...]

    @property
    def optimizer(self) -> str:
        return self.runs[0].optimizer

    @property
    def config(self) -> dict[str, Any]:
        return self.runs[0].config

    def samples(self) -> list[Run]:
        """The finished runs with a finite final loss, one for each seed: a repeated seed is no new sample."""
        by_seed = {run.config["seed"]: run for run in self.runs if math.isfinite(run.final_loss)}
        return list(by_seed.values())

    def pool(self) -> list[Run]:
        """The runs to average over: `samples`, or one for each seed of whatever there is."""
        return self.samples() or list({run.config["seed"]: run for run in self.runs}.values())

    def losses(self) -> list[float]:
        return [run.final_loss for run in self.samples()]

    @property
    def loss(self) -> float:
        return float(np.mean(self.losses())) if self.losses() else math.nan

    def curve(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Validation steps that all of the pool's runs have (E,), and the column `key` there as (runs, E)."""
        runs = [run for run in self.pool() if run.val]
        if not runs:
            return np.empty(0), np.empty((0, 0))
        steps = functools.reduce(np.intersect1d, [run.val["step"] for run in runs])
        return steps, np.array([run.val[key][np.isin(run.val["step"], steps)][: len(steps)] for run in runs])

    def mean(self, attribute: str) -> float:
        """Mean of a number of `Run` over the finished runs, over all of them if none is finished."""
        values = [getattr(run, attribute) for run in self.samples() or self.runs]
        values = [value for value in values if math.isfinite(value)]
        return float(np.mean(values)) if values else math.nan


def group_seeds(runs: Sequence[Run]) -> list[Group]:
    """Runs pooled over seeds, in the order given; a folder named twice counts once."""
    groups: dict[str, list[Run]] = {}
    for run in {run.path.resolve(): run for run in runs}.values():
        groups.setdefault(json.dumps(run.experiment(), sort_keys=True), []).append(run)
    return [Group(tuple(members)) for members in groups.values()]


def representative(groups: Sequence[Group], most: int) -> list[Group]:
    """At most `most` groups in their order: the best of each optimizer and model, then the second best of each, …"""
    if len(groups) <= most:
        return list(groups)

    def by_loss(group: Group) -> float:
        return group.loss if math.isfinite(group.loss) else math.inf

    families: dict[tuple, list[Group]] = {}
    for group in sorted(groups, key=by_loss):
        families.setdefault((group.optimizer, group.config["model"]), []).append(group)
    ranked = sorted(
        ((place, by_loss(group), group) for family in families.values() for place, group in enumerate(family)),
        key=lambda entry: entry[:2],
    )
    chosen = [group for *_, group in ranked[:most]]
    return [group for group in groups if any(group is one for one in chosen)]


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Mean and the Student-t confidence interval of independent runs; NaN bounds for fewer than two."""
    mean = float(np.mean(values)) if len(values) else math.nan
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = scipy_stats.t.ppf((1 + confidence) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return mean, mean - float(half), mean + float(half)


def welch(a: Sequence[float], b: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float, float]:
    """mean(a) - mean(b), its confidence interval and the two-sided p value, variances not assumed equal (Welch 1947).

    t = (mean a - mean b) / sqrt(va + vb), v = s²/n, with (va + vb)² / (va²/(na-1) + vb²/(nb-1)) degrees of freedom.
    Bounds and p are NaN with fewer than two values on a side, or with no spread on either.
    """
    difference = float(np.mean(a) - np.mean(b)) if len(a) and len(b) else math.nan
    if len(a) < 2 or len(b) < 2:
        return difference, math.nan, math.nan, math.nan
    va, vb = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    if va + vb == 0:
        return difference, math.nan, math.nan, math.nan
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    error = math.sqrt(va + vb)
    half = float(scipy_stats.t.ppf((1 + confidence) / 2, freedom)) * error
    p_value = 2 * float(scipy_stats.t.sf(abs(difference) / error, freedom))
    return difference, difference - half, difference + half, p_value


@dataclass(frozen=True)
class Comparison:
    """Two groups side by side; differences are a - b in nats, ratios a / b, NaN where there is nothing to tell."""

    a: Group
    b: Group
    difference: float
    low: float
    high: float
    p_value: float
    step_time_ratio: float
    speed_ratio: float
    seconds_ratio: float
    memory_ratio: float


def compare(a: Group, b: Group) -> Comparison:
    ratios = [_ratio(a.mean(key), b.mean(key)) for key in ("step_ms", "tokens_per_second", "train_seconds")]
    return Comparison(
        a, b, *welch(a.losses(), b.losses()), *ratios, _ratio(a.mean("memory_bytes"), b.mean("memory_bytes"))
    )


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


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


@dataclass(frozen=True)
class Tolerance:
    """The learning rates around the best whose loss stays near the best one's; `open_*`: the grid ended first."""

    best: float
    low: float
    high: float
    open_low: bool
    open_high: bool

    @property
    def decades(self) -> float:
        return math.log10(self.high / self.low)

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the lowest or highest that was tried."""
        return (self.open_low and self.low == self.best) or (self.open_high and self.high == self.best)


def learning_rate_tolerance(rates: Sequence[float], losses: Sequence[float], share: float = 0.01) -> Tolerance | None:
    """The width of the valley around the best rate within which the loss is at most (1 + share) times the best loss.

    Between grid points the loss is taken as linear in the logarithm of the rate. The valley is the one connected piece
    around the best rate; a loss that is NaN or infinite (a diverged run) ends it at its neighbour towards the best;
    where the grid ends inside, the width is a lower bound. None with no finite loss.
    """
    order = np.argsort(rates)
    exact = np.asarray(rates, dtype=float)[order]
    x, y = np.log(exact), np.asarray(losses, dtype=float)[order]
    if not np.isfinite(y).any():
        return None
    best = int(np.nanargmin(np.where(np.isfinite(y), y, np.nan)))
    limit = y[best] * (1 + share)

    def edge(direction: int) -> tuple[float, bool]:
        i = best
        while 0 <= i + direction < len(y):
            after = i + direction
            if not y[after] <= limit:
                if not np.isfinite(y[after]):
                    return float(exact[i]), False
                return math.exp(x[i] + (limit - y[i]) / (y[after] - y[i]) * (x[after] - x[i])), False
            i = after
        return float(exact[i]), True

    (low, open_low), (high, open_high) = edge(-1), edge(1)
    return Tolerance(float(exact[best]), low, high, open_low, open_high)


def unsteadiness(run: Run, share: float = 0.1) -> float:
    """Standard deviation of the last `share` of the training losses about their line, in nats; NaN below 4 updates."""
    loss = run.train.get("train_loss", np.empty(0))
    last = loss[-max(4, round(share * len(loss))) :]
    if len(loss) < 4 or not np.isfinite(last).all():
        return math.nan
    x = np.arange(len(last))
    return float(np.std(last - np.polyval(np.polyfit(x, last, 1), x), ddof=2))


def largest_spike(run: Run) -> float:
    """Greatest rise of the training loss above its least value so far, in nats; NaN without training."""
    loss = run.train.get("train_loss", np.empty(0))
    loss = loss[np.isfinite(loss)]
    return float(np.max(loss - np.minimum.accumulate(loss))) if len(loss) else math.nan


def thin(x: np.ndarray, y: np.ndarray, most: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """A long curve as at most `most` points, each the mean of as many neighbours."""
    width = math.ceil(len(x) / most) if len(x) else 1
    if width == 1:
        return x, y
    starts = np.arange(0, len(x), width)
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


@functools.cache
def chance_spread(k: int, trials: int = 20_000) -> tuple[float, float]:
    """The middle 95 % of the alignment of two random k-dimensional subspaces, as multiples of its mean.

    In a large dimension d the k x k overlap of the two bases is Gaussian with variance 1/d: its mean singular value
    scales with sqrt(1/d) and its relative spread depends on k alone.
    """
    overlaps = np.random.default_rng(0).standard_normal((trials, k, k))
    means = np.linalg.svd(overlaps, compute_uv=False).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975)) / means.mean()
    return float(low), float(high)
