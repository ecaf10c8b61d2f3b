"""Suites as jobs: which runs a suite needs, in which order, under which names.

    planner = Planner(Selection(suite="moe-momentum", scale="nano")); planner.plan("moe-momentum")

Runs are named by a hash of their settings, so suites share those they have in common and a finished run is never
trained twice.
"""

import dataclasses
import fnmatch
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from engine.cli import BadInput, Count
from engine.identity import MEASUREMENT, NOT_LEARNED, config_hash
from engine.ranks import Rank
from settings import Settings, identity, resolve
from suites.catalog import SCALES, SUITES, Condition, Fields, with_needs
from suites.launcher import OVER, Job, Later
from suites.results import Results

EVERYTHING = "everything"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which runs, and where they are."""

    suite: tyro.conf.Positional[str]
    """A suite of `list`, or everything."""
    scale: Literal["full", "nano"] = "full"
    """The documents' sizes, or the same experiments on a model for two CPU cores."""
    only: str | None = None
    """Only conditions whose name matches this pattern, as in "muon*"; of the suite named, not of those it needs."""
    seeds: tuple[int, ...] | None = None
    """Other seeds than the suite's; of the suite named, not of those it needs."""
    tokens: Count | None = None
    """Another budget for every run: a first look. Such runs are kept apart from the suite's own."""
    data: Path | None = None
    """Folder of token shards (default: the embedded shards that make speedrun builds)."""
    runs_dir: Path | None = None
    """Where the runs are (default: runs/experiments-<scale>)."""

    @property
    def folder(self) -> Path:
        return self.runs_dir or Path("runs") / f"experiments-{self.scale}"

    def suites(self) -> list[str]:
        if self.suite != EVERYTHING and self.suite not in SUITES:
            raise BadInput(f"{self.suite}: no such suite; choose from {', '.join(SUITES)} or {EVERYTHING}")
        return list(SUITES) if self.suite == EVERYTHING else [self.suite]


class NotYet(BadInput):
    """A suite cannot be planned before the runs of another are over."""


@dataclass(frozen=True)
class Planned:
    """A condition of a suite with its runs, one for each seed."""

    condition: Condition
    jobs: tuple[Job, ...]


class Planner:
    """Suites as jobs; a suite that takes up another's winners can be planned when that one's runs are over."""

    def __init__(self, chosen: Selection) -> None:
        self.chosen, self.scale = chosen, SCALES[chosen.scale]

    @functools.cache  # noqa: B019  one planner per command
    def job(self, fields: tuple[tuple[str, Any], ...], seed: int) -> Job:
        """The run of these settings; settings that make the same run give the same name."""
        given = dict(fields) | {"seed": seed}
        if self.chosen.tokens is not None:
            given["tokens"] = self.chosen.tokens
        if self.chosen.data is not None:
            given["data"] = self.chosen.data
        resolved, _, shards = resolve(Settings(**given), Rank())
        # What "auto" precision becomes is the machine's affair: a login node without a GPU plans the same runs.
        said = identity(resolved, shards) | {"precision": given.get("precision", "auto")}
        key = config_hash(said, (NOT_LEARNED | {"seed"}) - set(MEASUREMENT))
        defaults = {f.name: f.default for f in dataclasses.fields(Settings)}
        flags = [word for name, value in given.items() if value != defaults[name] for word in _flag(name, value)]
        return Job(
            name=f"{resolved.model}-{resolved.optimizer}-{key[:10]}-seed{seed}",
            flags=tuple(flags),
            updates=-(-resolved.tokens // resolved.batch_tokens),
            tokens=resolved.tokens,
            runs_dir=self.chosen.folder,
        )

    def plan(self, name: str) -> list[Planned]:
        """The conditions of a suite with their runs; BadInput where a suite that it needs has runs to go."""
        suite, named = SUITES[name], name in self.chosen.suites()
        seeds = self.chosen.seeds if named and self.chosen.seeds is not None else suite.seeds
        conditions = suite.plan(self.scale, self.winner)
        if named and self.chosen.only is not None:
            conditions = [c for c in conditions if fnmatch.fnmatchcase(c.name, self.chosen.only)]
            if not conditions and self.chosen.suite != EVERYTHING:
                raise BadInput(f"--only {self.chosen.only}: no condition of {name} has such a name")
        return [Planned(c, tuple(self.job(tuple(c.fields.items()), seed) for seed in seeds)) for c in conditions]

    def results(self, name: str) -> Results:
        return Results.load(
            SUITES[name], [(p.condition, {job.folder: job.state() for job in p.jobs}) for p in self.plan(name)]
        )

    @functools.cache  # noqa: B019
    def winner(self, name: str, optimizer: str) -> Fields:
        """The settings of a suite's condition with the least mean loss; NotYet until all its runs are over."""
        planned = [p for p in self.plan(name) if p.condition.fields["optimizer"] == optimizer]
        if not planned:
            raise BadInput(f"--only {self.chosen.only}: leaves no run of {optimizer} in {name}, whose best is needed")
        to_go = [job.name for p in planned for job in p.jobs if job.state() not in OVER]
        if to_go:
            raise NotYet(f"{name}: {to_go[0]} has not finished, and its best setting is needed")
        best = self.results(name).best(optimizer)
        if best is None:
            raise BadInput(f"{name}: runs of every setting of {optimizer} failed, so there is no best one")
        return best.condition.fields

    def outline(self, name: str) -> Later:
        """About how much a suite will train whose settings are not known yet."""
        conditions = SUITES[name].plan(self.scale, lambda suite, optimizer: UnknownRates())
        seeds = self.chosen.seeds or SUITES[name].seeds
        tokens = sum(self.chosen.tokens or c.fields["tokens"] for c in conditions)
        return Later(len(conditions) * len(seeds), tokens * len(seeds))

    def stages(self) -> list[list[str]]:
        return with_needs(self.chosen.suites())


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag[2:]]
    return [flag, str(value)]


def unique(planned: Sequence[Planned]) -> list[Job]:
    """Each run once, in the order of the plan."""
    return list({job.name: job for p in planned for job in p.jobs}.values())


class UnknownRates(dict[str, Any]):
    """Stands for settings that a sweep has yet to find, where only the names of conditions are wanted."""

    def __missing__(self, key: str) -> float:
        return 1.0
