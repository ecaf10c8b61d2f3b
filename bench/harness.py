"""What benchmarks share: flags, refusal of wrong results, interleaved timing, tables, and the JSON file at the end.

    require("X Xt", gram(X), X.double() @ X.double().mT, allowed=1e-3)
    seconds = interleaved({"ours": lambda i: gram(X), "torch.bmm": lambda i: torch.bmm(X, X.mT)}, device, repeats=100)
    print_table([{"candidate": name, "us": f"{1e6 * quartiles(s)[1]:.1f}"} for name, s in seconds.items()])

A wrong result is never timed. Candidates take turns, so that a clock that drifts slows all of them alike.
"""

import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import machine
from engine import files
from engine.speed import point, seconds_between
from kernels.newton_schulz import coefficient_schedule

NS_STEPS, NS_COEFFICIENTS = 5, "polar_express"  # of every Newton-Schulz that is checked or timed
NUMBER = re.compile(r"-?[\d.,]+[%x]?|-")


@dataclass(frozen=True, kw_only=True)
class JsonFlag:
    """The flag of every benchmark."""

    json: Path | None = None
    """Write the figures here too, with the machine, the command and the date."""


def this_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The norm of the error over the norm of `exact`; infinite where something is not finite."""
    exact = exact.double()
    return ((found.double() - exact).norm() / exact.norm()).nan_to_num(torch.inf).item()


def fault(found: Tensor, exact: Tensor, allowed: float, than: str = "float64") -> str | None:
    """The error of `found` in words, None where it is allowed."""
    error = relative_error(found, exact)
    return None if error <= allowed else f"differs from {than} by {error:.2g}, not timed"


def require(what: str, found: Tensor, exact: Tensor, allowed: float, than: str = "float64") -> None:
    """SystemExit that names `what` where it is wrong."""
    if wrong := fault(found, exact, allowed, than):
        sys.exit(f"{what} {wrong}")


def polynomials(X: Tensor, coefficients: str = NS_COEFFICIENTS) -> Tensor:
    """Newton-Schulz of normalised matrices in float64, from its formula: X <- a X + b A X + c A A X with A = X Xᵀ."""
    X, tall = X.double(), X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X  # the same polynomial of X, on the small side
    for a, b, c in coefficient_schedule(coefficients, NS_STEPS):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


def interleaved(
    candidates: dict[str, Callable[[int], Any]], device: torch.device, repeats: int, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds of each candidate(i) in turn, by events on a GPU and by the clock on a CPU.

    `i` counts from -warmup to repeats - 1, negative ones are not timed; it may pick the input ("cold" or "hot").
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(-warmup, repeats):
        for name, run in candidates.items():
            start = point(device)
            run(i)
            taken = seconds_between(start, point(device))
            if i >= 0:
                seconds[name].append(taken)
    return seconds


def quartiles(seconds: Sequence[float]) -> list[float]:
    """First quartile, median, third quartile; of one value, that value."""
    return statistics.quantiles(seconds, n=4) if len(seconds) > 1 else list(seconds) * 3


def print_table(rows: Sequence[dict[str, str]]) -> None:
    """Rows of the same columns under their header; columns of numbers are aligned to the right."""
    columns = {name: [name, *(row[name] for row in rows)] for name in rows[0]}
    for name, cells in columns.items():
        width = max(map(len, cells))
        right = all(map(NUMBER.fullmatch, cells[1:]))
        columns[name] = [cell.rjust(width) if right else cell.ljust(width) for cell in cells]
    for line in zip(*columns.values(), strict=True):
        print("  ".join(line).rstrip(), flush=True)


def write_figures(path: Path | None, figures: dict[str, Any]) -> None:
    """The file of --json, if there is one."""
    if path:
        files.write_json(path, {"command": " ".join(sys.argv)} | machine.facts() | figures)
