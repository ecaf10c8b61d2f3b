"""A suite's runs, loaded: conditions with their losses, the tests between them, rates, times to a loss, fairness.

    results = Results.load(SUITES["moe-momentum"], planned); results.tests(); results.fairness()

Reads only the files of the runs; runs that are missing or in progress are counted, not invented.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.runs import Run, load_run
from analysis.stats import (
    STEADY,
    Contrast,
    Reached,
    Tolerance,
    family,
    finite_only,
    first_reaching,
    learning_rate_tolerance,
    median_time,
)
from engine import files
from engine.identity import NOT_COMPARED
from suites.arms import Axis
from suites.launcher import diverged
from suites.suite import AS_WRITTEN, Condition, Suite

TOLERANCES = (0.01, 0.05)  # shares of the best loss by which a good rate may miss it
# Settings without a meaning for one of the two optimizers.
NOT_SHARED = {"optimizer", "optimizer_options", "lr", "left_lr", "momentum", "nesterov", "muon_on", "normalize_rows"}
NOT_SHARED |= {"ns_steps", "ns_coefficients", "ns_method", "ns_before_momentum", "lr_scale", "decay_rule"}
NOT_SHARED |= {"heads_per_matrix"}
SAME = ("weight decay", "schedule", "clipping", "validation tokens")


@dataclass(frozen=True)
class Outcome:
    """A condition and its runs: `failed` of the `planned` ones did; `runs` are those with a folder."""

    condition: Condition
    planned: int
    failed: int
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        return self.condition.name

    @property
    def optimizer(self) -> str:
        return str(self.condition.fields["optimizer"])

    @property
    def arm(self) -> str:
        return self.condition.arm

    @property
    def as_written(self) -> bool:
        return self.name.endswith(AS_WRITTEN)

    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.status == "finished"]

    def values(self, value_of: Callable[[Run], float]) -> dict[int, float]:
        """A number of each finished run by seed, where it is one."""
        return finite_only({run.config["seed"]: value_of(run) for run in self.finished()})

    def losses(self) -> dict[int, float]:
        return self.values(lambda run: run.final_loss)

    @property
    def seconds_per_token(self) -> float:
        """Of training, the median over its runs; NaN before one has finished."""
        seconds = [1 / run.tokens_per_second for run in self.finished()]
        return float(np.median(seconds)) if seconds else math.nan

    @property
    def slowdown(self) -> float:
        """A step of its slowest run over one of its fastest; NaN before a run has finished."""
        times = list(self.values(lambda run: run.step_ms).values())
        return max(times) / min(times) if times else math.nan

    @property
    def busy(self) -> bool:
        """Whether the step times of its seeds differ by more than STEADY, as they do next to other work."""
        return self.slowdown > STEADY

    @property
    def steady(self) -> bool:
        """Whether they differ by at most STEADY; False before a run has finished."""
        return self.slowdown <= STEADY

    @property
    def loss(self) -> float:
        """Mean final loss; NaN if a run of the condition failed: the mean of those that did not would flatter it."""
        losses = self.losses()
        return float(np.mean(list(losses.values()))) if losses and not self.failed else math.nan

    @property
    def diverged(self) -> int:
        return sum(diverged(run.summary) for run in self.runs)

    @property
    def lost(self) -> int:
        """Runs that failed without diverging: a killed process, no memory, a full disk, bad input."""
        return self.failed - self.diverged

    @property
    def to_go(self) -> int:
        return self.planned - self.failed - len(self.finished())


@dataclass(frozen=True)
class Results:
    """A suite and its outcomes, in the order of its plan."""

    suite: Suite
    outcomes: tuple[Outcome, ...]

    @classmethod
    def load(cls, suite: Suite, planned: Sequence[tuple[Condition, Mapping[Path, str]]]) -> "Results":
        """`planned` has the state of each run by its folder, as launcher.Job.state returns it."""
        outcomes = []
        for condition, states in planned:
            runs = tuple(_load(folder, state) for folder, state in states.items() if (folder / files.CONFIG).exists())
            failed = sum(state == "failed" for state in states.values())
            outcomes.append(Outcome(condition, len(states), failed, runs))
        return cls(suite, tuple(outcomes))

    @property
    def name(self) -> str:
        return self.suite.name

    def runs(self) -> list[Run]:
        return [run for outcome in self.outcomes for run in outcome.runs]

    @property
    def planned(self) -> int:
        return sum(outcome.planned for outcome in self.outcomes)

    def finished(self) -> int:
        return sum(len(outcome.finished()) for outcome in self.outcomes)

    @property
    def to_go(self) -> int:
        return sum(outcome.to_go for outcome in self.outcomes)

    def outcome(self, name: str) -> Outcome | None:
        return next((outcome for outcome in self.outcomes if outcome.name == name), None)

    def pairs(self) -> list[tuple[Outcome, Outcome]]:
        """Each condition with the one it is tested against."""
        found = ((outcome, self.outcome(outcome.condition.versus or "")) for outcome in self.outcomes)
        return [(a, b) for a, b in found if b is not None]

    def crosses(self) -> list[tuple[Outcome, Outcome]]:
        """The fair pairs of two arms that both have a finished run."""
        pairs = [(a, b) for a, b in self.pairs() if a.arm != b.arm and not a.as_written]
        return [(a, b) for a, b in pairs if a.finished() and b.finished()]

    def tests(self, value_of: Callable[[Run], float] | None = None) -> list[Contrast]:
        """Test the final losses (or another number of each run) of every pair, corrected together with the claims'
        further tests on the same runs."""
        of = value_of or (lambda run: run.final_loss)
        return family([(a.name, b.name, a.values(of), b.values(of)) for a, b in self.pairs()], self.suite.extra_tests)

    @property
    def family_size(self) -> int:
        """Tests that are corrected together: of the pairs with two runs a side, and of the claims."""
        tested = sum(min(len(a.losses()), len(b.losses())) > 1 for a, b in self.pairs())
        return max(1, tested + self.suite.extra_tests)

    def of_arm(self, arm: str) -> list[Outcome]:
        return [o for o in self.outcomes if o.arm == arm]

    def arms(self) -> list[str]:
        """In the order of the plan."""
        return list(dict.fromkeys(o.arm for o in self.outcomes))

    def space(self, arm: str) -> Mapping[str, Axis]:
        """The range of each setting that was tuned for the arm."""
        return self.of_arm(arm)[0].condition.space

    def best(self, arm: str) -> Outcome | None:
        """The arm's condition with the least mean loss."""
        tried = [o for o in self.of_arm(arm) if not o.as_written]
        found = [o for o in tried if math.isfinite(o.loss)]
        return min(found, key=lambda o: o.loss, default=None)

    def tolerance(self, arm: str, share: float) -> Tolerance | None:
        """Of a suite that varies the learning rate."""
        tried = self.of_arm(arm)
        return learning_rate_tolerance([o.condition.fields["lr"] for o in tried], [o.loss for o in tried], share)

    def reached(self, a: Outcome, b: Outcome) -> dict[str, Reached]:
        """Tokens and training seconds that either side needed to reach the mean final loss of `b`."""
        found = {}
        for side, outcome in (("a", a), ("b", b)):
            for column in ("tokens", "train_seconds"):
                runs = outcome.finished()
                times = [first_reaching(run.val[column], run.val["val_loss"], b.loss) for run in runs]
                found[f"{side} {column}"] = median_time(times)
        return found

    def fairness(self, by_design: Callable[[Outcome], Iterable[str]] = lambda outcome: ()) -> list[str]:
        """Settings that the arms of a suite share or differ in, from the runs' files; `by_design` names those that were
        chosen for an outcome."""
        pairs = self.crosses()
        if not pairs:
            best = [self.best(arm) for arm in self.arms()]
            pairs = [tuple(best)] if len(best) == 2 and all(best) else []
        if not pairs:
            return []
        differences: dict[str, list[str]] = {}
        chosen: set[str] = set()
        for a, b in pairs:
            left, right = (_shared_settings(outcome) for outcome in (a, b))
            own = {*by_design(a), *by_design(b)}
            chosen |= own
            for key in left:
                if key not in own and left[key] != right[key]:
                    words = f"{_listed(left[key])} for {a.name}, {_listed(right[key])} for {b.name}"
                    differences.setdefault(key, []).append(words)
        lines = [_same_batches(pairs), _same_start(pairs)]
        lines += [f"Deviation: {key} is {'; '.join(words)}." for key, words in differences.items()]
        if chosen:
            lines.append(f"Chosen for each arm: {', '.join(sorted(chosen))}.")
        if not differences:
            same = ("schedule", "clipping", "validation tokens") if chosen else SAME
            lines.append(f"No other setting differs: {', '.join(same[:-1])} and {same[-1]} are the same.")
        return lines

    def settings_from_sweeps(self, others: Mapping[str, "Results"]) -> list[str]:
        """Which setting of which sweep this suite uses, and whether it is on the edge of that sweep's grid."""
        lines = []
        for name in self.suite.needs:
            for arm in others[name].arms() if name in others else ():
                best = others[name].best(arm)
                if best is not None and arm in {*self.arms(), *(o.name for o in self.outcomes)}:
                    edge = ", ON THE EDGE OF THE GRID" if others[name].on_edge(best) else ""
                    lines.append(f"From {name}: {best.name}{edge} (mean loss {best.loss:.4f}).")
        return lines

    def on_edge(self, best: Outcome) -> bool:
        """Whether a condition has the least or greatest value tried, and another lies beyond it."""
        key = self.suite.varies
        tried = [o.condition.fields.get(key) for o in self.of_arm(best.arm)]
        if len(tried) < 3 or not all(isinstance(value, float | int) for value in tried):
            return False
        tried = [math.inf if value == 0 and key == "grad_clip" else value for value in tried]  # there, 0 is no limit
        own = math.inf if best.condition.fields[key] == 0 and key == "grad_clip" else best.condition.fields[key]
        return own in (min(tried), max(tried)) and 0 < own < math.inf


def _shared_settings(outcome: Outcome) -> dict[str, tuple[Any, ...]]:
    """The values of each setting over an outcome's runs, of settings that mean the same to both optimizers."""
    settings = [run.settings() for run in outcome.finished()]
    keys = dict.fromkeys(key for one in settings for key in one if key not in NOT_SHARED | NOT_COMPARED)
    return {key: tuple(dict.fromkeys(one.get(key) for one in settings)) for key in keys}


def _listed(values: tuple[Any, ...]) -> str:
    return " or ".join(map(str, values))


def _same_batches(pairs: Sequence[tuple[Outcome, Outcome]]) -> str:
    """Whether data and seeds agree within every pair."""
    for a, b in pairs:
        for key, words in (("data_fingerprint", "data"), ("seed", "seeds")):
            left, right = (sorted({str(run.config[key]) for run in o.finished()}) for o in (a, b))
            if left != right:
                return f"Deviation: {words} {', '.join(left)} for {a.name}, {', '.join(right)} for {b.name}."
    return "Same batches in the same order: one data fingerprint and the same seeds."


def _same_start(pairs: Sequence[tuple[Outcome, Outcome]]) -> str:
    """Whether every seed's model had the same validation loss before the first step under both optimizers."""
    compared, apart = 0, 0.0
    for a, b in pairs:
        before = [{r.config["seed"]: float(r.val["val_loss"][0]) for r in o.runs if r.val} for o in (a, b)]
        for seed in before[0].keys() & before[1].keys():
            compared += 1
            apart = max(apart, abs(before[0][seed] - before[1][seed]))
    if not compared:
        return "Unknown whether both began with the same weights: no seed is shared."
    if apart:
        return f"Deviation: before the first step the validation losses differ by up to {apart:.2g} nats."
    return "Same initial weights: before the first step the validation losses agree exactly, seed by seed."


@functools.cache
def _load(folder: Path, state: str) -> Run:
    return load_run(folder)
