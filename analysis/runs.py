"""Run folders, finished or not: their files read and checked, and runs grouped over seeds.

    run = load_run(Path("runs/my-run")); run.val["val_loss"][-1]; groups = group_seeds([run, other_run])

A damaged or foreign file may hold anything: BadInput names the file, the line and the key.
"""

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine import files
from engine.cli import BadInput
from engine.identity import ADDED_LATER, NOT_COMPARED, PUBLISHED_WITHOUT

MOST_LAYERS = 10_000  # a greater number is damage, and arrays of that size would be allocated
LARGEST = 2**53  # floats do not hold every whole number beyond
RATES = ("lr", "adamw_lr", "weight_decay", "momentum", "warmup", "min_lr", "grad_clip", "dropout", "inner_dropout")
SIZES = ("batch_tokens", "seq_len", "eval_tokens", "vocab_size", "params", "active_params", "tokens", "world_size")
CONFIG_NUMBERS = (*RATES, *SIZES, "unigram_val_loss", "bytes_per_token")
OPTIMIZER_NAMES = {"muon": "Muon", "adamw": "AdamW"}
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")  # in the order they are shown; gate: of swiglu alone


def optimizer_name(optimizer: str) -> str:
    """Of Muon, AdamW, or the class of FILE.py:CLASS."""
    return OPTIMIZER_NAMES.get(optimizer, optimizer.rpartition(":")[2])


def condition_name(name: str, optimizer: str) -> str:
    """'Muon as written' of 'muon as written'; names that do not begin with the optimizer stay."""
    return optimizer_name(optimizer) + name.removeprefix(optimizer) if name.startswith(optimizer) else name


def stem_of(optimizer: str) -> str:
    """The same as part of a file's name: two files' classes of one name stay apart."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", optimizer).strip("_")


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e300


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def is_layer(value: Any) -> bool:
    return is_count(value) and value < MOST_LAYERS


def is_number_or_null(value: Any) -> bool:
    return value is None or is_number(value)


def is_list_of_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_number_or_null, value))


def is_deciles(value: Any) -> bool:
    return is_list_of_numbers(value) and len(value) == files.DECILES


Rule = Callable[[Any], bool]
CONFIG: dict[str, Rule] = {"optimizer": is_text, "seed": is_count, "model": is_text, "steps": is_count}
SUMMARY: dict[str, Rule] = {"status": is_text}
SUMMARY |= dict.fromkeys(("reason", "data_fingerprint", "config_hash"), lambda value: value is None or is_text(value))
LINE: dict[str, Rule] = {"kind": is_text, "step": is_count}
LINES = {
    "train": LINE | {"tokens": is_count, "train_loss": is_number_or_null, "step_ms": is_number_or_null},
    "val": LINE
    | {"tokens": is_count}
    | dict.fromkeys(("val_loss", "val_accuracy", "train_seconds"), is_number_or_null),
    "experts": LINE | {"layer": is_layer, "utilization": is_list_of_numbers},
}
LISTS_OF_VAL: dict[str, Rule] = {"val_loss_by_decile": is_deciles}  # older runs have none
SPECTRA: dict[str, Rule] = {"step": is_count, "layer": is_layer, "proj": is_text, "singular_values": is_list_of_numbers}
MOMENTUM = "momentum_singular_values"  # null where there was no update; older runs have none
LISTS_OF_SPECTRA: dict[str, Rule] = {MOMENTUM: lambda value: value is None or is_list_of_numbers(value)}


def _check(where: str, record: dict[str, Any], rules: dict[str, Rule], other: Rule, needed: Iterable[str]) -> None:
    """The needed keys are there, and every value passes its key's rule, or `other` where there is none."""
    missing = [key for key in needed if key not in record]
    if missing:
        raise BadInput(f"{where}: lacks {', '.join(missing)}")
    for key, value in record.items():
        if not rules.get(key, other)(value):
            words = repr(value)
            raise BadInput(f"{where}: {key} is {words if len(words) <= 40 else words[:37] + '...'}")


def read_config(path: Path) -> dict[str, Any]:
    """A run's settings: flat, with the four that every report needs."""
    read = files.load_json(path)
    rules = CONFIG | dict.fromkeys(CONFIG_NUMBERS, is_number_or_null)
    _check(
        str(path), read, rules, other=lambda value: value is None or isinstance(value, str | int | float), needed=CONFIG
    )
    return read


def read_summary(path: Path) -> dict[str, Any]:
    """How a run ended; empty where there is no such file."""
    read = files.load_json(path) if path.exists() else {}
    _check(str(path), read, SUMMARY, other=is_number_or_null, needed=())
    return read


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    lines = files.read_jsonl(path)
    for number, line in enumerate(lines, start=1):
        kind = line.get("kind")
        if not is_text(kind):
            raise BadInput(f'{path}: line {number} has no "kind"')
        if kind in LINES:
            other = (lambda value: True) if kind == "experts" else is_number_or_null
            _check(f"{path}: line {number}", line, LINES[kind] | LISTS_OF_VAL, other, needed=LINES[kind])
    return lines


def read_spectra(path: Path) -> list[dict[str, Any]]:
    """The lines of manifold_stats.jsonl; all matrices of one projection are of one size."""
    lines = files.read_jsonl(path)
    sizes: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{path}: line {number}"
        _check(where, line, SPECTRA | LISTS_OF_SPECTRA, other=is_number_or_null, needed=SPECTRA)
        proj = line["proj"]
        for size in (len(line["singular_values"]), len(line.get(MOMENTUM) or line["singular_values"])):
            if sizes.setdefault(proj, size) != size:
                raise BadInput(f"{where}: {size} singular values, earlier lines of {proj} have {sizes[proj]}")
    return lines


def read_samples(path: Path) -> tuple[str, list[tuple[str, str]]]:
    """The name of the checkpoint that wrote a run's samples, and of each its prompt and its text; none where there is
    no such file."""
    read = files.load_json(path) if path.exists() else {"checkpoint": "", "samples": []}
    listed = {"checkpoint": is_text, "samples": lambda value: isinstance(value, list)}
    _check(str(path), read, listed, other=is_number_or_null, needed=listed)
    for place, text in enumerate(read["samples"], start=1):
        where, needed = f"{path}: sample {place}", {"prompt": is_text, "text": is_text}
        if not isinstance(text, dict):
            raise BadInput(f"{where} is not an object")
        _check(where, text, needed, other=is_number_or_null, needed=needed)
    return read["checkpoint"], [(text["prompt"], text["text"]) for text in read["samples"]]


@dataclass(frozen=True)
class Run:
    """One run's folder in memory; columns are float arrays with NaN where the file says null, val_loss_by_decile one
    of (validations, 10). `condition` is what a suite calls it, and figures too."""

    path: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    train: dict[str, np.ndarray] = field(repr=False)
    val: dict[str, np.ndarray] = field(repr=False)
    spectra: list[dict[str, Any]] = field(repr=False)
    experts: list[dict[str, Any]] = field(repr=False)
    condition: str = ""

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
    def steps_done(self) -> int:
        """The last step in the files."""
        logged = [int(columns["step"][-1]) for columns in (self.train, self.val) if columns]
        return max(logged, default=0)

    @property
    def tokens(self) -> float:
        logged = [float(columns["tokens"][-1]) for columns in (self.train, self.val) if columns]
        return max(logged, default=0.0)

    @property
    def budget(self) -> int:
        """Training tokens in all; steps where the settings have no batch size."""
        return int(self.config["steps"]) * int(self.config.get("batch_tokens") or 1)

    @property
    def final_loss(self) -> float:
        """The last validation loss of a finished run, NaN for any other."""
        return float(self.val["val_loss"][-1]) if self.status == "finished" and self.val else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Of the last validation, NaN where it was not logged."""
        return float(self.val["val_bpb"][-1]) if "val_bpb" in self.val else math.nan

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
        """Median step time."""
        return float(np.nanmedian(self.train["step_ms"])) if self.train else math.nan

    @property
    def memory_bytes(self) -> float:
        value = self.summary.get("peak_memory_bytes")
        return float(value) if isinstance(value, int | float) else math.nan

    def settings(self) -> dict[str, Any]:
        """The resolved flags: config.json lists them first, derived values from the data fingerprint on."""
        keys = list(self.config)
        end = keys.index("data_fingerprint") if "data_fingerprint" in keys else len(keys)
        return {key: self.config[key] for key in keys[:end]}

    def experiment(self) -> dict[str, Any]:
        """Everything but the seed that decides the result: runs that agree in it are repetitions."""
        complete = ADDED_LATER | PUBLISHED_WITHOUT | self.settings()
        kept = {key: value for key, value in complete.items() if key not in NOT_COMPARED}
        code = {key: value for key, value in self.config.items() if key in ("optimizer_code", "init_fingerprint")}
        return kept | code | {key: self.config.get(key) for key in ("data_fingerprint", "steps")}

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

    def singular_values(self, proj: str, layer: int, key: str = "singular_values") -> tuple[np.ndarray, np.ndarray]:
        """Steps (E,) of the events that have them, and all singular values (E, r), descending; a mean over experts."""
        by_step: dict[int, list[np.ndarray]] = {}
        for line in self._by_projection.get(proj, []):
            if line["layer"] == layer and line.get(key) is not None:
                by_step.setdefault(line["step"], []).append(line[key])
        steps = sorted(by_step)
        return np.array(steps), np.array([np.mean(by_step[step], axis=0) for step in steps], dtype=float)

    def full_rank(self, proj: str) -> int:
        """The smaller side of a projection."""
        return len(self._by_projection[proj][0]["singular_values"])


def load_run(path: Path) -> Run:
    """Read a run's folder, finished or not; BadInput names the folder or file that cannot be read."""
    if not path.is_dir():
        raise BadInput(f"{path}: no such run folder")
    config, summary = read_config(path / files.CONFIG), read_summary(path / files.SUMMARY)
    metrics, spectra = read_metrics(path / files.METRICS), read_spectra(path / files.SPECTRA)
    for line in spectra:
        for key in ("singular_values", MOMENTUM):
            if line.get(key) is not None:
                line[key] = np.array(line[key], dtype=np.float32)  # an eighth of the list's memory
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
    """The folder itself, or, where it is not a run but holds runs, these in the order of their names."""
    if (path / files.CONFIG).exists() or not path.is_dir():
        return [path]
    return sorted(folder.parent for folder in path.glob(f"*/{files.CONFIG}")) or [path]


def load_runs(folders: Iterable[Path]) -> list[Run]:
    """The runs of all folders, each once."""
    return [load_run(folder) for folder in {folder.resolve(): folder for folder in folders}.values()]


def bits_per_nat(runs: Sequence[Run]) -> float:
    """How many bits per byte a nat per token is, NaN where the runs are not validated on the same tokens. Older runs
    did not log the bytes of a token: those of the others hold for them too."""
    tokens = {tuple(run.config.get(key) for key in ("data_fingerprint", "eval_tokens", "seq_len")) for run in runs}
    sizes = {run.config["bytes_per_token"] for run in runs if run.config.get("bytes_per_token")}
    return 1 / (sizes.pop() * math.log(2)) if len(tokens) == len(sizes) == 1 else math.nan


def _whole_events(spectra: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the last event where a running or killed run has written only some of its lines."""
    counts = Counter(line["step"] for line in spectra)
    if not counts or counts[max(counts)] >= max(counts.values()):
        return spectra
    return [line for line in spectra if line["step"] != max(counts)]


def _columns(lines: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Each key but the kind as an array, NaN where a line lacks it, as those of an older version do."""
    keys = dict.fromkeys(key for line in lines for key in line if key != "kind")
    absent = dict.fromkeys(keys) | {key: [None] * files.DECILES for key in LISTS_OF_VAL}
    return {key: np.array([line.get(key, absent[key]) for line in lines], dtype=float) for key in keys}


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
        """The finished runs with a finite final loss, one for each seed: a repeated seed is not a new sample."""
        by_seed = {run.config["seed"]: run for run in self.runs if math.isfinite(run.final_loss)}
        return list(by_seed.values())

    def pool(self) -> list[Run]:
        """The runs to average over: `samples`, or, where none has finished, one for each seed."""
        return self.samples() or list({run.config["seed"]: run for run in self.runs}.values())

    def losses_by_seed(self) -> dict[int, float]:
        return {run.config["seed"]: run.final_loss for run in self.samples()}

    def losses(self) -> list[float]:
        return list(self.losses_by_seed().values())

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
        """Mean of an attribute of `Run` over the finished runs, over all runs if none has finished."""
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
