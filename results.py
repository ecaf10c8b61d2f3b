"""A suite's runs, loaded: conditions with their losses, the tests between them, rates, times to a loss, fairness.

    results = Results.load(SUITES["moe-momentum"], planned); results.tests(); results.fairness()

Reads only the files of the runs; runs that are missing or under way are counted, not invented.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import runfiles
from inference import Reached, Test, family, finite, median_time
from stats import Group, Run, Tolerance, first_reaching, learning_rate_tolerance, load_run
from suites import OPTIMIZERS, Condition, Suite

TOLERANCES = (0.01, 0.05)  # shares of the best loss by which a good rate may miss it
# Settings without a meaning for one of the two optimizers, and those that only say where a run was made.
NOT_SHARED = {"optimizer", "lr", "momentum", "nesterov", "ns_steps", "ns_coefficients", "ns_method", "lr_scale"}
ELSEWHERE = {"name", "runs_dir", "seed", "micro_batch", "resume", "log", "log_every", "plots", "compile", "kernels"}


@dataclass(frozen=True)
class Outcome:
    """A condition and what came of its runs."""

    condition: Condition
    planned: int
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        return self.condition.name

    @property
    def optimizer(self) -> str:
        return str(self.condition.fields["optimizer"])

    @property
    def group(self) -> Group:
        return Group(self.runs)

    def values(self, value_of: Callable[[Run], float]) -> dict[int, float]:
        """A number of each finished run by seed, where it is one."""
        return finite({run.config["seed"]: value_of(run) for run in self.runs if run.status == "finished"})

    def losses(self) -> dict[int, float]:
        return self.values(lambda run: run.final_loss)

    @property
    def loss(self) -> float:
        """Mean final loss; NaN if a run of the condition failed: the mean of those that did not would flatter it."""
        losses = self.losses()
        return float(np.mean(list(losses.values()))) if losses and not self.failed else math.nan

    @property
    def failed(self) -> int:
        return sum(run.status == "failed" for run in self.runs)

    @property
    def to_go(self) -> int:
        return self.planned - self.failed - sum(run.status == "finished" for run in self.runs)


@dataclass(frozen=True)
class Results:
    """A suite and its outcomes, in the order of its plan; conditions without a run are left out."""

    suite: Suite
    outcomes: tuple[Outcome, ...]
    planned_runs: int

    @classmethod
    def load(cls, suite: Suite, planned: Sequence[tuple[Condition, Sequence[Path]]]) -> "Results":
        outcomes = []
        for condition, folders in planned:
            runs = tuple(_load(folder) for folder in folders if (folder / runfiles.CONFIG).exists())
            if runs:
                outcomes.append(Outcome(condition, len(folders), runs))
        return cls(suite, tuple(outcomes), sum(len(folders) for _, folders in planned))

    @property
    def name(self) -> str:
        return self.suite.name

    def runs(self) -> list[Run]:
        return [run for outcome in self.outcomes for run in outcome.runs]

    def finished(self) -> int:
        return sum(run.status == "finished" for run in self.runs())

    def outcome(self, name: str) -> Outcome | None:
        return next((outcome for outcome in self.outcomes if outcome.name == name), None)

    def pairs(self) -> list[tuple[Outcome, Outcome]]:
        """Each condition with the one it is tested against, as far as both have runs."""
        found = ((outcome, self.outcome(outcome.condition.versus or "")) for outcome in self.outcomes)
        return [(a, b) for a, b in found if b is not None]

    def tests(self, others: int = 0, value_of: Callable[[Run], float] | None = None) -> list[Test]:
        """The final losses (or another number of each run) of every pair, corrected together."""
        of = value_of or (lambda run: run.final_loss)
        return family([(a.name, b.name, a.values(of), b.values(of)) for a, b in self.pairs()], others)

    def best(self, optimizer: str) -> Outcome | None:
        """The condition with the least mean loss."""
        found = [o for o in self.outcomes if o.optimizer == optimizer and math.isfinite(o.loss)]
        return min(found, key=lambda o: o.loss, default=None)

    def optimizers(self) -> list[str]:
        return [name for name in OPTIMIZERS if any(o.optimizer == name for o in self.outcomes)]

    def tolerance(self, optimizer: str, share: float) -> Tolerance | None:
        """Of a suite that varies the learning rate."""
        tried = [o for o in self.outcomes if o.optimizer == optimizer]
        return learning_rate_tolerance([o.condition.fields["lr"] for o in tried], [o.loss for o in tried], share)

    def reached(self, a: Outcome, b: Outcome) -> dict[str, Reached]:
        """How long either side took to the mean final loss of `b`, in tokens and in seconds of training."""
        found = {}
        for side, outcome in (("a", a), ("b", b)):
            for column in ("tokens", "train_seconds"):
                runs = [run for run in outcome.runs if run.val]
                times = [first_reaching(run.val[column], run.val["val_loss"], b.loss) for run in runs]
                found[f"{side} {column}"] = median_time(times)
        return found

    def fairness(self) -> list[str]:
        """What the two optimizers of a suite share and where they differ, from what the runs recorded."""
        pairs = [(a, b) for a, b in self.pairs() if a.optimizer != b.optimizer]
        if not pairs:
            pairs = [p for p in [tuple(self.best(name) for name in self.optimizers())] if len(p) == 2 and all(p)]
        if not pairs:
            return []
        lines, differences = [], {}
        for a, b in pairs:
            left, right = (o.runs[0].settings() for o in (a, b))
            for key in sorted(set(left) | set(right)):
                if left.get(key) != right.get(key) and key not in NOT_SHARED | ELSEWHERE:
                    differences.setdefault(key, []).append(
                        f"{left.get(key)} for {a.name}, {right.get(key)} for {b.name}"
                    )
        fingerprints = {run.config["data_fingerprint"] for run in self.runs()}
        orders = "one data fingerprint and the same seeds" if len(fingerprints) == 1 else "DIFFERENT data"
        lines.append(f"Same batches in the same order: {orders}.")
        lines.append(_same_start(pairs))
        for key, words in differences.items():
            lines.append(f"Deviation: {key} is {'; '.join(dict.fromkeys(words))}.")
        if not differences:
            lines.append(
                "No other setting differs: weight decay, schedule, clipping and validation tokens are the same."
            )
        return lines


def _same_start(pairs: Sequence[tuple[Outcome, Outcome]]) -> str:
    """Whether every seed's model had the same validation loss before the first update under both optimizers."""
    compared, apart = 0, 0.0
    for a, b in pairs:
        before = [{r.config["seed"]: float(r.val["val_loss"][0]) for r in o.runs if r.val} for o in (a, b)]
        for seed in before[0].keys() & before[1].keys():
            compared += 1
            apart = max(apart, abs(before[0][seed] - before[1][seed]))
    if not compared:
        return "Whether both began with the same weights cannot be told: no seed is shared."
    if apart:
        return f"Deviation: before the first update the validation losses differ by up to {apart:.2g} nats."
    return (
        f"Same initial weights: before the first update the validation losses agree exactly, in all {compared} pairs."
    )


@functools.cache
def _load(folder: Path) -> Run:
    return load_run(folder)
