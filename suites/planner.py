"""Turn suites into jobs: the runs that a suite needs, their order and their names.

    planner = Planner(Selection(suite="moe-momentum", scale="nano")); planner.plan("moe-momentum")

A hash of its settings names a run, so suites share the runs that they have in common, and a finished run is never
trained twice.
"""

import dataclasses
import fnmatch
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from engine.cli import AT_LEAST_1, BadInput, Count, Limit
from engine.identity import MEASUREMENT, NOT_LEARNED, PUBLISHED_WITHOUT, config_hash
from engine.own_optimizer import class_name
from engine.ranks import Rank
from settings import Settings, identity, resolve
from suites.catalog import SUITES, with_needs
from suites.cost import run_seconds, weight_bytes
from suites.fair import FIGHT, TRIALS, chosen_fight
from suites.launcher import OVER, Job, LaterStages
from suites.results import Results
from suites.scales import SCALES, Fields, Scale
from suites.suite import GROUPS, MOST_GROWTH, RETESTS, Condition, grown


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Selects runs and their folder."""

    suite: tyro.conf.Positional[str]
    """Choose a suite of `list`, or everything (those that repeat a document), or retests (those that test a paper)."""
    scale: Literal["full", "nano"] = "full"
    """Use the documents' sizes, or the same experiments on a model for two CPU cores."""
    only: str | None = None
    """Keep only conditions whose name matches this pattern, as in "muon*"; the suites that it needs stay whole."""
    seeds: tuple[int, ...] | None = None
    """Use these seeds instead of the suite's, and for the suites that it needs; these use as many others where the
    suite confirms what they chose."""
    tokens: Count | None = None
    """Train every run on this many tokens, for a first look; such runs have names of their own."""
    arms: tuple[str, ...] | None = None
    """Let these arms fight, the first as the reference: names of suites/arms.py, or FILE.py:CLASS for an optimizer of
    your own (fair-fight; default: adamw muon)."""
    space: tuple[str, ...] | None = None
    """Tune an optimizer of your own in these ranges, as lr=0.1:3 momentum=0.7:0.99, or fix an option, as
    nesterov=True (fair-fight)."""
    trials: Annotated[int, Limit("must be at least 4", lambda value: value >= 4)] | None = None
    """Draw so many settings for each arm (fair-fight; default: 32)."""
    steps: Annotated[int, AT_LEAST_1] | None = None
    """Train each trial, and the slowest arm of the fight, for so many steps (fair-fight; default: the scale's)."""
    data: Path | None = None
    """Read this folder of token shards (default: the embedded shards that make speedrun builds)."""
    runs_dir: Path | None = None
    """Keep the runs in this folder (default: runs/experiments-<scale>)."""

    @property
    def folder(self) -> Path:
        return self.runs_dir or Path("runs") / f"experiments-{self.scale}"

    def suites(self) -> list[str]:
        if self.suite in GROUPS:
            return [name for name, suite in SUITES.items() if suite.group == self.suite]
        if self.suite not in SUITES:
            raise BadInput(f"{self.suite}: no such suite; choose from {', '.join(SUITES)} or {' or '.join(GROUPS)}")
        return [self.suite]

    def scaled(self) -> Scale:
        """The scale, with the fight that the flags choose."""
        given = {flag: getattr(self, flag) for flag in ("arms", "space", "trials", "steps")}
        used = [flag for flag, value in given.items() if value is not None]
        ours = self.suite in (TRIALS, FIGHT)
        if used and not ours:
            raise BadInput(f"--{used[0]}: belongs to {TRIALS} and {FIGHT}, not to {self.suite}")
        if ours and self.tokens is not None:
            raise BadInput(f"--tokens: {self.suite} counts its budget in --steps")
        return dataclasses.replace(SCALES[self.scale], fight=chosen_fight(SCALES[self.scale].fight, **given))


class NotYet(BadInput):
    """A suite cannot be planned before the runs of another suite are over."""


@dataclass(frozen=True)
class Planned:
    """A condition of a suite with its runs, one per seed."""

    condition: Condition
    jobs: tuple[Job, ...]


def run_name(values: Mapping[str, Any]) -> str:
    """Model, optimizer, hash of all settings but the seed, seed: of the values that settings.identity gives."""
    hashed = {k: v for k, v in values.items() if k not in PUBLISHED_WITHOUT or v != PUBLISHED_WITHOUT[k]}
    key = config_hash(hashed, (NOT_LEARNED | {"seed"}) - set(MEASUREMENT))
    return f"{values['model']}-{class_name(values['optimizer'])}-{key[:10]}-seed{values['seed']}"


class Planner:
    """Plans suites; one that uses the winners of another can be planned when the runs of that one are over."""

    def __init__(self, chosen: Selection) -> None:
        chosen.suites()  # refuses an unknown one
        self.chosen, self.scale = chosen, chosen.scaled()

    @functools.cache  # noqa: B019  one planner per command
    def job(self, fields: tuple[tuple[str, Any], ...], seed: int) -> Job:
        """The run with these settings; settings that train the same model give the same name."""
        given = {**self.scale.fixed, **dict(fields), "seed": seed}
        if self.chosen.tokens is not None:
            given["tokens"] = self.chosen.tokens
        if self.chosen.data is not None:
            given["data"] = self.chosen.data
        here = {"workers": 1, "threads": 1, "compile": "off"}  # the machine that trains chooses them
        resolved, config, shards = resolve(Settings(**here | given), Rank())
        # "auto" precision stays "auto" in the name, so that a login node without a GPU plans the same runs.
        values = identity(resolved, shards) | {"precision": given.get("precision", "auto")}
        defaults = {f.name: f.default for f in dataclasses.fields(Settings)}
        words = [word for name, value in given.items() if value != defaults[name] for word in _flag(name, value)]
        return Job(
            name=run_name(values),
            flags=tuple(words),
            steps=resolved.steps,
            tokens=resolved.tokens,
            runs_dir=self.chosen.folder,
            seconds=run_seconds(given, resolved.tokens),
            weight_bytes=weight_bytes(config, shards.vocab_size),
        )

    def plan(self, name: str) -> list[Planned]:
        """The conditions of a suite with their runs; NotYet if a suite that it needs has runs to go."""
        conditions = SUITES[name].plan(self.scale, self)
        if self._narrowed(name):
            conditions = [c for c in conditions if fnmatch.fnmatchcase(c.name, self.chosen.only)]
            if not conditions and self.chosen.suite not in GROUPS:
                raise BadInput(f"--only {self.chosen.only}: no condition of {name} matches")
        if self.grows(name):
            for _ in range(MOST_GROWTH):
                for arm, edge in self._edges(name, conditions):
                    conditions = grown(conditions, arm, edge)
        return self._planned(name, conditions)

    def _planned(self, name: str, conditions: Sequence[Condition]) -> list[Planned]:
        corpus = self.scale.corpora.get(SUITES[name].source)
        where = {"data": corpus.folder} if corpus is not None and corpus.folder.exists() else {}
        fields = [tuple({**c.fields, **where}.items()) for c in conditions]
        seeds = self.seeds(name)
        return [Planned(c, tuple(self.job(f, s) for s in seeds)) for c, f in zip(conditions, fields, strict=True)]

    def _edges(self, name: str, conditions: Sequence[Condition]) -> list[tuple[str, float]]:
        """Arms whose best rate is on the edge of a sweep, with that rate, once all runs of the sweep are over."""
        planned = self._planned(name, conditions)
        if any(job.state() not in OVER for p in planned for job in p.jobs):
            return []
        results = self._load(name, planned)
        found = [(arm, results.best(arm)) for arm in results.arms()]
        return [(arm, best.condition.fields["lr"]) for arm, best in found if best is not None and results.on_edge(best)]

    def grows(self, name: str) -> bool:
        """Whether a suite is a whole sweep of learning rates."""
        return SUITES[name].varies == "lr" and not self._narrowed(name)

    def _narrowed(self, name: str) -> bool:
        return name in self.chosen.suites() and self.chosen.only is not None

    def grown_sentence(self, name: str) -> str:
        """Which rates a sweep has beyond its grid; empty where it has none."""
        if not self.grows(name):
            return ""
        before = {c.name for c in SUITES[name].plan(self.scale, self)}
        more = [p.condition.name for p in self.plan(name) if p.condition.name not in before]
        return f"  {name}: the best rate was on the edge of the grid, so also {', '.join(more)}" if more else ""

    def seeds(self, name: str) -> tuple[int, ...]:
        """The seeds of a suite: its own, or those of --seeds. Settings must be confirmed on other seeds than those that
        chose them: if the suite asked for confirms, what it needs gets as many others, the least that are free."""
        suite, given = SUITES[name], self.chosen.seeds
        if given is None:
            return suite.seeds_at(self.scale)
        group = self.chosen.suite in GROUPS
        exact = suite.confirms == (self.chosen.suite == RETESTS if group else SUITES[self.chosen.suite].confirms)
        others = (seed for seed in itertools.count() if seed not in given)
        return given if exact else tuple(itertools.islice(others, 1 if suite.one_seed else len(given)))

    def missing_corpora(self) -> list[str]:
        """A sentence for each document whose corpus is not there, so that its suites train on other text."""
        if self.chosen.data is not None:
            return []
        sources = dict.fromkeys(SUITES[name].source for stage in self.stages() for name in stage)
        missing = {source: self.scale.corpora[source] for source in sources if source in self.scale.corpora}
        return [
            f"{source}'s corpus {corpus.folder} is not there: its suites use other shards; {corpus.command} builds it"
            for source, corpus in missing.items()
            if not corpus.folder.exists()
        ]

    def results(self, name: str) -> Results:
        return self._load(name, self.plan(name))

    def _load(self, name: str, planned: Sequence[Planned]) -> Results:
        return Results.load(SUITES[name], [(p.condition, {j.folder: j.state() for j in p.jobs}) for p in planned])

    @functools.cache  # noqa: B019
    def __call__(self, name: str, arm: str) -> Fields:
        """As `suite.Winners`: the settings of the arm's condition with the least mean loss; NotYet until all its runs
        are over."""
        planned = [p for p in self.plan(name) if p.condition.arm == arm]
        if not planned:
            raise BadInput(
                f"--only {self.chosen.only}: leaves no run of {arm} in {name}, but its best setting is needed"
            )
        to_go = [job.name for p in planned for job in p.jobs if job.state() not in OVER]
        if to_go:
            raise NotYet(f"{name}: {to_go[0]} has not finished, and its best setting is needed")
        lost = [job for p in planned for job in p.jobs if job.state() == "failed" and not job.diverged]
        if lost and SUITES[name].one_seed:
            raise NotYet(
                f"{name}: {lost[0].name} failed without diverging ({lost[0].reason()}), so {arm} lacks a trial; "
                "--retry tries it again"
            )
        best = self.results(name).best(arm)
        if best is None:
            raise BadInput(f"{name}: every setting of {arm} has a failed run, so there is no best one")
        return best.condition.fields

    def seconds_per_token(self, name: str, conditions: Sequence[Condition]) -> dict[str, float]:
        """As `suite.Winners`; without the arms of which no run finished."""
        planned = self._planned(name, conditions)
        if any(job.state() not in OVER for p in planned for job in p.jobs):
            return {}
        seconds = {o.arm: o.seconds_per_token for o in self._load(name, planned).outcomes}
        return {arm: value for arm, value in seconds.items() if math.isfinite(value)}

    def estimate(self, stages: Sequence[Sequence[str]]) -> LaterStages:
        """The size of stages whose settings are not known yet. Runs that suites share count once."""
        defaults = {f.name: f.default for f in dataclasses.fields(Settings)}
        runs: dict[tuple, Fields] = {}
        for name in (name for stage in stages for name in stage):
            for condition in SUITES[name].plan(self.scale, Unknown(self.scale)):
                settings = tuple(sorted((k, str(v)) for k, v in {**defaults, **condition.fields}.items()))
                runs |= {(settings, seed): condition.fields for seed in self.seeds(name)}
        tokens = [self.chosen.tokens or fields["tokens"] for fields in runs.values()]
        seconds = sum(run_seconds(fields, budget) for fields, budget in zip(runs.values(), tokens, strict=True))
        return LaterStages(len(runs), sum(tokens), seconds)

    def stages(self) -> list[list[str]]:
        return with_needs(self.chosen.suites())


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag[2:]]
    return [flag, *map(str, value)] if isinstance(value, tuple) else [flag, str(value)]


def unique(planned: Sequence[Planned]) -> list[Job]:
    """Each run of a suite once, seed by seed, so that a machine that slows down does so for all conditions."""
    by_seed = zip(*(p.jobs for p in planned), strict=True)
    return list({job.name: job for jobs in by_seed for job in jobs}.values())


@dataclass(frozen=True)
class Unknown:
    """`suite.Winners` before any run."""

    scale: Scale

    def __call__(self, suite: str, arm: str) -> Fields:
        return UnknownRates()

    def seconds_per_token(self, suite: str, conditions: Sequence[Condition]) -> dict[str, float]:
        """Of every arm another, so that equal time is not taken for equal tokens."""
        return {arm: 1 / (1 + 0.1 * i) for i, arm in enumerate(dict.fromkeys(c.arm for c in conditions))}


class UnknownRates(dict[str, Any]):
    """Replaces the settings that a sweep has yet to find, when only the names of conditions matter."""

    def __missing__(self, key: str) -> float:
        return 1.0
